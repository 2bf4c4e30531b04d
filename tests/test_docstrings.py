"""What the comments beside parameters say reaches help(), Shift+Tab and editors."""

import ast
import inspect
import pydoc

import pytest
from export import Comments, definitions, fields_of, parameters_of, result_of
from sync import ROOT, modules

MODULES = [path for path in modules() if path.name != "_modidx.py"]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in MODULES])
def test_every_comment_beside_a_parameter_is_in_a_docstring(path):
    source = path.read_text(encoding="utf-8")
    comments = Comments(source)
    for node in definitions(ast.parse(source).body):
        if node.name == "__init__": continue  # its comments stand in the docstring of the class
        if isinstance(node, ast.ClassDef):
            init = [own for own in node.body if isinstance(own, ast.FunctionDef) and own.name == "__init__"]
            said = fields_of(node, comments) + [row for own in init for row in parameters_of(own, comments)]
        else: said = parameters_of(node, comments) + result_of(node, comments)
        shown = " ".join((ast.get_docstring(node) or "").split())
        for name, text in said: assert " ".join(f"{name} {text}".split()) in shown, f"{node.name}: {name}"


def test_help_shows_what_a_comment_says():
    from lagm.matching.distances import distance

    assert "metric\n        \"cosine\", \"l2\" or \"dotprod\"" in pydoc.plain(pydoc.render_doc(distance))
    assert "Returns\n-------\nTensor\n    a number, differentiable in both" in inspect.getdoc(distance)


# modules of which every parameter is explained
EXPLAINED = ["cli", "core.moved", "experiments.notebooks", "experiments.running", "experiments.sweep"]


def unexplained(function, documentation: str, name: str) -> list[str]:
    """Parameters that no section of a docstring lists, and that it does not mention in backticks."""
    a = function.args
    every = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    names = [each for each in every if each not in ("self", "cls")]
    listed = {part.strip(" *") for line in documentation.splitlines() for part in line.split(",")}
    return [f"{name}({each})" for each in names if each not in listed and f"`{each}`" not in documentation]


@pytest.mark.parametrize("module", EXPLAINED)
def test_every_parameter_of_public_names_is_explained(module):
    tree = ast.parse((ROOT / "lagm" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        own = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef): found += unexplained(node, own, node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(part, ast.FunctionDef): continue
            if part.name.startswith("_") and part.name != "__init__": continue
            text = own if part.name == "__init__" else ast.get_docstring(part) or ""
            found += unexplained(part, text, f"{node.name}.{part.name}")
    assert not found, "say in a comment beside it what it is: " + ", ".join(found)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in MODULES])
def test_what_a_module_says_of_itself_is_whole(path):
    assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").endswith((".", "!", "?"))
