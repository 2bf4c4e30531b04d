"""Files are whole or absent, streams repeat, mistakes are told in one message."""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lagm.core import files as core_files
from lagm.core import tensors as core_tensors
from lagm.core.errors import InputError
from lagm.core.files import asset, atomic_path, read_json, write_json
from lagm.core.origins import provenance
from lagm.core.seeds import choose_device, random_generator, seed_everything
from lagm.core.tensors import load_tensors, save_tensors


def below_a_file(folder: Path) -> Path:
    """A path that nobody can write to, not even root: its parent is a file."""
    (folder / "file").write_text("")
    return folder / "file" / "result.json"


# ---- files


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("new")
        1 / 0
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def test_atomic_path_names_what_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="result.json"), atomic_path(below_a_file(tmp_path)): pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_writer_leaves_the_old_file_and_its_leftovers_go(tmp_path):
    path = tmp_path / "net.bin"
    path.write_text("old")
    code = ("import sys, time; from lagm.core.files import atomic_path\nwith atomic_path(sys.argv[1]) as t: "
            "t.write_text('half'); print('writing', flush=True); time.sleep(60)")
    writer = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    with atomic_path(path) as temporary: temporary.write_text("meanwhile")
    assert len(os.listdir(tmp_path)) == 2, "the temporary file of a living process must stay"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == "meanwhile" and len(os.listdir(tmp_path)) == 2
    with atomic_path(path) as temporary: temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["net.bin"]


def test_json_takes_numbers_of_numpy_and_torch_and_has_no_nan(tmp_path):
    value = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": (float("inf"), np.nan), 3: Path("x/y"), "d": True,
             "e": "ü"}
    write_json(tmp_path / "m.json", value)
    def forbidden(name): raise AssertionError(f"{name} is not JSON")
    strict = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"), parse_constant=forbidden)
    assert strict == read_json(tmp_path / "m.json") == {"a": 0.5, "b": [1, 2], "c": [None, None], "3": "x/y", "d": True,
                                                        "e": "ü"}
    with pytest.raises(TypeError, match="object"): write_json(tmp_path / "m.json", {"x": object()})
    assert read_json(tmp_path / "m.json") == strict


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(InputError, match="none.json"): read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="bad.json is not JSON"): read_json(tmp_path / "bad.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    base = (torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    tensors = {"whole": base, "view": base.T[1:3], "shared": base, "scalar": base[0, 0],
               "parameter": torch.nn.Parameter(base.float())}
    save_tensors(tmp_path / "t.safetensors", tensors, {"recipe": "fast", "nested": {"images": 3}, "rate": float("nan")})
    back, header = load_tensors(tmp_path / "t.safetensors")
    assert header == {"recipe": "fast", "nested": {"images": 3}, "rate": None}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor.detach()), name


def test_where_tensors_lie_does_not_hang_on_the_header(tmp_path):
    """A network computes other last bits with weights that begin elsewhere than torch puts its own."""
    for extra in range(0, 64, 8):
        tensors = {"a": torch.arange(5.0), "b": torch.arange(3.0)}
        save_tensors(tmp_path / "a.safetensors", tensors, {"note": "x" * extra})
        found, _ = load_tensors(tmp_path / "a.safetensors")
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_load_tensors_of_other_programs_and_of_damaged_files(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    tensors, header = load_tensors(tmp_path / "foreign.safetensors")
    assert header == {} and torch.equal(tensors["x"], torch.ones(2))
    whole = (tmp_path / "foreign.safetensors").read_bytes()
    for content in (whole[:-1], whole[:9], b"", b"\x80\x04pickle"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="bad.safetensors"): load_tensors(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="no such file"): load_tensors(tmp_path / "none.safetensors")


def test_asset_names_its_neighbours():
    with pytest.raises(InputError, match="no asset 'nothing/here.png'"): asset("nothing/here.png")


# ---- randomness


def test_streams_are_the_documented_hash():
    bits = int.from_bytes(hashlib.sha256(b'[3, "latents", 1]').digest()[:8], "big") >> 1
    assert random_generator(3, "latents", 1).initial_seed() == bits


def test_streams_differ_by_seed_and_by_every_name():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, "a", "1"), (0, 1), (0, "a1")]
    assert len({random_generator(*key).initial_seed() for key in keys}) == len(keys)
    again = [torch.rand(3, generator=random_generator(5, "x")) for _ in range(2)]
    assert torch.equal(*again)


