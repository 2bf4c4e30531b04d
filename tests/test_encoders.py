"""Encoders that learn without labels, and heads: points by hand, what is frozen stays, resuming, files, timm."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import LABELS, tiny_generator, tiny_pictures, tiny_segmenter

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.core.tensors import describe_tensors, load_tensors, save_tensors
from lagm.data.augment import Augment
from lagm.evaluation.metrics import evaluate
from lagm.models.frozen import EncoderSegmenter, TimmSegmenter
from lagm.models.saved import describe_network, load_segmenter, read_networks, save_segmenter
from lagm.training.encoders import (
    FrozenEncoder,
    Pretraining,
    contrast_loss,
    denoise_step,
    matching_points,
    read_points,
    train_frozen_encoder,
)
from lagm.training.lagm import train_supervised
from lagm.training.recipe import FAST
from lagm.training.state import TrainState

RECIPE = dataclasses.replace(FAST, steps=4, batch_labelled=2, batch_synthetic=2, average=0.9)
SHORT = Pretraining(steps=3, batch=2, points=20)
ANY = tiny_segmenter()  # of three classes, which is all that counts
SIZE = dict(width=2, levels=2)
SMALL = FrozenEncoder(SHORT, **SIZE)


def part(network, name):
    return torch.cat([v.flatten().double() for key, v in network.state_dict().items() if key.startswith(name)])


def small(frozen=True, **options):
    torch.manual_seed(0)
    return EncoderSegmenter(3, frozen=frozen, **dict(outputs=4, channels=4) | SIZE | options)


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


# ---- points


def test_a_point_is_found_again():
    """Pictures whose colours are the places themselves: what is read at matching points is the same place."""
    y, x = torch.meshgrid((torch.arange(64) + 0.5) / 32 - 1, (torch.arange(64) + 0.5) / 32 - 1, indexing="ij")
    places = torch.stack([x, y, x * y])[None].repeat(5, 1, 1, 1)
    augment = Augment(hue=0, saturation=(1, 1), brightness=(1, 1), rotate=40)
    changes = [augment.draw(places, random_generator(0, i)) for i in range(2)]
    u, v, both = matching_points(changes[0].maps, changes[1].maps, 300, random_generator(1))
    first, second = (read_points(change.pictures(places), at) for change, at in zip(changes, (u, v)))
    inner = both & (u.abs().amax(2) < 0.9) & (v.abs().amax(2) < 0.9) & (first[..., :2].abs().amax(2) < 0.9)
    assert 0.2 < both.float().mean() < 1 and inner.sum() > 300
    assert (first - second)[inner].abs().max() < 1e-3 and u[:, :, 0].std() > 0.4
    sources = u @ changes[0].maps[:, :, :2].mT + changes[0].maps[:, None, :, 2]
    assert not both[(sources.abs() > 1).any(2)].any() and not both[(v.abs() > 1).any(2)].any()


def test_the_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 3, generator=rng), torch.randn(2, 4, 3, generator=rng)
    both = torch.tensor([[True, True, False, True], [False, False, False, False]])
    p, q = (F.normalize(t[0, [0, 1, 3]], dim=1) for t in (a, b))
    expected = (F.cross_entropy(p @ q.T / 0.2, torch.arange(3)) + F.cross_entropy(q @ p.T / 0.2, torch.arange(3))) / 2
    a.requires_grad_(True)
    loss = contrast_loss(a, b, both, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and a.grad.isfinite().all() and not a.grad[1].any()
    assert contrast_loss(a, b, torch.zeros(2, 4, dtype=torch.bool), 0.2).item() == 0


def test_denoising_by_hand():
    class Same(torch.nn.Conv2d):
        def forward(self, x): return super().forward(x) * 0 + x

    players = TrainState(Same(3, 3, 1), None, dataclasses.replace(RECIPE, channels_last=False), torch.device("cpu"))
    players.networks["encoder"], players.resting["encoder"] = players.segmenter, []
    images, rng = tiny_pictures(2)[0], random_generator(0)
    noise = torch.randn(images.shape, generator=rng) * 0.3 * torch.rand(2, 1, 1, 1, generator=rng)
    found = denoise_step(players, images, Pretraining("denoise", noise=0.3), None, random_generator(0)).item()
    assert found == pytest.approx(noise.square().mean().item(), rel=1e-4)


# ---- what is frozen


def test_a_frozen_encoder_stays_whatever_is_asked():
    segmenter = small()
    images, masks = tiny_pictures(3)
    before, head = part(segmenter, "encoder."), part(segmenter, "head.")
    first = train_supervised(segmenter, images, masks, RECIPE, 3, progress=False).segmenter
    assert not any(p.requires_grad for p in first.parameters())  # an average
    again = train_supervised(first, images, masks, RECIPE, 3, progress=False).segmenter
    for network in (segmenter, first, again): assert part(network, "encoder.").equal(before)
    assert not part(first, "head.").equal(head) and not part(again, "head.").equal(part(first, "head."))
    assert not segmenter.train().encoder.training and segmenter.head.training


def test_an_encoder_that_is_not_frozen_moves():
    segmenter = small(frozen=False)
    images, masks = tiny_pictures(3)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    train_supervised(segmenter, images, masks, RECIPE, 3, progress=False)
    still = [name for name, p in segmenter.named_parameters() if p.equal(before[name])]
    assert still == ["encoder.outc.weight", "encoder.outc.bias"]


@pytest.mark.parametrize("size", [(16, 16), (17, 30)])
def test_any_size(size):
    assert small().eval()(torch.randn(2, 3, *size)).shape == (2, 3, *size)
    with pytest.raises(InputError, match="pixels or more"): small()(torch.randn(2, 3, 3, 16))


# ---- runs


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("task", ["contrast", "denoise"])
def test_a_stopped_run_goes_on_to_the_same_bits(generator, tmp_path, task, finetune):
    images, masks = tiny_pictures(3)
    pretraining = dataclasses.replace(SHORT, task=task)
    setting = FrozenEncoder(pretraining, finetune, **SIZE)
    arguments = dict(setting=setting, recipe=RECIPE, seed=1, progress=False)
    arguments["checkpoint_every"] = 2
    random_state = torch.get_rng_state()
    whole = train_frozen_encoder(ANY, generator, images, masks, **arguments)
    assert torch.get_rng_state().equal(random_state)
    for fails_at, path in ((3, tmp_path / "a.safetensors"), (1, tmp_path / "b.safetensors")):
        calls = []

        class Fails:
            checked = True  # the look at the door would be the first call

            def __getattr__(self, key): return getattr(generator, key)
            def __call__(self, *a):
                calls.append(1)
                if len(calls) == fails_at: raise ZeroDivisionError
                return generator(*a)

        with pytest.raises(ZeroDivisionError):
            train_frozen_encoder(ANY, Fails(), images, masks, checkpoint=path, **arguments)
        again = train_frozen_encoder(ANY, generator, images, masks, checkpoint=path, **arguments)
        assert part(again.segmenter, "").equal(part(whole.segmenter, "")) and again.step == whole.step == 7
    for fields in (dict(finetune=not finetune), dict(pretraining=dataclasses.replace(pretraining, lr=1e-4))):
        change = dict(setting=dataclasses.replace(setting, **fields))
        with pytest.raises(InputError, match="another run"):
            train_frozen_encoder(ANY, generator, images, masks, checkpoint=path, **arguments | change)


def test_a_run_stopped_in_the_second_stage(generator, tmp_path, monkeypatch):
    import lagm.training.encoders as module
    images, masks = tiny_pictures(3)
    arguments = dict(setting=SMALL, recipe=RECIPE, progress=False, checkpoint_every=1)
    whole, step, done = train_frozen_encoder(ANY, generator, images, masks, **arguments), module.supervised_step, []

    def fails(*a):
        if len(done) == 2: raise ZeroDivisionError
        done.append(1)
        return step(*a)

    monkeypatch.setattr(module, "supervised_step", fails)
    path = tmp_path / "run.safetensors"
    with pytest.raises(ZeroDivisionError):
        train_frozen_encoder(ANY, generator, images, masks, checkpoint=path, **arguments)
    found = read_networks(path).segmenter  # the state of a run is a trained network like any other
    assert type(found) is EncoderSegmenter and part(found, "encoder.").equal(part(whole.segmenter, "encoder."))
    monkeypatch.undo()
    again = train_frozen_encoder(ANY, generator, images, masks, checkpoint=path, **arguments)
    assert part(again.segmenter, "").equal(part(whole.segmenter, ""))


def test_the_second_stage_leaves_the_encoder_alone(generator):
    images, masks = tiny_pictures(3)
    arguments = dict(setting=SMALL, seed=2, progress=False, record_every=1)
    recipes = {steps: dataclasses.replace(RECIPE, steps=steps, average=a) for steps, a in ((1, 0.0), (4, 0.9))}
    run = lambda recipe: train_frozen_encoder(ANY, generator, images, masks, recipe=recipe, **arguments)
    runs = {steps: run(recipe) for steps, recipe in recipes.items()}
    encoders = [part(run.segmenter, "encoder.") for run in runs.values()]
    assert encoders[0].equal(encoders[1])
    assert not part(runs[1].segmenter, "head.").equal(part(runs[4].segmenter, "head."))
    assert {name.split(".")[0] for name, p in runs[1].segmenter.named_parameters() if p.requires_grad} == {"head"}
    assert [record["stage"] for record in runs[4].history["losses"]] == ["pretrain"] * 3 + ["head"] * 4


def test_in_parts(generator):
    images, masks = tiny_pictures(3)
    recipe = dataclasses.replace(RECIPE, parts=2, batch_labelled=4, batch_synthetic=4)
    run, one = (train_frozen_encoder(ANY, generator, images, masks, setting=SMALL, progress=False, recipe=r)
                for r in (recipe, dataclasses.replace(recipe, parts=1)))
    assert part(run.segmenter, "encoder.").equal(part(one.segmenter, "encoder.")) and run.step == 7


def test_it_learns():
    """Pictures of the right kind instead of a generator's."""
    class Pictures:
        def sample_z(self, n, rng): return torch.randint(0, 10**6, (n, 1), generator=rng)
        def __call__(self, z, rng): return torch.cat([tiny_pictures(1, seed=int(i))[0] for i in z]), []

    images, masks = tiny_pictures(4, seed=77)
    recipe = dataclasses.replace(FAST, steps=60, lr_segmenter=1e-2, average=0.9, augment=Augment(rotate=5, hue=5))
    how = Pretraining(steps=30, batch=4, points=50, lr=1e-2)
    trained = train_frozen_encoder(ANY, Pictures(), images, masks, setting=FrozenEncoder(how, width=4, levels=2),
                                   recipe=recipe, progress=False, record_every=1)
    learnt = [record["loss_contrast"] for record in trained.history["losses"] if record["stage"] == "pretrain"]
    assert sum(learnt[-5:]) < 0.8 * sum(learnt[:5])
    assert evaluate(trained.segmenter, *tiny_pictures(20, seed=3), 3).fg_miou > 0.5


