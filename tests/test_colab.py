"""A lesson in a runtime like Colab's: an empty folder, no kit, and a first cell that installs it."""

import sys

import pytest
from colab import build_wheel, main, walk
from sync import ROOT

LESSON = ROOT / "nbs" / "course" / "05_does_it_work.ipynb"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory): return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_a_lesson_runs_where_nothing_but_its_file_is_there(wheel, tmp_path):
    ran, took, installing, work = walk(LESSON, wheel, tmp_path)
    assert installing < took and work < 2 * 600, "ten minutes of two processors"
    errors = [output for cell in ran.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert not errors and not list((tmp_path / "empty").iterdir())
    pictures = [output for cell in ran.cells for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3


def test_a_page_that_fails_is_named(wheel, tmp_path, capsys):
    notebook = tmp_path / "broken.ipynb"
    notebook.write_text(LESSON.read_text(encoding="utf-8").replace("install -q", "list -q"), encoding="utf-8")
    assert main([str(wheel), str(notebook)]) == 1
    assert "broken: " in (said := capsys.readouterr().out) and "No module named 'lagm'" in said


@pytest.mark.skipif(sys.platform == "win32", reason="sockets")
def test_nothing_of_the_checkout_is_seen(tmp_path):
    from colab import new_environment

    python = new_environment(tmp_path / "venv")
    assert python.is_file() and not list((tmp_path / "venv").rglob("*lagm*"))
