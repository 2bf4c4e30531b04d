"""Label sets are consistent and frozen; colourise shows every label in its own colour and refuses what it does not
know.
"""

import dataclasses

import numpy as np
import pytest
import torch

from lagm.core.errors import InputError
from lagm.data.labels import CELEBA8, IGNORE, IGNORE_COLOUR, LabelSet, colourise

TWO = (("background", "thing"), ((0, 0, 0), (9, 8, 7)))


def test_the_papers_classes_in_the_papers_order():
    assert CELEBA8.classes == ("background", "ear", "eye", "eyebrow", "skin", "hair", "mouth", "nose")
    assert CELEBA8.n_classes == 8 and IGNORE == 255
    assert [CELEBA8.index(name) for name in CELEBA8.classes] == list(range(8))
    assert CELEBA8.palette[0] == (0, 0, 0)


def test_colours_can_be_told_apart():
    colours = np.array(CELEBA8.palette + (IGNORE_COLOUR,), float)
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert gaps[~np.eye(9, dtype=bool)].min() > 90


def test_a_label_set_is_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CELEBA8.name = "other"
    from_lists = LabelSet("celeba8", list(CELEBA8.classes), [list(colour) for colour in CELEBA8.palette])
    assert from_lists == CELEBA8 and hash(from_lists) == hash(CELEBA8)
    assert LabelSet("x", *TWO) != LabelSet("y", *TWO)


@pytest.mark.parametrize(
    "classes, palette, message",
    [
        ((), (), "0 classes"),
        (("a", "b"), ((0, 0, 0),), "2 classes and 1 colours"),
        (("a", "a"), TWO[1], "repeats the class 'a'"),
        (("a", "b"), ((1, 1, 1), (1, 1, 1)), "repeats the colour"),
        (("a", "b"), ((1, 1, 1), (1, 1, 256)), "0..255"),
        (("a", "b"), ((1, 1, 1), (1, 1)), "three integers"),
        (tuple(f"c{i}" for i in range(256)), tuple((i % 256, i // 256, 3) for i in range(256)), "256 classes"),
    ],
)
def test_inconsistent_sets_are_refused(classes, palette, message):
    with pytest.raises(InputError, match=message):
        LabelSet("bad", classes, palette)


def test_255_classes_are_possible_and_the_last_is_not_ignore():
    labels = LabelSet("many", tuple(f"c{i}" for i in range(255)), tuple((i, 255 - i, 3) for i in range(255)))
    shown = colourise(np.array([[254, 255]]), labels)
    assert shown[0, 0].tolist() == [254, 1, 3] and shown[0, 1].tolist() == list(IGNORE_COLOUR)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (0, 5, 7)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.int64, torch.uint8])
def test_every_pixel_gets_the_colour_of_its_class(shape, kind):
    mask = np.random.RandomState(0).choice([0, 1, 2, 3, 4, 5, 6, 7, IGNORE], shape)
    given = torch.from_numpy(mask).to(kind) if isinstance(kind, torch.dtype) else mask.astype(kind)
    shown = colourise(given)
    assert shown.shape == (*shape, 3) and shown.dtype == np.uint8
    for index in np.ndindex(shape):
        wanted = IGNORE_COLOUR if mask[index] == IGNORE else CELEBA8.palette[mask[index]]
        assert tuple(shown[index].tolist()) == wanted


@pytest.mark.parametrize("mask, message",
                         [([[8]], "the value 8"), ([[-1]], "the value -1"), ([[254]], "the value 254"),
                          ([[256]], "the value 256"),
                                           ([[0.0]], "must hold integers"), ([[True]], "must hold integers")])
def test_what_is_no_label_is_refused(mask, message):
    with pytest.raises(InputError, match=message):
        colourise(np.array(mask))


def test_unknown_name():
    with pytest.raises(InputError, match="no class 'beard'.*background, ear"):
        CELEBA8.index("beard")