@pytest.mark.parametrize("change", [dict(task="rotate"), dict(steps=-1), dict(batch=0), dict(points=1),
                                    dict(temperature=0.0), dict(lr=0.0), dict(noise=-1.0)])
def test_pretraining_that_makes_no_sense(change):
    with pytest.raises(InputError, match=next(iter(change))): Pretraining(**change)


def test_mistakes(generator):
    images, masks = tiny_pictures(2)
    usual = dict(recipe=RECIPE, progress=False)
    run = lambda **options: train_frozen_encoder(ANY, generator, images, masks, **usual | options)
    with pytest.raises(InputError, match="augment"): run(recipe=dataclasses.replace(RECIPE, augment=None))
    with pytest.raises(InputError, match="classes"):
        train_frozen_encoder(tiny_segmenter(), generator, images, 2 * masks, **usual)
    with pytest.raises(InputError, match="did you mean setting"): run(seting=SMALL)
    with pytest.raises(InputError, match="levels"): run(setting=FrozenEncoder(levels=0))
    with pytest.raises(InputError, match="pixels or more"): run(setting=FrozenEncoder(levels=6))
    with pytest.raises(InputError, match="frozen encoder: width"): FrozenEncoder(width="wide")


# ---- files


def test_what_a_run_left_predicts(generator, tmp_path):
    images, masks = tiny_pictures(3)
    trained = train_frozen_encoder(ANY, generator, images, masks, setting=SMALL, recipe=RECIPE, labels=LABELS,
                                   progress=False, checkpoint=tmp_path / "state.safetensors")
    trained.save(tmp_path / "segmenter.safetensors")
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    for name in ("segmenter", "state"):
        found, header = load_segmenter(tmp_path / f"{name}.safetensors")
        assert part(found, "").equal(part(trained.segmenter, ""))
        assert found(x).allclose(trained.segmenter(x), atol=1e-5)
        assert header["labels"].classes == LABELS.classes and found.frozen
    own = dict(width=2, levels=2, outputs=32, channels=32, layers=2, frozen=True)
    assert header["network"] == dict(name="encoder", n_classes=3, **own)
    (tmp_path / "faces").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "faces" / "face.png")
    order = ["predict", tmp_path / "segmenter.safetensors", tmp_path / "faces", "-o", tmp_path / "out"]
    assert main([str(word) for word in order]) in (0, None)
    assert list((tmp_path / "out").rglob("face.png"))


