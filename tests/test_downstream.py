"""Downstream training: the paper's loss and order, resuming to the bit, soft labels and weights, several processes."""

import dataclasses
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from tiny import LABELS, tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter
from torch.utils.data import TensorDataset

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.core.tensors import load_tensors, save_tensors
from lagm.data.augment import Augment
from lagm.models.saved import load_segmenter, save_segmenter
from lagm.models.deeplab import DeepLabV3
from lagm.training.downstream import DownstreamRecipe, change_batch, epoch_batches, pair_loss, train_downstream
from lagm.training.loop import Diverged
from lagm.training.synthetic import GeneratedPairs, Plan

QUICK = DownstreamRecipe(epochs=3, batch=4)


def pairs(n=10):
    return TensorDataset(*tiny_pictures(n))


def weights(network):
    return torch.cat([v.flatten().double() for v in network.state_dict().values()])


def test_the_recipe_is_the_papers():
    recipe = DownstreamRecipe()
    assert (recipe.epochs, recipe.batch, recipe.lr, recipe.schedule, recipe.augment, recipe.precision,
            recipe.keep) == (20, 8, 1e-3, "constant", None, "float32", 20)


def test_a_run_is_a_plain_loop_of_adam():
    images, masks = tiny_pictures(10)
    masks[:, :3] = 255
    expected = tiny_segmenter().train()
    optimizer = torch.optim.Adam(expected.parameters(), 1e-3)
    for epoch in range(3):
        for batch in epoch_batches(10, 4, 5, epoch):
            loss = F.cross_entropy(expected(images[batch]), masks[batch], ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = train_downstream(tiny_segmenter(), TensorDataset(images, masks), QUICK, seed=5, progress=False)
    assert torch.allclose(weights(result.segmenter), weights(expected), atol=1e-6)
    assert ([r["epoch"] for r in result.history] == [1, 2, 3] and not result.segmenter.training
            and not result.checkpoints)


def test_batches():
    epoch = epoch_batches(10, 4, 0, 0)
    assert [len(b) for b in epoch] == [4, 4] and len(set(sum(epoch, []))) == 8 and epoch_batches(10, 4, 0, 1) != epoch
    assert epoch_batches(10, 4, 0, 0) == epoch != epoch_batches(10, 4, 1, 0)
    assert [len(b) for b in epoch_batches(3, 8, 0, 0)] == [3]


def test_soft_labels_and_weights():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    q, w = torch.rand(2, 3, 4, 4).softmax(1), torch.rand(2, 4, 4)
    total, weight = pair_loss(logits, q, w)
    per_pixel = -(q * logits.log_softmax(1)).sum(1)
    assert (total.item() == pytest.approx((per_pixel * w).sum().item(), rel=1e-5)
            and weight.item() == pytest.approx(w.sum().item(), rel=1e-5))
    q[0, :, 0] = 0  # no probability at all: as ignored
    total, weight = pair_loss(logits, q)
    assert (weight == 28 and total.item() == pytest.approx(per_pixel.sum().item() - per_pixel[0, 0].sum().item(),
                                                           rel=1e-5))
    total.backward()
    assert logits.grad[0, :, 0].abs().max() == 0


def test_one_change_for_all_parts_of_a_pair():
    images, masks = tiny_pictures(6)
    soft = F.one_hot(masks, 3).movedim(-1, 1).float()
    rng = lambda: random_generator(0, "x")
    augment = Augment(soft_labels="nearest")
    changed, target, confidence = change_batch(augment, (images, soft, (masks == 2).float()), rng())
    assert target.argmax(1).equal(change_batch(augment, (images, masks), rng())[1])
    assert confidence.equal(target[:, 2])
    assert change_batch(None, (images, masks), rng())[0] is images


@pytest.mark.parametrize("recipe",
                         [QUICK, dataclasses.replace(QUICK, augment=Augment(), schedule="cosine", precision="bfloat16",
                                                     channels_last=True)])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, recipe):
    whole = train_downstream(tiny_segmenter(), pairs(), recipe, folder=tmp_path / "a",
                             validation=tiny_pictures(3, seed=9), progress=False)

    class Stop(Exception): pass

    class Stops(TensorDataset):
        limit, asked = 13, 0
        def __getitem__(self, i):
            Stops.asked += 1
            if Stops.asked > Stops.limit: raise Stop
            return super().__getitem__(i)

    stops = Stops(*pairs().tensors)
    with pytest.raises(Stop):
        train_downstream(tiny_segmenter(), stops, recipe, folder=tmp_path / "b", validation=tiny_pictures(3, seed=9),
                         progress=False)
    assert load_tensors(tmp_path / "b" / "state.safetensors")[1]["epoch"] == 1
    Stops.limit = 10**9
    again = train_downstream(tiny_segmenter(seed=7), stops, recipe, folder=tmp_path / "b",
                             validation=tiny_pictures(3, seed=9), progress=False)
    assert weights(again.segmenter).equal(weights(whole.segmenter)) and again.history == whole.history
    done = train_downstream(tiny_segmenter(seed=8), stops, recipe, folder=tmp_path / "b", progress=False)
    assert weights(done.segmenter).equal(weights(whole.segmenter))


