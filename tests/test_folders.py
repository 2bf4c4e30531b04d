"""Exports of labelling programs become folders with the right masks; what cannot be used is listed."""

import json

import numpy as np
import pytest
from PIL import Image

from lagm import cli
from lagm.core.errors import InputError
from lagm.data.coco import import_coco
from lagm.data.cvat import import_cvat, read_label_map
from lagm.data.folder import Folder, read_classes
from lagm.data.label_studio import import_label_studio
from lagm.data.regions import unpack_brush

TRUTH = np.zeros((20, 30), np.uint8)
TRUTH[4:16, 5:25], TRUTH[6:10, 8:14] = 1, 2


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.jpg", "b.png"): Image.new("RGB", (30, 20), (9, 90, 200)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def runs(mask):
    """Run lengths, column by column, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [-1]])
    edges = (np.flatnonzero(np.diff(flat)) if flat[1] == 0
             else np.concatenate([[0], np.flatnonzero(np.diff(flat[1:])) + 1]))
    return np.diff(np.concatenate([[0], edges])).tolist()


def coco(*annotations, images=("a.jpg", "b.png")):
    return {"images": [{"id": i, "file_name": f"folder/{name}", "width": 30, "height": 20}
                       for i, name in enumerate(images)],
            "categories": [{"id": 9, "name": "eye"}, {"id": 4, "name": "head"}], "annotations": list(annotations)}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_coco_polygons_and_runs(tmp_path, pictures):
    pytest.importorskip("pycocotools")
    head = {"image_id": 0, "category_id": 4, "segmentation": [[5, 4, 25, 4, 25, 16, 5, 16]], "iscrowd": 0}
    eye = {"image_id": 0, "category_id": 9, "segmentation": {"size": [20, 30],
                                                             "counts": runs((TRUTH == 2).astype(int))}, "iscrowd": 0}
    crowd = {"image_id": 1, "category_id": 4,
             "segmentation": {"size": [20, 30], "counts": runs((TRUTH > 0).astype(int))}, "iscrowd": 1}
    done = import_coco(write(tmp_path / "c.json",
                             coco(eye, head, crowd, images=("a.jpg", "b.png", "gone.png", "a.png"))), pictures,
                       tmp_path / "out")
    assert done.names == ["a", "b"] and set(done.skipped) == {"folder/gone.png", "folder/a.png"}
    data = Folder(tmp_path / "out")
    assert data.classes == ("background", "head", "eye")
    assert np.array_equal(data[0][1], TRUTH) and np.array_equal(data[1][1], np.where(TRUTH > 0, 255, 0))


def test_coco_panoptic(tmp_path, pictures):
    numbers = np.where(TRUTH == 0, 0, np.where(TRUTH == 1, 70000, 300))
    (tmp_path / "p").mkdir()
    Image.fromarray(np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536],
                             -1).astype(np.uint8)).save(tmp_path / "p" / "a.png")
    content = coco({"image_id": 0, "file_name": "a.png",
                    "segments_info": [{"id": 70000, "category_id": 4}, {"id": 300, "category_id": 9}]})
    import_coco(write(tmp_path / "c.json", content), pictures, tmp_path / "out", tmp_path / "p")
    assert np.array_equal(Folder(tmp_path / "out")[0][1], np.where(TRUTH == 0, 255, TRUTH))
    with pytest.raises(InputError, match="folder of their PNGs"):
        import_coco(tmp_path / "c.json", pictures, tmp_path / "out2")


@pytest.mark.parametrize("annotation", [{"image_id": 0, "category_id": 5, "segmentation": [[1, 1, 9, 1, 9, 9]]},
                                        {"image_id": 0, "category_id": 4},
                                        {"image_id": 0, "category_id": 4,
                                         "segmentation": {"size": [9, 9], "counts": [81]}}])
def test_coco_annotations_that_make_no_sense(tmp_path, pictures, annotation):
    pytest.importorskip("pycocotools")
    done = import_coco(write(tmp_path / "c.json", coco(annotation)), pictures, tmp_path / "out")
    assert not done.names and len(done.skipped) == 2


def test_coco_other_files(tmp_path, pictures):
    for content in ([], {"images": []}):
        with pytest.raises(InputError, match="not a COCO file"):
            import_coco(write(tmp_path / "c.json", content), pictures, tmp_path / "out")
    (tmp_path / "c.json").write_text("<html>")
    with pytest.raises(InputError, match="is not JSON"): import_coco(tmp_path / "c.json", pictures, tmp_path / "out")


def test_cvat(tmp_path, pictures):
    export = tmp_path / "export"
    (export / "SegmentationClass").mkdir(parents=True)
    (export / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nhead:255,0,0::\nleft: "
                                         "eye:0,0,255::\nbackground:0,0,0::\n")
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    for name in ("a", "c"): Image.fromarray(colours[TRUTH]).save(export / "SegmentationClass" / f"{name}.png")
    Image.fromarray(colours[TRUTH] + 1).save(export / "SegmentationClass" / "b.png")
    done = import_cvat(export, tmp_path / "out", pictures)
    assert (done.names == ["a"] and "belongs to no class" in done.skipped["b.png"]
            and "no picture c" in done.skipped["c.png"])
    data = Folder(tmp_path / "out")
    assert (data.classes == ("background", "head", "left: eye")
            and data.palette == ((0, 0, 0), (255, 0, 0), (0, 0, 255)) and np.array_equal(data[0][1], TRUTH))
    with pytest.raises(InputError, match="holds a data set already"): import_cvat(export, tmp_path / "out", pictures)
    with pytest.raises(InputError, match="save images"): import_cvat(export, tmp_path / "out2")
    (export / "labelmap.txt").write_text("head 255 0 0\n")
    with pytest.raises(InputError, match="not a label map"): read_label_map(export / "labelmap.txt")


def pack(values, word=8):
    """Label Studio's packing, one literal block for all that is not constant."""
    bits = f"{len(values):032b}{word - 1:05b}" + "".join(f"{n - 1:04b}" for n in (3, 5, 9, 14))
    i = 0
    while i < len(values):
        run = next((j for j in range(i, len(values)) if values[j] != values[i]), len(values)) - i
        if run > 8:
            run = min(run, 2**9)
            bits += "1" + "10" + f"{run - 1:09b}" + f"{values[i]:08b}"
        else:
            run = min(5, len(values) - i)
            bits += "0" + "00" + f"{run - 1:03b}" + "".join(f"{v:08b}" for v in values[i:i + run])
        i += run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i:i + 8], 2) for i in range(0, len(bits), 8)]


