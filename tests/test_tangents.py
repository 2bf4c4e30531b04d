"""Tangents by replay against PyTorch's dual numbers, and what must never be overlooked."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lagm.matching import tangents
from lagm.matching.forward import SyntheticPass, directional_derivative, match_forward_mode
from lagm.matching.gradients import labelled_gradient, log_probabilities, match_double_backward
from lagm.matching.tangents import NoTangent, pushforward, record
from lagm.models.deeplab import DeepLabV3
from lagm.models.segmenters import UNet, matched_parameter_names


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def random_direction(network, names=None):
    return {n: torch.randn_like(p) for n, p in network.named_parameters() if names is None or n in names}


class Zoo(nn.Module):
    """Every operation with a rule, in one network."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.first, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm, self.plain_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.gate, self.scale, self.last = nn.Linear(8, 8), nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        a = F.relu(self.norm(self.first(x)), inplace=self.inplace)
        b = F.leaky_relu(self.grouped(F.max_pool2d(a, 2)), 0.1) + F.silu(self.strided(a)[..., :16, :16])
        b = self.plain_norm(F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=True))
        b = F.pad(b, (1, 1, 1, 1))[..., 1:-1, 1:-1] * 1
        if self.inplace: b += a
        else: b = b + a
        weights = self.gate(F.adaptive_avg_pool2d(b, 1).flatten(1)).sigmoid()[:, :, None, None]
        c = b * weights / self.scale - F.gelu(a) + F.avg_pool2d(b, 3, 1, 1).tanh()
        c = F.interpolate(self.up(F.avg_pool2d(c, 2)), size=b.shape[-2:], mode="nearest")
        c = F.dropout(c.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 0.3, self.training) * c.softmax(1)
        return self.last(torch.cat([c, 2 * a], 1)) + c.mean((2, 3), keepdim=True)[:, :5]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_every_rule(training, inplace):
    network, images = Zoo(inplace).double().train(training), torch.randn(2, 3, 32, 32).double()
    before, state = copy.deepcopy(network), torch.get_rng_state()
    result, tape = record(network, lambda: log_probabilities(network, images))
    assert tape.problem is None
    direction = random_direction(network)
    expected = directional_derivative(before, direction, images, state)
    assert relative(tape.tangent(direction, result), expected) < 1e-11
    for name in ("first.weight", "norm.weight", "norm.bias", "grouped.bias", "up.weight", "gate.weight", "gate.bias",
                 "scale", "last.bias"):  # alone
        one = {name: direction[name]}
        assert relative(tape.tangent(one, result), directional_derivative(before, one, images, state)) < 1e-11, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_every_rule_at_once(training, inplace):
    network, images = Zoo(inplace).double().train(training), torch.randn(2, 3, 32, 32).double()
    before, state, direction = copy.deepcopy(network), torch.get_rng_state(), random_direction(network)
    for names in (set(direction), {"first.weight"}, {"norm.bias"}, {"up.weight", "scale"}, {"last.bias"}):
        some = {name: direction[name] for name in names}
        torch.set_rng_state(state)
        change = pushforward(network, lambda: log_probabilities(network, images), some)
        assert relative(change, directional_derivative(before, some, images, state)) < 1e-11, names


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["U-Net", "DeepLab"])
def test_at_once_is_the_replay(kind, autocast):
    torch.manual_seed(0)
    network = (UNet(4, width=8, levels=2) if kind == "U-Net" else DeepLabV3(4, pretrained_backbone=False)).train()
    images = torch.randn(2, 3, 32, 32)
    direction = {n: d * 0.1 for n, d in random_direction(network).items() if d.ndim > 1}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        again = copy.deepcopy(network)
        torch.manual_seed(1)  # DeepLab has a dropout
        replayed = SyntheticPass(network, images).directional_derivative(direction)
        torch.manual_seed(1)
        at_once = SyntheticPass(again, images, tangents=False).directional_derivative(direction)
    assert relative(at_once, replayed) < (1e-2 if autocast else 1e-6)
    assert all(map(torch.equal, network.buffers(), again.buffers()))


