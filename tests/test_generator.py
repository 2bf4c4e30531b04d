"""Files of generators: what is written is read back, and what is not a generator is refused with the reason."""

import json
import subprocess
import sys

import nursery
import pytest
import torch
from safetensors.torch import save_file

from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors, save_tensors
from lagm.data.demo import Avatars, stack
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.load import kit_generators, load_generator
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.weights import save_generator

STYLES = ["big-ears", "micah", "toon-head"]

@pytest.fixture
def network():
    torch.manual_seed(0)
    return StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=128, channel_max=8, architecture="resnet",
                     conv_clamp=256)


def test_a_saved_generator_draws_the_same_pictures(network, tmp_path):
    save_generator(tmp_path / "g.safetensors", network, {"data": "noise"})
    loaded = load_generator(tmp_path / "g.safetensors", Sampling(psi=0.5, cutoff=3, noise="const"))
    z = loaded.sample_z(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, features = network(z, 0.5, 3, "const")
    assert torch.equal(loaded(z).image, image)
    assert all(torch.equal(a, b) for a, b in zip(loaded(z).features, features, strict=True))
    assert loaded.header["provenance"] == {"data": "noise"}


def test_half_precision_halves_the_file_and_hardly_changes_the_picture(network, tmp_path):
    save_generator(tmp_path / "full.safetensors", network)
    save_generator(tmp_path / "half.safetensors", network, half=True)
    full, half = (load_generator(tmp_path / f"{name}.safetensors", Sampling(noise="const"))
                  for name in ("full", "half"))
    assert all(t.dtype == torch.float16 for t in load_tensors(tmp_path / "half.safetensors")[0].values())
    z = full.sample_z(4)
    assert (full(z).image - half(z).image).abs().max() < 0.02


def test_latents_do_not_depend_on_batching(network):
    generator = FrozenGenerator(network, Sampling(noise="none"))
    z = generator.sample_z(6, torch.Generator().manual_seed(3))
    apart = torch.cat([generator(one[None]).image for one in z])
    assert torch.allclose(generator(z).image, apart, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"kind": "segmenter"}, "no generator of ours"), ({"format_version": 99}, "format version 99"),
    ({"network": "BigGAN"}, "BigGAN")])
def test_a_header_of_another_kind_is_named(network, tmp_path, change, message):
    path = tmp_path / "g.safetensors"
    save_generator(path, network)
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, {**header, **change})
    with pytest.raises(InputError, match=message):
        load_generator(path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "text"])
def test_a_damaged_file_gives_one_clear_error(network, tmp_path, damage):
    path = tmp_path / "g.safetensors"
    save_generator(path, network)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_text("<html>not found</html>")
    with pytest.raises(InputError, match="g.safetensors"):
        load_generator(path)


@pytest.mark.parametrize("change", [{"psi": -0.1}, {"psi": 3}, {"cutoff": -1}, {"noise": "loud"}])
def test_sampling_refuses_values_that_mean_nothing(change):
    with pytest.raises(InputError, match=str(next(iter(change.values())))):
        Sampling(**change)


@pytest.mark.parametrize("style", STYLES)
def test_a_generator_of_the_kit_says_where_it_comes_from(style):
    generator = load_generator(style)
    facts = generator.header["provenance"]
    assert (facts["images_seen"] >= 250_000 and facts["style"] == style and facts["artwork"]["license"]["name"]
            and len(facts["trained_with"]["commit"]) == 40)
    assert kit_generators()[style].stat().st_size < 2_000_000
    assert (generator.feature_sizes[0] == 4 and generator.feature_sizes[-1] == generator.resolution
            and all(b == 2 * a for a, b in zip(generator.feature_sizes, generator.feature_sizes[1:])))
    json.dumps(facts)


def test_a_generator_of_the_kit_draws_its_own_style():
    """The mean of 100 generated faces is nearest to the mean of 100 drawn faces of the same style."""
    drawn = [stack(Avatars(style, "val"))[0][:100].mean(0) for style in STYLES]
    for style in STYLES:
        generator = load_generator(style)
        made = generator(generator.sample_z(100, torch.Generator().manual_seed(0))).image.clamp(-1, 1)
        assert made.std(0).mean() > 0.2, "all faces are alike"
        distances = [(made.mean(0) - mean).square().mean().sqrt() for mean in drawn]
        assert STYLES[int(torch.stack(distances).argmin())] == style and min(distances) < 0.16


@pytest.mark.slow
def test_the_same_latents_give_the_same_pictures_in_another_process():
    script = ("import torch; from lagm.generators.contract import Sampling; from lagm.generators.load import "
              "load_generator; torch.set_num_threads(1); g = load_generator(sampling=Sampling());"
              "r = torch.Generator().manual_seed(5); print(g(g.sample_z(2, r), r).image.double().sum().item())")
    forked = nursery.run([sys.executable, "-c", script]).stdout
    assert forked == subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