def test_the_last_networks_are_kept_and_can_be_read(tmp_path):
    result = train_downstream(tiny_segmenter(), pairs(), DownstreamRecipe(epochs=4, batch=4, keep=2), folder=tmp_path,
                              labels=LABELS, progress=False)
    assert (
        [p.name for p in result.checkpoints]
        == ["epoch-003.safetensors", "epoch-004.safetensors"]
        == sorted(p.name for p in tmp_path.glob("epoch*"))
    )
    network, header = load_segmenter(result.checkpoints[-1])
    assert (weights(network).equal(weights(result.segmenter)) and header["labels"] == LABELS and header["epoch"] == 4
            and header["size"] == [16, 16])


def test_another_run_is_refused(tmp_path):
    train_downstream(tiny_segmenter(), pairs(), QUICK, folder=tmp_path, progress=False)
    for change, words in ((dict(recipe=dataclasses.replace(QUICK, lr=1)), "recipe.lr"), (dict(seed=1), "seed"),
                          (dict(data=pairs(11)), "data")):
        arguments = dict(data=pairs(), recipe=QUICK, folder=tmp_path, progress=False) | change
        with pytest.raises(InputError, match=words): train_downstream(tiny_segmenter(), **arguments)
    with pytest.raises(InputError, match="network"):
        train_downstream(tiny_segmenter(width=8), pairs(), QUICK, folder=tmp_path, progress=False)


def test_it_learns():
    validation = tiny_pictures(20, seed=3)
    result = train_downstream(tiny_segmenter(width=8), pairs(16), DownstreamRecipe(epochs=25, batch=8, lr=1e-2),
                              validation=validation, progress=False)
    assert result.history[-1]["validation"]["fg_miou"] > 0.85 > 0.5 > result.history[0]["validation"]["fg_miou"]


def test_pictures_on_the_fly_change_every_epoch():
    generator = tiny_generator()
    data, seen = GeneratedPairs(generator, tiny_annotators(generator), Plan(n=4), soft=True, confidence=True), []
    whole = GeneratedPairs.__getitem__

    class Spy(GeneratedPairs):
        def __getitem__(self, i):
            seen.append(self.epoch * self.plan.n + i)
            return whole(self, i)

    data.__class__ = Spy
    result = train_downstream(tiny_segmenter(), data, DownstreamRecipe(epochs=2, batch=2), progress=False)
    assert sorted(seen[-8:]) == list(range(8)) and len(result.history) == 2


