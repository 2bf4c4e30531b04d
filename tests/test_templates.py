"""Every released experiment, stage by stage, on stand-ins: the official layouts, the official file formats, the real
code, a few steps.
"""

import json
import shutil

import pytest
import torch
from standin import ThinDeepLab, make_checkpoints, make_data
from sync import ROOT
from templates import run_cells

from lagm.experiments.catalogue import change_runs, choose_runs, missing_inputs, paper_experiments, read_catalogue
from lagm.experiments.stages import load_networks
from lagm.generators.load import load_generator
from lagm.models.saved import read_networks

CATALOGUE = read_catalogue(ROOT)
REAL = ("celeba_2",)  # with the real DeepLabV3, 60 million weights; the others with a thin one
SIZES = {"cgpart_car": [64, 48]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data/ and checkpoints/."""
    root = tmp_path_factory.mktemp("project")
    make_data(root / "data")
    make_checkpoints(root)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name, **values):
    """The stages of an experiment at a size for tests. Everything else is as in its files."""
    runs = choose_runs(CATALOGUE, [name])
    sizes = {"size": SIZES.get(name, [64, 64]), "k": 2, "channels": 16, "width": 8}
    known = {key for run in runs.values() for key in run.parameters}
    return change_runs(runs, {key: value for key, value in (sizes | values).items() if key in known}, small=True)


@pytest.mark.parametrize("name", paper_experiments())
def test_a_released_experiment_runs_through(project, monkeypatch, name):
    monkeypatch.chdir(project)
    values = {}
    if name not in REAL and "unet" not in name:
        monkeypatch.setattr("torchvision.models.segmentation.deeplabv3_resnet101",
                            lambda num_classes, **_: ThinDeepLab(num_classes))
        values = {"backbone": "none"}
    try:
        for run in small(name, **values).values():
            assert missing_inputs(run, project) == []
            run_cells(run.notebook, dict(run.parameters))
            record = json.loads((project / run.metrics).read_text())
            assert record["stage"] == run.stage and record["summary"] and record["provenance"]["versions"]["torch"]
            for row in record["metrics"].values(): assert 0 <= row["miou"] <= 1
            if run.stage == "annotate": check_annotate(project, run, record)
        if "five-fold" in run.parameters.values(): assert len(record["metrics"]["five folds"]["folds"]) == 5
    finally: shutil.rmtree(project / "outputs", ignore_errors=True)


def check_annotate(project, run, record):
    """The annotator reads every feature map of that generator, and the best or last state was handed on."""
    expected = paper_experiments()[run.experiment][1]["annotate"]
    assert all(record["parameters"][key] == value for key, value in expected.items()
               if key not in ("size", "k", "channels", "width", "iterations", "validate_every", "validation_pictures",
                              "backbone"))
    networks = load_networks(project / run.folder / "results.safetensors", len(record["classes"]))
    assert record["recipe"]["wide_crop"] == expected.get("wide_crop", False) and record["step"] == 2
    generator = load_generator(project / expected["generator"],
                               avg_latent=project / expected["avg_latent"] if "avg_latent" in expected else None)
    assert networks.facts["annotator"]["arguments"]["feature_channels"] == generator.feature_channels
    alone = read_networks(project / run.folder / "segmenter.safetensors", len(record["classes"]))
    assert (alone.labels.classes == tuple(record["classes"]) and alone.size == tuple(record["parameters"]["size"][::-1])
            and alone.header["metrics"] == record["metrics"]["segmenter"])