def test_at_once_little_is_held(monkeypatch):
    """Of fifty and more operations only the tangents of maps that are still wanted: those of the skips."""
    held, network, images = [], UNet(4, width=4, levels=3), torch.randn(2, 3, 32, 32)
    follow = tangents._AtOnce._follow

    def counted(tape, *arguments):
        follow(tape, *arguments)
        held.append(len(tape.memory))

    monkeypatch.setattr(tangents._AtOnce, "_follow", counted)
    direction = random_direction(network)
    pushforward(network, lambda: log_probabilities(network, images), direction)
    assert len(held) > 50 and max(held) <= 8, (len(held), max(held))


def test_memory_that_is_used_again_has_no_old_tangent():
    """A map that does not move may lie where a moving one was."""
    layer, images = nn.Conv2d(3, 4, 1).double(), torch.randn(1, 3, 8, 8).double()

    def forward():
        total = layer(images)
        for i in range(20):
            moving = layer(images) * i
            del moving
            total = total + torch.full((1, 4, 8, 8), 0.5).double()
        return total

    direction = {"weight": torch.randn_like(layer.weight)}
    expected = F.conv2d(images, direction["weight"])
    assert relative(pushforward(layer, forward, direction), expected) < 1e-12


def test_what_has_no_rule_at_once_is_done_with_dual_numbers_and_tried_once(monkeypatch):
    network, images, tried = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU()), torch.randn(2, 3, 8, 8), []
    direction = random_direction(network)
    expected = directional_derivative(network, direction, images)
    def once(*arguments): return tried.append(1) or pushforward(*arguments)

    monkeypatch.setattr("lagm.matching.forward.pushforward", once)
    with pytest.warns(UserWarning, match="no tangent rule for aten.elu.*layer 1, a ELU"):
        for _ in range(2):
            change = SyntheticPass(network, images, tangents=False).directional_derivative(direction)
            assert torch.equal(change, expected)
    assert len(tried) == 1
    with pytest.raises(NoTangent, match="no parameter magic"): pushforward(network, lambda: images, {"magic": images})
    still = nn.Conv2d(3, 4, 1)
    with pytest.raises(NoTangent, match="does not depend"):
        pushforward(still, lambda: images * 2, random_direction(still))


def test_result_graph_and_statistics_are_as_without():
    network, images = UNet(4, width=4, levels=2), torch.randn(2, 3, 16, 16)
    plain = copy.deepcopy(network)
    expected = log_probabilities(plain, images)
    result, _ = record(network, lambda: log_probabilities(network, images))
    assert torch.equal(result, expected) and all(torch.equal(a, b) for a, b in zip(network.buffers(), plain.buffers()))
    result[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), plain.parameters()))


@pytest.mark.parametrize("name", ["relu", "relu_", "sigmoid", "tanh", "softmax", "log_softmax"])
def test_a_detached_copy_is_not_overlooked(name):
    """Autograd detaches some results itself; the network's own detach must still be seen."""
    layer = nn.Conv2d(3, 4, 1)
    def forward(x):
        y = getattr(torch, name)(layer(x), *([1] if "softmax" in name else []))
        return y * y.detach()
    result, tape = record(layer, lambda: forward(torch.randn(1, 3, 4, 4)))
    assert "detach" in tape.problem
    with pytest.raises(NoTangent, match="detach"): tape.tangent(random_direction(layer), result)
    images, direction = torch.randn(1, 3, 4, 4), random_direction(layer)
    with pytest.raises(NoTangent, match="detach"): pushforward(layer, lambda: forward(images), direction)


