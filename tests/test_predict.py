"""From a folder of pictures to masks, overlays and COCO; exports that give the network's logits; evaluation of a file.
"""

import importlib.util
import json
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from shell import lagm
from tiny import LABELS, tiny_pictures, tiny_segmenter
from torch import nn

from lagm.core.errors import InputError
from lagm.core.tensors import save_tensors
from lagm.data.exporters import rle_decode
from lagm.data.images import read_image
from lagm.data.labels import CELEBA8
from lagm.data.writers import WRITERS
from lagm.evaluation.export import export_onnx, export_program, write_model_card
from lagm.evaluation.metrics import evaluate, predict
from lagm.evaluation.prediction import _writer as one_after_the_other
from lagm.evaluation.prediction import (
    evaluate_checkpoint,
    list_pictures,
    open_segmenter,
    overlay,
    place,
    predict_folder,
    predict_pictures,
)
from lagm.models.saved import save_segmenter


class Red(nn.Module):
    """Class 1 where red is positive, 2 where it is also very bright; notes what it sees."""
    n_classes, seen = 3, ()

    def forward(self, x):
        self.seen += (tuple(x.shape),)
        r = x[:, :1]
        return torch.cat([-r, r, 4 * r - 2.4], 1)


def picture(height, width, split=0.5):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, int(width * split):] = (180, 40, 40)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("policy, inner, outer",
                         [("fit", (16, 32), (32, 32)), ("stretch", (32, 32), (32, 32)), ("native", (40, 80), (40, 80))])
def test_policies(policy, inner, outer):
    pixels, placement = place(picture(40, 80), policy, (32, 32))
    assert (placement.inner, placement.outer, tuple(pixels.shape[1:])) == (inner, outer, outer)
    mask, = predict_pictures(Red(), [picture(40, 80)], policy, (32, 32))
    assert mask.shape == (40, 80) and mask.dtype == np.uint8
    expected = np.zeros((40, 80), int)
    expected[:, 40:] = 1
    assert (mask != expected).mean() < 0.03


def test_the_filling_is_the_edge_and_is_cut_off():
    pixels, placement = place(picture(10, 30), "fit", (21, 30))
    assert (placement.top == 5 and pixels[:, :5].equal(pixels[:, 5:6].expand(-1, 5, -1))
            and pixels[:, 15:].equal(pixels[:, 14:15].expand(-1, 6, -1)))
    rows = torch.arange(21.0)[None, :, None].expand(3, 21, 30)
    assert placement.back(rows)[0, :, 0].tolist() == list(range(5, 15))


def test_pictures_of_one_size_go_together():
    network = Red()
    pictures = [picture(16, 16), picture(20, 16), picture(16, 16)]
    masks = predict_pictures(network, pictures, "native")
    assert (sorted(network.seen) == [(1, 3, 20, 16), (2, 3, 16, 16)]
            and [m.shape for m in masks] == [(16, 16), (20, 16), (16, 16)])
    assert np.array_equal(masks[0], predict(Red(), place(pictures[0], "native")[0][None])[0])


def test_overlay():
    mask = np.array([[0, 1]], np.uint8)
    assert overlay(Image.fromarray(np.full((1, 2, 3), 100, np.uint8)), mask, LABELS,
                   0.5).tolist() == [[[100] * 3, [178, 50, 50]]]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    picture(12, 20).save(folder / "b.png")
    picture(30, 14).save(folder / "below" / "a.JPG", quality=95)
    (folder / "torn.jpeg").write_bytes(b"\xff\xd8\xff not much")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder(pictures, tmp_path):
    result = predict_folder(Red(), pictures, tmp_path / "out", LABELS, (16, 16), progress=False)
    assert (result.done == ["b.png", "below/a.JPG"] and list(result.failed) == ["torn.jpeg"]
            and "torn.jpeg" in str(result))
    mask = Image.open(tmp_path / "out" / "masks" / "b.png")
    assert (mask.mode == "P" and mask.size == (20, 12)
            and mask.getpalette()[:9] == [v for c in LABELS.palette for v in c])
    assert Image.open(tmp_path / "out" / "overlays" / "below" / "a.png").size == (14, 30)
    coco = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert ([(i["file_name"], i["height"], i["width"]) for i in coco["images"]]
            == [("b.png", 12, 20), ("below/a.JPG", 30, 14)])
    rebuilt = np.zeros((12, 20), int)
    for a in coco["annotations"]:
        if a["image_id"] == 1: rebuilt[rle_decode(a["segmentation"])] = a["category_id"]
    assert np.array_equal(rebuilt, np.asarray(mask))


@pytest.mark.parametrize("form", ["masks", *WRITERS])
def test_where_nothing_could_be_labelled_nothing_is_written(form, pictures, tmp_path):
    """Not over what an earlier call has written, either."""
    out, torn = tmp_path / "out", tmp_path / "torn"
    torn.mkdir()
    (torn / "torn.jpeg").write_bytes((pictures / "torn.jpeg").read_bytes())
    def written(): return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    assert predict_folder(Red(), torn, out, LABELS, (16, 16), progress=False, form=form).done == []
    assert not written()
    predict_folder(Red(), pictures, out, LABELS, (16, 16), progress=False, form=form)
    before = written()
    assert before and predict_folder(Red(), torn, out, LABELS, (16, 16), progress=False, form=form).failed
    assert written() == before


