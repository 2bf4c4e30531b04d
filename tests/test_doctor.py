"""The doctor is right about whole, partial and damaged trees, and so is its exit code."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lagm import cli
from lagm.core.errors import InputError
from lagm.data.cgpart import CGPART_MODELS
from lagm.data.images import save_mask
from lagm.data.registry import EXPERIMENTS
from lagm.download.sources import SOURCES
from lagm.experiments.catalogue import missing_inputs, read_catalogue
from lagm.experiments.doctor import Doctor, can_run, examine, report
from lagm.experiments.notebooks import list_experiments

ROOT = Path(__file__).parent / "golden" / "datasets" / "data"


def make_celeba(data, splits):
    """A tree with small faces of two parts."""
    for numbers in splits.values():
        for number in numbers:
            image = data / "CelebAMask-HQ" / "CelebA-HQ-img" / f"{number}.jpg"
            parts = data / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno" / str(number // 2000)
            image.parent.mkdir(parents=True, exist_ok=True), parts.mkdir(parents=True, exist_ok=True)
            if number == next(iter(numbers)):
                Image.new("RGB", (16, 16)).save(image)
                Image.new("L", (8, 8), 255).save(parts / f"{number:05d}_skin.png")
                first = image, parts / f"{number:05d}_skin.png"
            else: os.link(first[0], image), os.link(first[1], parts / f"{number:05d}_skin.png")


def make_pascal(data, name, train=180, val=3, test=2):
    for split, n in (("train", train + val), ("test", test)):
        folder = data / "PascalPart" / name / split
        for below in ("CroppedImages", "CroppedSegmentation"): (folder / below).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (9, 9)).save(folder / "CroppedImages" / f"{i:03d}_0.png")
            save_mask(folder / "CroppedSegmentation" / f"{i:03d}_0.png", np.ones((9, 9)))
    names = [f"{i:03d}_0\n" for i in range(train + val)]
    (data / "PascalPart" / name / "train" / "train_set.txt").write_text("".join(names[:train]))
    (data / "PascalPart" / name / "train" / "val_set.txt").write_text("".join(names[train:]))


def make_datasetgan(data, name, test_folder, train=16, test=10):
    for below, n in ((f"training_data/{name}_processed", train), (f"testing_data/{test_folder}", test)):
        folder = data / "DatasetGAN" / "annotation" / below
        folder.mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (16, 12)).save(folder / f"image_{i}.png")
            np.save(folder / f"image_mask{i}.npy", np.zeros((12, 16), np.uint8))


def make_cgpart(data, per_model=250):
    shutil.copytree(ROOT / "CGPart_real", data / "CGPart_real")
    for kind in ("minivan", "suv", "sedan", "wagon"):
        for below in ("image", "seg"):
            folder = data / "CGPart_render" / "car" / below / CGPART_MODELS["car"][kind]
            folder.mkdir(parents=True)
            Image.new("RGBA" if below == "image" else "P", (8, 6)).save(folder / "000000.png")
            for i in range(1, per_model): os.link(folder / "000000.png", folder / f"{i:06d}.png")


def make_files(data, checkpoints):
    """Every checkpoint and latent, in form."""
    for source in SOURCES.values():
        path = source.place(data, checkpoints)
        if source.kind not in ("pickle", "torch", "npy"): continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.kind == "pickle": path.write_bytes(b"\x80\x04N.")
        elif source.kind == "npy": np.save(path, np.zeros((18, 512) if "cat" not in source.name else 512, np.float32))
        else: torch.save({"x": torch.zeros(1)}, path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tree with everything the 28 experiments need."""
    base = tmp_path_factory.mktemp("whole")
    data, checkpoints = base / "data", base / "checkpoints"
    make_celeba(data, {"train": range(28000, 29500), "val": range(27500, 28000), "test": range(29500, 30000)})
    for name in ("horse", "aeroplane"): make_pascal(data, name)
    for name, folder in (("car", "car_20_class"), ("cat", "cat_16_class"), ("face", "face_34_class")):
        make_datasetgan(data, name, folder)
    make_cgpart(data)
    make_files(data, checkpoints)
    return data, checkpoints


@pytest.fixture
def small(tmp_path):
    """A tree that `celeba_2`, `horse_2` and `cat16_stylegan_unet` can do with, to be damaged."""
    data, checkpoints = tmp_path / "data", tmp_path / "checkpoints"
    shutil.copytree(ROOT, data)
    make_pascal(data, "horse", train=2)
    shutil.rmtree(data / "DatasetGAN")
    make_datasetgan(data, "cat", "cat_16_class", train=3, test=5)
    make_files(data, checkpoints)
    return data, checkpoints


