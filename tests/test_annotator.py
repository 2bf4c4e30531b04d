"""The annotator against the authors' own network, and its checks of the input."""

import json
from pathlib import Path

import pytest
import torch
from filling import fill, relative_error
from safetensors import safe_open

from lagm.core.errors import InputError
from lagm.models.annotator import FPNAnnotator

GOLDEN = Path(__file__).parent / "golden" / "annotator_fpn.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}


def golden_annotator(golden, variant):
    meta, arrays = golden
    kwargs = json.loads(meta[f"{variant}.kwargs"])
    features = [arrays[f"features.{i}"] for i in range(5)]
    annotator = FPNAnnotator(
        [f.shape[1] for f in features],
        kwargs["output_channels"],
        channels=kwargs["tmp_channels"],
        layers=kwargs["num_layers"],
        fuse_bn_relu=kwargs.get("fuse_bn_relu", False),
        use_factor=kwargs.get("use_factor", False),
    )
    return annotator, features


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_names_are_the_authors(golden, variant):
    annotator, _ = golden_annotator(golden, variant)
    assert sorted(annotator.state_dict()) == json.loads(golden[0][f"{variant}.keys"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("variant", ["plain", "fused"])
@torch.no_grad()
def test_logits_agree(golden, variant, mode):
    annotator, features = golden_annotator(golden, variant)
    fill(annotator, int(golden[0]["seed"])).train(mode == "train")
    assert relative_error(annotator(features), golden[1][f"{variant}.{mode}"]) < 1e-4


@torch.no_grad()
def test_channels_last_gives_the_same(golden):
    annotator, features = golden_annotator(golden, "fused")
    fill(annotator, int(golden[0]["seed"])).eval().to(memory_format=torch.channels_last)
    logits = annotator([f.contiguous(memory_format=torch.channels_last) for f in features])
    assert relative_error(logits, golden[1]["fused.eval"]) < 1e-4


@pytest.mark.parametrize("layers", [1, 2, 4])
@torch.no_grad()
def test_layers_widen_the_window(layers):
    annotator = FPNAnnotator([3], 2, channels=16, layers=layers).eval()  # few channels may all be silenced by a ReLU
    x = torch.zeros(1, 3, 17, 17)
    nudged = x.clone()
    nudged[..., 8, 8] = 1.0
    annotator = annotator.double()
    changed = (annotator([x.double()]) - annotator([nudged.double()])).abs().amax(1)[0] > 0
    rows = changed.any(1).nonzero()
    assert rows.max() - rows.min() + 1 == 2 * layers + 1


@torch.no_grad()
def test_one_map_that_is_not_square():
    assert FPNAnnotator([3, 2], 4, channels=8)([torch.randn(2, 3, 3, 5), torch.randn(2, 2, 6, 9)]).shape == (2, 4, 6, 9)


def test_gradient_of_a_gradient_reaches_every_parameter():
    annotator = FPNAnnotator([3, 2], 2, channels=4, fuse_bn_relu=True)
    features = [torch.randn(2, 3, 4, 4), torch.randn(2, 2, 8, 8)]
    weight = torch.randn(2, requires_grad=True)
    loss = (annotator(features).softmax(1) * weight[:, None, None]).square().sum()
    (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    grads = torch.autograd.grad(g.square().sum(), list(annotator.parameters()))
    assert all(torch.isfinite(v).all() for v in grads) and all(v.abs().max() > 0 for v in grads[-2:])


@pytest.mark.parametrize(
    "features, told",
    [
        ([torch.zeros(1, 3, 4, 4)], "but got [3]"),
        ([torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4)], "but got [2, 3]"),
        ([torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 4, 4)], "coarse to fine"),
    ],
)
def test_wrong_features_are_named(features, told):
    with pytest.raises(InputError) as error:
        FPNAnnotator([3, 2], 2)(features)
    assert told in str(error.value)


@pytest.mark.parametrize("wrong", [{"feature_channels": []}, {"n_classes": 0}, {"layers": 0}, {"channels": 0}])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(InputError):
        FPNAnnotator(**({"feature_channels": [3], "n_classes": 2} | wrong))
