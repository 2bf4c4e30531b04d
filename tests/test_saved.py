"""Files of trained networks: what is written is read everywhere, and a header is believed only where it is harmless."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from shell import lagm
from tiny import LABELS, tiny_generator, tiny_pictures, tiny_segmenter

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import describe_tensors, load_tensors, save_tensors
from lagm.data.folder import save_folder
from lagm.evaluation.prediction import open_segmenter
from lagm.experiments.stages import load_any_segmenter, load_networks, read_validation, split_problems
from lagm.generators.load import load_generator
from lagm.generators.stylegan1 import StyleGAN1
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.weights import save_generator
from lagm.labelling.album import Album, save_painted
from lagm.models import saved
from lagm.models.annotator import FPNAnnotator
from lagm.models.convert import convert, inspect
from lagm.models.deeplab import DeepLabV3
from lagm.models.results import load_results
from lagm.models.saved import (
    describe_network,
    find_segmenters,
    load_segmenter,
    read_networks,
    save_networks,
    save_segmenter,
)
from lagm.models.saved import find_segmenters as load_segmenters
from lagm.models.segmenters import UNet
from lagm.training.downstream import DownstreamRecipe, train_downstream
from lagm.training.lagm import train_lagm, train_supervised
from lagm.training.recipe import FAST

PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def annotator(**options):
    torch.manual_seed(1)
    return FPNAnnotator([8, 4], 3, channels=4, layers=2, **options).eval()


def same(one, other):
    with torch.no_grad(): return torch.equal(one(PICTURE), other(PICTURE))


def alike(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- one form


def test_each_reader_takes_each_file(tmp_path):
    segmenter = tiny_segmenter().eval()
    save_segmenter(tmp_path / "segmenter.safetensors", segmenter, LABELS, (16, 24), "stretch",
                   metrics={"fg_miou": 0.25}, note="x")
    save_networks(tmp_path / "results.safetensors", annotator(use_factor=True), segmenter, labels=LABELS, size=(16, 24),
                  policy="stretch", step=7)
    for name in ("segmenter", "results"):
        path = tmp_path / f"{name}.safetensors"
        network, labels, size = open_segmenter(path)
        assert same(network, segmenter) and labels == LABELS and size == (16, 24) and not network.training
        assert same(load_any_segmenter(path, 3), segmenter) and load_segmenters(path) == [path]
        loaded, header = load_segmenter(path)
        assert (same(loaded, segmenter) and header["labels"] == LABELS and header["size"] == [16, 24]
                and header["policy"] == "stretch")
        assert (header["network"] == {"name": "unet", "n_classes": 3, "in_channels": 3, "width": 4, "levels": 2}
                and header["provenance"]["versions"]["torch"])
        facts = inspect(path)
        assert (facts["classes"] == ["background", "left", "bright"] and facts["size"] == (16, 24)
                and facts["policy"] == "stretch")
        with pytest.raises(InputError, match="for 3 classes, not 5"): load_any_segmenter(path, 5)
    assert (inspect(tmp_path / "segmenter.safetensors")["metrics"] == {"fg_miou": 0.25}
            and load_segmenter(tmp_path / "segmenter.safetensors")[1]["note"] == "x")
    assert load_networks(tmp_path / "results.safetensors", 3).annotator.factor == pytest.approx(2**-0.5)
    with pytest.raises(InputError, match="holds no annotator"): load_networks(tmp_path / "segmenter.safetensors")
    assert find_segmenters(tmp_path) == [tmp_path / "segmenter.safetensors"]
    assert same(open_segmenter(tmp_path)[0], segmenter)


@pytest.mark.parametrize("network", [
    UNet(3, in_channels=2, width=4, levels=1), FPNAnnotator([8, 4, 2], 5, channels=6, layers=1),
    FPNAnnotator([8], 5, channels=6, layers=4, fuse_bn_relu=True),
    FPNAnnotator([8, 4], 2, channels=3, use_factor=True)])
def test_what_a_network_was_built_with_is_read_off_it(network):
    said = describe_network(network)
    twin = saved.network_classes()[said["name"]].build(**said["arguments"])
    assert ({k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
            and describe_network(twin) == said)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    told = (saved.annotator_from_shapes(shapes, said["arguments"].get("use_factor")) if said["name"] == "FPNAnnotator"
            else saved.segmenter_from_shapes(shapes))
    assert told == said and saved._check_arguments("f", **said) == said["arguments"]


def test_files_of_before_are_read(tmp_path):
    """As the annotate stage, and tutorial 30, wrote them once."""
    segmenter, about = (tiny_segmenter().eval(),
                        {"name": LABELS.name, "classes": LABELS.classes, "palette": LABELS.palette})
    arguments = {"annotator": dict(feature_channels=[8, 4], n_classes=3, channels=4, layers=2),
                 "segmenter": dict(n_classes=3, width=4, levels=2)}
    tensors = {f"{role}.{k}": v for role, network in (("annotator", annotator()), ("segmenter", segmenter))
               for k, v in network.state_dict().items()}
    roles = {role: {"name": name, "arguments": arguments[role]}
             for role, name in (("annotator", "FPNAnnotator"), ("segmenter", "UNet"))}
    save_tensors(tmp_path / "results.safetensors", tensors,
                 {"kind": "results", "format_version": 1, **roles, "labels": about, "size": [16, 16], "step": 3})
    network, labels, size = open_segmenter(tmp_path / "results.safetensors")
    assert same(network, segmenter) and labels == LABELS and size == (16, 16)
    header = {"class": "UNet", "width": 4, "levels": 2, "classes": LABELS.classes, "size": 16}
    save_tensors(tmp_path / "tutorial.safetensors", segmenter.state_dict(), header)
    network, labels, size = open_segmenter(tmp_path / "tutorial.safetensors")
    assert same(network, segmenter) and labels.classes == LABELS.classes and size == (16, 16)
    save_file(segmenter.state_dict(), tmp_path / "bare.safetensors")
    network, labels, size = open_segmenter(tmp_path / "bare.safetensors")
    assert same(network, segmenter) and labels.classes == ("background", "class 1", "class 2") and size is None


def test_what_cannot_be_read_is_not_written(tmp_path):
    path = tmp_path / "s.safetensors"
    for options in (dict(size=(16, 0)), dict(size=(16, 16, 3)), dict(policy="squeeze"), dict(metrics=[1]),
                    dict(labels=type(LABELS)("odd", ("a", "b\x1b[2J", "c"), LABELS.palette))):
        with pytest.raises(InputError): save_segmenter(path, tiny_segmenter(), **options)
    with pytest.raises(InputError, match="cannot be saved"):
        save_networks(path, torch.nn.Conv2d(1, 1, 1), tiny_segmenter())
    with pytest.raises(InputError, match="no network"): save_networks(path)
    assert not path.exists()


def test_converting_keeps_what_the_file_says(tmp_path):
    save_networks(tmp_path / "r.safetensors", annotator(), tiny_segmenter(), labels=LABELS, size=(16, 16), policy="fit",
                  metrics={"miou": 0.5})
    torch.save(tiny_segmenter().state_dict(), tmp_path / "segmentator.pth")
    convert(tmp_path / "r.safetensors", tmp_path / "half.safetensors", half=True)
    convert(tmp_path / "segmentator.pth", tmp_path / "s.safetensors")
    found = read_networks(tmp_path / "half.safetensors")
    assert ((found.kind, found.labels, found.size, found.policy, found.header["metrics"])
            == ("results", LABELS, (16, 16), "fit", {"miou": 0.5}))
    assert load_tensors(tmp_path / "half.safetensors")[0]["segmenter.outc.weight"].dtype == torch.float16
    assert (read_networks(tmp_path / "s.safetensors").kind == "segmenter"
            and same(load_segmenter(tmp_path / "s.safetensors")[0], tiny_segmenter().eval()))


# ---- from training to masks, on the command line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(tiny_pictures(2, 24)[0]):
        Image.fromarray(((image.movedim(0, -1).numpy() + 1) * 127.5).astype(np.uint8)).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny training with all the files it leaves."""
    folder, generator = tmp_path_factory.mktemp("run"), tiny_generator()
    torch.manual_seed(0)
    plan = saved.dataclasses.replace(FAST, steps=2, warm_segmenter=2, warm_annotator=2, average=0.5)
    networks = FPNAnnotator(generator.feature_channels, 3, channels=4, layers=2), tiny_segmenter()
    trained = train_lagm(generator, *networks, *tiny_pictures(), plan, progress=False,
                         checkpoint=folder / "state.safetensors", validation=tiny_pictures(2, seed=5), validate_every=3,
                         labels=LABELS)
    trained.save(folder / "segmenter.safetensors", policy="fit", metrics={"fg_miou": 0.5})
    return folder, trained


