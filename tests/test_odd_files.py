"""Files of others where ours are expected: one sentence, or a line that names what is passed over; never a traceback,
a formula or a faked line.
"""

import copy
import json
import math
import random
import subprocess
import sys

import matplotlib
import pytest
from notebooks import write_experiment
from sync import ROOT

from lagm import cli
from lagm.core.errors import InputError
from lagm.data.labels import LabelSet
from lagm.evaluation.curves import curves
from lagm.evaluation.grids import labelled_grid
from lagm.evaluation.metrics import Metrics
from lagm.evaluation.tables import confusion_figure, iou_bars, iou_table
from lagm.experiments import notebooks as experiments
from lagm.experiments import running
from lagm.experiments.catalogue import paper_numbers, read_catalogue
from lagm.experiments.comparison import (
    comparison_table,
    finish_figure,
    minutes_table,
    quality_figure,
    read_cells,
    saved_figure,
    saved_table,
)
from lagm.experiments.notebooks import is_finished, read_parameter_file, read_parameters, read_record
from lagm.experiments.report import (
    Section,
    ablation_table,
    as_html,
    as_markdown,
    class_figures,
    find_results,
    group_minutes,
    group_results,
    in_html,
    in_markdown,
    learning_curves_figure,
    own_table,
    paper_rows,
    paper_table,
    steps_figure,
    why_missing,
    write_pages,
)
from lagm.experiments.running import run_notebook
from lagm.experiments.sweep import Step, Sweep, describe_steps, plan_steps
from lagm.training.watching import MetricsLog

LAUGHS = "k: 1\nmodels:\n  - &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"  - &a{i} [{','.join(10 * [f'*a{i - 1}'])}]\n"
                                                                    for i in range(1, 9))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_experiment(tmp_path / "nbs" / "experiments" / "toy.ipynb", "print(k)")


# ---- YAML


@pytest.mark.parametrize(("text", "message"), [
    (LAUGHS, "line 4: an alias"), ("k: 1\nk: 2", "line 2: 'k' is given a second time"),
    ("changes: {a: 1, a: 2}", "'a' is given a second time"), ("rate: .nan", "line 1: .nan is no number"),
    ("rate: -.inf", "is no number"),
    ("k: " + 5000 * "9", "is no number"), ("k: 9223372036854775808", "is no number"),
    ("k: !!timestamp 2020-99-99", "line 1: "), ("k: !!python/object/apply:os.getcwd []", "line 1: "),
    ("k: !!binary aGk=", "line 1: "),
    ("data: " + "[" * 5000, "more than 20 levels"),
    ("".join(" " * i + "a:\n" for i in range(200)), "more than 20 levels"), ("k:\t[\t5", "line 1: "),
    ("k: !!bool x", "is not YAML"), ("k: !!float x", "is no number"),
    ("- 1", "name: value"), ("5: 6", "name: value"), ("just text", "name: value"), ("", "name: value"),
    ("k: 1\n---\nk: 2", "line 2: "), ("k: [1", "is not YAML"), ("a: b\x1b[31m", "is not YAML"),
    ("? [a]\n: 1", "line 1: "),
    ("k: 5\n" * 20_000, "larger than"),
])
def test_odd_yaml_is_a_sentence_with_its_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_bytes(text.encode())
    with pytest.raises(InputError) as caught: read_parameter_file(tmp_path / "a.yaml")
    assert (message in str(caught.value) and "a.yaml" in str(caught.value) and "\n" not in str(caught.value)
            and "\x1b" not in str(caught.value) and len(str(caught.value)) < 400)


def test_what_yaml_is_taken_for(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffk: 5\r\nwhen: 2020-99-99\nday: 2020-01-02\nn: 010\nrate: 1e-4\nclock: "
                                      "1:30\nsize: [1_000, -2.5]\nflag: yes\nnone: ~\n".encode())
    assert read_parameter_file(tmp_path / "a.yaml") == {"k": 5, "when": "2020-99-99", "day": "2020-01-02", "n": "010",
                                                        "rate": "1e-4", "clock": "1:30", "size": [1000, -2.5],
                                                        "flag": True, "none": None}
    (tmp_path / "b.yaml").write_bytes("k: 5".encode("utf-16"))
    assert read_parameter_file(tmp_path / "b.yaml") == {"k": 5} and paper_numbers()["celeba_2"]["metric"] == "fg_miou"


