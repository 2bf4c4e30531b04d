"""LabelMe's and YOLO's files: the pixels that were drawn on the pictures they mean, and a sentence about all others."""

import base64
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shell import lagm

from lagm.core.errors import InputError
from lagm.core.files import read_yaml
from lagm.data.folder import Folder
from lagm.data.labelme import import_labelme
from lagm.data.yolo import import_yolo, yolo_polygons

pytestmark = pytest.mark.filterwarnings("ignore:no labelled picture")
W, H = 20, 16
FRAMES = st.tuples(st.integers(0, W - 1), st.integers(0, H - 1), st.integers(1, W), st.integers(1, H)).map(
    lambda r: (r[0], r[1], min(W, r[0] + r[2]), min(H, r[1] + r[3])))  # corners of whole numbers, some pixels inside
QUIET = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("lagm.core.files._flush_to_disk", lambda path: None)


@pytest.fixture
def fresh(tmp_path_factory):
    """A function that makes a new folder, for tests that run many examples."""
    return lambda: tmp_path_factory.mktemp("example")


def picture(path, size=(W, H), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation: exif[0x0112] = orientation
    Image.new("RGB", size, (90, 90, 90)).save(path, exif=exif)
    return path


def in_base64(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(label, *points, kind="rectangle", **more):
    return {"label": label, "shape_type": kind, "points": [list(point) for point in points], **more}


def labelme(path, *shapes, size=(W, H), said=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "5.5.0", "shapes": list(shapes), "imagePath": said or f"{path.stem}.png", "imageData": "AAAA",
               "imageWidth": size[0], "imageHeight": size[1]}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def yolo(folder, lines, names=("house", "window"), stem="a"):
    picture(folder / "images" / f"{stem}.png")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / f"{stem}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(json.dumps({"names": list(names)}))
    return folder


def frame_line(number, frame):
    x0, y0, x1, y1 = frame
    return " ".join(map(repr, (number, x0 / W, y0 / H, x1 / W, y0 / H, x1 / W, y1 / H, x0 / W, y1 / H)))


def painted(frames):
    """Rectangles one over the other, by slices."""
    mask = np.zeros((H, W), np.uint8)
    for value, (x0, y0, x1, y1) in frames: mask[y0:y1, x0:x1] = value
    return mask


def masks(root):
    folder = Folder(root)
    return {name: mask.numpy() for name, (_, mask) in zip(folder.names, folder)}


# ---- pixels


@QUIET
@given(st.lists(st.tuples(st.sampled_from((1, 2)), FRAMES), min_size=1, max_size=5))
def test_rectangles_are_the_pixels_between_their_corners(fresh, frames):
    here, wanted = fresh(), painted(frames)
    picture(here / "in" / "a.png")
    names = {1: "house", 2: "window"}
    labelme(here / "in" / "a.json", *(shape(names[value], (x1, y0), (x0, y1)) for value, (x0, y0, x1, y1) in frames))
    import_labelme(here / "in", here / "out", classes=("house", "window"))
    yolo(here / "y", [frame_line(value - 1, frame) for value, frame in frames])
    import_yolo(here / "y", here / "y out")
    for root in (here / "out", here / "y out"): assert np.array_equal(masks(root)["a"], wanted)


@QUIET
@given(FRAMES)
def test_a_polygon_a_box_and_a_mask_of_one_frame_agree(fresh, frame):
    x0, y0, x1, y1 = frame
    here, whole = fresh(), np.ones((y1 - y0, x1 - x0), np.uint8)
    corners = (x0, y0), (x1, y0), (x1, y1), (x0, y1)
    for name, own in {"box": shape("house", (x0, y0), (x1, y1)), "polygon": shape("house", *corners, kind="polygon"),
                      "old": {"label": "house", "points": [list(corner) for corner in corners]},
                      "mask": shape("house", (x0, y0), (x1 - 1, y1 - 1), kind="mask", mask=in_base64(whole))}.items():
        picture(here / "in" / f"{name}.png")
        labelme(here / "in" / f"{name}.json", own)
    done = import_labelme(here / "in", here / "out")
    assert not done.skipped
    for mask in masks(here / "out").values(): assert np.array_equal(mask, painted([(1, frame)]))


@pytest.mark.parametrize("corner", [(-3, 5), (17, -2), (15, 12), (-4, -4), (0, 0)])
def test_a_mask_may_leave_the_picture(tmp_path, corner):
    picture(tmp_path / "in" / "a.png")
    spots = np.random.default_rng(0).integers(0, 2, (9, 7), np.uint8)
    (x, y), whole = corner, np.zeros((H + 40, W + 40), np.uint8)
    whole[y + 20: y + 29, x + 20: x + 27] = spots
    labelme(tmp_path / "in" / "a.json", shape("house", corner, (x + 6, y + 8), kind="mask", mask=in_base64(spots)))
    import_labelme(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(masks(tmp_path / "out")["a"], whole[20: 20 + H, 20: 20 + W])


def test_a_circle_is_the_pixels_whose_middle_is_near(tmp_path):
    picture(tmp_path / "in" / "a.png")
    labelme(tmp_path / "in" / "a.json", shape("sun", (18, 3), (18, 7.3), kind="circle"))
    import_labelme(tmp_path / "in", tmp_path / "out")
    near = [[(x + 0.5 - 18) ** 2 + (y + 0.5 - 3) ** 2 <= 4.3**2 for x in range(W)] for y in range(H)]
    assert np.array_equal(masks(tmp_path / "out")["a"], np.array(near))


def test_labels_that_mean_no_class(tmp_path):
    picture(tmp_path / "in" / "a.png")
    labelme(tmp_path / "in" / "a.json", shape("house", (0, 0), (9, 9)), shape("__ignore__", (2, 2), (5, 5)),
            shape("_background_", (6, 6), (8, 8)), shape("Background", (0, 0), (1, 1)))
    import_labelme(tmp_path / "in", tmp_path / "out")
    assert Folder(tmp_path / "out").classes == ("background", "house")
    wanted = painted([(1, (0, 0, 9, 9)), (255, (2, 2, 5, 5)), (0, (6, 6, 8, 8)), (0, (0, 0, 1, 1))])
    assert np.array_equal(masks(tmp_path / "out")["a"], wanted)


def test_a_yolo_list_with_a_background(tmp_path):
    yolo(tmp_path / "y", [frame_line(0, (0, 0, 9, 9)), frame_line(1, (2, 2, 5, 5))], names=("house", "Background"))
    import_yolo(tmp_path / "y", tmp_path / "out")
    assert Folder(tmp_path / "out").classes == ("background", "house")
    assert np.array_equal(masks(tmp_path / "out")["a"], painted([(1, (0, 0, 9, 9)), (0, (2, 2, 5, 5))]))


# ---- which picture


BOX = shape("house", (2, 2), (10, 8))


@pytest.mark.parametrize("size, annotated", [((W, H), (H, W)), ((W, H), (W, H))])
def test_a_picture_turned_by_its_header(tmp_path, size, annotated):
    """LabelMe shows pictures upright; a program that does not writes the stored size, and its mask is turned."""
    picture(tmp_path / "in" / "a.jpg", size, orientation=6)
    labelme(tmp_path / "in" / "a.json", BOX, size=annotated, said="a.jpg")
    import_labelme(tmp_path / "in", tmp_path / "out")
    wanted = np.zeros(annotated[::-1], np.uint8)
    wanted[2:8, 2:10] = 1
    if annotated == size: wanted = np.rot90(wanted, -1)
    assert np.array_equal(masks(tmp_path / "out")["a"], wanted)


@pytest.mark.parametrize("file, said, there, apart", [
    ("a.json", "a.png", "a.png", False), ("day/a.json", "a.png", "day/a.png", False),
    ("a.json", r"C:\Users\me\a.png", "a.png", False), ("a.json", r"..\pictures\a.png", "a.png", True),
    ("a.json", "../pictures/day/a.png", "day/a.png", True), ("day/a.json", "../../x/day/a.png", "day/a.png", True),
    ("labels/a.json", "../images/a.png", "images/a.png", False), ("a.json", "/elsewhere/day/a.png", "day/a.png", True),
    ("a.json", None, "a.png", True), ("day/A.JSON", "A.PNG", "day/A.png", False)])
def test_the_picture_that_a_file_means(tmp_path, file, said, there, apart):
    pictures = tmp_path / ("pictures" if apart else "in")
    picture(pictures / there)
    labelme(tmp_path / "in" / file, BOX, said=said)
    done = import_labelme(tmp_path / "in", tmp_path / "out", images=pictures if apart else None)
    assert len(done.names) == 1 and not done.skipped


@pytest.mark.parametrize("said", ["../../../etc/passwd", "..", "/", "a\0.png", "a.png/", "z.png", "other/a.png", "~",
                                  "."])
def test_a_picture_that_is_not_there_is_left_out(tmp_path, said):
    picture(tmp_path / "in" / "good.png")
    picture(tmp_path / "in" / "elsewhere" / "a.png")
    labelme(tmp_path / "in" / "good.json", BOX)
    labelme(tmp_path / "in" / "bad.json", BOX, said=said)
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert done.names == ["good"] and set(done.skipped) == {"bad.json"}


@pytest.mark.parametrize("text, there", [
    ("labels/a.txt", "images/a.png"), ("labels/train/a.txt", "images/train/a.png"), ("a.txt", "a.png"),
    ("train/labels/a.txt", "train/images/a.png"), ("valid/labels/day/a.TXT", "valid/images/day/a.jpg")])
def test_layouts_of_yolo(tmp_path, text, there):
    picture(tmp_path / "y" / there)
    (tmp_path / "y" / text).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "y" / text).write_text(frame_line(0, (2, 2, 10, 8)))
    (tmp_path / "y" / "data.yml").write_text("names: [house]\n")
    (tmp_path / "y" / "README.roboflow.txt").write_text("made by a program")
    done = import_yolo(tmp_path / "y", tmp_path / "out")
    assert len(done.names) == 1 and np.array_equal(*masks(tmp_path / "out").values(), painted([(1, (2, 2, 10, 8))]))


# ---- what cannot be used


@pytest.mark.parametrize("wrong, why", [
    (shape("house", (1, 1), (1e9, 4)), "between"), (shape("house", (1, 1)), "needs 2"),
    (shape("house", (30, 30), (35, 32)), "outside"), (shape("house", (1, 1), (float("nan"), 4)), "between"),
    (shape("house", (-9, -9), (-9, -8), kind="circle"), "no pixel"),
    (shape("house", (1, 1), (2, 2), kind="heart"), "kind"),
    (shape("house", (18, 18), (20, 20), kind="mask", mask=in_base64(np.ones((3, 3), np.uint8))), "no pixel"),
    (shape("house", (0, 0), (9, 9), kind="mask", mask=in_base64(np.ones((3, 3), np.uint8))), "box"),
    (shape("house", (0, 0), (2, 2), kind="mask", mask=in_base64(np.ones((3, 3, 3), np.uint8))), "grey"),
    (shape("house", (0, 0), (9, 9), kind="mask", mask=in_base64(np.zeros((5000, 5000), np.uint8))), "allowed"),
    (shape("house", (0, 0), (9, 9), kind="mask", mask="iVBORw0KGgo="), "its mask"),
    (shape("house", (0, 0), (9, 9), kind="mask", mask="ä"), "base64"), (shape("", (0, 0), (9, 9)), "name"),
    (shape(7, (0, 0), (9, 9)), "label"), ("text", "not an object"), (None, "not an object")])
def test_one_bad_shape_costs_one_picture(tmp_path, wrong, why):
    for name in "ab": picture(tmp_path / "in" / f"{name}.png")
    labelme(tmp_path / "in" / "a.json", BOX)
    labelme(tmp_path / "in" / "b.json", BOX, wrong)
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert done.names == ["a"] and why in done.skipped["b.json"] and "hape 2" in done.skipped["b.json"]


@pytest.mark.parametrize("size", [(10**6, 10**6), (W + 1, H), (-1, 4), ("20", H), (10**400, 1)])
def test_a_file_of_a_picture_of_another_size(tmp_path, size):
    """Its numbers are compared with the picture before a mask of so many pixels is made."""
    for name in "ab": picture(tmp_path / "in" / f"{name}.png")
    labelme(tmp_path / "in" / "a.json", BOX, size=size)
    labelme(tmp_path / "in" / "b.json", BOX)
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert done.names == ["b"] and set(done.skipped) == {"a.json"}


def test_labels_that_differ_in_spelling(tmp_path):
    for name in "ab": picture(tmp_path / "in" / f"{name}.png")
    labelme(tmp_path / "in" / "a.json", BOX, shape(" the  house ", (0, 0), (1, 1)))
    labelme(tmp_path / "in" / "b.json", shape("House", (2, 2), (4, 4)), shape("the house", (0, 0), (1, 1)))
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert Folder(tmp_path / "out").classes == ("background", "House", "house", "the house")
    assert "capitals" in str(done) and "House, house" in str(done)
    with pytest.raises(InputError, match=r"'House' of b\.json is none of the classes given"):
        import_labelme(tmp_path / "in", tmp_path / "x", classes=("house", "the house"))
    with pytest.raises(InputError, match="a mask has room for 254"):
        import_labelme(tmp_path / "in", tmp_path / "x",
                       classes=[str(i) for i in range(300)] + ["House", "house", "the house"])


def test_two_files_of_one_picture(tmp_path):
    picture(tmp_path / "in" / "a.png")
    for name in ("a", "b"): labelme(tmp_path / "in" / f"{name}.json", BOX, said="a.png")
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert not done.names and set(done.skipped) == {"a.json", "b.json"}


def test_points_have_no_area(tmp_path):
    for name in "ab": picture(tmp_path / "in" / f"{name}.png")
    labelme(tmp_path / "in" / "a.json", shape("nose", (2, 2), kind="point"))
    labelme(tmp_path / "in" / "b.json", BOX, shape("edge", (2, 2), (3, 3), kind="line"))
    done = import_labelme(tmp_path / "in", tmp_path / "out")
    assert done.names == ["b"] and done.unlabelled == ["a"] and "no area" in str(done)
    assert Folder(tmp_path / "out").classes == ("background", "house")


def test_folders_without_anything(tmp_path):
    (tmp_path / "empty").mkdir()
    for importer, where in ((import_labelme, "empty"), (import_yolo, "empty"), (import_labelme, "none"),
                            (import_yolo, "none")):
        with pytest.raises(InputError): importer(tmp_path / where, tmp_path / "out")
    (tmp_path / "empty" / "classes.txt").write_text("house\n")
    with pytest.raises(InputError, match="no label files"): import_yolo(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "coco.json").write_text("{}")
    with pytest.raises(InputError, match="has no shapes"): import_labelme(tmp_path / "empty", tmp_path / "out")
    picture(tmp_path / "empty" / "a.png")
    labelme(tmp_path / "empty" / "a.json", BOX)
    with pytest.raises(InputError, match="folder of the pictures"):
        import_labelme(tmp_path / "empty", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["nan 0 0 1 0 1 1", "inf 0 0 1 0 1 1", "1e400 0 0 1 0 1 1", "0.5 0 0 1 0 1 1",
                                  "-1 0 0 1 0 1 1",
                                  "2 0 0 1 0 1 1", "0 0.5 0.5 1 1", "0 0 0 1 0 1", "0 0 0 1 0 1 1 0.9",
                                  "0 0 0 nan 0 1 1",
                                  "0 0 0 9 0 1 1", "0", "house 0 0 1 0 1 1", "\x1b[2J"])
def test_lines_that_are_none(line):
    with pytest.raises(InputError, match="line 2"): yolo_polygons(f"0 0 0 1 0 1 1\n{line}", 2)


@pytest.mark.parametrize("text", ["[" * 4000, "names: 2020-99-99", "names: !!int ''",
                                  "a: !!python/object/apply:os.system [x]",
                                  "names: {0: a, 2: b}", "names: [1, 2]", "names: [a, a]", "names: {true: a}",
                                  "names: &a [*a]",
                                  "names: {? [1] : a}", "nc: 3", "\0", "names: []", "names: house"])
def test_lists_of_classes_that_are_none(tmp_path, text):
    yolo(tmp_path, [frame_line(0, (2, 2, 10, 8))])
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError): import_yolo(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- anything


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(
        (W, H, 10**300, "house", "a.png", "../a.png", "polygon", "mask", "circle", "rectangle", "point", "\ud800",
         "\x1b[31m",
         in_base64(np.ones((2, 2), np.uint8)))) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(("shapes", "points", "label", "shape_type", "mask", "imagePath", "x")), inner, max_size=4),
    max_leaves=12)
