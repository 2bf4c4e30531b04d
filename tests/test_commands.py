"""Every command that README, a notebook's prose or a parameter file's comment shows is run from a clean state, at a
small size.

They are collected here, so that a new one is met by itself: one that no runner below knows, or that is not marked as
code, fails.
Where the files that a command needs cannot be had, stand-ins take their place; where a run would take minutes, all up
to
its first step is checked (`--dry-run`), and the run itself, made small, is in the test that the comment names.
"""

import configparser
import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import sys
import unittest.mock
from pathlib import Path

import nbformat
import numpy as np
import nursery
import pytest
import torch
from official_files import nvidia_pytorch
from packaging.requirements import Requirement
from PIL import Image
from standin import make_data
from sync import ROOT, notebooks

from lagm import cli
from lagm.data.labels import CELEBA8
from lagm.download.sources import CHECKPOINTS
from lagm.experiments.notebooks import check_parameters, read_parameter_file
from lagm.generators.stylegan2 import StyleGAN2
from lagm.models.saved import save_segmenter
from lagm.models.segmenters import UNet

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
SPAN = re.compile(r"`([^`]+)`")
PROGRAMS = (".", "lagm", "papermill", "make", "mkdir", "pip", "python", "snakemake", "nbdev_export", "nbdev_clean",
            "nbdev_install_hooks", "nbdev_test", "git", "cd", "jupyter")
WORDS = (r"lagm (?:list|show|run|doctor|fetch|prepare|inspect|convert|predict)\b|papermill \w+/|make "
         r"(?:demo|bench|test|readme|clean)\b|pip install|snakemake -")
# marked as code, but names of things: a package, a program, an ending, another program's option
NAMES = {".", "lagm", "make", "git", "pip", "papermill", "python", "-small", "--cfg=stylegan2", "--check"}
# a mistake that an exercise asks for; a package that the reader is to write, for `lagm run methods`
ON_PURPOSE = {"-p kk 5", "-p methods 'gradient matching, my_package.rivals:mirror'"}
SIZES = dict(iterations=1, warm_up=1, supervised_steps=1, test_pictures=2, width=2, threads=1)
SMALL = [word for name, value in SIZES.items() for word in ("-p", name, str(value))]
# the stand-ins are fewer than the experiment's pictures
FEW = r"k is \d+, give 1 to|cannot choose \d+ of|it needs [\w-]+/|the same as [\w-]+/"
THEIRS = {"gan_face_generate"}  # the generator of tutorial 40
CODE = "import sys; from lagm.cli import main; sys.exit(main())"
THEIR_GAN = """
from torch import nn


class DCGAN(nn.Sequential):
    def __init__(self, nz=32, width=16):
        up = lambda a, b: (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU())
        super().__init__(nn.ConvTranspose2d(nz, width, 4), *up(width, width), *up(width, width),
                         nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


GAN = DCGAN
"""


# ---- collecting


def proses():
    """(where, text) of README, of each notebook's prose and of the comments of each parameter file."""
    for name in ("README.md", "outputs/README.md"): yield name, (ROOT / name).read_text(encoding="utf-8")
    for path in notebooks():
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        yield path.relative_to(ROOT).as_posix(), "\n\n".join(cells)
    for path in sorted((ROOT / "nbs").rglob("*.yaml")):
        yield (path.relative_to(ROOT).as_posix(),
               "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")))


def commands(text: str) -> list[tuple]:
    """The blocks of commands in a text: tuples of commands, which are tuples of words.

    Fences of commands and code spans.
    """
    found = []
    for language, body in FENCE.findall(text):
        if language not in ("bash", "sh", ""): continue
        lines = [shlex.split(line, comments=True) if line.split()[:1] else []
                 for line in body.replace("\\\n", " ").splitlines() if language or line.startswith(PROGRAMS)]
        if not lines: continue
        found.append(tuple(tuple(words) for words in lines if words))
    for span in SPAN.findall(FENCE.sub("", text)):
        first = (span.split() or [""])[0].lstrip("%!")
        if span in NAMES or not (first in PROGRAMS or first.startswith("-") and re.match(r"--?[a-z]", first)): continue
        found.append(tuple(tuple(shlex.split(part.strip().lstrip("%!"))) for part in span.split("&&")))
    return found


BLOCKS = {}  # block -> where it stands, first
for place, prose in proses():
    for block in commands(prose): BLOCKS.setdefault((block, place if block[0][0].startswith("-") else ""), place)
CASES = [pytest.param(block, where, id=f"{where}: {' && '.join(shlex.join(words) for words in block)}"[:110])
         for (block, _), where in BLOCKS.items()]


def test_the_collector():
    text = ("See `lagm list`, `x.y` and `-p k 1`.\n\n```bash\nmkdir -p a  # first\nlagm run \\\n  "
            "b\n```\n\n```\nimages/ a\n```\n\n`%pip install ./lagm`")
    assert commands(text) == [(("mkdir", "-p", "a"), ("lagm", "run", "b")), (("lagm", "list"),), (("-p", "k", "1"),),
                              (("pip", "install", "./lagm"),)]


