"""Our own additions, each with numbers worked out by hand: what no golden of the authors' program would notice."""

import math
import os
import zlib

import pytest
import torch
from tiny import tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lagm.download.transfer as fetching
import lagm.evaluation.intervals as evaluation
from lagm.core import files as core_files
from lagm.core.files import write_json
from lagm.core.pickle_records import Budget, Storage, Unreadable
from lagm.core.seeds import random_generator
from lagm.data.augment import Augment
from lagm.evaluation.boundary import BoundaryScore, within
from lagm.evaluation.folds import number_in
from lagm.experiments.sweep import last_error
from lagm.generators.stylegan1 import NoiseLayer
from lagm.generators.stylegan2 import SQRT2, SynthesisLayer, ToRGB
from lagm.generators.train import GANRecipe, GANTrainer
from lagm.matching.distances import distance, distance_and_derivative
from lagm.matching.forward import SyntheticPass, directional_derivative
from lagm.matching.gradients import graph_of, labelled_gradient, log_probabilities
from lagm.matching.tangents import record
from lagm.ops.convolutions import FastConvolutions
from lagm.training.batches import SyntheticBatch
from lagm.training.checkpoints import digest
from lagm.training.downstream import change_batch
from lagm.training.lagm import train_supervised
from lagm.training.loop import Trained
from lagm.training.processes import each_part, mean_over_parts
from lagm.training.recipe import PAPER, get_recipe, learning_rate
from lagm.training.state import TrainState
from lagm.training.steps import imitation_step, labelled_gradients, phase_segmenter
from lagm.training.synthetic import GeneratedPairs, Plan, decide, make_pair

CPU = torch.device("cpu")


class Dot(nn.Module):
    """A segmenter of one weight, a running statistic and a counter."""
    n_classes, network = 2, ""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("mean", torch.tensor([10 * value]))
        self.register_buffer("count", torch.tensor(0))


# --- training


def test_two_steps_of_the_average_by_hand():
    """0.9 of what was, 0.1 of what is: 0.9 * 1 + 0.1 * 2 = 1.1, 0.9 * 1.1 + 0.1 * 4 = 1.39; a counter is copied."""
    segmenter = Dot(1.0)
    players = TrainState(segmenter, None, get_recipe("fast", average=0.9, channels_last=False), CPU)
    players.begin({"segmenter": 0.0}, averaged=True)
    for value, expected in ((2.0, 1.1), (4.0, 1.39)):
        with torch.no_grad(): segmenter.weight.fill_(value), segmenter.mean.fill_(10 * value), segmenter.count.add_(3)
        players.update_average()
        assert players.average.weight.item() == pytest.approx(expected, rel=1e-6)
        assert players.average.mean.item() == pytest.approx(10 * expected, rel=1e-6)
    assert players.average.count == 6 and players.result is players.average and not players.average.weight.requires_grad
    players.begin({"segmenter": 0.0}, averaged=False)
    assert players.average is None and players.result is segmenter


def test_the_cosine_schedule_by_hand():
    rate = learning_rate
    assert rate(0.01, 0, 100, "cosine") == 0.01 and rate(0.01, 50, 100, "cosine") == pytest.approx(0.005, rel=1e-12)
    assert rate(0.01, 25, 100, "cosine") == pytest.approx(0.01 * (2 + math.sqrt(2)) / 4, rel=1e-12)
    assert rate(0.01, 99, 100, "cosine") == pytest.approx(0.01 * math.sin(math.pi / 200) ** 2, rel=1e-9)
    assert rate(0.01, 99, 100, "constant") == 0.01


