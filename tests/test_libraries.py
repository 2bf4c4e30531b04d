"""Segmenters by the names of other libraries: what stands around them, weights, files, tangents, and whole stages."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from templates import run_cells
from tiny import LABELS, tiny_generator, tiny_pictures
from torch import nn

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import describe_tensors, load_tensors, save_tensors
from lagm.evaluation.export import export_program
from lagm.evaluation.prediction import predict_pictures
from lagm.experiments.notebooks import experiment_folder, read_parameter_file
from lagm.experiments.project import Settings, train_project
from lagm.experiments.stages import matched_by_default, name_problems
from lagm.generators.weights import save_generator
from lagm.matching.forward import directional_derivative
from lagm.matching.gradients import log_probabilities
from lagm.matching.tangents import record
from lagm.models import libraries
from lagm.models.annotators import build_annotator
from lagm.models.convert import inspect
from lagm.models.libraries import LibrarySegmenter, TorchvisionSegmenter, _unused_parameters
from lagm.models.saved import load_segmenter, read_networks, save_segmenter
from lagm.models.segmenters import SEGMENTERS, build_segmenter, matched_parameter_names
from lagm.training.lagm import estimate_lagm
from lagm.training.networks import _COMMON, network_lines, tangent_error, tangent_problem
from lagm.training.recipe import get_recipe

LIBRARIES = {"smp": "segmentation_models_pytorch", "timm": "timm"}
SMALL = {"torchvision": "torchvision:lraspp_mobilenet_v3_large", "smp": "smp:Unet:tu-mobilenetv3_small_050"}


@pytest.fixture
def smp():
    return pytest.importorskip("segmentation_models_pytorch")


@pytest.fixture(params=SMALL)
def small(request):
    """The name of a small network of each library that is there."""
    if request.param == "smp": pytest.importorskip("segmentation_models_pytorch")
    return SMALL[request.param]


class Answers(nn.Module):
    """A network of another package that answers with a dictionary."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes, self.layer = n_classes, nn.Conv2d(3, n_classes, 3, padding=1)

    def forward(self, x): return {"out": self.layer(x), "aux": x}


# ---- what stands around a network


def test_sides_normalisation_and_gradients(small):
    network, images = build_segmenter(small, 4).eval(), torch.rand(2, 3, 70, 45) * 2 - 1
    logits = network(images)
    assert logits.shape == (2, 4, 70, 45)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (libraries._MEAN, libraries._STD))
    ready = ((images + 1) / 2 - mean) / std
    below, right = (-side % network.multiple for side in images.shape[-2:])
    ready = F.pad(ready, (0, right, 0, below), mode="replicate")
    expected = network.main_net(ready)
    expected = expected["out"] if isinstance(expected, dict) else expected
    torch.testing.assert_close(logits, expected[..., :70, :45])
    assert network.multiple == (32 if small.startswith("smp") else 1)


def test_unused_parameters_rest(smp):
    network = build_segmenter("smp:PSPNet:resnet18", 3)
    names = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert names == {f"main_net.{name}" for name in _unused_parameters(network.main_net)}
    assert names and all(".layer3." in name or ".layer4." in name for name in names)
    network.requires_grad_(False).requires_grad_(True).train()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((p.grad is None) == (name in names) for name, p in network.named_parameters())


def test_one_sentence_for_sizes(smp):
    network = build_segmenter("smp:PAN:resnet18", 3)
    with pytest.raises(InputError, match="smp:PAN:resnet18 .* 64x64: it needs larger pictures"):
        network(torch.randn(2, 3, 64, 64))
    with pytest.raises(InputError, match="batches of 2 or more"): network.train()(torch.randn(1, 3, 128, 128))
    with pytest.raises(RuntimeError, match="mat|shape|channels"): network(torch.randn(2, 4, 128, 128))


def test_a_dictionary_is_opened(tmp_path):
    network = build_segmenter("test_libraries:Answers", 3)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    save_segmenter(tmp_path / "s.safetensors", network)
    again, _ = load_segmenter(tmp_path / "s.safetensors")
    assert torch.equal(again(torch.ones(1, 3, 8, 8)), network(torch.ones(1, 3, 8, 8)))


