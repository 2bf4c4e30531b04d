"""Segmenters given away: a folder with weights and a card, and a hub, played by a server of this machine."""

import base64
import hashlib
import http.server
import importlib.util
import json
import pickle
import threading

import pytest
import torch
import yaml
from tiny import LABELS, tiny_annotators, tiny_generator, tiny_segmenter

from lagm.core.errors import InputError
from lagm.evaluation.export import card_header
from lagm.evaluation.hub import _CARD, _WEIGHTS, from_pretrained, push_to_hub, save_pretrained
from lagm.evaluation.record import evaluation_report
from lagm.models.saved import load_segmenter, save_networks, save_segmenter

needs_hub = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="huggingface_hub is not here")
TOKEN = "hf_" + "q" * 34


def header_of(folder):
    first, text, _ = (folder / _CARD).read_text(encoding="utf-8").split("---\n", 2)
    assert first == ""
    return yaml.safe_load(text)


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_folder_and_back(tmp_path):
    network = tiny_segmenter()
    save_pretrained(tmp_path / "f", network, LABELS, (16, 16), "fit", title="Tiny: \"#1\"", intended="Tests.")
    again, labels, size, policy = from_pretrained(tmp_path / "f")
    assert same(again, network) and labels == LABELS and (size, policy) == ((16, 16), "fit") and not again.training
    known = header_of(tmp_path / "f")
    assert known == {"library_name": "lagm", "pipeline_tag": "image-segmentation",
                     "tags": ["part-segmentation", "semantic-segmentation"]}  # no licence, no data, no numbers made up
    text = (tmp_path / "f" / _CARD).read_text()
    assert "not said yet" in text and "nothing was measured" in text and all(name in text for name in LABELS.classes)


def test_the_card_says_what_the_record_says_and_no_names(tmp_path):
    network = tiny_segmenter()
    facts = {"learnt_from": ["Anna Schmidt", "b"], "step": 1234, "training": {"recipe": "fast"}}
    save_segmenter(tmp_path / "s.safetensors", network, LABELS, (16, 16), "stretch", **facts)
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (4, 16, 16), generator=g)
    report = evaluation_report(torch.randint(0, 3, (4, 16, 16), generator=g), masks, LABELS.classes)
    folder = save_pretrained(tmp_path / "f", tmp_path / "s.safetensors", licence="CC BY-SA 4.0", datasets=["me/faces"],
                             tags=["faces"], report=report, tested_on="4 random pictures")
    assert (folder / _WEIGHTS).read_bytes() == (tmp_path / "s.safetensors").read_bytes()
    text, known = (folder / _CARD).read_text(), header_of(folder)
    assert "2 labelled pictures" in text and "1,234 steps" in text and "recipe: fast" in text and "Schmidt" not in text
    assert known["license"] == "cc-by-sa-4.0" and known["datasets"] == ["me/faces"] and "faces" in known["tags"]
    (result,) = known["model-index"][0]["results"]
    assert {m["name"]: m["value"] for m in result["metrics"]}["FG-mIoU"] == round(report["metrics"]["fg_miou"], 4)
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import ModelCard

        card = ModelCard(text)
        assert card.data.library_name == "lagm" and len(card.data.eval_results) == 3
    assert "license" not in yaml.safe_load(card_header("x").strip("-\n"))


def test_results_of_a_run_lose_the_annotator_and_keep_the_record(tmp_path):
    annotator = tiny_annotators(tiny_generator())[0]
    network = tiny_segmenter()
    save_networks(tmp_path / "r.safetensors", annotator, network, labels=LABELS, size=(16, 16), learnt_from=["a"])
    folder = save_pretrained(tmp_path / "f", tmp_path / "r.safetensors")
    found, header = load_segmenter(folder / _WEIGHTS)
    assert same(found, network) and header["kind"] == "segmenter" and header["learnt_from"] == ["a"]
    save_pretrained(folder, folder / _WEIGHTS, title="Again")
    assert "# Again" in (folder / _CARD).read_text() and same(from_pretrained(folder)[0], network)


