"""The README is the front notebook: prose with working links, code with what it printed."""

import json
import shutil
import statistics
import subprocess

import nbformat
import pytest
from nbformat import v4
from sync import ROOT

from lagm import readme
from lagm.comparison import comparison_table, read_cells, saved_table
from lagm.core_errors import InputError
from lagm.report import as_markdown, benchmark_table, find_results, group_minutes, group_results


@pytest.fixture
def project(tmp_path):
    """A function that writes nbs/index.ipynb from cells into a folder with a few files, and returns the folder."""
    for name in ("LICENSE", "nbs/images/faces.png", "nbs/components/00_core.ipynb", "tests/test_core.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def write(*cells):
        nbformat.write(v4.new_notebook(cells=list(cells)), tmp_path / "nbs" / "index.ipynb")
        return tmp_path
    return write


def convert(folder) -> str:
    return readme.to_markdown(folder / "nbs" / "index.ipynb", folder)


@pytest.mark.parametrize(("link", "moved"), [
    ("[a](components/00_core.ipynb)", "[a](nbs/components/00_core.ipynb)"),
    ("[a](components/00_core.ipynb#files)", "[a](nbs/components/00_core.ipynb#files)"),
    ("[a](./images/faces.png)", "[a](nbs/images/faces.png)"),
    ("[![b](images/faces.png)](../LICENSE)", "[![b](nbs/images/faces.png)](LICENSE)"),
    ('<img src="images/faces.png" width="500">', '<img src="nbs/images/faces.png" width="500">'),
    ("[a](..) and [b](../tests)", "[a](.) and [b](tests)"),
    ("[a](https://example.org/x.png) [b](#top) [c](mailto:a@example.org)", None),
    ("`[a](none.png)` and\n```\n[a](none.png)\n```", None),
])
def test_links_lead_to_the_same_place_from_one_folder_up(project, link, moved):
    assert convert(project(v4.new_markdown_cell(link))) == (moved or link) + "\n"


@pytest.mark.parametrize("link", ["[a](none.ipynb)", "![a](images/none.png)", '<img src="none.png">', "[a](../README.txt#x)"])
def test_links_to_nothing_are_refused(project, link):
    with pytest.raises(InputError, match="leads to no file"): convert(project(v4.new_markdown_cell(link)))


def test_code_is_fenced_with_what_it_printed_and_hidden_cells_are_left_out(project):
    text = convert(project(
        v4.new_raw_cell("raw"), v4.new_markdown_cell("# title\n"), v4.new_code_cell("#| hide\nsecret()"),
        v4.new_code_cell("#| eval: false\n#| echo: true\nx = 1 | 2\nprint(x)", outputs=[
            v4.new_output("stream", text="3\n"), v4.new_output("execute_result", {"text/plain": "'done'"})]),
        v4.new_code_cell("#| default_exp nothing"), v4.new_code_cell("pass")))
    assert text == "# title\n\n```python\nx = 1 | 2\nprint(x)\n```\n\n```\n3\n'done'\n```\n\n```python\npass\n```\n"


def test_pictures_drawn_by_cells_are_refused(project):
    cell = v4.new_code_cell("plot()", outputs=[v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"})])
    with pytest.raises(InputError, match="draws a picture"): convert(project(cell))


def test_check_tells_what_to_do_and_writes_nothing(project, capsys):
    folder = project(v4.new_markdown_cell("one"))
    assert readme.main(["--root", str(folder), "--check"]) == 1 and not (folder / "README.md").exists()
    assert readme.main(["--root", str(folder)]) == 0 and (folder / "README.md").read_text() == "one\n"
    assert readme.main(["--root", str(folder), "--check"]) == 0
    (folder / "README.md").write_text("two\n")
    capsys.readouterr()
    assert readme.main(["--root", str(folder), "--check"]) == 1
    said = capsys.readouterr()
    assert "-two" in said.out and "+one" in said.out and "make readme" in said.err
    assert (folder / "README.md").read_text() == "two\n"


def test_problems_of_the_notebook_are_told(project, tmp_path, capsys):
    assert readme.main(["--root", str(tmp_path)]) == 1 and "there is no" in capsys.readouterr().err
    folder = project(v4.new_markdown_cell("[a](none)"))
    assert readme.main(["--root", str(folder)]) == 1 and "leads to no file: none" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


# ---- the numbers in it


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The committed results alone, whatever else was run here."""
    listed = subprocess.run(["git", "ls-files", "-z", "outputs/**/metrics.json", "outputs/*/metrics.json"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("published")
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return find_results(folder / "outputs")[0]


def test_the_tables_are_those_of_the_committed_results(published):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    methods = ("supervised only", "A never matched", "gradient matching")
    scores = {int(r.variant.removeprefix("seed")): [r.value("fg_miou", m) for m in methods] for r in published if r.experiment == "quickstart"}
    assert sorted(scores) == [0, 1, 2, 3, 4]
    for seed, values in scores.items(): assert f"| {seed} | " + " | ".join(f"{v:.1f}" for v in values) + " |" in text
    means = [statistics.fmean(column) for column in zip(*scores.values())]
    assert f"| mean | {means[0]:.1f} | {means[1]:.1f} | **{means[2]:.1f}** |" in text
    cells, groups, minutes = read_cells(published), group_results(published), group_minutes(published)
    for domain in dict.fromkeys(domain for domain, _ in cells):
        table = benchmark_table(groups, minutes, domain)
        assert len(table) > 5 and as_markdown(
            table) in text, f"README lacks the table of {domain}, as it is in outputs/report/report.md"
    resampled = any(score.draws is not None for methods in cells.values() for scores in methods.values()
                    for score in scores.values())
    if resampled:  # older records cannot be compared picture by picture
        for table in (comparison_table(cells), saved_table(cells)): assert as_markdown(table) in text


def test_the_costs_are_those_of_the_committed_benchmarks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = subprocess.run(["git", "ls-files", "outputs/benchmarks/matching*/metrics.json"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    rows = [row for name in listed.stdout.split() for row in json.loads((ROOT / name).read_text(encoding="utf-8"))["results"]]
    works = {work: {row["variant"]: row for row in rows if row["work"] == work} for work in ("a", "b", "c", "a256")}
    for work in "abc":
        variants = works[work]
        assert list(variants) == ["plain", "tangents", "fast convolutions", "kept memory", "compiled convolutions", "shared batch", "bfloat16"]
        ours = list(variants.values())[1:]
        assert "| " + " | ".join(f"{row['times_faster']:.2f}" for row in ours) + f" | {ours[3]['memory_ratio']:.2f} | {ours[-1]['memory_ratio']:.2f} |" in text
    large = works["a256"]
    for variant in ("compiled convolutions", "bfloat16"): assert f"{large[variant]['times_faster']:.1f} times as fast with {large[variant]['memory_ratio']:.2f} of the memory" in text
