"""Threads on a processor that others use: what is known of it, how many threads are chosen, when they sleep."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from notebooks import write_experiment
from tiny import tiny_pictures, tiny_segmenter

from lagm.core import threads
from lagm.core.threads import _crowded, _fitting_threads, choose_threads, considerate_threads
from lagm.experiments.cost import clock
from lagm.experiments.notebooks import read_record
from lagm.experiments.running import run_notebook
from lagm.training.lagm import train_supervised
from lagm.training.recipe import get_recipe
from lagm.training.state import surroundings

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TELL = """\
import json, os
from pathlib import Path
Path(out_dir, "seen.json").write_text(json.dumps({name: os.environ.get(name) for name in %r}))
if k > 5: raise ValueError("stopped")
Path(out_dir, "metrics.json").write_text("{}")""" % (SETTINGS,)


@pytest.fixture
def clean(monkeypatch):
    """An environment in which the user has said nothing about threads."""
    for name in SETTINGS: monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_threads():
    """torch with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted, cores, taken, fit", [
    (2, 2, None, 2), (2, 2, 0.0, 2), (2, 2, 0.49, 2), (2, 2, 0.51, 1), (2, 2, 1.0, 1), (2, 2, 2.0, 1), (2, 2, 9.0, 1),
    (4, 8, 3.0, 4), (8, 8, 2.0, 6), (1, 2, 2.0, 1)])
def test_threads_that_find_a_core(wanted, cores, taken, fit):
    assert _fitting_threads(wanted, cores, taken) == fit


def test_a_crowd_begins_at_once_and_ends_after_two_quiet_looks():
    assert not _crowded(False, 2, 2, [0.3]) and _crowded(False, 2, 2, [0.0, 0.7])
    assert _crowded(True, 2, 2, [0.0]) and _crowded(True, 2, 2, [0.6, 0.0]) and not _crowded(True, 2, 2, [0.1, 0.0])
    assert not _crowded(False, 4, 8, [3.0]) and _crowded(False, 4, 8, [5.0]) and not _crowded(True, 4, 8, [3.0, 3.0])


def test_the_counters_are_those_of_the_cores_one_may_use():
    tick = 1 / os.sysconf("SC_CLK_TCK")
    said = "cpu 99 99 99 99 99 99 99 99\ncpu0 1 2 4 8 16 32 64 128 256 0\ncpu3 1 0 0 5 0 0 0 0\nctxt 3\n"
    assert threads._busy_seconds(said, [0]) == pytest.approx(231 * tick), "neither idle nor waiting, stolen is"
    assert threads._busy_seconds(said, {0, 3}) == pytest.approx(232 * tick)
    with pytest.raises(KeyError): threads._busy_seconds(said, [1])


def test_where_the_system_does_not_say_nothing_changes(monkeypatch, two_threads):
    monkeypatch.setattr(threads._Neighbours, "_now", staticmethod(lambda: None))
    assert threads._Neighbours().look() is None and choose_threads(2, 0.01) == (2, None)


def test_what_others_take_is_without_our_own(monkeypatch):
    moments = iter([(10.0, 100.0), (12.0, 103.0), (13.0, 102.9), (13.0, 103.0)])
    monkeypatch.setattr(threads._Neighbours, "_now", staticmethod(lambda: next(moments)))
    neighbours = threads._Neighbours()
    assert [neighbours.look() for _ in range(3)] == [1.5, 0.0, None]


@pytest.mark.parametrize("name", SETTINGS[1:])
def test_a_users_own_way_of_waiting_is_left_alone(name, clean, monkeypatch, two_threads):
    monkeypatch.setenv(name, "0")
    assert not threads._can_rest(2)
    with considerate_threads() as watched: assert not watched


