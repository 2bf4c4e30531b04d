"""Rules that hold for every notebook and every module of the project."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from sync import ROOT, differences, modules, notebooks

from lagm.experiments.notebooks import check_parameters, find_experiment, read_parameter_file, read_parameters

NOTEBOOKS = notebooks()
COMPONENTS = [path for path in NOTEBOOKS if {"book", "reference"} & set(path.relative_to(ROOT).parts)]
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent == ROOT / "nbs" / "experiments"]
MODULES = [path for path in modules() if path.name not in ("__init__.py", "_modidx.py")]
MOST_LINES = 70
MOST_BYTES_OF_A_PICTURE = 150_000
MACHINE_PATH = re.compile(
    r"(?<![\w.…~])/(?:tmp|home|root|work|Users|private|var/folders|mnt|opt)/[\w.]|[A-Z]:\\\\?Users"
)


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def directives(cell) -> list[str]:
    return re.findall(r"^[ \t]*#\|[ \t]*(\w+)", cell.source, re.M)


def parsed(cell) -> ast.Module:
    """The cell's syntax tree; lines that only a notebook understands are passed over."""
    return ast.parse("\n".join("pass" if re.match(r"\s*[!%]", line) else line for line in cell.source.splitlines()))


def test_there_are_notebooks_and_modules():
    assert COMPONENTS and MODULES and (ROOT / "nbs" / "index.ipynb") in NOTEBOOKS


# ---- every notebook


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_notebook_holds_no_widgets_errors_or_big_pictures(path):
    notebook = nbformat.read(path, 4)
    assert "widgets" not in notebook.metadata, "saved widget state: clear it (pictures must be static as well)"
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number} holds an error"
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data), f"cell {number} holds a widget"
            size = len(data.get("image/png", "")) * 3 // 4
            assert size <= MOST_BYTES_OF_A_PICTURE, (
                f"the picture of cell {number} has {size:,} bytes: fewer dots per inch"
            )


@pytest.mark.parametrize("path", named(NOTEBOOKS + MODULES
                                       + [ROOT / name for name in ("README.md", "Makefile", "settings.ini", "setup.py",
                                                                   "outputs/README.md")]))
def test_a_file_tells_nothing_of_the_machine_it_was_made_on(path):
    found = [match[0] for line in path.read_text(encoding="utf-8").splitlines() if '"image/png"' not in line
             for match in MACHINE_PATH.finditer(line)]
    assert not found, f"paths of a machine: {found}"


def test_the_pattern_of_machine_paths():
    assert all(MACHINE_PATH.search(text) for text in (f"in /{'tmp'}/x", f'"/{"ho" "me"}/me/a"', f"(/{'root'}/.cache",
                                                      "file:///Users/me", r"C:\\Users\\me", f"/{'work'}/main"))
    assert not any(MACHINE_PATH.search(text)
                   for text in ("https://example.org/home/x", "…/tmp/x", "~/work/x", "a/root/b", "/tmp"))


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_cells_are_short_and_imports_explicit(path):
    for number, cell in enumerate(code_cells(path)):
        lines = len(cell.source.splitlines())
        assert lines <= MOST_LINES, f"code cell {number} has {lines} lines: {cell.source[:60]!r}"
        stars = [node.module for node in ast.walk(parsed(cell))
                 if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        assert not stars, f"code cell {number}: from {stars} import *"


# ---- notebooks that are exported


@pytest.mark.parametrize("path", named(COMPONENTS))
def test_a_chapter_has_title_subtitle_and_summary(path):
    cells = nbformat.read(path, 4).cells
    if directives(cells[0]) == ["default_exp"]: cells = cells[1:]  # a chapter of the book may export nothing
    assert re.match(r"# .+\n\n> \S", cells[0].source), "after the module's name: '# Title' and '> subtitle'"
    headings = re.findall(r"^## (.+)$", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), re.M)
    assert "Summary" in headings or path.name.startswith("00_")
    assert "Exercises" in headings or path.parent.name != "book" or path.name.startswith("00_")


