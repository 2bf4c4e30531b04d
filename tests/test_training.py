"""The loop: the authors' traces, resuming to the bit, and mistakes that become sentences."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import nursery
import pytest
import torch
from filling import fill
from safetensors import safe_open
from sync import ROOT
from templates import run_cells
from torch import nn

from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.data.augment import Augment
from lagm.models.annotator import FPNAnnotator
from lagm.models.segmenters import UNet, matched_parameter_names
from lagm.ops.convolutions import can_winograd
from lagm.ops.winograd import can_compile, has_wide_registers
from lagm.training import loop as training_loop
from lagm.training.batches import LabelledBatches, SyntheticBatch, balanced_weights
from lagm.training.checkpoints import Checkpoints, Identity
from lagm.training.lagm import train_lagm, train_supervised
from lagm.training.loop import Diverged
from lagm.training.recipe import Recipe, get_recipe
from lagm.training.state import TrainState, memory_layouts
from lagm.training.steps import matching_step

GOLDEN = Path(__file__).parent / "golden"
CLASSES, SIZE = 4, 16


# --- the authors' traces ---------------------------------------------------------------------------------------------

TRACE_NAMES = {"loss_gm": "GM/loss_gm", "loss_label": "GM/loss_label", "loss_syn": "GM/loss_syn",
               "loss_s": "S/loss_syn"}


def read_trace(name):
    with safe_open(GOLDEN / f"training_trace_{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def trace_data(seed):
    """Synthetic images and features, labelled images and labels, in the order in which they were drawn."""
    r = np.random.RandomState(seed)
    images = r.uniform(-1, 1, (10, 2, 3, 32, 32))
    features = [r.standard_normal((10, 2) + shape) for shape in ((6, 8, 8), (6, 16, 16), (4, 32, 32))]
    labelled = r.uniform(-1, 1, (5, 2, 3, 32, 32))
    labels = torch.from_numpy(r.randint(0, 4, (5, 2, 32, 32)).astype(np.int64))
    images, labelled, *features = (torch.from_numpy(a.astype(np.float32)) for a in (images, labelled, *features))
    return ([SyntheticBatch(images[i], [f[i] for f in features], lambda q: q) for i in range(10)],
            list(zip(labelled, labels)))


@functools.cache
def filled_networks(annotator_seed, segmenter_seed):
    return fill(FPNAnnotator([6, 6, 4], 4, channels=8), annotator_seed), fill(UNet(4), segmenter_seed)


def run_trace(meta, gradients):
    annotator, segmenter = copy.deepcopy(filled_networks(int(meta["A_seed"]), int(meta["S_seed"])))
    recipe = get_recipe("paper", metric=meta["metric"], reduction=meta["reduction"], gradients=gradients)
    players = TrainState(segmenter, annotator, recipe, torch.device("cpu"))
    players.begin({"segmenter": 0.01, "annotator": 0.05}, averaged=False)
    names, first_gradient, losses = matched_parameter_names(segmenter, meta["matched"]), {}, []

    def keep_first(*_):
        if not first_gradient: first_gradient.update({name: p.grad.clone() for name, p in annotator.named_parameters()})

    players.optimizers["annotator"].register_step_pre_hook(keep_first)
    synthetic, labelled = trace_data(int(meta["data_seed"]))
    for step in range(5):
        losses.append(matching_step(players, names, [labelled[step]], [synthetic[2 * step]], [synthetic[2 * step + 1]]))
    return (annotator, segmenter, first_gradient,
            {name: torch.stack([record[name] for record in losses]) for name in TRACE_NAMES})


@pytest.mark.parametrize("gradients", ["forward", "double"])
@pytest.mark.parametrize("name, gradient_tolerance, cross_entropy_tolerance, gm_tolerance", [
    ("outc_cosine_mean", 1e-5, 1e-3, 5e-3), ("all_cosine_mean", 1e-2, 1e-3, 5e-3), ("all_l2_sum", 1e-2, 1e-2, 2e-2)])
def test_authors_trace(name, gradient_tolerance, cross_entropy_tolerance, gm_tolerance, gradients):
    meta, golden = read_trace(name)
    annotator, segmenter, gradient, losses = run_trace(meta, gradients)

    for loss, theirs in TRACE_NAMES.items():
        expected = golden[f"trace.Loss/{theirs}"]
        if loss != "loss_s": assert losses[loss][0].item() == pytest.approx(expected[0].item(), rel=5e-5), loss
        worst = ((losses[loss] - expected) / expected).abs().max().item()
        assert worst < (gm_tolerance if loss == "loss_gm" else cross_entropy_tolerance), loss

    difference = sum((gradient[key] - golden[f"gradA.{key}"]).square().sum() for key in gradient).sqrt()
    assert difference / sum(golden[f"gradA.{key}"].square().sum() for key in gradient).sqrt() < gradient_tolerance

    for key, value in segmenter.state_dict().items():  # running statistics and their counts included
        assert value.float().norm().item() == pytest.approx(golden[f"finalS_norm.{key}"].item(), rel=1e-3), key
    if "cosine" in name:
        for key, value in annotator.state_dict().items():
            torch.testing.assert_close(value.float(), golden[f"finalA.{key}"], rtol=0.02, atol=2e-3,
                                       msg=lambda m: f"{key}: {m}")


# --- a small run -----------------------------------------------------------------------------------------------------

class ToyGenerator:
    """Pictures of noise, and features that are the pictures, pooled and copied."""
    z_dim, resolution, feature_channels, feature_sizes = 4, SIZE, [3, 6], [SIZE // 2, SIZE]

    def sample_z(self, n, rng=None): return torch.randn(n, self.z_dim, generator=rng)

    def __call__(self, z, rng=None):
        image = torch.tanh(torch.randn(len(z), 3, SIZE, SIZE, generator=rng) + z[:, :3, None, None])
        return image, [nn.functional.avg_pool2d(image, 2), torch.cat([image, image.square()], dim=1)]


def labelled(n=2):
    rng = torch.Generator().manual_seed(1)
    return (torch.rand(n, 3, SIZE, SIZE, generator=rng) * 2 - 1,
            torch.randint(0, CLASSES, (n, SIZE, SIZE), generator=rng))


def networks(seed=0):
    torch.manual_seed(seed)
    return FPNAnnotator(ToyGenerator.feature_channels, CLASSES, channels=4), UNet(CLASSES, width=4, levels=2)


FAST = get_recipe("fast", steps=5, warm_segmenter=4, warm_annotator=3, finish=0.0)
PAPER = get_recipe("paper", steps=6)


def run(recipe, match=True, nets=None, **options):
    annotator, segmenter = nets or networks()
    return train_lagm(ToyGenerator(), annotator, segmenter, *labelled(), recipe, match=match, progress=False, **options)


def same(first, second):
    """Whether two results hold the same bits."""
    pairs = [(first.segmenter, second.segmenter), (first.annotator, second.annotator)]
    return all(torch.equal(a, b) for one, other in pairs
               for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


RECIPES = {
    "fast": FAST,
    "fast, finished": dataclasses.replace(FAST, finish=16.0, finish_anchor=2.0),
    "paper": PAPER,
    "paper, augmented and resized": dataclasses.replace(PAPER, augment=Augment(), wide_crop=True),
    "double backward, shared": dataclasses.replace(FAST, gradients="double"),
    "stale labels": dataclasses.replace(FAST, fresh_labels=False),
    "bfloat16": dataclasses.replace(FAST, precision="bfloat16"),
    "labelled loss, fresh pictures, head only": dataclasses.replace(FAST, shared_batch=False, matched="outc"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_the_same_twice(name):
    first, second = run(RECIPES[name]), run(RECIPES[name])
    assert same(first, second)
    annotator, segmenter = networks()
    assert not torch.equal(first.segmenter.outc.weight, segmenter.outc.weight)
    assert not torch.equal(first.annotator.to_logit[0].weight, annotator.to_logit[0].weight)
    assert first.step == RECIPES[name].total_steps(2) and not first.segmenter.training


def test_kept_memory_changes_no_bit():
    assert same(run(dataclasses.replace(FAST, keep_memory=True)), run(dataclasses.replace(FAST, keep_memory=False)))


@pytest.mark.parametrize("threads, wide, contiguous", [(1, True, True), (2, True, False), (2, False, True)])
def test_the_annotators_layout_is_that_of_the_kernel_that_runs(monkeypatch, threads, wide, contiguous):
    """Where PyTorch's Winograd kernel rests, turning maps around for it would gain nothing."""
    monkeypatch.setattr("lagm.training.state.can_winograd", lambda: True)
    monkeypatch.setattr("lagm.training.state.has_wide_registers", lambda: wide)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layouts = memory_layouts(dataclasses.replace(PAPER, channels_last=True, fast_convolutions=True),
                             torch.device("cpu"))
    assert layouts["annotator"] == (torch.contiguous_format if contiguous else torch.channels_last)


