"""How well the house is kept: what can be counted of its notebooks and its rooms.

`python tests/house.py` prints the table of goals with today's numbers, `python tests/house.py --list MEASURE` the
offenders: notebook, cell id, number. tests/test_house.py holds the numbers against limits.

The groups of notebooks: nbs/book and nbs/reference or, while those do not exist, nbs/components. What is counted:

first_output    Lines of code that stand in front of the first cell that shows something, median over the notebooks.
first_figure    The same for the first cell that shows a figure, over the notebooks that have one.
run_cells       The most exported cells in a row with no output and no figure between them.
run_lines       The height of them: the most lines of exported cells in a row, as the reader sees them.
cell_median     Lines of code of an exported cell, median.
cell_longest    The height of the highest exported cell.
unshown         Exported public functions and classes with nothing shown in the cell itself or in the next three.
figures         Chapters without a figure.
links           Chapters that lack the line of links which lagm.experiments.readme writes: previous, next, what they
need.
long_lines      Lines of more than 120 characters in code and prose. Not in prose: what cannot be wrapped, that is rows
                of tables, fenced code, mathematics between $$, HTML, headings, and words longer than the line.
exercises       Exercises (the numbered list under a heading "Exercises") without an answer.

and of the package, from the import statements of all its modules, wherever they stand in them:

public          Names in the `__all__` of the modules.
meanings        Public names that two modules define, each something else; `main` is the entry of any program.
rooms           The top-level folders and modules of the package; lagm/__init__.py is the face and none of them.
arrows          Pairs of rooms of which one imports from the other.
floors          The longest chain of rooms that stand on each other. A circle is one floor.
circles         Groups of rooms that import each other in a circle.

Lines of code are lines that are neither blank nor one of nbdev's directives; the *height* of a cell is all of its
lines, blank ones and directives too. A cell *shows* something if it has a stored output, if its code asserts
something (a check that would catch a breakage, `test_eq` and `pytest.raises` too), or if it is prose with an image.
An *exported* cell has the directive `export`. An exercise is *answered* by a `<details>` block after it and before
the next exercise, in the same cell or in the next ones of the notebook; or by a heading such as `### 09_matching, 3`
(the chapter's file and the exercise's number) in a notebook whose name holds `answers`.
"""

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import nbformat
from sync import ROOT, modules, notebooks

from lagm.experiments.readme import link_lines

MOST_CHARACTERS = 120
WITHIN = 3  # cells after a definition in which it must be shown
DIRECTIVE = re.compile(r"^[ \t]*#\|[ \t]*(\w+)", re.M)
FIGURE = re.compile(r"!\[[^\]]*\]\(|<img\b|<svg\b")
CHECK = re.compile(r"^\s*(?:assert\b|test_\w+\(|with (?:pytest\.raises|expect_fail|ExceptionExpected))"
                   r"|raise AssertionError", re.M)


@dataclass
class Cell:
    """A cell of a notebook, and what is asked about it."""
    notebook: str  # the notebook's path from the project's folder
    id: str
    kind: str  # "code", "markdown" or "raw"
    source: str
    outputs: list = field(default_factory=list, repr=False)

    @cached_property
    def exported(self) -> bool:
        """Whether the package holds its code."""
        return self.kind == "code" and bool({"export", "exports", "exporti"} & set(DIRECTIVE.findall(self.source)))

    @cached_property
    def lines(self) -> int:
        """Lines of code."""
        if self.kind != "code": return 0
        return sum(bool(line.strip()) and not DIRECTIVE.match(line) for line in self.source.splitlines())

    @cached_property
    def height(self) -> int:
        """Lines of the page that its code takes."""
        return len(self.source.splitlines()) if self.kind == "code" else 0

    @cached_property
    def figure(self) -> bool:
        """Whether it shows a picture."""
        if self.kind == "markdown": return bool(FIGURE.search(self.source))
        data = [output.get("data", {}) for output in self.outputs]
        return any(kind.startswith("image/") or kind == "text/html" and FIGURE.search(str(text))
                   for kinds in data for kind, text in kinds.items())

    @cached_property
    def shows(self) -> bool:
        """Whether it shows something: an output, a check, an image in the prose."""
        return self.figure or bool(self.outputs) or self.kind == "code" and bool(CHECK.search(self.source))

    @cached_property
    def definitions(self) -> list[str]:
        """The public functions and classes that it exports."""
        if not self.exported: return []
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        tree = ast.parse(self.source)
        return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


