"""The options of a run, its estimate, appointments, batches in parts, and the protocols of what is passed around."""

import dataclasses
import inspect

import pytest
import torch
from test_training import FAST, ToyGenerator, labelled, networks, run, same
from tiny import tiny_generator, tiny_segmenter

from lagm.core.errors import InputError
from lagm.data.demo import Avatars
from lagm.models.contracts import Annotator, Generator, LabelledDataset, Segmenter
from lagm.training.batches import Parts, in_parts
from lagm.training.lagm import (
    estimate_lagm,
    estimate_supervised,
    lagm_loop,
    supervised_loop,
    train_finish,
    train_lagm,
    train_supervised,
)
from lagm.training.loop import RUN_OPTIONS, Appointment, Loop, RunOptions, go_on, run_options
from lagm.training.watching import Estimate


def test_options_are_documented():
    """Each field has a line in what help() shows, and the functions name them all."""
    for name in RUN_OPTIONS:
        assert f"\n{name}: " in inspect.getdoc(RunOptions), name
        assert f"{name}," in train_lagm.__doc__ or f"{name}." in train_lagm.__doc__, name


def test_options_as_one_object_or_by_name(tmp_path):
    options = RunOptions(progress=False, record_every=3, checkpoint=tmp_path / "a.safetensors", keep=1)
    one = train_lagm(ToyGenerator(), *networks(), *labelled(), FAST, options=options)
    other = run(FAST, record_every=3, checkpoint=tmp_path / "b.safetensors", keep=1)
    assert same(one, other) and one.history == other.history
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == ["a.safetensors", "b.safetensors"]
    mixed = run_options(options, {"record_every": 7})
    assert mixed == dataclasses.replace(options, record_every=7) and run_options(None, {}) == RunOptions()


@pytest.mark.parametrize("changes, words", [
    (dict(validate_every="often"), "option validate_every"), (dict(record_every=1.5), "option record_every"),
    (dict(validation=(torch.full((1, 3, 8, 8), torch.nan), torch.zeros(1, 8, 8))), "validation pictures hold NaN")])
def test_options_that_make_no_sense(changes, words):
    with pytest.raises(InputError, match=words): RunOptions(**changes)
    with pytest.raises(InputError, match=words): run(FAST, **changes)


def test_an_estimate_has_a_function_of_its_own():
    images, masks = labelled()
    assert isinstance(estimate_supervised(networks()[1], images, masks, FAST, 9), Estimate)
    assert list(estimate_lagm(ToyGenerator(), *networks(), images, masks, FAST).steps) == [
        "warm segmenter", "warm annotator", "match"]


def test_a_dry_run_still_gives_an_estimate_and_names_what_to_call():
    images, masks = labelled()
    calls = {"estimate_lagm": lambda: train_lagm(ToyGenerator(), *networks(), images, masks, FAST, dry_run=True),
             "estimate_supervised": lambda: train_supervised(networks()[1], images, masks, FAST, dry_run=True),
             "finish_loop": lambda: train_finish(networks()[1], ToyGenerator(), images, masks,
                                                 dataclasses.replace(FAST, finish=4.0), dry_run=True)}
    for instead, call in calls.items():
        with pytest.warns(DeprecationWarning, match=instead): assert isinstance(call(), Estimate)


def test_appointments_are_told_of_every_step():
    told = []

    class Diary(Appointment):
        def before(self, loop): told.append(("before", loop.step))
        def after(self, loop, moment): told.append((moment.stage.name, moment.within, loop.step))

    images, masks = labelled()
    loop = supervised_loop(networks()[1], images, masks, FAST, 2, progress=False)
    loop.appointments = [*loop.appointments, Diary()]
    assert go_on(loop).step == 2
    assert told == [("before", 0), ("supervised", 0, 1), ("before", 1), ("supervised", 1, 2)]


def test_a_loop_is_ready_to_go():
    loop = lagm_loop(ToyGenerator(), *networks(), *labelled(), FAST, progress=False)
    assert (isinstance(loop, Loop) and [stage.name for stage in loop.stages]
            == ["warm segmenter", "warm annotator", "match"])
    assert same(loop.run(), run(FAST))


def test_parts_are_made_when_they_are_asked_for():
    made = []
    parts = Parts(3, lambda part: made.append(part) or part)
    assert len(parts) == 3 and not made and parts[1] == 1 and made == [1] and list(parts) == [0, 1, 2]
    assert list(in_parts(lambda step, stage: (step, stage), 4, "warm", 1)) == [(4, "warm")]
    assert list(in_parts(lambda step, stage: (step, stage), 4, "warm", 2)) == [(8, "warm"), (9, "warm")]


def test_what_the_kit_has_keeps_the_protocols():
    assert isinstance(tiny_generator(), Generator) and isinstance(ToyGenerator(), Generator)
    annotator, segmenter = networks()
    assert isinstance(annotator, Annotator) and isinstance(segmenter, Segmenter)
    assert isinstance(tiny_segmenter(), Segmenter) and isinstance(Avatars("big-ears", "train"), LabelledDataset)
    assert not isinstance(torch.nn.Identity(), Generator | Segmenter | LabelledDataset)
