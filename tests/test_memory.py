"""Freed memory that is kept: for a while only.

What a process holds is watched in a process of its own, whose heap no other test has used.
"""

import json
import platform
import subprocess
import sys

import pytest

import lagm.ops.memory
from lagm.ops.memory import kept_memory

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.system() != "Linux",
                                 reason="a setting of glibc")

WATCHED = """
import contextlib, json, resource, torch
from pathlib import Path
from lagm.ops.memory import kept_memory

MIB = 2**20

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

def page_faults(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.ones(mib * MIB // 4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / MIB

page_faults(1)
seen = {"start": resident(), "usual faults": page_faults(40)}
with contextlib.suppress(ZeroDivisionError), kept_memory() as seen["works"]:
    # until every hole that such a block leaves behind has its size
    for mib in (40, 100): page_faults(mib), page_faults(mib)
    seen["faults"] = [page_faults(mib) for mib in (40, 100)]
    blocks = [torch.ones(MIB // 4) for _ in range(300)]
    seen["full"] = resident()
    blocks.clear()
    seen["freed"] = resident()
    if ERROR: 1 / 0
seen["after"] = resident()
block = torch.ones(2000 * MIB // 4)  # larger than any hole
seen["large"] = resident()
del block
seen["large, freed"] = resident()
print(json.dumps(seen))
"""


@pytest.mark.slow
@needs_glibc
@pytest.mark.parametrize("error", [False, True])
def test_memory_is_kept_for_a_while(error):
    """In MiB. Without the context a block of 40 MiB is faulted in each time; with it, hardly ever; and at its end, an
    error's or not, memory goes back.
    """
    done = subprocess.run([sys.executable, "-c", WATCHED.replace("ERROR", str(error))], capture_output=True, text=True,
                          check=True)
    seen = json.loads(done.stdout)
    assert seen["works"] and seen["usual faults"] >= 400
    assert seen["faults"][0] < 40 and seen["faults"][1] < 100
    assert seen["full"] > seen["start"] + 290 and seen["freed"] > seen["full"] - 30
    assert seen["after"] < seen["start"] + 60
    assert seen["large"] > seen["after"] + 1900 and seen["large, freed"] < seen["after"] + 60


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(lagm.ops.memory, "_glibc", lambda: None)
    with kept_memory() as works: assert not works
