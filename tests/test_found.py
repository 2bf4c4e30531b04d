"""Labelled pictures found in the generator's space: what they add to the annotator's gradient; when there are none."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_training import ToyGenerator, labelled, networks
from tiny import tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter

from lagm.core.errors import InputError
from lagm.data.demo import Avatars, choose_labelled, stack
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator
from lagm.training.batches import SyntheticBatches
from lagm.training.inversion import Inversion, find_labelled
from lagm.training.lagm import train_lagm
from lagm.training.recipe import PAPER, get_recipe
from lagm.training.state import TrainState
from lagm.training.steps import imitation_step, matching_step

CPU, BRIEF = torch.device("cpu"), Inversion(steps=2, samples=2)
SHORT = get_recipe("fast", steps=3, warm_segmenter=2, warm_annotator=2, finish=16.0, batch_labelled=2,
                   batch_synthetic=2)


def moved(step, known, recipe):
    """How the annotator's weights move in one step of rate 1 without momentum: minus its gradient."""
    torch.manual_seed(1)
    annotator, segmenter = networks()
    before = [p.detach().clone() for p in annotator.parameters()]
    state = TrainState(segmenter, annotator, recipe, CPU, torch.tensor([1.0, 2.0, 0.5, 1.0]))
    state.begin({"annotator": 1.0, "segmenter": 0.0}, averaged=False)
    step(state, known)
    return annotator, [p.detach() - b for p, b in zip(annotator.parameters(), before)]


@pytest.mark.parametrize("stage", ["match", "warm"])
def test_the_annotator_gets_the_gradient_of_the_weighted_loss_on_top(stage):
    """Against plain autograd, at the weights that it had before the step."""
    recipe = get_recipe("fast", optimizer="sgd", momentum=0.0, average=0.0, channels_last=False, augment=None,
                        batch_labelled=2, batch_synthetic=2, truth=0.3)
    batch = SyntheticBatches(ToyGenerator(), 2, (16, 16), 0)(0)
    known = (SyntheticBatches(ToyGenerator(), 2, (16, 16), 5)(0).features, labelled()[1])

    def step(state, known):
        if stage == "warm": return imitation_step(state, [batch], known=known)
        names = [name for name, _ in state.segmenter.named_parameters()]
        return matching_step(state, names, [labelled()], [batch], learn=False, known=known)

    torch.manual_seed(1)
    fresh, _ = networks()
    _, without = moved(step, None, recipe)
    _, with_truth = moved(step, known, recipe)
    _, unweighted = moved(step, known, dataclasses.replace(recipe, truth=0.0))
    logits = fresh.train()(known[0])
    size = tuple(logits.shape[-2:])
    target = F.interpolate(known[1][:, None].float(), size, mode="nearest")[:, 0].long()
    loss = 0.3 * F.cross_entropy(logits, target, torch.tensor([1.0, 2.0, 0.5, 1.0]), ignore_index=255)
    gradients = torch.autograd.grad(loss, list(fresh.parameters()))
    assert max(g.abs().max() for g in gradients) > 1e-3
    for a, b, g in zip(with_truth, without, gradients): torch.testing.assert_close(a - b, -g, rtol=1e-3, atol=1e-5)
    for a, b in zip(unweighted, without): assert torch.equal(a, b)


def test_found_pictures_train_the_annotator_and_a_stopped_run_ends_in_the_same_bits(tmp_path):
    generator, (images, masks) = tiny_generator(), tiny_pictures()
    found = find_labelled(generator, images, masks, SHORT, plan=BRIEF, progress=False)
    assert len(found[0]) == len(generator.feature_channels) and len(found[1]) == len(images)

    def run(found, recipe=SHORT, **options):
        torch.manual_seed(0)
        return train_lagm(generator, tiny_annotators(generator)[0], tiny_segmenter(), images, masks, recipe,
                          found=found, progress=False, **options)

    whole, without = run(found), run(None)
    bits = lambda trained: [*trained.annotator.state_dict().values(), *trained.segmenter.state_dict().values()]
    assert not all(torch.equal(a, b) for a, b in zip(bits(whole), bits(without)))
    kept = dict(checkpoint=tmp_path / "run.safetensors", checkpoint_every=1, keep=20)
    run(found, **kept)
    for place in (3, 5):  # in the annotator's warm start, and in matching
        again = run(found, resume_from=tmp_path / f"run.step-{place:08d}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again))), place
    near = [f + 1e-6 for f in found[0]], found[1]  # as another number of threads rounds them
    assert run(near, resume_from=tmp_path / "run.step-00000005.safetensors").step == whole.step
    with pytest.raises(InputError, match="another run|found"): run(None, **kept)


def test_how_well_pictures_were_found_is_told():
    """The error is that of what is drawn, in the labelled pictures' form, from 0 to 1; by hand, for a wide band too."""
    generator, (images, masks) = tiny_generator(), tiny_pictures()
    for size, recipe in ((16, SHORT), (12, dataclasses.replace(SHORT, wide_crop=True))):
        x, y = images[..., :size, :16], masks[..., :size, :16]
        found = find_labelled(generator, x, y, recipe, plan=BRIEF, progress=False)
        assert found.images.shape == (len(x), 3, 16, 16) and found.features == found[0] and found.masks is found[1]
        drawn = found.images[:, :, 2:14] if recipe.wide_crop else found.images
        by_hand = [((a.clamp(-1, 1) - b) ** 2).mean().item() ** 0.5 / 2 for a, b in zip(drawn, x)]
        assert found.errors.tolist() == pytest.approx(by_hand, rel=1e-5) and 0 < min(by_hand)
        assert f"an error of {by_hand[0]:.1%}, " in str(found)


def test_a_face_far_from_the_others_is_found():
    """Two labelled pictures of the style whose faces differ most; at a rate that only falls they end at 0.13."""
    pool = Avatars("micah", "train")
    images, masks = stack(pool, choose_labelled(pool, 2, 1))
    found = find_labelled(load_generator("micah", Sampling(psi=1.0)), images, masks, seed=1, progress=False)
    assert found.errors.max() < 0.12 and found.errors.min() < 0.08


def test_where_there_is_no_space_nothing_is_found():
    images, masks = tiny_pictures()
    assert find_labelled(ToyGenerator(), images, masks, SHORT, plan=BRIEF) is None
    assert find_labelled(tiny_generator(), images, masks, PAPER, plan=BRIEF) is None
    assert find_labelled(tiny_generator(), images[:0], masks[:0], SHORT, plan=BRIEF) is None


def test_a_generator_is_searched_once_and_kept(tmp_path):
    generator, (images, masks) = tiny_generator(), tiny_pictures()
    first = find_labelled(generator, images, masks, SHORT, plan=BRIEF, folder=tmp_path, progress=False)
    stamp = (tmp_path / "inversion.safetensors").stat().st_mtime_ns
    again = find_labelled(copy.deepcopy(generator), images, masks, SHORT, plan=BRIEF, folder=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0])) and torch.equal(first[1], again[1])
    assert (tmp_path / "inversion.safetensors").stat().st_mtime_ns == stamp
