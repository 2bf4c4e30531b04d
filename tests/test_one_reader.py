"""Each kind of file has one reader in the package; nothing else opens, decodes or parses files of other people."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lagm"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

READING = {  # calls that read or parse a file: functions as they are called, methods with a dot before their name
    "open", ".open", ".read_text", ".read_bytes", "np.load", "np.loadtxt", "np.genfromtxt", "np.fromfile", "np.memmap",
    "json.load", "json.loads", "yaml.load", "yaml.safe_load",
    "ElementTree.parse", "ElementTree.fromstring", "ElementTree.iterparse", "ElementTree.XML", "loadmat",
    "zipfile.ZipFile", "torch.load", "pickle.load", "pickle.loads"}

ALLOWED = {  # module:function -> why it may; * stands for all of a module
    "core.files:read_text": "the reader of text",
    "core.files:parse_json": "the reader of JSON",
    "core.files:checksum": "bytes, whatever they are",
    "core.files:_flush_to_disk": "a handle to flush, nothing is read",
    "core.origins:_hardware": "the system's description of itself",
    "core.threads:_Neighbours._now": "the system's description of itself",
    "core.threads:_can_rest": "the system's description of itself",
    "core.threads:_whole_cores": "the system's description of itself",
    "training.tuning:emulates_bfloat16": "the system's description of itself",
    "data.images:_decoded": "the reader of pictures",
    "data.images:describe_file": "the first bytes, to name the kind",
    "data.images:_png_depth": "the first bytes of a PNG that was read",
    "core.pickle_records:reading": "the reader of pickles and arrays",
    "core.unpickling:_table_of_contents": "the reader of pickles and arrays",
    "data.demo:_member": "compressed arrays, which go to the reader of arrays",
    "data.demo:_arrays": "compressed arrays, which go to the reader of arrays",
    "data.pascal_files:unpacked_mat": "the reader of MATLAB files",
    "data.pascal_files:read_annotation": "the reader of MATLAB files",
    "core.files:read_xml": "the reader of XML",
    "core.files:parse_yaml": "the reader of YAML",
    "training.shards:_scan": "the reader of shards",
    "training.shards:StoredPairs.read": "the reader of shards",
    "training.loop:go_on": "our own log, opened for writing",
    "labelling.page:LabelServer.__init__": "the script of the page, a file of the kit",
    "data.cache:item_key": "bytes, for a sum",
    "download.sources:picture_problem": "first and last bytes",
    "download.sources:_*_problem": "first and last bytes",
    "download.transfer:*": "downloads and their own notes",
    "download.archives:*": "archives that were downloaded",
    "data.avatars:load_definition": "a file of an installed package",
    "data.draw_avatars:rasterise": "a picture that was drawn just now",
    "experiments.notebooks:*": "parameters in YAML, which has its own rules",
    "experiments.cost:in_own_process": "what a process of ours printed",
    "experiments.sweep:*": "orders and logs of our own processes",
    "training.watching:*": "our own log, whose last line may be half written, and the system's",
    "data.cvat:unpack_export": "the reader of archives with annotations",
    "data.cvat:_unpack_member": "the reader of archives with annotations",
    "data.cvat:members": "names in an archive, nothing is unpacked",
    "data.squares:_side_for": "the first bytes of pictures, for their sizes",
    "experiments.course:StoredRun.__init__": "compressed arrays of the kit's own, plain values only",
    "experiments.serve:open_page": "the script of the page, a file of the kit",
    "core.files:folder_lock": "a lock, which holds nothing",
    "cli:_heard": "a stream of the process itself",
    "experiments.report:write_pages": "pictures of our own, as bytes",
    "models.deeplab:_imagenet_weights": "torchvision's weights, tensors only",
    "models.libraries:_read_state": "weights of an encoder, tensors only",
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
def d(p): return read_text(p), p.read_text(), ElementTree.parse(p), loadmat(p), parse(p), load(p), \\
    json.loads(json.dumps(p))
def e(p):
    with open(p, "w") as f, tarfile.open(p, "w", format=1) as t, p.open("a") as g: f.write("")
'''
    assert [(where, name) for where, name, _ in readings(source)] == [
        ("a", "np.load"), ("B.c", "open"), ("B.c", ".open"), ("B.c", ".open"), ("B.c", "json.loads"),
        ("d", ".read_text"), ("d", "ElementTree.parse"), ("d", "loadmat")]


def test_nothing_else_reads():
    found = [f"{module}, line {line}: {where} calls {name}" for module, path in MODULES.items()
             for where, name, line in readings(path.read_text(encoding="utf-8"))
             if not any(fnmatchcase(f"{module}:{where}", allowed) for allowed in ALLOWED)]
    assert not found, "\n".join(["read these through the readers in lagm.core.files, lagm.data.images or "
                                 "lagm.core.unpickling:", *found])


def test_only_readers_are_allowed():
    """An entry whose function is gone would let another of its name through."""
    there = [f"{module}:{where}" for module, path in MODULES.items()
             for where, *_ in readings(path.read_text(encoding="utf-8"))]
    assert [allowed for allowed in ALLOWED if not any(fnmatchcase(place, allowed) for place in there)] == []