@cache
def read(path: Path) -> list[Cell]:
    """The cells of a notebook."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [Cell(name, cell.get("id", ""), cell.cell_type, cell.source, cell.get("outputs", []))
            for cell in nbformat.read(path, 4).cells]


Found = list[tuple[str, str, int]]  # (notebook or file, cell id or line, number)


# ---- of notebooks


def _before(path: Path, sort: str) -> int | None:
    """Lines of code in front of the first cell with an output or a figure; None if there is none."""
    lines = 0
    for cell in read(path):
        if cell.figure or sort == "output" and cell.outputs: return lines
        lines += cell.lines
    return None


def first(paths: Iterable[Path], sort: str) -> Found:
    """Of each notebook, the lines of code in front of its first output or figure; all of them if there is no output."""
    found = []
    for path in paths:
        lines = _before(path, sort)
        if lines is None and sort == "output": lines = sum(cell.lines for cell in read(path))
        if lines is not None: found.append((path.relative_to(ROOT).as_posix(), "", lines))
    return found


def runs(paths: Iterable[Path], sort: str) -> Found:
    """Every run of exported cells without an output or a figure: its first cell, and its length in cells or lines."""
    found = []
    for path in paths:
        run = []
        for cell in [*read(path), None]:
            if cell is not None and cell.exported and not cell.outputs: run.append(cell)
            elif run and (cell is None or cell.outputs or cell.figure):
                found.append((run[0].notebook, run[0].id, len(run) if sort == "cells" else sum(c.height for c in run)))
                run = []
    return found


def exported(paths: Iterable[Path], sort: str) -> Found:
    """Every exported cell that holds code, and its lines of code or its height."""
    return [(cell.notebook, cell.id, cell.lines if sort == "lines" else cell.height) for path in paths
            for cell in read(path) if cell.exported and cell.lines]


def definitions(paths: Iterable[Path], shown: bool | None = None) -> Found:
    """The cells with public definitions and how many; of those shown within three cells, of the others, or all."""
    found = []
    for path in paths:
        cells = read(path)
        for i, cell in enumerate(cells):
            is_shown = any(c.shows for c in cells[i:i + WITHIN + 1])
            if cell.definitions and shown in (None, is_shown):
                found.append((cell.notebook, cell.id, len(cell.definitions)))
    return found


def without_figure(paths: Iterable[Path]) -> Found:
    """The notebooks without a picture."""
    return [(path.relative_to(ROOT).as_posix(), "", 1) for path in paths if not any(cell.figure for cell in read(path))]


def without_links(paths: Iterable[Path]) -> Found:
    """The notebooks that lack the line of links which lagm.experiments.readme writes."""
    wanted = link_lines(ROOT)
    return [(path.relative_to(ROOT).as_posix(), "", 1) for path in paths
            if not any(cell.source.strip() == wanted.get(path.resolve()) for cell in read(path))]


def long_prose(text: str) -> list[int]:
    """The lines of a markdown text that are too long and could be wrapped, counted from 1."""
    found, fenced, mathematics = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if re.match(r"(```|~~~)", bare): fenced = not fenced
        inside = fenced or mathematics
        if not fenced and bare.count("$$") % 2: mathematics, inside = not mathematics, True
        kept = bare.startswith(("|", "#", "<", "$$")) or line.startswith("    ")
        if inside or kept or len(line) <= MOST_CHARACTERS: continue
        blanks = [match.start() for match in re.finditer(r"(?<=\S) ", line)]
        if any(place <= MOST_CHARACTERS for place in blanks): found.append(number)
    return found


def long_lines(paths: Iterable[Path]) -> Found:
    """The cells with lines that are too long, and their number."""
    found = []
    for cell in (cell for path in paths for cell in read(path)):
        if cell.kind == "markdown": count = len(long_prose(cell.source))
        else: count = sum(len(line) > MOST_CHARACTERS for line in cell.source.splitlines())
        if count: found.append((cell.notebook, cell.id, count))
    return found


def exercises(path: Path) -> list[tuple[str, int, bool]]:
    """(cell id, number, answered in this notebook) of each exercise of a notebook.

    A folded answer is of the exercises whose numbers it lists; without numbers, of the one above it.
    """
    found, inside, fenced, numbers = [], False, False, None  # numbers: of the folded answer that is being read
    for cell in read(path):
        if cell.kind != "markdown": continue
        for line in cell.source.splitlines():
            if line.startswith("```"): fenced = not fenced
            if fenced: continue
            if re.match(r"#{1,6} ", line): inside = bool(re.match(r"#{1,6} (Exercises?|Over to you)\b", line))
            numbered = re.match(r"(\d+)[.)] ", line)
            if inside and "<details" in line: numbers = []
            if numbered and numbers is not None: numbers.append(int(numbered[1]))
            elif inside and numbered: found.append((cell.id, int(numbered[1]), False))
            if "</details" in line and numbers is not None:
                numbers = numbers or [number for _, number, _ in found[-1:]]
                found = [(where, number, here or number in numbers) for where, number, here in found]
                numbers = None
    return found


@cache
def answered() -> frozenset[tuple[str, int]]:
    """(chapter, number) of the exercises answered in an `answers` notebook."""
    heads = (re.finditer(r"^#{2,6} .*?\b(\w+),? (\d+)\s*$", cell.source, re.M) for path in notebooks()
             if "answers" in path.stem for cell in read(path) if cell.kind == "markdown")
    return frozenset((match[1], int(match[2])) for head in heads for match in head)


def unanswered(paths: Iterable[Path], every: bool = False) -> Found:
    """The exercises without an answer: notebook, cell, the exercise's number. All of them if `every` is true."""
    return [(path.relative_to(ROOT).as_posix(), cell, number) for path in paths
            for cell, number, here in exercises(path)
            if every or not here and (path.stem, number) not in answered()]


