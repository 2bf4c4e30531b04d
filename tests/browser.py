"""A real Chromium without a window, driven over its debugging protocol with real mouse and key events; None is
installed by pip.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from tornado.websocket import websocket_connect

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
                None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian, Ubuntu: apt install chromium)")
KEYS = {" ": ("Space", 32), "Enter": ("Enter", 13), "Escape": ("Escape", 27), "PageDown": ("PageDown", 34),
        "PageUp": ("PageUp", 33),
        "ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38), "ArrowRight": ("ArrowRight", 39),
        "ArrowDown": ("ArrowDown", 40), "Tab": ("Tab", 9)}


class Browser:
    """One page of a browser of its own."""

    def __init__(self, width=1000, height=900):
        self.folder = Path(tempfile.mkdtemp(prefix="browser-"))
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0",
             f"--user-data-dir={self.folder}", f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop, self.number = asyncio.new_event_loop(), 0
        port = self.wait_for(lambda: (self.folder / "DevToolsActivePort").read_text().split()[0]
                             if (self.folder / "DevToolsActivePort").exists() else None)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply: pages = json.load(reply)
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket = self.run(self._connect(address))
        self.said = []
        for domain in ("Page", "Runtime"): self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self.number += 1
        self.run(self._write(json.dumps({"id": self.number, "method": method, "params": parameters})))
        while True:
            message = json.loads(self.run(asyncio.wait_for(self._next(), 60)))
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.said.append(message["params"]["exceptionDetails"])

    def run(self, work): return self.loop.run_until_complete(work)

    async def _connect(self, address): return await websocket_connect(address, max_message_size=2 ** 28)

    async def _write(self, text): await self.socket.write_message(text)

    async def _next(self): return await self.socket.read_message()

    @staticmethod
    def wait_for(condition, seconds=60):
        """The first true result of `condition`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = condition()
            if found: return found
            time.sleep(0.05)
        raise AssertionError("waited in vain")

    def open(self, address): self.send("Page.navigate", url=address)

    def value(self, script):
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script): return self.wait_for(lambda: self.value(script))

    def mouse(self, kind, x, y, buttons=1, clicks=1):
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y,
                  button="none" if kind == "Moved" and not buttons else "left", buttons=buttons, clickCount=clicks)

    def drag(self, points):
        """Press at the first point, move through the others, let go at the last."""
        self.mouse("Moved", *points[0], buttons=0)
        self.mouse("Pressed", *points[0])
        for point in points[1:]: self.mouse("Moved", *point)
        self.mouse("Released", *points[-1], buttons=0)

    def click(self, x, y): self.drag([(x, y)])

    def click_on(self, selector):
        box = self.value(f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect(); return "
                         f"[b.left + b.width / 2, b.top + b.height / 2] }})()")
        self.click(*box)

    def key(self, key, control=False, shift=False):
        code, number = KEYS.get(key, (f"Key{key.upper()}" if key.isalpha() else f"Digit{key}", ord(key.upper()[0])))
        text = {} if control or len(key) > 1 and key != "Enter" else {"text": "\r" if key == "Enter" else key}
        common = dict(key=key, code=code, windowsVirtualKeyCode=number, modifiers=2 * control + 8 * shift)
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_files(self, selector, paths):
        """What a person chooses in the dialog that a file input opens."""
        found = self.send("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]
        self.send("DOM.setFileInputFiles", objectId=found["objectId"], files=[str(path) for path in paths])

    def drop_files(self, selector, paths):
        """Drag files from another window over an element and let them go."""
        x, y = self.value(f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect(); return "
                          f"[b.left + b.width / 2, b.top + b.height / 2] }})()")
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def resize(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    page = Browser()
    yield page
    page.close()
    assert not page.said, page.said
