"""Convolutions with less arithmetic: the same function and the same derivatives as PyTorch's."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from lagm.core.errors import InputError
from lagm.experiments.cost import WORKLOADS, make_step, prepare, usual_generator
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.stylegan2 import StyleGAN2
from lagm.matching.forward import directional_derivative, match_forward_mode
from lagm.matching.gradients import labelled_gradient, match_double_backward
from lagm.matching.tangents import record
from lagm.models.deeplab import DeepLabV3
from lagm.models.segmenters import UNet, matched_parameter_names
from lagm.ops import convolutions as convolutions
from lagm.ops.convolutions import (
    FastConvolutions,
    can_winograd,
    live_share,
    trimmed_conv2d,
    winograd_conv2d,
    winograd_fits,
)
from lagm.training.recipe import get_recipe

needs_winograd = pytest.mark.skipif(not can_winograd(), reason="this build of PyTorch has no NNPACK")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def everywhere(monkeypatch):
    """Winograd's algorithm for small convolutions, too."""
    monkeypatch.setattr(convolutions, "has_wide_registers", lambda: False)
    monkeypatch.setattr(convolutions, "_LEAST_CHANNELS", 4)  # on several threads: 8
    monkeypatch.setattr(convolutions, "LEAST_PIXELS", 16)


@needs_winograd
@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), inputs=st.integers(1, 20), outputs=st.integers(1, 20), height=st.integers(3, 40),
       width=st.integers(3, 40), seed=st.integers(0, 99), channels_last=st.booleans())
def test_winograd_is_the_convolution(batch, inputs, outputs, height, width, seed, channels_last):
    rng = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(batch, inputs, height, width, generator=rng),
                       torch.randn(outputs, inputs, 3, 3, generator=rng), torch.randn(outputs, generator=rng))
    if channels_last:
        x, weight = (x.contiguous(memory_format=torch.channels_last),
                     weight.contiguous(memory_format=torch.channels_last))
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(winograd_conv2d(x, weight, bias).double(), expected, rtol=1e-4,
                               atol=1e-4 * expected.abs().max().item())


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), rates=st.tuples(st.integers(1, 15), st.integers(1, 15)),
       bias=st.booleans())
def test_trimmed_is_the_dilated_convolution_with_all_derivatives(height, width, rates, bias):
    torch.manual_seed(0)
    x, weight = (torch.randn(2, 3, height, width, dtype=torch.double, requires_grad=True),
                 torch.randn(4, 3, 3, 3, dtype=torch.double, requires_grad=True))
    offset = torch.randn(4, dtype=torch.double) if bias else None
    results = []
    for y in (trimmed_conv2d(x, weight, offset, rates), F.conv2d(x, weight, offset, padding=rates, dilation=rates)):
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        results.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(n=st.integers(1, 40), rate=st.integers(1, 50))
def test_live_share_counts_the_products_that_are_not_with_padding(n, rate):
    seen = sum(0 <= place + offset < n for place in range(n) for offset in (-rate, 0, rate))
    assert live_share((n, n), (rate, rate)) == pytest.approx((seen / (3 * n))**2)


def test_what_does_not_qualify_is_left_alone_to_the_bit():
    x, cases = torch.randn(2, 64, 64, 64), []
    for options in (dict(padding=1, groups=2), dict(padding=1, stride=2), dict(padding=0), dict(padding="same"),
                    dict(padding=(1, 0)), dict(padding=2, dilation=2), dict(kernel_size=1),
                    dict(out_channels=8, padding=1)):
        cases.append(nn.Conv2d(64, options.pop("out_channels", 64), options.pop("kernel_size", 3), **options))
    for layer in cases:
        with FastConvolutions(): quick = layer(x)
        assert torch.equal(quick, layer(x)), layer
    x, layer = torch.randn(2, 128, 64, 64), nn.Conv2d(128, 128, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        with FastConvolutions(): quick = layer(x)
        assert torch.equal(quick, layer(x))
    x, layer = x[:, :16, :8, :8], nn.Conv2d(16, 16, 3, padding=1)
    double = copy.deepcopy(layer).double()
    with FastConvolutions():
        assert torch.equal(double(x.double()), F.conv2d(x.double(), double.weight, double.bias, padding=1))
    assert not winograd_fits(x.to("meta"), layer.weight.to("meta"))


@needs_winograd
@pytest.mark.parametrize("threads, wide, fits", [(1, False, True), (1, True, True), (2, False, True), (2, True, False)])
def test_narrow_registers_of_the_kernel_against_wide_ones_of_the_definition(monkeypatch, threads, wide, fits):
    monkeypatch.setattr(convolutions, "has_wide_registers", lambda: wide)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert winograd_fits(torch.zeros(1, 128, 64, 64), torch.zeros(128, 128, 3, 3)) == fits


@needs_winograd
def test_without_the_kernel_nothing_changes(monkeypatch):
    monkeypatch.setattr(convolutions, "has_wide_registers", lambda: False)
    x, layer = torch.randn(1, 128, 64, 64), nn.Conv2d(128, 128, 3, padding=1)
    usual = layer(x)
    with FastConvolutions(): assert not torch.equal(layer(x), usual)
    monkeypatch.setattr(convolutions, "can_winograd", lambda: False)
    with FastConvolutions(): assert torch.equal(layer(x), usual)


@needs_winograd
def test_tangents_by_tape_and_by_dual_numbers(everywhere):
    torch.manual_seed(0)
    network, images = UNet(4, width=8, levels=2).train(), torch.randn(2, 3, 24, 24)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters() if p.ndim > 1}
    exact = directional_derivative(copy.deepcopy(network).double(), {name: d.double() for name, d in direction.items()},
                                   images.double())
    with FastConvolutions():
        result, tape = record(network, lambda: network(images).log_softmax(1), [*direction])
        assert tape.problem is None and any("_winograd" in apply.__qualname__ for _, _, apply in tape.records)
        by_tape, by_duals = tape.tangent(direction, result), directional_derivative(network, direction, images)
    assert relative(by_tape, exact) < 1e-4 and relative(by_duals, exact) < 1e-4
    with forward_ad.dual_level():  # one argument alone may move
        x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
        moved = forward_ad.unpack_dual(winograd_conv2d(forward_ad.make_dual(x, x), weight)).tangent
    assert relative(moved, F.conv2d(x, weight, padding=1)) < 1e-5


