"""Annotations land on the picture they name; what cannot be understood is left out with its reason, alone."""

import copy
import io
import json
import random
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folders import brush
from test_regions import data_url

from lagm import cli
from lagm.core.errors import InputError
from lagm.data.coco import import_coco
from lagm.data.cvat import import_cvat
from lagm.data.folder import Folder
from lagm.data.import_folder import _new_names
from lagm.data.import_names import Finder, Pictures
from lagm.data.label_studio import import_label_studio

W, H = 20, 16
SQUARE = [[2, 2, 10, 2, 10, 8, 2, 8]]
TRUTH = np.zeros((H, W), np.uint8)
TRUTH[2:8, 2:10] = 1
SIZE = {"original_width": W, "original_height": H}


def pictures(folder, *names, size=(W, H)):
    """Each picture is of its own grey: 10, 20, 30, ..."""
    for i, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * i,) * 3).save(folder / name)
    return folder


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def greys(root, sub="masks"):
    """The greys of the pictures that have masks, by name."""
    stems = {path.stem for path in (root / sub).iterdir()}
    return {
        path.name: Image.open(path).getpixel((0, 0))[0]
        for path in sorted((root / "images").iterdir())
        if path.stem in stems
    }


def coco(names, *annotations, **record):
    annotations = annotations or [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE} for i in range(1, len(names) + 1)
    ]
    return {
        "images": [{"id": i, "width": W, "height": H, "file_name": name, **record} for i, name in enumerate(names, 1)],
        "categories": [{"id": 1, "name": "leg"}],
        "annotations": annotations,
    }


def coco_of(tmp_path, names, *annotations, images="img", **record):
    return import_coco(
        write(tmp_path / "x.json", coco(names, *annotations, **record)), tmp_path / images, tmp_path / "out"
    )


# ---- names


@pytest.mark.parametrize(
    "there, names, right",
    [
        (["x/a.png"], ["x/a.png"], {"a.png": 10}),
        (["x/a.png", "y/a.png"], ["x/a.png", "y/a.png"], {"x_a.png": 10, "y_a.png": 20}),
        (["a.png", "x/a.png"], ["x/a.png"], {"a.png": 20}),
        (["a.png"], ["x/a.png"], {}),  # never another picture of the name
        (["a.png", "b.png"], ["x/a.png", "y/b.png"], {}),
        (["x/a.png"], ["a.png"], {}),
        (["x/a.png"], ["x\\a.png"], {"a.png": 10}),
        (["x/a.png"], ["./x//a.png"], {"a.png": 10}),
        (["a.PNG", "b.jpg"], ["a.png", "b.JPG"], {"a.PNG": 10, "b.jpg": 20}),
        (["a b.png", "100%.png"], ["a%20b.png", "100%.png"], {"a b.png": 10, "100%.png": 20}),
        (["x/a.png"], ["/elsewhere/data/x/a.png"], {"a.png": 10}),
        (["x/a.png", "y/a.png"], ["/elsewhere/y/a.png"], {"y_a.png": 20}),
        (["x/a.png", "y/a.png"], ["/elsewhere/a.png"], {}),
        (["a.png"], ["/one/x/a.png", "/one/y/a.png"], {}),  # only one of them can be it
        (["a.png"], ["C:\\data\\a.png"], {"a.png": 10}),
        (["a.png"], ["https://example.org/data/a.png?x=1"], {"a.png": 10}),
        (
            ["a.png", "b.png"],
            ["data/a.png", "data/b.png"],
            {"a.png": 10, "b.png": 20},
        ),  # the file was made one folder higher
        (["x/a.png", "y/a.png"], ["data/x/a.png", "data/y/a.png"], {"x_a.png": 10, "y_a.png": 20}),
        (["a.png"], ["../img/a.png", "x/../a.png", "/etc/passwd", ""], {}),
        (["a.png"], ["img/a.png"], {"a.png": 10}),  # below the folder above
    ],
)
def test_names_of_coco(tmp_path, there, names, right):
    pictures(tmp_path / "img", *there)
    done = coco_of(tmp_path, names)
    assert (greys(tmp_path / "out") if right else {}) == right
    assert len(done.names) == len(right) and len(done.skipped) == len(names) - len(right)


def test_names_that_look_the_same(tmp_path):
    composed, apart = unicodedata.normalize("NFC", "Mä"), unicodedata.normalize("NFD", "Mä")
    pictures(tmp_path / "img", f"{apart}.png")
    assert len(coco_of(tmp_path, [f"{composed}.png"]).names) == 1
    pictures(tmp_path / "both", f"{apart}.png", f"{composed}.png")
    tree = Pictures(tmp_path / "both")
    if len(tree.paths) == 2:  # some file systems take the two for one
        assert tree.at(f"{apart}.png") != tree.at(f"{composed}.png")
        with pytest.raises(InputError, match="cannot be told"):
            tree.ending(f"/elsewhere/{composed}.png")