# ---- names


def test_mistyped_names(smp):
    for name, message in (("smp:Unett:resnet18", "near are Unet"), ("smp:Unet:resnet19", "near are resnet18"),
                          ("smp:Unet:tu-resnet19", "near are tu-resnet18"),
                          ("smpp:Unet:resnet18", "did you mean 'smp'"),
                          ("torchvision:fcn_resnet51", "near are fcn_resnet50"), ("smp:", "there are DPT"),
                          ("smp:Unet:../x", "no encoder"), ("unet:8", "not of the form")):
        with pytest.raises(InputError, match=message): build_segmenter(name, 3)
        assert message in " ".join(name_problems({"segmenter": name}))
    assert name_problems({"segmenter": "smp:unet", "annotator": "mlp"}) == []
    assert name_problems({"annotator": "mpl"})[0].startswith("annotator: ")


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match="pip install '?segmentation-models-pytorch"): build_segmenter("smp:Unet", 3)
    (line,) = name_problems({"segmenter": "smp:Unet:resnet34"})
    assert line.startswith("segmenter: ") and "pip install" in line


def test_decoder_and_head_are_matched(small, capsys):
    network = build_segmenter(small, 3)
    names = matched_parameter_names(network)
    assert names and not any("encoder" in name or "backbone" in name for name in names)
    assert matched_by_default(small) == {"matched": "decoder"}
    assert len(matched_parameter_names(network, r".*backbone.*weight|.*encoder.*weight")) > 1
    assert main(["show", small]) in (0, None)
    said = capsys.readouterr().out
    assert f"* matched: {'decoder':10} {len(names):4} tensors" in said and "on tangents: yes" in said
    assert network_lines("attention")[0].startswith("annotator attention: A feature pyramid")


def test_timm_by_name():
    pytest.importorskip("timm")
    import lagm.models.frozen  # noqa: F401  # it registers timm

    assert SEGMENTERS.get("timm:resnet18").bound == {"model": "resnet18"}
    assert SEGMENTERS.get("timm:resnet18").options(16, 3, "imagenet") == {"pretrained": True}
    with pytest.raises(InputError, match="give imagenet or none"): SEGMENTERS.get("timm").options(16, 3, "w.pth")
    assert build_segmenter("timm:resnet18", 3, side=32).encoder is not None


# ---- weights, only when asked for