def wrong(name, tree, **options):
    return {finding.need: finding for finding in examine(EXPERIMENTS[name], Doctor(*tree, **options))
            if finding.status not in ("present", "note")}


def places(tree):
    return ["--data", str(tree[0]), "--checkpoints", str(tree[1])]


def test_a_whole_tree(whole, capsys):
    content = report(None, *whole)
    assert content["can_run"] and len(content["experiments"]) == 28
    assert {finding["status"] for entry in content["experiments"].values()
            for finding in entry["findings"]} == {"present"}
    assert cli.main(["doctor", "celeba_1500", *places(whole)]) == 0
    assert "celeba_1500: could run" in capsys.readouterr().out


def test_an_empty_tree(tmp_path, capsys):
    tree = tmp_path / "d", tmp_path / "c"
    content = report(None, *tree)
    assert not content["can_run"]
    for name, entry in content["experiments"].items():
        assert not entry["can_run"] and {finding["status"] for finding in entry["findings"]} <= {"missing",
                                                                                                 "note"}, name
        assert all(finding["mend"] for finding in entry["findings"])
    assert cli.main(["doctor", *places(tree)]) == 1
    text = capsys.readouterr().out
    assert ("0 of 28 experiments could run" in text and "lagm fetch stylegan2-horse" in text
            and "lagm prepare pascal" in text)
    assert cli.main(["doctor", "celeba_2", "--json", *places(tree)]) == 1
    assert json.loads(capsys.readouterr().out)["experiments"]["celeba_2"]["can_run"] is False


def test_partial_trees(small, capsys):
    for name, good in (("celeba_2", True), ("celeba_10", False), ("horse_2", True), ("horse_10", False),
                       ("cat16_stylegan_unet", True), ("cat16_stylegan2_deeplab", True), ("car20_stylegan_unet", False),
                       ("aeroplane_2", False)):
        assert can_run(examine(EXPERIMENTS[name], Doctor(*small))) == good, name
        assert cli.main(["doctor", name, *places(small)]) == (0 if good else 1)
    assert wrong("aeroplane_2", small)["Pascal-Part aeroplane train"].status == "missing"
    assert (
        f"lagm prepare pascal --voc {small[0] / 'VOC2010'} --object aeroplane"
        in wrong("aeroplane_2", small)["Pascal-Part aeroplane train"].mend
    )
    assert wrong("horse_10", small)["Pascal-Part horse train"].detail == "2 items, 10 are needed"
    assert wrong("celeba_10", small)["CelebAMask-HQ train"].status == "broken"
    assert cli.main(["doctor", "celeba", *places(small)]) == 1
    assert "1 of 5 experiments could run" in capsys.readouterr().out
    notes = [finding for finding in examine(EXPERIMENTS["celeba_2"], Doctor(*small)) if finding.status == "note"]
    assert "not the official split" in notes[0].detail


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


FACE = "CelebAMask-HQ/CelebA-HQ-img/7.jpg"
PARTS = "CelebAMask-HQ/CelebAMask-HQ-mask-anno/0"