@pytest.mark.skipif(not importlib.util.find_spec("lightning_fabric"), reason="needs the extra 'fabric'")
def test_two_processes_give_what_one_gives(tmp_path):
    """With batch norm at rest, as each process would otherwise use the statistics of its own pictures."""
    masks = tiny_pictures(8)[1]
    masks[::3, :9] = 255  # the processes have different numbers of labelled pixels
    data = TensorDataset(tiny_pictures(8)[0], masks)
    recipe = DownstreamRecipe(epochs=2, batch=4, augment=Augment())
    one = train_downstream(Resting(tiny_segmenter()), data, recipe, folder=tmp_path / "one", progress=False)
    two = train_downstream(Resting(tiny_segmenter()), data, recipe, folder=tmp_path / "two", processes=2,
                           validation=tiny_pictures(2), progress=False)
    assert torch.allclose(weights(two.segmenter), weights(one.segmenter), atol=1e-5)
    assert ([r["loss"] for r in two.history] == pytest.approx([r["loss"] for r in one.history], rel=1e-5)
            and "validation" in two.history[-1])
    assert len(two.checkpoints) == 2


def Resting(segmenter):
    """The network with its batch norms fixed to the statistics of some pictures."""
    for module in segmenter.modules(): module.momentum = 1.0
    segmenter.train()(tiny_pictures(8)[0])
    for name, module in list(segmenter.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d): module.__class__ = RestingNorm
    return segmenter


class RestingNorm(torch.nn.BatchNorm2d):
    def train(self, mode=True): return super().train(False)


@pytest.mark.parametrize("change, words", [
    (dict(data=TensorDataset(*tiny_pictures(0))), "no pairs"), (dict(processes=3), "multiple"),
    (dict(processes=2), "a folder"),
    (dict(data=TensorDataset(torch.zeros(4, 3, 8, 8), torch.full((4, 8, 8), 3))), "for 3 classes"),
    (dict(data=TensorDataset(torch.zeros(4, 3, 8, 8), torch.rand(4, 4, 8, 8))), "for 3 classes"),
    (dict(device="abacus"), "abacus")])
def test_mistakes(change, words):
    with pytest.raises(InputError, match=words):
        train_downstream(tiny_segmenter(), **(dict(data=pairs(), recipe=QUICK, progress=False) | change))


def test_a_loss_that_is_no_number():
    with pytest.raises(Diverged, match="epoch 1, step 1"):
        train_downstream(tiny_segmenter(), TensorDataset(torch.full((4, 3, 16, 16), torch.nan),
                                                         torch.zeros(4, 16, 16, dtype=int)), QUICK, progress=False)


def test_segmenter_files(tmp_path):
    save_segmenter(tmp_path / "s.safetensors", tiny_segmenter(), LABELS, note="x")
    assert load_segmenter(tmp_path / "s.safetensors")[1]["note"] == "x"
    with pytest.raises(InputError, match="3 classes"):
        save_segmenter(tmp_path / "t.safetensors", tiny_segmenter(),
                       dataclasses.replace(LABELS, classes=("a", "b"), palette=LABELS.palette[:2]))
    with pytest.raises(InputError, match="cannot be saved"):
        save_segmenter(tmp_path / "t.safetensors", torch.nn.Conv2d(3, 3, 1))
    save_tensors(tmp_path / "g.safetensors", {}, {"kind": "generator"})
    with pytest.raises(InputError, match="'generator'"): load_segmenter(tmp_path / "g.safetensors")
    tensors, header = load_tensors(tmp_path / "s.safetensors")
    save_tensors(tmp_path / "broken.safetensors", {k: v for k, v in tensors.items() if k != "outc.bias"}, header)
    with pytest.raises(InputError, match="outc.bias"): load_segmenter(tmp_path / "broken.safetensors")
    with torch.device("meta"): deeplab = DeepLabV3(4)
    from lagm.models.saved import segmenter_options
    assert segmenter_options(deeplab) == {"name": "deeplabv3", "n_classes": 4}
