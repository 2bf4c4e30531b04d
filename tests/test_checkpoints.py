"""Files built like the released ones load into networks that draw the pictures of the original programs; damaged ones
are named.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import nursery
import official_files as official
import pytest
import torch
import torch.nn.functional as F
from filling import relative_error
from safetensors import safe_open
from test_stylegan1 import golden_network

from lagm.core.errors import InputError
from lagm.core.tensors import save_tensors
from lagm.evaluation.metrics import evaluate
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator, read_generator
from lagm.generators.stylegan1 import StyleGAN1
from lagm.generators.stylegan2 import StyleGAN2
from lagm.generators.weights import save_generator
from lagm.models.annotator import FPNAnnotator
from lagm.models.deeplab import DeepLabV3
from lagm.models.results import load_results, read_generator_kwargs
from lagm.models.segmenters import UNet

GOLDEN = Path(__file__).parent / "golden"


def tiny(**change) -> StyleGAN2:
    torch.manual_seed(0)
    network = StyleGAN2(**{**dict(img_resolution=16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128,
                                  channel_max=8), **change})
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("noise_strength", "w_avg", "bias")): tensor += 0.3 * torch.randn_like(tensor)
    return network


def tiny1() -> StyleGAN1:
    torch.manual_seed(0)
    return StyleGAN1(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)


def same_pictures(path, network, **options) -> None:
    """The file gives the same picture and feature maps as the network it was made from, to the bit."""
    G = load_generator(path, Sampling(psi=0.6, cutoff=3, noise="const"), **options)
    z = G.sample_z(2, torch.Generator().manual_seed(3))
    with torch.no_grad(): image, features = network(z, 0.6, 3, "const")
    assert torch.equal(G(z).image, image)
    assert all(torch.equal(a, b) for a, b in zip(G(z).features, features, strict=True))
    assert [(c, s, s) for c, s in zip(G.feature_channels, G.feature_sizes)] == [tuple(f.shape[1:]) for f in features]


# ---- goldens, through files


@pytest.fixture(scope="module")
def golden2():
    with safe_open(GOLDEN / "stylegan2_pytorch.safetensors", "pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    network = StyleGAN2.from_init_kwargs(json.loads(facts["init_kwargs"]))
    network.load_state_dict({k.removeprefix("G_ema."): v for k, v in tensors.items() if k.startswith("G_ema.")})
    return network, tensors, facts


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nvidia_pytorch_pickles_of_every_protocol_agree_with_the_original_program_and_run_nothing(golden2, tmp_path,
                                                                                                  protocol):
    network, tensors, facts = golden2
    path = official.nvidia_pytorch(tmp_path / "g.pkl", network, protocol, str(tmp_path / "executed"),
                                   positional=protocol == 3, kwargs=json.loads(facts["init_kwargs"]))
    for case, options in json.loads(facts["cases"]).items():
        G = load_generator(path, Sampling(options["truncation_psi"], options["truncation_cutoff"],
                                          options["noise_mode"]))
        with torch.no_grad(): image, features = G.network(tensors["z"], **options)
        assert relative_error(image, tensors[f"{case}.img"]) < 1e-4
        assert all(relative_error(f, tensors[f"{case}.feat{i}"]) < 1e-4 for i, f in enumerate(features))
        assert len(features) == sum(name.startswith(f"{case}.feat") for name in tensors)
        assert torch.equal(G(tensors["z"]).image, image)
    assert not (tmp_path / "executed").exists()
    assert G.header["provenance"]["source"] == "g.pkl" and "G_ema" in G.header["provenance"]["format"]


@pytest.mark.parametrize("protocol, old_numpy, scalars",
                         [(2, True, True), (3, False, False), (4, True, True), (5, False, False)])
def test_nvidia_tensorflow_pickles_agree_with_the_original_program(tmp_path, protocol, old_numpy, scalars):
    """`scalars`: arrays without dimensions were often stored as numpy's scalars."""
    stored = np.load(GOLDEN / "stylegan2_tf_variables.npz", allow_pickle=False)
    variables = {name.removeprefix("var:"): stored[name] for name in stored if name.startswith("var:")}
    if scalars: variables = {name: value[()] for name, value in variables.items()}
    path = official.nvidia_tensorflow(tmp_path / "g.pkl", variables, json.loads(str(stored["static_kwargs"])), protocol,
                                      old_numpy=old_numpy, executed=str(tmp_path / "executed"))
    case = json.loads(str(stored["case"]))
    G = load_generator(path, Sampling(case["truncation_psi"], case["truncation_cutoff"], case["noise_mode"]))
    with torch.no_grad(): image = G.network(torch.from_numpy(stored["z"]), **case).image
    assert relative_error(image, torch.from_numpy(stored["img"])) < 1e-4
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped, apart", [(True, False), (False, True)])
def test_datasetgan_files_agree_with_the_original_program(tmp_path, zipped, apart):
    with safe_open(GOLDEN / "stylegan1.safetensors", "pt") as file:
        facts, expected = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    network, _ = golden_network(facts)
    state = network.state_dict()
    mean, noise = (state.pop("truncation.avg_latent") if apart else None,
                   [m.fixed for m in network.modules() if hasattr(m, "fixed")])
    if apart: np.save(tmp_path / "mean.npy", mean.numpy())
    torch.save(state, tmp_path / "g.pt", _use_new_zipfile_serialization=zipped)
    cut = json.loads(facts["truncation"])
    G = load_generator(tmp_path / "g.pt", Sampling(cut["psi"], cut["max_layer"], "const"),
                       avg_latent=tmp_path / "mean.npy" if apart else None)
    G.network.set_noise(noise)
    image, features = G.network(expected["z"], cut["psi"], cut["max_layer"], "const")
    assert relative_error(image, expected["img"]) < 1e-4
    for i, f in enumerate(features):
        step = max(1, f.shape[-1] // 8)
        assert relative_error(f[:, ::4, ::step, ::step], expected[f"feat{i}.sub"]) < 1e-4
    assert G.feature_channels == [shape[1] for shape in json.loads(facts["feature_shapes"])]


# ---- variants


@pytest.mark.parametrize("change", [
    {"architecture": "resnet"}, {"architecture": "orig"}, {"conv_clamp": 256}, {"use_noise": False},
    {"mapping_features": 12}, {"mapping_lr": 0.1},
    {"resample_filter": [1, 2, 1, 1]}, {"img_resolution": 64, "channel_base": 256}])
def test_variants_of_nvidia_pytorch_files(tmp_path, change):
    network = tiny(**change)
    same_pictures(official.nvidia_pytorch(tmp_path / "g.pkl", network), network)


def test_arguments_that_matter_in_training_only_change_nothing(tmp_path):
    network = tiny(conv_clamp=256)
    kwargs = network.init_kwargs()
    kwargs["synthesis_kwargs"] |= {"num_fp16_res": 4, "fp16_channels_last": True, "activation": "lrelu"}
    kwargs["mapping_kwargs"] |= {"w_avg_beta": 0.99, "embed_features": None, "layer_features": None,
                                 "activation": "lrelu"}
    same_pictures(official.nvidia_pytorch(tmp_path / "g.pkl", network, kwargs=kwargs), network)


def test_an_unknown_argument_of_a_file_is_named(tmp_path):
    network = tiny()
    for change in ({"colour": 3}, {"c_dim": 10}, {"synthesis_kwargs": {"architecture": "ladder"}},
                   {"mapping_kwargs": {"num_layers": 10**9}}, {"img_resolution": 10**6}):
        official.nvidia_pytorch(tmp_path / "g.pkl", network, kwargs={**network.init_kwargs(), **change})
        with pytest.raises(InputError, match="g.pkl describes no network"): load_generator(tmp_path / "g.pkl")


def test_tensorflow_arguments_are_understood_or_named(tmp_path):
    stored = np.load(GOLDEN / "stylegan2_tf_variables.npz", allow_pickle=False)
    variables, static = ({n.removeprefix("var:"): stored[n] for n in stored if n.startswith("var:")},
                         json.loads(str(stored["static_kwargs"])))
    harmless = {"truncation_cutoff": 8, "style_mixing_prob": 0.9, "structure": "linear", "randomize_noise": False,
                "resolution_w": static["resolution"], "resolution_h": static["resolution"], "fmap_decay": 1.0}
    G = load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static | harmless))
    assert (G.resolution == static["resolution"]
            and G.feature_channels
            == [min(2 * static["fmap_base"] // side, static["fmap_max"]) for side in G.feature_sizes])
    for change, message in [({"fmap_decay": 0.5}, "fmap_decay"), ({"attention": True}, "attention"),
                            ({"label_size": 10}, "label_size"),
                            ({"resolution_w": 2 * static["resolution"]}, "not square"),
                            ({"fmap_base": "x"}, "fmap_base")]:
        with pytest.raises(InputError, match=message):
            load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static | change))
    for change, message in [({"synthesis/8x8/Conv0_up/weight": np.zeros((3, 3, 2, 2), "f4")}, "wrong shapes"),
                            ({"synthesis/8x8/Extra/weight": np.zeros(3, "f4")}, "Extra"),
                            ({"mapping/Dense0/bias": np.full_like(variables["mapping/Dense0/bias"], np.nan)}, "NaN"),
                            ({"synthesis/noise3": np.zeros(4, "f4")}, "wrong shapes")]:
        with pytest.raises(InputError, match=message):
            load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables | change, static))
    for version in (2, 3):
        with pytest.raises(InputError, match="first StyleGAN"):
            load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static, version=version))
    del variables["synthesis/32x32/ToRGB/bias"]
    with pytest.raises(InputError, match="lacks synthesis.b32.torgb.bias"):
        load_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static))


