"""Cached items are the decoded ones, keyed by contents and settings; damage and other writers do no harm."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import nursery
import pytest
import torch
from torch.utils.data import Dataset

from lagm.core.errors import InputError
from lagm.data.cache import Cached, item_key, pack, unpack
from lagm.data.cgpart import CGPartReal, CGPartRendered
from lagm.data.datasetgan import DatasetGAN
from lagm.data.demo import Avatars, stack

ROOT = Path(__file__).parent / "golden" / "datasets" / "data"


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].dtype == b[0].dtype and a[1].dtype == b[1].dtype


@pytest.mark.parametrize("make", [lambda: DatasetGAN(ROOT, "car"), lambda: CGPartReal(ROOT),
                                  lambda: CGPartRendered(ROOT), lambda: Avatars("micah", "val")])
def test_items_are_those_of_the_data_set(make, tmp_path):
    data = make()
    caches = [Cached(data)] + ([Cached(data, tmp_path), Cached(make(), tmp_path),
                                Cached(data, tmp_path / "b", in_memory=False)] if hasattr(data, "sources") else [])
    for cache in caches:
        assert len(cache) == len(data) and cache.classes == data.classes and cache.labels == data.labels
        for _ in range(2):
            for i in (0, 1, -1): assert same(cache[i], data[i])
        with pytest.raises(IndexError): cache[len(data)]


def test_every_byte_comes_back_exactly_and_other_floats_too():
    image = torch.arange(256).repeat(3).view(3, 16, 16).float() / 127.5 - 1
    mask = torch.arange(256).view(16, 16)
    assert pack(image, mask)["image"].dtype == pack(image, mask)["mask"].dtype == torch.uint8
    assert same(unpack(pack(image, mask)), (image, mask))
    for odd in (image * 0.999, image.clone().fill_(float("nan")), image * 3):
        assert torch.equal(unpack(pack(odd, mask))[0].nan_to_num(7), odd.nan_to_num(7))
    assert same(unpack(pack(image, mask - 1)), (image, mask - 1))


def test_what_is_handed_out_can_be_changed():
    cache = Cached(Avatars())
    before = cache[0][0].clone(), cache[0][1].clone()
    cache[0][0].zero_(), cache[0][1].zero_()
    assert same(cache[0], before)


def test_random_transforms_stay_random():
    cache = Cached(Avatars(), transforms=lambda image, mask: (image + torch.rand(()), mask))
    assert not torch.equal(cache[0][0], cache[0][0])
    with pytest.raises(InputError, match="give them to Cached"):
        Cached(Avatars(transforms=lambda image, mask: (image, mask)))


def test_the_key_depends_on_contents_and_settings_only(tmp_path):
    shutil.copytree(ROOT / "DatasetGAN", tmp_path / "DatasetGAN")
    here, there = DatasetGAN(ROOT, "car"), DatasetGAN(tmp_path, "car")
    keys = [item_key(here, i) for i in range(4)]
    assert keys == [item_key(there, i) for i in range(4)] and len(set(keys)) == 4
    for other in (DatasetGAN(ROOT, "car", size=(64, 64)), DatasetGAN(ROOT, "car", clean=False),
                  DatasetGAN(ROOT, "car", labels="dg_car_12")):
        assert item_key(other, 0) != keys[0]
    mask = there.sources(0)[1]
    values = np.load(mask)
    values[0, 0] += 1
    np.save(mask, values)
    assert item_key(there, 0) != keys[0] and item_key(there, 1) == keys[1]


def test_damaged_entries_are_made_again(tmp_path):
    data = DatasetGAN(ROOT, "car")
    Cached(data, tmp_path)[0]
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    for damage in (b"", whole[:50], whole[:-5], b"<html>"):
        entry.write_bytes(damage)
        cache = Cached(data, tmp_path)
        assert same(cache[0], data[0]) and cache.hits == {"memory": 0, "disk": 0, "decoded": 1}
        assert entry.stat().st_size == len(whole)


FILL = """
import sys
from lagm.data.cache import Cached
from lagm.data.datasetgan import DatasetGAN
from lagm.data.demo import stack
cache = Cached(DatasetGAN(sys.argv[1], "car"), sys.argv[2])
for _ in range(3):
    images, masks = stack(cache)
    cache._items.clear()
print(float(images.sum()), int(masks.sum()), cache.hits["disk"])
"""


def test_several_writers(tmp_path):
    workers = [nursery.start([sys.executable, "-c", FILL, ROOT, tmp_path], stdout=subprocess.PIPE) for _ in range(3)]
    results = [worker.communicate(timeout=180)[0].split() for worker in workers]
    assert len({(*result[:2],) for result in results}) == 1 and all(int(result[2]) >= 8 for result in results)
    assert (len(list(tmp_path.rglob("*.safetensors"))) == 4
            and len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4)


def test_errors(tmp_path):
    with pytest.raises(InputError, match="in memory only"): Cached(Avatars(), tmp_path)
    shutil.copytree(ROOT / "DatasetGAN", tmp_path / "DatasetGAN")
    data = DatasetGAN(tmp_path, "car")
    data.sources(0)[0].unlink()
    with pytest.raises(InputError, match="lagm doctor"): Cached(data, tmp_path / "cache")[0]


def test_each_item_is_decoded_once():
    class Counting(Dataset):
        count = 0
        def __len__(self): return 3
        def __getitem__(self, index):
            self.count += 1
            return torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.int64)

    data = Counting()
    cache = Cached(data)
    for _ in range(5): stack(cache)
    assert data.count == 3 and cache.hits == {"memory": 12, "disk": 0, "decoded": 3}
