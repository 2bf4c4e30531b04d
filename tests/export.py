"""Write lagm/ from the notebooks: what `nbdev_export` writes, and what it leaves out.

A notebook explains a parameter in a comment beside it (nbdev's docments). help(), Shift+Tab and editors show
docstrings only. So every function, method and dataclass that has such comments gets them a second time, as the
sections "Parameters", "Attributes" and "Returns" of its docstring; the comments stay the one source. A folder of
modules gets an `__init__.py` that says in a sentence what it holds. Running it twice changes nothing.
"""

import ast
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[int, int]  # line, from 1; column, in characters
Edit = tuple[Place, Place, str]  # from, to, the new text

# What each folder of modules holds.
ROOMS = {
    "core": "What everything stands on: errors, files that are whole or absent, seeds, provenance and digests.",
    "ops": "Operations that PyTorch lacks or does slowly: convolutions, Winograd's algorithm, memory.",
    "data": "Images and their label maps: datasets, folders, importers, exporters, augmentation and caches.",
    "generators": "Frozen generators, the formats of their files, and the training of a small one.",
    "models": "The annotator, the segmenters, and the files that they are saved in.",
    "matching": "The distance between two gradients, and the ways to follow it down.",
    "training": "Recipes, steps, checkpoints and the loop that trains everything in the kit.",
    "evaluation": "Scores, folds, figures and predictions for files.",
    "download": "What can be downloaded, from where, and whether it is whole.",
    "labelling": "Painting part labels, in a notebook or a browser.",
    "experiments": "What is run: projects of one's own pictures, notebooks with parameters, sweeps; and the commands.",
}


# ---- comments


def comments_of(source: str) -> dict[int, tuple[int, str]]:
    """By line: the column and the text of the comment there."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: (t.start[1], t.string.lstrip("#").strip()) for t in tokens if t.type == tokenize.COMMENT}


class Comments:
    """The comments of a module, asked for by the place of a parameter."""

    def __init__(self, source: str) -> None:
        self.lines, self.found = source.splitlines(), comments_of(source)

    def alone(self, line: int) -> bool:
        """Whether the line holds a comment and nothing else."""
        return line in self.found and not self.lines[line - 1][: self.found[line][0]].strip()

    def above(self, line: int, first: int) -> str:
        """The lines of comment directly above `line`, not above `first`."""
        start = line
        while start - 1 >= first and self.alone(start - 1): start -= 1
        return " ".join(self.found[i][1] for i in range(start, line))

    def about(self, line: int, end: int, first: int) -> str:
        """What is said above and beside something that stands on the lines from `line` to `end`."""
        beside = [self.found[i][1] for i in range(line, end + 1) if i in self.found]
        return " ".join(part for part in (self.above(line, first), *beside) if part)


def grouped(places: list[tuple[str, int, int]], comments: Comments, first: int) -> list[tuple[str, str]]:
    """(names, text) for (name, first line, last line); names on one line share its comment."""
    by_line: dict[int, tuple[list[str], int]] = {}
    for name, line, end in places:
        names, until = by_line.setdefault(line, ([], end))
        by_line[line] = ([*names, name], max(until, end))
    found = [(", ".join(names), comments.about(line, end, first)) for line, (names, end) in by_line.items()]
    return [(names, text) for names, text in found if text]


def parameters_of(node: Function, comments: Comments) -> list[tuple[str, str]]:
    """The parameters of a function that have comments."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(a.defaults))
    pairs = [*zip(plain, [*missing, *a.defaults], strict=True), *([(a.vararg, None)] if a.vararg else []),
             *zip(a.kwonlyargs, a.kw_defaults, strict=True), *([(a.kwarg, None)] if a.kwarg else [])]
    marks = {id(a.vararg): "*", id(a.kwarg): "**"}
    on_return = node.returns.lineno if node.returns else 0
    places = []
    for argument, default in pairs:
        end = max(argument.end_lineno or 0, default.end_lineno or 0 if default else 0)
        if argument.arg in ("self", "cls") or end == on_return: continue  # a comment there is the result's
        places.append((marks.get(id(argument), "") + argument.arg, argument.lineno, end))
    if node.body[0].lineno == node.lineno: return []
    return grouped(places, comments, node.lineno + 1)


def yields(node: Function) -> bool:
    """Whether a function is a generator."""
    return any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node))


