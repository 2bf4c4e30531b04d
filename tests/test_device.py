"""Every training on a second device: mistakes that only a machine with a GPU would show, found without one."""

import sys
from collections import Counter

import pytest
import second_device
import torch
from PIL import Image
from tiny import LABELS, tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter

from lagm.evaluation.metrics import evaluate
from lagm.evaluation.prediction import predict_pictures
from lagm.generators.train import GANRecipe, GANTrainer
from lagm.matching.forward import SyntheticPass, directional_derivative
from lagm.training.baselines import BASELINES, with_numbers
from lagm.training.datasetgan import label_generated
from lagm.training.downstream import DownstreamRecipe, train_downstream
from lagm.training.lagm import train_finish, train_lagm, train_supervised
from lagm.training.recipe import get_recipe
from lagm.training.shards import generate
from lagm.training.synthetic import GeneratedPairs, Plan

pytestmark = pytest.mark.skipif(not second_device.prepare(), reason="this torch has no devices written in Python")

SHORT = dict(steps=3, warm_segmenter=2, warm_annotator=2, batch_labelled=2, batch_synthetic=2)
QUIET = dict(seed=3, progress=False, record_every=1)
# numbers of the rivals' settings that make them quick; those that a setting has not are passed over
SMALL = dict(steps=3, batch=2, points=8, samples=20, scales=2, members=2, pixel_steps=3, pairs=4, levels=2, width=4,
             channels=8, pool=20, coarsest=4,
             inversion=dict(steps=2, samples=20, scales=2, batch=4), pretraining=dict(steps=2, batch=2, points=8))
SLIM = dict(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8, discriminator_channels=(8, 8))


