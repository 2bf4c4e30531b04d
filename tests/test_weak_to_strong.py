"""Weak to strong: boxes by hand, labels that go with the pictures, a step by hand, resuming, mistakes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from templates import run_cells
from tiny import tiny_generator, tiny_pictures, tiny_segmenter

from lagm.core.errors import InputError
from lagm.core.files import read_json
from lagm.core.seeds import random_generator
from lagm.data.augment import Augment
from lagm.experiments.notebooks import experiment_folder
from lagm.models.deeplab import DeepLabV3
from lagm.models.saved import load_segmenter
from lagm.models.segmenters import UNet
from lagm.training.lagm import train_supervised
from lagm.training.recipe import FAST, PAPER
from lagm.training.state import TrainState
from lagm.training.teachers import MEAN_TEACHER, SELF_TRAINING, Teaching, taught_step, train_taught
from lagm.training.weak_to_strong import (
    WeakToStrong,
    consistency_steps,
    cutmix_boxes,
    deepest_maps,
    dropped_channels,
    mix_neighbours,
    train_consistency,
    train_weak_to_strong,
)

RECIPE = dataclasses.replace(FAST, steps=6, warm_segmenter=3, batch_labelled=2, batch_synthetic=2, average=0.9)
PLAIN = dataclasses.replace(FAST, optimizer="sgd", momentum=0.0, average=0.0, channels_last=False)
ONLY_MOVES = Augment(hue=0, saturation=(1, 1), brightness=(1, 1))
STILL = dataclasses.replace(ONLY_MOVES, flip=False, scale=(1, 1), rotate=0, shift=0)


class Red(torch.nn.Module):
    """Class 1 where a picture is red, as sure of it as red is strong."""
    def forward(self, x): return torch.cat([-x[:, :1], x[:, :1]], 1) * 2


def weights(network):
    return torch.cat([v.flatten().double() for v in network.state_dict().values()])


def players_of(segmenter, recipe=PLAIN):
    players = TrainState(segmenter, None, recipe, torch.device("cpu"))
    players.begin({"segmenter": 0.1}, False)
    return players


def views_of(images, teaching, augment=None, seed=0, segmenter=None):
    players = players_of(segmenter or tiny_segmenter())
    return teaching.views(players, Red(), images, augment, random_generator(seed))


def squares(n, size=16):
    """Pictures of squares that are fully red or not at all."""
    drawn = torch.rand(n, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(n)).round() * 2 - 1
    return F.interpolate(drawn, size=(size, size))


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


# ---- boxes


def test_boxes_by_hand():
    u = torch.rand(40, 5, generator=random_generator(3)).double()
    boxes = cutmix_boxes(40, (30, 20), 0.6, random_generator(3))
    assert boxes.shape == (40, 1, 30, 20) and boxes.dtype == torch.bool
    for box, (chance, area, aspect, top, left) in zip(boxes[:, 0], u.tolist()):
        area, aspect = 0.02 + 0.38 * area, 0.3 ** (2 * aspect - 1)
        high, wide = min(1, (area / aspect) ** 0.5), min(1, (area * aspect) ** 0.5)
        rows = [top * (1 - high) <= (i + 0.5) / 30 < top * (1 - high) + high for i in range(30)]
        columns = [left * (1 - wide) <= (i + 0.5) / 20 < left * (1 - wide) + wide for i in range(20)]
        rows, columns = torch.tensor(rows), torch.tensor(columns)
        assert box.equal(rows[:, None] & columns if chance < 0.6 else torch.zeros(30, 20, dtype=torch.bool))
    assert not cutmix_boxes(9, (8, 8), 0.0, random_generator(0)).any()
    assert cutmix_boxes(9, (64, 64), 1.0, random_generator(0)).flatten(1).any(1).all()


def test_a_box_shows_the_picture_before():
    maps = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    boxes = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    boxes[0, :, :2, :3], boxes[2, :, 3:, 3:] = True, True
    mixed = mix_neighbours(boxes, maps)
    assert (mixed[0, :, :2, :3] == 2).all() and (mixed[2, :, 3:, 3:] == 1).all() and mixed[1].equal(maps[1])
    assert mixed.sum() == (0 + 16 + 32) * 2 + 6 * 2 * 2 - 2


# ---- views


@pytest.mark.parametrize("augment", [STILL, None])
def test_labels_are_mixed_as_the_pictures_are(augment):
    """What is read off a mixed picture is what was mixed into its labels, pixel for pixel."""
    strong, weak = views_of(squares(5), WeakToStrong(cutmix=1.0), augment, 1)
    red = strong.pictures[:, 0] > 0
    assert strong.labels.argmax(1).equal(red.long()) and strong.labels.sum(1).eq(1).all()
    assert weak.pictures.allclose(squares(5), atol=1e-5)
    assert weak.labels.argmax(1).equal((weak.pictures[:, 0] > 0).long())
    mixed = strong.pictures.unflatten(0, (2, 5))
    assert not mixed[0].allclose(mixed[1]) and not mixed[0].allclose(weak.pictures, atol=1e-3)
    assert (strong.share, strong.dropout, weak.share, weak.dropout) == (0.5, 0.0, 0.5, 0.5)


def test_a_strong_view_is_recoloured_and_not_moved_again():
    coloured = dataclasses.replace(Augment(), flip=True, rotate=15)
    teaching = WeakToStrong(cutmix=0.0, threshold=0.0)
    images = squares(4, 32) * 0.2
    strong, weak = views_of(images, teaching, coloured, 1)
    assert not weak.pictures.allclose(images, atol=1e-2)
    for view, labels in zip(strong.pictures.unflatten(0, (2, 4)), strong.labels.unflatten(0, (2, 4))):
        assert labels.equal(weak.labels)
        for changed, before in zip(view, weak.pictures):  # one matrix and one shift explain the whole picture
            known = torch.cat([before.flatten(1), torch.ones(1, before[0].numel())]).T
            fit = torch.linalg.lstsq(known, changed.flatten(1).T).solution
            inside = changed.abs().amax(0).flatten() < 1
            assert (known @ fit - changed.flatten(1).T)[inside].abs().max() < 1e-3
            assert not changed.allclose(before, atol=1e-2)


def test_where_the_teacher_is_not_sure_nothing_is_learnt():
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, :4] = torch.linspace(0, 1, 8)  # sure of class 1 from softmax(4 red) on
    views = views_of(images, WeakToStrong(cutmix=0.0, threshold=0.9))
    sure = torch.sigmoid(4 * images[:, 0]) >= 0.9
    assert 0 < sure.sum() < sure.numel() / 2
    for view in views: assert view.labels.sum(1).eq(sure.repeat(len(view.labels) // 2, 1, 1)).all()


def test_outside_the_picture_nothing_is_learnt():
    shifted = dataclasses.replace(STILL, shift=0.5, outside="ignore")
    _, weak = views_of(squares(6), WeakToStrong(threshold=0.0), shifted, 2)
    known = shifted.draw(squares(6), random_generator(2)).labels(torch.ones(6, 1, 16, 16))[:, 0]
    assert weak.labels.sum(1).allclose(known) and 0.1 < (known == 0).float().mean() < 0.9


def test_networks_without_known_deepest_maps_have_no_such_view():
    views = views_of(squares(2), WeakToStrong(), segmenter=torch.nn.Conv2d(3, 2, 1))
    assert [view.share for view in views] == [1.0] and len(views[0].pictures) == 4
    for change in (dict(dropout=0.0), dict(dropped=0.0), dict(dropped=1.0)):
        assert [view.share for view in views_of(squares(2), WeakToStrong(**change))] == [1.0]
    assert [view.share for view in views_of(squares(2), WeakToStrong(dropped=0.25))] == [0.75, 0.25]


def test_deepest_maps():
    unet = UNet(3, width=2, levels=3)
    assert deepest_maps(unet) is unet.down3 and deepest_maps(torch.nn.Conv2d(3, 3, 1)) is None
    with torch.device("meta"): deeplab = DeepLabV3(3)
    assert deepest_maps(deeplab) is deeplab.main_net.backbone.layer4


def test_whole_channels_are_dropped_and_the_hook_goes():
    net, x, seen = UNet(3, width=8, levels=2).eval(), torch.randn(4, 3, 16, 16), []
    hook = net.up1.register_forward_hook(lambda module, given, maps: seen.append(given[0][:, 16:]))
    whole = net(x)
    with pytest.raises(ZeroDivisionError), dropped_channels(net, 0.5):
        net(x)
        1 / 0
    hook.remove()
    silent = (seen[1] == 0).all(-1).all(-1)
    assert 0.2 < silent.float().mean() < 0.8 and seen[1][~silent].allclose(2 * seen[0][~silent], atol=1e-5)
    assert net(x).equal(whole) and not net.down2._forward_hooks


# ---- steps


def expected_loss(segmenter, labelled, images, dropout):
    """One step's loss without any change of pictures, by hand."""
    with torch.no_grad(): q = segmenter.eval()(images).softmax(1)
    target = torch.where(q.amax(1) >= 0.4, q.argmax(1), 255)
    segmenter.train()
    loss = F.cross_entropy(segmenter(labelled[0]), labelled[1])
    ce = lambda logits, t: F.cross_entropy(logits, t, ignore_index=255, reduction="sum") / t.numel()
    strong = ce(segmenter(torch.cat([images, images])), torch.cat([target, target]))
    if not dropout: return loss + 0.7 * strong
    hook = segmenter.down2.register_forward_hook(lambda module, given, maps: F.dropout2d(maps, dropout))
    weak = ce(segmenter(images), target)
    hook.remove()
    return loss + 0.7 * (0.5 * strong + 0.5 * weak)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_by_hand(dropout):
    labelled, images = tiny_pictures(2), tiny_pictures(3, seed=5)[0]
    expected, players = tiny_segmenter(), players_of(tiny_segmenter())
    torch.manual_seed(1)
    loss = expected_loss(expected, labelled, images, dropout)
    loss.backward()
    torch.manual_seed(1)
    teaching, rng = WeakToStrong(teacher="student", threshold=0.4, cutmix=0.0, dropout=dropout), random_generator(0)
    batches = [labelled], [(images, rng)]
    losses = taught_step(players, players.segmenter, *batches, teaching, 0.7, None)
    for p, e in zip(players.segmenter.parameters(), expected.parameters()):
        assert torch.allclose(p, e - 0.1 * e.grad, atol=1e-6)
    assert (losses["loss_label"] + 0.7 * losses["loss_s"]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert players.segmenter.training


# ---- runs


@pytest.mark.parametrize("teacher", ["average", "student", "fixed"])
def test_a_stopped_run_goes_on_to_the_same_bits(generator, tmp_path, teacher):
    images, masks = tiny_pictures(3)
    arguments = dict(recipe=RECIPE, seed=1, progress=False, checkpoint_every=4)
    arguments["setting"], path = WeakToStrong(teacher=teacher, threshold=0.3), tmp_path / "run.safetensors"
    whole = train_weak_to_strong(tiny_segmenter(), generator, images, masks, **arguments)
    calls = []

    class Fails:
        checked = True  # the look at the door would be the first call

        def __getattr__(self, key): return getattr(generator, key)
        def __call__(self, *a):
            calls.append(1)
            if len(calls) == 4: raise ZeroDivisionError
            return generator(*a)

    with pytest.raises(ZeroDivisionError):
        train_weak_to_strong(tiny_segmenter(), Fails(), images, masks, checkpoint=path, **arguments)
    again = train_weak_to_strong(tiny_segmenter(seed=9), generator, images, masks, checkpoint=path, **arguments)
    assert weights(again.segmenter).equal(weights(whole.segmenter)) and again.step == whole.step == 9
    with pytest.raises(InputError, match="another run"):
        plain = Teaching(teacher=teacher, threshold=0.3)
        train_taught(tiny_segmenter(), generator, images, masks, plain, RECIPE, seed=1, checkpoint=path, progress=False)


def test_a_run_in_parts(generator):
    images, masks = tiny_pictures(3)
    recipe = dataclasses.replace(RECIPE, parts=2, batch_labelled=4, batch_synthetic=4)
    options = dict(recipe=recipe, progress=False)
    run = lambda seed: train_weak_to_strong(tiny_segmenter(), generator, images, masks, seed=seed, **options)
    one, same, other = (weights(run(seed).segmenter) for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other)


def test_it_learns():
    """Pictures of the right kind instead of a generator's."""
    class Pictures:
        def sample_z(self, n, rng): return torch.randint(0, 10**6, (n, 1), generator=rng)
        def __call__(self, z, rng): return torch.cat([tiny_pictures(1, seed=int(i))[0] for i in z]), []

    images, masks = tiny_pictures(4, seed=77)
    recipe = dataclasses.replace(FAST, steps=60, warm_segmenter=40, lr_warm=1e-2, lr_segmenter=5e-3, average=0.9,
                                 augment=Augment(rotate=5, hue=5))
    from lagm.evaluation.metrics import evaluate
    trained = train_weak_to_strong(tiny_segmenter(width=8), Pictures(), images, masks, recipe=recipe, progress=False)
    assert evaluate(trained.segmenter, *tiny_pictures(20, seed=3), 3).fg_miou > 0.65


@pytest.mark.parametrize("steps, most", [(1000, 900), (4, 4), (6, 5), (1, 1), (0, 0)])
def test_the_length_of_the_consistency_stage(steps, most):
    assert consistency_steps(dataclasses.replace(FAST, steps=steps)) == most and consistency_steps(PAPER) == 0


def test_the_consistency_stage_is_weak_to_strong_without_a_warm_start(generator):
    images, masks = tiny_pictures(2)
    told = dict(seed=3, progress=False)
    longer = dataclasses.replace(RECIPE, steps=4)  # 0.9 x 4, rounded
    after = train_consistency(tiny_segmenter(), generator, images, masks, longer, **told)
    alone = dataclasses.replace(longer, warm_segmenter=0)
    same = train_weak_to_strong(tiny_segmenter(), generator, images, masks, recipe=alone, **told)
    given = train_consistency(tiny_segmenter(), generator, images, masks, RECIPE, steps=4, **told)
    assert after.step == same.step == given.step == 4
    assert weights(after.segmenter).equal(weights(same.segmenter)) and weights(given.segmenter).equal(
        weights(same.segmenter))
    none = train_consistency(tiny_segmenter(), generator, images, masks, RECIPE, steps=0, **told)
    assert none.step == 0 and weights(none.segmenter).equal(weights(tiny_segmenter()))
    for steps in (-1, 2.5, True):
        with pytest.raises(InputError, match="steps is"):
            train_consistency(tiny_segmenter(), generator, images, masks, RECIPE, steps=steps, **told)


def test_annotate_goes_on_to_consistency_if_asked_for(tmp_path):
    small = dict(k=2, iterations=4, warm_up=2, width=4, channels=8, validation_pictures=2, threads=1, seed=3)
    def run(name, **more):
        run_cells(experiment_folder() / "annotate.ipynb", small | dict(out_dir=str(tmp_path / name)) | more)
        found = read_json(tmp_path / name / "metrics.json")
        return found, load_segmenter(tmp_path / name / "segmenter.safetensors")[0]

    without, plain = run("without")
    found, network = run("with", consistency=True)
    finished = load_segmenter(tmp_path / "with" / "state.safetensors")[0]
    assert weights(finished).equal(weights(plain)) and not weights(network).equal(weights(plain))
    assert found["step"] == without["step"] + 4, "0.9 x 4, rounded"
    assert "with the finish and consistency" in found["summary"][0] and "consist" not in without["summary"][0]
    assert (tmp_path / "with" / "state-consistency.safetensors").is_file()
    for more in (dict(recipe="paper"), dict(finish=False)):
        with pytest.raises(InputError, match="consistency comes after a finish"): run("never", consistency=True, **more)
    assert not (tmp_path / "never").exists()


def test_runs_of_before_are_still_known():
    """A run's identity holds this text: a new field in it would make strangers of older checkpoints."""
    assert repr(SELF_TRAINING) == "Teaching(teacher='fixed', hard=True, threshold=0.5, weight=1.0, ramp=0.0)"
    assert repr(MEAN_TEACHER) == "Teaching(teacher='average', hard=False, threshold=0.0, weight=1.0, ramp=0.3)"


@pytest.mark.parametrize("change", [dict(cutmix=1.5), dict(dropout=1.0), dict(dropped=-0.1), dict(threshold=1.0),
                                    dict(teacher="strict"), dict(cutmix="often")])
def test_teaching_that_makes_no_sense(change):
    with pytest.raises(InputError, match=next(iter(change))): WeakToStrong(**change)


def test_mistakes(generator):
    images, masks = tiny_pictures(2)
    alone = dataclasses.replace(RECIPE, average=0.0)
    with pytest.raises(InputError, match="average"):
        train_weak_to_strong(tiny_segmenter(), generator, images, masks, recipe=alone, progress=False)
    with pytest.raises(InputError, match="did you mean validation"):
        train_weak_to_strong(tiny_segmenter(), generator, images, masks, recipe=RECIPE, validations=(images, masks))


def test_what_its_owner_froze_stays_so_in_the_last_stage(generator):
    """The stage begins with the average of the one before, none of which asks for gradients."""
    (images, masks), network = tiny_pictures(2), tiny_segmenter()
    frozen = [name for name, _ in network.named_parameters() if name.startswith("inc.")]
    for name in frozen: network.get_parameter(name).requires_grad_(False)
    network.train().inc.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = train_supervised(network, images, masks, RECIPE, progress=False)
    last = train_consistency(first.segmenter, generator, images, masks, RECIPE, progress=False)
    kept = [name for name in before if torch.equal(before[name], last.segmenter.state_dict()[name])]
    own = [name for name in before if name.startswith("inc.")]
    assert frozen and set(own) <= set(kept), "its weights, and the running means of its batch norm"
    assert not [name for name, _ in network.named_parameters() if name in kept and name not in frozen]
