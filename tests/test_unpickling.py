"""The reader gives what torch and numpy would, and neither runs, nor is exhausted by, nor crashes on anything else."""

import io
import pickle
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import attacks
import numpy as np
import nursery
import official_files as official
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import tiny, tiny1

from lagm.core.errors import InputError
from lagm.core.pickle_machine import ACTIONS, read_legacy_torch, read_pickle
from lagm.core.pickle_records import LazyTensor, Unreadable
from lagm.core.unpickling import read_arrays, read_torch_zip
from lagm.generators.load import load_generator
from lagm.generators.weights import save_generator
from lagm.models.results import load_results
from lagm.models.segmenters import UNet

FOLDER = tempfile.TemporaryDirectory()
MARKER = Path(FOLDER.name) / "marker"  # what an attack makes if it is run
ATTACKS, ARRAYS = attacks.attacks(str(MARKER)), attacks.arrays(str(MARKER))


# ---- what is right comes out as it went in


def opened(value):
    """The value with its tensors and arrays read."""
    if isinstance(value, LazyTensor): return value.tensor()
    if isinstance(value, dict): return {k: opened(v) for k, v in value.items()}
    return [opened(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_tensors_come_out_as_torch_reads_them(dtype, tmp_path):
    whole = (torch.randn(6, 5) * 50).to(dtype)
    tensors = {"whole": whole, "turned": whole.t(), "part": whole[1::2, 2:4], "number": whole[3, 3], "empty": whole[:0],
               "again": whole}
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
        data = memoryview((tmp_path / "t.pt").read_bytes())
        ours = opened(read_torch_zip(tmp_path / "t.pt", data) if zipped else read_legacy_torch(data))
        theirs = torch.load(tmp_path / "t.pt", weights_only=True)
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype is dtype and ours[k].shape == theirs[k].shape
                   for k in theirs)
    assert all(torch.equal(opened(read_pickle(pickle.dumps(tensors, protocol)))[k], tensors[k]) for k in tensors
               for protocol in (2, 5))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text()
                    | st.binary(),
                    lambda s: st.lists(s) | st.dictionaries(st.text(), s) | st.tuples(s, s)
                    | st.lists(s, max_size=5).map(tuple), max_leaves=30), st.integers(2, 5))
def test_plain_data_survives_every_protocol(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)) == value


def test_large_pieces_and_small_classes():
    value = OrderedDict(text="ü" * 100_000, raw=b"\xff" * 100_000, mutable=bytearray(b"abc"), members={1, "a"},
                        frozen=frozenset([2]))
    for protocol in (2, 3, 4, 5):
        read = read_pickle(pickle.dumps(value, protocol))
        assert (bytes(read["raw"]) == value["raw"] and bytes(read["mutable"]) == b"abc" and read["members"] == {1, "a"}
                and read["frozen"] == {2})


@pytest.mark.parametrize("code", ["f2", ">f4", "<f8", "i8", ">i2", "u1", "?"])
def test_arrays_of_every_type(code):
    array = (np.random.standard_normal((3, 4)) * 9).astype(code)
    for protocol in (2, 3, 4, 5):
        for given_array in (array, np.asfortranarray(array), array[:0]):
            read = read_pickle(pickle.dumps(given_array, protocol))
            assert (read.array() == given_array).all() and read.array().dtype == given_array.dtype


# ---- attacks


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_told_and_does_nothing(name, tmp_path):
    content = ATTACKS[name]
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    small = len(content) < 50_000  # counting is slow; what large ones take is measured below, for the whole process
    for load in (load_generator, load_results)[: 1 + small]:
        start = time.perf_counter()
        if small: tracemalloc.start()
        try:
            with pytest.raises(InputError) as caught: load(path)
            peak = tracemalloc.get_traced_memory()[1] if small else 0
        finally: tracemalloc.stop()
        message = str(caught.value)
        assert "evil.pkl" in message and message.isprintable() and len(message) < 700, message
        assert "; " in message or " use " in message or ": the file" in message, f"no remedy: {message}"
        assert peak < 4 * len(content) + 48e6, f"{peak / 1e6:.0f} MB for a file of {len(content) / 1e6:.2f} MB"
        assert time.perf_counter() - start < 60  # not a measurement: some attacks would take years
    assert not MARKER.exists()


def test_there_are_enough_attacks_and_the_first_would_really_run(tmp_path):
    assert len(ATTACKS) + len(ARRAYS) > 150
    content = attacks.pickled(attacks.call("os", "system", attacks.text(attacks.touch(str(tmp_path / "marker")))))
    assert len(content) - len(str(tmp_path)) == len(ATTACKS["reduce os.system"]) - len(FOLDER.name)
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"], input=content,
                   check=True)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_an_attack_in_an_array_is_told_and_does_nothing(name, tmp_path):
    network = tmp_path / "g.pt"
    (tmp_path / "mean.npy").write_bytes(ARRAYS[name])
    torch.save(tiny1().state_dict(), network)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="mean.npy"): load_generator(network, avg_latent=tmp_path / "mean.npy")
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally: tracemalloc.stop()
    assert not MARKER.exists()
    with pytest.raises(InputError, match="mean.npy"): read_arrays(tmp_path / "mean.npy")


