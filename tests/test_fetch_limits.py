"""What a server may not do to a download: never end, compress, trickle, change the file half-way, lead to plain http;
and two calls at once.
"""

import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import nursery
import pytest

import lagm.download.fetch as fetching
import lagm.download.transfer as transferring
from lagm.core.errors import InputError
from lagm.download.fetch import download, fetch, fetch_from, remote_size
from lagm.download.sources import Source
from lagm.download.transfer import Unavailable, transfer

pytest.importorskip("pooch")
requests = pytest.importorskip("requests")

OLD, NEW = (b"\x80\x04" + letter * 100_000 + b"." for letter in (b"o", b"n"))
QUICK = {"attempts": 3, "pause": 0.01, "timeout": (1, 1), "progress": False}


class Server(http.server.BaseHTTPRequestHandler):
    """The first word of the path says how to misbehave."""

    def log_message(self, *_): pass

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        kind, start = (self.path.split("/")[1],
                       int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")))
        log = self.server.log
        log.append((kind, start, self.headers.get("If-Range")))
        try: getattr(self, kind.replace("-", "_"))(start, len([entry for entry in log if entry[0] == kind]))
        except (BrokenPipeError, ConnectionResetError): pass

    def head(self, code=200, **headers):
        self.send_response(code)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, content, start, **headers):
        piece = content[start:]
        more = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.head(206 if start else 200, Content_Length=len(piece), **more, **headers)
        return piece

    def endless(self, start, _):
        self.head()
        while True: self.wfile.write(b"\x80" * 65536)

    def endless_chunks(self, start, _):
        self.head(Transfer_Encoding="chunked")
        while True: self.wfile.write(b"10000\r\n" + b"\x80" * 65536 + b"\r\n")

    def huge(self, start, _): self.head(Content_Length=10**15)

    def gzip(self, start, _):
        bomb = gzip.compress(bytes(10**7))
        self.head(Content_Encoding="gzip", Content_Length=len(bomb))
        self.wfile.write(bomb)

    def trickle(self, start, _):
        piece = self.send(OLD, start, ETag='"one"')
        for i in range(40):
            self.wfile.write(piece[i:i + 1])
            time.sleep(0.05)

    def crumbs(self, start, _): self.wfile.write(self.send(OLD, start, ETag='"one"')[:10])

    def dated(self, start, count):  # a changed file, told by its date only
        content = OLD if count == 1 else NEW
        date = f"Sat, 0{min(count, 2)} Jan 2022 00:00:00 GMT"
        if self.headers.get("If-Range") not in (None, date): start = 0
        self.wfile.write(self.send(content, start, Last_Modified=date)[:50_000 if count == 1 else None])

    def rude(self, start, count):  # a changed file; If-Range is not looked at
        self.wfile.write(self.send(OLD if count == 1 else NEW, start,
                                   ETag=f'"{min(count, 2)}"')[:50_000 if count == 1 else None])

    def nameless(self, start, count):  # a changed file of another length, without any name for the version
        self.wfile.write(self.send(OLD if count == 1 else NEW + NEW, start)[:50_000 if count == 1 else None])

    def whole(self, start, _):  # 416 says that there is no more
        if start >= len(OLD): return self.head(416, Content_Range=f"bytes */{len(OLD)}")
        self.wfile.write(self.send(OLD, start, ETag='"one"'))

    def page(self, start, _):
        self.head(Content_Length=24)
        for byte in b"<!doctype html><p>quota</p>"[:24]: self.wfile.write(bytes([byte]))

    def plain(self, start, _): self.wfile.write(self.send(OLD, start))

    def late(self, start, _):
        time.sleep(0.2)
        self.wfile.write(self.send(OLD, start))


@pytest.fixture(scope="module")
def running():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    running.log = []
    running.url = lambda kind: f"http://127.0.0.1:{running.server_port}/{kind}/file.pkl"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return running


def toy(*addresses, kind="pickle"):
    return Source("toy", "checkpoints/toy.pkl", kind, addresses, "https://example.org/page")


# ---- how much


@pytest.mark.parametrize("kind", ["endless", "endless-chunks"])
def test_an_answer_without_end_is_given_up(server, tmp_path, kind):
    with pytest.raises(Unavailable, match="more than 1,000,000 bytes"):
        transfer(server.url(kind), tmp_path / "part", **QUICK, most=10**6)
    assert len(server.log) == 1 and not (tmp_path / "part").exists()


