"""Inputs are known by what they hold, a refused run changes nothing, two runs cannot be in one folder, and nothing is
lost to --force.
"""

import json
import os
import subprocess
import sys
import time
import warnings

import nbformat
import pytest
import test_training as training_tests
from notebooks import printed, write_experiment
from sync import ROOT
from templates import run_cells
from tiny import tiny_generator, tiny_pictures, tiny_segmenter
from torch.utils.data import TensorDataset

from lagm import cli
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors, save_tensors
from lagm.data.labels import CELEBA8
from lagm.experiments import notebooks as experiments
from lagm.experiments.notebooks import describe_inputs, inputs_unchanged, is_finished, unfinished_copy
from lagm.experiments.running import RunError, run_notebook
from lagm.experiments.stages import _check_size, start_stage
from lagm.models.annotator import FPNAnnotator
from lagm.training.checkpoints import Checkpoints, checkpoint_lock, folder_lock, set_aside
from lagm.training.downstream import DownstreamRecipe, train_downstream
from lagm.training.recipe import get_recipe
from lagm.training.shards import generate
from lagm.training.synthetic import Plan

PARAMETERS = """\
dataset: str = "avatars:big-ears"  # pictures
data: str = "data"  # their folder
generator: str = ""  # a file
networks: str = ""  # of another run
outputs: str = ""  # results
k: int = 2  # how many
out_dir: str = "."  # results"""
WORK = """\
class InputError(ValueError): pass
from pathlib import Path
from lagm.training.checkpoints import set_aside
if k == 40: set_aside([Path(out_dir) / "state.safetensors", Path(out_dir) / "pairs"])
(Path(out_dir) / "state.safetensors").unlink(missing_ok=True)
(Path(out_dir) / "state.safetensors").write_text(f"state of {k}")
(Path(out_dir) / "curves.png").write_text(f"curves of {k}")
(Path(out_dir) / "pairs").mkdir(exist_ok=True)
(Path(out_dir) / "pairs" / "list.txt").write_text(f"pairs of {k}")
if k == 40: raise InputError("k is 40; give 1 to 30")
if k == 41: raise KeyError("lost")
(Path(out_dir) / "metrics.json").write_text(str(k))"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_SUMS", {})
    return write_experiment(tmp_path / "nbs" / "experiments" / "toy.ipynb", WORK, parameters=PARAMETERS)


def put(path, content, age=0):
    """Write a file whose date is so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)


def unchanged(values, record): return inputs_unchanged(record, values)


# ---- what a run reads


FLOWERS = {"dataset": "folder", "data": "flowers"}


@pytest.mark.parametrize("spoil", [
    lambda masks: [put(mask, b"new", age=10_000) for mask in masks.iterdir()],  # as many bytes, an older date
    lambda masks: put(masks / "0.png", b"new"), lambda masks: (masks / "1.png").rename(masks / "9.png"),
    lambda masks: (masks / "1.png").unlink(),
    lambda masks: put(masks / "deep" / "er.png", b"more"), lambda masks: put(masks.parent / "classes.txt", b"x"),
], ids=["all, older", "one", "renamed", "gone", "added below", "added beside"])
@pytest.mark.parametrize("settled", [True, False])
def test_a_folder_is_known_by_what_it_holds(toy, tmp_path, monkeypatch, spoil, settled):
    if settled: monkeypatch.setattr(experiments.time, "time", lambda: 4e9)  # all was written long ago
    for i in range(3): put(tmp_path / "flowers" / "masks" / f"{i}.png", b"old")
    record = describe_inputs(FLOWERS)
    assert (record["data"]["folder"] == "flowers" and record["data"]["files"] == 3 and record["data"]["bytes"] == 9
            and ("marks" in record["data"]) == (settled and os.name == "posix"))
    put(tmp_path / "flowers" / "masks" / "0.png", b"old", age=500)
    put(tmp_path / "flowers" / ".DS_Store", b"hidden")
    assert unchanged(FLOWERS, record), "written anew with the same content"
    spoil(tmp_path / "flowers" / "masks")
    assert not unchanged(FLOWERS, record)


