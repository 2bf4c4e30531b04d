"""The numbers of every notebook with parameters: the ends that the comments state are those that are checked, and an
experiment runs at them.
"""

import ast
import re

import nbformat
import pytest
import torch
from sync import notebooks
from templates import run_cells

from lagm.core.errors import InputError
from lagm.data.demo import Avatars
from lagm.experiments.notebooks import check_parameters, read_parameters
from lagm.training.baselines import BASELINES

ENDS = re.compile(r"(?<![\w.-])(-?\d[\d.]*) (?:to (\d[\d.]*)|or more)\b")  # in the comment of a parameter
NUMBERS = ("int", "float", "list[int]")


def stated(path) -> dict[str, tuple]:
    """The numeric parameters of a notebook and the ends that its comments state: (least, most or None)."""
    found = {}
    for name, parameter in read_parameters(path).items():
        if parameter.annotation not in NUMBERS: continue
        said = ENDS.search(parameter.help)
        number = float if parameter.annotation == "float" else int
        found[name] = tuple(None if end is None else number(end.rstrip(".")) for end in said.groups()) if said else None
    return found


PARAMETRIC = {path.stem: path for path in notebooks() if any(end is None or end for end in stated(path).values())}


def begin(path, parameters: dict) -> dict:
    """Execute a notebook up to the cell that checks its numbers, with other parameters."""
    values, namespace = check_parameters(path, parameters), {"__name__": "__main__"}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code": continue
        exec(compile(cell.source, path.name, "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []): namespace.update(values)
        if re.search(r"^check_numbers\(", cell.source, re.M): return namespace
    raise AssertionError("no cell checks the numbers: check_numbers(globals(), k=(1, 40), ...)")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_notebook_with_numbers_is_met():
    assert {"quickstart", "methods", "annotate", "downstream", "cross_domain", "evaluate", "report", "generators",
            "matching"} <= set(PARAMETRIC)


@pytest.mark.parametrize("name", PARAMETRIC)
def test_a_notebook_states_and_checks_the_ends_of_its_numbers(name, tmp_path, monkeypatch):
    """Each end passes the first cells; what lies beyond is refused there, in one sentence that names the parameter."""
    monkeypatch.chdir(tmp_path)
    path, ends = PARAMETRIC[name], stated(PARAMETRIC[name])
    assert None not in ends.values(), (
        f"the comment states no ends, such as '1 or more' or '1 to 40': {[n for n, end in ends.items() if end is None]}"
    )
    lists = {n: ast.literal_eval(p.default) for n, p in read_parameters(path).items() if p.annotation == "list[int]"}
    value = lambda n, end: [end] * len(lists[n]) if n in lists else end
    begin(path, {n: value(n, least) for n, (least, _) in ends.items()})
    begin(path, {n: value(n, most) for n, (_, most) in ends.items() if most is not None})
    for n, (least, most) in ends.items():
        beyond = [least - 1] + ([] if most is None else [most + 1])
        for wrong in beyond:
            with pytest.raises(InputError, match=rf"^{n} (is|must be) [^;\n]*$"): begin(path, {n: value(n, wrong)})
        if isinstance(least, float):
            with pytest.raises(InputError, match=rf"\b{n}\b"): begin(path, {n: float("nan")})


def test_as_many_pictures_as_the_ends_say():
    assert (len(Avatars("big-ears", "train")),
            len(Avatars("big-ears", "test"))) == (stated(PARAMETRIC["quickstart"])["k"][1],
                                                  stated(PARAMETRIC["methods"])["test_pictures"][1])


# What is small where there is no upper end
SMALL = {
    "quickstart": dict(iterations=1, warm_up=1, supervised_steps=1, width=2),
    "methods": dict(iterations=1, warm_up=1, person_steps=1, pixel_steps=1, pretraining_steps=1, inversion_steps=1,
                    members=1, pairs=1, width=1),
    "annotate": dict(iterations=1, warm_up=1, width=1, channels=1, layers=1),
    "cross_domain": dict(supervised_steps=1, teacher_steps=1, width=1, k=1, pictures=2),
    "downstream": dict(width=1, epochs=1, pictures=2, validation_pictures=2),
    "evaluate": dict(draws=2, pictures=2),
}
# Beside the least numbers: methods takes 0 iterations for the table's, some thousand steps each
FEW = {"methods": dict(steps=dict.fromkeys(BASELINES, 1), changes=dict(finish=0.01))}
# Ends that only have to pass the first cells
DEAR = {("methods", "test_pictures", 1), ("methods", "pixels", 1)}


@pytest.mark.parametrize("end", [0, 1], ids=["least", "most"])
@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_runs_at_the_ends_of_its_numbers(name, end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = {n: both[end] for n, both in stated(PARAMETRIC[name]).items()
            if both[end] is not None and n != "threads" and (name, n, end) not in DEAR}
    values = {n: [e] * 2 if n == "size" else e for n, e in ends.items()}
    small = (SMALL if end else FEW).get(name, {})
    run_cells(PARAMETRIC[name], {"out_dir": str(tmp_path / "out"), "threads": 1} | small | values)
    assert (tmp_path / "out" / "metrics.json").is_file()