def test_linked_folders_and_loops(tmp_path):
    pictures(tmp_path / "disk", "b.png")
    pictures(tmp_path / "img", "a.png")
    (tmp_path / "img" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "img")
    assert sorted(Pictures(tmp_path / "img").paths.values()) == ["a.png", "link/b.png"]


def test_byte_order_marks(tmp_path):
    pictures(tmp_path / "img", "a.png")
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(coco(["a.png"])).encode())
    assert import_coco(tmp_path / "x.json", tmp_path / "img", tmp_path / "out").names == ["a"]


def test_looking_takes_one_step_a_name(tmp_path):
    """Four times the names take four times the calls, whether they are there or not."""

    def calls(n):
        root = tmp_path / str(n)
        root.mkdir()
        for i in range(n):
            (root / f"{i}.png").touch()
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            tree = Pictures(root)
            find = Finder(tree, [f"{i}.png" for i in range(n)])
            for i in range(n):
                find(f"{i}.png"), tree.ending(f"/elsewhere/{i}.png"), tree.ending(f"/elsewhere/{i}.jpg")
        finally:
            sys.setprofile(None)
        return count

    assert calls(800) < 6 * calls(200)


# ---- what comes along


def test_pictures_without_labels_come_along(tmp_path):
    pictures(tmp_path / "img", "a.png", "b.png", "c.png", "d.png")
    done = coco_of(
        tmp_path,
        ["a.png", "b.png", "c.png"],
        {"image_id": 1, "category_id": 1, "segmentation": SQUARE},
        {"image_id": 3, "category_id": 1, "bbox": [1, 1, 4, 4]},
    )
    assert (done.names, done.unlabelled, list(done.skipped)) == (
        ["a"],
        ["b", "d"],
        ["c.png"],
    ) and "only bbox" in done.skipped["c.png"]
    assert str(done).splitlines()[-1] == "1 labelled, 2 without labels, 1 left out"
    assert Folder(tmp_path / "out").names == ["a"] and Folder(tmp_path / "out", "unlabelled").names == ["b", "d"]
    done = import_coco(tmp_path / "x.json", tmp_path / "img", tmp_path / "few", only_labelled=True)
    assert (done.names, done.unlabelled) == (["a"], []) and "2 pictures without labels" in str(done)
    left = Folder(tmp_path / "few", "unlabelled")
    assert len(left) == 0 and list(left) == []  # nothing left to label is no error


def test_a_picture_that_may_be_a_copy_does_not_come_along(tmp_path):
    pictures(tmp_path / "img", "x/a.png", "a.png", "small/x/a.jpg", "y/a.png")
    done = coco_of(tmp_path, ["x/a.png"])
    assert (
        greys(tmp_path / "out") == {"x_a.png": 10}
        and done.unlabelled == ["y_a"]
        and "a.png, small/x/a.jpg" in str(done)
    )


def test_two_annotations_of_one_picture(tmp_path):
    pictures(tmp_path / "img", "a.png", "b.png", "c.png")
    content = coco(["a.png", "a.png", "b.png", "c.png", "c.png"])
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 5]
    done = import_coco(write(tmp_path / "x.json", content), tmp_path / "img", tmp_path / "out")
    assert done.names == ["b", "c"] and done.unlabelled == [] and set(done.skipped) == {"a.png", "a.png (2)", "c.png"}


def test_names_of_one_stem_in_one_folder(tmp_path):
    pictures(tmp_path / "img", "a.png", "a.jpg", "A.bmp")
    done = coco_of(tmp_path, ["a.png"])
    assert done.names == ["a_png"] and done.unlabelled == ["A_bmp"] and "a.jpg" in str(done)
    pictures(tmp_path / "more", "d/a.png", "e/a.png", "d_a.png", "d/A.PNG" if sys.platform == "linux" else "d/b.png")
    assert len({name.casefold() for name in _new_names(Pictures(tmp_path / "more").paths).values()}) == 4


def test_a_picture_turned_by_its_header(tmp_path):
    header = Image.Exif()
    header[0x0112] = 6
    (tmp_path / "img").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (H, W)).save(tmp_path / "img" / name, exif=header)  # shown W x H
    Image.new("RGB", (H, W)).save(tmp_path / "img" / "c.jpg")
    stored = {"width": H, "height": W}
    content = coco(["a.jpg", "b.jpg", "c.jpg"])
    content["images"][1] |= stored
    content["annotations"][1]["segmentation"] = [
        [2, 10, 8, 10, 8, 18, 2, 18]
    ]  # what is at (2..10, 2..8) when it is turned
    done = import_coco(write(tmp_path / "x.json", content), tmp_path / "img", tmp_path / "out")
    data = Folder(tmp_path / "out")
    assert (
        done.names == ["a", "b"]
        and "turned" in done.skipped["c.jpg"]
        and all(np.array_equal(mask, TRUTH) for _, mask in data)
    )


# ---- COCO: what is not understood


