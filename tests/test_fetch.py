"""Downloads against a server that is slow, breaks off, lies, answers with pages or redirects; files in their places;
the command.
"""

import hashlib
import http.server
import io
import json
import shutil
import socket
import sys
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import lagm.download.fetch as fetching
from lagm import cli
from lagm.core.errors import InputError
from lagm.data.registry import EXPERIMENTS, match_experiments
from lagm.download.fetch import download, fetch, fetch_command, fetch_from, is_there, remote_size
from lagm.download.sources import SOURCES, Source, file_problem
from lagm.download.transfer import Unavailable, transfer

pytest.importorskip("pooch")
pytest.importorskip("requests")

CONTENT = b"\x80\x04" + np.random.RandomState(0).bytes(150_000) + b"."
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CGPART = Path(__file__).parent / "golden" / "datasets" / "data" / "CGPart_real"


class Rascal(http.server.BaseHTTPRequestHandler):
    """The first word of the path says how to misbehave."""

    def log_message(self, *_): pass

    def do_HEAD(self): self.answer(body=False)

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "silent": return time.sleep(3)
        if kind == "closed": return self.connection.shutdown(socket.SHUT_RDWR)
        self.answer()

    def answer(self, body=True):
        kind, log = self.path.split("/")[1], self.server.log
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if body: log.append((kind, start, self.headers.get("If-Range")))
        if kind.isdecimal(): return self.send_error(int(kind))
        if kind == "busy" and len(log) < 3: return self.send_error(503)
        if kind in ("moved", "loop"):
            self.send_response(302)
            self.send_header("Location", "/loop" if kind == "loop" else "/good")
            return self.end_headers()
        content = {"page": b"<!DOCTYPE html><p>quota", "empty": b"", "zip": self.server.zip}.get(kind, CONTENT)
        version = '"one"'
        if kind == "changes" and len(log) > 1: version, content = '"two"', CONTENT[:1] + b"\x05" + CONTENT[2:]
        if kind == "no-ranges" or (self.headers.get("If-Range") not in (None, version)): start = 0
        if start and start >= len(content): return self.send_error(416)
        piece = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        if kind != "no-etag": self.send_header("ETag", version)
        if kind != "no-length":
            self.send_header("Content-Length", str(len(piece) + {"longer": 5000, "shorter": -5000}.get(kind, 0)))
        if start:
            self.send_header("Content-Range",
                             f"bytes {start + (7 if kind == 'elsewhere' else 0)}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body: return
        if kind in ("breaks", "changes", "no-ranges", "elsewhere", "no-etag"): piece = piece[:50_000]
        for i in range(0, len(piece), 10_000):
            self.wfile.write(piece[i:i + 10_000])
            if kind == "slow": time.sleep(0.03)


@pytest.fixture(scope="module")
def running():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(CGPART.rglob("*")): file.write(path, f"cgpart_real/{path.relative_to(CGPART).as_posix()}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rascal)
    server.log, server.zip = [], archive.getvalue()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    """The server with an empty log; `url(kind)` its addresses."""
    running.log.clear()
    running.url = lambda kind: f"http://127.0.0.1:{running.server_port}/{kind}/file.pkl"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return running


QUICK = {"attempts": 3, "pause": 0.01, "timeout": (1, 1), "progress": False}


def toy(*addresses, kind="pickle", path="checkpoints/gan/toy.pkl", **more):
    return Source("toy", path, kind, addresses, "https://example.org/page", **more)


# ---- transfer


@pytest.mark.parametrize("kind", ["good", "slow", "moved", "busy", "breaks", "no-length", "no-etag"])
def test_transfers_that_succeed(server, tmp_path, kind):
    transfer(server.url(kind), tmp_path / "part", **QUICK)
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_a_broken_line_is_taken_up_where_it_broke(server, tmp_path):
    transfer(server.url("breaks"), tmp_path / "part", **QUICK)
    starts = [start for _, start, _ in server.log]
    assert (starts[0] == 0 and starts == sorted(set(starts)) and len(starts) <= 5
            and all(version == '"one"' for _, _, version in server.log[1:]))


def test_a_changed_file_is_begun_anew(server, tmp_path):
    transfer(server.url("changes"), tmp_path / "part", **{**QUICK, "attempts": 9})
    assert (tmp_path / "part").read_bytes() == CONTENT[:1] + b"\x05" + CONTENT[2:]


@pytest.mark.parametrize("kind,words,requests",
                         [("404", "answers 404", 1), ("403", "answers 403", 1), ("page", "a web page", 1),
                          ("elsewhere", "another part", 2), ("500", "gave up after 3", 3),
                          ("silent", "gave up after 3", 0),
                                                 ("closed", "gave up after 3", 0),
                          ("no-ranges", "gave up after 3", None), ("longer", "gave up after 3", None),
                          ("loop", "gave up after 3", None)])
def test_transfers_that_fail(server, tmp_path, kind, words, requests):
    options = {**QUICK, "timeout": (0.3, 0.3)} if kind == "silent" else QUICK
    with pytest.raises(Unavailable, match=words): transfer(server.url(kind), tmp_path / "part", **options)
    if requests is not None: assert len(server.log) == requests


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match="gave up"): transfer(f"http://127.0.0.1:{port}/a", tmp_path / "part", **QUICK)


def test_a_killed_transfer_goes_on_in_another_process(server, tmp_path):
    url = server.url("good")
    (tmp_path / "part").write_bytes(CONTENT[:70_000])
    (tmp_path / "part.json").write_text(json.dumps({"url": url, "version": '"one"'}))
    transfer(url, tmp_path / "part", **QUICK)
    assert server.log == [("good", 70_000, '"one"')] and (tmp_path / "part").read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "{", '{"url": "http://elsewhere"}', "[1]"])
