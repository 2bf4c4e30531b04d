"""The painter in a real browser: real mouse and key events, and what is on disk afterwards, pixel for pixel."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from browser import Browser, browser, needs_browser  # noqa: F401
from matplotlib.path import Path as Polygon
from PIL import Image

from lagm.core.errors import InputError
from lagm.labelling.album import Album, Desk, read_painted, save_painted
from lagm.labelling.page import LabelServer, respond
from lagm.labelling.painter import Painter, answer

CLASSES, SIZE = ["background", "skin", "hair", "eye"], 64
SAVED = "document.querySelector('.lagm-painter').dataset.saved == 'yes'"


def make_pictures(folder, n=3, size=(SIZE, SIZE)):
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3),
                                                          np.uint8)).save(folder / "images" / f"face{i}.png")
    return folder


@pytest.fixture
def desk(tmp_path):
    halves = lambda album, index: np.repeat([[0] * 32 + [1] * 32], SIZE, 0)
    return Desk(Album(make_pictures(tmp_path / "faces"), CLASSES),
                {"clusters": halves, "prediction": lambda album, index: np.full((SIZE, SIZE), 3)})


@pytest.fixture
def page(desk, browser):  # noqa: F811
    server = LabelServer(lambda *request: respond(desk, *request))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.open("about:blank")
    browser.open(server.address)
    ready(browser, "face0")
    yield browser, desk, server
    server.shutdown(), server.server_close()


def ready(browser, name):  # noqa: F811
    browser.until(f"!!document.querySelector('.lagm-painter .status')?.textContent.includes('{name}, {SIZE}')")


def spot(browser, x, y):  # noqa: F811
    """Where a point of the picture, in its pixels, is on the screen."""
    left, top, width, height = browser.value(
        "(() => { const b = document.querySelector('.lagm-painter canvas').getBoundingClientRect(); return [b.left, "
        "b.top, b.width, b.height] })()")
    return left + x / SIZE * width, top + y / SIZE * height


def level(browser):  # noqa: F811
    """Put the picture on whole pixels of the screen, since a mouse has no other places: eight of them are one of the
    picture.
    """
    browser.value("(() => { const f = document.querySelector('.frame'), top = document.querySelector('.lagm-painter "
                  "canvas').getBoundingClientRect().top; "
                  "f.style.position = 'relative'; f.style.top = `${1 - top % 1}px` })()")
    left, top = spot(browser, 0, 0)
    assert left % 1 == top % 1 == 0 and spot(browser, SIZE, 0)[0] - left == 8 * SIZE


def stroke(points, size):
    """By another way than the canvas: the distance of each pixel's centre to each segment."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    inside = np.zeros((SIZE, SIZE), bool)
    for a, b in zip(np.array(points[:-1], float), np.array(points[1:], float)):
        t = np.clip(((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / max((b - a) @ (b - a), 1e-9), 0, 1)
        inside |= np.hypot(x - a[0] - t * (b - a)[0], y - a[1] - t * (b - a)[1]) <= size / 2
    return inside


def polygon(corners):
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return Polygon(corners).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(SIZE, SIZE)


@needs_browser
def test_each_tool_paints_what_it_shows(page):
    browser, desk, _ = page  # noqa: F811
    level(browser)
    expected = np.full((SIZE, SIZE), 255)

    def check():
        browser.until(SAVED)
        assert (read_painted(desk.album, 0) == expected).all()

    points = [(10.25, 10.25), (30.25, 12.25), (40.25, 30.25)]
    browser.key("2"), browser.drag([spot(browser, *p) for p in points])
    expected[stroke(points, 7)] = 2
    check()
    corners = [(5.125, 40.375), (30.375, 45.125), (28.625, 60.375), (8.375, 58.625)]  # no pixel's centre is on an edge
    browser.key("p"), browser.key("1")
    for corner in corners: browser.click(*spot(browser, *corner))
    browser.key("Enter")
    expected[polygon(corners)] = 1
    check()
    corners = [(40.125, 40.375), (60.375, 42.625), (50.625, 60.125)]
    browser.key("l"), browser.key("3"), browser.drag([spot(browser, *p) for p in corners])
    expected[polygon(corners)] = 3
    check()
    browser.key("e"), browser.click(*spot(browser, 50.25, 45.25))
    expected[stroke([(50.25, 45.25)] * 2, 7)] = 255
    check()
    browser.key("f"), browser.key("0"), browser.click(*spot(browser, 1.5, 1.5))
    outside = np.array(Image.fromarray((expected == 255).astype(np.uint8)))
    reached, front = np.zeros_like(outside, bool), [(1, 1)]
    while front:
        y, x = front.pop()
        if not (0 <= y < SIZE and 0 <= x < SIZE) or reached[y, x] or not outside[y, x]: continue
        reached[y, x] = True
        front += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    expected[reached] = 0
    check()
    browser.key("z"), browser.until(SAVED)
    expected[reached] = 255
    check()
    browser.key("y"), browser.until(SAVED)
    expected[reached] = 0
    check()


@needs_browser
def test_reload_goes_on_and_pictures_do_not_mix(page):
    browser, desk, server = page  # noqa: F811
    browser.key("1"), browser.drag([spot(browser, 20, 20), spot(browser, 30, 20)]), browser.until(SAVED)
    first = read_painted(desk.album, 0)
    browser.key("PageDown"), ready(browser, "face1")
    browser.key("2"), browser.click(*spot(browser, 50.5, 50.5)), browser.until(SAVED)
    assert set(np.unique(read_painted(desk.album, 1))) == {2, 255} and (read_painted(desk.album, 0) == first).all()
    browser.open("about:blank"), browser.open(server.address), ready(browser, "face0")
    browser.key("2"), browser.click(*spot(browser, 50.5, 50.5)), browser.until(SAVED)
    both = read_painted(desk.album, 0)
    assert (both[first == 1] == 1).all() and (both == 2).sum() == stroke([(50.5, 50.5)] * 2, 7).sum()
    browser.key("z"), browser.until(SAVED)
    assert (read_painted(desk.album, 0) == first).all()


@needs_browser
def test_the_keyboard_is_enough(page):
    browser, desk, _ = page  # noqa: F811
    for _ in range(6): browser.key("[")
    browser.key("3"), browser.key("ArrowRight"), browser.key("ArrowUp",
                                                             shift=True), browser.key(" "), browser.until(SAVED)
    mask = read_painted(desk.album, 0)
    assert np.argwhere(mask == 3).tolist() == [[22, 33]] and (mask != 255).sum() == 1
    browser.key("r"), browser.until(SAVED)
    assert (read_painted(desk.album, 0) == 0).sum() == SIZE * SIZE - 1
    browser.key("z", control=True), browser.key("z", control=True), browser.until(SAVED)
    assert not (desk.album.folder / "masks" / "face0.png").exists()


@needs_browser
def test_proposals(page):
    browser, desk, _ = page  # noqa: F811
    browser.key("g"), browser.until("document.querySelector('.status').textContent.includes('click a region')")
    browser.key("1"), browser.click(*spot(browser, 40, 5)), browser.until(SAVED)
    mask = read_painted(desk.album, 0)
    assert (mask[:, 32:] == 1).all() and (mask[:, :32] == 255).all()
    browser.key("s"), browser.until("document.querySelector('.status').textContent.includes('all labelled')")
    mask = read_painted(desk.album, 0)
    assert (mask[:, 32:] == 1).all() and (mask[:, :32] == 3).all()


@needs_browser
def test_what_cannot_be_saved_is_said(page):
    browser, desk, server = page  # noqa: F811
    desk.save = lambda index, content: (_ for _ in ()).throw(InputError("the disk is full"))
    browser.key("1"), browser.click(*spot(browser, 20, 20))
    browser.until("document.querySelector('.status.wrong')?.textContent.includes('not saved: the disk is full')")
    del desk.save
    browser.click(*spot(browser, 40, 40)), browser.until(SAVED)
    assert (read_painted(desk.album, 0) == 1).sum() == 2 * stroke([(20, 20)] * 2, 7).sum()


@pytest.mark.slow
@needs_browser
def test_the_command_line_and_ctrl_c(tmp_path, browser):  # noqa: F811
    make_pictures(tmp_path / "faces")
    lagm = [sys.executable, "-u", "-c", "import sys; from lagm.cli import main; sys.exit(main())", "label",
            str(tmp_path / "faces"), "--classes", ",".join(CLASSES), "--no-browser"]
    process = subprocess.Popen(lagm, stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(3)]
    browser.open(lines[1].strip()), ready(browser, "face0")
    browser.key("1"), browser.click(*spot(browser, 20, 20)), browser.until(SAVED)
    os.killpg(process.pid, 2)
    assert "1 of 3 pictures have labels" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert (read_painted(Album(tmp_path / "faces"), 0) == 1).sum() == stroke([(20, 20)] * 2, 7).sum()


# ---- the notebook's half, without and with a notebook


def test_messages(tmp_path):
    desk = Desk(Album(make_pictures(tmp_path / "a", size=(8, 6)), CLASSES))
    said, buffers = answer(desk, {"ask": 5, "kind": "picture", "index": 1})
    assert said == {"answer": 5, "result": {"width": 8, "height": 6}} and buffers[1] == b"\xff" * 48
    assert Image.open(io.BytesIO(buffers[0])).size == (8, 6)
    content = bytes(range(4)) * 12
    assert answer(desk, {"ask": 6, "kind": "save", "index": 1}, [memoryview(content)])[0]["result"] == {"labelled": 1.0}
    assert read_painted(desk.album, 1).tobytes() == content
    for content in ({"kind": "save", "index": 1}, {"kind": "picture", "index": "../../etc"},
                    {"kind": "picture", "index": True}, {"kind": "what"}, {}):
        said, buffers = answer(desk, {"ask": 7, **content}, [b"\x09" * 48])
        assert said["error"] and not buffers and said["answer"] == 7
    assert read_painted(desk.album, 1).max() == 3


@needs_browser
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("jupyterlab", "anywidget"))),
                    reason="JupyterLab or anywidget is not installed")
