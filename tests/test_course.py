"""The course: six lessons for a class, whose exercises, sliders and heads hold what they promise."""

import ast
import io
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from lagm.core.errors import InputError
from lagm.core.files import asset
from lagm.data.demo import Avatars, stack
from lagm.evaluation.intervals import picture_counts, scores
from lagm.experiments import course
from lagm.experiments.badges import badged_pages, badges, install_code, write_badges
from lagm.experiments.catalogue import project_folder
from lagm.experiments.course import (
    EXERCISES,
    METHODS,
    RECORDED,
    Exercise,
    Exercises,
    Explorer,
    LittleLoop,
    StoredRun,
    as_png,
    explore,
    learn_reader,
    stacked,
    widgets_of,
)
from lagm.generators.contract import Sampling
from lagm.generators.load import load_generator

ROOT = Path(__file__).resolve().parents[1]
PAGES = badged_pages(ROOT)
LESSONS = [path for path in PAGES if path.parent.name == "course"]
ADDRESS = "https://github.com/lagm-kit/lagm"
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=[path.stem for path in LESSONS])


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def cells(path, kind):
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def calls(path, name):
    """All calls of a function in a notebook, as syntax."""
    return [node for source in cells(path, "code") for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]


def number(path):
    return int(path.stem[:2])


# ---- what every lesson has


def test_there_are_six_lessons_and_a_page_for_teachers():
    assert [number(path) for path in LESSONS] == [1, 2, 3, 4, 5, 6] == list(EXERCISES)
    text = "\n".join(cells(ROOT / "nbs" / "course" / "00_for_teachers.ipynb", "markdown"))
    assert all(f"({path.name})" in text for path in LESSONS)
    assert all(word in text for word in ("## Minutes", "## What goes wrong", "## What to ask"))
    for lesson in range(1, 7): assert re.search(rf"^\| lesson {lesson} \|", text, re.M), "no minutes"


@each_lesson
def test_a_lesson_has_goals_questions_exercises_and_a_summary(path):
    prose = cells(path, "markdown")
    assert re.match(rf"# Lesson {number(path)}: .+\n\n> 45 minutes\. ", prose[0])
    for heading in ("Goals", "Questions", "Exercises", "Summary"):
        assert any(re.match(rf"## {heading}\b", cell) for cell in prose), f"no cell begins with ## {heading}"
    assert prose[-1].startswith("## Summary") and len(re.findall("^- ", prose[-1], re.M)) <= 5
    assert sum("<details>" in cell for cell in prose) >= 2, "answers to questions and exercises, folded"
    assert "](../book/" in "\n".join(prose) or "](../tutorials/" in "\n".join(prose)


@each_lesson
def test_the_minutes_of_a_lesson_fit_into_45(path):
    minutes = [int(m) for m in re.findall(r"^## .*\((\d+) minutes", "\n".join(cells(path, "markdown")), re.M)]
    assert len(minutes) >= 4 and 25 <= sum(minutes) <= 45


@each_lesson
def test_every_slider_has_a_stored_picture(path):
    found = 0
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or "explore(" not in cell.source: continue
        found += 1
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source[:60]
    assert found >= (1 if number(path) == 4 else 2)


@each_lesson
def test_a_lesson_asks_each_of_its_exercises(path):
    (made,) = calls(path, "Exercises")
    assert ast.literal_eval(made.args[0]) == number(path)
    asked = calls(path, "check")
    assert [ast.literal_eval(call.args[0]) for call in asked] == [*range(1, len(EXERCISES[number(path)]) + 1)]
    assert all(ast.literal_eval(call.args[1]) is ... for call in asked), "an answer was left in the lesson"


# ---- answers