def test_bytes_of_unknown_origin_are_not_trusted(server, tmp_path, note):
    (tmp_path / "part").write_bytes(b"x" * 70_000)
    if note: (tmp_path / "part.json").write_text(note)
    transfer(server.url("good"), tmp_path / "part", **QUICK)
    assert server.log[0][1] == 0 and (tmp_path / "part").read_bytes() == CONTENT


def test_more_bytes_than_there_are(server, tmp_path):
    url = server.url("good")
    (tmp_path / "part").write_bytes(CONTENT + b"more")
    (tmp_path / "part.json").write_text(json.dumps({"url": url, "version": '"one"'}))
    transfer(url, tmp_path / "part", **QUICK)
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_a_full_disk_is_told_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="make room"): transfer(server.url("good"), tmp_path / "part", **QUICK)


# ---- download and fetch


def test_checksums(server, tmp_path):
    for sha in (DIGEST, DIGEST[:8], ""):
        assert download(toy(sha256=sha), server.url("good"), tmp_path / (sha or "none"),
                        **QUICK).read_bytes() == CONTENT
    for sha in ("0" * 64, "0" * 8):
        with pytest.raises(Unavailable, match="checksum|SHA-256"):
            download(toy(sha256=sha), server.url("good"), tmp_path / f"wrong{len(sha)}", **QUICK)


@pytest.mark.parametrize("kind", ["shorter", "empty"])
def test_a_length_that_is_too_small_is_noticed_by_the_form(server, tmp_path, kind):
    with pytest.raises(Unavailable, match="cut off|is empty"): download(toy(), server.url(kind), tmp_path, **QUICK)


def test_mirrors_in_order_and_nothing_else_left(server, tmp_path):
    source = toy(server.url("404"), server.url("page"), server.url("shorter"), server.url("good"), server.url("500"))
    place = fetch(source, tmp_path / "data", tmp_path / "c", **QUICK)
    assert place == tmp_path / "c" / "gan" / "toy.pkl" and place.read_bytes() == CONTENT
    assert [kind for kind, _, _ in server.log] == ["404", "page", "shorter", "good"]
    assert [path.name for path in place.parent.iterdir()] == ["toy.pkl"]
    fetch(source, tmp_path / "data", tmp_path / "c", **QUICK)
    assert len(server.log) == 4
    place.write_bytes(CONTENT[:-1])  # cut off: fetched again
    fetch(toy(server.url("404")), tmp_path / "data", tmp_path / "c", mirrors=[server.url("good")], **QUICK)
    assert place.read_bytes() == CONTENT and len(server.log) == 5


