"""Inversion finds known latents again, picture by picture, and goes on; annotators by hand and on planted features."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import LABELS, tiny_generator, tiny_pictures, tiny_segmenter

import lagm.training.inversion
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors, save_tensors
from lagm.data.labels import IGNORE
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.stylegan1 import StyleGAN1
from lagm.training.inversion import (
    HandsOff,
    Inversion,
    Inverted,
    Prototypes,
    Prototyping,
    StyleSpace,
    as_generated,
    as_labelled,
    best_start,
    invert,
    learn_pixels,
    picture_distance,
    prototypes_of,
    pyramid,
    train_handsoff,
    train_prototypes,
)
from lagm.training.recipe import FAST

RECIPE = dataclasses.replace(FAST, steps=4, warm_segmenter=3, batch_labelled=2, batch_synthetic=2, average=0.9)
QUICK = Inversion(steps=3, samples=4, batch=2)
HANDSOFF = HandsOff(QUICK, members=2, pixel_steps=5, pairs=6, keep=0.5)
TRAINERS = {"HandsOff": (train_handsoff, {"setting": HANDSOFF}),
            "prototypes": (train_prototypes, {"setting": Prototyping(QUICK)})}


def faint(generator):
    """The generator with pictures that lie in [-1, 1], as those of trained ones do."""
    with torch.no_grad():
        for name, p in generator.network.named_parameters():
            if "torgb" in name and p.ndim == 4: p.mul_(0.2)
    return generator


def first_generation():
    torch.manual_seed(0)
    network = StyleGAN1(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    return faint(FrozenGenerator(network, Sampling(psi=1.0)))


def weights(network):
    return torch.cat([v.flatten().double() for v in network.state_dict().values()])


# ---- inversion


@pytest.mark.parametrize(
    "make, bound", [(lambda: faint(tiny_generator()), 0.01), (first_generation, 0.15)], ids=["StyleGAN2", "StyleGAN1"])
def test_a_generated_picture_gives_back_its_features(make, bound):
    generator = make()
    space, before = StyleSpace(generator), weights(generator.network)
    with torch.no_grad(): picture, features = space(space.sample(3, torch.Generator().manual_seed(5)))
    found = invert(generator, picture, Inversion(steps=150, pull=0.0, samples=40), progress=False)
    assert (found.images - picture).square().mean() < bound * picture.var()
    if bound < 0.1:  # untrained, the older network hides its coarse maps behind instance norms
        wanted = features[0]
        assert (found.features[0] - wanted).square().mean() < 0.3 * (wanted - wanted.mean(0)).square().mean()
    assert found.losses.shape == (3, 150) and (found.losses[:, -1] < 0.3 * found.losses[:, 0]).all()
    assert weights(generator.network).equal(before) and not generator.network.training
    assert all(p.grad is None and not p.requires_grad for p in generator.network.parameters())


def test_style_vectors_are_those_the_generator_uses():
    for generator in (tiny_generator(), first_generation()):
        generator.sampling = Sampling(psi=1.0, noise="const")
        space, z = StyleSpace(generator), generator.sample_z(2, torch.Generator().manual_seed(1))
        v = (generator.network.styles(z) - space.mean) / space.spread
        for a, b in zip(space(v).features, generator(z).features): assert torch.allclose(a, b, atol=1e-3)
        w = generator.network.styles(generator.sample_z(4000, torch.Generator().manual_seed(2)))[:, 0]
        assert torch.allclose(space.mean, w.mean(0), atol=0.2) and torch.allclose(space.spread, w.std(0), rtol=0.15)


def test_a_picture_does_not_depend_on_its_neighbours():
    generator, (images, _) = faint(tiny_generator()), tiny_pictures(5)
    plan = Inversion(steps=12, samples=6, batch=5)
    all_at_once, again = (invert(generator, images, plan, seed=3, progress=False) for _ in range(2))
    assert all_at_once.latents.equal(again.latents)
    for batch in (1, 2):
        other = invert(generator, images, dataclasses.replace(plan, batch=batch), seed=3, progress=False)
        assert torch.allclose(other.latents, all_at_once.latents, atol=1e-3)
    alone = invert(generator, images[3:4], plan, seed=3, progress=False)
    assert torch.allclose(alone.latents, all_at_once.latents[3:4], atol=1e-3)
    other = invert(generator, images, plan, seed=4, progress=False)
    assert not torch.allclose(other.latents, all_at_once.latents, atol=1e-3)


def test_the_state_of_the_caller_stays():
    generator, (images, _) = tiny_generator(), tiny_pictures(1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.no_grad(): invert(generator, images, QUICK, progress=False)
    assert torch.get_rng_state().equal(before)


def test_the_start_is_the_nearest_and_the_pull_keeps_it_near():
    generator = faint(tiny_generator())
    space = StyleSpace(generator)
    points = space.sample(7, torch.Generator().manual_seed(0))
    with torch.no_grad(): images = space(points).image
    assert best_start(space, images[[4, 2]], points, Inversion(batch=3)).equal(points[[4, 2]])
    noise = tiny_pictures(2)[0]
    plans = (Inversion(steps=30, pull=pull, samples=0) for pull in (0.0, 10.0))
    far, near = (invert(generator, noise, plan, progress=False) for plan in plans)
    assert (near.latents - space.mean).norm() < 0.2 * (far.latents - space.mean).norm()
    start = invert(generator, noise, Inversion(steps=0, samples=0), progress=False)
    assert start.losses.shape == (2, 0) and torch.allclose(start.latents, space.mean.expand_as(start.latents))


def test_distance_by_hand():
    a, b = torch.zeros(1, 3, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).expand(1, 3, 2, 2)
    assert len(pyramid(a, 9)) == 2
    assert picture_distance(pyramid(a, 2), pyramid(b, 2)).tolist() == pytest.approx([(0.25 + 0.0625) / 2])


def test_other_sizes_and_wide_pictures():
    generator, (images, masks) = faint(tiny_generator()), tiny_pictures(2, size=24)
    assert invert(generator, images, QUICK, progress=False).images.shape == (2, 3, 16, 16)
    assert invert(generator, images[:, :, 3:21], QUICK, wide=True, progress=False).losses.shape == (2, 3)
    picture = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 3, 16, 16)
    assert as_labelled(picture, (12, 16), wide=True)[0, 0, :, 0].tolist() == list(range(2, 14))
    drawn = as_generated(masks[:, 3:21], 16, wide=True)
    assert drawn.shape == (2, 16, 16) and (drawn[:, 2:14] != IGNORE).all()
    assert (drawn[:, [0, 1, 14, 15]] == IGNORE).all()
    assert as_generated(masks, 16, wide=False) is masks


@pytest.mark.parametrize("wrong, words", [
    (dict(generator=lambda z, rng=None: None), "no style vectors"),
    (dict(images=torch.zeros(2, 16, 16)), r"\(2, 16, 16\)"), (dict(images=torch.zeros(0, 3, 16, 16)), r"\(0, 3"),
    (dict(images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "uint8"),
    (dict(images=torch.full((1, 3, 16, 16), torch.nan)), "NaN")])
def test_what_cannot_be_inverted(wrong, words):
    right = dict(generator=tiny_generator(), images=torch.zeros(1, 3, 16, 16), plan=QUICK)
    with pytest.raises(InputError, match=words): invert(**right | wrong)


@pytest.mark.parametrize("kind, wrong", [
    (Inversion, dict(steps=-1)), (Inversion, dict(pull=-1)), (Inversion, dict(batch=0)), (Inversion, dict(lr="fast")),
    (HandsOff, dict(keep=0)), (HandsOff, dict(pairs=0)), (HandsOff, dict(inversion={"step": 1})),
    (Prototyping, dict(temperature=0))])
def test_settings_that_mean_nothing(kind, wrong):
    with pytest.raises(InputError): kind(**wrong)


# ---- files


def test_a_stopped_inversion_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    generator, (images, _) = tiny_generator(), tiny_pictures(5)
    whole = invert(generator, images, QUICK, progress=False)
    descend, calls = lagm.training.inversion._descend, []

    def stopped(*arguments):
        if len(calls) == 1: raise KeyboardInterrupt
        calls.append(1)
        return descend(*arguments)

    monkeypatch.setattr(lagm.training.inversion, "_descend", stopped)
    with pytest.raises(KeyboardInterrupt): invert(generator, images, QUICK, folder=tmp_path, progress=False)
    assert len(load_tensors(tmp_path / "inversion.safetensors")[0]["v"]) == 2 and len([*tmp_path.iterdir()]) == 1
    begun = []
    monkeypatch.setattr(lagm.training.inversion, "_descend", lambda *a: (begun.append(len(a[1])), descend(*a))[1])
    resumed = invert(generator, images, QUICK, folder=tmp_path, progress=False)
    assert begun == [2, 1] and resumed.latents.equal(whole.latents) and resumed.losses.equal(whole.losses)
    read = invert(generator, images, QUICK, folder=tmp_path, progress=False)
    assert begun == [2, 1] and all(a.equal(b) for a, b in zip(read.features, whole.features))


def test_files_of_another_run_are_refused(tmp_path, monkeypatch):
    generator, (images, _) = tiny_generator(), tiny_pictures(2)
    usual = dict(generator=generator, images=images, plan=QUICK, folder=tmp_path, progress=False)
    run = lambda **more: invert(**usual | more)
    run()
    for other, words in ((dict(seed=1), "seed"), (dict(images=images[:1]), "pictures"),
                         (dict(generator=tiny_generator(1)), "generator"),
                         (dict(plan=dataclasses.replace(QUICK, pull=0.5)), "pull")):
        with pytest.raises(InputError, match=f"of another run .*{words}"): run(**other)
    path = tmp_path / "inversion.safetensors"
    tensors, header = load_tensors(path)
    save_tensors(path, {"v": tensors["v"][:, :1], "losses": tensors["losses"]}, header)
    with pytest.raises(InputError, match="is damaged"): run()
    path.write_bytes(b"half")
    with pytest.raises(InputError, match="not a readable"): run()
    save_tensors(path, tensors, header)
    monkeypatch.setenv("LAGM_FORCE", "1")
    assert run(seed=1).latents.isfinite().all() and (tmp_path / "aside-1" / path.name).is_file()


# ---- the annotators


def planted(n, seed=0):
    """Masks of three classes, and two maps of noise; some channels of the finer one tell the class."""
    rng = torch.Generator().manual_seed(seed)
    masks = F.interpolate(torch.randint(3, (n, 1, 4, 4), generator=rng).float(), (16, 16))[:, 0].long()
    hot = F.one_hot(masks, 3).movedim(-1, 1).float()
    coarse, fine = (torch.randn(n, c, s, s, generator=rng) for c, s in ((4, 8), (5, 16)))
    return [coarse, torch.cat([3 * hot, fine], 1)], masks


def test_the_ensemble_finds_planted_classes(tmp_path):
    features, masks = planted(3)
    masks[:, 5:8] = IGNORE
    inverted = Inverted(torch.empty(0), torch.empty(0), features, torch.empty(0))
    plan = HandsOff(members=3, pixel_steps=150)
    ensemble = learn_pixels(inverted, masks, 3, plan, folder=tmp_path, progress=False)
    features, truth = planted(4, seed=1)
    with torch.no_grad(): votes = [annotator(features).argmax(1) for annotator in ensemble.annotators()]
    assert all((vote == truth).float().mean() > 0.99 for vote in votes)
    kept = learn_pixels(inverted, masks, 3, plan, folder=tmp_path, progress=False)
    fresh = learn_pixels(inverted, masks, 3, plan, progress=False)
    assert weights(kept).equal(weights(ensemble)) and weights(fresh).equal(weights(ensemble)) and not kept.training
    with pytest.raises(InputError, match="of another run .*data"):
        learn_pixels(inverted, 2 - masks.clamp(max=2), 3, plan, folder=tmp_path)


def test_prototypes_by_hand():
    f = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # at two places (3, 4) and (0, 2): unit vectors (0.6, 0.8), (0, 1)
    made = prototypes_of([f], torch.tensor([[[0, 1]]]), 3, temperature=0.5)
    logits = made([f])[0, :, 0]
    half = torch.tensor(0.5).log().item()
    assert logits[0].tolist() == pytest.approx([1 / 0.5 + half, 0.8 / 0.5 + half])
    assert logits[1].tolist() == pytest.approx([0.8 / 0.5 + half, 1 / 0.5 + half]) and (logits[2] < -9e3).all()
    one = prototypes_of([f], torch.tensor([[[0, IGNORE]]]), 2, temperature=1.0)
    assert one.share.tolist() == [1, 0] and one([f])[0, 0, 0].tolist() == pytest.approx([1, 0.8])
    mixed = prototypes_of([f], torch.tensor([[[1, 1]]]), 2, temperature=1.0).map0[1]
    assert torch.allclose(mixed, F.normalize(torch.tensor([0.3, 0.9]), dim=0))


def test_prototypes_of_several_maps():
    features, masks = planted(3)
    masks[:, :4, :4] = IGNORE
    unit = [F.normalize(f, dim=1) for f in features]
    unit = torch.cat([F.interpolate(f, (16, 16), mode="bilinear", align_corners=False) for f in unit], 1) / 2**0.5
    rows = unit.movedim(1, -1)
    expected = torch.stack([F.normalize(rows[masks == c].mean(0), dim=0) for c in range(3)])
    share = torch.stack([(masks == c).sum() for c in range(3)]) / (masks != IGNORE).sum()
    made = prototypes_of(features, masks, 3, temperature=0.1)
    logits = torch.einsum("kc,bchw->bkhw", expected, unit) / 0.1 + share.log()[:, None, None]
    assert torch.allclose(made(features), logits, atol=1e-4) and not [*made.parameters()]
    only = prototypes_of(features, masks, 3, layers=[1])
    assert only(features).equal(prototypes_of([torch.randn(3, 4, 8, 8), features[1]], masks, 3, layers=[1])(features))
    new, truth = planted(4, seed=1)
    assert (only(new).argmax(1) == truth).float().mean() > 0.95
    copy = Prototypes([4, 8], 3, [1])
    copy.load_state_dict(only.state_dict())
    assert copy(new).equal(only(new))


def test_prototypes_that_cannot_be():
    features, masks = planted(2)
    for layers in ([], [2], [0, 0]):
        with pytest.raises(InputError, match="layers is"): prototypes_of(features, masks, 3, layers)
    with pytest.raises(InputError, match="temperature"): Prototypes([4], 3, temperature=0)
    with pytest.raises(InputError, match="name classes 0..1"): prototypes_of(features, masks, 2)
    with pytest.raises(InputError, match="masks have shape"): prototypes_of(features, masks[:1], 3)
    with pytest.raises(InputError, match="their own generator"): prototypes_of(features, masks, 3)(features[:1])
    assert Prototyping(coarsest=9).layers(tiny_generator()) == [2]
    assert Prototyping(coarsest=99).layers(tiny_generator()) is None


# ---- whole runs


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_learns_and_is_repeatable(name, tmp_path):
    train, plan = TRAINERS[name]
    generator, (images, masks) = tiny_generator(), tiny_pictures(3)
    usual = dict(labels=LABELS, recipe=RECIPE, seed=1, progress=False, **plan)
    run = lambda folder: train(tiny_segmenter(), generator, images, masks, folder=folder, **usual)
    runs = [run(folder) for folder in (None, tmp_path, tmp_path)]
    assert all(weights(run.segmenter).equal(weights(runs[0].segmenter)) for run in runs)
    assert runs[0].step == 7 and {"loss_label", "loss_s"} <= runs[0].history["losses"][-1].keys()
    assert not runs[0].segmenter.training and runs[0].labels == LABELS
    more = {"ensemble.safetensors", "pairs"} if name == "HandsOff" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"inversion.safetensors"} | more


@pytest.mark.parametrize("name", TRAINERS)
def test_a_checkpoint_of_other_labels_is_refused(name, tmp_path):
    train, plan = TRAINERS[name]
    generator, (images, masks) = tiny_generator(), tiny_pictures(2)
    usual = dict(recipe=RECIPE, checkpoint=tmp_path / "run.safetensors", progress=False)
    run = lambda plan: train(tiny_segmenter(), generator, images, masks, **usual, **plan)
    done, again = run(plan), run(plan)
    assert weights(done.segmenter).equal(weights(again.segmenter))
    (key, value), = plan.items()
    changed = {"keep": 1} if name == "HandsOff" else {"weigh_labels": True}
    for change in ({"inversion": dataclasses.replace(QUICK, pull=3.0)}, changed):
        other = dataclasses.replace(value, **change)
        with pytest.raises(InputError, match="another run: .*generator"): run({key: other})


class NoStyles:
    """A generator of another program: what the contract asks for, and no more."""

    def __init__(self, generator):
        self.generator = generator
        self.feature_channels, self.feature_sizes = generator.feature_channels, generator.feature_sizes

    def sample_z(self, n, rng=None): return self.generator.sample_z(n, rng)

    def __call__(self, z, rng=None): return self.generator(z, rng)


@pytest.mark.parametrize("name", TRAINERS)
def test_wide_pictures_and_wrong_arguments(name):
    train, plan = TRAINERS[name]
    generator, (images, masks) = tiny_generator(), tiny_pictures(2)
    wide = dataclasses.replace(RECIPE, wide_crop=True, steps=1, warm_segmenter=1, augment=None)
    run = lambda generator=generator, images=images, masks=masks, **more: train(
        tiny_segmenter(), generator, images, masks, progress=False, **plan | more)
    assert run(images=images[:, :, 2:14], masks=masks[:, 2:14], recipe=wide).step == 2
    with pytest.raises(InputError, match="did you mean validation"): run(validaton=None)
    with pytest.raises(InputError, match="has no feature_channels"): run(generator=object())
    with pytest.raises(InputError, match="no style vectors"): run(generator=NoStyles(generator))
    with pytest.raises(InputError, match="classes 0 to 7"): run(masks=masks + 5 * (masks == 2))
    if name == "prototypes": return
    other = dataclasses.replace(LABELS, classes=LABELS.classes[:2], palette=LABELS.palette[:2])
    with pytest.raises(InputError, match="has 2 classes, the segmenter 3"): run(labels=other)
