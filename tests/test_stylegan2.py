"""The generator against arrays computed with the original program, and its properties."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lagm.core.errors import InputError
from lagm.generators.stylegan2 import ARCHITECTURES, StyleGAN2, modulated_conv2d
from lagm.generators.stylegan2_ops import resampling_filter, upsample2x

GOLDEN = Path(__file__).parent / "golden" / "stylegan2_pytorch.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    network = StyleGAN2.from_init_kwargs(json.loads(metadata["init_kwargs"]))
    network.load_state_dict({k.removeprefix("G_ema."): v for k, v in tensors.items() if k.startswith("G_ema.")})
    return network, tensors, json.loads(metadata["cases"])


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", "abc")
def test_image_and_every_feature_map_agree_with_the_original_program(golden, case):
    network, tensors, cases = golden
    with torch.no_grad():
        image, features = network(tensors["z"], **cases[case])
    assert relative(image, tensors[f"{case}.img"]) < 1e-4
    assert len(features) == sum(name.startswith(f"{case}.feat") for name in tensors)
    for i, feature in enumerate(features):
        assert relative(feature, tensors[f"{case}.feat{i}"]) < 1e-4, i


def test_constructor_arguments_survive_the_round_trip(golden):
    network, _, _ = golden
    twin = StyleGAN2.from_init_kwargs(json.loads(json.dumps(network.init_kwargs())))
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_noise_is_reproducible_and_differs_between_pictures(architecture):
    torch.manual_seed(0)
    network = StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=128, channel_max=8,
                        architecture=architecture, conv_clamp=256)
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(1.0)
    z = torch.randn(1, 8).repeat(2, 1)
    with torch.no_grad():
        first = network(z, rng=torch.Generator().manual_seed(1)).image
        again = network(z, rng=torch.Generator().manual_seed(1)).image
        silent = network(z, noise_mode="none").image
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])
    assert torch.equal(silent[0], silent[1])


def test_gradients_equal_those_of_the_per_sample_form():
    generator = torch.Generator().manual_seed(0)
    x, weight, styles = (torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
                         for shape in ((2, 4, 5, 5), (3, 4, 3, 3), (2, 4)))
    kernel = weight[None] * styles[:, None, :, None, None]
    kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    naive = torch.cat([torch.nn.functional.conv2d(a[None], k, padding=1) for a, k in zip(x, kernel)])
    ours = modulated_conv2d(x, weight, styles)
    seed = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (x, weight, styles), seed),
                    torch.autograd.grad(naive, (x, weight, styles), seed)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_upsampling_keeps_the_sum_of_an_inner_pixel():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    up = upsample2x(x, resampling_filter())
    assert up.shape == (1, 1, 18, 18)
    assert up.sum().item() == pytest.approx(4)
    assert torch.equal(up, up.flip(2)) and torch.equal(up, up.transpose(2, 3))


@pytest.mark.parametrize("change, message", [
    ({"c_dim": -1}, "c_dim"), ({"img_resolution": 100}, "power of two"),
    ({"synthesis_kwargs": {"colour": 1}}, "colour"),
    ({"synthesis_kwargs": {"architecture": "ladder"}}, "ladder"), ({"mapping_kwargs": {"embed": 1}}, "embed")])
def test_unknown_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        StyleGAN2.from_init_kwargs({"img_resolution": 16, **change})


def test_unknown_noise_mode_is_named():
    network = StyleGAN2(8, z_dim=4, w_dim=4, mapping_layers=1, channel_base=64, channel_max=8)
    with pytest.raises(InputError, match="sometimes"):
        network(torch.randn(1, 4), noise_mode="sometimes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_generator_notices_that_its_weights_were_changed(dtype):
    torch.manual_seed(0)
    network, other = (StyleGAN2(16, z_dim=8, w_dim=8, channel_base=128, channel_max=8).requires_grad_(False)
                      for _ in range(2))
    z = torch.randn(2, 8)
    def draw(of): return of(z, noise_mode="const", dtype=dtype).image
    before = draw(network)
    network.load_state_dict(other.state_dict())
    assert torch.equal(draw(network), draw(other)) and not torch.equal(draw(network), before)
    for parameter in network.parameters(): parameter.mul_(1.1)
    assert torch.equal(draw(network), draw(copy.deepcopy(network))) and not torch.equal(draw(network), draw(other))
    network.to(torch.double).float()
    assert torch.equal(draw(network), draw(copy.deepcopy(network)))
