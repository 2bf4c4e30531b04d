"""Checkpoints: complete, whole or absent, several; and the loop that relies on them."""

import dataclasses
import json
import random
import warnings

import numpy as np
import pytest
import torch
from test_training import CLASSES, FAST, PAPER, RECIPES, SIZE, ToyGenerator, labelled, networks, run, same
from torch import nn

import lagm.training.checkpoints as run_state
import lagm.training.loop as training_loop
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors, save_tensors
from lagm.models.annotator import FPNAnnotator
from lagm.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    generator_digest,
    random_states,
    restore_random_states,
)
from lagm.training.lagm import estimate_lagm, estimate_supervised, train_lagm, train_supervised
from lagm.training.loop import Diverged
from lagm.training.recipe import get_recipe
from lagm.training.state import TrainState
from lagm.training.watching import Estimate, MetricsLog, Watch, Watcher, palette_for, snapshot_grid


def tensors(value, n=1000): return {"w": torch.full((n,), float(value))}


def step_of(path): return load_tensors(path)[1]["step"]


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep", [1, 2, 4])
def test_last_ones_and_the_best_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path / "run.safetensors", keep)
    for step in range(1, 7):
        checkpoints.save(tensors(step), {"step": step})
        if step == 3: checkpoints.save_best(tensors(step), {"step": step})
    assert checkpoints.load()[1]["step"] == step_of(checkpoints.path) == 6 and step_of(checkpoints.best) == 3
    assert [step_of(p) for p in checkpoints.numbered()] == ([] if keep == 1 else list(range(6, 6 - keep, -1)))
    checkpoints.save(tensors(7), {"step": 7})
    checkpoints.save(tensors(8), {"step": 7})  # the same step again
    assert checkpoints.load()[0]["w"][0] == 8
    with pytest.raises(InputError, match="keep is 0"): Checkpoints(tmp_path / "run.safetensors", 0)


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_): raise OSError("no links here")
    monkeypatch.setattr(run_state.os, "link", refuse)
    checkpoints = Checkpoints(tmp_path / "run.safetensors")
    for step in (1, 2, 3): checkpoints.save(tensors(step), {"step": step})
    assert step_of(checkpoints.path) == 3 and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_damage_falls_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run.safetensors")
    for step in (1, 2): checkpoints.save(tensors(step), {"step": step})
    checkpoints.path.write_bytes(checkpoints.path.read_bytes()[:500])
    with pytest.warns(UserWarning, match="going on from run.step-00000001"): assert checkpoints.load()[1]["step"] == 1
    checkpoints.path.unlink()
    with pytest.warns(UserWarning): assert checkpoints.load()[1]["step"] == 1
    for p in checkpoints.numbered(): p.write_bytes(b"")
    with pytest.raises(InputError, match="safetensors"): checkpoints.load()


