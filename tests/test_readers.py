"""One answer from all that read: pixels, names, lists and masks, whatever program and system they come from."""

import os
import sys
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.cache import Cached
from lagm.data.celeba import CelebAMaskHQ, celeba_numbers
from lagm.data.datasetgan import DatasetGAN, read_array_mask
from lagm.data.folder import Folder, read_classes
from lagm.data.images import by_name, list_files, read_image, read_pair, save_mask
from lagm.data.labels import LabelSet
from lagm.data.pascal import PascalPart
from lagm.data.pascal_boxes import crowded, overlap, usable_boxes
from lagm.data.prepare_pascal import listed
from lagm.evaluation.folds import read_test_folder
from lagm.evaluation.prediction import list_pictures, predict_folder
from lagm.experiments.stages import read_labelled

TWO = LabelSet("two", ("background", "thing"), ((0, 0, 0), (255, 0, 0)))
MASK = np.zeros((8, 12), np.uint8)
MASK[2:5, 3:9] = 1


class Spy(torch.nn.Module):
    """Notes what it is shown."""
    n_classes = 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen += list(x)
        return torch.cat([-x.mean(1, True), x.mean(1, True)], 1)


def seen_in_prediction(folder, out):
    spy = Spy()
    result = predict_folder(spy, folder, out, TWO, None, "native", batch=1, progress=False)
    assert not result.failed
    return spy.seen


def pixels(seed=0):
    return np.random.RandomState(seed).randint(0, 255, (8, 12, 3), np.uint8)


def own_folder(root, names=("a.png",), masks=True):
    for below in ("images", "masks"): (root / below).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(pixels()).save(root / "images" / name)
        if masks: save_mask(root / "masks" / f"{name.rpartition('.')[0]}.png", MASK)
    (root / "classes.txt").write_text("background\nthing\n")
    return root


# ---- the same pixels everywhere