class Norm(nn.Module):
    """A segmenter of two classes whose logits are a batch norm's result and zero."""
    n_classes, network = 2, ""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        y = self.norm(x[:, :1])
        return torch.cat([y, torch.zeros_like(y)], 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_imitation_is_of_the_segmenter_at_rest(parts):
    """Mean 1 and variance 4: the target is the sigmoid of (x - 1) / 2. In train mode x = 3 everywhere gives a half."""
    segmenter, annotator = Norm().train(), nn.Conv2d(1, 2, 1)
    segmenter.norm.running_mean.fill_(1.0), segmenter.norm.running_var.fill_(4.0 - 1e-5)
    annotator.forward = lambda features: nn.Conv2d.forward(annotator, features[0])
    with torch.no_grad(): annotator.weight.zero_(), annotator.bias.copy_(torch.tensor([1.0, 0.0]))
    players = TrainState(segmenter, annotator, PAPER, CPU)
    players.begin({"annotator": 0.0}, averaged=False)
    batch = SyntheticBatch(torch.full((1, 3, 2, 2), 3.0), [torch.zeros(1, 1, 2, 2)], lambda q: q)
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-1))  # target sigmoid((3 - 1) / 2), annotator sigmoid(1)
    loss = imitation_step(players, [batch] * parts)["loss_imitation"].item()
    assert loss == pytest.approx(-(p * math.log(q) + (1 - p) * math.log(1 - q)), rel=1e-6)
    assert segmenter.norm.num_batches_tracked == 0 and segmenter.norm.running_mean.item() == 1.0 and annotator.training


def test_the_labelled_gradient_has_its_weight():
    """Half of the labelled gradient 4 and the synthetic 2, at a rate of 0.1: 1 - 0.1 * (2 + 2) = 0.6."""
    segmenter = Dot(1.0)
    players = TrainState(segmenter, nn.Identity(), get_recipe("paper", momentum=0.0, label_weight=0.5), CPU)
    players.begin({"segmenter": 0.1}, averaged=False)
    phase_segmenter(players, None, gradients_l=[torch.tensor([4.0])], gradients_s=[torch.tensor([2.0])])
    assert segmenter.weight.item() == pytest.approx(0.6, rel=1e-6)


def test_every_step_has_its_learning_rate(monkeypatch):
    """Four steps of the cosine: 1, (2 + sqrt 2) / 4, 1 / 2 and (2 - sqrt 2) / 4 of the base."""
    rates, update = [], TrainState.update
    monkeypatch.setattr(TrainState, "update",
            lambda self, role, *a: rates.append(self.optimizers[role].param_groups[0]["lr"]) or update(self, role, *a))
    train_supervised(tiny_segmenter(), *tiny_pictures(2), get_recipe("fast", lr_segmenter=0.01), 4, progress=False)
    assert rates == pytest.approx([0.01, 0.01 * (2 + math.sqrt(2)) / 4, 0.005, 0.01 * (2 - math.sqrt(2)) / 4], rel=1e-9)


def test_the_best_is_the_first_of_equals():
    history = {"losses": [], "validation": [{"step": s, "fg_miou": v} for s,
            v in ((1, 0.25), (2, 0.5), (3, 0.5), (4, 0.125))]}
    assert Trained(None, None, history, 4).best["step"] == 2


# --- parts


def test_statistics_of_the_parts_are_averaged_and_each_has_its_own_dropout():
    """From 10, part 0 adds 1 and part 1 adds 2: 11.5. A counter goes up by one, not by two."""
    network = Dot(1.0)
    def function(part):
        network.mean.add_(part + 1), network.count.add_(1)
        return torch.rand(1).item()
    torch.manual_seed(5)
    first = each_part(network, 2, function)
    assert network.mean.item() == 11.5 and network.count == 1 and first[0] != first[1]
    assert each_part(network, 2, function, update=False) == first and network.mean.item() == 11.5
    assert torch.initial_seed() == 5


def test_a_part_without_labels_has_no_vote():
    segmenter, (images, masks) = nn.Conv2d(3, 3, 1), tiny_pictures(2)
    masks[1] = 255
    players, names = TrainState(segmenter, None, PAPER, CPU), ["weight", "bias"]
    gradients, loss = labelled_gradients(players, names, [(images[i:i + 1], masks[i:i + 1]) for i in (0, 1)])
    alone, loss_alone = labelled_gradient(segmenter, names, images[:1], masks[:1])
    assert loss.item() == pytest.approx(loss_alone.item())
    assert all(torch.allclose(a, b) for a, b in zip(gradients, alone))
    assert mean_over_parts([[torch.tensor(1.0)], [torch.tensor(5.0)]], [torch.tensor(3.0), torch.tensor(1.0)])[0] == 2


