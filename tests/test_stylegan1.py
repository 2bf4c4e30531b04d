"""StyleGAN against arrays computed with the original program, and its properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import fill, relative_error
from safetensors import safe_open

from lagm.core.errors import InputError
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.load import load_generator
from lagm.generators.stylegan1 import StyleGAN1
from lagm.generators.weights import save_generator

GOLDEN = Path(__file__).parent / "golden" / "stylegan1.safetensors"


def tiny(**change) -> StyleGAN1:
    torch.manual_seed(0)
    return StyleGAN1(**{**dict(resolution=16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8),
                        **change})


def golden_network(facts: dict) -> tuple[StyleGAN1, torch.Tensor]:
    """The network and the latents of the golden file, made from its seed alone."""
    seed, kwargs = int(facts["seed"]), json.loads(facts["synthesis_kwargs"])
    network = StyleGAN1(kwargs["resolution"], channel_base=2 * kwargs["fmap_base"], channel_max=kwargs["fmap_max"])
    fill(network, seed, scheme="equalised")
    with torch.no_grad():
        for name, parameter in network.g_mapping.named_parameters():
            if name.endswith("weight"): parameter.mul_(100)
    random = np.random.RandomState(seed + 999)
    network.set_noise([torch.from_numpy(random.standard_normal((1, 1, r, r)).astype(np.float32))
                       for r in network.channels for _ in range(2)])
    return network, torch.from_numpy(random.standard_normal((2, 512)).astype(np.float32))


def test_image_and_every_feature_map_agree_with_the_original_program():
    with safe_open(GOLDEN, "pt") as file:
        facts, expected = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    network, z = golden_network(facts)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == json.loads(facts["shapes"])
    assert relative_error(z, expected["z"]) < 1e-6
    cut = json.loads(facts["truncation"])
    with torch.no_grad(): image, features = network(expected["z"], cut["psi"], cut["max_layer"], noise_mode="const")
    assert relative_error(image, expected["img"]) < 1e-4
    assert [list(f.shape) for f in features] == json.loads(facts["feature_shapes"])
    for i, feature in enumerate(features):
        step = max(1, feature.shape[-1] // 8)
        assert relative_error(feature[:, ::4, ::step, ::step], expected[f"feat{i}.sub"]) < 1e-4, i


def test_constant_noise_is_the_same_for_all_and_random_noise_is_not():
    network = tiny()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "noise" in name: parameter.fill_(0.5)
        z = torch.randn(1, 8).repeat(2, 1)
        const, again = network(z, noise_mode="const").image, network(z, noise_mode="const").image
        random = [network(z, rng=torch.Generator().manual_seed(seed)).image for seed in (1, 1, 2)]
        silent = network(z, noise_mode="none").image
    assert torch.equal(const, again) and torch.equal(const[0], const[1]) and not torch.allclose(const, silent)
    assert (torch.equal(random[0], random[1]) and not torch.allclose(random[0], random[2])
            and not torch.allclose(random[0][0], random[0][1]))


def test_a_mean_style_per_layer_truncates_each_layer_towards_its_own():
    network = tiny(average_rows=6)
    with torch.no_grad():
        network.truncation.avg_latent += torch.arange(6.0)[:, None]
        ws = network.styles(torch.randn(3, 8), truncation_psi=0.0, truncation_cutoff=4)
    assert torch.equal(ws[:, :4], torch.arange(4.0)[None, :, None].expand(3, 4, 8))
    assert not torch.equal(ws[:, 4:], torch.arange(4.0, 6.0)[None, :, None].expand(3, 2, 8))


def test_larger_pictures_are_resized_like_the_1024_face_model():
    network, limited = tiny(resolution=32), tiny(resolution=32, largest=16)
    limited.load_state_dict(network.state_dict())
    z = torch.randn(2, 8)
    with torch.no_grad():
        (image, features), (small, small_features) = network(z, noise_mode="none"), limited(z, noise_mode="none")
    resize = dict(size=(16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(small, torch.nn.functional.interpolate(image, **resize))
    assert all(torch.equal(a, b) for a, b in zip(small_features[:6], features[:6]))
    assert all(torch.equal(a, torch.nn.functional.interpolate(b, **resize))
               for a, b in zip(small_features[6:], features[6:], strict=True))
    assert FrozenGenerator(limited).resolution == 16 and limited.feature_shapes[-1][1:] == (16, 16)
    face = StyleGAN1(1024, z_dim=8, w_dim=8, mapping_layers=1, channel_base=1024, channel_max=2)
    assert face.num_ws == 18 and face.img_resolution == 512 and [s for _, s, _ in face.feature_shapes[-4:]] == [512] * 4


def test_a_saved_stylegan_draws_the_same_pictures(tmp_path):
    network = tiny()
    save_generator(tmp_path / "g.safetensors", network, {"data": "noise"})
    loaded = load_generator(tmp_path / "g.safetensors", Sampling(psi=0.5, cutoff=3, noise="const"))
    z = loaded.sample_z(3, torch.Generator().manual_seed(0))
    with torch.no_grad(): image, features = network(z, 0.5, 3, "const")
    assert torch.equal(loaded(z).image, image)
    assert all(torch.equal(a, b) for a, b in zip(loaded(z).features, features, strict=True))


def test_bfloat16_is_close():
    network, z = tiny(), torch.randn(2, 8)
    with torch.no_grad():
        exact, rounded = (network(z, noise_mode="none", dtype=dtype).image for dtype in (torch.float32, torch.bfloat16))
    assert 0 < relative_error(rounded, exact) < 0.1


@pytest.mark.parametrize("change, message", [
    ({"resolution": 100}, "power of two"), ({"z_dim": 0}, "z_dim"), ({"mapping_layers": 10**9}, "mapping_layers"),
    ({"average_rows": 3}, "3 rows"),
    ({"channel_base": 8}, "channel_base"), ({"resolution": 16.0}, "resolution")])
def test_arguments_that_name_no_network_are_refused(change, message):
    with pytest.raises(InputError, match=message): tiny(**change)
