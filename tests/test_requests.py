"""Requests that cannot be met are refused in a sentence before anything is computed, and warnings are one line."""

import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lagm import cli
from lagm.cli import main
from lagm.core.errors import InputError
from lagm.data.coco import import_coco
from lagm.data.folder import Folder
from lagm.data.labels import LabelSet
from lagm.evaluation.prediction import predict_folder

LABELS = LabelSet("two", ("background", "thing"), ((0, 0, 0), (255, 0, 0)))


class Never(nn.Module):
    """A segmenter that must not be asked."""
    n_classes = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor: raise AssertionError("it was asked")


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


@pytest.mark.parametrize(("request_", "words"), [
    (dict(size=(1_000_000, 1_000_000)), "1000000 x 1000000"), (dict(size=(0, 5)), "size is 0 x 5"),
    (dict(size=(8, 8), batch=0), "batch is 0"),
])
def test_a_prediction_that_cannot_be(pictures, request_, words):
    with pytest.raises(InputError, match=words):
        predict_folder(Never(), pictures, pictures.parent / "out", LABELS, progress=False, **request_)
    assert not (pictures.parent / "out").exists()


def test_masks_beside_pictures_are_not_taken_for_pictures(tmp_path):
    for sub in ("images", "masks"): (tmp_path / "set" / sub).mkdir(parents=True)
    (tmp_path / "set" / "classes.txt").write_text("background\nthing\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "images" / "a.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 1
    Image.fromarray(mask).save(tmp_path / "set" / "masks" / "a.png")
    assert len(Folder(tmp_path / "set")) == 1
    with pytest.raises(InputError, match="set/images"):
        predict_folder(Never(), tmp_path / "set", tmp_path / "out", LABELS, (8, 8), progress=False)


def test_an_import_does_not_mix_with_its_pictures(pictures, tmp_path):
    (tmp_path / "x.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}')
    with pytest.raises(InputError, match="folder of the pictures"):
        import_coco(tmp_path / "x.json", pictures, tmp_path / "in" / ".." / "in")
    assert [path.name for path in pictures.iterdir()] == ["a.png"]


@pytest.mark.parametrize("words", [["run", "quickstart", "--jobs", "0"], ["run", "quickstart", "--jobs", "-1"],
                                   ["predict", "s", "in", "-o", "out", "--batch", "0"],
                                   ["prepare", "pascal", "--workers", "two"]])
def test_counts_of_the_command_line(words, capsys):
    with pytest.raises(SystemExit) as ended: main(words)
    assert ended.value.code == 2 and "whole number of 1 or more" in capsys.readouterr().err


def test_a_warning_is_one_line(monkeypatch, capfd):
    def warn(arguments):
        warnings.warn("the file lacks its mean style", stacklevel=1)

    before = warnings.formatwarning
    monkeypatch.setattr(cli, "list_command", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning",
                            lambda m, c, f, n, file=None, line=None: sys.stderr.write(warnings.formatwarning(m, c, f, n,
                                                                                                             line)))
        assert main(["list"]) == 0
    assert (capfd.readouterr().err == "lagm: warning: the file lacks its mean style\n"
            and warnings.formatwarning is before)
