"""Sweeps with real processes: order, failures, changes, kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nursery
import pytest
from notebooks import write_experiment

from lagm import cli
from lagm.core.errors import InputError
from lagm.experiments import sweep as sweeps
from lagm.experiments.catalogue import Run, read_catalogue
from lagm.experiments.sweep import Sweep, describe_steps, execute, last_error, plan_steps
from lagm.training.checkpoints import folder_lock

ANNOTATE = """\
from pathlib import Path
import os, time
out = Path(out_dir)
with open(out / "runs.txt", "a") as file: file.write("x")
(out / "pid").write_text(str(os.getpid()))
while (out / "hold").exists(): time.sleep(0.02)
if k == 13: raise KeyError("unlucky")
(out / "metrics.json").write_text(str(k % 10))"""
EVALUATE = """\
from pathlib import Path
with open(Path(out_dir, "runs.txt"), "a") as file: file.write("x")
Path(out_dir, "metrics.json").write_text('"from ' + Path(networks, "metrics.json").read_text() + '"')"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nbs" / "experiments"
    write_experiment(folder / "annotate.ipynb", ANNOTATE,
                     parameters='k: int = 2  # labels\ndevice: str = "auto"  # where\nout_dir: str = "."  # results')
    write_experiment(folder / "evaluate.ipynb", EVALUATE,
                     parameters='networks: str = ""  # of annotate\nout_dir: str = "."  # results')
    put(tmp_path, "a", 2), put(tmp_path, "b", 13)
    monkeypatch.setattr(sweeps, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": nursery.start}))
    return tmp_path


def put(project, name, k):
    """Write, or change, an experiment."""
    for stage, text in {"annotate": f"k: {k}", "evaluate": f"networks: outputs/{name}/annotate"}.items():
        folder = project / "nbs" / "experiments" / stage
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(f"{text}\nout_dir: outputs/{name}/{stage}\n")


def times(project, *names):
    """How often runs were really done."""
    return [len((project / "outputs" / name / "runs.txt").read_text()) for name in names]


def states(steps): return [step.state for step in steps.values()]


def sweep(project, **options): return Sweep(read_catalogue(project), project, say=lambda line: None, **options).run()


def test_a_sweep_from_the_first_failure_to_the_last_change(project):
    assert states(plan_steps(read_catalogue(project), project)) == ["to do"] * 4
    steps = sweep(project, jobs=2)
    assert states(steps) == ["done", "done", "failed", "blocked"]
    assert "KeyError: 'unlucky'" in steps["b/annotate"].why and steps["b/evaluate"].why == "it needs b/annotate"
    assert ((project / "outputs/a/evaluate/metrics.json").read_text() == '"from 2"'
            and "2 done, 1 failed, 1 blocked" in describe_steps(steps))
    assert "unlucky" in (project / "outputs/b/annotate/annotate.ipynb").read_text(), (
        "the notebook of a failed run must stay"
    )

    put(project, "b", 3)  # the cause removed
    put(project, "a", 12)  # another parameter, but the same result: what depends on it stays
    assert (states(sweep(project)) == ["done", "finished", "done", "done"]
            and times(project, "a/annotate", "a/evaluate", "b/annotate", "b/evaluate") == [2, 1, 2, 1])
    runs = read_catalogue(project)
    assert (states(plan_steps(runs, project)) == ["finished"] * 4
            and states(plan_steps(runs, project, force=["a/evaluate"]))
            == ["finished", "to do", "finished", "finished"])


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_sweep_goes_on_and_leaves_no_process(project):
    (project / "outputs/a/annotate").mkdir(parents=True)
    (project / "outputs/a/annotate/hold").touch()
    words = [sys.executable, "-c", "import sys; from lagm.cli import main; sys.exit(main())", "run", "--all"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    pid = project / "outputs/a/annotate/pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kernel = int(pid.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 120
    while alive(kernel):
        assert time.monotonic() < deadline, "what the sweep had started outlived it"
        time.sleep(0.1)
    assert not (project / "outputs/a/annotate/metrics.json").exists()
    (project / "outputs/a/annotate/hold").unlink()
    assert states(sweep(project)) == ["done", "done", "failed", "blocked"]


def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().split(")")[-1].split()[0] != "Z"
    except OSError: return False


def test_one_process_in_a_folder(project):
    run = read_catalogue(project)["a/annotate"]
    with folder_lock(run.folder), pytest.raises(InputError, match="another process is working in"):
        execute(run, project)
    with folder_lock(run.folder): pass


def test_the_device_is_not_a_reason_to_repeat(project, capsys):
    assert cli.main(["run", "a/annotate", "-p", "device", "cpu"]) == 0
    assert cli.main(["run", "a"]) == 0
    assert (times(project, "a/annotate", "a/evaluate") == [1, 1]
            and "kept outputs/a/annotate/annotate.ipynb".replace("/", os.sep) in capsys.readouterr().out)


def test_commands(project, capsys):
    assert cli.main(["list"]) == 0 and "a " in capsys.readouterr().out
    assert cli.main(["list", "--stages"]) == 0 and "b/evaluate" in capsys.readouterr().out
    assert cli.main(["show", "a"]) == 0
    said = capsys.readouterr().out
    assert "a/evaluate" in said and "* k = 2" in said and "needs     a/annotate" in said
    assert cli.main(["run", "a", "b", "--dry-run"]) == 0 and "4 to do" in capsys.readouterr().out
    assert not (project / "outputs").exists()
    assert cli.main(["run", "a", "--seeds", "1"]) == 2 and "there is no parameter 'seed'" in capsys.readouterr().err
    assert (cli.main(["run", "a", "--dry-run", "-p", "k", "7", "-o", "elsewhere"]) == 0
            and "elsewhere/evaluate" in capsys.readouterr().out)
    assert cli.main(["run"]) == 2 and cli.main(["run", "a", "--all"]) == 2
    capsys.readouterr()
    assert cli.main(["run", "aa"]) == 2 and "there is no experiment 'aa', did you mean 'a'" in capsys.readouterr().err


def test_a_missing_file_stops_before_the_start(project, capsys):
    (project / "nbs/experiments/evaluate/c.yaml").write_text("networks: checkpoints/none.bin\nout_dir: "
                                                             "outputs/c/evaluate\n")
    for words in (["run", "c"], ["run", "c", "--dry-run"]):
        assert cli.main(words) == 2 and "there is no checkpoints/none.bin" in capsys.readouterr().err
    assert not (project / "outputs/c").exists()


def test_a_plan_looks_at_each_run_once(tmp_path, monkeypatch):
    """Twice as many runs, twice as much work, though each of them lacks a file that another one might make."""
    looks, folder = [], Run.folder
    monkeypatch.setattr(Run, "folder", property(lambda run: looks.append(run) or folder.fget(run)))

    def planned(number):
        runs = {f"r{i}": Run(f"r{i}", "", tmp_path / "toy.ipynb", {"generator": f"made/{i}/g.pkl"},
                             Path(f"out/{i}/toy.ipynb")) for i in range(number)}
        looks.clear()
        assert {step.state for step in plan_steps(runs, tmp_path).values()} == {"blocked"}
        return len(looks)

    assert planned(80) == 2 * planned(40)
    maker = Run("maker", "", tmp_path / "toy.ipynb", {}, Path("made/0/toy.ipynb"))
    reader = Run("reader", "", tmp_path / "toy.ipynb", {"generator": "made/0/deep/g.pkl"}, Path("out/toy.ipynb"))
    assert [step.state for step in plan_steps({"maker": maker, "reader": reader}, tmp_path).values()] == ["to do"] * 2


def test_the_last_error_of_a_log(tmp_path):
    (tmp_path / "log").write_text("a\nlagm: error: x went wrong\nb\n\n")
    assert last_error(tmp_path / "log") == "x went wrong" and last_error(tmp_path / "none") == ""
    (tmp_path / "mixed").write_text("library: a leak, see x.htmllagm: error: y\nlibrary: another\n")
    assert last_error(tmp_path / "mixed") == "y"
    (tmp_path / "raised").write_text("Traceback (most recent call last):\n  ...\nKeyError: 'x'\nlibrary: a leak\n")
    assert last_error(tmp_path / "raised") == "KeyError: 'x'"  # not what a library says when it is unloaded


def test_snakemake_reads_the_same_graph(project):
    pytest.importorskip("snakemake")
    from sync import ROOT
    words = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "nbs" / "Snakefile")]
    for expected in (2, 0):  # a second time nothing is done
        done = subprocess.run([*words, "-c1", "a"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stderr.count("Finished jobid") == (expected + 1 if expected else 0)
                or "Nothing to be done" in done.stderr)
    assert ((project / "outputs/a/evaluate/metrics.json").read_text() == '"from 2"'
            and times(project, "a/annotate", "a/evaluate") == [1, 1])
    failed = subprocess.run([*words, "-c1", "b"], capture_output=True, text=True)
    assert (failed.returncode and "unlucky" in (project / "outputs/b/annotate/annotate.ipynb").read_text()
            and "unlucky" in (project / "outputs/b/annotate/run.log").read_text())


def test_snakemake_where_machines_share_no_folder(project, tmp_path, monkeypatch):
    """Stamps and logs where Snakemake is, everything else in the project, wherever that is."""
    pytest.importorskip("snakemake")
    from sync import ROOT
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "nbs" / "Snakefile"), "-c1", "a", "--config",
             f"project={project}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (times(project, "a/annotate", "a/evaluate") == [1, 1]
            and (project / "outputs/a/evaluate/metrics.json").read_text() == '"from 2"')
    assert {path.name for path in elsewhere.rglob("*")
            if path.is_file() and ".snakemake" not in path.parts} == {".done", "run.log"}
    assert "Nothing to be done" in subprocess.run(words, capture_output=True, text=True).stderr
    parameters = project / "nbs/experiments/evaluate/a.yaml"
    parameters.write_text(parameters.read_text() + "# {changed}\n")
    assert subprocess.run(words, capture_output=True, text=True).stderr.count("Finished jobid") == 2
