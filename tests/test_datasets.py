"""Every reader gives the masks and images of the released readers; wrong trees are one clear error."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.celeba import CELEBA_SPLITS, CelebAMaskHQ, celeba_numbers
from lagm.data.cgpart import CGPART_MODELS, CGPartReal, CGPartRendered, choose_subset, short_side_size, synthetic_size
from lagm.data.datasetgan import DatasetGAN, remove_specks
from lagm.data.folder import Folder, save_folder
from lagm.data.images import save_mask
from lagm.data.labels import CELEBA8, IGNORE
from lagm.data.pascal import PascalPart

GOLDEN = Path(__file__).parent / "golden" / "datasets"
ROOT = GOLDEN / "data"
EXPECTED = np.load(GOLDEN / "datasets_expected.npz")


@pytest.fixture
def tree(tmp_path):
    """A copy of the stand-ins that may be damaged."""
    shutil.copytree(ROOT, tmp_path / "data")
    return tmp_path / "data"


def check(dataset, mask_key, image_key):
    n = sum(1 for key in EXPECTED if key.startswith(f"{mask_key}.") and key.endswith(".seg")
            and key.count(".") == mask_key.count(".") + 2)
    assert len(dataset) == n > 0
    for i, (image, mask) in enumerate(dataset[j] for j in range(n)):
        assert image.dtype == torch.float32 and mask.dtype == torch.int64 and image.is_contiguous()
        assert np.array_equal(mask, EXPECTED[f"{mask_key}.{i}.seg"])
        assert np.array_equal(image.numpy().astype(np.float16), EXPECTED[f"{image_key}.{i}.img"])
        assert mask.max() < dataset.n_classes == len(dataset.classes) == len(dataset.palette)


@pytest.mark.parametrize("labels", ["celebA_8", "celebA_19"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_celeba(split, labels):
    check(CelebAMaskHQ(ROOT, split, labels, (40, 40)), f"celeba.{split}.{labels[7:]}", f"celeba.{split}")


@pytest.mark.parametrize("name,labels", [("car", None), ("cat", None), ("face", None), ("face", "celebA_8")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_datasetgan(name, split, labels):
    check(DatasetGAN(ROOT, name, split, labels, (44, 36)), f"datasetgan.{name}.{split}.{'8' if labels else 'full'}",
          f"datasetgan.{name}.{split}")


@pytest.mark.parametrize("labels", [None, "CGPart_car_simplified_v0", "CGPart_car_simplified_v1"])
def test_cgpart(labels):
    check(CGPartRendered(ROOT, labels=labels, size=(64, 48)), f"cgpart_render.{labels}", "cgpart_render")
    check(CGPartReal(ROOT, labels=labels, short_side=48), f"cgpart_real.{labels}", "cgpart_real")


@pytest.mark.parametrize("make", [lambda **k: CelebAMaskHQ(ROOT, **k), lambda **k: DatasetGAN(ROOT, **k),
                                  lambda **k: CGPartRendered(ROOT, **k), lambda **k: CGPartReal(ROOT, **k)])
def test_transforms_and_indices(make):
    plain, flipped = make(), make(transforms=lambda image, mask: (image.flip(-1), mask.flip(-1)))
    assert torch.equal(flipped[0][0], plain[0][0].flip(-1)) and torch.equal(flipped[0][1], plain[0][1].flip(-1))
    assert torch.equal(plain[-1][1], plain[len(plain) - 1][1])
    with pytest.raises(IndexError): plain[len(plain)]
    assert all(path.is_file() for i in range(len(plain)) for path in plain.sources(i))
    assert "datapoints" in repr(plain)


# ---- CelebAMask-HQ


def test_celeba_official_splits(tmp_path):
    assert [(split, len(celeba_numbers(tmp_path, split)), celeba_numbers(tmp_path, split)[0])
            for split in CELEBA_SPLITS] == [("train", 1500, "28000"), ("val", 500, "27500"), ("test", 500, "29500"),
                                            ("unlabelled", 28000, "0")]


def test_celeba_later_parts_cover_earlier_ones_and_any_channel_counts(tree):
    parts = tree / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno" / "0"
    for path in parts.glob("00007_*"): path.unlink()
    blue = np.zeros((512, 512, 3), np.uint8)
    blue[100:300, 100:300, 2] = 1
    Image.fromarray(blue).save(parts / "00007_skin.png")
    grey = np.zeros((512, 512), np.uint8)
    grey[200:400, 200:400] = 255
    Image.fromarray(grey).save(parts / "00007_nose.png")
    mask = CelebAMaskHQ(tree, "train", "celebA_19", size=None, k=1)[0][1]
    assert mask.shape == (512, 512) and (mask == 1).sum() == 200 * 200 - 100 * 100 and (mask == 2).sum() == 200 * 200


def test_celeba_unlabelled(tree):
    (tree / "celeba_split" / "unlabelled.txt").write_text("2003\n")
    data = CelebAMaskHQ(tree, "unlabelled", size=(32, 32))
    assert (data[0][1] == IGNORE).all() and len(data.sources(0)) == 1


def test_celeba_errors(tree):
    with pytest.raises(InputError, match=r"(?s)Expected layout.*CelebA-HQ-img.*Ask for"): CelebAMaskHQ(tree / "none")
    with pytest.raises(InputError, match="27997 of 28000"): CelebAMaskHQ(tree, "unlabelled")
    with pytest.raises(InputError, match="give 1 to 2"): CelebAMaskHQ(tree, k=3)
    (tree / "celeba_split" / "val.txt").write_text("seven\n")
    with pytest.raises(InputError, match="one picture number a line"): CelebAMaskHQ(tree, "val")
    for path in (tree / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno" / "0").glob("00007_*"): path.unlink()
    with pytest.raises(InputError, match="face 7 has no part masks"): CelebAMaskHQ(tree)[0]
    Image.new("RGB", (96, 60)).save(tree / "CelebAMask-HQ" / "CelebA-HQ-img" / "0.jpg")
    with pytest.raises(InputError, match="must show the same"): CelebAMaskHQ(tree)[1]


# ---- DatasetGAN


def test_specks():
    mask = np.zeros((40, 40), np.uint8)
    mask[0, :29], mask[1, :30], mask[2, :29], mask[3, :29] = 1, 2, 49, 50
    assert np.unique(remove_specks(mask)).tolist() == [0, 2, 50]


def test_datasetgan_planes_numbers_and_raw_masks(tree):
    folder = tree / "DatasetGAN" / "annotation" / "training_data" / "cat_processed"
    plain, raw = DatasetGAN(tree, "cat"), DatasetGAN(tree, "cat", clean=False, size=None)
    assert plain.names == ["image_0.png", "image_1.png", "image_2.png", "image_10.png"]
    first = np.load(folder / "image_mask0.npy")
    assert np.array_equal(raw[0][1], first)
    np.save(folder / "image_mask0.npy", np.stack([first, first * 0, first * 0], -1).astype(np.int64))
    assert torch.equal(DatasetGAN(tree, "cat")[0][1], plain[0][1])
    np.save(folder / "image_mask0.npy", first[None].astype(np.float64))
    assert torch.equal(DatasetGAN(tree, "cat")[0][1], plain[0][1])
    Image.open(folder / "image_1.png").save(folder / "face_1.jpeg", quality=100)
    with pytest.raises(InputError, match="same number"): DatasetGAN(tree, "cat")


def test_datasetgan_errors(tree):
    folder = tree / "DatasetGAN" / "annotation" / "training_data" / "car_processed"
    with pytest.raises(InputError, match=r"(?s)Expected layout:.*car_processed.*datasetGAN_release"):
        DatasetGAN(tree / "x", "car")
    np.save(folder / "image_mask0.npy", np.full((48, 64), 20))
    with pytest.raises(InputError, match="value 20"): DatasetGAN(tree, "car")[0]
    np.save(folder / "image_mask0.npy", np.zeros((64, 48)))
    with pytest.raises(InputError, match="must show the same"): DatasetGAN(tree, "car")[0]
    (folder / "image_mask0.npy").write_bytes(b"<html>")
    with pytest.raises(InputError, match="a web page"): DatasetGAN(tree, "car")[0]
    np.save(folder / "image_mask0.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable numpy array"): DatasetGAN(tree, "car")[0]
    (folder / "image_0.png").unlink()
    with pytest.raises(InputError, match="no image for mask image_mask0.npy"): DatasetGAN(tree, "car")


# ---- CGPart


def test_cgpart_subsets_are_seeded_and_recorded():
    data = CGPartRendered(ROOT, length=3, seed=5)
    everything = CGPartRendered(ROOT)
    assert data.names == [everything.names[i] for i in data.chosen] and len(set(data.chosen)) == 3
    assert CGPartRendered(ROOT, length=3, seed=5).chosen == data.chosen
    assert len({tuple(choose_subset(100, 10, seed)) for seed in range(20)}) == 20
    with pytest.raises(InputError, match="cannot choose 5 of 4"): CGPartRendered(ROOT, length=5)


def test_cgpart_models_and_sizes():
    assert CGPartRendered(ROOT, models=["minivan", "sedan"]).names == CGPartRendered(ROOT).names
    assert {len(models) for models in CGPART_MODELS.values()} == {5, 4}
    with pytest.raises(InputError, match=CGPART_MODELS["car"]["wagon"]): CGPartRendered(ROOT, models=["wagon"])
    assert ([short_side_size(size, 192) for size in ((400, 300), (300, 400), (299, 299), (500, 333))]
            == [(256, 192), (192, 256), (192, 192), (288, 192)])
    assert (synthetic_size((256, 192)) == (256, 192)
            and synthetic_size((256, 192), "released-transposed-size") == (192, 256))


def test_cgpart_errors(tree):
    for make, command in ((CGPartRendered, "lagm fetch cgpart-rendered-cars"), (CGPartReal, "lagm fetch cgpart-real")):
        with pytest.raises(InputError, match=command): make(tree / "x")
    with pytest.raises(InputError, match="use one of CGPart_car, CGPart_car_simplified_v0"):
        CGPartReal(tree, labels="celebA_8")
    with pytest.raises(InputError, match="train pictures"): CGPartReal(tree, split="train")
    path = CGPartReal(tree).sources(0)[1]
    Image.fromarray(np.full((50, 70), 32, np.uint8)).save(path)
    with pytest.raises(InputError, match="value 32"): CGPartReal(tree)[0]
    Image.fromarray(np.zeros((50, 71), np.uint8)).save(path)
    with pytest.raises(InputError, match="71 x 50"): CGPartReal(tree)[0]


def test_pascal_errors(tmp_path):
    with pytest.raises(InputError, match="lagm prepare pascal --voc VOC2010 --object aeroplane"):
        PascalPart(tmp_path, "aeroplane")
    with pytest.raises(InputError, match="no split 'trainval'"): PascalPart(tmp_path, "horse", "trainval")


# ---- folders


@pytest.fixture
def folder(tmp_path):
    images = torch.randint(0, 256, (3, 3, 20, 30)).float() / 127.5 - 1
    masks = torch.randint(0, 8, (3, 20, 30))
    masks[0, 0] = IGNORE
    return save_folder(tmp_path / "mine", ["b", "a", "c"], images, masks, CELEBA8), images, masks


def test_folder_round_trip(folder):
    root, images, masks = folder
    data = Folder(root)
    assert data.names == ["a", "b", "c"] and data.classes == CELEBA8.classes and data.palette == CELEBA8.palette
    for i, j in enumerate((1, 0, 2)): assert torch.equal(data[i][0], images[j]) and torch.equal(data[i][1], masks[j])


def test_folder_lists_and_unlabelled(folder):
    root, _, masks = folder
    (root / "masks" / "c.png").unlink()
    (root / "val.txt").write_text("b.jpg\n\na\n")
    assert (Folder(root).names == ["a", "b"] and Folder(root, "unlabelled").names == ["c"]
            and Folder(root, "val").names == ["b", "a"])
    assert (Folder(root, "unlabelled", size=(8, 8))[0][1] == IGNORE).all()
    (root / "val.txt").write_text("c\n")
    with pytest.raises(InputError, match="lists c, which has no mask"): Folder(root, "val")


def test_folder_turned_pictures(folder):
    root, images, masks = folder
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(root / "images" / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(root / "images" / "a.png", exif=exif)  # stored sideways
    # mask drawn upright
    assert torch.equal(Folder(root)[0][0], images[1]) and torch.equal(Folder(root)[0][1], masks[1])
    save_mask(root / "masks" / "a.png", np.rot90(masks[1].numpy()), CELEBA8)  # mask drawn sideways
    assert torch.equal(Folder(root)[0][1], masks[1])


@pytest.mark.parametrize("change,words", [
    (lambda root: (root / "classes.txt").unlink(), "list of classes"),
    (lambda root: (root / "classes.txt").write_text("\n"), "names no class"),
    (lambda root: (root / "classes.txt").write_text("a\na\n"), "repeats the class 'a'"),
    (lambda root: shutil.rmtree(root / "masks"), "there is no folder"),
    (lambda root: (root / "images" / "a.png").unlink(), "have no image of the same name"),
    (lambda root: shutil.copy(root / "images" / "a.png", root / "images" / "a.jpg"), "share one mask"),
    (lambda root: [path.unlink() for path in (root / "masks").iterdir()], "no labelled pictures")])
def test_folder_errors(folder, change, words):
    change(folder[0])
    with pytest.raises(InputError, match=words): Folder(folder[0])


def test_folder_a_short_list_of_classes(folder):
    (folder[0] / "classes.txt").write_text("background\near\n")
    with pytest.raises(InputError, match=r"a\.png holds the value"): Folder(folder[0])[0]
