"""What reading a pickle takes in memory and steps goes with the file's size, whatever it repeats; and what is harmless
in a checkpoint is no reason to refuse it.
"""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import pickle
import pickletools
import tracemalloc
import types
import uuid

import attacks
import numpy as np
import official_files as official
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import tiny

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.pickle_machine import read_pickle
from lagm.core.pickle_names import is_extra
from lagm.core.pickle_records import Extra, LazyArray, Record, Unreadable
from lagm.core.unpickling import module_tensors, read_torch_zip
from lagm.generators.load import load_generator
from lagm.models.results import load_results

LONG = 60_000


def spread(value) -> bytes:
    """A value as instructions that remember nothing."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def legacy(content: bytes) -> bytes:
    """A storage as pickles of NVIDIA's hold it."""
    buffer = io.BytesIO()
    torch.save(torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage(), buffer,
               _use_new_zipfile_serialization=False)
    return buffer.getvalue()


REMEMBERED = [  # what the instructions below take from the memo, by number
    spread([f"item {i}" for i in range(800)]), spread("x" * LONG), spread(b"x" * LONG), spread("\xff" * (LONG // 2)),
    spread([(f"key {i}", i) for i in range(500)]),
    spread({f"key {i}": i for i in range(500)}), attacks.data(legacy(b"x" * LONG)), attacks.storage(), spread((LONG,)),
    spread(list(range(800))),
    attacks.call("numpy", "dtype", attacks.text("u1"), b"\x89\x88")]
PREFIX = b"".join(made + b"q" + bytes([i]) + b"0" for i, made in enumerate(REMEMBERED))


def memo(i: int) -> bytes: return b"h" + bytes([i])
def call(module: str, function: str, *arguments: bytes) -> bytes:
    return attacks.old_name(module, function) + b"(" + b"".join(arguments) + b"tR"


ARRAY = call("numpy.core.multiarray", "_reconstruct", attacks.old_name("numpy", "ndarray"), spread((0,)),
             attacks.data(b"b"))
REPEATED = {
    "set": call("builtins", "set", memo(0)), "set of numbers": call("__builtin__", "set", memo(9)),
    "frozenset": call("builtins", "frozenset", memo(0)), "dict of pairs": call("collections", "OrderedDict", memo(4)),
    "counter": call("collections", "Counter", memo(5)),
    "default dict": call("collections", "defaultdict", b"N", memo(5)),
    "easy dict": call("dnnlib.util", "EasyDict", memo(4)),
    "bytes": call("_codecs", "encode", memo(3), attacks.text("latin1")),
    "bytearray": call("builtins", "bytearray", memo(3), attacks.text("latin-1")),
    "array": call("numpy.core.numeric", "_frombuffer", memo(1), memo(10), memo(8), attacks.text("C")),
    "array, built": ARRAY + b"(K\x01" + memo(8) + memo(10) + b"\x89" + memo(1) + b"tb",
    "storage": call("torch.storage", "_load_from_bytes", memo(6)),
    "tensor": call("torch._utils", "_rebuild_tensor", memo(7), b"K\x00", spread((2,)), spread((1,))),
    "size": call("torch", "Size", spread((1,) * 16)), "name": memo(1) + memo(1) + b"\x93",
    "record": attacks.old_name("training.a", "B") + b")\x81", "extra": call("pathlib", "PosixPath", memo(1)),
    "dict": b"}" + attacks.text("a") + b"Ns",
    "mark and list": b"(" + memo(0) * 30 + b"l", "text": attacks.text("xyz" * 20),
    "sets of one": b"\x8f(" + attacks.text("a") + b"\x90"}


# what takes no more than its instructions say
CHEAP = ("storage", "tensor", "size", "record", "extra", "dict", "mark and list", "text", "sets of one")


def peak_of(content: bytes) -> tuple[bool, int]:
    """Whether it was read, and the most memory that this took."""
    tracemalloc.start()
    try:
        read_pickle(content)
        return True, tracemalloc.get_traced_memory()[1]
    except Unreadable: return False, tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", REPEATED)
def test_what_is_repeated_is_paid_for_each_time(name, keep):
    unit = REPEATED[name] + b"" if keep else REPEATED[name] + b"0"
    once = b"\x80\x02" + PREFIX + b"(" + unit + b"t."
    if name != "name": read_pickle(once)
    many = b"\x80\x02" + PREFIX + b"(" + unit * (80_000 // len(unit)) + b"t."
    read, peak = peak_of(many)
    assert peak < 4 * len(many) + 48e6, f"{peak / 1e6:.0f} MB for {len(many) / 1e6:.2f} MB"
    assert read == (name in CHEAP)


PIECES = [memo(i) for i in range(len(REMEMBERED))] + [b"(", b"t", b"l", b"u", b"e", b"s", b"a", b"}", b"]", b"\x8f",
                                                      b"\x90", b"\x91", b"R", b"\x81", b"b", b"0", b"\x85", b"\x86",
                                                      b"\x87", b"N", b"K\x01", b"q\x20", b"h\x20", b"\x94"] + [
    attacks.old_name(*pair) for pair in (("builtins", "set"), ("collections", "OrderedDict"), ("_codecs", "encode"),
                                         ("torch.storage", "_load_from_bytes"),
                                         ("numpy.core.multiarray", "_reconstruct"), ("builtins", "bytearray"),
                                         ("torch.nn", "Linear"), ("pathlib", "Path"),
                                         ("collections", "defaultdict"))] + list(REPEATED.values())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), st.integers(1, 2000))
def test_random_programs_over_large_things_stay_within_the_budget(pieces, times):
    content = b"\x80\x02" + PREFIX + b"(" + (b"".join(pieces) * times)[:60_000] + b"t."
    _, peak = peak_of(content)
    assert peak < 4 * len(content) + 48e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("content, words", [
    (b"\x80\x04(" + b"]q\x00" + b"".join(attacks.text(f"{i:02d}") for i in range(99)) + b"e0"
     + b"cbuiltins\nset\nh\x00\x85R" * 8000 + b"t.", "bomb"),
    (b"\x80\x04" + attacks.text("a" * LONG) + b"q\x000(" + (b"h\x00X\x01\x00\x00\x00Bx\x93").replace(b"Bx", b"B") * 5000
     + b"t.", "characters")])
def test_the_two_files_that_took_minutes(tmp_path, capsys, content, words):
    (tmp_path / "bomb.pkl").write_bytes(content)
    assert main(["inspect", str(tmp_path / "bomb.pkl")]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    with pytest.raises(InputError): load_results(tmp_path / "bomb.pkl")


# ---- what comes after the machine


def persistent(modules: dict, parameters: dict, **more) -> Record:
    record = Record("Layer")
    record.state = {"_parameters": parameters, "_buffers": {}, "_modules": modules} | more
    return record


def test_modules_that_share_their_parts_are_counted_each_time():
    (tensor,) = read_pickle(pickle.dumps([torch.zeros(2)], 2))
    many = {f"p{i}": tensor for i in range(3000)}
    with pytest.raises(Unreadable, match="parts"):
        module_tensors(persistent({f"m{i}": persistent({}, many) for i in range(10)}, {}))
    with pytest.raises(Unreadable, match="names"):
        module_tensors(persistent({"m" * 299: persistent({}, {"pp": tensor})}, {}))
    hidden = [f"p{i}" for i in range(3000)]
    assert len(module_tensors(persistent({}, many, _non_persistent_buffers_set=hidden))) == 3000


def test_keys_of_an_old_torch_file_are_texts():
    """A list that holds itself many times over has a text of astronomical length."""
    old = (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
           + pickle.dumps({}, 2))
    laughs = b"\x80\x02]q\x000" + b"](h\x00h\x00eq\x000" * 100 + b"h\x00."
    with pytest.raises(Unreadable, match="other tensors"):
        read_pickle(b"\x80\x02" + attacks.old_name("torch.storage", "_load_from_bytes") + b"("
                    + attacks.data(old + laughs) + b"tR.")


def test_strides_across_the_whole_file_are_counted(tmp_path):
    """Hundreds of small tensors, each of which has its numbers at both ends of one large storage."""
    state = official.rosinality_state(tiny())
    big = torch.zeros(2_000_000)
    for name in list(state):
        if name.endswith(".modulation.bias") or name.startswith("style") and name.endswith("bias"):
            state[name] = big.as_strided((8,), (250_000,))
    torch.save({"g_ema": state, "latent_avg": torch.zeros(8)}, tmp_path / "g.pt")
    with pytest.raises(InputError, match="the same numbers for many tensors"): load_generator(tmp_path / "g.pt")


# ---- harmless things


class Mode(enum.Enum):
    FAST, SLOW = "fast", 2


@dataclasses.dataclass
class Options:
    path: pathlib.Path
    rate: float = 0.1


class Point(collections.namedtuple("Point", "x y")): pass


EXTRAS = {
    "posix path": pathlib.PurePosixPath("/data/pictures"), "windows path": pathlib.PureWindowsPath(r"C:\data"),
    "path": pathlib.Path("data"), "date and time": datetime.datetime(2021, 3, 4, 5, 6, tzinfo=datetime.UTC),
    "date": datetime.date(2021, 3, 4), "time": datetime.time(1, 2), "duration": datetime.timedelta(days=3),
    "zone": datetime.timezone(datetime.timedelta(hours=2)), "deque": collections.deque([1, 2], maxlen=5),
    "namespace": types.SimpleNamespace(a=1, b=[2]), "arguments": argparse.Namespace(size=16, path=pathlib.Path("x")),
    "fraction": fractions.Fraction(1, 3), "decimal": decimal.Decimal("0.1"), "identifier": uuid.UUID(int=5),
    "complex": 1 + 2j,
    "enum": Mode.FAST, "enum, number": Mode.SLOW, "options": Options(pathlib.Path("y")), "point": Point(1, 2),
    "numpy text": np.str_("hello"), "numpy texts": np.array(["a", "bc"]), "numpy date": np.datetime64("2021-03-04"),
    "numpy number": np.float32(1.5), "numpy complex": np.complex64(1j), "random state": np.random.RandomState(0),
    "random numbers": np.random.default_rng(0), "range": range(3), "slice": slice(1, 2), "type": np.float32,
    "class": Options, "size": torch.Size([1, 2]),
    "device": torch.device("cpu"), "dtype": torch.float8_e4m3fn}


@pytest.mark.parametrize("name", EXTRAS)
def test_harmless_things_beside_a_network_do_not_matter(tmp_path, name):
    network = tiny()
    content = {"g_ema": official.rosinality_state(network), "latent_avg": network.mapping.w_avg, "extra": EXTRAS[name],
               "more": [EXTRAS[name], {"deep": (EXTRAS[name],)}]}
    for zipped in (True, False):
        torch.save(content, tmp_path / "g.pt", _use_new_zipfile_serialization=zipped)
        G = load_generator(tmp_path / "g.pt")
        assert torch.equal(G.network.mapping.fc0.weight, network.mapping.fc0.weight)
    for protocol in (2, 3, 4, 5):
        extra = read_pickle(pickle.dumps({"a": EXTRAS[name], "b": 1}, protocol))
        assert (extra["b"] == 1 and type(extra["a"]) in (Extra, Record, LazyArray, float, tuple, str)
                or str(type(extra["a"])).endswith("Name'>"))


def test_dicts_with_a_default_or_a_count_are_dicts():
    default = collections.defaultdict(list, a=[1])
    for protocol in (2, 4):
        assert read_pickle(pickle.dumps([default, collections.Counter("aab"), collections.OrderedDict(x=1)],
                                        protocol)) == [{"a": [1]}, {"a": 2, "b": 1}, {"x": 1}]
    class EasyDict(official.EasyDict): pass
    with official.stand_ins({"easydict.EasyDict": EasyDict}): content = pickle.dumps(EasyDict(a=1), 4)
    assert read_pickle(content) == {"a": 1}


def test_what_is_made_of_an_extra_is_never_run(tmp_path):
    """Their constructors are not called, their attributes are not set, and nothing is kept of them."""
    extra = read_pickle(attacks.pickled(attacks.call("options", "Options", attacks.text("x")), b"}",
                                        attacks.text("__class__"), b"K\x01s", b"b"))
    assert type(extra) is Extra and vars(extra) == {"class_name": "options.Options"}
    for filled in (b"]K\x01a", b"](K\x01K\x02e", b"}K\x01K\x02s"):
        made = attacks.call("options", "Options", attacks.text("x")) + filled[1:]
        assert vars(read_pickle(attacks.pickled(made))) == {"class_name": "options.Options"}
    network = attacks.pickled(b"}", attacks.text("G_ema"), attacks.call("options", "Options"), b"s")
    (tmp_path / "g.pkl").write_bytes(network)
    with pytest.raises(InputError, match="options.Options"): load_generator(tmp_path / "g.pkl")


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval", "builtins.getattr",
                                  "pathlib.Path.unlink", "pathlib.os.system", "types.FunctionType", "types.CodeType",
                                  "ctypes.CDLL", "code.InteractiveConsole", "zipimport.zipimporter",
                                  "multiprocessing.Process", "threading.Thread", "torch.jit.ScriptModule",
                                  "torch.package.PackageImporter", "torch.load", "numpy.memmap", "datetime.sys.exit",
                                  "collections.abc.os.system", "options.load", "options.Options.__init__",
                                  "options.__class__.X", "dill._dill.Anything", "popen2.Popen3", "pip.Main",
                                  "functools.partial", "operator.attrgetter", "logging.FileHandler", "smtplib.SMTP",
                                  "socket.socket", "urllib.request.Request", "tempfile.TemporaryDirectory",
                                  "shelve.DbfilenameShelf", "importlib.metadata.PathDistribution",
                                  "webbrowser.GenericBrowser"])
