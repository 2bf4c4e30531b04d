"""The report is true with no result, with some and with all."""

import json

import pytest
from sync import ROOT
from templates import run_cells

from lagm.experiments.catalogue import paper_numbers, read_catalogue
from lagm.experiments.comparison import quality_figure, read_cells
from lagm.experiments.report import (
    Row,
    Section,
    ablation_table,
    as_html,
    as_markdown,
    class_figures,
    find_results,
    group_results,
    number_of_labels_figure,
    paper_rows,
    paper_table,
    result_pictures,
    write_pages,
)

CATALOGUE, NUMBERS = read_catalogue(ROOT), paper_numbers()


def put(root, folder, metrics, **more):
    (root / "outputs" / folder).mkdir(parents=True, exist_ok=True)
    (root / "outputs" / folder
     / "metrics.json").write_text(json.dumps({"metrics": metrics, "seconds_in_all": 7200, **more}))


def scores(x, n=8): return dict(pixel_accuracy=x, iou=[x] * n, miou=x, fg_miou=x, fg_miou_present=x)


def rows(root): return {row.experiment: row for row in paper_rows(find_results(root / "outputs")[0], CATALOGUE, root)}


def test_no_result(tmp_path):
    found = rows(tmp_path)
    assert len(found) == 28 and not any(row.values for row in found.values())
    assert all(row.note.startswith("cannot be run here: ") for row in found.values())
    assert [line[3] for line in paper_table(found.values())[1:]] == ["–"] * 28 and number_of_labels_figure(
        found.values()) and quality_figure({}) is None


def test_all_results(tmp_path):
    for name, number in NUMBERS.items():
        stage, row = (("evaluate", "five folds" if number["metric"] == "miou" else "segmenter") if "value" in number
                      else ("cross_domain", "gradient matching"))
        put(tmp_path, f"{name}/annotate", {"segmenter": scores(0.01)}, recipe={"steps": 150_000})
        put(tmp_path, f"{name}/{stage}", {"segmenter": scores(0.02)}
            | {row: {number["metric"]: number.get("value", 50) / 100 + 0.01, "std": 0.1}})
    found = rows(tmp_path)
    assert (not any(row.note for row in found.values())
            and all(row.hours == 4 and row.iterations == 150_000 for row in found.values()))
    table = {line[0]: line for line in paper_table(found.values())[1:]}
    assert (all(table[name][4] == "+1.00" for name in NUMBERS if name != "cgpart_car")
            and table["cgpart_car"][2] == "figure only" and table["cgpart_car"][3] == "51.00")


def test_seeds_variants_and_damage(tmp_path):
    for ending, value in {"": 0.70, "-seed1": 0.74, "-seed2": 0.72, "-small": 0.01}.items():
        put(tmp_path, f"celeba_10{ending}/evaluate", {"segmenter": scores(value)}, classes=list("abcdefgh"))
    put(tmp_path, "horse_2/evaluate", {"segmenter": scores(float("nan"))})
    for name, text in {"horse_10": "{", "horse_30": "[]", "horse_100": '{"metrics": 3}'}.items():
        (tmp_path / "outputs" / name / "evaluate").mkdir(parents=True)
        (tmp_path / "outputs" / name / "evaluate" / "metrics.json").write_text(text)
    results, broken = find_results(tmp_path / "outputs")
    assert len(broken) == 3 and all("metrics.json" in line for line in broken)
    row = rows(tmp_path)["celeba_10"]
    assert (row.values == pytest.approx((70, 74, 72)) and row.ours == pytest.approx(72)
            and row.spread == pytest.approx(2))
    assert "72.00 ± 2.00" in as_markdown(paper_table([row])) and "-2.41" in as_markdown(paper_table([row]))
    assert rows(tmp_path)["horse_2"].values == () and list(class_figures(results)) == ["celeba_10"]


def test_why_something_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("lagm.experiments.report.missing_inputs", lambda run, root: [])
    assert rows(tmp_path)["celeba_2"].note == "not run yet"
    folder = tmp_path / "outputs" / "celeba_2" / "annotate"
    folder.mkdir(parents=True)
    error = {"output_type": "error", "ename": "KeyError", "evalue": "hair\nmore", "traceback": []}
    cell = {"cell_type": "code", "source": "", "metadata": {}, "execution_count": 1, "outputs": [error], "id": "a"}
    (folder / "annotate.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4,
                                                       "nbformat_minor": 5}))
    assert rows(tmp_path)["celeba_2"].note == "annotate failed: KeyError: hair"
    cell["outputs"] = []
    (folder / "annotate.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4,
                                                       "nbformat_minor": 5}))
    assert "was begun and did not end" in rows(tmp_path)["celeba_2"].note
    (folder / "annotate.ipynb").write_text("{")
    assert "cannot be read" in rows(tmp_path)["celeba_2"].note


