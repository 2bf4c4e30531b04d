"""What comes in is looked at where it comes in: fields, options, pictures, generators, and modules that are to rest."""

import copy
import dataclasses
import functools
import warnings

import pytest
import torch
import yaml
from test_parts import NoNorm, close
from test_training import ToyGenerator, labelled, networks, run
from tiny import LABELS, tiny_annotators, tiny_generator, tiny_pictures, tiny_segmenter
from torch import nn
from torch.utils.data import TensorDataset

from lagm.core.errors import InputError
from lagm.core.seeds import random_generator
from lagm.core.tensors import all_finite, load_tensors
from lagm.core.values import check_fields
from lagm.data.augment import Augment
from lagm.evaluation.metrics import evaluate, predict
from lagm.evaluation.prediction import predict_pictures
from lagm.experiments.stages import make_recipe
from lagm.generators.contract import Sampling
from lagm.generators.train import GANRecipe
from lagm.training.batches import Parts
from lagm.training.datasetgan import label_generated
from lagm.training.downstream import DownstreamRecipe, train_downstream
from lagm.training.lagm import check_labelled, estimate_lagm, train_lagm, train_supervised
from lagm.training.loop import Diverged, validated
from lagm.training.recipe import FAST, PAPER, Recipe, get_recipe
from lagm.training.state import TrainState
from lagm.training.synthetic import GeneratedPairs, Plan, make_pair
from lagm.training.teachers import Teaching, taught_step, train_mean_teacher, train_self_training, train_taught
from lagm.training.watching import Watch

CPU = torch.device("cpu")
SHORT = get_recipe("fast", steps=2, warm_segmenter=2, warm_annotator=1, batch_labelled=2, batch_synthetic=2)


SHORT_AND_AVERAGED = dataclasses.replace(SHORT, average=0.9)


# --- fields


@pytest.mark.parametrize("text", ["lr_annotator: 1e-4", "lr_annotator: '0.0001'", "lr_annotator: 1.0e-4"])
def test_numbers_that_yaml_takes_for_text(text):
    changes = yaml.safe_load(text)
    for recipe in (get_recipe("fast", **changes), make_recipe("fast", 1000, 300, changes),
            dataclasses.replace(FAST, **changes)):
        assert recipe == dataclasses.replace(FAST, lr_annotator=0.0001) and isinstance(recipe.lr_annotator, float)


def test_fields_become_what_they_were_declared_as():
    import numpy as np
    assert get_recipe("fast", steps="10") == get_recipe("fast", steps="1e1") == get_recipe("fast",
            steps=np.int64(10)) == dataclasses.replace(FAST, steps=10)
    assert DownstreamRecipe(epochs="3", lr="1e-4", augment={"scale": ["0.5", 2]}) == DownstreamRecipe(3, lr=1e-4,
            augment=Augment(scale=(0.5, 2)))
    assert Teaching(threshold="5e-1") == Teaching(threshold=0.5)
    assert Sampling(psi="7e-1", cutoff="4") == Sampling(0.7, 4)
    assert Plan(n="20", size=["64", 48]) == Plan(n=20, size=(64, 48))
    assert GANRecipe(discriminator_channels=[8, "16"]).discriminator_channels == (8, 16)


WRONG = [(Recipe, "steps"), (Recipe, "lr_annotator"), (Recipe, "shared_batch"), (Recipe, "optimizer"),
        (Recipe, "augment"), (DownstreamRecipe, "epochs"), (DownstreamRecipe, "lr"),
         (DownstreamRecipe, "channels_last"), (DownstreamRecipe, "schedule"), (DownstreamRecipe, "augment"), (Augment,
                 "scale"), (Augment, "rotate"), (Augment, "flip"),
         (Teaching, "threshold"), (Teaching, "hard"), (Plan, "n"), (Plan, "size"), (Plan, "soft"), (Sampling,
                 "psi"), (Sampling, "cutoff"), (GANRecipe, "learning_rate")]


