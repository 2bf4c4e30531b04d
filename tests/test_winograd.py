"""Winograd's algorithm in PyTorch: the same function and derivatives as `conv2d`, compiled or not."""

import copy
import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lagm.core.errors import InputError
from lagm.matching.forward import directional_derivative, match_forward_mode
from lagm.matching.gradients import labelled_gradient, match_double_backward
from lagm.matching.tangents import record
from lagm.models.segmenters import UNet, matched_parameter_names
from lagm.ops import winograd as winograd
from lagm.ops.convolutions import FastConvolutions, WinogradConv2d, winograd_conv2d, winograd_fits
from lagm.ops.winograd import fused_winograd, is_fused, tiled_conv2d, tiled_weight_gradient, tiles_pay
from lagm.training.recipe import PAPER, get_recipe
from lagm.training.state import TrainState, surroundings
from lagm.training.steps import supervised_step

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def uncompiled(monkeypatch):
    """Inside `fused_winograd` the sums are plain PyTorch, and small convolutions take part."""
    monkeypatch.setattr(winograd, "can_compile", lambda: True)
    monkeypatch.setattr(winograd, "_compiled", lambda sums: sums)
    monkeypatch.setattr(winograd, "has_wide_registers", lambda: False)
    for name in ("CHANNELS", "TILES", "WORK", "SIDE"): monkeypatch.setattr(winograd, f"_LEAST_{name}", 1)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), inputs=st.integers(1, 9), outputs=st.integers(1, 9), height=st.integers(1, 30),
       width=st.integers(1, 30), dilation=st.integers(1, 5),
       seed=st.integers(0, 99), channels_last=st.booleans(), at_once=st.sampled_from([1, winograd._AT_ONCE]),
       many=st.sampled_from([1, 10**9]))
def test_it_is_the_convolution_and_its_gradients(batch, inputs, outputs, height, width, dilation, seed, channels_last,
                                                 at_once, many):
    """In double precision, for any size; whatever is done at once, by either kind of product."""
    rng = torch.Generator().manual_seed(seed)
    x, weight, gradient = (torch.randn(*shape, dtype=torch.double, generator=rng)
                           for shape in ((batch, inputs, height, width), (outputs, inputs, 3, 3),
                                         (batch, outputs, height, width)))
    if channels_last:
        x, weight, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, gradient))
    expected = F.conv2d(x, weight, padding=dilation, dilation=dilation)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, [1, 1], [dilation] * 2,
                                                             [dilation] * 2, False, [0, 0], 1, [True, True, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_AT_ONCE", at_once)
        patch.setattr(winograd, "_MANY_TILES", many)
        ours = (tiled_conv2d(x, weight, dilation, False), tiled_conv2d(gradient, weight, dilation, True),
                tiled_weight_gradient(x, gradient, dilation))
    for a, b in zip(ours, (expected, of_x, of_weight), strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("dilation", [1, 2])
def test_derivatives_of_first_and_second_order_and_forward_mode(uncompiled, dilation):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.double, requires_grad=True)
                       for shape in ((2, 2, 5, 4), (2, 2, 3, 3), (2,)))
    with fused_winograd():
        def convolve(x, weight, bias): return winograd_conv2d(x, weight, bias, dilation)
        assert torch.autograd.gradcheck(convolve, (x, weight, bias), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(convolve, (x, weight, bias))
        swapped = torch.randn(2, 2, 5, 4, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, weight: WinogradConv2d.apply(x, weight, dilation, True),
                                        (swapped, weight), check_forward_ad=True)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_backward_pass_after_the_context_is_right(uncompiled, dilation):
    torch.manual_seed(0)
    x, weight, gradient = (torch.randn(2, 8, 20, 20, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True),
                           torch.randn(2, 8, 20, 20))
    with fused_winograd(): y = winograd_conv2d(x, weight, None, dilation)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=dilation, dilation=dilation), (x, weight), gradient)
    for ours, usual in zip(torch.autograd.grad(y, (x, weight), gradient), expected, strict=True):
        assert relative(ours, usual) < 1e-5


