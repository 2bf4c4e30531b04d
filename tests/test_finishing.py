"""The finish: its length and shares by hand, its step by plain autograd, the same bits in one go or by itself, and
signs of a lost class.
"""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_training import CLASSES, RECIPES, ToyGenerator, labelled, networks, run, same
from tiny import tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter
from torch import nn

from lagm.core.errors import InputError
from lagm.training.batches import SyntheticBatches
from lagm.training.checkpoints import Identity
from lagm.training.finishing import anchor_labels, finish_step
from lagm.training.lagm import estimate_lagm, train_finish, train_lagm
from lagm.training.loop import Loop
from lagm.training.recipe import PAPER, get_recipe, labels_say
from lagm.training.signs import class_shares, signs, warning_sign
from lagm.training.state import Stage, TrainState
from lagm.training.steps import _reweighed, alignment
from lagm.training.watching import Cost

CPU, FAST = torch.device("cpu"), RECIPES["fast, finished"]


def test_length_and_share_by_hand():
    recipe = get_recipe("fast", steps=1000, finish=2.5, finish_anchor=4)
    assert [recipe.finish_steps(k) for k in (1, 2, 4, 6, 36)] == [4, 31, 156, 324, 1640]
    assert recipe.total_steps(4) == recipe.warm_segmenter + recipe.warm_annotator + 1000 + 156
    assert labels_say(2, 6) == 0.25 and labels_say(3, 0) == 1
    usual, never = get_recipe("fast", finish_anchor=2), get_recipe("fast", finish_anchor=0)
    assert [usual.anchor_every(k) for k in (1, 2, 3, 4, 5, 30)] == [1, 1, 1, 2, 2, 15] and never.anchor_every(9) == 0
    assert PAPER.finish_steps(10) == 0 and get_recipe("fast", finish=0).finish_steps(10) == 0
    assert get_recipe("fast", steps=4).finish_steps(1) == 1 and get_recipe("fast", steps=0).finish_steps(1) == 0
    assert get_recipe("fast", steps=4, finish=1.0, finish_anchor=0).finish_steps(1) == 4