def test_file_size_limit(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = Checkpoints(tmp_path / "run.safetensors")
    checkpoints.save(tensors(1, 100_000), {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        for save in (checkpoints.save, checkpoints.save_best):
            with pytest.raises(CheckpointError, match="(?s)cannot write the checkpoint .*0.4 MiB.*last good"):
                save(tensors(2, 100_000), {"step": 2})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.load()[1]["step"] == 1 and checkpoints.load()[0]["w"][0] == 1 and not checkpoints.best.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_random_states_through_a_file(tmp_path):
    def draw(): return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()
    draw()
    state = random_states()
    save_tensors(tmp_path / "s.safetensors", state[0], state[1])
    expected = draw()
    restore_random_states(*load_tensors(tmp_path / "s.safetensors"))
    assert draw() == expected


def test_generator_digest():
    class Held:
        def __init__(self, network, sampling="a"):
            self.network, self.sampling, self.dtype = network, sampling, torch.float32
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    first = generator_digest(Held(network))
    assert first == generator_digest(Held(network)) != generator_digest(Held(network, "b"))
    network.bias.data += 1
    assert generator_digest(Held(network)) != first and generator_digest(ToyGenerator()) is None


# --- the loop --------------------------------------------------------------------------------------------------------

def test_resumed_from_each_of_its_checkpoints(tmp_path):
    options = dict(checkpoint_every=3, record_every=2, validation=labelled(), validate_every=4)
    whole = run(FAST, checkpoint=tmp_path / "run.safetensors", keep=10, **options)
    kept = Checkpoints(tmp_path / "run.safetensors").numbered()
    assert [step_of(p) for p in kept] == [12, 9, 6, 3]
    for path in [*kept, Checkpoints(tmp_path / "run.safetensors").best]:
        resumed = run(FAST, nets=networks(seed=9), resume_from=path, **options)
        assert same(whole, resumed) and resumed.history == whole.history
    best = load_tensors(tmp_path / "run.best.safetensors")[1]
    assert (best["step"] == whole.best["step"]
            and whole.best["fg_miou"] == max(r["fg_miou"] for r in whole.history["validation"]))


def test_the_header_says_it_all(tmp_path):
    run(FAST, checkpoint=tmp_path / "run.safetensors", seed=4)
    tensors, header = load_tensors(tmp_path / "run.safetensors")
    assert (header["identity"]["seed"] == 4 and header["identity"]["recipe"]["metric"] == "cosine"
            and header["sampler"] == {"stage": "match", "step": 5})
    assert header["provenance"]["versions"]["torch"] and {"commit", "hardware"} <= set(header["provenance"])
    assert {name.split(".")[0] for name in tensors} == {"segmenter", "annotator", "average", "optimizer", "random"}
    assert ({"random.torch", "random.numpy", "random.python"} <= set(tensors)
            and {n.split(".")[1] for n in tensors if n.startswith("optimizer")} == {"segmenter", "annotator"})


def test_another_generator_is_not_resumed(tmp_path):
    class Weighted(nn.Module):
        resolution, feature_channels, feature_sizes, z_dim = SIZE, [3, 6], [8, SIZE], 4
        def __init__(self, value):
            super().__init__()
            self.register_buffer("w", torch.tensor(value))
        def sample_z(self, n, rng=None): return ToyGenerator().sample_z(n, rng)
        def forward(self, z, rng=None): return ToyGenerator()(self.w * z, rng)

    def train(value):
        return train_lagm(Weighted(value), *networks(), *labelled(), FAST, checkpoint=tmp_path / "run.safetensors",
                          progress=False)
    train(1.0)
    assert train(1.0).step == FAST.total_steps(2)
    with pytest.raises(InputError, match="generator"): train(1.1)


def test_a_checkpoint_that_lacks_new_fields_is_still_ours(tmp_path):
    path = tmp_path / "run.safetensors"
    whole = run(FAST, checkpoint=path)
    tensors, header = load_tensors(path)
    for field in ("interval_annotator", "interval_segmenter"): del header["identity"]["recipe"][field]
    del header["identity"]["generator"], header["random"], header["sampler"], header["provenance"]
    for p in Checkpoints(path).numbered(): p.unlink()
    save_tensors(path, {k: v for k, v in tensors.items() if not k.startswith("random")}, header)
    assert same(run(FAST, nets=networks(7), checkpoint=path), whole)
    with pytest.raises(InputError, match="interval_segmenter .1 there, 2 here"):
        run(dataclasses.replace(FAST, interval_segmenter=2), checkpoint=path)


class WithDropout(nn.Module):
    n_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.body, self.outc = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                              nn.Dropout(0.5)), nn.Conv2d(8, CLASSES, 1))

    def forward(self, x): return self.outc(self.body(x))


@pytest.mark.parametrize("recipe", ["fast", "paper"])
def test_dropout_is_a_function_of_the_step(recipe, tmp_path):
    def train(**options):
        torch.manual_seed(0)
        nets = FPNAnnotator(ToyGenerator.feature_channels, CLASSES, channels=4), WithDropout()
        if options.pop("moved", False): torch.rand(5)
        state = torch.get_rng_state()
        result = train_lagm(ToyGenerator(), *nets, *labelled(), RECIPES[recipe], progress=False, **options)
        assert torch.equal(state, torch.get_rng_state())  # the caller's generator is as it was
        return result

    whole = train(checkpoint=tmp_path / "run.safetensors", checkpoint_every=2, keep=9)
    assert same(whole, train(moved=True))
    assert same(whole, train(resume_from=Checkpoints(tmp_path / "run.safetensors").numbered()[-1]))


def test_intervals():
    counts = {"annotator": 0, "segmenter": 0}

    def count(recipe, match=True):
        counts.update(annotator=0, segmenter=0)
        update = TrainState.update
        def counted(self, role, gradients=None):
            counts[role] += 1
            update(self, role, gradients)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainState, "update", counted)
            run(recipe, match)
        return counts["annotator"], counts["segmenter"]

    plain = dataclasses.replace(PAPER, steps=6)
    assert count(plain) == (6, 6)
    assert count(dataclasses.replace(plain, interval_annotator=2)) == (3, 6)
    assert count(dataclasses.replace(plain, interval_segmenter=3)) == (6, 2)
    assert count(dataclasses.replace(plain, interval_annotator=4, interval_segmenter=3)) == (2, 2)
    assert count(plain, match=False) == (0, 6)
    for name in ("fast", "stale labels", "double backward, shared"):
        warm = RECIPES[name].warm_segmenter, RECIPES[name].warm_annotator
        assert (count(dataclasses.replace(RECIPES[name], interval_annotator=2, interval_segmenter=2))
                == (warm[1] + 3, warm[0] + 3))


