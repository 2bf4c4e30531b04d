"""Inputs of other programs that were read without a word, or in a time that grows with the square of their number."""
import json
import os
import warnings

import numpy as np
import official_files
import pytest
import torch
from PIL import Image

from lagm.core import files as core_files
from lagm.core.errors import InputError
from lagm.core.files import atomic_path
from lagm.data.folder import Folder
from lagm.data.label_studio import import_label_studio
from lagm.data.prepare_pascal import listed
from lagm.generators.load import read_generator
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.weights import check_names
from lagm.training.recipe import get_recipe


def test_writing_many_files_looks_at_few_names(tmp_path, monkeypatch):
    """The names that are looked at, for leftovers, grow with the number of files, not with its square."""
    seen, listdir = [0], os.listdir
    monkeypatch.setattr(core_files, "_flush_to_disk", lambda path: None)

    def counted(folder):
        names = listdir(folder)
        seen[0] += len(names)
        return names

    monkeypatch.setattr(core_files.os, "listdir", counted)
    looked = {}
    for n in (250, 1000):
        seen[0] = 0
        for i in range(n):
            with atomic_path(tmp_path / str(n) / f"{i}.txt") as temporary: temporary.write_text("x")
        looked[n] = seen[0]
    assert looked[1000] < 6 * looked[250] and looked[1000] < 20 * 1000


def folder_of(root, masks, classes="background\nthing\n"):
    for sub in ("images", "masks"): (root / sub).mkdir(parents=True)
    for name, value in masks.items():
        mask = np.zeros((8, 10), np.uint8)
        mask[2:4, 3:6] = value
        Image.new("RGB", (10, 8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "classes.txt").write_text(classes)
    return Folder(root)


@pytest.mark.parametrize(("masks", "suspect"), [
    ({"a": 1, "b": 255}, "b.png"), ({"a": 255, "b": 1}, "a.png"), ({"a": 1, "b": 1}, None)])
def test_one_mask_saved_as_0_and_255_among_right_ones(tmp_path, masks, suspect):
    data = folder_of(tmp_path, masks)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(len(data)): data[i]
    assert [f"{suspect} holds only 0 and 255" in str(w.message) for w in told] == ([True] if suspect else [])


def test_a_warning_of_255_is_given_once(tmp_path):
    data = folder_of(tmp_path, {"a": 1, "b": 255, "c": 255})
    with pytest.warns(UserWarning, match="b.png holds only 0 and 255") as told:
        for i in (0, 1, 2, 1): data[i]
    assert len(told) == 1


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, 2**63, "1e300"], ids=list("abcde"))
def test_numbers_beyond_64_bits_are_refused(value):
    for name in ("steps", "lr_annotator") if value != "1e300" else ("steps",):
        with pytest.raises(InputError, match=f"{name} is a number of more than 18"): get_recipe("fast", **{name: value})


@pytest.mark.parametrize("line", ["2008_000003", "2008_000003 yes", "2008_000003 1 1"])
def test_a_line_of_a_voc_list_is_not_lost(tmp_path, line):
    path = tmp_path / "ImageSets" / "Main" / "horse_train.txt"
    path.parent.mkdir(parents=True)
    path.write_text("2008_000001  1\n2008_000002  0\n2008_000004 -1\n")
    assert listed(tmp_path, "horse", "train") == ["2008_000001"]
    path.write_text(f"2008_000001  1\n{line}\n")
    with pytest.raises(InputError, match=f"has the line '{line}'"): listed(tmp_path, "horse", "train")


def test_a_picture_turned_in_label_studio_is_refused_whichever_result_says_so(tmp_path):
    shape = {"type": "polygonlabels", "original_width": 10, "original_height": 8,
             "value": {"points": [[0, 0], [50, 0], [50, 50]], "polygonlabels": ["leg"]}}
    turned = {"type": "choices", "image_rotation": 90, "value": {"choices": ["good"]}}
    (tmp_path / "in").mkdir()
    for name in "ab": Image.new("RGB", (10, 8)).save(tmp_path / "in" / f"{name}.png")
    tasks = [{"id": i, "data": {"image": f"{name}.png"}, "annotations": [{"result": results}]}
             for i, (name, results) in enumerate((("a", [shape, turned]), ("b", [shape])), 1)]
    (tmp_path / "x.json").write_text(json.dumps(tasks))
    done = import_label_studio(tmp_path / "x.json", tmp_path / "in", tmp_path / "out")
    assert done.names == ["b"] and "image_rotation 90" in done.skipped["task 1"]


def test_a_shape_of_a_thousand_sides_makes_no_long_message():
    with pytest.raises(InputError, match=r"wrong shapes: weight \(1, 1, 1.*… instead of \(2, 3\)") as error:
        check_names("x.safetensors", torch.nn.Linear(3, 2, bias=False), {"weight": (1,) * 1000})
    assert len(str(error.value)) < 400


def test_a_generator_without_its_average_is_no_classifier(tmp_path):
    weights = official_files.rosinality_state(StyleGAN2(16, 16, 16, 3, 2, 64, 16))
    torch.save({"g": weights, "d": {"convs.0.0.weight": torch.zeros(2, 3, 1, 1)}}, tmp_path / "g.pt")
    with pytest.raises(InputError, match="without its running average"): read_generator(tmp_path / "g.pt")
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="mean style"): read_generator(tmp_path / "weights.pt")