def test_odd_values_on_the_command_line(toy, capsys):
    for name, value in (("rate", "nan"), ("rate", "inf"), ("rate", "9" * 400), ("widths", "[" * 3000),
                        ("widths", "[&a 1, *a]"), ("widths", "[2020-99-99]"), ("k", "9" * 5000)):
        assert cli.main(["run", "toy", "-p", name, value]) == 2
        assert f"toy.ipynb: {name} = " in (said := capsys.readouterr().err) and said.count("\n") == 1
    (toy.parent.parent.parent / "laughs.yaml").write_text(LAUGHS)
    assert (cli.main(["run", "toy", "-f", "laughs.yaml", "--dry-run"]) == 2
            and "line 4: an alias" in capsys.readouterr().err)


# ---- records


ODD = [None, True, -1, 0.5, 10**400, 1e300, math.nan, math.inf, "", "text", "$x^", "a|b\n# c\x1b[2J<script>", [], [[]],
       [None], ["a", 1], {}, {"a": {}}, {"step": 1}, [{"step": "x"}], "x" * 500, {"": []}]


def changed(value, rng):
    """A copy with one thing in it replaced, removed or renamed."""
    value, place, path = copy.deepcopy(value), None, []
    inner = value
    while isinstance(inner, dict | list) and inner and (not path or rng.random() < 0.75):
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        place, inner = inner, inner[key]
        path.append(key)
    if place is None: return rng.choice(ODD)
    if isinstance(place, dict) and rng.random() < 0.2:
        place[rng.choice(["metrics", "iou", "$a", "_b", "c\nd"])] = place.pop(path[-1])
    elif rng.random() < 0.1: del place[path[-1]]
    else: place[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return value


def scores(x): return dict(pixel_accuracy=x, iou=[x] * 3, miou=x, fg_miou=x, fg_miou_present=x)


RECORD = {"stage": "methods", "metrics": {"supervised": scores(0.5), "gradient matching": scores(0.7),
                                          "gradient matching, finished": scores(0.8) | {"draws": [8000, 8100, 7900]}},
                                          "classes": ["no", "ear", "eye"], "seconds_in_all": 60.5,
                                          "seconds": {"supervised": 30.0, "gradient matching": 30},
          "recipe": {"steps": 5},
          "validation": {"supervised": [{"step": 1, "fg_miou": 0.1}, {"step": 2, "fg_miou": 0.2}]}, "summary": ["fine"]}


def whole_report(root, runs):
    """All that the report computes and draws."""
    results, broken = find_results(root / "outputs")
    rows, groups = paper_rows(results, runs, root), group_results(results)
    cells = read_cells(results)
    tables = [paper_table(rows), own_table(groups, group_minutes(results)), ablation_table(results),
              comparison_table(cells), saved_table(cells), minutes_table(cells, "big-ears")]
    figures = [quality_figure(cells), saved_figure(cells), finish_figure(cells, "big-ears"),
               learning_curves_figure(results), steps_figure(results), *class_figures(results).values()]
    for figure in figures:
        if figure is not None: figure.canvas.draw()
    return (results, broken, write_pages([Section("a", "\n\n".join(broken), table) for table in tables],
                                         root / "outputs" / "report"))


def test_one_odd_record_does_not_cost_the_report(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr("lagm.experiments.report.missing_inputs", lambda run, root: [])
    rng, passed_over = random.Random(0), 0
    folders = ("demo_k2/methods", "demo_steps_1000_k2/methods", "celeba_2/evaluate")
    for folder in folders: (tmp_path / "outputs" / folder).mkdir(parents=True)
    for i in range(80):
        for folder in folders:
            record = changed(RECORD, rng)
            for _ in range(i % 3): record = changed(record, rng)
            text = json.dumps(record)
            if i % 10 == 9: text = text[:rng.randrange(len(text))] if i % 20 == 9 else "[" * 100_000
            (tmp_path / "outputs" / folder / "metrics.json").write_text(text)
        results, broken, _ = (whole_report(tmp_path, {}) if i % 4 == 0 or i > 70
                              else (*find_results(tmp_path / "outputs"), None))
        assert (len(results) + len(broken) == 3
                and all(line.startswith("passed over: ") and "metrics.json" in line for line in broken))
        group_results(results), group_minutes(results), ablation_table(results), paper_rows(results, {}, tmp_path)
        passed_over += len(broken)
    assert passed_over > 30


def test_the_report_says_what_it_passed_over(tmp_path):
    for name, content in {"x": json.dumps({"metrics": {"x": {"fg_miou": 10**400}}}),
                          "y": '{"metrics": {"a": {"fg_miou": 0.5}}}', "z\x1b[31m<b>": "{"}.items():
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "metrics.json").write_text(content)
    results, broken, pages = whole_report(tmp_path, {})
    assert ([r.experiment for r in results] == ["y"] and len(broken) == 2 and "passed over: " in broken[0]
            and "a number of 1e+15 or more" in broken[0])
    for page in pages:
        assert ("a number of 1e+15 or more" in page.read_text() and "\x1b" not in page.read_text()
                and "<b>" not in page.read_text())


def test_all_results_that_are_there_count():
    results, broken = find_results(ROOT / "outputs")
    assert broken == [] and len(results) >= 70


def test_odd_notebooks_are_no_finished_runs(toy, tmp_path, monkeypatch, capsys):
    output = run_notebook(toy, tmp_path / "outputs" / "toy" / "toy.ipynb", {"data": "in"})
    whole, rng, bad = json.loads(output.read_text()), random.Random(1), 0
    assert is_finished(toy, output, {"data": "in"})
    monkeypatch.setattr("lagm.experiments.report.missing_inputs", lambda run, root: [])
    run = type("Run", (), dict(stage="toy", output=output, finished=lambda self, root: is_finished(toy, output)))()
    for i in range(200):
        odd = changed(whole, rng)
        if i % 2: odd = whole | {"metadata": changed(whole["metadata"], rng)}
        output.write_text(json.dumps(odd) if i % 25 else json.dumps(odd)[:-9])
        assert (is_finished(toy, output, {"data": "in"}) in (True, False)
                and isinstance(why_missing([run], tmp_path), str))
        for reader in (read_record, read_parameters, experiments.purpose):
            try: reader(output)
            except InputError as error:
                assert "\n" not in str(error)
                bad += 1
    assert bad > 50
    for record in ({"finished": True}, {"finished": True, "parameters": {}, "inputs": {},
                                        "files": ["../../etc/passwd"]},
                   {"finished": 1, "parameters": {}, "inputs": {}, "files": []},
                   {"finished": True, "parameters": {}, "inputs": {"data": 5}, "files": []},
                   {"finished": True, "parameters": [], "inputs": {}, "files": []}, 7):
        output.write_text(json.dumps(whole | {"metadata": whole["metadata"] | {"lagm": record}}))
        assert not is_finished(toy, output, {"data": "in"})
        with pytest.raises(InputError, match="odd record"): read_record(output)
    capsys.readouterr()
    run_notebook(toy, output, {"data": "in"})
    assert capsys.readouterr().out.startswith("passed over: ") and is_finished(toy, output, {"data": "in"})


def test_a_sweep_names_an_odd_notebook_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "nbs/experiments/annotate.ipynb", "print(k)",
                     parameters='k: int = 2\nout_dir: str = "."')
    (tmp_path / "nbs/experiments/annotate").mkdir()
    (tmp_path / "nbs/experiments/annotate/a.yaml").write_text("out_dir: outputs/a/annotate\n")
    (tmp_path / "outputs/a/annotate").mkdir(parents=True)
    (tmp_path / "outputs/a/annotate/annotate.ipynb").write_text('{"cells": 5}')
    runs, said = read_catalogue(tmp_path), []
    assert (plan_steps(runs, tmp_path)["a/annotate"].state == "to do"
            and "passed over: " in describe_steps(plan_steps(runs, tmp_path)))
    (tmp_path / "outputs/a/annotate/run.log").mkdir()  # the log cannot be written
    steps = Sweep(runs, tmp_path, say=said.append).run()
    assert steps["a/annotate"].state == "failed" and "passed over: " in said[0]