# --- matching


def test_short_gradients_count_as_a_millionth():
    """Rows of length 1e-7 and 1: their cosine is 1e-7 / 1e-6 = 0.1; across it is 0."""
    short, long = [torch.tensor([[1e-7, 0.0], [0.0, 2e-7]])], [torch.tensor([[1.0, 0.0], [1.0, 0.0]])]
    for reduction, expected in (("mean", (0.9 + 1.0) / 2), ("sum", 0.9 + 1.0)):
        assert distance(short, long, "cosine", reduction).item() == pytest.approx(expected, rel=1e-5)
        total, (derivative,) = distance_and_derivative(short, long, "cosine", reduction)
        assert total.item() == pytest.approx(expected, rel=1e-5)
        moving = [short[0].clone().requires_grad_()]
        assert torch.allclose(derivative, torch.autograd.grad(distance(moving, long, "cosine", reduction), moving)[0],
                rtol=1e-5)


def test_equal_gradients_pull_nowhere():
    """One row equal, the other 3 and 4 apart: no slope, and one of 0.6 and 0.8; the mean halves it."""
    ours, theirs = [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], [torch.tensor([[1.0, 2.0], [0.0, 0.0]])]
    total, (derivative,) = distance_and_derivative(ours, theirs, "l2")
    assert total.item() == 2.5 and torch.allclose(derivative, torch.tensor([[0.0, 0.0], [0.3, 0.4]]))


def test_a_graph_of_some_parameters_gives_the_others_back():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1))
    network[0].bias.requires_grad_(False)  # its owner's wish
    with graph_of(network, ["1.weight"]):
        assert [p.requires_grad for p in network.parameters()] == [False, False, True, False]
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]
    with pytest.raises(ZeroDivisionError), graph_of(network, ["1.weight"]): raise ZeroDivisionError
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]


def test_the_second_pass_drops_the_same_values():
    """Dual numbers go through the network again: only the same random numbers give the derivative of that pass."""
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Dropout(0.5), nn.Conv2d(64, 2, 1)).double().train()
    x, direction = torch.randn(1, 3, 4, 4).double(), {"2.weight": torch.randn(2, 64, 1, 1).double()}
    seen = SyntheticPass(network, x, ["2.weight"])
    torch.rand(5)  # the generator has moved on
    state = torch.get_rng_state()
    again = directional_derivative(network, direction, x, seen.random_state)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(again, seen.directional_derivative(direction), atol=1e-6)  # by its tape
    step = 1e-7
    with torch.no_grad():
        network[2].weight += step * direction["2.weight"]
        torch.set_rng_state(seen.random_state)
        moved = log_probabilities(network, x)
    assert torch.allclose((moved - seen.log_probs) / step, again, atol=1e-4)


def test_convolutions_in_groups_are_left_alone():
    """Mostly padding, which would be the quicker way's, but in two groups."""
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 2, 3, 3)
    expected = torch.nn.functional.conv2d(x, weight, padding=4, dilation=4, groups=2)
    with FastConvolutions(): got = torch.nn.functional.conv2d(x, weight, padding=4, dilation=4, groups=2)
    assert torch.equal(got, expected)


def test_the_products_of_tiles_are_counted():
    """Two maps of 8 x 8 pixels are 4 tiles each, with 36 products, and sums, for each of 64 x 32 pairs of channels."""
    with FlopCounterMode(display=False) as counter:
        torch.ops.lagm.winograd_conv2d(torch.zeros(2, 64, 8, 8), torch.zeros(32, 64, 3, 3), 1, False)
    assert counter.get_total_flops() == 2 * 36 * 2 * 4 * 64 * 32


def test_the_tangent_of_dropout_by_hand():
    """Of w * x, three quarters dropped, the rest times 4, at w = 2: the slope is half the result. (As on GPUs.)"""
    network, x = nn.Linear(1, 1, bias=False), torch.arange(1.0, 41.0)[:, None]
    with torch.no_grad(): network.weight.fill_(2.0)
    result, tape = record(network, lambda: torch.native_dropout(x * network.weight, 0.75, True)[0])
    kept = result != 0
    assert 0 < kept.sum() < 40 and torch.equal(result[kept], (8 * x)[kept])
    assert torch.allclose(tape.tangent({"weight": torch.ones(1, 1)}, result), result / 2)


