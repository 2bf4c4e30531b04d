"""Parameters are checked before the start; a run is kept only if it really came to its end."""

import json
import math
import os

import nbformat
import papermill
import pytest
from notebooks import printed, write_experiment

from lagm.core.errors import InputError
from lagm.experiments import notebooks as experiments
from lagm.experiments.notebooks import check_parameters, is_finished
from lagm.experiments.running import RunError, run_notebook

METRICS = ("from pathlib import Path\nimport json\nprint('k is', k)\nPath(out_dir, "
           "'metrics.json').write_text(json.dumps({'k': k}))")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment in a little checkout, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_experiment(tmp_path / "nbs" / "experiments" / "10_toy.ipynb", METRICS)


# ---- parameters


def test_parameters_are_read_as_papermill_reads_them(toy):
    ours = experiments.read_parameters(toy)
    theirs = papermill.inspect_notebook(str(toy))
    assert list(ours) == list(theirs) == ["k", "rate", "flip", "recipe", "widths", "data", "plain", "out_dir"]
    assert [p.help for p in ours.values()] == [p["help"] for p in theirs.values()]
    assert ours["recipe"].annotation == "Literal['fast', 'paper']" and ours["plain"].annotation == ""
    assert str(ours["k"]) == "k: int = 2  # labelled pictures"


@pytest.mark.parametrize(("name", "value", "wanted"), [
    ("k", "5", 5), ("k", "250_000", 250_000), ("k", "1e5", 100_000), ("k", 2.0, 2), ("k", 10**20 + 1, 10**20 + 1),
    ("rate", "1e-4", 1e-4), ("rate", 1, 1.0), ("flip", "no", False), ("flip", True, True), ("recipe", "paper", "paper"),
    ("widths", "[4, 8]", [4, 8]), ("widths", (4, "8"), [4, 8]), ("widths", [], []), ("data", "none", None),
    ("data", None, None), ("data", "faces", "faces"),
    ("plain", "2", 2.0), ("out_dir", "3", "3"),
])
def test_values_that_fit(toy, name, value, wanted):
    fitted = check_parameters(toy, {name: value})[name]
    assert fitted == wanted and type(fitted) is type(wanted)


@pytest.mark.parametrize(("name", "value"), [
    ("k", "two"), ("k", 2.5), ("k", True), ("k", None), ("k", [1]), ("k", math.nan), ("k", "inf"), ("rate", "fast"),
    ("rate", False), ("flip", 1), ("flip", "maybe"),
    ("recipe", "papr"), ("recipe", 0), ("widths", "8"), ("widths", [8, "x"]), ("widths", "[8,"), ("data", 3),
    ("plain", "half"), ("out_dir", 3), ("out_dir", None),
])
def test_values_that_do_not_fit_are_named_and_nothing_starts(toy, tmp_path, name, value):
    with pytest.raises(InputError, match=rf"10_toy.ipynb: {name} = .* is not "):
        run_notebook(toy, tmp_path / "outputs" / "toy.ipynb", {name: value})
    assert not (tmp_path / "outputs").exists()


def test_unknown_parameters_are_named_with_the_known_ones(toy, tmp_path):
    with pytest.raises(InputError) as caught:
        run_notebook(toy, tmp_path / "outputs" / "toy.ipynb", {"recepie": "fast", "zzz": 1, "k": "x"})
    message = str(caught.value)
    assert "'recepie', did you mean 'recipe'?" in message and "'zzz'" in message and "k = 'x' is not int" in message
    assert "k, rate, flip, recipe, widths, data, plain, out_dir" in message and "\n" not in message
    assert not (tmp_path / "outputs").exists()


def test_a_notebook_without_parameters_takes_none(tmp_path):
    bare = write_experiment(tmp_path / "bare.ipynb", "k = 2", parameters=None)
    with pytest.raises(InputError, match="no cell of it is tagged 'parameters'"): check_parameters(bare, {"k": 3})
    assert check_parameters(bare, {}) == {}


def test_parameter_files(tmp_path):
    (tmp_path / "a.yaml").write_text("k: 5\nrate: 1e-4\nwidths: [1, 2]\n")
    assert experiments.read_parameter_file(tmp_path / "a.yaml") == {"k": 5, "rate": "1e-4", "widths": [1, 2]}
    for content in ("- k", "k: [1", "", "5: 6", "\x00"):
        (tmp_path / "b.yaml").write_text(content)
        with pytest.raises(InputError, match="b.yaml"): experiments.read_parameter_file(tmp_path / "b.yaml")
    with pytest.raises(InputError, match="none.yaml"): experiments.read_parameter_file(tmp_path / "none.yaml")


# ---- finding


