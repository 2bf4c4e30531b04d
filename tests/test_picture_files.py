"""Awkward picture files become the right pixels or one clear error."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.images import (
    check_classes,
    check_same_shape,
    check_size,
    describe_bytes,
    open_picture,
    read_image,
    read_mask,
    save_mask,
    to_item,
)
from lagm.data.labels import CELEBA8

Y, X = np.mgrid[:24, :32]
PIXELS = np.stack([X * 8, Y * 10, 255 - X * 3 - Y], -1).clip(0, 255).astype(np.uint8)
MASK = np.zeros((24, 32), np.uint8)
MASK[5:15, 8:20], MASK[:2] = 3, 255


def png(width, height, depth, colour, rows=b"", extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.fixture
def picture():
    return Image.fromarray(PIXELS)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp"])
def test_lossless_formats(tmp_path, picture, name):
    picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), PIXELS)


def test_sixteen_bits(tmp_path):
    grey = (np.arange(24 * 32).reshape(24, 32) * 85).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "g.png")), np.repeat((grey >> 8)[..., None], 3, 2))
    colour = np.random.RandomState(0).randint(0, 65536, (24, 32, 3)).astype(">u2")
    (tmp_path / "c.png").write_bytes(png(32, 24, 16, 2, b"".join(b"\0" + row.tobytes() for row in colour)))
    assert np.array_equal(np.asarray(read_image(tmp_path / "c.png")), (colour >> 8).astype(np.uint8))


def test_unknown_ranges_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match="32-bit pixels"): read_image(tmp_path / "f.tif")


def test_cmyk(tmp_path, picture):
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), int) - PIXELS).mean() < 4


@pytest.mark.parametrize("orientation,back",
                         [(1, None), (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180),
                          (4, Image.Transpose.FLIP_TOP_BOTTOM),
                                              (5, Image.Transpose.TRANSPOSE), (6, Image.Transpose.ROTATE_90),
                          (7, Image.Transpose.TRANSVERSE), (8, Image.Transpose.ROTATE_270)])
def test_exif_rotation(tmp_path, picture, orientation, back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture.transpose(back) if back is not None else picture
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", upright=True)), PIXELS)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(stored))


def test_damaged_exif_is_passed_over(tmp_path, picture):
    picture.save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", upright=True)), PIXELS)


def test_transparency(tmp_path, picture):
    clear = picture.convert("RGBA")
    alpha = np.full((24, 32), 255, np.uint8)
    alpha[:5] = 0
    clear.putalpha(Image.fromarray(alpha))
    clear.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), PIXELS)
    white = np.asarray(read_image(tmp_path / "a.png", background=(255, 255, 255)))
    assert (white[:5] == 255).all() and np.array_equal(white[5:], PIXELS[5:])


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(MASK % 5)
    image.putpalette([9, 9, 9, 0, 0, 0, 0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=3)
    assert np.asarray(read_image(tmp_path / "a.png"))[6, 10].tolist() == [200, 100, 50]
    assert np.asarray(read_image(tmp_path / "a.png", background=(255, 255, 255)))[6, 10].tolist() == [255, 255, 255]
    assert np.array_equal(read_mask(tmp_path / "a.png"), MASK % 5)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated(tmp_path, name, share):
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8).astype(np.uint8)).save(tmp_path
                                                                                                           / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=f"{name} is"): read_image(tmp_path / name)


@pytest.mark.parametrize("side", [8001, 10_000, 40_000, 2**31 - 1])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, bytes(1000)))
    with warnings.catch_warnings(), pytest.raises(InputError, match="bomb.png"):
        warnings.simplefilter("ignore")
        read_image(tmp_path / "bomb.png")


def test_a_bomb_in_a_text_chunk(tmp_path):
    text = zlib.compress(bytes(80_000_000), 9)
    data = b"key\0\0" + text
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    (tmp_path / "a.png").write_bytes(png(2, 1, 8, 0, b"\0\1\2", chunk))
    with pytest.raises(InputError, match="a.png"): open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("content,words",
                         [(b"", "empty"), (b"<!DOCTYPE html>", "a web page"), (b"\n  <HTML>", "a web page"),
                          (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
                                           (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unknown kind"),
                          (b"PK\x03\x04....", "zip"), (b"nonsense", "unknown kind")])
def test_other_files(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=words): read_image(tmp_path / "a.png")
    assert words in describe_bytes(content)


def test_missing_and_folder(tmp_path):
    with pytest.raises(InputError, match="there is no picture"): read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="it is a folder"): read_image(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), name=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]))
def test_a_damaged_byte_gives_a_picture_or_an_input_error(tmp_path, place, value, name):
    path = tmp_path / f"a.{name.lower()}"
    Image.fromarray(PIXELS).save(path, format=name)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: assert read_image(path, upright=True).mode == "RGB"
        except InputError as error: assert str(path) in str(error)


# ---- masks


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_masks_of_every_mode(tmp_path, mode):
    stored = {"L": MASK, "I;16": MASK.astype(np.uint16), "RGB": np.repeat(MASK[..., None], 3, 2),
              "RGBA": np.concatenate([np.repeat(MASK[..., None], 3, 2), np.full((24, 32, 1), 255, np.uint8)], -1),
              "LA": np.stack([MASK, np.full_like(MASK, 9)], -1)}
    if mode == "P": save_mask(tmp_path / "m.png", MASK, CELEBA8)
    else: Image.fromarray(stored[mode]).save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == mode
    assert np.array_equal(read_mask(tmp_path / "m.png", 4), MASK)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3])
def test_masks_of_few_bits_hold_the_stored_numbers(tmp_path, depth, colour):
    values = np.random.RandomState(depth).randint(0, min(2**depth, 250), (6, 16))
    per_byte = 8 // depth
    rows = b"".join(b"\0" + bytes(sum(int(v) << (8 - depth * (i + 1)) for i, v in enumerate(group))
                                  for group in row.reshape(-1, per_byte)) for row in values)
    plte = bytes(range(200, 200 + 3)) * 2**depth
    extra = (b"" if colour == 0 else struct.pack(">I", len(plte)) + b"PLTE" + plte
             + struct.pack(">I", zlib.crc32(b"PLTE" + plte)))
    (tmp_path / "m.png").write_bytes(png(16, 6, depth, colour, rows, extra))
    assert np.array_equal(read_mask(tmp_path / "m.png"), values)


def test_class_out_of_range_is_named_and_counted(tmp_path):
    Image.fromarray(MASK).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png holds the value 3 \(120 such pixels\), but the classes are 0\.\.2"):
        read_mask(tmp_path / "m.png", 3)
    Image.fromarray(MASK.astype(np.uint16) * 100).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="holds the value"): read_mask(tmp_path / "m.png")


def test_masks_that_are_pictures_are_refused(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    Image.fromarray(MASK).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="coloured picture"): read_mask(tmp_path / "a.png")
    with pytest.raises(InputError, match="JPEG changes the numbers"): read_mask(tmp_path / "a.jpg")


@pytest.mark.parametrize("values", [np.array([[0.5]]), np.array([[np.nan]]), np.array([[-1]]), np.array([[256]]),
                                    np.zeros(3), np.array([["a"]])])
def test_arrays_that_are_no_masks(values):
    with pytest.raises(InputError): check_classes(values, 5)


def test_sizes(picture):
    check_same_shape(picture, MASK, "a", "b")
    check_same_shape(picture, np.zeros((48, 64)), "a", "b", scaled=True)
    with pytest.raises(InputError, match="64 x 48 pixels, but its picture a is 32 x 24"):
        check_same_shape(picture, np.zeros((48, 64)), "a", "b")
    with pytest.raises(InputError, match="one of them is turned"):
        check_same_shape(picture, MASK.T, "a", "b", scaled=True)
    assert check_size(7) == (7, 7) and check_size([3, 4]) == (3, 4) and check_size(None) is None
    for wrong in ((0, 1), (1.5, 2), "ab", (1, 2, 3), True, -4):
        with pytest.raises(InputError, match="size is"): check_size(wrong)


def test_items(picture):
    image, mask = to_item(picture, MASK)
    assert np.array_equal(image.numpy(), (PIXELS.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1))
    assert mask.numpy().dtype == np.int64 and np.array_equal(mask, MASK)
    image, mask = to_item(picture, MASK, (16, 12), "lanczos")
    assert np.array_equal(((image + 1) * 127.5).round().byte().permute(1, 2, 0),
                          np.asarray(picture.resize((16, 12), Image.Resampling.LANCZOS)))
    assert image.shape == (3, 12, 16) and set(mask.unique().tolist()) <= {0, 3, 255}
