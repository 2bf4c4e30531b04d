"""The experiments as data: every file fits its notebook, says what the paper did, and mistakes in files are named."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml
from notebooks import write_experiment
from sync import ROOT

from lagm.core.errors import InputError
from lagm.data.registry import DATASETS, EXPERIMENTS, splits_of
from lagm.experiments.catalogue import (
    _OWN_NETWORKS,
    SMALL,
    Run,
    change_runs,
    choose_runs,
    declared_parameters,
    demo_experiments,
    missing_inputs,
    paper_experiments,
    paper_numbers,
    project_folder,
    read_catalogue,
    write_parameter_files,
)
from lagm.models.annotators import ANNOTATORS
from lagm.models.segmenters import SEGMENTERS
from lagm.training.recipe import Recipe

CATALOGUE = read_catalogue(ROOT)
EXPERIMENT_FOLDER = ROOT / "nbs" / "experiments"


def test_the_files_are_those_of_the_table():
    wanted = {(stage, name): parameters for name, (_, stages) in (paper_experiments() | demo_experiments()).items()
              for stage, parameters in stages.items()}
    there = {(path.parent.name, path.stem): yaml.safe_load(path.read_text())
             for path in EXPERIMENT_FOLDER.glob("*/*.yaml")}
    assert there == wanted


def test_there_are_the_28_experiments_and_their_stages():
    names = {run.experiment for run in CATALOGUE.values() if run.experiment in EXPERIMENTS}
    assert len(names) == 28 and set(paper_numbers()) == names
    stages = [run.stage for run in CATALOGUE.values() if run.experiment in names]
    assert {stage: stages.count(stage) for stage in set(stages)} == {"annotate": 28, "downstream": 12, "evaluate": 27,
                                                                     "cross_domain": 1}


def test_what_the_paper_did_is_in_the_files():
    """Spot checks against the paper's table, not against the function that wrote them."""
    def annotate(name): return CATALOGUE[f"{name}/annotate"].parameters
    assert {name: annotate(name)["cutoff"] for name in ("celeba_2", "horse_2", "aeroplane_2", "cat16_stylegan_unet",
                                                        "face34_stylegan2_unet", "car20_stylegan_deeplab",
                                                        "cgpart_car")} == dict(
        celeba_2=8, horse_2=7, aeroplane_2=7, cat16_stylegan_unet=7, face34_stylegan2_unet=8, car20_stylegan_deeplab=8,
        cgpart_car=8)
    assert (annotate("face34_stylegan_deeplab")["size"] == [512, 512] and annotate("cgpart_car")["size"] == [256, 192]
            and annotate("cat16_stylegan2_unet")["size"] == [256, 256])
    assert (annotate("car20_stylegan_unet")["wide_crop"] and annotate("cgpart_car")["wide_crop"]
            and "wide_crop" not in annotate("face34_stylegan_unet"))
    assert (annotate("celeba_1500")["k"] == 1500 and annotate("car20_stylegan2_unet")["k"] == 16
            and annotate("cat16_stylegan2_unet")["k"] == 0)
    assert annotate("celeba_10")["select"] == "best" and annotate("face34_stylegan_unet")["select"] == "last"
    for name in EXPERIMENTS:
        assert (annotate(name)["iterations"] == 150_000 and annotate(name)["channels"] == 128
                and annotate(name)["layers"] == 3 and annotate(name)["recipe"] == "paper"
                and annotate(name)["psi"] == 0.7)
    paper = Recipe()
    assert ((paper.batch_labelled, paper.optimizer, paper.momentum, paper.lr_annotator, paper.lr_segmenter)
            == (2, "sgd", 0.9, 1e-3, 1e-3))
    downstream = CATALOGUE["face34_stylegan_unet/downstream"].parameters
    assert ((downstream["pictures"], downstream["epochs"], downstream["batch"], downstream["lr"])
            == (10_000, 20, 8, 1e-3))
    numbers = paper_numbers()
    assert (numbers["aeroplane_100"]["value"] == 42.94
            and numbers["car20_stylegan_deeplab"] == {"metric": "miou", "value": 63.55, "std": 2.25})


def test_defaults_do_not_stand_in_for_what_the_paper_set():
    """A template's small default must not slip into a paper's run: whatever has a size is in the file."""
    for run in CATALOGUE.values():
        if run.experiment not in EXPERIMENTS: continue
        must = {"annotate": {"k", "size", "iterations", "channels", "layers", "segmenter", "validation_pictures",
                             "validate_every", "cutoff", "generator"},
                "downstream": {"size", "pictures", "epochs", "segmenter", "annotators", "generator",
                               "validation_pictures"}, "evaluate": {"size", "pictures", "networks"}}.get(run.stage,
                                                                                                         set())
        must |= ({"width", "levels"} if run.parameters.get("segmenter") == "unet" else {"backbone"}
                 if "segmenter" in run.parameters else set())
        assert must <= set(run.parameters), f"{run.name} leaves {must - set(run.parameters)} to the template"