def test_in_jupyterlab(tmp_path):
    """A cell is run in JupyterLab, a stroke is painted with the mouse, keys of the painter do not reach the notebook.
    """
    import nbformat

    make_pictures(tmp_path / "faces")
    cell = nbformat.v4.new_code_cell(f"from lagm.labelling.painter import Painter\nPainter('faces', {CLASSES})")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "paint.ipynb")
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
         "--ServerApp.port=0", "--IdentityProvider.token=t",
         f"--ServerApp.root_dir={tmp_path}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "c"),
         "JUPYTER_DATA_DIR": str(tmp_path / "d"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "r")})
    browser = Browser(1400, 1200)  # noqa: F811
    try:
        port = Browser.wait_for(lambda: next((json.loads(p.read_text())["port"]
                                              for p in (tmp_path / "r").glob("jpserver-*.json")), None))
        browser.open(f"http://127.0.0.1:{port}/doc/tree/paint.ipynb?token=t")
        browser.until("!!document.querySelector('.jp-Notebook .cm-content')")
        browser.until("!!document.querySelector('[data-jp-item-name=run]')")
        shown = "!!document.querySelector('.lagm-painter .status')?.textContent.includes('face0, 64')"
        for _ in range(30):  # the first clicks come before the kernel is there
            browser.click_on("[data-jp-item-name=run]")
            time.sleep(2)
            if browser.value(shown): break
        browser.until(shown)
        cells = browser.value("document.querySelectorAll('.jp-Notebook .jp-Cell').length")
        browser.click_on(".lagm-painter .classes button:nth-child(3)")
        browser.value("document.querySelector('.lagm-painter .stage').scrollIntoView({block: 'center'})")
        points = [(20.25, 20.25), (40.25, 30.25)]
        browser.drag([spot(browser, *p) for p in points])
        for key in "bbb": browser.key(key)
        browser.until(SAVED)
        mask = read_painted(Album(tmp_path / "faces"), 0)
        assert (mask[stroke(points, 7)] == 2).mean() > 0.97 and abs((mask == 2).sum() - stroke(points, 7).sum()) < 6
        assert browser.value("document.querySelectorAll('.jp-Notebook .jp-Cell').length") == cells
    finally:
        browser.close()
        lab.terminate(), lab.wait(30)


