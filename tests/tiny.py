"""A generator, annotators and labelled pictures of 16 x 16 pixels and three classes, for tests that train."""

import torch

from lagm.data.labels import LabelSet
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.stylegan2 import StyleGAN2
from lagm.models.annotator import FPNAnnotator
from lagm.models.segmenters import UNet

LABELS = LabelSet("three", ("background", "left", "bright"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))


def tiny_generator(seed=0):
    torch.manual_seed(seed)
    return FrozenGenerator(StyleGAN2(16, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8),
                           Sampling(psi=0.9, cutoff=None))


def tiny_annotators(generator, n=1):
    """Not trained, but sharp enough that the labels vary."""
    found = []
    for seed in range(n):
        torch.manual_seed(100 + seed)
        annotator = FPNAnnotator(generator.feature_channels, 3, channels=8, layers=2).eval()
        with torch.no_grad():
            for p in annotator.to_logit[-1].parameters(): p.mul_(20)
        found.append(annotator)
    return found


def tiny_pictures(n=4, size=16, seed=0):
    """Pictures of noise and a bright square, class 2, on a left half, class 1, that is a little darker than the right
    one.
    """
    rng = torch.Generator().manual_seed(seed)
    images, masks = 0.1 * torch.randn(n, 3, size, size, generator=rng), torch.zeros(n, size, size, dtype=torch.int64)
    images[:, :, :, : size // 2] -= 0.5
    masks[:, :, : size // 2] = 1
    for i in range(n):
        y, x = torch.randint(0, size - 5, (2,), generator=rng).tolist()
        images[i, :, y:y + 5, x:x + 5] = 0.9
        masks[i, y:y + 5, x:x + 5] = 2
    return images.clamp(-1, 1), masks


def tiny_segmenter(seed=0, width=4):
    torch.manual_seed(seed)
    return UNet(3, width=width, levels=2)