@pytest.mark.parametrize("name,damage,need,words", [
    ("celeba_2", lambda d: cut(d / FACE), "CelebAMask-HQ train", "damaged or cut off"),
    ("celeba_2", lambda d: cut(d / PARTS / "00007_hair.png"), "CelebAMask-HQ val", "00007_hair.png is damaged"),
    ("celeba_2", lambda d: (d / FACE).write_text("<html>"), "CelebAMask-HQ train", "a web page"),
    ("celeba_2", lambda d: (d / FACE).write_bytes(b""), "CelebAMask-HQ train", "empty"),
    ("celeba_2", lambda d: (d / FACE).unlink(), "CelebAMask-HQ train", "1 of 2 train images are not in"),
    ("celeba_2", lambda d: [path.unlink() for path in (d / PARTS).glob("00007*")], "CelebAMask-HQ train",
     "no part masks"),
    ("celeba_2", lambda d: (d / "CelebAMask-HQ" / "CelebA-HQ-img").rename(d / "CelebAMask-HQ" / "img"),
     "CelebAMask-HQ test", "the images of CelebAMask-HQ not found"),
    ("celeba_2", lambda d: shutil.rmtree(d / "CelebAMask-HQ"), "CelebAMask-HQ train", "there is no"),
    ("horse_2", lambda d: cut(d / "PascalPart/horse/train/CroppedImages/001_0.png"), "Pascal-Part horse train",
     "damaged or cut off"),
    ("horse_2", lambda d: (d / "PascalPart/horse/train/CroppedSegmentation/003_0.png").unlink(),
     "Pascal-Part horse val", "is not there"),
    ("horse_2", lambda d: (d / "PascalPart/horse/train/val_set.txt").write_text(""), "Pascal-Part horse val",
     "0 items"),
    ("horse_2", lambda d: (d / "PascalPart/horse/train/train_set.txt").unlink(), "Pascal-Part horse train",
     "list of train crops"),
    ("horse_2", lambda d: shutil.rmtree(d / "PascalPart/horse/test"), "Pascal-Part horse test", "not found"),
    ("cat16_stylegan_unet", lambda d: cut(d / "DatasetGAN/annotation/training_data/cat_processed/image_mask1.npy"),
     "DatasetGAN cat train", "image_mask1.npy is damaged"),
    ("cat16_stylegan_unet", lambda d: (d / "DatasetGAN/annotation/testing_data/cat_16_class/image_4.png").unlink(),
     "DatasetGAN cat test", "no image for mask"),
    ("cat16_stylegan_unet",
     lambda d: [(d / f"DatasetGAN/annotation/testing_data/cat_16_class/image{x}").unlink()
                for x in ("_0.png", "_mask0.npy")], "DatasetGAN cat test", "4 items, 5 are needed"),
    ("cat16_stylegan_unet", lambda d: np.save(d / "DatasetGAN/training_latent/cat_16/avg_latent_cat.npy", np.zeros(7)),
     "latent-cat", r"shape \(7,\)"),
    ("cat16_stylegan_unet", lambda d: cut(d / "DatasetGAN/training_latent/cat_16/avg_latent_cat.npy"), "latent-cat",
     "is damaged"),
    ("cat16_stylegan_unet",
     lambda d: cut(d.parent / "checkpoints/stylegan_pt/karras2019stylegan-cats-256x256.for_g_all.pt"), "stylegan-cat",
     "without its end"),
    ("celeba_2",
     lambda d: (d.parent / "checkpoints/stylegan2/celeba0-28k-paper256-ada.pkl").write_text("version https://git-lfs"),
     "stylegan2-celeba-256", "git-lfs pointer"),
    ("celeba_2", lambda d: (d.parent / "checkpoints/stylegan2/celeba0-28k-paper256-ada.pkl").write_bytes(b"\x80\x04N"),
     "stylegan2-celeba-256", "cut off"),
    ("celeba_2", lambda d: (d.parent / "checkpoints/torchvision/resnet101-63fe2227.pth").write_text("<html>"),
     "resnet101", "a web page"),
])
def test_damaged_trees(small, name, damage, need, words):
    assert not wrong(name, small)
    damage(small[0])
    found = wrong(name, small)
    assert need in found and re.search(words, found[need].detail), found
    assert found[need].mend and cli.main(["doctor", name, *places(small)]) == 1


def test_damage_inside_is_found_by_decoding(small):
    path = small[0] / PARTS / "00007_hair.png"
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(30) + content[90:])
    assert (not wrong("celeba_2", small) and "damaged" in wrong("celeba_2", small,
                                                                deep=True)["CelebAMask-HQ train"].detail)
    path.write_bytes(content)
    save_mask(small[0] / "PascalPart/horse/train/CroppedSegmentation/001_0.png", np.full((9, 9), 6))
    assert not wrong("horse_2", small) and "holds the value 6" in wrong("horse_2", small,
                                                                        deep=True)["Pascal-Part horse train"].detail


def test_a_whole_picture_with_something_after_its_end_is_whole(small):
    with open(small[0] / FACE, "ab") as file: file.write(b"\r\n" + b"x" * 40)
    assert not wrong("celeba_2", small)