def test_weights_from_files(small, tmp_path, monkeypatch):
    def no_network(*args, **kwargs): raise AssertionError("something was fetched")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network, raising=False)
    encoder = getattr(build_segmenter(small, 3).main_net, "encoder" if small.startswith("smp") else "backbone")
    state = {f"features.{name}": value.clone() for name, value in encoder.state_dict().items()}
    torch.save(state | {"classifier.weight": torch.ones(3)}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        options = SEGMENTERS.get(small).options(16, 3, str(tmp_path / file))
        filled = build_segmenter(small, 5, **options).state_dict()
        own = {name.split(".", 2)[2]: value for name, value in filled.items() if name.startswith("main_net.")}
        assert all(own[name].equal(value) for name, value in encoder.state_dict().items())
    torch.save({"features.0.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    for file, message in (("other.pth", "does not hold the weights"), ("text.pth", "cannot be read"),
                          ("none.pth", "there is no file")):
        with pytest.raises(InputError, match=message): build_segmenter(small, 3, weights=str(tmp_path / file))


def test_weights_of_the_library_are_asked_for_by_name(monkeypatch):
    from torchvision.models._api import WeightsEnum

    asked = []
    def fetched(self, *args, **kwargs):
        asked.append(self.name)
        raise ConnectionError("no way out")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", fetched)
    TorchvisionSegmenter("fcn_resnet50", 3)
    assert asked == []
    with pytest.raises(InputError, match="no way out.*backbone: none"):
        build_segmenter("torchvision:fcn_resnet50", 3, weights="imagenet")
    assert asked == ["IMAGENET1K_V1"]


# ---- files


def test_saved_and_loaded(small, tmp_path):
    network, path = build_segmenter(small, 4).eval(), tmp_path / "s.safetensors"
    save_segmenter(path, network, size=(40, 40), policy="fit")
    state = torch.get_rng_state()
    again, header = load_segmenter(path)
    assert torch.equal(state, torch.get_rng_state()) and header["network"]["n_classes"] == 4
    images = torch.rand(2, 3, 50, 33) * 2 - 1
    assert torch.equal(again(images), network(images))
    assert predict_pictures(again, [Image.new("RGB", (57, 31))], "fit", (40, 40))[0].shape == (31, 57)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in network.named_parameters() if p.requires_grad}


def test_a_frozen_encoder_is_exported(tmp_path):
    """Gradients are switched off inside, which a program of torch.export cannot keep."""
    pytest.importorskip("timm")
    network = build_segmenter("timm:test_resnet", 3, side=32, channels=4)
    assert export_program(network, tmp_path / "s.pt2", (24, 40)) < 1e-5


def test_a_network_that_looks_at_numbers_while_it_is_built(smp, tmp_path):
    network = build_segmenter("smp:Segformer:mit_b0", 3).eval()
    save_segmenter(tmp_path / "s.safetensors", network)
    state = torch.get_rng_state()
    again, _ = load_segmenter(tmp_path / "s.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(again(torch.ones(1, 3, 64, 64)), network(torch.ones(1, 3, 64, 64)))


def test_a_header_is_not_believed(smp, tmp_path):
    path = tmp_path / "s.safetensors"
    save_segmenter(path, build_segmenter(SMALL["smp"], 3))
    tensors, header = load_tensors(path)[0], describe_tensors(path)[1]
    for change, message in (({"architecture": "../x"}, "impossible"), ({"encoder": "resnet19"}, "near are resnet18"),
                            ({"weights": "imagenet"}, "which no file may"), ({"encoder": "resnet18"}, "s.safetensors")):
        save_tensors(path, tensors, header | {"network": header["network"] | change})
        with pytest.raises(InputError, match=message): read_networks(path)


# ---- tangents


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _COMMON)
def test_common_networks_run_on_tangents(name):
    if name.startswith("smp"): pytest.importorskip("segmentation_models_pytorch")
    network = build_segmenter(name, 3).to(memory_format=torch.channels_last)
    assert tangent_problem(network, 128 if "PAN" in name else 64) is None


@pytest.mark.parametrize("name, group", [
    ("smp:FPN:tu-mobilenetv3_small_050", None), ("smp:Segformer:mit_b0", "all"),
    ("torchvision:lraspp_mobilenet_v3_large", None)])
def test_tangents_agree_with_differentiating_twice(name, group):
    if name.startswith("smp"): pytest.importorskip("segmentation_models_pytorch")
    assert tangent_error(build_segmenter(name, 3), 64, group) < 1e-10


@pytest.mark.parametrize("name, layout", [
    ("torchvision:deeplabv3_mobilenet_v3_large", torch.channels_last),
    ("torchvision:lraspp_mobilenet_v3_large", torch.contiguous_format)])
def test_tangents_agree_with_dual_numbers(name, layout):
    """Hard gates in place, dropout, and global averages of channels-last maps, with all parameters moving."""
    network = build_segmenter(name, 3).double().train().to(memory_format=layout)
    images, state = torch.randn(2, 3, 32, 32).double().contiguous(memory_format=layout), torch.get_rng_state()
    ways = {name: torch.randn_like(p) * p.detach().std().nan_to_num() for name, p in network.named_parameters()}
    expected = directional_derivative(network, ways, images, state)
    torch.set_rng_state(state)
    result, tape = record(network, lambda: log_probabilities(network, images))
    found = tape.tangent(ways, result)
    assert tape.problem is None and ((found - expected).norm() / expected.norm()).item() < 1e-11


class Attends(nn.Module):
    """Queries, keys and values of one layer, fused attention, and a gate in place."""

    def __init__(self):
        super().__init__()
        self.read, self.give = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        read = self.read(x).flatten(2).transpose(1, 2).unflatten(2, (3, 2, 2))
        query, key, value = read.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.give(F.silu(found.transpose(1, 2).unflatten(2, x.shape[2:]).roll(1, 2), inplace=True))


def test_attention_is_put_together_where_it_is_trained():
    around = LibrarySegmenter(Attends(), 3)
    assert tangent_problem(around, 8) is None and tangent_error(around, 8) < 1e-11
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(around.train()(images), around.eval()(images))


def test_a_missing_rule_is_named_with_its_layer():
    odd = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.ELU()))
    assert tangent_problem(odd) == "no tangent rule for aten.elu.default (layer 1.1, a ELU)"