@pytest.mark.parametrize("kind, name", WRONG)
def test_wrong_types_are_sentences(kind, name):
    """Whatever a parameter file can hold."""
    right = getattr(kind(), name)
    for value in (None, True, 3, 0.5, "ten", "", [], [1, 2, 3], {"a": 1}, {}, float("nan"), float("inf"), "nan", 1e400,
            b"1", "x" * 10_000, {1, 2}):
        try: made = getattr(kind(**{name: value}), name)
        except InputError as error:
            assert name in str(error) and len(str(error)) < 600 and "\n" not in str(error), value
        else:
            assert type(made) is type(right) or made is None or right is None or (isinstance(right, float)
                    and type(made) is int), value
    for bad in ("ten", [1, [2]], float("nan")):
        with pytest.raises(InputError, match=name): kind(**{name: bad})


def test_true_is_no_number_and_the_nearest_field_is_named():
    with pytest.raises(InputError, match="recipe: steps is True; give a whole number"): get_recipe("fast", steps=True)
    with pytest.raises(InputError, match="recipe: lr_segmenter is None; give a number"):
        get_recipe("fast", lr_segmenter=None)
    with pytest.raises(InputError, match="no field learning_rate.*it has.*lr_annotator"):
        get_recipe("fast", learning_rate=1)
    with pytest.raises(InputError, match="no field lr_anotator; did you mean lr_annotator"):
        make_recipe("fast", 1, 1, {"lr_anotator": 1})
    with pytest.raises(InputError, match="augment has no field rotat; did you mean rotate"):
        get_recipe("fast", augment={"rotat": 3})

    @dataclasses.dataclass
    class Pair:
        sides: tuple[int, ...] = (1,)
        name: str | None = None
        def __post_init__(self): check_fields(self, "pair")

    assert Pair([1, "2", 3]).sides == (1, 2, 3) and Pair(name="x").name == "x"
    with pytest.raises(InputError, match="pair: name is 3; give text"): Pair(name=3)


# --- options


@functools.cache
def generator(): return tiny_generator()


def trainers():
    images, masks = tiny_pictures(2)
    annotator = tiny_annotators(generator())[0]
    return {train_lagm: (generator(), annotator, tiny_segmenter(), images, masks),
            train_supervised: (tiny_segmenter(), images, masks),
            train_self_training: (tiny_segmenter(), generator(), images, masks), train_mean_teacher: (tiny_segmenter(),
                    generator(), images, masks),
            train_taught: (tiny_segmenter(), generator(), images, masks, Teaching())}


@pytest.mark.parametrize("number", range(5))
def test_a_mistyped_option_names_the_function_and_the_nearest_option(number):
    train, arguments = list(trainers().items())[number]
    # would be refused, too, but later
    poisoned = [torch.full((0,), 1.0) if a is arguments[-2] else a for a in arguments]
    for wrong, right in (("chekpoint", "checkpoint"), ("validate_evry", "validate_every"), ("sed", "seed"),
            ("recip", "recipe"), ("devise", "device")):
        with pytest.raises(InputError, match=f"{train.__name__} has no option {wrong}; did you mean {right}?"):
            train(*poisoned, **{wrong: 1})
    with pytest.raises(InputError, match=f"{train.__name__} has no option xyzzy; it has .*checkpoint"):
        train(*arguments, xyzzy=1)
    for inner in ("players", "stages", "identity", "pictures"):
        with pytest.raises(InputError, match=f"no option {inner}"): train(*arguments, **{inner: 1})


@pytest.mark.parametrize("number", range(5))
def test_what_is_no_recipe_and_no_number(number):
    train, arguments = list(trainers().items())[number]
    for wrong in ("fast", {"steps": 3}, None):
        with pytest.raises(InputError, match="recipe is .*give a Recipe, such as get_recipe"):
            train(*arguments, recipe=wrong)
    for name in ("validate_every", "record_every", "checkpoint_every"):
        with pytest.raises(InputError, match=f"option {name} is 'often'; give a whole number"):
            train(*arguments, recipe=SHORT_AND_AVERAGED, **{name: "often"})
    with pytest.raises(InputError, match="seed is '1'"):
        train(*arguments, recipe=SHORT_AND_AVERAGED, seed="1", progress=False)


