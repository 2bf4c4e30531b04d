"""The command line, as real processes: exit codes, one-line errors, killed and interrupted runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from notebooks import printed, write_experiment

from lagm import cli

LAGM = [sys.executable, "-c", "import sys; from lagm.cli import main; sys.exit(main())"]
STAGES = """\
from pathlib import Path
import os, time
out = Path(out_dir)
(out / "kernel.pid").write_text(str(os.getpid()))
if not (out / "stage1.txt").exists(): (out / "stage1.txt").write_text(f"by {os.getpid()}")
print("stage 1", (out / "stage1.txt").read_text())"""
WAIT = """\
print("stage 2 starts")
(out / "waiting").touch()
while (out / "hold").exists(): time.sleep(0.05)
(out / "metrics.json").write_text('{"summary": ["all is well", "really"]}')"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A little checkout with one experiment of two stages, as the current folder."""
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "nbs" / "experiments" / "10_toy.ipynb", STAGES, WAIT, "print('end of k', k)")
    return tmp_path


def hear_interrupts() -> None:
    """Undo what a shell does to jobs in its background: there Ctrl-C is ignored, by them and by all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_and_wait(out: Path) -> tuple[subprocess.Popen, int]:
    """Start the experiment and wait until its second stage runs; the process and its kernel's number."""
    out.mkdir(parents=True)
    (out / "hold").touch()
    process = subprocess.Popen([*LAGM, "run", "toy", "-p", "k", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, preexec_fn=hear_interrupts)
    deadline = time.monotonic() + 120
    while not (out / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process, int((out / "kernel.pid").read_text())


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try: return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_run_can_be_read_and_goes_on(checkout, capsys):
    out = checkout / "outputs" / "toy"
    process, kernel = start_and_wait(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    notebook = nbformat.read(out / "toy.ipynb", 4)
    assert printed(out / "toy.ipynb").startswith(f"stage 1 by {kernel}\n"), "the finished cell must be on disk"
    assert not notebook.metadata.get("lagm", {}).get("finished") and not (out / "metrics.json").exists()
    deadline = time.monotonic() + 20
    while alive(kernel):
        assert time.monotonic() < deadline, "the notebook's process outlived the run"
        time.sleep(0.1)

    (out / "hold").unlink()
    assert cli.main(["run", "toy", "-p", "k", "3"]) == 0
    said = capsys.readouterr().out
    assert printed(out / "toy.ipynb") == f"stage 1 by {kernel}\nstage 2 starts\nend of k 3\n", (
        "stage 1 must not be repeated"
    )
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [], "leftovers of the killed run must go"
    assert [word in said for word in ("toy.ipynb", "metrics.json", "all is well\nreally", "end of k 3")] == [True] * 4
    before = (out / "toy.ipynb").read_bytes()
    assert cli.main(["run", "toy", "-p", "k", "3"]) == 0
    said = capsys.readouterr().out
    assert "kept" in said and "all is well" in said
    assert (out / "toy.ipynb").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_an_interrupted_run_is_not_finished(checkout):
    out = checkout / "outputs" / "toy"
    process, _ = start_and_wait(out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on from what is saved" in errors and "Traceback" not in errors
    assert not nbformat.read(out / "toy.ipynb", 4).metadata.lagm.finished
    assert printed(out / "toy.ipynb").startswith("stage 1 by")


def test_two_runs_at_once_in_one_folder(checkout):
    runs = [subprocess.Popen([*LAGM, "run", "toy", "-p", "k", str(k), "-o", f"results/{k}"], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for k in (4, 5)]
    for k, run in zip((4, 5), runs):
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said
        assert printed(checkout / "results" / str(k) / "toy.ipynb").endswith(f"end of k {k}\n")
    assert sorted(os.listdir(checkout)) == ["nbs", "results"], "nothing may be left in the current folder"


@pytest.mark.parametrize(("words", "message"), [
    (["run", "toy", "-p", "kk", "3"], "there is no parameter 'kk', did you mean 'k'?"),
    (["run", "toy", "-p", "k", "three"], "k = 'three' is not int"),
    (["run", "tony"], "there is no experiment 'tony', did you mean 'toy'?"),
    (["run", "missing.ipynb"], "no such notebook: missing.ipynb"),
    (["run", "toy", "-f", "missing.yaml"], "cannot read the parameter file missing.yaml"),
    (["run", "toy", "-o", "file/below"], "cannot write to the output folder file"),
])
def test_wrong_calls_are_one_line_and_code_2(checkout, capsys, words, message):
    (checkout / "file").write_text("")
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("lagm: error: ") and message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert sorted(os.listdir(checkout)) == ["file", "nbs"]


def test_wrong_words_are_code_2(checkout, capsys):
    for words in ([], ["walk"], ["run", "toy", "-p", "k"], ["run", "toy", "--parameter=k"]):
        with pytest.raises(SystemExit) as caught: cli.main(words)
        assert caught.value.code == 2 and "lagm" in capsys.readouterr().err


def test_a_failing_cell_is_one_line_and_code_1(checkout, capsys):
    write_experiment(checkout / "nbs" / "experiments" / "10_toy.ipynb",
                     "raise RuntimeError('first line\\nsecond line')")
    assert cli.main(["run", "toy"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(
            "lagm: error: cell [4] of outputs/toy/toy.ipynb failed: RuntimeError: first line; ".replace("/", os.sep)
        )
        and error.count("\n") == 1
    )


def test_values_of_the_command_line_win_over_files(checkout, capsys):
    write_experiment(checkout / "nbs" / "experiments" / "10_toy.ipynb",
                     "import json\nprint(json.dumps([k, rate, recipe, widths]))")
    (checkout / "a.yaml").write_text("k: 5\nrate: 1e-2\nwidths: [1]\n")
    (checkout / "b.yaml").write_text("recipe: paper\nwidths: [2]\n")
    assert cli.main(["run", "toy", "-f", "a.yaml", "-f", "b.yaml", "-p", "k", "6", "-p", "k", "7"]) == 0
    assert json.loads(printed(checkout / "outputs" / "toy" / "toy.ipynb")) == [7, 0.01, "paper", [2]]
    assert f"figures   {Path('outputs/toy')}" not in capsys.readouterr().out
    (checkout / "outputs" / "toy" / "b.png").touch()
    (checkout / "outputs" / "toy" / "a.png").touch()
    described = cli.describe_results(Path("outputs/toy/toy.ipynb")).splitlines()
    assert [line.split()[-1].split(os.sep)[-1] for line in described] == ["toy.ipynb", "a.png", "b.png"]


def test_the_file_beside_an_experiment_gives_its_size(checkout, capsys):
    write_experiment(checkout / "nbs" / "experiments" / "10_toy.ipynb",
                     "import json\nprint(json.dumps([k, rate, recipe]))")
    (checkout / "nbs" / "experiments" / "10_toy.yaml").write_text("k: 5\nrate: 0.5\n")
    assert cli.main(["run", "toy", "-p", "k", "6"]) == 0
    assert json.loads(printed(checkout / "outputs" / "toy" / "toy.ipynb")) == [6, 0.5, "fast"]
    assert cli.main(["run", "toy", "--small", "-p", "k", "6"]) == 0
    assert json.loads(printed(checkout / "outputs" / "toy-small" / "toy.ipynb")) == [6, 1e-3, "fast"]


def test_list_and_help_and_version(checkout, capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == "toy  Does little.\n"
    for words in (["--help"], ["run", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught: cli.main(words)
        assert caught.value.code == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("lagm ")


@pytest.mark.parametrize("words", [["--help"], ["list"], ["show", "celeba_10"], ["show", "demo_k2"], ["doctor"],
                                   ["doctor", "cgpart_car"], ["run", "quickstart", "--dry-run"],
                                   ["run", "demo_k2", "demo_micah_k2", "--dry-run"]])
def test_first_commands_do_not_load_torch(words, tmp_path):
    code = ("import sys, lagm.cli\ntry: print('it ends with', lagm.cli.main(sys.argv[1:]))\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("False") and "it ends with 2" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("asked", ["", "OMP_NUM_THREADS=1", "OMP_NUM_THREADS=2,3", "OMP_NUM_THREADS=junk",
                                   "OMP_NUM_THREADS=64", "MKL_NUM_THREADS=1", "MKL_NUM_THREADS=3 MKL_DYNAMIC=FALSE"])
def test_what_is_said_of_torch_before_it_is_loaded_is_true(asked):
    """Its version with the build, its threads, its GPUs: a run's process does not load it to write a record."""
    code = ("import json, sys\nfrom lagm.core.origins import _DRIVERS, provenance\n"
            "from lagm.core.threads import usual_threads\nfrom pathlib import Path\n"
            "def facts(): p = provenance(); return [p['versions']['torch'], p['hardware'], usual_threads()]\n"
            "before, loaded = facts(), 'torch' in sys.modules\n"
            "may = sys.platform == 'linux' and not any(Path(driver).exists() for driver in _DRIVERS)\n"
            "import torch\n"
            "print(json.dumps([before, facts(), loaded, may, torch.backends.mkl.is_available(),\n"
            "                  torch.get_num_threads(), str(torch.__version__)]))")
    own = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DYNAMIC")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= dict(pair.split("=") for pair in asked.split())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    before, after, loaded, may, mkl, threads, version = json.loads(done.stdout.splitlines()[-1])
    assert before[0] == after[0] == version and loaded != may, done.stderr
    if mkl or not asked: assert before == after and before[2] == before[1]["threads"] == threads


def test_no_experiments_is_said(tmp_path, monkeypatch, capsys):
    from lagm.experiments import notebooks as experiments
    monkeypatch.setattr(experiments.importlib.resources, "files", lambda name: tmp_path / "lagm")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list"]) == 2
    assert "no experiments found" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["p", "-p", "threads", "1"], "p is a project: -p would do nothing there; leave it out, or change p/project.yaml"),
    (["p", "--seeds", "1", "--small"], "p is a project: --seeds, --small would do nothing there"),
    (["toy", "--folds", "3"], "toy is a single notebook: --folds would do nothing there"),
    (["toy", "--jobs", "2", "--only"], "toy is a single notebook: --only, --jobs would do nothing there"),
    (["celeba_10", "--folds", "3", "--dry-run"], "these are experiments: --folds would do nothing there"),
])
def test_options_that_would_do_nothing_are_told(checkout, capsys, words, said):
    (checkout / "p").mkdir()
    (checkout / "p" / "project.yaml").write_text("")
    assert cli.main(["run", *words]) == 2
    assert said in capsys.readouterr().err and not (checkout / "outputs").exists()


def test_a_notebook_once_for_each_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = tmp_path / "nbs" / "experiments" / "seeded.ipynb"
    write_experiment(notebook, "from pathlib import Path",
                     "Path(out_dir, 'metrics.json').write_text('{\"summary\": [\"seed %d\"]}' % seed)",
                     parameters="seed: int = 0\nout_dir: str = ''")
    assert cli.main(["run", "seeded", "--seeds", "3", "5"]) == 0
    assert "seed 3" in (said := capsys.readouterr().out) and "seed 5" in said
    records = {path.parent.name: path.read_text() for path in (tmp_path / "outputs").glob("*/metrics.json")}
    assert {name: json.loads(text)["summary"] for name, text in records.items()} == {
        "seeded-seed3": ["seed 3"], "seeded-seed5": ["seed 5"]}
    assert cli.main(["run", "seeded", "--seeds", "7", "-o", "here"]) == 0
    assert (tmp_path / "here" / "metrics.json").is_file()


TINY = """\
k: int = 2  # how many, 0 to 9
networks: str = ""  # of another run
numbers: dict = {}  # by name
wait: bool = False  # until the file hold is gone
seed: int = 0  # of all that is random
out_dir: str = ""  # folder"""
CHECK = """\
check_injected(globals())
if not 0 <= k <= 9: raise InputError(f"k is {k}: give 0 to 9")
out = Path(out_dir or ".")"""
WORK = """\
out.mkdir(parents=True, exist_ok=True)
(out / "metrics.json").write_text(json.dumps({"summary": [f"k {k}, GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}"]}))
if wait: (out / "waiting").touch()
while wait and Path("hold").exists(): time.sleep(0.05)"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A checkout with the notebook tiny and three experiments of it: a, b, and c, which reads what a leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = tmp_path / "nbs" / "experiments"
    head = ("import json, os, time\nfrom pathlib import Path\nfrom lagm.core.errors import InputError\n"
            "from lagm.experiments.notebooks import check_injected")
    write_experiment(folder / "tiny.ipynb", CHECK, WORK, parameters=TINY, types=head)
    (folder / "tiny").mkdir()
    for name, more in dict(a="k: 1", b="k: 2", c="networks: outputs/a/tiny/metrics.json").items():
        (folder / "tiny" / f"{name}.yaml").write_text(f"# Tiny {name}\n{more}\nout_dir: outputs/{name}/tiny\n")
    return tmp_path


def test_one_experiment_gets_its_gpu_too(stages):
    assert cli.main(["run", "a", "--devices", "7"]) == 0
    assert json.loads((stages / "outputs/a/tiny/metrics.json").read_text())["summary"] == ["k 1, GPU 7"]


def test_paths_are_right_from_another_folder(stages, monkeypatch, capsys):
    (stages / "deep").mkdir()
    monkeypatch.chdir(stages / "deep")
    assert cli.main(["run", "a", "--dry-run"]) == 0 and "../outputs/a/tiny" in capsys.readouterr().out
    assert cli.main(["run", "a"]) == 0
    said = capsys.readouterr().out
    assert "notebook  ../outputs/a/tiny/tiny.ipynb" in said and "k 1, GPU None" in said
    assert cli.main(["show", "a"]) == 0 and "../outputs/a/tiny (finished)" in capsys.readouterr().out
    assert cli.main(["run", "b", "-o", "here"]) == 0 and cli.main(["run", "tiny", "-o", "there"]) == 0
    assert (stages / "deep/here/tiny/metrics.json").is_file() and (stages / "deep/there/tiny.ipynb").is_file()


def test_a_small_run_of_a_single_notebook_has_a_folder_of_its_own(stages, capsys):
    assert cli.main(["run", "tiny", "-p", "k", "3"]) == 0 and cli.main(["run", "tiny", "--small", "-p", "k", "4"]) == 0
    assert "k 3" in (stages / "outputs/tiny/metrics.json").read_text()
    assert "k 4" in (stages / "outputs/tiny-small/metrics.json").read_text()
    capsys.readouterr()
    assert cli.main(["run", "tiny", "--small", "--seeds", "3", "--dry-run"]) == 0
    assert "outputs/tiny-small-seed3" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["a", "b", "-p", "out_dir", "elsewhere"], "where results go is said by -o FOLDER"),
    (["a", "-p", "k", "1000", "--dry-run"], "k is 1000: give 0 to 9"),
    (["a", "-p", "numbers", "[1]", "--dry-run"], "numbers = '[1]' is not dict"),
    (["a", "--seeds", "1", "-p", "seed", "3"], "seed is given twice, by --seeds and as 3"),
    (["c", "--only", "--dry-run"], "there is no outputs/a/tiny/metrics.json"),
    (["a", "c", "-p", "k", "1000", "--dry-run"], "2 of 2 runs cannot start"),
    (["tiny", "-p", "k", "1000", "--dry-run"], "k is 1000: give 0 to 9"),
    (["tiny", "-p", "networks", "outputs/none", "--dry-run"], "there is no outputs/none"),
    (["tiny", "-p", "out_dir", "elsewhere"], "where results go is said by -o FOLDER"),
    (["tiny", "--seeds", "1", "-p", "seed", "3"], "seed is given twice, by --seeds and as 3"),
    (["a", "nbs/experiments/tiny.ipynb"], "is a single notebook: it runs alone"),
    (["alone", "a"], "alone is a single notebook: it runs alone, lagm run alone")])
def test_what_a_plan_refuses(stages, capsys, words, message):
    write_experiment(stages / "nbs" / "experiments" / "alone.ipynb")
    assert cli.main(["run", *words]) == 2 and message in capsys.readouterr().err
    assert not (stages / "outputs").exists()


def test_out_dir_of_a_file_is_where_all_of_it_goes(stages, capsys):
    (stages / "mine.yaml").write_text("k: 3\nout_dir: mine\n")
    assert cli.main(["run", "tiny", "-f", "mine.yaml"]) == 0
    assert "k 3" in (stages / "mine/metrics.json").read_text() and "mine/metrics.json" in capsys.readouterr().out
    assert not (stages / "outputs").exists()
    (stages / "mine.yaml").write_text("out_dir: 5\n")
    assert cli.main(["run", "tiny", "-f", "mine.yaml"]) == 2 and "out_dir = 5 is not str" in capsys.readouterr().err


def test_a_folder_on_another_disk_stays_finished(stages, capsys):
    (stages / "disk").mkdir()
    (stages / "outputs").symlink_to(stages / "disk", target_is_directory=True)
    for folder in ("outputs/run", "./near"):
        assert cli.main(["run", "a", "-o", folder]) == 0
        capsys.readouterr()
        assert cli.main(["run", "a", "-o", folder, "--dry-run"]) == 0 and "finished" in capsys.readouterr().out


def test_a_plan_tells_whole_sentences(stages, monkeypatch):
    from lagm.experiments.catalogue import read_catalogue
    from lagm.experiments.sweep import Step, describe_steps

    one, other = list(read_catalogue(stages).values())[:2]
    text = describe_steps({"one": Step(one, "blocked", "no faces; get them there\nno cars"),
                           "other": Step(other, "blocked", "no cars\nno horses; get them there")})
    assert text.splitlines()[:2] == ["one    blocked   no faces; get them there; no cars",
                                     "other  blocked   no horses; get them there; the same as one"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_run_over_a_finished_one_leaves_no_copy_and_loses_nothing(stages, capsys):
    folder = stages / "outputs" / "a" / "tiny"
    assert cli.main(["run", "a", "-p", "k", "7"]) == 0
    (stages / "hold").touch()
    process = subprocess.Popen([*LAGM, "run", "a", "-p", "k", "5", "-p", "wait", "true"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    (stages / "hold").unlink()
    assert "k 5" in (folder / "metrics.json").read_text() and (folder / ".tiny.before").is_dir()
    deadline = time.monotonic() + 20
    while cli.main(["run", "a", "-p", "k", "77"]) == 2 and "another process" in capsys.readouterr().err:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "k 7," in (folder / "metrics.json").read_text(), "a refused run puts back what the killed one replaced"
    assert not (folder / ".tiny.before").exists()
    assert cli.main(["run", "a", "-p", "k", "8"]) == 0 and not (folder / ".tiny.before").exists()