@pytest.mark.parametrize("name", ["segmenter", "state", "state.best"])
def test_train_inspect_predict(run, pictures, tmp_path, capsys, name):
    folder, trained = run
    assert main(["inspect", str(folder / f"{name}.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "UNet" in told and "bright" in told and "16 x 16" in told
    assert main(["predict", str(folder / f"{name}.safetensors"), str(pictures), "-o", str(tmp_path / "out"), "--device",
                 "cpu"]) == 0
    record = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert ([entry["name"] for entry in record["categories"]] == ["left", "bright"]
            and [image["file_name"] for image in record["images"]] == ["p0.png", "p1.png"])
    mask = Image.open(tmp_path / "out" / "masks" / "p1.png")
    assert mask.size == (24, 24) and mask.getpalette()[:9] == [0, 0, 0, 255, 0, 0, 0, 0, 255]
    if name == "state": assert alike(open_segmenter(folder / "state.safetensors")[0], trained.segmenter)


def test_of_a_state_the_average_is_used(run):
    folder, trained = run
    tensors, header = load_tensors(folder / "state.safetensors")
    assert (torch.equal(trained.segmenter.state_dict()["outc.bias"], tensors["average.outc.bias"])
            and not torch.equal(tensors["average.outc.bias"], tensors["segmenter.outc.bias"]))
    found = read_networks(folder / "state.safetensors")
    assert (found.kind == "training" and torch.equal(found.segmenter.outc.bias, tensors["average.outc.bias"])
            and torch.equal(found.annotator.lateral0.bias, tensors["annotator.lateral0.bias"]))
    assert header["networks"]["segmenter"] == describe_network(trained.segmenter)


def test_a_state_of_before_that_says_less(run, pictures, tmp_path, capsys):
    folder, trained = run
    tensors, header = load_tensors(folder / "state.safetensors")
    for path in (tmp_path / "alone" / "state.safetensors", tmp_path / "state.safetensors"):
        save_tensors(path, tensors,
                     {name: value for name, value in header.items() if name not in ("networks", "labels", "size")})
    trained.save(tmp_path / "segmenter.safetensors")
    assert alike(open_segmenter(tmp_path / "state.safetensors")[0], trained.segmenter)
    assert main(["predict", str(tmp_path / "state.safetensors"), str(pictures), "-o", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "--size" in error and str(tmp_path / "segmenter.safetensors") in error and error.count("\n") == 1
    assert main(["predict", str(tmp_path / "alone" / "state.safetensors"), str(pictures), "-o", str(tmp_path / "o"),
                 "--size", "16", "16", "--device", "cpu"]) == 0


@pytest.mark.parametrize("change", [{"format_version": 2}, {"format_version": True}, {"format_version": "1"},
                                    {"format_version": None}])
def test_a_state_of_an_unknown_version_is_neither_used_nor_gone_on_from(run, tmp_path, change):
    folder, _ = run
    tensors, header = load_tensors(folder / "state.safetensors")
    save_tensors(tmp_path / "state.safetensors", tensors, header | change)
    with pytest.raises(InputError, match="format version"): read_networks(tmp_path / "state.safetensors")
    again = dict(progress=False, validation=tiny_pictures(2, seed=5), validate_every=3)
    plan = saved.dataclasses.replace(FAST, steps=2, warm_segmenter=2, warm_annotator=2, average=0.5)
    networks = FPNAnnotator(tiny_generator().feature_channels, 3, channels=4, layers=2), tiny_segmenter()
    with pytest.raises(InputError, match="format version"):
        train_lagm(tiny_generator(), *networks, *tiny_pictures(), plan, checkpoint=tmp_path / "state.safetensors",
                   **again)
    with pytest.raises(InputError, match="format version"):
        train_lagm(tiny_generator(), *networks, *tiny_pictures(), plan, resume_from=tmp_path / "state.safetensors",
                   **again)


@pytest.mark.parametrize("change", [{"step": "3"}, {"step": 0}, {"step": None}, {"step": 10**6}, {"history": []},
                                    {"history": None}, {"random": 5}, {"identity": []}, {"identity": {"recipe": 3}}])
def test_a_state_with_an_odd_header_is_refused(run, tmp_path, change):
    folder, _ = run
    tensors, header = load_tensors(folder / "state.safetensors")
    save_tensors(tmp_path / "state.safetensors", tensors, header | change)
    plan = saved.dataclasses.replace(FAST, steps=2, warm_segmenter=2, warm_annotator=2, average=0.5)
    networks = FPNAnnotator(tiny_generator().feature_channels, 3, channels=4, layers=2), tiny_segmenter()
    with pytest.raises(InputError, match="state.safetensors"):
        train_lagm(tiny_generator(), *networks, *tiny_pictures(), plan, checkpoint=tmp_path / "state.safetensors",
                   progress=False)


def test_a_state_of_wider_networks_is_refused(tmp_path):
    images, masks = tiny_pictures()
    train_supervised(tiny_segmenter(width=4), images, masks, steps=2, checkpoint=tmp_path / "state.safetensors",
                     progress=False)
    with pytest.raises(InputError, match="networks of other sizes"):
        train_supervised(tiny_segmenter(width=8), images, masks, steps=2, checkpoint=tmp_path / "state.safetensors",
                         progress=False)


def test_the_state_of_a_downstream_run_is_used_too(tmp_path, pictures):
    images, masks = tiny_pictures(4)
    done = train_downstream(tiny_segmenter(), list(zip(images, masks)), DownstreamRecipe(epochs=1, batch=2),
                            folder=tmp_path / "run", labels=LABELS, progress=False)
    for name in ("state", "epoch-001"):
        network, labels, size = open_segmenter(tmp_path / "run" / f"{name}.safetensors")
        assert alike(network, done.segmenter) and labels == LABELS and size == (16, 16)
    assert alike(open_segmenter(tmp_path / "run")[0], done.segmenter)
    tensors, header = load_tensors(tmp_path / "run" / "state.safetensors")
    for change in ({"format_version": 2}, {"step": "1"}, {"identity": [1]}, {"history": None}):
        save_tensors(tmp_path / "run" / "state.safetensors", tensors, header | change)
        with pytest.raises(InputError, match="state.safetensors"):
            train_downstream(
tiny_segmenter(), list(zip(images, masks)), DownstreamRecipe(epochs=1, batch=2), folder=tmp_path / "run", labels=LABELS,
progress=False)


def test_a_segmenter_of_other_channels_is_named(tmp_path):
    save_segmenter(tmp_path / "s.safetensors", UNet(3, in_channels=1, width=4, levels=2))
    with pytest.raises(InputError, match="1 channels"): open_segmenter(tmp_path / "s.safetensors")


def test_your_own_pictures_from_the_folder_to_masks(tmp_path):
    """Tutorial 30 on a folder of one's own: it stops where one has to paint, and goes on from there."""
    images, masks = tiny_pictures(4)
    save_folder(tmp_path / "mine", [f"l{i}" for i in range(4)], images, None, LABELS)
    notebook = os.path.join(os.path.dirname(__file__), "..", "nbs", "tutorials", "30_your_own_pictures.ipynb")
    words = ["run", os.path.abspath(notebook), "-o", tmp_path / "out", "--force", "-p", "size", 16, "-p", "steps", 2,
             "-p", "images", tmp_path / "mine" / "images", "-p", "classes", ",".join(LABELS.classes),
             "-p", "project", tmp_path / "faces"]
    done = lagm(*words, cwd=tmp_path)
    assert done.returncode != 0 and "no picture is labelled yet. Next: lagm label" in done.stderr, done.stderr
    album = Album(tmp_path / "faces")
    for i in (0, 2): save_painted(album, album.names.index(f"l{i}"), masks[i].numpy().astype(np.uint8))
    done = lagm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    segmenter = tmp_path / "faces" / "results" / "segmenter.safetensors"
    found = read_networks(segmenter)
    assert found.labels.classes == LABELS.classes and found.size == (16, 16) and found.policy == "stretch"
    labelled = sorted((tmp_path / "faces-labelled" / "masks").iterdir())
    assert [path.name for path in labelled] == [f"l{i}.png" for i in range(4)]
    done = lagm("predict", segmenter, tmp_path / "mine" / "images", "-o", tmp_path / "again")
    assert done.returncode == 0 and "4 pictures labelled" in done.stdout, done.stderr
    for path in labelled:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "masks" / path.name)),
                              np.asarray(Image.open(path)))


def test_a_folder_may_do_without_pictures_to_validate_on(tmp_path):
    images, masks = tiny_pictures(4)
    root = save_folder(tmp_path / "mine", [f"l{i}" for i in range(4)], images, masks, LABELS)
    where = dict(data=root, size=(16, 16))
    for split in ("", "val"):
        found, labels = read_validation("folder", split, **where)
        assert found is None and labels.classes == LABELS.classes
        assert not split_problems("annotate", dict(dataset="folder", validation=split, k=2, **where))
    assert "no list" in split_problems("annotate", dict(dataset="folder", validation="vall", k=2, **where))[0]
    (root / "val.txt").write_text("l3\n")
    assert read_validation("folder", "val", **where)[0][1].equal(masks[3:])
    assert not split_problems("evaluate", dict(dataset="folder", split="", **where))


# ---- headers


@pytest.fixture
def no_backbone(monkeypatch):
    def forbidden(*_): raise AssertionError("a file had the backbone's weights loaded")
    monkeypatch.setattr("lagm.models.deeplab._imagenet_weights", forbidden)


UNET = {"name": "unet", "n_classes": 3, "in_channels": 3, "width": 4, "levels": 2}
DEEP = {"name": "deeplabv3", "n_classes": 3}


@pytest.mark.parametrize("change, message", [
    ({"network": DEEP | {"pretrained_backbone": True}}, "'pretrained_backbone', which no file may"),
    ({"network": DEEP | {"backbone_path": "x.pth"}}, "'backbone_path', which no file may"),
    ({"network": DEEP | {"pretrained_backbone": False}}, "which no file may"),
    ({"network": UNET | {"width": 4096}}, "inc.conv1.weight"),
    ({"network": UNET | {"width": 4097}}, "impossible size: width is 4097"),
    ({"network": UNET | {"levels": 9}}, "levels is 9"), ({"network": UNET | {"n_classes": True}}, "n_classes is True"),
    ({"network": UNET | {"n_classes": 3.0}}, r"n_classes is 3\.0"),
    ({"network": UNET | {"width": float("nan")}}, "width is"),
    ({"network": UNET | {"width": 10**3000}}, "width is 1000"), ({"network": UNET | {"width": "4"}}, "width is '4'"),
    ({"network": UNET | {"width": [4]}}, "width is a list"),
    ({"network": UNET | {"name": ["unet"]}}, "network a list"),
    ({"network": UNET | {"name": "FPNAnnotator"}}, "FPNAnnotator"), ({"network": []}, "does not describe"),
    ({"network": {"name": "unet"}}, "n_classes"),
    ({"kind": []}, "a list"), ({"kind": "generator"}, "'generator'"),
    ({"kind": "gan-training"}, "generator's training"), ({"format_version": 2}, "version 2"),
    ({"format_version": True}, "version True"), ({"format_version": 1.0}, r"version 1\.0"),
    ({"labels": []}, "what its classes are"),
    ({"labels": {"name": "x", "classes": ["a"], "palette": [[0, 0, 0]]}}, "names 1"),
    ({"labels": {"name": "x", "classes": [1, 2, 3], "palette": [[0, 0, 0]] * 3}}, "classes are"),
    ({"labels": {"name": "x", "classes": ["a", "b", "\ud800"], "palette": [[i, 0, 0] for i in range(3)]}},
     "classes are"),
    ({"labels": {"name": "x", "classes": ["a", "b", "c"], "palette": [[i, 0, True] for i in range(3)]}}, "classes are"),
    ({"size": 16}, "size"), ({"size": [16, 10**9]}, "size"), ({"size": [True, 16]}, "size"),
    ({"policy": "squeeze"}, "policy"), ({"policy": {}}, "policy"), ({"provenance": [1]}, "provenance"),
    ({"metrics": "good"}, "metrics")])
def test_a_header_that_asks_for_what_it_may_not(tmp_path, no_backbone, monkeypatch, change, message):
    """Refused from header and shapes alone: no number is read, so no more memory is taken than the file is long."""
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(), LABELS, (16, 16))
    tensors, header = load_tensors(tmp_path / "s.safetensors")
    metadata = {"lagm": json.dumps(header | change)}
    save_file(tensors, tmp_path / "t.safetensors", metadata)
    monkeypatch.setattr(saved, "load_tensors", lambda *_: pytest.fail("numbers were read"))
    for read in (read_networks, load_segmenter, load_results, open_segmenter):
        with pytest.raises(InputError, match=message) as caught: read(tmp_path / "t.safetensors")
        assert "t.safetensors" in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()


@pytest.mark.parametrize("role, change, message", [
    ("annotator", {"channels": 4.0}, "channels"), ("annotator", {"feature_channels": [8] * 65}, "feature_channels"),
    ("annotator", {"feature_channels": [8, True]}, "feature_channels"),
    ("annotator", {"feature_channels": 8}, "feature_channels"),
    ("annotator", {"feature_channels": []}, "feature_channels"), ("annotator", {"layers": 65}, "layers"),
    ("annotator", {"use_factor": 1}, "use_factor"), ("annotator", {"path": "x"}, "which no file may"),
    ("annotator", {"channels": 16384}, "lateral0"),
    ("segmenter", {"pretrained_backbone": True}, "which no file may"), ("segmenter", {"levels": 0}, "levels")])
def test_the_same_of_results(tmp_path, no_backbone, role, change, message):
    save_networks(tmp_path / "r.safetensors", annotator(), tiny_segmenter())
    tensors, header = load_tensors(tmp_path / "r.safetensors")
    header[role]["arguments"] |= change
    save_tensors(tmp_path / "r.safetensors", tensors, header)
    with pytest.raises(InputError, match=message): load_results(tmp_path / "r.safetensors")
    header[role] = {"name": "UNet" if role == "annotator" else "FPNAnnotator",
                    "arguments": {"n_classes": 3, "feature_channels": [2]} if role == "segmenter" else {"n_classes": 3}}
    save_tensors(tmp_path / "r.safetensors", tensors, header)
    with pytest.raises(InputError, match=f"in the place of its {role}"): load_results(tmp_path / "r.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000,
                                  '{"kind": "segmenter", "x": ' + "[" * 500 + "]" * 500 + "}", "9" * 5000, "[]", "null",
                                  "{", ""])
