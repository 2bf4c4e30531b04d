"""The gradient distance against golden numbers, and the two ways to differentiate it against each other."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lagm.core.errors import InputError
from lagm.matching.distances import METRICS, REDUCTIONS, distance, distance_and_derivative, layer_cosines
from lagm.matching.forward import SyntheticPass, directional_derivative, match_forward_mode
from lagm.matching.gradients import clean_gradients, labelled_gradient, match_double_backward, soft_cross_entropy
from lagm.models.segmenters import UNet, matched_parameter_names

GOLDEN = load_file(Path(__file__).parent / "golden" / "matching_distances.safetensors")
CLASSES = 5


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def problem(width=8, levels=2, size=16, dtype=torch.float32):
    torch.manual_seed(0)
    segmenter = UNet(CLASSES, width=width, levels=levels).to(dtype)
    images_l, images_s = torch.randn(2, 2, 3, size, size).to(dtype)
    masks = torch.randint(0, CLASSES, (2, size, size))
    labels = torch.randn(2, CLASSES, size, size).softmax(1).to(dtype)
    return segmenter, images_l, masks, images_s, labels


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distance_agrees_with_golden(metric, reduction):
    gradients_s, gradients_l = ([GOLDEN[f"{side}.{i}"] for i in range(6)] for side in ("syn", "real"))
    expected = GOLDEN[f"{metric}.{reduction}"].item()
    assert distance(gradients_s, gradients_l, metric, reduction).item() == pytest.approx(expected, rel=1e-5)
    value, _ = distance_and_derivative(gradients_s, gradients_l, metric, reduction)
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_closed_form_derivative_is_autograds(metric, reduction):
    gradients_s, gradients_l = ([GOLDEN[f"{side}.{i}"].clone() for i in range(6)] for side in ("syn", "real"))
    # rows that try to break it
    gradients_s[4][0], gradients_s[4][1], gradients_l[4][2] = 0, gradients_s[4][1] * 1e-9, 0
    leaves = [g.clone().requires_grad_() for g in gradients_s]
    expected = torch.autograd.grad(distance(leaves, gradients_l, metric, reduction), leaves, allow_unused=True)
    _, derivatives = distance_and_derivative(gradients_s, gradients_l, metric, reduction)
    for derivative, right in zip(derivatives, expected, strict=True):
        if right is None: assert not derivative.any()
        else: torch.testing.assert_close(derivative, right, rtol=1e-5, atol=1e-9)


def test_layer_cosines_are_the_distance_taken_apart():
    gradients_s, gradients_l = ([GOLDEN[f"{side}.{i}"] for i in range(6)] for side in ("syn", "real"))
    cosines = layer_cosines([f"p{i}" for i in range(6)], gradients_s, gradients_l)
    assert list(cosines) == [f"p{i}" for i, g in enumerate(gradients_s) if g.ndim > 1]
    whole = sum(1 - c for c in cosines.values()) / 6
    assert distance(gradients_s, gradients_l).item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("way", [match_forward_mode, match_double_backward])
def test_the_gradient_is_linear_in_the_labels(way):
    segmenter, images_l, masks, images_s, labels = problem(dtype=torch.double)
    names = matched_parameter_names(segmenter, "all")
    gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
    other = torch.randn_like(labels).softmax(1)
    mixture = 0.3 * labels + 0.7 * other
    of = [way(segmenter, names, images_s, q, gradients_l).gradients_s for q in (labels, other, mixture)]
    for a, b, mixed in zip(*of): torch.testing.assert_close(mixed, 0.3 * a + 0.7 * b, rtol=1e-8, atol=1e-10)


def test_wrong_arguments_are_refused():
    g = [torch.ones(2, 3)]
    for arguments, says in [((g, g, "cos"), "cosine, l2, dotprod"), ((g, g, "l2", "max"), "mean, sum"),
                            ((g, []), "pair up"), ((g, [torch.ones(3, 2)]), "pair up"),
                            (([torch.ones(3)], [torch.ones(3)]), "two or more dimensions")]:
        with pytest.raises(InputError, match=says): distance(*arguments)
    segmenter, images, masks, _, labels = problem()
    with pytest.raises(InputError, match="outd.weight"): labelled_gradient(segmenter, ["outd.weight"], images, masks)
    with pytest.raises(InputError, match="differ in shape"): soft_cross_entropy(labels, labels[..., 1:])


def test_labelled_gradient_ignores_255():
    segmenter, images, masks, _, _ = problem()
    segmenter.eval()
    masks[0, :8] = 255
    gradients, loss = labelled_gradient(segmenter, ["outc.weight"], images, masks)
    log_probs = segmenter(images).log_softmax(1).movedim(1, -1)[masks != 255]
    expected = F.nll_loss(log_probs, masks[masks != 255])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected, segmenter.outc.weight)[0])


@pytest.mark.parametrize("group", ["all", "outc", "up", "conv"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_is_double_backward(group, training):
    """In double precision, where only a mistake could make a difference: batch norm's statistics included."""
    segmenter, images_l, masks, images_s, labels = problem(dtype=torch.double)
    segmenter.train(training)
    names = matched_parameter_names(segmenter, group)
    gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
    for metric in METRICS:
        pair = copy.deepcopy(segmenter), copy.deepcopy(segmenter)
        once = match_forward_mode(pair[0], names, images_s, labels, gradients_l, metric)
        twice = match_double_backward(pair[1], names, images_s, labels, gradients_l, metric)
        assert once.loss.item() == pytest.approx(twice.loss.item(), rel=1e-9)
        assert relative(once.label_gradient, twice.label_gradient) < 1e-9
        assert all(torch.equal(a, b) for a, b in zip(pair[0].state_dict().values(), pair[1].state_dict().values()))