def test_an_untouched_folder_is_not_read_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.time, "time", lambda: 4e9)
    for i in range(3): put(tmp_path / "flowers" / f"{i}.png", b"old")
    record = json.loads(json.dumps(describe_inputs(FLOWERS)))
    experiments._SUMS.clear()
    monkeypatch.setattr(experiments, "checksum", lambda path: pytest.fail("read again"))
    assert unchanged(FLOWERS, record)


@pytest.mark.parametrize("where", ["{0}", "./{0}", "{1}/{0}", "linked"])
def test_files_are_inputs_with_a_slash_or_without(toy, tmp_path, where):
    put(tmp_path / "gan.pt", b"weights")
    (tmp_path / "linked").symlink_to(tmp_path / "gan.pt")
    values = {"generator": where.format("gan.pt", tmp_path)}
    record = describe_inputs(values)
    assert record["generator"]["bytes"] == 7
    put(tmp_path / "gan.pt", b"Weights", age=100_000)
    assert not unchanged(values, record)
    (tmp_path / "gan.pt").unlink()
    assert not unchanged(values, record)


def test_links_in_a_folder_are_followed_and_circles_end(toy, tmp_path):
    put(tmp_path / "elsewhere" / "a.png", b"a")
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "flowers" / "again").symlink_to(tmp_path / "flowers")
    (tmp_path / "flowers" / "nowhere").symlink_to(tmp_path / "gone")
    if hasattr(os, "mkfifo"): os.mkfifo(tmp_path / "flowers" / "pipe")  # reading it would never end
    record = describe_inputs(FLOWERS)
    assert record["data"]["files"] == 1
    put(tmp_path / "elsewhere" / "a.png", b"b")
    assert not unchanged(FLOWERS, record)


def test_of_the_data_only_the_named_sets_count(toy, tmp_path):
    put(tmp_path / "data" / "CelebAMask-HQ" / "a.jpg", b"a")
    put(tmp_path / "data" / "PascalPart" / "horse" / "a.png", b"a")
    both = {"dataset": "celeba", "data": "data", "validation_dataset": "pascal:horse"}
    assert describe_inputs({"dataset": "avatars:micah", "data": "data"}) == {}
    assert (describe_inputs({"dataset": "celeba", "data": "data"})["data"]["files"] == 1
            and describe_inputs(both)["data"]["files"] == 2)
    record = describe_inputs({"dataset": "celeba", "data": "data"})
    put(tmp_path / "data" / "PascalPart" / "horse" / "a.png", b"b")
    assert unchanged({"dataset": "celeba", "data": "data"}, record)
    put(tmp_path / "data" / "CelebAMask-HQ" / "a.jpg", b"b")
    assert not unchanged({"dataset": "celeba", "data": "data"}, record)


def test_results_of_other_runs_below_the_pictures_are_no_part_of_them(toy, tmp_path):
    here = {"dataset": "folder", "data": "."}
    put(tmp_path / "masks" / "a.png", b"a")
    record = describe_inputs(here, own="results/mine")
    put(tmp_path / "outputs" / "x" / "metrics.json", b"{}")
    put(tmp_path / "results" / "mine" / "metrics.json", b"{}")
    assert inputs_unchanged(record, here, own="results/mine")


def test_replaced_networks_of_another_run_count(toy, tmp_path):
    for name in ("metrics.json", "results.safetensors", "run.log"): put(tmp_path / "outputs" / "a" / name, b"1")
    for name in ("epoch-001.safetensors",): put(tmp_path / "outputs" / "a" / "segmenters" / name, b"1")
    for path, change, same in (("outputs/a", "run.log", True), ("outputs/a", "results.safetensors", False),
                               ("outputs/a", "metrics.json", False),
                               ("outputs/a/segmenters", "segmenters/epoch-001.safetensors", False)):
        record = describe_inputs({"networks": path})
        before = (tmp_path / "outputs" / "a" / change).read_bytes()
        put(tmp_path / "outputs" / "a" / change, bytes([before[0] + 1]), age=1000)
        assert unchanged({"networks": path}, record) == same, (path, change)


