"""Labels on generated pictures: the latents are known, so the annotator learns true labels of true features."""

import argparse
import copy
import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from official_files import nvidia_pytorch
from PIL import Image
from templates import run_cells
from tiny import LABELS, tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter

from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors, save_tensors
from lagm.data.images import save_mask
from lagm.data.label_maps import write_classes
from lagm.experiments.notebooks import experiment_folder
from lagm.experiments.project import (
    Settings,
    generate_command,
    label_command,
    new_command,
    new_project,
    proposals_for,
    run_project,
    settings_text,
)
from lagm.generators.contract import Sampling
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.weights import save_generator
from lagm.labelling.album import Album, save_painted
from lagm.models.saved import load_segmenter
from lagm.training.datasetgan import DatasetGANNumbers, train_datasetgan
from lagm.training.drawn import LATENTS, DrawnBatches, check_drawn, draw_for_labelling, joined, read_drawn, truth_step
from lagm.training.inversion import HandsOff, Inversion, Prototyping, train_handsoff, train_prototypes
from lagm.training.lagm import estimate_lagm, train_lagm
from lagm.training.recipe import Recipe, get_recipe
from lagm.training.teachers import train_mean_teacher, train_self_training
from lagm.training.weak_to_strong import consistency_steps, train_weak_to_strong

NOTHING = torch.zeros(0, 3, 16, 16), torch.zeros(0, 16, 16, dtype=torch.int64)
RECIPE = get_recipe("fast", steps=2, warm_segmenter=2, warm_annotator=3, batch_labelled=2, batch_synthetic=2)


