"""The right tricks for a machine: the choice from given times, what is remembered, `auto` in a recipe, `lagm tune`."""

import json
import warnings

import pytest
import torch

from lagm import cli
from lagm.core.errors import InputError
from lagm.models.segmenters import UNet
from lagm.ops import winograd as winograd
from lagm.training import choices, tuning
from lagm.training.choices import settled
from lagm.training.recipe import FAST, get_recipe
from lagm.training.state import Networks
from lagm.training.tuning import _choose_forms, emulates_bfloat16, tuned

LAST, HALF = "float32, channels last", "bfloat16, channels last"
FAST_ONES, COMPILED = "fast convolutions, channels last", "compiled convolutions, channels last"
ALONE = "one thread, channels last"
TIMES = {"float32": 1.0, LAST: 0.7, HALF: 0.4, FAST_ONES: 0.69}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own, and measuring that takes no time; `measured` counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    def measure(compiled=False):
        calls.append(compiled)
        return TIMES | ({COMPILED: 0.3} if compiled else {})
    monkeypatch.setattr(tuning, "_measure_forms", measure)
    return tmp_path / "lagm" / "tuning.json", calls


@pytest.mark.parametrize("wide", [False, True])
def test_one_of_the_measured_convolutions_is_one_that_tiles_are_for(monkeypatch, wide):
    """Else `compiled` would measure nothing but the usual ones."""
    monkeypatch.setattr(winograd, "has_wide_registers", lambda: wide)
    gains = [winograd.tiles_pay((n, c, side, side), (c, c, 3, 3)) for n, c, side in tuning._SHAPES]
    assert gains[-1] and not gains[0]


@pytest.mark.parametrize("times, expected", [
    ({"float32": 1.0}, ("float32", False, False, False)),
    ({"float32": 1.0, LAST: 0.96, HALF: 0.96}, ("float32", False, False, False)),
    ({"float32": 1.0, LAST: 0.7, HALF: 1.6}, ("float32", True, False, False)),
    ({"float32": 1.0, LAST: 0.7, HALF: 0.68}, ("float32", True, False, False)),
    ({"float32": 1.0, LAST: 0.7, HALF: 0.4, FAST_ONES: 0.5}, ("bfloat16", True, False, False)),
    ({"float32": 1.0, LAST: 0.7, HALF: 1.6, FAST_ONES: 0.5}, ("float32", True, True, False)),
    ({"float32": 1.0, LAST: 0.7, HALF: 1.6, FAST_ONES: 0.5, COMPILED: 0.3}, ("float32", True, True, True)),
    ({"float32": 1.0, LAST: 0.7, HALF: 1.6, FAST_ONES: 0.9, COMPILED: 0.3}, ("float32", True, True, True))])
def test_a_form_is_chosen_if_it_saves_a_twentieth(times, expected):
    choice = _choose_forms(times)
    assert tuple(choice[name] for name in choices._AUTO) == expected
    get_recipe("fast", **{name: choice[name] for name in choices._AUTO})  # what is chosen goes together


def test_one_thread_is_chosen_where_two_are_no_quicker():
    assert _choose_forms({"float32": 1.0, LAST: 0.5, ALONE: 0.6}, 2)["threads"] == 2
    assert _choose_forms({"float32": 1.0, LAST: 0.5, ALONE: 0.5}, 2)["threads"] == 1
    with pytest.raises(InputError, match="float32 was not measured"): _choose_forms({LAST: 1.0})


def test_it_is_measured_once_for_each_processor_and_version(cache, monkeypatch):
    file, calls = cache
    lines = []
    assert tuned(say=lines.append)[0]["precision"] == "bfloat16" and tuned(say=lines.append)[1] == TIMES
    assert len(calls) == 1 and len(lines) == 2 and torch.__version__ in lines[0]
    key = tuning._key()
    monkeypatch.setattr(tuning, "_key", lambda: "another processor")
    tuned(say=lines.append)
    assert len(calls) == 2 and list(json.loads(file.read_text())) == [key, "another processor"]
    tuned(again=True, say=lines.append)
    assert len(calls) == 3


def test_compiled_convolutions_are_measured_when_asked_for_and_remembered(cache):
    _, calls = cache
    for compiled in (False, True, True, False): choice, measured = tuned(compiled=compiled, say=lambda line: None)
    assert calls == [False, True] and COMPILED in measured and choice["precision"] == "float32"
    assert choice["compile_convolutions"]


@pytest.mark.parametrize("content", ["", "{ damaged", "[]", '"text"', "{KEY: []}", '{KEY: {"float32": "x"}}',
                                     '{KEY: {"float32": -1.0}}', '{KEY: {"float32": 1.0, "b": null}}', "{KEY: {}}"])
def test_a_damaged_cache_counts_as_none(cache, content):
    file, calls = cache
    file.parent.mkdir()
    file.write_text(content.replace("KEY", json.dumps(tuning._key())))
    assert tuned(say=lambda line: None)[1] == TIMES and calls == [False]
    assert json.loads(file.read_text())[tuning._key()] == TIMES


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(cache, monkeypatch):
    file, _ = cache
    file.parent.write_text("a file where a folder should be")
    lines = []
    assert tuned(say=lines.append)[1] == TIMES and "not kept for the next time" in lines[0]


def test_auto_in_a_recipe_becomes_plain_values(cache, capsys):
    recipe = get_recipe("fast", precision="auto", channels_last="auto", steps=3)
    assert (recipe.precision, recipe.channels_last, recipe.steps) == ("bfloat16", True, 3)
    assert capsys.readouterr().out.startswith("auto: precision bfloat16, ")
    assert get_recipe("fast") == FAST and settled({"precision": "float32"}) == {"precision": "float32"}
    assert len(cache[1]) == 1, "nothing is measured that nobody asked for"
    with pytest.raises(InputError): get_recipe("fast", steps="auto")


def test_bfloat16_that_is_emulated_is_warned_of(monkeypatch, tmp_path):
    def networks(precision):
        return Networks(UNet(3, width=8, levels=2), None, get_recipe("fast", precision=precision), torch.device("cpu"))

    monkeypatch.setattr("lagm.training.state.emulates_bfloat16", lambda: True)
    with pytest.warns(UserWarning, match="emulated.*lagm tune"): networks("bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        networks("float32")
        for known in (False, None):
            monkeypatch.setattr("lagm.training.state.emulates_bfloat16", lambda known=known: known)
            networks("bfloat16")
    for text, said in {"flags\t\t: sse avx512f amx_tile": True, "flags : amx_bf16 sse": False, "": None}.items():
        file = tmp_path / f"info{len(text)}"
        file.write_text("processor : 0\n" + text)
        assert emulates_bfloat16(file) is said


def test_lagm_tune_shows_the_table_and_the_choice(cache, capsys, monkeypatch):
    monkeypatch.setattr("lagm.core.threads.choose_threads", lambda: (1, None))
    assert cli.main(["tune"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "times as fast" in line]) == len(TIMES)
    assert said[0].split()[:2] == ["float32", "1000.0"]
    assert said[-1].startswith("auto: precision bfloat16, channels_last")
    assert cli.main(["tune", "--again", "--compile"]) == 0
    assert cache[1] == [False, True] and COMPILED in capsys.readouterr().out


def test_a_folder_in_the_place_of_the_file_does_no_harm_either(cache):
    file, _ = cache
    file.mkdir(parents=True)
    lines = []
    assert tuned(say=lines.append)[1] == TIMES and "not kept for the next time" in lines[0]
