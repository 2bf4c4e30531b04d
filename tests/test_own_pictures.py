"""From a folder of pictures to a folder of masks by the commands a newcomer types, and the mistakes on that road."""

import functools
import json

import nbformat
import numpy as np
import pytest
import shell
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.demo import Avatars, stack
from lagm.data.folder import save_folder
from lagm.data.images import read_mask
from lagm.experiments import project
from lagm.experiments.project import (
    Settings,
    disagreement,
    missing,
    new_project,
    next_step,
    project_generator,
    read_settings,
    run_project,
    settings_text,
    train_project,
)
from lagm.experiments.proposals import cluster, clusters_of_features, predictions
from lagm.experiments.template import write_notebook
from lagm.labelling.album import Album, labelled_shares, save_painted
from lagm.models.saved import save_segmenter
from lagm.models.segmenters import UNet
from lagm.training import inversion
from lagm.training.drawn import draw_for_labelling

CLASSES = Avatars().classes


def lagm(folder, *words, code=0):
    done = shell.lagm(*words, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "pics"
    (folder / "more").mkdir(parents=True)
    for i, picture in enumerate(stack(Avatars(), range(5))[0]):
        pixels = ((picture + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(folder / ("more" if i > 2 else "") / f"f{i}.png")
    return folder


def paint(project, numbers):
    masks = stack(Avatars(), range(5))[1].numpy().astype(np.uint8)
    album = Album(project)
    for i in numbers: save_painted(album, album.names.index(f"f{i}"), masks[i])


def test_the_road_in_a_shell(pictures, tmp_path):
    said = lagm(tmp_path, "new", "faces", "--images", pictures, "--classes", ",".join(CLASSES), "--size", 32)
    assert "5 pictures" in said and "Next: lagm label faces" in said
    assert "no picture is labelled yet" in lagm(tmp_path, "run", "faces", code=2)
    paint(tmp_path / "faces", (0, 1))
    settings = tmp_path / "faces" / "project.yaml"
    settings.write_text(settings.read_text().replace("steps: 1000", "steps: 3").replace("width: 16", "width: 4"))
    said = lagm(tmp_path, "run", "faces", "--folds", 2)
    assert ("learnt from 2 pictures, without a generator" in said and "2 folds" in said
            and "lagm predict faces/results/segmenter.safetensors" in said)
    facts = json.loads((tmp_path / "faces" / "results" / "metrics.json").read_text())
    assert facts["labelled"] == ["f0", "f1"] and set(facts["label_next"]) == {"f2", "more/f3", "more/f4"}
    lagm(tmp_path, "predict", "faces/results/segmenter.safetensors", pictures, "-o", "labelled")
    lagm(tmp_path, "predict", "faces", pictures, "-o", "the-same")
    assert sorted(p.read_bytes() for p in (tmp_path / "the-same").rglob("*.png")) == sorted(
        p.read_bytes() for p in (tmp_path / "labelled").rglob("*.png"))
    assert read_mask(tmp_path / "labelled" / "masks" / "more" / "f4.png", len(CLASSES)).shape == (64, 64)


def test_with_a_generator(pictures, tmp_path):
    from tiny import tiny_generator

    from lagm.generators.weights import save_generator

    new_project(tmp_path / "p", pictures, CLASSES, Settings(size=16, steps=2, width=4, generator="g.safetensors"))
    paint(tmp_path / "p", (0, 1))
    assert "the generator g.safetensors is not there" in missing(tmp_path / "p")
    with pytest.raises(InputError, match="the generator g.safetensors is not there"):
        run_project(tmp_path / "p", progress=False)
    save_generator(tmp_path / "p" / "g.safetensors", tiny_generator().network)
    facts = run_project(tmp_path / "p", progress=False)
    assert facts["generator"] == "g.safetensors" and (tmp_path / "p" / "results" / "look.png").is_file()


def test_a_generator_of_the_kit_by_its_name(pictures, tmp_path):
    """A name is no path: it must reach project.yaml as it is, and a wrong one must not make a project."""
    words = ("new", "faces", "--images", pictures, "--classes", ",".join(CLASSES), "--generator")
    assert "there is no generator big-eras" in lagm(tmp_path, *words, "big-eras", code=2)
    assert not (tmp_path / "faces").exists()
    lagm(tmp_path, *words, "big-ears")
    assert read_settings(tmp_path / "faces").generator == "big-ears"
    paint(tmp_path / "faces", (0,))
    assert not [what for what in missing(tmp_path / "faces") if "generator" in what]
    assert project_generator(tmp_path / "faces", read_settings(tmp_path / "faces"), torch.device("cpu")).z_dim > 0


def test_the_project_has_a_notebook_of_its_own(pictures, tmp_path):
    """It runs where it lies, and what a person has written into it stays."""
    new_project(tmp_path / "p", pictures, CLASSES, Settings(size=16, steps=1, width=4))
    paint(tmp_path / "p", (0, 1))
    book = nbformat.read(tmp_path / "p" / "road.ipynb", as_version=4)
    nbformat.validate(book)
    (tmp_path / "moved").mkdir()
    (tmp_path / "p").rename(tmp_path / "moved" / "q")
    NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path / "moved" / "q"}}).execute()
    assert len([*(tmp_path / "moved" / "q" / "labelled" / "masks").rglob("*.png")]) == 5
    (tmp_path / "moved" / "q" / "road.ipynb").write_text("mine")
    assert write_notebook(tmp_path / "moved" / "q").read_text() == "mine"


