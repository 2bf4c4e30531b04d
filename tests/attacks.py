"""Files made to do harm to whoever reads them. Each is bytes, made for a marker file that must not appear."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import torch

P2, P4 = b"\x80\x02", b"\x80\x04"
HUGE = 2**60


def text(s: str) -> bytes: return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
def name(module: str, function: str) -> bytes: return text(module) + text(function) + b"\x93"
def old_name(module: str, function: str) -> bytes: return f"c{module}\n{function}\n".encode()
def call(module: str, function: str, *arguments: bytes) -> bytes:
    return name(module, function) + b"(" + b"".join(arguments) + b"tR"
def pickled(*parts: bytes) -> bytes: return P4 + b"".join(parts) + b"."
def touch(marker: str) -> str: return f"touch {marker}"


CALLABLES = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "check_output"),
    ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "compile"),
    ("builtins", "map"), ("pty", "spawn"), ("shutil", "rmtree"),
    ("importlib", "import_module"), ("operator", "attrgetter"), ("operator", "methodcaller"), ("functools", "partial"),
    ("functools", "reduce"), ("types", "FunctionType"), ("types", "CodeType"),
    ("ctypes", "CDLL"), ("runpy", "run_path"), ("code", "interact"), ("torch", "load"), ("torch.serialization", "load"),
    ("torch.hub", "load"), ("torch.utils.cpp_extension", "load"),
    ("numpy", "load"), ("numpy.core.multiarray", "fromstring"), ("numpy.f2py", "compile"), ("pickle", "loads"),
    ("_pickle", "loads"), ("joblib", "load"), ("copyreg", "add_extension"), ("copyreg", "__newobj__"),
    ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("torch.jit", "load"),
    ("torch_utils.persistence", "_src_to_module"), ("dnnlib.util", "get_obj_by_name"),
    ("dnnlib.util", "open_url"), ("torch.nn.modules.container", "os.system"),
    ("collections", "OrderedDict.__init__.__globals__"), ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("webbrowser", "open")]


def spread(*values) -> bytes:
    """Values as instructions, without a frame."""
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)


def blob(value, old: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def data(b: bytes) -> bytes: return b"B" + struct.pack("<I", len(b)) + b
def storage(b: bytes | None = None) -> bytes:
    return call("torch.storage", "_load_from_bytes",
                data(blob(torch.arange(6.0).untyped_storage()) if b is None else b))
def claimed(offset, shape, stride) -> bytes:
    return pickled(b"}", text("G_ema"), call("torch._utils", "_rebuild_tensor_v2", storage(),
                                             spread(offset, shape, stride, False), b"}"), b"s")


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for entry, content in entries.items(): archive.writestr(entry, content)
    return buffer.getvalue()


def torch_zip(pickle_bytes: bytes, **storages: bytes) -> bytes:
    return zipped({"a/data.pkl": pickle_bytes, "a/version": b"3\n"}
                  | {f"a/data/{key}": value for key, value in storages.items()})


def pointing(kind: str, numel: int, offset=0, shape=(2,), stride=(1,), key: str = "k0") -> bytes:
    """A pickle with one tensor in a storage of torch's zip."""
    point = b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + spread(numel) + b"tQ"
    return pickled(b"}", text("g_ema"), call("torch._utils", "_rebuild_tensor_v2", point,
                                             spread(offset, shape, stride, False), b"}"), b"s")


def changed(archive: bytes, signature: bytes, at: int, new: bytes) -> bytes:
    """A zip file with some bytes after the last `signature` replaced."""
    i = archive.rindex(signature) + at
    return archive[:i] + new + archive[i + len(new):]


def persistent(**change) -> bytes:
    meta = dict(type="class", version=6, module_src="import os; os.system('touch executed')", class_name="Generator",
                state={}) | change
    return pickled(b"}", text("G_ema"), call("torch_utils.persistence", "_reconstruct_persistent_obj", spread(meta)),
                   b"s")