@pytest.mark.parametrize("path", named(COMPONENTS))
def test_exported_imports_stand_alone(path):
    for number, cell in enumerate(code_cells(path)):
        if "export" not in directives(cell): continue
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in parsed(cell).body}
        assert len(kinds) < 2, f"code cell {number} holds imports and other code: {cell.source[:60]!r}"


@pytest.mark.parametrize("path", named(MODULES))
def test_a_module_comes_from_a_notebook_and_defines_each_name_once(path):
    text = path.read_text(encoding="utf-8")
    source = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (?:\.\./)+(\S+\.ipynb)\.$", text, re.M)
    assert source and (ROOT / source[1]).is_file(), "no notebook exports this module: remove it"
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)), f"defined twice: {sorted({name for name in names if names.count(name) > 1})}"


@pytest.mark.slow
def test_the_package_needs_no_tool_of_its_makers():
    """Every module can be imported where nbdev and the optional extras are not installed."""
    blocked = ["nbdev", "fastcore", "execnb", "pytest", "hypothesis", "resvg_py", "dicebear_styles", "jupyterlab",
               "ipywidgets",
               "scipy", "pycocotools", "pooch", "gdown", "tensorboard", "lightning_fabric", "onnx", "onnxruntime",
               "snakemake"]
    code = (
        "import importlib, sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {['.'.join(path.relative_to(ROOT / 'lagm').with_suffix('').parts) for path in MODULES]!r}: "
        f"importlib.import_module(f'lagm.{{name}}')\n"
        "print('imported')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_requirements_of_makers_are_extras():
    required = importlib.metadata.requires("lagm")
    for tool in ("nbdev", "fastcore", "execnb", "pytest", "dicebear-styles"):
        lines = [line for line in required if re.match(rf"{tool}\b", line)]
        assert lines and all("extra ==" in line for line in lines), lines
    assert ("nbdev==2.4.14" in "".join(required) and re.search(r"execnb<0\.2,", "".join(required))
            and re.search(r"fastcore<2,", "".join(required)))


# ---- experiments


@pytest.mark.parametrize("path", named(EXPERIMENTS))
def test_an_experiment_explains_its_parameters(path):
    known = read_parameters(path)
    assert known, "no parameters: tag a cell 'parameters'"
    assert list(papermill.inspect_notebook(str(path))) == list(known), (
        "papermill must see the same parameters: no quotes and no | in a type, one = a line"
    )
    for parameter in known.values():
        assert parameter.annotation and parameter.help, f"{parameter.name} lacks a type or a comment"
    defaults = {name: ast.literal_eval(parameter.default) for name, parameter in known.items()}
    check_parameters(path, defaults)


@pytest.mark.parametrize("path", named(EXPERIMENTS))
def test_an_experiment_is_a_template(path):
    assert not any(cell.outputs for cell in code_cells(path)), "an experiment is stored without outputs"
    assert not any("default_exp" in directives(cell) for cell in code_cells(path)), "an experiment exports nothing"


@pytest.mark.parametrize("path", named(sorted((ROOT / "nbs" / "experiments").glob("*.yaml"))))
def test_parameter_files_fit_their_experiment(path):
    """A file NAME.yaml, or NAME_more.yaml, holds parameters of the experiment NAME."""
    assert check_parameters(find_experiment(path.stem.split("_")[0], ROOT), read_parameter_file(path))


# ---- the check that is not a test


def test_differences_are_told_by_file(tmp_path):
    same, changed, gone, new = (tmp_path / name for name in ("same.py", "changed.py", "gone.py", "new.py"))
    found = differences({same: "a\n", changed: "a\nb\n", gone: "a\n"}, {same: "a\n", changed: "a\nc\n", new: "a\n"},
                        tmp_path)
    assert [text.split()[1] for text in found] == ["changed.py", "gone.py", "new.py"]
    assert "-b\n+c" in found[0]
    assert differences({same: "a\r\n"}, {same: "a\n"}, tmp_path) == ["same.py: only its line ends differ"]
