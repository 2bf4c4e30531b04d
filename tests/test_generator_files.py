"""Generators as other programs write them, and have written them: read with the same arithmetic, or named in a sentence
that does not call them damaged.
"""

import json
import math
import sys
import warnings

import numpy as np
import nursery
import official_files as official
import pytest
import torch
import torch.nn.functional as F
from filling import relative_error
from test_checkpoints import GOLDEN, same_pictures, tiny

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.core.tensors import load_tensors, save_tensors
from lagm.experiments.stages import open_generator
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator, mean_style, read_generator
from lagm.generators.stylegan2 import StyleGAN2, modulated_conv2d
from lagm.generators.stylegan2_ops import resampling_filter, upsample2x
from lagm.generators.weights import save_generator
from lagm.models.convert import as_lines, convert, inspect
from lagm.models.deeplab import DeepLabV3
from lagm.models.results import load_results
from lagm.models.segmenters import UNet
from lagm.training.checkpoints import generator_digest


def refused(path, *words: str, read=load_generator) -> str:
    """The file is refused in one line that names it, does not call it damaged, and has these words."""
    with pytest.raises(InputError) as caught: read(path)
    message = str(caught.value)
    assert path.name in message and "damaged" not in message and message.isprintable(), message
    for word in words: assert word in message, message
    return message


# ---- NVIDIA's later program


def loud(**change) -> StyleGAN2:
    """A network whose layers pass 256, so that a clamp shows."""
    network = tiny(**change)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("conv0.bias", "conv1.bias")): parameter.mul_(1500)
    return network


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("clamp", [256, 100, None])
def test_a_stylegan2_of_stylegan3s_program(tmp_path, protocol, clamp):
    network = loud(conv_clamp=clamp)
    path = official.nvidia_later(tmp_path / "network-snapshot.pkl", network, protocol,
                                 executed=str(tmp_path / "executed"))
    same_pictures(path, network)
    assert not (tmp_path / "executed").exists() and "StyleGAN3's program" in inspect(path)["format"]
    with torch.no_grad():
        highest = max(f.abs().max().item() for f in network(torch.randn(2, 8), noise_mode="const").features)
    assert highest == clamp if clamp else highest > 256


def test_where_the_later_program_says_nothing_its_blocks_tell(tmp_path, monkeypatch):
    network, build = loud(conv_clamp=256), official.persistent_module

    def with_attribute(state, *rest, **more):
        root = build(state, *rest, **more)
        if "synthesis" in root._modules:
            for block in root._modules["synthesis"]._modules.values():
                block.__dict__["fused_modconv_default"] = "inference_only"
        return root

    said = {"channel_base": 128, "channel_max": 8}
    monkeypatch.setattr(official, "persistent_module", with_attribute)
    same_pictures(official.nvidia_later(tmp_path / "g.pkl", network, said=said), network)
    kwargs = {name: value for name, value in network.init_kwargs().items() if name != "synthesis_kwargs"}
    # the usual widths need not be said
    wide = loud(channel_base=32768, channel_max=512, conv_clamp=256, img_resolution=8)
    same_pictures(official.nvidia_pytorch(tmp_path / "g.pkl", wide, kwargs=kwargs | {"img_resolution": 8}), wide)


def test_unknown_arguments_of_the_later_program_are_named(tmp_path):
    network = tiny(conv_clamp=256)
    for change in ({"colour": 3}, {"kernel_size": 5}, {"magnitude_ema_beta": 0.9}):
        refused(official.nvidia_later(tmp_path / "g.pkl", network,
                                      said={"channel_base": 128, "channel_max": 8} | change), next(iter(change)))
    frozen = network.init_kwargs()
    frozen["mapping_kwargs"] |= {"freeze_layers": 2, "freeze_embed": True}
    same_pictures(official.nvidia_pytorch(tmp_path / "g.pkl", network, kwargs=frozen), network)


# ---- other filters


FILTERS = [[1, 1], [1, 2, 1], [1, 2, 3, 1], [1, 4, 6, 4, 1], [1, 3, 5, 5, 3, 1], [1, 2, 3, 4, 4, 3, 2, 1, 1],
           [[1, 2, 1], [2, 4, 2], [1, 3, 1]], [5]]