def test_steps_may_be_text_here_too():
    assert train_supervised(tiny_segmenter(), *tiny_pictures(2), SHORT, "2", progress=False, record_every="1").step == 2


# --- fields that count


# the same change for all
@pytest.mark.parametrize("augment", [None,
        Augment(flip=False, scale=(1.1, 1.1), rotate=0, shift=0, hue=0, saturation=(1.2, 1.2), brightness=(0.9, 0.9))])
def test_without_batch_norm_a_taught_step_in_parts_is_the_whole(augment):
    torch.manual_seed(0)
    recipe = dataclasses.replace(PAPER, batch_labelled=4, batch_synthetic=4, average=0.5)
    segmenter, teacher, (images, masks) = NoNorm(), NoNorm(), labelled(4)
    masks[0, :12] = 255  # parts count by what is known
    synthetic, results = torch.rand(4, 3, 16, 16) * 2 - 1, []
    for parts in (1, 2):
        players = TrainState(copy.deepcopy(segmenter), None, recipe, CPU, torch.tensor([0.5, 1, 2, 1]))
        players.begin({"segmenter": 0.1}, averaged=True)
        share = 4 // parts
        def known(p): return images[share * p:share * (p + 1)], masks[share * p:share * (p + 1)]
        def generated(p): return synthetic[share * p:share * (p + 1)], random_generator(0, *[p] * (parts > 1))
        batches = Parts(parts, known), Parts(parts, generated)
        losses = taught_step(players, teacher, *batches, Teaching(hard=False), 0.3, augment)
        results.append((players, losses))
    (whole, losses), (parted, losses_in_parts) = results
    assert losses.keys() == losses_in_parts.keys()
    for name, loss in losses.items(): assert losses_in_parts[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert close(parted.segmenter, whole.segmenter, 1e-5) and close(parted.average, whole.average, 1e-5)
    assert not close(parted.segmenter, segmenter, 1e-3)


@pytest.mark.parametrize("train", [train_self_training, train_mean_teacher])
def test_baselines_do_their_batches_in_parts(train, monkeypatch, tmp_path):
    """Never more than a part goes through the network, and a stopped run goes on to the same bits."""
    seen, images, masks = [], *tiny_pictures(4)
    recipe = dataclasses.replace(SHORT, batch_labelled=4, batch_synthetic=4, parts=2, average=0.9)
    def fresh(seed=0):
        network = tiny_segmenter(seed)
        network.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
        return network
    arguments = dict(recipe=recipe, progress=False, checkpoint_every=1, keep=9)
    whole = train(fresh(), generator(), images, masks, checkpoint=tmp_path / "a.safetensors", **arguments)
    assert set(seen) == {2} and whole.segmenter.inc.bn1.num_batches_tracked == 2 + 2 * 2
    again = train(fresh(5), generator(), images, masks, resume_from=tmp_path / "a.step-00000003.safetensors",
            **arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole.segmenter.state_dict().values(),
            again.segmenter.state_dict().values()))


def test_what_has_no_effect_is_refused_or_said():
    images, masks = tiny_pictures(2)
    supervised = functools.partial(train_supervised, tiny_segmenter(), images, masks, steps=1, progress=False)
    taught = functools.partial(train_self_training, tiny_segmenter(), generator(), images, masks, progress=False)
    for changes in (dict(interval_segmenter=2), dict(interval_annotator=3)):
        for train in (supervised, taught):
            with pytest.raises(InputError, match=f"{next(iter(changes))} is .*no phases take turns; give 1"):
                train(recipe=dataclasses.replace(SHORT, **changes))
    with pytest.raises(InputError, match="label_weight is 0.5.*Teaching.weight"):
        taught(recipe=dataclasses.replace(SHORT, label_weight=0.5))
    with pytest.warns(UserWarning, match="train_supervised makes no use of the recipe's matched, metric, gradients$"):
        supervised(recipe=dataclasses.replace(SHORT, matched="outc", metric="l2", gradients="double",
                batch_synthetic=4))
    with pytest.warns(UserWarning, match="train_taught makes no use of the recipe's lr_annotator$"):
        taught(recipe=dataclasses.replace(SHORT, lr_annotator=0.5, lr_warm=1e-2, batch_synthetic=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a comparison may share its recipe
        supervised(recipe=dataclasses.replace(SHORT, batch_synthetic=4)), taught(recipe=SHORT)


# --- what rests


def modes(network): return {name: m.training for name, m in network.named_modules()}


def frozen_networks(parameters=False):
    """The first batch norm of S and of A is at rest, the networks are in train mode."""
    a, s = networks()
    norms = [next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)) for network in (a, s)]
    for norm in norms:
        norm.eval()
        norm.running_mean.fill_(0.25)
        if parameters: norm.requires_grad_(False)
    return (a, s), norms


