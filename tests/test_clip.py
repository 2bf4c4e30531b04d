"""Generated pictures reach the segmenter and the matching as the generator gives them; clipping is a choice that has a
name.
"""

import dataclasses

import torch
import torch.nn.functional as F

from lagm.core.seeds import random_generator
from lagm.data.augment import Augment, recolour
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.load import load_generator
from lagm.generators.stylegan2 import StyleGAN2
from lagm.models.annotator import FPNAnnotator
from lagm.models.segmenters import UNet
from lagm.training.batches import SyntheticBatches
from lagm.training.datasetgan import label_generated
from lagm.training.lagm import train_lagm
from lagm.training.recipe import FAST, PAPER
from lagm.training.synthetic import Plan, make_pair
from lagm.training.teachers import train_self_training

CLASSES = 3


def loud_generator() -> FrozenGenerator:
    """A small generator with random weights, a third of whose values lie outside [-1, 1]."""
    torch.manual_seed(3)
    network = StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=128, channel_max=8)
    network.synthesis.b16.torgb.bias.data += torch.tensor([1.0, 0.0, -1.0])
    return FrozenGenerator(network, Sampling(psi=1.0, cutoff=None, noise="const"))


def new_networks(generator) -> tuple[FPNAnnotator, UNet]:
    torch.manual_seed(0)
    return FPNAnnotator(generator.feature_channels, CLASSES, channels=8), UNet(CLASSES, width=8, levels=2)


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1, torch.randint(CLASSES, (2, 16, 16), generator=rng)


def test_the_kits_own_generator_hands_out_values_beyond_1():
    generator = load_generator(sampling=Sampling(psi=1.0, cutoff=None, noise="const"))
    z = generator.sample_z(8, torch.Generator().manual_seed(0))
    with torch.no_grad(): raw = generator.network(z, 1.0, None, "const").image
    image = generator(z).image
    assert raw.abs().max() > 1.2 and 0.01 < (raw.abs() > 1).float().mean() < 0.2
    assert (image - raw).abs().max() < 1e-4 and image.abs().max() > 1.2


def test_batches_are_raw_unless_clipping_is_asked_for():
    generator = loud_generator()
    raw, clipped = (SyntheticBatches(generator, 4, (16, 16), seed=0, clip=clip)(0).images for clip in (False, True))
    rng = random_generator(0, "synthetic", "match", 0)
    assert torch.equal(raw, generator(generator.sample_z(4, rng), rng).image) and raw.abs().max() > 1
    assert torch.equal(clipped, raw.clamp(-1, 1))
    assert not PAPER.clip and FAST.clip


def gradient_by_hand(generator, clip: bool) -> list[torch.Tensor]:
    """The annotator's gradient in the first step of the paper's recipe, by two backward passes and the formula alone.
    """
    annotator, segmenter = new_networks(generator)
    images, masks = labelled()
    first = [int(i) for i in torch.randperm(2, generator=random_generator(0, "labelled", 0))]
    parameters = list(segmenter.train().parameters())
    target = torch.autograd.grad(F.cross_entropy(segmenter(images[first]), masks[first]), parameters)
    rng = random_generator(0, "synthetic", "match", 0)
    pictures, features = generator(generator.sample_z(2, rng), rng)
    q = annotator.train()(features).softmax(1)
    loss = -(q * F.log_softmax(segmenter(pictures.clamp(-1, 1) if clip else pictures), 1)).sum(1).mean()
    found = torch.autograd.grad(loss, parameters, create_graph=True)
    rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(found, target) if a.ndim > 1]
    distance = sum((1 - F.cosine_similarity(a, b, dim=1, eps=1e-6)).mean() for a, b in rows) / len(parameters)
    return torch.autograd.grad(distance, list(annotator.parameters()))


def relative(a, b) -> float:
    """The norm of the difference of two lists of tensors, relative to the second."""
    return (sum((x - y).square().sum() for x, y in zip(a, b)) / sum(y.square().sum() for y in b)).sqrt().item()


def test_the_papers_step_sees_the_raw_pictures():
    generator = loud_generator()
    annotator, segmenter = new_networks(generator)
    before = [p.detach().clone() for p in annotator.parameters()]
    train_lagm(generator, annotator, segmenter, *labelled(), dataclasses.replace(PAPER, steps=1, lr_annotator=1.0),
               seed=0, progress=False)
    moved = [old - new.detach() for old, new in zip(before, annotator.parameters())]  # a step of SGD at a rate of 1
    raw, clipped = gradient_by_hand(generator, clip=False), gradient_by_hand(generator, clip=True)
    assert relative(clipped, raw) > 0.1  # the two can be told apart
    assert relative(moved, raw) < 1e-3


def test_a_recipe_that_clips_says_so_to_the_baselines_too():
    generator, seen = loud_generator(), []

    class Spy(UNet):
        def forward(self, x):
            seen.append(x.abs().max().item())
            return super().forward(x)

    for clip in (True, False):
        recipe = dataclasses.replace(FAST, clip=clip, augment=None, steps=1, warm_segmenter=1, balance=0.0)
        torch.manual_seed(0)
        seen.clear()
        train_self_training(Spy(CLASSES, width=8, levels=2), generator, *labelled(), recipe=recipe, seed=0,
                            progress=False)
        assert (max(seen) <= 1) == clip


def test_recolouring_clips_unless_told_not_to():
    twice = 2 * torch.eye(3)[None]
    light = torch.full((1, 3, 1, 1), 0.8)  # x -> 2 (x + 1) - 1
    assert torch.allclose(recolour(light, twice, clip=False), torch.tensor(2.6))
    assert recolour(light, twice).max() == 1
    bright = Augment(brightness=(2.0, 2.0), clip=False).draw(light, torch.Generator().manual_seed(0))
    assert bright.pictures(light).max() > 2


def test_what_is_saved_or_shown_to_a_person_is_clipped():
    generator = loud_generator()
    annotator, person = new_networks(generator)
    pictures, _, _ = label_generated(generator, person, 2)
    assert pictures.abs().max() == 1
    pair = make_pair(generator, [annotator.eval()], 0, Plan(n=1, seed=0))
    rng = random_generator(0, "synthetic dataset", 0)
    raw = generator(generator.sample_z(1, rng), rng).image[0]
    assert raw.max() > 1 and pair.image[raw >= 1].eq(255).all() and pair.image[raw <= -1].eq(0).all()
