"""A batch in parts, and shared by two real processes."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import nursery
import pytest
import torch
from test_training import CLASSES, PAPER, ToyGenerator, labelled, networks, run, same
from torch import nn

from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.models.annotator import FPNAnnotator
from lagm.models.segmenters import matched_parameter_names
from lagm.training.batches import SyntheticBatches, in_parts
from lagm.training.lagm import train_supervised
from lagm.training.processes import own_parts
from lagm.training.recipe import get_recipe
from lagm.training.state import TrainState
from lagm.training.steps import matching_step


def close(first, second, tolerance):
    """Whether two networks' weights agree, relative to the whole of each tensor."""
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    worst = max(((a - b).float().norm() / b.float().norm().clamp_min(1e-3)).item() for (_, a), b in pairs)
    return worst < tolerance


class NoNorm(nn.Module):
    n_classes, network = CLASSES, ""

    def __init__(self):
        super().__init__()
        self.body, self.outc = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1),
                                              nn.Tanh()), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x): return self.outc(self.body(x))


def without_norm(network):
    """The network, with nothing in place of batch norm."""
    for name, child in network.named_children():
        setattr(network, name, nn.Identity() if isinstance(child, nn.BatchNorm2d) else without_norm(child))
    return network


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("label_weight", [0.0, 0.5, 1.0])
def test_without_batch_norm_parts_are_the_whole(shared, label_weight):
    """Ignored pixels make the labelled parts count differently."""
    torch.manual_seed(0)
    recipe = dataclasses.replace(PAPER, batch_labelled=4, batch_synthetic=4, shared_batch=shared,
                                 label_weight=label_weight, lr_annotator=0.1, lr_segmenter=0.1, optimizer="sgd")
    annotator = without_norm(FPNAnnotator(ToyGenerator.feature_channels, CLASSES, channels=4)).double()
    segmenter = NoNorm().double()
    images, masks = labelled(4)
    images, masks[0, :12] = images.double(), 255
    source = SyntheticBatches(ToyGenerator(), 4, images.shape[2:], seed=0)
    batches = {stage: source(0, stage) for stage in ("match", "s")}

    def double(batch, rows):
        return dataclasses.replace(batch, images=batch.images[rows].double(),
                                   features=[f[rows].double() for f in batch.features])
    results = []
    for parts in (1, 2):
        players = TrainState(copy.deepcopy(segmenter), copy.deepcopy(annotator), recipe, torch.device("cpu"))
        players.begin({"segmenter": 0.1, "annotator": 0.1}, averaged=False)
        names = matched_parameter_names(players.segmenter, "all")
        rows = [slice(4 // parts * part, 4 // parts * (part + 1)) for part in range(parts)]
        pairs, own = [(images[r], masks[r]) for r in rows], [double(batches["match"], r) for r in rows]
        losses = matching_step(players, names, pairs, own, None if shared else [double(batches["s"], r) for r in rows])
        results.append((players, losses))
    (whole, whole_losses), (parts, parts_losses) = results
    assert whole_losses.keys() == parts_losses.keys()
    for name, loss in whole_losses.items():
        assert parts_losses[name].item() == pytest.approx(loss.item(), rel=1e-6), name
    assert close(parts.segmenter, whole.segmenter, 1e-6) and close(parts.annotator, whole.annotator, 1e-6)
    assert not close(parts.annotator, annotator, 1e-6)


PARTS = get_recipe("fast", steps=4, warm_segmenter=2, warm_annotator=2, finish=4.0, finish_anchor=2.0, parts=2,
                   lr_segmenter=1e-3)


@pytest.mark.parametrize("name", ["shared", "two batches", "bfloat16", "intervals", "paper"])
def test_runs_in_parts(name):
    recipe = {"shared": PARTS, "two batches": dataclasses.replace(PARTS, shared_batch=False),
              "bfloat16": dataclasses.replace(PARTS, precision="bfloat16"),
              "intervals": dataclasses.replace(PARTS, interval_annotator=2, interval_segmenter=2),
              "paper": dataclasses.replace(PAPER, steps=3, parts=2)}[name]
    first = run(recipe)
    assert same(first, run(recipe)) and first.step == recipe.total_steps(2)
    assert (first.segmenter.inc.bn1.num_batches_tracked
            == run(dataclasses.replace(recipe, parts=1)).segmenter.inc.bn1.num_batches_tracked)


@pytest.mark.parametrize("gradients", ["forward", "double"])
def test_only_one_phase_has_its_pictures_in_memory(gradients):
    """With two batches the second is made when the first is gone."""
    annotator, segmenter = networks()
    state = TrainState(segmenter, annotator, dataclasses.replace(PAPER, gradients=gradients), torch.device("cpu"))
    state.begin({"segmenter": 0.1, "annotator": 0.1}, averaged=False)
    source, there, made = SyntheticBatches(ToyGenerator(), 2, labelled()[0].shape[2:], seed=0), [], []

    def watched(step, stage):
        made.append([stage, sum(reference() is not None for reference in there)])
        batch = source(step, stage)
        there.extend(map(weakref.ref, batch.features))
        return batch

    stages = [in_parts(watched, 0, stage, 1) for stage in ("match", "match, phase S")]
    matching_step(state, matched_parameter_names(segmenter), [labelled()], *stages)
    assert made == [["match", 0], ["match, phase S", 0]]


def test_supervised_in_parts():
    images, masks = labelled()
    result = train_supervised(networks()[1], images, masks, PARTS, 3, progress=False, record_every=1)
    assert len(result.history["losses"]) == 3


def test_resumed_in_parts(tmp_path):
    whole = run(PARTS, checkpoint=tmp_path / "run.safetensors", checkpoint_every=3, keep=9)
    assert same(run(PARTS, nets=networks(8), resume_from=tmp_path / "run.step-00000003.safetensors"), whole)


def test_mistakes():
    for changes, says in [(dict(parts=3), "divide both batches"), (dict(parts=0), "1 or more"),
                          (dict(parts=2, gradients="double"), "forward"),
                          (dict(parts=2, fresh_labels=False), "fresh_labels")]:
        with pytest.raises(InputError, match=says): get_recipe("fast", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="2 processes cannot share 3 parts"):
        patch.setattr("lagm.training.processes.this_process", lambda: (0, 2))
        own_parts(3)


ONE_OF_TWO = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed
torch.set_num_threads(1)
from test_parts import PARTS, run
torch.distributed.init_process_group("gloo", init_method="file://" + {meeting!r}, rank=int(sys.argv[1]), world_size=2)
run(PARTS, checkpoint={path!r}, checkpoint_every=3)
torch.distributed.barrier()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="needs gloo")
def test_two_processes_are_one_with_two_parts(tmp_path):
    path = tmp_path / "run.safetensors"
    code = ONE_OF_TWO.format(tests=str(Path(__file__).parent), meeting=str(tmp_path / "meeting"), path=str(path))
    pair = [nursery.start([sys.executable, "-c", code, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in (0, 1)]
    errors = [process.communicate(timeout=240)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the pair has
    try: one = run(PARTS)
    finally: torch.set_num_threads(threads)
    tensors, header = load_tensors(path)
    assert header["step"] == PARTS.total_steps(2)
    for prefix, network in (("average.", one.segmenter), ("annotator.", one.annotator)):
        for key, value in network.state_dict().items():
            # batch norm takes a constant away again: such a bias moves by rounding alone, and the running mean follows
            # it
            if prefix == "average." and re.search(r"conv\d\.bias|running_mean", key): continue
            torch.testing.assert_close(tensors[prefix + key], value, rtol=1e-4, atol=1e-5,
                                       msg=lambda m: f"{prefix}{key}: {m}")


def test_several_processes_by_fabric_are_one_with_as_many_parts(tmp_path):
    pytest.importorskip("lightning_fabric")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: one = run(PARTS)
    finally: torch.set_num_threads(threads)
    code = BY_FABRIC.format(tests=str(Path(__file__).parent), path=str(tmp_path / "run.safetensors"))
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    tensors, header = load_tensors(tmp_path / "result.safetensors")
    assert header["step"] == PARTS.total_steps(2) and header["losses"] == 1  # the history came along, too
    for key, value in one.annotator.state_dict().items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")


BY_FABRIC = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from lagm.core.tensors import save_tensors
from test_parts import PARTS, run
if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path({path!r})
    result = run(PARTS, checkpoint=path, checkpoint_every=3, processes=2)
    save_tensors(path.parent / "result.safetensors", result.annotator.state_dict(),
                 dict(step=result.step, losses=len({{r["stage"] for r in result.history["losses"]}})))
"""


def test_several_processes_need_a_file_and_parts():
    with pytest.raises(InputError, match="give checkpoint="): run(PARTS, processes=2)
    with pytest.raises(InputError, match="3 processes cannot share 2 parts"): run(PARTS, processes=3, checkpoint="x")