def test_the_order_is_that_of_needs():
    place = {name: i for i, name in enumerate(CATALOGUE)}
    assert all(place[need] < place[name] for name, run in CATALOGUE.items() for need in run.needs)
    assert CATALOGUE["celeba_2/evaluate"].needs == ("celeba_2/annotate",) and CATALOGUE["celeba_2/annotate"].needs == ()
    assert CATALOGUE["cat16_stylegan_deeplab/evaluate"].needs == ("cat16_stylegan_deeplab/downstream",)
    assert len({run.folder for run in CATALOGUE.values()}) == len(CATALOGUE)
    assert (list(choose_runs(CATALOGUE, ["cat16_stylegan_deeplab/evaluate"]))
            == [f"cat16_stylegan_deeplab/{stage}" for stage in ("annotate", "downstream", "evaluate")])
    assert list(choose_runs(CATALOGUE, ["cat16_stylegan_deeplab/evaluate"],
                            only=True)) == ["cat16_stylegan_deeplab/evaluate"]


def test_small_values_fit():
    for stage, values in SMALL.items():
        for run in [run for run in CATALOGUE.values() if run.stage == stage][:1]:
            assert set(values) <= set(declared_parameters(run.notebook))


@pytest.fixture
def project(tmp_path):
    """Two stages, one experiment."""
    experiments = tmp_path / "nbs" / "experiments"
    write_experiment(experiments / "annotate.ipynb")
    write_experiment(experiments / "evaluate.ipynb",
                     parameters='networks: str = ""  # of annotate\nout_dir: str = "."  # results')
    write_parameter_files({"toy": ("a toy",
                                   {"annotate": {"k": 3, "rate": 1e-5, "widths": [1, 2],
                                                 "out_dir": "outputs/toy/annotate"},
                                             "evaluate": {"networks": "outputs/toy/annotate/x.bin",
                                                          "out_dir": "outputs/toy/evaluate"}})}, experiments)
    return tmp_path


def test_a_project_of_ones_own(project):
    runs = read_catalogue(project)
    assert list(runs) == ["toy/annotate", "toy/evaluate"] and runs["toy/evaluate"].needs == ("toy/annotate",)
    run = runs["toy/annotate"]
    assert (run.parameters == {"k": 3, "rate": 1e-5, "widths": [1, 2], "out_dir": "outputs/toy/annotate"}
            and run.about == "a toy")
    assert (run.output.as_posix() == "outputs/toy/annotate/annotate.ipynb"
            and project_folder(project / "nbs") == project.resolve())


@pytest.mark.parametrize(("stage", "text", "message"), [
    ("annotate", "kk: 3\nout_dir: outputs/a/annotate", "a.yaml: there is no parameter 'kk', did you mean 'k'"),
    ("annotate", "k: many\nout_dir: outputs/a/annotate", "a.yaml: k = 'many' is not int"),
    ("annotate", "k: 3", "a.yaml: out_dir is '.'; give a folder below outputs/, such as outputs/a/annotate"),
    ("annotate", "out_dir: outputs/../etc", "give a folder below outputs/"),
    ("annotate", "out_dir: /etc/outputs/a", "give a folder below outputs/"),
    ("annotate", "out_dir: outputs/toy/annotate", "both write to outputs/toy/annotate"),
    ("evaluate", "networks: outputs/none/annotate/x.bin\nout_dir: outputs/a/evaluate",
     "a.yaml: no run writes to outputs/none/annotate/x.bin"),
    ("evaluate", "k: [1", "a.yaml is not YAML"),
    ("export", "k: 1\nout_dir: outputs/a/export", "there is no notebook .*export.ipynb"),
])
def test_wrong_files_are_named(project, stage, text, message):
    path = project / "nbs" / "experiments" / stage / "a.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(InputError, match=message): read_catalogue(project)


def test_a_circle_is_named(project):
    folder = project / "nbs" / "experiments" / "evaluate"
    for one, other in (("a", "b"), ("b", "a")):
        (folder / f"{one}.yaml").write_text(f"networks: outputs/{other}/evaluate/x\nout_dir: outputs/{one}/evaluate")
    with pytest.raises(InputError, match="wait for each other"): read_catalogue(project)


