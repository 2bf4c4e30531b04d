"""Opening and saving a notebook in JupyterLab must leave git's status clean; `make` sets that up."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, nbformat
from nbdev.clean import clean_jupyter
path, out = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
notebook.metadata |= {"language_info": {"name": "python", "version": "3.12.9"}, "toc-autonumbering": True}
notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
for number, cell in enumerate(notebook.cells):
    cell.metadata.collapsed = False
    if cell.cell_type == "code": cell.execution_count = number
model = {"type": "notebook", "content": notebook}
clean_jupyter(path=path, model=model)
nbformat.write(model["content"], out)
"""


@pytest.mark.parametrize("name", ["book/01_faces_and_labels", "tutorials/30_your_own_pictures",
                                  "reference/core/01_registry"])
def test_what_lab_changes_is_undone(name, tmp_path, monkeypatch):
    path = ROOT / "nbs" / f"{name}.ipynb"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", PROGRAM, path, tmp_path / "saved.ipynb"], check=True, timeout=120)
    assert (tmp_path / "saved.ipynb").read_bytes() == path.read_bytes()
    assert nbformat.read(path, as_version=4).nbformat == 4


def test_make_names_a_hook_that_is_there():
    found, = re.findall(r"echo '(\{.*\})' > \"\$\(HOOKS\)\"", (ROOT / "Makefile").read_text(encoding="utf-8"))
    module, _, name = json.loads(found)["FileContentsManager"]["pre_save_hook"].rpartition(".")
    assert callable(getattr(import_module(module), name))
