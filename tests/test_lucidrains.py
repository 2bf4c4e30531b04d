"""lucidrains' stylegan2-pytorch: the program's own numbers, its files, and what is odd about them.

The golden was made by the program, version 1.9.0 (MIT licence), on a CPU: two generators with random weights, one with
attention and one with `no_const`; styles, pictures and the outputs of its blocks for given latents and noise.
"""

import json
from pathlib import Path

import official_files as official
import pytest
import torch
from filling import relative_error
from safetensors import safe_open

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator
from lagm.generators.lucidrains import LucidrainsGAN, _noise_picture
from lagm.generators.weights import save_generator
from lagm.models.convert import convert, inspect

GOLDEN = Path(__file__).parent / "golden" / "stylegan2_lucidrains.safetensors"
CASES = ("attention", "no_const")


def golden(case: str) -> tuple[dict, dict]:
    """The tensors of a case, and how its network was made."""
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in file.keys() if name.startswith(case + "/")]
        return {n.removeprefix(case + "/"): file.get_tensor(n) for n in names}, json.loads(file.metadata()[case])


def golden_file(folder: Path, case: str, **change) -> Path:
    """The case's network as the trainer would have saved it; the networks without average are other numbers."""
    tensors, made = golden(case)
    state = {n.removeprefix("file/"): t.float() for n, t in tensors.items() if n.startswith("file/")}
    return official.lucidrains(folder, state | change, lr_mlp=made["lr_mlp"])


@pytest.mark.parametrize("case", CASES)
def test_the_programs_pictures_and_maps(tmp_path, case):
    tensors, made = golden(case)
    G, noise = load_generator(golden_file(tmp_path, case), Sampling(psi=1)), tensors["noise"][..., 0]
    assert relative_error(G.network.mapping(tensors["z"]), tensors["w"]) < 1e-6
    network = G.network.synthesis
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lagm.generators.lucidrains._noise_picture", lambda *claims, **more: noise)
        mixed, image = network(tensors["ws"]).image, G(tensors["z"])
    assert relative_error(mixed, 2 * tensors["mixed"] - 1) < 1e-5
    assert relative_error(image.image, 2 * tensors["image"] - 1) < 1e-5
    for i, feature in enumerate(image.features): assert relative_error(feature, tensors[f"feature{i}"]) < 1e-5
    assert G.feature_sizes == [4, 8, 16][: len(G.feature_sizes)] and G.resolution == made["image_size"]


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_inspected_and_converted(tmp_path, case):
    path = golden_file(tmp_path, case)
    convert(path, tmp_path / "g.safetensors")
    z = torch.randn(2, golden(case)[1]["latent_dim"])
    first, again = (load_generator(p, Sampling(noise="const")) for p in (path, tmp_path / "g.safetensors"))
    assert torch.equal(first(z).image, again(z).image)
    facts = inspect(path)
    assert "stylegan2-pytorch" in facts["format"] and facts["generator"]["class"] == "LucidrainsGAN"
    assert facts["generator"]["feature_maps"][0].endswith("4 × 4") and "whoever trained" in facts["licence"]
    assert facts["provenance"]["mean_style"].startswith("computed")


def test_without_averages_the_networks_themselves_are_taken(tmp_path):
    path = golden_file(tmp_path, "attention")
    content = torch.load(path, weights_only=True)
    averaged, plain = (load_generator(path),
                       {n: t for n, t in content["GAN"].items() if not n.startswith(("SE.", "GE."))})
    torch.save(plain, tmp_path / "model_4.pt")
    bare = load_generator(tmp_path / "model_4.pt")
    ours, theirs = bare.network.state_dict(), averaged.network.state_dict()
    assert torch.equal(ours["synthesis.initial_conv.weight"], theirs["synthesis.initial_conv.weight"] * 2)


def test_the_config_beside_the_file_tells_the_mapping_factor(tmp_path, recwarn):
    path = golden_file(tmp_path, "attention")
    z = torch.randn(3, 8)
    usual = load_generator(path).network.mapping(z)
    (tmp_path / ".config.json").write_text(json.dumps({"lr_mlp": 0.2, "image_size": 16}))
    other = load_generator(path)
    assert other.network.init_kwargs()["mapping_lr"] == 0.2 and not torch.allclose(other.network.mapping(z), usual)
    assert "from .config.json" in other.header["provenance"]["mapping_lr"]
    save_generator(tmp_path / "g.safetensors", other.network)
    assert torch.equal(load_generator(tmp_path / "g.safetensors").network.mapping(z), other.network.mapping(z))
    for nonsense in ("[", "[]", "{}"):
        (tmp_path / ".config.json").write_text(nonsense)
        assert torch.equal(load_generator(path).network.mapping(z), usual)
    (tmp_path / ".config.json").write_text('{"lr_mlp": "much"}')
    with pytest.raises(InputError, match="lr_mlp is no positive number"): load_generator(path)
    assert not recwarn.list, "the program computes its mean style, too: nothing to warn of"


def test_noise_modes():
    device = torch.device("cpu")
    rngs = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, other = (_noise_picture("random", 2, 8, device, rng) for rng in rngs)
    assert torch.equal(first, same) and not torch.equal(first, other) and 0 <= first.min() and first.max() <= 1
    constant = _noise_picture("const", 2, 8, device)
    assert torch.equal(constant[0], constant[1]) and torch.equal(constant, _noise_picture("const", 2, 8, device))
    assert torch.equal(constant[0], torch.rand(8, 8, generator=random_generator(0, "noise picture")))
    assert _noise_picture("none", 1, 4, device).unique().tolist() == [0.5]


@pytest.mark.parametrize("change, words", [
    ({"GE.initial_conv.weight": None}, "old version"),
    ({"GE.attns.1.0.fn.fn.to_qkv.weight": torch.zeros(3)}, "old version"),
    ({"GE.blocks.0.to_rgb.conv.weight": torch.zeros(4, 16, 1, 1)}, "--transparent"),
    ({"GE.blocks.1.conv2.weight": None}, "lacks some of the layers"),
    ({"GE.blocks.1.conv1.weight": torch.zeros(8, 9, 3, 3)}, "wrong shapes"),
    ({"SE.net.0.weight": None}, "lacks mapping.net.0.weight")])
def test_files_that_cannot_be_read_are_named(tmp_path, change, words):
    path = golden_file(tmp_path, "attention")
    content = torch.load(path, weights_only=True)
    for name, tensor in change.items():
        if tensor is None: del content["GAN"][name]
        else: content["GAN"][name] = tensor
    torch.save(content, path)
    with pytest.raises(InputError, match=words) as caught: load_generator(path)
    assert "model_7.pt" in str(caught.value)


def test_half_precision_draws_nearly_the_same():
    torch.manual_seed(0)
    network = LucidrainsGAN([16, 16, 8], z_dim=8, mapping_layers=1, attention=[1]).eval()
    z = torch.randn(2, 8)
    with torch.no_grad(): full, half = (network(z, noise_mode="none", dtype=d) for d in (torch.float32, torch.bfloat16))
    assert half.image.dtype == torch.float32 and relative_error(half.image, full.image) < 0.05