def test_older_records_are_understood(toy, tmp_path):
    """As they were written before: of a folder, the metrics.json in it or beside it."""
    put(tmp_path / "outputs" / "a" / "metrics.json", b"1")
    put(tmp_path / "outputs" / "a" / "segmenters" / "epoch-001.safetensors", b"1")
    old = {"networks": {"file": "metrics.json", "bytes": 1,
                        "sha256": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"}}
    for path in ("outputs/a", "outputs/a/segmenters", "outputs/a/metrics.json"):
        assert unchanged({"networks": path}, old)
    put(tmp_path / "outputs" / "a" / "metrics.json", b"2", age=9999)
    for path in ("outputs/a", "outputs/a/segmenters", "outputs/a/metrics.json"):
        assert not unchanged({"networks": path}, old)


def test_a_run_is_repeated_when_its_folder_changes_and_the_report_always(toy, tmp_path, capsys):
    put(tmp_path / "flowers" / "masks" / "a.png", b"old")
    words = ["run", "toy", "-p", "dataset", "folder", "-p", "data", "flowers"]
    assert cli.main(words) == 0 and cli.main(words) == 0 and "kept" in capsys.readouterr().out
    record = nbformat.read("outputs/toy/toy.ipynb", 4).metadata.lagm
    assert record.inputs.data.files == 1 and str(tmp_path) not in json.dumps(record)
    put(tmp_path / "flowers" / "masks" / "a.png", b"new", age=10_000)
    assert cli.main([*words, "--dry-run"]) == 0 and "to do" in capsys.readouterr().out
    assert not is_finished(toy, "outputs/toy/toy.ipynb",
                           {"outputs": "outputs"}), "what reads all results has always something new"
    text = (tmp_path / "outputs/toy/toy.ipynb").read_text()
    (tmp_path / "outputs/toy/toy.ipynb").write_text(text.replace('"dataset": "folder"', '"outputs": "outputs"'))
    assert not is_finished(toy, "outputs/toy/toy.ipynb", {"outputs": "outputs", "data": "flowers"})


def test_the_records_that_are_there_are_read():
    for path in (ROOT / "outputs").rglob("*.ipynb"):
        record = experiments.read_record(path)[1]
        assert record == {} or record["finished"] is True


# ---- a run that is refused


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "toy.refused.ipynb"}


def test_a_refused_run_leaves_the_finished_one_as_it_was(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # so that the kit chooses, and notes, the number of threads
    out = tmp_path / "outputs" / "toy"
    assert cli.main(["run", "toy"]) == 0
    before = content(out)
    assert before["metrics.json"] == b"2" and before["pairs/list.txt"] == b"pairs of 2"
    capsys.readouterr()
    assert cli.main(["run", "toy", "-p", "k", "40"]) == 2
    said = capsys.readouterr()
    assert ("k is 40; give 1 to 30 (says cell [4] of " in said.err and "toy.refused.ipynb)" in said.err
            and said.err.count("\n") == 1)
    assert "set aside, of a run that was refused: state.safetensors" in said.out
    after = content(out)
    assert ([after.pop(name) for name in list(after) if name.startswith("aside-")] == [b"state of 40"]
            and after == before and is_finished(toy, out / "toy.ipynb"))

    with pytest.raises(RunError, match="toy.unfinished.ipynb failed: KeyError"):
        run_notebook(toy, out / "toy.ipynb", {"k": 41})
    assert not is_finished(toy, out / "toy.ipynb") and unfinished_copy(out / "toy.ipynb").is_file(), (
        "its files are not all its own any more"
    )
    run_notebook(toy, out / "toy.ipynb", {"k": 3})
    assert (is_finished(toy, out / "toy.ipynb", {"k": 3}) and not unfinished_copy(out / "toy.ipynb").exists()
            and not (out / "toy.refused.ipynb").exists())
    assert nbformat.read(out / "toy.ipynb", 4).metadata.papermill.output_path == "toy.ipynb"
    assert ((out / "metrics.json").read_text() == "3"
            and not [path for path in out.iterdir() if path.name.startswith(".")])


# ---- two runs at once


HOLD = """
import sys, time
from lagm.training.checkpoints import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs the system's locks")
def test_the_second_run_is_told_and_a_killed_one_holds_nothing(toy, tmp_path, capsys):
    out = tmp_path / "outputs" / "toy"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert cli.main(["run", "toy"]) == 2
    said = capsys.readouterr().err
    assert (f"another process is working in {os.path.join('outputs', 'toy')} (process {holder.pid} on " in said
            and os.listdir(out) == [".lagm.lock"])
    holder.kill()
    holder.wait()
    with folder_lock(out): assert f"process {os.getpid()} on " in (out / ".lagm.lock").read_text()
    assert os.listdir(out) == []


@pytest.mark.skipif(os.name != "posix", reason="needs the system's locks")
def test_trainings_hold_their_checkpoint(tmp_path):
    recipe, data = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1), TensorDataset(*tiny_pictures(4))
    with checkpoint_lock(tmp_path / "run.safetensors"), checkpoint_lock(tmp_path / "d" / "state.safetensors"):
        with pytest.raises(InputError, match="another process is working in"):
            training_tests.run(recipe, checkpoint=tmp_path / "run.safetensors")
        with pytest.raises(InputError, match="another process is working in"):
            train_downstream(tiny_segmenter(), data, DownstreamRecipe(epochs=1), folder=tmp_path / "d", progress=False)
        training_tests.run(recipe, checkpoint=tmp_path / "other.safetensors")
    assert not list(tmp_path.rglob(".*"))


# ---- what another run left


def test_force_sets_another_runs_checkpoints_aside(tmp_path, monkeypatch, capsys):
    recipe, path = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1), tmp_path / "run.safetensors"
    training_tests.run(recipe, checkpoint=path)
    before = path.read_bytes()
    other = get_recipe("fast", steps=2, warm_segmenter=1, warm_annotator=1)
    with pytest.raises(InputError, match="checkpoint of another run: recipe.steps .1 there, 2 here.*--force"):
        training_tests.run(other, checkpoint=path)
    assert path.read_bytes() == before
    monkeypatch.setenv("LAGM_FORCE", "1")
    assert (training_tests.run(other, checkpoint=path).step == other.total_steps(2)
            and (tmp_path / "aside-1" / "run.safetensors").read_bytes() == before)
    said = capsys.readouterr().out
    assert (said.startswith("set aside, of another run: run.safetensors")
            and said.endswith(f", now in {tmp_path / 'aside-1'}\n") and said.count("\n") == 1)
    assert (
        training_tests.run(other, checkpoint=path).step == other.total_steps(2) and not (tmp_path / "aside-2").exists()
    ), "its own checkpoint is gone on from"
    path.write_bytes(b"rubbish")
    for numbered in Checkpoints(path).numbered(): numbered.write_bytes(b"rubbish")
    assert (training_tests.run(other, checkpoint=path).step == other.total_steps(2)
            and (tmp_path / "aside-2" / "run.safetensors").read_bytes() == b"rubbish")


def test_force_sets_downstream_runs_and_pairs_aside(tmp_path, monkeypatch):
    data, pairs = TensorDataset(*tiny_pictures(4)), tmp_path / "pairs"
    labels = type(CELEBA8)("two", ("no", "yes"), ((0, 0, 0), (1, 1, 1)))
    generator = tiny_generator()
    def downstream(epochs):
        return train_downstream(tiny_segmenter(), data, DownstreamRecipe(epochs=epochs, batch=4), folder=tmp_path / "d",
                                progress=False)
    def made(n):
        return generate(generator, FPNAnnotator(generator.feature_channels, 2, channels=4, layers=1).eval(), pairs,
                        Plan(n=n), labels, progress=False)
    downstream(1), made(2)
    with pytest.raises(InputError, match="another run: recipe.epochs"): downstream(2)
    with pytest.raises(InputError, match="another dataset"): made(3)
    monkeypatch.setenv("LAGM_FORCE", "1")
    assert (len(downstream(2).history) == 2
            and load_tensors(tmp_path / "d" / "aside-1" / "state.safetensors")[1]["epoch"] == 1)
    assert len(made(3)) == 3 and (tmp_path / "aside-1" / "pairs" / "dataset.json").is_file()


def test_force_reaches_the_notebook(toy, tmp_path):
    write_experiment(toy, "from lagm.training.checkpoints import forced\nprint(forced())", parameters=PARAMETERS)
    for force in (False, True): assert printed(run_notebook(toy, "outputs/toy.ipynb", force=force)) == f"{force}\n"
    assert "LAGM_FORCE" not in os.environ


def test_advice_of_a_run_is_a_sentence_without_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # comes back
    start_stage(dict(out_dir=str(tmp_path / "out")))
    assert warnings.formatwarning(UserWarning("the size"), UserWarning, "f.py", 3) == "warning: the size\n"
    assert "f.py:3" in warnings.formatwarning(DeprecationWarning("old"), DeprecationWarning, "f.py", 3, line="")


def test_a_stage_sets_aside_what_it_cannot_go_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_SUMS", {})
    put(tmp_path / "flowers" / "masks" / "a.png", b"old")
    values = {"out_dir": "out", "dataset": "folder", "data": "flowers", "k": 1}
    def begin(**more): return start_stage(values | more, ["state*.safetensors", "pairs"])
    save_tensors(begin() / "state.safetensors", {}), put(tmp_path / "out" / "pairs" / "0.tar", b"x")
    os.utime(tmp_path / "flowers" / "masks" / "a.png")  # only a date
    assert (begin(device="cpu") / "state.safetensors").is_file()
    with pytest.raises(InputError, match="size is"): begin(size=[64])
    assert (tmp_path / "out" / "state.safetensors").is_file(), "a refused run changes nothing"
    put(tmp_path / "flowers" / "masks" / "a.png", b"new", age=1000)
    begin()
    assert (sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aside-1", "asked.json"]
            and (tmp_path / "out/aside-1/pairs/0.tar").is_file())
    save_tensors(begin() / "state.safetensors", {})
    (tmp_path / "out" / "asked.json").write_text("[" * 100_000)  # somebody else's
    begin()
    assert (tmp_path / "out/aside-2/state.safetensors").is_file() and set_aside([tmp_path / "out" / "none"]) is None


@pytest.mark.parametrize(("values", "message"), [
    ({"size": [64, 0]}, "size is"), ({"size": [64, 64, 64]}, "width and height"),
    ({"size": [64, 32], "levels": 6}, "levels is 6"),
])
def test_sizes_that_cannot_be_are_named_before_the_start(values, message):
    with pytest.raises(InputError, match=message): _check_size(values)


def test_every_experiment_checks_its_numbers_before_it_reads_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, wrong in {"annotate": {"evaluation_batch": 0}, "downstream": {"keep": 1.5}, "evaluate": {"draws": 0},
                        "cross_domain": {"teacher_steps": -1}, "methods": {"pairs": 0}, "report": {"most_pictures": -1},
                        "downstream ": {"lr": -1.0}, "evaluate ": {"protocol": "five-fold"}}.items():
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
            run_cells(ROOT / "nbs" / "experiments" / f"{name.strip()}.ipynb", wrong | {"out_dir": "out"})
    assert not (tmp_path / "out").exists()