def test_every_kind_of_source_has_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setitem(fetching.MOST, "pickle", 10**6)
    with pytest.raises(InputError, match="more than 1,000,000 bytes"):
        fetch(toy(server.url("endless")), tmp_path, tmp_path / "c", **QUICK)
    assert set(fetching.MOST) == {"pickle", "torch", "npy", "any", "folder"} and max(fetching.MOST.values()) < 10**12
    with pytest.raises(InputError, match="said to have 1,000,000,000,000,000 bytes"):
        fetch(toy(server.url("huge")), tmp_path, tmp_path / "c", **QUICK)


def test_the_disk_is_looked_at_while_bytes_come(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage",
                        lambda folder: fetching.shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="make room"): transfer(server.url("endless"), tmp_path / "part", **QUICK)


def test_a_compressed_answer_is_refused(server, tmp_path):
    with pytest.raises(Unavailable, match=r"compressed \(gzip\)"):
        transfer(server.url("gzip"), tmp_path / "part", **QUICK)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("kind,words", [("trickle", "less than 1,000 bytes a second"),
                                        ("crumbs", "stops before the end|IncompleteRead")])
def test_progress_that_would_never_end_is_none(server, tmp_path, kind, words):
    with pytest.raises(Unavailable, match=f"gave up after 3 .*({words})"):
        transfer(server.url(kind), tmp_path / "part", **QUICK | {"timeout": (1, 0.3)})
    assert len(server.log) <= 4


def test_a_page_is_seen_though_it_comes_in_crumbs(server, tmp_path):
    with pytest.raises(InputError, match="a web page"):
        fetch(toy(server.url("page")), tmp_path, tmp_path / "c", **QUICK)


# ---- which version


@pytest.mark.parametrize("kind", ["dated", "rude"])
def test_a_file_that_changes_half_way_is_begun_anew(server, tmp_path, kind):
    transfer(server.url(kind), tmp_path / "part", **QUICK)
    assert (tmp_path / "part").read_bytes() == NEW
    if kind == "dated": assert server.log[1] == ("dated", 50_000, "Sat, 01 Jan 2022 00:00:00 GMT")


def test_without_a_name_the_length_tells(server, tmp_path):
    transfer(server.url("nameless"), tmp_path / "part", **QUICK)
    assert (tmp_path / "part").read_bytes() == NEW + NEW


def test_bytes_of_a_version_without_a_name_are_not_taken_up_later(server, tmp_path):
    (tmp_path / "part").write_bytes(NEW[:50_000])
    (tmp_path / "part.json").write_text(json.dumps({"url": server.url("plain"), "version": None, "length": len(OLD)}))
    transfer(server.url("plain"), tmp_path / "part", **QUICK)
    assert server.log == [("plain", 0, None)] and (tmp_path / "part").read_bytes() == OLD


def test_what_came_whole_is_not_asked_for_again(server, tmp_path):
    """A call that is killed between the transfer and the last step."""
    folder = tmp_path / ".toy.pkl.fetch"
    folder.mkdir()
    (folder / "whole").write_bytes(OLD)
    (folder / "part.json").write_text(json.dumps({"url": server.url("whole"), "version": '"one"', "length": len(OLD)}))
    assert download(toy(), server.url("whole"), folder, **QUICK).read_bytes() == OLD
    assert server.log == [("whole", len(OLD), '"one"')]


@pytest.mark.parametrize("force", [False, True])
def test_leftovers_of_another_address_are_not_used(server, tmp_path, force):
    folder = tmp_path / "c" / ".toy.pkl.fetch"
    folder.mkdir(parents=True)
    for name in ("whole", "part"): (folder / name).write_bytes(NEW)
    (folder / "part.json").write_text(json.dumps({"url": "https://example.org/other.pkl", "version": '"one"',
                                                  "length": len(NEW)}))
    place = fetch(toy(server.url("plain")), tmp_path, tmp_path / "c", force=force, **QUICK)
    assert place.read_bytes() == OLD and [path.name for path in place.parent.iterdir()] == ["toy.pkl"]


def test_force_begins_anew(server, tmp_path):
    folder = tmp_path / "c" / ".toy.pkl.fetch"
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(NEW[:50_000])
    (folder / "part.json").write_text(json.dumps({"url": server.url("whole"), "version": '"one"', "length": len(OLD)}))
    assert fetch(toy(server.url("whole")), tmp_path, tmp_path / "c", force=True, **QUICK).read_bytes() == OLD
    assert server.log == [("whole", 0, None)]


# ---- where to


class Elsewhere(requests.adapters.BaseAdapter):
    """Stands for servers that cannot be had on this machine."""

    def __init__(self, places):
        super().__init__()
        self.places, self.asked = places, []

    def send(self, request, **_):
        self.asked.append(request.url)
        response = requests.Response()
        response.request, response.url, response.status_code, response.raw = request, request.url, 302, io.BytesIO()
        response.headers["Location"] = self.places[request.url]
        return response

    def close(self): pass


