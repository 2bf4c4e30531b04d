"""The segmenters against the authors' own networks, their groups of parameters, and their checks of the input."""

import json
import urllib.error
from pathlib import Path

import pytest
import torch
from filling import fill, relative_error
from safetensors import safe_open
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet101

from lagm.core.errors import InputError
from lagm.models.deeplab import DeepLabV3
from lagm.models.segmenters import (
    SEGMENTERS, UNet, build_segmenter, matched_parameter_names, resolve_group, unet_widths)

GOLDEN = Path(__file__).parent / "golden" / "segmenters.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}


@pytest.fixture(scope="module")
def deeplab(golden):
    return fill(DeepLabV3(6), int(golden[0]["seed"]))


@pytest.fixture
def unet(golden):
    return fill(UNet(6), int(golden[0]["seed"]))


def on_meta(network, *args, **kwargs):
    with torch.device("meta"):
        return network(*args, **kwargs)


# ---------------------------------------------------------------- goldens
@pytest.mark.parametrize("network, key", [(UNet, "unet"), (DeepLabV3, "deeplabv3_101")])
def test_names_are_the_authors(golden, network, key):
    assert sorted(on_meta(network, 6).state_dict()) == json.loads(golden[0][f"{key}.keys"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_unet_agrees(golden, unet, mode, memory_format):
    unet.train(mode == "train").to(memory_format=memory_format)
    logits = unet(golden[1]["image"].contiguous(memory_format=memory_format))
    assert relative_error(logits, golden[1][f"unet.{mode}"]) < 1e-4


@torch.no_grad()
def test_deeplab_agrees(golden, deeplab):
    state = {name: value.clone() for name, value in deeplab.state_dict().items() if "running" in name}
    assert relative_error(deeplab.eval()(golden[1]["image"]), golden[1]["deeplabv3_101.eval"]) < 1e-4
    deeplab.train()
    for module in deeplab.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert relative_error(deeplab(golden[1]["image"]), golden[1]["deeplabv3_101.train_nodropout"]) < 2e-3
    deeplab.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- shapes
def test_paper_widths():
    assert unet_widths(64, 4) == ([64, 128, 256, 512, 512], [256, 128, 64, 64])
    assert unet_widths(16, 3) == ([16, 32, 64, 64], [32, 16, 16])
    assert unet_widths(8, 1) == ([8, 8], [8])
    unet = on_meta(UNet, 6)
    assert ([getattr(unet, n).conv2.out_channels for n in ("inc", "down1", "down2", "down3", "down4")]
            == [64, 128, 256, 512, 512])
    assert [getattr(unet, n).conv1.in_channels for n in ("up1", "up2", "up3", "up4")] == [1024, 512, 256, 128]


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 23)])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_unet_keeps_any_size(size, levels):
    assert UNet(3, width=2, levels=levels)(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_unet_refuses_a_picture_that_vanishes():
    with pytest.raises(InputError, match="16 pixels"):
        UNet(3, width=2)(torch.randn(2, 3, 15, 64))


# ---------------------------------------------------------------- derivatives
def tangent(network, x, v):
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p.detach(), v[name]) for name, p in network.named_parameters()}
        return forward_ad.unpack_dual(functional_call(network, {**dual, **buffers}, (x,))).tangent


def backward_twice(network, x, v):
    """The same directional derivative by two reverse passes, an independent road."""
    parameters = dict(network.named_parameters())
    logits = network(x)
    u = torch.zeros_like(logits, requires_grad=True)
    grads = torch.autograd.grad(logits, list(parameters.values()), u, create_graph=True)
    inner = sum((g * v[name]).sum() for g, name in zip(grads, parameters, strict=True))
    return torch.autograd.grad(inner, u)[0]


def direction(network):
    torch.manual_seed(1)
    return {name: torch.randn_like(p) * p.abs().mean() for name, p in network.named_parameters()}


def test_unet_forward_mode_equals_two_backward_passes():
    torch.manual_seed(0)
    unet, x = UNet(4, width=4, levels=3).double().train(), torch.randn(2, 3, 21, 19).double()
    v = direction(unet)
    assert relative_error(tangent(unet, x, v), backward_twice(unet, x, v)) < 1e-10


def test_deeplab_forward_mode_equals_two_backward_passes(deeplab):
    deeplab.eval()  # no dropout; its batch norm in train mode is the same operation as the U-Net's
    deeplab.main_net.classifier.train()
    deeplab.main_net.classifier[0].project[3].eval()
    x, v = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), direction(deeplab)
    state = {name: value.clone() for name, value in deeplab.named_buffers()}
    expected = backward_twice(deeplab, x, v)
    deeplab.load_state_dict(state, strict=False)
    assert relative_error(tangent(deeplab, x, v), expected) < 1e-3


