"""The wheel, installed in an environment of its own without the checkout, does in an empty folder what a checkout does.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
HAS_TOOLS = all(importlib.util.find_spec(name) for name in ("setuptools", "wheel"))  # or else pip gets them


# ---- what the notebooks and messages need


def imported(path):
    """The packages that a notebook's cells import, besides Python's own and ours."""
    trees = [ast.parse(cell.source) for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"lagm"}


def test_notebooks_need_only_what_the_package_needs():
    wanted = [Requirement(line) for line in importlib.metadata.requires("lagm")]
    names = {"pillow": "PIL", "pyyaml": "yaml", "ipykernel": "IPython", "lightning-fabric": "lightning_fabric",
             "dicebear-styles": "dicebear_styles", "resvg-py": "resvg_py",
             "segmentation-models-pytorch": "segmentation_models_pytorch"}
    # the latter come with ipykernel
    needed = {names.get(item.name, item.name) for item in wanted if not item.marker} | {"IPython", "jupyter_client"}
    extras = {names.get(item.name, item.name)
              for extra in ("avatars", "pascal", "fetch", "fabric", "onnx", "watch", "encoders", "paint", "hub", "lab",
                            "diffusion", "smp")
              for item in wanted
              if item.marker and item.marker.evaluate({"extra": extra})}
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"fastcore|\btest_(eq|fail|close)\(",
                             text), f"{path.name}: fastcore is a package of the makers; say assert, or try/except/else"
        made_up = {"old_math"} if path.name == "01_moved.ipynb" else set()
        assert imported(path) <= needed | extras | made_up | {"ipykernel"}, path.name


def test_no_message_sends_anybody_to_an_index_for_the_kit():
    for path in [*(ROOT / "lagm").rglob("*.py"), *NOTEBOOKS]:
        assert not re.search(r"pip install ['\"]?lagm\[",
                             path.read_text(encoding="utf-8")), f"{path.name}: use install_advice"


# ---- the wheel


def python(*words, cwd, **environment):
    """Run a program of an environment; its output."""
    clean = {name: value for name, value in os.environ.items()
             if name not in ("PYTHONPATH", "LAGM_HOME", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in words], cwd=cwd,
                          env=clean | {"OMP_NUM_THREADS": "1"}
                          | {name: str(value) for name, value in environment.items()}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    base = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z", "lagm", "nbs", "setup.py", "settings.ini", "MANIFEST.in",
                            "README.md", "LICENSE", "NOTICE", "Makefile"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        target = base / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (base / "source" / "nbs" / "experiments" / ".ipynb_checkpoints").mkdir()
    (base / "source" / "nbs" / "experiments" / ".ipynb_checkpoints" / "quickstart-checkpoint.ipynb").write_text("{}")
    stale = base / "source" / "build" / "lib" / "lagm" / "_experiments"
    stale.mkdir(parents=True)
    (stale / "removed_long_ago.ipynb").write_text("{}")
    python(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *(["--no-build-isolation"] if HAS_TOOLS else []),
           "-w", base / "dist", base / "source", cwd=base)
    assert not (base / "source" / "lagm" / "_experiments").exists()
    (found,) = (base / "dist").glob("lagm-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of a new environment, in which torch and the rest are those of this one."""
    base = tmp_path_factory.mktemp("environment")
    venv.create(base / "venv", with_pip=False)
    bin = base / "venv" / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = (base / "venv").glob("lib/python3.*/site-packages")
    # whose own .pth files, such as the checkout's, are not read
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    python(sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q", "--no-deps", "--no-index", wheel,
           cwd=base)
    where = python(bin / "python", "-c", "import lagm, torch; print(lagm.__file__)", cwd=base).strip()
    assert Path(where).is_relative_to(packages), where
    return bin


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which another Python is registered as Jupyter's python3."""
    home = tmp_path_factory.mktemp("home")
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": [str(home / "no" / "python"), "-m", "ipykernel_launcher",
                                                             "-f", "{connection_file}"], "display_name": "other",
                                                    "language": "python"}))
    return home


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    experiments = {path.relative_to(ROOT / "nbs" / "experiments").as_posix() for kind in ("ipynb", "yaml")
                   for path in (ROOT / "nbs" / "experiments").rglob(f"[!.]*.{kind}")
                   if ".ipynb_checkpoints" not in path.parts}
    assert ({name.removeprefix("lagm/_experiments/") for name in names if name.startswith("lagm/_experiments/")}
            == experiments | {"Snakefile"} and len(experiments) > 80)
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "lagm" / "assets").rglob("*")
            if path.is_file()} <= names
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert (f"Version: {importlib.metadata.version('lagm')}\n" in metadata
            and (ROOT / "README.md").read_text(encoding="utf-8")[:500] in metadata)
    assert "lagm = lagm.cli:main" in zipfile.ZipFile(wheel).read(next(name for name in names
                                                                      if name.endswith("entry_points.txt"))).decode()