@pytest.mark.parametrize("taps", FILTERS)
def test_doubling_with_any_filter_against_sums_written_out(taps):
    """Pixel y of the result is the sum over i of f[i] x'[y - i + k // 2 - 1 + ...], x' with zeros inserted: one line
    per pixel.
    """
    kernel, x = resampling_filter(taps).double(), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    rows, columns = kernel.shape
    spread = torch.zeros(8, 8, dtype=torch.float64)
    spread[::2, ::2] = x[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for y in range(8):
        for c in range(8):
            for i in range(rows):
                for j in range(columns):
                    a, b = y - i + rows - 1 - (rows + 1) // 2, c - j + columns - 1 - (columns + 1) // 2
                    if 0 <= a < 8 and 0 <= b < 8: expected[y, c] += 4 * kernel[i, j] * spread[a, b]
    assert torch.allclose(upsample2x(x, kernel)[0, 0], expected, atol=1e-12)
    weight, ones = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    far = upsample2x(F.pad(x, (6, 6, 6, 6)), kernel)  # the same as filter, then convolution, with room around
    slow = F.conv2d(far, weight.flip(2, 3), padding=1)[..., 12:-12, 12:-12]
    slow = slow * (weight.square().sum((1, 2, 3)) + 1e-8).rsqrt()[:, None, None]
    assert torch.allclose(modulated_conv2d(x, weight, ones, kernel), slow, atol=1e-12)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("taps", FILTERS[1:6])
def test_nvidia_files_with_another_filter(tmp_path, taps, architecture):
    """As that program keeps them: long filters in one dimension, and conv1 with the usual one that it never uses."""
    network = tiny(resample_filter=taps, architecture=architecture)
    stored, kept = network.state_dict(), {}
    for name, tensor in stored.items():
        if name.endswith("resample_filter"):
            if name.endswith("conv1.resample_filter"): assert tensor.shape == (4, 4)
            elif len(taps) >= 8: tensor = torch.tensor(taps) / sum(taps)
        kept[name] = tensor
    network.state_dict = lambda: kept
    path = official.nvidia_pytorch(tmp_path / "g.pkl", network)
    later = official.nvidia_later(tmp_path / "later.pkl", network, said=network.init_kwargs()["synthesis_kwargs"])
    del network.state_dict
    convert(path, tmp_path / "g.safetensors")
    z = torch.randn(2, 8)
    for file in (path, later, tmp_path / "g.safetensors"):
        with torch.no_grad(): image, features = network(z, 0.6, 3, "const")
        G = load_generator(file, Sampling(psi=0.6, cutoff=3, noise="const"))
        assert (relative_error(G(z).image, image) < 4e-6
                and all(relative_error(a, b) < 4e-6 for a, b in zip(G(z).features, features, strict=True)))


def test_filters_that_the_arguments_do_not_mention_are_named(tmp_path):
    network = tiny(resample_filter=[1, 2, 1])
    kwargs = network.init_kwargs()
    del kwargs["synthesis_kwargs"]["resample_filter"]
    refused(official.nvidia_pytorch(tmp_path / "g.pkl", network, kwargs=kwargs), "filter of 3 × 3")


def tf_golden() -> tuple[dict, dict]:
    stored = np.load(GOLDEN / "stylegan2_tf_variables.npz", allow_pickle=False)
    return ({name.removeprefix("var:"): stored[name] for name in stored if name.startswith("var:")},
            json.loads(str(stored["static_kwargs"])))


@pytest.mark.parametrize("taps", [[1, 2, 1], [1, 4, 6, 4, 1], [1, 1]])
def test_tensorflow_files_with_another_filter(tmp_path, taps):
    variables, static = tf_golden()
    G, usual = (load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static | more),
                               Sampling(noise="none")) for more in ({"resample_kernel": taps}, {}))
    assert (torch.equal(G.network.synthesis.b8.resample_filter, resampling_filter(taps))
            and G.network.synthesis.b8.conv1.resample_filter.shape == (4, 4))
    assert not torch.allclose(G(torch.ones(1, G.z_dim)).image, usual(torch.ones(1, G.z_dim)).image, atol=1e-3)
    refused(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static | {"resample_kernel": None}),
            "resample_kernel")


# ---- rosinality's program