BAD = {
    "a coordinate is nan": {"segmentation": [[float("nan"), 1, 2, 3, 4, 5]]},
    "must lie between": {"segmentation": [[0, 0, 1e9, 4, 0, 4]]},
    "add up to 100": {"segmentation": {"size": [H, W], "counts": [0, 100]}},
    "is -5": {"segmentation": {"size": [H, W], "counts": [-5, 325]}},
    "is 10000": {"segmentation": {"size": [H, W], "counts": [0, 10000]}},
    "add up to 20": {"segmentation": {"size": [H, W], "counts": "05?"}},
    "no segmentation, only keypoints": {"segmentation": [], "keypoints": [1, 1, 2]},
    "category 2, which is not": {"category_id": 2, "segmentation": SQUARE},
    "has no id": {"category_id": None, "segmentation": SQUARE},
    "iscrowd": {"segmentation": SQUARE, "iscrowd": "0"},
    "16 x 21|21 x 16|for 16": {"segmentation": {"size": [H, W + 1], "counts": [336]}},
    "has 4 numbers": {"segmentation": [[1, 1, 9, 1]]},
    "not a list of numbers": {"segmentation": SQUARE[0]},
    "not an object": {"segmentation": "abc"},
}


@pytest.mark.parametrize("why", BAD)
def test_one_bad_annotation_costs_one_picture(tmp_path, why):
    pictures(tmp_path / "img", "a.png", "b.png")
    annotations = [
        {"id": 7, "image_id": 1, "category_id": 1, "segmentation": SQUARE},
        {"id": 8, "image_id": 1, "category_id": 1, **BAD[why]},
        {"id": 9, "image_id": 2, "category_id": 1, "segmentation": SQUARE},
    ]
    done = coco_of(tmp_path, ["a.png", "b.png"], *annotations)
    assert (
        done.names == ["b"]
        and done.unlabelled == []
        and set(done.skipped) == {"a.png"}
        and "annotation 8" in done.skipped["a.png"]
    )
    assert "Error" not in done.skipped["a.png"] and np.array_equal(Folder(tmp_path / "out")[0][1], TRUTH)
    if why.isascii() and "|" not in why and why != "a coordinate is nan":
        assert why in done.skipped["a.png"]


@pytest.mark.parametrize(
    "record",
    [
        {"width": 100000, "height": 100000},
        {"width": H, "height": W},
        {"width": None},
        {"width": float("nan")},
        {"width": "20"},
        {"width": -W},
        {"id": None},
        {"id": [1]},
        {"id": 2},
        {"file_name": 5},
        {"file_name": None},
    ],
)
def test_one_bad_picture_costs_itself(tmp_path, record):
    pictures(tmp_path / "img", "a.png", "b.png", "c.png")
    content = coco(
        ["a.png", "c.png", "b.png"], *({"image_id": i, "category_id": 1, "segmentation": SQUARE} for i in (1, 2, 3))
    )
    content["images"][0] |= record
    done = import_coco(write(tmp_path / "x.json", content), tmp_path / "img", tmp_path / "out")
    assert done.names == (["b"] if record.get("id") == 2 else ["c", "b"]) and len(done.skipped) == 3 - len(done.names)
    assert greys(tmp_path / "out") == ({"b.png": 20} if record.get("id") == 2 else {"b.png": 20, "c.png": 30})


def test_records_that_are_none(tmp_path):
    pictures(tmp_path / "img", "a.png")
    content = coco(["a.png"])
    content["images"] += [None, 5, "a.png", []]
    content["categories"] += [
        None,
        {"name": "x"},
        {"id": 4},
        {"id": 5, "name": "two\nlines"},
        {"id": 6, "name": "\x1b[31m"},
        {"id": 7, "name": "arm"},
        {"id": 7, "name": "wing"},
    ]
    content["annotations"] += [None, 3, {"image_id": None}, {"image_id": 99, "category_id": 1, "segmentation": SQUARE}]
    done = import_coco(write(tmp_path / "x.json", content), tmp_path / "img", tmp_path / "out")
    assert (
        done.names == ["a"]
        and len(done.skipped) == 4
        and Folder(tmp_path / "out").classes == ("background", "leg", "two lines")
    )
    assert (
        "4 annotations belong to no picture" in str(done)
        and "category 7 is listed with two names" in str(done)
        and "\x1b" not in str(done)
    )


def test_a_file_without_categories(tmp_path):
    pictures(tmp_path / "img", "a.png")
    for categories in ([], [{"name": "a"}]):
        with pytest.raises(InputError, match="no category"):
            import_coco(
                write(tmp_path / "x.json", {**coco(["a.png"]), "categories": categories}),
                tmp_path / "img",
                tmp_path / "out",
            )
    with pytest.raises(InputError, match="room for 254"):
        import_coco(
            write(
                tmp_path / "x.json", {**coco(["a.png"]), "categories": [{"id": i, "name": f"c{i}"} for i in range(255)]}
            ),
            tmp_path / "img",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_numbers_as_text_name_the_same_picture(tmp_path):
    pictures(tmp_path / "img", "a.png")
    assert coco_of(tmp_path, ["a.png"], {"image_id": "1", "category_id": 1.0, "segmentation": SQUARE}).names == ["a"]


def panoptic(tmp_path, segments, values=(0, 70000, 300), **more):
    pictures(tmp_path / "img", "a.png", "b.png")
    numbers = np.array(values)[np.where(np.arange(W) > 15, 2, TRUTH)]
    pictures(tmp_path / "png", "b.png")
    Image.fromarray(np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)).save(
        tmp_path / "png" / "a.png"
    )
    content = coco(["a.png", "b.png"], {"image_id": 1, "file_name": "a.png", "segments_info": segments, **more})
    content["categories"].append({"id": 2, "name": "arm"})
    return import_coco(write(tmp_path / "x.json", content), tmp_path / "img", tmp_path / "out", tmp_path / "png")


