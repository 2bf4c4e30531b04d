"""A diffusion model as a generator: arithmetic against closed forms, the folder, and stages by parameters."""

import json
import math
import re

import pytest
import torch
import yaml
from sync import ROOT
from templates import run_cells
from torch import nn

from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.experiments.catalogue import Run, missing_inputs
from lagm.experiments.notebooks import experiment_folder, find_experiment
from lagm.experiments.project import Settings, project_generator, settings_text
from lagm.generators.diffusers_folder import _OLD_NAMES, describe_diffusers, is_diffusers
from lagm.generators.diffusion import (
    Diffusing,
    DiffusionGenerator,
    DiffusionNetwork,
    Kept,
    Schedule,
    _Listener,
    ddim_step,
    decoder_blocks,
    kept_pictures,
)
from lagm.generators.load import load_generator
from lagm.models.contracts import Generator
from lagm.training.checkpoints import generator_digest
from lagm.training.drawn import LATENTS, _weights_digest

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
SCHEDULE = Schedule(ALPHAS.float(), steps=lambda n: range(1000 - 1000 // n, -1, -(1000 // n)))


# ---- the arithmetic, without the library


@pytest.mark.parametrize("mean, spread", [(0.0, 1.0), (0.4, 0.25), (-0.3, 0.05)])
def test_a_run_on_a_gaussian_is_known(mean, spread):
    """Data N(m, s): the variance of x_t is v = a s^2 + 1 - a, and the best guess of the noise in it is sqrt(1 - a)
    (x - sqrt(a) m) / v. So a step of DDIM from a to b multiplies the distance of x to its mean by
    (sqrt(ab) s^2 + sqrt((1 - a)(1 - b))) / v.
    """
    z = torch.linspace(-2, 2, 7, dtype=torch.float64)
    x, factor, start, levels = z, 1.0, ALPHAS[950], [*range(950, -1, -50)]
    for t, s in zip(levels, [*levels[1:], None]):
        a, b = ALPHAS[t], ALPHAS[s] if s is not None else torch.ones((), dtype=torch.float64)
        v = a * spread**2 + 1 - a
        x = ddim_step(x, (1 - a).sqrt() * (x - a.sqrt() * mean) / v, a, b)
        factor *= float(((a * b).sqrt() * spread**2 + ((1 - a) * (1 - b)).sqrt()) / v)
    assert torch.allclose(x, mean + factor * (z - start.sqrt() * mean), atol=1e-10)
    # infinitely small steps keep the quantile: the factor is then the ratio of the two spreads
    assert factor == pytest.approx(spread / math.sqrt(float(start) * spread**2 + 1 - float(start)), abs=0.1)


def test_what_the_network_says_may_be_three_things():
    x, clean, noise = torch.randn(3, 2, 4, dtype=torch.float64)
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x, want = a.sqrt() * clean + (1 - a).sqrt() * noise, b.sqrt() * clean + (1 - b).sqrt() * noise
    v = a.sqrt() * noise - (1 - a).sqrt() * clean
    for kind, said in (("epsilon", noise), ("sample", clean), ("v_prediction", v)):
        assert torch.allclose(ddim_step(x, said, a, b, kind), want)
    clipped = b.sqrt() * clean.clamp(-0.5, 0.5) + (1 - b).sqrt() * noise  # the noise stays as it was said
    assert torch.allclose(ddim_step(x, noise, a, b, clip=0.5), clipped)


class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.resnets = scale, nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1)])

    def forward(self, x): return self.resnets[0](nn.functional.interpolate(x, scale_factor=self.scale)).tanh()