def test_experiments_are_found_by_name_from_any_folder_of_the_checkout(toy, tmp_path, monkeypatch):
    write_experiment(tmp_path / "nbs" / "experiments" / "_draft.ipynb")
    assert experiments.list_experiments() == {"toy": toy}
    assert experiments.purpose(toy) == "Does little."
    title = "# Toy\n\n> Goes on\n> in a second line.\n> And more.\n"
    wrapped = write_experiment(tmp_path / "wrapped.ipynb", title=title)
    assert experiments.purpose(wrapped) == "Goes on in a second line."
    (tmp_path / "nbs" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert experiments.find_experiment("toy") == toy and experiments.find_experiment(str(toy)) == toy
    assert experiments.default_output(toy) == tmp_path / "outputs" / "toy" / "toy.ipynb"
    monkeypatch.chdir(tmp_path)
    assert str(experiments.default_output(toy)) == os.path.join("outputs", "toy", "toy.ipynb")
    with pytest.raises(InputError, match="no experiment 'tay', did you mean 'toy'"): experiments.find_experiment("tay")
    with pytest.raises(InputError, match="no such notebook: other.ipynb"): experiments.find_experiment("other.ipynb")


def test_results_go_to_the_current_folder_when_it_is_not_in_the_checkout(toy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert str(experiments.default_output(toy, elsewhere)) == os.path.join("outputs", "toy", "toy.ipynb")


def test_lagm_home_comes_first(toy, tmp_path_factory, monkeypatch):
    elsewhere, home = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("home")
    for value in (home, os.path.relpath(home)):
        monkeypatch.setenv("LAGM_HOME", str(value))
        for start in (elsewhere, toy.parent): assert experiments.working_folder(toy, start) == home
        assert experiments.default_output(toy, elsewhere) == home / "outputs" / "toy" / "toy.ipynb"
    monkeypatch.setenv("LAGM_HOME", "")
    assert experiments.working_folder(toy, elsewhere) == elsewhere
    (home / "file").touch()
    monkeypatch.setenv("LAGM_HOME", str(home / "file"))
    with pytest.raises(InputError, match="LAGM_HOME is .*file, a file"): experiments.working_folder(toy, elsewhere)


def test_experiments_of_the_package_are_found_without_a_checkout(toy, tmp_path_factory, monkeypatch):
    package, elsewhere = tmp_path_factory.mktemp("site-packages") / "lagm", tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr(experiments.importlib.resources, "files", lambda name: package)
    write_experiment(package / "_experiments" / "own.ipynb")
    assert (list(experiments.list_experiments(elsewhere)) == ["own"]
            and list(experiments.list_experiments(toy.parent)) == ["toy"])
    assert experiments.working_folder(package / "_experiments" / "own.ipynb", elsewhere) == elsewhere
    assert experiments.working_folder(package / "_experiments" / "own.ipynb",
                                      package / "_experiments") == package / "_experiments"


# ---- files that cannot be used


def test_unusable_files_are_named_before_the_start(toy, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.ipynb").write_text("{}")
    for notebook, output, cwd, message in [
        (tmp_path / "none.ipynb", tmp_path / "o" / "a.ipynb", None, "cannot read the notebook .*none.ipynb"),
        (tmp_path / "file", tmp_path / "o" / "a.ipynb", None, "file is not a Jupyter notebook"),
        (tmp_path / "broken.ipynb", tmp_path / "o" / "a.ipynb", None, "broken.ipynb is not a Jupyter notebook"),
        (toy, tmp_path / "file" / "a.ipynb", None, "cannot write to the output folder .*file"),
        (toy, tmp_path / "o" / "a.txt", None, "must be a file ending in .ipynb"),
        (toy, toy, None, "would replace the experiment"),
        (toy, tmp_path / "o" / "a.ipynb", tmp_path / "away", "no such folder to run in: .*away"),
    ]:
        with pytest.raises(InputError, match=message): run_notebook(notebook, output, cwd=cwd)
    assert not (tmp_path / "o").exists()
    if os.path.isdir("/proc/self"):
        with pytest.raises(InputError, match="output folder"): run_notebook(toy, "/proc/self/lagm/a.ipynb")


# ---- running


def test_a_finished_run_is_kept_until_something_changes(toy, tmp_path, capsys):
    output = run_notebook(toy, "outputs/{braces} and spaces/toy.ipynb", {"k": "5"})
    assert json.loads((output.parent / "metrics.json").read_text()) == {"k": 5} and printed(output) == "k is 5\n"
    done = nbformat.read(output, 4)
    assert done.metadata.lagm.parameters == {"k": 5} and done.metadata.lagm.provenance.versions.papermill
    assert str(tmp_path) not in output.read_text(), "an executed notebook must not tell where it ran"
    assert sorted(os.listdir(output.parent)) == ["metrics.json", "toy.ipynb"]
    first = output.read_bytes()

    run_notebook(toy, output, {"k": 5.0, "recipe": "fast"})  # a default spelt out changes nothing
    assert output.read_bytes() == first and "kept" in capsys.readouterr().out
    assert not is_finished(toy, output, {"k": 4}) and not is_finished(toy, output)

    (output.parent / "metrics.json").unlink()
    assert not is_finished(toy, output, {"k": 5})
    run_notebook(toy, output, {"k": 5})
    assert (output.parent / "metrics.json").is_file() and output.read_bytes() != first

    write_experiment(toy, METRICS, title="# Other words")
    assert is_finished(toy, output, {"k": 5})
    write_experiment(toy, METRICS + "\nprint('more')")
    assert not is_finished(toy, output, {"k": 5})
    run_notebook(toy, output, {"k": 5})
    assert printed(output) == "k is 5\nmore\n"
    before = output.read_bytes()
    run_notebook(toy, output, {"k": 5}, force=True)
    assert output.read_bytes() != before


def test_a_failing_cell_gives_a_short_message_and_a_readable_notebook(toy, tmp_path, capsys):
    write_experiment(toy, METRICS, "def f():\n    raise KeyError('lost')\nf()", "print('never')")
    with pytest.raises(RunError) as caught: run_notebook(toy, "outputs/toy.ipynb", echo=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert "KeyError: 'lost'" in str(caught.value) and os.path.join("outputs", "toy.ipynb") in str(caught.value)
    assert printed(tmp_path / "outputs" / "toy.ipynb") == "k is 2\n" and "k is 2\n" in capsys.readouterr().out
    errors = [out for cell in nbformat.read("outputs/toy.ipynb", 4).cells for out in cell.get("outputs", [])
              if out.output_type == "error"]
    assert ([error.ename for error in errors] == ["KeyError"]
            and any("in f()" in line or "f()" in line for line in errors[0].traceback))
    assert not is_finished(toy, "outputs/toy.ipynb")
    write_experiment(toy, METRICS, "1", "print('at last')")
    run_notebook(toy, "outputs/toy.ipynb")
    assert printed(tmp_path / "outputs" / "toy.ipynb") == "k is 2\nat last\n" and is_finished(toy, "outputs/toy.ipynb")


def test_a_mistake_found_by_the_notebook_is_the_callers_too(toy):
    write_experiment(toy, "class InputError(ValueError): pass\nif k > 30: raise InputError(f'k is {k}; give 1 to 30')")
    with pytest.raises(InputError, match=r"^k is 40; give 1 to 30 \(says cell \[4\] of outputs.toy.ipynb\)$"):
        run_notebook(toy, "outputs/toy.ipynb", {"k": 40})


def test_a_run_whose_process_dies_is_not_finished(toy):
    write_experiment(toy, "print('alive', flush=True)", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
                     "print('never')")
    with pytest.raises(RunError, match="the Python process of outputs.toy.ipynb died"):
        run_notebook(toy, "outputs/toy.ipynb")
    assert nbformat.read("outputs/toy.ipynb",
                         4).metadata.papermill.end_time, "if papermill changes this, is_finished could be simpler"
    assert not is_finished(toy, "outputs/toy.ipynb")


def test_relative_folders_are_those_of_the_caller(toy, tmp_path):
    write_experiment(toy, "import os\nprint(os.getcwd(), out_dir)")
    run_notebook(toy, "outputs/toy.ipynb")
    assert printed(tmp_path / "outputs" / "toy.ipynb") == f"{os.path.realpath(tmp_path)} outputs\n"
    run_notebook(toy, "outputs/toy.ipynb", cwd="nbs", force=True)
    assert printed(tmp_path / "outputs"
                   / "toy.ipynb") == f"{os.path.realpath(tmp_path / 'nbs')} {os.path.realpath(tmp_path / 'outputs')}\n"
    run_notebook(toy, "outputs/toy.ipynb", {"out_dir": "mine"})
    assert printed(tmp_path / "outputs" / "toy.ipynb").endswith(" mine\n")


# ---- plain papermill, and what a run reads


def test_wrong_values_are_errors_under_plain_papermill_too(toy, tmp_path):
    write_experiment(toy, "from lagm.experiments.notebooks import "
                          "check_injected\ncheck_injected(globals())\nprint('checked')")
    papermill.execute_notebook(str(toy), str(tmp_path / "a.ipynb"), {"k": 3, "widths": [1]}, progress_bar=False,
                               kernel_name="python3")
    assert printed(tmp_path / "a.ipynb") == "checked\n"
    for wrong, message in (({"kk": 3}, "there is no parameter 'kk', did you mean 'k'"),
                           ({"recipe": "papr"}, "recipe = 'papr' is not")):
        with pytest.raises(papermill.PapermillExecutionError, match=message):
            papermill.execute_notebook(str(toy), str(tmp_path / "b.ipynb"), wrong, progress_bar=False,
                                       kernel_name="python3")


def test_what_a_run_reads_is_recorded_and_compared(toy, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "g.bin").write_bytes(b"weights")
    (tmp_path / "in" / "metrics.json").write_text("1")
    values = {"data": "in/g.bin"}
    output = run_notebook(toy, "outputs/toy.ipynb", values)
    record = nbformat.read(output, 4).metadata.lagm.inputs
    assert record == {"data": {"file": "g.bin", "bytes": 7,
                               "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"}}
    (tmp_path / "in" / "g.bin").write_bytes(b"weights")
    assert is_finished(toy, output, values), "the same content, written anew"
    (tmp_path / "in" / "g.bin").write_bytes(b"Weights")
    assert not is_finished(toy, output, values)
    (tmp_path / "in" / "g.bin").unlink()
    assert not is_finished(toy, output, values)
    assert experiments.describe_inputs({"data": "in/", "out_dir": "in/x"})["data"]["file"] == "metrics.json"
