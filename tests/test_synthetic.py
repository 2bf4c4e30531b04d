"""A synthetic dataset is the same bytes however it was made, is completed after an interruption, and says how sure it
is.
"""

import csv
import hashlib
import json
import platform
import sys
import tarfile

import numpy as np
import nursery
import pytest
import torch
from PIL import Image
from tiny import LABELS, tiny_annotators, tiny_generator

from lagm.core.errors import InputError
from lagm.data.exporters import coco_annotations, rle_decode, rle_encode
from lagm.training.exports import export_coco, export_folder, export_webdataset
from lagm.training.shards import SyntheticDataset, claim, generate, publish, select, shard_path
from lagm.training.synthetic import GeneratedPairs, Plan, decide, make_pair, uncertainty

PLAN = Plan(n=23, seed=3, shard_size=5, soft=True)
DEAD = 2**22 + 1  # beyond the numbers that Linux gives to processes


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def world():
    generator = tiny_generator()
    return generator, tiny_annotators(generator, 3)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "one"
    return generate(*world, folder, PLAN, LABELS, progress=False), folder


def test_two_processes_give_the_same_bytes_as_one(world, made, tmp_path):
    generate(*world, tmp_path / "two", PLAN, LABELS, processes=2, progress=False)
    assert digests(tmp_path / "two") == digests(made[1])


def test_labels_vary_and_so_does_uncertainty(made):
    dataset, _ = made
    assert len(torch.unique(torch.stack([dataset[i][1] for i in range(len(dataset))]))) > 1
    assert len({r["uncertainty"] for r in dataset.records}) == len(dataset)


def test_number_of_threads_and_order_do_not_matter(world, made):
    dataset, _ = made
    for i in (22, 0, 7):
        pair = make_pair(*world, i, PLAN)
        image, label = dataset[i]
        assert (pair.image.float() / 127.5 - 1).equal(image) and pair.label.long().equal(label)


def test_an_interrupted_run_is_completed(world, made, tmp_path, monkeypatch):
    folder, calls = tmp_path / "broken", []

    class Stop(Exception): pass

    import lagm.training.shards as module
    whole = module.make_pair

    def interrupted(*arguments):
        calls.append(arguments[2])
        if len(calls) == 13: raise Stop
        return whole(*arguments)

    monkeypatch.setattr(module, "make_pair", interrupted)
    with pytest.raises(Stop): generate(*world, folder, PLAN, LABELS, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(InputError, match="lacks 3 of 5 shards"): SyntheticDataset(folder)
    calls.clear()
    monkeypatch.setattr(module, "make_pair", lambda *a: calls.append(a[2]) or whole(*a))
    dataset = generate(*world, folder, PLAN, LABELS, progress=False)
    assert calls == list(range(10, 23)), "only what was missing is made"
    assert [r["index"] for r in dataset.records] == list(range(23)) and digests(folder) == digests(made[1])


def test_what_others_are_at_is_left_alone(world, made, tmp_path):
    folder = tmp_path / "shared"
    generate(*world, folder, PLAN, LABELS, progress=False)
    shard_path(folder, 2).unlink()
    foreign = folder / "shard-000002.tar.claim"
    foreign.write_text(json.dumps({"host": "another-machine", "pid": 1}))
    with pytest.raises(InputError, match="shard-000002.tar"): generate(*world, folder, PLAN, LABELS, progress=False)
    assert foreign.exists() and not shard_path(folder, 2).exists()
    foreign.write_text(json.dumps({"host": platform.node(), "pid": DEAD}))
    generate(*world, folder, PLAN, LABELS, progress=False)
    assert digests(folder) == digests(made[1])


def test_a_finished_shard_is_never_replaced(world, tmp_path):
    folder = tmp_path / "kept"
    generate(*world, folder, PLAN, LABELS, progress=False)
    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    generate(*world, folder, PLAN, LABELS, progress=False)
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    (tmp_path / "new").write_text("new")
    assert not publish(tmp_path / "new", shard_path(folder, 0)) and not (tmp_path / "new").exists()
    assert shard_path(folder, 0).stat().st_mtime_ns == stamps[shard_path(folder, 0)]


def test_a_claim_of_a_living_process_holds(tmp_path):
    with claim(tmp_path / "x") as mine:
        code = (f"import pathlib, lagm.training.shards as s\nwith s.claim(pathlib.Path({str(tmp_path / 'x')!r})) as "
                "mine: print(mine)")
        told = nursery.run([sys.executable, "-c", code])
        assert mine and told.stdout == "False\n", told.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words",
                         [(dict(seed=4), "plan.seed"), (dict(shard_size=6), "plan.shard_size"), (dict(n=24), "plan.n")])