# --- changes of pictures


def test_draws_go_both_ways_and_half_are_mirrored():
    """A thousand draws: turns of -15 to 15 degrees about zero, shifts alike, and about half of them mirrored."""
    images, quiet = torch.zeros(1000, 3, 8, 8), dict(scale=(1, 1), hue=0, saturation=(1, 1), brightness=(1, 1))
    maps = Augment(flip=False, rotate=15, shift=0.1, **quiet).draw(images, random_generator(0)).maps
    turns = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).rad2deg()
    assert turns.min() < -14 and turns.max() > 14 and turns.abs().max() <= 15.001 and turns.mean().abs() < 1
    offsets = maps[:, :, 2]  # minus twice the shift, turned
    assert offsets.mean(0).abs().max() < 0.02 and offsets.min() < -0.19 and offsets.max() > 0.19
    maps = Augment(flip=True, rotate=0, shift=0, **quiet).draw(images, random_generator(0)).maps
    assert maps[:, 0, 0].unique().tolist() == [-1, 1] and 0.45 < (maps[:, 0, 0] < 0).float().mean() < 0.55
    assert (maps[:, 1, 1] == 1).all()


# --- generators


def test_the_clamp_grows_with_the_gain():
    """NVIDIA's layers clamp at conv_clamp * gain; a layer that only adds a large bias shows it."""
    layer = SynthesisLayer(2, 2, 4, resolution=4, conv_clamp=3.0)
    with torch.no_grad(): layer.bias.copy_(torch.tensor([100.0, -100.0]))
    x, w = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4)
    for gain in (1.0, math.sqrt(0.5), 0.5):
        high, low = layer(x, w, "none", gain=gain).unbind(1)
        assert high.unique().item() == pytest.approx(3 * gain) and low.unique().item() == pytest.approx(-3 * gain)
    # not clamped: sqrt(2) gain, and a fifth of it below zero
    with torch.no_grad(): layer.bias.copy_(torch.tensor([1.0, -1.0]))
    high, low = layer(x, w, "none", gain=0.5).unbind(1)
    assert high.unique().item() == pytest.approx(0.5 * SQRT2) and low.unique().item() == pytest.approx(-0.1 * SQRT2)
    rgb = ToRGB(2, 3, 4, conv_clamp=3.0)
    with torch.no_grad(): rgb.bias.copy_(torch.tensor([100.0, -100.0, 1.0]))
    assert rgb(x, w)[0, :, 0, 0].tolist() == [3.0, -3.0, 1.0]


def test_each_layer_has_its_own_constant_noise():
    """By its number: on nothing, with a weight of 2, twice the normal numbers of that seed."""
    for number in (0, 3):
        layer = NoiseLayer(1, 4, number)
        with torch.no_grad(): layer.weight.fill_(2.0)
        expected = 2 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(number))
        assert torch.equal(layer(torch.zeros(1, 1, 4, 4), "const", None), expected)


def test_the_generators_average_by_hand():
    """A half-life of half a batch: each step leaves a quarter of the way. 0, 1.5, 1.875 on the way to 2."""
    small = dict(resolution=16, z_dim=4, w_dim=4, mapping_layers=1, channel_base=64, channel_max=8)
    recipe = GANRecipe(batch=8, ema_halflife=4, ema_rampup=100.0, discriminator_channels=(4,), **small)
    trainer = GANTrainer(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), recipe)
    trainer.seen = 8
    for network, value in ((trainer.generator, 2.0), (trainer.average, 0.0)):
        with torch.no_grad():
            for p in network.parameters(): p.fill_(value)
    for expected in (1.5, 1.875):
        trainer._average()
        assert all(torch.allclose(p, torch.tensor(expected)) for p in trainer.average.parameters())


