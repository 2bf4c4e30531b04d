"""Regions of labelling programs: the right pixels, and no number taken on trust."""

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.regions import (
    area,
    number,
    paint,
    percent_shape,
    polygon_runs,
    run_length_runs,
    shown,
    unpack_bitmask,
    unpack_brush,
    unpack_counts,
    whole,
)


def mask_of(runs, width, height):
    columns = np.zeros((width, height), np.uint8)
    paint(columns, runs, 1)
    assert columns.sum() == area(runs)
    return columns.T


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -1, 6, True, "5", None, [5], {}])
def test_numbers_that_are_none_or_out_of_range(value):
    with pytest.raises(InputError, match="its side"):
        number(value, "its side", 0, 5)
    with pytest.raises(InputError, match="its side"):
        whole(value, "its side", 0, 5)


def test_numbers_that_are_taken():
    assert (
        number(2, "x") == 2.0
        and number(2.5, "x") == 2.5
        and whole(5.0, "x", 0, 5) == 5
        and isinstance(whole(5.0, "x"), int)
    )
    with pytest.raises(InputError, match="whole number"):
        whole(2.5, "x")
    assert [shown(v) for v in (None, {}, [], True, "a\x1b", 3)] == [
        "nothing",
        "an object",
        "a list",
        "true or false",
        "'a\\x1b'",
        "3",
    ]


def test_a_polygon_by_hand():
    assert polygon_runs([[1, 1, 4, 1, 4, 3, 1, 3]], 6, 4).tolist() == [
        [5, 7],
        [9, 11],
        [13, 15],
    ]  # rows 1 and 2 of columns 1, 2 and 3
    both = polygon_runs([[1, 1, 4, 1, 4, 3, 1, 3], [3, 0, 5, 0, 5, 2, 3, 2]], 6, 4)  # they overlap in one pixel
    assert area(both) == 6 + 4 - 1 and both.tolist() == [[5, 7], [9, 11], [12, 15], [16, 18]]


SIDE = st.integers(1, 30)
POINT = st.floats(-1, 2, width=32)


@settings(max_examples=300, deadline=None)
@given(
    SIDE,
    SIDE,
    st.lists(st.lists(st.tuples(POINT, POINT), min_size=3, max_size=8), min_size=1, max_size=3),
    st.integers(0, 4),
)
def test_polygons_are_drawn_as_the_tools_of_coco_draw_them(width, height, polygons, digits):
    theirs = pytest.importorskip("pycocotools.mask")
    given = [[round(float(v), digits) for x, y in points for v in (x * width, y * height)] for points in polygons]
    try:
        ours = mask_of(polygon_runs(given, width, height), width, height)
    except InputError as error:
        assert "lie outside" in str(error) or "must lie between" in str(error)  # rounded over the edge
        return
    assert np.array_equal(ours, theirs.decode(theirs.merge(theirs.frPyObjects(given, height, width))))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=40))
def test_packed_run_lengths(rows):
    theirs = pytest.importorskip("pycocotools.mask")
    mask = np.array(rows, np.uint8)
    packed = theirs.encode(np.asfortranarray(mask))["counts"].decode()
    assert np.array_equal(mask_of(run_length_runs(packed, 7, len(rows)), 7, len(rows)), mask)


def test_run_lengths_by_hand():
    assert run_length_runs([5, 3, 0, 2, 2], 3, 4).tolist() == [[5, 8], [8, 10]] and run_length_runs(
        [0, 12], 3, 4
    ).tolist() == [[0, 12]]
    assert unpack_counts("5n05b1") == [5, 30, 5, 80]
    assert run_length_runs([12], 3, 4).tolist() == [] == run_length_runs([12.0], 3, 4).tolist()


@pytest.mark.parametrize(
    "counts",
    [
        [0, 100],
        [-5, 125],
        [0, 10**30],
        [119.5, 0.5],
        [math.nan, 120],
        [True] * 120,
        "5n0",
        "n0P",
        "~",
        "\x00",
        "ü",
        "oooooooooo",
        7,
        None,
        {},
    ],
)
def test_run_lengths_that_do_not_add_up(counts):
    with pytest.raises(InputError, match="run lengths"):
        run_length_runs(counts, 12, 10)


