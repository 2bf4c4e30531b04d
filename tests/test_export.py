"""tests/export.py: comments beside parameters become sections of docstrings, once."""

import ast
import inspect
import json

import pytest
from export import WIDTH, explained, summarised, write_rooms

SOURCE = '''\
"""A module."""

from dataclasses import dataclass

__all__ = ['scale', 'Box']


def scale(
    x: list,  # (n,), in [-1, 1]
    by: float = 2.0, to: float = 1.0,  # both finite
    # what is done with numbers that
    # leave the range
    rule: str = "clip",  # or "wrap"
    *rest: int,
    path: dict = {
        "a": 1,
    },  # a path with \\ or "quotes"
    **more: int,  # handed on
) -> tuple[
    list, int
]:  # (n,); how many were changed
    """Scale — ä."""
    return x, len(path)  # not a comment about anything


def bare(x: int) -> int:  # one more
    return x + 1


def one_line(x: int) -> int: return x  # not the result's


@dataclass
class Box:
    "A box."
    width: int  # pixels
    name: str = ""
    _hidden: int = 0  # nobody's business

    def area(self, times: int = 1) -> int:  # pixels
        r"""Area of the \\box.

        Twice.
        """
        def inner(
            y: int,  # stays a comment
        ) -> int: return y
        return self.width * inner(times)


class Net:
    """A network."""

    def __init__(
        self,
        size: int,  # of one side
    ) -> None: self.size = size

    def forward(
        self,
        x: int,  # (B, C)
    ) -> None:
        pass


def pairs(
    n: int,
):
    """Some.

    Nothing is said here.
    """
    yield from range(n)
'''


def loaded(source: str) -> dict:
    """The names that a module defines."""
    names: dict = {"__name__": "toy"}
    exec(compile(source, "toy", "exec"), names)
    return names


def test_comments_become_sections():
    names = loaded(explained(SOURCE))
    assert inspect.getdoc(names["scale"]) == """Scale — ä.

Parameters
----------
x
    (n,), in [-1, 1]
by, to
    both finite
rule
    what is done with numbers that leave the range or "wrap"
path
    a path with \\ or "quotes"
**more
    handed on

Returns
-------
tuple[list, int]
    (n,); how many were changed"""
    assert inspect.getdoc(names["Box"]) == "A box.\n\nAttributes\n----------\nwidth\n    pixels"
    assert inspect.getdoc(names["Box"].area) == "Area of the \\box.\n\nTwice.\n\nReturns\n-------\nint\n    pixels"
    assert inspect.getdoc(names["Net"]) == "A network.\n\nParameters\n----------\nsize\n    of one side"
    assert names["Net"].__init__.__doc__ is None and inspect.getdoc(names["Net"].forward).startswith("Parameters\n---")
    assert names["one_line"].__doc__ is None
    assert names["bare"].__doc__.split() == ["Returns", "-------", "int", "one", "more"]
    assert inspect.getdoc(names["pairs"]) == "Some.\n\nNothing is said here."


def test_only_docstrings_change_and_only_once():
    once = explained(SOURCE)
    assert explained(once) == once

    def without_docstrings(source: str) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef): continue
            if ast.get_docstring(node) is not None: node.body[:1] = []
        return ast.dump(tree)

    assert without_docstrings(once) == without_docstrings(SOURCE)
    assert once.count("# both finite") == 1 and "# nobody's business" in once


def test_a_generator_function_yields():
    source = 'def f() -> Iterator[int]:  # ever more\n    """Count."""\n    yield 1\n'
    assert '    Yields\n    ------\n    int\n        ever more\n    """\n' in explained(source)


def test_two_explanations_are_an_error():
    source = ('def f(\n    x: int,  # this\n) -> None:\n'
              '    """Do.\n\n    Parameters\n    ----------\n    x\n        that\n    """\n')
    with pytest.raises(ValueError, match=r"line 1: f has the section Parameters and comments"): explained(source)
    without = source.replace("  # this", "")
    assert explained(without) == without, "a section written by hand stays where there are no comments"


def test_lines_are_wrapped():
    words = " ".join(["long"] * 60)
    head = f'"""{words}."""\n\n__all__ = [{", ".join(repr(f"name_{i:03}") for i in range(40))}]\n'
    method = (f'    def f(\n        self,\n        x: int,\n        # {words}\n        y: int,\n    ) -> '
              'None:\n        """Do."""\n')
    source = f"{head}\n\nclass A:\n{method}"
    text = explained(source)
    assert all(len(line) <= WIDTH for line in text.replace(f"        # {words}\n", "").splitlines())
    assert explained(text) == text and len(loaded(text)["__all__"]) == 40
    assert inspect.getdoc(loaded(text)["A"].f).split("y\n")[1].split() == ["long"] * 60
    assert " ".join(ast.get_docstring(ast.parse(text)).split()) == words + "."


def test_folders_of_modules_say_what_they_hold(tmp_path):
    package = tmp_path / "lagm"
    for name in ("data/celeba.py", "core/errors.py"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("")
    (package / "core/moved.py").write_text("MOVED = {'lagm.core': {}}\n")
    rooms = {"data": "Pictures.", "core": "Errors.", "training": "Not there yet."}
    for _ in range(2): write_rooms(package, rooms)
    assert (package / "data/__init__.py").read_text().splitlines()[0] == '"""Pictures."""'
    assert "moved" not in (package / "data/__init__.py").read_text()
    assert "__getattr__ = forward(__name__)" in (package / "core/__init__.py").read_text()
    assert not (package / "training").exists() and not (package / "__init__.py").exists()
    with pytest.raises(ValueError, match="core/ holds modules: say which"): write_rooms(package, {"data": "Pictures."})


def test_a_module_says_all_that_its_notebook_says_of_itself(tmp_path):
    def cell(kind, text): return {"cell_type": kind, "source": text.splitlines(keepends=True)}

    title = "# A title\n\n> What it is for,\n> in two lines.\n\nProse, and\n> a quotation."
    cells = [cell("code", "#| default_exp n"), cell("markdown", title)]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    head = "# AUTOGENERATED! DO NOT EDIT! File to edit: n.ipynb.\n"
    found = summarised(f'"""What it is for,"""\n\n{head}x = 1\n', tmp_path)
    assert found == f'"""What it is for, in two lines."""\n\n{head}x = 1\n'
    assert summarised(found, tmp_path) == found
    assert summarised("x = 1\n", tmp_path) == "x = 1\n"