def test_forward_mode_is_double_backward_at_width_64():
    """The paper's U-Net in single precision."""
    segmenter, images_l, masks, images_s, labels = problem(width=64, levels=4, size=32)
    names = matched_parameter_names(segmenter, "all")
    gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
    twice = match_double_backward(copy.deepcopy(segmenter), names, images_s, labels, gradients_l)
    once = match_forward_mode(segmenter, names, images_s, labels, gradients_l)
    assert relative(once.label_gradient, twice.label_gradient) < 1e-5


@pytest.mark.parametrize("group", ["all", "outc", "conv"])
def test_autocast_and_channels_last(group):
    segmenter, images_l, masks, images_s, labels = problem()
    segmenter = segmenter.to(memory_format=torch.channels_last)
    images_s = images_s.contiguous(memory_format=torch.channels_last)
    names = matched_parameter_names(segmenter, group)
    with torch.autocast("cpu", torch.bfloat16):
        gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
        twice = match_double_backward(copy.deepcopy(segmenter), names, images_s, labels, gradients_l)
        once = match_forward_mode(segmenter, names, images_s, labels, gradients_l)
    assert once.label_gradient.dtype == torch.float32
    assert F.cosine_similarity(once.label_gradient.flatten(), twice.label_gradient.flatten(), dim=0) > 0.99


def test_dropout_draws_the_same_mask():
    class Noisy(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, images): return F.dropout(self.body(F.dropout(images, 0.3)), 0.5)

    segmenter, images_l, masks, images_s, labels = problem(dtype=torch.double)
    segmenter = Noisy(segmenter)
    names = [name for name, _ in segmenter.named_parameters()]
    gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
    torch.manual_seed(1)
    once, after_once = match_forward_mode(segmenter, names, images_s, labels, gradients_l), torch.get_rng_state()
    torch.manual_seed(1)
    twice, after_twice = match_double_backward(segmenter, names, images_s, labels, gradients_l), torch.get_rng_state()
    assert relative(once.label_gradient, twice.label_gradient) < 1e-9
    assert torch.equal(after_once, after_twice)


@pytest.mark.parametrize("way", [match_forward_mode, match_double_backward])
def test_shared_pass_serves_both_phases(way):
    segmenter, images_l, masks, images_s, labels = problem(dtype=torch.double)
    names = matched_parameter_names(segmenter, "all")
    gradients_l, _ = labelled_gradient(segmenter, names, images_l, masks)
    other = torch.randn_like(labels).softmax(1)

    plain = copy.deepcopy(segmenter)
    expected = way(plain, names, images_s, labels, gradients_l).label_gradient
    shared = SyntheticPass(segmenter, images_s)
    given = dict(synthetic_pass=shared) if way is match_forward_mode else dict(log_probs=shared.log_probs)
    match = way(segmenter, names, images_s, labels, gradients_l, **given)
    assert relative(match.label_gradient, expected) < 1e-9
    step, loss = shared.gradient(names, other, keep_graph=False)
    fresh = SyntheticPass(plain, images_s)
    expected_step, expected_loss = fresh.gradient(names, other)
    assert loss.item() == pytest.approx(expected_loss.item())
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(step, expected_step))
    assert segmenter.inc.bn1.num_batches_tracked == 2 and plain.inc.bn1.num_batches_tracked == 3


def test_directional_derivative_leaves_no_trace():
    segmenter, _, _, images, _ = problem()
    before, state = copy.deepcopy(segmenter.state_dict()), torch.get_rng_state()
    direction = {name: torch.ones_like(p) for name, p in segmenter.named_parameters()}
    directional_derivative(segmenter, direction, images)
    assert all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in segmenter.parameters())


def test_directional_derivative_against_a_difference_quotient():
    segmenter, _, _, images, _ = problem(dtype=torch.double)
    segmenter.eval()
    direction = {name: torch.randn_like(p) for name, p in segmenter.named_parameters()}
    change = directional_derivative(segmenter, direction, images)
    values = []
    for step in (1e-7, -2e-7):
        for name, p in segmenter.named_parameters(): p.data += step * direction[name]
        values.append(segmenter(images).log_softmax(1))
    assert relative((values[0] - values[1]).detach() / 2e-7, change) < 1e-4


def test_clean_gradients():
    tensors = [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), -float("inf")])]
    clean_gradients(tensors)
    assert torch.cat(tensors).tolist() == [1.0, 0.0, 1e5, -1e5]
