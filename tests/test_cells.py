"""A cell that was run too soon, in real kernels: what they say, and in which environments they say it."""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from jupyter_client.launcher import launch_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
SOCKETS = tempfile.TemporaryDirectory(prefix="lagm-")
QUIET = Config({"KernelManager": {"transport": "ipc", "ip": f"{SOCKETS.name}/kernel"}})


def outputs(*sources, kernel=None):
    """The outputs of cells that run one after the other in a new kernel: per cell, the texts and errors."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    try: NotebookClient(notebook, km=kernel, allow_errors=True, kernel_name="python3", config=QUIET).execute()
    finally:
        if kernel is not None: kernel.shutdown_kernel(now=True)  # a client ends the kernels that it started alone
    return [["".join(output.get("text", output.get("evalue", ""))) for output in cell.outputs]
            for cell in notebook.cells]


READY = Path(sys.prefix, "etc", "ipython", "ipython_config.json").is_file()  # make has set this environment up


@pytest.fixture(scope="module")
def said():
    with pytest.MonkeyPatch.context() as patch:  # a kernel that was forked has imported the kit already
        patch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", launch_kernel)
        return said_by_a_kernel()


def said_by_a_kernel():
    return outputs("faces[0]", "from lagm.core.errors import InputError\nimport lagm", "faces[0]",
                   "def f(): return faces\nf()", "def g():\n    print(a)\n    a = 1\ng()", "import textwrap",
                   "textwrap.fill('x', width=nowhere)", "exec('unknown', vars(textwrap))", "print('fine')")


def test_after_the_kit_was_imported_a_missing_name_is_followed_by_advice(said):
    assert len(said[0]) == 1 + READY, "nothing of the kit was imported yet"
    for cell, name in ((2, "faces"), (3, "faces"), (6, "nowhere")):
        error, advice = said[cell]
        assert error == f"name '{name}' is not defined"
        assert advice.startswith(f"If a cell above makes `{name}`, run the cells above first"), advice
        assert advice.count("\n") == 1


def test_nothing_is_said_after_other_errors_or_in_cells_that_run(said):
    assert len(said[4]) == 1 and "not associated" in said[4][0]  # a local variable: no cell above mends it
    assert len(said[7]) == 1 and said[7][0] == "name 'unknown' is not defined"  # in somebody else's module
    assert said[1] == said[5] == [] and said[8] == ["fine\n"]


def test_the_error_that_papermill_sees_is_the_same():
    notebook = new_notebook(cells=[new_code_cell("import lagm"), new_code_cell("faces")])
    with pytest.raises(CellExecutionError, match="name 'faces' is not defined"):
        NotebookClient(notebook, kernel_name="python3", config=QUIET).execute()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment of its own on top of this one's packages, after `make kernels`."""
    place = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (packages / "base.pth").write_text("\n".join([str(ROOT), *(path for path in sys.path if "-packages" in path)]))
    make(place)
    return place


def make(place): subprocess.run(["make", "-s", "kernels", f"VIRTUAL_ENV={place}"], cwd=ROOT, check=True)


def test_the_first_cell_after_a_restart_gets_advice_in_an_environment_made_by_make(environment):
    python = str(environment / "bin" / "python")
    kernel = KernelManager(config=QUIET)
    kernel.kernel_spec.argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
    first, prefix, torch = outputs("faces[0]", "import sys\nprint(sys.prefix)", "print('torch' in sys.modules)",
                                   kernel=kernel)
    assert prefix == [f"{environment}\n"] and torch == ["False\n"]
    assert first[0] == "name 'faces' is not defined" and "run the cells above first" in first[1]


def test_make_leaves_the_file_of_somebody_else(environment):
    config = environment / "etc" / "ipython" / "ipython_config.json"
    assert json.loads(config.read_text()) == {"InteractiveShellApp": {"extensions": ["lagm.core.cells"]}}
    config.write_text("{}")
    make(environment)
    assert config.read_text() == "{}"