def test_results_with_an_odd_record_are_described(toy, tmp_path):
    for content, expected in (("{", "passed over: "), ('{"summary": 5}', ""),
                              ('{"summary": ["a\\u001b[2Jb", 5]}', "a\\x1b[2Jb"), ("[]", ""),
                              (json.dumps({"summary": ["x"] * 300}), "... and 100 more lines")):
        (tmp_path / "metrics.json").write_text(content)
        said = cli.describe_results(tmp_path / "toy.ipynb")
        assert expected in said and "\x1b" not in said


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x00\n[1]\n{"step": "x"}\n{"no": 1}\n' + b"[" * 100_000
                                       + b'\n{"step": 2}\n{"half')
    log = MetricsLog(tmp_path / "m.jsonl")
    assert [record["step"] for record in log.records()] == [1, 2]
    log.rewind(1)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'


# ---- texts of others


HOSTILE = "x\x1b[31m\n# faked |line| <script>alert(1)</script> `code` [a](http://b) ![c](d) $\\frac$ \u202egnp & *b*"


def test_texts_do_nothing_on_a_page():
    line = in_markdown(HOSTILE)
    for text in ("\x1b", "\n", "<script", "\u202e"): assert text not in line and text not in in_html(HOSTILE)
    for mark in "|`[]#$*": assert all(line[i - 1] == "\\" for i, c in enumerate(line) if c == mark), mark
    assert (in_markdown("demo_k2 (seed 0): 5.0 ± 0.1") == "demo_k2 (seed 0): 5.0 ± 0.1"
            == in_html("demo_k2 (seed 0): 5.0 ± 0.1"))
    assert as_markdown([["a"], [HOSTILE]]).count("\n") == 2 and as_html([["a"], [HOSTILE]]).count("<tr>") == 2


