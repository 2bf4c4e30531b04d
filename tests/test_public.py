"""`import lagm`: what it shows, and what it costs."""

import ast
import importlib.util
import inspect
import subprocess
import sys

import pytest

import lagm

HEAVY = ["torch", "torchvision", "numpy", "papermill", "nbformat", "jupyter_client", "ipykernel", "matplotlib", "yaml"]


def loaded_after(code: str, names: list[str]) -> list[str]:
    """Which of the modules a fresh Python has loaded after some code."""
    script = f"import sys\n{code}\nprint(*(name for name in {names} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_importing_the_package_loads_nothing_large():
    assert loaded_after("import lagm; dir(lagm); lagm.__version__", HEAVY) == []


def test_listing_experiments_needs_no_torch():
    assert loaded_after("from lagm.cli import main; assert not main(['list'])", HEAVY[:2] + HEAVY[3:-1]) == []


def test_showing_a_notebook_needs_no_torch():
    assert loaded_after("from lagm.cli import main; assert not main(['show', 'quickstart'])",
                        HEAVY[:2] + HEAVY[3:-1]) == []


def test_showing_a_run_of_the_demo_needs_no_torch():
    assert loaded_after("from lagm.cli import main; assert not main(['show', 'demo_k2'])",
                        HEAVY[:2] + HEAVY[3:-1]) == []


def test_the_doctor_needs_no_torch_where_there_is_nothing_to_read(tmp_path):
    words = ["doctor", "celeba_10", "--data", str(tmp_path), "--checkpoints", str(tmp_path)]
    assert loaded_after(f"from lagm.cli import main; assert main({words!r}) == 1", HEAVY[:2] + HEAVY[3:-1]) == []


def test_the_public_names():
    assert len(lagm.__all__) == len(set(lagm.__all__)) and 20 <= len(lagm.__all__) <= 30
    assert set(lagm.__all__) <= set(dir(lagm))
    for name in lagm.__all__:
        assert getattr(lagm, name).__name__ == name and vars(lagm)[name] is getattr(lagm, name)
        assert inspect.getdoc(getattr(lagm, name)), f"{name} has no docstring"
        assert not importlib.util.find_spec(f"lagm.{name}"), f"{name} is a module, too"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"): _ = lagm.nothing


def test_type_checkers_see_the_same_names():
    with open(lagm.__file__, encoding="utf-8") as file: tree = ast.parse(file.read())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in lagm._PUBLIC.items() for name in names}
    assert sorted(name for _, name in seen) == lagm.__all__


@pytest.mark.parametrize("module", ["lagm.training.lagm", "lagm.training.baselines", "lagm.evaluation.prediction",
                                    "lagm.experiments.stages", "lagm.experiments.doctor", "lagm.data.registry"])
def test_nobody_waits_for_what_is_not_used(module):
    """torchvision takes longer to import than torch itself."""
    unused = ["torchvision", "torch._dynamo", "torch._inductor", "scipy", "pandas", "IPython", "diffusers", "timm"]
    assert loaded_after(f"import {module}", unused) == []