def test_a_residual_tensorflow_network(tmp_path):
    """The reverse translation, of skip connections and a network without noise too."""
    network = tiny(architecture="resnet", use_noise=False, w_dim=6)
    variables = {"lod": np.float32(0) * np.ones(()), "dlatent_avg": network.mapping.w_avg.numpy()}
    layers = {"conv0": "Conv0_up", "conv1": "Conv1", "torgb": "ToRGB", "skip": "Skip"}
    for name, tensor in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "mapping" and rest != "w_avg":
            variables[f"mapping/Dense{rest[2]}/{rest[4:]}"] = (tensor.t() if "weight" in rest else tensor).numpy()
        if part != "synthesis" or "filter" in name: continue
        block, layer, *leaf = rest.split(".")
        side = block[1:]
        if layer == "const":
            variables["synthesis/4x4/Const/const"] = tensor[None].numpy()
            continue
        theirs = f"synthesis/{side}x{side}/{'Conv' if side == '4' and layer == 'conv1' else layers[layer]}/"
        if leaf == ["weight"]:
            variables[theirs + "weight"] = (tensor.flip(2, 3) if layer in ("conv0", "skip")
                                            else tensor).permute(2, 3, 1, 0).numpy()
        elif leaf == ["bias"]: variables[theirs + "bias"] = tensor.numpy()
        else: variables[theirs + f"mod_{leaf[1]}"] = tensor.t().numpy() if leaf[1] == "weight" else tensor.numpy() - 1
    static = dict(latent_size=8, dlatent_size=6, mapping_fmaps=6, resolution=16, mapping_layers=2, fmap_base=64,
                  fmap_max=8, architecture="resnet", use_noise=False)
    loaded, _ = read_generator(official.nvidia_tensorflow(tmp_path / "g.pkl", variables, static))
    for name, tensor in network.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-6), name


