"""The labelled sets of the kit load as described, and every wrong file, split or k is one clear error."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lagm.core.errors import InputError
from lagm.core.files import asset
from lagm.data.avatars import SEED_RANGES
from lagm.data.demo import SPLITS, Avatars, choose_labelled, stack
from lagm.data.labels import CELEBA8

STYLES = ("big-ears", "toon-head", "micah")
SIZES = {"train": 40, "val": 60, "test": 240}


@pytest.fixture(scope="module")
def sets():
    return {(style, split): Avatars(style, split) for style in STYLES for split in SPLITS}


@pytest.fixture
def folder(tmp_path):
    for name in ("micah.npz", "micah.json"):
        shutil.copy(asset(f"avatars/{name}"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("style", STYLES)
def test_sizes_types_and_ranges(sets, style, split):
    data = sets[style, split]
    assert len(data) == SIZES[split] and data.labels == CELEBA8
    assert (data.classes, data.n_classes, data.palette) == (CELEBA8.classes, 8, CELEBA8.palette)
    images, masks = stack(data)
    assert images.shape == (SIZES[split], 3, 64, 64) and images.dtype == torch.float32
    assert masks.shape == (SIZES[split], 64, 64) and masks.dtype == torch.int64
    assert -1 <= images.min() < -0.85 and 0.85 < images.max() <= 1
    assert set(masks.unique().tolist()) == set(range(8))


def test_items_are_the_bytes_of_the_file():
    with np.load(asset("avatars/toon-head.npz"), allow_pickle=False) as file:
        image_bytes, mask_bytes = file["val_images"][17], file["val_masks"][17]
    image, mask = Avatars("toon-head", "val")[17]
    assert ((image + 1) * 127.5).round().permute(1, 2, 0).byte().numpy().tolist() == image_bytes.tolist()
    assert mask.tolist() == mask_bytes.tolist()


@pytest.mark.parametrize("style", STYLES)
def test_every_picture_has_every_part(sets, style):
    for split in SPLITS:
        _, masks = stack(sets[style, split])
        present = torch.stack([(masks == c).flatten(1).any(1) for c in range(8)])
        assert present.all(), (
            f"{style} {split}: pictures without {[CELEBA8.classes[c] for c in (~present).any(1).nonzero().flatten()]}"
        )


def test_no_face_is_in_two_splits(sets):
    for style in STYLES:
        seeds = [seed for split in SPLITS for seed in sets[style, split].seeds]
        assert len(seeds) == len(set(seeds)) == 340
        pictures = torch.cat([stack(sets[style, split])[0] for split in SPLITS])
        assert len(pictures.flatten(1).unique(dim=0)) == 340
    gan = range(SEED_RANGES["gan"][0], sum(SEED_RANGES["gan"]))
    assert all(data.seeds.stop <= gan.start or data.seeds.start >= gan.stop for data in sets.values())


def test_styles_look_different(sets):
    means = torch.stack([stack(sets[style, "test"])[0].mean(0) for style in STYLES])
    assert torch.cdist(means.flatten(1), means.flatten(1))[torch.triu_indices(3, 3, 1).unbind()].min() > 10


def test_metadata_and_notice_name_author_source_licence_and_changes(sets):
    notice = Path(__file__).parent.parent / "NOTICE"
    text = re.sub(r"\s+", " ", notice.read_text(encoding="utf-8"))
    authors = {"big-ears": "The Visual Team", "toon-head": "Johan Melin", "micah": "Micah Lanier"}
    for style in STYLES:
        art = sets[style, "test"].metadata["artwork"]
        assert art["author"] == authors[style] and art["licence"] == "CC BY 4.0"
        assert art["licence_url"] == "https://creativecommons.org/licenses/by/4.0/"
        for key in ("title", "author", "author_url", "source", "licence_url", "changes"):
            assert art[key] and art[key] in text, f"NOTICE lacks the {key} of {style}"
        assert authors[style] in repr(sets[style, "test"])


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in asset("avatars").iterdir()) < 3_000_000


def test_transforms_and_loader():
    data = Avatars("micah", "train", transforms=lambda image, mask: (image.flip(-1), mask.flip(-1)))
    plain = Avatars("micah", "train")
    assert torch.equal(data[3][0], plain[3][0].flip(-1)) and torch.equal(data[3][1], plain[3][1].flip(-1))
    images, masks = next(iter(DataLoader(plain, batch_size=4)))
    assert torch.equal(images, stack(plain, range(4))[0]) and torch.equal(masks, stack(plain, range(4))[1])


def test_an_item_may_be_changed_without_changing_the_set():
    data = Avatars("micah", "train")
    image, mask = data[0]
    before = image.clone(), mask.clone()
    image.zero_(), mask.fill_(3)
    assert torch.equal(data[0][0], before[0]) and torch.equal(data[0][1], before[1])


def test_stack_takes_any_integers_in_their_order(sets):
    data = sets["micah", "train"]
    images, masks = stack(data, torch.tensor([4, 0]))
    assert torch.equal(images[0], data[4][0]) and torch.equal(masks[1], data[0][1])
    assert torch.equal(stack(data, np.array([4, 0]))[0], images)
    for wrong in ([40], [-1], []):
        with pytest.raises(InputError, match="dataset of 40"):
            stack(data, wrong)


# -- mistakes


def test_wrong_style_or_split():
    with pytest.raises(InputError, match="no avatars of style 'ears'.*big-ears, micah, toon-head"):
        Avatars("ears")
    with pytest.raises(InputError, match="no split 'exam'.*train, val, test"):
        Avatars("micah", "exam")


def test_missing_folder_and_missing_files(folder):
    with pytest.raises(InputError, match="it holds none.*Leave out `root`"):
        Avatars("micah", root=folder / "nowhere")
    (folder / "micah.npz").unlink()
    with pytest.raises(InputError, match="cannot read the val pictures.*micah.npz"):
        Avatars("micah", "val", root=folder)
    (folder / "micah.json").unlink()
    with pytest.raises(InputError, match="no avatars of style 'micah'"):
        Avatars("micah", "val", root=folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_file(folder, keep):
    whole = (folder / "micah.npz").read_bytes()
    (folder / "micah.npz").write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(InputError, match="cannot read the test pictures"):
        Avatars("micah", "test", root=folder)


def test_a_flipped_byte_in_each_array(folder):
    whole = (folder / "micah.npz").read_bytes()
    for split in SPLITS:
        place = whole.index(f"{split}_images.npy".encode()) + 5000
        (folder / "micah.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(InputError):
            Avatars("micah", split, root=folder)


def test_pictures_that_are_not_the_described_ones(folder):
    with np.load(folder / "micah.npz") as file:
        arrays = dict(file)
    arrays["val_masks"] = arrays["val_masks"].copy()
    arrays["val_masks"][0, 0, 0] ^= 1
    np.savez_compressed(folder / "micah.npz", **arrays)
    assert len(Avatars("micah", "test", root=folder)) == 240
    with pytest.raises(InputError, match="is not the file that micah.json beside it describes"):
        Avatars("micah", "val", root=folder)


def test_pickled_arrays_are_refused(folder):
    np.savez(folder / "micah.npz", train_images=np.array([{}], object), train_masks=np.zeros(1))
    with pytest.raises(InputError, match="cannot read the train pictures"):
        Avatars("micah", root=folder)


@pytest.mark.parametrize("damage, message",
                         [("{", "not JSON"), ("[]", "does not describe"), ('{"format": "other"}', "does not describe"),
                          (None, "does not say which classes"),
                                             ("splits", "cannot read the train pictures")])
def test_a_damaged_description(folder, damage, message):
    header = json.loads((folder / "micah.json").read_text(encoding="utf-8"))
    if damage is None or damage == "splits":
        del header["palette" if damage is None else damage]
        damage = json.dumps(header)
    (folder / "micah.json").write_text(damage, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Avatars("micah", root=folder)


# -- the labelled few


def test_choice_is_seeded_nested_and_without_repeats(sets):
    pool = sets["big-ears", "train"]
    for seed in range(10):
        orders = [choose_labelled(pool, k, seed) for k in range(1, len(pool) + 1)]
        assert sorted(orders[-1]) == list(range(40))
        assert all(order == orders[-1][: len(order)] for order in orders)
    assert choose_labelled(pool, 2, 0) == [32, 10]  # fixed for ever: published tables depend on it
    assert all(isinstance(index, int) for index in choose_labelled(pool, 3, np.int64(1)))


def test_choice_is_fair(sets):
    counts = np.bincount([i for seed in range(4000) for i in choose_labelled(sets["big-ears", "train"], 2, seed)],
                         minlength=40)
    assert counts.sum() == 8000 and 140 < counts.min() and counts.max() < 260  # 200 expected, standard deviation 14


@pytest.mark.parametrize("k", [0, -1, 41, True, False, 2.0, "2", None, [2], np.array([1, 2]), float("nan")])
def test_a_wrong_k(sets, k):
    with pytest.raises(InputError, match=r"number of labelled pictures, must be a whole number 1\.\.40"):
        choose_labelled(sets["big-ears", "train"], k, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, True, 0.0, None])
def test_a_wrong_seed(sets, seed):
    with pytest.raises(InputError, match="the seed must be"):
        choose_labelled(sets["big-ears", "train"], 2, seed)
