"""Each kind of file has one reader in the package; nothing else opens, decodes or parses files of other people."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lagm"

READING = {  # calls that read or parse a file: functions as they are called, methods with a dot before their name
    "open", ".open", ".read_text", ".read_bytes", "np.load", "np.loadtxt", "np.genfromtxt", "np.fromfile", "np.memmap",
    "json.load", "json.loads", "yaml.load", "yaml.safe_load",
    "ElementTree.parse", "ElementTree.fromstring", "ElementTree.iterparse", "ElementTree.XML", "loadmat",
    "zipfile.ZipFile", "torch.load", "pickle.load", "pickle.loads"}

ALLOWED = {  # module:function -> why it may; * stands for all of a module
    "core_files:read_text": "the reader of text",
    "core_files:parse_json": "the reader of JSON",
    "core_files:checksum": "bytes, whatever they are",
    "core_files:_flush_to_disk": "a handle to flush, nothing is read",
    "core_provenance:_hardware": "the system's description of itself",
    "data_images:_decoded": "the reader of pictures",
    "data_images:describe_file": "the first bytes, to name the kind",
    "data_images:_png_depth": "the first bytes of a PNG that was read",
    "generators_pickle_records:reading": "the reader of pickles and arrays",
    "generators_unpickling:_table_of_contents": "the reader of pickles and arrays",
    "data:_member": "compressed arrays, which go to the reader of arrays",
    "data:_arrays": "compressed arrays, which go to the reader of arrays",
    "data_pascal_files:unpacked_mat": "the reader of MATLAB files",
    "data_pascal_files:read_annotation": "the reader of MATLAB files",
    "data_pascal_boxes:read_xml": "the reader of XML",
    "synthetic:_scan": "the reader of shards",
    "synthetic:SyntheticDataset._read": "the reader of shards",
    "data_cache:item_key": "bytes, for a sum",
    "sources:picture_problem": "first and last bytes",
    "sources:_*_problem": "first and last bytes",
    "download_transfer:*": "downloads and their own notes",
    "download_archives:*": "archives that were downloaded",
    "data_avatars:load_definition": "a file of an installed package",
    "data_draw_avatars:rasterise": "a picture that was drawn just now",
    "experiments:*": "parameters in YAML, which has its own rules",
    "cost:in_own_process": "what a process of ours printed",
    "sweep:*": "orders and logs of our own processes",
    "watching:*": "our own log, whose last line may be half written, and the system's",
    "data_cvat:_unpack*": "the reader of archives with annotations",
    "run_state:folder_lock": "a lock, which holds nothing",
    "cli:_heard": "a stream of the process itself",
    "report:write_pages": "pictures of our own, as bytes",
    "segmenters:load_backbone": "torchvision's weights, tensors only",
}


def name_of(function: ast.expr) -> str:
    """What is called, as `READING` spells it."""
    if isinstance(function, ast.Name): return function.id
    if not isinstance(function, ast.Attribute): return ""
    whole = f"{function.value.id}.{function.attr}" if isinstance(function.value, ast.Name) else ""
    return whole if whole in READING else f".{function.attr}"


def is_own_text(call: ast.Call) -> bool:
    """`json.loads(json.dumps(...))`, which makes plain values of others and reads nothing."""
    return (bool(call.args) and isinstance(call.args[0], ast.Call) and isinstance(call.args[0].func, ast.Attribute)
            and call.args[0].func.attr == "dumps")


def writes(call: ast.Call) -> bool:
    """Whether an `open` is for writing only."""
    texts = [a.value for a in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))
             if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return (any(set(text) <= set("wxab") and set(text) & set("wxa") for text in texts)
            or any("w" in text and len(text) < 3 for text in texts))


def readings(source: str) -> list[tuple[str, str, int]]:
    """The calls that read, as (function they are in, name, line)."""
    found = []

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            here = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                here = f"{inside}.{child.name}" if inside else child.name
            if isinstance(child, ast.Call):
                name = name_of(child.func)
                if name in READING and not is_own_text(child) and not (name.endswith("open") and writes(child)):
                    found.append((inside, name, child.lineno))
            visit(child, here)

    visit(ast.parse(source), "")
    return found


def test_the_search_finds_what_it_should():
    source = '''
def a(p): return np.load(p)
class B:
    def c(self, p):
        with open(p, "rb") as f, tarfile.open(p) as t, Image.open(p) as i: return json.loads(f.read())
def d(p): return read_text(p), p.read_text(), ElementTree.parse(p), loadmat(p), parse(p), load(p), json.loads(json.dumps(p))
def e(p):
    with open(p, "w") as f, tarfile.open(p, "w", format=1) as t, p.open("a") as g: f.write("")
'''
    assert [(where, name) for where, name, _ in readings(source)] == [
        ("a", "np.load"), ("B.c", "open"), ("B.c", ".open"), ("B.c", ".open"), ("B.c", "json.loads"),
        ("d", ".read_text"), ("d", "ElementTree.parse"), ("d", "loadmat")]


def test_nothing_else_reads():
    found = [f"lagm/{path.name}:{line}: {where} calls {name}" for path in sorted(PACKAGE.glob("*.py"))
             for where, name, line in readings(path.read_text(encoding="utf-8"))
             if not any(fnmatchcase(f"{path.stem}:{where}", allowed) for allowed in ALLOWED)]
    assert not found, "\n".join(["read these through the readers in lagm.core.files, lagm.data.images or "
                                 "lagm.core.unpickling:", *found])


def test_only_readers_are_allowed():
    """An entry whose function is gone would let another of its name through."""
    there = [f"{path.stem}:{where}" for path in PACKAGE.glob("*.py")
             for where, *_ in readings(path.read_text(encoding="utf-8"))]
    assert [allowed for allowed in ALLOWED if not any(fnmatchcase(place, allowed) for place in there)] == []