def rosinality_file(path, network, change):
    official.rosinality(path, network)
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return path


def without_noise(content) -> None:
    content["g_ema"] = {name: tensor for name, tensor in content["g_ema"].items() if not name.startswith("noises.")}
    content.pop("latent_avg")


def test_old_files_without_constant_noise_and_mean(tmp_path):
    network = tiny()
    path = rosinality_file(tmp_path / "ffhq256.pt", network, without_noise)
    with pytest.warns(UserWarning) as told: first = load_generator(path, Sampling(psi=1, noise="const"))
    assert (sorted("constant noise" in str(w.message) for w in told) == [False, True]
            and all("ffhq256.pt" in str(w.message) for w in told))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_generator(path, Sampling(psi=1, noise="const"))
        silent = load_generator(path, Sampling(psi=1, noise="none"))
        convert(path, tmp_path / "g.safetensors")
        same_pictures(tmp_path / "g.safetensors", first.network)
    z = torch.randn(2, 8)
    assert torch.equal(first(z).image, again(z).image) and not torch.equal(first(z).image, silent(z).image)
    with torch.no_grad(): assert torch.allclose(silent(z).image, network(z, noise_mode="none").image, atol=1e-4)
    noises = [m.noise_const for m in first.network.modules() if hasattr(m, "noise_const")]
    assert len({n.flatten()[0].item() for n in noises}) == len(noises) and 0.8 < noises[-1].std() < 1.2
    assert first.header["provenance"]["constant_noise"] == "drawn from a fixed seed"


def test_some_noises_missing_is_damage(tmp_path):
    path = rosinality_file(tmp_path / "g.pt", tiny(), lambda content: content["g_ema"].pop("noises.noise_2"))
    with pytest.raises(InputError, match="lacks noises.noise_2"): load_generator(path)


@pytest.mark.parametrize("taps", [[1, 2, 1], [1, 4, 6, 4, 1], [1, 2, 3, 1]])
def test_rosinality_files_with_another_filter(tmp_path, taps):
    network = tiny(resample_filter=taps)
    G = load_generator(official.rosinality(tmp_path / "g.pt", network), Sampling(psi=1, noise="const"))
    z = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.allclose(G.network(z, noise_mode="const").image, network(z, noise_mode="const").image, atol=2e-4)
    path = rosinality_file(tmp_path / "h.pt", network,
                           lambda content: content["g_ema"].update({"to_rgbs.1.upsample.kernel": torch.ones(4, 4)}))
    refused(path, "different resampling filters")


def test_widths_that_no_rule_gives_are_named(tmp_path):
    """channel_multiplier=4: 1024 channels at 64 pixels, 512 below."""
    def widen(content):
        state = content["g_ema"]
        for name in ("convs.2.conv.weight", "convs.3.conv.weight"): state[name] = state[name].repeat(1, 2, 1, 1, 1)
    refused(rosinality_file(tmp_path / "g.pt", tiny(), widen), "channel_multiplier")


# ---- files of programs that are not read


LUCIDRAINS = {"S.net.0.weight": 1, "G.initial_block": 1, "G.blocks.0.to_style1.weight": 1,
              "GE.blocks.0.to_style1.weight": 1, "SE.net.0.weight": 1, "D.blocks.0.conv_res.weight": 1}


@pytest.mark.parametrize("content, words", [
    ({"GAN": LUCIDRAINS, "version": "0.2"}, ["lucidrains' stylegan2-pytorch", "old version"]),
    (LUCIDRAINS, ["lucidrains"]), ({"G.initial_block": 1}, ["a part of a checkpoint of lucidrains'"]),
    ({"GAN": {"G.layers.0.0.0.weight": 1}, "version": "0.1"}, ["lightweight-gan"]),
    ({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": 1, "first_stage_model.encoder.conv_in.weight": 1},
      "global_step": 3}, ["diffusion"]),
    ({"down_blocks.0.resnets.0.conv1.weight": 1, "time_embedding.linear_1.weight": 1}, ["diffusion"]),
    ({"model": {"time_embed.0.weight": 1}, "ema": 2}, ["diffusion"]),
    ({"synthesis.input.freqs": 1, "mapping.w_avg": 1}, ["StyleGAN3"]),
    ({"generator": {"a": 1}}, ["some other program"])])