def test_commands_are_marked_as_code():
    """Or the collector would not see them."""
    for where, text in proses():
        loose = re.findall(WORDS, SPAN.sub("", FENCE.sub("", text)))
        assert not loose, f"{where}: put it between backticks: {loose}"


# ---- a clean state


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a fresh clone holds, without the results of old runs."""
    root = tmp_path_factory.mktemp("clone") / "lagm"
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", "settings.ini", "setup.py", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Stand-ins for what commands call FILE, FOLDER and so on, and for all that the paper's experiments read."""
    root = tmp_path_factory.mktemp("things")
    make_data(root / "data")
    torch.manual_seed(0)
    nvidia_pytorch(root / "network.pkl", StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64,
                                                   channel_max=8))
    for source in CHECKPOINTS:
        path = root / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.kind == "npy": np.save(path, np.zeros(512, np.float32))
        elif source.kind == "torch": torch.save({}, path)
        else: shutil.copy(root / "network.pkl", path)
    save_segmenter(root / "segmenter.safetensors", UNet(8, width=2, levels=2), CELEBA8, (16, 16))
    (root / "pictures").mkdir()
    for i in range(2): Image.new("RGB", (20, 16), (90 * i, 80, 70)).save(root / "pictures" / f"{i}.jpg")
    return root