@pytest.mark.parametrize(
    "polygons",
    [
        None,
        [],
        3,
        "abc",
        [3],
        [[1, 1, 9, 1]],
        [[1, 1, 9, 1, 9, 9, 1]],
        [[1, 1, 2, math.nan, 3, 3]],
        [[1, 1, math.inf, 2, 3, 3]],
        [[0, 0, 1e9, 4, 0, 4]],
        [[1, 1, "2", 2, 3, 3]],
        [[-9, -9, -1, -9, -1, -1]],
        [[1, 1, 2, 2, 3, 3], [1, 2]],
        [[10**400, 1, 2, 2, 3, 3]],
    ],
)
def test_polygons_that_are_none(polygons):
    with pytest.raises(InputError):
        polygon_runs(polygons, 60, 40)


def test_an_outline_that_would_take_all_memory():
    with pytest.raises(InputError, match="pixels long"):
        polygon_runs([[0, 0, 8000, 0] * 20000], 8000, 10)


@pytest.mark.parametrize("values", [[300, -1], [1.5], ["1"], [None], "abc", None, {}, [True]])
def test_brush_strokes_that_are_no_bytes(values):
    with pytest.raises(InputError, match="brush strokes"):
        unpack_brush(values, 4, 4)


def test_brush_strokes_that_hold_more_than_the_picture():
    bits = f"{4:032b}" + f"{7:05b}" + f"{7:04b}" * 4 + "1" + "00" + f"{4:08b}" + f"{255:08b}"  # a run of 5, of 4 values
    bits += "0" * (-len(bits) % 8)
    with pytest.raises(InputError, match="more than the picture"):
        unpack_brush([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], 1, 1)


def data_url(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def test_bitmasks():
    truth = np.zeros((5, 7), bool)
    truth[1:3, 2:6] = True
    painted = np.zeros((5, 7, 4), np.uint8)
    painted[truth] = (0, 0, 0, 255)  # black, and opaque: painted
    assert np.array_equal(unpack_bitmask(data_url(Image.fromarray(painted)), 5, 7), truth)
    assert np.array_equal(unpack_bitmask(data_url(Image.fromarray(truth.astype(np.uint8) * 255)), 5, 7), truth)
    for wrong in (
        None,
        7,
        "a.png",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,ü",
        "data:text/plain;base64,AAAA",
        data_url(Image.new("L", (7, 4))),
        data_url(Image.new("1", (3000, 3000))),
    ):
        with pytest.raises(InputError, match="bitmask"):
            unpack_bitmask(wrong, 5, 7)


def test_turned_shapes():
    box = {"x": 40, "y": 20, "width": 40, "height": 30}
    upright, right, left = (
        np.argwhere(percent_shape("rectangle", {**box, "rotation": turn}, 50, 100)) for turn in (360, 90, -90)
    )
    assert upright.min(0).tolist() == [10, 40] and upright.max(0).tolist() == [24, 79]
    assert right.min(0).tolist() == [10, 25] and right.max(0).tolist() == [
        49,
        39,
    ]  # 40 pixels long, down from the corner (40, 10), 15 to its left
    assert left.min(0).tolist() == [0, 40] and left.max(0).tolist() == [9, 54]  # cut by the edge above
    ellipse = {"x": 50, "y": 50, "radiusX": 30, "radiusY": 10}
    tilted = percent_shape("ellipse", {**ellipse, "rotation": 45}, 100, 100)
    assert tilted[70, 70] and not tilted[30, 70] and abs(tilted.sum() - math.pi * 300) < 15


@pytest.mark.parametrize(
    "kind, value",
    [
        ("polygon", {}),
        ("polygon", {"points": [[1, 1], [2, 2]]}),
        ("polygon", {"points": [[1, 1], [2, 2], [math.nan, 3]]}),
        ("polygon", {"points": [[1, 1], [2, 2], [3]]}),
        ("polygon", {"points": [[1, 1], [9, 1], [9, 9]], "closed": False}),
        ("polygon", {"points": [[101, 1], [120, 1], [120, 9]]}),
        ("rectangle", {"x": 1, "y": 1, "width": -3, "height": 5}),
        ("rectangle", {"x": 150, "y": 1, "width": 3, "height": 5}),
        ("rectangle", {"x": 1, "y": 1, "width": 1e9, "height": 5}),
        ("rectangle", {"x": 1, "y": 1, "width": 3, "height": 5, "rotation": "30"}),
        ("ellipse", {"x": 1}),
        ("ellipse", {"x": 1, "y": 1, "radiusX": math.inf, "radiusY": 1}),
    ],
)
def test_shapes_that_are_none(kind, value):
    with pytest.raises(InputError):
        percent_shape(kind, value, 40, 60)