def test_a_header_that_is_no_header(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "s.safetensors", {"lagm": text})
    for read in (describe_tensors, load_tensors, read_networks, load_results, load_generator):
        with pytest.raises(InputError, match="s.safetensors"): read(tmp_path / "s.safetensors")


@pytest.mark.parametrize("kind", ["segmenter", "results", "generator"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.complex64, torch.bool, torch.int32, torch.uint8])
def test_types_of_weights(tmp_path, kind, dtype):
    path = tmp_path / "s.safetensors"
    if kind == "generator": save_generator(path, tiny_generator().network)
    else: save_networks(path, annotator() if kind == "results" else None, tiny_segmenter())
    tensors, header = load_tensors(path)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(path, tensors, header)
    read = (lambda: load_generator(path).network) if kind == "generator" else lambda: read_networks(path).segmenter
    if dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert all(t.dtype == torch.float32 for t in read().parameters())
    else:
        with pytest.raises(InputError,
                           match=f"as {str(dtype).removeprefix('torch.')}; weights of such a network are float32"):
            read()


def test_numbers_that_are_none(tmp_path):
    for value in (float("nan"), float("inf"), 1e300):
        state = {name: t.double() if t.is_floating_point() else t for name, t in tiny_segmenter().state_dict().items()}
        state["outc.bias"][1] = value
        save_tensors(tmp_path / "s.safetensors", state)
        with pytest.raises(InputError, match="infinite or NaN numbers in outc.bias"):
            read_networks(tmp_path / "s.safetensors")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["unet", "UNet", "FPNAnnotator", "results", "training", "../x", 10**400])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=6)
                                        | st.sampled_from(["name", "n_classes", "width", "pretrained_backbone"]), inner,
                                        max_size=4), max_leaves=8)


