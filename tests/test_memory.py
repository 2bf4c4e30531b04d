"""Freed memory that is kept: for a while only, and without a trace in the numbers."""

import contextlib
import platform
import resource
from pathlib import Path

import pytest
import torch

import lagm.memory
from lagm.memory import kept_memory

MIB = 2**20
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.system() != "Linux", reason="a setting of glibc")


def page_faults(mib):
    """Of filling and freeing a tensor of so many MiB, ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.ones(mib * MIB // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """MiB of this process in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@needs_glibc
@pytest.mark.parametrize("mib", [40, 100])
def test_a_block_is_not_faulted_in_each_time(mib):
    with kept_memory() as works:
        page_faults(mib)  # until every hole that such a block leaves behind has its size
        page_faults(mib)
        assert works and page_faults(mib) < mib * MIB / resource.getpagesize()


@needs_glibc
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_afterwards_memory_goes_back(error):
    before = resident()
    with contextlib.suppress(ZeroDivisionError), kept_memory():
        blocks = [torch.ones(MIB // 4) for _ in range(300)]
        assert resident() > before + 250
        blocks.clear()
        assert resident() > before + 250
        if error: raise error
    assert resident() < before + 30
    block = torch.ones(800 * MIB // 4)  # larger than any hole
    assert resident() > before + 750
    del block
    assert resident() < before + 30


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(lagm.memory, "_glibc", lambda: None)
    with kept_memory() as works: assert not works