def test_variants_keep_to_themselves():
    runs = choose_runs(CATALOGUE, ["cat16_stylegan2_unet"])
    before = copy.deepcopy({name: dict(run.parameters) for name, run in runs.items()})
    changed = change_runs(runs, {"seed": "4", "epochs": "1e1"}, {"cat16_stylegan2_unet": "outputs/x"}, small=True)
    text = str([(dict(run.parameters), run.output) for run in changed.values()])
    assert ("outputs/cat16" not in text and changed["cat16_stylegan2_unet/downstream"].parameters["annotators"]
            == ["outputs/x/annotate/results.safetensors"])
    assert ([run.parameters["seed"] for run in changed.values()] == [4, 4, 4]
            and changed["cat16_stylegan2_unet/downstream"].parameters["epochs"] == 10)
    assert changed["cat16_stylegan2_unet/annotate"].parameters["iterations"] == SMALL["annotate"]["iterations"]
    assert {name: dict(run.parameters) for name, run in runs.items()} == before
    with pytest.raises(InputError, match="'epoch' in .*did you mean 'epochs'"): change_runs(runs, {"epoch": 3})
    with pytest.raises(InputError, match="is not int"): change_runs(runs, {"epochs": "few"})


def test_a_glance_at_the_data_agrees_with_its_readers(tmp_path):
    """In each stage of each released experiment: what is not there, both miss; what is there, neither."""
    def lines(run): return [line for line in missing_inputs(run, tmp_path, data=False) if line.startswith("dataset ")]

    for run in (run for run in CATALOGUE.values() if run.experiment in EXPERIMENTS):
        glance, opened = lines(run), missing_inputs(run, tmp_path)
        places = [line.partition("there is no ")[2].partition(";")[0] for line in glance]
        named = [one["dataset"].partition(":") for one in splits_of(run.stage, run.parameters)]
        assert {*places} == {"data/" + DATASETS.get(family).reads.format(rest) for family, _, rest in named}
        assert all(place.split("/")[1] in " ".join(opened) for place in places), (places, opened)
        assert all(f"`lagm doctor {run.experiment}`" in line for line in glance)
        for place in places: (tmp_path / place).mkdir(parents=True, exist_ok=True)
        assert lines(run) == []
        for place in places: shutil.rmtree(tmp_path / place)


@pytest.mark.parametrize("stage, changes, said", [
    ("annotate", dict(dataset="celebba"), "did you mean 'celeba'?"),
    ("annotate", dict(dataset="pascal:cow"), "not 'cow'"),
    ("annotate", dict(dataset="nopkg.mod:DATA"), "nopkg"),
    ("annotate", dict(validation_dataset="cgpart:real", validation=""), "celeba: there is no data/CelebAMask-HQ"),
    ("downstream", dict(validation=""), None),
    ("evaluate", dict(validation_dataset="pascal:horse"), "celeba: there is no data/CelebAMask-HQ"),
    ("cross_domain", dict(dataset="avatars:micah", target="pascal:horse"), "there is no data/PascalPart"),
    ("annotate", dict(dataset="folder", data="data/faces"), "data: there is no data/faces"),
])
def test_a_glance_is_at_what_the_stage_reads(tmp_path, stage, changes, said):
    parameters = dict(dataset="celeba", k=2, validation="val") | changes
    run = Run("mine", stage, tmp_path / "x.ipynb", parameters, Path("outputs/mine/x.ipynb"))
    lines = missing_inputs(run, tmp_path, data=False)
    assert len(lines) == (said is not None), lines
    assert all(said in line and "doctor mine" not in line for line in lines), lines


def test_networks_that_need_no_look_are_there():
    assert {*_OWN_NETWORKS["segmenter"]} <= {*SEGMENTERS} and {*_OWN_NETWORKS["annotator"]} <= {*ANNOTATORS}


def test_what_is_missing_is_told(tmp_path):
    def lacking(name, **options): return missing_inputs(CATALOGUE[name], tmp_path, **options)
    assert lacking("demo_paper_k2/annotate") == [] and lacking("demo_paper_k2/evaluate", data=False) == []
    assert ([line.split(":")[0] for line in lacking("face34_stylegan_deeplab/annotate", data=False)]
            == ["generator", "avg_latent", "backbone", "dataset datasetgan"])
    assert any("CelebAMask-HQ not found" in line for line in lacking("celeba_2/evaluate"))
    assert (any("rendered CGPart" in line for line in lacking("cgpart_car/annotate"))
            and any("real CGPart" in line for line in lacking("cgpart_car/annotate")))