def test_threads_rest_in_a_crowd_and_the_numbers_stay(clean, monkeypatch, two_threads):
    if not threads._can_rest(2): pytest.skip("not libgomp on Linux")
    monkeypatch.setattr(threads, "_EVERY", 0.02)
    taken, said, held = [0.0], [], []
    monkeypatch.setattr(threads._Neighbours, "look", lambda self: taken[0])
    gather, disperse = threads._Crowd.gather, threads._Crowd.disperse
    monkeypatch.setattr(threads._Crowd, "gather", lambda self, n: (gather(self, n), held.append(len(self.teams))))
    monkeypatch.setattr(threads._Crowd, "disperse", lambda self: (disperse(self), held.append(len(self.teams))))

    def wait_for(number):
        deadline = time.monotonic() + 20
        while len(held) < number and time.monotonic() < deadline: time.sleep(0.01)
        assert len(held) == number

    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    with considerate_threads(said.append) as watched, considerate_threads() as inner:
        assert watched and not inner, "one watcher is enough"
        spinning = x.sum()
        taken[0] = float(len(threads._own_cores()))
        wait_for(1)
        asleep = x.sum()
        taken[0] = 0.0
        wait_for(2)
        assert torch.equal(spinning, asleep) and torch.equal(spinning, x.sum())
    assert held[0] >= 1 and held[1:] == [0, 0] and len(said) == 1 and "torch.set_num_threads(1)" in said[0]
    with considerate_threads() as watched: assert watched, "the watcher has gone home"


@pytest.mark.parametrize("now, most, cores, taken, then", [
    (2, 2, 2, [1.0] * 3, 2), (2, 2, 2, [1.0] * 4, 1), (2, 2, 2, [1.0, 1.0, 0.2, 1.0], 2), (2, 2, 2, [9.0] * 9, 1),
    (1, 2, 2, [0.2] * 9, 1), (1, 2, 2, [0.2] * 10, 2), (1, 2, 2, [0.2] * 9 + [0.6], 1),
    (1, 2, 2, [1.0] + [0.2] * 10, 2), (8, 8, 8, [3.0, 2.0, 3.0, 5.0], 6), (6, 8, 8, [0.0] * 5 + [1.0] * 5, 7),
    (6, 8, 16, [4.0] * 10, 8), (2, 2, 2, [], 2)])
def test_a_moment_changes_nothing_and_a_while_does(now, most, cores, taken, then):
    assert threads._following(now, most, cores, taken) == then


def test_libgomp_counts_the_idle_team_as_more_threads_than_cores(clean):
    """In its own process: after the team has gone, so have its threads."""
    code = ("import os, torch; from lagm.core import threads; torch.set_num_threads(2); torch.ones(1 << 18).add_(1)\n"
            "count = lambda: len(os.listdir('/proc/self/task')); crowd = threads._Crowd(); before = count()\n"
            "crowd.gather(1); more = count() - before; crowd.disperse()\n"
            "import time; deadline = time.monotonic() + 20\n"
            "while count() > before and time.monotonic() < deadline: time.sleep(0.01)\n"
            "print(more, count() - before)")
    if not os.path.isdir("/proc/self/task"): pytest.skip("needs Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0"], "the team's first thread and its second, and both go"


# ---- lagm run

@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A notebook that tells its process's environment, and a processor of which others take one core of two."""
    notebook = tmp_path / "toy.ipynb"
    write_experiment(notebook, TELL)
    monkeypatch.setattr("lagm.experiments.running.choose_threads", lambda: (1, 1.02))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    return notebook


def run(notebook, k=3, **options):
    """Run the toy; what its process saw and what its record says of threads."""
    run_notebook(notebook, notebook.parent / "out" / "toy.ipynb", {"k": k}, cwd=notebook.parent, **options)
    return run_of(notebook)


def run_of(notebook):
    """What a run of the toy left."""
    output = notebook.parent / "out" / "toy.ipynb"
    return json.loads((output.parent / "seen.json").read_text()), read_record(output)[1].get("threads")


def test_the_number_of_threads_is_set_before_the_process_starts_and_recorded(toy, clean, capsys):
    seen, told = run(toy)
    assert seen["OMP_NUM_THREADS"] == "1" and told == {"threads": 1, "of": 2, "taken": 1.02}
    assert "1 thread(s) instead of 2" in capsys.readouterr().out
    assert "OMP_NUM_THREADS" not in os.environ and not (toy.parent / "out" / ".threads.json").exists()