class Toy(nn.Module):
    """A decoder of two blocks; it counts the pictures it sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_blocks, self.seen = nn.ModuleList([Block(1), Block(2)]), 0

    def forward(self, x, t):
        self.seen += len(x)
        x = nn.functional.avg_pool2d(x, 2)
        for block in self.up_blocks: x = block(x)
        return x


def toy_generator(**how):
    return DiffusionGenerator(DiffusionNetwork(Toy(), SCHEDULE, 8, Diffusing(**{"steps": 4, "times": (50,)} | how)))


def test_the_contract():
    G = toy_generator()
    z = G.sample_z(3, torch.Generator().manual_seed(0))
    image, features = G(z)
    assert isinstance(G, Generator) and z.shape == (3, 192) and image.shape == (3, 3, 8, 8) and not image.requires_grad
    assert [f.shape[-1] for f in features] == G.feature_sizes == [4, 8] and G.resolution == 8
    with pytest.raises(InputError, match="latents have shape"): G(z[:, :5])
    only = toy_generator(blocks=(0,))  # the finest map has the size of the picture, so that labels have it
    assert [f.shape[-1] for f in only(z).features] == only.feature_sizes == [8]


def test_features_follow_from_the_picture_alone():
    G = toy_generator(times=(50, 150))
    image, features = G(G.sample_z(2))
    noise = G.network.noise
    noisy = ALPHAS[150].float().sqrt() * image + (1 - ALPHAS[150].float()).sqrt() * noise
    with torch.no_grad(): coarse = G.network.unet.up_blocks[0].resnets[0](nn.functional.avg_pool2d(noisy, 2))
    assert torch.allclose(features[0][:, 3:], coarse, atol=1e-5)


def test_choices_change_the_digest_and_what_is_kept():
    choices = {}, dict(steps=5), dict(times=(60,)), dict(blocks=(0,))
    digests = [generator_digest(toy_generator(**how)) for how in choices]
    assert len(set(digests)) == 4
    z = toy_generator().sample_z(1)
    assert toy_generator().name(z) != toy_generator(steps=5).name(z) != toy_generator(pool=5).name(z)
    assert toy_generator().name(z) == toy_generator(times=(60,)).name(z)  # the picture is the same


def test_a_run_is_made_once(tmp_path):
    G = toy_generator(folder=str(tmp_path / "kept"))
    z = G.sample_z(3)
    first = G(z)
    before = G.network.unet.seen
    assert G(z).image.equal(first.image) and G.network.unet.seen - before == 3  # the features, not the run
    other = toy_generator(folder=str(tmp_path / "kept"))  # another process
    before = other.network.unet.seen
    assert other(z).image.equal(first.image) and other.network.unet.seen - before == 3
    (next((tmp_path / "kept").iterdir())).write_bytes(b"broken off")
    assert toy_generator(folder=str(tmp_path / "kept"))(z).image.equal(first.image)


def test_latents_of_a_pool_come_again_in_any_company():
    G, other = toy_generator(pool=12), toy_generator(pool=12, cache=0)
    rng = torch.Generator().manual_seed(0)
    z = torch.cat([G.sample_z(6, rng) for _ in range(5)])
    assert len(z.unique(dim=0)) <= 12
    images = kept_pictures(G, z)
    other.numbers = G.numbers
    for i in (7, 0, 29): assert kept_pictures(other, z[i: i + 1]).equal(images[i: i + 1])
    assert len(G.kept.entries) == 16  # two groups of eight


def test_a_cache_has_an_end(tmp_path):
    kept = Kept(memory=1, folder=tmp_path, most=1)
    for i in range(9): kept.put(str(i), torch.zeros(60_000))
    assert len(kept.entries) == 4 and len([*tmp_path.iterdir()]) == 4


# ---- the folder


def pipeline_folder(path, size=16, betas="squaredcos_cap_v2", **scheduler):
    """A tiny random pipeline, as the library writes it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    made = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_schedule=betas, **scheduler))
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize("scheduler", [
    dict(betas="linear"), dict(prediction_type="v_prediction"), dict(prediction_type="sample"),
    dict(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    dict(timestep_spacing="linspace"), dict(clip_sample=False), dict(steps_offset=1)])
def test_the_run_is_the_librarys(tmp_path, scheduler):
    made = pipeline_folder(tmp_path / "p", **scheduler)
    from diffusers import DDIMScheduler

    G = load_generator(tmp_path / "p", diffusion=dict(steps=7, times=[20]))
    z, theirs = G.sample_z(2, torch.Generator().manual_seed(1)), DDIMScheduler.from_config(made.scheduler.config)
    theirs.set_timesteps(7)
    x = z.view(2, 3, 16, 16)
    with torch.no_grad():
        for t in theirs.timesteps: x = theirs.step(made.unet.eval()(x, t).sample, t, x).prev_sample
    assert (G(z).image - x).abs().max() / x.abs().max() < 1e-4


def test_old_names_of_attention(tmp_path):
    """Well-known checkpoints were written before the library renamed these weights."""
    from safetensors.torch import load_file, save_file

    pipeline_folder(tmp_path / "p")
    path = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    z, new = torch.randn(1, 768), load_file(path)
    before = load_generator(tmp_path / "p", diffusion=dict(steps=2, times=[5]))(z).image
    for old, today in _OLD_NAMES.items():
        new = {name.replace(today, old): value for name, value in new.items()}
    assert any(".query." in name for name in new)
    save_file(new, path, {"format": "pt"})
    assert load_generator(tmp_path / "p", diffusion=dict(steps=2, times=[5]))(z).image.equal(before)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("spoil, words", [
    (lambda p: change(p / "model_index.json", unet=["my_unet", "UNet2DModel"]), "names code of its own"),
    (lambda p: (p / "pipeline.py").write_text("raise SystemExit"), "names code of its own .pipeline.py"),
    (lambda p: change(p / "model_index.json", _class_name=["mine", "Pipe"]), "names code of its own"),
    (lambda p: change(p / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]), "conditional on text"),
    (lambda p: change(p / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "latent diffusion model"),
    (lambda p: change(p / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"]), "levels of noise are not"),
    (lambda p: change(p / "unet" / "config.json", num_class_embeds=10), "conditional on a class"),
    (lambda p: change(p / "unet" / "config.json", in_channels=1), "3 are needed"),
    (lambda p: change(p / "unet" / "config.json", sample_size=[16, 32]), "square"),
    (lambda p: change(p / "unet" / "config.json", down_block_types=["Nothing"]), "describes no network"),
    (lambda p: change(p / "unet" / "config.json", block_out_channels=[8, 4000]), "wrong shapes"),
    (lambda p: change(p / "scheduler" / "scheduler_config.json", beta_schedule="steep"), "no levels of noise"),
    (lambda p: change(p / "scheduler" / "scheduler_config.json", thresholding=True), "thresholding"),
    (lambda p: (p / "model_index.json").unlink(), "give the file|part of a pipeline"),
    (lambda p: (p / "model_index.json").write_text("[]"), "no names and values"),
    (lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").rename(p / "unet" / "x.bin"), "as a pickle")])
def test_a_folder_that_cannot_be_used_says_why(tmp_path, spoil, words):
    pipeline_folder(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(InputError, match=words): load_generator(tmp_path / "p")


def test_without_the_library(tmp_path, monkeypatch, capsys):
    pipeline_folder(tmp_path / "p")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert is_diffusers(tmp_path / "p") and describe_diffusers(tmp_path / "p")["resolution"] == 16
    assert main(["inspect", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out
    assert "diffusers DDPMPipeline" in said and "768" in said
    with pytest.raises(InputError, match="needs diffusers: python -m pip install"): load_generator(tmp_path / "p")


def test_what_the_catalogue_and_the_doctor_say(tmp_path):
    pipeline_folder(tmp_path / "p")
    def lacks(**more):
        values = dict(dataset="avatars:big-ears", generator="p") | more
        return missing_inputs(Run("x", "annotate", find_experiment("annotate"), values, tmp_path), tmp_path)

    assert lacks() == []
    assert "there is no" in lacks(diffusion=dict(step=3))[0] or "step" in lacks(diffusion=dict(step=3))[0]
    change(tmp_path / "p" / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert "latent diffusion model" in lacks()[0]


def test_the_doctor_examines_a_folder(tmp_path, capsys, monkeypatch):
    pipeline_folder(tmp_path / "p")
    assert main(["doctor", str(tmp_path / "p")]) == 0
    told = capsys.readouterr().out
    for words in ("diffusers DDPMPipeline", "16 pixels", "0: 16 × 8 × 8, 1: 16 × 8 × 8, 2: 8 × 16 × 16", "could run",
                  "diffusion: {steps: 20", "licence"):
        assert words in told, told
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["doctor", str(tmp_path / "p")]) == 1 and "diffusers (missing)" in capsys.readouterr().out
    change(tmp_path / "p" / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert main(["doctor", str(tmp_path / "p")]) == 1 and "latent diffusion model" in capsys.readouterr().out


def test_blocks_are_told_as_the_decoder_has_them(tmp_path):
    pipeline_folder(tmp_path / "p")
    network = load_generator(tmp_path / "p").network
    with _Listener(decoder_blocks(network.unet)) as heard, torch.no_grad(): network.say(torch.zeros(1, 3, 16, 16), 0)
    said = [f"{i}: {' × '.join(map(str, maps.shape[1:]))}" for i, maps in enumerate(heard)]
    assert describe_diffusers(tmp_path / "p")["blocks"] == said
    for odd in (dict(block_out_channels=[2**70]), dict(block_out_channels="x"), dict(layers_per_block=10**9)):
        change(tmp_path / "p" / "unet" / "config.json", **odd)
        assert describe_diffusers(tmp_path / "p")["blocks"] == []


def test_a_project_names_steps_and_blocks(tmp_path):
    pipeline_folder(tmp_path / "p")
    settings = Settings(size=16, generator="p", diffusion=dict(steps=3, times=[20], blocks=[1]))
    G = project_generator(tmp_path, Settings(**yaml.safe_load(settings_text(settings))), torch.device("cpu"))
    assert G.how.steps == 3 and G.network.blocks == [1]
    with pytest.raises(InputError, match="project.yaml: diffusion has no field stepps; did you mean steps"):
        Settings(generator="p", diffusion=dict(stepps=3))
    with pytest.raises(InputError, match="which has neither: leave avg_latent and label out"):
        project_generator(tmp_path, Settings(generator="p", generator_class=1), torch.device("cpu"))
    with pytest.raises(InputError, match="the generator is a module: leave diffusion out"):
        project_generator(tmp_path, Settings(generator="{module: a:B}", diffusion=dict(steps=3)), torch.device("cpu"))


def test_pictures_to_label_are_drawn_with_the_runs_steps(tmp_path, capsys):
    pipeline_folder(tmp_path / "p")
    asked = ["generate", str(tmp_path / "p"), "--n", "1", "-o", str(tmp_path / "d"), "--device", "cpu"]
    assert main([*asked, "--diffusion", "{steps: 2}"]) == 0
    assert load_tensors(tmp_path / "d" / LATENTS)[1]["weights"] == _weights_digest(
        load_generator(tmp_path / "p", diffusion=dict(steps=2)))
    assert main([*asked, "--diffusion", "{step: 2}"]) == 2 and "did you mean steps" in capsys.readouterr().err
    assert main([*asked, "--diffusion", "2"]) == 2 and "project.yaml: diffusion" in capsys.readouterr().err


def test_choices_belong_to_diffusion_models(tmp_path):
    pipeline_folder(tmp_path / "p")
    with pytest.raises(InputError, match="leave avg_latent and label out"): load_generator(tmp_path / "p", label=1)
    with pytest.raises(InputError, match="no folder of diffusers"): load_generator("big-ears", diffusion=dict(steps=3))


# ---- the stages


def test_annotate_finish_downstream_and_evaluate_by_parameters(tmp_path):
    pipeline_folder(tmp_path / "p")
    common = dict(dataset="avatars:big-ears", size=[16, 16])
    made = dict(generator=str(tmp_path / "p"), diffusion=dict(steps=2, times=[20], pool=8))
    run_cells(experiment_folder() / "annotate.ipynb", common | made | dict(
        k=2, validation="", width=4, levels=2, channels=4, iterations=1, warm_up=1, out_dir=str(tmp_path / "annotate"),
        changes=dict(batch_labelled=2, batch_synthetic=2)))
    record = json.loads((tmp_path / "annotate" / "metrics.json").read_text())
    assert record["generator"]["format"] == "diffusers DDPMPipeline, UNet2DModel"
    assert "with the finish" in record["summary"][0]
    run_cells(experiment_folder() / "evaluate.ipynb", common | dict(
        networks=str(tmp_path / "annotate" / "results.safetensors"), pictures=2, draws=5, out_dir=str(tmp_path / "e")))
    assert 0 <= json.loads((tmp_path / "e" / "metrics.json").read_text())["metrics"]["segmenter"]["fg_miou"] <= 1


def test_the_experiment_goes_on_where_it_was_stopped(tmp_path):
    small = dict(resolution=8, channels=[8, 8], batch=2, steps=1, times=[50], k=1, compare=[], threads=1, save_every=2)
    losses = {}
    for name, runs in (("whole", [4]), ("stopped", [2, 4])):
        for iterations in runs:
            values = small | dict(iterations=iterations, out_dir=str(tmp_path / name))
            names = run_cells(experiment_folder() / "diffusion.ipynb", values)
            if iterations == 2:  # as a run that was killed leaves it
                asked = json.loads((tmp_path / name / "asked.json").read_text())
                asked["parameters"]["iterations"] = 4
                (tmp_path / name / "asked.json").write_text(json.dumps(asked))
        losses[name] = names["averaged"].state_dict()
    assert all(value.equal(losses["stopped"][key]) for key, value in losses["whole"].items())
    assert load_generator(tmp_path / "whole" / "pipeline", diffusion=dict(steps=1)).resolution == 8


def test_a_comparison_needs_the_size_of_the_gan(tmp_path):
    with pytest.raises(InputError, match=r"the GAN draws 64 pixels: give resolution 64, or compare \[\]"):
        run_cells(experiment_folder() / "diffusion.ipynb", dict(resolution=32, out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["asked.json"]


def test_the_table_of_the_chapter_is_that_of_the_record():
    record = json.loads((ROOT / "outputs/diffusion/metrics.json").read_text(encoding="utf-8"))
    chapter = (ROOT / "nbs/reference/generators/27_diffusion.ipynb").read_text(encoding="utf-8")
    rows = re.findall(r"\| (GAN|diffusion) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", chapter)
    assert {f"{name}, {k}": [matched, finished] for name, k, matched, finished in rows} == {
        name: [f"{100 * value:.1f}" for value in pair] for name, pair in record["beside"].items()}
    full = yaml.safe_load((ROOT / "nbs/experiments/diffusion.yaml").read_text(encoding="utf-8"))
    assert {name: record["parameters"][name] for name in full} == full