def result_of(node: Function, comments: Comments) -> list[tuple[str, str]]:
    """The type of what a function returns or yields, and what its comment says; nothing if it has none."""
    if not node.returns or node.body[0].lineno <= (node.returns.end_lineno or 0): return []
    text = comments.about(node.returns.lineno, node.returns.end_lineno or 0, node.lineno + 1)
    quoted = isinstance(node.returns, ast.Constant) and isinstance(node.returns.value, str)
    kind = ast.literal_eval(node.returns) if quoted else ast.unparse(node.returns)
    return [(re.sub(r"^Iterator\[(.*)\]$", r"\1", kind) if yields(node) else kind, text)] if text else []


def fields_of(node: ast.ClassDef, comments: Comments) -> list[tuple[str, str]]:
    """The declared fields of a class that have comments."""
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)]
    public = [field for field in fields if not ast.unparse(field.target).startswith("_")]
    places = [(ast.unparse(field.target), field.lineno, field.end_lineno or 0) for field in public]
    return grouped(places, comments, node.lineno + 1)


# ---- docstrings


def section(title: str, rows: list[tuple[str, str]], indent: str) -> str:
    """A section of a docstring in numpy's style; no row, no section."""
    if not rows: return ""
    lines = [title, "-" * len(title)]
    for name, text in rows:
        lines += textwrap.wrap(name, WIDTH - len(indent), break_long_words=False)
        lines += textwrap.wrap(text, WIDTH - len(indent), initial_indent="    ", subsequent_indent="    ",
                               break_long_words=False, break_on_hyphens=False)
    return "\n".join(indent + line for line in lines)


def sections_of(node: Function | ast.ClassDef, comments: Comments) -> str:
    """All sections for one docstring; those of `__init__` stand in that of its class."""
    indent = " " * node.body[0].col_offset
    if isinstance(node, ast.ClassDef):
        init = next((own for own in node.body if isinstance(own, Function) and own.name == "__init__"), None)
        parts = [section("Parameters", parameters_of(init, comments) if init else [], indent),
                 section("Attributes", fields_of(node, comments), indent)]
    else:
        parts = [section("Parameters", parameters_of(node, comments), indent),
                 section("Yields" if yields(node) else "Returns", result_of(node, comments), indent)]
    return "\n\n".join(part for part in parts if part)


HEADING = re.compile(r"^[ \t]*(Parameters|Attributes|Returns|Yields)\n[ \t]*-{6,}[ \t]*$", re.M)


def with_sections(literal: str, sections: str, indent: str) -> str:
    """A docstring, as it stands in the source, with the sections at its end; ValueError for sections of its own."""
    prefix, quotes, text = re.findall(r"^(\w*)(\"\"\"|'''|\"|')(.*)\2$", literal, re.S)[0]
    if "r" not in prefix.lower(): sections = sections.replace("\\", "\\\\")
    sections = sections.replace('"""', "'''")
    own = HEADING.search(text)
    if own and text[own.start():].rstrip() != sections:
        raise ValueError(f"has the section {own[1]} and comments beside its parameters: keep the comments")
    before = text[: own.start()] if own else text
    quotes = '"""' if quotes in ('"', "'") else quotes
    head = before.rstrip() + "\n\n" if before.strip() else "\n"
    return f"{prefix}{quotes}{head}{sections}\n{indent}{quotes}"


