"""Every list of classes and every mapping equals the released one, number by number."""

import json
from pathlib import Path

import numpy as np
import pytest

from lagm.core.errors import InputError
from lagm.data.label_maps import (
    LABEL_MAPS,
    LABEL_SETS,
    PASCAL_PARTS,
    RELEASED_CAR_12_NAMES,
    LabelMap,
    distinct_colours,
    get_labels,
    make_labels,
    pascal_n_parts,
    pascal_part_id,
)
from lagm.data.labels import CELEBA8

GOLDEN = Path(__file__).parent / "golden" / "datasets"
NAMES = json.loads((GOLDEN / "class_names.json").read_text(encoding="utf-8"))
MAPS = json.loads((GOLDEN / "label_maps.json").read_text(encoding="utf-8"))
PARTS = json.loads((GOLDEN / "pascal_part_map.json").read_text(encoding="utf-8"))
OURS = {"datasetgan_face_34_to_8": ("dg_face", "celebA_8"), "datasetgan_car_20_to_12": ("dg_car_20", "dg_car_12"),
        "celeba_19_to_8": ("celebA_19", "celebA_8"),
        "cgpart_car_32_to_v0": ("CGPart_car", "CGPart_car_simplified_v0"),
        "cgpart_car_32_to_v1": ("CGPart_car", "CGPart_car_simplified_v1"),
        "cgpart_aeroplane_to_v0": ("CGPart_aeroplane", "CGPart_aeroplane_simplified_v0")}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_released_ones(name):
    ours = RELEASED_CAR_12_NAMES if name == "dg_car_12" else get_labels(name).classes
    assert list(ours) == NAMES[name]


def test_car_12_goes_by_the_numbers():
    for part, number in {"head light": 2, "licence plate": 3, "mirror": 4, "tail light": 5, "wheel": 6, "window": 7,
                         "wind shield": 8, "door": 9, "handle": 10, "wheelhub": 11}.items():
        assert get_labels("dg_car_12").index(part) == number


@pytest.mark.parametrize("name", OURS)
def test_mappings_are_the_released_ones(name):
    mapping = LABEL_MAPS[OURS[name]]
    assert list(mapping.ids) == MAPS[name]["ids"]
    mask = np.arange(len(mapping.ids))[None]
    assert mapping(mask).tolist() == [MAPS[name]["ids"]] and mapping(mask).dtype == np.uint8


def test_there_are_no_other_mappings():
    assert set(LABEL_MAPS) == set(OURS.values())


@pytest.mark.parametrize("object_class", PARTS)
def test_pascal_parts(object_class):
    for part, number in PARTS[object_class].items():
        for name in ([part.replace("*", n) for n in ("1", "2", "17")] if part.endswith("*") else [part]):
            assert pascal_part_id(object_class, name) == number
    assert sum(len(row.split()) for row in PASCAL_PARTS[object_class]) == len(PARTS[object_class])
    assert pascal_n_parts(object_class) == 1 + max(PARTS[object_class].values(), default=0)
    assert pascal_part_id(object_class, "antenna") is None
    assert pascal_part_id("aeroplane", "engine") is None and pascal_part_id("aeroplane", "engine_x") is None


def test_every_set_has_distinct_colours():
    for labels in LABEL_SETS.values():
        colours = np.array(labels.palette, int)
        gaps = np.abs(colours[:, None] - colours[None]).max(-1) + 999 * np.eye(len(colours), dtype=int)
        assert gaps.min() >= 32 and labels.palette[0] == (0, 0, 0) and (255, 255, 255) not in labels.palette
    assert distinct_colours(20) == distinct_colours(34)[:20]


def test_a_mapping_keeps_255_and_refuses_other_values():
    mapping = LABEL_MAPS["celebA_19", "celebA_8"]
    assert mapping(np.array([[255, 13]])).tolist() == [[255, CELEBA8.index("hair")]]
    for wrong in (19, 254, -1):
        with pytest.raises(InputError, match=f"holds the value {wrong}"): mapping(np.array([[wrong]]))


def test_a_table_must_name_every_class_once():
    fine, coarse = make_labels("fine", ["background", "a", "b"]), make_labels("coarse", ["background", "ab"])
    assert LabelMap.from_table(fine, coarse, {"background": ["background"], "ab": ["a", "b"]}).ids == (0, 1, 1)
    for table, words in (({"background": ["background"], "ab": ["a"]}, "says nothing about b"),
                         ({"background": ["background", "a"], "ab": ["a", "b"]}, "twice"),
                         ({"background": ["background", "c"]}, "no class 'c'"),
                         ({"ground": ["background"]}, "no class 'ground'")):
        with pytest.raises(InputError, match=words): LabelMap.from_table(fine, coarse, table)