class Trap:
    def __reduce__(self): return (open, ("never", "w"))


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"", b"PK\x03\x04", b"\xff" * 40])
def test_nothing_but_safetensors_is_read(tmp_path, content, monkeypatch):
    monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / _WEIGHTS).write_bytes(content)
    with pytest.raises(InputError): from_pretrained(tmp_path)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "../b", "a/..", "a b/c", "https://x.org/a", "-a/b"])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="neither a folder here nor a name on a hub|there is no"):
        from_pretrained(name or "?")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as one model needs: make, preupload, large files beside the commit, commit, resolve."""

    protocol_version = "HTTP/1.1"
    files: dict = {}
    seen: list = []
    store: dict = {}  # large files, by their SHA-256
    large = False  # weights go to the store, as a true hub wants them

    def log_message(self, *_): pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "ETag": '"1"', "X-Repo-Commit": "a" * 40, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, here = self.path.partition("?")[0], f"http://{self.headers['Host']}"
        self.seen.append((self.command, path, self.headers.get("Authorization")))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not known: return self.answer({}, 401)
        if path == "/api/repos/create": return self.answer({"url": f"{here}/me/faces"})
        if path == "/api/validate-yaml": return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [{"path": file["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if self.large and file["path"] == _WEIGHTS else "regular"}
                     for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [part | {"authenticated": True, "actions": {"upload": {"href": f"{here}/store/{part['oid']}"}}}
                       for part in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/store/"): return self.keep(path.rpartition("/")[2], body)
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "lfsFile": self.files[line["value"]["path"]] = self.store[line["value"]["oid"]]
                if line["key"] == "file": self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = "a" * 40
            return self.answer({"success": True, "commitOid": commit, "commitUrl": f"{here}/me/faces/commit/{commit}"})
        name = path.rpartition("/")[2]
        if path == f"/me/faces/resolve/main/{name}" and name in self.files: return self.give(name)
        return self.answer({}, 404, **{"X-Error-Code": "RepoNotFound"})

    def keep(self, oid, body):
        if self.command == "PUT": self.store[oid] = body
        self.answer(b"" if self.command == "PUT" else self.store[oid])

    def give(self, name):
        content = self.files[name]
        oid = hashlib.sha256(content).hexdigest()
        if oid not in self.store: return self.answer(content)
        self.answer(b"", 302, Location=f"/store/{oid}",
                    **{"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The address of a hub; the token is where huggingface_hub looks for it."""
    Hub.files, Hub.seen, Hub.store, Hub.large = {}, [], {}, False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown(), server.server_close()


@needs_hub
def test_to_a_hub_and_back(hub, tmp_path, capsys):
    network = tiny_segmenter()
    folder = save_pretrained(tmp_path / "f", network, LABELS, (16, 16), "fit")
    (folder / "notes of the patients.txt").write_text("secret")
    said = push_to_hub(folder, "me/faces", endpoint=hub)
    assert said.startswith(f"{hub}/me/faces/commit/")
    assert set(Hub.files) == {_WEIGHTS, _CARD} and Hub.files[_WEIGHTS] == (folder / _WEIGHTS).read_bytes()
    again, labels, size, policy = from_pretrained("me/faces", endpoint=hub, cache=tmp_path / "cache")
    assert same(again, network) and labels == LABELS and (size, policy) == ((16, 16), "fit")
    Hub.files[_WEIGHTS] = pickle.dumps(Trap())
    with pytest.raises(InputError): from_pretrained("me/faces", endpoint=hub, cache=tmp_path / "other")
    told = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in told.out + told.err and TOKEN.encode() not in written


@needs_hub
def test_large_files_go_beside_the_commit(hub, tmp_path, monkeypatch):
    """As a true hub takes weights: to a store of their own, which is not told the token, and back by a redirect."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    Hub.large = True
    network = tiny_segmenter()
    folder = save_pretrained(tmp_path / "f", network, LABELS, (16, 16), "fit")
    push_to_hub(folder, "me/faces", endpoint=hub)
    content = (folder / _WEIGHTS).read_bytes()
    assert Hub.store == {hashlib.sha256(content).hexdigest(): content} and set(Hub.files) == {_WEIGHTS, _CARD}
    assert [token for command, path, token in Hub.seen if command == "PUT"] == [None]
    again, labels, size, policy = from_pretrained("me/faces", endpoint=hub, cache=tmp_path / "cache")
    assert same(again, network) and labels == LABELS and (size, policy) == ((16, 16), "fit")


@needs_hub
def test_what_a_hub_refuses(hub, tmp_path, monkeypatch):
    folder = save_pretrained(tmp_path / "f", tiny_segmenter(), LABELS, (16, 16), "fit")
    with pytest.raises(InputError, match="would not give me/cats: there is no such thing"):
        from_pretrained("me/cats", endpoint=hub, cache=tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "X")
    with pytest.raises(InputError, match="would not make me/faces: it does not know you: log in") as caught:
        push_to_hub(folder, "me/faces", endpoint=hub)
    assert TOKEN[:-1] not in str(caught.value) and caught.value.__cause__ is None
    (folder / _CARD).unlink()
    with pytest.raises(InputError, match=f"there is no {_CARD}"): push_to_hub(folder, "me/faces", endpoint=hub)
    assert not Hub.files


def test_without_the_client(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="huggingface_hub: .*pip install"): from_pretrained("me/faces")
