"""Masks that go out to a labelling program come back as they were; CVAT's XML, VOC's and napari's files are read."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.data.cvat_images import import_cvat_images
from lagm.data.folder import Folder
from lagm.data.importers import IMPORTS, import_export, recognise_export
from lagm.data.label_maps import make_labels
from lagm.data.labels import LabelSet
from lagm.data.mask_files import import_masks, import_voc
from lagm.data.outlines import outlines
from lagm.data.regions import paint, polygon_runs
from lagm.data.writers import WRITERS, open_writer
from lagm.experiments.commands import _FORMATS, EXPORTS

pytestmark = pytest.mark.filterwarnings("ignore:no labelled picture")
LABELS = make_labels("made", ["background", "skin", "Haar", "eye: left"])
QUIET = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
MASKS = st.integers(0, 2**32 - 1).flatmap(lambda seed: st.tuples(
    st.just(seed), st.integers(1, 23), st.integers(1, 23), st.sampled_from([0.02, 0.3, 0.6, 0.98])))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("lagm.core.files._flush_to_disk", lambda path: None)


def made(seed, height, width, density):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 4, (height, width)) * (rng.random((height, width)) < density)).astype(np.uint8)


def drawn(polygons, height, width):
    columns = np.zeros((width, height), np.uint8)
    for polygon in polygons: paint(columns, polygon_runs([polygon.reshape(-1).tolist()], width, height), 1)
    return columns.T > 0


def back(form, out, root):
    source = out / "annotations.json" if form == "coco" else out
    return import_export(form, source, root, out / "images" if form == "coco" else None)


@QUIET
@given(MASKS)
def test_outlines_enclose_exactly_their_pixels(case):
    inside = made(*case) > 1
    assert (drawn(outlines(inside), *inside.shape) == inside).all()


def test_fewer_corners_lose_little_and_no_part():
    y, x = np.mgrid[:60, :80]
    disc = (np.hypot(y - 30, x - 40) < 25) & (np.hypot(y - 30, x - 40) > 8)
    thin = (y == 58) & (x > 4) & (x < 70)
    fewer = outlines(disc | thin, 1)
    assert sum(map(len, fewer)) < sum(map(len, outlines(disc | thin))) / 3
    again = drawn(fewer, 60, 80)
    assert (again & (disc | thin)).sum() / (again | disc | thin).sum() > 0.93 and (again[58, 5:70]).all()
    assert not again[30, 40]  # the hole is there


@pytest.mark.parametrize("form", WRITERS)
@QUIET
@given(st.lists(MASKS, min_size=2, max_size=3))
@example([(0, 5, 7, 0.0), (1, 9, 4, 1.0)])  # nothing but background; no background at all
def test_round_trips(form, tmp_path_factory, cases):
    here = tmp_path_factory.mktemp("round")
    masks = {f"{'below/' * (i % 2)}a{i}.png": made(*case) for i, case in enumerate(cases)}
    with open_writer(form, here / "out", LABELS) as writer:
        for name, mask in masks.items():
            (here / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (*mask.shape, 3), np.uint8))
            picture.save(here / "in" / name)
            writer.add(name, here / "in" / name, picture, mask)
    done = back(form, here / "out", here / "back")
    silent = {name for name, mask in masks.items() if form == "coco" and not mask.any()}  # COCO has no word for it
    assert len(done.names) == len(masks) - len(silent)
    if not done.names: return
    assert not done.skipped and len(done.unlabelled) == len(silent)
    data = Folder(here / "back")
    assert data.labels.classes == LABELS.classes
    by_name = {name: data[i][1].numpy() for i, name in enumerate(data.names)}
    for name, mask in masks.items():
        if name not in silent: assert (by_name[name.rpartition("/")[2].removesuffix(".png")] == mask).all()


def test_a_turned_picture_and_strange_names(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "ä & <b>.jpg", exif=exif)
    mask = made(5, 8, 6, 0.5)
    for form in WRITERS:
        upright = Image.new("RGB", (6, 8))
        with open_writer(form, tmp_path / form, LABELS) as writer:
            writer.add("ä & <b>.jpg", tmp_path / "ä & <b>.jpg", upright, mask)
            with pytest.raises(InputError, match="rename"): writer.add("a\x01.jpg", tmp_path / "a", upright, mask)
        back(form, tmp_path / form, tmp_path / f"{form} back")
        assert (Folder(tmp_path / f"{form} back")[0][1].numpy() == mask).all(), form


def test_another_first_class_and_its_colour(tmp_path):
    labels = LabelSet("x", ("sky", "roof"), ((9, 9, 9), (0, 0, 0)))
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    mask = made(1, 4, 5, 0.5) > 0
    for form in WRITERS:
        with open_writer(form, tmp_path / form, labels) as writer:
            writer.add("a.png", tmp_path / "a.png", Image.new("RGB", (5, 4)), mask.astype(np.uint8))
        back(form, tmp_path / form, tmp_path / f"{form} back")
        data = Folder(tmp_path / f"{form} back")
        assert data.labels.classes[1] == "roof" and (data[0][1].numpy() == mask).all(), form


def test_labelme_keeps_a_class_that_was_added_there(tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    with open_writer("labelme", tmp_path / "out", LABELS) as writer:
        writer.add("a.png", tmp_path / "a.png", Image.new("RGB", (9, 8)), made(0, 8, 9, 0.5))
    file = tmp_path / "out" / "a.json"
    content = json.loads(file.read_text())
    content["shapes"].append({"label": "Bart", "shape_type": "rectangle", "points": [[0, 0], [2, 2]]})
    file.write_text(json.dumps(content))
    back("labelme", tmp_path / "out", tmp_path / "back")
    assert Folder(tmp_path / "back").labels.classes == (*LABELS.classes, "Bart")


# ---- CVAT for images


def xml(*images, labels=("skin", "hair"), meta=None):
    listed = "".join(f"<label><name>{name}</name><color>#{i + 1:02x}0000</color></label>"
                     for i, name in enumerate(labels))
    return (f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>'
            f'<meta>{meta or f"<task><labels>{listed}</labels></task>"}</meta>{"".join(images)}</annotations>')


def image(name, *shapes, size=(20, 16)): return (f'<image id="0" name="{name}" width="{size[0]}" height="{size[1]}">'
                                                 f'{"".join(shapes)}</image>')


POLYGON = '<polygon label="{}" points="2,2;8,2;8,9;2,9" z_order="{}"/>'
MASK = '<mask label="{}" rle="{}" left="{}" top="4" width="3" height="2" z_order="{}"/>'


@pytest.fixture
def export(tmp_path):
    def make(*texts, names=("a.png",)):
        folder = tmp_path / f"export{len(list(tmp_path.iterdir()))}"
        (folder / "images").mkdir(parents=True)
        for name in names: Image.new("RGB", (20, 16)).save(folder / "images" / name)
        for i, text in enumerate(texts): (folder / f"annotations{i or ''}.xml").write_text(text)
        return folder
    return make


def test_cvat_shapes_order_and_what_is_left_out(export, tmp_path):
    box = '<box label="hair" xtl="1" ytl="1" xbr="9" ybr="9" z_order="5"/>'
    folder = export(xml(image("a.png", MASK.format("hair", "0, 1, 4, 1", 3, 1), POLYGON.format("skin", 0), box,
                              MASK.format("ignore", "5, 1", 10, 0)), image("b.png", box), labels=("hair", "skin")),
                    names=("a.png", "b.png"))
    done = import_cvat_images(folder, tmp_path / "made")
    assert any("a.png" in note and "1 box" in note for note in done.notes)
    assert done.names == ["a"] and done.unlabelled == ["b"]
    data = Folder(tmp_path / "made")
    expected = np.zeros((16, 20), int)
    expected[2:9, 2:8], expected[5, 12] = 2, 255
    expected[4, 3] = expected[5, 5] = 1
    assert data.labels.classes == ("background", "hair", "skin") and data.labels.palette[2] == (2, 0, 0)
    assert (data[0][1].numpy() == expected).all()


def test_cvat_as_a_zip_and_several_jobs(export, tmp_path):
    folder = export(xml(image("a.png", POLYGON.format("skin", 0))),
                    xml(image("b.png", POLYGON.format("nose", 0)), image("c.png", POLYGON.format("skin", 0)),
                        labels=("hair", "nose")), xml(image("c.png", POLYGON.format("skin", 0))),
                    names=("a.png", "b.png", "c.png"))
    packed = shutil.make_archive(str(tmp_path / "jobs"), "zip", folder)
    for i, source in enumerate((folder, packed)):
        done = import_export("cvat", source, tmp_path / f"made{i}")
        assert sorted(done.names) == ["a", "b"]
        assert set(done.skipped) == {"annotations1.xml: c.png", "annotations2.xml: c.png"}
        assert "annotations of one picture" in str(done.skipped)
        assert Folder(tmp_path / f"made{i}").labels.classes == ("background", "skin", "hair", "nose")
        assert recognise_export(source) == "cvat"


@pytest.mark.parametrize("text, said", [
    ("<annotations>", "no XML"), ("<a/>", "not CVAT's"), ("", "no XML"),
    ('<!DOCTYPE a [<!ENTITY x "y">]><annotations>&x;</annotations>', "document type"),
    ('<annotations><meta/><track id="0" label="a"/></annotations>', "for video"),
    (xml(image("a.png", '<mask label="" rle="1"/>')), "name of the label"),
    (xml(labels=()), "no label but the background")])
def test_cvat_files_that_cannot_be_read(export, tmp_path, text, said):
    with pytest.raises(InputError, match=said): import_cvat_images(export(text), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("shape", [
    MASK.format("skin", "1, 2", 0, 0), MASK.format("skin", "7", 0, 0), MASK.format("skin", "", 0, 0),
    MASK.format("skin", "0, 6", 18, 0), MASK.format("skin", "0, 6", -1, 0), MASK.format("skin", "-3, 9", 0, 0),
    MASK.format("skin", "0, 99999999999999999999", 0, 0), POLYGON.replace("8,9", "nan,9").format("skin", 0),
    POLYGON.replace("8,9", "8;9").format("skin", 0), POLYGON.replace("8,9", "1e300,9").format("skin", 0),
    '<ellipse label="skin" cx="5" cy="5" rx="inf" ry="2"/>', '<ellipse label="skin" cx="5" cy="5" rx="2"/>',
    '<mask label="skin" rle="0, 6" left="0" top="0" width="999999999" height="999999999"/>'])
def test_cvat_shapes_that_cannot_be_drawn(export, tmp_path, shape):
    folder = export(xml(image("a.png", shape), image("b.png", POLYGON.format("hair", 0))), names=("a.png", "b.png"))
    done = import_cvat_images(folder, tmp_path / "made")
    assert done.names == ["b"] and "shape 1 (skin)" in done.skipped["a.png"]


def test_a_zip_that_leads_out_of_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("annotations.xml", xml(image("a.png", POLYGON.format("skin", 0))))
        archive.writestr("images/../../evil.png", b"x")
    done = import_cvat_images(tmp_path / "a.zip", tmp_path / "made", tmp_path)
    assert not (tmp_path.parent / "evil.png").exists() and any("evil" in name for name in done.skipped)


# ---- masks as files


def test_masks_beside_pictures(tmp_path):
    for name in ("a.jpg", "sub/a.jpg", "b.png", "c.jpg", "free.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (200, 3, 3)).save(tmp_path / "in" / name)
    masks = {"a.png": made(0, 8, 9, 0.5), "sub/a_mask.png": made(1, 8, 9, 0.5), "b-labels.tif": made(2, 8, 9, 0.5)}
    for name, mask in masks.items(): Image.fromarray(mask).save(tmp_path / "in" / name)
    with pytest.raises(InputError, match="--classes"): import_masks(tmp_path / "in", tmp_path / "out")
    done = import_export("auto", tmp_path / "in", tmp_path / "out", classes=LABELS.classes[1:])
    assert not done.skipped and sorted(done.unlabelled) == ["c", "free"] and len(done.names) == 3
    data = Folder(tmp_path / "out")
    found = {name: data[i][1].numpy() for i, name in enumerate(data.names)}
    assert (found["b"] == masks["b-labels.tif"]).all() and (found["a"] == masks["a.png"]).all()
    assert (found["sub_a"] == masks["sub/a_mask.png"]).all()


def test_voc_by_number_and_by_colour(tmp_path):
    mask = made(3, 8, 9, 0.5)
    with open_writer("voc", tmp_path / "voc", LABELS) as writer:
        Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
        writer.add("a.png", tmp_path / "a.png", Image.new("RGB", (9, 8)), mask)
    (tmp_path / "voc" / "labelmap.txt").unlink()
    with pytest.raises(InputError, match="--classes"): import_voc(tmp_path / "voc", tmp_path / "never")
    (tmp_path / "voc" / "class_names.txt").write_text("__ignore__\n_background_\nx\ny\nz\n")
    import_voc(tmp_path / "voc", tmp_path / "made")
    data = Folder(tmp_path / "made")
    assert data.labels.classes == ("background", "x", "y", "z") and (data[0][1].numpy() == mask).all()


# ---- the command line


def test_formats_have_one_list_each():
    assert {name: what for name, what in EXPORTS.items() if name != "auto"} == IMPORTS
    assert _FORMATS == ("masks", *WRITERS) and set(_FORMATS) <= set(IMPORTS)


def test_predict_and_back(tmp_path, capsys):
    from tiny import tiny_segmenter

    from lagm.models.saved import save_segmenter

    segmenter = tiny_segmenter()
    labels = make_labels("tiny", ["background", *(f"part {i}" for i in range(1, segmenter.n_classes))])
    save_segmenter(tmp_path / "s.safetensors", segmenter, labels, (16, 16), "fit")
    for i, size in enumerate([(16, 16), (20, 31), (40, 12)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"p{i}.png")
    words = ["predict", str(tmp_path / "s.safetensors"), str(tmp_path / "in"), "--device", "cpu", "-o"]
    assert main([*words, str(tmp_path / "masks")]) == 0
    expected = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "masks" / "masks").iterdir()}
    assert len(expected) == 3 and any(mask.any() for mask in expected.values())
    for form in WRITERS:
        capsys.readouterr()
        assert main([*words, str(tmp_path / form), "--format", form]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        command = line.partition("take them back: lagm ")[2].replace("NEW-FOLDER", f"{tmp_path}/{form}-2")
        assert main(command.split()) == 0
        data = Folder(tmp_path / f"{form}-2")
        for i, name in enumerate(data.names): assert (data[i][1].numpy() == expected[name]).all(), form
    assert main([*words, str(tmp_path / "x"), "--format", "voc", "--tolerance", "1"]) == 2
    assert "a tolerance is for labelme and yolo" in capsys.readouterr().err
    assert main(["prepare", "auto", str(tmp_path / "in"), "--out", str(tmp_path / "y")]) == 2
    said = capsys.readouterr().err
    assert "is in no format that is known" in said and all(name in said for name in IMPORTS)
    assert not os.path.exists(tmp_path / "y")