# ---- whole stages


def stage_parameters(out, **values):
    common = dict(size=[32, 32], validation_pictures=2, channels=4, layers=1, iterations=2, warm_up=1, out_dir=str(out))
    return common | values


@pytest.mark.parametrize("kind, name, annotator, group", [
    ("SmpSegmenter", SMALL["smp"], "attention", "decoder"),
    ("TorchvisionSegmenter", SMALL["torchvision"], "mlp", "decoder"),
    ("TimmSegmenter", "timm:test_resnet", "fpn", "all")])  # its encoder is frozen, so all that learns is the head
def test_annotate_finish_and_evaluate(kind, name, annotator, group, tmp_path):
    if not name.startswith("torchvision"): pytest.importorskip(LIBRARIES[name.partition(":")[0]])
    values = stage_parameters(tmp_path / "a", k=2, segmenter=name, annotator=annotator)
    (tmp_path / "annotate.yaml").write_text(json.dumps(values))  # JSON is YAML, too
    run = run_cells(experiment_folder() / "annotate.ipynb", read_parameter_file(tmp_path / "annotate.yaml"))
    assert run["plan"].matched == group and run["plan"].finish > 0
    found = read_networks(tmp_path / "a" / "results.safetensors")
    assert type(found.segmenter).__name__ == kind
    assert type(found.annotator).__name__ == type(build_annotator(annotator, [4], 3)).__name__
    facts = inspect(tmp_path / "a" / "results.safetensors")
    assert facts["segmenter"]["class"] == kind and name.rpartition(":")[2] in facts["segmenter"].values()
    run_cells(experiment_folder() / "evaluate.ipynb", dict(
        size=[32, 32], networks=str(tmp_path / "a" / "segmenter.safetensors"), pictures=3, draws=10,
        out_dir=str(tmp_path / "e")))
    record_ = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert 0 <= record_["metrics"]["segmenter"]["fg_miou"] <= 1


def test_the_estimate_and_a_project(small, tmp_path, monkeypatch):
    few = dict(steps=2, warm_segmenter=1, warm_annotator=1, finish=8.0)
    monkeypatch.setattr("lagm.experiments.project.get_recipe", lambda name, **more: get_recipe(name, **(more | few)))
    generator, (images, masks) = tiny_generator(), tiny_pictures(2)
    annotator, segmenter = build_annotator("mlp", generator.feature_channels, 3, channels=4), build_segmenter(small, 3)
    recipe = get_recipe("fast", steps=2, warm_segmenter=1, warm_annotator=1, matched="decoder")
    assert estimate_lagm(generator, annotator, segmenter, images, masks, recipe).seconds > 0
    save_generator(tmp_path / "g.safetensors", generator.network)
    settings = Settings(size=16, steps=2, generator="g.safetensors", segmenter=small, annotator="attention")
    trained = train_project(tmp_path, images, masks, settings, labels=LABELS, progress=False)
    assert isinstance(trained.segmenter, LibrarySegmenter)
    with pytest.raises(InputError, match="project.yaml: segmenter: .*near are"):
        Settings(segmenter="torchvision:fcn_resnet5")
    with pytest.raises(InputError, match="project.yaml: annotator: .*did you mean 'fpn'"): Settings(annotator="fnp")
