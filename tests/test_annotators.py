"""The annotators by name: their arithmetic, their files, and a training with each of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_training import ToyGenerator, labelled
from tiny import tiny_segmenter
from torch import nn

from lagm.core.errors import InputError
from lagm.core.tensors import describe_tensors, load_tensors, save_tensors
from lagm.models.annotator import FPNAnnotator
from lagm.models.annotators import ANNOTATORS, AttentionAnnotator, LookAround, MLPAnnotator, build_annotator, positions
from lagm.models.saved import read_networks, save_networks
from lagm.models.segmenters import UNet
from lagm.training.baselines import Matching, train_matching
from lagm.training.lagm import train_lagm
from lagm.training.recipe import get_recipe

WIDTHS, SIDES = [6, 5, 4], [4, 8, 16]


class Plain(nn.Module):
    """An annotator of another package: it reads the finest map."""

    def __init__(self, feature_channels, n_classes):
        super().__init__()
        self.feature_channels, self.n_classes = list(feature_channels), n_classes
        self.layer = nn.Conv2d(feature_channels[-1], n_classes, 1)

    def forward(self, features): return self.layer(features[-1])


def maps(count=2, widths=WIDTHS, sides=SIDES):
    return [torch.randn(count, c, side, side).double() for c, side in zip(widths, sides)]


def stirred(network):
    """A network with weights everywhere, in eval mode, whose batch norms have seen something."""
    for p in network.parameters(): nn.init.normal_(p, std=0.3)
    network.double().train()(maps(8))
    return network.eval()


@pytest.mark.parametrize("name", ANNOTATORS)
@pytest.mark.parametrize("sizes", [dict(channels=8, layers=1), dict(channels=6, layers=3), dict(channels=1, layers=2)])
def test_one_interface(name, sizes):
    network = build_annotator(name, WIDTHS, 5, **sizes).double()
    assert network(maps()).shape == (2, 5, 16, 16)
    assert ANNOTATORS.get(name).describe(network).items() >= sizes.items()
    network(maps())[:, 1].sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    wide = [torch.randn(2, c, side, 2 * side).double() for c, side in zip(WIDTHS, SIDES)]
    assert network(wide).shape == (2, 5, 16, 32)


def test_a_perceptron_sees_its_own_pixel():
    """Against the network as it is usually written: all maps enlarged, then linear layers for each pixel."""
    network, features = stirred(MLPAnnotator(WIDTHS, 5, channels=8)), maps()
    whole = torch.cat([F.interpolate(f, (16, 16), mode="bilinear", align_corners=False) for f in features], 1)
    pixels = whole.permute(0, 2, 3, 1).flatten(0, 2)
    weight = torch.cat([network.get_submodule(f"part{i}").weight.flatten(1) for i in range(3)], 1)
    x = F.linear(pixels, weight, network.part0.bias)
    for relu, norm, layer in zip(*[iter(network.rest)] * 3):
        x = F.linear((relu(x) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias,
                     layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(network(features), x.view(2, 16, 16, 5).permute(0, 3, 1, 2))


def test_the_look_around_by_hand():
    """Against torch's own multi-head attention."""
    block, x = LookAround(8, 4).double(), torch.randn(2, 8, 3, 5).double()
    for p in block.parameters(): nn.init.normal_(p, std=0.4)
    attention = nn.MultiheadAttention(8, 4, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(block.read.weight)
        attention.in_proj_bias.copy_(block.read.bias)
        attention.out_proj.load_state_dict(block.give.state_dict())
    tokens = x.flatten(2).transpose(1, 2)
    place = positions(3, 5, 8).double()
    change = attention(block.norm1(tokens) + place, block.norm1(tokens) + place, block.norm1(tokens) + place)[0]
    change = change + block.narrow(F.gelu(block.wide(block.norm2(tokens + change))))
    torch.testing.assert_close(block(x), change.transpose(1, 2).view(2, 8, 3, 5))


def test_attention_begins_as_the_pyramid():
    pyramid, looking = stirred(FPNAnnotator(WIDTHS, 5, channels=8)), AttentionAnnotator(WIDTHS, 5, channels=8).double()
    missing, extra = looking.load_state_dict(pyramid.state_dict(), strict=False)
    features = maps()
    assert all(name.startswith("around.") for name in missing) and not extra
    assert torch.equal(looking.eval()(features), pyramid(features))
    for p in looking.around.parameters(): nn.init.normal_(p, std=0.3)
    nudged = [f.clone() for f in features]
    nudged[1][:, :, 0, 0] += 1
    reach = [((network(nudged) - network(features)).abs().sum(1)[0] > 1e-12).double().mean() for network in
             (looking, pyramid)]
    assert reach[0] == 1 and reach[1] < 0.5


def test_a_large_first_map_is_averaged_for_the_look():
    looking = stirred(AttentionAnnotator(WIDTHS, 5, channels=8, side=2))
    assert looking(maps()).shape == (2, 5, 16, 16)
    total = torch.randn(1, 8, 4, 6).double()
    change = looking.around(F.adaptive_avg_pool2d(total, (2, 2)))
    expected = total + F.interpolate(change, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(looking.changed(total), expected)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_files(name, tmp_path):
    network, path = build_annotator(name, WIDTHS, 3, channels=6, layers=2), tmp_path / "results.safetensors"
    save_networks(path, network, tiny_segmenter())
    found = read_networks(path)
    assert type(found.annotator) is type(network) and found.networks["annotator"]["arguments"]["channels"] == 6
    assert all(a.equal(b) for a, b in zip(found.annotator.state_dict().values(), network.state_dict().values()))
    tensors, header = load_tensors(path)[0], describe_tensors(path)[1]
    header["annotator"]["arguments"] |= {"layers": 10**6}
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match="impossible size: layers"): read_networks(path)
    header["annotator"] = {"name": "UNet", "arguments": {"n_classes": 3}}
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match="UNet in the place of its annotator"): read_networks(path)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_run_with_every_stage_goes_on_where_it_stopped(name, tmp_path):
    """Warm start, alignment, matching and finish; the same numbers after a stop in between."""
    recipe = get_recipe("fast", steps=4, warm_segmenter=2, warm_annotator=2, finish=2.0, align=1.0)
    def run(**options):
        torch.manual_seed(3)
        annotator = build_annotator(name, ToyGenerator.feature_channels, 5, channels=4)
        before = {key: value.clone() for key, value in annotator.state_dict().items()}
        trained = train_lagm(ToyGenerator(), annotator, UNet(5, width=4, levels=2), *labelled(), recipe, progress=False,
                             **options)
        return before, trained
    before, whole = run()
    assert any(not torch.equal(value, before[key]) for key, value in whole.annotator.named_parameters())
    assert all(math.isfinite(p.sum()) for p in whole.annotator.parameters())
    run(checkpoint=tmp_path / "c.safetensors", checkpoint_every=3)
    _, again = run(checkpoint=tmp_path / "c.safetensors")
    assert all(a.equal(b) for a, b in zip(whole.annotator.state_dict().values(), again.annotator.state_dict().values()))
    said = read_networks(tmp_path / "c.safetensors").networks["annotator"]
    assert said["name"] == ANNOTATORS.get(name).build.__name__


