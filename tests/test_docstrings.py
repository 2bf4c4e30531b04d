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
    from lagm.matching import distance

    assert "metric\n        \"cosine\", \"l2\" or \"dotprod\"" in pydoc.plain(pydoc.render_doc(distance))
    assert "Returns\n-------\nTensor\n    a number, differentiable in both" in inspect.getdoc(distance)
