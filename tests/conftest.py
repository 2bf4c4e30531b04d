"""Every test starts from the same random numbers, in the checkout's own folders."""

import os
import sys

import numpy
import nursery
import pytest
import torch

os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # older ipykernels warn of frozen modules on stderr

# Files whose tests take more than some ten seconds of processor time together, most of them because they start
# processes: `make quick` leaves them out, `make test` does not. To measure one: pytest --durations=10
# tests/test_kill.py. A single long test of another file has the mark itself: @pytest.mark.slow.
SLOW = """
    avatars baselines cache checkpoints cli colab commands convolutions device doctor doors downstream encoders
    experiments fetch fetch_limits finishing gan generator_files inversion kill libraries methods mutate numbers
    odd_files odd_inputs other_generators own_pictures parts pickle_budget quickstart reader_fuzz registries
    registry_baseline report requests run_state runs saved site stylegan2 sweep synthetic table tangents
    templates train_generator training unpickling weak_to_strong wheel winograd""".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by `make quick`")
    config.option.loadscopereorder = False  # of xdist, which would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW: item.add_marker(pytest.mark.slow)
    # their files first: what is left at the end is short, and no worker waits for the other
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def kernels_are_forked():
    """tests/nursery.py says why."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", nursery.launch_kernel)
        yield


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
    numpy.random.seed(0)


REGISTRIES = {"lagm.data.registry": "DATASETS", "lagm.generators.formats": "FORMATS",
              "lagm.models.segmenters": "SEGMENTERS", "lagm.models.annotators": "ANNOTATORS",
              "lagm.training.baselines": "BASELINES"}


@pytest.fixture(autouse=True)
def no_entries_of_other_packages():
    """What a test brought from a package outside the kit is unknown to the next."""
    yield
    for module, name in REGISTRIES.items():
        if module in sys.modules: getattr(sys.modules[module], name)._outside.clear()


@pytest.fixture(autouse=True)
def no_other_project(monkeypatch):
    monkeypatch.delenv("LAGM_HOME", raising=False)