def test_pages_and_figures_take_any_text(tmp_path):
    matplotlib.use("Agg")
    (tmp_path / "a>b <c>").mkdir()
    (tmp_path / "a>b <c>" / "p.png").write_bytes(b"png")
    markdown, page = write_pages([Section(HOSTILE, HOSTILE, [[HOSTILE]], [(HOSTILE, tmp_path / "a>b <c>" / "p.png")])],
                                 tmp_path / "report", title=HOSTILE)
    assert ("](<../a%3Eb %3Cc%3E/p.png>)" in markdown.read_text()
            and "<script" not in page.read_text() + markdown.read_text()
            and "\x1b" not in page.read_text() + markdown.read_text())
    assert sum(line.startswith("#") for line in markdown.read_text().splitlines()) == 2

    money, results = ["$", "$x$", "a $\\frac$ b"], {"costs $5 and $\\frac": Metrics(0.5, [0.5] * 3, 0.5, 0.5, 0.5)}
    labels = LabelSet("money", tuple(money), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    torch = pytest.importorskip("torch")
    for figure in (iou_bars(results, money, title="$^$"), iou_table(results, money, title="$^$"),
                   confusion_figure([[1, 0, 0]] * 3, money, title="$^$"),
                   curves({"$^$": ([1, 2], [1, 2])}, title="$^$"),
                   labelled_grid(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64), labels,
                                 title="$^$")):
        figure.canvas.draw()


def test_names_are_shown_harmless_on_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path / "nbs/experiments/toy.ipynb", "1", parameters="k: int = 2  # how\x9bmany",
                     title="# T\n\n> Clear\x1b[2J all.")
    assert cli.main(["list"]) == 0 and cli.main(["show", "toy"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x9b" not in said and "Clear\\x1b[2J all." in said and "how\\x9bmany" in said


def test_a_reason_is_said_once():
    run = read_catalogue(ROOT)["celeba_2/annotate"]
    text = describe_steps({"a": Step(run, "blocked", "no g\nno b\nno g"), "b": Step(run, "blocked", "no b\nno c"),
                           "c": Step(run, "blocked", "no g\nno b"), "d": Step(run, "to do")})
    assert [" ".join(line.split()) for line in text.splitlines()] == ["a blocked no g; no b",
                                                                      "b blocked no c; the same as a",
                                                                      "c blocked the same as a",
                                                                      "d to do outputs/celeba_2/annotate",
                                                                      "1 to do, 3 blocked"]


def test_the_check_that_is_advised_is_of_the_experiment_that_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("celeba_10", "celeba_30"):
        assert cli.main(["run", name, "--dry-run"]) == 2
        said = "".join(capsys.readouterr())
        assert f"`lagm doctor {name}`" in said and "celeba_2" not in said


# ---- the command line


@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyError("hair"), 1, "KeyError: 'hair' (test_odd_files.py, line "),
    (RecursionError("too deep"), 1, "RecursionError: too deep"),
    (MemoryError(), 1, "there is not enough memory for this\n"),
    (InputError("a\nb\x1b[2J"), 2, "lagm: error: a b\\x1b[2J\n"),
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (ZeroDivisionError(), 1, "ZeroDivisionError: "), (AssertionError("x\ny"), 1, "AssertionError: x y"),
    (KeyboardInterrupt(), 130, "lagm: interrupted; the same command begins anew"),
])
def test_every_error_is_one_line(toy, monkeypatch, capsys, error, code, message):
    def fail(*_): raise error
    monkeypatch.setattr("lagm.experiments.catalogue.read_catalogue", fail)
    assert cli.main(["list"]) == code
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
    if code != 130:
        for words in (["--traceback", "list"], ["list", "--traceback"]):
            assert cli.main(words) == code
            assert ((said := capsys.readouterr().err).startswith("Traceback")
                    and said.splitlines()[-1].startswith("lagm: error: "))
    assert (code != 1 or isinstance(error, OSError | MemoryError)
            or "`lagm --traceback ...` shows where" in running.explain_error(error)[0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that close")
@pytest.mark.parametrize("words", ["list --stages", "--help", "show toy"])
def test_nobody_listening_is_no_error(toy, words):
    code = f"import sys; from lagm.cli import main; sys.argv = ['lagm']; sys.exit(main({words.split()!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 1)


def test_every_command_has_the_traceback_option():
    for words in (["run", "x"], ["prepare", "coco", "f", "--images", "i", "--out", "o"], ["doctor"], ["inspect", "f"],
                  ["fetch"]):
        assert cli.build_parser().parse_args([*words, "--traceback"]).traceback