def test_validation_keeps_every_mode():
    _, s = frozen_networks()[0]
    before = modes(s)
    validated(s, *labelled())
    assert modes(s) == before and len(set(before.values())) == 2


RESTING = {"fast": SHORT, "paper": dataclasses.replace(PAPER, steps=3),
        "double": dataclasses.replace(SHORT, gradients="double"),
        "stale": dataclasses.replace(SHORT, fresh_labels=False),
           "parts": dataclasses.replace(SHORT, parts=2)}


@pytest.mark.parametrize("name", RESTING)
@pytest.mark.parametrize("parameters", [False, True])
def test_a_frozen_batch_norm_stays_frozen(name, parameters):
    """Its statistics through all stages, and its parameters if they ask for no gradients; everything else learns."""
    nets, norms = frozen_networks(parameters)
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    others = [copy.deepcopy(network.state_dict()) for network in nets]
    result = run(dataclasses.replace(RESTING[name], average=0.0), nets=nets, validation=labelled(), validate_every=1)
    for norm, old in zip(norms, before):
        for key, value in norm.state_dict().items():
            assert torch.equal(value, old[key]) == (parameters or key not in ("weight", "bias")), key
    for network, old in zip(nets, others):
        moved = [key for key, value in network.state_dict().items() if not torch.equal(value, old[key])]
        assert any("running_mean" in key for key in moved) and any("weight" in key for key in moved)
    assert result.segmenter is nets[1]
    assert all(p.requires_grad != (parameters and any(p is q for n in norms for q in n.parameters())) for n in nets
            for p in n.parameters())


def test_a_frozen_batch_norm_rests_in_the_other_trainers():
    images, masks = tiny_pictures(4)
    pairs = TensorDataset(images, masks)
    pairs.labels = LABELS
    runs = [lambda s: train_supervised(s, images, masks, SHORT, 2, progress=False),
            lambda s: train_self_training(s, generator(), images, masks, recipe=SHORT, progress=False),
            lambda s: train_downstream(s, pairs, DownstreamRecipe(epochs=1, batch=2), validation=(images, masks),
                    progress=False)]
    for train in runs:
        s = tiny_segmenter().train()
        s.inc.bn1.eval().requires_grad_(False)
        before = copy.deepcopy(s.inc.bn1.state_dict())
        train(s)
        assert all(torch.equal(v, before[k]) for k, v in s.inc.bn1.state_dict().items())
        assert s.inc.bn2.num_batches_tracked > 0


def test_a_network_in_eval_mode_is_trained_as_a_whole():
    """It was only not in use."""
    a, s = networks()
    run(SHORT, nets=(a.eval(), s.eval()))
    assert all(m.num_batches_tracked > 0 for n in (a, s) for m in n.modules() if isinstance(m, nn.BatchNorm2d))
    average = run(SHORT).segmenter
    assert not any(p.requires_grad for p in average.parameters())
    train_supervised(average, *labelled(), SHORT, 1, progress=False)
    assert all(p.requires_grad for p in average.parameters())