# ---- of the package


def _imported(tree: ast.AST, package: tuple[str, ...]) -> Iterable[str]:
    """What a module of the folder `package` imports from lagm, without `lagm.`; nbdev writes relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name[5:] for a in node.names if a.name.startswith("lagm."))
        if not isinstance(node, ast.ImportFrom): continue
        module = node.module or ""
        if node.level: module = ".".join(("lagm", *package[:len(package) - node.level + 1], *filter(None, [module])))
        if module == "lagm": yield from (alias.name for alias in node.names)
        elif module.startswith("lagm."): yield module[5:]


@cache
def imports() -> dict[str, dict[str, list[str]]]:
    """room -> the rooms it imports from -> the modules that do."""
    found: dict[str, dict[str, list[str]]] = {}
    package = ROOT / "lagm"
    paths = [p for p in modules() if p.name != "_modidx.py" and p != package / "__init__.py"]
    rooms = {p.relative_to(package).with_suffix("").parts[0] for p in paths}
    for path in paths:
        name = path.relative_to(package).with_suffix("")
        arrows = found.setdefault(name.parts[0], {})
        folder = path.relative_to(package).parent.parts
        for module in _imported(ast.parse(path.read_text(encoding="utf-8")), folder):
            room = module.split(".")[0]
            if room in rooms and room != name.parts[0]: arrows.setdefault(room, []).append(name.as_posix())
    return found


def circles(graph: dict[str, Iterable[str]]) -> list[list[str]]:
    """The groups of rooms that reach each other (strongly connected components of more than one room)."""
    reach = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for room in graph.get(stack.pop(), ()):
                if room not in seen: seen.add(room), stack.append(room)
        reach[start] = seen
    groups = {frozenset(b for b in graph if b in reach[a] and a in reach[b]) for a in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def floors(graph: dict[str, Iterable[str]]) -> dict[str, int]:
    """The floor of each room: 1 if it stands on nothing, else one above the highest that it stands on."""
    together = {room: frozenset(group) for group in circles(graph) for room in group}
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            group = together.get(room, frozenset([room]))
            below = {other for one in group for other in graph.get(one, ()) if other not in group}
            level = 1 + max((floor(other) for other in below), default=0)
            known.update(dict.fromkeys(group, level))
        return known[room]
    return {room: floor(room) for room in graph}


def _all_of(path: Path) -> list[str]:
    """The names in the `__all__` of a module."""
    return [part.value for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def public() -> Found:
    """The modules and how many names each makes public."""
    return [(path.relative_to(ROOT).as_posix(), "", len(names)) for path in modules() if (names := _all_of(path))]


def meanings() -> Found:
    """The public names that more than one module defines: the name, the modules, and how many they are."""
    homes: dict[str, list[str]] = {}
    for path in modules():
        if path.parent == ROOT / "lagm" and path.name == "__init__.py": continue  # the face shows names of modules
        for name in _all_of(path): homes.setdefault(name, []).append(path.relative_to(ROOT / "lagm").as_posix())
    return [(name, " ".join(own), len(own)) for name, own in sorted(homes.items()) if len(own) > 1 and name != "main"]


def package(sort: str) -> Found:
    """The rooms, arrows, floors or circles, one by one."""
    graph = imports()
    if sort == "rooms": return [(room, "", 1) for room in sorted(graph)]
    if sort == "arrows":
        return [(room, to, len(set(by))) for room in sorted(graph) for to, by in sorted(graph[room].items())]
    if sort == "floors": return [(room, "", level) for room, level in floors(graph).items()]
    return [(" - ".join(group), "", len(group)) for group in circles(graph)]


# ---- the table


def _middle(found: Found) -> float:
    return statistics.median(number for *_, number in found) if found else 0


def _most(found: Found) -> int:
    return max((number for *_, number in found), default=0)


def _sum(found: Found) -> int:
    return sum(number for *_, number in found)


@dataclass(frozen=True)
class Measure:
    """Something that can be counted, and what is asked of it."""
    title: str
    asked: str  # of the book; of the reference in brackets
    found: Callable[..., Found]  # the cases: of notebooks, or without an argument of the package
    number: Callable[[Found], float]  # of the cases
    of: Callable[..., Found] | None = None  # what the cases are taken from, if a share says more than a number


OF_NOTEBOOKS = {
    "first_output": Measure("lines of code before the first output, median", "15 (40)", lambda p: first(p, "output"),
                            _middle),
    "first_figure": Measure("lines of code before the first figure, median", "", lambda p: first(p, "figure"), _middle),
    "run_cells": Measure("exported cells in a row, nothing shown", "2 (3)", lambda p: runs(p, "cells"), _most),
    "run_lines": Measure("height of them", "50 (90)", lambda p: runs(p, "lines"), _most),
    "cell_median": Measure("lines of code of an exported cell, median", "12 (15)", lambda p: exported(p, "lines"),
                           _middle),
    "cell_longest": Measure("height of the highest exported cell", "35 (45)", lambda p: exported(p, "height"), _most),
    "unshown": Measure("public definitions without an example or check within three cells", "0",
                       lambda p: definitions(p, False), _sum, definitions),
    "figures": Measure("chapters without a figure", "0", without_figure, len, lambda p: list(p)),
    "links": Measure("chapters without links to the previous, the next and those they need", "0",
                     without_links, len, lambda p: list(p)),
    "long_lines": Measure("lines over 120 characters, code and prose", "0", long_lines, _sum),
    "exercises": Measure("exercises without an answer", "0", unanswered, len, lambda p: unanswered(p, True)),
}
OF_THE_PACKAGE = {
    "public": Measure("public names", "", public, _sum),
    "meanings": Measure("public names with two meanings", "0", meanings, len),
    "rooms": Measure("rooms", "12", lambda: package("rooms"), len),
    "arrows": Measure("arrows between rooms", "34", lambda: package("arrows"), len),
    "floors": Measure("floors", "7", lambda: package("floors"), _most),
    "circles": Measure("circles", "0", lambda: package("circles"), len),
}


def groups() -> dict[str, list[Path]]:
    """The notebooks, by group. Answers are no chapter, and so is what exports nothing in the reference."""
    paths = [path for path in notebooks() if "answers" not in path.stem and "glossary" not in path.stem]
    named = {name: [p for p in paths if p.relative_to(ROOT).parts[1] == name]
             for name in ("book", "reference", "components")}
    named["others"] = [p for p in paths if not any(p in group for group in named.values())]
    return {name: group for name, group in named.items() if group}


def measured(name: str, paths: list[Path] | None = None) -> float:
    """One number: of notebooks, or of the package."""
    if name in OF_THE_PACKAGE: return OF_THE_PACKAGE[name].number(OF_THE_PACKAGE[name].found())
    return OF_NOTEBOOKS[name].number(OF_NOTEBOOKS[name].found(paths))


def _shown(measure: Measure, paths: list[Path]) -> str:
    number = f"{measure.number(measure.found(paths)):g}"
    return f"{number} of {measure.number(measure.of(paths)):g}" if measure.of else number


def table() -> str:
    """The table of goals with today's numbers, in markdown."""
    found = {name: paths for name, paths in groups().items() if name != "others"}
    heads = [f"{name} ({len(paths)})" for name, paths in found.items()]
    rows = [["measure", *heads, "asked"], ["---"] * (len(found) + 2)]
    rows += [[m.title, *(_shown(m, paths) for paths in found.values()), m.asked] for m in OF_NOTEBOOKS.values()]
    others = f"{measured('long_lines', groups()['others']):g}, tests {_sum(long_tests()):g}"
    rows.append(["lines over 120 characters in the other notebooks", others, *[""] * (len(found) - 1), "0"])
    rows += [[m.title, f"{m.number(m.found()):g}", *[""] * (len(found) - 1), m.asked] for m in OF_THE_PACKAGE.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def long_tests() -> Found:
    """The lines of the tests that are too long, one by one, and their lengths."""
    return [(path.relative_to(ROOT).as_posix(), str(number), 1) for path in sorted((ROOT / "tests").glob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > MOST_CHARACTERS]


def listed(name: str) -> str:
    """The cases of a measure, the worst first."""
    if name in OF_THE_PACKAGE: found = OF_THE_PACKAGE[name].found()
    else: found = [case for paths in groups().values() for case in OF_NOTEBOOKS[name].found(paths)]
    if name == "long_lines": found += long_tests()
    if name != "exercises": found = sorted(found, key=lambda case: -case[2])
    return "\n".join(f"{where}\t{cell}\t{number}" for where, cell, number in found)


def main(argv: list[str] | None = None) -> int:
    """Print the table or the cases of one measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", choices=[*OF_NOTEBOOKS, *OF_THE_PACKAGE], metavar="MEASURE",
                        help=f"the cases of one measure: {', '.join([*OF_NOTEBOOKS, *OF_THE_PACKAGE])}")
    asked = parser.parse_args(argv).list
    print(listed(asked) if asked else table())
    return 0


if __name__ == "__main__": sys.exit(main())