def test_attacks_do_not_take_memory_outside_of_python_either(tmp_path):
    """All attacks in one process: its highest memory use, whoever asked for it."""
    if not Path("/proc/self/status").exists(): pytest.skip("needs /proc")
    (tmp_path / "files").mkdir()
    for i, content in enumerate(ATTACKS.values()): (tmp_path / "files" / f"{i}.pkl").write_bytes(content)
    code = """
import sys
from pathlib import Path
from lagm.core.errors import InputError
from lagm.generators.load import load_generator
import lagm.generators.formats
def kilobytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])
before = kilobytes("VmHWM")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try: load_generator(path)
    except InputError: continue
    raise SystemExit(f"no error for {path}")
print((kilobytes("VmHWM") - before) // 1024)"""
    done = nursery.run([sys.executable, "-c", code, str(tmp_path / "files")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 150, f"{done.stdout} MB"
    assert not MARKER.exists()


# ---- damage


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    """A small valid file of every format."""
    folder, network = (tmp_path_factory.mktemp("good"),
                       tiny(img_resolution=8, z_dim=4, w_dim=4, mapping_layers=1, channel_base=16, channel_max=2))
    ours = folder / "g.safetensors"
    save_generator(ours, network)
    torch.save(tiny1().state_dict(), folder / "one.pt")
    paths = {"nvidia": official.nvidia_pytorch(folder / "g.pkl", network, executed=str(folder / "executed")),
             "rosinality zip": official.rosinality(folder / "z.pt", network),
             "rosinality legacy": official.rosinality(folder / "l.pt", network, zipped=False),
             "tensorflow": official.nvidia_tensorflow(folder / "t.pkl",
                                                      {"dlatent_avg": np.zeros(4, "f4"),
                                                       "mapping/Dense0/weight": np.zeros((4, 4), "f4")},
                                                      {"resolution": 8, "latent_size": 4}),
             "datasetgan": folder / "one.pt", "ours": ours}
    return {name: path.read_bytes() for name, path in paths.items()}


def try_loading(content: bytes, path: Path) -> bool:
    """Whether it loads; any error but `InputError` is passed on."""
    path.write_bytes(content)
    try: load_generator(path)
    except InputError as error:
        assert path.name in str(error) and len(str(error)) < 900
        return False
    return True


FORMATS = ["nvidia", "rosinality zip", "rosinality legacy", "tensorflow", "datasetgan", "ours"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_told(kind, good_files, tmp_path):
    content = good_files[kind]
    assert try_loading(content, tmp_path / "cut") or kind == "tensorflow"  # that one lacks most variables
    cuts = sorted({*range(0, 40), *np.linspace(40, len(content) - 30, 60).astype(int).tolist(),
                   *range(len(content) - 30, len(content))})
    for cut in cuts: assert not try_loading(content[:cut], tmp_path / "cut"), cut


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_or_are_told(kind, good_files, tmp_path_factory):
    content, path = good_files[kind], tmp_path_factory.mktemp("fuzz") / "fuzz"
    places = st.integers(0, len(content)
                         - 1) | st.integers(0, min(3000, len(content) - 1)) | st.integers(max(0, len(content) - 800),
                                                                                          len(content) - 1)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(places, st.sampled_from(["flip", "set", "insert", "remove", "copy"]),
                              st.integers(0, 255)), min_size=1, max_size=4))
    def damage(changes):
        mutated = bytearray(content)
        for at, how, value in changes:
            at = min(at, len(mutated) - 1)
            if how == "flip": mutated[at] ^= 1 << value % 8
            elif how == "set": mutated[at] = value
            elif how == "insert": mutated[at:at] = bytes([value]) * (1 + value % 9)
            elif how == "remove": del mutated[at : at + 1 + value % 9]
            else: mutated[at:at] = content[at : at + value]
        try_loading(bytes(mutated), path)

    damage()


PIECES = [b"}", b"]", b")", b"(", b"N", b"K\x01", b"\x94", b"h\x00", b"q\x00", b"s", b"u", b"a", b"e", b"t", b"\x85",
          b"\x86", b"R", b"\x81", b"b", b"0", b"1", b"\x93", b"\x8f", b"\x90", b"\x91", b"Q",
          attacks.text("a"), attacks.name("collections", "OrderedDict"),
          attacks.name("torch._utils", "_rebuild_tensor_v2"), attacks.storage(), attacks.name("numpy", "dtype"),
          attacks.text("f4"), attacks.spread((0,)),
          attacks.name("numpy.core.multiarray", "_reconstruct"), attacks.name("torch.nn.modules.linear", "Linear"),
          attacks.name("torch_utils.persistence", "_reconstruct_persistent_obj"), attacks.data(b"abcd"),
          attacks.name("_codecs", "encode")]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_random_programs_give_data_or_a_reason(pieces):
    try: read_pickle(b"\x80\x04" + b"".join(pieces) + b".")
    except Unreadable: pass


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300))
def test_random_bytes_give_data_or_a_reason(content):
    try: read_pickle(b"\x80\x04" + content)
    except Unreadable: pass


def test_the_reader_calls_nothing_but_its_own():
    """No instruction of the machine imports or looks up an attribute by a name from the file."""
    import inspect

    import lagm.core.pickle_machine as machine
    import lagm.core.pickle_names as names
    import lagm.core.pickle_records as records
    import lagm.core.unpickling as doors
    source = "\n".join(map(inspect.getsource, (machine, names, records, doors)))
    forbidden = ("importlib", "__import__", "eval(", "exec(", "pickle.load", "torch.load(", "Unpickler",
                 "allow_pickle=True")
    for word in ("getattr(", *forbidden): assert word not in source, word
    assert {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "DUP"}.isdisjoint(ACTIONS)


def test_a_segmenter_with_code_in_it_is_refused(tmp_path):
    state = UNet(3, width=2, levels=1).state_dict()
    state["evil"] = type("Evil", (), {"__reduce__": lambda self: (print, ("executed",))})()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (tmp_path / "s.pth").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="s.pth imports '__builtin__.print'"): load_results(tmp_path / "s.pth")