def test_what_is_not_seen_is_a_problem():
    layer = nn.Conv2d(3, 4, 1)
    images = torch.randn(1, 3, 4, 4)
    outside = layer.weight * 2  # depends on a parameter, before the tape looks
    _, tape = record(layer, lambda: F.conv2d(images, outside))
    assert "not seen" in tape.problem
    def in_place_below_a_view(x):
        y = layer(x)
        part = y[:, :2]
        y.relu_()
        return part + 1
    _, tape = record(layer, lambda: in_place_below_a_view(images))
    assert tape.problem
    result, tape = record(layer, lambda: layer(images), ["weight"])
    with pytest.raises(NoTangent, match="bias"): tape.tangent(random_direction(layer), result)


def test_a_cast_that_autocast_remembers_is_recorded():
    network, images = UNet(4, width=8, levels=2), torch.randn(2, 3, 16, 16)
    direction = {n: d for n, d in random_direction(network).items() if d.ndim > 1}
    expected = directional_derivative(network, direction, images)
    with torch.autocast("cpu", torch.bfloat16):
        network(images)  # autocast now holds the weights in bfloat16
        result, tape = record(network, lambda: log_probabilities(network, images))
    change = tape.tangent(direction, result)
    assert change.dtype == torch.float32 and F.cosine_similarity(change.flatten(), expected.flatten(), dim=0) > 0.95


def test_unknown_operation_falls_back_and_says_so_once():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
            self.layers = nn.Sequential(first, nn.ELU(), last)

        def forward(self, x): return self.layers(x)

    network, images, masks = Grouped().double(), torch.randn(2, 3, 8, 8).double(), torch.randint(0, 5, (2, 8, 8))
    labels, names = torch.rand(2, 5, 8, 8).softmax(1).double(), [n for n, _ in network.named_parameters()]
    gradients, _ = labelled_gradient(network, names, images, masks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        once = [match_forward_mode(network, names, images.flip(0), labels, gradients) for _ in range(2)]
    assert len([w for w in caught if "aten.elu" in str(w.message)]) == 1
    twice = match_double_backward(network, names, images.flip(0), labels, gradients)
    assert relative(once[1].label_gradient, twice.label_gradient) < 1e-9


def graph_size(tensor):
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen: continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return len(seen)


def test_deeplab_head_without_a_graph_through_the_backbone():
    torch.manual_seed(0)
    segmenter, images = DeepLabV3(4), torch.randn(4, 3, 64, 64)
    names = matched_parameter_names(segmenter, "head")
    whole = SyntheticPass(copy.deepcopy(segmenter), images, tangents=False)
    head = SyntheticPass(copy.deepcopy(segmenter), images, names)
    assert graph_size(head.log_probs) < 100 < graph_size(whole.log_probs) and len(head.tape.records) < 60
    assert all(p.requires_grad for p in segmenter.parameters())

    labels, masks = torch.rand(4, 4, 64, 64).softmax(1), torch.randint(0, 4, (4, 64, 64))
    with torch.random.fork_rng(): gradients, _ = labelled_gradient(copy.deepcopy(segmenter), names, -images, masks)
    results = []
    for match in (match_forward_mode, match_double_backward):
        network = copy.deepcopy(segmenter)
        torch.manual_seed(3)  # the head has dropout
        results.append((match(network, names, images, labels, gradients).label_gradient, network))
    assert relative(results[0][0], results[1][0]) < 1e-5
    for (name, a), b in zip(results[0][1].named_buffers(), results[1][1].buffers()): assert torch.equal(a, b), name
    assert results[0][1].main_net.backbone.bn1.num_batches_tracked == 1


def test_width_64_with_batch_norm_in_train_mode():
    torch.manual_seed(0)
    segmenter, images, labels = UNet(5, width=64), torch.randn(2, 3, 32, 32), torch.rand(2, 5, 32, 32).softmax(1)
    names = matched_parameter_names(segmenter, "all")
    gradients, _ = labelled_gradient(segmenter, names, -images, torch.randint(0, 5, (2, 32, 32)))
    other = copy.deepcopy(segmenter)
    once = match_forward_mode(segmenter, names, images, labels, gradients)
    twice = match_double_backward(other, names, images, labels, gradients)
    assert relative(once.label_gradient, twice.label_gradient) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(segmenter.buffers(), other.buffers()))
