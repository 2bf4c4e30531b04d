"""From a folder of pictures to a generator: what is read, what is measured, how a run is cut, and mistakes."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.data.demo import Avatars, stack
from lagm.data.squares import read_squares, square_of
from lagm.evaluation.likeness import Likeness, frechet_distance, nearest, precision_recall
from lagm.experiments.project import Settings, new_project, read_settings
from lagm.experiments.train_command import _name_generator
from lagm.generators.ada import AdaptiveRecipe, AdaptiveTrainer, augment, random_colours, random_geometry
from lagm.generators.load import load_generator
from lagm.training import from_folder
from lagm.training.from_folder import GeneratorSettings, estimate_generator, train_generator

SMALL = GeneratorSettings(size=16, images=96, every=32, batch=4, precision="float32", device="cpu")
FLAGS = ["--images", "32", "--every", "16", "--batch", "4", "--precision", "float32", "--nice", "0", "--device", "cpu"]


def faces(count=48):
    return ((stack(Avatars("big-ears", "test"), range(count))[0] + 1) * 127.5).round().byte()


def save(folder, images, form="{:02d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / form.format(i))
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "photos", faces())


def quiet(folder, out, settings=SMALL, **options):
    return train_generator(folder, out, settings, progress=False, say=None, **options)


# ---- what is read


def test_pictures_of_every_kind_become_squares(tmp_path):
    face = Image.fromarray(faces(1)[0].permute(1, 2, 0).numpy())
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "deep" / "er").mkdir(parents=True)
    face.resize((90, 128)).save(tmp_path / "exif.jpg", exif=turned, quality=95)
    face.resize((80, 80)).convert("RGBA").save(tmp_path / "deep" / "alpha.png")
    face.resize((70, 100)).convert("L").save(tmp_path / "deep" / "er" / "grey.webp")
    Image.fromarray(np.asarray(face.convert("L")).astype(np.uint16) << 8).save(tmp_path / "16.png")
    face.quantize(32).save(tmp_path / "palette.png")
    os.symlink(tmp_path / "deep", tmp_path / "deep" / "er" / "loop")
    os.symlink(tmp_path / "16.png", tmp_path / "link.png")
    with pytest.warns(UserWarning, match="passed over"): found = read_squares(tmp_path, 64)
    assert found.names == ("16.png", "deep/alpha.png", "deep/er/grey.webp", "exif.jpg", "palette.png")
    assert found.images.shape == (5, 3, 64, 64) and "copies of other pictures: 1" in " ".join(found.notes)
    upright = np.asarray(square_of(face.resize((90, 128)).transpose(Image.Transpose.ROTATE_270), 64), float)
    assert np.abs(found.images[3].permute(1, 2, 0).numpy() - upright).mean() < 6, "turned as its header says"
    assert (found.images[0][0] == found.images[0][1]).all()


@pytest.mark.parametrize(("crop", "left"), [("centre", 100), ("squash", 0), ("fit", 100)])
def test_what_becomes_of_a_wide_picture(crop, left):
    bars = np.zeros((20, 60, 3), np.uint8)
    bars[:, 20:40] = 100
    square = np.asarray(square_of(Image.fromarray(bars), 20, crop))
    assert abs(int(square[10, 1 if crop != "fit" else 10, 0]) - left) < 3
    if crop == "fit": assert len({tuple(pixel) for pixel in square[0]}) == 1, "the border has one colour"


def test_the_side_is_what_nine_of_ten_pictures_reach(tmp_path):
    for i in range(20): Image.new("RGB", (300, 140 if i else 30), (i, 99, 200)).save(tmp_path / f"{i}.png")
    assert read_squares(tmp_path).side == 128 and read_squares(tmp_path, largest=64).side == 64
    assert read_squares(tmp_path, crop="fit").side == 256


def test_masks_are_no_pictures(tmp_path):
    save(tmp_path / "p", faces(4))
    save(tmp_path / "p" / "Masks", faces(3))
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 8).save(tmp_path / "p" / "m.png")
    found = read_squares(tmp_path / "p")
    assert len(found.names) == 4 and "passed over as masks" in found.notes[0] and "looks like a mask" in found.notes[1]
    save(tmp_path / "p" / "images", faces(2))
    assert len(read_squares(tmp_path / "p").names) == 2, "of a data set only images/ is read"


@pytest.mark.parametrize(("make", "said"), [
    (lambda p: None, "is not there; give the folder"),
    (lambda p: p.mkdir(), "it holds nothing"),
    (lambda p: p.write_text("x"), "is a file; give the folder"),
    (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "it holds 1 .txt"),
    (lambda p: (p.mkdir(), (p / "a.png").write_text("<html>")), "it is a web page"),
    (lambda p: save(p, faces(1)), "1 picture in"),
    (lambda p: save(p, faces(6)[:, :, ::4, ::4]), "is 16 x 16 pixels: too small for 64, and 5 more"),
])
def test_a_mistake_is_one_sentence(tmp_path, capsys, make, said):
    make(tmp_path / "photos")
    assert main(["train-generator", str(tmp_path / "photos"), "--nice", "0"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "photos-generator" / "state.safetensors").exists()


def test_ten_pictures_are_said_to_be_few(tmp_path):
    notes = estimate_generator(save(tmp_path / "p", faces(10)), SMALL)[1]
    assert any("only 10 pictures" in note for note in notes)
    assert quiet(tmp_path / "p", tmp_path / "out", replace(SMALL, images=32))["held_out"] == 0


# ---- augmentation


def test_transforms_do_what_they_say():
    rng = torch.Generator().manual_seed(0)
    turn = random_geometry(4000, 0.7, rng)[:, :, :2]
    areas = torch.linalg.det(turn)
    assert 0.25 < (areas < 0).float().mean() < 0.45, "0.7 / 2 are mirrored"
    assert abs(areas.abs().log2().mean()) < 0.05, "as often larger as smaller"
    colours = random_colours(4000, 0.7, rng)
    white = colours[:, :, :3].sum(2)
    assert (white - white.mean(1, keepdim=True)).abs().max() < 1e-4 and 0.25 < (white[:, 0] < 0).float().mean() < 0.45
    images = torch.randn(4, 3, 8, 8)
    before = rng.get_state()
    assert torch.equal(augment(images, 0, rng), images)
    after = rng.get_state()
    rng.set_state(before)
    augment(images, 0.5, rng)
    assert torch.equal(rng.get_state(), after), "the stream of numbers does not depend on the probability"


def test_the_thermostat_goes_up_and_down_and_stays_in_its_range():
    trainer = AdaptiveTrainer(faces(8)[..., ::4, ::4].contiguous(), AdaptiveRecipe(
        images=64, batch=4, resolution=16, z_dim=4, w_dim=4, mapping_layers=1, channel_base=64, channel_max=4,
        discriminator_channels=(4, 4), bfloat16=False, ada_images=32))
    for sign, ends in ((1, 0.8), (-1, 0.0)):
        for _ in range(16): trainer.look_at(torch.full((4,), float(sign)))
        assert trainer.p == ends
    for _ in range(4): trainer.look_at(torch.tensor([1.0, 1, 1, 1]))
    assert trainer.p == 0.5 and trainer.more["r"] == 1
    with pytest.raises(InputError, match="ada_target is 2"): AdaptiveRecipe(ada_target=2.0)


# ---- measures


def test_the_frechet_distance_of_gaussians_is_known():
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    a, b = torch.diag(torch.tensor([4.0, 1.0]).double()), turn @ torch.diag(torch.tensor([9.0, 0.25]).double()) @ turn.T
    root = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * root + 25).item()
    first = x @ torch.linalg.cholesky(a).T
    assert frechet_distance(first, x @ torch.linalg.cholesky(b).T + torch.tensor([3.0, 4.0])) == pytest.approx(expected)
    assert precision_recall(x[:99], x[:99]) == (1, 1)


def test_copies_are_near_and_variety_counts():
    images = faces(200)
    measure = Likeness(images[:120], images[120:160])
    good, few = measure.score(images[160:]), measure.score(images[160:162].repeat(20, 1, 1, 1))
    assert good["relative"] < 2 < 5 < few["relative"] and few["recall"] < 0.3 < good["recall"]
    found, distance, yardstick = measure.copies(images[:10].flip(3))
    assert torch.equal(found, images[:10].flip(3)) and distance.max() < 1e-3 < yardstick.min()
    alone = Likeness(images[:10], mirrored=False).copies(images[:10])[2]
    assert torch.equal(alone, nearest(images[:10] / 255, images[:10] / 255, itself=True)[1])
    with pytest.raises(InputError, match="3 training pictures"): Likeness(images[:3])


# ---- a run


def result(out):
    tensors, header = load_tensors(out / "state.safetensors")
    return tensors, header["history"], header["more"], load_tensors(out / "generator.safetensors")[0]


def same(a, b):
    return a[1:3] == b[1:3] and all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
                                    for x, y in ((a[0], b[0]), (a[3], b[3])))


def test_a_run_that_is_cut_ends_in_the_same_bits(folder, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    facts = quiet(folder, tmp_path / "whole")
    assert facts["pictures"] == 38 and facts["held_out"] == 10 and len(facts["looks"]) == 3
    step = from_folder._step

    def cut(at, how):
        def stepping(run):
            losses = step(run)
            if run.trainer.seen == at: how()
            return losses

        monkeypatch.setattr(from_folder, "_step", stepping)

    def die(): raise RuntimeError("killed")

    cut(40, die)  # after the first look
    with pytest.raises(RuntimeError, match="killed"): quiet(folder, tmp_path / "cut")
    cut(76, lambda: signal.raise_signal(signal.SIGINT))  # goes on, and is stopped between two looks
    with pytest.raises(KeyboardInterrupt): quiet(folder, tmp_path / "cut")
    assert load_tensors(tmp_path / "cut" / "state.safetensors")[1]["seen"] == 76, "an interrupt loses nothing"
    cut(0, die)
    quiet(folder, tmp_path / "cut")
    assert same(result(tmp_path / "cut"), result(tmp_path / "whole"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_goes_on_with_the_same_pictures_and_settings_only(folder, tmp_path, capsys):
    out = tmp_path / "out"
    quiet(folder, out)
    before = result(out)
    with pytest.raises(InputError, match="other ada_target"): quiet(folder, out, replace(SMALL, augment=False))
    with pytest.raises(InputError, match="began with the crop centre, not fit"):
        quiet(folder, out, replace(SMALL, crop="fit"))
    quiet(folder, out, replace(SMALL, size=0))  # not said: the run's own
    (folder / "00.png").unlink()
    with pytest.raises(InputError, match=r"have changed since .* began: 1 gone \(00.png"): quiet(folder, out)
    assert same(result(out), before), "nothing was touched"
    quiet(folder, out, replace(SMALL, images=32), fresh=True)
    assert (out / "aside-1" / "state.safetensors").is_file() and "begun anew" in capsys.readouterr().out


def test_it_stops_when_it_no_longer_improves_and_keeps_the_best(folder, tmp_path, monkeypatch):
    values, saved = iter([3.0, 2.0, 2.5, 2.4, 1.0]), {}
    monkeypatch.setattr(Likeness, "score", lambda self, images: {
        "distance": 1.0, "relative": next(values), "precision": 0.5, "recall": 0.5})
    writing = from_folder.save_generator
    monkeypatch.setattr(from_folder, "save_generator",
                        lambda path, network, facts, half: (saved.update(seen=facts["images_seen"]),
                                                            writing(path, network, facts, half)))
    facts = quiet(folder, tmp_path / "out", replace(SMALL, every=16, patience=2))
    assert facts["seen"] == 64 and facts["why"] == "it no longer improved"
    assert facts["best"]["seen"] == saved["seen"] == 32
    assert load_generator(tmp_path / "out" / "generator.safetensors").header["provenance"]["images_seen"] == 32
    assert quiet(folder, tmp_path / "out", replace(SMALL, every=16, patience=2))["seen"] == 64, "it stays stopped"


def test_a_place_without_room_or_among_the_pictures(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="lies among the pictures"): quiet(folder, folder / "out")
    assert not (folder / "out").exists()
    monkeypatch.setattr(from_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="MiB, and 0 are free"): quiet(folder, tmp_path / "out")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_best(folder, tmp_path, monkeypatch):
    step = AdaptiveTrainer.step
    monkeypatch.setattr(AdaptiveTrainer, "step", lambda self: {
        name: value if self.seen < 48 else float("nan") for name, value in step(self).items()})
    with pytest.raises(FloatingPointError, match="best so far is kept"): quiet(folder, tmp_path / "out")
    assert load_tensors(tmp_path / "out" / "state.safetensors")[1]["seen"] == 32


@pytest.mark.parametrize(("words", "said"), [
    (["--size", "100"], "the size is 100 pixels; a generator draws 16, 32, 64, 128 or 256: the nearest is 128"),
    (["--crop", "cut"], "there is no crop 'cut'"), (["--images", "0"], "images is 0"),
    (["--threads", "0"], "threads is 0")])
def test_a_wrong_word_is_one_sentence(folder, capsys, words, said):
    assert main(["train-generator", str(folder), "--nice", "0", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# ---- the command


def test_the_command_on_a_folder(folder, tmp_path, capsys):
    words = ["train-generator", str(folder), "--size", "16", *FLAGS]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "38 pictures of 16 x 16 pixels (10 more held out)" in said and "GiB of memory" in said and "MiB" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"], "a dry run writes nothing"
    assert main(words) == 0
    said, out = capsys.readouterr().out, tmp_path / "photos-generator"
    assert f"next: lagm new PROJECT --images {folder} --classes" in said and "held-out" in said
    made = {path.name for path in out.iterdir()}
    assert made == set(from_folder._MADE) and len(list((out / "grids").iterdir())) == 2
    assert main(["inspect", str(out / "generator.safetensors")]) == 0
    assert "StyleGAN2" in capsys.readouterr().out
    assert main(["new", str(tmp_path / "project"), "--images", str(folder), "--classes", "background,face",
                 "--generator", str(out / "generator.safetensors")]) == 0


def test_the_command_on_a_project(folder, tmp_path, capsys):
    project = tmp_path / "project"
    new_project(project, folder, ["background", "face"], Settings(size=24))
    settings = project / "project.yaml"
    settings.write_text(settings.read_text().replace("seed: 0", "seed: 7  # my own\n#") + "\n")
    assert main(["train-generator", str(project), *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "38 pictures of 32 x 32" in said and "Next: lagm label" in said
    assert read_settings(project).generator == "generator/generator.safetensors" and "# my own" in settings.read_text()
    assert load_generator(project / read_settings(project).generator).network.img_resolution == 32


@pytest.mark.parametrize("text", ["generator: {module: p:G,\n  weights: g.pt}  # mine\nsteps: 5\n",
                                  "generator:\n  module: p:G\n  layers:\n  - a\n  - b\n\n# mine\nsteps: 5\n",
                                  'generator: "a#b.pt"  # mine\nsteps: 5', "steps: 5  # mine", "generator:  # mine\n"])
@pytest.mark.parametrize("name", ["g.safetensors", "it's a #1: é.pt"])
def test_the_generator_of_a_project_is_replaced_however_it_was_written(tmp_path, text, name):
    (tmp_path / "project.yaml").write_text(text, encoding="utf-8")
    _name_generator(tmp_path, name)
    settings = read_settings(tmp_path)
    assert settings.generator == name and settings.steps == (5 if "steps" in text else 1000)
    assert "# mine" in (tmp_path / "project.yaml").read_text(encoding="utf-8")
