"""Training a generator: the run can be cut anywhere, and it learns."""

import signal
import sys
import time
from dataclasses import asdict, replace

import nursery
import pytest
import torch

from lagm.core.errors import InputError
from lagm.generators.train import (
    Discriminator,
    GANRecipe,
    GANTrainer,
    load_training,
    minibatch_std,
    r1_penalty,
    train_gan,
    training_state,
)

TINY = GANRecipe(images=96, batch=8, resolution=16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=128, channel_max=8,
                 discriminator_channels=(8, 8), r1_interval=4, bfloat16=False)


def pictures(seed=0):
    return torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_r1_penalty_equals_finite_differences():
    torch.manual_seed(0)
    discriminator = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(),
                                        torch.nn.Linear(4 * 36, 1)).double()
    real = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(real.numel(), dtype=torch.float64).view(-1, *real.shape)
        slopes = torch.stack([discriminator(real + step).sum() - discriminator(real - step).sum()
                              for step in steps]) / 2e-5
    assert torch.isclose(r1_penalty(discriminator, real), slopes.square().sum() / len(real), rtol=1e-6)


def test_minibatch_std_looks_at_one_group_only():
    x = torch.randn(8, 3, 4, 4)
    before = minibatch_std(x)
    x[:4] *= 10
    after = minibatch_std(x)
    assert torch.equal(before[4:], after[4:]) and not torch.allclose(before[:4, -1], after[:4, -1])


@pytest.mark.parametrize("name", ["discriminator", "generator"])
def test_the_first_step_goes_against_the_gradient(name):
    """A fused optimiser may take gradients in another memory layout for those of other weights."""
    trainer = GANTrainer(pictures(), replace(TINY, bfloat16=True))
    fake = trainer.generator(torch.randn(8, 8), dtype=torch.bfloat16).image
    network = {"discriminator": trainer.discriminator, "generator": trainer.generator}[name]
    parameters = [p for p in network.parameters()]
    loss = trainer.discriminator(fake, torch.bfloat16).square().sum()
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    before = [p.detach().clone() for p in parameters]
    trainer._update(name, loss, parameters)
    for parameter, old, gradient in zip(parameters, before, gradients):
        moved = gradient.abs() > 1e-4 * gradient.abs().max()
        assert torch.equal((parameter.detach() - old).sign()[moved], -gradient.sign()[moved])


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from lagm.generators.train import GANRecipe, train_gan\n"
        f"recipe = GANRecipe(**{asdict(TINY)!r})\n"
        "real = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))\n"
        "train_gan(real, recipe, sys.argv[1], save_every=8, grid_every=96, progress=False)\n")
    assert nursery.run([sys.executable, "-c", code, tmp_path / "whole"]).returncode == 0
    process = nursery.start([sys.executable, "-c", code, tmp_path / "cut"])
    while not (tmp_path / "cut" / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert nursery.run([sys.executable, "-c", code, tmp_path / "cut"]).returncode == 0
    whole, cut = GANTrainer(pictures(), TINY), GANTrainer(pictures(), TINY)
    load_training(whole, tmp_path / "whole" / "state.safetensors")
    load_training(cut, tmp_path / "cut" / "state.safetensors")
    assert whole.finished and cut.finished
    assert all(torch.equal(tensor, training_state(cut)[name]) for name, tensor in training_state(whole).items())
    assert not list((tmp_path / "cut").glob(".*"))


def test_another_recipe_is_not_continued_silently(tmp_path):
    train_gan(pictures(), replace(TINY, images=8), tmp_path, progress=False)
    with pytest.raises(InputError, match="learning_rate"):
        train_gan(pictures(), replace(TINY, images=8, learning_rate=0.1), tmp_path, progress=False)


def test_it_learns_a_single_colour():
    red = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    red[:, 0] = 255
    trainer = GANTrainer(red, replace(TINY, images=800, r1_gamma=0.1))
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def error():
        with torch.no_grad():
            return (trainer.average(z).image - (red[:1].float() / 127.5 - 1)).abs().mean().item()

    before = error()
    while not trainer.finished:
        trainer.step()
    assert error() < 0.8 * before


def test_wrong_pictures_are_refused():
    with pytest.raises(InputError, match="uint8"):
        GANTrainer(torch.rand(8, 3, 16, 16), TINY)
    with pytest.raises(InputError, match="power of two"):
        Discriminator(48)