def rosinality_picture(state: dict, w: torch.Tensor, noise: bool) -> torch.Tensor:
    """rosinality's network written down directly: weights scaled, modulated and demodulated per picture."""
    def blurred(x, kernel, pad):
        return F.conv2d(F.pad(x, pad * 2).flatten(0, 1)[:, None],
                        kernel.flip(0, 1)[None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    def conv(x, name, demodulate=True):
        weight = state[f"{name}.conv.weight"]
        style = (w @ state[f"{name}.conv.modulation.weight"].t() / w.shape[1] ** 0.5
                 + state[f"{name}.conv.modulation.bias"])
        weight = weight / weight[0, 0].numel() ** 0.5 * style[:, None, :, None, None]
        if demodulate: weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        if f"{name}.conv.blur.kernel" not in state:
            return torch.cat([F.conv2d(a[None], k, padding=k.shape[-1] // 2) for a, k in zip(x, weight)])
        up = torch.cat([F.conv_transpose2d(a[None], k.transpose(0, 1), stride=2) for a, k in zip(x, weight)])
        return blurred(up, state[f"{name}.conv.blur.kernel"], (1, 1))

    def layer(x, name, k):
        x = conv(x, name) + (state[f"{name}.noise.weight"] * state[f"noises.noise_{k}"] if noise else 0)
        return F.leaky_relu(x + state[f"{name}.activate.bias"][:, None, None], 0.2) * 2**0.5

    x = layer(state["input.input"].repeat(len(w), 1, 1, 1), "conv1", 0)
    image = conv(x, "to_rgb1", False) + state["to_rgb1.bias"]
    for i in range(sum(name.startswith("to_rgbs") and name.endswith("conv.weight") for name in state)):
        x = layer(layer(x, f"convs.{2 * i}", 2 * i + 1), f"convs.{2 * i + 1}", 2 * i + 2)
        spread = torch.zeros(len(w), 3, *(2 * s for s in image.shape[2:]))
        spread[..., ::2, ::2] = image
        image = conv(x, f"to_rgbs.{i}",
                     False) + state[f"to_rgbs.{i}.bias"] + blurred(spread, state[f"to_rgbs.{i}.upsample.kernel"],
                                                                   (2, 1))
    return image


@pytest.mark.parametrize("zipped", [True, False])
def test_rosinality_files_draw_what_their_equations_say(tmp_path, zipped):
    network = tiny(img_resolution=32, channel_base=256)
    path = official.rosinality(tmp_path / "g.pt", network, zipped=zipped)
    G = load_generator(path, Sampling(psi=0.6, cutoff=None, noise="const"))
    z = G.sample_z(3)
    with torch.no_grad(): ws = G.network.styles(z, 0.6)
    expected = rosinality_picture(official.rosinality_state(network), ws[:, 0], noise=True)
    assert relative_error(G.network(z, 0.6, None, "const").image, expected) < 1e-5
    assert torch.equal(G.network.mapping.w_avg, network.mapping.w_avg)


def test_a_bare_state_dict_and_data_parallel_names(tmp_path):
    network = tiny()
    torch.save({f"module.{k}": v for k, v in official.rosinality_state(network).items()}, tmp_path / "g.pt")
    with pytest.warns(UserWarning, match="8,000 latents"): G = load_generator(tmp_path / "g.pt")
    assert G.header["provenance"]["mean_style"] == "computed from 8,000 latents"
    state = official.rosinality_state(network)
    del state["convs.1.conv.weight"]
    torch.save({"g_ema": state}, tmp_path / "g.pt")
    with pytest.raises(InputError, match="g.pt lacks some of the layers"): load_generator(tmp_path / "g.pt")


# ---- the mean style


def test_a_missing_mean_style_is_computed_said_and_recorded(tmp_path):
    network = tiny1()
    torch.save({k: v for k, v in network.state_dict().items() if "avg_latent" not in k}, tmp_path / "g.pt")
    with pytest.warns(UserWarning, match="g.pt lacks its mean style.*8,000 latents"):
        G = load_generator(tmp_path / "g.pt")
    with torch.no_grad(): mean = network.g_mapping(torch.randn(50_000, 8)).mean(0)
    assert relative_error(G.network.truncation.avg_latent, mean) < 0.2
    assert G.header["provenance"]["mean_style"] == "computed from 8,000 latents"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(load_generator(tmp_path / "g.pt").network.truncation.avg_latent,
                           G.network.truncation.avg_latent)


@pytest.mark.parametrize("shape, good", [((8,), True), ((1, 8), True), ((6, 8), True), ((18, 8), False), ((9,), False),
                                         ((2, 6, 8), False)])
def test_mean_styles_of_every_shape(tmp_path, shape, good):
    network, mean = tiny1(), np.random.standard_normal(shape)
    torch.save(network.state_dict(), tmp_path / "g.pt")
    np.save(tmp_path / "mean.npy", mean)
    if not good:
        with pytest.raises(InputError, match="mean.npy is not a mean style"):
            load_generator(tmp_path / "g.pt", avg_latent=tmp_path / "mean.npy")
        return
    G = load_generator(tmp_path / "g.pt", avg_latent=tmp_path / "mean.npy")
    assert np.allclose(G.network.truncation.avg_latent, mean[0] if shape[0] == 1 else mean, atol=1e-7)
    save_generator(tmp_path / "again.safetensors", G.network)  # the header must fit the mean style it now has
    assert load_generator(tmp_path / "again.safetensors").network.num_ws == 6


# ---- what the authors trained


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("options", [{}, {"use_factor": True}, {"fuse_bn_relu": True}])
def test_snapshots_load_and_evaluate(tmp_path, protocol, options):
    annotator, segmenter = (FPNAnnotator([8, 4], 5, channels=6, layers=3, **options).eval(),
                            UNet(5, width=4, levels=2).eval())
    path = official.snapshot(tmp_path / "network-snapshot-000200.pkl", annotator, segmenter, protocol, **options)
    found = load_results(path, n_classes=5)
    features, picture = [torch.randn(2, 8, 4, 4), torch.randn(2, 4, 8, 8)], torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (torch.equal(found.annotator(features), annotator(features))
                and torch.equal(found.segmenter(picture), segmenter(picture)))
    assert found.facts["training_set_kwargs"]["resolution"] == 64
    masks = torch.randint(0, 5, (2, 16, 16))
    assert evaluate(found.segmenter, picture, masks, 5) == evaluate(segmenter, picture, masks, 5)
    with pytest.raises(InputError, match="for 5 classes, not 7"): load_results(path, n_classes=7)
    with pytest.raises(InputError, match="load_results"): load_generator(path)


def test_a_deeplab_state_dict_loads(tmp_path):
    with torch.device("meta"): network = DeepLabV3(4)
    network.load_state_dict({k: torch.rand(v.shape).to(torch.float16 if v.is_floating_point() else v.dtype)
                             for k, v in network.state_dict().items()}, assign=True)
    torch.save(network.state_dict(), tmp_path / "segmentator-best.pth")  # in half precision, to be quick
    found = load_results(tmp_path / "segmentator-best.pth")
    assert found.annotator is None and isinstance(found.segmenter, DeepLabV3)
    mine, theirs = found.segmenter.state_dict(), network.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].to(mine[k].dtype)) for k in mine)
    assert (mine["main_net.backbone.bn1.weight"].dtype == torch.float32
            and mine["main_net.backbone.bn1.num_batches_tracked"].dtype == torch.int64)


def test_generator_pkl_tells_which_generator_and_nothing_else(tmp_path):
    G = official.persistent_module({"w": torch.zeros(3)}, "StyleGAN", "raise SystemExit('executed')")
    path = official.dump(dict(G_kwargs=official.EasyDict(class_name="networks.StyleGAN", ckpt="celeba0.pkl",
                                                         truncation_psi=0.7), G=G), tmp_path / "generator.pkl", 4)
    assert read_generator_kwargs(path) == {"class_name": "networks.StyleGAN", "ckpt": "celeba0.pkl",
                                           "truncation_psi": 0.7}
    with pytest.raises(InputError, match="celeba0.pkl"): load_generator(path)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("outc.weight"), "neither a U-Net"), (lambda s: s.pop("inc.bn1.bias"), "lacks inc.bn1.bias"),
    (lambda s: s.update(more=torch.zeros(1)), "unexpected more"),
    (lambda s: s.update({"outc.bias": torch.zeros(9)}), r"outc.bias \(9,\) instead of \(5,\)"),
    (lambda s: s["up1.conv1.weight"].fill_(float("nan")), "NaN"), (lambda s: s.update(x="text"), "something else")])