def test_another_plan_is_refused(world, made, change, words):
    before = digests(made[1])
    with pytest.raises(InputError, match=words):
        generate(*world, made[1], Plan(**{**vars(PLAN), **change}), LABELS, progress=False)
    assert digests(made[1]) == before


def test_other_weights_are_refused(world, made):
    with pytest.raises(InputError, match="generator"):
        generate(tiny_generator(1), world[1], made[1], PLAN, LABELS, progress=False)
    with pytest.raises(InputError, match="annotators"):
        generate(world[0], world[1][:2], made[1], PLAN, LABELS, progress=False)


@pytest.mark.parametrize("change, words",
                         [(dict(n=0), "n is 0"), (dict(shard_size=True - 1), "shard_size"),
                          (dict(vote="x"), "mean, majority"), (dict(size=(0, 4)), "height")])
def test_plans_that_make_no_sense(change, words):
    with pytest.raises(InputError, match=words): Plan(**change)


def test_on_the_fly_and_from_disk_are_the_same(world, made):
    fly = GeneratedPairs(*world, PLAN, soft=True, confidence=True)
    disk = SyntheticDataset(made[1], soft=True, confidence=True)
    for i in (0, 4, 5, 22):
        for a, b in zip(fly[i], disk[i], strict=True): assert a.equal(b)
    assert disk[0][1].shape == (3, 16, 16) and disk[0][1].sum(0).allclose(torch.ones(16, 16))
    fly.set_epoch(2)
    assert fly[1][0].equal(GeneratedPairs(*world, Plan(n=60, seed=3))[47][0])


def test_wide_crop_and_size(world):
    pair = make_pair(*world, 0, Plan(wide_crop=True))
    assert pair.image.shape == (3, 12, 16) and pair.label.shape == (12, 16)
    assert pair.image.equal(make_pair(*world, 0, Plan()).image[:, 2:14])
    assert make_pair(*world, 0, Plan(size=(8, 10))).label.shape == (8, 10)


def test_uncertainty_of_known_distributions():
    p = torch.tensor([0.7, 0.2, 0.1])[:, None, None]
    q = torch.tensor([0.1, 0.1, 0.8])[:, None, None]
    entropy = lambda v: -sum(float(x) * np.log(float(x)) for x in v.flatten())
    assert uncertainty(p[None]).item() == pytest.approx(entropy(p) / np.log(3), abs=1e-6)
    js = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    assert uncertainty(torch.stack([p, q])).item() == pytest.approx(js / np.log(2), abs=1e-6)
    certain = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert uncertainty(torch.stack([certain, certain.roll(1, 0)])).item() == pytest.approx(1)


def test_a_tie_of_votes_goes_to_the_higher_mean():
    members = torch.tensor([[0.6, 0.4, 0], [0.1, 0.9, 0]])[:, :, None, None]
    assert decide(members, "majority").item() == 1