NUMBERS = st.integers(-40, 40) | st.floats(-40, 40) | VALUES
SHAPES = st.fixed_dictionaries(
    {"label": st.sampled_from(("house", "Window", "__ignore__")) | VALUES,
     "points": st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=5) | VALUES},
    optional={"shape_type": st.sampled_from(("polygon", "rectangle", "circle", "mask", "point", None)) | VALUES,
              "mask": st.just(in_base64(np.ones((3, 2), np.uint8))) | VALUES})
FILES = VALUES | st.fixed_dictionaries(
    {"shapes": st.lists(SHAPES, max_size=4) | VALUES},
    optional={"imagePath": st.sampled_from(("a.png", "b\\a.png", "..", "")) | VALUES, "imageWidth": st.just(W) | VALUES,
              "imageHeight": st.just(H) | VALUES})


@settings(QUIET, max_examples=100)
@given(FILES)
def test_any_json_becomes_a_folder_or_a_sentence(fresh, content):
    here = fresh()
    for name in "ab": picture(here / "in" / f"{name}.png")
    labelme(here / "in" / "b.json", BOX)
    (here / "in" / "a.json").write_text(json.dumps(content))
    try: done = import_labelme(here / "in", here / "out")
    except InputError as error:
        assert str(error).encode() and not (here / "out").exists()
        return
    assert str(done).encode() and "Error" not in str(done)
    assert set(masks(here / "out")) == set(done.names)


