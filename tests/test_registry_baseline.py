"""A rival from a package outside the kit: named in a parameter file, trained and compared like any other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nursery
import pytest
import yaml

from lagm.core.errors import InputError
from lagm.training.baselines import BASELINES, Baseline, with_numbers
from lagm.training.inversion import HandsOff, Inversion


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of somebody else, on the path."""
    folder = tmp_path / "path"
    (folder / "other_rivals").mkdir(parents=True)
    (folder / "other_rivals" / "__init__.py").write_text("")
    shutil.copy(Path(__file__).with_name("outside_rival.py"), folder / "other_rivals" / "table.py")
    monkeypatch.syspath_prepend(folder)
    return folder


def test_it_is_compared_by_a_name_in_a_parameter_file(package, tmp_path):
    sizes = dict(iterations=2, warm_up=2, members=3, width=4, test_pictures=4, threads=1,
                 methods="supervised, other_rivals.table:mirror, other_rivals.table:no_finish",
                 steps={"other_rivals.table:mirror": 5}, settings={"other_rivals.table:mirror": {"weight": 0.5}})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(sizes))
    code = "import sys; from lagm.cli import main; sys.exit(main())"
    words = ["run", "methods", "-f", tmp_path / "small.yaml", "-o", tmp_path / "out"]
    done = nursery.run([sys.executable, "-c", code, *map(str, words)],
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"LAGM_HOME": str(package)}
    plan = subprocess.run([sys.executable, "-P", "-c", code, *map(str, words[:-2]), "--dry-run"], env=env, cwd=package,
                          capture_output=True, text=True)  # -P: without the current folder, as the command
    assert plan.returncode == 0, "the kernel finds it in its folder, so the plan does\n" + plan.stderr
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert [*rows] == ["supervised", "supervised, finished", "supervised, consistent", "mirror", "mirror, finished",
                       "mirror, consistent", "mirror, alone"]
    assert [rows[name]["own_steps"] for name in ("supervised", "mirror", "mirror, alone")] == [4, 5, 4]
    assert (tmp_path / "out" / "mirror" / "mirror.txt").read_text() == "Mirror(weight=0.5, members=3)"


def test_a_name_that_stands_for_no_baseline_is_refused(package):
    assert BASELINES.get("other_rivals.table:mirror").steps == 7
    for name, words in (("other_rivals.table:nothing", "cannot be a baseline"), ("other_rivals.tabel:mirror", "tabel"),
                        ("other_rivals.table:mirorr", "did you mean mirror"), ("mean teachr", "'mean teacher'"),
                        ("../table.py:mirror", "package.module:name")):
        with pytest.raises(InputError, match=words): BASELINES.get(name)


def test_entries_say_what_they_are():
    kit = [BASELINES.get(name) for name in BASELINES]
    assert len({entry.name for entry in kit}) == len(kit) >= 12 and all(entry.learns_from for entry in kit)
    assert [entry.name for entry in kit if entry.labels_on == "generated"] == [
        "DatasetGAN", "matching on generated labels"]
    control, ours = BASELINES.get("never matched"), BASELINES.get("gradient matching")
    assert control.train is ours.train and ours.setting.match and not control.setting.match
    with pytest.raises(InputError, match="another signature"): Baseline("x", "y", lambda segmenter: None)
    with pytest.raises(InputError, match="finish is 'never'"): Baseline("x", "y", control.train, finish="never")


def test_a_setting_takes_the_numbers_that_it_has():
    changed = with_numbers(HandsOff(), dict(members=2, inversion=dict(steps=9), width=4))
    assert changed == HandsOff(Inversion(steps=9), members=2) and with_numbers(None, dict(members=2)) is None
    for numbers in (dict(width=4), dict(inversion=dict(width=4))):
        with pytest.raises(InputError, match="there is no width"): with_numbers(HandsOff(), numbers, every=True)
    with pytest.raises(InputError, match="members is 0"): with_numbers(HandsOff(), dict(members=0))
    with pytest.raises(InputError, match="give a name and a value"): with_numbers(HandsOff(), 3)