def transparent(mode):
    picture = Image.fromarray(np.dstack([pixels(), np.tile([0, 255, 128], (8, 4)).astype(np.uint8)]), "RGBA")
    return picture if mode == "RGBA" else picture.convert("LA") if mode == "LA" else picture.convert("RGB").quantize(8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_transparent_picture_looks_the_same_everywhere(tmp_path, mode):
    picture, options = transparent(mode), {"transparency": 3} if mode == "P" else {}
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0).float() / 127.5 - 1
    root = own_folder(tmp_path / "mine")
    picture.save(root / "images" / "a.png", **options)
    assert Folder(root)[0][0].equal(expected) and Cached(Folder(root), tmp_path / "cache")[0][0].equal(expected)
    assert seen_in_prediction(root / "images", tmp_path / "out")[0].equal(expected)
    (tmp_path / "folds").mkdir()
    picture.save(tmp_path / "folds" / "image_0.png", **options)
    np.save(tmp_path / "folds" / "image_mask0.npy", MASK)
    assert read_test_folder(tmp_path / "folds").images[0].equal(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_looks_the_same_everywhere(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("mine/images", "mine/masks", "DatasetGAN/annotation/training_data/car_processed"):
        (tmp_path / folder).mkdir(parents=True)
    stored = Image.fromarray(pixels())
    stored.save(tmp_path / "mine/images/a.png", exif=exif)
    gan = tmp_path / "DatasetGAN/annotation/training_data/car_processed"
    stored.save(gan / "image_0.png", exif=exif)
    np.save(gan / "image_mask0.npy", MASK)
    expected = np.asarray(read_image(gan / "image_0.png", upright=True))
    along = {1: MASK, 2: MASK[:, ::-1], 3: MASK[::-1, ::-1], 4: MASK[::-1], 5: MASK.T, 6: np.rot90(MASK, -1),
             7: MASK[::-1, ::-1].T, 8: np.rot90(MASK)}[orientation]
    tensor = torch.from_numpy(expected.copy()).movedim(-1, 0).float() / 127.5 - 1
    folds, trained = read_test_folder(gan), DatasetGAN(tmp_path, "car", size=None, clean=False)[0]
    for image, mask in ((folds.images[0], folds.masks[0]), trained):  # published masks belong to the stored pixels
        assert image.equal(tensor) and np.array_equal(mask, along)
    (tmp_path / "mine/classes.txt").write_text("background\nthing\n")
    save_mask(tmp_path / "mine/masks/a.png", along)  # the user drew on what a viewer shows
    image, mask = Folder(tmp_path / "mine")[0]
    assert image.equal(tensor) and np.array_equal(mask, along)
    assert seen_in_prediction(tmp_path / "mine/images", tmp_path / "out")[0].equal(tensor)
    if orientation > 4:  # or on the stored pixels: the size tells
        save_mask(tmp_path / "mine/masks/a.png", MASK)
        assert np.array_equal(Folder(tmp_path / "mine")[0][1], along)


def test_a_mask_of_another_shape_is_refused(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="its mask is 8 x 8 pixels"):
        read_pair(tmp_path / "a.png", np.zeros((8, 8), np.uint8), "its mask")


# ---- two classes as 0 and 255, and classes that nobody shows


def test_all_of_a_class_as_255_is_an_error(tmp_path):
    root = own_folder(tmp_path, ("a.png", "b.png"))
    for name in "ab": Image.fromarray(MASK * 255).save(root / "masks" / f"{name}.png")
    for _ in range(2):
        with pytest.raises(InputError,
                           match=r"hold only 0 and 255, and 255 means 'no label': thing never occurs.*save the masks "
                                 r"with 1"):
            Folder(root)[1]
    save_mask(root / "masks" / "b.png", MASK)  # now 255 in the other mask is what it means
    assert Folder(root)[0][1].unique().tolist() == [0, 255] and Folder(root)[1][1].unique().tolist() == [0, 1]
    (root / "masks" / "b.png").write_bytes(b"")
    with pytest.raises(InputError, match="only 0 and 255"): Folder(root)[0]


def test_one_bit_masks_are_two_classes(tmp_path):
    root = own_folder(tmp_path)
    Image.fromarray(MASK * 255).convert("1").save(root / "masks" / "a.png")
    assert np.array_equal(Folder(root)[0][1], MASK)


def told(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in found]


def test_classes_that_no_labelled_picture_shows_are_named_once(tmp_path):
    root = own_folder(tmp_path, ("a.png", "b.png"))
    (root / "classes.txt").write_text("background\nthing\nleg\ntail\n")
    data = Folder(root)
    assert told(lambda: data[0]) == []
    assert told(lambda: [data[0], data[1], data[1],
                         data[0]]) == [f"no labelled picture of {root} shows leg, tail: nothing can be learnt about "
                                       "them"]
    assert told(lambda: Folder(root, "unlabelled") if (root / "masks" / "a.png").unlink()
                else [Folder(root, "unlabelled")[0]]) == []
    assert len(told(lambda: read_labelled("folder", 0, data=root, size=(8, 8)))) == 1
    assert told(lambda: read_labelled("avatars:big-ears", 1, size=(16, 16))) == []


# ---- names


NFC, NFD = (unicodedata.normalize(form, "Zoë é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("picture, mask, line", [(NFC, NFD, NFC), (NFD, NFC, NFC), (NFD, NFD, NFC), (NFC, NFC, NFD)])
def test_names_that_look_the_same_are_the_same(tmp_path, picture, mask, line):
    root = own_folder(tmp_path / "mine", ())
    Image.fromarray(pixels()).save(root / "images" / f"{picture}.JPG")
    save_mask(root / "masks" / f"{mask}.PNG", MASK)
    (root / "few.txt").write_bytes(b"\xef\xbb\xbf\r\n" + f"{line}.jpg \r\n".encode())
    assert np.array_equal(Folder(root)[0][1], MASK) and Folder(root, "few").names == [NFC]
    assert len(Folder(root, "unlabelled")) == 0


def test_two_names_that_look_the_same(tmp_path):
    if sys.platform == "darwin": pytest.skip("the file system takes them for one")
    for name in (NFC, NFD): Image.fromarray(pixels()).save(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match="how their letters are coded"): list_pictures(tmp_path)
    root = own_folder(tmp_path / "mine", ())
    for name in (NFC, NFD): Image.fromarray(pixels()).save(root / "images" / f"{name}.png")
    with pytest.raises(InputError, match="would share one mask"): Folder(root)


def test_leftovers_of_other_programs_are_no_pictures(tmp_path):
    root = own_folder(tmp_path / "mine")
    for below in ("images", "masks"):
        for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (root / below / name).write_bytes(b"\0\5\26\7")
    assert Folder(root).names == ["a"] and len(list_pictures(root / "images")) == 1
    gan = tmp_path / "gan"
    gan.mkdir()
    for name in ("._image_1.png", "._image_mask1.npy", "Thumbs.db"): (gan / name).write_bytes(b"\0\5\26\7")
    Image.fromarray(pixels()).save(gan / "image_1.PNG")
    np.save(gan / "image_mask1.npy", MASK)
    assert read_test_folder(gan).names == ["image_1.PNG"]


def test_two_masks_for_one_picture(tmp_path):
    root = own_folder(tmp_path / "mine")
    Image.fromarray(MASK).save(root / "masks" / "a.tif")
    with pytest.raises(InputError, match="two masks of one name, 'a.png' and 'a.tif'"): Folder(root)
    (root / "masks" / "a.tif").unlink()
    Image.fromarray(MASK).save(root / "masks" / "a.jpg")  # a preview beside the true mask
    assert np.array_equal(Folder(root)[0][1], MASK)
    (root / "masks" / "a.png").unlink()
    with pytest.raises(InputError, match="a.jpg is in a format that may change the numbers"): Folder(root)


@pytest.mark.parametrize("extra, words", [("image_mask01.npy", "have the same number"),
                                          ("photo_1.jpg", "have the same number"),
                                          ("image_mask7.npy", "no picture for the label image_mask7"),
                                          ("image_8.bmp", "no label file, such as image_mask8")])
def test_folds_pair_each_with_one(tmp_path, extra, words):
    Image.fromarray(pixels()).save(tmp_path / "image_1.png")
    np.save(tmp_path / "image_mask1.npy", MASK)
    assert len(read_test_folder(tmp_path).names) == 1
    if extra.endswith("npy"): np.save(tmp_path / extra, MASK)
    else: Image.fromarray(pixels()).save(tmp_path / extra)
    with pytest.raises(InputError, match=words): read_test_folder(tmp_path)


def test_pictures_in_folders_below(tmp_path):
    root = own_folder(tmp_path / "mine")
    for below, value in (("x", 0), ("y", 1)):
        for kind, array in (("images", pixels(value)), ("masks", MASK * value)):
            (root / kind / below).mkdir()
            Image.fromarray(array).save(root / kind / below / "a.png")
    (root / "few.txt").write_text("y/a.png\nx\\a\n")
    data = Folder(root)
    assert data.names == ["a", "x/a", "y/a"] and data[1][1].max() == 0 and np.array_equal(data[2][1], MASK)
    assert Folder(root, "few").names == ["y/a", "x/a"]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_linked_folders_are_read_once(tmp_path):
    for folder in ("in/real", "disk2/deep"): (tmp_path / folder).mkdir(parents=True)
    for name in ("in/real/a.png", "disk2/b.png", "disk2/deep/c.JPG"): Image.fromarray(pixels()).save(tmp_path / name)
    (tmp_path / "in/link").symlink_to(tmp_path / "disk2")
    below = lambda: [p.relative_to(tmp_path / "in").as_posix() for p in list_pictures(tmp_path / "in")]
    assert below() == ["link/b.png", "link/deep/c.JPG", "real/a.png"]
    (tmp_path / "in/a_loop").symlink_to(tmp_path / "in")
    (tmp_path / "disk2/deep/up").symlink_to("..")
    (tmp_path / "in/again").symlink_to("real")
    assert [line.split(",")[0] for line in told(lambda: below())] == ["3 links lead to folders that are read already"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert below() == ["link/b.png", "link/deep/c.JPG", "real/a.png"]
        with pytest.raises(InputError, match="lies in the folder of the pictures"):
            predict_folder(Spy(), tmp_path / "in", tmp_path / "disk2/out", TWO, progress=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").symlink_to(tmp_path / "gone.png")
    assert "there is no picture" in predict_folder(Spy(), tmp_path / "broken", tmp_path / "out", TWO, None, "native",
                                                   progress=False).failed["a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_names_that_are_no_text_do_not_stop_the_others(tmp_path):
    for name in (b"a.png", b"\xff.png"):
        Image.fromarray(pixels()).save(open(os.fsencode(tmp_path) + b"/" + name, "wb"), "PNG")
    result = predict_folder(Spy(), tmp_path, tmp_path.parent / "out", TWO, None, "native", progress=False)
    assert result.done == ["a.png"] and "not in UTF-8" in str(result) and str(result).isascii()


# ---- lists


@pytest.mark.parametrize("start, end", [("\ufeff", "\r\n"), ("", "\r"), ("\ufeff\n", " \n\n")])
def test_lists_of_any_system(tmp_path, start, end):
    def write(name, *lines):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((start + end.join(lines) + end).encode())
        return tmp_path / name
    write("celeba_split/train.txt", "23", "28000")
    assert celeba_numbers(tmp_path, "train") == ["23", "28000"]
    write("voc/ImageSets/Main/horse_train.txt", "2008_000001  1", "2008_000002 -1", "2008_000003  1")
    assert listed(tmp_path / "voc", "horse", "train") == ["2008_000001", "2008_000003"]
    assert read_classes(write("classes.txt", "ground\t#010203", "roof\t#ff0000")).palette == ((1, 2, 3), (255, 0, 0))
    (tmp_path / "PascalPart/horse/train/CroppedSegmentation").mkdir(parents=True)
    write("PascalPart/horse/train/train_set.txt", "2008_000001_0")
    assert PascalPart(tmp_path, "horse").names == ["2008_000001_0"]


@pytest.mark.parametrize("line", ["9" * 5000, "12\x1b[31m", "../1", "-3", "1.0"])
def test_celeba_lists_hold_numbers(tmp_path, line):
    (tmp_path / "celeba_split").mkdir()
    (tmp_path / "celeba_split" / "val.txt").write_text(f"7\n{line}\n")
    with pytest.raises(InputError, match="one picture number a line") as caught: celeba_numbers(tmp_path, "val")
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_names_in_lists_stay_in_their_folder(tmp_path):
    (tmp_path / "PascalPart/horse/train/CroppedSegmentation").mkdir(parents=True)
    (tmp_path / "PascalPart/horse/train/train_set.txt").write_text("../../../x\n")
    with pytest.raises(InputError, match="leads out of the folder"): PascalPart(tmp_path, "horse")


def test_unlabelled_faces_are_upright_too(tmp_path):
    for below in ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno/0"):
        (tmp_path / "CelebAMask-HQ" / below).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.kron(pixels(), np.ones((8, 8, 1), np.uint8))).save(
        tmp_path / "CelebAMask-HQ/CelebA-HQ-img/7.jpg", exif=exif
    )
    (tmp_path / "celeba_split").mkdir()
    for split in ("unlabelled", "train"): (tmp_path / "celeba_split" / f"{split}.txt").write_text("7\n")
    Image.fromarray(np.tile([0, 255], (4, 3)).astype(np.uint8)).save(
        tmp_path / "CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/00007_skin.png"
    )
    labelled, unlabelled = (CelebAMaskHQ(tmp_path, split, size=None)[0] for split in ("train", "unlabelled"))
    expected = np.asarray(read_image(tmp_path / "CelebAMask-HQ/CelebA-HQ-img/7.jpg",
                                     upright=True).resize((6, 4), Image.Resampling.BICUBIC))
    assert (np.array_equal(((labelled[0] + 1) * 127.5).round().byte().movedim(0, -1), expected)
            and unlabelled[0].shape == (3, 64, 96))
    assert (labelled[1][:, 0] > 0).all() and (labelled[1][:, 1] == 0).all()  # turned with the picture


def test_an_archive_is_no_mask(tmp_path):
    np.savez(tmp_path / "a.npz", MASK)
    with pytest.raises(InputError, match="archive of arrays"): read_array_mask(tmp_path / "a.npz")


# ---- work in proportion


def calls(function):
    """How many functions, of Python's and of C's, are called."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try: function()
    finally: sys.setprofile(None)
    return count


def test_listing_takes_work_in_proportion(tmp_path):
    counts = []
    for n in (500, 2000):
        (tmp_path / str(n)).mkdir()
        for i in range(n): (tmp_path / str(n) / f"{i:06d}.png").touch()
        counts.append(calls(lambda: list_pictures(tmp_path / str(n))))
    assert counts[1] < 5 * counts[0]


@pytest.mark.parametrize("layout", ["row", "column", "grid", "diagonal", "same", "sizes"])
def test_boxes_take_work_in_proportion(layout):
    def boxes(n):
        side = int(n**0.5)
        place = {"row": lambda i: (50 * i, 0), "column": lambda i: (0, 50 * i),
                 "grid": lambda i: (50 * (i % side), 50 * (i // side)), "diagonal": lambda i: (50 * i, 50 * i),
                 "same": lambda i: (0, 0), "sizes": lambda i: (50 * i, 0)}[layout]
        return [(x, y, x + 40, y + (40 if layout != "sizes" else 2 ** (i % 12))) for i in range(n)
                for x, y in (place(i),)]
    few, many = (calls(lambda n=n: crowded(boxes(n))) for n in (500, 2000))
    assert many < 5 * few


def test_crowded_boxes_are_those_of_all_pairs():
    rng = np.random.RandomState(0)
    for _ in range(60):
        corners, sides = rng.randint(-5, 60, (25, 2)), np.exp(rng.uniform(0, 4, (25, 2))).astype(int) - 1
        boxes = [tuple(int(v) for v in (*corner, *(corner + side))) for corner, side in zip(corners, sides)]
        boxes[3] = boxes[7]
        expected = {n for n, a in enumerate(boxes) if any(overlap(a, b) > 0.05 for m, b in enumerate(boxes) if m != n)}
        assert crowded(boxes) == expected
        assert usable_boxes(boxes, 8) == {n: b for n, b in enumerate(boxes)
                                          if n not in expected and min(b[2] - b[0], b[3] - b[1]) >= 8}


def test_files_of_a_folder(tmp_path):
    (tmp_path / ".hidden").mkdir()
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden/d.png", ".e.png"): (tmp_path / name).touch()
    (tmp_path / "f.png").mkdir()  # a folder with the name of a picture
    (tmp_path / "f.png" / "g.Tiff").touch()
    found, folders = list_files(tmp_path)
    assert ([p.relative_to(tmp_path).as_posix() for p in found] == ["a.jpeg", "b.PNG", "f.png/g.Tiff"]
            and len(folders) == 2)
    assert list(by_name(found, tmp_path)) == ["a", "b", "f.png/g"]
    with pytest.raises(InputError, match="cannot read the folder"): list_files(tmp_path / "none")
