"""Walk a notebook as somebody does who opened it by its badge: an empty folder, an environment without the kit.

    python tests/colab.py WHEEL NOTEBOOK ...

The environment is new and sees this one's packages, for PyTorch's sake, but not the checkout. The first code cell
installs the wheel (LAGM_KIT), with no index (PIP_NO_INDEX). Prints the seconds that each notebook took, by the clock
and of processors; the exit status is 1 if a cell failed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import datetime
from pathlib import Path
from unittest import mock

from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode, read
from nbformat.v4 import new_code_cell
from traitlets.config import Config


def build_wheel(root: Path, folder: Path) -> Path:
    """The wheel of a checkout, built in a copy of it."""
    copy = folder / "copy"
    leave = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "tests", "_docs")
    shutil.copytree(root, copy, ignore=leave)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", folder, copy], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def new_environment(place: Path) -> Path:
    """The Python of a new environment that finds the packages here, but not the kit, however it is installed."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    for found in (Path(path) for path in reversed(sys.path) if path.endswith("-packages")):
        for entry in found.iterdir():
            name = packages / entry.name
            if "lagm" in entry.name or entry.suffix == ".pth" or name.is_dir() and not name.is_symlink(): continue
            name.unlink(missing_ok=True)
            name.symlink_to(entry)
    return place / "bin" / "python"


def walk(notebook: Path, wheel: Path, folder: Path) -> tuple[NotebookNode, float, float, float]:
    """Run a notebook from an empty folder; it as it ran, and seconds: all, of the installing cell, of processors."""
    python, work = new_environment(folder / "venv"), folder / "empty"
    work.mkdir()
    assert subprocess.run([python, "-c", "import lagm"], cwd=work, capture_output=True).returncode
    ran = read(notebook, 4)
    ran.cells.append(new_code_cell("import os\nprint(sum(os.times()[:4]))"))
    kernel = KernelManager(config=Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "s")}}))
    kernel.kernel_spec.argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
    settings = {"LAGM_KIT": wheel.as_uri(), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LAGM_HOME")}
    client = NotebookClient(ran, km=kernel, timeout=600, resources={"metadata": {"path": str(work)}})
    start = time.time()
    try:
        with mock.patch.dict(os.environ, clean | settings, clear=True): client.execute()
    finally: kernel.shutdown_kernel(now=True)
    took = time.time() - start
    first = next(cell for cell in ran.cells if cell.cell_type == "code").metadata["execution"]
    begin, end = (datetime.fromisoformat(first[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
    processors = float(ran.cells.pop().outputs[0].text)
    return ran, took, (end - begin).total_seconds(), processors


def main(words: list[str]) -> int:
    """Walk the notebooks; 1 if one failed."""
    failed = 0
    for name in words[1:]:
        with tempfile.TemporaryDirectory(prefix="lagm-") as folder:
            try: _, took, install, work = walk(Path(name).resolve(), Path(words[0]).resolve(), Path(folder))
            except CellExecutionError as error:
                failed += 1
                print(f"{Path(name).stem}: {error}", flush=True)
            else:
                print(f"{Path(name).stem}: {took:.0f} s, of which the installing cell {install:.0f} s; {work:.0f} s of "
                      "processors", flush=True)
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
