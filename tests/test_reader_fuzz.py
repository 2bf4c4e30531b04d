"""Damaged and hostile files of every kind end in one sentence, with little memory: bounded fuzzing, and the lies that
were found by it.

LAGM_FUZZ=20 in the environment tries twenty times as many cases.
"""

import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.datasetgan import read_array_mask
from lagm.data.demo import Avatars, _content_hash
from lagm.data.images import png, read_image, read_mask
from lagm.data.pascal_boxes import read_boxes
from lagm.data.pascal_files import Unusable, read_annotation, unpacked_mat
from lagm.download.sources import array_problem
from lagm.evaluation.folds import read_test_folder
from lagm.training.shards import SyntheticDataset, add_to_tar

MASK = np.tile(np.arange(4, dtype=np.uint8), (6, 2))
MAT = (Path(__file__).parent / "golden" / "datasets" / "data" / "VOC2010" / "part_segmentation" / "Annotations_Part"
       / "2008_000002.mat")
XML = (
    "<annotation><filename>1.jpg</filename><size><width>12</width><height>10</height></size>"
    + "".join(
        "<object><name>horse</name>"
        f"<bndbox><xmin>{x}</xmin><ymin>2</ymin><xmax>{x + 4}</xmax><ymax>9</ymax></bndbox></object>"
        for x in (1, 6)
    )
    + "</annotation>"
).encode()
WORDS = [b"-1", b"0", b"1e999", b"nan", b"1" * 400, b"99999999999999999999", b"true", b"null", b"[" * 5000,
         b"<a>" * 3000, b"\xff\xff\xff\xff", b"\0\0\0\x80", b"&x;", b"", b"\xef\xbb\xbf"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content after one to four small accidents."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 40))
        match rng.randrange(6):
            case 0: data[place:place + length] = rng.randbytes(length)
            case 1: del data[place:place + length]
            case 2: data[place:place] = data[rng.randrange(len(data) + 1):][:length * 8]
            case 3: data[place:place + length] = rng.choice(WORDS)
            case 4: data = data[:place]
            case 5:
                if place < len(data): data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard():
    """The shard of a dataset of one pair, of two classes."""
    label = (MASK > 1).astype(np.uint8)
    record = {"index": 0, "uncertainty": 0.25, "pixels": np.bincount(label.ravel(), minlength=2).tolist()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add_to_tar(tar, "000000", {"png": png(np.dstack([MASK] * 3)), "label.png": png(label, [(0, 0, 0), (9, 9, 9)]),
                                   "confidence.png": png(MASK), "json": json.dumps(record).encode()})
    return file.getvalue()


def write_description(folder, **changes):
    plan = {"n": 1, "seed": 0, "size": None, "wide_crop": False, "vote": "mean", "soft": False, "shard_size": 250}
    about = {"format": "lagm-synthetic-1", "plan": plan, "label_set": "two", "classes": ["ground", "thing"],
             "palette": [[0, 0, 0], [9, 9, 9]]}
    (folder / "dataset.json").write_text(json.dumps(about | changes))


def read_shard(path):
    write_description(path.parent)
    for confidence in (False, True): SyntheticDataset(path.parent, confidence=confidence)[0]


def avatars():
    """Arrays and description of a set of two pictures."""
    arrays = {"val_images": np.dstack([MASK] * 6).reshape(2, 6, 8, 3), "val_masks": np.stack([MASK, MASK])}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    about = {"format": "lagm-avatars-1", "style": "x", "palette": ["#000000", "#010000", "#020000", "#030000"],
             "classes": list("abcd"), "label_set": "four",
             "splits": {"val": {"first_seed": 0, "images_sha256": _content_hash(arrays["val_images"]),
                                "masks_sha256": _content_hash(arrays["val_masks"])}}}
    return file.getvalue(), json.dumps(about).encode()


def read_avatars(path):
    (path.parent / "x.json").write_bytes(avatars()[1])
    Avatars("x", "val", path.parent)[0]


def read_avatars_described(path):
    (path.parent / "x.npz").write_bytes(avatars()[0])
    repr(Avatars("x", "val", path.parent)[1])


def read_folds(path):
    Image.new("RGB", (8, 6)).save(path.parent / "image_1.png")
    read_test_folder(path.parent)


def picture(kind, mode="L"):
    file = io.BytesIO()
    Image.fromarray(MASK).convert(mode).save(file, kind)
    return file.getvalue()


READERS = {  # what: name of the file, whole content, reader, cases
    "npy": ("a.npy", npy(MASK), read_array_mask, 400),
    "npy of planes": ("a.npy", npy(np.dstack([MASK] * 3).astype(np.float64)), read_array_mask, 200),
    "doctor": ("a.npy", npy(MASK), array_problem, 100),
    "folds": ("image_mask1.npy", npy(MASK), read_folds, 150),
    "npz": ("x.npz", avatars()[0], read_avatars, 200),
    "description": ("x.json", avatars()[1], read_avatars_described, 200),
    "shard": ("shard-000000.tar", shard(), read_shard, 300),
    "xml": ("a.xml", XML, lambda path: read_boxes(path, "horse"), 400),
    "mat": ("a.mat", MAT.read_bytes(), read_annotation, 150),
    "unpacked mat": ("a.mat", unpacked_mat(MAT).getvalue(), read_annotation, 150),
    **{f"mask {kind}": (f"a.{kind.lower()}", picture(kind), lambda path: read_mask(path, 4), 80)
       for kind in ("PNG", "TIFF", "GIF", "BMP", "WEBP")},
    "picture": ("a.tif", picture("TIFF", "LAB"), lambda path: read_image(path, upright=True), 80),
}


@pytest.mark.parametrize("what", READERS)
def test_only_one_kind_of_error(tmp_path, what):
    name, content, reader, cases = READERS[what]
    if "mat" in what: pytest.importorskip("scipy")
    path, rng = tmp_path / name, random.Random(what)
    for case in range(int(os.environ.get("LAGM_FUZZ", 1)) * cases):
        path.write_bytes(content if case == 0 else damaged(content, rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(path)
        except InputError as error:
            assert case or what == "picture", f"the whole file was refused: {error}"
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)


# ---- lies


def mat_of(depth):
    """A MATLAB file of empty cells in cells."""
    head = struct.pack("<IIII", 6, 8, 1, 0) + struct.pack("<IIii", 5, 8, 1, 1)
    names = [struct.pack("<II", 1, 0)] * (depth - 1) + [struct.pack("<II", 1, 4) + b"anno" + bytes(4)]
    heads, length = [], 0
    for name in names:
        length += len(head) + len(name)
        heads.append(struct.pack("<II", 14, length) + head + name)
        length += 8
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + b"".join(reversed(heads))


def mat_bomb():
    """A few hundred kilobytes that unpack to 300 million zeros."""
    packer = zlib.compressobj()
    data = b"".join(packer.compress(bytes(10**7)) for _ in range(30)) + packer.flush()
    return mat_of(1)[:128] + struct.pack("<II", 15, len(data)) + data


def test_matlab_files_that_ended_the_process(tmp_path):
    for content, words in ((mat_of(30_000), "nested more than 16 deep"),
                           (mat_bomb(), "claim more than 268,435,456 bytes"),
                           (mat_of(2)[:-3], "longer than what is left"), (b"", "no MATLAB file")):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(Unusable, match=f"a.mat cannot be used: .*{words}"): read_annotation(tmp_path / "a.mat")


@pytest.mark.parametrize("shape, data", [((1 << 40,), b""), ((1 << 62, 4), bytes(8)), ((-1, 8), bytes(8)),
                                         ((2, 3), bytes(5)), ((0, 1 << 62), b"")])
def test_arrays_that_claim_more_than_there_is(tmp_path, shape, data):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    (tmp_path / "image_mask1.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + data)
    Image.new("RGB", (8, 6)).save(tmp_path / "image_1.png")
    for reader in (read_array_mask, lambda path: read_test_folder(path.parent)):
        with pytest.raises(InputError, match="image_mask1.npy"): reader(tmp_path / "image_mask1.npy")
    assert shape[0] == 0 or "is damaged" in array_problem(tmp_path / "image_mask1.npy")


def test_compressed_arrays_that_claim_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("lagm.data.demo._MOST_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val_images.npy", bytes(10_001))
    with pytest.raises(InputError, match="claims 10,001 bytes, more than the 10,000 allowed"):
        read_avatars(tmp_path / "x.npz")


@pytest.mark.parametrize("text", ['<!DOCTYPE a [<!ENTITY x "y">]><annotation/>',
                                  '<!DOCTYPE a SYSTEM "http://localhost/x"><annotation/>', "<annotation>", "",
                                  "<a>" * 100_000])
def test_xml_that_is_no_annotation(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(Unusable, match="a.xml"): read_boxes(tmp_path / "a.xml", "horse")


@pytest.mark.parametrize("number", ["1e999", "nan", "-1e300", "1e6", "", "x"])
def test_boxes_outside_of_any_picture(tmp_path, number):
    (tmp_path / "a.xml").write_text(XML.decode().replace("<ymax>9<", f"<ymax>{number}<", 1))
    with pytest.raises(Unusable, match="a.xml has a box"): read_boxes(tmp_path / "a.xml", "horse")


def test_xml_with_a_byte_order_mark(tmp_path):
    for content in (XML, b"\xef\xbb\xbf" + XML, XML.decode().encode("utf-16")):
        (tmp_path / "a.xml").write_bytes(content)
        assert read_boxes(tmp_path / "a.xml", "horse") == [(0, 1, 5, 9), (5, 1, 10, 9)]


def entry(name, content=b"x", **changes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items(): setattr(member, key, value)
    return member, content


@pytest.mark.parametrize("extra", [entry("000001.png"), entry("000000.exe"), entry("../000000.png"),
                                   entry("000000.png"), entry("000000.soft.png", type=tarfile.SYMTYPE,
                                                              linkname="/etc/passwd"),
                                   entry("000000.soft.png", type=tarfile.DIRTYPE), entry("x\x1b[31m.png"),
                                   entry("9" * 90 + ".png")])
def test_entries_that_do_not_belong_in_a_shard(tmp_path, extra):
    (tmp_path / "shard-000000.tar").write_bytes(shard())
    read_shard(tmp_path / "shard-000000.tar")
    with tarfile.open(tmp_path / "shard-000000.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(extra[0], io.BytesIO(extra[1]) if extra[0].isreg() else None)
    with pytest.raises(InputError,
                       match="shard-000000.tar is damaged .*does not belong there.*call `generate` again") as caught:
        SyntheticDataset(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("changes", [{"label.png": png(MASK)}, {"label.png": png(MASK[:3] % 2)}, {"png": png(MASK)},
                                     {"png": b"<html>"}, {"png": png(np.zeros((3, 3, 4), np.uint8))},
                                     {"confidence.png": png(MASK[:2])}])
def test_pictures_of_a_shard_that_do_not_fit(tmp_path, changes):
    with tarfile.open(fileobj=io.BytesIO(shard())) as tar:
        files = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}
    with tarfile.open(tmp_path / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add_to_tar(tar, "000000", files | changes)
    write_description(tmp_path)
    with pytest.raises(InputError, match=next(iter(changes)) if changes.get("label.png") != png(MASK)
                       else "the label 3 in picture 0"):
        SyntheticDataset(tmp_path, confidence=True)[0]


@pytest.mark.parametrize("changes", [{"plan": {"n": 10**30}}, {"plan": {"n": 10**11}}, {"plan": {"n": 1, "size": 3}},
                                     {"plan": {"n": 1, "x": 1}}, {"plan": [1]}, {"plan": None}, {"classes": 3},
                                     {"classes": [1, 2]}, {"classes": []},
                                     {"palette": [["a", 0, 0], [1, 1, 1]]}, {"label_set": None}, {"format": 1}])
def test_descriptions_of_a_dataset(tmp_path, changes):
    (tmp_path / "shard-000000.tar").write_bytes(shard())
    write_description(tmp_path, **changes)
    with pytest.raises(InputError): SyntheticDataset(tmp_path)


def test_a_pair_without_confidence_is_a_pair(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(shard())) as tar:
        files = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}
    del files["confidence.png"]
    with tarfile.open(tmp_path / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add_to_tar(tar, "000000", files)
    write_description(tmp_path)
    assert (np.array_equal(SyntheticDataset(tmp_path)[0][1], MASK > 1)
            and list(SyntheticDataset(tmp_path).files(0)) == list(files))
    with pytest.raises(InputError, match="lacks 000000.confidence.png"): SyntheticDataset(tmp_path, confidence=True)


@pytest.mark.skipif(os.name != "posix", reason="needs limits of memory")
def test_little_memory(tmp_path):
    """The worst of the above, in a process that may take half a gigabyte more than it has."""
    (tmp_path / "image_mask1.npy").write_bytes(b"\x93NUMPY\x01\0P\0"
                                               + "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), "
                                                 "}".ljust(79).encode() + b"\n")
    (tmp_path / "a.mat").write_bytes(mat_bomb())
    code = """if True:
        import resource, sys
        from lagm.data.datasetgan import read_array_mask
        from lagm.data.pascal_files import read_annotation
        used = 2**40
        if sys.platform == "linux": used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for reader, name in ((read_array_mask, "image_mask1.npy"), (read_annotation, "a.mat")):
            try: reader(name)
            except ValueError as error: print(type(error).__name__, error)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == ["InputError",
                                                                                               "Unusable"], done.stderr
