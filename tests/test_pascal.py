"""The preparation of Pascal-Part equals the released tool's, goes on where it was stopped, and survives broken files.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lagm import cli
from lagm.core.errors import InputError
from lagm.data.pascal import PascalPart
from lagm.data.pascal_boxes import cut_square, overlap, read_boxes, square_around, usable_boxes
from lagm.data.pascal_files import Unusable, decode_mask, encode_mask, paint_parts, read_annotation
from lagm.data.prepare_pascal import N_LABELLED, _write_lists, labelled_share, part_presence, prepare_pascal

scipy_io = pytest.importorskip("scipy.io")
pytest.importorskip("pycocotools")

GOLDEN = Path(__file__).parent / "golden" / "datasets"
VOC = GOLDEN / "data" / "VOC2010"
EXPECTED = np.load(GOLDEN / "datasets_expected.npz")
OFFICIAL = json.loads((GOLDEN / "pascal_part_expected.json").read_text(encoding="utf-8"))


def run(voc, out, **options):
    return prepare_pascal(voc, options.pop("objects", ("horse", "aeroplane")), out, workers=options.pop("workers", 1),
                          progress=False, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The stand-ins, prepared."""
    out = tmp_path_factory.mktemp("pascal") / "data" / "PascalPart"
    run(VOC, out, steps=("parse",))
    run(VOC, out)
    return out


@pytest.fixture
def voc(tmp_path):
    shutil.copytree(VOC, tmp_path / "voc")
    return tmp_path / "voc"


def png(path):
    return np.asarray(Image.open(path))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [f"2008_{i:06d}" for i in range(1, 8)])
def test_parsed_parts(made, name):
    assert np.array_equal(png(made / "parsed" / f"{name}.png"), EXPECTED[f"pascal.pre.{name}"])
    objects, original = (json.loads((made / "parsed" / f"{name}.json").read_text())["objects"],
                         read_annotation(VOC / "part_segmentation" / "Annotations_Part" / f"{name}.mat"))
    for ours, theirs in zip(objects, original, strict=True):
        assert (ours["class"], ours["class_ind"]) == (theirs["class"], theirs["class_ind"])
        assert np.array_equal(decode_mask(ours["mask"]), theirs["mask"])
        assert [part["part_name"] for part in ours["parts"]] == [part for part, _ in theirs["parts"]]
        for part, (_, mask) in zip(ours["parts"], theirs["parts"]):
            assert np.array_equal(decode_mask(part["mask"]), mask)


@pytest.mark.parametrize("key", OFFICIAL)
def test_everything_equals_the_released_tool(made, key):
    folder, value = made / key, OFFICIAL[key]
    assert sorted(contents(folder)) == value["files"]
    assert json.loads((folder / "stats.json").read_text()) == value["stats"]
    assert json.loads((folder / "cropped_stats.json").read_text()) == value["cropped_stats"]
    for file in ("train_set", "val_set"):
        if file in value: assert (folder / f"{file}.txt").read_text().splitlines() == value[file]
    compared = 0
    for name in EXPECTED:
        if name.startswith(f"pascal.{key.replace('/', '.')}.") and ".item" not in name:
            assert np.array_equal(png(folder / f"{name.split('.')[3]}/{name.split('.')[4]}.png"), EXPECTED[name])
            compared += 1
    assert compared == len(value["stats"]["indexs"]) + 2 * len(value["cropped_stats"]["indexs"])
    assert {path: data for path, data in contents(folder / "JPEGImages").items()} == {
        f"{name}.jpg": (VOC / "JPEGImages" / f"{name}.jpg").read_bytes() for name in value["stats"]["indexs"]
    }


@pytest.mark.parametrize("name", ["horse", "aeroplane"])
def test_the_reader_finds_them(made, name):
    data = PascalPart(made.parent, name, "test", size=(48, 48))
    for i, (image, mask) in enumerate(data[j] for j in range(len(data))):
        assert np.array_equal(mask, EXPECTED[f"pascal.{name}.test.item{i}.seg"])
        assert np.array_equal(image.numpy().astype(np.float16), EXPECTED[f"pascal.{name}.test.item{i}.img"])
    assert PascalPart(made.parent, name, "train").names == OFFICIAL[f"{name}/train"]["train_set"]
    with pytest.raises(InputError, match="0 items here"): PascalPart(made.parent, name, "val", k=1)


@pytest.mark.slow
def test_several_processes_and_single_steps_make_the_same(made, tmp_path):
    run(VOC, tmp_path / "one", steps=("parse",), workers=2)
    for step in ("copy", "crop"): run(VOC, tmp_path / "one", steps=(step,))
    assert contents(tmp_path / "one") == contents(made)


def test_a_second_run_makes_nothing_and_a_deleted_file_comes_back(tmp_path):
    run(VOC, tmp_path)
    before = contents(tmp_path)
    assert sum(report.made for report in run(VOC, tmp_path)) == 0
    (tmp_path / "parsed" / "2008_000001.png").unlink()
    (tmp_path / "horse" / "train" / "CroppedSegmentation" / "2008_000002_1.png").unlink()
    shutil.rmtree(tmp_path / "aeroplane" / "test" / "JPEGImages")
    # a new parse makes its copies and crops anew
    assert [report.made for report in run(VOC, tmp_path)] == [1, 1, 0, 2, 0, 0, 1, 0, 2]
    assert contents(tmp_path) == before