def test_files_of_other_programs_are_named(tmp_path, capsys, content, words):
    def tensors(value):
        return {k: tensors(v) if isinstance(v, dict) else v if isinstance(v, str) else torch.zeros(2)
                for k, v in value.items()}
    torch.save(tensors(content), tmp_path / "model_7.pt")
    refused(tmp_path / "model_7.pt", *words)
    for command in (["inspect", str(tmp_path / "model_7.pt")],
                    ["convert", str(tmp_path / "model_7.pt"), str(tmp_path / "g.safetensors")]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert words[0] in told and told.count("\n") == 1
    assert not (tmp_path / "g.safetensors").exists()


def test_a_safetensors_file_of_another_program_is_named(tmp_path):
    import safetensors.torch
    safetensors.torch.save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, tmp_path / "unet.safetensors")
    refused(tmp_path / "unet.safetensors", "diffusion")


@pytest.mark.parametrize("tensors, words", [
    ({"mapping.w_avg": (10, 3), "synthesis.input.freqs": (3,)}, ["a StyleGAN-XL", "mean style for every class"]),
    ({"mapping.w_avg": (3,), "synthesis.input.freqs": (3,), "synthesis.L0_36_4.up_filter16": (12,)}, ["StyleGAN-XL"]),
    ({"mapping.w_avg": (3,), "synthesis.input.freqs": (3,), "synthesis.b4.torgb.affine.proj.weight": (3, 3)},
     ["a StyleGAN-T", "CLIP"]),
    ({"synthesis.init.init.1.weight_orig": (3, 3, 4, 4), "synthesis.feat_8.0.weight": (3,)}, ["FastGAN", "Projected"]),
    ({"mapping.w_avg": (3,), "synthesis.b8.conv0.transformer.to_queries.weight": (3, 3)}, ["GANformer"]),
    ({"backbone.synthesis.b4.const": (3, 4, 4), "decoder.net.0.weight": (3, 3)}, ["EG3D", "camera"])])
def test_what_was_built_on_nvidias_programs_is_named(tmp_path, tensors, words):
    module = official.persistent_module({name: torch.zeros(shape) for name, shape in tensors.items()}, "Generator", "",
                                        _init_args=(), _init_kwargs={})
    refused(official.dump(dict(G_ema=module), tmp_path / "g.pkl", 4), "does not compute", *words)


def test_whole_objects_are_named(tmp_path):
    with official.stand_ins({"network.program.Generator": type("Generator", (), {})}) as _:
        from network.program import Generator
        for name, content in (("whole.pt", Generator()), ("dict.pt", {"G_ema": Generator()})):
            torch.save(content, tmp_path / name)
    refused(tmp_path / "whole.pt", "network.program.Generator", "state_dict()")
    refused(tmp_path / "dict.pt", "network.program.Generator")


def test_an_authors_unet_with_transposed_convolutions_is_named(tmp_path):
    state = UNet(5, width=4, levels=2).state_dict() | {"up1.up.weight": torch.zeros(4, 4, 2, 2),
                                                       "up1.up.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "s.pth")
    refused(tmp_path / "s.pth", "transposed convolutions", "bilinear", read=load_results)


# ---- types of weights


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool, torch.int64,
                                   torch.uint16])
def test_weights_that_are_no_floating_point_numbers_are_named(tmp_path, dtype):
    state = official.rosinality_state(tiny())
    state["style.1.bias"] = torch.ones(8).to(dtype)
    torch.save({"g_ema": state}, tmp_path / "g.pt")
    refused(tmp_path / "g.pt", str(dtype).removeprefix("torch."))
    for half in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({"g_ema": {name: tensor.to(half) for name, tensor in state.items() if name != "style.1.bias"}
                    | {"style.1.bias": torch.ones(8, dtype=half)}, "latent_avg": torch.zeros(8)}, tmp_path / "h.pt")
        assert next(load_generator(tmp_path / "h.pt").network.parameters()).dtype == torch.float32


# ---- several classes