@pytest.mark.parametrize("options", [dict(frozen=False), dict(width=3, levels=1, channels=6, layers=1), dict(layers=3)])
def test_a_described_encoder_is_built_again(tmp_path, options):
    segmenter = small(**options)
    about = describe_network(segmenter)
    assert describe_network(EncoderSegmenter(**about["arguments"])) == about
    save_segmenter(tmp_path / "s.safetensors", segmenter)
    assert describe_network(load_segmenter(tmp_path / "s.safetensors")[0]) == about


@pytest.mark.parametrize("change", [
    dict(frozen=1), dict(outputs=0), dict(width=10**6), dict(channels="4"), dict(encoder="x"),
    dict(name="timm"), dict(name="timm", model="../x"), dict(name="timm", model=["resnet18"])])
def test_a_header_is_believed_only_where_it_is_harmless(tmp_path, change):
    save_segmenter(tmp_path / "s.safetensors", small())
    tensors, header = load_tensors(tmp_path / "s.safetensors")
    network = header["network"] | change
    if "name" in change: network = {key: network[key] for key in ("name", "n_classes", "model") if key in network}
    save_tensors(tmp_path / "s.safetensors", tensors, header | {"network": network})
    with pytest.raises(InputError): load_segmenter(tmp_path / "s.safetensors")


