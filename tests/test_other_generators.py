"""A parameter file for each kind of generator: its file, through annotate with a finish, and evaluate, tiny."""

import json

import official_files as official
import pytest
import torch
from templates import run_cells

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.experiments.notebooks import experiment_folder, read_parameter_file
from lagm.generators.lucidrains import LucidrainsGAN
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.stylegan3 import StyleGAN3

SMALL = dict(z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)
ROTATION = dict(conv_kernel=1, use_radial_filters=True)


def trainers_file(folder):
    """A model_7.pt of lucidrains' trainer."""
    state = LucidrainsGAN([8, 8, 4], z_dim=8, mapping_layers=1, attention=[1]).state_dict()
    del state["mapping.w_avg"]
    names = {"mapping": "SE", "synthesis": "GE"}
    return official.lucidrains(folder, {names[n.partition(".")[0]] + "." + n.partition(".")[2]: t
                                        for n, t in state.items()})


KINDS = {  # how its file is made, what the record says, and the class that is drawn
    "StyleGAN3 T": (lambda f: official.nvidia_stylegan3(f / "t.pkl", StyleGAN3(32, num_layers=4, **SMALL)),
                    "configuration T", None),
    "StyleGAN3 R, class 2": (lambda f: official.nvidia_stylegan3(
        f / "r.pkl", StyleGAN3(16, c_dim=3, num_layers=4, **SMALL, **ROTATION)), "configuration R", 2),
    "StyleGAN2-ADA, class 0": (lambda f: official.nvidia_pytorch(f / "c.pkl", StyleGAN2(16, c_dim=2, **SMALL)),
                               "StyleGAN2-ADA", 0),
    "stylegan2-pytorch": (trainers_file, "stylegan2-pytorch", None)}


@pytest.mark.parametrize("kind", KINDS)
def test_annotate_finish_and_evaluate(tmp_path, kind):
    make, said, label = KINDS[kind]
    torch.manual_seed(0)
    common = dict(dataset="avatars:big-ears", size=[16, 16], out_dir=str(tmp_path / "annotate"))
    values = common | dict(generator=str(make(tmp_path)), k=2, width=4, levels=2, channels=4, layers=1, iterations=1,
                           warm_up=1, validation="", changes={"finish": 8, "batch_labelled": 2, "batch_synthetic": 2})
    if label is not None: values["generator_class"] = label
    (tmp_path / "annotate.yaml").write_text(json.dumps(values))  # JSON is YAML, too
    run_cells(experiment_folder() / "annotate.ipynb", read_parameter_file(tmp_path / "annotate.yaml"))
    record = json.loads((tmp_path / "annotate" / "metrics.json").read_text())
    assert said in record["generator"]["format"] and record["generator"].get("label") == label
    values = common | dict(networks=str(tmp_path / "annotate" / "results.safetensors"), pictures=3, draws=20)
    values["out_dir"] = str(tmp_path / "evaluate")
    (tmp_path / "evaluate.yaml").write_text(json.dumps(values))
    run_cells(experiment_folder() / "evaluate.ipynb", read_parameter_file(tmp_path / "evaluate.yaml"))
    record = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert 0 <= record["metrics"]["segmenter"]["fg_miou"] <= 1


@pytest.mark.parametrize("label, words", [(-1, "draws 2 classes: choose one with label="),
                                          (2, "draws 2 classes, 0 to 1"),
                                          (-2, "generator_class is -2: give -1 or more")])
def test_a_generator_of_several_classes_needs_one(tmp_path, label, words):
    file = official.nvidia_pytorch(tmp_path / "c.pkl", StyleGAN2(16, c_dim=2, **SMALL))
    values = dict(generator=str(file), size=[16, 16], validation="", generator_class=label,
                  out_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match=words): run_cells(experiment_folder() / "annotate.ipynb", values)


def test_the_doctor_reads_a_generators_file(tmp_path, capsys):
    several = official.nvidia_stylegan3(tmp_path / "r.pkl", StyleGAN3(16, c_dim=3, num_layers=4, **SMALL, **ROTATION))
    assert main(["doctor", str(several)]) == 0
    told = capsys.readouterr().out
    for words in ("StyleGAN3", "configuration R", "16 pixels", "NVIDIA's licences", "3 classes",
                  "generator_class, 0 to 2"):
        assert words in told, told
    assert main(["doctor", str(trainers_file(tmp_path))]) == 0 and "stylegan2-pytorch" in capsys.readouterr().out
    (tmp_path / "page.pkl").write_text("<html>")
    for name, words in (("page.pkl", "web page"), ("none.pkl", "no such file")):
        assert main(["doctor", str(tmp_path / name)]) == 1 and words in capsys.readouterr().out
