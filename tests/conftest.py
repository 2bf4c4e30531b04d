"""Every test starts from the same random numbers, in the checkout's own folders."""

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def no_other_project(monkeypatch):
    monkeypatch.delenv("LAGM_HOME", raising=False)