# ---------------------------------------------------------------- groups of parameters
@pytest.mark.parametrize("network", [UNet, DeepLabV3])
def test_every_group_matches_something(network):
    net = on_meta(network, 8)
    names = [name for name, _ in net.named_parameters()]
    for group in SEGMENTERS.get(net.network).groups:
        matched = matched_parameter_names(net, group)
        assert matched and [n for n in names if n in set(matched)] == matched
    assert matched_parameter_names(net, "all") == names
    assert matched_parameter_names(net) == matched_parameter_names(net, SEGMENTERS.get(net.network).default_group)


def test_groups_hold_what_their_names_say():
    unet, deeplab = on_meta(UNet, 8), on_meta(DeepLabV3, 8)

    def blocks(group, net=unet, depth=1):
        return {".".join(n.split(".")[:depth]) for n in matched_parameter_names(net, group)}

    assert blocks("downup12") == {"down1", "down2", "up1", "up2"}
    assert blocks("u1") == {"outc", "down1", "up4"} and blocks("u2") == {"outc", "down2", "up3"}
    assert not blocks("conv") & {"outc"}  # the last layer is a convolution, but not by name
    assert blocks("head", deeplab, 2) == {"main_net.classifier"}
    assert blocks("r45head", deeplab, 3) - {f"main_net.classifier.{i}" for i in range(5)} == {
        "main_net.backbone.layer3",
        "main_net.backbone.layer4",
    }


def test_patterns_match_whole_names():
    unet = on_meta(UNet, 8)
    assert matched_parameter_names(unet, "outc.weight") == ["outc.weight"]
    assert resolve_group("unet", "u1") == SEGMENTERS.get("unet").groups["u1"]
    assert resolve_group(torch.nn.Linear(2, 2), "wei.*") == "wei.*"


@pytest.mark.parametrize("group, told", [("headd", "downup12"), ("out", "regular expression"), ("(", "not a valid"),
                                         ("", "no parameter")])
def test_wrong_groups_list_the_options(group, told):
    with pytest.raises(InputError, match=told):
        matched_parameter_names(on_meta(UNet, 8), group)


def test_a_group_of_the_deep_network_is_refused_by_a_shallow_one():
    with pytest.raises(InputError, match="up4"):
        matched_parameter_names(on_meta(UNet, 8, levels=3), "u1")


def test_any_module_has_the_group_all():
    assert matched_parameter_names(torch.nn.Linear(2, 3)) == ["weight", "bias"]


# ---------------------------------------------------------------- building
def test_build_by_name():
    assert isinstance(build_segmenter("unet", 3, width=4), UNet)
    with torch.device("meta"):
        assert isinstance(build_segmenter("deeplab", 3), DeepLabV3)
    for name, options in (("fcn", {}), ("unet", {"depth": 3}), ("unet", {"levels": 0})):
        with pytest.raises(InputError):
            build_segmenter(name, 3, **options)


def test_backbone_from_a_file(tmp_path):
    net = resnet101()
    net.load_state_dict({k: torch.full_like(v, 0.25) for k, v in net.state_dict().items()})
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    deeplab = DeepLabV3(3, backbone_path=tmp_path / "backbone.pth")
    state = deeplab.main_net.backbone.state_dict()
    assert len(state) == len(net.state_dict()) - 2  # all but its classifier
    assert all((v == torch.full_like(v, 0.25)).all() for v in state.values())


@pytest.mark.parametrize("content", ["nothing", "page", "other"])
def test_a_wrong_backbone_file_gets_the_remedy(tmp_path, content):
    path = tmp_path / "backbone.pth"
    if content == "page":
        path.write_text("<html>not found</html>")
    elif content == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="backbone_path") as error:
        on_meta(DeepLabV3, 3, backbone_path=path)
    assert str(path) in str(error.value)


def test_a_failed_download_gets_the_remedy(monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match="no route to host.*backbone_path"):
        on_meta(DeepLabV3, 3, pretrained_backbone=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_doublings_gradient_has_no_gaps(layout):
    """PyTorch's backward pass of the doubling is several times slower over a view with gaps."""
    class Doublings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.upsample_bilinear2d_backward.default:
                layouts.append(args[0].is_contiguous(memory_format=layout))
            return function(*args, **kwargs or {})

    layouts, network = [], build_segmenter("unet", 3, width=4, levels=2).to(memory_format=layout)
    loss = network(torch.rand(2, 3, 18, 16).contiguous(memory_format=layout)).square().mean()
    with Doublings(): loss.backward()
    assert layouts == [True, True]
