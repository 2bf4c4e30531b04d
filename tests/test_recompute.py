"""What is computed again for a backward pass is what was there: to the bit, counted once, with nothing left behind."""

import contextlib
import dataclasses

import pytest
import second_device
import torch
from test_device import RUNS, lagm, losses
from test_device import second as second  # a fixture
from test_training import CLASSES, RECIPES, networks, run, same
from tiny import tiny_pictures
from torch import nn

from lagm.core.errors import InputError
from lagm.matching.forward import SyntheticPass
from lagm.models.segmenters import UNet
from lagm.ops.convolutions import FastConvolutions
from lagm.ops.recompute import recomputed
from lagm.training import steps
from lagm.training.recipe import Recipe, get_recipe
from lagm.training.state import TrainState

needs_second = pytest.mark.skipif(not second_device.prepare(), reason="this torch has no devices written in Python")
MORE = {
    "paper, double backward": dataclasses.replace(RECIPES["paper"], gradients="double"),
    "two parts": dataclasses.replace(RECIPES["fast"], parts=2),
    "part of each block": dataclasses.replace(RECIPES["fast"], shared_batch=False, matched=r".*conv2\.weight"),
    "half of each block, double": dataclasses.replace(RECIPES["paper"], matched=r".*(conv1|bn2).*", gradients="double"),
    "channels last, fast convolutions": dataclasses.replace(RECIPES["fast"], channels_last=True,
                                                            fast_convolutions=True),
}


@pytest.fixture
def without_tape(monkeypatch):
    """Matching takes dual numbers, as it does where passes are recomputed."""
    def untaped(segmenter, images, names=None, tangents=True): return SyntheticPass(segmenter, images, names, False)

    monkeypatch.setattr(steps, "SyntheticPass", untaped)


@pytest.mark.parametrize("name", [*RECIPES, *MORE])
def test_a_run_is_the_same_to_the_bit(name, without_tape):
    recipe = (RECIPES | MORE)[name]
    usual, spared = run(recipe), run(dataclasses.replace(recipe, recompute=True))
    assert same(usual, spared) and usual.history["losses"] == spared.history["losses"]
    for network in (spared.segmenter, spared.annotator):
        assert not [module for module in network.modules() if "forward" in vars(module)]


def test_with_the_tape_only_rounding_differs():
    usual, spared = run(RECIPES["paper"]), run(dataclasses.replace(RECIPES["paper"], recompute=True))
    for ours, theirs in zip(usual.annotator.state_dict().values(), spared.annotator.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_second
@pytest.mark.parametrize("name", RUNS)
def test_on_a_second_device(second, name):
    recomputing = RUNS[name] | {"recompute": True}
    found, expected = losses(lagm(device="second", **recomputing)), losses(lagm(**RUNS[name]))
    assert found == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in expected]


