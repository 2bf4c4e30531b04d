"""Old import paths: names that moved are found, with a warning that says where."""

import importlib
import importlib.util
import subprocess
import sys
import warnings

import pytest
from export import write_rooms

from lagm.core.moved import MOVED

# A package of two versions in one: `annotator` is gone, `training` is a package now.
FILES = {
    "__init__.py": "from {package}.core.moved import install\ninstall()\n",
    "models/annotator.py": "class FPNAnnotator: pass\n",
    "training/recipe.py": "class Recipe: pass\n",
    "training/steps.py": "class TrainState: pass\n",
}
TABLE = {
    "toy.annotator": {"FPNAnnotator": "toy.models.annotator"},
    "toy.training": {"Recipe": "toy.training.recipe", "Players": "toy.training.steps:TrainState"},
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The package, importable, and away again afterwards."""
    package = tmp_path / "toy"
    ours = importlib.util.find_spec("lagm.core.moved").origin
    with open(ours, encoding="utf-8") as file: source = file.read()
    empty = "MOVED: _Table = {"
    line = next(line for line in source.splitlines() if line.startswith(empty))
    for name, text in {**FILES, "core/moved.py": source.replace(line, f"MOVED: _Table = {TABLE!r}")}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text.replace("{package}", "toy"), encoding="utf-8")
    write_rooms(package, {"core": "Old names.", "models": "Networks.", "training": "Recipes and steps."})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]: del sys.modules[name]


def run(code: str) -> tuple[dict, list]:
    """The names after some code, and the warnings that it caused."""
    names: dict = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(code, "users_script.py", "exec"), names)
    return names, caught


def test_a_name_of_a_module_that_is_gone(toy):
    names, caught = run("from toy.annotator import FPNAnnotator\nfrom toy.models.annotator import FPNAnnotator as new")
    assert names["FPNAnnotator"] is names["new"]
    said = "toy.annotator.FPNAnnotator has moved; write: from toy.models.annotator import FPNAnnotator"
    assert [str(w.message) for w in caught] == [said]
    assert caught[0].category is DeprecationWarning and caught[0].filename == "users_script.py"


def test_a_name_of_a_module_that_is_a_package_now(toy):
    names, caught = run("from toy.training import Recipe, steps\nimport toy.training as t\nPlayers = t.Players")
    assert names["Recipe"].__module__ == "toy.training.recipe" and names["steps"].__name__ == "toy.training.steps"
    assert names["Players"].__name__ == "TrainState"
    assert {(str(w.message).partition("write: ")[2], w.filename) for w in caught} == {
        ("from toy.training.recipe import Recipe", "users_script.py"),
        ("from toy.training.steps import TrainState", "users_script.py")}


def test_a_module_that_is_gone_as_a_whole(toy):
    names, caught = run("import toy.annotator as a\nimport toy.annotator\nwhole = toy.annotator")
    assert not caught and names["a"] is names["whole"] and names["a"].__all__ == ["FPNAnnotator"]
    assert run("from toy.annotator import *")[0]["FPNAnnotator"].__module__ == "toy.models.annotator"


@pytest.mark.parametrize("code, error", [
    ("from toy.annotator import UNet", "cannot import name 'UNet' from 'toy.annotator'"),
    ("from toy.training import UNet", "cannot import name 'UNet' from 'toy.training'"),
    ("import toy.training; toy.training.UNet", "module 'toy.training' has no attribute 'UNet'"),
    ("import toy.other", "No module named 'toy.other'"),
])
def test_other_names_are_errors_as_ever(toy, code, error):
    with pytest.raises((ImportError, AttributeError), match=error): run(code)


def test_new_paths_do_not_warn(toy):
    code = "import toy\nfrom toy.training.recipe import Recipe\nfrom toy.models.annotator import FPNAnnotator"
    assert not run(code)[1]


# ---- the kit's own table


def test_every_moved_name_is_there():
    for old, homes in MOVED.items():
        for module in homes: assert importlib.import_module(module).__all__, f"{old}: {module}"
    for old, name in (("lagm.annotator", "FPNAnnotator"), ("lagm.core", "InputError"), ("lagm.training", "train_lagm"),
                      ("lagm.training", "FAST"), ("lagm.evaluation", "evaluate"),
                      ("lagm.matching", "match_forward_mode"),
                      ("lagm.data", "Avatars"), ("lagm.experiments", "run_notebook"),
                      ("lagm.pictures", "labelled_grid"), ("lagm.labelling.project", "run_project"),
                      ("lagm.labelling.serve", "open_page"), ("lagm.download.hub", "push_to_hub"),
                      ("lagm.run_state", "folder_lock"), ("lagm.run_state", "set_aside"),
                      ("lagm.run_state", "Checkpoints"), ("lagm.cli", "EXPORTS")):
        with pytest.warns(DeprecationWarning, match=f"{old}.{name} has moved; write: from lagm"):
            assert getattr(importlib.import_module(old), name) is not None
    with pytest.warns(DeprecationWarning, match="import TrainState"):
        assert importlib.import_module("lagm.training").Players.__name__ == "TrainState"


def test_no_moved_name_is_a_module_of_its_package():
    """`from lagm.matching import x`, a function or a module: it would depend on what was imported before."""
    for old, homes in MOVED.items():
        try: packaged = importlib.util.find_spec(old).submodule_search_locations
        except (ImportError, AttributeError): packaged = None
        names = [name for module in homes for name in importlib.import_module(module).__all__] if packaged else []
        clashing = [name for name in names if importlib.util.find_spec(f"{old}.{name}")]
        assert not clashing, f"{old}: rename the modules {clashing}"


@pytest.mark.slow
def test_the_kit_itself_uses_no_old_path():
    code = ("import warnings; warnings.filterwarnings('error', '.* has moved; write: ')\n"
            "import lagm, lagm.cli\nfor name in lagm.__all__: getattr(lagm, name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