# ---- timm


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install 'timm"): TimmSegmenter("resnet18", 3)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


# convolutions, a transformer, one with tables that no file holds, one with channels last
TIMM = ("test_resnet", "test_vit", "test_vit_relpos", "test_mambaout")


@pytest.mark.parametrize("model", TIMM)
def test_an_encoder_of_timm(timm, tmp_path, model):
    if model not in timm.list_models(): pytest.skip(f"timm {timm.__version__} has no {model}")
    torch.manual_seed(0)
    segmenter, x = TimmSegmenter(model, 3, side=32, channels=4), torch.randn(2, 3, 21, 30).clamp(-1, 1)
    assert segmenter(x).shape == (2, 3, 21, 30)
    before = part(segmenter, "encoder.")
    images, masks = tiny_pictures(2)
    trained = train_supervised(segmenter, images, masks, RECIPE, 2, labels=LABELS, progress=False)
    assert part(trained.segmenter, "encoder.").equal(before) and not segmenter.encoder.training
    trained.save(tmp_path / "s.safetensors")
    found, header = load_segmenter(tmp_path / "s.safetensors")
    assert part(found, "").equal(part(trained.segmenter, "")) and found(x).allclose(trained.segmenter(x), atol=1e-4)
    assert header["network"] == dict(name="timm", n_classes=3, model=model, side=32, channels=4, layers=2, frozen=True)
    assert describe_tensors(tmp_path / "s.safetensors")[1]["size"] == [16, 16]


def test_pictures_come_as_the_encoder_knows_them(timm, monkeypatch):
    about, seen = timm.get_pretrained_cfg("test_resnet"), []
    segmenter = TimmSegmenter("test_resnet", 3, side=64, channels=4).eval()
    segmenter.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    segmenter(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 20, 40))
    expected = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor(about.mean)) / torch.tensor(about.std)
    assert seen[0].allclose(expected.view(1, 3, 1, 1).expand(1, 3, 64, 64), atol=1e-5)


def test_maps_come_coarse_to_fine_with_channels_first(timm):
    """Its finest map has 16 rows, 16 columns and 16 channels: the order does not show in the shape."""
    segmenter, x = TimmSegmenter("test_mambaout", 3, side=64, channels=4).eval(), torch.randn(1, 3, 64, 64)
    maps = segmenter.maps(x)
    assert [tuple(f.shape) for f in maps] == [(1, 64, 2, 2), (1, 48, 4, 4), (1, 32, 8, 8), (1, 16, 16, 16)]
    given = segmenter.encoder(((x + 1) / 2 - segmenter.input_mean) / segmenter.input_std)
    assert maps[-1].equal(given[0].permute(0, 3, 1, 2)) and not maps[-1].equal(given[0])


def test_an_encoder_of_timm_that_goes_on_learning(timm):
    segmenter = TimmSegmenter("test_vit", 3, side=32, channels=4, frozen=False)
    before = part(segmenter, "encoder.")
    train_supervised(segmenter, *tiny_pictures(2), RECIPE, 2, progress=False)
    assert not part(segmenter, "encoder.").equal(before)


@pytest.mark.parametrize("arguments, told", [(("resnet18000", 3), "list_models"), (("hf-hub:a/b", 3), "list_models"),
                                             ((None, 3), "list_models"), (("test_resnet", 3, False, 33), "multiple")])
def test_mistakes_with_timm(timm, arguments, told):
    with pytest.raises(InputError, match=told): TimmSegmenter(*arguments)


def test_weights_that_cannot_be_had(timm, monkeypatch):
    def fails(*a, **o): raise ConnectionError("no network")
    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(InputError, match="no network.*pretrained=False"):
        TimmSegmenter("test_resnet", 3, pretrained=True)
