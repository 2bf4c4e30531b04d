"""A folder of pictures that is no project: painted in, trained on, without moving a file."""

import numpy as np
import pytest
from PIL import Image

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.data.folder import Folder
from lagm.data.importers import import_export
from lagm.experiments.project import new_project
from lagm.labelling.album import Album, labelled_shares, save_painted

CLASSES = ["background", "skin", "hair"]


@pytest.fixture
def flat(tmp_path):
    for i, name in enumerate(("a.jpg", "b.png", "june/a.jpg", "june/first/c.webp")):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (6, 8, 3), np.uint8)).save(tmp_path / "flat" / name)
    for name in ("a_mask.png", "june/a.png"): Image.new("L", (8, 6)).save(tmp_path / "flat" / name)
    return tmp_path / "flat"


def painted(flat):
    album = Album(flat, CLASSES)
    masks = {name: np.random.default_rng(i).integers(0, 3, (6, 8)).astype(np.uint8)
             for i, name in enumerate(album.names)}
    for i in (0, 2): save_painted(album, i, masks[album.names[i]])
    return album, masks


def test_pictures_below_and_masks_among_them(flat):
    before = {path: path.read_bytes() for path in flat.rglob("*") if path.is_file()}
    album, masks = painted(flat)
    assert album.names == ["a", "b", "june/a", "june/first/c"]
    assert sorted(path.name for path in album.masks_beside) == ["a.png", "a_mask.png"]
    assert (flat / "masks" / "june" / "a.png").is_file() and labelled_shares(Album(flat)) == [1, 0, 1, 0]
    save_painted(album, 0, np.full((6, 8), 255, np.uint8))
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing that was there is touched


def test_a_project_of_it_keeps_what_was_painted(flat, tmp_path):
    album, masks = painted(flat)
    assert main(["new", str(tmp_path / "p"), "--images", str(flat), "--classes", "background,skin,hair,eye"]) == 0
    again = Album(tmp_path / "p")
    data = Folder(tmp_path / "p")
    assert data.names == ["a", "june/a"] and again.labels.classes == (*CLASSES, "eye")
    for i, name in enumerate(data.names): assert (data[i][1].numpy() == masks[name]).all()
    with pytest.raises(InputError, match="give these, in this order"):
        new_project(tmp_path / "q", flat, ["background", "hair", "skin"])
    assert not (tmp_path / "q").exists() and not list(tmp_path.glob(".q-*"))


def test_a_data_set_of_it(flat, tmp_path):
    _, masks = painted(flat)
    done = import_export("auto", flat, tmp_path / "made")
    data = Folder(tmp_path / "made")
    assert len(done.names) == 2 and data.labels.classes == tuple(CLASSES)
    assert sorted(data[i][1].numpy().tobytes() for i in range(2)) == sorted(masks[n].astype(np.int64).tobytes()
                                                                           for n in ("a", "june/a"))