def test_another_set_of_frozen_modules_is_another_run(tmp_path):
    run(SHORT, nets=frozen_networks(True)[0], checkpoint=tmp_path / "run.safetensors")
    assert run(SHORT, nets=frozen_networks(True)[0],
               checkpoint=tmp_path / "run.safetensors").step == SHORT.total_steps(2)
    assert ", 6 frozen (" in load_tensors(tmp_path / "run.safetensors")[1]["identity"]["arm"]
    for nets in (networks(), frozen_networks()[0]):
        with pytest.raises(InputError, match="another run: arm"):
            run(SHORT, nets=nets, checkpoint=tmp_path / "run.safetensors")


def test_all_matched_parameters_frozen():
    a, s = networks()
    s.outc.requires_grad_(False)
    with pytest.raises(InputError, match="matched is 'outc', but all of these"):
        run(dataclasses.replace(SHORT, matched="outc"), nets=(a, s))


def test_an_estimate_and_a_snapshot_leave_no_trace(tmp_path):
    (a, s), _ = frozen_networks()
    before = modes(a), modes(s), copy.deepcopy(s.state_dict())
    estimate_lagm(ToyGenerator(), a, s, *labelled(), SHORT, progress=False)
    assert (modes(a), modes(s)) == before[:2] and all(torch.equal(v, before[2][k]) for k, v in s.state_dict().items())
    plain, watched = run(SHORT, nets=frozen_networks()[0]), run(SHORT, nets=frozen_networks()[0],
            watch=Watch(tmp_path, snapshot_every=1))
    assert all(torch.equal(x, y) for x, y in zip(plain.segmenter.state_dict().values(),
            watched.segmenter.state_dict().values()))


def test_those_who_only_ask_leave_modes_and_statistics_alone():
    from PIL import Image
    s = tiny_segmenter().train()
    s.inc.bn1.eval()
    before, state = modes(s), copy.deepcopy(s.state_dict())
    picture = Image.new("RGB", (20, 16), (200, 10, 10))
    one, two = predict_pictures(s, [picture], size=(16, 16))[0], predict_pictures(s,
            [picture, Image.new("RGB", (20, 16))], size=(16, 16))[0]
    assert (one == two).all() and modes(s) == before
    assert all(torch.equal(v, state[k]) for k, v in s.state_dict().items())


# --- pictures


BAD = [(lambda x: ((x + 1) * 127.5).round(), r"go from .* to 25\d.*/ 127.5 - 1"),
        (lambda x: ((x + 1) * 127.5).byte(), "hold torch.uint8.*/ 127.5 - 1"),
       (lambda x: torch.where(torch.arange(len(x))[:, None, None, None] == 1, torch.nan, x),
               "hold NaN or infinite numbers: number 1"),
       (lambda x: x.clone().index_fill_(0, torch.tensor([0]), float("-inf")),
               "hold NaN or infinite numbers: number 0"), (lambda x: x.numpy(), "are a ndarray; give a torch tensor"),
       (lambda x: x.long(), "hold torch.int64")]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_pictures_is_refused_everywhere(number):
    change, says = BAD[number]
    images, masks = tiny_pictures(3)
    wrong, s, quiet = change(images), tiny_segmenter(), dict(progress=False)
    for call in (lambda: train_lagm(generator(), tiny_annotators(generator())[0], s, wrong, masks, SHORT, **quiet),
            lambda: train_supervised(s, wrong, masks, SHORT, 1, **quiet),
                 lambda: train_self_training(s, generator(), wrong, masks, recipe=SHORT, **quiet)):
        with pytest.raises(InputError, match=f"the labelled pictures {says}"): call()
    with pytest.raises(InputError, match=f"the validation pictures {says}"):
        train_supervised(s, images, masks, SHORT, 1, validation=(wrong, masks), **quiet)
    for call in (lambda: predict(s, wrong), lambda: evaluate(s, wrong, masks, 3)):
        with pytest.raises(InputError, match="the pictures"): call()
    if number not in (2, 3, 4):
        with pytest.raises(InputError, match="the training pictures"):
            train_downstream(s, TensorDataset(wrong, masks), DownstreamRecipe(1, batch=1), **quiet)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pictures_that_a_network_does_not_compute_with_are_refused(dtype):
    images, masks = tiny_pictures(3)
    s, quiet, says = tiny_segmenter(), dict(progress=False), f"hold {dtype}, the network computes in torch.float32"
    for call in (lambda x: train_lagm(generator(), tiny_annotators(generator())[0], s, x, masks, SHORT, **quiet),
                 lambda x: train_supervised(s, x, masks, SHORT, 1, **quiet),
                 lambda x: train_self_training(s, generator(), x, masks, recipe=SHORT, **quiet)):
        with pytest.raises(InputError, match=says): call(images.to(dtype))