def places(value, here=()):
    """Every place in a header."""
    yield here
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*here, key))


def changed(draw, header):
    """The header with a few values replaced, removed or added."""
    header = copy.deepcopy(header)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([place for place in places(header) if place]))
        at = header
        for key in above: at = at[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace": at[last] = draw(VALUES)
            case "remove": del at[last]
            case "add" if isinstance(at, dict):
                known = st.sampled_from(["pretrained_backbone", "backbone_path", "kind", "networks", "classes"])
                at[draw(st.text(max_size=6) | known)] = draw(VALUES)
    return header


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    save_segmenter(folder / "segmenter", tiny_segmenter(), LABELS, (16, 16), "fit", metrics={"miou": 0.5})
    save_networks(folder / "results", annotator(), tiny_segmenter(), labels=LABELS, size=(16, 16))
    train_supervised(tiny_segmenter(), *tiny_pictures(), steps=1, checkpoint=folder / "training.safetensors", keep=1,
                     progress=False, labels=LABELS)
    save_generator(folder / "stylegan2", tiny_generator().network, {"data": "none"})
    save_generator(folder / "stylegan1", StyleGAN1(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64,
                                                   channel_max=8))
    return {path.stem: (*load_tensors(path), folder / "changed.safetensors") for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["segmenter", "results", "training", "stylegan2", "stylegan1"])
@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_read_or_refused_in_a_sentence(originals, no_backbone, kind, data):
    tensors, header, path = originals[kind]
    save_file(tensors, path, {"lagm": json.dumps(changed(data.draw, header))})
    for read in (load_generator,) if kind.startswith("style") else (load_segmenter, open_segmenter):
        try: read(path)
        except InputError as error: assert "changed.safetensors" in str(error)
    try: json.dumps(inspect(path), default=str)
    except InputError: pass


def test_on_the_command_line_it_is_one_line(tmp_path, no_backbone, pictures, capsys):
    """The two files that asked a server for weights, and opened a path of their own choice."""
    save_file({}, tmp_path / "a.safetensors",
              {"lagm": json.dumps({"kind": "results", "format_version": 1,
                                   "segmenter": {"name": "DeepLabV3",
                                                 "arguments": {"n_classes": 2, "pretrained_backbone": True}}})})
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors",
              {"lagm": json.dumps({"kind": "segmenter", "format_version": 1,
                                   "network": {"name": "deeplabv3", "n_classes": 2, "backbone_path": "x.pth"},
                                   "labels": None})})
    for name in "ab":
        for words in (["inspect", str(tmp_path / f"{name}.safetensors")],
                      ["predict", str(tmp_path / f"{name}.safetensors"), str(pictures), "-o", str(tmp_path / "o")]):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "which no file may" in error