@pytest.mark.parametrize("places", [{"https://a.test/x": "http://a.test/x"},
                                    {"https://a.test/x": "//b.test/x", "https://b.test/x": "HTTP://c.test/x"},
                                    {"http://a.test/x": "https://b.test/x", "https://b.test/x": "ftp://c.test/x"}])
def test_no_redirect_leads_from_https_to_http(tmp_path, monkeypatch, places):
    adapter, make = Elsewhere(places), transferring.open_session

    def session():
        made = make()
        for scheme in ("https://", "http://"): made.mount(scheme, adapter)
        return made

    for module in (fetching, transferring): monkeypatch.setattr(module, "open_session", session)
    first = next(iter(places))
    with pytest.raises(Unavailable, match="redirects from https to"): transfer(first, tmp_path / "part", **QUICK)
    assert adapter.asked == list(places)  # nothing was asked of the last one, and nothing twice
    assert remote_size(first) is None


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "no address", "http://"])
def test_addresses_of_another_kind_are_refused_at_once(tmp_path, address):
    with pytest.raises(Unavailable, match="no address to download from"):
        transfer(address, tmp_path / "part", **QUICK | {"pause": 99})


# ---- two at once


def test_two_calls_for_one_place(server, tmp_path):
    source, done = toy(server.url("late")), []

    def call(force):
        try: done.append(fetch(source, tmp_path, tmp_path / "c", force=force, **QUICK).read_bytes())
        except Exception as error: done.append(error)

    threads = [threading.Thread(target=call, args=(force,)) for force in (False, False, True, True)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(20)
    assert done == [OLD] * 4 and [path.name for path in (tmp_path / "c").iterdir()] == ["toy.pkl"]
    assert len(server.log) in (2, 3)  # of those without force at most one


def test_a_second_process_waits(server, tmp_path):
    code = ("from lagm.download.fetch import fetch; from lagm.download.sources import Source; fetch(Source('toy', "
            f"'checkpoints/toy.pkl', 'pickle', ({server.url('late')!r},)), {str(tmp_path)!r}, {str(tmp_path / 'c')!r}, "
            "progress=False)")
    with fetching._alone(tmp_path / "c" / "toy.pkl"):
        process = nursery.start([sys.executable, "-c", code], stderr=subprocess.PIPE)
        assert "waiting for another process" in process.stderr.readline()
        assert not server.log
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "c" / "toy.pkl").read_bytes() == OLD


# ---- in place


def test_a_kill_in_the_last_step_loses_nothing(tmp_path, monkeypatch):
    target = tmp_path / "c" / "stylegan2" / "stylegan2-horse-config-f.pkl"
    (tmp_path / "new.pkl").write_bytes(NEW)
    target.parent.mkdir(parents=True)
    target.with_name(f".{target.name}.old").write_bytes(OLD)  # killed between the two moves
    calls, replace = [], os.replace

    def dies(a, b):
        calls.append(b)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt): fetch_from("stylegan2-horse", tmp_path / "new.pkl", tmp_path, tmp_path / "c")
    assert target.with_name(f".{target.name}.old").read_bytes() == OLD
    monkeypatch.setattr(fetching.os, "replace", replace)
    assert fetch_from("stylegan2-horse", tmp_path / "new.pkl", tmp_path, tmp_path / "c").read_bytes() == NEW
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("member", ["..\\escaped.txt", "C:\\escaped.txt", "C:escaped.txt", "a/../../escaped.txt",
                                    "//host/escaped.txt"])
def test_names_of_other_systems_lead_outside_too(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive: archive.writestr(member, "x")
    with pytest.raises(InputError, match="outside its folder"):
        fetch_from("cgpart-real", tmp_path / "evil.zip", tmp_path / "d")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["evil.zip"]


def test_an_archive_that_swells_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("Images/a.png", "w", force_zip64=True) as file:
            for _ in range(12): file.write(bytes(10**6))
        for info in archive.infolist(): info.file_size = 10**10  # as the table of contents has it
    with pytest.raises(InputError, match="would unpack to 10.0 GB"):
        fetch_from("cgpart-real", tmp_path / "bomb.zip", tmp_path / "d")
    assert not (tmp_path / "d" / "CGPart_real").exists()


def test_the_folder_itself_is_a_member_that_is_taken(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("./", "Images/", "Annotations_png/", "Image_sets/"): archive.writestr(name, "")
    assert sorted(path.name for path in fetch_from("cgpart-real", tmp_path / "a.zip",
                                                   tmp_path / "d").iterdir()) == ["Annotations_png", "Image_sets",
                                                                                  "Images"]
