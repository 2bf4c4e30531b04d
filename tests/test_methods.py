"""The comparison of all methods, as it runs from the command line at its small size."""

import dataclasses
import inspect
import json

import pytest
from shell import lagm
from templates import run_cells

from lagm.data.demo import Avatars
from lagm.data.images import save_mask
from lagm.data.label_maps import write_classes
from lagm.experiments.notebooks import experiment_folder
from lagm.generators.load import load_generator
from lagm.models.saved import load_segmenter
from lagm.training.baselines import BASELINES
from lagm.training.drawn import draw_for_labelling
from lagm.training.inversion import Inversion

SIZES = dict(iterations=2, steps="{supervised: 4, paper's recipe: 3}",
             methods="supervised, DatasetGAN, gradient matching, paper's recipe", warm_up=2, person_steps=2,
             pretraining_steps=2, inversion_steps=2, pixel_steps=3, members=2, pairs=3, width=4, test_pictures=6,
             threads=1)


def call(folder, *more, **parameters):
    words = [word for name, value in (SIZES | parameters).items() for word in ("-p", name, str(value))]
    return lagm("run", "methods", "--small", "-o", folder, *words, *more)


def test_a_row_for_each_method(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    rows = report["metrics"]
    assert list(rows) == list(report["seconds"]) == [row for name in ("supervised", "DatasetGAN", "gradient matching",
        "paper's recipe") for row in (name, f"{name}, finished", f"{name}, consistent")] and len(report["classes"]) == 8
    assert (report["parameters"]["k"], report["parameters"]["seed"]) == (2, 0)
    for name, row in rows.items():
        assert row["own_steps"] == (3 if name == "paper's recipe" else 4) or ", " in name
        assert row["own_steps"] == 2 or not name.endswith(", consistent"), "0.9 x 2, rounded"
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
    assert ours["method"] == "gradient matching, consistent" and ours["labels"].n_classes == 8 and ours["size"] == [64,
        64] and files["gradient-matching"]["step"] == 6


def test_other_steps_of_a_method_train_it_alone_anew(tmp_path):
    both = "supervised, paper's recipe"
    first = call(tmp_path, methods=both)
    assert first.returncode == 0, first.stderr
    kept = {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in ("supervised", "papers-recipe")}
    again = call(tmp_path, methods=both, steps="{supervised: 5, paper's recipe: 3}")
    assert again.returncode == 0, again.stderr
    assert "set aside, of other steps, settings or recipe: supervised" in again.stdout + again.stderr
    rows = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert [rows[name]["own_steps"] for name in ("supervised", "paper's recipe")] == [5, 3]
    now = {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in kept}
    assert now["papers-recipe"] == kept["papers-recipe"] and now["supervised"] > kept["supervised"]
    assert (tmp_path / "aside-1" / "supervised" / "run.json").is_file()
    assert (tmp_path / "aside-2" / "supervised-finished" / "run.json").is_file()  # it began from the old network
    assert (tmp_path / "aside-3" / "supervised-consistent" / "run.json").is_file()
    asked = json.loads((tmp_path / "papers-recipe" / "asked.json").read_text())
    assert f"pull={Inversion().pull}" in asked["settings"]  # the kit's defaults, too: other ones train anew


def test_with_less_memory_what_is_there_stays(tmp_path):
    assert call(tmp_path, methods="supervised").returncode == 0
    kept = (tmp_path / "supervised" / "run.json").stat().st_mtime_ns
    again = call(tmp_path, "--force", methods="supervised", changes="{recompute: true, keep_memory: false}")
    assert again.returncode == 0 and "set aside" not in again.stdout + again.stderr, again.stderr
    assert (tmp_path / "supervised" / "run.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize("change, words",
                         [(dict(methods="magic"), "there is no baseline 'magic'"), (dict(pairs=0), "pairs is 0"),
                          (dict(steps="{supervised: 0}"), "steps of supervised are 0"),
                          (dict(settings="{DatasetGAN: {memberz: 3}}"), "there is no memberz in DatasetGAN")])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_mistake_gives_one_line(tmp_path, change, words, more):
    done = call(tmp_path / "run", *more, **change)
    assert (done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
            and not (tmp_path / "run" / "metrics.json").exists())


@pytest.mark.parametrize("k", [0, 2])
def test_every_method_gets_the_pictures_that_the_generator_drew(tmp_path, monkeypatch, k):
    """Those that read features get the latents, too; the others the same pictures, and nobody plays a person."""
    pool, given, names = Avatars("big-ears", "train"), {}, ["supervised", "DatasetGAN", "HandsOff", "prototypes",
                                                            "matching on generated labels"][:2 if k else 5]
    drawn = draw_for_labelling(load_generator(), tmp_path / "drawn", 3)
    write_classes(drawn, pool.labels)
    (drawn / "masks").mkdir()
    for name, (_, mask) in zip(("0000", "0002"), pool):
        save_mask(drawn / "masks" / f"{name}.png", mask.byte().numpy(), pool.labels)
    for name in names:
        entry = BASELINES.get(name)

        def spy(*args, name=name, train=entry.train, **options):
            given[name] = len(args[2]), "drawn" in options and options["drawn"].names
            return train(*args, **options)

        spy.__signature__ = inspect.signature(entry.train)
        monkeypatch.setitem(BASELINES._entries, name, dataclasses.replace(entry, train=spy))
    run_cells(experiment_folder() / "methods.ipynb", SIZES | dict(
        k=k, drawn=str(drawn), methods=", ".join(names), steps={}, finish=not k, out_dir=str(tmp_path / "out"),
        person_steps=9**9))
    known, both = (k, ["0000", "0002"]), "real and generated" if k else "generated"
    assert given == dict.fromkeys(names, known) | {"supervised": (k + 2, False)}
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {row["labels_on"] for row in report["metrics"].values()} == {both} and report["drawn"] == ["0000", "0002"]
    assert f"from {k + 2} labelled pictures of big-ears, 2 of them drawn by the generator" in report["summary"][0]
