"""The workflows call what is there, with the versions of Python that the kit says it supports."""

import configparser
import importlib.metadata
import re
import shutil
import subprocess

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from sync import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path):
    """The lines of shell that a workflow runs."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [line.strip() for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    found = commands(path)
    for line in found:
        words = line.split()
        if words[0] == "make": assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[0] == "bash": assert (ROOT / words[1]).is_file(), line
        if words[0] == "python" and words[1] != "-m": assert (ROOT / words[1]).is_file(), line
    assert found or "deploy" in path.stem


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_not_write_and_ends(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert name == "deploy" or job["timeout-minutes"] <= 120
        assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def supported():
    """The versions of Python from the lowest to the highest that settings.ini names."""
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    first, last = (int(config["DEFAULT"][key].removeprefix("3.")) for key in ("min_python", "max_python"))
    return [f"3.{minor}" for minor in range(first, last + 1)]


def test_the_workflows_use_the_versions_of_python_that_the_kit_supports():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == supported()
    for path in WORKFLOWS:
        named = re.findall(r'python-version: "(.+)"', path.read_text(encoding="utf-8"))
        assert set(named) <= set(supported()), path.name


def test_a_job_installs_and_tests_the_lowest_versions():
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]["lowest"]
    steps = {step.get("name"): step for step in job["steps"]}
    assert "-r .ci/constraints/lowest.txt" in steps["The lowest versions"]["run"]
    assert steps["Notebooks and tests"]["run"] == "make notebooks unit"
    assert steps["Notebooks and tests"]["env"]["PIP_CONSTRAINT"] == ".ci/constraints/lowest.txt"
    assert job["steps"][1]["with"]["python-version"] == supported()[0]


def test_pip_takes_the_versions_of_python_that_the_kit_supports_and_no_other():
    asked = SpecifierSet(importlib.metadata.metadata("lagm")["Requires-Python"])
    first, last = (int(version.removeprefix("3.")) for version in (supported()[0], supported()[-1]))
    taken = [f"3.{minor}" for minor in range(last + 3) if f"3.{minor}.1" in asked]
    assert taken == supported() and f"3.{first - 1}.99" not in asked
    said = importlib.metadata.metadata("lagm").get_all("Classifier")
    named = [word.rpartition(" ")[2] for word in said if word.startswith("Programming Language :: Python :: 3.")]
    assert named == taken


def test_make_and_the_texts_name_the_same_versions_of_python():
    first, last = supported()[0], supported()[-1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    after = f"3, {int(last.removeprefix('3.')) + 1}"
    assert f"({first.replace('.', ', ')}) <= sys.version_info < ({after})" in makefile
    assert all(f" python{version}" in makefile for version in supported())
    for name in ("Makefile", ".ci/run", "README.md", "nbs/index.ipynb"):
        assert f"Python {first} to {last}" in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint here")
def test_the_linter_of_workflows_is_content():
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
