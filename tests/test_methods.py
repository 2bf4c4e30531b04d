"""The comparison of all methods, as it runs from the command line at its small size."""

import json

import pytest
from shell import lagm

from lagm.models.saved import load_segmenter

SIZES = dict(iterations=2, steps="{supervised: 4, paper's recipe: 3}",
             methods="supervised, DatasetGAN, gradient matching, paper's recipe", warm_up=2, person_steps=2,
             pretraining_steps=2, inversion_steps=2, pixel_steps=3, members=2, pairs=3, width=4, test_pictures=6,
             threads=1)


def call(folder, **parameters):
    words = [word for name, value in (SIZES | parameters).items() for word in ("-p", name, str(value))]
    return lagm("run", "methods", "--small", "-o", folder, *words)


def test_a_row_for_each_method(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    rows = report["metrics"]
    assert list(rows) == list(report["seconds"]) == [row for name in ("supervised", "DatasetGAN", "gradient matching",
        "paper's recipe") for row in (name, f"{name}, finished")] and len(report["classes"]) == 8
    assert (report["parameters"]["k"], report["parameters"]["seed"]) == (2, 0)
    for name, row in rows.items():
        assert row["own_steps"] == (3 if name == "paper's recipe" else 4) or name.endswith(", finished")
        assert row["interval"][0] <= row["fg_miou"] <= row["interval"][1] and row["labels_on"] == ("generated"
            if name.startswith("DatasetGAN") else "real")
    assert {"table.png", "test.png", "curves.png", "methods.ipynb"} <= {p.name for p in tmp_path.iterdir()}
    for line in report["summary"]: assert line in done.stdout
    files = {path.parent.name: load_segmenter(path)[1] for path in tmp_path.rglob("segmenter.safetensors")}
    slugs = {name.replace(", ", "-").replace(" ", "-").replace("'", ""): row for name, row in rows.items()}
    assert set(files) == {*slugs,
                          tmp_path.name} and all(files[slug]["metrics"]["fg_miou"] == pytest.approx(row["fg_miou"],
                              abs=1e-5) for slug, row in slugs.items())
    ours = files[tmp_path.name]
    assert ours["method"] == "gradient matching, finished" and ours["labels"].n_classes == 8 and ours["size"] == [64,
        64] and files["gradient-matching"]["step"] == 6


@pytest.mark.parametrize("change, words",
                         [(dict(methods="magic"), "there is no baseline 'magic'"), (dict(pairs=0), "pairs is 0"),
                          (dict(steps="{supervised: 0}"), "steps of supervised are 0")])
def test_a_mistake_gives_one_line(tmp_path, change, words):
    done = call(tmp_path / "run", **change)
    assert (done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
            and not (tmp_path / "run" / "metrics.json").exists())
