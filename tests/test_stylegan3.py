"""StyleGAN3 against a slow implementation in double precision, written here from the paper's equations; its files.

No line of NVIDIA's program is used, in the kit or here.
"""

import math

import numpy as np
import official_files as official
import pytest
import torch
from filling import relative_error
from test_checkpoints import same_pictures

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import save_tensors
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator
from lagm.generators.stylegan3 import (
    Design,
    FourierInput,
    Signal,
    StyleGAN3,
    balanced_conv2d,
    layer_signals,
    rotation_design,
)
from lagm.generators.stylegan3_filters import filtered_leaky_relu, kaiser_beta, lowpass_filter, resample
from lagm.generators.weights import save_generator
from lagm.models.convert import convert, inspect

SMALL = dict(img_resolution=32, z_dim=6, w_dim=5, channel_base=128, channel_max=6, num_layers=5, mapping_layers=2)
ROTATION = dict(conv_kernel=1, use_radial_filters=True)


def small(**change) -> StyleGAN3:
    """A network whose parameters are all random, its magnitudes too."""
    torch.manual_seed(0)
    network = StyleGAN3(**{**SMALL, **change})
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("bias", "w_avg", "input.affine.weight")): tensor += 0.3 * torch.randn_like(tensor)
            if name.endswith("magnitude_ema"): tensor.copy_(torch.rand([]) + 0.5)
    return network.eval()


# ---- the slow implementation


def slow_filter(taps, cutoff, half_width, rate, radial=False):
    """As a two-dimensional array; [[1]] for no filter. The Bessel function by its integral."""
    if taps == 1: return np.ones((1, 1))
    decibels = 2.285 * (taps - 1) * math.pi * (2 * half_width) / (rate / 2) + 7.95
    beta = (0.1102 * (decibels - 8.7) if decibels > 50 else
            0.5842 * (decibels - 21) ** 0.4 + 0.07886 * (decibels - 21) if decibels > 21 else 0.0)
    middle = (taps - 1) / 2
    window = np.array([np.i0(beta * math.sqrt(1 - ((i - middle) / middle) ** 2)) / np.i0(beta) for i in range(taps)])
    found = np.zeros((taps, taps))
    for i in range(taps):
        for j in range(taps):
            y, x = (i - middle) / rate, (j - middle) / rate
            if radial:
                angles, r = (np.arange(4000) + 0.5) / 4000 * math.pi, math.hypot(x, y)
                argument = 2 * math.pi * cutoff * r
                found[i, j] = np.cos(angles - argument * np.sin(angles)).mean() / (math.pi * r)  # J1 / (pi r)
            else: found[i, j] = np.sinc(2 * cutoff * x) * np.sinc(2 * cutoff * y)
            found[i, j] *= window[i] * window[j]
    return found / found.sum()


def slow_resample(x, kernel, up, down, low, high, gain):
    """Zeros, padding or cropping, convolution, every so many samples one: (C, H, W)."""
    channels, height, width = x.shape
    wide = np.zeros((channels, height * up, width * up))
    wide[:, ::up, ::up] = x
    padded = np.zeros((channels, height * up + low + high, width * up + low + high))
    for i in range(wide.shape[1]):
        for j in range(wide.shape[2]):
            if 0 <= i + low < padded.shape[1] and 0 <= j + low < padded.shape[2]:
                padded[:, i + low, j + low] = wide[:, i, j]
    taps = len(kernel)
    out = np.zeros((channels, padded.shape[1] - taps + 1, padded.shape[2] - taps + 1))
    for a in range(taps):
        for b in range(taps):
            part = padded[:, taps - 1 - a : taps - 1 - a + out.shape[1], taps - 1 - b : taps - 1 - b + out.shape[2]]
            out += gain * kernel[a, b] * part
    return out[:, ::down, ::down]


