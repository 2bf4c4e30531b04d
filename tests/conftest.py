"""Every test starts from the same random numbers, in the checkout's own folders."""

import numpy
import pytest
import torch

# Files whose tests take more than some ten seconds of processor time together, most of them because they start
# processes: `make quick` leaves them out, `make test` does not. To measure one: pytest --durations=10
# tests/test_kill.py
SLOW = """
    avatars baselines cache checkpoints cli colab commands convolutions doctor doors downstream encoders experiments
    fetch fetch_limits gan generator_files inversion kill libraries methods mutate numbers odd_files odd_inputs
    own_pictures parts pickle_budget quickstart reader_fuzz registries registry_baseline report requests runs
    saved site stylegan2 sweep synthetic table tangents templates training unpickling weak_to_strong wheel
    winograd""".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by `make quick`")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW: item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def no_other_project(monkeypatch):
    monkeypatch.delenv("LAGM_HOME", raising=False)