def test_folder_mistakes(pictures, tmp_path):
    with pytest.raises(InputError, match="lies in the folder"):
        predict_folder(Red(), pictures, pictures / "out", LABELS, (16, 16))
    with pytest.raises(InputError, match="no folder"): list_pictures(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"): list_pictures(tmp_path / "empty")
    picture(4, 4).save(pictures / "b.jpg")
    with pytest.raises(InputError, match="extension only"): list_pictures(pictures)
    with pytest.raises(InputError, match="fit, stretch, native"): place(picture(4, 4), "crop", (8, 8))
    with pytest.raises(InputError, match="needs the size"): place(picture(4, 4), "stretch")


@pytest.mark.parametrize("mark", ["project.yaml", "classes.txt"])
@pytest.mark.parametrize("form", ["masks", "coco"])
def test_painted_masks_are_not_overwritten(pictures, tmp_path, mark, form):
    folder = tmp_path / "project"
    (folder / "masks").mkdir(parents=True)
    (folder / mark).write_text("")
    (folder / "masks" / "a.png").write_bytes(b"painted")
    with pytest.raises(InputError, match="choose another place"):
        predict_folder(Red(), pictures, folder, LABELS, (8, 8), form=form, progress=False)
    assert (folder / "masks" / "a.png").read_bytes() == b"painted"


def test_on_the_command_line(pictures, tmp_path):
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(), LABELS, (16, 16))
    done = lagm("predict", tmp_path / "s.safetensors", pictures, "-o", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0 and "2 pictures labelled" in done.stdout, done.stderr
    segmenter, labels, size = open_segmenter(tmp_path / "s.safetensors")
    assert labels == LABELS and size == (16, 16)
    expected, = predict_pictures(segmenter, [picture(12, 20)], "fit", size)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / "b.png")), expected)


def test_opening_files(tmp_path):
    save_segmenter(tmp_path / "n.safetensors", tiny_segmenter())
    _, labels, size = open_segmenter(tmp_path / "n.safetensors")
    assert labels.classes == ("background", "class 1", "class 2") and size is None
    with pytest.raises(InputError, match="3 classes"): open_segmenter(tmp_path / "n.safetensors", CELEBA8)
    with pytest.raises(InputError, match="no such file"): open_segmenter(tmp_path / "missing.safetensors")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(InputError): open_segmenter(tmp_path / "junk.pth")


def test_a_checkpoint_without_header_is_opened_too(tmp_path):
    """As the authors' segmentator-*.pth: a plain state dict."""
    torch.save(tiny_segmenter_of_four_levels().state_dict(), tmp_path / "segmentator-000001.pth")
    segmenter, labels, size = open_segmenter(tmp_path / "segmentator-000001.pth", LABELS)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert segmenter(x).equal(tiny_segmenter_of_four_levels().eval()(x))
    assert labels == LABELS and size is None


def tiny_segmenter_of_four_levels():
    from lagm.models.segmenters import UNet
    torch.manual_seed(0)
    return UNet(3, width=4, levels=4)


def test_evaluation_of_a_file(tmp_path):
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(), LABELS, (16, 16))
    images, masks = tiny_pictures(12)
    report = evaluate_checkpoint(tmp_path / "s.safetensors", images, masks, tmp_path / "report")
    assert (report["metrics"] == vars(evaluate(tiny_segmenter(), images, masks, 3))
            and report["checkpoint"] == "s.safetensors")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["confusion.png", "metrics.json", "table.png",
                                                                       "worst.png"]
    assert json.loads((tmp_path / "report"
                       / "metrics.json").read_text())["metrics"]["miou"] == pytest.approx(report["metrics"]["miou"])
    nothing = evaluate_checkpoint(tmp_path / "s.safetensors", images, torch.zeros_like(masks), tmp_path / "bare")
    assert nothing["metrics"]["pixel_accuracy"] >= 0 and not (tmp_path / "bare" / "worst.png").exists()
    write_model_card(tmp_path / "card.md", tmp_path / "s.safetensors", "Tiny", "For tests.", "Apache-2.0", report)
    card = (tmp_path / "card.md").read_text()
    assert ("| 2 | bright | #0000ff |" in card and "Apache-2.0" in card
            and f"FG-mIoU {report['metrics']['fg_miou']:.1%}" in card and "trained at 16 x 16" in card)


def test_torch_export(tmp_path):
    assert export_program(tiny_segmenter(), tmp_path / "s.pt2", (16, 16)) < 1e-5
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "s.pt2").module()(x), tiny_segmenter().eval()(x), atol=1e-5)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
                    reason="needs the extra 'onnx'")