def test_matching_gradients_of_the_deeplab_head_in_double_precision():
    torch.manual_seed(0)
    segmenter, images, labels, masks = (DeepLabV3(4).double(), torch.randn(2, 2, 3, 32, 32).double(),
                                        torch.rand(2, 4, 32, 32).softmax(1).double(), torch.randint(0, 4, (2, 32, 32)))
    names, results = matched_parameter_names(segmenter, "head"), []
    for match, quick in ((match_double_backward, False), (match_forward_mode, False), (match_forward_mode, True),
                         (match_double_backward, True)):
        network = copy.deepcopy(segmenter)
        torch.manual_seed(3)  # the head has dropout
        with FastConvolutions() if quick else contextlib.nullcontext():
            gradients, _ = labelled_gradient(network, names, images[0], masks)
            results.append(match(network, names, images[1], labels, gradients).label_gradient)
    assert max(relative(result, results[0]) for result in results) < 1e-9


@needs_winograd
def test_winograd_keeps_the_matching_gradient_in_float32(everywhere):
    torch.manual_seed(0)
    segmenter, images, labels, masks = (UNet(4, width=16, levels=2), torch.randn(2, 2, 3, 32, 32),
                                        torch.rand(2, 4, 32, 32).softmax(1), torch.randint(0, 4, (2, 32, 32)))
    names = matched_parameter_names(segmenter, "all")

    def label_gradient(dtype, quick):
        network = copy.deepcopy(segmenter).to(dtype)
        with FastConvolutions() if quick else contextlib.nullcontext():
            gradients, _ = labelled_gradient(network, names, images[0].to(dtype), masks)
            return match_forward_mode(network, names, images[1].to(dtype), labels.to(dtype), gradients).label_gradient

    usual, quick = label_gradient(torch.float32, False), label_gradient(torch.float32, True)
    assert not torch.equal(usual, quick) and relative(quick, label_gradient(torch.double, False)) < 1e-3


def test_the_usual_generator_is_the_same_function():
    torch.manual_seed(0)
    network = StyleGAN2(64, z_dim=16, w_dim=16, channel_base=4096, channel_max=64)
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength"): nn.init.constant_(parameter, 0.3)
    sampling = Sampling(0.7, 4, "random")
    ours = FrozenGenerator(network, sampling)
    z = ours.sample_z(2, torch.Generator().manual_seed(1))
    a, b = (ours(z, torch.Generator().manual_seed(2)),
            usual_generator(network, z, sampling, torch.Generator().manual_seed(2)))
    assert (relative(a.image, b.image) < 1e-4
            and all(relative(x, y) < 1e-4 for x, y in zip(a.features, b.features, strict=True)))


def test_the_plain_step_moves_both_networks_as_ours_does():
    plain, ours = (make_step(WORKLOADS["tiny"], variant) for variant in ("plain", "tangents"))
    before = [p.clone() for p in prepare(WORKLOADS["tiny"]).segmenter.parameters()]
    for step in (plain, ours): step(0)
    assert all(p.requires_grad for p in plain.setting.segmenter.parameters())
    for role in ("segmenter", "annotator"):
        a, b = (torch.cat([p.detach().flatten() for p in getattr(step.setting, role).parameters()])
                for step in (plain, ours))
        assert relative(a, b) < 1e-5
    assert not torch.equal(before[0], next(plain.setting.segmenter.parameters()))


def test_the_switch_excludes_compiling():
    with pytest.raises(InputError, match="fast_convolutions"): get_recipe("fast", fast_convolutions=True, compile=True)
