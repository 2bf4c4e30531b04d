"""`compare`: the same pictures in a widget with a line, with a slider, and in a figure."""

import importlib.util
import io
import threading

import numpy as np
import pytest
import torch
from browser import browser, needs_browser  # noqa: F401
from PIL import Image
from tiny import LABELS, tiny_segmenter

from lagm.core.errors import InputError
from lagm.core.files import asset
from lagm.evaluation.compare import as_picture, compare, wiped
from lagm.evaluation.prediction import overlay, predict_pictures
from lagm.labelling.page import LabelServer
from lagm.models.saved import save_segmenter

needs_widgets = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("anywidget", "ipywidgets"))),
                                   reason="anywidget is not installed")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))


@pytest.fixture
def files(tmp_path):
    for name, seed in (("before", 0), ("after", 5)):
        save_segmenter(tmp_path / f"{name}.safetensors", tiny_segmenter(seed), LABELS, (16, 16), "fit")
    return tmp_path


def pixels(png): return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_any_kind_of_picture(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    tensor = torch.from_numpy(np.asarray(PICTURE).copy()).movedim(-1, 0) / 127.5 - 1
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), PICTURE, np.asarray(PICTURE), tensor):
        assert as_picture(image) == PICTURE
    for image in (tensor[:1], np.zeros((4, 4)), np.zeros((4, 4, 3)), None):
        with pytest.raises(InputError, match="is no picture"): as_picture(image)


@needs_widgets
def test_widgets_show_what_predict_says(files):
    found = predict_pictures(tiny_segmenter(0).eval(), [PICTURE], "fit", (16, 16))[0]
    parts = overlay(PICTURE, found, LABELS, 0.6)
    widget = compare(files / "before.safetensors", PICTURE)
    assert (pixels(widget.left) == np.asarray(PICTURE)).all() and (pixels(widget.right) == parts).all()
    assert widget.names == ["picture", "before"] and widget.split == 0.5
    both = compare(files / "before.safetensors", PICTURE, files / "after.safetensors")
    assert (pixels(both.left) == parts).all() and both.names == ["before", "after"]
    box = compare(files / "before.safetensors", PICTURE, how="ipywidgets", split=0.25)
    image, row = box.children
    assert (pixels(image.value) == wiped(np.asarray(PICTURE), parts, 0.25)).all()
    row.children[0].value = 0.75
    assert (pixels(image.value) == wiped(np.asarray(PICTURE), parts, 0.75)).all()


def test_a_figure_without_widgets(files, monkeypatch):
    monkeypatch.setattr("lagm.evaluation.compare._there", lambda name: False)
    figure = compare(files / "before.safetensors", PICTURE)
    assert (figure.axes[0].images[0].get_array() == np.asarray(PICTURE)).all()
    with pytest.raises(InputError, match="give `labels`"): compare(tiny_segmenter(0), PICTURE)
    with pytest.raises(InputError, match="no way 'film'"): compare(files / "before.safetensors", PICTURE, how="film")


PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:20px"><div id="out"></div><script type="module">
import widget from "/viewer.js";
const hash = new URLSearchParams(location.hash.slice(1)), values = {names: ["picture", "parts"], split: 0.5};
for (const name of ["left", "right"]) values[name] = new DataView(await (await fetch(`/${name}`)).arrayBuffer());
window.model = {get: name => values[name], set: (name, value) => (values[name] = value),
                save_changes: () => (window.saved = values.split)};
widget.render({model: window.model, el: document.getElementById("out")});
</script>"""


@needs_browser
def test_the_line_follows_mouse_and_keys(browser, tmp_path):  # noqa: F811
    left, right = np.full((20, 30, 3), (200, 0, 0), np.uint8), np.full((20, 30, 3), (0, 0, 200), np.uint8)
    server = LabelServer(lambda *request: (404, "text/plain", b"", {}), PAGE,
                         scripts={"/viewer.js": asset("viewer/viewer.js").read_bytes()})
    for name, content in (("left", left), ("right", right)):
        file = io.BytesIO()
        Image.fromarray(content).save(file, "PNG")
        server.files[f"/{name}"] = "image/png", file.getvalue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.resize(800, 600)
    browser.open(server.address)
    browser.until("document.querySelector('.lagm-viewer')?.dataset.ready == 'yes'")
    box = browser.value("(() => { const b = document.querySelector('.both').getBoundingClientRect(); "
                        "return [b.left, b.top, b.width, b.height] })()")

    def colours():
        browser.screenshot(tmp_path / "seen.png")
        seen = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB")).astype(int)
        row = seen[round(box[1] + box[3] / 2), round(box[0]):round(box[0] + box[2])]
        return (row[:, 0] > 150).mean(), (row[:, 2] > 150).mean()

    assert box[2] >= 300 and np.allclose(colours(), 0.5, atol=0.03)
    x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
    browser.drag([(x, y), (box[0] + box[2] * 0.6, y), (box[0] + box[2] * 0.8, y)])
    assert abs(browser.value("window.saved") - 0.8) < 0.01 and np.allclose(colours(), (0.8, 0.2), atol=0.03)
    browser.value("document.querySelector('.lagm-viewer input').focus()")
    for _ in range(100): browser.key("ArrowLeft")
    assert abs(browser.value("window.saved") - 0.7) < 0.01 and np.allclose(colours(), (0.7, 0.3), atol=0.03)
    server.shutdown(), server.server_close()