@pytest.mark.parametrize("match", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_all_stages_in_bfloat16_with_a_real_generator(parts, match):
    """The generator is never run under autocast: truncation mixes its float32 mean style with styles from a linear
    layer.
    """
    generator, (images, masks) = tiny_generator(), tiny_pictures()
    recipe = get_recipe("fast", steps=2, warm_segmenter=1, warm_annotator=2, batch_labelled=2, batch_synthetic=2,
                        parts=parts, precision="bfloat16")
    trained = train_lagm(generator, tiny_annotators(generator)[0], tiny_segmenter(), images, masks, recipe, match=match,
                         progress=False)
    assert trained.history["losses"][-1]["stage"] == "finish"


@pytest.mark.parametrize("name", ["finish", "finish_anchor", "lr_finish"])
def test_impossible_values_are_named(name):
    for value in (-1, float("inf"), "much"):
        with pytest.raises(InputError, match=f"recipe: {name} is|{name}"): get_recipe("fast", **{name: value})


def test_the_step_is_the_gradient_of_the_weighted_sum():
    """Against plain autograd, with SGD of rate 1 and no momentum: the weights move by minus the gradient."""
    recipe = get_recipe("fast", optimizer="sgd", momentum=0.0, average=0.0, channels_last=False, augment=None,
                        batch_synthetic=2)
    annotator, segmenter = networks()
    reference, share = copy.deepcopy(segmenter), 0.3
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    players = TrainState(segmenter, annotator, recipe, CPU, weights)
    players.begin({"segmenter": 1.0}, averaged=False)
    batch = SyntheticBatches(ToyGenerator(), 2, (16, 16), 0)(0)
    images, masks = labelled()
    losses = finish_step(players, [(images, masks)], [batch], lambda b: anchor_labels([], annotator, b), share)

    with torch.no_grad(): q = annotator.eval()(batch.features).softmax(1)
    known = F.cross_entropy(reference.train()(images), masks, weight=weights)
    soft = -(q * reference(batch.images).log_softmax(1)).sum(1).mean()
    (share * known + (1 - share) * soft).backward()
    with torch.no_grad():
        for p in reference.parameters(): p -= p.grad
    for (name, a), b in zip(segmenter.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert losses["loss_label"].item() == pytest.approx(known.item(), rel=1e-5)
    assert losses["loss_anchor"].item() == pytest.approx(soft.item(), rel=1e-5)


def test_the_anchor_is_the_mean_of_what_the_teachers_say():
    annotator, segmenter = networks()
    batch = SyntheticBatches(ToyGenerator(), 3, (16, 16), 0, get_recipe("fast").augment)(0)
    modes = [m.training for n in (annotator, segmenter) for m in n.modules()]
    one, other = anchor_labels([segmenter], None, batch), anchor_labels([], annotator, batch)
    torch.testing.assert_close(anchor_labels([segmenter], annotator, batch), (one + other) / 2)
    assert modes == [m.training for n in (annotator, segmenter) for m in n.modules()]
    with torch.no_grad(): said = segmenter.eval()(batch.plain).softmax(1)
    torch.testing.assert_close(one, batch.follow(said))


def test_in_one_go_or_by_itself_the_same_bits():
    whole = run(FAST)
    matched = run(dataclasses.replace(FAST, finish=0.0))
    before = copy.deepcopy(matched.annotator.state_dict())
    finished = train_finish(copy.deepcopy(matched.segmenter), ToyGenerator(), *labelled(), FAST,
                            annotator=matched.annotator, progress=False)
    assert same(whole, finished) and finished.step == FAST.finish_steps(2) and whole.step == FAST.total_steps(2)
    assert not torch.equal(matched.segmenter.outc.weight, finished.segmenter.outc.weight)
    for (name, a), b in zip(before.items(), finished.annotator.state_dict().values()): assert torch.equal(a, b), name


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_finish_goes_on_to_the_same_bits(stop, tmp_path, monkeypatch):
    """The anchor of a network without annotator is how it came; it is kept with the state."""
    import lagm.training.loop as training_loop

    _, start = networks(3)
    options = dict(checkpoint_every=1, progress=False)
    whole = train_finish(copy.deepcopy(start), ToyGenerator(), *labelled(), FAST, **options)
    advance, count = training_loop.advance, [0]

    def counted(loop, bar):
        if count[0] == stop: raise KeyError
        count[0] += 1
        advance(loop, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(training_loop, "advance", counted)
        train_finish(copy.deepcopy(start), ToyGenerator(), *labelled(), FAST, checkpoint=tmp_path / "f.safetensors",
                     **options)
    _, other = networks(9)
    again = train_finish(other, ToyGenerator(), *labelled(), FAST, checkpoint=tmp_path / "f.safetensors", **options)
    for a, b in zip(whole.segmenter.state_dict().values(), again.segmenter.state_dict().values()):
        assert torch.equal(a, b)


def test_without_an_anchor_no_picture_is_generated():
    class Asleep(ToyGenerator):
        def __call__(self, z, rng=None): raise AssertionError("it was asked for a picture")

    done = train_finish(networks()[1], Asleep(), *labelled(), dataclasses.replace(FAST, finish_anchor=0.0),
                        progress=False)
    assert done.step == round(FAST.finish * FAST.steps)


def test_the_anchor_is_asked_less_often_where_labels_are_many():
    """Of five labelled pictures and an anchor that counts as two: every second step, with half of the say."""
    images, masks = (torch.cat([part] * 3)[:5] for part in labelled())
    recipe = dataclasses.replace(FAST, finish=6 / FAST.steps / labels_say(5, 2) ** 4, finish_anchor=2.0)
    done = train_finish(networks()[1], ToyGenerator(), images, masks, recipe, progress=False, record_every=1)
    assert ["loss_anchor" in record for record in done.history["losses"]] == [True, False] * 3


def test_an_estimate_knows_that_the_anchor_is_dear():
    """Costs of four steps: 9 s at the very first, then 1 s, and 4 s whenever the anchor is asked, each second time."""
    import lagm.training.loop as training_loop

    times, taken = iter([9.0, 1.0, 4.0]), []
    stage = Stage("finish", 10, lambda within: taken.append(within) or {}, {}, period=2)
    state = TrainState(networks()[1], None, dataclasses.replace(FAST, average=0.0), CPU)

    def measured(function, device):
        function()
        return Cost(next(times), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "measure", measured)
        estimate = Loop(state, [stage], Identity(FAST, 0, "none", "", ""), progress=False).estimate()
    assert taken == [0, 1, 2] and estimate.steps["finish"] == (10, 2.5)


def test_in_parts_and_estimated():
    recipe = dataclasses.replace(FAST, parts=2)
    assert same(run(recipe), run(recipe))
    estimate = estimate_lagm(ToyGenerator(), *networks(), *labelled(), FAST, progress=False)
    assert estimate.steps["finish"][0] == FAST.finish_steps(2)


def test_no_finish_is_refused_by_itself():
    with pytest.raises(InputError, match="finish is 0.0 of 6 steps"):
        train_finish(networks()[1], ToyGenerator(), *labelled(), dataclasses.replace(PAPER, steps=6), progress=False)
    with pytest.raises(InputError, match="no option valdation; did you mean validation"):
        train_finish(networks()[1], ToyGenerator(), *labelled(), FAST, valdation=1)


# --- signs -----------------------------------------------------------------------------------------------------------

def test_shares_and_signs_by_hand():
    masks = torch.tensor([[[0, 0, 0, 1], [1, 2, 255, 255]]])
    assert class_shares(masks, 4).tolist() == [0.5, 2 / 6, 1 / 6, 0]
    named = torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 3]]])
    found = signs(named, torch.tensor([[[0, 0, 0, 0], [1, 1, 2, 2]]]), masks, 4)
    assert found["agreement"] == 0.75 and found["shares"] == pytest.approx([1.0, 1.125, 0.0, None])
    assert warning_sign(found) == warning_sign(found, ["a", "b", "c", "d"]).replace("c (0.00)", "class 2 (0.00)") != ""
    assert warning_sign({"agreement": 0.4,
                         "shares": [1.0, None]}).startswith("annotator and segmenter agree on 40 % of the pixels only")
    assert warning_sign({"agreement": 0.6, "shares": [0.3, None]}) == ""


