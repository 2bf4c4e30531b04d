"""Every test starts from the same random numbers."""

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
    numpy.random.seed(0)
