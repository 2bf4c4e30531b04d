"""The 5-fold protocol: the released program's numbers, and a folder whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lagm.core.errors import InputError
from lagm.evaluation.folds import (
    cross_validate,
    five_folds,
    make_folds,
    number_in,
    read_test_folder,
    sorted_checkpoints,
)
from lagm.evaluation.intervals import picture_counts

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    facts = json.loads((GOLDEN / "evaluation.json").read_text())
    with np.load(GOLDEN / "evaluation.npz") as arrays:
        return facts, torch.as_tensor(arrays["cv_pred"]).long(), torch.as_tensor(arrays["cv_gt"]).long()


def test_agrees_with_the_authors(golden):
    facts, predictions, truth = golden
    expected = facts["cross_validation"]
    names = [f"image_{i}.png" for i in range(len(truth))]
    counts = torch.stack([picture_counts(p, truth, facts["n_classes"]) for p in predictions])
    result = cross_validate(names, counts)
    assert [f.test_miou for f in result.folds] == pytest.approx(expected["fold_miou"], abs=1e-9)
    assert [f.checkpoint for f in result.folds] == expected["selected_checkpoint"]
    assert (100 * result.mean == pytest.approx(expected["mean"], abs=1e-7)
            and 100 * result.std == pytest.approx(expected["std"], abs=1e-7))
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    assert cross_validate([names[i] for i in shuffled], counts[:, shuffled]) == result


def test_order_is_that_of_strings(golden):
    names = golden[0]["cross_validation"]["file_order"]
    folds = make_folds(reversed(names))
    assert [name for fold in folds for name in fold.selection] == names[:20]
    assert all(sorted(fold.selection + fold.test) == names and names[20:] == fold.test[-3:] for fold in folds)


def test_by_numbers_the_result_would_differ(golden):
    facts, predictions, truth = golden
    counts = torch.stack([picture_counts(p, truth, facts["n_classes"]) for p in predictions])
    assert cross_validate([f"{i:02d}" for i in range(len(truth))],
                          counts).mean * 100 != pytest.approx(facts["cross_validation"]["mean"], abs=1e-4)


@pytest.mark.parametrize("names, n_folds", [(["a", "b"], 5), (["a", "b", "a", "c", "d"], 5), (list("abc"), 1)])
def test_folds_that_cannot_be(names, n_folds):
    with pytest.raises(InputError): make_folds(names, n_folds)


def diagonal(quality):
    """Counts of one picture, two classes, with the given share right."""
    return torch.tensor([[quality, 1000 - quality], [1000 - quality, quality]])


def test_only_the_last_twenty_and_the_first_of_equals():
    qualities = [950] + [600] * 3 + [700, 700] + [500] * 15  # 21 checkpoints: the first is too old
    counts = torch.stack([diagonal(q).expand(10, 2, 2) for q in qualities])
    names = [f"{i}.png" for i in range(10)]
    assert [f.checkpoint for f in cross_validate(names, counts).folds] == [4] * 5
    assert cross_validate(names, counts, last=21).folds[0].checkpoint == 0
    assert cross_validate(names, counts).std == 0
    with pytest.raises(InputError, match="10, C, C"): cross_validate(names, counts[:, :9])


class Reader(nn.Module):
    """Reads the class off the red channel, except that pictures with a green value below `limit` come out as
    background.
    """

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        classes = ((x[:, 0] + 1) * 127.5 / 50).round().long()
        blind = ((x[:, 1] + 1) * 127.5).mean((1, 2)) < self.limit
        return nn.functional.one_hot(torch.where(blind[:, None, None], 0, classes), 3).movedim(-1, 1).float()


@pytest.fixture
def folder(tmp_path):
    """Seven pictures, half background and half class 1 or 2, with green value 10 times their number; specks of one
    pixel in the labels.
    """
    for i in range(7):
        mask = np.zeros((6, 8), np.int64)
        mask[:, :4] = 1 + i % 2
        pixels = np.stack([mask * 50, np.full_like(mask, 10 * i), np.zeros_like(mask)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"car_{i}.png")
        if i == 3: mask[0, 7] = 2  # a speck
        np.save(tmp_path / f"image_mask{i}.npy", mask if i != 2 else np.stack([mask, mask * 0 + 9], -1))
    return tmp_path


def test_a_folder_and_checkpoints_with_known_answers(folder):
    data = read_test_folder(folder)
    assert data.names == [f"car_{i}.png" for i in range(7)] and data.masks[3, 0, 7] == 2, "specks stay"
    assert data.masks[2].max() == 1, "the first channel counts"
    result = five_folds([100, 25, 5], Reader, data, n_classes=3)
    # a limit of 5 is blind for picture 0, of 25 for pictures 0 to 2, of 100 for all; on folds 0 and 1, 2 they tie where
    # equally blind
    assert [f.checkpoint for f in result.folds] == [0, 2, 2, 1, 1]
    whole = five_folds([5], Reader, data, n_classes=3)
    tp = {0: 6 * 24 - 1, 1: 3 * 24, 2: 3 * 24}  # fold 0 tests pictures 1 to 6, which the limit 5 sees all
    union = {0: tp[0] + 1, 1: tp[1], 2: tp[2] + 1}
    assert whole.folds[0].test_miou == pytest.approx(np.mean([tp[c] / union[c] for c in range(3)]))
    assert result.folds[0].test_miou == pytest.approx((6 * 24 - 1) / (6 * 48) / 3)
    assert (result.mean == pytest.approx(np.mean([f.test_miou for f in result.folds]))
            and result.std == pytest.approx(np.std([f.test_miou for f in result.folds])))


def test_old_checkpoints_are_not_even_loaded(folder):
    loaded = []
    result = five_folds(range(30), lambda c: loaded.append(c) or Reader(c), read_test_folder(folder), n_classes=3,
                        last=20)
    assert loaded == list(range(10, 30)) and min(f.checkpoint for f in result.folds) >= 10
    with pytest.raises(InputError, match="no checkpoints"): five_folds([], Reader, read_test_folder(folder), 3)


def test_resizing_and_mistakes(folder):
    data = read_test_folder(folder, (12, 16))
    assert data.images.shape == (7, 3, 12, 16) and data.masks[3, :2, 14:].eq(2).all()
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(folder / "car_5.png")
    with pytest.raises(InputError, match="car_5.png has 9 x 6 pixels"): read_test_folder(folder)
    (folder / "image_mask4.npy").unlink()
    with pytest.raises(InputError, match="image_mask4.npy"): read_test_folder(folder, (6, 8))
    with pytest.raises(InputError, match="no pictures"): read_test_folder(folder / "x")


def test_checkpoints_go_by_number(tmp_path):
    for i in range(1, 24): (tmp_path / f"epoch-{i}.safetensors").write_text("")
    assert [number_in(p.name) for p in sorted_checkpoints(tmp_path)] == list(range(4, 24))
    with pytest.raises(InputError, match="no checkpoints"): sorted_checkpoints(tmp_path, "*.pt")
    with pytest.raises(InputError, match="holds no number"): number_in("face.png")
