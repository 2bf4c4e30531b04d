"""Augmentation: pictures and labels move together, and gradients come back the way labels went."""

import pytest
import torch
import torch.nn.functional as F

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.data.augment import (
    OUTSIDE,
    Augment,
    affine_maps,
    colour_matrices,
    recolour,
    resize_nearest,
    warp_images,
    warp_masks,
    wide_crop,
)
from lagm.data.labels import IGNORE


def batch(n=3, height=24, width=32):
    rng = random_generator(0, "test augment")
    return (torch.rand(n, 3, height, width, generator=rng) * 2 - 1,
            torch.randint(0, 5, (n, height, width), generator=rng))


def map_of(turn=0.0, scale=1.0, shift=(0.0, 0.0), mirror=False, aspect=1.0):
    return affine_maps(torch.tensor([turn]), torch.tensor([scale]), torch.tensor([shift]), torch.tensor([mirror]),
                       aspect)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_masks_follow_pictures(outside):
    images, masks = batch()
    change = Augment(outside=outside).draw(images, random_generator(1))
    painted = masks[:, None].expand(-1, 3, -1, -1).float()
    moved = change.labels(masks)
    inside = moved != IGNORE
    assert moved.dtype == torch.int64 and inside.any()
    assert torch.equal(warp_images(painted, change.maps, outside, "nearest")[:, 0][inside], moved[inside].float())
    assert inside.all() == (outside != "ignore")


def test_ignored_pixels_stay_ignored():
    masks = torch.full((1, 8, 8), IGNORE)
    assert (warp_masks(masks, map_of(turn=20.0, scale=0.7)) == IGNORE).all()


def test_rotation_does_not_shear_a_wide_picture():
    """A quarter turn of a 16 x 32 picture moves a point 5 to the right of the centre to 5 above it."""
    picture = torch.zeros(1, 1, 17, 33)
    picture[0, 0, 8, 21] = 1
    turned = warp_images(picture, map_of(turn=90.0, aspect=33 / 17), "border")
    assert divmod(turned.argmax().item(), 33) == (3, 16)


def test_identity():
    images, masks = batch()
    augment = Augment(flip=False, scale=(1, 1), rotate=0, shift=0, hue=0, saturation=(1, 1), brightness=(1, 1))
    same, kept = augment(images, masks, random_generator(2))
    assert torch.allclose(same, images, atol=1e-5) and torch.equal(kept, masks)


def test_soft_labels_stay_probabilities_and_give_gradients():
    images, masks = batch()
    q = F.one_hot(masks, 5).movedim(-1, 1).float().requires_grad_()
    change = Augment().draw(images, random_generator(3))
    moved = change.labels(q)
    assert torch.allclose(moved.sum(1), torch.ones(()), atol=1e-5)
    assert torch.autograd.gradcheck(lambda t: change.labels(t),
                                    torch.rand(3, 2, 6, 8, dtype=torch.double, requires_grad=True))
    moved.square().sum().backward()
    assert q.grad.abs().sum() > 0


def test_soft_labels_outside_are_nobodys():
    q = torch.full((1, 4, 16, 16), 0.25)
    moved = Augment(scale=(0.5, 0.5), shift=0, outside="ignore").draw(q, random_generator(4))
    assert 0.6 < (moved.labels(q).sum(1) < 1e-6).float().mean() < 0.9


def test_grey_is_not_coloured_and_a_full_turn_is_none():
    images, _ = batch()
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    turned = recolour(grey, colour_matrices(torch.tensor([10.0, 90.0, -170.0]), torch.tensor([0.5, 1.0, 1.5]),
                                            torch.ones(3)))
    assert torch.allclose(turned, grey, atol=1e-6)
    assert torch.allclose(recolour(images, colour_matrices(torch.full((3,), 360.0), torch.ones(3), torch.ones(3))),
                          images, atol=1e-5)


def test_brightness_scales_the_distance_from_black():
    white = torch.ones(1, 3, 1, 1)
    assert torch.allclose(recolour(white, colour_matrices(torch.zeros(1), torch.ones(1), torch.tensor([0.75]))),
                          torch.tensor(0.5))


def test_draws_repeat_and_differ():
    images, masks = batch()
    first, _ = Augment()(images, masks, random_generator(5))
    again, _ = Augment()(images, masks, random_generator(5))
    other, _ = Augment()(images, masks, random_generator(6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_range_takes_as_many_numbers():
    images, _ = batch()
    after = []
    for augment in (Augment(), Augment(flip=False, rotate=0.0, hue=0.0)):
        rng = random_generator(7)
        augment.draw(images, rng)
        after.append(torch.rand(1, generator=rng).item())
    assert after[0] == after[1]


@pytest.mark.parametrize("wrong", [dict(scale=(1.3, 0.7)), dict(scale=(0.0, 1.0)), dict(brightness=(-1.0, 1.0)),
                                   dict(outside="mirror"), dict(soft_labels="cubic")])
def test_wrong_ranges_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))): Augment(**wrong)


def test_wide_crop_and_nearest_resize():
    picture = torch.arange(64.0).reshape(1, 1, 8, 8)
    band = wide_crop(picture)
    assert torch.equal(band, picture[:, :, 1:7])
    assert torch.equal(wide_crop(band), band)
    assert torch.equal(resize_nearest(picture, (4, 4)), picture[:, :, ::2, ::2])
    masks = picture[0].long()
    assert torch.equal(resize_nearest(masks, (4, 4)), masks[:, ::2, ::2]) and resize_nearest(masks, (8, 8)) is masks