def test_names(tmp_path):
    for wrong, message in ((lambda: build_annotator("fnp", [4], 3), "did you mean 'fpn'"),
                           (lambda: build_annotator("test_annotators:SIDES", [4], 3), "cannot be an? annotator"),
                           (lambda: build_annotator("torch.nn:Conv2d", [4], 3), "cannot be an? annotator"),
                           (lambda: build_annotator("mlp", [], 3), "at least one feature map"),
                           (lambda: build_annotator("attention", [4], 3, channels=0), "channels=0"),
                           (lambda: build_annotator("mlp", WIDTHS, 3)(maps()[::-1]), "its own generator")):
        with pytest.raises(InputError, match=message): wrong()
    network = build_annotator("test_annotators:Plain", WIDTHS, 3, channels=8)
    save_networks(tmp_path / "r.safetensors", network, tiny_segmenter())
    assert read_networks(tmp_path / "r.safetensors").networks["annotator"]["name"] == "test_annotators:Plain"
    ANNOTATORS._outside.clear()
    with pytest.raises(InputError, match="of another package"): read_networks(tmp_path / "r.safetensors")


def test_methods_take_them():
    recipe = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1, finish=0.0)
    trained = train_matching(UNet(5, width=4, levels=2), ToyGenerator(), *labelled(), setting=Matching("mlp", 4),
                             recipe=recipe, progress=False)
    assert type(trained.annotator) is MLPAnnotator