def test_streams_leave_the_global_generator_alone():
    seed_everything(1)
    expected = torch.rand(2)
    seed_everything(1)
    torch.rand(5, generator=random_generator(1))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", None, True])
def test_wrong_seeds_are_refused(seed):
    with pytest.raises(InputError, match="seed is"): random_generator(seed)
    with pytest.raises(InputError, match="seed is"): seed_everything(seed)


# ---- device and provenance


def test_choose_device():
    assert choose_device().type in ("cuda", "mps", "cpu") and choose_device(torch.device("cpu")).type == "cpu"
    for wrong in ("gpu", "", "meta", "cuda:99"):
        with pytest.raises(InputError): choose_device(wrong)


def test_new_results_are_no_change_of_the_program(tmp_path, monkeypatch):
    def git(*words): subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    for folder in ("lagm", "outputs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("first")
    for words in (["init"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", "one"]):
        git(*words)
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path / "lagm")
    (tmp_path / "outputs" / "a.txt").write_text("a new result")
    assert provenance()["modified"] is False and len(provenance()["commit"]) == 40
    (tmp_path / "lagm" / "a.txt").write_text("changed")
    assert provenance()["modified"] is True


def test_provenance_is_plain_and_anonymous(tmp_path):
    made_with = provenance()
    write_json(tmp_path / "p.json", made_with)
    assert read_json(tmp_path / "p.json") == made_with
    assert made_with["versions"]["torch"] == torch.__version__ and made_with["hardware"]["cores"] == os.cpu_count()
    known = torch.backends.cpu.get_cpu_capability()
    assert (made_with["hardware"]["instructions"] or "DEFAULT") == known or known not in ("DEFAULT", "AVX2", "AVX512")
    assert time.strptime(made_with["date"], "%Y-%m-%dT%H:%M:%S+00:00")
    text = json.dumps(made_with)
    assert str(Path.home()) not in text and str(Path(core_files.__file__).parents[1]) not in text
    assert f'"{platform.node()}"' not in text


@pytest.mark.parametrize("lengths", [(3, 3), (3, 5000), (5000, 3)])
def test_a_file_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, lengths):
    """The library opens the file once for the header and once more for the numbers; the run saves in between."""
    path, opened, safe_open = tmp_path / "run.safetensors", [], core_tensors.safetensors.safe_open
    def save(step): save_tensors(path, {"weight": torch.full((lengths[step],), float(step))}, {"step": step})

    def open_and_replace(*args, **kwargs):
        file = safe_open(*args, **kwargs)
        opened.append(file)
        if len(opened) == 1: save(1)
        return file

    save(0)
    monkeypatch.setattr(core_tensors.safetensors, "safe_open", open_and_replace)
    tensors, header = load_tensors(path)
    assert header == {"step": 1} and torch.equal(tensors["weight"], torch.ones(lengths[1])) and len(opened) == 2


def test_a_failure_that_is_not_the_files_is_not_blamed_on_it(tmp_path, monkeypatch):
    save_tensors(tmp_path / "run.safetensors", {"weight": torch.ones(2)})
    monkeypatch.setattr(core_tensors.safetensors, "safe_open",
                        lambda *args, **kwargs: exec("raise RuntimeError('out of memory')"))
    with pytest.raises(RuntimeError, match="out of memory"): load_tensors(tmp_path / "run.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_what_a_killed_write_of_tensors_leaves_goes_with_the_next(tmp_path):
    """The system ends the process in the middle of the file: the kit's own temporary file is left, and not long."""
    code = ("import resource, signal, sys, torch; from lagm.core.tensors import save_tensors; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); "
            "save_tensors(sys.argv[1], {'a': torch.zeros(100_000)})")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".a.safetensors.")
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