def test_with_room_for_all_nothing_is_set(toy, clean, monkeypatch, capsys):
    monkeypatch.setattr("lagm.experiments.running.choose_threads", lambda: (2, 0.03))
    seen, told = run(toy)
    assert seen == dict.fromkeys(SETTINGS) and told["threads"] == 2 and "instead" not in capsys.readouterr().out


FOLLOW = """\
import json, time, torch
from pathlib import Path
from lagm.core import threads
from lagm.core.origins import provenance
threads._EVERY, taken, said, seen = 0.01, [1.0], [], []
threads._Neighbours.look = lambda self: taken[0]
if k == 4: torch.set_num_threads(3)
with threads.considerate_threads(said.append, follow=k != 5) as follow:
    def wait_for(number):
        deadline = time.monotonic() + (20 if k == 3 else 0.5)
        while torch.get_num_threads() != number and time.monotonic() < deadline:
            if follow: follow("step %d of 9" % (len(seen) + 1))
            time.sleep(0.01)
        seen.append(torch.get_num_threads())
    wait_for(1)
    taken[0] = 0.0
    wait_for(2)
hardware = provenance()["hardware"]
Path(out_dir, "seen.json").write_text(json.dumps(dict(seen=seen, said=said, hardware=hardware)))
Path(out_dir, "metrics.json").write_text("{}")"""


def test_the_number_follows_the_crowd_and_the_record_tells_it(toy, clean, monkeypatch):
    monkeypatch.setattr("lagm.experiments.running.choose_threads", lambda: (2, 0.03))
    write_experiment(toy, "import torch\ntorch.set_num_threads(2)\n" + FOLLOW)
    seen, told = run(toy)
    assert seen["seen"] == [1, 2] and len(seen["said"]) == 1 and "from here on 1 thread(s) compute" in seen["said"][0]
    changes = [{"threads": 1, "taken": 1.0, "at": "step 1 of 9"}, {"threads": 2, "taken": 0.0, "at": "step 2 of 9"}]
    assert told == {"threads": 2, "of": 2, "taken": 0.03, "changes": changes}
    assert seen["hardware"]["thread_changes"] == changes and seen["hardware"]["threads"] == 2
    assert not (toy.parent / "out" / ".threads.json").exists()


@pytest.mark.parametrize("k, number", [(4, 3), (5, 2)])
def test_a_number_that_a_program_set_or_no_leave_to_follow_stays(toy, clean, monkeypatch, k, number):
    monkeypatch.setattr("lagm.experiments.running.choose_threads", lambda: (2, 0.03))
    write_experiment(toy, "import torch\ntorch.set_num_threads(2)\n" + FOLLOW)
    seen, told = run(toy, k)
    assert seen["seen"] == [number] * 2 and "changes" not in told and "thread_changes" not in seen["hardware"]


def test_a_number_that_the_user_gave_stays(toy, clean, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    write_experiment(toy, "import torch\ntorch.set_num_threads(2)\n" + FOLLOW)
    seen, told = run(toy, 6)
    assert seen["seen"] == [2, 2] and told is None


def test_a_loop_asks_between_its_steps_and_several_processes_do_not(monkeypatch, tmp_path):
    asked, leave = [], []

    @contextlib.contextmanager
    def watching(recipe, say=None, follow=False):
        leave.append(follow)
        yield asked.append

    monkeypatch.setattr("lagm.training.loop.surroundings", watching)
    recipe = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1, batch_labelled=2, batch_synthetic=2)
    train_supervised(tiny_segmenter(), *tiny_pictures(2), recipe, 2)
    assert asked == ["supervised, step 1 of 2", "supervised, step 2 of 2"] and leave == [True]
    train_supervised(tiny_segmenter(), *tiny_pictures(2), recipe, 1, checkpoint=tmp_path / "alone.safetensors")
    assert asked[2:] == ["alone, supervised, step 1 of 1"]
    monkeypatch.setattr("lagm.training.loop.this_process", lambda: (0, 2))
    train_supervised(tiny_segmenter(), *tiny_pictures(2), recipe, 2)
    assert leave == [True, True, False], "each process would choose another number"