def test_without_anywidget(tmp_path, monkeypatch):
    monkeypatch.setattr("lagm.labelling.painter.anywidget", None)
    with pytest.raises(InputError, match=r"painting in a notebook needs anywidget: .*pip install 'anywidget"):
        Painter(make_pictures(tmp_path / "a"), CLASSES)


# ---- odd folders


def test_masks_of_turned_pictures_and_other_formats(tmp_path):
    folder = make_pictures(tmp_path / "a", 1, (8, 6))
    picture = Image.open(folder / "images" / "face0.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "images" / "face0.png", exif=exif)
    album = Album(folder, CLASSES)
    mask = np.arange(48, dtype=np.uint8).reshape(8, 6) % 4
    assert album.image(0).size == (6, 8) and save_painted(album, 0, mask) == 1.0
    assert (read_painted(Album(folder), 0) == mask).all()
    (folder / "masks" / "face0.png").unlink()
    Image.fromarray(mask).save(folder / "masks" / "face0.tif")
    assert (read_painted(album, 0) == mask).all()
    save_painted(album, 0, 3 - mask)
    assert ([p.name for p in (folder / "masks").iterdir()] == ["face0.png"]
            and (read_painted(album, 0) == 3 - mask).all())


@pytest.mark.parametrize("classes", [["background"], ["background", "hair", "skin"], ["background", "skin", "skin"]])
def test_lists_of_classes_that_cannot_be(tmp_path, classes):
    folder = make_pictures(tmp_path / "a", 1)
    Album(folder, ["background", "skin", "hair"])
    with pytest.raises(InputError): Album(folder, classes)
    assert (folder / "classes.txt").read_text().count("\n") == 3


def test_requests_from_elsewhere(desk):
    import http.client

    server = LabelServer(lambda *request: respond(desk, *request))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port, token = server.server_port, server.token

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, body, {"X-Token": token, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())

    mask = bytes([1]) * SIZE * SIZE
    assert ask("PUT", "/api/mask/0", mask)[0] == 200
    for headers in ({"X-Token": ""}, {"X-Token": token[:-1]}, {"Host": "example.org"}, {"Host": f"example.org:{port}"}):
        assert ask("PUT", "/api/mask/0", bytes(SIZE * SIZE), **headers)[0] == 403
    assert ask("PUT", "/api/mask/0", mask, **{"Content-Length": "999999999999"})[0] == 413
    assert ask("GET", "/api/mask/%2e%2e/x")[0] == 404 and ask("DELETE", "/api/mask/0")[0] in (404, 501)
    assert (read_painted(desk.album, 0) == 1).all()
    status, body, headers = ask("GET", "/", **{"X-Token": ""})
    assert status == 200 and token not in body.decode() and "Access-Control-Allow-Origin" not in headers
    with pytest.raises(InputError, match=f"port {port}"): LabelServer(lambda *request: None, port=port)
    server.shutdown(), server.server_close()
