"""The benchmark's table: one cell of it as a notebook runs it, and what is read off many of them."""

import dataclasses
import json
import math
import statistics

import matplotlib.text
import pytest
import torch
import yaml
from sync import ROOT
from templates import run_cells

from lagm.core.errors import InputError
from lagm.core.files import read_json, write_json
from lagm.evaluation.intervals import picture_counts, resampled_scores
from lagm.experiments.catalogue import DEMO_METHODS, DEMO_STYLES, missing_inputs, read_catalogue
from lagm.experiments.comparison import (
    Score,
    best_rival,
    better_of,
    cell_pictures,
    compare_all,
    comparison_table,
    finish_figure,
    interval,
    labels_needed,
    labels_saved,
    minutes_table,
    quality_figure,
    read_cells,
    saved_figure,
    saved_table,
    score_differences,
    widening,
)
from lagm.experiments.report import (
    ablation_table,
    benchmark_table,
    cell_of,
    class_figures,
    find_results,
    group_minutes,
    group_results,
    learning_curves_figure,
    own_table,
    steps_figure,
)
from lagm.experiments.stages import without_finish
from lagm.generators.load import generator_file, kit_generators, load_generator
from lagm.models.saved import load_segmenter
from lagm.training import baselines, datasetgan
from lagm.training import lagm as training
from lagm.training.recipe import FAST, PAPER, get_recipe

METHODS = ROOT / "nbs" / "experiments" / "methods.ipynb"
NAMES = ["supervised", "self-training", "mean teacher", "weak to strong", "frozen encoder", "DatasetGAN", "HandsOff",
         "prototypes", "gradient matching", "paper's recipe"]
CLASSES = ["background", "ear", "eye", "eyebrow", "skin", "hair", "mouth", "nose"]
LEVELS = dict(zip(NAMES, ((60, 28), (57, 24), (58, 27), (60, 27), (61, 22), (68, 10), (65, 13), (63, 8), (74, 8),
                          (18, 2))))  # per cent at k = 1, and more at 30


def normal(rng, *size): return torch.randn(*size, generator=rng, dtype=torch.float64)


def put_cell(root, name, k, seed, change=0.0, levels=LEVELS, draws=200, finished=True, endings=("", ", finished")):
    """A record as methods.ipynb writes it, with numbers by a formula."""
    rng = torch.Generator().manual_seed(1000 * k + seed)
    luck, pictures, x, rows = 2 * normal(rng, 1).item(), normal(torch.Generator().manual_seed(len(name)),
        draws), math.log(k) / math.log(30), {}
    for method, (low, gain) in levels.items():
        for ending in endings if finished else ("",):
            more = (8 * x if method == "gradient matching" else 1.5 * x) if ending else 0
            value = low + gain * x + more + luck + 0.5 * normal(rng, 1).item() + (change if "matching" in method else 0)
            row = dict(fg_miou=round(value / 100, 5),
                       iou=[0.9, *[round(min(0.99, max(0, value + e) / 100), 5)
                                   for e in (6, -22, -14 + 2 * more, 10, 14, 4, 2)]], miou=0.5, fg_miou_present=0.5,
                                   pixel_accuracy=0.9)
            rows[method + ending] = row | (
                dict(draws=(100 * (value + pictures + 0.3 * normal(rng, draws))).round().int().tolist()) if draws
                else {})
    folder = root / "outputs" / f"{name}k{k}-seed{seed}" / "methods"
    folder.mkdir(parents=True)
    validation = {method: [dict(step=s, fg_miou=row["fg_miou"] * s / 1200) for s in range(100, 1300, 100)] for method,
                  row in rows.items()}
    write_json(folder / "metrics.json", dict(experiment="methods", stage="methods", metrics=rows, classes=CLASSES,
                                             seconds={method: 60.0 + 30 * method.endswith("finished")
                                                      for method in rows}, validation=validation), levels=2)


