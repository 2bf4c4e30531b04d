"""The developers' door: what stands beside the code is there, and agrees with it."""

import configparser
import re
import subprocess
import sys

import pytest
import yaml
from sync import ROOT

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
DOCUMENTS = ["CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", ".pre-commit-config.yaml", ".ruff.toml", ".mypy.ini"]


def read(name: str) -> str: return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_fit_the_page(name):
    assert not [line for line in read(name).splitlines() if len(line) > 120 and not line.startswith("[mypy-")]


def test_the_citation_file_is_valid():
    """The keys that Citation File Format 1.2.0 requires, and their values."""
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert citation["type"] == "software" and str(citation["version"]) == SETTINGS["version"]
    assert citation["license"] == "Apache-2.0" and citation["authors"] == [{"name": SETTINGS["author"]}]
    assert citation["repository-code"].endswith(f"{SETTINGS['user']}/{SETTINGS['repo']}")


def test_the_citation_names_the_paper():
    paper = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    assert {"type", "title", "authors", "year", "url"} <= set(paper) and paper["year"] == 2022
    assert [author["family-names"] for author in paper["authors"]] == ["Yang", "Cheng", "Bilen", "Ji"]
    words = " ".join(read("README.md").replace("> ", "").split())
    assert paper["title"] in words and paper["url"] in words, "README cites another paper"


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.M)
    assert versions and versions[0] == SETTINGS["version"] and len(versions) == len(set(versions))


def test_what_contributing_names_is_there():
    text = read("CONTRIBUTING.md")
    targets = set(re.findall(r"^(\w[\w-]*):", read("Makefile"), re.M))
    assert set(re.findall(r"\bmake (\w+)", re.sub(r"[^`\n]*$", "", text))) & {"quick", "test", "export"} <= targets
    named = re.findall(r"`((?:nbs|tests|lagm|outputs)/[\w./]*)`", text) + re.findall(r"pytest (\S+\.py)", text)
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_hooks_and_make_run_the_same_tools():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["id"] for hook in hooks] == ["nbdev-clean", "export", "ruff"]
    for hook in hooks: assert hook["language"] == "system" and hook["entry"] in read("Makefile"), hook["id"]


def test_nobody_is_told_to_export_without_docstrings():
    """`nbdev_export` alone leaves the comments out of the docstrings: the advice is `make export`."""
    said = subprocess.run(["git", "grep", "-l", "nbdev_export"], cwd=ROOT, capture_output=True,
                          text=True).stdout.split()
    assert set(said) <= {"tests/export.py", "tests/test_door.py", "tests/test_commands.py"}, said


def test_the_package_says_that_it_has_types():
    assert (ROOT / "lagm" / "py.typed").is_file() and '"py.typed"' in read("setup.py")


def test_ruff_knows_its_settings():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--show-settings", "tests/test_door.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "multiple-statements-on-one-line-colon" not in done.stdout, done.stderr
    for rule in ("unsorted-imports (I001)", "unused-import (F401)", "mutable-argument-default (B006)"):
        assert rule in done.stdout


def test_the_slow_tests_are_there():
    from conftest import SLOW

    assert SLOW == sorted(SLOW) and all((ROOT / "tests" / f"test_{name}.py").is_file() for name in SLOW)