def test_phase_a_alone_is_the_step_without_its_second_half():
    """An annotator's step does not depend on whether the segmenter moves after it."""
    both, first = (run(dataclasses.replace(PAPER, steps=1)),
                   run(dataclasses.replace(PAPER, steps=1, interval_segmenter=1), match=True))
    assert same(both, first)
    record = run(dataclasses.replace(PAPER, steps=2, interval_segmenter=2), record_every=1).history["losses"]
    assert "loss_s" in record[0] and "loss_s" not in record[1] and "loss_gm" in record[1]


def test_other_released_options():
    """Optimiser, batches, learning rates, group by name or pattern, metric and reduction: each changes the run."""
    plain = run(PAPER)
    for changes in (dict(optimizer="adam"), dict(batch_labelled=1), dict(batch_synthetic=3), dict(lr_annotator=0.1),
                    dict(lr_segmenter=0.1), dict(matched="outc"),
                    dict(matched=r"up.*conv1.*"), dict(metric="l2", lr_annotator=0.1), dict(reduction="sum"),
                    dict(momentum=0.0)):
        assert not same(run(dataclasses.replace(PAPER, **changes)), plain), changes


def test_labelled_and_generated_batches_of_different_size():
    result = run(dataclasses.replace(FAST, batch_labelled=1, batch_synthetic=5), record_every=1)
    assert result.step == FAST.total_steps(2)