def brush(mask):
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[mask] = (3, 60, 70, 255)
    return pack(rgba.ravel().tolist())


@pytest.mark.parametrize("seed", range(3))
def test_brush_strokes(seed):
    mask = np.random.RandomState(seed).rand(7, 9) > 0.6
    assert np.array_equal(unpack_brush(brush(mask), 7, 9), mask)
    for wrong in (brush(mask)[:-9], brush(mask)[:4], []):
        with pytest.raises(InputError, match="cut off"): unpack_brush(wrong, 7, 9)
    with pytest.raises(InputError, match="not 280 of 8"): unpack_brush(brush(mask), 7, 10)


def region(kind, name, **value):
    return {"type": kind, "original_width": 30, "original_height": 20, "value": {**value, kind: [name]}}


def test_label_studio(tmp_path, pictures):
    head = region("rectanglelabels", "head", x=100 * 5 / 30, y=20, width=100 * 20 / 30, height=60, rotation=0)
    eye = region("brushlabels", "eye", format="rle", rle=brush(TRUTH == 2))
    polygon = region("polygonlabels", "head",
                     points=[[100 * x / 30, 5 * y] for x, y in ((5, 4), (25, 4), (25, 16), (5, 16))])
    tasks = [{"id": 1, "data": {"image": "/data/upload/2/ab12cd-a.jpg"},
              "annotations": [{"result": []}, {"result": [head, eye, {"type": "choices", "value": {}}]},
                              {"was_cancelled": True, "result": [eye]}]},
             {"id": 2, "data": {"text": "hello", "picture": "/data/local-files/?d=some/b.png"},
              "annotations": [{"result": [polygon, eye]}]},
             {"id": 3, "data": {"image": "c.png"}, "annotations": [{"result": [head]}]},
             {"id": 4, "data": {"image": "a.jpg"}, "annotations": []},
             {"id": 5, "data": {"image": "b.png"},
              "annotations": [{"result": [{**eye, "value": {"brushlabels": ["eye"]}}]}]}]
    done = import_label_studio(write(tmp_path / "s.json", tasks), pictures, tmp_path / "out", ["head", "eye"])
    assert done.names == ["a", "b"] and set(done.skipped) == {"task 3", "task 4", "task 5"}
    data = Folder(tmp_path / "out")
    assert data.classes == ("background", "head", "eye") and np.array_equal(data[0][1], TRUTH)
    inside = data[1][1].numpy()
    # an edge may go either way
    assert np.array_equal(inside == 2, TRUTH == 2) and np.abs((inside > 0).astype(int) - (TRUTH > 0)).sum() <= 34
    with pytest.raises(InputError, match="not a Label Studio export"):
        import_label_studio(write(tmp_path / "s.json", {"a": 1}), pictures, tmp_path / "x")


def test_classes_with_and_without_colours(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffground\t#010203\nroof tile\t#ff0000\n", encoding="utf-8")
    labels = read_classes(tmp_path / "classes.txt")
    assert labels.classes == ("ground", "roof tile") and labels.palette == ((1, 2, 3), (255, 0, 0))
    (tmp_path / "classes.txt").write_text("ground\nroof\t#ff0000\n")
    assert read_classes(tmp_path / "classes.txt").palette[0] == (0, 0, 0)


def test_command_line(tmp_path, pictures, capsys):
    pytest.importorskip("pycocotools")
    write(tmp_path / "c.json", coco({"image_id": 0, "category_id": 4, "segmentation": [[5, 4, 25, 4, 25, 16, 5, 16]]}))
    assert cli.main(["prepare", "coco", str(tmp_path / "c.json"), "--images", str(pictures), "--out",
                     str(tmp_path / "out")]) == 0
    assert "1 pictures in" in capsys.readouterr().out and Folder(tmp_path / "out").names == ["a"]
    assert cli.main(["prepare", "coco", str(tmp_path / "c.json"), "--images", str(tmp_path), "--out",
                     str(tmp_path / "out2")]) == 2