def test_a_segmenter_that_does_not_fit_is_told(tmp_path, change, message):
    state = UNet(5, width=4, levels=2).state_dict()
    change(state)
    torch.save(state, tmp_path / "s.pth")
    with pytest.raises(InputError, match=message): load_results(tmp_path / "s.pth")


# ---- other files


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"<!DOCTYPE html><html>Sign in</html>", "web page"), (b"  <html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    (b"\x93NUMPY\x01\x00", "avg_latent"), (b"\x89HDF\r\n", "HDF5"), (b"\x1f\x8b\x08" + b"x" * 99, "unpack"),
    (b"a" * 257 + b"ustar", "tar archive"), (b"\x89PNG\r\n", "picture"),
    (b"\0" * 5000, "zeros"), (b'{"error": "quota"}', "JSON"), (b"PK\x03\x04" + b"x" * 50, "table of contents"),
    (b"random words", "known here"), (b"\x80\x04}.", "empty dict"), (b"\x80\x04K\x01.", "a int")])
def test_files_of_another_kind_are_named(tmp_path, content, message):
    path = tmp_path / "download.pkl"
    path.write_bytes(content)
    for load in (load_generator, load_results):
        if load is load_results and message in ("empty dict", "a int"): continue
        with pytest.raises(InputError, match="download.pkl") as caught: load(path)
        assert message in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("state, message", [
    ({"synthesis.input.freqs": 1, "mapping.w_avg": 1}, "StyleGAN3"), ({"layer1.0.conv1.weight": 1}, "classifier"),
    ({"input_blocks.0.weight": 1}, "diffusion"),
    ({"lateral0.weight": 1}, "annotator"), ({"synthesis.b4.const": 1}, "without the arguments"),
    ({"state_dict": 1}, "some other program"), ({"zebra": 1}, "zebra")])