def test_a_full_disk_does_not_end_the_run_before_its_end(tmp_path, monkeypatch):
    path, write, calls = tmp_path / "run.safetensors", run_state.save_tensors, []

    def full(where, *arguments):
        calls.append(where)
        if 2 <= len(calls) <= 4: raise OSError(28, "No space left on device")
        write(where, *arguments)

    monkeypatch.setattr(run_state, "save_tensors", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(FAST, checkpoint=path, checkpoint_every=2)
    assert len([w for w in caught if "No space left" in str(w.message)]) == 3 and step_of(path) == FAST.total_steps(2)
    assert same(result, run(FAST))
    monkeypatch.setattr(run_state, "save_tensors",
                        lambda *_: full(*_) if len(calls) < 2
                        else (_ for _ in ()).throw(OSError(28, "No space left on device")))
    calls.clear()
    with pytest.raises(CheckpointError, match="No space left"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(FAST, checkpoint=tmp_path / "other.safetensors", checkpoint_every=4)
    assert step_of(tmp_path / "other.safetensors") == 4


def test_explosion_names_step_and_way_back(tmp_path):
    with pytest.raises(Diverged, match=r"step 1 of stage 'match': loss_label is 1.\d+, above 0.1.*no checkpoint"):
        run(PAPER, explode_at=0.1)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Diverged,
                       match=r"above 1000; the last good checkpoint, of step \d of the run, is .*run.safetensors"):
        run(dataclasses.replace(PAPER, lr_segmenter=1e5), checkpoint=path, checkpoint_every=1)


# --- watching --------------------------------------------------------------------------------------------------------

def test_watched_runs_leave_the_same_numbers_when_resumed(tmp_path, monkeypatch):
    def watched(name, **options):
        watch = Watch(tmp_path / name, snapshot_every=6, cosines_every=5)
        run(FAST, watch=watch, record_every=3, validation=labelled(), validate_every=4,
            checkpoint=tmp_path / f"{name}.safetensors", checkpoint_every=2, **options)
        return ((tmp_path / name / "metrics.jsonl").read_text(),
                sorted(p.name for p in (tmp_path / name / "snapshots").iterdir()))

    whole, pictures = watched("whole")
    kinds = [json.loads(line)["kind"] for line in whole.splitlines()]
    assert (kinds.count("losses") == 4 and kinds.count("validation") == 3 and "cosines" in kinds
            and pictures == ["00000006.png", "00000012.png"])
    advance, calls = training_loop.advance, [0]

    def dies(loop, bar):
        calls[0] += 1
        if calls[0] == 10: raise RuntimeError("dies")
        advance(loop, bar)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="dies"):
        patch.setattr(training_loop, "advance", dies)
        watched("killed")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file: file.write('{"kind": "los')
    assert watched("killed") == (whole, pictures)
    # looking changes nothing
    assert same(run(FAST), run(FAST, watch=Watch(tmp_path / "x", snapshot_every=1, cosines_every=1)))


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(FAST, watch=Watch(tmp_path, snapshot_every=6, tensorboard=True), record_every=4)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert ("losses/loss_gm" in events.Tags()["scalars"]
            and [e.step for e in events.Scalars("losses/loss_label")] == [4, 8, 12]
            and "snapshot" in events.Tags()["images"])


def test_supervised_runs_are_watched_and_estimated(tmp_path):
    images, masks = labelled()
    train_supervised(networks()[1], images, masks, FAST, 4, watch=Watch(tmp_path, snapshot_every=2), record_every=1,
                     progress=False)
    assert len(MetricsLog(tmp_path / "metrics.jsonl").records()) == 4
    estimate = estimate_supervised(networks()[1], images, masks, FAST, 1000, progress=False)
    assert estimate.steps["supervised"][0] == 1000


def test_an_estimate_leaves_no_trace(tmp_path):
    nets, untouched = networks(), networks()
    estimate = estimate_lagm(ToyGenerator(), *nets, *labelled(), FAST, checkpoint=tmp_path / "deep" / "run.safetensors",
                             progress=False)
    assert (isinstance(estimate, Estimate) and list(estimate.steps) == ["warm segmenter", "warm annotator", "match"]
            and estimate.seconds > 0)
    assert (estimate.free_bytes > 0 and estimate.checkpoint_bytes > 1000 and "steps of" in str(estimate)
            and not list(tmp_path.iterdir()))
    for net, other in zip(nets, untouched):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    assert same(run(FAST, nets=nets), run(FAST))


def test_a_long_run_says_its_estimate_first(capsys, monkeypatch):
    monkeypatch.setattr(training_loop, "LONG", 3)
    train_lagm(ToyGenerator(), *networks(), *labelled(), get_recipe("paper", steps=3), progress=True)
    printed = "".join(capsys.readouterr())
    assert "estimate: " in printed and "3 steps of" in printed and "loss_gm" in printed


def test_snapshot_shows_where_the_annotator_is_sure():
    probabilities = torch.full((1, 3, 2, 2), 0.2)
    probabilities[0, 1] = 0.6
    probabilities[0, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    grid = snapshot_grid(torch.zeros(1, 3, 2, 2), probabilities, probabilities, palette_for(3), 0.9)
    assert (grid.shape == (2, 8, 3) and tuple(grid[0, 4]) == palette_for(3).palette[2] and (grid[1, 4] == 255).all()
            and tuple(grid[1, 2]) == palette_for(3).palette[1])


def test_watcher_survives_a_full_disk(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be written
    MetricsLog(tmp_path / "metrics.jsonl").add("losses", {"step": 1})
    assert "cannot write" in capsys.readouterr().err
    Watcher(Watch(tmp_path / "fresh"), 0).close()