def test_panoptic_segments(tmp_path):
    done = panoptic(
        tmp_path, [{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 2, "iscrowd": 1}], (0, 70000, 300)
    )
    assert done.names == ["a"] and np.array_equal(Folder(tmp_path / "out")[0][1], np.where(TRUTH == 1, 1, 255))
    with pytest.raises(InputError, match="no panoptic annotations"):
        import_coco(write(tmp_path / "y.json", coco(["a.png"])), tmp_path / "img", tmp_path / "o", tmp_path / "png")


@pytest.mark.parametrize(
    "segments, why",
    [
        ([{"id": 70000, "category_id": 1}], "does not explain"),
        ([{"id": 70000, "category_id": 1}] * 2, "twice"),
        (
            [{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 1}, {"id": 7, "category_id": 1}],
            "lacks the segment 7",
        ),
        ([{"id": 70000, "category_id": 9}, {"id": 300, "category_id": 1}], "category 9"),
        ([{"id": -1, "category_id": 1}], "id of one of its segments"),
        ([7], "one of its segments is 7"),
        ({}, "segments_info"),
    ],
)
def test_panoptic_segments_that_are_not_understood(tmp_path, segments, why):
    done = panoptic(tmp_path, segments, (70000, 70000, 300) if why == "does not explain" else (0, 70000, 300))
    assert done.names == [] and why in done.skipped["a.png"]


# ---- CVAT


def cvat(*masks, pictures=(), colour=(255, 0, 0), labels="background:0,0,0::\nleg:255,0,0::\n"):
    """Members of an export."""

    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    members = {"labelmap.txt": f"# label:color_rgb:parts:actions\n{labels}".encode()}
    members |= {f"SegmentationClass/{name}.png": png(np.array([(0, 0, 0), colour], np.uint8)[TRUTH]) for name in masks}
    return members | {
        f"JPEGImages/{name}.png": png(np.full((H, W, 3), 10 * i, np.uint8)) for i, name in enumerate(pictures, 1)
    }