def slow_conv(x, weight, styles, demodulate, gain):
    """A modulated convolution with full padding by loops: (I, H, W) -> (O, H + k - 1, W + k - 1)."""
    if demodulate:
        weight = weight / np.sqrt((weight**2).mean(axis=(1, 2, 3), keepdims=True))
        styles = styles / np.sqrt((styles**2).mean())
    weight = weight * styles[None, :, None, None]
    if demodulate: weight = weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    weight, side = weight * gain, weight.shape[-1]
    padded = np.pad(x, ((0, 0), (side - 1, side - 1), (side - 1, side - 1)))
    out = np.zeros((len(weight), x.shape[1] + side - 1, x.shape[2] + side - 1))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            out[:, i, j] = (weight * padded[None, :, i : i + side, j : j + side]).sum(axis=(1, 2, 3))
    return out


def slow_waves(state, w, rate, size, cutoff):
    """The Fourier features of one style vector, pixel by pixel."""
    t = state["affine.weight"] @ w / math.sqrt(len(w)) + state["affine.bias"]
    c, s, tx, ty = t / math.hypot(t[0], t[1])
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, -tx], [0, 1, -ty], [0, 0, 1]])
    matrix = matrix @ state["transform"]
    channels = len(state["freqs"])
    waves = np.zeros((channels, size, size))
    for k in range(channels):
        frequency, phase = state["freqs"][k] @ matrix[:2, :2], state["phases"][k] + state["freqs"][k] @ matrix[:2, 2]
        strength = min(max(1 - (math.hypot(*frequency) - cutoff) / (rate / 2 - cutoff), 0), 1)
        for i in range(size):
            for j in range(size):
                x, y = (j + 0.5 - size / 2) / rate, (i + 0.5 - size / 2) / rate
                waves[k, i, j] = strength * math.sin(2 * math.pi * (frequency[0] * x + frequency[1] * y + phase))
    return np.einsum("oc,chw->ohw", state["weight"] / math.sqrt(channels), waves)


def slow_schedule(resolution, design):
    """Cutoff, half-width, rate and size of every layer, one after the other."""
    found, steps = [], design.num_layers - design.num_critical
    for i in range(design.num_layers + 1):
        t = min(i / steps, 1)
        cutoff = design.first_cutoff * (resolution / 2 / design.first_cutoff) ** t
        last = resolution / 2 * design.last_stopband_rel
        stop = design.first_stopband * (last / design.first_stopband) ** t
        rate = 2 ** math.ceil(math.log2(min(2 * stop, resolution)))
        size = resolution if i >= design.num_layers - 1 else rate + 2 * design.margin_size
        found.append((cutoff, max(stop, rate / 2) - cutoff, rate, size))
    return found


def slow_network(network, z, psi, cutoff):
    """Picture and all layers of one latent, in double precision: only numbers are taken from the network."""
    state = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    part = lambda prefix: {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}  # noqa: E731
    x = z / math.sqrt((z**2).mean() + 1e-8)
    for i in range(2):
        weight = state[f"mapping.fc{i}.weight"]
        x = weight @ x * (0.01 / math.sqrt(weight.shape[1])) + state[f"mapping.fc{i}.bias"] * 0.01
        x = np.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    design, mean = network.design, state["mapping.w_avg"]
    ws = [mean + psi * (x - mean) if i < cutoff else x for i in range(design.num_layers + 2)]
    plan, maps, most = slow_schedule(network.img_resolution, design), [], design.conv_clamp or np.inf
    before = plan[0]
    x = slow_waves(part("synthesis.input."), ws[0], before[2], before[3], before[0])
    for i, after in enumerate(plan):
        torgb = i == design.num_layers
        layer = part(f"synthesis.{network.synthesis.layer_names[i]}.")
        styles = layer["affine.weight"] @ ws[i + 1] / math.sqrt(len(ws[0])) + layer["affine.bias"]
        if torgb: styles = styles / math.sqrt(layer["weight"][0].size)
        x = slow_conv(x, layer["weight"], styles, not torgb, 1 / math.sqrt(layer["magnitude_ema"]))
        x = x + layer["bias"][:, None, None]
        if torgb: x = x.clip(-most, most)
        else:
            fine = max(before[2], after[2]) * design.lrelu_upsampling
            up, down = fine // before[2], fine // after[2]
            radial = design.use_radial_filters and i < design.num_layers - design.num_critical
            first = slow_filter(6 * up if up > 1 else 1, before[0], before[1], fine)
            second = slow_filter(6 * down if down > 1 else 1, after[0], after[1], fine, radial)
            total = (after[3] - 1) * down + 1 - x.shape[1] * up + len(first) + len(second) - 2
            low = (total + up) // 2
            x = slow_resample(x, first, up, 1, low, total - low, up**2)
            x = (np.where(x > 0, x, 0.2 * x) * math.sqrt(2)).clip(-most, most)
            x = slow_resample(x, second, 1, down, 0, 0, 1)
        maps.append(x)
        before = after
    return x * design.output_scale, maps