@pytest.mark.parametrize("lesson", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(lesson, capsys):
    check = Exercises(lesson)
    for i, exercise in enumerate(EXERCISES[lesson], start=1):
        right, said = check.judge(i, exercise.right)
        assert right and said == f"Right. {exercise.why}"
        assert check.judge(i, f" {exercise.right} ".upper())[0], "written otherwise"
        assert exercise.wrong, "no mistake that one makes is explained"
        for answer, text in exercise.wrong.items():
            assert check.judge(i, answer) == (False, f"Not yet. {text}")
        for answer in (-7, "nonsense", None, [], {}):
            assert check.judge(i, answer) == (False, f"Not yet. {exercise.hint}")
        assert not check.judge(i)[0] and "three dots" in check.judge(i)[1]
        if len(str(exercise.right)) > 1: assert str(exercise.right) not in exercise.hint, "it gives the answer away"
        check(i, exercise.right)
        assert capsys.readouterr().out.startswith("Right.")


def test_what_there_is_not_is_refused():
    with pytest.raises(InputError, match="no lesson 9"): Exercises(9)
    for wrong in (0, 4):
        with pytest.raises(InputError, match=f"no exercise {wrong}; it has 1 to 3"): Exercises(1).judge(wrong, 1)


def test_a_number_may_be_off_by_its_tolerance():
    third = Exercise(1 / 3, "", "", tolerance=0.005)
    assert third.judge(0.33)[0] and third.judge("0.333")[0] and not third.judge(0.34)[0]
    assert not Exercise("a", "", "").judge(1)[0] and not Exercise(1, "", "").judge("a")[0]


def test_the_numbers_of_lesson_1_are_those_of_the_generator():
    still = load_generator(sampling=Sampling(psi=0, cutoff=None, noise="const"))
    assert sum(still.feature_channels) == EXERCISES[1][0].right
    faces = still(still.sample_z(8)).image
    assert (faces - faces[:1]).abs().max() < 1e-4 and EXERCISES[1][1].right == 1


def test_the_numbers_of_lesson_2_are_those_of_the_reader():
    generator = load_generator()
    reader = course.VotingReader(generator.feature_channels, 8)
    assert sum(p.numel() for p in reader.parameters()) == EXERCISES[2][0].right
    assert (generator.resolution // generator.feature_sizes[0]) ** 2 == EXERCISES[2][1].right


def test_the_answers_of_lesson_5():
    truth, said = torch.zeros(1, 1, 8, dtype=torch.long), torch.zeros(1, 1, 8, dtype=torch.long)
    truth[..., :4], said[..., 2:6] = 1, 1
    assert abs(scores(picture_counts(said, truth, 2).sum(0)).item() - EXERCISES[5][0].right) < 1e-9
    means = {name: sum(values) for name, values in zip(METHODS, RECORDED[10], strict=True)}
    assert max(means, key=means.get) == EXERCISES[5][1].right


def test_the_recorded_scores_are_those_of_the_older_table():
    """Its records are in the history alone; the comparison's chapter keeps mean and spread of each method."""
    cells = nbformat.read(project_folder() / "nbs/reference/experiments/95_comparison.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    names = dict(zip(METHODS, ("supervised", "DatasetGAN", "gradient matching"), strict=True))
    for place, name in enumerate(METHODS):
        line = next(line for line in text.splitlines() if line.startswith(f"| {names[name]} |") and "(" not in line)
        for cell, rows in zip(line.strip("| ").split(" | ")[1:], RECORDED.values(), strict=True):
            said = [float(word) for word in cell.split(" ± ")]
            assert said == pytest.approx([statistics.fmean(rows[place]), statistics.stdev(rows[place])], abs=0.06)


# ---- sliders


def drawing(a, b):
    figure, axis = plt.subplots(figsize=(2, 1))
    axis.plot([0, a], [0, 1 if b == "up" else -1])
    return figure


def test_an_explorer_draws_what_its_sliders_say():
    explorer = Explorer(drawing, {"a": (1, 5, 1), "b": ["up", "down"]}, {"a": 2})
    assert explorer.start == {"a": 2, "b": "up"}
    box = widgets_of(explorer)
    a, b, picture = box.children
    assert (a.min, a.max, a.step, a.value, b.options) == (1, 5, 1, 2, ("up", "down"))
    assert bytes(picture.value) == explorer.png()
    a.value, b.value = 4, "down"
    assert bytes(picture.value) == explorer.png(a=4, b="down") != explorer.png(a=4)
    assert not plt.get_fignums(), "figures are left open"


def test_a_slider_for_numbers_with_a_point():
    box = widgets_of(Explorer(lambda psi: drawing(psi, "up"), {"psi": (0.0, 1.5, 0.1)}, {"psi": 0.7}))
    assert type(box.children[0]).__name__ == "FloatSlider" and box.children[0].value == 0.7


def test_unknown_values_are_refused_before_anything_is_drawn():
    for start, stills in (({"c": 1}, [{}]), ({}, [{"c": 1}])):
        with pytest.raises(InputError, match="no slider 'c'; there are a, b"):
            Explorer(drawing, {"a": (1, 5, 1), "b": ["up"]}, start, stills)


def test_without_ipywidgets_the_picture_stays(monkeypatch, capsys):
    shown = []
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(course, "display", shown.append)
    explore(drawing, {"a": 2}, [{}, {"a": 3}], a=(1, 5, 1), b=["up", "down"])
    assert len(shown) == 2 and all(type(one).__name__ == "Image" for one in shown)
    assert "ipywidgets" in capsys.readouterr().out


def test_as_png_closes_the_figure():
    figure = drawing(1, "up")
    assert as_png(figure)[:4] == b"\x89PNG" and not plt.fignum_exists(figure.number)


def explorers_of(path, monkeypatch):
    """Run a lesson's cells up to its questions, without showing, and give what its sliders draw with."""
    made = []

    def collect(draw, start=None, stills=({},), **ranges):
        made.append(Explorer(draw, ranges, start or {}, stills))
        return made[-1]

    monkeypatch.setattr(course, "explore", collect)
    names = {"get_ipython": lambda: None}
    for source in cells(path, "code"):
        if "run_line_magic" not in source and "check(" not in source: exec(compile(source, path.name, "exec"), names)
    return made


# Lesson 4 trains for ten seconds, lesson 6 for twenty; nbdev_test runs them, as it does all.
@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in LESSONS if number(p) in (1, 2, 3, 5)], ids=lambda path: path.stem)
def test_the_sliders_of_a_lesson_give_figures_from_end_to_end(path, monkeypatch):
    made = explorers_of(path, monkeypatch)
    assert made
    for explorer in made:
        for name, values in explorer.ranges.items():
            ends = [values[0], values[-1]] if isinstance(values, list) else values[:2]
            for end in ends:
                picture = Image.open(io.BytesIO(explorer.png(**{name: end})))
                assert picture.width > 200 and np.asarray(picture.convert("L")).std() > 5


# ---- the reader, the loop and the stored run


def test_votes_add_up_to_the_score_and_a_reader_learns():
    torch.manual_seed(0)
    features = [torch.randn(3, 4, 4, 4), torch.randn(3, 2, 8, 8)]
    masks = (features[1][:, 0] > 0).long()
    reader = learn_reader([f[:2] for f in features], masks[:2], 2, steps=200)
    assert stacked(features).shape == (3, 6, 8, 8)
    one = [f[2:] for f in features]
    said = reader(one)
    assert (said.argmax(1)[0] == masks[2]).float().mean() > 0.9
    for row, column in ((0, 0), (7, 3)):
        votes = reader.votes(one, row, column)
        assert votes.shape == (3, 2)
        torch.testing.assert_close(votes.sum(0), said[0, :, row, column].detach(), rtol=1e-4, atol=1e-4)


def test_a_step_of_the_loop_moves_both_networks_and_can_be_repeated():
    found = []
    for _ in range(2):
        loop = LittleLoop(k=1, seed=3)
        before = [network.state_dict()[name].clone()
                  for network, name in ((loop.A, "lateral0.weight"), (loop.S, "outc.weight"))]
        found.append(loop.step())
        assert not torch.equal(before[0], loop.A.lateral0.weight) and not torch.equal(before[1], loop.S.outc.weight)
        assert not any(p.requires_grad for p in loop.G.network.parameters())
    assert found[0] == found[1]


def test_the_stored_run_is_small_and_says_what_it_scored():
    assert Path(asset(course.RUN)).stat().st_size <= 400_000
    run, (_, truth) = StoredRun(), stack(Avatars("big-ears", "val"), range(30))
    assert len(run.distances) == run.steps[-1] and len(run.scores) == len(run.steps)
    for name, expected in zip(("matching", "alone"), run.scores[-1], strict=True):
        counts = picture_counts(run.said(run.steps[-1], name), truth, 8).sum(0)
        assert abs(100 * scores(counts).item() - expected) < 0.01
    assert run.annotator(run.steps[0]).n_classes == 8
    with pytest.raises(InputError, match="steps that were"): run.annotator(7)


# ---- badges and the installing cell


def test_the_heads_of_the_pages_are_what_settings_ini_says():
    assert write_badges(ROOT, check=True) == [], "run: make readme"
    assert len(PAGES) - len(LESSONS) == len(list((ROOT / "nbs" / "tutorials").glob("*.ipynb"))) >= 9
    for path in PAGES:
        title, head, install = nbformat.read(path, 4).cells[:3]
        page = path.relative_to(ROOT).as_posix()
        assert title.source.startswith("# ") and head.source == badges(ADDRESS, page)
        assert install.source == install_code(ADDRESS, path) and not install.outputs


def test_the_readme_opens_the_first_lesson():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert badges(ADDRESS, f"nbs/course/{LESSONS[0].name}") in text.split("![Test pictures")[0]


def test_badges_name_the_page_in_all_three_places():
    colab, kaggle, binder = badges("https://github.com/me/kit", "nbs/course/01_a.ipynb", "dev").splitlines()
    assert "github/me/kit/blob/dev/nbs/course/01_a.ipynb)" in colab
    assert "welcome?src=https://github.com/me/kit/blob/dev/nbs/course/01_a.ipynb)" in kaggle
    assert "gh/me/kit/dev?labpath=nbs%2Fcourse%2F01_a.ipynb)" in binder


def test_writing_badges_twice_changes_nothing_and_follows_the_address(tmp_path):
    page = tmp_path / "nbs" / "tutorials" / "05_a.ipynb"
    page.parent.mkdir(parents=True)
    for path in (page, tmp_path / "nbs" / "index.ipynb"):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T", id="t")]), path)
    with pytest.raises(InputError, match="no git_url"): write_badges(tmp_path)
    for address in ("https://github.com/me/kit", "https://github.com/you/kit"):
        (tmp_path / "settings.ini").write_text(f"[DEFAULT]\ngit_url = {address}\n")
        assert write_badges(tmp_path, check=True) == write_badges(tmp_path) == [page, tmp_path / "nbs" / "index.ipynb"]
        assert write_badges(tmp_path) == []
        assert [cell.id for cell in nbformat.read(page, 4).cells] == ["t", "lesson-badges", "lesson-install"]
        assert address in cells(page, "code")[0] and len(cells(tmp_path / "nbs" / "index.ipynb", "code")) == 0


@pytest.mark.parametrize(("given", "place"), [({}, "git+https://github.com/me/kit"),
                                              ({"LAGM_KIT": "file:///a/b.whl"}, "file:///a/b.whl")])
def test_the_installing_cell_installs_only_where_the_kit_is_missing(given, place):
    code = ("import sys\nran = []\n"
            "class Shell:\n    def run_line_magic(self, *words): ran.append(words)\n"
            "def get_ipython(): return Shell()\n" + install_code("https://github.com/me/kit", "30_your_own_pictures")
            + "\nprint(ran)")
    clean = {key: value for key, value in os.environ.items() if key != "LAGM_KIT"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=clean | given)
    assert there.stdout == "[]\n", there.stderr
    bare = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, env=clean | given)
    assert f"""('pip', 'install -q "lagm[paint] @ {place}"')""" in bare.stdout, bare.stderr
