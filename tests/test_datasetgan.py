"""DatasetGAN without the memory: the naive form's numbers, training like ten separate networks, the use in a synthetic
dataset.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import LABELS, tiny_generator, tiny_segmenter

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.training.datasetgan import (
    CAR20,
    FeatureStore,
    PixelEnsemble,
    label_generated,
    memory_needed,
    naive_member,
    train_pixels,
)
from lagm.training.shards import generate, select
from lagm.training.synthetic import Plan, make_pair


def some_features(n=2, shapes=((5, 4), (4, 8), (6, 8), (3, 16)), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, s, s, generator=rng) for c, s in shapes]


def stack_naively(features, size):
    up = [F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features]
    return torch.cat(up, 1).movedim(1, -1).flatten(0, 2)


@pytest.mark.parametrize("size", [(16, 16), (32, 24), (16, 10)])
def test_reading_pixels_is_upsampling(size):
    features = some_features()
    store, naive = FeatureStore(features, size), stack_naively(features, size)
    assert torch.allclose(store.read(torch.arange(len(naive))), naive, atol=1e-5)
    places = torch.tensor([3, 3, len(naive) - 1, 0])
    assert torch.allclose(store.read(places), naive[places], atol=1e-5)


def test_half_precision_is_close_and_pictures_can_be_added():
    features = some_features(3)
    store = FeatureStore([f[:1] for f in features], dtype=torch.float16)
    store.add([f[1:] for f in features])
    assert len(store) == 3 and all(m.dtype == torch.float16 for m in store.maps)
    naive = stack_naively(features, (16, 16))
    assert torch.allclose(store.read(torch.arange(len(naive))), naive, atol=4e-3)


@pytest.mark.parametrize("n_classes, widths", [(6, (128, 32)), (34, (256, 128))])
def test_whole_pictures_against_the_naive_form(n_classes, widths):
    torch.manual_seed(0)
    features = some_features()
    ensemble = PixelEnsemble([5, 4, 6, 3], n_classes, members=3)
    for _ in range(3): ensemble(torch.randn(3, 50, 18) * 3 + 1)
    ensemble.eval()
    with torch.no_grad():
        for m in range(3):
            plain = naive_member(ensemble, m).eval()
            assert (plain[0].out_features, plain[3].out_features) == widths
            expected = plain(stack_naively(features, (16, 16))).view(2, 16, 16, -1).movedim(-1, 1)
            assert torch.allclose(ensemble.label_maps(features, m), expected, rtol=1e-4,
                                  atol=1e-5 * expected.abs().max())


def test_training_is_that_of_separate_networks():
    features, masks = some_features(), torch.randint(0, 4, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    masks[0, :5] = 255
    torch.manual_seed(0)
    ensemble = PixelEnsemble([5, 4, 6, 3], 4, members=3, hidden=(8, 6))
    plain = [naive_member(ensemble, m).train() for m in range(3)]
    rows, flat = stack_naively(features, (16, 16)), masks.flatten()
    known = (flat != 255).nonzero()[:, 0]
    for m, network in enumerate(plain):
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for step in range(5):
            drawn = known[torch.randint(len(known), (3 * 16,),
                                        generator=random_generator(7, "pixels", step))].view(3, 16)[m]
            loss = F.cross_entropy(network(rows[drawn]), flat[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    train_pixels(ensemble, FeatureStore(features), masks, steps=5, batch=16, seed=7, progress=False)
    for m, network in enumerate(plain):
        for a, b in zip(naive_member(ensemble, m).state_dict().values(), network.state_dict().values()):
            if a.is_floating_point(): assert torch.allclose(a, b, atol=2e-5)
    assert not ensemble.training


def test_it_learns_what_the_features_say():
    features = some_features(4, seed=3)
    masks = (F.interpolate(features[1], (16, 16), mode="bilinear")[:, 0] > 0).long()
    torch.manual_seed(0)
    trained = train_pixels(PixelEnsemble([5, 4, 6, 3], 2, members=2, hidden=(16, 8)), FeatureStore(features), masks,
                           steps=250, lr=1e-2, progress=False)
    with torch.no_grad(): right = trained.ensemble.label_maps(features, 1).argmax(1).eq(masks).float().mean()
    assert right > 0.95 and trained.losses[-1] < 0.5 * trained.losses[0]


def test_memory_of_car_20():
    need = memory_needed(**CAR20)
    assert sum(CAR20["channels"]) == 5056 and need["naive"] == pytest.approx(16 * 5056 * 512**2 * 4 / 2**30)
    assert need["ours"] < 2 and memory_needed(**CAR20, bytes_each=2)["ours"] == need["ours"] / 2


def test_a_synthetic_dataset_by_majority(tmp_path):
    generator = tiny_generator()
    images, masks, store = label_generated(generator, tiny_segmenter(), 2, seed=5)
    assert images.shape == (2, 3, 16, 16) and masks.shape == (2, 16, 16) and len(store) == 2
    assert label_generated(generator, tiny_segmenter(), 1, seed=5)[0].equal(images[:1])
    ensemble = train_pixels(PixelEnsemble(generator.feature_channels, 3, members=3, hidden=(8, 8)), store, masks,
                            steps=3, progress=False).ensemble
    plan = Plan(n=5, vote="majority", shard_size=3)
    dataset = generate(generator, ensemble.annotators(), tmp_path / "d", plan, LABELS, progress=False)
    pair = make_pair(generator, ensemble.annotators(), 4, plan)
    assert dataset[4][1].equal(pair.label.long()) and len(select(dataset.records, 0.8).indices) == 4
    rng = random_generator(0, "synthetic dataset", 4)
    _, features = generator(generator.sample_z(1, rng), rng)
    with torch.no_grad():
        votes = torch.stack([naive_member(ensemble, m).eval()(stack_naively(features, (16, 16))).argmax(1)
                             for m in range(3)])
    most = votes.mode(0).values
    agreed = (votes == most).sum(0) >= 2
    assert agreed.any() and pair.label.flatten()[agreed].equal(most[agreed].byte())


def test_mistakes():
    features, ensemble = some_features(), PixelEnsemble([5, 4, 6, 3], 3, members=2)
    with pytest.raises(InputError, match="the features need"):
        train_pixels(ensemble, FeatureStore(features), torch.zeros(1, 16, 16, dtype=torch.int64))
    for wrong in (3, 255):
        with pytest.raises(InputError, match=r"0\.\.2"):
            train_pixels(ensemble, FeatureStore(features), torch.full((2, 16, 16), wrong))
    with pytest.raises(InputError, match="its own generator"): ensemble.label_maps(features[:2], 0)
    with pytest.raises(InputError, match="members=0"): PixelEnsemble([3], 2, members=0)
    with pytest.raises(InputError, match="k is 0"): label_generated(tiny_generator(), tiny_segmenter(), 0)