class OneClass(nn.Module):
    """An annotator that is sure of one class, to a degree."""
    n_classes = 3

    def __init__(self, c, probability):
        super().__init__()
        rest = (1 - probability) / 2
        self.register_buffer("logits", torch.tensor([probability if i == c else rest for i in range(3)]).log().view(1,
                3, 1, 1))
        self.dropout = nn.Dropout(0.9)

    def forward(self, features): return self.dropout(self.logits.expand(1, 3, *features[-1].shape[-2:]) + 20) - 20


def test_a_pair_by_majority_and_by_mean():
    """Two annotators lean to class 1 (0.4), one is sure of class 2 (0.98): the majority says 1, the mean 2."""
    annotators = [OneClass(1, 0.4), OneClass(1, 0.4), OneClass(2, 0.98)]
    stacked = torch.stack([a.logits[0].exp() for a in annotators])
    assert decide(stacked, "majority").item() == 1 and decide(stacked, "mean").item() == 2
    votes = torch.tensor([[0.33, 0.34, 0.33]] * 3 + [[0.0, 0.0, 1.0]] * 2)[:, :, None, None]  # 3 to 2
    assert decide(votes, "majority").item() == 1 and decide(votes, "mean").item() == 2
    for vote, label, confidence in (("majority", 1, (0.4 + 0.4 + 0.01) / 3), ("mean", 2, (0.3 + 0.3 + 0.98) / 3)):
        pair = make_pair(tiny_generator(), annotators, 0, Plan(n=1, vote=vote))
        assert pair.label.unique().tolist() == [label]
        assert pair.confidence.unique().mean().item() == pytest.approx(confidence, rel=1e-4)


def test_generated_labels_are_those_of_annotators_at_rest():
    """Dropout of 0.9 would label at random; afterwards the annotators are in the mode they came in."""
    annotator = OneClass(1, 0.5).train()
    pair = make_pair(tiny_generator(), [annotator], 0, Plan(n=1))
    assert pair.label.unique().tolist() == [1] and torch.allclose(pair.confidence, torch.tensor(0.5), atol=1e-4)
    assert annotator.training and annotator.dropout.training
    generator = tiny_generator()
    normed = tiny_annotators(generator)[0].train()
    before = {k: v.clone() for k, v in normed.state_dict().items()}
    first = GeneratedPairs(generator, [normed], Plan(n=2))[0]
    assert all(torch.equal(v, before[k]) for k, v in normed.state_dict().items())
    assert torch.equal(first[1], GeneratedPairs(generator, [normed.eval()], Plan(n=2))[0][1])


def test_another_epoch_goes_on_where_the_last_one_ended():
    """Of pictures 0 and 1 of a seed the second epoch makes 2 and 3."""
    generator = tiny_generator()
    annotators = tiny_annotators(generator)
    few, many = GeneratedPairs(generator, annotators, Plan(n=2)), GeneratedPairs(generator, annotators, Plan(n=4))
    few.set_epoch(1)
    for i in (0, 1): assert all(torch.equal(a, b) for a, b in zip(few[i], many[2 + i]))
    assert not torch.equal(few[0][0], many[0][0])


def test_each_process_changes_its_own_pictures_of_a_batch():
    """Two processes have pictures 0 and 2, and 1 and 3; together they change them as one process does."""
    (images, masks), augment = tiny_pictures(4), Augment()
    whole = change_batch(augment, [images, masks, torch.rand(4, 16, 16)], random_generator(3))
    for rank in (0, 1):
        own = change_batch(augment, [images[rank::2], masks[rank::2]], random_generator(3), rank, 2)
        assert torch.equal(own[0], whole[0][rank::2]) and torch.equal(own[1], whole[1][rank::2])


# --- scores and names


def test_an_interval_holds_its_share_of_the_draws(monkeypatch):
    """Of draws spread evenly from 0 to 1, the middle 95 and 60 per cent."""
    monkeypatch.setattr(evaluation, "resampled_scores", lambda *a: torch.linspace(0, 1, 1001, dtype=torch.float64))
    for level, low, high in ((0.95, 0.025, 0.975), (0.6, 0.2, 0.8)):
        found = evaluation.bootstrap(torch.eye(2)[None], level=level)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9) and found.value == 1