def test_selection():
    records = [{"index": i, "uncertainty": u, "pixels": p}
               for i, (u, p) in enumerate([(0.1, [9, 0]), (0.4, [5, 4]), (0.2, [9, 0]), (0.3, [7, 2]), (0.2, [9, 1])])]
    assert select(records, 0.6).indices == [0, 2, 4]
    assert select(records, 1.0).indices == [0, 1, 2, 3, 4]
    assert select(records, 0.4, {1: 2}, min_pixels=2).added == [1, 3]
    assert select(records, 0.4, {1: 9}).short == {1: 6}
    with pytest.raises(InputError, match="keep"): select(records, 0)
    with pytest.raises(InputError, match="class 2"): select(records, 1, {2: 1})


def test_a_selection_of_the_dataset(made):
    some = SyntheticDataset(made[1], [20, 3])
    assert len(some) == 2 and some[0][0].equal(made[0][20][0]) and some[1][1].equal(made[0][3][1])
    with pytest.raises(InputError, match="no picture 23"): SyntheticDataset(made[1], [23])


def test_run_lengths():
    rng = np.random.RandomState(0)
    for shape in ((1, 1), (3, 5), (8, 2)):
        for density in (0.0, 0.3, 1.0):
            mask = rng.rand(*shape) < density
            code = rle_encode(mask)
            assert np.array_equal(rle_decode(code), mask) and sum(code["counts"]) == mask.size
            assert sum(code["counts"][1::2]) == mask.sum()
    assert coco_annotations(np.array([[0, 2], [2, 0]]), 5, 9, 3)[0] | {} == {
        "id": 9, "image_id": 5, "category_id": 2, "iscrowd": 0, "area": 2, "bbox": [0, 0, 2, 2],
        "segmentation": {"size": [2, 2], "counts": [1, 2, 1]}}


def test_exports(made, tmp_path):
    some = SyntheticDataset(made[1], [20, 3, 8])
    rows = list(csv.DictReader(open(export_folder(some, tmp_path / "png"))))
    assert [int(r["index"]) for r in rows] == [20, 3, 8]
    mask = Image.open(tmp_path / "png" / rows[1]["mask"])
    assert (mask.mode == "P" and np.array_equal(np.asarray(mask), some[1][1].numpy())
            and mask.getpalette()[:9] == [0, 0, 0, 255, 0, 0, 0, 0, 255])
    assert float(rows[1]["left"]) == pytest.approx((some[1][1] == 1).float().mean().item(), abs=1e-6)
    coco = json.loads(export_coco(some, tmp_path / "coco").read_text())
    rebuilt = np.zeros((16, 16), int)
    for a in coco["annotations"]:
        if a["image_id"] == 3: rebuilt[rle_decode(a["segmentation"])] = a["category_id"]
    assert np.array_equal(rebuilt, some[1][1].numpy())
    assert (len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
            and [c["name"] for c in coco["categories"]] == ["left", "bright"])
    shards = export_webdataset(some, tmp_path / "web", shard_size=2)
    names = [tarfile.open(path).getnames() for path in shards]
    assert (names[0]
            == [f"{key}.{e}" for key in ("000020", "000003")
                for e in ("png", "label.png", "confidence.png", "soft.png", "json")] and len(names[1]) == 5)
    with pytest.raises(InputError, match="not empty"): export_coco(some, tmp_path / "coco")


def test_a_damaged_shard_is_named(world, tmp_path):
    generate(*world, tmp_path / "d", Plan(n=3), LABELS, progress=False)
    path = shard_path(tmp_path / "d", 0)
    path.write_bytes(b"x" * 700)
    with pytest.raises(InputError, match="damaged"): SyntheticDataset(tmp_path / "d")
    with pytest.raises(InputError, match="cannot read"): SyntheticDataset(tmp_path / "nothing")


def test_there_must_be_an_annotator_and_a_process(world, tmp_path):
    with pytest.raises(InputError, match="annotator"): generate(world[0], [], tmp_path)
    with pytest.raises(InputError, match="0 processes"): generate(*world, tmp_path, processes=0)