def test_a_prepared_folder_becomes_a_project_with_its_masks(tmp_path):
    """`lagm prepare` writes images/, masks/ and classes.txt: pictures and masks must meet again in the project."""
    images, masks = stack(Avatars(), range(3))
    prepared = save_folder(tmp_path / "prepared", ["a", "b"], images[:2], masks[:2], Avatars().labels)
    save_folder(prepared, ["c"], images[2:], None, Avatars().labels)
    new_project(tmp_path / "p", prepared, CLASSES, Settings(size=16, steps=1, width=4))
    assert sorted(path.name for path in (tmp_path / "p" / "images").iterdir()) == ["a.png", "b.png", "c.png"]
    assert [share > 0 for share in labelled_shares(Album(tmp_path / "p"))] == [True, True, False]
    assert "next: lagm run" in next_step(tmp_path / "p")


def test_few_steps_have_a_short_warm_start(pictures, tmp_path, monkeypatch):
    """Of 20 steps, 6 of each warm start, not 300; 1,000 steps have the recipe's."""
    asked = []
    monkeypatch.setattr("lagm.experiments.project.train_lagm", lambda *a, **k: asked.append(a[5]))
    for steps in (20, 1000):
        images, masks = stack(Avatars(), range(2))
        settings = Settings(size=64, steps=steps, width=4, generator="big-ears", consistency=False)
        train_project(tmp_path, images, masks, settings, labels=Avatars().labels)
    assert [(r.warm_segmenter, r.warm_annotator, r.steps) for r in asked] == [(6, 6, 20), (300, 300, 1000)]


def test_a_run_that_fails_leaves_the_result(pictures, tmp_path, monkeypatch):
    new_project(tmp_path / "p", pictures, CLASSES, Settings(size=16, steps=1, width=4))
    paint(tmp_path / "p", (0,))
    run_project(tmp_path / "p", progress=False)
    before = (tmp_path / "p" / "results" / "segmenter.safetensors").read_bytes()
    (tmp_path / "p" / "project.yaml").write_text(settings_text(Settings(size=16, steps=2, width=4)))
    monkeypatch.setattr("lagm.experiments.project.train_supervised",
                        lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError): run_project(tmp_path / "p", progress=False)
    assert (tmp_path / "p" / "results" / "segmenter.safetensors").read_bytes() == before