SESSION = r"""
import contextlib, io, json, re, sys
from pathlib import Path
from lagm.cli import main
from lagm.core.files import asset
from lagm.core.origins import install_advice
from lagm.experiments.notebooks import experiment_folder

def call(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: code = main(list(words))
        except SystemExit as error: code = error.code
    return code, out.getvalue() + err.getvalue()

def check(words, code, *texts):
    found = call(*words)
    assert found[0] == code and all(text in found[1] for text in texts), (words, found)
    return found[1]

place = experiment_folder()
assert place.parts[-2:] == ("lagm", "_experiments") and (place / "Snakefile").is_file(), place
lines = check(["list"], 0, "quickstart", "celeba_10", "demo_k1").splitlines()
assert len(lines) > 50
check(["show", "celeba_10"], 0, "outputs/celeba_10/annotate",
      "there is no checkpoints/stylegan2/celeba0-28k-paper256-ada.pkl", "the paper's fg_miou")
check(["run", "celeba_10", "--dry-run"], 2, "celeba_10/annotate", "blocked",
      "there is no checkpoints/torchvision/resnet101-63fe2227.pth")
check(["run", "demo_k1", "--dry-run"], 0, "to do")
check(["run", "quickstart", "--dry-run"], 0, "to do")
check(["doctor", "celeba_10"], 1, "there is no data/CelebAMask-HQ", "lagm fetch resnet101")
check(["doctor", "demo_k1"], 0, "could run")
check(["fetch"], 0, "checkpoints/stylegan2/stylegan2-horse-config-f.pkl")
check(["inspect", str(asset("generator.safetensors"))], 0, "generator")
check(["run", "report", "-p", "most_pictures", "2"], 0, "outputs/report")
assert Path("outputs/report/report.md").is_file() and json.loads(Path("outputs/report/metrics.json").read_text())
assert "lagm" not in install_advice("fetch") and "pooch" in install_advice("fetch")
print(json.dumps(dict(executable=sys.executable)))
"""


def test_commands_in_an_empty_folder(installed, home, tmp_path):
    assert python(installed / "lagm", "--version", cwd=tmp_path) == f"lagm {importlib.metadata.version('lagm')}\n"
    python(installed / "python", "-c", SESSION, cwd=tmp_path, HOME=home)
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


TRY = ["-p", "iterations", "2", "-p", "warm_up", "2", "-p", "supervised_steps", "2", "-p", "test_pictures", "16", "-p",
       "width", "8"]
PREDICTING = """
import sys
from pathlib import Path
import torch
from PIL import Image
from lagm.cli import main
from lagm.data.labels import CELEBA8
from lagm.models.saved import save_segmenter
from lagm.models.segmenters import UNet
Path("pictures").mkdir()
Image.new("RGB", (40, 30), (200, 90, 10)).save("pictures/a.png")
torch.manual_seed(0)
save_segmenter("s.safetensors", UNet(n_classes=8, width=4, levels=2), CELEBA8, size=(32, 32))
sys.exit(main(["predict", "s.safetensors", "pictures", "-o", "found", "--device", "cpu"]))
"""


def test_the_quickstart_where_lagm_home_says(installed, home, tmp_path):
    here, project = tmp_path / "here", tmp_path / "project"
    here.mkdir()
    said = python(installed / "lagm", "run", "quickstart", *TRY, cwd=here, HOME=home,
                  LAGM_HOME=os.path.join("..", "project"))
    results = project / "outputs" / "quickstart"
    assert str(results) in said and json.loads((results / "metrics.json").read_text())
    assert list(here.iterdir()) == [] and [path.name for path in project.iterdir()] == ["outputs"]
    made = nbformat.read(results / "quickstart.ipynb", 4).metadata["lagm"]
    assert made["finished"] and made["provenance"]["commit"] is None  # no checkout was seen
    python(installed / "python", "-c", PREDICTING, cwd=here)
    assert (here / "found" / "masks" / "a.png").is_file()


# ---- the source distribution


def test_a_wheel_from_the_source_distribution_is_the_same(wheel, tmp_path):
    if not HAS_TOOLS: pytest.skip("setuptools is not installed here")
    source = wheel.parent.parent / "source"
    code = "import os, sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    name = python(sys.executable, "-c", code, tmp_path, cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive: archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    code = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    again = tmp_path / python(sys.executable, "-c", code, tmp_path, cwd=unpacked).splitlines()[-1]
    listed = {name for name in zipfile.ZipFile(again).namelist() if name.startswith("lagm/")}
    assert listed == {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lagm/")}