def cells_of(root): return read_cells(find_results(root / "outputs")[0])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with a whole table: three domains, five numbers of labels, three seeds."""
    root = tmp_path_factory.mktemp("table")
    for name in ("demo_", "demo_toon_head_", "demo_micah_"):
        for k in (1, 2, 5, 10, 30):
            for seed in range(3): put_cell(root, name, k, seed)
    return root


# ---- differences


def scores(values, draws=None): return {f"seed{i}": Score(v, None if draws is None else draws[i]) for i,
                                        v in enumerate(values)}


def test_a_planted_difference_is_found_and_none_is_level(tmp_path):
    for k, change in ((1, 0.0), (2, -12.0), (5, -40.0)):
        for seed in range(3): put_cell(tmp_path, "demo_", k, seed, change,
                                       {"DatasetGAN": (62, 0), "gradient matching": (74, 0)}, finished=False)
    found = {c.k: c for c in compare_all(cells_of(tmp_path))}
    assert [found[k].verdict for k in (1, 2, 5)] == ["above", "level",
                                                     "below"] and found[1].rival == "DatasetGAN" and found[1].seeds == 3
    assert abs(found[1].difference - 12) < 1 and found[1].ends[0] < found[1].difference < found[1].ends[1] and (
        found[1].ahead, found[5].ahead) == (3, 0)
    assert found[None].difference == pytest.approx(statistics.fmean(found[k].difference for k in (1, 2, 5)))


def test_pairs_matter():
    """What a seed and a test picture do to both methods cancels."""
    rng = torch.Generator().manual_seed(0)
    luck, pictures = 6 * normal(rng, 4, 1), 3 * normal(rng, 200)
    ours, rival = (70 + luck + pictures + 0.3 * normal(rng, 4, 200), 68 + luck + pictures + 0.3 * normal(rng, 4, 200))
    a, b = scores(ours.mean(1).tolist(), ours), scores(rival.mean(1).tolist(), rival)
    other = scores(rival.mean(1).roll(1).tolist(), rival.roll((1, 7), (0, 1)))
    paired, unpaired = score_differences(a, b), score_differences(a, other)
    assert paired.shape == (4, 200) and paired.var() < unpaired.var() / 50
    (low, high), (lower, higher) = interval(paired), interval(unpaired)
    assert 1 < low < 2 < high < 3 and higher - lower > 5 * (high - low)


def test_few_seeds_have_students_width():
    assert widening(3) == pytest.approx(math.sqrt(3 / 2) * 4.303 / 1.96, abs=1e-3) and 1 < widening(40) < 1.06
    table = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    low, high = interval(table)
    assert low < 0 < 4 < high and interval(table, widen=False) == (1, 3) and interval(table) == (low, high)
    assert interval(table[:1]) is None and interval(torch.arange(1001.0, dtype=torch.float64)[None]) == pytest.approx(
        (25, 975), abs=15)


def test_the_best_rival_is_the_best_by_the_mean_over_our_seeds():
    methods = {"gradient matching, finished": scores([80, 82]), "gradient matching": scores([99, 99]),
               "matching on generated labels": scores([99, 99]),
               "supervised": scores([70, 74]), "supervised, finished": scores([73, 72]),
               "paper's recipe": {"seed0": Score(90)}, "late": {"seed7": Score(95)}}
    assert best_rival(methods, methods["gradient matching, finished"]) == "supervised, finished"
    assert best_rival({"gradient matching": scores([1])}, scores([1])) is None
    (found,) = compare_all({("micah", 2): methods})
    assert (found.ours, found.theirs, found.difference, found.ahead, found.seeds) == (81, 72.5, 8.5, 2, 2)


def test_ours_is_the_last_row_that_has_most_seeds():
    methods = {"gradient matching": scores([70, 70, 70]), "gradient matching, finished": scores([80, 82]),
               "gradient matching, consistent": scores([90, 92]), "HandsOff, consistent": scores([85, 85, 85]),
               "HandsOff": scores([75, 75, 75])}
    (found,) = compare_all({("micah", 2): methods})
    assert (found.method, found.ours, found.seeds) == ("gradient matching", 70, 3), "three seeds say more than two"
    for row in ("finished", "consistent"): methods[f"gradient matching, {row}"] |= {"seed2": Score(81.0)}
    (found,) = compare_all({("micah", 2): methods})
    assert (found.method, found.rival) == ("gradient matching, consistent", "HandsOff, consistent")
    assert found.difference == pytest.approx((90 + 92 + 81) / 3 - 85)
    methods["supervised, finished"] = scores([60, 60, 60])
    assert compare_all({("micah", 2): methods})[0].method == "gradient matching, finished", "a rival is not consistent"
    methods["supervised, consistent"] = scores([99, 61])
    assert compare_all({("micah", 2): methods})[0].method == "gradient matching, finished", "not with all its seeds"
    methods["supervised, consistent"] = scores([99, 99, 99])
    (found,) = compare_all({("micah", 2): methods})
    assert (found.method, found.rival) == ("gradient matching, consistent", "supervised, consistent")
    assert better_of(methods, "supervised") == 60, "alone is what saw no generated picture"
    assert better_of(methods, "HandsOff") == 85
    assert better_of(methods | {"HandsOff, consistent": scores([95])}, "HandsOff") == 75, "three say more than one"
    del methods["gradient matching, consistent"]
    assert compare_all({("micah", 2): methods})[0].method == "gradient matching, finished"


def test_three_rows_of_each_method_in_tables_and_figures(tmp_path):
    for k in (1, 2):
        for seed in (0, 1): put_cell(tmp_path, "demo_", k, seed, endings=("", ", finished", ", consistent"))
    results = find_results(tmp_path / "outputs")[0]
    cells = read_cells(results)
    assert {found.method for found in compare_all(cells)} == {"gradient matching, consistent"}
    figure = quality_figure(cells)
    said = {text.get_text() for text in figure.findobj(matplotlib.text.Text)}
    assert {"matching", "matching, finished", "matching, consistent", "supervised, consistent"} <= said
    bars = finish_figure(cells, "big-ears")
    assert [text.get_text() for text in bars.legends[0].texts] == ["supervised, finished", "matching",
                                                                    "matching, finished", "and consistent"]
    assert len(bars.axes[0].containers) == 4


def test_resamples_follow_from_the_name_and_the_number_of_pictures():
    masks = torch.randint(0, 3, (30, 8, 8), generator=torch.Generator().manual_seed(0))
    counts = picture_counts(masks.roll(1, 1), masks, 3)
    draws = resampled_scores(counts, of="micah")
    assert len(draws) == 200 and draws.equal(resampled_scores(counts, of="micah")) and not draws.equal(
        resampled_scores(counts, of="toon-head"))
    perfect = resampled_scores(picture_counts(masks, masks, 3), of="micah")
    assert perfect.eq(1).all() and 0.5 < draws.std() / draws.mean() * 100 < 20


# ---- labels saved


def test_labels_saved_by_hand(tmp_path):
    curve = {1: 40.0, 2: 50.0, 5: 70.0, 10: 65.0, 30: 80.0}
    assert labels_needed(curve, 45) == (pytest.approx(2**0.5), "") and labels_needed(curve,
        60) == (pytest.approx(2 * 2.5**0.5), "")
    assert labels_needed(curve, 70) == (pytest.approx(5), "") and labels_needed(curve,
        75) == (pytest.approx(10 * 3**(2 / 3)), "")
    assert labels_needed(curve, 80.1) == (30, ">")
    assert labels_needed(curve, 40) == (1, "≤") == labels_needed({1: 40.0}, 3)
    cells = {("big-ears", 1): {"supervised": scores([40]), "supervised, finished": scores([38]),
                               "gradient matching": scores([30]), "gradient matching, finished": scores([60])},
             ("big-ears", 10): {"supervised": scores([70]), "supervised, finished": scores([80]),
                                "gradient matching, finished": scores([85])}}
    assert labels_saved(cells) == {"big-ears": {1: (pytest.approx(10**0.5), ""),
                                                10: (10, ">")}}, "alone means the better of supervised and finished"
    assert saved_table(cells) == [["domain", "ours with 1", "ours with 10"], ["big-ears", "3.2", "> 10"]]


# ---- tables and figures


def test_the_whole_table(table):
    cells = cells_of(table)
    assert [*cells] == [(domain, k) for domain in DEMO_STYLES for k in (1, 2, 5, 10, 30)]
    lines = comparison_table(cells)
    assert len(lines) == 1 + 3 * 6 and {line[-1] for line in lines[1:]} <= {"above", "level",
        "below"} and lines[1][-1] == "above" and lines[6][1] == "mean"
    assert minutes_table(cells, "micah")[2] == ["supervised, finished", *["1.5"] * 5]
    results = find_results(table / "outputs")[0]
    groups, minutes = group_results(results), group_minutes(results)
    for domain in DEMO_STYLES:
        rows = benchmark_table(groups, minutes, domain)
        assert [row[0] for row in rows[1:]] == [row for name in NAMES for row in (name, f"{name}, finished")] and rows[
            1][1].endswith("(3)")
    figures = [quality_figure(cells), saved_figure(cells), learning_curves_figure(results),
               *(finish_figure(cells, domain) for domain in DEMO_STYLES)]
    for figure in figures: figure.canvas.draw()
    assert len(figures[0].axes) == 3 and len(figures[3].axes) == 5
    said = [text.get_text() for text in figures[0].axes[0].texts]
    assert "matching, finished" in said and "HandsOff" in said and "paper's recipe" not in said
    assert any(text.startswith("below: paper's recipe 1") for text in said)
    assert {text.get_text() for text in figures[2].axes[0].texts} == set(
        NAMES), "no curves of finished rows, and those of the others"
    assert class_figures(results) == {}, "twenty methods are too many bars"


def test_runs_that_ask_for_steps_draw_a_curve_and_are_in_no_table(tmp_path):
    put_cell(tmp_path, "demo_", 2, 0)
    for steps, value in ((1000, 0.41), (4800, 0.63), (2400, 0.52)):
        for k in (2, 10):
            folder = tmp_path / "outputs" / f"demo_steps_{steps}_k{k}-seed0" / "methods"
            folder.mkdir(parents=True)
            record = dict(stage="methods", classes=CLASSES, parameters=dict(tested_on="val"), seconds={},
                          metrics={"mean teacher": dict(fg_miou=value, iou=[value] * 8, miou=value,
                                                        fg_miou_present=value, pixel_accuracy=value)},
                          validation={"mean teacher": [dict(step=1, fg_miou=0.99)]})
            write_json(folder / "metrics.json", record)
    results = find_results(tmp_path / "outputs")[0]
    groups, minutes = group_results(results), group_minutes(results)
    lines = [axis.lines[0] for axis in steps_figure(results).axes]
    assert [[*line.get_xdata()] for line in lines] == [[1000, 2400, 4800]] * 2
    assert [line.get_ydata().tolist() for line in lines] == [pytest.approx([41, 52, 63])] * 2
    assert not any("demo_steps" in word for row in own_table(groups, minutes) for word in row)
    assert {k for _, k in read_cells(results)} == {2} and not class_figures(results)
    assert max(max(line.get_ydata()) for line in learning_curves_figure(results).axes[0].lines) < 99


def test_a_partial_table_has_dashes(tmp_path):
    for seed in range(2): put_cell(tmp_path, "demo_", 2, seed)
    put_cell(tmp_path, "demo_", 5, 0, levels={"supervised": (60, 28)})
    put_cell(tmp_path, "demo_micah_", 5, 1)
    (tmp_path / "outputs" / "demo_micah_k2-small" / "methods").mkdir(parents=True)
    (tmp_path / "outputs" / "demo_micah_k2-small" / "methods" / "metrics.json").write_text(
        json.dumps({"stage": "methods", "metrics": {"supervised": {"fg_miou": 0.5}}}))
    cells = cells_of(tmp_path)
    lines = {(line[0], line[1]): line[2:] for line in comparison_table(cells)[1:]}
    assert [*lines] == [("big-ears", "2"), ("big-ears", "5"), ("micah", "2"), ("micah", "5")] and lines["big-ears",
        "5"] == lines["micah", "2"] == ["–"] * 7
    assert lines["micah", "5"][-1] == "one seed" and lines["micah", "5"][-2] == "1 of 1" and lines["big-ears",
        "2"][-2] == "2 of 2"
    assert minutes_table(cells, "big-ears")[-1][1:] == ["1.5", "–"]
    for figure in (quality_figure(cells), saved_figure(cells), finish_figure(cells, "big-ears")): figure.canvas.draw()


def test_old_records_are_read(tmp_path):
    for seed in range(3): put_cell(tmp_path, "demo_", 2, seed, draws=0, finished=False)
    (found,) = compare_all(cells_of(tmp_path))
    assert found.method == "gradient matching" and found.ends is not None and found.verdict in ("above", "level")
    assert finish_figure(cells_of(tmp_path), "big-ears") is None and quality_figure(cells_of(tmp_path)).axes


def test_the_names_of_cells():
    assert [cell_of(name) for name in ("demo_k2", "demo_toon_head_k30", "demo_micah_k1", "demo_paper_k2", "demo_k0",
                                       "demo_downstream_k5", "celeba_2")] == [
        ("big-ears", 2), ("toon-head", 30), ("micah", 1), None, None, None, None]


def test_ablations_are_set_beside_what_is_as_finished(tmp_path):
    put_cell(tmp_path, "demo_", 2, 0)
    put_cell(tmp_path, "demo_ablation_x", 2, 0, change=-5, levels={"gradient matching": LEVELS["gradient matching"]})
    results, whole = find_results(tmp_path / "outputs")[0], cells_of(tmp_path)["big-ears", 2]
    lines = {line[1]: line for line in ablation_table(results)[1:]}
    for method in ("gradient matching", "gradient matching, finished"):
        assert lines[method][3] == f"{whole[method]['seed0'].value:.1f}" and -7 < float(lines[method][4]) < -3


def test_the_same_test_pictures_of_each_cell(tmp_path):
    for name, k, seed in (("demo_micah_", 2, 0), ("demo_", 10, 11), ("demo_", 10, 2), ("demo_", 2, 0)):
        put_cell(tmp_path, name, k, seed)
        (tmp_path / "outputs" / f"{name}k{k}-seed{seed}" / "methods" / "test.png").write_bytes(b"\x89PNG")
    put_cell(tmp_path, "demo_", 1, 0)
    assert [path.parent.parent.name for _, path in cell_pictures(find_results(tmp_path / "outputs")[0])] == [
        "demo_k2-seed0", "demo_k10-seed2", "demo_micah_k2-seed0"]


def test_the_report_shows_it(tmp_path, table, monkeypatch):
    (tmp_path / "outputs").symlink_to(table / "outputs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lagm.experiments.catalogue.project_folder", lambda start=".": table)
    monkeypatch.setattr("builtins.display", lambda thing: None, raising=False)
    run_cells(ROOT / "nbs" / "experiments" / "report.ipynb", {"out_dir": str(tmp_path / "report")})
    text, record = (tmp_path / "report" / "report.md").read_text(), read_json(tmp_path / "report" / "metrics.json")
    for title in ("The demo benchmark: micah", "Ours against the best rival", "Labels saved", "What the finish does",
                  "Minutes: toon-head"): assert f"## {title}\n" in text
    assert {"methods.png", "saved.png", "curves.png", "finish_big-ears.png", "finish_toon-head.png",
            "finish_micah.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
    assert len(record["comparisons"]) == 18 and record["comparisons"][0]["verdict"] == "above"


# ---- experiments


def test_the_catalogue_has_every_cell():
    runs = read_catalogue(ROOT)
    cells = {cell: run for run in runs.values() if run.stage == "methods" and (cell := cell_of(run.experiment))}
    assert [*cells] == [(style, k) for style in ("big-ears", "micah", "toon-head")
                        for k in (1, 2, 5, 10, 30)] or len(cells) == 15
    for (style, k), run in cells.items(): assert (run.parameters.get("style", "big-ears"),
                                                  run.parameters["k"]) == (style,
                                                      k) and run.parameters["steps"] == DEMO_METHODS["steps"]
    assert {**yaml.safe_load(METHODS.with_suffix(".yaml").read_text())} == DEMO_METHODS
    assert runs["demo_downstream_finished_k5/evaluate"].needs == ("demo_downstream_k5/downstream",) and runs[
        "demo_downstream_k5/downstream"].parameters["finish_on"] == 5
    for name in ("demo_cross_micah", "demo_cross_toon_head"): assert not runs[f"{name}/annotate"].parameters[
        "finish"] and runs[f"{name}/cross_domain"].parameters["finish"]
    assert "finish" not in runs["cgpart_car/cross_domain"].parameters


def test_a_generator_is_a_name_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generator_file() == generator_file("") == generator_file("big-ears") == kit_generators()[
        "big-ears"] and load_generator("big-ears").feature_channels == load_generator().feature_channels
    message = r"^there is no generator 'manga': the kit has big-ears.*; or give a file$"
    with pytest.raises(InputError, match=message): load_generator("manga")
    (tmp_path / "mine").touch()
    assert [str(generator_file(name)) for name in ("mine", "big-ears.safetensors", "./big-ears")] == ["mine",
        "big-ears.safetensors", "big-ears"]
    run = dataclasses.replace(read_catalogue(ROOT)["demo_k2/methods"], parameters={"generator": "manga"})
    assert [line for line in missing_inputs(run, tmp_path)] == [
        f"generator: {str(pytest.raises(InputError, generator_file, 'manga').value)}"]


def test_a_recipe_without_its_finish():
    assert without_finish(PAPER) == PAPER and FAST.finish > 0 == without_finish(FAST).finish
    assert dataclasses.replace(without_finish(FAST), finish=FAST.finish) == FAST


def test_a_record_with_a_line_a_row(tmp_path):
    value = {"a": {"b": {"c": [1, 2.5, {"d": None}]}, "e": []}, "f": [], "g": [1, [2, "ü"]], "h": float("nan")}
    write_json(tmp_path / "x.json", value, levels=2)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value | {
        "h": None} and '  "b": {"c":[1,2.5,{"d":null}]},\n' in text and "ü" in text
    write_json(tmp_path / "y.json", value)
    assert (tmp_path / "y.json").read_text(encoding="utf-8") == json.dumps(value | {"h": None}, indent=1,
        ensure_ascii=False) + "\n"


# ---- one cell, as the notebook runs it


SIZES = dict(iterations=2, warm_up=2, person_steps=2, pretraining_steps=2, inversion_steps=2, pixel_steps=3, members=2,
             pairs=3, width=4, test_pictures=13, threads=1)


def test_one_cell_with_all_methods(tmp_path):
    run_cells(METHODS, SIZES | dict(out_dir=str(tmp_path), k=1, steps={"supervised": 3, "paper's recipe": 5}))
    record = read_json(tmp_path / "metrics.json")
    rows = record["metrics"]
    assert [*rows] == [row for name in NAMES for row in (name, f"{name}, finished", f"{name}, consistent")] == [
        *record["seconds"]] == [*record["validation"]]
    assert (tmp_path / "metrics.json").stat().st_size < 3e6 / 45
    for name, row in rows.items():
        assert len(row["draws"]) == 200 and row["interval"][0] <= row["fg_miou"] <= row["interval"][1] and len(
            row["iou"]) == 8 and row["labels_on"] == ("generated" if "DatasetGAN" in name else "real")
        method, _, stage = name.partition(", ")
        before = {"": (), "finished": ("",), "consistent": ("", ", finished")}[stage]
        parts = [row, *(rows[method + ending] for ending in before)]
        assert row["seconds"] == pytest.approx(sum(part["own_seconds"] for part in parts), abs=0.16)
        assert row["segmenter_steps"] == sum(part["own_steps"] for part in parts)
        folder = tmp_path / name.replace(", ", "-").replace(" ", "-").replace("'", "")
        assert load_segmenter(folder / "segmenter.safetensors")[1]["method"] == name
    assert [rows[name]["own_steps"] for name in ("supervised", "paper's recipe", "gradient matching",
                                                 "mean teacher")] == [3, 5, 4, 4]
    assert load_segmenter(tmp_path / "segmenter.safetensors")[1]["method"] == "gradient matching, consistent"
    assert {"table.png", "test.png", "classes.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_stopped_cell_goes_on(tmp_path, monkeypatch):
    """What was done is not done again, what it took counts, and the numbers are those of a run in one piece."""
    some = SIZES | dict(methods="supervised, DatasetGAN, gradient matching", test_pictures=6)
    whole = run_cells(METHODS, some | dict(out_dir=str(tmp_path / "whole")))["table"]
    calls, matched = [], training.train_lagm  # called by two methods, from their own modules

    def stopping(*given, **options):
        calls.append(options["checkpoint"].stem)
        if calls.count("gradient-matching") == 1 and calls[-1] == "gradient-matching": raise KeyboardInterrupt
        return matched(*given, **options)

    for module in (baselines, datasetgan): monkeypatch.setattr(module, "train_lagm", stopping)
    with pytest.raises(KeyboardInterrupt): run_cells(METHODS, some | dict(out_dir=str(tmp_path / "parts")))
    assert not (tmp_path / "parts" / "metrics.json").exists() and read_json(
        tmp_path / "parts" / "gradient-matching" / "seconds.json")["seconds"] >= 0
    before = (tmp_path / "parts" / "DatasetGAN" / "segmenter.safetensors").stat().st_mtime_ns
    table = run_cells(METHODS, some | dict(out_dir=str(tmp_path / "parts")))["table"]
    assert calls == ["DatasetGAN", "gradient-matching",
                     "gradient-matching"] and (tmp_path / "parts" / "DatasetGAN" / "segmenter.safetensors").stat(
                         ).st_mtime_ns == before
    assert all(table[name]["draws"] == whole[name]["draws"] and table[name]["iou"] == whole[name]["iou"]
               for name in whole)


@pytest.mark.parametrize(("change", "words"), [
    (dict(methods="magic"), "there is no baseline 'magic'; there are supervised"),
    (dict(steps={"magic": 3}), "there is no baseline 'magic'"),
    (dict(settings={"HandsOff": {"membres": 3}}, methods="HandsOff"), "there is no membres in HandsOff"),
    (dict(steps={"supervised": 0}), "steps of supervised are 0: give"),
    (dict(steps={"supervised": 2.5}), "steps of supervised are 2.5"), (dict(changes={"stepps": 2}), "stepps"),
    (dict(generator="manga"), "there is no generator 'manga'"), (dict(style="manga"), "manga")])
def test_a_mistake_is_told_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(InputError, match=words): run_cells(METHODS,
                                                           SIZES | change | dict(out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_finish_can_be_left_out(tmp_path):
    table = run_cells(METHODS, SIZES | dict(out_dir=str(tmp_path), methods="gradient matching", finish=False,
                                            changes=dict(metric="l2")))["table"]
    assert [*table] == ["gradient matching"] and load_segmenter(tmp_path / "segmenter.safetensors")[1][
        "method"] == "gradient matching"
    assert read_json(tmp_path / "metrics.json")["recipe"]["metric"] == "l2" == get_recipe("fast", metric="l2").metric


@pytest.fixture
def quick_finish(monkeypatch):
    """A finish that takes no step, and what it was called with."""
    calls = []

    def train_finish(segmenter, generator, images, masks, recipe, *, checkpoint, **options):
        calls.append((checkpoint.name, len(images)))
        return training.Trained(segmenter.eval(), None, {"losses": [], "validation": []}, 0, options["labels"],
                                tuple(images.shape[2:]))

    monkeypatch.setattr(training, "train_finish", train_finish)
    return calls


def test_cross_domain_finishes_every_network(tmp_path, quick_finish):
    small = dict(k=2, pictures=2, supervised_steps=1, teacher_steps=1, width=2, threads=1)
    run_cells(METHODS.with_name("cross_domain.ipynb"), small | dict(finish=True, out_dir=str(tmp_path)))
    record = read_json(tmp_path / "metrics.json")
    names = ["gradient matching", "labelled domain alone", "mean teacher"]
    assert [*record["metrics"]] == [row for name in names for row in (name, f"{name}, finished")]
    assert "each network also finished on them" in record["summary"][0]
    assert quick_finish == [(f"finish-{name.replace(' ', '-')}.safetensors", 2) for name in names]
    assert all(record["metrics"][name] == record["metrics"][f"{name}, finished"]
               for name in names), "a finish without a step changes nothing"


@pytest.mark.parametrize("labelled", [0, 2])
def test_the_downstream_network_is_finished_if_asked_for(tmp_path, quick_finish, labelled):
    run_cells(METHODS.with_name("downstream.ipynb"),
              dict(pictures=2, epochs=1, width=2, validation_pictures=2, threads=1, finish_on=labelled,
                   out_dir=str(tmp_path)))
    said = read_json(tmp_path / "metrics.json")["summary"][0]
    assert quick_finish == [("finish.safetensors", 2)] * bool(labelled) and said.endswith(
        "finished on 2 labelled pictures:" if labelled else "without a finish:")


def test_annotate_says_whether_there_is_a_finish(tmp_path):
    run_cells(METHODS.with_name("annotate.ipynb"),
              dict(iterations=1, warm_up=1, width=1, channels=1, layers=1, validation_pictures=2, finish=False,
                   threads=1, out_dir=str(tmp_path)))
    record = read_json(tmp_path / "metrics.json")
    assert "recipe fast without a finish, state of step 3" in record["summary"][0] and record["recipe"] == json.loads(
        json.dumps(dataclasses.asdict(without_finish(get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1)))))
