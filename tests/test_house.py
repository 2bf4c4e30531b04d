"""The goals of the house that can be counted, and what counts them."""

import nbformat
import pytest
from house import (
    OF_NOTEBOOKS,
    OF_THE_PACKAGE,
    Cell,
    circles,
    definitions,
    exercises,
    exported,
    first,
    floors,
    groups,
    listed,
    long_prose,
    long_tests,
    meanings,
    measured,
    read,
    runs,
    table,
    unanswered,
)
from nbformat import v4

# What no notebook, or the package, may exceed. Lower a limit when the number has become lower; none may rise.
LIMITS = {
    "book": {"first_output": 15, "first_figure": 60, "run_cells": 2, "run_lines": 50, "cell_median": 12,
             "cell_longest": 35, "unshown": 0, "figures": 0, "links": 0, "long_lines": 0, "exercises": 0},
    "reference": {"first_output": 40, "first_figure": 156, "run_cells": 3, "run_lines": 90, "cell_median": 15,
                  "cell_longest": 45, "unshown": 0, "figures": 45, "links": 0, "long_lines": 0, "exercises": 0},
    "others": {"long_lines": 0},
    "package": {"public": 1393, "meanings": 0, "rooms": 12, "arrows": 33, "floors": 7, "circles": 0},
    "tests": {"long_lines": 0},
}
NOTEBOOKS = groups()
COUNTED = [(group, name) for group in NOTEBOOKS for name in LIMITS[group]]


@pytest.mark.parametrize(("group", "name"), COUNTED)
def test_the_notebooks_keep_the_house(group, name):
    number, most = measured(name, NOTEBOOKS[group]), LIMITS[group][name]
    assert number <= most, f"{OF_NOTEBOOKS[name].title}: see python tests/house.py --list {name}"


@pytest.mark.parametrize("name", LIMITS["package"])
def test_the_package_keeps_the_house(name):
    assert measured(name) <= LIMITS["package"][name], f"see python tests/house.py --list {name}"


def test_the_tests_have_no_long_lines():
    assert len(long_tests()) <= LIMITS["tests"]["long_lines"]


def test_the_table_names_every_measure():
    text = table()
    assert all(m.title in text for m in (*OF_NOTEBOOKS.values(), *OF_THE_PACKAGE.values()))
    columns = {line.count("|") for line in text.splitlines()}
    assert len(columns) == 1


def test_the_list_names_the_cells():
    first_line = listed("cell_longest").splitlines()[0].split("\t")
    assert first_line[0].endswith(".ipynb") and first_line[1] and int(first_line[2]) > 0


# ---- the counting, on a notebook made for it


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A function that writes a notebook of cells and returns its path."""
    monkeypatch.setattr("house.ROOT", tmp_path)
    read.cache_clear()

    def write(*cells, name="01_toy.ipynb"):
        path = tmp_path / "nbs" / "book" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(v4.new_notebook(cells=list(cells)), path)
        return path
    yield write
    read.cache_clear()


def code(source, output=None):
    outputs = {"text": [v4.new_output("stream", text="1\n")],
               "figure": [v4.new_output("display_data", {"image/png": "AAAA"})]}
    return v4.new_code_cell(source, outputs=outputs.get(output, []))


def test_lines_before_the_first_output_and_figure(notebook):
    path = notebook(code("#| default_exp toy"), code("#| export\nimport os\n\nimport re"), code("x = 1\nx", "text"),
                    code("y = 2"), code("plot()", "figure"))
    assert [n for *_, n in first([path], "output")] == [2]  # directives and blank lines do not count
    assert [n for *_, n in first([path], "figure")] == [5]
    assert first([notebook(code("x = 1"), name="02.ipynb")], "figure") == []  # a chapter without one has no number


def test_a_run_ends_where_something_is_shown(notebook):
    def f(): return code("#| export\ndef f():\n    pass")
    path = notebook(f(), v4.new_markdown_cell("words"), f(), code("x = f()"), f(), code("f()", "text"), f(), f(),
                    code("assert f() is None"), f())  # a check shows nothing to the reader
    assert [n for *_, n in runs([path], "cells")] == [3, 3]
    assert [n for *_, n in runs([path], "lines")] == [9, 9]


def test_the_height_of_a_cell_is_what_the_reader_sees(notebook):
    path = notebook(code("#| export\nimport os\n\n\ndef f():\n    return os"))
    assert [n for *_, n in exported([path], "lines")] == [3] and [n for *_, n in exported([path], "height")] == [6]


def test_definitions_want_something_shown_within_three_cells(notebook):
    def f(): return code("#| export\ndef f(): pass\nclass A: pass\ndef _own(): pass\nX = 1")
    def words(): return v4.new_markdown_cell("words")
    path = notebook(f(), words(), words(), code("assert 1"), f(), words(), words(), words(), code("f()", "text"))
    assert sum(n for *_, n in definitions([path])) == 4
    assert sum(n for *_, n in definitions([path], False)) == 2


def test_what_shows():
    assert Cell("", "", "markdown", "![a\nb](c.png)").shows and not Cell("", "", "markdown", "[a](b.png)").shows
    assert Cell("", "", "code", "with pytest.raises(InputError): f()").shows
    assert not Cell("", "", "code", "print('assert')").shows


def test_long_prose_leaves_what_cannot_be_wrapped():
    long = "word " * 30
    assert long_prose(f"short\n{long}\n- {long}") == [2, 3]
    assert long_prose(f"| {long} |\n# {long}\n<p>{long}</p>\n```\n{long}\n```\n$$\n{long}\n$$\n{'x' * 150}") == []


def test_exercises_are_answered_below_or_in_a_notebook_of_answers(notebook, monkeypatch):
    path = notebook(v4.new_markdown_cell("## Summary\n\n1. no exercise"), v4.new_markdown_cell(
        "## Exercises\n\n1. One?\n\n   <details><summary>Answer</summary>Yes.</details>\n\n2. Two?\n3. Three?"))
    assert [(n, here) for _, n, here in exercises(path)] == [(1, True), (2, False), (3, False)]
    monkeypatch.setattr("house.answered", lambda: frozenset({("01_toy", 3)}))
    assert [n for *_, n in unanswered([path])] == [2]
    read.cache_clear()
    together = notebook(v4.new_markdown_cell("## Exercises\n\n1. One?\n2. Two?\n3. Three?"), v4.new_markdown_cell(
        "<details><summary>Answers</summary>\n\n1. Yes.\n3. No.\n\n</details>"))
    assert [(n, here) for _, n, here in exercises(together)] == [(1, True), (2, False), (3, True)]


def test_a_name_of_two_modules_has_two_meanings(tmp_path, monkeypatch):
    monkeypatch.setattr("house.ROOT", tmp_path)
    files = {"__init__": ["load"], "data/a": ["load", "main", "_own"], "data/b": ["load", "main"], "models/c": ["save"]}
    for name, names in files.items():
        (tmp_path / "lagm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lagm" / f"{name}.py").write_text(f"__all__ = {names}\n")
    monkeypatch.setattr("house.modules", lambda: sorted((tmp_path / "lagm").rglob("*.py")))
    assert meanings() == [("load", "data/a.py data/b.py", 2)]


def test_floors_and_circles():
    graph = {"core": [], "data": ["core"], "a": ["b", "core"], "b": ["a", "data"], "top": ["a"]}
    assert circles(graph) == [["a", "b"]]
    assert floors(graph) == {"core": 1, "data": 2, "a": 3, "b": 3, "top": 4}