def test_tangents_by_tape_and_by_dual_numbers(uncompiled):
    torch.manual_seed(0)
    network, images = UNet(4, width=8, levels=2).train(), torch.randn(2, 3, 24, 24)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters() if p.ndim > 1}
    exact = directional_derivative(copy.deepcopy(network).double(), {name: d.double() for name, d in direction.items()},
                                   images.double())
    with fused_winograd(), FastConvolutions():
        result, tape = record(network, lambda: network(images).log_softmax(1), [*direction])
        # all of them
        assert tape.problem is None and sum("_tiled" in apply.__qualname__ for _, _, apply in tape.records) == 10
        by_tape, by_duals = tape.tangent(direction, result), directional_derivative(network, direction, images)
        first = network.inc.conv1.weight  # alone: its input stands still
        result, tape = record(network, lambda: network.inc.conv1(images), ["inc.conv1.weight"])
        alone = tape.tangent({"inc.conv1.weight": torch.ones_like(first)}, result)
        result, tape = record(network,
                              lambda: network.inc.conv2(images.repeat(1, 3, 1, 1)[:, :8]
                                                        * network.inc.bn1.weight[:, None, None]), ["inc.bn1.weight"])
        through = tape.tangent({"inc.bn1.weight": torch.ones(8)}, result)
    assert relative(by_tape, exact) < 1e-4 and relative(by_duals, exact) < 1e-4
    assert relative(alone, F.conv2d(images, torch.ones_like(first), padding=1)) < 1e-5
    assert relative(through, F.conv2d(images.repeat(1, 3, 1, 1)[:, :8], network.inc.conv2.weight, padding=1)) < 1e-5


def matched(network, images, masks, labels, match):
    names = matched_parameter_names(network, "all")
    gradients, _ = labelled_gradient(network, names, images[0], masks)
    return match(network, names, images[1], labels, gradients).label_gradient


@pytest.mark.parametrize("match", [match_forward_mode, match_double_backward])
def test_it_keeps_the_matching_gradient(uncompiled, match):
    torch.manual_seed(0)
    segmenter, images, labels, masks = (UNet(4, width=16, levels=2), torch.randn(2, 2, 3, 32, 32),
                                        torch.rand(2, 4, 32, 32).softmax(1), torch.randint(0, 4, (2, 32, 32)))
    exact = matched(copy.deepcopy(segmenter).double(), images.double(), masks, labels.double(), match)
    usual = matched(copy.deepcopy(segmenter), images, masks, labels, match)
    with fused_winograd(), FastConvolutions(): quick = matched(copy.deepcopy(segmenter), images, masks, labels, match)
    assert not torch.equal(usual, quick) and relative(quick, exact) < 1e-3


def test_what_does_not_qualify_is_left_alone():
    weight = torch.randn(64, 64, 3, 3)
    with fused_winograd() as works:
        if not works: pytest.skip("needs torch.compile")
        for x in (torch.randn(2, 64, 64, 64), torch.randn(2, 64, 128, 128, dtype=torch.double),
                  torch.randn(2, 64, 128, 128, device="meta")):
            assert not winograd_fits(x, weight.to(x.dtype))
        x = torch.randn(2, 64, 128, 128)
        assert winograd_fits(x, weight) and winograd_fits(x, weight, 2) and not winograd_fits(x, weight, 24)
        with torch.autocast("cpu", torch.bfloat16): assert not winograd_fits(x, weight)
    assert not is_fused() and not winograd_fits(x, weight, 2)


def test_the_rule_counts_tiles(monkeypatch):
    def pays(batch, inputs, side, outputs, dilation=1, **options):
        return tiles_pay((batch, inputs, side, side), (outputs, inputs, 3, 3), dilation, **options)

    for wide in (False, True):
        monkeypatch.setattr(winograd, "has_wide_registers", lambda wide=wide: wide)
        assert pays(2, 256, 32, 256) and pays(2, 256, 32, 256, 2) and pays(2, 256, 32, 256, of="weights")
        assert not pays(1, 512, 16, 512) and not pays(2, 512, 32, 512, 8) and not pays(2, 16, 256, 512)
        # measured on wide registers: 64 tiles take longer than the definition there, 64 channels for the weights
        assert pays(2, 512, 16, 512) != wide and pays(4, 64, 128, 64)
        assert pays(4, 64, 128, 64, of="weights") != wide and pays(4, 64, 64, 512, of="weights") != wide
        assert not pays(0, 256, 32, 256) and not pays(0, 256, 32, 256, of="weights"), "an empty batch"
    assert not pays(4, 32, 64, 32) and pays(8, 512, 64, 512) and pays(8, 512, 64, 512, of="weights")