@pytest.mark.parametrize("change", [{}, ROTATION, {"conv_clamp": 0.7, "lrelu_upsampling": 4, "num_critical": 1},
                                    {"img_resolution": 16, "margin_size": 3, "conv_clamp": None}],
                         ids=["T", "R", "clamped", "16 pixels"])
def test_the_network_is_that_of_the_equations(change):
    network = small(**change)
    z = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad(): image, features = network(z.float(), 0.6, 3)
    assert len(features) == len(network.feature_names) == len(network.feature_shapes)
    for i in range(2 if not change else 1):
        expected, maps = slow_network(network, z[i].numpy(), 0.6, 3)
        assert relative_error(image[i], torch.from_numpy(expected)) < 2e-5
        for name, feature in zip(network.feature_names, features):
            wide = maps[network.synthesis.layer_names.index(name)]
            margin = (wide.shape[-1] - feature.shape[-1]) // 2
            expected = wide[:, margin:-margin, margin:-margin] if margin else wide
            assert relative_error(feature[i], torch.from_numpy(expected.copy())) < 2e-5


# ---- one operator after the other


@pytest.mark.parametrize("taps, cutoff, half, rate", [(12, 2, 6.0, 32), (24, 16, 9.3, 128), (12, 128, 29.6, 512)])
def test_filters_are_scipys(taps, cutoff, half, rate):
    signal, special = pytest.importorskip("scipy.signal"), pytest.importorskip("scipy.special")
    beta = signal.kaiser_beta(signal.kaiser_atten(taps, 2 * half / (rate / 2)))
    assert abs(kaiser_beta(taps, 4 * half / rate) - beta) < 1e-12
    row = lowpass_filter(taps, cutoff, half, rate)
    assert np.abs(row.numpy() - signal.firwin(taps, cutoff, width=2 * half, fs=rate)).max() < 1e-7
    x = (np.arange(taps) - (taps - 1) / 2) / rate
    r = np.hypot(x[:, None], x[None, :])
    jinc = special.j1(2 * math.pi * cutoff * r) / r * np.outer(*[np.kaiser(taps, beta)] * 2)
    assert np.abs(lowpass_filter(taps, cutoff, half, rate, radial=True).numpy() - jinc / jinc.sum()).max() < 1e-7


