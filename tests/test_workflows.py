"""The workflows call what is there, with the versions of Python that the kit says it supports."""

import configparser
import re
import shutil
import subprocess

import pytest
import yaml
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


def test_the_versions_of_python_are_those_that_the_kit_supports():
    supported = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "setup.py").read_text("utf-8"))
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert supported[0] == config["DEFAULT"]["min_python"]
    for path in WORKFLOWS:
        named = re.findall(r'python-version: "(.+)"', path.read_text(encoding="utf-8"))
        assert set(named) <= set(supported), path.name


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint here")
def test_the_linter_of_workflows_is_content():
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