def test_changed_sources_and_settings_are_noticed(voc, tmp_path):
    out = tmp_path / "out"
    run(voc, out, objects=("horse",))
    run(voc, out, objects=("horse",), minpx=60, steps=("crop",))
    assert sorted(path.name for path in (out / "horse" / "train" / "CroppedImages").iterdir()) == ["2008_000001_0.png"]
    assert (out / "horse" / "train" / "train_set.txt").read_text() == "2008_000001_0\n"
    run(voc, out, objects=("horse",), steps=("crop",))
    assert json.loads((out / "horse" / "train"
                       / "cropped_stats.json").read_text()) == OFFICIAL["horse/train"]["cropped_stats"]
    (voc / "ImageSets" / "Main" / "horse_train.txt").write_text("2008_000001  1\n")
    run(voc, out, objects=("horse",))
    assert [path.name for path in (out / "horse" / "train" / "JPEGImages").iterdir()] == ["2008_000001.jpg"]
    xml = voc / "Annotations" / "2008_000001.xml"
    xml.write_text(xml.read_text().replace("<xmin>11<", "<xmin>21<"))
    os.utime(xml, (2e9, 2e9))
    run(voc, out, objects=("horse",))
    assert png(out / "horse" / "train" / "CroppedImages" / "2008_000001_0.png").shape == (79, 79, 3)
    assert not np.array_equal(png(out / "horse" / "train" / "CroppedSegmentation" / "2008_000001_0.png"),
                              EXPECTED["pascal.horse.train.CroppedSegmentation.2008_000001_0"])


# ---- broken things


def mat(path, objects, name="x"):
    scipy_io.savemat(path, {"anno": {"imname": name, "objects": objects}})


@pytest.mark.parametrize("damage", [b"", b"<html>", b"MATLAB 5.0 MAT-file" + bytes(200)])
def test_corrupt_mat_files_are_reported(voc, tmp_path, damage):
    (voc / "part_segmentation" / "Annotations_Part" / "2008_000001.mat").write_bytes(damage)
    reports = run(voc, tmp_path / "out")
    assert "2008_000001" in reports[0].skipped and reports[0].made == 5
    assert OFFICIAL["aeroplane/test"]["cropped_stats"] == json.loads((tmp_path / "out" / "aeroplane" / "test"
                                                                      / "cropped_stats.json").read_text())
    assert "2008_000001: " in str(reports[0])


def test_mat_files_cut_anywhere(tmp_path):
    whole = (VOC / "part_segmentation" / "Annotations_Part" / "2008_000002.mat").read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 25)):
        (tmp_path / "a.mat").write_bytes(whole[:end])
        with pytest.raises(Unusable, match="a.mat"): read_annotation(tmp_path / "a.mat")


@pytest.mark.parametrize("objects", [{"class": "horse"},
                                     {"class": "horse", "class_ind": 13, "mask": np.zeros((2, 3, 4)), "parts": []},
                                     {"class": "horse", "class_ind": 13, "mask": np.zeros((4, 5)),
                                      "parts": {"part_name": "head", "mask": np.zeros((5, 4))}}, []])
def test_mat_files_of_another_form(tmp_path, objects):
    mat(tmp_path / "a.mat", objects)
    with pytest.raises(Unusable): read_annotation(tmp_path / "a.mat")


def test_missing_files_no_parts_and_empty_results(voc, tmp_path):
    mats = voc / "part_segmentation" / "Annotations_Part"
    (voc / "JPEGImages" / "2008_000001.jpg").unlink()
    mat(mats / "2008_000002.mat", {"class": "horse", "class_ind": 13, "mask": np.ones((100, 120), np.uint8),
                                   "parts": np.zeros((0, 0))})
    (mats / "2008_000004.mat").unlink()
    (voc / "Annotations" / "2008_000003.xml").unlink()
    (voc / "JPEGImages" / "2008_000006.jpg").write_bytes((voc / "JPEGImages" / "2008_000006.jpg").read_bytes()[:500])
    mat(mats / "2008_000005.mat", {"class": "cow", "class_ind": 10, "mask": np.ones((100, 120), np.uint8),
                                   "parts": {"part_name": "head", "mask": np.ones((100, 120), np.uint8)}})
    reports = run(voc, tmp_path / "out")
    why = {name: text for report in reports for name, text in report.skipped.items()}
    for name, words in {"2008_000001": "no picture", "2008_000002": "has no parts",
                        "2008_000004": "no parsed annotation", "2008_000003": "no box file",
                        "2008_000005": "no object is a horse", "2008_000006": "damaged or cut off"}.items():
        assert words in why[name]
    for key in OFFICIAL:
        assert json.loads((tmp_path / "out" / key / "stats.json").read_text())["indexs"] == []
        assert (json.loads((tmp_path / "out" / key / "cropped_stats.json").read_text())
                == {"indexs": [], "part_class": [], "area": []})
    assert (tmp_path / "out" / "horse" / "train" / "train_set.txt").read_text() == ""