def test_networks_of_another_kind_are_named(tmp_path, state, message):
    torch.save({name: torch.zeros(2) for name in state}, tmp_path / "g.pt")
    with pytest.raises(InputError, match=message): load_generator(tmp_path / "g.pt")


def test_a_stylegan3_pickle_without_arguments_is_named(tmp_path):
    module = official.persistent_module({"mapping.w_avg": torch.zeros(3), "synthesis.input.freqs": torch.zeros(3),
                                         "synthesis.L0_36_512.weight": torch.zeros(3)}, "Generator", "", _init_args=(),
                                        _init_kwargs={})
    with pytest.raises(InputError, match="arguments lack img_resolution"):
        load_generator(official.dump(dict(G_ema=module), tmp_path / "g.pkl", 4))


def test_missing_files_and_folders(tmp_path):
    for load in (load_generator, load_results):
        with pytest.raises(InputError, match="no such file"): load(tmp_path / "none.pkl")
    with pytest.raises(InputError, match="folder"): load_generator(tmp_path)


@pytest.mark.parametrize("header", [[], {"kind": "generator", "format_version": 1, "network": "StyleGAN2"},
                                    {"kind": "generator", "format_version": 1, "network": [], "init_kwargs": {}},
                                    {"kind": "generator", "format_version": 1, "network": "StyleGAN2",
                                     "init_kwargs": {"img_resolution": "big"}},
                                    {"kind": "generator", "format_version": 1, "network": "StyleGAN1",
                                     "init_kwargs": {"resolution": 2**40}}])