def test_a_network_with_a_part_in_other_numbers_learns_as_before():
    """A frozen encoder in bfloat16 below a head in float32, say: either kind of pictures is the network's affair."""
    images, masks = tiny_pictures(3)
    s = tiny_segmenter()
    s.encoder = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    s.encoder.requires_grad_(False)
    check_labelled(images, masks, s.n_classes, learner=s)
    plain = tiny_segmenter()
    plain.load_state_dict({k: v for k, v in s.state_dict().items() if not k.startswith("encoder")})
    assert predict(s, images).equal(predict(plain, images))


def test_raw_pictures_of_a_generator_are_pictures():
    images, masks = tiny_pictures(2)
    train_supervised(tiny_segmenter(), 2.2 * images, masks, SHORT, 1, progress=False)
    with pytest.warns(UserWarning, match="labelled pictures is below 0.*2 . pictures - 1"):
        train_supervised(tiny_segmenter(), (images + 1) / 2, masks, SHORT, 1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_supervised(tiny_segmenter(), images, masks, SHORT, 1, progress=False)


def test_a_later_pair_that_is_no_picture_is_named_and_not_the_learning_rate():
    images, masks = tiny_pictures(4)
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="epoch 1, step \\d: the loss is nan; the step's pictures hold NaN or infinite"):
        train_downstream(tiny_segmenter(), TensorDataset(images, masks), DownstreamRecipe(1, batch=2), progress=False)


# --- generators


class Ill:
    """A generator whose pictures, or features, hold one number that is none."""

    def __init__(self, where, value=float("nan")): self.where, self.value = where, value
    def __getattr__(self, name): return getattr(generator(), name)

    def __call__(self, z, rng=None):
        image, features = generator()(z, rng)
        (image if self.where == "pictures" else features[1])[0, 0, 1, 2] = self.value
        return image, features


@pytest.mark.parametrize("where", ["pictures", "features"])
def test_a_generator_that_gives_no_numbers_is_named(where):
    (images, masks), annotator = tiny_pictures(2), tiny_annotators(generator())[0]
    says = f"the generator's {where} hold NaN or infinite numbers"
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=says):
            train_lagm(Ill(where, value), copy.deepcopy(annotator), tiny_segmenter(), images, masks, SHORT,
                    progress=False)
    with pytest.raises(InputError, match=says):
        train_mean_teacher(tiny_segmenter(), Ill(where), images, masks, recipe=SHORT, progress=False)
    with pytest.raises(InputError, match=says): make_pair(Ill(where), [annotator], 0)
    with pytest.raises(InputError, match=says): GeneratedPairs(Ill(where), [annotator])[0]
    with pytest.raises(InputError, match=says): label_generated(Ill(where), tiny_segmenter(), 1)


def test_weights_that_are_no_numbers_are_named():
    images, masks = tiny_pictures(2)
    s = tiny_segmenter()
    with torch.no_grad(): s.outc.bias[1] = float("nan")
    with pytest.raises(InputError, match="the segmenter's weights hold NaN"):
        train_supervised(s, images, masks, SHORT, 1, progress=False)


def test_finite_whatever_the_type():
    huge = torch.finfo(torch.float32).max
    assert all_finite([torch.full((3, 3), huge), torch.full((4,), 65504.0).half(), torch.tensor([True]), torch.zeros(0),
            torch.full((2,), 2**62)]) and all_finite([])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for value in (float("nan"), float("inf"), -float("inf")):
            assert not all_finite([torch.zeros(2), torch.tensor([0, value, 1], dtype=dtype)])