@pytest.mark.parametrize("wide", [False, True])
def test_each_gradient_takes_the_way_that_pays(uncompiled, monkeypatch, wide):
    monkeypatch.setattr(winograd, "has_wide_registers", lambda: wide)
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64, 128, 128), torch.randn(64, 64, 3, 3)
    expected = torch.autograd.functional.vjp(lambda a, b: F.conv2d(a, b, padding=1), (x, weight), torch.ones_like(x))[1]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with fused_winograd(), FastConvolutions(), FlopCounterMode(display=False) as counter:
        F.conv2d(x, weight, padding=1).backward(torch.ones_like(x))
    counted = {str(name).split(".")[-1]: count for name, count in counter.get_flop_counts()["Global"].items()}
    direct = 2 * 4 * 128 * 128 * 64 * 64 * 9
    rest = {"convolution_backward": direct} if wide else {"winograd_weight_gradient": direct // 4}
    assert counted == {"winograd_conv2d": direct // 2, **rest}
    assert relative(x.grad, expected[0]) < 1e-5 and relative(weight.grad, expected[1]) < 1e-5


def test_without_a_compiler_it_says_so_once_and_changes_nothing(monkeypatch):
    def broken(*_, **__): raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", broken)
    winograd.can_compile.cache_clear()
    x, weight = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    with pytest.warns(UserWarning, match="torch.compile does not work here \\(no compiler\\)") as said:
        for _ in range(2):
            with fused_winograd() as works, FastConvolutions(): quick = F.conv2d(x, weight, padding=2, dilation=2)
            assert not works and not is_fused() and torch.equal(quick, F.conv2d(x, weight, padding=2, dilation=2))
    winograd.can_compile.cache_clear()
    assert len([w for w in said if "torch.compile" in str(w.message)]) == 1


def test_the_recipe_switches_it_on_around_its_steps(uncompiled):
    with pytest.raises(InputError, match="compile_convolutions.*fast_convolutions=True"):
        get_recipe("paper", compile_convolutions=True)
    for on in (False, True):
        with surroundings(dataclasses.replace(PAPER, fast_convolutions=on, compile_convolutions=on)):
            assert is_fused() == on
        assert not is_fused()


@needs_compiler
def test_compiled_it_is_the_same_function_and_compiles_few_times():
    """Shapes, memory layouts, tapes and backward passes of all kinds share what is compiled: at most four versions of a
    sum (two layouts, batches of one), and no more for what comes later.
    """
    torch.manual_seed(0)
    counters = torch._dynamo.utils.counters["stats"]

    def everything(batch, inputs, outputs, height, width, dilation, layout):
        x, weight, dx, dweight, gradient = (torch.randn(*shape).contiguous(memory_format=layout)
                                            for shape in (2 * [(batch, inputs, height, width), (outputs, inputs, 3, 3)]
                                                          + [(batch, outputs, height, width)]))
        layer = torch.nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation,
                                bias=False).to(memory_format=layout)
        layer.weight = torch.nn.Parameter(weight)
        y, tape = record(layer, lambda: layer(x))
        of_weight, = torch.autograd.grad(y, layer.weight, gradient)
        x.requires_grad_()
        of_x, = torch.autograd.grad(layer(x), x, gradient)
        tangent = tape.tangent({"weight": dweight}, y)
        with forward_ad.dual_level():
            both = forward_ad.unpack_dual(winograd_conv2d(forward_ad.make_dual(x.detach(), dx),
                                                          forward_ad.make_dual(weight, dweight), None,
                                                          dilation)).tangent
        def exact(x, weight): return F.conv2d(x.double(), weight.double(), padding=dilation, dilation=dilation)
        x = x.detach()
        settings = [1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1, [True, True, False]
        gradients = torch.ops.aten.convolution_backward(gradient.double(), x.double(), weight.double(), None, *settings)
        for ours, expected in ((y, exact(x, weight)), (of_x, gradients[0]), (of_weight, gradients[1]),
                               (tangent, exact(x, dweight)), (both, exact(dx, weight) + exact(x, dweight))):
            assert relative(ours, expected) < 2e-5

    with fused_winograd() as works, FastConvolutions():
        assert works
        before = counters["unique_graphs"]
        everything(2, 64, 128, 64, 64, 1, torch.channels_last)
        everything(2, 256, 256, 32, 32, 1, torch.contiguous_format)  # the other kind of product
        first = counters["unique_graphs"] - before
        everything(2, 128, 64, 64, 64, 1, torch.channels_last)
        everything(3, 64, 96, 62, 81, 1, torch.contiguous_format)
        everything(2, 256, 128, 32, 48, 2, torch.channels_last)
        everything(4, 64, 128, 128, 64, 1, torch.channels_last)
        assert 1 <= first <= 7 and counters["unique_graphs"] - before == first
        everything(1, 64, 128, 64, 64, 1, torch.channels_last)
        assert counters["unique_graphs"] - before <= 14


@needs_compiler
def test_a_training_step_with_it_is_the_same_step():
    """The first step of a U-Net's supervised training, compiled, against the usual one: the same but for rounding, and
    again to the bit.
    """
    torch.manual_seed(0)
    start, images, masks = UNet(4, width=64, levels=1), torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    weights = []
    for recipe in (PAPER, *2
                   * [dataclasses.replace(PAPER, channels_last=True, fast_convolutions=True,
                                          compile_convolutions=True)]):
        network = copy.deepcopy(start)
        players = TrainState(network, None, recipe, torch.device("cpu"))
        players.begin({"segmenter": 0.1}, averaged=False)
        with surroundings(recipe): supervised_step(players, [(images, masks)])
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    usual, quick, again = weights
    origin = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert (torch.equal(quick, again) and not torch.equal(usual, quick)
            and (quick - usual).norm() < 1e-4 * (usual - origin).norm())
