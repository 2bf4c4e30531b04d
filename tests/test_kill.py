"""Real processes, killed with SIGKILL at random moments, also while they write; and a disk that is really full."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lagm.core.tensors import load_tensors

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

KILLS = 20

# Imports torch once and forks: each child is a process of its own, begun from the same nothing.
NURSERY = """
import json, os, random, sys, time
sys.path.insert(0, {tests!r})
import numpy, torch
torch.set_num_threads(1)
import test_training as t
from lagm.training.watching import Watch

flush, recipe = os.fsync, t.get_recipe("fast", steps=24, warm_segmenter=4, warm_annotator=4)

def slow_flush(handle):  # a slow disk: files are half written for longer
    time.sleep(0.004)
    flush(handle)

for line in sys.stdin:
    folder, seed = json.loads(line)
    child = os.fork()
    if child == 0:
        os.fsync = slow_flush
        random.seed(0), numpy.random.seed(0)  # a fork begins with random states of its own
        t.run(recipe, nets=t.networks(seed), checkpoint=folder + "/run.safetensors", checkpoint_every=1,
              validation=t.labelled(), validate_every=3,
              record_every=1, watch=Watch(folder))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts runs, one at a time."""

    def __init__(self):
        code = NURSERY.format(tests=str(Path(__file__).parent))
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def start(self, folder, seed):
        self.process.stdin.write(json.dumps([str(folder), seed]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self): return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def half_written(folder): return [p for p in folder.iterdir() if p.name.startswith(".run")]


def is_running(pid):
    """Whether a child has not ended yet; until somebody has asked how it did, it is there."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def fresh_or(folder, seed):
    """The seed of the initial weights: the run's, if it begins; any, if it goes on, since all weights come from the
    checkpoint.
    """
    return seed if list(folder.glob("run*.safetensors")) else 0


def content(folder):
    """All that a finished run leaves, but for dates."""
    left = {}
    for name in ("run.safetensors", "run.best.safetensors"):
        tensors, header = load_tensors(folder / name)
        header["provenance"] = None
        left[name] = {k: v for k, v in tensors.items()}, header
    return left, (folder / "metrics.jsonl").read_text(), sorted(p.name for p in folder.iterdir())


def differences(first, second):
    """Where two such contents differ."""
    (files, numbers, names), (others, other_numbers, other_names) = first, second
    found = [] if numbers == other_numbers else ["metrics.jsonl"]
    if names != other_names: found.append(f"files {names} and {other_names}")
    for name, (tensors, header) in files.items():
        theirs, other_header = others[name]
        found += [f"{name}: {key}" for key in header if header[key] != other_header.get(key)]
        found += [f"{name}: {key}" for key in tensors.keys() | theirs.keys()
                  if key not in tensors or key not in theirs or not torch.equal(tensors[key], theirs[key])]
    return found


def test_killed_twenty_times_it_ends_in_the_same_bits(tmp_path):
    rng, nursery = random.Random(0), Nursery()

    def new_folder(i):
        folder = tmp_path / str(i)
        folder.mkdir()
        return folder

    reference = new_folder("whole")
    nursery.start(reference, 0)
    assert nursery.wait() == 0
    whole = content(reference)

    kills, in_writing, finished, folder = 0, 0, 0, new_folder(0)
    while kills < KILLS:
        child = nursery.start(folder, seed=fresh_or(folder, kills))
        if kills % 2:  # at the next write, however slow the machine is
            end = time.monotonic() + 60
            while not half_written(folder) and is_running(child) and time.monotonic() < end: pass
        time.sleep(rng.uniform(0, 0.012) if kills % 2 else rng.uniform(0, 0.25))
        try: os.kill(child, signal.SIGKILL)
        except ProcessLookupError: pass
        status = nursery.wait()
        if status == 0:  # it was faster; the next kills are for another run
            assert not differences(content(folder), whole)
            finished += 1
            assert finished < 30
            folder = new_folder(finished)
            continue
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        in_writing += bool(half_written(folder))
        # whole, whenever it is there
        if (folder / "run.safetensors").exists():
            load_tensors(folder / "run.safetensors")
    nursery.start(folder, seed=fresh_or(folder, 99))
    assert nursery.wait() == 0
    nursery.close()
    assert not differences(content(folder), whole)
    assert in_writing >= 3, in_writing


FULL_DISK = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_training as t
from lagm.core.tensors import load_tensors
from lagm.training.checkpoints import CheckpointError

folder = {folder!r}
warnings.simplefilter("ignore")
recipe = t.get_recipe("fast", steps=8, warm_segmenter=2, warm_annotator=2)
whole = t.run(recipe)
path = folder + "/run.safetensors"
with open(folder + "/filler", "wb") as file:  # room for one checkpoint and a half
    file.write(b"0" * int({room} - 1.5 * {size}))
try: t.run(recipe, checkpoint=path, checkpoint_every=3)
except CheckpointError as error: print("full:", str(error)[:80])
step = load_tensors(path)[1]["step"]
assert 0 < step < 12 and not [name for name in os.listdir(folder) if name.startswith(".")], os.listdir(folder)
os.remove(folder + "/filler")
assert t.same(t.run(recipe, nets=t.networks(5), checkpoint=path, checkpoint_every=3), whole)
print("resumed from", step)
"""


def test_a_full_disk(tmp_path):
    """A small disk of its own, in a namespace of its own."""
    disk, size, room = tmp_path / "disk", 0, 2 * 2**20
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={room} none {disk}"
    if (not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount],
                                                      capture_output=True).returncode):
        pytest.skip("small disks cannot be made here; the size limit on files, in test_run_state, stands in")
    import test_training as t
    t.run(t.get_recipe("fast", steps=8, warm_segmenter=2, warm_annotator=2), checkpoint=tmp_path / "size.safetensors")
    size = (tmp_path / "size.safetensors").stat().st_size
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(disk), room=room, size=size))
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} {script}"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "full:" in done.stdout and "resumed from 3" in done.stdout, done.stdout