@pytest.mark.parametrize(("changes", "segmenter", "annotator"), [
    ({}, False, False),
    ({"channels_last": True}, True, True),
    ({"channels_last": True, "fast_convolutions": True}, True,
     not can_winograd() or (has_wide_registers() and torch.get_num_threads() > 1)),
    ({"channels_last": True, "fast_convolutions": True, "compile_convolutions": True}, True,
     bool(shutil.which("g++")) or not can_winograd()),
    ({"channels_last": True, "fast_convolutions": True, "precision": "bfloat16"}, True, True),
])
def test_each_network_has_its_memory_layout(changes, segmenter, annotator):
    """True: channels last, of the kernels and of what they see.

    Winograd's kernel, in float32, wants the annotator's maps contiguous.
    """
    def is_last(tensor): return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    a, s = networks()
    players = TrainState(s, a, dataclasses.replace(PAPER, **changes), torch.device("cpu"))
    maps = torch.randn(2, 6, 8, 8)
    assert is_last(s.inc.conv1.weight) == is_last(players.arrange(maps)) == segmenter
    assert is_last(players.arrange(maps, "annotator")) == annotator
    assert all(is_last(p) == annotator for p in a.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    if changes.get("fast_convolutions") and not annotator:
        assert players.arrange(maps.contiguous(memory_format=torch.channels_last), "annotator").is_contiguous()


def test_forward_mode_and_double_backward_train_alike():
    """Same weights after a few steps, but for rounding."""
    results = [run(dataclasses.replace(PAPER, gradients=gradients, lr_annotator=0.05))
               for gradients in ("forward", "double")]
    for a, b in zip(results[0].annotator.state_dict().values(), results[1].annotator.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_without_matching_the_annotator_stands_still():
    warm = run(dataclasses.replace(FAST, steps=0))
    frozen = run(FAST, match=False)
    for (name, a), b in zip(warm.annotator.state_dict().items(), frozen.annotator.state_dict().values()):
        assert torch.equal(a, b), name
    assert not torch.equal(warm.segmenter.outc.weight, frozen.segmenter.outc.weight)
    assert ({record["stage"] for record in run(FAST, record_every=1).history["losses"]}
            == {"warm segmenter", "warm annotator", "match"})


def test_a_warm_start_can_be_shared():
    """Warm start once, match from copies of it: the same bits as in one go."""
    warm = run(dataclasses.replace(FAST, steps=0))
    assert same(run(dataclasses.replace(FAST, warm_segmenter=0, warm_annotator=0),
                    nets=(warm.annotator, warm.segmenter)), run(FAST))


def test_average_is_what_is_returned():
    nets = networks()
    result = run(FAST, nets=nets)
    assert result.segmenter is not nets[1] and not torch.equal(result.segmenter.outc.weight, nets[1].outc.weight)
    plain = networks()
    assert run(PAPER, nets=plain).segmenter is plain[1]


def test_supervised_ignores_the_generator_and_learns():
    images, masks = labelled()
    segmenter = networks()[1]
    result = train_supervised(segmenter, images, masks,
                              get_recipe("fast", augment=None, average=0.0, lr_segmenter=1e-2), 60,
                              validation=(images, masks), record_every=1, progress=False)
    losses = [record["loss_label"] for record in result.history["losses"]]
    assert losses[-1] < 0.8 * losses[0] and result.history["validation"][-1]["step"] == 60


def test_labelled_batches_go_round():
    batches = LabelledBatches(*labelled(3), batch=2, seed=5)
    drawn = sum((batches.indices(step) for step in range(6)), [])
    assert [sorted(drawn[i:i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert drawn != sum((LabelledBatches(*labelled(3), batch=2, seed=6).indices(step) for step in range(6)), [])
    assert len(LabelledBatches(*labelled(1), batch=4, seed=5)(0)[0]) == 4


# --- stopping and going on -------------------------------------------------------------------------------------------

class Stop(Exception): pass


def stop_after(monkeypatch, steps):
    """Make the loop raise after so many steps, as a crash would."""
    count, advance = [0], training_loop.advance

    def counted(loop, bar):
        if count[0] == steps: raise Stop
        count[0] += 1
        advance(loop, bar)

    monkeypatch.setattr(training_loop, "advance", counted)


@pytest.mark.parametrize("name, steps", [("fast", 1), ("fast", 4), ("fast", 5), ("fast", 7), ("fast", 9),
                                         ("fast, finished", 12), ("fast, finished", 14), ("paper", 1), ("paper", 5),
                                         ("stale labels", 9)])
def test_resumed_run_ends_in_the_same_bits(name, steps, tmp_path, monkeypatch):
    options = dict(checkpoint_every=1, record_every=1, validation=labelled(), validate_every=2)
    recipe = RECIPES[name]
    whole = run(recipe, **options)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, steps)
        run(recipe, checkpoint=tmp_path / "run.safetensors", **options)
    torch.rand(3)  # the global generator has moved on
    resumed = run(recipe, nets=networks(seed=99), checkpoint=tmp_path / "run.safetensors", **options)
    assert same(whole, resumed) and whole.history == resumed.history
    # a finished run is only read
    again = run(recipe, nets=networks(seed=98), checkpoint=tmp_path / "run.safetensors", **options)
    assert same(whole, again) and whole.history == again.history


def test_another_run_is_not_resumed(tmp_path):
    path = tmp_path / "run.safetensors"
    run(FAST, checkpoint=path)
    for arguments, says in [(dict(recipe=dataclasses.replace(FAST, label_weight=2.0)),
                             "recipe.label_weight .1.0 there, 2.0 here"),
                            (dict(recipe=FAST, seed=1), "seed .0 there, 1 here"),
                            (dict(recipe=FAST, match=False), "arm .matching there, no matching here")]:
        with pytest.raises(InputError, match=says): run(**arguments, checkpoint=path)
    images, masks = labelled()
    with pytest.raises(InputError, match="data"):
        train_lagm(ToyGenerator(), *networks(), images.flip(0), masks.flip(0), FAST, checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="safetensors"): run(FAST, checkpoint=path)


RUN_IN_A_PROCESS = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_training import *
    import lagm.training.lagm as training
    if {slow}: training.matching_step = (lambda step: lambda *args: (time.sleep(0.05), step(*args))[1])(matching_step)
    recipe = get_recipe("fast", steps=24, warm_segmenter=4, warm_annotator=4)
    print("begins", flush=True)
    run(recipe, nets=networks({seed}), checkpoint={path!r}, checkpoint_every=1)
    print("ends", flush=True)
"""


def start_process(path, seed=0, slow=False):
    code = textwrap.dedent(RUN_IN_A_PROCESS).format(tests=str(Path(__file__).parent), path=str(path), seed=seed,
                                                    slow=slow)
    process = nursery.start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "begins\n", process.stderr.read()
    return process


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_killed_and_interrupted_processes_go_on(tmp_path):
    """SIGKILL at an arbitrary moment, then Ctrl-C, then to the end: the bits of a run that was left alone."""
    def step(): return load_tensors(path)[1]["step"] if path.exists() else 0

    def wait_for(number):
        end = time.monotonic() + 60
        while step() < number and time.monotonic() < end: time.sleep(0.005)

    path = tmp_path / "run.safetensors"
    killed = start_process(path, slow=True)
    wait_for(7)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and 7 <= step() < 32
    assert killed.stdout.read() == ""

    interrupted = start_process(path, seed=5, slow=True)
    wait_for(step() + 4)
    interrupted.send_signal(signal.SIGINT)
    output, errors = interrupted.communicate(timeout=60)
    assert output == "" and "to go on" in errors and str(path) in errors and 11 <= step() < 32

    final = start_process(path, seed=6)
    assert final.communicate(timeout=60)[0] == "ends\n" and final.returncode == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: whole = run(get_recipe("fast", steps=24, warm_segmenter=4, warm_annotator=4))
    finally: torch.set_num_threads(threads)
    tensors, header = load_tensors(path)
    assert header["step"] == get_recipe("fast", steps=24, warm_segmenter=4, warm_annotator=4).total_steps(2)
    assert all(torch.equal(tensors[f"average.{key}"], value) for key, value in whole.segmenter.state_dict().items())
    assert all(torch.equal(tensors[f"annotator.{key}"], value) for key, value in whole.annotator.state_dict().items())


def test_a_loss_that_is_not_a_number_stops(tmp_path):
    recipe = dataclasses.replace(PAPER, lr_segmenter=1e30)
    with pytest.raises(Diverged, match=r"step \d of stage 'match': loss_\w+ is (nan|inf).*run.safetensors"):
        run(recipe, checkpoint=tmp_path / "run.safetensors", checkpoint_every=1)
    _, header = load_tensors(tmp_path / "run.safetensors")
    assert 1 <= header["step"] < 6


# --- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    (dict(optimizer="adamw"), "sgd, adam"), (dict(steps=-1), "steps"), (dict(steps=1.5), "whole number"),
    (dict(batch_labelled=0), "batch_labelled"),
    (dict(lr_segmenter=float("nan")), "lr_segmenter"), (dict(average=1.0), "average"),
    (dict(precision="float16"), "precision"),
    (dict(fresh_labels=False, shared_batch=False), "shared_batch"), (dict(stepps=3), "no field stepps")])
def test_wrong_recipes(changes, says):
    with pytest.raises(InputError, match=says): get_recipe("fast", **changes)


def test_unknown_recipe():
    with pytest.raises(InputError, match="paper, fast"): get_recipe("quick")


def test_paper_recipe_is_the_papers():
    assert get_recipe("paper") == Recipe()
    assert (Recipe().steps, Recipe().batch_labelled, Recipe().optimizer, Recipe().lr_annotator,
            Recipe().momentum) == (150_000, 2, "sgd", 1e-3, 0.9)


def test_wrong_inputs():
    images, masks = labelled()
    generator, (annotator, segmenter) = ToyGenerator(), networks()

    def train(images=images, masks=masks, recipe=FAST, **changes):
        nets = dict(annotator=annotator, segmenter=segmenter) | changes
        return train_lagm(generator, nets["annotator"], nets["segmenter"], images, masks, recipe, progress=False)

    for arguments, says in [(dict(images=images[:, :1]), "3, H, W"), (dict(images=images[:0]), "n of 1"),
                            (dict(masks=masks[:, :8]), "masks have shape"),
                            (dict(masks=masks.int()), "int64"), (dict(masks=masks + 4), "classes 4 to 7"),
                            (dict(masks=masks * 0 + 255), "no class"),
                            (dict(annotator=FPNAnnotator([3, 6], 7, channels=4)), "7 classes"),
                            (dict(recipe=dataclasses.replace(FAST, matched="nothing")), "nothing"),
                            (dict(recipe=dataclasses.replace(FAST, matched="outc", fresh_labels=False)),
                             "matched='all'")]:
        with pytest.raises(InputError, match=says): train(**arguments)


def test_recipe_survives_json():
    plain = Identity(FAST, 0, "matching", "x").header()["recipe"]
    assert Recipe(**plain) == FAST


def test_nothing_of_the_inputs_changes():
    images, masks = labelled()
    before = copy.deepcopy((images, masks))
    train_lagm(ToyGenerator(), *networks(), images, masks, FAST, progress=False)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


# ---- torch.compile


@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")
def test_compiled_networks_learn_the_same():
    """Networks compiled where they can be; matching takes the segmenter as it was written.

    What they learn differs by rounding alone.
    """
    recipe = dataclasses.replace(FAST, steps=2, warm_segmenter=1, warm_annotator=1, optimizer="sgd", lr_warm=1e-2,
                                 lr_segmenter=1e-2, lr_annotator=1e-2, average=0.0)
    plain = run(recipe)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = run(dataclasses.replace(recipe, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 2  # both networks
    for role, start in zip(("annotator", "segmenter"), networks(), strict=True):
        usual, quick, first = (torch.cat([p.detach().flatten() for p in network.parameters()])
                               for network in (getattr(plain, role), getattr(compiled, role), start))
        assert not torch.equal(usual, quick) and (quick - usual).norm() < 1e-4 * (usual - first).norm()


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch):
    def broken(*_, **__): raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", broken)
    can_compile.cache_clear()
    recipe = dataclasses.replace(FAST, steps=1, warm_segmenter=1, warm_annotator=1, compile=True)
    with pytest.warns(UserWarning, match="torch.compile does not work here \\(no compiler\\)") as said:
        run(recipe), run(recipe)
    can_compile.cache_clear()
    assert len([w for w in said if "torch.compile" in str(w.message)]) == 1


# ---- the demo, from each of its checkpoints


def test_the_demo_resumed_from_each_checkpoint_ends_in_the_same_metrics(tmp_path, monkeypatch):
    """The demo's recipe, through its notebook, with the real faces and generator; only the numbers of steps are small.
    """
    parameters = dict(k=2, psi=1.0, iterations=6, warm_up=2, checkpoint_every=2, validate_every=3,
                      validation_pictures=4, evaluation_batch=4, width=8, threads=1)
    parameters["changes"] = dict(batch_labelled=2, batch_synthetic=2, finish=1.125, finish_anchor=1.0)
    notebook, kept = ROOT / "nbs" / "experiments" / "annotate.ipynb", []
    save = Checkpoints.save

    def save_and_copy(self, tensors, header):
        save(self, tensors, header)
        kept.append(tmp_path / f"step-{header['step']}.safetensors")
        shutil.copy(self.path, kept[-1])

    def metrics(folder):
        record = json.loads((folder / "metrics.json").read_text())
        for changing in ("seconds_in_all", "training_seconds", "provenance"): record.pop(changing, None)
        record["parameters"].pop("out_dir")
        return record

    monkeypatch.setattr(Checkpoints, "save", save_and_copy)
    run_cells(notebook, parameters | {"out_dir": str(tmp_path / "whole")})
    monkeypatch.setattr(Checkpoints, "save", save)
    assert [path.name for path in kept] == [f"step-{step}.safetensors" for step in (2, 4, 6, 8, 10, 11)]
    for path in kept:
        folder = tmp_path / path.stem
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "asked.json", folder)
        shutil.copy(path, folder / "state.safetensors")
        run_cells(notebook, parameters | {"out_dir": str(folder)})
        assert metrics(folder) == metrics(tmp_path / "whole"), path.name


# ---- labels that have the class weights already


def test_labels_of_an_imitating_annotator_can_go_without_class_weights():
    """The same annotator, never matched: with weights, without, and without any weights in the recipe, which is another
    run for S's labelled loss.
    """
    recipe = dataclasses.replace(FAST, balance=0.5, label_weight=0.0, warm_segmenter=0, warm_annotator=0)
    weighed, plain = run(recipe, match=False), run(recipe, match=False, weigh_labels=False)
    unbalanced = run(dataclasses.replace(recipe, balance=0.0), match=False)
    assert not same(weighed, plain) and same(plain, unbalanced)


def test_class_weights_by_hand():
    masks = torch.full((1, 10, 10), 255)
    masks[0, :9, :], masks[0, 9, :5] = 0, 1  # 90 pixels, 5 pixels, class 2 nowhere, the rest unknown
    weights = balanced_weights(masks, 3, 0.5)
    shares = torch.tensor([90 / 95, 5 / 95])
    assert weights[1] / weights[0] == pytest.approx(18**0.5, rel=1e-5) and weights[2] == weights[1]
    assert (weights[:2] * shares).sum() == pytest.approx(1, rel=1e-6) and balanced_weights(masks, 3, 0.0) is None