def paint(folder, names):
    """Masks of three classes that follow the brightness of the pictures."""
    write_classes(folder, LABELS)
    for name in names:
        grey = np.array(Image.open(folder / "images" / f"{name}.png")).mean(2)
        mask = np.digitize(grey, np.quantile(grey, (0.3, 0.7))).astype(np.uint8)
        (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        save_mask(folder / "masks" / f"{name}.png", mask, LABELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = draw_for_labelling(tiny_generator(), tmp_path_factory.mktemp("drawn") / "d", 5, seed=3)
    paint(made, ["0001", "0002", "0004"])
    return made


def networks(generator, seed=0):
    torch.manual_seed(seed)
    return tiny_annotators(generator)[0].train(), tiny_segmenter()


def test_only_what_is_labelled_with_its_own_latents(folder):
    drawn, generator = read_drawn(folder), tiny_generator()
    assert drawn.names == ["0001", "0002", "0004"] and drawn.numbers == [1, 2, 4] and drawn.images.shape[2:] == (16, 16)
    generator.sampling = Sampling(psi=0.3, cutoff=None)  # what counts is how they were drawn
    again = drawn.generated(generator, [2]).image
    assert (again.clamp(-1, 1) - drawn.images[2:]).abs().max() < 0.005
    assert generator.sampling.psi == 0.3


def test_features_and_masks_belong_together(folder):
    drawn, generator = read_drawn(folder), tiny_generator()
    batches = DrawnBatches(drawn, generator, 8, seed=0)
    features, masks = batches(5)
    order = batches.order.indices(5)
    assert len(masks) == 3 and masks.equal(drawn.masks[order])
    for f, g in zip(features, drawn.generated(generator).features): assert f.equal(g[order])


def test_the_warm_start_learns_the_truth_alone(folder):
    """The annotator's loss is cross-entropy with the masks, and pixels without a label do not count."""
    from lagm.training.state import Stage, TrainState

    drawn, generator = read_drawn(folder), tiny_generator()
    annotator, segmenter = networks(generator)
    state = TrainState(segmenter, annotator, RECIPE, torch.device("cpu"))
    state.begin(Stage("warm annotator", 1, lambda step: {}, {"annotator": 1e-2}).rates, False)
    features, masks = DrawnBatches(drawn, generator, 3, seed=0)(0)
    with torch.no_grad(): logits = copy.deepcopy(annotator).train()(features)
    hidden = masks.clone()
    hidden[:, :8] = 255
    known = -logits.log_softmax(1).gather(1, masks[:, None])[:, 0, 8:]
    assert truth_step(state, [(features, hidden)])["loss_truth"].item() == pytest.approx(known.mean().item(), rel=1e-5)
    assert truth_step(state, [(features, torch.full_like(masks, 255))])["loss_truth"].item() == 0


def test_training_with_latents_alone_and_mixed(folder, tmp_path):
    drawn, generator, (images, masks) = read_drawn(folder), tiny_generator(), tiny_pictures(2)
    alone = train_lagm(generator, *networks(generator), *NOTHING, RECIPE, drawn=drawn, progress=False)
    mixed = train_lagm(generator, *networks(generator), images, masks, RECIPE, drawn=drawn, progress=False,
                       record_every=1, checkpoint=tmp_path / "state.safetensors")
    assert alone.step == RECIPE.total_steps(3) and mixed.step == RECIPE.total_steps(5)
    names = {name for record in mixed.history["losses"] for name in record}
    assert "loss_truth" in names and "loss_imitation" not in names
    with pytest.raises(InputError, match="another run|differ"):
        train_lagm(generator, *networks(generator), *joined(images, masks, drawn), RECIPE, progress=False,
                   checkpoint=tmp_path / "state.safetensors")
    assert estimate_lagm(generator, *networks(generator), *NOTHING, RECIPE, drawn=drawn)


def test_parts_share_the_truth(folder):
    drawn, generator = read_drawn(folder), tiny_generator()
    two = dataclasses.replace(RECIPE, parts=2, steps=1)
    assert train_lagm(generator, *networks(generator), *NOTHING, two, drawn=drawn, progress=False).step > 0


def test_labelled_pictures_are_in_the_form_of_generated_ones(folder):
    drawn, (images, masks) = read_drawn(folder), tiny_pictures(2, size=8)
    both, truth = joined(images, masks, drawn)
    assert both.shape == (5, 3, 8, 8) and truth[2:].equal(drawn.masks[:, ::2, ::2])
    wide, _ = joined(torch.zeros(0, 3, 12, 16), torch.zeros(0, 12, 16, dtype=torch.int64), drawn, wide=True)
    assert wide.equal(drawn.images[:, :, 2:14])


def test_the_rivals_know_the_latents(folder, monkeypatch):
    drawn, generator, (images, masks) = read_drawn(folder), tiny_generator(), tiny_pictures(2)
    quick, shared = Inversion(steps=1, samples=0), dict(recipe=RECIPE, drawn=drawn, progress=False)
    for real in (NOTHING, (images, masks)):
        for run in (train_datasetgan(tiny_segmenter(), generator, *real, setting=DatasetGANNumbers(2, 5, 4), **shared),
                    train_handsoff(tiny_segmenter(), generator, *real, setting=HandsOff(quick, 2, 5, 4), **shared),
                    train_prototypes(tiny_segmenter(), generator, *real, setting=Prototyping(quick), **shared)):
            assert run.step == 4
    monkeypatch.setattr("lagm.training.inversion.invert", lambda *a, **k: pytest.fail("a drawn picture was inverted"))
    train_handsoff(tiny_segmenter(), generator, *NOTHING, setting=HandsOff(quick, 2, 5, 4), **shared)


def test_another_generator_is_one_sentence(folder):
    drawn = read_drawn(folder)
    with pytest.raises(InputError, match="drawn by another generator .*digest"): check_drawn(drawn, tiny_generator(1))

    class Bare:
        """A generator that shows no weights."""

        def __init__(self, seed): self.inner = tiny_generator(seed)
        def __call__(self, z, rng=None): return self.inner(z, rng)

    check_drawn(drawn, Bare(0))
    with pytest.raises(InputError, match="does not draw the pictures"): check_drawn(drawn, Bare(1))
    generator = tiny_generator(1)
    with pytest.raises(InputError, match="another generator"):
        train_lagm(generator, *networks(generator), *NOTHING, RECIPE, drawn=drawn, progress=False)


def test_edited_and_damaged_folders(folder, tmp_path):
    import shutil

    for name, spoil, words in (
            ("one pixel", lambda p: edit(p / "images" / "0002.png"), "0002 was changed after it was drawn"),
            ("swapped", lambda p: shutil.copy(p / "images" / "0001.png", p / "images/0004.png"), "0004 was changed"),
            ("no masks", lambda p: [shutil.rmtree(p / "masks"), (p / "masks").mkdir()], "lagm label|no labelled"),
            ("no latents", lambda p: (p / LATENTS).unlink(), "lagm generate"),
            ("other file", lambda p: save_tensors(p / LATENTS, {"z": torch.zeros(5, 8)}, {"kind": "x"}), "damaged")):
        here = shutil.copytree(folder, tmp_path / name)
        spoil(here)
        with pytest.raises(InputError, match=words): read_drawn(here)
    with pytest.raises(InputError, match="holds images already"): draw_for_labelling(tiny_generator(), folder, 2)
    with pytest.raises(InputError, match="give a whole number"): draw_for_labelling(tiny_generator(), tmp_path / "n", 0)


def test_a_generator_that_breaks_its_contract_draws_nothing_to_label(tmp_path):
    class Pale:
        """It gives pictures in [0, 1]."""

        def __init__(self):
            self.inner = tiny_generator()
            self.feature_channels, self.feature_sizes = self.inner.feature_channels, self.inner.feature_sizes

        def sample_z(self, n, rng=None): return self.inner.sample_z(n, rng)

        def __call__(self, z, rng=None):
            image, features = self.inner(z, rng)
            return (image.clamp(-1, 1) + 1) / 2, features

    with pytest.raises(InputError, match="never below 0"): draw_for_labelling(Pale(), tmp_path / "d", 2)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("train, setting", [(train_handsoff, HandsOff(Inversion(steps=1, samples=0), 2, 5, 4)),
                                            (train_prototypes, Prototyping(Inversion(steps=1, samples=0)))])
def test_rivals_that_invert_look_at_the_range_of_labelled_pictures(train, setting):
    images, masks = tiny_pictures(2)
    with pytest.raises(InputError, match="both must be in .-1, 1."), pytest.warns(UserWarning, match="below 0"):
        train(tiny_segmenter(), tiny_generator(), (images + 1) / 2, masks, setting=setting, recipe=RECIPE,
              progress=False)


@pytest.mark.parametrize("train", [train_self_training, train_mean_teacher, train_weak_to_strong])
def test_rivals_of_pictures_are_told_of_a_bare_module(train):
    with pytest.raises(InputError, match="a bare module .Linear.*adapt"):
        train(tiny_segmenter(), torch.nn.Linear(8, 8), *tiny_pictures(2), recipe=RECIPE, progress=False)


def edit(path):
    image = Image.open(path).copy()
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)


# ---- parameter files, projects, commands


def test_annotate_by_a_parameter_file(folder, tmp_path):
    save_generator(tmp_path / "g.safetensors", tiny_generator().network)
    common = dict(drawn=str(folder), size=[16, 16], generator=str(tmp_path / "g.safetensors"), psi=0.9, cutoff=0,
                  width=4, levels=2, channels=4, iterations=1, warm_up=1, finish=False, validation="")
    run_cells(experiment_folder() / "annotate.ipynb", common | dict(dataset="", out_dir=str(tmp_path / "alone")))
    record = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert record["drawn"] == ["0001", "0002", "0004"] and record["labelled"] == []
    assert "3 labelled pictures, 3 of them drawn by the generator" in record["summary"][0]
    with pytest.raises(InputError, match="both need the same list"):
        run_cells(experiment_folder() / "annotate.ipynb", common | dict(out_dir=str(tmp_path / "mixed")))


@pytest.fixture
def project(tmp_path):
    save_generator(tmp_path / "g.safetensors", tiny_generator().network)
    return tmp_path / "p", Settings(size=16, steps=2, width=4, generator=str(tmp_path / "g.safetensors"))


def test_a_project_of_generated_and_real_pictures(project, tmp_path, monkeypatch):
    monkeypatch.setattr("lagm.experiments.project.get_recipe", lambda name, **lengths: RECIPE)
    place, settings = project
    (tmp_path / "pics").mkdir()
    for i, image in enumerate(tiny_pictures(2)[0]):
        Image.fromarray(((image + 1) * 127.5).byte().movedim(0, -1).numpy()).save(tmp_path / "pics" / f"{i}.png")
    new_project(place, tmp_path / "pics", LABELS.classes, settings, generated=3)
    album = Album(place)
    assert album.names == ["0", "1", "drawn/0000", "drawn/0001", "drawn/0002"]
    regions = proposals_for(album, settings=settings)["clusters"]
    assert regions(album, 0).shape == regions(album, 3).shape == (16, 16)
    paint(place, ["drawn/0001", "drawn/0002"])
    assert run_project(place, progress=False)["latents_known"] == 2
    save_painted(album, 0, tiny_pictures(2)[1][0].numpy().astype(np.uint8))
    facts = run_project(place, folds=3, progress=False)
    assert facts["labelled"] == ["0", "drawn/0001", "drawn/0002"] and facts["latents_known"] == 2
    save_generator(tmp_path / "g.safetensors", tiny_generator(1).network)
    with pytest.raises(InputError, match="drawn by another generator"): run_project(place, progress=False)


def test_a_project_ends_with_the_consistency_stage_and_goes_on_in_it(project, tmp_path, monkeypatch):
    place, settings = project
    new_project(place, None, LABELS.classes, settings, generated=2)
    paint(place, ["drawn/0000", "drawn/0001"])
    own = importlib.import_module("lagm.experiments.project")
    begun, stage = [], own.train_consistency

    def counted(segmenter, *a, **k):
        begun.append({name: value.clone() for name, value in segmenter.state_dict().items()})
        return stage(segmenter, *a, **k)

    def ended(*a, **k):
        counted(*a, **k)
        raise KeyboardInterrupt

    def weights():
        assert not [*(place / "results").glob("run-*")], "what a finished run went on from is removed"
        return load_segmenter(place / "results" / "segmenter.safetensors")[0].state_dict()

    def same(a, b): return all(torch.equal(a[name], b[name]) for name in b)

    monkeypatch.setattr(own, "train_consistency", counted)
    run_project(place, progress=False)
    whole, finished = weights(), begun[0]
    step = load_segmenter(place / "results" / "segmenter.safetensors")[1]["step"]
    recipe = get_recipe("fast", steps=2, warm_segmenter=1, warm_annotator=1)
    assert step == recipe.total_steps(2) + consistency_steps(recipe), "of all stages"
    assert not same(whole, finished)
    monkeypatch.setattr(own, "train_consistency", ended)
    with pytest.raises(KeyboardInterrupt): run_project(place, progress=False, again=True)
    monkeypatch.setattr(own, "train_consistency", counted)
    (place / "results" / "segmenter.safetensors").unlink()
    run_project(place, progress=False)
    assert same(weights(), whole) and all(same(network, finished) for network in begun)
    (place / "project.yaml").write_text(settings_text(dataclasses.replace(settings, consistency=False)))
    assert not run_project(place, progress=False)["kept"] and same(weights(), finished) and len(begun) == 3


def test_a_stopped_project_goes_on_with_less_memory(project, monkeypatch):
    """And one that has finished is not trained anew for it."""
    place, settings = project
    new_project(place, None, LABELS.classes, settings, generated=2)
    paint(place, ["drawn/0000", "drawn/0001"])
    own, used = importlib.import_module("lagm.experiments.project"), []
    matching, stage = own.train_lagm, own.train_consistency
    def ended(*a, **k): raise KeyboardInterrupt

    def seen(segmenter, *a, **k):
        used.append(next(value for value in a if isinstance(value, Recipe)))
        return stage(segmenter, *a, **k)

    def weights(): return load_segmenter(place / "results" / "segmenter.safetensors")[0].state_dict()

    run_project(place, progress=False)
    whole = weights()
    monkeypatch.setattr(own, "train_consistency", ended)
    with pytest.raises(KeyboardInterrupt): run_project(place, progress=False, again=True)
    monkeypatch.setattr(own, "train_consistency", seen)
    (place / "results" / "segmenter.safetensors").unlink()
    (place / "project.yaml").write_text(settings_text(dataclasses.replace(settings, recompute=True)))
    monkeypatch.setattr(own, "train_lagm", lambda *a, **k: matching(*a, **k) if k["checkpoint"].is_file() else 1 / 0)
    run_project(place, progress=False)
    assert used[0].recompute and not used[0].keep_memory
    assert all(torch.equal(a, whole[name]) for name, a in weights().items())
    (place / "project.yaml").write_text(settings_text(settings))
    assert run_project(place, progress=False)["kept"]


def test_the_last_stage_belongs_to_a_runs_name_only_with_a_generator(project, monkeypatch):
    place, settings = project
    new_project(place, None, LABELS.classes, settings, generated=2)
    paint(place, ["drawn/0000", "drawn/0001"])
    own = importlib.import_module("lagm.experiments.project")

    def names(generator):
        asked = dataclasses.replace(settings, generator=generator)
        return [own._asked_for(place, dataclasses.replace(asked, consistency=c)).run.name for c in (True, False)]

    with_it, without_it = names(settings.generator)
    alone = names("")
    assert with_it != without_it and alone[0] == alone[1]
    monkeypatch.setattr(own, "WEAK_TO_STRONG", dataclasses.replace(own.WEAK_TO_STRONG, cutmix=0.4))
    assert names(settings.generator)[0] != with_it and names(settings.generator)[1] == without_it
    assert names("") == alone


def test_a_project_takes_the_latents_of_pictures_that_its_generator_drew(project, tmp_path, monkeypatch, capsys):
    """The road of `lagm generate`: draw, paint, `lagm new --images`, run."""
    monkeypatch.setattr("lagm.experiments.project.get_recipe", lambda name, **lengths: RECIPE)
    place, settings = project
    asked = dict(generator=settings.generator, output=str(tmp_path / "d"), n=3, seed=1, psi=0.5, device="cpu",
                 generator_class=-1, diffusion="")
    generate_command(argparse.Namespace(**asked, classes=",".join(LABELS.classes)))
    said = capsys.readouterr().out
    assert f"--classes {','.join(LABELS.classes)} --generator {settings.generator}" in said and "lagm new " in said
    paint(tmp_path / "d", ["0000", "0002"])
    assert new_project(place, tmp_path / "d", LABELS.classes, settings) == {}
    assert run_project(place, progress=False)["latents_known"] == 2
    save_generator(tmp_path / "other.safetensors", tiny_generator(1).network)
    other = dataclasses.replace(settings, generator=str(tmp_path / "other.safetensors"))
    none = dataclasses.replace(settings, generator="")
    for i, (how, why) in enumerate(((other, "another generator drew"), (none, "no generator"))):
        told = new_project(tmp_path / f"q{i}", tmp_path / "d", LABELS.classes, how)
        assert why in told[LATENTS] and not (tmp_path / f"q{i}" / LATENTS).exists()
        assert run_project(tmp_path / f"q{i}", progress=False)["latents_known"] == 0
    (place / LATENTS).rename(tmp_path / "away")
    assert not run_project(place, progress=False)["kept"], "without latents it is another run"
    (tmp_path / "away").rename(place / LATENTS)
    again = run_project(place, progress=False)
    assert not again["kept"] and again["latents_known"] == 2 and run_project(place, progress=False)["kept"]
    edit(tmp_path / "d" / "images" / "0001.png")
    assert "or one was changed" in new_project(tmp_path / "e", tmp_path / "d", LABELS.classes, settings)[LATENTS]


def test_mistakes_of_new_projects(project):
    place, settings = project
    for wrong, words in ((dict(images=None), "would be empty"),
                         (dict(images=None, generated=2, settings=Settings()), "need a generator")):
        with pytest.raises(InputError, match=words):
            new_project(place, classes=LABELS.classes, **({"settings": settings} | wrong))
        assert not place.exists()


def test_the_command(project, tmp_path, capsys):
    _, settings = project
    asked = dict(generator=settings.generator, output=str(tmp_path / "d"), n=2, seed=1, psi=0.5, device="cpu",
                 generator_class=-1, diffusion="")
    generate_command(argparse.Namespace(**asked, classes="background, skin"))
    assert "next: lagm label" in capsys.readouterr().out and Album(tmp_path / "d").labels.n_classes == 2
    assert load_tensors(tmp_path / "d" / LATENTS)[1]["sampling"]["psi"] == 0.5


class Ended:
    """A server whose person has left."""
    address = "nowhere"

    def serve_forever(self): raise KeyboardInterrupt

    def server_close(self): pass


def test_the_painter_asks_the_class_that_was_drawn(tmp_path, monkeypatch):
    """A generator of several classes, one of them chosen on the command line or in project.yaml."""
    torch.manual_seed(0)
    sizes = dict(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8)
    file = nvidia_pytorch(tmp_path / "c.pkl", StyleGAN2(16, c_dim=2, **sizes))
    asked = dict(generator=str(file), generator_class=1, diffusion="")
    generate_command(argparse.Namespace(**asked, output=str(tmp_path / "d"), n=2, seed=1, psi=0.5, device="cpu",
                                        classes="background, skin"))
    opened = []
    monkeypatch.setattr("lagm.experiments.project.LabelServer", lambda respond, port: opened.append(respond) or Ended())
    monkeypatch.setattr("lagm.experiments.project.Desk", lambda album, proposals: opened.append((album, proposals)))
    painting = dict(folder=str(tmp_path / "d"), classes="", segmenter="", port=0, no_browser=True)
    label_command(argparse.Namespace(**asked, **painting))
    album, proposals = opened[0]
    assert proposals["clusters"](album, 0).shape == (16, 16)
    with pytest.raises(InputError, match="class"):
        label_command(argparse.Namespace(**asked | {"generator_class": -1}, **painting))
    with pytest.raises(InputError, match="name the generator, too"):
        label_command(argparse.Namespace(**asked | {"generator": ""}, **painting))
    project = tmp_path / "p"
    with pytest.raises(InputError, match="name the generator, too"):
        new_command(argparse.Namespace(project=str(project), images=None, generated=2, classes="background,skin",
                                       size=16, **asked | {"generator": ""}))
    assert not project.exists()
    new_command(argparse.Namespace(project=str(project), images=None, generated=2, classes="background,skin", size=16,
                                   **asked))
    label_command(argparse.Namespace(**asked | {"generator": "", "generator_class": -1},
                                     **painting | {"folder": str(project)}))
    album, proposals = opened[-2]
    assert proposals["clusters"](album, 1).shape == (16, 16)