@pytest.mark.parametrize("radial", [False, True])
def test_filters_are_those_of_the_equations(radial):
    ours, expected = lowpass_filter(12, 5, 3, 64, radial=radial), slow_filter(12, 5, 3, 64, radial)
    ours = ours.double() if radial else torch.outer(ours, ours).double()
    assert np.abs(ours.numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("up, down, padding, taps", [(1, 2, (3, 2), 4), (4, 1, (7, 9), 8), (2, 2, (-3, 5), 6),
                                                      (2, 4, (0, -1), 5), (1, 1, (0, 0), 1)])
def test_resampling(up, down, padding, taps):
    torch.manual_seed(0)
    x, row, square = torch.randn(1, 3, 9, 9), torch.randn(taps), torch.randn(taps, taps)
    for kernel, whole in ((row, torch.outer(row, row)), (square, square)):
        expected = slow_resample(x[0].double().numpy(), whole.double().numpy(), up, down, *padding, up**2)
        assert relative_error(resample(x, kernel, up, down, padding, up**2)[0],
                              torch.from_numpy(expected.copy())) < 1e-5
    expected = slow_resample(x[0].double().numpy(), np.ones((1, 1)), up, down, *padding, 1.0)
    assert torch.allclose(resample(x, None, up, down, padding)[0].double(), torch.from_numpy(expected.copy()))


def test_the_filtered_relu_clamps_on_the_fine_grid():
    torch.manual_seed(0)
    x, bias, row = torch.randn(1, 2, 8, 8), torch.tensor([0.5, -0.5]), lowpass_filter(12, 3, 2, 16)
    ours = filtered_leaky_relu(x, bias, row, row, 2, 2, (12, 11), clamp=0.4)
    fine = slow_resample((x + bias[:, None, None])[0].double().numpy(), torch.outer(row, row).double().numpy(), 2, 1,
                         12,
                         11, 4)
    fine = (np.where(fine > 0, fine, 0.2 * fine) * math.sqrt(2)).clip(-0.4, 0.4)
    expected = slow_resample(fine, torch.outer(row, row).double().numpy(), 1, 2, 0, 0, 1)
    assert relative_error(ours[0], torch.from_numpy(expected.copy())) < 1e-5


@pytest.mark.parametrize("demodulate", [True, False])
def test_the_modulated_convolution(demodulate):
    torch.manual_seed(0)
    x, weight, styles = torch.randn(2, 3, 5, 5), 7 * torch.randn(4, 3, 3, 3), torch.randn(2, 3)
    ours = balanced_conv2d(x, weight, styles, demodulate, torch.tensor(0.3))
    for i in range(2):
        expected = slow_conv(x[i].double().numpy(), weight.double().numpy(), styles[i].double().numpy(), demodulate,
                             0.3)
        assert relative_error(ours[i], torch.from_numpy(expected)) < 1e-5
    alone = balanced_conv2d(x[:1], weight, styles[:1], demodulate, torch.tensor(0.3))
    assert torch.allclose(ours[:1], alone, atol=1e-6), "a picture does not depend on the others of its batch"


def test_fourier_features_with_a_motion_of_the_user():
    torch.manual_seed(0)
    layer = FourierInput(5, Signal(2.0, 6.0, 16, 36, 4)).requires_grad_(False)
    layer.affine.weight.normal_()
    layer.transform.copy_(torch.tensor([[3.0, -1.5, 0.2], [1.5, 3.0, -0.1], [0, 0, 1]]))  # waves beyond the cutoff fade
    w = torch.randn(2, 5)
    state = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    for i in range(2):
        expected = slow_waves(state, w[i].double().numpy(), 16, 36, 2.0)
        assert relative_error(layer(w)[i], torch.from_numpy(expected)) < 1e-5
    layer.transform.copy_(100 * torch.eye(3))
    assert layer(w).abs().max() == 0


def test_the_schedule_of_the_released_networks():
    """The names of the layers of NVIDIA's checkpoints, T at 1024 and R at 256 pixels, say sizes and channels."""
    def names(signals): return [f"L{i}_{s.size}_{s.channels}" for i, s in enumerate(signals)]

    assert names(layer_signals(1024, 3, Design())) == [
        "L0_36_512", "L1_36_512", "L2_52_512", "L3_52_512", "L4_84_512", "L5_148_512", "L6_148_512", "L7_276_323",
        "L8_276_203", "L9_532_128", "L10_1044_81", "L11_1044_51", "L12_1044_32", "L13_1024_32", "L14_1024_3"]
    assert names(layer_signals(256, 3, rotation_design(channel_base=32768))) == [
        "L0_36_1024", "L1_36_1024", "L2_36_1024", "L3_52_1024", "L4_52_1024", "L5_84_1024", "L6_84_1024", "L7_148_724",
        "L8_148_512", "L9_148_362", "L10_276_256", "L11_276_181", "L12_276_128", "L13_256_128", "L14_256_3"]
    for resolution in (16, 32, 64, 128, 256, 512, 1024):
        with torch.device("meta"): network = StyleGAN3(resolution, channel_base=4096)
        plan = slow_schedule(resolution, network.design)
        for ours, (cutoff, half, rate, size) in zip(layer_signals(resolution, 3, network.design), plan):
            assert math.isclose(ours.cutoff, cutoff) and math.isclose(ours.half_width, half)
            assert (ours.rate, ours.size) == (rate, size)
        assert network.feature_shapes[-1][1:] == (resolution, resolution)
        assert [s for _, s, _ in network.feature_shapes] == [2**i for i in range(4, resolution.bit_length())]


# ---- what it is for


def settle(network, z):
    """Magnitudes as training would have measured them."""
    def measure(layer, inputs): layer.magnitude_ema.copy_(inputs[0].square().mean())
    hooks = [network.synthesis.get_submodule(name).register_forward_pre_hook(measure)
             for name in network.synthesis.layer_names]
    with torch.no_grad(): network(z)
    for hook in hooks: hook.remove()


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_configuration_t_moves_with_translations(pixels):
    network, z = small(img_resolution=64, channel_base=512, channel_max=16, num_layers=8), torch.randn(2, 6)
    settle(network, z)
    with torch.no_grad():
        still = network(z)
        network.synthesis.input.transform[0, 2] = -pixels / 64
        moved = network(z)
    inside = slice(12, -12)
    for a, b in ((still.image, moved.image), (still.features[-1], moved.features[-1])):
        error = (b[..., inside, 12 + pixels : -12] - a[..., inside, 12 : -12 - pixels]).square().mean().sqrt()
        assert error < 0.01 * a.std(), "40 dB"


# ---- files


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("change", [{}, ROTATION | {"channel_base": 200, "img_channels": 3}], ids=["T", "R"])
def test_nvidias_pickle_is_read_and_nothing_runs(tmp_path, protocol, change):
    network = small(**change)
    path = official.nvidia_stylegan3(tmp_path / "g.pkl", network, protocol, executed=str(tmp_path / "executed"))
    same_pictures(path, network)
    convert(path, tmp_path / "g.safetensors")
    same_pictures(tmp_path / "g.safetensors", network)
    facts = inspect(path)
    assert (facts["format"].endswith("configuration " + ("R" if change else "T"))
            and not (tmp_path / "executed").exists())
    assert facts["generator"]["class"] == "StyleGAN3" and "NVIDIA's licences" in facts["licence"]
    assert facts["generator"]["feature_maps"][-1].endswith("32 × 32")
    assert main(["inspect", str(path)]) == 0


def test_a_file_without_what_it_should_have_is_named(tmp_path):
    network = small()
    state = network.state_dict()
    del state["synthesis.input.freqs"]
    for name, tensors, words in (("lacks.safetensors", state, "lacks synthesis.input.freqs"),
                                 ("wrong.safetensors", network.state_dict(), "num_layers is 0")):
        save_generator(tmp_path / name, network)
        header = load_generator(tmp_path / name).header
        if "wrong" in name: header["init_kwargs"]["num_layers"] = 0
        save_tensors(tmp_path / name, tensors, header)
        with pytest.raises(InputError, match=words): load_generator(tmp_path / name)
    kwargs = network.init_kwargs() | {"margins": 3}
    path = official.nvidia_pytorch(tmp_path / "g.pkl", network, kwargs=kwargs)
    with pytest.raises(InputError, match="unknown generator argument.*margins"): load_generator(path)
    torch.save(network.state_dict(), tmp_path / "g.pt")
    with pytest.raises(InputError, match="without the arguments"): load_generator(tmp_path / "g.pt")


def test_one_class_of_a_conditional_stylegan3(tmp_path):
    network = small(c_dim=3)
    path = official.nvidia_stylegan3(tmp_path / "g.pkl", network)
    z = torch.randn(3, 6)
    with pytest.raises(InputError, match="draws 3 classes: choose one with label="): load_generator(path)
    for label in range(3):
        G = load_generator(path, Sampling(psi=0.7, cutoff=2), label=label)
        one = torch.eye(3)[[label] * 3]
        with torch.no_grad():
            ws = network.mapping(z, one)[:, None].repeat(1, network.num_ws, 1)
            ws[:, :2] = network.mapping.w_avg + 0.7 * (ws[:, :2] - network.mapping.w_avg)
            assert relative_error(G(z).image, network.synthesis(ws).image) < 1e-5
    for wrong in (3, -1, "cat"):
        with pytest.raises(InputError, match="0 to 2"): load_generator(path, label=wrong)
    with pytest.raises(InputError, match="leave label out"):
        load_generator(official.nvidia_stylegan3(tmp_path / "h.pkl", small()), label=0)


def test_half_precision_draws_nearly_the_same():
    network, z = small(), torch.randn(2, 6)
    with torch.no_grad(): full, half = (network(z, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.image.dtype == torch.float32 and relative_error(half.image, full.image) < 0.05