WORDS = st.integers(-1, 3) | st.floats(-0.1, 1.1) | st.sampled_from(("nan", "inf", "1_0", "x", "", "\n", "0", "\x85",
                                                                     "é"))


@settings(QUIET, max_examples=250)
@given(st.lists(WORDS, max_size=24).map(lambda words: " ".join(map(str, words))) | st.text(max_size=40))
def test_any_lines_become_polygons_or_a_sentence(text):
    with contextlib.suppress(InputError):
        for number, values in yolo_polygons(text, 2): assert number in (0, 1) and len(values) >= 6


@settings(QUIET, max_examples=40)
@given(VALUES | st.text(alphabet="[]{}:,-?!&*'\"#|>% \nab01", max_size=30))
def test_any_yaml_is_read_or_becomes_a_sentence(fresh, content):
    here = fresh()
    text = content if isinstance(content, str) else json.dumps({"names": content})
    yolo(here, [frame_line(0, (2, 2, 10, 8))])
    (here / "data.yaml").write_text(text, "utf-8", "replace")
    with contextlib.suppress(InputError): read_yaml(here / "data.yaml")
    try: done = import_yolo(here, here / "out")
    except InputError: assert not (here / "out").exists()
    else: assert str(done).encode()


# ---- the commands


def test_the_commands(tmp_path):
    picture(tmp_path / "in" / "a.png")
    labelme(tmp_path / "in" / "a.json", BOX, shape("window", (4, 4), (6, 6)))
    done = lagm("prepare", "labelme", tmp_path / "in", "--out", tmp_path / "out", "--classes", "window", "house")
    assert done.returncode == 0 and "1 labelled" in done.stdout, done.stderr
    assert np.array_equal(masks(tmp_path / "out")["a"], painted([(2, (2, 2, 10, 8)), (1, (4, 4, 6, 6))]))
    yolo(tmp_path / "y", [frame_line(1, (2, 2, 10, 8))])
    done = lagm("prepare", "yolo", tmp_path / "y", "--out", tmp_path / "y out")
    assert done.returncode == 0 and "1 labelled" in done.stdout, done.stderr
    assert np.array_equal(masks(tmp_path / "y out")["a"], painted([(2, (2, 2, 10, 8))]))
    done = lagm("prepare", "yolo", tmp_path / "in", "--out", tmp_path / "x")
    assert done.returncode and "Traceback" not in done.stderr and "classes" in done.stderr