def unpacked(root, members):
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder"])
def test_cvat_with_folders(tmp_path, form):
    members = cvat("x/a", "y/a", "b", pictures=("x/a", "y/a", "z/a", "a", "b", "c"))
    if form == "zip of a folder":
        members = {f"task 3/{name}": content for name, content in members.items()}
    export = unpacked(tmp_path / "export", members) if form == "folder" else zipped(tmp_path / "export.zip", members)
    done = import_cvat(export, tmp_path / "out")
    assert sorted(done.names) == ["b", "x_a", "y_a"] and done.skipped == {}
    assert (greys(tmp_path / "out") == {"b.png": 50, "x_a.png": 10, "y_a.png": 20}
            and sorted(done.unlabelled) == ["a", "c", "z_a"])
    assert all(np.array_equal(mask, TRUTH) for _, mask in Folder(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([export.name, "out"])


def test_cvat_with_pictures_elsewhere(tmp_path):
    export = zipped(tmp_path / "e.zip", cvat("x/a", "y/b"))
    with pytest.raises(InputError, match="save images"):
        import_cvat(export, tmp_path / "out")
    done = import_cvat(export, tmp_path / "out", pictures(tmp_path / "img", "x/a.jpg", "b.jpg", "c.jpg"))
    assert done.names == ["a"] and list(done.skipped) == ["y/b.png"] and done.unlabelled == ["c"]


def test_cvat_colours_that_are_not_listed(tmp_path):
    export = zipped(
        tmp_path / "e.zip",
        cvat("a", pictures=("a", "b"), colour=(1, 2, 3)) | {
            "SegmentationClass/b.png": cvat("b")["SegmentationClass/b.png"]
        },
    )
    done = import_cvat(export, tmp_path / "out")
    assert done.names == ["b"] and "#010203, which belongs to no class" in done.skipped["a.png"]


@pytest.mark.parametrize(
    "labels, why",
    [
        ("leg:255,0,0::\narm:255,0,0::\n", "repeats the colour"),
        ("leg:255,0,0::\nleg:0,0,0::\n", "repeats the class"),
        ("leg:999,0,0::\n", "integers 0..255"),
        ("leg\n", "not a label map"),
        ("", "not a label map"),
        (" \t:1,2,3::\n", "not a label map|needs a name"),
    ],
)
def test_label_maps_that_cannot_be_right(tmp_path, labels, why):
    with pytest.raises(InputError, match=why):
        import_cvat(unpacked(tmp_path / "e", cvat("a", pictures=("a",), labels=labels)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_leads_out(tmp_path):
    members = cvat("a", "../../b", pictures=("a",)) | {
        "../SegmentationClass/c.png": b"x",
        "/JPEGImages/d.png": b"x",
        "JPEGImages/../../../e.png": b"x",
    }
    (tmp_path / "in").mkdir()
    done = import_cvat(zipped(tmp_path / "in" / "e.zip", members), tmp_path / "in" / "out")
    assert done.names == ["a"] and len(done.skipped) == 4
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "a.png",
        "a.png",
        "classes.txt",
        "e.zip",
    ]


def test_a_damaged_member_is_left_out(tmp_path):
    path = zipped(tmp_path / "e.zip", cvat("a", "b", pictures=("a", "b", "c")))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("SegmentationClass/b.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + 12] ^= 255
    path.write_bytes(content)
    done = import_cvat(path, tmp_path / "out")
    assert done.names == ["a"] and done.unlabelled == ["c"] and len(done.skipped) == 1 and "unpacked" in str(done)


def test_archives_that_are_none_or_blow_up(tmp_path):
    (tmp_path / "e.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="neither"):
        import_cvat(tmp_path / "e.zip", tmp_path / "out")
    with pytest.raises(InputError, match="there is no"):
        import_cvat(tmp_path / "f.zip", tmp_path / "out")
    with pytest.raises(InputError, match="SegmentationClass"):
        import_cvat(zipped(tmp_path / "g.zip", {"a.txt": b"x"}), tmp_path / "out")
    with pytest.raises(InputError, match="far more than its size"):
        import_cvat(
            zipped(tmp_path / "h.zip", cvat("a") | {"JPEGImages/b.png": bytes(2**26 + 2**24)}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# ---- Label Studio


def region(kind, name=None, key=None, **value):
    return {"type": kind, **SIZE, "value": value | ({kind: [name]} if name else {})} | ({"id": key} if key else {})


LEG = region("polygonlabels", "leg", points=[[10, 12.5], [50, 12.5], [50, 50], [10, 50]])


def studio(tmp_path, tasks, images=("a.png",), **options):
    pictures(tmp_path / "img", *images)
    tasks = [
        {"id": i, "data": {"image": "a.png"}, "annotations": [{"result": [LEG]}], **task}
        for i, task in enumerate(tasks, 1)
    ]
    return import_label_studio(write(tmp_path / "x.json", tasks), tmp_path / "img", tmp_path / "out", **options)


@pytest.mark.parametrize(
    "address, there, right",
    [
        ("/data/upload/1/0a1b2c3d-a.png", ["a.png"], 10),
        ("/data/upload/1/0a1b2c3d-a.png", ["a.png", "0a1b2c3d-a.png"], 20),
        ("/data/upload/1/0a1b2c3d-a.png", ["x/a.png", "y/a.png"], None),
        ("/data/upload/1/0a1b2c3d-a.png", ["x/a.png", "a.png"], 20),
        ("/data/upload/1/dog-a.png", ["a.png"], None),
        ("left-a.png", ["a.png"], None),
        ("0a1b2c3x-a.png", ["a.png"], None),
        ("0a1b2c3d-a-b.png", ["a-b.png", "b.png"], 10),
        ("/data/upload/1/0a1b2c3d-M%C3%A4rz%201.png", ["März 1.png"], 10),
        ("a+b.png", ["a b.png", "a+b.png"], 20),
        ("100%.png", ["100%.png"], 10),
        ("a#1.png", ["a#1.png"], 10),
        ("/data/local-files/?d=x/a.png", ["a.png", "x/a.png"], 20),
        ("/data/local-files/?d=deep/x%2Fa.png", ["y/a.png", "x/a.png"], 20),
        ("/data/local-files/?d=z%5Ca.png", ["z/a.png"], 10),
        ("/data/local-files/?d=z/a.png", ["x/a.png", "y/a.png"], None),
        ("s3://store/x/a.png", ["x/a.png"], 10),
        ("https://example.org/x/a.png?token=1#b", ["x/a.png"], 10),
        ("../a.png", ["a.png"], None),
        ("a.PNG", ["a.png"], 10),
        ("http://[", ["a.png"], None),
        ("x/a.png", ["a.png", "x/a.png"], 20),
    ],
)
def test_addresses(tmp_path, address, there, right):
    done = studio(tmp_path, [{"data": {"image": address}}], there)
    assert (list(greys(tmp_path / "out").values()) if done.names else [None]) == [right] and len(done.skipped) == (
        right is None
    )


def test_tasks_of_several_pictures(tmp_path):
    for data in (
        {"a": "a.png", "b": "b.png"},
        {"pages": ["a.png", "b.png"]},
        {"image": {"url": "a.png"}},
        {},
        None,
        [],
    ):
        done = studio(
            tmp_path / str(len(list(tmp_path.iterdir()))),
            [{"data": data}, {"data": {"image": "c.png", "thumbnail": "gone.png"}}],
            ("a.png", "b.png", "c.png"),
        )
        assert done.names == ["c"] and list(done.skipped) == ["task 1"]


def test_two_uploads_of_one_name(tmp_path):
    done = studio(tmp_path, [{"data": {"image": f"/data/upload/1/{n * 8}-a.png"}} for n in "12"])
    assert done.names == [] and len(done.skipped) == 2 and "could each be a.png" in done.skipped["task 1"]


HEAD = np.zeros((H, W), bool)
HEAD[10:14, 12:18] = True
RECTANGLE = {"x": 60, "y": 62.5, "width": 30, "height": 25}


@pytest.mark.parametrize(
    "regions",
    [
        [
            region(
                "bitmasklabels",
                "head",
                imageDataURL=data_url(Image.fromarray(np.stack([HEAD * np.uint8(255)] * 4, -1))),
            )
        ],
        [region("brushlabels", "head", format="rle", rle=brush(HEAD))],
        [region("brush", key="q", format="rle", rle=brush(HEAD)), region("labels", "head", "q")],
        [region("labels", "head", "q"), region("rectangle", key="q", **RECTANGLE)],
        [region("rectanglelabels", "head", **RECTANGLE, rotation=0)],
        [region("rectanglelabels", "head", x=90, y=62.5, width=20, height=37.5, rotation=90)],
        [region("labels", "head", "q"), region("rectangle", key="q", **RECTANGLE), region("choices", "old", "q")],
    ],
)
def test_every_tool_is_drawn(tmp_path, regions):
    done = studio(
        tmp_path,
        [
            {
                "annotations": [
                    {
                        "result": [
                            LEG,
                            *regions,
                            {"type": "textarea", "value": {"text": ["fine"]}},
                            {"type": "relation", "from_id": "q"},
                        ]
                    }
                ]
            }
        ],
    )
    mask = Folder(tmp_path / "out")[0][1].numpy()
    assert (
        done.names == ["a"]
        and Folder(tmp_path / "out").classes == ("background", "head", "leg")
        and np.array_equal(mask == 1, HEAD)
        and (mask == 2).sum() >= 48
    )


@pytest.mark.parametrize(
    "result, why",
    [
        (region("keypointlabels", "head", x=1, y=1, width=1), "keypointlabels"),
        (region("vectorlabels", "head", vertices=[]), "vectorlabels"),
        (region("labels", "head", "q", start=1, end=3), "labels"),
        (region("video\x1b[2J", "head"), "x1b"),
        (region("brush", key="q", rle=[1]), "no label"),
        (region("polygonlabels", points=[[1, 1], [9, 1], [9, 9]]), "no label"),
        ({**LEG, "value": {**LEG["value"], "polygonlabels": ["leg", "arm"]}}, "2 labels"),
        ({**LEG, "image_rotation": 90}, "turned"),
        ({**LEG, "orientation": 6}, "turned"),
        ({**LEG, "original_width": 100000}, "different sizes"),
        ({**LEG, "original_width": None}, "original_width"),
        ({**LEG, "value": None}, "no value"),
        ({"value": {}}, "no type"),
        (None, "nothing"),
        (7, "7"),
        (region("ellipselabels", "leg", x=float("nan"), y=1, radiusX=1, radiusY=1), "nan"),
        ({**LEG, "item_index": 1}, "several pages"),
        ({**LEG, "value": {**LEG["value"], "polygonlabels": [{}]}}, "an object"),
        (region("brushlabels", "leg", rle=[0] * 30), "brush strokes"),
    ],
)
def test_regions_that_are_not_understood_cost_their_picture(tmp_path, result, why):
    done = studio(
        tmp_path, [{"annotations": [{"result": [LEG, result]}]}, {"data": {"image": "b.png"}}], ("a.png", "b.png")
    )
    assert (
        done.names == ["b"]
        and done.unlabelled == []
        and why in done.skipped["task 1"]
        and "Error" not in str(done)
        and "\x1b" not in str(done)
    )


def test_a_polygon_with_a_label_of_its_own_tool(tmp_path):
    results = [
        region("polygon", key="q", points=[[60, 62.5], [90, 62.5], [90, 87.5], [60, 87.5]]),
        region("labels", "head", "q"),
        LEG,
    ]
    studio(tmp_path, [{"annotations": [{"result": results}]}])
    mask = Folder(tmp_path / "out")[0][1].numpy()
    assert (mask == 1)[HEAD].all() and (mask == 1).sum() <= HEAD.sum() + 12  # an edge may go either way


def test_two_shapes_of_one_id_cannot_share_a_label(tmp_path):
    shapes = [
        region("rectangle", key="q", **RECTANGLE),
        region("brush", key="q", rle=brush(HEAD)),
        region("labels", "head", "q"),
    ]
    assert "which label" in studio(tmp_path, [{"annotations": [{"result": shapes}]}]).skipped["task 1"]


def annotation(label, **more):
    return {"result": [{**LEG, "value": {**LEG["value"], "polygonlabels": [label]}}], **more}


@pytest.mark.parametrize(
    "annotations",
    [
        [annotation("new", updated_at="2026-05-02T10:00:00Z"), annotation("old", updated_at="2026-01-01T10:00:00Z")],
        [
            annotation("new", created_at="2026-01-01T00:00:00.000001Z"),
            annotation("old", created_at="2026-01-01T00:00:00Z"),
        ],
        [
            annotation("new", updated_at="2026-01-01T00:00:00+00:00"),
            annotation("old", updated_at="2026-01-01T01:00:00+02:00"),
        ],
        [
            annotation("old", created_at="2026-01-02T00:00:00Z", updated_at="2026-01-02T00:00:00Z"),
            annotation("new", created_at="2026-01-01T00:00:00Z", updated_at="2026-01-03T00:00:00Z"),
        ],
        [annotation("new", id=9), annotation("old", id=3)],
        [annotation("new", updated_at="2026-01-01"), annotation("old", updated_at="yesterday", id=99)],
        [annotation("old"), annotation("new")],
        [annotation("new"), annotation("old", was_cancelled=True, updated_at="2030-01-01T00:00:00Z")],
    ],
)
def test_the_newest_annotation_counts(tmp_path, annotations):
    more = {
        "predictions": [annotation("old", updated_at="2031-01-01T00:00:00Z")],
        "drafts": [annotation("old", updated_at="2031-01-01T00:00:00Z")],
    }
    studio(tmp_path, [{"annotations": annotations, **more}], classes=["old", "new"])
    assert np.unique(Folder(tmp_path / "out")[0][1]).tolist() == [0, 2]


def test_tasks_without_annotations(tmp_path):
    tasks = [
        {},
        {"data": {"image": "b.png"}, "annotations": []},
        {"data": {"image": "c.png"}, "annotations": None, "predictions": [annotation("leg")]},
        {"data": {"image": "d.png"}, "annotations": [annotation("leg", was_cancelled=True)]},
        {"data": {"image": "e.png"}, "annotations": 7},
        {"data": {"image": "f.png"}, "annotations": [{}]},
    ]
    done = studio(tmp_path, tasks, ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png"))
    assert (done.names, done.unlabelled, list(done.skipped)) == (["a"], ["b", "c", "d", "g"], ["task 5", "task 6"])


def test_tasks_that_are_none(tmp_path):
    tasks = [
        {"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": [LEG]}]},
        None,
        5,
        [],
        {"id": 5},
        {"id": {}, "data": {"image": "gone.png"}},
    ]
    done = import_label_studio(write(tmp_path / "x.json", tasks), pictures(tmp_path / "img", "a.png"), tmp_path / "out")
    assert done.names == ["a"] and len(done.skipped) == 5
    done = import_label_studio(tmp_path / "x.json", tmp_path / "img", tmp_path / "other", classes=["arm"])
    assert done.names == [] and "none of the classes" in done.skipped["task 1"]


# ---- the folder that is made


def test_an_import_that_fails_changes_nothing(tmp_path, monkeypatch):
    pictures(tmp_path / "img", "a.png", "b.png")
    pictures(tmp_path / "out" / "images", "b.jpg")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    write(tmp_path / "x.json", coco(["a.png", "b.png"]))
    with pytest.raises(InputError, match="another file"):
        import_coco(tmp_path / "x.json", tmp_path / "img", tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device", "mask.png")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(sys.modules[_new_names.__module__], "save_mask", full)
        import_coco(tmp_path / "x.json", tmp_path / "img", tmp_path / "new" / "out")
    (tmp_path / "x.json").unlink()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_pictures_that_are_in_their_place_already(tmp_path):
    pictures(tmp_path / "set" / "images", "a.png", "b.png")
    (tmp_path / "set" / "notes.txt").write_text("mine")
    done = import_coco(write(tmp_path / "x.json", coco(["a.png"])), tmp_path / "set" / "images", tmp_path / "set")
    assert (
        done.names == ["a"]
        and Folder(tmp_path / "set", "unlabelled").names == ["b"]
        and (tmp_path / "set" / "notes.txt").read_text() == "mine"
    )
    with pytest.raises(InputError, match="holds a data set already"):
        import_coco(tmp_path / "x.json", tmp_path / "set" / "images", tmp_path / "set")


def test_an_earlier_result_below_the_pictures_is_not_a_picture(tmp_path):
    pictures(tmp_path / "img", "a.png", "b.png")
    done = import_coco(write(tmp_path / "x.json", coco(["a.png"])), tmp_path / "img", tmp_path / "img" / "out")
    assert (done.names, done.unlabelled) == (["a"], ["b"])


# ---- the command line


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "img", "a.png", "b.png")
    write(tmp_path / "c.json", coco(["a.png"]))
    write(tmp_path / "s.json", [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": [LEG]}]}])
    zipped(tmp_path / "task.zip", cvat("a", pictures=("a", "b")))
    for i, words in enumerate(
        (["coco", "c.json", "--images", "img"], ["label-studio", "s.json", "--images", "img"], ["cvat", "task.zip"])
    ):
        assert cli.main(["prepare", *words, "--out", f"out{i}"]) == 0
        *_, counted, next_step = capsys.readouterr().out.splitlines()
        assert counted == "1 labelled, 1 without labels, 0 left out"
        assert next_step.startswith("next: lagm new PROJECT --images ") and "--classes background," in next_step
        assert Folder(f"out{i}").names == ["a"] and Folder(f"out{i}", "unlabelled").names == ["b"]
        assert (
            cli.main(["prepare", *words, "--out", f"few{i}", "--only-labelled"]) == 0
            and len(Folder(f"few{i}", "unlabelled")) == 0
        )
        capsys.readouterr()
    write(tmp_path / "c.json", coco(["a.png"], {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}))
    assert cli.main(["prepare", "coco", "c.json", "--images", "img", "--out", "nothing"]) == 2
    said = capsys.readouterr()
    assert "only bbox" in said.out and "nothing was written" in said.err and not Path("nothing").exists()


# ---- anything at all


ODD = [
    None,
    True,
    0,
    -1,
    2**31,
    10**30,
    1e308,
    -1e9,
    float("nan"),
    float("inf"),
    0.5,
    "",
    "a",
    "..",
    "../a.png",
    "\ud800",
    "\x1b[31m",
    "a\0b",
    "x" * 3000,
    [],
    [[]],
    {},
    {"a": 1},
    [1, 2, 3],
    [None],
    "a.png",
    "http://[",
    "data:image/png;base64,AAAA",
]


def places(value, path=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value[:12]) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


def mutated(value, rng):
    """The value with one to four places changed, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        *way, last = rng.choice(places(value) or [(None,)])
        at = value
        for key in way:
            at = at[key]
        if last is None:
            break
        what = rng.choice("oooonndrs")
        if what == "o":
            at[last] = copy.deepcopy(rng.choice(ODD))
        elif what == "d":
            del at[last]
        elif what == "r" and isinstance(at, dict):
            at[rng.choice(("zz", "id", "type", "value", "file_name"))] = at.pop(last)
        elif what == "r":
            at.insert(last, copy.deepcopy(at[last]))
        elif isinstance(at[last], int | float):
            at[last] = rng.choice((-at[last], at[last] + 1, at[last] * 1000, at[last] / 3, str(at[last])))
        elif isinstance(at[last], str) and at[last]:
            at[last] = at[last][:-1] + chr(rng.randrange(1, 300))
    return value


GOOD_COCO = coco(
    ["a.png", "b.png", "x/a.png"],
    {"id": 1, "image_id": 1, "category_id": 1, "segmentation": SQUARE},
    {"image_id": 2, "category_id": 2, "segmentation": {"size": [H, W], "counts": [40, 90, 5, 185]}, "iscrowd": 0},
)
GOOD_COCO["categories"].append({"id": 2, "name": "background"})
GOOD_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/1/0a1b2c3d-a.png"},
        "annotations": [
            {
                "id": 1,
                "updated_at": "2026-01-01T00:00:00Z",
                "result": [LEG, region("ellipselabels", "head", x=50, y=50, radiusX=9, radiusY=9, rotation=3)],
            }
        ],
    },
    {
        "id": 2,
        "data": {"image": "b.png"},
        "annotations": [
            {
                "result": [
                    region("brush", key="q", rle=brush(HEAD)),
                    region("labels", "head", "q"),
                    region("rectanglelabels", "leg", **RECTANGLE),
                ]
            }
        ],
    },
    {"id": 3, "data": {"image": "/data/local-files/?d=x/a.png"}, "annotations": []},
]


@pytest.mark.parametrize("kind", ["coco", "studio", "cvat"])
def test_anything_at_all_becomes_a_folder_or_a_sentence(tmp_path, monkeypatch, kind):
    """200 spoiled exports each: no exception but `InputError`, and nothing left behind."""
    monkeypatch.setattr("lagm.core.files._flush_to_disk", lambda path: None)
    pictures(tmp_path / "img", "a.png", "b.png", "x/a.png")
    archive = zipped(tmp_path / "good.zip", cvat("a", "x/b", pictures=("a", "x/b"))).read_bytes()
    imported = 0
    for seed in range(200):
        rng, out = random.Random(seed), tmp_path / "made" / str(seed)
        try:
            if kind == "coco":
                done = import_coco(write(tmp_path / "e", mutated(GOOD_COCO, rng)), tmp_path / "img", out)
            elif kind == "studio":
                done = import_label_studio(write(tmp_path / "e", mutated(GOOD_STUDIO, rng)), tmp_path / "img", out)
            else:
                content = bytearray(archive)
                for _ in range(rng.choice((1, 2, 9))):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                (tmp_path / "e").write_bytes(content[: rng.choice((None, None, None, rng.randrange(len(content))))])
                done = import_cvat(tmp_path / "e", out)
        except InputError as error:
            assert str(error) and not out.exists()
            continue
        assert str(done).encode() and "Error" not in str(done)
        if done.names:
            imported += len(list(Folder(out)))
        assert not [path for path in tmp_path.rglob(".*")]
    assert imported > 50
