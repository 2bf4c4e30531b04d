"""The list of small mistakes is in step with the package; tests/mutate.py tries them."""

import sys

import mutate
import pytest


def test_each_text_is_there_once_and_its_tests_are_there():
    assert mutate.stale(mutate.ROWS) == [] and len(mutate.ROWS) >= 60
    assert len({(row.module, row.old, row.new) for row in mutate.ROWS}) == len(mutate.ROWS)
    assert all(row.old != row.new for row in mutate.ROWS)
    for row in mutate.ROWS:
        compile(mutate.source(row).read_text(encoding="utf-8").replace(row.old, row.new), row.module, "exec")
    for run in (run for row in mutate.ROWS for run in mutate.arguments(row.tests)):
        assert (mutate.ROOT / run[0]).is_file(), run


def test_a_text_that_is_gone_is_said(monkeypatch, capsys):
    gone = mutate.ROWS[0]._replace(old="no such text")
    monkeypatch.setattr(mutate, "ROWS", [gone])
    monkeypatch.setattr(sys, "argv", ["mutate.py"])
    assert mutate.main() == 1
    assert "row 0: 'no such text' occurs 0 times in lagm.core.files; it must occur once" in capsys.readouterr().out


def test_a_mistake_is_caught_and_one_without_effect_survives(monkeypatch, capsys):
    """With a stand-in for pytest: the copy is changed, the checkout is not."""
    row = next(row for row in mutate.ROWS if row.module == "training.recipe" and "math.pi" in row.old)
    before, seen = mutate.source(row).read_bytes(), []

    def fake(run, copy):
        seen.append("math.pi * (step + 1)" in (copy / "lagm" / "training" / "recipe.py").read_text(encoding="utf-8"))
        return not (seen[-1] and catches)

    monkeypatch.setattr(mutate, "passes", fake)
    monkeypatch.setattr(mutate, "prepare", lambda: None)
    for catches, code, says in ((True, 0, "none survives"), (False, 1, "1 survive")):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["mutate.py", str(mutate.ROWS.index(row))])
        assert mutate.main() == code and seen == [False, True] and says in capsys.readouterr().out
    assert mutate.source(row).read_bytes() == before
    monkeypatch.setattr(mutate, "passes", lambda *a: False)
    assert mutate.main() == 1 and "fail already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no row elephants"): mutate.chosen(["elephants"])
