"""The site: a small one is built as the whole one is, and what would be wrong with one is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from sync import ROOT, notebooks

pytest.importorskip("sphinx", reason="the site's tools are the extra docs")
sys.path.insert(0, str(ROOT / "nbs" / "site"))
import build  # noqa: E402
import hooks  # noqa: E402
import stage  # noqa: E402

from lagm.core.errors import InputError  # noqa: E402

SMALL = ["nbs/book/00_glossary.ipynb", "nbs/book/08_the_distance_of_two_gradients.ipynb",
         "nbs/reference/core/01_registry.ipynb", "outputs/demo_paper_k2/evaluate/evaluate.ipynb"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A site of four notebooks and two modules; its folder."""
    folder = tmp_path_factory.mktemp("site")
    assert build.build(folder, SMALL, ["lagm.core.errors", "lagm.core.registry"]) == []
    return folder / "html"


def text(folder, page):
    return (folder / page).read_text(encoding="utf-8")


def test_a_small_site_has_every_kind_of_page(small):
    for page in ("index", "book", "reference", "reference/core", "experiments", "api/index", "api/core", "search",
                 "api/lagm.core.registry", "CHANGELOG", *(name.removesuffix(".ipynb") for name in SMALL)):
        assert (small / f"{page}.html").is_file(), page
    assert "01_registry" in text(small, "searchindex.js")


def test_a_chapter_is_shown_as_it_was_run_without_directives(small):
    page = text(small, "nbs/book/08_the_distance_of_two_gradients.html")
    assert "default_exp" not in page and "#| " not in re.sub(r"<[^>]+>", "", page)
    assert "data:image/png" in page or "_images/" in page
    assert 'class="cell tag_exported' in page and "mathjax/tex-chtml.js" in page
    assert (small / "_static/mathjax/tex-chtml.js").stat().st_size > 1_000_000


def test_words_lead_to_the_glossary_once(small):
    page = text(small, "nbs/book/08_the_distance_of_two_gradients.html")
    terms = re.findall(r'href="00_glossary\.html#(term-[^"]+)"', page)
    assert len(terms) > 1 and len(terms) == len(set(terms))
    assert all(f'id="{term}"' in text(small, "nbs/book/00_glossary.html") for term in terms)


def test_a_name_leads_to_its_cell_and_explains_its_parameters(small):
    page = text(small, "api/lagm.core.registry.html")
    source, anchor = re.search(r'href="\.\./(nbs/reference/core/01_registry\.html)#(cell-[^"]+)"', page).groups()
    assert f'id="{anchor}"' in text(small, source)
    assert "<strong>" in page and "Parameters" in page
    assert "InputError" in text(small, "api/index.html").split("Every module")[0]


def test_links_out_of_the_site_lead_to_the_repository(small):
    address = f"{stage.settings()['git_url']}/blob/main/nbs/experiments/quickstart.ipynb"
    assert f'href="{address}"' in text(small, "index.html")


# ---- what it shows


def test_every_notebook_is_in_a_section():
    shown = stage.all_notebooks()
    made = [path.relative_to(ROOT).as_posix() for path in notebooks() if path.name != "index.ipynb"]
    assert set(made) <= set(shown) and len(shown) == len(set(shown))
    folders = [folder for _, _, folder in stage.SECTIONS.values()] + ["nbs/experiments", "nbs/benchmarks"]
    assert [page for page in shown if not page.startswith(tuple(f"{folder}/" for folder in folders))] == []


def test_every_module_is_in_the_api():
    assert {"lagm.cli", "lagm.training.lagm", "lagm.core.errors"} <= set(stage.all_modules())
    assert all((ROOT / stage.module_source(module)).is_file() for module in stage.all_modules())
    assert sum(map(len, stage.public_names().values())) >= 25


def test_links_are_mended():
    site = stage.Site(Path("x"), "https://example.org/blob/main", ["nbs/book/01_faces_and_labels.ipynb"])
    page = "nbs/book/02_a_frozen_generator.ipynb"
    assert stage.mended("[a](01_faces_and_labels.ipynb#Summary)", page, site) == (
        "[a](/nbs/book/01_faces_and_labels.ipynb#Summary)")
    assert stage.mended("[a](../../LICENSE) [b](../index.ipynb) `[c](none)`", page, site) == (
        "[a](https://example.org/blob/main/LICENSE) [b](/index.md) `[c](none)`")
    badge = "https://example.org/badge.svg"
    assert stage.mended(f'[![Colab]({badge})](https://example.org) <img src="{badge}" alt="Kaggle">', page, site) == (
        "[Colab](https://example.org) Kaggle")
    with pytest.raises(InputError, match="leads to no file: none.ipynb"): stage.mended("[a](none.ipynb)", page, site)


def test_docstrings_become_restructured_text():
    lines = ["Takes `x` and **more**; `InputError` if a_b_ is none | all.", "", "Parameters", "----------", "**options",
             "    a `value`*"]
    assert hooks.as_rst(lines) == [
        "Takes ``x``\\  and \\*\\*more\\*\\*; :py:obj:`~lagm.core.errors.InputError`\\  if a_b\\_ is none \\| all.", "",
        "Parameters", "----------", "**options", "    a ``value``\\ \\*"]


# ---- what would be wrong with it


@pytest.fixture
def pages(tmp_path):
    """A function that writes pages {name: body} and returns what is wrong with them."""
    def write(**bodies):
        for name, body in bodies.items():
            (tmp_path / f"{name}.html").write_text(f"<html><article>{body}</article></html>", encoding="utf-8")
        return build.problems(tmp_path)
    return write


def test_a_whole_site_is_passed(pages):
    assert pages(index='<a href="a.html#x">a</a> <a href="https://example.org">b</a>', a='<p id="x"></p>') == []


@pytest.mark.parametrize(("body", "said"), [
    ('<a href="none.html">a</a>', "leads to no file: none.html"),
    ('<a href="#none">a</a>', "leads to no anchor: #none"),
    ('<img src="none.png">', "leads to no file: none.png"),
    ('<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js"),
    ('<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css"),
    ('<img src="http://example.org/a.png">', "loads http://example.org/a.png"),
])
def test_links_to_nothing_and_foreign_things_are_found(pages, body, said):
    assert len(found := pages(index=body)) == 1 and said in found[0]


def test_a_style_sheet_that_loads_from_elsewhere_is_found(pages, tmp_path):
    (tmp_path / "a.css").write_text("a { background: url('https://example.org/a.png') } b { src: url(b.woff) }")
    assert pages(index="") == ["a.css loads 'https://example.org/a.png') } b { src: "]


def test_pages_that_are_far_away_are_found(pages):
    links = {f"p{i}": f'<a href="p{i + 1}.html">on</a>' for i in range(1, 4)}
    found = pages(index='<a href="p1.html">on</a>', **links, p4="", p5="")
    assert found == ["p4.html is 4 links away from the first page", "p5.html is no number of links away from the first "
                     "page"]


def test_make_docs_is_there():
    done = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert "nbs/site/build.py" in done.stdout
