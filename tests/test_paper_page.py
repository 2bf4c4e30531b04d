"""The page that walks through the paper leads to what is there: notebooks, headings, functions, experiments."""

import re

import nbformat
import pytest
from sync import ROOT

from lagm.experiments.catalogue import paper_experiments, read_catalogue
from lagm.training.recipe import get_recipe

PAGE = ROOT / "nbs" / "book" / "16_the_paper_section_by_section.ipynb"
TEXT = "\n\n".join(cell.source for cell in nbformat.read(PAGE, 4).cells if cell.cell_type == "markdown")
LINKS = [(text, *target.partition("#")[::2]) for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", TEXT)
         if not target.startswith("http")]


def sources(name, kind):
    return [cell.source for cell in nbformat.read(PAGE.parent / name, 4).cells if cell.cell_type == kind]


def named(links):
    return [pytest.param(*link, id="#".join(filter(None, link))) for link in dict.fromkeys(links)]


@pytest.mark.parametrize(("text", "name", "anchor"), named(link for link in LINKS if link[2]))
def test_a_heading_that_is_linked_is_there(text, name, anchor):
    headings = re.findall(r"^#+ (.+)$", "\n".join(sources(name, "markdown")), re.M)
    assert anchor in [heading.replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(("text", "name", "anchor"), named(link for link in LINKS if link[0].startswith("`")))
def test_a_function_is_exported_by_the_notebook_that_its_link_leads_to(text, name, anchor):
    exported = [source for source in sources(name, "code") if re.search(r"^#\| *export", source, re.M)]
    assert re.search(rf"^(?:def|class) {text.strip('`')}\b", "\n".join(exported), re.M), f"{text} is not in {name}"


def test_what_stands_in_backticks_alone_is_known():
    alone = set(re.findall(r"`([^`\n]+)`", re.sub(r"\[[^\]]+\]\([^)\s]+\)", "", TEXT)))
    experiments = {run.experiment for run in read_catalogue().values()}
    fields = set(vars(get_recipe("paper")))
    letters = {"generator", "annotator", "segmenter", "labels", "gradients_l", "gradients_s", "fg_miou_present"}
    others = {word for word in alone if not re.match(r"lagm \w+ NAME$|\w+=\"|\"paper\"$|Recipe\(\)$", word)}
    unknown = {word for word in others - experiments - fields - letters if not (PAGE.parents[1] / word).exists()}
    assert not unknown


def test_each_experiment_of_the_paper_is_named():
    missing = [name for name in paper_experiments() if f"`{name}`" not in TEXT]
    assert len(paper_experiments()) == 28 and not missing


def test_the_page_has_links_of_all_kinds():
    assert len(LINKS) > 60 and sum(text.startswith("`") for text, *_ in LINKS) > 30
    assert all((PAGE.parent / name).is_file() for _, name, _ in LINKS if name)