@pytest.fixture
def clean(checkout, monkeypatch):
    """The checkout as the current folder, as it was, and beside it what a reader has: a module with its weights."""
    before = {path for path in checkout.iterdir()}
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(checkout))
    for name, weights in (("mine", "gan.pth"), ("dcgan", "dcgan.pth")):
        (checkout / f"{name}.py").write_text(THEIR_GAN)
        sys.modules.pop(name, None)
        torch.save(importlib.import_module(name).DCGAN().state_dict(), checkout / weights)
    (checkout / "mine.yaml").write_text("generator: {module: dcgan:DCGAN, weights: dcgan.pth}\nsize: [32, 32]\n")
    yield checkout
    for path in set(checkout.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def call(*words, **environment):
    """A real process; its output if it ended well."""
    done = nursery.run([str(word) for word in words], env=os.environ | environment)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


# ---- running


def meant(words, things) -> list[str]:
    """The words with things in the place of the names that stand for them."""
    known = {"FILE": things / "network.pkl", "SEGMENTER": things / "segmenter.safetensors",
             "FOLDER": things / "pictures", "PICTURES": things / "pictures", "DIR": things / "data" / "VOC2010",
             "VOC2010": things / "data" / "VOC2010"}
    named = {"show": "quickstart", "run": "quickstart", "doctor": "celeba_30", "fetch": "resnet101",
             "prepare": "labelme"}
    example = {"NAME": named.get(words[1] if len(words) > 1 else ""), "key": "seed", "value": "1"}
    known |= {word: things / "segmenter.safetensors" for word in words
              if word.endswith(("segmenter.safetensors", "faces.safetensors"))}
    return [str(known.get(word) or example.get(word) or word) for word in words]


# hours, a server, or files for which there is no stand-in here: the parser knows them, and their own tests run them
ASKED_ONLY, NOT_HERE = {"train-generator", "serve"}, {"EXPORT", "RECORD"}


def run_lagm(words, clean, things):
    """`lagm`: a name alone, such as `lagm predict`, must be a command; all else is run."""
    _, command, *rest = words
    bare = not rest or command == "prepare" and len(rest) == 1
    if "|" in words:
        call("sh", "-c",
             " ".join([shlex.join([sys.executable, "-c", CODE]),
                       *(word if word == "|" else shlex.quote(word) for word in words[1:])]))
        return
    if bare and command != "list":
        with pytest.raises(SystemExit) as end: cli.main([*words[1:], "--help"])
        assert end.value.code == 0
        return
    if command in ASKED_ONLY or NOT_HERE & {*words} or command == "generate" and rest[0] != "big-ears":
        cli.build_parser().parse_args(words[1:])
        return
    if command == "run" and words[2:] == ["quickstart", "-p", "seed", "1", "-o", "outputs/seed1"]:
        call(sys.executable, "-c", CODE, *words[1:], *SMALL)
        assert (clean / "outputs" / "seed1" / "metrics.json").is_file()
        return
    # test_quickstart, test_methods, test_templates, test_fetch
    more = {"run": ["--dry-run"], "fetch": ["--dry-run"], "label": ["--no-browser"],
            "prepare": ["--minpx", "5", "--workers", "1", "--out", "crops"]}.get(command, [])
    if command == "run":
        for name in ("data", "checkpoints"):
            if not (clean / name).is_symlink(): (clean / name).symlink_to(things / name)
    ctrl_c = unittest.mock.patch("lagm.labelling.page.LabelServer.serve_forever", side_effect=KeyboardInterrupt)
    with contextlib.redirect_stdout(io.StringIO()) as said, ctrl_c: code = cli.main([*words[1:], *more])
    # nothing is there for an experiment in a fresh clone
    if command == "doctor": assert code == (0 if Path(words[2]).is_file() else 1)
    elif command == "run" and code == 2:
        for line in said.getvalue().splitlines(): assert " blocked " not in line or re.search(FEW, line), line
    else: assert code == 0


def run_papermill(words, clean, things):
    """`papermill`: the quickstart as a process; of the others, which train for hours, all that papermill looks at
    before it begins, and their values.
    """
    if "nbs/experiments/quickstart.ipynb" in words:
        call(sys.executable, "-m", *words, *SMALL)
        assert (clean / "outputs" / "quickstart" / "metrics.json").is_file()
        return
    notebook, output, *options = words[1:]
    assert Path(notebook).is_file() and Path(output).parent.is_dir(), "papermill makes no folders"
    while options:
        option, *options = options
        assert option in ("-p", "-f")
        if option == "-f": check_parameters(notebook, read_parameter_file(options.pop(0)))
        else: check_parameters(notebook, {options.pop(0): options.pop(0)})


def run_make(words, clean, things):
    """`make`: demo and readme as processes, in an environment that is installed already; of the others, what would be
    done.
    """
    env = clean / "env"
    (env / "bin").mkdir(parents=True, exist_ok=True)
    (env / ".lagm-dev").write_text(f"{clean}\n")
    scripts = {"python": f'exec {shlex.quote(sys.executable)} "$@"',
               "lagm": f'exec {shlex.quote(sys.executable)} -c "{CODE}" "$@" {shlex.join(SMALL)}'}
    for name, line in scripts.items():
        (env / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (env / "bin" / name).chmod(0o755)
    target = words[1]
    if target == "readme": (clean / "outputs").symlink_to(ROOT / "outputs")
    before = (clean / "README.md").read_text(encoding="utf-8")
    call("make", *([] if target in ("demo", "readme") else ["-n"]), target, VIRTUAL_ENV=str(env), CONDA_DEFAULT_ENV="")
    if target == "demo": assert (clean / "outputs" / "quickstart" / "test.png").is_file()
    assert (clean / "README.md").read_text(encoding="utf-8") == before


def run_pip(words, clean, things):
    """`pip install` and `pip wheel`, which test_wheel walks: the folder is a checkout, the extras are ours, the
    packages those that settings.ini names (test_project looks at those).
    """
    assert words[1] in ("install", "wheel")
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    extras = {key.removesuffix("_requirements") for key in settings["DEFAULT"] if key.endswith("_requirements")}
    required = {Requirement(line).name for line in importlib.metadata.requires("lagm")}
    for word in (word for word in words[2:] if word not in ("-e", "--no-deps")):
        place, _, asked = word.partition("[")
        if place in (".", "./lagm", "lagm"):
            assert set(asked.rstrip("]").split(",")) - {""} <= extras, f"no such extra: {word}"
        else: assert word == "lagm-*.whl" or Requirement(word).name in {*required, *THEIRS}, f"not ours: {word}"


def run_python(words, clean, things):
    """`python`: a process; what README links to is there."""
    if "lagm.experiments.readme" in words: (clean / "outputs").symlink_to(ROOT / "outputs")
    call(sys.executable, *words[1:])


def run_mkdir(words, clean, things): call(*words)


def run_activation(words, clean, things):
    """`. .venv/bin/activate`: where make puts an environment, if there is none."""
    assert (words == [".", ".venv/bin/activate"]
            and "$(CURDIR)/.venv)" in (clean / "Makefile").read_text(encoding="utf-8"))


def run_tool(words, clean, things):
    """nbdev's commands, which tests/sync.py runs on the checkout: they are installed."""
    assert shutil.which(words[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


RUNNERS = {"lagm": run_lagm, "papermill": run_papermill, "make": run_make, "pip": run_pip, "python": run_python,
           "mkdir": run_mkdir, ".": run_activation,
           **dict.fromkeys(("nbdev_export", "nbdev_clean", "nbdev_install_hooks", "nbdev_test"), run_tool)}


def check_options(words, where):
    """Options without a command: in an experiment, values of its parameters; elsewhere, options that some command has.
    """
    if shlex.join(words) in ON_PURPOSE: return
    if words[0] == "-p" and len(words) > 1:
        check_parameters(ROOT / where,
                         {name: value for option, name, value in zip(words[::3], words[1::3], words[2::3], strict=True)
                          if option == "-p"})
        return
    parsers, known = [cli.build_parser()], set()
    for parser in parsers:
        known |= set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action.choices, dict): parsers += action.choices.values()
    assert words[0] in known, f"no command has the option {words[0]}"


RAN = set()


@pytest.mark.parametrize("block, where", CASES)
def test_a_command_that_is_shown_works(clean, things, block, where):
    for i, words in enumerate(block):
        known = tuple(words for words in block[:i] if words[0] == "mkdir"), words  # the same command, in the same state
        if words[0].startswith("-"): check_options(words, where)
        elif known not in RAN:
            assert words[0] in RUNNERS, f"{where} shows a command that no runner here knows: {shlex.join(words)}"
            RUNNERS[words[0]](meant(words, things), clean, things)
            if words[0] != "mkdir": RAN.add(known)