@pytest.fixture
def second(monkeypatch):
    """The second device, which the kit takes for one that is there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lagm.") and "choose_device" in vars(module):
            monkeypatch.setattr(module, "choose_device", torch.device)
    with second_device.Second() as mode: yield mode


def losses(trained): return [{k: v for k, v in row.items() if k != "stage"} for row in trained.history["losses"]]


def lagm(recipe="fast", device="cpu", arm=None, **changes):
    generator = tiny_generator()
    annotator, = tiny_annotators(generator)
    return train_lagm(generator.to(device), annotator, tiny_segmenter(), *tiny_pictures(3),
                      get_recipe(recipe, **{**SHORT, **changes}), device=device, validation=tiny_pictures(2, seed=1),
                      validate_every=2, **(arm or {}), **QUIET)


RUNS = {
    "paper": dict(recipe="paper"), "paper, double": dict(recipe="paper", gradients="double"),
    "paper, two parts": dict(recipe="paper", parts=2), "paper, control": dict(recipe="paper", arm=dict(match=False)),
    "fast": {}, "fast, double": dict(gradients="double"), "fast, two parts": dict(parts=2),
    "fast, control": dict(arm=dict(match=False, weigh_labels=False)),
    "fast, sgd, l2": dict(optimizer="sgd", metric="l2", reduction="sum", schedule="constant"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_numbers_of_the_cpu(second, name):
    found, expected = losses(lagm(device="second", **RUNS[name])), losses(lagm(**RUNS[name]))
    assert found == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in expected]


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_in_bfloat16(second, recipe):
    run = lagm(recipe, "second", precision="bfloat16")
    assert run.step and run.segmenter(tiny_pictures(1)[0].to("second")).device.type == "second"


@pytest.mark.parametrize("name", BASELINES)
def test_a_rival(second, name):
    rival, found = BASELINES.get(name), {}
    for device in ("second", "cpu"):
        generator = tiny_generator().to(device)
        pictures = tiny_pictures(3)
        if rival.labels_on == "generated":
            pictures = [part.cpu() for part in label_generated(generator, tiny_segmenter().to(device), 3, seed=3)[:2]]
        run = rival.train(tiny_segmenter(), generator, *pictures, folder=None, device=device,
                          setting=with_numbers(rival.setting, SMALL), recipe=get_recipe("fast", **SHORT), **QUIET)
        found[device] = losses(run)
    assert found["second"] == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in found["cpu"]]


def test_supervised_and_finish(second):
    recipe = get_recipe("fast", **SHORT)
    for parts in (1, 2):
        recipe = get_recipe("fast", parts=parts, **SHORT)
        train_supervised(tiny_segmenter(), *tiny_pictures(3), get_recipe("fast", batch_labelled=2, parts=parts), 3,
                         device="second", **QUIET)
        for annotator in (None, tiny_annotators(tiny_generator())[0]):
            train_finish(tiny_segmenter(), tiny_generator().to("second"), *tiny_pictures(3), recipe,
                         annotator=annotator, device="second", **QUIET)


@pytest.mark.parametrize("soft", [False, True])
def test_downstream(second, soft):
    generator = tiny_generator().to("second")
    annotators = [annotator.to("second") for annotator in tiny_annotators(generator, 2)]
    data = GeneratedPairs(generator, annotators, Plan(n=4, seed=5, soft=soft))
    train_downstream(tiny_segmenter(), data, DownstreamRecipe(epochs=2, batch=2), seed=3, device="second",
                     progress=False, validation=tiny_pictures(2))


def test_a_planted_mistake_is_caught(second, monkeypatch):
    """A tensor of numbers made on the CPU, as a GPU would meet it."""
    from lagm.training import steps

    plain = steps.labelled_gradient

    def forgetful(segmenter, names, images, masks, weights):
        return plain(segmenter, names, images, masks.cpu(), weights)

    monkeypatch.setattr(steps, "labelled_gradient", forgetful)
    with pytest.raises(second_device.DeviceMistake, match="second:0 and on cpu"): lagm(device="second")


def test_what_a_step_waits_for(second):
    """Numbers are fetched every ten steps, not in each: ten steps more wait for little more."""
    found = []
    for steps in (10, 20):
        second.waits.clear()
        generator = tiny_generator().to("second")
        train_lagm(generator, *tiny_annotators(tiny_generator()), tiny_segmenter(), *tiny_pictures(3), get_recipe(
            "fast", **{**SHORT, "steps": steps, "finish": 0.0}), device="second", seed=3, progress=False)
        found.append(Counter(second.waits))
    more = found[1] - found[0]
    assert more.pop("to cpu") == 1  # the losses, every ten steps
    assert more.pop("item", 0) <= 2  # are the generator's pictures finite?
    assert not more, f"a step waits: {dict(more)}"


def test_a_run_leaves_the_random_state_of_the_device(second):
    generator, segmenter = tiny_generator().to("second"), tiny_segmenter()
    annotator, = tiny_annotators(generator)
    before = second_device.Module.get_rng_state()
    recipe = get_recipe("fast", **SHORT)
    train_lagm(generator, annotator, segmenter, *tiny_pictures(3), recipe, device="second", **QUIET)
    assert second_device.Module.get_rng_state().equal(before)


class Dropping(torch.nn.Module):
    """A segmenter with dropout."""

    def __init__(self):
        super().__init__()
        self.inside, self.n_classes = tiny_segmenter(), 3

    def forward(self, images): return self.inside(torch.nn.functional.dropout2d(images, 0.5, self.training))


def test_the_second_pass_drops_what_the_first_did(second):
    segmenter = Dropping().to("second").train()
    images = tiny_pictures(2)[0].to("second")
    names = ["inside.outc.weight"]
    torch.manual_seed(5)
    both = [SyntheticPass(segmenter, images, names, tangents=tangents) for tangents in (True, False)]
    torch.manual_seed(5)
    torch.rand(100, device="second")
    direction = {names[0]: torch.ones_like(segmenter.inside.outc.weight)}
    for one in both[:1]:
        replayed = one.directional_derivative(direction)
        again = directional_derivative(segmenter, direction, images, one.random_state)
        assert torch.allclose(replayed.cpu(), again.cpu(), atol=1e-5)


def test_prediction_and_scores(second):
    segmenter = tiny_segmenter().to("second").eval()
    images, masks = tiny_pictures(4)
    on_cpu = evaluate(tiny_segmenter().eval(), images, masks, 3)
    assert evaluate(segmenter, images, masks, 3, device="second") == on_cpu
    pictures = [Image.fromarray(((image.movedim(0, -1) + 1) * 127.5).byte().numpy()) for image in images]
    assert len(predict_pictures(segmenter, pictures, size=(16, 16), device="second")) == 4


def test_generation(second, tmp_path):
    generator, other = tiny_generator(), tiny_generator()
    generate(generator, tiny_annotators(generator, 2), tmp_path / "a", Plan(n=4), LABELS, devices=["second"],
             progress=False)
    generate(other, tiny_annotators(other, 2), tmp_path / "b", Plan(n=4), LABELS, progress=False)
    found = [sorted(p.name for p in (tmp_path / name).rglob("*.tar")) for name in "ab"]
    assert found[0] == found[1] and found[0]


def test_training_a_generator(second):
    pictures = ((tiny_pictures(8)[0] + 1) * 127.5).byte()
    trainer = GANTrainer(pictures, GANRecipe(resolution=16, batch=4, **SLIM), "second")
    for _ in range(2): trainer.step()