def test_a_failure_tells_of_every_address_and_keeps_the_old_file(server, tmp_path):
    place = tmp_path / "c" / "gan" / "toy.pkl"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\x80\x04old.")
    with pytest.raises(InputError,
                       match=r"(?s)/404/.*answers 404.*/no-ranges/.*gave up.*https://example.org/page.*--from FILE"):
        fetch(toy(server.url("404"), server.url("no-ranges")), tmp_path, tmp_path / "c", force=True, **QUICK)
    assert place.read_bytes() == b"\x80\x04old."


def test_what_was_transferred_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(InputError): fetch(toy(server.url("longer")), tmp_path, tmp_path / "c", **QUICK)
    assert (tmp_path / "c" / "gan" / ".toy.pkl.fetch" / "part").is_file()


def test_an_archive_is_unpacked_in_its_place(server, tmp_path):
    source = Source("cgpart", "data/CGPart_real", "folder", (server.url("zip"),),
                    holds=("Images", "Annotations_png", "Image_sets"))
    place = fetch(source, tmp_path / "d", tmp_path / "c", **QUICK)
    assert {path.relative_to(place) for path in place.rglob("*")} == {path.relative_to(CGPART)
                                                                      for path in CGPART.rglob("*")}
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["CGPart_real"]
    (place / "mine.txt").touch()
    fetch(source, tmp_path / "d", tmp_path / "c", force=True, **QUICK)
    assert not (place / "mine.txt").exists()


def test_sources_that_must_be_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"handed out at https://github\.com/nv-tlabs/datasetGAN_release.*--from FILE"):
        fetch("stylegan-car", tmp_path, tmp_path)
    with pytest.raises(InputError, match="nothing is called 'x'"): fetch("x")


def test_google_drive(tmp_path, monkeypatch):
    gdown = pytest.importorskip("gdown")
    calls = []
    def good(id, output, **options):
        calls.append((id, options["resume"]))
        Path(output).write_bytes(CONTENT)
        return output
    def bad(id, output, **options): raise RuntimeError("Cannot retrieve the public link of the file.\n Too many users")
    monkeypatch.setattr(gdown, "download", bad)
    with pytest.raises(InputError, match=r"(?s)drive:abc: Google Drive does not give it.*Too many "
                                         r"users.*drive\.google\.com/file/d/abc.*--from"):
        fetch(toy("drive:abc"), tmp_path, tmp_path, **QUICK)
    monkeypatch.setattr(gdown, "download", good)
    assert fetch(toy("drive:abc"), tmp_path, tmp_path, **QUICK).read_bytes() == CONTENT and calls == [("abc", True)]
    assert remote_size("drive:abc") is None


def test_gdown_takes_the_options_it_is_given():
    import inspect
    gdown = pytest.importorskip("gdown")
    assert {"id", "output", "quiet", "resume", "timeout",
            "retries"} <= set(inspect.signature(gdown.download).parameters)


# ---- from a file


def test_from_files_archives_and_folders(tmp_path, running):
    (tmp_path / "a.zip").write_bytes(running.zip)
    for i, source in enumerate((tmp_path / "a.zip", CGPART, CGPART.parent)):
        place = fetch_from("cgpart-real", source, tmp_path / f"d{i}", tmp_path)
        assert ((place / "Image_sets" / "car_imagenet_val.txt").is_file()
                and [path.name for path in place.parent.iterdir()] == ["CGPart_real"])
    (tmp_path / "x.pkl").write_bytes(CONTENT)
    assert (fetch_from("stylegan2-horse", tmp_path / "x.pkl", tmp_path, tmp_path / "c").read_bytes() == CONTENT
            and (tmp_path / "x.pkl").exists())
    place = fetch_from("released-celeba-2", tmp_path / "x.pkl", tmp_path, tmp_path / "c")
    assert [path.name for path in place.iterdir()] == ["released.pkl"]
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    assert [path.name for path in fetch_from("released-celeba-10", tmp_path / "x.pth", tmp_path,
                                             tmp_path / "c").iterdir()] == ["released.pth"]


@pytest.mark.parametrize("name,content,words",
                         [("stylegan2-horse", b"<html>", "a web page"), ("stylegan2-horse", CONTENT[:-1], "cut off"),
                          ("stylegan2-horse", b"", "is empty"), ("stylegan-cat", b"PK\x03\x04cut", "cut off"),
                                                ("latent-cat", b"no", "not a numpy array"),
                          ("resnet101", CONTENT, "SHA-256 begins with"), ("cgpart-real", b"PK\x03\x04", "cut off"),
                          ("stylegan2-car", b"version https://git-lfs.github.com/spec/v1", "git-lfs")])