def test_compiled_convolutions_keep_their_number(monkeypatch):
    leave = []

    @contextlib.contextmanager
    def considerate(say, follow):
        leave.append(follow)
        yield None

    monkeypatch.setattr("lagm.training.state.considerate_threads", considerate)
    for compiled in (False, True):
        recipe = get_recipe("fast", fast_convolutions=True, compile_convolutions=compiled, keep_memory=False)
        with surroundings(recipe, None, True): pass
    assert leave == [True, False], "each number would be compiled anew"


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{ damaged")])
def test_what_cannot_be_written_down_does_not_happen(tmp_path, monkeypatch, two_threads, damage):
    file = tmp_path / "threads.json"
    file.write_text('{"threads": 2, "of": 2}')
    monkeypatch.setenv("LAGM_THREADS", str(file))
    watcher = threads._Watcher(None, threads._wanted_threads())
    watcher.taken, watcher.wanted = [1.0], 1
    damage(file)
    watcher.follow("step 1")
    assert (torch.get_num_threads(), watcher.threads, watcher.follows, watcher.wanted) == (2, 2, False, 2)


def test_seconds_are_of_one_clock_where_the_number_may_change(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    try:
        for path in ("", str(tmp_path / "threads.json")):
            monkeypatch.setenv("LAGM_THREADS", path)
            torch.set_num_threads(1)
            start = clock()
            torch.set_num_threads(2)
            assert (abs(clock() - start) < 60) == bool(path) or abs(time.perf_counter() - time.process_time()) < 60
    finally: torch.set_num_threads(before)


def test_a_users_own_number_wins(toy, clean, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    seen, told = run(toy)
    assert seen["OMP_NUM_THREADS"] == "2" and told is None


def test_a_run_that_goes_on_keeps_its_threads(toy, clean, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="stopped"): run(toy, 7)
    hidden = toy.parent / "out" / ".threads.json"
    assert json.loads(hidden.read_text())["threads"] == 1
    monkeypatch.setattr("lagm.experiments.running.choose_threads", lambda: (2, 0.0))
    with pytest.raises(RuntimeError): run(toy, 7)
    assert json.loads((toy.parent / "out" / "seen.json").read_text())["OMP_NUM_THREADS"] == "1"
    changes = [{"threads": 2, "taken": 0.1, "at": "step 5 of 9"}]
    hidden.write_text(json.dumps({**json.loads(hidden.read_text()), "changes": changes}))
    with pytest.raises(RuntimeError): run(toy, 7)
    seen, told = run_of(toy)
    assert seen["OMP_NUM_THREADS"] == "1", "the first number: what auto chooses depends on it"
    changes += [{"threads": 1, "taken": None, "at": "called again"}]
    assert told["threads"] == 1 and told["changes"] == changes
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(RuntimeError): run(toy, 7)
    assert run_of(toy)[1] == {"changes": changes}, "what happened before the user chose a number"
    monkeypatch.delenv("OMP_NUM_THREADS")
    hidden.write_text("{ damaged")
    assert run(toy, 4)[0]["OMP_NUM_THREADS"] is None, "other parameters, and a damaged file: chosen anew"


def test_advice_does_not_mix_with_results(monkeypatch, capsys):
    """What a command prints for programs to read stays as it is on a crowded machine."""
    @contextlib.contextmanager
    def crowded(recipe, say=None, follow=False):
        if say: say("other programs take 1.5 of 2 cores")
        yield None

    monkeypatch.setattr("lagm.training.loop.surroundings", crowded)
    recipe = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1, batch_labelled=2, batch_synthetic=2)
    train_supervised(tiny_segmenter(), *tiny_pictures(2), recipe, 2, progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "other programs take 1.5" in said.err