def definitions(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and their methods; none that stands in a function."""
    for node in body:
        if isinstance(node, ast.ClassDef): yield from definitions(node.body)
        if isinstance(node, Function | ast.ClassDef): yield node
        if isinstance(node, ast.If): yield from definitions([*node.body, *node.orelse])


def edits(source: str) -> Iterator[Edit]:
    """What to change in a module so that its docstrings hold its comments."""
    comments, lines = Comments(source), source.split("\n")

    def place(line: int | None, offset: int | None) -> Place:  # the tree counts bytes
        return line or 0, len(lines[(line or 0) - 1].encode()[:offset].decode())

    for node in definitions(ast.parse(source).body):
        sections, first = sections_of(node, comments), node.body[0]
        if not sections or (isinstance(node, Function) and node.name == "__init__"): continue
        indent = " " * first.col_offset
        if ast.get_docstring(node, clean=False) is None:
            line = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
            yield (line, 0), (line, 0), with_sections('""""""', sections, indent).join((indent, "\n"))
            continue
        start, end = place(first.lineno, first.col_offset), place(first.end_lineno, first.end_col_offset)
        literal = "\n".join(lines[start[0] - 1 : end[0]])
        literal = literal[start[1] : len(literal) - len(lines[end[0] - 1]) + end[1]]
        try: yield start, end, with_sections(literal, sections, indent)
        except ValueError as error: raise ValueError(f"line {node.lineno}: {node.name} {error}") from None


def explained(source: str) -> str:
    """The module with its comments in its docstrings, and no line of its head too long."""
    lines = source.split("\n")
    for (top, left), (bottom, right), text in sorted(edits(source), reverse=True):
        lines[top - 1 : bottom] = (lines[top - 1][:left] + text + lines[bottom - 1][right:]).split("\n")
    return wrapped_head("\n".join(lines))


def wrapped_head(source: str) -> str:
    """The module with the two long lines that nbdev writes, its docstring and `__all__`, broken at `WIDTH`."""
    first, _, rest = source.partition("\n")
    if first.startswith('"""') and len(first) > WIDTH and first.endswith('"""'):
        source = "\n".join([*textwrap.wrap(first[:-3], WIDTH, break_long_words=False), '"""']) + "\n" + rest
    names = re.search(r"^__all__ = \[(.*?)\]$", source, re.M | re.S)
    if not names: return source
    text = "\n".join(textwrap.wrap("__all__ = [" + " ".join(names[1].split()) + "]", WIDTH, subsequent_indent=" " * 11))
    return source[: names.start()] + text + source[names.end() :]


# ---- the package


def summary_of(notebook: Path) -> str:
    """What a notebook says of itself below its title: the lines after `>`, as one; empty if there is none."""
    cells = json.loads(notebook.read_bytes())["cells"]
    title = next(("".join(cell["source"]) for cell in cells
                  if cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith("# ")), "")
    lines = itertools.dropwhile(lambda line: not line.startswith("> "), title.splitlines())
    return " ".join(line.lstrip("> ").strip() for line in itertools.takewhile(lambda line: line[:1] == ">", lines))


def summarised(source: str, folder: Path) -> str:
    """The module in `folder` with all that its notebook says of itself; nbdev takes the first line of it."""
    notebook = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (.*\.ipynb)\.$", source, re.M)
    said = summary_of(folder / notebook[1]) if notebook else ""
    found = re.match(r'"""(.*?)\s*"""\n', source, re.S)
    if not said or not found: return source
    return f'"""{said}"""\n{source[found.end():]}'


def write(path: Path, text: str) -> None:
    """Write a file if it holds something else."""
    if not path.is_file() or path.read_bytes() != text.encode(): path.write_bytes(text.encode())


def public_face(source: str) -> str:
    """`lagm/__init__.py` with what tools look for and its table `_PUBLIC` knows: `__all__`, imports of all names."""
    found = re.search(r"^_PUBLIC = (\{.*?^\})$", source, re.M | re.S)
    if not found or "if TYPE_CHECKING" in source: return source
    public: dict[str, list[str]] = ast.literal_eval(found[1])
    names = sorted(name for own in public.values() for name in own)
    imports = [f"    from {module} import {', '.join(own)}" for module, own in sorted(public.items())]
    block = [f"__all__ = {names}", "", "from typing import TYPE_CHECKING", "", "if TYPE_CHECKING:", *imports]
    version = "".join(re.findall(r"^__version__ = .*\n", source, re.M))
    lines = source.replace(version, "").split("\n")
    lines[lines.index("__all__ = []")] = version + "\n".join(block)
    return "\n".join(lines)


def write_rooms(package: Path, rooms: dict[str, str] | None = None) -> None:
    """The `__init__.py` of every folder of modules; ValueError for one that `rooms` does not know."""
    rooms, moved = ROOMS if rooms is None else rooms, package / "core" / "moved.py"
    old = runpy.run_path(str(moved))["MOVED"] if moved.is_file() else {}
    for folder in sorted({path.parent for path in package.rglob("*.py")} - {package}):
        name = ".".join(folder.relative_to(package).parts)
        if name not in rooms: raise ValueError(f"{name}/ holds modules: say which, in ROOMS of tests/export.py")
        text = f'"""{rooms[name]}"""\n\n# AUTOGENERATED! DO NOT EDIT! File to edit: tests/export.py.\n'
        if f"{package.name}.{name}" in old:
            text += f"\nfrom {package.name}.core.moved import forward\n\n__getattr__ = forward(__name__)\n"
        write(folder / "__init__.py", text)


def export(root: Path = ROOT) -> int:
    """Write all modules; how it went, as an exit status."""
    done = subprocess.run(["nbdev_export"], cwd=root)
    if done.returncode: return done.returncode
    package = root / "lagm"
    for path in sorted(package.rglob("*.py")):
        if path.name == "_modidx.py": continue
        try: write(path, explained(summarised(public_face(path.read_bytes().decode()), path.parent)))
        except ValueError as error:
            print(f"export: {path.relative_to(root)}, {error}", file=sys.stderr)
            return 1
    try: write_rooms(package)
    except ValueError as error: print(f"export: {error}", file=sys.stderr)
    else: return 0
    return 1


if __name__ == "__main__": sys.exit(export())