def styles_by_hand(state: dict, z: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The mapping network of several classes from its equations."""
    weights = {name: tensor.double().numpy() for name, tensor in state.items() if name.startswith("mapping.")}
    def unit(x): return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-8)
    y = label[None] @ weights["mapping.embed.weight"].T / math.sqrt(len(label)) + weights["mapping.embed.bias"]
    x = np.concatenate([unit(z), np.repeat(unit(y), len(z), axis=0)], axis=1)
    for i in range(2):
        weight = weights[f"mapping.fc{i}.weight"]
        x = x @ weight.T * (0.01 / math.sqrt(weight.shape[1])) + weights[f"mapping.fc{i}.bias"] * 0.01
        x = np.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    return x


@pytest.mark.parametrize("size", [None, 5])
def test_one_class_of_a_conditional_generator(tmp_path, size):
    network = tiny(c_dim=3, embed_features=size)
    paths = [official.nvidia_pytorch(tmp_path / "g.pkl", network),
             official.nvidia_later(tmp_path / "later.pkl", network, said=network.init_kwargs()["synthesis_kwargs"])]
    convert(paths[0], tmp_path / "g.safetensors")
    z = torch.randn(4, 8)
    for path in [*paths, tmp_path / "g.safetensors"]:
        refused(path, "draws 3 classes", "label=")
        assert len({generator_digest(load_generator(path, label=label)) for label in range(3)}) == 3
        assert inspect(path)["generator"]["classes"] == 3 and any("classes" in line for line in as_lines(inspect(path)))
        for label, vector in [(2, [0, 0, 1]), (0, [1, 0, 0]), ([0.5, 0.5, 0], [0.5, 0.5, 0])]:
            G = load_generator(path, Sampling(psi=1, noise="none"), label=label)
            expected = styles_by_hand(network.state_dict(), z.double().numpy(), np.array(vector, dtype=float))
            assert np.abs(G.network.styles(z)[:, 0].numpy() - expected).max() < 1e-5
            with torch.no_grad():
                image = network.synthesis(torch.from_numpy(expected).float()[:, None].repeat(1, network.num_ws, 1),
                                          noise_mode="none").image
            assert relative_error(G(z).image, image) < 4e-6
            assert (G.header["provenance"]["label"] == label and G.header["init_kwargs"]["c_dim"] == 0
                    and G.network.c_dim == 0)
            save_generator(tmp_path / "one.safetensors", G.network)
            assert torch.equal(load_generator(tmp_path / "one.safetensors", Sampling(psi=1, noise="none"))(z).image,
                               G(z).image)
        for wrong in (3, -1, True, 1.5, "cat", [1, 0], [1, 0, math.nan]):
            with pytest.raises(InputError, match="label"): load_generator(path, label=wrong)
    assert main(["convert", str(paths[0]), str(tmp_path / "two.safetensors"), "--label", "2"]) == 0
    styles = load_generator(paths[0], label=2).network.styles(z)
    assert (torch.equal(load_generator(tmp_path / "two.safetensors").network.styles(z), styles)
            and torch.equal(open_generator(str(paths[0]), label=2).network.styles(z), styles))
    with pytest.raises(InputError, match="leave label out"): load_generator(label=0)
    with pytest.raises(InputError, match="draws 3 classes"): read_generator(paths[0])[0](z)


def test_one_class_of_a_tensorflow_file(tmp_path):
    variables, static = tf_golden()
    variables = {name: value for name, value in variables.items()
                 if not name.startswith("mapping/") or name.endswith(("Dense0/bias", "Dense1/weight", "Dense1/bias"))}
    rng, z_dim, w_dim = np.random.default_rng(0), static["latent_size"], static["dlatent_size"]
    variables |= {"mapping/Dense0/weight": rng.standard_normal((z_dim + 7, w_dim)).astype("f4") * 100,
                  "mapping/LabelEmbed/weight": rng.standard_normal((4, 7)).astype("f4"),
                  "mapping/LabelEmbed/bias": rng.standard_normal(7).astype("f4")}
    path = official.nvidia_tensorflow(tmp_path / "g.pkl", variables,
                                      static | {"label_size": 4, "label_fmaps": 7, "mapping_layers": 2})
    G, z = load_generator(path, label=1), torch.randn(3, z_dim)
    expected = styles_by_hand(read_generator(path)[0].state_dict(), z.double().numpy(), np.array([0.0, 1, 0, 0]))
    assert np.abs(G.network.mapping(z).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert torch.equal(read_generator(path)[0].mapping.embed.weight,
                       torch.from_numpy(variables["mapping/LabelEmbed/weight"]).t())
    first = {name: value for name, value in variables.items()
             if "LabelEmbed" not in name} | {"mapping/LabelConcat/weight": np.zeros((4, z_dim), "f4")}
    refused(official.nvidia_tensorflow(tmp_path / "g.pkl", first, static | {"label_size": 4}), "joins labels")


# ---- a full disk


FULL = """
import errno, os, resource, sys
import lagm.core.files
from lagm.cli import main
def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
real, lagm.core.files.os.fsync = os.fsync, full
codes = [main(["convert", sys.argv[1], sys.argv[2], "--force"])]
lagm.core.files.os.fsync = real
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
codes += [main(["convert", sys.argv[1], sys.argv[2], "--force"])]
sys.exit(sum(codes))
"""


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path):
    """Noticed when the file is flushed; and while it is written, for which safetensors has errors of its own."""
    pytest.importorskip("resource")
    save_generator(tmp_path / "s.safetensors", tiny(channel_base=1024, channel_max=64))
    (tmp_path / "t.safetensors").write_text("older")
    done = nursery.run([sys.executable, "-c", FULL, tmp_path / "s.safetensors", tmp_path / "t.safetensors"])
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("lagm: error")]
    assert len(lines) == 2 and all(line.startswith(f"lagm: error: cannot write {tmp_path / 't.safetensors'}: ")
                                   and "make room" in line for line in lines), done.stderr
    assert (sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]
            and (tmp_path / "t.safetensors").read_text() == "older")


# ---- what a file says is shown without its escapes


def test_nothing_of_a_file_reaches_the_terminal_unescaped(tmp_path, capsys):
    rude = "\x1b[2J\u202e\ud800lagm: fine\n"
    network = tiny()
    save_tensors(tmp_path / "g.safetensors", network.state_dict(),
                 {**load_header(tmp_path, network), "provenance": {"format": rude.replace("\ud800", ""),
                                                                   "note\x1b": {"deep": [rude.replace("\ud800", "")]}}})
    for arguments in ([], ["--json"]):
        assert main(["inspect", str(tmp_path / "g.safetensors"), *arguments]) == 0
        told = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in told) and "\nlagm: fine" not in told
    annotator_like = {"training_set_kwargs": official.EasyDict({"path": rude, rude: 1, "resolution": 64}),
                      "S": official.persistent_module(UNet(3, width=2, levels=1).state_dict(), "UNet", "",
                                                      _init_args=(), _init_kwargs={})}
    path = official.dump(annotator_like, tmp_path / "network-snapshot.pkl", 4)
    assert main(["inspect", str(path)]) == 0 and capsys.readouterr().out.replace("\n", "").isprintable()
    assert main(["convert", str(path), str(tmp_path / "r.safetensors")]) == 0
    assert load_results(path).facts["training_set_kwargs"]["resolution"] == 64


def load_header(folder, network) -> dict:
    save_generator(folder / "header.safetensors", network)
    return load_tensors(folder / "header.safetensors")[1]


def test_an_auxiliary_head_changes_nothing(tmp_path):
    with torch.device("meta"): names = DeepLabV3(4).state_dict()
    state = {name: torch.zeros(t.shape, dtype=torch.float16 if t.is_floating_point() else t.dtype)
             for name, t in names.items()}
    torch.save(state | {"main_net.aux_classifier.0.weight": torch.zeros(2, 2, 3, 3)}, tmp_path / "s.pth")
    assert isinstance(load_results(tmp_path / "s.pth").segmenter, DeepLabV3)


def test_the_mean_style_of_very_wide_networks_is_computed_in_parts():
    seen = []

    def mapping(z):
        seen.append(tuple(z.shape))
        return z[:, :2] + 1

    wide = mean_style(mapping, 4096, 2)
    assert sum(n for n, _ in seen) == 8000 and all(n * 4096 <= 2**24 for n, _ in seen) and len(seen) == 2
    assert (wide - 1).abs().max() < 0.05
    assert torch.equal(mean_style(mapping, 8, 2),
                       mapping(torch.randn(8000, 8,
                                           generator=random_generator(0, "mean style"))).double().mean(dim=0).float())