# ---- label pictures of other programs, read as they are


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate"])
def test_label_pictures_of_napari(tmp_path, kind, compression):
    """A labels layer is saved as TIFF, of as many bits as it has."""
    picture(tmp_path / "images" / "a.png")
    wanted = painted([(1, (2, 2, 10, 8)), (2, (5, 4, 15, 12)), (255, (0, 0, 1, 1))])
    (tmp_path / "masks").mkdir()
    Image.fromarray(wanted.astype(kind)).save(tmp_path / "masks" / "a.tif", compression=compression)
    (tmp_path / "classes.txt").write_text("background\nhouse\nwindow\n")
    assert np.array_equal(masks(tmp_path)["a"], wanted)
    if kind is np.uint8: return
    Image.fromarray((wanted * 150.0).astype(kind)).save(tmp_path / "masks" / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds the value"): masks(tmp_path)


def voc_palette():
    """VOC's colours: the bits of the index, spread over red, green and blue from the top bit down."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8): colours[index, bit % 3] |= (index >> bit & 1) << 7 - bit // 3
    return colours


def test_palette_pictures_of_voc(tmp_path):
    """The index counts, not the colour; 255 is the border that has no label."""
    picture(tmp_path / "images" / "a.jpg")
    wanted = painted([(255, (1, 1, 11, 9)), (15, (2, 2, 10, 8)), (20, (12, 3, 15, 12))])
    image = Image.fromarray(wanted)
    image.putpalette(voc_palette().tobytes())
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "a.png")
    (tmp_path / "classes.txt").write_text("\n".join(["background", *(f"class {i}" for i in range(1, 21))]))
    with pytest.warns(UserWarning, match="class 1"): assert np.array_equal(masks(tmp_path)["a"], wanted)
    assert Image.open(Path(tmp_path, "masks", "a.png")).convert("RGB").getpixel((3, 3)) == (192, 128, 128)
    image.convert("RGB").save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="coloured picture"): masks(tmp_path)