def test_dangerous_things_are_still_named(tmp_path, name):
    assert not is_extra(name)
    module, _, function = name.rpartition(".")
    for made in (attacks.call(module, function, attacks.text("true")), attacks.name(module, function) + b")\x81"):
        (tmp_path / "g.pkl").write_bytes(attacks.pickled(b"}", attacks.text("extra"), made, b"s"))
        with pytest.raises(InputError, match="can run programs") as caught: load_generator(tmp_path / "g.pkl")
        assert f"'{name}'" in str(caught.value)


def test_the_name_of_a_dangerous_thing_is_shown_without_its_escapes(tmp_path):
    (tmp_path
     / "g.pkl").write_bytes(attacks.pickled(attacks.call("os\x1b[2J\u202e\n", "system" * 20, attacks.text("true"))))
    with pytest.raises(InputError, match=r"os\\x1b\[2J") as caught: load_generator(tmp_path / "g.pkl")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


UNUSUAL = {"sparse": lambda: torch.zeros(2, 2).to_sparse(),
           "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
           "meta": lambda: torch.zeros(2, device="meta"), "float8_e5m2": lambda: torch.zeros(2).to(torch.float8_e5m2),
           "uint16": lambda: torch.zeros(2).to(torch.uint16)}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_unusual_kinds_are_no_programs(tmp_path, kind):
    torch.save({"g_ema": {"style.1.weight": UNUSUAL[kind]()}}, tmp_path / "g.pt")
    with pytest.raises(InputError, match=kind if "_" in kind or "16" in kind else "unusual kind") as caught:
        load_generator(tmp_path / "g.pt")
    assert "can run programs" not in str(caught.value)


def test_an_error_that_no_reader_expects_is_still_a_sentence(tmp_path, monkeypatch):
    import lagm.generators.rosinality as module
    torch.save({"g_ema": official.rosinality_state(tiny())}, tmp_path / "g.pt")
    for error in (KeyError("\x1b[2J"), AttributeError("x"), ZeroDivisionError(),
                  UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")):
        def fail(*_, error=error): raise error
        monkeypatch.setattr(module, "rosinality", fail)
        with pytest.raises(InputError, match="g.pt") as caught: load_generator(tmp_path / "g.pt")
        assert str(caught.value).isprintable()


def test_complex_numbers_are_read_as_torch_does(tmp_path):
    torch.save({"a": torch.tensor([1 + 2j])}, tmp_path / "c.pt")
    data = memoryview((tmp_path / "c.pt").read_bytes())
    assert torch.equal(read_torch_zip(tmp_path / "c.pt", data)["a"].tensor(), torch.tensor([1 + 2j]))