def test_a_run_says_when_a_class_is_lost():
    """An annotator that cannot name the last class, in a run that is long enough to be told."""
    class Blind(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.n_classes = inner, inner.n_classes
        def forward(self, features):
            return self.inner(features) - 50.0 * F.one_hot(torch.tensor(CLASSES - 1), CLASSES)[:, None, None]

    annotator, segmenter = networks()
    recipe = get_recipe("fast", steps=100, warm_segmenter=1, warm_annotator=1, finish=0.0, batch_labelled=1,
                        batch_synthetic=1)
    with pytest.warns(UserWarning, match=r"names too little of .*class 3 \(0.00\)"):
        done = run(recipe, nets=(Blind(annotator), segmenter))
    assert [record["step"] for record in done.history["signs"]] == [102] and done.history["signs"][0]["shares"][-1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(FAST).history["signs"] == []  # too short to be judged


# --- the annotator's warm start --------------------------------------------------------------------------------------

def test_alignment_by_hand():
    class Constant(nn.Module):
        """Says the same everywhere: 80, 15, 4 and 1 per cent."""
        n_classes = CLASSES
        def forward(self, images):
            return torch.tensor([0.80, 0.15, 0.04, 0.01]).log()[None, :, None, None].expand(len(images), -1, 16, 16)

    masks = torch.tensor([0] * 40 + [1] * 30 + [2] * 28 + [3] * 2).reshape(1, 10, 10)
    players = TrainState(Constant(), networks()[0], get_recipe("fast", align=5.0), CPU)
    factors = alignment(players, SyntheticBatches(ToyGenerator(), 2, (16, 16), 0), masks)
    assert factors.tolist() == pytest.approx([0.5, 2.0, 5.0, 2.0], rel=1e-5)  # the third: 7, but 5 at most
    q = torch.tensor([0.80, 0.15, 0.04, 0.01]).reshape(1, 4, 1, 1)
    assert _reweighed(q, factors).flatten().tolist() == pytest.approx([0.4 / 0.92, 0.3 / 0.92, 0.2 / 0.92, 0.02 / 0.92],
                                                                     rel=1e-5)
    assert _reweighed(q, None) is q
    none = alignment(players, SyntheticBatches(ToyGenerator(), 2, (16, 16), 0), masks.clamp(max=2))
    assert none[3].item() == pytest.approx(0.2)  # a class that no mask shows


def test_an_aligned_warm_start_names_what_the_segmenter_hardly_finds():
    """S finds the last class in a thousandth of the pixels' probability; the masks show it in a quarter."""
    class Shy(nn.Module):
        n_classes = CLASSES
        def __init__(self):
            super().__init__()
            self.outc = nn.Conv2d(3, CLASSES, 1)
        def forward(self, images):
            return self.outc(images) * 0.01 - 5.0 * F.one_hot(torch.tensor(CLASSES - 1), CLASSES)[:, None, None]

    def share(align):
        recipe = get_recipe("fast", steps=0, warm_segmenter=0, warm_annotator=60, lr_warm=1e-2, align=align,
                            matched="all")
        torch.manual_seed(0)
        done = run(recipe, nets=(networks()[0], Shy()))
        with torch.no_grad():
            q = done.annotator(ToyGenerator()(torch.zeros(8, 4), torch.Generator().manual_seed(0))[1]).softmax(1)
        return q.mean((0, 2, 3))[-1].item()

    assert share(0.0) < 0.02 < 0.04 < share(20.0)  # 0.002 and 0.045 are said to it


def test_an_estimate_leaves_no_factors_behind(monkeypatch):
    """A long run tells its estimate first; the segmenter that this measures with is not the one to align."""
    import lagm.training.lagm as training
    import lagm.training.loop as training_loop

    seen = []
    monkeypatch.setattr(training, "alignment", lambda *given: seen.append(alignment(*given)) or seen[-1])
    plain = run(FAST)
    assert len(seen) == 1
    monkeypatch.setattr(training_loop, "LONG", 1)
    told = train_lagm(ToyGenerator(), *networks(), *labelled(), FAST, progress=True)
    assert same(plain, told) and len(seen) == 3 and torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
