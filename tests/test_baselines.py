"""The baselines: a step by hand, the same warm start as matching, resuming, learning."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_generator, tiny_pictures, tiny_segmenter

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.data.augment import Augment
from lagm.models.annotator import FPNAnnotator
from lagm.training.lagm import train_lagm
from lagm.training.recipe import FAST
from lagm.training.state import TrainState
from lagm.training.teachers import (
    MEAN_TEACHER,
    SELF_TRAINING,
    Teaching,
    taught_step,
    teacher_labels,
    train_mean_teacher,
    train_self_training,
    train_taught,
)

RECIPE = dataclasses.replace(FAST, steps=6, warm_segmenter=5, warm_annotator=0, batch_labelled=2, batch_synthetic=2,
                             average=0.9)
TRAINERS = {"self-training": train_self_training, "mean teacher": train_mean_teacher}


def weights(network):
    return torch.cat([v.flatten().double() for v in network.state_dict().values()])


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


def test_labels_of_the_teacher():
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 5, 5)
    expected = (teacher[0](x) / (1 + 1e-5) ** 0.5).softmax(1)  # at rest, a new batch norm does almost nothing
    assert torch.allclose(teacher_labels(teacher, x, Teaching(hard=False)), expected, atol=1e-6)
    assert teacher.training and teacher[1].num_batches_tracked == 0
    hard = teacher_labels(teacher, x, Teaching(threshold=0.5))
    sure = expected.amax(1) >= 0.5
    assert (hard.sum(1).equal(sure.float()) and hard.argmax(1)[sure].equal(expected.argmax(1)[sure])
            and 0 < sure.sum() < sure.numel())


def test_the_weight_grows():
    ramp = Teaching(weight=2, ramp=0.5)
    assert [ramp.weight_at(s, 10) for s in (0, 5, 9)] == pytest.approx([2 * 2.718281828**-5, 2, 2])
    assert (ramp.weight_at(2, 10) == pytest.approx(2 * 2.718281828 ** (-5 * 0.36))
            and SELF_TRAINING.weight_at(0, 10) == 1)


def test_a_step_by_hand():
    recipe = dataclasses.replace(FAST, optimizer="sgd", momentum=0.0, lr_segmenter=0.1, average=0.0,
                                 channels_last=False)
    images, masks = tiny_pictures(2)
    synthetic, teacher = tiny_pictures(3, seed=5)[0], tiny_segmenter(3)
    expected = tiny_segmenter().train()
    w = torch.tensor([0.5, 1.0, 2.0])
    q = teacher.eval()(synthetic).softmax(1).detach()
    # the teacher's labels have the weights already
    loss = F.cross_entropy(expected(images), masks,
                           weight=w) + 0.3 * -(q * expected(synthetic).log_softmax(1)).sum(1).mean()
    loss.backward()
    players = TrainState(tiny_segmenter(), None, recipe, torch.device("cpu"), w)
    players.begin({"segmenter": 0.1}, False)
    losses = taught_step(players, teacher, [(images, masks)], [(synthetic, random_generator(0))], Teaching(hard=False),
                         0.3,
                         None)
    for p, e in zip(players.segmenter.parameters(), expected.parameters()):
        assert torch.allclose(p, e - 0.1 * e.grad, atol=1e-6)
    assert (losses["loss_label"] + 0.3 * losses["loss_s"]).item() == pytest.approx(loss.item(), rel=1e-5)


def test_labels_go_with_the_picture(generator):
    """A teacher that reads a colour, pictures that are only moved: the moved label is the label of the moved picture.
    """
    class Red(torch.nn.Module):
        def forward(self, x): return torch.cat([-x[:, :1], x[:, :1]], 1) * 50

    recipe = dataclasses.replace(FAST, average=0.0, channels_last=False)
    players = TrainState(torch.nn.Conv2d(3, 2, 1), None, recipe, torch.device("cpu"))
    players.begin({"segmenter": 0.0}, False)
    with torch.no_grad():
        for p, v in zip(players.segmenter.parameters(),
                        (torch.tensor([[-50.0, 0, 0], [50, 0, 0]])[:, :, None, None], torch.zeros(2))):
            p.copy_(v)
    images = F.interpolate(torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round() * 2 - 1,
                           size=(64, 64))
    masks = torch.zeros(4, 64, 64, dtype=torch.int64)
    only_moves = Augment(hue=0, saturation=(1, 1), brightness=(1, 1))
    losses = taught_step(players, Red(), [(images, masks)], [(images, random_generator(0))], Teaching(), 1.0,
                         only_moves)
    assert losses["loss_s"] < 1.0  # but for pixels at borders; labels that stayed where they were would give about 25


@pytest.mark.parametrize("name", TRAINERS)
def test_the_warm_start_is_that_of_matching(generator, name):
    recipe = dataclasses.replace(RECIPE, steps=0)
    baseline = dataclasses.replace(RECIPE, warm_segmenter=5, steps=0)
    images, masks = tiny_pictures(3)
    ours = train_lagm(generator, FPNAnnotator(generator.feature_channels, 3, channels=4), tiny_segmenter(), images,
                      masks, recipe, seed=4, progress=False)
    theirs = TRAINERS[name](tiny_segmenter(), generator, images, masks, recipe=baseline, seed=4, progress=False)
    assert weights(theirs.segmenter).equal(weights(ours.segmenter))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_stopped_run_goes_on_to_the_same_bits(generator, tmp_path, name):
    images, masks = tiny_pictures(3)
    arguments = dict(recipe=RECIPE, seed=1, progress=False, checkpoint_every=4)
    whole = TRAINERS[name](tiny_segmenter(), generator, images, masks, **arguments)
    calls = []

    class Fails:
        checked = True  # the look at the door would be the first call

        def __getattr__(self, key): return getattr(generator, key)
        def __call__(self, *a):
            calls.append(1)
            if len(calls) == 5: raise ZeroDivisionError
            return generator(*a)

    with pytest.raises(ZeroDivisionError):
        TRAINERS[name](tiny_segmenter(), Fails(), images, masks, checkpoint=tmp_path / "run.safetensors", **arguments)
    again = TRAINERS[name](tiny_segmenter(seed=9), generator, images, masks, checkpoint=tmp_path / "run.safetensors",
                           **arguments)
    assert weights(again.segmenter).equal(weights(whole.segmenter)) and again.step == whole.step == 11
    with pytest.raises(InputError, match="another run"):
        train_taught(tiny_segmenter(), generator, images, masks, Teaching(threshold=0.1), RECIPE, seed=1,
                     checkpoint=tmp_path / "run.safetensors", progress=False)


def test_the_fixed_teacher_is_fixed_and_the_mean_teacher_is_not(generator, monkeypatch):
    import lagm.training.teachers as module
    seen, whole = [], module.teacher_labels
    monkeypatch.setattr(module, "teacher_labels",
                        lambda teacher, *a: seen.append(weights(teacher)) or whole(teacher, *a))
    images, masks = tiny_pictures(3)
    train_self_training(tiny_segmenter(), generator, images, masks, recipe=RECIPE, progress=False)
    assert len(seen) == 6 and all(w.equal(seen[0]) for w in seen)
    seen.clear()
    train_mean_teacher(tiny_segmenter(), generator, images, masks, recipe=RECIPE, progress=False)
    assert not any(a.equal(b) for a, b in zip(seen, seen[1:]))


def test_they_learn():
    """Pictures of the right kind instead of a generator's."""
    class Pictures:
        def sample_z(self, n, rng): return torch.randint(0, 10**6, (n, 1), generator=rng)
        def __call__(self, z, rng): return torch.cat([tiny_pictures(1, seed=int(i))[0] for i in z]), []

    images, masks = tiny_pictures(4, seed=77)
    recipe = dataclasses.replace(FAST, steps=60, warm_segmenter=40, lr_warm=1e-2, lr_segmenter=5e-3, average=0.9,
                                 augment=Augment(rotate=5, hue=5), batch_labelled=4)
    from lagm.evaluation.metrics import evaluate
    for train in TRAINERS.values():
        trained = train(tiny_segmenter(width=8), Pictures(), images, masks, recipe=recipe, progress=False)
        assert evaluate(trained.segmenter, *tiny_pictures(20, seed=3), 3).fg_miou > 0.65


@pytest.mark.parametrize("change", [dict(teacher="strict"), dict(threshold=1.0), dict(weight=-1.0), dict(ramp=1.5)])
def test_teaching_that_makes_no_sense(change):
    with pytest.raises(InputError, match=next(iter(change))): Teaching(**change)


def test_mistakes(generator):
    images, masks = tiny_pictures(2)
    with pytest.raises(InputError, match="average"):
        train_mean_teacher(tiny_segmenter(), generator, images, masks, recipe=dataclasses.replace(RECIPE, average=0.0),
                           progress=False)
    with pytest.raises(InputError, match="warm_segmenter"):
        train_self_training(tiny_segmenter(), generator, images, masks,
                            recipe=dataclasses.replace(RECIPE, warm_segmenter=0), progress=False)
    with pytest.raises(InputError, match="labelled"):
        train_self_training(tiny_segmenter(), generator, images, masks + 5, recipe=RECIPE, progress=False)
    assert MEAN_TEACHER.teacher == "average"