def test_from_wrong_files(tmp_path, name, content, words):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=words): fetch_from(name, tmp_path / "file", tmp_path / "d", tmp_path / "c")
    assert not SOURCES[name].place(tmp_path / "d", tmp_path / "c").exists()
    with pytest.raises(InputError, match="there is no"): fetch_from(name, tmp_path / "none", tmp_path / "d")


@pytest.mark.parametrize("member", ["../escaped.txt", "a/../../escaped.txt", "/escaped.txt", "link"])
def test_archives_that_reach_outside(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        info = zipfile.ZipInfo(member)
        if member == "link": info.external_attr = 0o120777 << 16
        archive.writestr(info, "../..")
    with pytest.raises(InputError, match="outside its folder"):
        fetch_from("cgpart-real", tmp_path / "evil.zip", tmp_path / "d" / "e")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["evil.zip"]


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError,
                       match="should hold the folders Images, Annotations_png, Image_sets.*It holds readme.txt"):
        fetch_from("cgpart-real", tmp_path / "a.zip", tmp_path / "d")


# ---- the command and the tables


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOURCES, "toy", toy(server.url("good"), licence="CC0", note="a toy"))
    places = ["--data", str(tmp_path / "d"), "--checkpoints", str(tmp_path / "c")]
    assert cli.main(["fetch", "toy", "--dry-run", *places]) == 0
    text = capsys.readouterr().out
    assert "CC0" in text and "0.2 MB" in text and str(tmp_path / "c") in text and "a toy" in text and not server.log
    assert cli.main(["fetch", "toy", *places]) == 0
    text = capsys.readouterr().out
    assert (text.index("CC0") < text.index("is in place")
            and (tmp_path / "c" / "gan" / "toy.pkl").read_bytes() == CONTENT)
    assert cli.main(["fetch", "toy", *places]) == 0 and "toy is there" in capsys.readouterr().out
    assert cli.main(["fetch", *places]) == 0 and "stylegan2-horse" in capsys.readouterr().out
    assert cli.main(["fetch", "toys", *places]) == 2 and "nothing is called 'toys'" in capsys.readouterr().err
    assert cli.main(["fetch", "toy", "voc2010", "--from", "x", *places]) == 2
    (tmp_path / "mine.pkl").write_bytes(b"\x80\x04N.")
    assert cli.main(["fetch", "toy", "--from", str(tmp_path / "mine.pkl"), *places]) == 0
    assert (tmp_path / "c" / "gan" / "toy.pkl").read_bytes() == b"\x80\x04N."


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match=r"pip install 'pooch"): fetch(toy("http://127.0.0.1:9/a"), tmp_path, tmp_path)
    said = []
    fetch_command(Namespace(list=True, names=[], data=tmp_path, checkpoints=tmp_path), said.append)
    assert len(said) == len(SOURCES)


def test_the_tables():
    assert len(EXPERIMENTS) == 28 and sum(name.startswith("released-") for name in SOURCES) == 15
    assert all(source.addresses or source.page for source in SOURCES.values())
    for item in EXPERIMENTS.values():
        assert set(item.needs) <= set(SOURCES) and (item.latent is None) == ("_stylegan_" not in item.name)
    assert (EXPERIMENTS["celeba_150"].k == 150 and EXPERIMENTS["horse_180"].cutoff == 7
            and EXPERIMENTS["car20_stylegan_unet"].matched == ".*" and EXPERIMENTS["car20_stylegan_unet"].wide_crop)
    assert (EXPERIMENTS["cgpart_car"].size == (256, 192)
            and EXPERIMENTS["face34_stylegan_deeplab"].needs == ("stylegan-face", "latent-face", "resnet101"))
    assert len({SOURCES[item.generator].path for item in EXPERIMENTS.values()}) == 9
    assert len(match_experiments("cat16")) == 4
    assert is_there(SOURCES["cgpart-real"], CGPART) and not is_there(SOURCES["cgpart-real"], CGPART.parent)
    assert file_problem(CGPART, "any") == "it is a folder"