def test_the_demo_is_grouped_by_method(tmp_path):
    for ending, value in {"": 0.6, "-seed1": 0.7}.items():
        put(tmp_path, f"demo_k2{ending}/methods", {"supervised": scores(value), "LAGM": scores(value + 0.1)})
        put(tmp_path, f"demo_downstream_k2{ending}/annotate", {"segmenter": scores(0.9)})
        put(tmp_path, f"demo_downstream_k2{ending}/evaluate", {"segmenter": scores(0.8)})
    put(tmp_path, "quickstart", {"supervised only": scores(0.5)})
    results = find_results(tmp_path / "outputs")[0]
    groups = group_results(results)
    assert groups["demo_k2", "LAGM"] == pytest.approx([70, 80]) and groups[
        "demo_downstream_k2", "segmenter"
    ] == pytest.approx([80, 80]), "validation numbers must stay out"
    assert groups["quickstart", "supervised only"] == [50] and quality_figure(read_cells(results)) is not None


def test_pages_hold_text_as_text_and_figures(tmp_path):
    picture = tmp_path / "outputs" / "a b" / "test.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"\x89PNG")
    markdown, page = write_pages([Section("<b>", "1 < 2", [["a|b"], ["<script>"]], [("x", picture)])],
                                 tmp_path / "outputs" / "report")
    text, html = markdown.read_text(), page.read_text()
    assert "a\\|b" in text and "<../a b/test.png>" in text and "iVBORw==" not in text
    assert ("<script>" not in html and "&lt;script&gt;" in html and "data:image/png;base64,iVBORw==" in html
            and html.count("<b>") == 0)
    assert as_html([["a"], ["b"]]).count("<tr>") == 2
    assert paper_table([Row("celeba_2", "fg_miou", 56.55, None, (), None, None, "")])[1][2:5] == ["56.55", "–", "–"]


def test_the_report_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "demo_k2/methods", {"supervised": scores(0.5)}, classes=list("abcdefgh"))
    monkeypatch.setattr("lagm.experiments.catalogue.project_folder", lambda start=".": tmp_path)
    monkeypatch.setattr("builtins.display", lambda thing: None, raising=False)
    run_cells(ROOT / "nbs" / "experiments" / "report.ipynb", {"out_dir": "outputs/report"})
    assert ("demo_k2" in (tmp_path / "outputs/report/report.md").read_text()
            and json.loads((tmp_path / "outputs/report/metrics.json").read_text())["methods"]
            == {"demo_k2: supervised": [50.0]})
    assert result_pictures(find_results(tmp_path / "outputs")[0]) == []


def test_the_benchmark_has_a_row_per_method_and_a_column_per_number_of_labels():
    from lagm.experiments.report import benchmark_table, own_table

    groups = {("demo_k2", "supervised"): [60.0, 62.0], ("demo_k10", "supervised"): [80.0],
              ("demo_downstream_k2", "segmenter"): [77.0], ("demo_paper_k2", "segmenter"): [30.0],
              ("quickstart", "A"): [1.0]}
    table = benchmark_table(groups, {("demo_k2", "supervised"): 1.0, ("demo_k10", "supervised"): 2.0})
    assert table == [["method", "k = 2", "k = 10", "minutes"], ["supervised", "61.0 ± 1.4 (2)", "80.0 (1)", "1.5"],
                     ["gradient matching, then downstream", "77.0 (1)", "–", "–"],
                     ["paper's recipe, 15,000 steps", "30.0 (1)", "–", "–"]]
    assert ["quickstart", "A", "1.0", "1.0", "1.0", "1", "–"] in own_table(groups)


def test_ablations_are_set_beside_the_whole_recipe_with_the_same_pictures(tmp_path):
    for seed, value in enumerate((0.77, 0.75)):
        put(tmp_path, f"demo_k2-seed{seed}/methods", {"gradient matching": scores(value), "supervised": scores(0.1)})
    put(tmp_path, "demo_ablation_last_layer-seed1/evaluate", {"segmenter": scores(0.70)})
    put(tmp_path, "demo_ablation_last_layer-seed5/evaluate", {"segmenter": scores(0.60)})
    put(tmp_path, "demo_ablation_last_layer-small/evaluate", {"segmenter": scores(0.01)})
    for seed in (4, 5): put(tmp_path, f"demo_ablation_up-seed{seed}/evaluate", {"segmenter": scores(0.10 * seed)})
    assert ablation_table(find_results(tmp_path / "outputs")[0])[1:] == [
        ["last layer", "segmenter", "70.0", "75.0", "-5.0", "1"], ["up", "segmenter", "45.0 ± 7.1", "–", "–", "2"]]
    assert ablation_table([]) == [["ablation", "network", "FG-mIoU", "whole recipe", "difference", "seeds"]]