def test_the_backbone(small, monkeypatch):
    (small[1] / "torchvision" / "resnet101-63fe2227.pth").unlink()
    monkeypatch.setenv("TORCH_HOME", str(small[0]))
    assert torch.hub.get_dir() == str(small[0] / "hub")  # where torchvision keeps what it downloads
    (finding,) = ([finding for finding in examine(EXPERIMENTS["celeba_2"], Doctor(*small))
                   if finding.need == "resnet101"])
    assert (finding.status == "missing" and finding.mend.startswith("lagm fetch resnet101")
            and "--from" not in finding.mend)
    (small[0] / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({}, small[0] / "hub" / "checkpoints" / "resnet101-63fe2227.pth")
    assert wrong("celeba_2", small)["resnet101"].mend.endswith(
        f"--from {small[0] / 'hub' / 'checkpoints' / 'resnet101-63fe2227.pth'}"
    )


def test_unknown_names(capsys):
    with pytest.raises(InputError, match="no experiment is called 'celeba_3'; there are celeba_2"): report("celeba_3")
    assert cli.main(["doctor", "dog"]) == 2 and "no experiment is called 'dog'" in capsys.readouterr().err


# ---- the doctor and `lagm run` say the same


def test_what_run_lacks_is_what_the_doctor_misses(small, monkeypatch):
    data, checkpoints = small
    monkeypatch.chdir(data.parent)
    assert (data.name, checkpoints.name) == ("data", "checkpoints")
    backbone, generator = (checkpoints / "torchvision" / "resnet101-63fe2227.pth",
                           checkpoints / "stylegan2" / "celeba0-28k-paper256-ada.pkl")
    run = read_catalogue()["celeba_2/annotate"]

    def agree(expected):
        assert [line for line in missing_inputs(run, data.parent) if "CelebA" not in line] == expected
        assert ({need for need in wrong("celeba_2", small) if "CelebA" not in need}
                == {source.name for source in SOURCES.values() if any(source.path in line for line in expected)})

    agree([])
    page = generator.read_bytes()
    generator.write_text("<html>quota</html>")
    agree(["generator: checkpoints/stylegan2/celeba0-28k-paper256-ada.pkl cannot be used: it is a web page (a download "
           "that went wrong)"])
    generator.write_bytes(page)
    backbone.unlink()
    agree(["backbone: there is no checkpoints/torchvision/resnet101-63fe2227.pth"])


@pytest.mark.parametrize("name,keys,code", [
    ("celeba_2", ["celeba_2"], 0), ("celeba_2/annotate", ["celeba_2/annotate"], 0),
    ("celeba_2/evaluate", ["celeba_2"], 0), ("celeba_1*", ["celeba_10", "celeba_150", "celeba_1500"], 1),
    ("cat16_stylegan_unet/downstream", ["cat16_stylegan_unet/downstream"], 0), ("quickstart", ["quickstart"], 0),
    ("annotate", ["annotate"], 0), ("report", ["report"], 0),
    ("demo_k*", ["demo_k1", "demo_k10", "demo_k2", "demo_k30", "demo_k5"], 0),
    ("demo_cross_micah/cross_domain", ["demo_cross_micah"], 0), ("cgpart_car/annotate", ["cgpart_car/annotate"], 1)])
def test_every_name_that_run_takes(small, capsys, name, keys, code):
    assert cli.main(["doctor", name, "--json", *places(small)]) == code
    assert list(json.loads(capsys.readouterr().out)["experiments"]) == keys


def test_every_name_of_the_list_is_known(small):
    for name in [*list_experiments(), *list(read_catalogue())[::12]]: assert report(name, *small)["experiments"], name


def test_a_stage_needs_what_it_reads(small):
    shutil.rmtree(small[0] / "CelebAMask-HQ" / "CelebA-HQ-img")
    entry = report("celeba_2/annotate", *small)["experiments"]["celeba_2/annotate"]
    assert {finding["need"] for finding in entry["findings"]} == {"CelebAMask-HQ train", "CelebAMask-HQ val",
                                                                  "CelebAMask-HQ splits", "stylegan2-celeba-256",
                                                                  "resnet101"}
    entry = report("cgpart_car/annotate", *small)["experiments"]["cgpart_car/annotate"]
    assert {finding["need"] for finding in entry["findings"]} == {"CGPart rendered cars", "CGPart real cars val",
                                                                  "stylegan2-car", "resnet101"}


def test_a_reason_is_said_once(tmp_path, capsys):
    cli.main(["doctor", "celeba", "--data", str(tmp_path), "--checkpoints", str(tmp_path)])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == len(set(lines)) and text.count("there is no") == 3  # the data, the generator, the backbone
    assert "missing  CelebAMask-HQ train, CelebAMask-HQ val, CelebAMask-HQ test: there is no" in text


def test_advice_names_what_was_asked(tmp_path):
    for name in ("celeba_10", "car20_stylegan_unet"):
        lines = [line for line in missing_inputs(read_catalogue()[f"{name}/annotate"], tmp_path)
                 if "lagm doctor" in line]
        assert lines and all(f"`lagm doctor {name}`" in line for line in lines)


def test_without_a_word_the_projects_own_folders_are_looked_at(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT, tmp_path / "project" / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LAGM_HOME", str(tmp_path / "project"))
    cli.main(["doctor", "celeba_2"])
    text = capsys.readouterr().out
    assert "CelebAMask-HQ train: 2 items" in text and str(tmp_path / "project" / "checkpoints") in text
    cli.main(["doctor", "celeba_2", "--data", "data"])  # what is given is meant from here
    assert "there is no data/CelebAMask-HQ" in capsys.readouterr().out
    assert (cli.main(["fetch", "--list"]) == 0
            and str(tmp_path / "project" / "data" / "VOC2010") in capsys.readouterr().out)