def module(children: bytes) -> bytes:
    """A module whose `_modules` is made by the given instructions."""
    return (
        name("torch.nn.modules.container", "Sequential")
        + b")\x81q\x01}("
        + text("_parameters")
        + b"}"
        + text("_buffers")
        + b"}"
        + text("_modules")
        + children
        + b"ub"
    )


def shared_modules(levels: int) -> bytes:
    tree = module(b"}") + b"q\x02"
    for _ in range(levels): tree += b"0" + module(b"}(" + text("a") + b"h\x02" + text("b") + b"h\x02u") + b"q\x02"
    return pickled(b"}" + text("G_ema"), tree, b"s")


def safetensors(header: dict | bytes, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def npy(header: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def array(shape, code: str = "f4", raw: bytes = b"\0" * 24) -> bytes:
    """A TensorFlow pickle's array, told to have this shape and type."""
    made = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), spread((0,)), data(b"b"))
    kind = call("numpy", "dtype", text(code), b"\x89\x88") + spread((3, "<", None, None, None, -1, -1, 0)) + b"b"
    return pickled(made, b"(K\x01", spread(shape), kind, b"\x89", data(raw), b"tb")


def attacks(marker: str) -> dict[str, bytes]:
    """All attacks by name."""
    run = call("os", "system", text(touch(marker)))
    found = {f"reduce {m}.{f}": pickled(call(m, f, text(touch(marker)))) for m, f in CALLABLES}
    found |= {f"protocol 2 {m}.{f}": P2 + old_name(m, f) + b"(" + text(touch(marker)) + b"tR."
              for m, f in (("os", "system"), ("__builtin__", "exec"), ("torch._utils", "exec"))}
    found |= {
        "inst": P2 + b"(" + text(touch(marker)) + b"ios\nsystem\n.",
        "obj": P2 + b"(" + old_name("os", "system") + text(touch(marker)) + b"o.",
        "inst class": P2 + b"(idnnlib.util\nEasyDict\n.",
        "newobj function": pickled(name("os", "system"), b"(", text(touch(marker)), b"t\x81"),
        "newobj call": pickled(name("torch._utils", "_rebuild_tensor"), b")\x81"),
        "newobj arguments": pickled(name("torch.nn.modules.container", "Sequential"), b"(", run, b"t\x81"),
        "newobj_ex": pickled(name("collections", "OrderedDict"), b")}\x92"),
        "reduce class": pickled(name("torch.nn.modules.linear", "Linear"), b"K\x01K\x01\x86R"),
        "reduce text": pickled(text("os.system"), b"(", text(touch(marker)), b"tR"),
        "reduce record": pickled(name("torch.nn.modules.linear", "Linear"), b")\x81)R"),
        "reduce list of arguments": pickled(name("collections", "OrderedDict"), b"]R"),
        "nested callables": pickled(call("collections", "OrderedDict", b"]", run)),
        "ext1": P2 + b"\x82\x01.", "ext4": P2 + b"\x84\x01\0\0\0.",
        "global of a number": pickled(b"K\x01", text("system"), b"\x93"), "global without name": P2 + b"cos\n\n.",
        "global with blanks": P2 + b"cos system\nx\n."}
    found |= {
        "build function": pickled(name("collections", "OrderedDict"), b"}", text("__call__"), run, b"sb"),
        "build list": pickled(b"]}b"), "build text": pickled(text("x"), b"}b"), "build number": pickled(b"K\x01}b"),
        "build slots": pickled(name("torch.nn.modules.linear", "Linear"), b")\x81N}", text("__class__"),
                               name("collections", "OrderedDict"), b"s\x86b"),
        "setstate": pickled(name("dnnlib.tflib.network", "Network"), b")\x81}", text("__setstate__"), run, b"sb"),
        "build twice": pickled(name("argparse", "Namespace"), b")\x81}", text("a"), b"K\x01sb}", text("__class__"),
                               b"K\x01sb"),
        "build dtype": pickled(call("numpy", "dtype", text("f4")), spread((3, "<", ("O",), None, None, -1, -1, 0)),
                               b"b"), "append to dict": pickled(b"}K\x01a"),
        "setitem on list": pickled(b"]K\x00K\x01s"),
        "appends to record": pickled(name("argparse", "Namespace"), b")\x81(K\x01e"),
        "persid text": P2 + b"Pstorage\n.", "persid": pickled(b"(", text("storage"), b"tQ"), "buffers": P4 + b"\x97.",
        "readonly buffer": P4 + b"C\x00\x98.", "dup": P4 + b"K\x012.", "protocol 200": b"\x80\x0f" + b"N."}
    found |= {
        "storage holds code": pickled(storage(P2 + run + b".")),
        "storage holds a zip": pickled(storage(blob(torch.zeros(2), old=False))),
        "storage is code in torch's file": pickled(storage(blob(torch.zeros(2))[:60] + run)),
        "storage in storage": pickled(storage(blob({"a": 1}))),
        "storage nested": pickled(storage(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
                                          + pickle.dumps({"little_endian": True}, 2) + P4 + storage() + b"."
                                          + pickle.dumps([], 2))),
        "tensor of a name": pickled(call("torch._utils", "_rebuild_tensor_v2", name("torch", "FloatStorage"),
                                         spread(0, (1,), (1,), False), b"}")),
        "parameter of code": pickled(call("torch._utils", "_rebuild_parameter", text("os.system"), b"\x88}")),
        "strides zero": claimed(0, (HUGE, HUGE), (0, 0)), "strides zero, small": claimed(0, (1000, 1000), (0, 0)),
        "strides negative": claimed(5, (2, 3), (-3, -1)), "offset": claimed(HUGE, (2,), (1,)),
        "offset negative": claimed(-1, (2,), (1,)),
        "shape huge": claimed(0, (2**31, 2**31), (2**31, 1)), "shape negative": claimed(0, (-1, -6), (1, 1)),
        "shape of floats": claimed(0, (2.0, 3.0), (3, 1)), "shape of truths": claimed(0, (True, 6), (1, 1)),
        "too many dimensions": claimed(0, (1,) * 5000, (1,) * 5000), "shape is text": claimed(0, "2", "1"),
        "dtype lie": torch_zip(pointing("DoubleStorage", 2), k0=b"\0" * 8),
        "numel lie": torch_zip(pointing("FloatStorage", HUGE, shape=(HUGE,)), k0=b"\0" * 8),
        "storage missing": torch_zip(pointing("FloatStorage", 2)),
        "storage outside": torch_zip(pointing("FloatStorage", 2, key="../../etc/passwd"), k0=b"\0" * 8),
        "storage of code": torch_zip(pickled(b"(", text("module"), run, text("f"), text("s"), b"tQ")),
        "unknown storage": torch_zip(pointing("QUInt8Storage", 2), k0=b"\0" * 8),
        "zip with code": torch_zip(pickled(run)),
        "zip with protocol 0": torch_zip(b"cos\nsystem\n(S'" + touch(marker).encode() + b"'\ntR.")}
    found |= {
        "memo index": P2 + b"]r\xff\xff\xff\xff.", "memo of nothing": P2 + b"h\x05.",
        "memo flood": P4 + b"N" + b"\x94" * 400_000 + b".", "dicts": P4 + b"}" * 400_000 + b".",
        "sets": P4 + b"\x8f" * 150_000 + b".", "marks": P4 + b"(" * 400_000 + b".",
        "deep lists": P4 + b"]" * 100_000 + b"a" * 99_999 + b".", "deep tuples": P4 + b")" + b"\x85" * 100_000 + b".",
        "tuple as key": P4 + b"}" + b")" + b"\x85" * 60_000 + b"K\x01s.",
        "slow hash": P4 + b"})q\x000" + b"h\x00h\x00\x86q\x000" * 100 + b"h\x00K\x01s.",
        "slow hash in a set": P4 + b")q\x000" + b"h\x00h\x00\x86q\x000" * 100 + b"\x8f(h\x00\x90.",
        "laughs": P4 + b"]q\x000" + b"](h\x00h\x00eq\x000" * 5000 + b"h\x00.",
        "list in itself": P4 + b"]q\x00h\x00a.", "frame": P4 + b"\x95" + struct.pack("<Q", HUGE) + b"N.",
        "bytes8": P4 + b"\x8e" + struct.pack("<Q", HUGE) + b".",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b".",
        "unicode8": P4 + b"\x8d" + struct.pack("<Q", HUGE) + b".",
        "bytes": P4 + b"B\xff\xff\xff\xff.", "long": P4 + b"\x8b\xff\xff\xff\x7f.",
        "long negative": P4 + b"\x8b\xff\xff\xff\xff.",
        "big number": P4 + b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        "string negative": P2 + b"T\xff\xff\xff\xff.",
        "number as text": P2 + b"L" + b"9" * 10**6 + b"L\n.", "big key": P4 + b"}\x8a\x10" + b"\x7f" * 16 + b"K\x01s.",
        "no end": P4 + b"N", "two results": P4 + b"NN.", "empty stack": P4 + b".", "pop": P4 + b"00.",
        "mark missing": P4 + b"t."}
    found |= {
        "persistent module": persistent(type="module"), "persistent without state": persistent(state=None),
        "persistent with empty state": persistent(),
        "persistent, no dict": pickled(call("torch_utils.persistence", "_reconstruct_persistent_obj",
                                            text("import os"))),
        "module in itself": pickled(b"}", text("G_ema"), module(b"}" + text("a") + b"h\x01s"), b"s"),
        "modules shared": shared_modules(60), "modules deep": pickled(b"}", text("G_ema"),
                                                                      module(b"}" + text("a")) [:-2] * 2000 + b".",
                                                                      b"s"),
        "modules are a list": pickled(b"}", text("G_ema"), module(b"]"), b"s"), "array of objects": array((3,), "O8"),
        "array of records": array((3,), "V8"), "array shape": array((HUGE,)), "array shape negative": array((-1, -6)),
        "array, too few bytes": array((7,)), "array without dimensions": array(None),
        "scalar object": pickled(call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O8")), run)),
        "scalar size": pickled(call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8")), data(b"1"))),
        "encode": pickled(call("_codecs", "encode", text("a"), text("rot13"))),
        "set of sets": pickled(call("builtins", "set", b"](\x8f\x8fe"))}
    found |= zips(marker) | other(marker)
    return found


def zips(marker: str) -> dict[str, bytes]:
    """Zip files that would harm an unpacker."""
    fine = {"a/data.pkl": pickled(b"}"), "a/version": b"3\n"}
    overlapping = zipped({f"a/data/{i}": b"\0" * 50_000 if i == 0 else b"" for i in range(100)} | fine)
    central = overlapping.index(b"PK\x01\x02")
    first = overlapping[central:]
    sizes = first[16:28]
    parts = first.split(b"PK\x01\x02")
    overlapping = overlapping[:central] + b"PK\x01\x02".join([parts[0]]
                                                             + [p[:12] + sizes + p[24:38] + b"\0" * 4 + p[42:]
                                                                if i < 100 else p for i, p in enumerate(parts[1:])])
    good = zipped(fine)
    return {
        "zip slip": zipped(fine | {"../../evil": b"x"}), "zip slip inside": zipped(fine | {"a/../../evil": b"x"}),
        "zip absolute": zipped(fine | {"/etc/evil": b"x"}), "zip windows": zipped(fine | {"C:\\evil": b"x"}),
        "zip bomb": zipped({"a/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED),
        "zip bomb bzip2": zipped({"a/data.pkl": b"\0" * 10**7}, zipfile.ZIP_BZIP2), "zip overlapping": overlapping,
        "zip of many": zipped({f"a/{i}": b"" for i in range(51_000)}),
        "zip encrypted": changed(good, b"PK\x01\x02", 8, b"\x01\x00"),
        "zip crc": changed(good, b"a/data.pkl\x80", 12, b"]"),
        "zip size": changed(good, b"PK\x01\x02", 20, struct.pack("<II", 2**31, 2**31)),
        "zip offset": changed(good, b"PK\x01\x02", 42, struct.pack("<I", 2**31)),
        "zip twice": zipped(fine | {"b/data.pkl": pickled(b"}")}),
        "zip script": zipped(fine | {"a/constants.pkl": b"", "a/code/x.py": b"import os"}),
        "zip big-endian": zipped(fine | {"a/byteorder": b"big"})}


def other(marker: str) -> dict[str, bytes]:
    """Attacks on the other formats."""
    deep = b'{"__metadata__": {"lagm": "' + b"[" * 200_000 + b'"}}'
    legacy = blob({"a": torch.zeros(3)})
    return {
        "safetensors deep": safetensors(deep),
        "safetensors header": struct.pack("<Q", 2**40) + b"{}",
        "safetensors offsets": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, HUGE]}}),
        "safetensors shape": safetensors(
            {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4
        ),
        "safetensors kwargs": safetensors(
            {
                "__metadata__": {
                    "lagm": json.dumps(
                        dict(
                            kind="generator",
                            format_version=1,
                            network="StyleGAN2",
                            init_kwargs=dict(img_resolution=2**40),
                        )
                    )
                }
            }
        ),
        "safetensors layers": safetensors(
            {
                "__metadata__": {
                    "lagm": json.dumps(
                        dict(
                            kind="generator",
                            format_version=1,
                            network="StyleGAN2",
                            init_kwargs=dict(img_resolution=16, mapping_kwargs=dict(num_layers=10**9)),
                        )
                    )
                }
            }
        ),
        "legacy code": legacy[:14]
        + b"."
        + pickle.dumps(1001, 2)
        + P4
        + call("os", "system", text(touch(marker)))
        + b".",
        "legacy numel": legacy[:-20] + struct.pack("<q", HUGE) + legacy[-12:],
        "legacy keys": legacy.replace(b"]q", b"}q", 1),
        "legacy cut": legacy[:-5],
    }


def arrays(marker: str) -> dict[str, bytes]:
    """Attacks on the readers of numpy's files."""
    objects = io.BytesIO()
    np.save(objects, np.array([type("Evil", (), {"__reduce__": lambda self: (exec, (f"open({marker!r}, 'w')",))})()],
                              dtype=object), allow_pickle=True)
    plain = io.BytesIO()
    np.save(plain, np.zeros(8))
    head = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n"
    return {
        "npy objects": objects.getvalue(), "npy shape": npy(head.format("'<f4'", "(99999999999,)"), b"\0" * 8),
        "npy overflow": npy(head.format("'<f4'", f"({2**63}, 2)")),
        "npy negative": npy(head.format("'<f4'", "(-2,)"), b"\0" * 8), "npy nested": npy("(" * 9000 + "\n"),
        "npy code": npy(f"__import__('os').system('{touch(marker)}')\n"),
        "npy structured": npy(head.format("[('a', '|O')]", "(1,)"), b"\0" * 8),
        "npy long header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "npy version": b"\x93NUMPY\x09\x09" + b"\0" * 99,
        "npy cut": plain.getvalue()[:-1], "npy text": npy(head.format("'<U8'", "(1,)"), b"\0" * 32),
        "npy pickle": pickled(call("os", "system", text(touch(marker)))),
        "npz objects": zipped({"a.npy": objects.getvalue()}),
        "npz bomb": zipped({"a.npy": b"\0" * 10**7}, zipfile.ZIP_DEFLATED),
        "npz slip": zipped({"../a.npy": plain.getvalue()}),
        "npz of pickles": zipped({"a.npy": pickled(call("os", "system", text(touch(marker))))}),
        "npz cut": zipped({"a.npy": plain.getvalue()})[:-9]}