def test_nonsense_in_a_header_of_ours(tmp_path, header):
    save_tensors(tmp_path / "g.safetensors", {"a": torch.zeros(2)}, header)
    with pytest.raises(InputError, match="g.safetensors"): load_generator(tmp_path / "g.safetensors")


# ---- memory


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    """A process that loads the 1024 network of full width (120 MB) stays below 2.5 times the file's size above what it
    had before.
    """
    if not Path("/proc/self/status").exists(): pytest.skip("needs /proc")
    torch.manual_seed(0)
    network = StyleGAN2(1024, channel_base=32768)
    pickled = official.dump(dict(G_ema=official.persistent_module(network.state_dict(), "Generator", "", _init_args=(),
                                                                  _init_kwargs=network.init_kwargs())),
                            tmp_path / "g.pkl", 4)
    torch.save({"g_ema": official.rosinality_state(network), "latent_avg": network.mapping.w_avg}, tmp_path / "g.pt")
    code = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import lagm.generators.formats
from lagm.generators.load import load_generator
def kilobytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])
before = kilobytes("VmRSS")
G = load_generator(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024 / Path(sys.argv[1]).stat().st_size)"""
    for path in (pickled, tmp_path / "g.pt"):
        done = nursery.run([sys.executable, "-c", code, path])
        assert not done.returncode, done.stderr
        ratio = float(done.stdout)
        print(path.name, round(ratio, 2))
        assert ratio < 2.5, f"{path.name}: {ratio:.2f} times the file's size"