def test_the_last_error_of_a_log_is_the_one_that_counts(tmp_path):
    (tmp_path / "run.log").write_text("step 1\nlagm: error: first\nlagm: error: second\nbye\n")
    assert last_error(tmp_path / "run.log") == "second"
    (tmp_path / "run.log").write_text("step 1\nbye\n")
    assert last_error(tmp_path / "run.log") == "bye"


def test_the_boundary_radius_by_hand():
    """100 x 100 pixels have a diagonal of 141.4: 0.0075 of it are 1 pixel, 0.03 are 4. Two vertical borders, d apart,
    are near each other from radius d on.
    """
    def score(distance, tolerance):
        truth, guess = torch.zeros(2, 1, 100, 100, dtype=torch.long)
        truth[..., 50:], guess[..., 50 + distance:] = 1, 1
        boundary = BoundaryScore(2, tolerance)
        boundary.update(guess, truth)
        return boundary.compute()[0][1]

    assert [score(d, 0.0075) for d in (0, 1, 2)] == [1, 1, 0] and [score(d, 0.03) for d in (4, 5)] == [1, 0]
    assert [score(d, 0.0125) for d in (2, 3)] == [1, 0]  # 1.77 pixels are 2
    assert [score(d, 1e-6) for d in (1, 2)] == [1, 0]  # at least one pixel
    point = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    point[0, 0, 3, 3] = True
    assert [within(point, r).sum().item() for r in (0, 1, 2, 3)] == [1, 5, 13, 29]  # discs


def test_the_last_number_of_a_name_counts():
    assert number_in("face_34_rgb_07.png") == 7 and number_in("2022-run.epoch-12.safetensors") == 12
    assert number_in("5.v2") == 5


def test_a_digest_tells_types_and_shapes_apart():
    zeros = torch.zeros(4)
    kinds = [zeros, zeros.view(2, 2), zeros.view(4, 1), zeros.int(), zeros.double()[:2], torch.zeros(8).half(),
            torch.zeros(8).bfloat16(), torch.zeros(16, dtype=torch.uint8)]
    assert len({digest([t]) for t in kinds}) == len(kinds)
    assert digest([zeros, torch.ones(0)]) != digest([zeros])
    assert digest([torch.arange(6.0).view(2, 3).T]) == digest([torch.arange(6.0).view(2, 3).T.clone()])


# --- files


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Content flushed, then renamed, then the folder flushed: another order can lose the old file and the new one."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(core_files.os, "fsync",
            lambda handle: done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "content")
            or fsync(handle))
    monkeypatch.setattr(core_files.os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_json(tmp_path / "x.json", {"a": 1})
    assert [d for d in done if os.path.isdir("/proc/self/fd") or d == "name"] == (["content", "name", "folder"]
            if os.path.isdir("/proc/self/fd") else ["name"])


def test_a_block_of_numbers_is_held_against_its_check_sum():
    data = b"\x00\x00\x80?" * 2
    assert bytes(Storage(torch.float32, 2, memoryview(data), crc=zlib.crc32(data)).bytes()) == data
    with pytest.raises(Unreadable, match="check sum"):
        Storage(torch.float32, 2, memoryview(data), crc=zlib.crc32(data) ^ 1).bytes()


def test_three_times_its_size_and_32_mib_are_what_a_file_may_take():
    budget = Budget(1000)
    budget.spend(3 * 1000 + 32 * 2**20)
    with pytest.raises(Unreadable, match="many times its size"): budget.spend(1)


def test_five_tries_without_progress(tmp_path, monkeypatch):
    """Pauses of 1, 2, 4 and 8 seconds between them."""
    pytest.importorskip("requests")
    tries, pauses = [], []
    monkeypatch.setattr(fetching, "_attempt", lambda *a, **k: tries.append(1) and False)
    monkeypatch.setattr(fetching.time, "sleep", pauses.append)
    with pytest.raises(fetching.Unavailable, match="5 tries"):
        fetching.transfer("http://127.0.0.1:9/x", tmp_path / "part", progress=False)
    assert len(tries) == 5 and pauses == [1, 2, 4, 8]