class Dilated(nn.Module):
    """Of its second convolution most products are with padding, so that `FastConvolutions` does it in nine pieces."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=12, dilation=12)
        self.drop, self.norm = nn.Dropout(), nn.BatchNorm2d(6)

    def forward(self, x): return self.norm(self.drop(self.wide(self.first(x).relu()))).relu()


def learnt(context, backward_inside=True):
    """Gradients, statistics and the next random number after a pass whose blocks are or are not done twice."""
    torch.manual_seed(0)
    network = nn.Sequential(Dilated(), nn.Conv2d(6, 2, 1)).train()
    images = tiny_pictures(2)[0].requires_grad_()
    with context(network):
        loss = network(images).square().mean()
        if backward_inside: loss.backward()
    if not backward_inside: loss.backward()
    return [images.grad, *(p.grad for p in network.parameters()), *network.buffers(), torch.rand(3)]


@pytest.mark.parametrize("inside", [True, False])
def test_dropout_statistics_and_pieces(inside):
    def usual(network): return FastConvolutions()

    def spared(network):
        stack = contextlib.ExitStack()
        stack.enter_context(recomputed(network, FastConvolutions))
        stack.enter_context(FastConvolutions())
        return stack

    for a, b in zip(learnt(usual, inside), learnt(spared, inside), strict=True): assert torch.equal(a, b)


def test_what_the_second_pass_is_to_be_like_counts():
    """Without `around` the pieces of the first pass are not those of the second, and torch says so."""
    def forgetful(network):
        stack = contextlib.ExitStack()
        stack.enter_context(recomputed(network))
        stack.enter_context(FastConvolutions())
        return stack

    with pytest.raises(torch.utils.checkpoint.CheckpointError): learnt(forgetful, backward_inside=False)


def test_contexts_in_contexts_and_mistakes_leave_nothing():
    network = UNet(CLASSES, width=4, levels=2)
    with recomputed(network):
        changed = {name for name, module in network.named_modules() if "forward" in vars(module)}
        with recomputed(network): assert network(torch.zeros(1, 3, 16, 16)).requires_grad
        assert changed == {name for name, module in network.named_modules() if "forward" in vars(module)} != set()
    with pytest.raises(ZeroDivisionError), recomputed(network): 1 / 0
    assert not [module for module in network.modules() if "forward" in vars(module)]


def test_a_failure_in_the_second_pass_leaves_who_asks_for_gradients():
    class Once(Dilated):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1: raise MemoryError("no more")
            return super().forward(x)

    network = Once()
    network.wide.weight.requires_grad_(False)
    with recomputed(network): loss = network(tiny_pictures(2)[0]).mean()
    network.wide.weight.requires_grad_(True)
    before = [b.clone() for b in network.buffers()]
    with pytest.raises(MemoryError): loss.backward()
    assert all(p.requires_grad for p in network.parameters())
    assert all(map(torch.equal, before, network.buffers()))


def test_without_a_graph_a_block_is_done_once():
    class Counted(Dilated):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    network = Counted()
    with recomputed(network), torch.no_grad(): network(tiny_pictures(2)[0])
    assert network.calls == 1
    with recomputed(network): network(tiny_pictures(2)[0]).mean().backward()
    assert network.calls == 3


@pytest.mark.parametrize("networks_of", ["attention", "residual"])
def test_graphs_of_other_networks_are_small(networks_of):
    from torchvision.models import resnet18
    torch.manual_seed(0)
    if networks_of == "residual": network, x = resnet18(), torch.randn(2, 3, 64, 64)
    else:
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        network, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(2, 64, 32)
    network.train()
    sizes, gradients = [], []
    for context in (lambda _: torch.enable_grad(), recomputed):
        torch.manual_seed(1)
        network.zero_grad()
        weights, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

        def note(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights: kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with context(network), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): out = network(x)
        sizes.append(sum(kept.values()))
        out.square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(map(torch.equal, *gradients))
    assert sizes[1] < 0.6 * sizes[0], sizes


def test_it_is_refused_beside_compiled_networks():
    with pytest.raises(InputError, match="recompute is True; choose one: a compiled network"):
        get_recipe("fast", recompute=True, compile=True)


def test_a_state_asks_for_it_in_passes_alone():
    annotator, segmenter = networks()
    state = TrainState(segmenter, annotator, dataclasses.replace(RECIPES["paper"], recompute=True), torch.device("cpu"))
    def changed(): return [network for network in (annotator, segmenter)
                           if any("forward" in vars(module) for module in network.modules())]
    assert not changed()
    with state.passes(): assert len(changed()) == 2
    assert not changed()


def test_a_run_that_found_no_memory_says_what_to_do_and_goes_on(tmp_path, monkeypatch):
    """The same numbers as a run that had enough, the tape's rounding apart; the command knows it as the same run."""
    path, recipe, step = tmp_path / "run.safetensors", RECIPES["paper"], steps.matching_step
    whole, done = run(recipe), []

    def greedy(*arguments, **keywords):
        done.append(1)
        if len(done) == 5: torch.empty(2**60)
        return step(*arguments, **keywords)

    monkeypatch.setattr("lagm.training.lagm.matching_step", greedy)
    with pytest.raises(InputError, match=r"match, step 5 of 6: no memory is left \(.*allocate.*recompute=True"):
        run(recipe, checkpoint=path, checkpoint_every=2)
    smaller = run(dataclasses.replace(recipe, recompute=True, keep_memory=True), checkpoint=path)
    assert len(done) == 5 + 2
    weights = (found.segmenter.state_dict().values() for found in (whole, smaller))
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("out of memory of names")])
def test_other_mistakes_are_told_as_they_are(monkeypatch, error):
    def wrong(*arguments, **keywords): raise error

    monkeypatch.setattr("lagm.training.lagm.matching_step", wrong)
    with pytest.raises(type(error), match=str(error)): run(RECIPES["paper"])


def test_the_runs_of_before_are_still_the_same_runs():
    """Names of kept runs come from the recipe's text, which does not tell how memory was saved."""
    assert repr(get_recipe("fast", recompute=True)) == repr(get_recipe("fast")) and "recompute" not in repr(Recipe())


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
     r"\(CUDA out of memory. Tried to allocate 2.00 GiB\)"), (MemoryError(), r"\(MemoryError\)")])
def test_other_words_for_no_memory_are_known(monkeypatch, error, says):
    def short(*arguments, **keywords): raise error

    monkeypatch.setattr("lagm.training.lagm.matching_step", short)
    with pytest.raises(InputError, match=says): run(RECIPES["paper"])
