"""Names in the lists of VOC and in files beside them lead nowhere else, and one bad record costs one picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lagm.core.errors import InputError
from lagm.data.pascal_boxes import read_boxes
from lagm.data.pascal_files import Unusable, decode_mask, encode_mask
from lagm.data.prepare_pascal import Report, copy_one, listed, prepare_pascal
from lagm.data.regions import unpack_counts

pytest.importorskip("scipy.io")
mask_of = pytest.importorskip("pycocotools.mask")

VOC = Path(__file__).parent / "golden" / "datasets" / "data" / "VOC2010"
HOSTILE = ("../../escaped", "/tmp/escaped", "..\\escaped", "C:\\escaped", "sub/2008_000001", "..")


@pytest.fixture
def voc(tmp_path):
    shutil.copytree(VOC, tmp_path / "in" / "voc")
    return tmp_path / "in" / "voc"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_hostile_names_in_a_list_are_left_out_and_nothing_is_written_outside(voc, tmp_path):
    for split in ("train", "val"):
        path = voc / "ImageSets" / "Main" / f"horse_{split}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + "".join(f"{name} 1\n" for name in HOSTILE).encode())
    # what such a name would find if it were followed
    for below, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        found = next((voc / below).iterdir())
        for name in ("../../escaped", "sub/2008_000001"):
            (voc / below / f"{name}{suffix}").parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, voc / below / f"{name}{suffix}")
    mats = voc / "part_segmentation" / "Annotations_Part"
    (mats / "sub").mkdir()
    for name in ("../../escaped", "sub/2008_000001"): shutil.copyfile(mats / "2008_000001.mat", mats / f"{name}.mat")
    before = files(tmp_path)
    reports = prepare_pascal(voc, ("horse",), tmp_path / "in" / "out" / "deep", workers=1, progress=False)
    assert {name for name in files(tmp_path) - before if not name.startswith("in/out/deep/")} == set()
    assert all("escaped" not in name and "sub" not in name for name in files(tmp_path / "in" / "out"))
    parse, copies = reports[0], reports[1]
    assert set(HOSTILE) <= set(parse.skipped) and set(HOSTILE) <= set(copies.skipped)
    assert "out of the folder" in parse.skipped["../../escaped"] and "of no file" in parse.skipped["sub/2008_000001"]
    clean = prepare_pascal(VOC, ("horse",), tmp_path / "clean", workers=1, progress=False)
    # the byte order mark hides no picture
    assert [report.made for report in reports] == [report.made for report in clean]


def test_hostile_classes_and_names_in_stats(voc, tmp_path):
    with pytest.raises(InputError, match="no class '../x"):
        prepare_pascal(voc, ("../x\x1b[31m",), tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="out of the folder"): listed(voc, "../../horse", "train")
    out = tmp_path / "out"
    prepare_pascal(voc, ("horse",), out, steps=("parse", "copy"), workers=1, progress=False)
    stats = out / "horse" / "train" / "stats.json"
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"indexs": ["../../../escaped"]}))
    report = prepare_pascal(voc, ("horse",), out, steps=("crop",), workers=1, progress=False)[0]
    assert report.made == 0 and "out of the folder" in report.skipped["../../../escaped"]
    for content in ("[]", '{"indexs": 3}', '{"indexs": [3]}', "{"):
        stats.write_text(content)
        with pytest.raises(InputError, match="stats.json"):
            prepare_pascal(voc, ("horse",), out, steps=("crop",), workers=1, progress=False)
    # a damaged one is replaced
    reports = prepare_pascal(voc, ("horse",), out, steps=("copy", "crop"), workers=1, progress=False)
    assert reports[0].kept and json.loads(stats.read_text())["indexs"]


def test_a_report_shows_no_escapes():
    text = str(Report("parse", skipped={"a\x1b[2J\nlagm: done": "why\r\x1b[0m"}))
    assert "\x1b" not in text and text.count("\n") == 1


def test_run_lengths():
    assert unpack_counts("02203ON0") == [0, 2, 2, 2, 5, 1, 3, 1]  # 0, 2, 2, 0 + 2, 3 + 2, -1 + 2, -2 + 5, 0 + 1
    for seed in range(5):
        mask = (np.random.RandomState(seed).rand(37, 61) > (0.5, 0.02, 0.98, 1, -1)[seed]).astype(np.uint8)
        runs = json.loads(json.dumps(encode_mask(mask)))
        assert np.array_equal(decode_mask(runs), mask)
        assert np.array_equal(mask_of.decode({"size": runs["size"], "counts": runs["counts"].encode()}), mask)


@pytest.mark.parametrize("change,words", [
    ({"counts": ""}, "do not add up"), ({"counts": "5"}, "do not add up"), ({"counts": "0" * 9}, "do not add up"),
    ({"counts": "f\x7f"}, "damaged"), ({"counts": "o" * 99}, "damaged"),
    ({"counts": "N" + "0"}, "do not add up"), ({"counts": 7}, "no size"), ({"size": [5, 7.0]}, "no size"),
    ({"size": [-5, -7]}, "no size"), ({"size": [10**9, 10**9]}, "no size"),
    ({"size": [7, 5]}, "the picture is 7 x 5, its masks are 5 x 7"), ({"size": None}, "no size")])
def test_damaged_masks(change, words):
    runs = encode_mask(np.eye(5, 7, dtype=np.uint8)) | change
    with pytest.raises(Unusable, match=words): decode_mask(runs, (5, 7))


@pytest.mark.parametrize("content", ["[]", "{}", '{"objects": 3}', '{"objects": [{}]}',
                                     '{"objects": [{"class": "horse", "parts": [{"part_name": "head", "mask": 5}]}]}',
                                     "{"])
def test_damaged_parsed_annotations_cost_one_picture(voc, tmp_path, content):
    out = tmp_path / "out"
    prepare_pascal(voc, ("horse",), out, steps=("parse",), workers=1, progress=False)
    name = listed(voc, "horse", "train")[0]
    (out / "parsed" / f"{name}.json").write_text(content)
    with pytest.raises((Unusable, InputError), match=f"{name}.json"):
        copy_one(name, "horse", voc, out / "parsed", tmp_path / "o")


@pytest.mark.parametrize("content", [
    "<annotation><object><name>horse</name>"
    "<bndbox><xmin>inf</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>",
    "<annotation><object><name>horse</name>"
    "<bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>",
    "<annotation><object><name>horse</name><bndbox><xmin>1e999</xmin></bndbox></object></annotation>",
    '<?xml version="1.0" encoding="utf-33"?><a/>', '<?xml version="1.0" encoding="utf-7"?><a/>',
    "<annotation><object><name>horse</name></object></annotation>", "\x00", "",
    '<!DOCTYPE a [<!ENTITY a "' + "x" * 1000 + '">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcdefg", "bcdefgh"))
    + "]><annotation>&h;</annotation>"])
def test_damaged_boxes(tmp_path, content):
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(Unusable, match="a.xml"): read_boxes(tmp_path / "a.xml", "horse")
