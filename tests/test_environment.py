"""The list of packages in records, what `lagm doctor --environment` says of it, and the files of constraints."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shell
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lagm.core.environment import (
    differences,
    environment_of_record,
    environment_report,
    installed_packages,
    read_environment,
    same_package,
)
from lagm.core.errors import InputError
from lagm.core.origins import provenance

ROOT = Path(__file__).parent.parent
NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,12}[A-Za-z0-9])?", fullmatch=True)


@given(NAMES)
def test_one_spelling_of_a_name(name): assert same_package(name) == canonicalize_name(name)


@given(st.dictionaries(NAMES.map(canonicalize_name), st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}(\+cpu)?",
                                                                 fullmatch=True), min_size=1), st.data())
def test_what_is_written_is_read(tmp_path_factory, packages, data):
    path = tmp_path_factory.mktemp("c") / "constraints.txt"
    ends = ["", "  # why", " ; python_version >= '3.11'", "; sys_platform == 'linux'  # both"]
    path.write_text("".join(f"{name}=={version}{data.draw(st.sampled_from(ends))}\n"
                            for name, version in packages.items()))
    assert read_environment(path) == packages


def test_all_packages_are_in_every_record():
    held = provenance()["environment"]
    assert held == environment_of_record()
    listed = dict(word.split("==") for word in held["packages"].split())
    freeze = subprocess.run([sys.executable, "-c", "import importlib.metadata as m; print(*sorted({d.metadata['Name'] "
                             "for d in m.distributions()}), sep='\\n')"], capture_output=True, text=True, check=True)
    assert {canonicalize_name(name) for name in freeze.stdout.split()} - {"lagm"} == set(listed)
    assert listed["numpy"] == importlib.metadata.version("numpy") and "lagm" not in listed


def test_differences_by_hand():
    recorded, here = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2.1", "d": "9"}
    assert differences(recorded, here) == {"b": ("2", "2.1"), "c": ("3", None)}
    assert differences({"torch": "2.14.1+cpu"}, {"torch": "2.14.1"})


def test_the_command(tmp_path):
    def lagm(place): return shell.lagm("doctor", "--environment", place, cwd=tmp_path)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"provenance": provenance()}))
    done = lagm(tmp_path / "run")
    assert done.returncode == 0 and "are here, in the same versions" in done.stdout, done.stderr
    (tmp_path / "old.txt").write_text("numpy==0.1\n")
    done = lagm("old.txt")
    assert done.returncode == 1 and "python -m pip install 'numpy==0.1'" in done.stdout
    (tmp_path / "run" / "metrics.json").write_text("{}")
    for wrong, words in ((tmp_path / "run", "does not say which packages"), ("nowhere.txt", "there is no file")):
        done = lagm(wrong)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_file_without_pins(tmp_path):
    (tmp_path / "c.txt").write_text("numpy>=1\n-e .\n")
    with pytest.raises(InputError, match="names no package"): environment_report(tmp_path / "c.txt")


def promised():
    """What settings.ini asks for, extra dev among it."""
    lines = importlib.metadata.requires("lagm") or []
    found = [Requirement(line) for line in lines]
    return [r for r in found if not r.marker or r.marker.evaluate({"extra": "dev"})]


@pytest.mark.parametrize("kind", ["records", "lowest"])
def test_the_constraints_hold_what_settings_ini_asks(kind):
    pins = read_environment(ROOT / ".ci" / "constraints" / f"{kind}.txt")
    for requirement in promised():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    if kind == "records": return
    for requirement in promised():
        lowest = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==")]
        pin = Version(pins[canonicalize_name(requirement.name)])
        assert pin.release[:2] >= lowest[0].release[:2], requirement


def test_the_constraints_name_no_machine():
    for path in (ROOT / ".ci" / "constraints").iterdir():
        assert not re.search(r"://|/home|/root|file:|find-links|index-url", path.read_text()), path


def test_the_containers_use_the_constraints():
    folder = ROOT / ".devcontainer"
    docker = (folder / "Dockerfile").read_text()
    named = re.findall(r"-c (\S+)", docker)
    assert named == [".ci/constraints/records.txt"] and (ROOT / named[0]).is_file()
    settings = json.loads((folder / "devcontainer.json").read_text())
    assert (folder / settings["build"]["dockerfile"]).is_file()
    asked = set(re.findall(r"^ARG (\w+)", docker, re.M))
    assert settings["build"]["args"].keys() <= asked
    conda = yaml.safe_load((folder / "environment.yml").read_text())
    pip = next(part["pip"] for part in conda["dependencies"] if isinstance(part, dict))
    assert (folder / pip[0].removeprefix("-c ")).is_file()


def test_installed_packages_are_those_that_import():
    for name in ("numpy", "torch", "papermill"):
        assert installed_packages()[name] == importlib.metadata.version(name)


def test_inspect_says_how_many_packages_not_which():
    from lagm.models.convert import as_lines

    said = "\n".join(as_lines({"provenance": provenance()}))
    assert re.search(r"environment +\d+ packages, sha256 [0-9a-f]{64}$", said, re.M)
    assert max(map(len, said.splitlines())) < 400