def test_onnx(tmp_path):
    import onnxruntime
    if Version(torch.__version__) < Version("2.7"):
        with pytest.raises(InputError, match="cannot export this to ONNX; install a later one"):
            export_onnx(tiny_segmenter(), tmp_path / "s.onnx", (16, 20))
        return
    assert export_onnx(tiny_segmenter(), tmp_path / "s.onnx", (16, 20)) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 16, 20)
    with torch.no_grad(): expected = tiny_segmenter().eval()(x)
    assert np.allclose(session.run(["logits"], {"pictures": x.numpy()})[0], expected, atol=1e-4 * expected.abs().max())


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="python -m pip install .onnx.*onnxruntime"):
        export_onnx(tiny_segmenter(), tmp_path / "s.onnx", (16, 16))
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    from lagm.training.processes import make_fabric
    with pytest.raises(InputError, match="python -m pip install .lightning-fabric"):
        make_fabric(2, torch.device("cpu"), "float32")


def test_an_export_that_is_wrong_is_refused(tmp_path):
    from lagm.evaluation.export import _compare
    (tmp_path / "bad").write_text("")
    with pytest.raises(InputError, match="differs"):
        _compare(tiny_segmenter().eval(), lambda x: torch.zeros(len(x), 3, 16, 16), (16, 16), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_not_a_segmenter(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"kind": "generator"})
    with pytest.raises(InputError): open_segmenter(tmp_path / "x.safetensors")


def many(folder, number):
    folder.mkdir()
    for i in range(number): picture(8 + i % 3, 9, (i % 7) / 7).save(folder / f"{i:03d}.png")
    return folder


def test_a_folder_flows_through(tmp_path, monkeypatch):
    """The first masks are there long before the last pictures are read, and only a few pictures are in memory."""
    folder, alive, most, ready = many(tmp_path / "in", 300), weakref.WeakValueDictionary(), [], {}

    def counted(path, **kw):
        if path.name in ("150.png", "299.png"):  # whoever waits to read a late picture sees what is done
            for _ in range(2000):
                ready[path.name] = len(list((tmp_path / "out").glob("masks/[!.]*.png")))
                if ready[path.name] >= int(path.stem) - 40: break
                time.sleep(0.01)
        found = read_image(path, **kw)
        alive[path.name] = found
        most.append(len(alive))
        return found

    monkeypatch.setattr("lagm.evaluation.prediction.read_image", counted)
    result = predict_folder(Red(), folder, tmp_path / "out", LABELS, (8, 8), batch=4, progress=False)
    assert result.done == [f"{i:03d}.png" for i in range(300)]
    assert ready["150.png"] >= 110 and ready["299.png"] >= 259 and max(most) < 50


@pytest.mark.parametrize("form", ["masks", "coco", "cvat", "voc", "yolo", "labelme", "napari"])
def test_threads_keep_the_order(tmp_path, monkeypatch, form):
    folder = many(tmp_path / "in", 60)

    def later(path, **kw):
        time.sleep(0.004 * (int(path.stem) % 5 == 0))  # some pictures come late
        return read_image(path, **kw)

    monkeypatch.setattr("lagm.evaluation.prediction.read_image", later)
    predict_folder(Red(), folder, tmp_path / "threads", LABELS, (8, 8), batch=7, progress=False, form=form)
    with one_after_the_other(form, tmp_path / "plain", LABELS, 0) as writer:
        for path in sorted(folder.iterdir()):
            image = read_image(path)
            writer.add(path.name, path, image, predict_pictures(Red(), [image], "fit", (8, 8))[0])
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "threads") for path in (tmp_path / "threads").rglob("*")
                     if path.is_file()} and len(files) > 60
    for path in files: assert (tmp_path / "threads" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    folder = many(tmp_path / "in", 40)

    def full(*_, **__): raise InputError("cannot write it: no space left; make room, or choose another place")

    monkeypatch.setattr("lagm.evaluation.prediction.png", full)
    with pytest.raises(InputError, match="make room"):
        predict_folder(Red(), folder, tmp_path / "out", LABELS, (8, 8), batch=4, progress=False)
    assert not (tmp_path / "out" / "annotations.json").exists()


def test_the_most_likely_class():
    """The first of equals, and that of the network's own numbers where nothing is resized."""
    logits = torch.randn(5, 40, 30, generator=torch.Generator().manual_seed(0))
    logits[1:3] = logits[1:3].round()
    network = nn.Module()
    network.forward = lambda x: logits[None].expand(len(x), -1, -1, -1)
    mask, = predict_pictures(network, [picture(40, 30)], "native")
    assert np.array_equal(mask, logits.numpy().argmax(0))


@pytest.mark.parametrize("form", ["masks", "coco", "cvat", "voc", "yolo", "labelme", "napari"])
def test_the_disk_is_not_waited_for_at_each_picture(tmp_path, monkeypatch, form):
    flushed = []
    monkeypatch.setattr("lagm.core.files._flush_to_disk", flushed.append)
    predict_folder(Red(), many(tmp_path / "in", 30), tmp_path / "out", LABELS, (8, 8), progress=False, form=form)
    assert 0 < len(flushed) < 10
