"""The README is the front notebook: prose with working links, code with what it printed."""

import json
import shutil
import statistics
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from sync import ROOT, notebooks

from lagm.core.errors import InputError
from lagm.experiments import readme
from lagm.experiments.comparison import comparison_table, read_cells, saved_table
from lagm.experiments.report import as_markdown, benchmark_table, find_results, group_minutes, group_results


@pytest.fixture
def project(tmp_path):
    """A function that writes nbs/index.ipynb from cells into a folder with a few files, and returns the folder."""
    for name in ("LICENSE", "nbs/images/faces.png", "nbs/components/00_core.ipynb", "tests/test_core.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    nbformat.write(v4.new_notebook(), tmp_path / "nbs" / "components" / "00_core.ipynb")

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


@pytest.mark.parametrize("link", ["[a](none.ipynb)", "![a](images/none.png)", '<img src="none.png">',
                                  "[a](../README.txt#x)"])
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
    cell = v4.new_code_cell("plot()",
                            outputs=[v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"})])
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


# ---- the links of the chapters


@pytest.fixture
def book(tmp_path):
    """A function that writes notebooks {name: (title, code cells)} into nbs/ of a folder, and returns the folder."""
    def write(**notebooks):
        for name, (title, *sources) in notebooks.items():
            path = tmp_path / "nbs" / f"{name.replace('__', '/')}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            cells = [v4.new_markdown_cell(f"# {title}"), *map(v4.new_code_cell, sources)]
            nbformat.write(v4.new_notebook(cells=cells), path)
        return tmp_path
    return write


def last(path) -> str:
    return nbformat.read(path, 4).cells[-1].source


def test_a_chapter_ends_with_links_to_its_neighbours_and_to_what_it_needs(book):
    folder = book(book__00_glossary=("Glossary",), book__01_labels=("Labels", "#| default_exp data.labels"),
                  book__02_steps=("Steps", "#| default_exp training.steps", "from lagm.core import shown_only",
                                  "#| export\nimport torch\nfrom lagm.core.seeds import a\nfrom lagm.data import "
                                  "labels"),
                  reference__core__seeds=("Seeds", "#| default_exp core.seeds"))
    assert len(readme.write_links(folder)) == 4
    assert last(folder / "nbs/book/02_steps.ipynb") == (
        "---\n\nprevious: [01 Labels](01_labels.ipynb) ·\nneeds: [01 Labels](01_labels.ipynb),\n"
        "[Seeds](../reference/core/seeds.ipynb) ·\nwords: [00 Glossary](00_glossary.ipynb)")
    assert "next: [01 Labels](01_labels.ipynb)" in last(folder / "nbs/book/00_glossary.ipynb")
    assert "previous" not in last(folder / "nbs/reference/core/seeds.ipynb")  # the book and the reference are apart


def test_links_are_written_once_and_follow_the_chapters(book):
    folder = book(book__01_a=("A",), book__02_b=("B",))
    assert len(readme.write_links(folder, check=True)) == 2 and last(folder / "nbs/book/01_a.ipynb") == "# A"
    assert len(readme.write_links(folder)) == 2
    before = (folder / "nbs/book/01_a.ipynb").read_bytes()
    assert readme.write_links(folder) == [] and (folder / "nbs/book/01_a.ipynb").read_bytes() == before
    book(book__03_c=("C",))
    assert [path.stem for path in readme.write_links(folder)] == ["02_b", "03_c"]
    assert "next: [03 C](03_c.ipynb)" in last(folder / "nbs/book/02_b.ipynb")
    cells = nbformat.read(folder / "nbs/book/02_b.ipynb", 4).cells
    assert [cell.id for cell in cells].count(readme.LINKS) == 1 and len(cells) == 2


def test_the_reference_is_read_room_by_room(book):
    folder = book(reference__training__loop=("Loop",), reference__core__files=("Files",), reference__zoo=("Zoo",),
                  reference__data__cache=("Cache",))
    assert [path.stem for path in readme.chapters(folder)["reference"]] == ["files", "cache", "loop", "zoo"]


def test_check_tells_of_stale_links_and_of_links_to_nothing(book, capsys):
    folder = book(index=("front",), book__01_a=("A\n\nSee [b](02_b.ipynb)",), book__02_b=("B",))
    assert readme.main(["--root", str(folder)]) == 0 and readme.main(["--root", str(folder), "--check"]) == 0
    (folder / "nbs/book/02_b.ipynb").unlink()
    capsys.readouterr()
    assert readme.main(["--root", str(folder), "--check"]) == 1
    said = capsys.readouterr().err
    assert "leads to no file: 02_b.ipynb" in said
    (folder / "nbs/book/01_a.ipynb").write_text("")
    assert readme.main(["--root", str(folder), "--check"]) == 1 and "no notebook" in capsys.readouterr().err


def test_all_links_of_the_notebooks_lead_somewhere():
    assert readme.broken_links(ROOT) == []


def test_the_glossary_explains_each_term_once_in_one_sentence():
    text = "\n".join(cell.source for cell in nbformat.read(ROOT / "nbs/book/00_glossary.ipynb", 4).cells)
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| ")][1:]
    terms = [term.lower() for term, *_ in rows]
    assert len(terms) >= 25 and terms == sorted(set(terms))
    for term, sentence, chapter in rows:
        assert sentence.endswith(".") and sentence.count(". ") == 0, f"{term}: one sentence, please"
        assert chapter.startswith("["), f"{term}: name the chapter that explains it"


# ---- the numbers in it


def prose_of_notebooks() -> str:
    """README, and the prose of all notebooks: the tables stand in the chapters they belong to."""
    cells = (cell for path in notebooks() for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    return "\n\n".join([(ROOT / "README.md").read_text(encoding="utf-8"), *(cell.source for cell in cells)])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The committed results alone, whatever else was run here."""
    listed = subprocess.run(["git", "ls-files", "-z", "outputs/**/metrics.json", "outputs/*/metrics.json"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("published")
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return find_results(folder / "outputs")[0]


def test_the_tables_are_those_of_the_committed_results(published):
    text, everything = (ROOT / "README.md").read_text(encoding="utf-8"), prose_of_notebooks()
    methods = ("supervised only", "A never matched", "gradient matching", "matching, finished")
    scores = {int(r.variant.removeprefix("seed")): [r.value("fg_miou", m) for m in methods] for r in published
              if r.experiment == "quickstart"}
    assert sorted(scores) == [0, 1, 2, 3, 4]
    for seed, values in scores.items():
        assert f"| {seed} | " + " | ".join(f"{v:.1f}" for v in values) + " |" in everything
    means = [statistics.fmean(column) for column in zip(*scores.values())]
    assert f"| mean | {means[0]:.1f} | {means[1]:.1f} | **{means[2]:.1f}** | **{means[3]:.1f}** |" in everything
    cells, groups, minutes = read_cells(published), group_results(published), group_minutes(published)
    domains = dict.fromkeys(domain for domain, _ in cells)
    tables = {domain: as_markdown(benchmark_table(groups, minutes, domain)) for domain in domains}
    for domain, table in tables.items():
        assert len(table.splitlines()) >= 6 and table in everything, f"no notebook has the table of {domain}"
    assert any(table in text for table in tables.values()), "README lacks a table as it is in outputs/report/report.md"
    resampled = any(score.draws is not None for methods in cells.values() for scores in methods.values()
                    for score in scores.values())
    if resampled:  # older records cannot be compared picture by picture
        for table in (comparison_table(cells), saved_table(cells)): assert as_markdown(table) in everything


def test_the_costs_are_those_of_the_committed_benchmarks():
    text = " ".join(prose_of_notebooks().split())  # wherever its lines break
    listed = subprocess.run(["git", "ls-files", "outputs/benchmarks/matching*/metrics.json"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    records = {Path(name).parent.name: json.loads((ROOT / name).read_text(encoding="utf-8"))["results"]
               for name in listed.stdout.split()}
    assert {"matching", "matching_older", "matching_a256", "matching_memory"} <= records.keys()
    large, spared = {row["variant"]: row for row in records.pop("matching_a256")}, records.pop("matching_memory")
    for work in ("a", "b", "a256"):
        rows = [row for row in spared if row["work"] == work]
        assert [row["variant"] for row in rows] == ["plain", "compiled convolutions", "recomputed", "bfloat16",
                                                    "bfloat16 recomputed"]
        cells = [f"{number:.2f}" for row in rows[1:] for number in (row["times_faster"], row["memory_ratio"])]
        assert "| " + " | ".join(cells) + " |" in text
    for rows in records.values():  # a table of each processor
        for work in "abc":
            variants = {row["variant"]: row for row in rows if row["work"] == work}
            assert list(variants) == ["plain", "tangents", "fast convolutions", "kept memory", "compiled convolutions",
                                      "shared batch", "bfloat16"]
            ours = list(variants.values())[1:]
            ratios = [row["times_faster"] for row in ours] + [ours[i]["memory_ratio"] for i in (3, -1)]
            assert "| " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |" in text
    for variant in ("compiled convolutions", "bfloat16"):
        assert (f"{large[variant]['times_faster']:.1f} times as fast with {large[variant]['memory_ratio']:.2f} of the "
                "memory" in text)
