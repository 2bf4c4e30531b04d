"""The page of `lagm serve` in a real browser: files are dropped and chosen, parts looked at, masks downloaded."""

import http.client
import io
import json
import os
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from browser import Browser, browser, needs_browser  # noqa: F401
from PIL import Image

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.data.images import png
from lagm.data.label_maps import make_labels
from lagm.experiments.serve import _Counter, _most_pixels, _respond, open_page
from lagm.models.saved import save_segmenter
from lagm.models.segmenters import UNet

LABELS = make_labels("made", ["background", "skin", "hair"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A segmenter with something to say about the pictures beside it."""
    here = tmp_path_factory.mktemp("serve")
    torch.manual_seed(1)
    segmenter = UNet(3, width=4, levels=2).eval()
    last = [layer for layer in segmenter.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    y, x = np.mgrid[:40, :64]
    with torch.no_grad():  # no class wins everywhere
        pattern = torch.from_numpy(np.stack([x / 32 - 1, y / 20 - 1, np.cos(x * y / 40)])[None]).float()
        logits = segmenter(pattern)
        last.weight /= logits.std((0, 2, 3)).view(-1, 1, 1, 1)
        last.bias.copy_((last.bias - logits.mean((0, 2, 3))) / logits.std((0, 2, 3)))
    save_segmenter(here / "s.safetensors", segmenter, LABELS, (32, 32), "fit")
    (here / "in").mkdir()
    for i, (suffix, size) in enumerate([("png", (64, 40)), ("jpg", (300, 200)), ("tif", (33, 57))]):
        pixels = np.stack([4 * x, 6 * y, (x * y * (i + 1)) % 256], -1).astype(np.uint8)
        Image.fromarray(pixels).resize(size).save(here / "in" / f"p{i}.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(here / "in" / "p1.jpg").save(here / "in" / "turned.jpg", exif=exif)
    words = ["predict", str(here / "s.safetensors"), str(here / "in"), "-o", str(here / "out"), "--device", "cpu"]
    assert main(words) == 0
    return here


@pytest.fixture(scope="module")
def counter(files):
    from lagm.evaluation.prediction import settings_of

    segmenter, labels, size, policy = settings_of(files / "s.safetensors")
    return _Counter(segmenter.eval(), labels, size, policy, name="s.safetensors")


@pytest.fixture
def server(counter):
    server = open_page(counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


@pytest.fixture
def page(server, browser):  # noqa: F811
    browser.resize(1000, 900)
    browser.open("about:blank")
    browser.open(server.address)
    browser.until("!!document.querySelector('.lagm-viewer .drop')")
    return browser


def done(browser, shown):  # noqa: F811
    browser.until(f"(d => d.busy == 'no' && d.shown == {shown!r})(document.querySelector('.lagm-viewer').dataset)")


def parts_of(answer):
    (length,) = struct.unpack(">I", answer[:4])
    facts = json.loads(answer[4:4 + length])
    at = 4 + length
    return facts, answer[at:at + facts["picture"]], answer[at + facts["picture"]:]


def test_masks_are_those_of_predict_byte_for_byte(files, counter):
    for path in sorted((files / "in").iterdir()):
        facts, picture, mask = parts_of(counter.label(path.read_bytes()))
        assert mask == (files / "out" / "masks" / path.with_suffix(".png").name).read_bytes()
        assert Image.open(io.BytesIO(picture)).size == (facts["width"], facts["height"])
        values = np.asarray(Image.open(io.BytesIO(mask)))
        assert np.allclose(facts["shares"], [(values == c).mean() for c in range(3)]) and len(np.unique(values)) > 1


def test_limits(counter, monkeypatch):
    assert _most_pixels(250, "fit") * 4 * 250 <= 2**30 and _most_pixels(2, "native") == 4_000_000
    monkeypatch.setattr(counter, "most_pixels", 99)
    with pytest.raises(InputError, match="10 x 10 pixels, more than the 99"):
        counter.label(png(np.zeros((10, 10, 3), np.uint8)))
    assert _respond(counter, "POST", "/api/label")[0] == _respond(counter, "GET", "/../x")[0] == 404


def test_requests_from_elsewhere(server):
    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request(method, path, body, {"X-Token": server.token, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()

    small = png(np.zeros((4, 4, 3), np.uint8))
    assert ask("PUT", "/api/label", small)[0] == 200
    for headers in ({"X-Token": "guess"}, {"Host": "example.org"}):
        assert ask("PUT", "/api/label", small, **headers)[0] == 403
    status, said = ask("PUT", "/api/label", b"", **{"Content-Length": "32000001"})
    assert status == 413 and b"32 MB" in said
    assert ask("GET", "/viewer.js")[0] == 200 and ask("GET", "/painter.js")[0] == 404
    status, said = ask("PUT", "/api/label", b"<html>")
    assert status == 400 and b"web page" in said


@needs_browser
def test_choose_drop_look_and_download(page, files, tmp_path):
    page.choose_files(".drop input", [files / "in" / "p0.png"])
    done(page, "p0.png")
    expected = np.asarray(Image.open(files / "out" / "masks" / "p0.png"))
    entries = page.value("[...document.querySelectorAll('.legend .entry')].map(e => e.textContent)")
    for number, name in enumerate(LABELS.classes):
        share = f"{100 * (expected == number).mean():.1f} %"
        assert (f"{name}{share}" in entries) == bool((expected == number).any())
    read = ("(() => { const c = document.querySelectorAll('.frame canvas')[1]; return [...c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data] })()")
    shown = np.array(page.value(read)).reshape(40, 64, 4)
    assert ((shown[..., 3] == 255) == (expected > 0)).all()
    for number in (1, 2): assert (shown[expected == number][:, :3] == LABELS.palette[number]).all()
    page.drop_files(".drop", [files / "in" / name for name in ("p1.jpg", "turned.jpg", "p2.tif")])
    done(page, "p2.tif")
    assert page.value("document.querySelector('select').options.length") == 4
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in ("p2", "turned"):
        page.key("d")
        Browser.wait_for(lambda: (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.png").stat().st_size)
        assert (tmp_path / f"{name}.png").read_bytes() == (files / "out" / "masks" / f"{name}.png").read_bytes()
        page.key("PageUp"), page.until("document.querySelector('.lagm-viewer').dataset.shown == 'turned.jpg'"
                                       if name == "p2" else "true")
    assert page.value("document.querySelector('.frame').style.aspectRatio").replace(" ", "") == "300/200"  # p1.jpg


@needs_browser
def test_the_keyboard_is_enough(page, files):
    page.key("Tab")
    assert page.value("document.activeElement.type") == "file"
    page.choose_files(".drop input", [files / "in" / "p0.png"])
    done(page, "p0.png")
    opacity = "document.querySelectorAll('.frame canvas')[1].style.opacity"
    assert page.value(opacity) == "0.6"
    page.key("o")
    assert page.value(opacity) == "0"
    page.key("o")
    assert page.value(opacity) == "0.6"
    for _ in range(6):
        page.key("Tab")
        if page.value("document.activeElement.type") == "range": break
    page.key("ArrowLeft")
    assert page.value(opacity) == "0.59"
    page.key("Tab")
    assert page.value("document.activeElement.textContent") == "Download mask"
    page.key("Tab")
    name = page.value("document.activeElement.title")
    assert name.startswith("Show or hide")
    page.key(" ")
    assert page.value("document.activeElement.ariaPressed") == "false"
    number = LABELS.index(name.removeprefix("Show or hide "))
    assert page.value("document.querySelector('.lagm-viewer') && [...document.querySelectorAll('.entry')].length") > 1
    count = page.value("(() => { const c = document.querySelectorAll('.frame canvas')[1]; const d = c.getContext('2d')"
                       ".getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) "
                       "n += d[i] > 0; return n })()")
    expected = np.asarray(Image.open(files / "out" / "masks" / "p0.png"))
    assert count == ((expected > 0) & (expected != number)).sum()


@needs_browser
def test_what_is_no_picture_gets_a_sentence_and_the_rest_goes_on(page, files, tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "torn.png").write_bytes((files / "in" / "p0.png").read_bytes()[:60])
    with open(tmp_path / "huge.png", "wb") as file: file.truncate(32_000_001)
    page.drop_files(".drop", [tmp_path / "notes.json", tmp_path / "torn.png", tmp_path / "huge.png",
                              files / "in" / "p0.png"])
    done(page, "p0.png")
    said = page.value("[...document.querySelectorAll('.wrong li')].map(e => e.textContent)")
    assert len(said) == 3 and said[0].startswith("notes.json: it is not a picture")
    assert "torn.png: it is damaged" in said[1]
    assert said[2] == "huge.png: it has 33 MB, and 32 MB are taken at most; make it smaller"
    page.choose_files(".drop input", [files / "in" / "p1.jpg"])
    done(page, "p1.jpg")
    assert page.value("document.querySelectorAll('.wrong li').length") == 0


@needs_browser
def test_nothing_sticks_out_on_a_phone(page, files):
    page.resize(360, 700)
    page.choose_files(".drop input", [files / "in" / "p1.jpg"])
    done(page, "p1.jpg")
    assert page.value("document.documentElement.scrollWidth") <= 360
    assert page.value("document.querySelector('.frame').getBoundingClientRect().width") > 290


@pytest.mark.slow
@needs_browser
def test_the_command_line(browser, files):  # noqa: F811
    words = [sys.executable, "-u", "-c", "import sys; from lagm.cli import main; sys.exit(main())", "serve",
             str(files / "s.safetensors"), "--no-browser", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(3)]
    assert "background, skin, hair" in lines[0]
    browser.resize(1000, 900)
    browser.open(lines[1].strip())
    browser.until("!!document.querySelector('.lagm-viewer .drop')")
    browser.choose_files(".drop input", [files / "in" / "p0.png"])
    done(browser, "p0.png")
    os.killpg(process.pid, 2)
    assert "lagm predict" in process.communicate(timeout=60)[0] and process.returncode == 0