def test_unknown_parts_are_counted(voc, tmp_path):
    mask = np.ones((100, 120), np.uint8)
    mat(voc / "part_segmentation" / "Annotations_Part" / "2008_000001.mat",
        {"class": "horse", "class_ind": 13, "mask": mask,
         "parts": np.array([("wing", mask), ("tail", mask * (np.arange(120) < 60))],
                           dtype=[("part_name", object), ("mask", object)])})
    report = run(voc, tmp_path / "out", objects=("horse",))[0]
    assert report.notes["unknown part horse/wing"] == 1 and "horse/wing: 1 times" in str(report)
    assert np.unique(png(tmp_path / "out" / "parsed" / "2008_000001.png")).tolist() == [0, 5]


def test_user_mistakes(tmp_path):
    for options, words in (({"objects": ("unicorn",)}, "no class 'unicorn'"),
                           ({"objects": ("boat",)}, "no parts of class 'boat'"), ({"steps": ("cut",)}, "unknown step"),
                           ({"steps": ("crop",)}, "'copy' comes first")):
        with pytest.raises(InputError, match=words): run(VOC, tmp_path, **options)
    with pytest.raises(InputError, match="Get VOC 2010"): run(tmp_path, tmp_path)
    with pytest.raises(InputError, match="cow_train.txt"): run(VOC, tmp_path, objects=("cow",))


def test_command_line(tmp_path, capsys):
    assert cli.main(["prepare", "pascal", "--voc", str(VOC), "--object", "horse", "--out", str(tmp_path / "p"),
                     "--workers", "1"]) == 0
    assert "crop horse train: 3 made, 0 kept, 0 left out" in capsys.readouterr().out
    assert cli.main(["prepare", "pascal", "--voc", str(tmp_path), "--out", str(tmp_path / "q")]) == 2


# ---- pieces


def test_boxes(tmp_path):
    (tmp_path / "a.xml").write_text(
        "<annotation>"
        + "".join(
            f"<object><name>{name}</name><part><bndbox><xmin>0</xmin></bndbox></part>"
            f"<bndbox><xmin>{x}</xmin><ymin>2.0</ymin><xmax>40.6</xmax><ymax>50</ymax></bndbox></object>"
            for name, x in (("horse", "3"), ("person", "1"), ("horse", "7.9"))
        )
        + "</annotation>"
    )
    assert read_boxes(tmp_path / "a.xml", "horse") == [(2, 1, 40, 50), (6, 1, 40, 50)]
    (tmp_path / "a.xml").write_text("<annotation><object><name>horse</name></object></annotation>")
    with pytest.raises(Unusable): read_boxes(tmp_path / "a.xml", "horse")


def test_overlap_and_size_rules():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1 and overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    a = (0, 0, 100, 100)
    assert list(usable_boxes([a, (90, 0, 190, 100)], 32)) == []  # 1000 / 19000 = 0.053
    assert list(usable_boxes([a, (91, 0, 191, 100)], 32)) == [0, 1]  # 900 / 19100 = 0.047
    assert list(usable_boxes([a, (200, 0, 232, 100), (300, 0, 331, 100)], 32)) == [0, 1]


@pytest.mark.parametrize("box,size,square,side", [
    ((10, 12, 81, 91), (120, 100), (6, 12, 85, 91), 79), ((5, 20, 56, 91), (120, 100), (0, 20, 66, 91), 71),
    ((8, 20, 111, 86), (120, 100), (8, 1, 111, 100), 103),
    ((0, 0, 120, 100), (120, 100), (0, 0, 120, 100), 120), ((90, 10, 120, 70), (120, 100), (75, 10, 120, 70), 60),
    ((20, 90, 61, 100), (120, 100), (20, 74, 61, 100), 41)])
def test_squares(box, size, square, side):
    assert square_around(box, size) == square
    cut = cut_square(np.ones((size[1], size[0]), np.uint8), square)
    width, height = square[2] - square[0], square[3] - square[1]
    assert cut.shape == (side, side) and cut.sum() == width * height
    assert (np.flatnonzero(cut.any(0))[0] == (side - width) // 2
            and np.flatnonzero(cut.any(1))[0] == (side - height) // 2)


def test_small_pieces():
    mask = np.random.RandomState(0).rand(13, 17) > 0.5
    assert np.array_equal(decode_mask(json.loads(json.dumps(encode_mask(mask)))), mask)
    assert labelled_share(mask) == mask.mean() and part_presence(np.array([[0, 2]]), 4) == [[1.0, 0.0, 1.0, 0.0]]
    assert paint_parts([], (3, 4))[0].shape == (3, 4)


def test_the_first_180_are_labelled(tmp_path):
    names = [f"{i:04d}_0" for i in range(200)]
    _write_lists(tmp_path, names)
    assert ((tmp_path / "train_set.txt").read_text().split() == names[:N_LABELLED]
            and (tmp_path / "val_set.txt").read_text().split() == names[180:])