def test_a_stopped_run_keeps_what_it_found(pictures, tmp_path, monkeypatch, capsys):
    """The search in the generator's space is done once, and a finished run leaves nothing of it."""
    new_project(tmp_path / "p", pictures, CLASSES, Settings(size=64, steps=1, width=4, generator="big-ears"))
    paint(tmp_path / "p", (0,))
    brief, descend, descents = inversion.Inversion(steps=2, samples=2), inversion._descend, []
    monkeypatch.setattr(project, "find_labelled", functools.partial(inversion.find_labelled, plan=brief))
    monkeypatch.setattr(inversion, "_descend", lambda *a, **k: descents.append(1) or descend(*a, **k))
    with monkeypatch.context() as stopped, pytest.raises(RuntimeError):
        stopped.setattr("lagm.experiments.project.train_lagm",
                        lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stopped")))
        run_project(tmp_path / "p", progress=False)
    with monkeypatch.context() as later, pytest.raises(RuntimeError):  # a kit that searches otherwise begins anew
        later.setattr(project, "Inversion", functools.partial(inversion.Inversion, lr=0.3))
        later.setattr("lagm.experiments.project.train_lagm",
                      lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stopped again")))
        run_project(tmp_path / "p", progress=False)
    assert len(descents) == 2
    capsys.readouterr()
    run_project(tmp_path / "p", progress=False)
    assert len(descents) == 2 and "drawn with an error" not in capsys.readouterr().out  # nobody asked to be told
    assert (sorted(path.name for path in (tmp_path / "p" / "results").iterdir())
            == ["found.png", "generator.png", "look.png", "metrics.json", "segmenter.safetensors"])


def test_a_changed_project_is_trained_anew(pictures, tmp_path):
    """Another label or setting must neither resume the old run nor stop at its checkpoint."""
    new_project(tmp_path / "p", pictures, CLASSES, Settings(size=16, steps=2, width=4))
    paint(tmp_path / "p", (0,))
    run_project(tmp_path / "p", progress=False)
    first = (tmp_path / "p" / "results" / "segmenter.safetensors").read_bytes()
    paint(tmp_path / "p", (1,))
    assert run_project(tmp_path / "p", progress=False)["labelled"] == ["f0", "f1"]
    second = (tmp_path / "p" / "results" / "segmenter.safetensors").read_bytes()
    (tmp_path / "p" / "project.yaml").write_text(settings_text(Settings(size=16, steps=3, width=8)))
    run_project(tmp_path / "p", progress=False)
    assert (sorted(path.name for path in (tmp_path / "p" / "results").iterdir())
            == ["look.png", "metrics.json", "segmenter.safetensors"])
    assert first != second != (tmp_path / "p" / "results" / "segmenter.safetensors").read_bytes()


@pytest.mark.parametrize("content, words", [
    ("size: 30", "size is 30"), ("sise: 64", "no setting 'sise'"), ("size: [", "not YAML"), ("- 1", "list"),
    ("steps: many", "steps"), ("psi: 3", "psi is 3")])
def test_mistakes_in_the_settings(tmp_path, content, words):
    (tmp_path / "project.yaml").write_text(content)
    with pytest.raises(InputError, match=words): read_settings(tmp_path)


def test_settings_come_back():
    for settings in (Settings(), Settings(generator="a: 'b' #c.pkl", psi=0.5, device="cuda:1", seed=7)):
        assert Settings(**yaml.safe_load(settings_text(settings))) == settings


def test_mistakes_at_the_start(pictures, tmp_path):
    (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir(), (tmp_path / "bad" / "x.png").write_bytes(b"<html>")
    for images, classes, words in ((tmp_path / "no", CLASSES, "there is no folder"),
                                   (tmp_path / "empty", CLASSES, "no picture"),
                                   (tmp_path / "bad", CLASSES, "a web page"),
                                   (pictures, ["background"], "one class only"), (pictures, ["a", "a"], "repeats")):
        with pytest.raises(InputError, match=words): new_project(tmp_path / "p", images, classes)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "empty"]
    new_project(tmp_path / "p", pictures, CLASSES)
    with pytest.raises(InputError, match="is there already.*lagm label"): new_project(tmp_path / "p", pictures, CLASSES)


def test_a_class_that_nobody_painted_is_said(pictures, tmp_path):
    new_project(tmp_path / "p", pictures, ["background", "skin", "wing"])
    album = Album(tmp_path / "p")
    save_painted(album, 0, np.eye(64, dtype=np.uint8))
    assert (missing(tmp_path / "p") == ["no mask shows wing: nothing can be learnt about it"]
            and "wing" in next_step(tmp_path / "p"))
    assert labelled_shares(album)[0] == 1.0


def test_disagreement_by_hand():
    """A network that calls the left half 1 wherever it is disagrees with its mirror image everywhere; a symmetric one
    nowhere.
    """
    class Left(torch.nn.Module):
        def forward(self, x):
            left = torch.zeros(len(x), 2, *x.shape[2:])
            left[:, 1, :, : x.shape[3] // 2] = 1
            left[:, 0, :, x.shape[3] // 2:] = 1
            return left

    class Bright(torch.nn.Module):
        def forward(self, x): return torch.cat([-x[:, :1], x[:, :1]], 1)

    images = torch.randn(3, 3, 8, 8).clamp(-1, 1)
    assert disagreement(Left(), images).tolist() == [1, 1, 1] and disagreement(Bright(), images).tolist() == [0, 0, 0]


def test_clusters_of_drawn_pictures(tmp_path):
    from tiny import tiny_generator

    generator = tiny_generator()
    album = Album(draw_for_labelling(generator, tmp_path / "d", 2, seed=3), ["a", "b"])
    regions = clusters_of_features(generator, k=5)(album, 1)
    assert regions.shape == (16, 16) and 2 <= len(np.unique(regions)) <= 5
    with pytest.raises(InputError, match="holds images already"): draw_for_labelling(generator, tmp_path / "d", 2)
    points = torch.cat([torch.randn(50, 3) * 0.01 + c for c in torch.eye(3)])
    found = cluster(points, 3)
    assert all(len(found[50 * i:50 * i + 50].unique()) == 1 for i in range(3)) and len(found.unique()) == 3


def test_the_painter_brings_pictures_to_size_as_predict_does(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 24)).save(tmp_path / "images" / "wide.png")
    album, said = Album(tmp_path, ["background", "face"]), []
    monkeypatch.setattr("lagm.experiments.proposals.predict_pictures",
                        lambda network, pictures, policy, size, device: said.append((policy, size)) or [[[0]]])
    for policy in ("fit", "stretch"):
        save_segmenter(tmp_path / "s.safetensors", UNet(2, width=4, levels=2), album.labels, (32, 32), policy)
        predictions(tmp_path / "s.safetensors", album.labels)(album, 0)
    assert said == [("fit", (32, 32)), ("stretch", (32, 32))]
