"""The comparison of all methods, as it runs from the command line at its small size."""

import json
import os
import subprocess
import sys

import pytest

from lagm.downstream import load_segmenter

SIZES = dict(iterations=2, paper_iterations=3, warm_up=2, person_steps=2, pixel_steps=3, members=2, pairs=3, width=4, test_pictures=6, threads=1)


def call(folder, **parameters):
    words = [word for name, value in (SIZES | parameters).items() for word in ("-p", name, str(value))]
    return subprocess.run([sys.executable, "-c", "import sys; from lagm.cli import main; sys.exit(main())", "run", "methods", "--small", "-o", str(folder), *words],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_row_for_each_method(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["supervised", "self-training", "mean teacher", "DatasetGAN", "gradient matching", "paper's recipe"]
    assert list(report["metrics"]) == list(report["seconds"]) == [row["method"] for row in report["rows"]] and len(report["classes"]) == 8
    for row in report["rows"]:
        assert row["segmenter_steps"] == (3 if row["method"] == "paper's recipe" else 4) and row["interval"]["low"] <= row["fg_miou"] <= row["interval"]["high"] and row["k"] == 2 and row["seed"] == 0
        assert row["labelled_on"] == ("generated" if row["method"] == "DatasetGAN" else "real")
    assert {"table.png", "test.png", "curves.png", "methods.ipynb"} <= {p.name for p in tmp_path.iterdir()}
    for line in report["summary"]: assert line in done.stdout
    files = {path.parent.name: load_segmenter(path)[1] for path in tmp_path.rglob("segmenter.safetensors")}
    assert {name: header["metrics"] for name, header in files.items() if name != tmp_path.name} == {
        name.replace(" ", "-").replace("'", ""): metrics for name, metrics in report["metrics"].items()}
    ours = files[tmp_path.name]
    assert ours["method"] == "gradient matching" and ours["labels"].n_classes == 8 and ours["size"] == [64, 64] and ours["step"] == 6


@pytest.mark.parametrize("change, words", [(dict(methods="magic"), "unknown method 'magic'"), (dict(pairs=0), "pairs is 0")])
def test_a_mistake_gives_one_line(tmp_path, change, words):
    done = call(tmp_path / "run", **change)
    assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1] and not (tmp_path / "run" / "metrics.json").exists()