def test_what_inspect_prints_is_harmless(tmp_path, capsys):
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(),
                   provenance={"note": "\x1b[2J\nlicence  free", "odd\x1b": "\ud800"})
    assert main(["inspect", str(tmp_path / "s.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "\\x1b[2J\\nlicence" in told and told.count("\nlicence") == 1


# ---- generators of ours


@pytest.mark.parametrize("change", [
    {"synthesis_kwargs": {"resample_filter": 5}}, {"synthesis_kwargs": {"resample_filter": [[1, 2], [3]]}},
    {"synthesis_kwargs": {"resample_filter": [1, float("nan")]}}, {"synthesis_kwargs": {"resample_filter": [10**400]}},
    {"synthesis_kwargs": {"resample_filter": [True, 1]}}, {"synthesis_kwargs": {"conv_clamp": 10**400}},
    {"synthesis_kwargs": {"conv_clamp": True}}, {"synthesis_kwargs": {"use_noise": "no"}},
    {"synthesis_kwargs": {"architecture": ["skip"]}},
    {"mapping_kwargs": {"layer_features": 0}}, {"mapping_kwargs": {"layer_features": False}},
    {"mapping_kwargs": {"num_layers": 10**1000}}, {"z_dim": True}, {"img_resolution": 16.0}, {"backbone_path": "x"},
    {"mapping_kwargs": []}])
def test_arguments_of_a_stylegan2_that_make_none(change):
    kwargs = StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8).init_kwargs()
    for name, value in change.items(): kwargs[name] = kwargs[name] | value if isinstance(value, dict) else value
    with pytest.raises(InputError): StyleGAN2.from_init_kwargs(kwargs)


@pytest.mark.parametrize("change", [{"format_version": True}, {"format_version": "1"}, {"provenance": []},
                                    {"network": ["StyleGAN2"]}])
def test_the_rest_of_a_generators_header(tmp_path, change):
    save_generator(tmp_path / "g.safetensors", tiny_generator().network)
    tensors, header = load_tensors(tmp_path / "g.safetensors")
    save_tensors(tmp_path / "g.safetensors", tensors, header | change)
    with pytest.raises(InputError, match="g.safetensors"): load_generator(tmp_path / "g.safetensors")
    with pytest.raises(InputError, match="g.safetensors"): inspect(tmp_path / "g.safetensors")


# ---- U-Nets of other programs


def transposed():
    """As the bilinear form, but with a learnt layer that doubles each map."""
    state = UNet(3, width=4, levels=4).state_dict()
    for j, width in enumerate((32, 16, 8, 4), start=1):
        state |= {f"up{j}.up.weight": torch.zeros(width, width, 2, 2), f"up{j}.up.bias": torch.zeros(width)}
    return state


def milesial():
    return {"inc.double_conv.0.weight": torch.zeros(4, 3, 3, 3),
            "down1.maxpool_conv.1.double_conv.0.weight": torch.zeros(8, 4, 3, 3),
            "outc.conv.weight": torch.zeros(3, 4, 1, 1)}


@pytest.mark.parametrize("state, message",
                         [(transposed(), "transposed convolutions"), (milesial(), "double_conv"),
                          (milesial() | {"up1.up.weight": torch.zeros(8, 4, 2, 2)}, "transposed convolutions")])
def test_other_unets_are_named(tmp_path, capsys, state, message):
    torch.save(state, tmp_path / "s.pth")
    save_file(state, tmp_path / "s.safetensors")
    for name in ("s.pth", "s.safetensors"):
        with pytest.raises(InputError, match=message) as caught: load_results(tmp_path / name)
        assert "get it again" not in str(caught.value) and "damaged" not in str(caught.value)
    if "inc.conv1.weight" in state:
        assert main(["inspect", str(tmp_path / "s.pth")]) == 2
        assert message in capsys.readouterr().err


def test_a_deeplab_is_built_without_memory(monkeypatch):
    assert all(p.is_meta for p in saved.build_empty("f", "DeepLabV3", {"n_classes": 255}).parameters())
    assert {*saved.network_classes()} == {"UNet", "DeepLabV3", "EncoderSegmenter", "TimmSegmenter", "SmpSegmenter",
                                          "TorchvisionSegmenter", "FPNAnnotator", "MLPAnnotator", "AttentionAnnotator"}
    with pytest.raises(InputError, match="DeepLabV4"): saved.build_empty("f", "DeepLabV4", {})
    assert saved.segmenter_options(DeepLabV3(4)) == {"name": "deeplabv3", "n_classes": 4}


def test_a_device_that_is_not_there_is_said_as_elsewhere(tmp_path):
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(), LABELS)
    for device, said in (("foo", "unknown device 'foo'"), ("cuda:99", "no device 'cuda:99'")):
        with pytest.raises(InputError, match=said): load_segmenter(tmp_path / "s.safetensors", device)
        with pytest.raises(InputError, match=said): saved.read_networks(tmp_path / "s.safetensors", device=device)
        with pytest.raises(InputError, match=said): load_generator(device=device)
