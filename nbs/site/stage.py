"""Lay out what Sphinx reads: the notebooks without nbdev's directives, and the pages that lead to them.

Every file keeps its place from the project's folder, so the links between notebooks hold as they are. What a link
names and the site does not show (a test, a folder, a file of parameters) is linked in the repository. A link to
nothing is an error.
"""

import ast
import configparser
import importlib.util
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from lagm.core.errors import InputError
from lagm.experiments import readme

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DIRECTIVE = re.compile(r"^[ \t]*#\|[ \t]*(.*)\n?", re.M)
PICTURES = (".png", ".svg", ".jpg")
GLOSSARY = "nbs/book/00_glossary.ipynb"
TEXTS = ("CHANGELOG.md", "CONTRIBUTING.md", "outputs/README.md")
ALIASES = {"nbs/index.ipynb": "index.md", "README.md": "index.md",
           "outputs/report/report.md": "outputs/report/report.ipynb"}  # two files, one page


@dataclass
class Site:
    """What is shown, and where it is laid out."""
    source: Path  # the folder that Sphinx reads
    repository: str  # address of a file in the repository, but for its path
    notebooks: list[str] = field(default_factory=list)  # paths from the project's folder
    texts: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # such as lagm.data.labels

    @property
    def shown(self) -> set[str]:
        """All files of the project that become pages."""
        return {"index.md", *self.notebooks, *self.texts}


def settings() -> configparser.SectionProxy:
    """What settings.ini says of the project."""
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


# ---- what there is


def published() -> list[str]:
    """The executed notebooks below outputs/ that are under version control; without git, all that lie there."""
    listed = subprocess.run(["git", "ls-files", "-z", "outputs"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if not listed.returncode else [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "outputs").rglob("*.ipynb")]
    return sorted(name for name in names if name.endswith(".ipynb"))


def all_notebooks() -> list[str]:
    """Every notebook of the site but the front page, in reading order."""
    ordered = [path for paths in readme.chapters(ROOT).values() for path in paths]
    others = sorted(path for path in (ROOT / "nbs").glob("*/*.ipynb") if path not in ordered)
    return [path.relative_to(ROOT).as_posix() for path in [*ordered, *others]] + published()


def all_modules() -> list[str]:
    """The public modules of the package, room by room, each room after those it stands on."""
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "lagm").rglob("*.py")]
    names = sorted(".".join(parts) for parts in paths if not any(part.startswith("_") for part in parts))
    rooms = list(dict.fromkeys(page.split("/")[2] for page in all_notebooks() if page.startswith("nbs/reference/")))
    return sorted(names, key=lambda name: [*rooms, name.split(".")[1]].index(name.split(".")[1]))


# ---- a notebook


def cell_text(cell: nbformat.NotebookNode) -> str | None:
    """The source of a cell as a reader sees it; None for a cell that is not for readers."""
    names = [name.split(":")[0].split()[0] for name in DIRECTIVE.findall(cell.source) if name.strip()]
    if cell.cell_type == "raw" or {"hide", "default_exp"} & set(names): return None
    return cell.source if cell.cell_type == "markdown" else DIRECTIVE.sub("", cell.source).strip()


def exported(cell: nbformat.NotebookNode) -> bool:
    """Whether the package holds the cell's code."""
    return cell.cell_type == "code" and bool(re.search(r"^[ \t]*#\|[ \t]*exports?\b", cell.source, re.M))


def mended_link(target: str, page: str, site: Site) -> str:
    """A link of `page` as the site needs it; `InputError` for a link to no file."""
    if target.startswith("#") or re.match(r"[a-z][a-z0-9+.-]*:|//", target): return target
    path, hash_, anchor = target.partition("#")
    folders = [posixpath.dirname(page), *(["nbs/experiments"] if page.startswith("outputs/") else [])]
    found = [full for folder in folders if (ROOT / (full := posixpath.normpath(posixpath.join(folder, path)))).exists()]
    if not found: raise InputError(f"{page}: a link leads to no file: {target}")  # an executed copy has its template's
    full = found[0]
    full = ALIASES.get(full, full)
    if full in site.shown or full.endswith(PICTURES): return f"/{full}{hash_}{anchor}"
    return f"{site.repository}/{full}{hash_}{anchor}"


def mended(text: str, page: str, site: Site) -> str:
    """Markdown with its links mended, and with words in place of pictures from elsewhere; code is left alone."""
    def link(match: re.Match[str]) -> str: return match[1] + mended_link(match[2].strip("<>"), page, site)

    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    for i, part in enumerate(parts[::2]):  # what is not code: a badge, say, would be loaded from its site
        part = re.sub(r"!\[([^\]]*)\]\(https?://[^)]*\)", r"\1", part)
        part = re.sub(r"""<img\b[^>]*\bsrc="https?:[^>]*>""",
                      lambda image: "".join(re.findall(r'alt="([^"]*)"', image[0])), part)
        parts[2 * i] = re.sub(r"""(\]\(|\b(?:src|href)=")([^)"\s]+)""", link, part)
    return "".join(parts)


def without_reader_cells(notebook: nbformat.NotebookNode, page: str, site: Site) -> None:
    """Leave the cells that are for readers; those that the package holds get an anchor and a tag."""
    kept = []
    for cell in notebook.cells:
        text = cell_text(cell)
        if not text: continue
        if exported(cell):
            kept.append(nbformat.v4.new_markdown_cell(f'<span class="cell-anchor" id="cell-{cell.id}"></span>'))
            cell.metadata.tags = [*cell.metadata.get("tags", []), "exported"]
        cell.source = mended(text, page, site) if cell.cell_type == "markdown" else text
        kept.append(cell)
    notebook.cells = kept


def stage_notebook(page: str, site: Site) -> None:
    """Copy one notebook into the layout."""
    notebook = nbformat.read(ROOT / page, 4)
    without_reader_cells(notebook, page, site)
    if page == GLOSSARY: notebook.cells = [with_terms(cell) for cell in notebook.cells]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                         "language_info": {"name": "python"}}
    target = site.source / page
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


# ---- the glossary


def glossary_rows() -> Iterator[tuple[str, str, str]]:
    """(term, explanation, markdown link to where more is said) of each row of the glossary's table."""
    for cell in nbformat.read(ROOT / GLOSSARY, 4).cells:
        if cell.cell_type != "markdown" or not cell.source.startswith("| term"): continue
        for line in cell.source.splitlines()[2:]:
            term, text, place = (part.strip() for part in line.strip().strip("|").split("|"))
            yield term, text, place


def with_terms(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell with the table as a glossary, whose terms can be linked and searched."""
    if cell.cell_type != "markdown" or not cell.source.startswith("| term"): return cell
    rows = [[part.strip() for part in line.strip().strip("|").split("|")] for line in cell.source.splitlines()[2:]]
    items = [f"{term}\n   {text} More: {place}.\n" for term, text, place in rows]
    cell.source = "```{glossary}\n" + "\n".join(items) + "```"
    return cell


# ---- pages that lead to others


def title_of(page: str) -> tuple[str, str]:
    """A notebook's first heading, and the line that begins with > below it."""
    cells = [cell.source for cell in nbformat.read(ROOT / page, 4).cells if cell.cell_type == "markdown"]
    head = next((re.search(r"^# (.+)", text, re.M) for text in cells if re.search(r"^# ", text, re.M)), None)
    quote = next((re.search(r"(?:^> .*\n?)+", text, re.M) for text in cells if re.search(r"^> ", text, re.M)), None)
    lines = quote[0].splitlines() if quote else []
    return head[1].strip() if head else Path(page).stem, " ".join(line.lstrip("> ").strip() for line in lines)


def title_in(name: str) -> str:
    """The first heading of a text of the project."""
    return re.search(r"^# (.+)", (ROOT / name).read_text(encoding="utf-8"), re.M)[1]


def entry(page: str, name: str, site: Site) -> str:
    """A line of a list that leads to a notebook."""
    said = mended(title_of(page)[1], page, site)
    return f"- [{name}](/{page})" + (f": {said}" if said else "")


def entries(pages: list[str], site: Site) -> str:
    """A list that leads to notebooks."""
    return "\n".join(entry(page, title_of(page)[0], site) for page in pages)


def toctree(pages: list[tuple[str, str]], caption: str = "") -> str:
    """A hidden list of pages for the sidebar: (title or nothing, document)."""
    lines = [f"{title} <{page}>" if title else page for title, page in pages]
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *lines, "```", ""])


def document(page: str) -> str:
    """The name that Sphinx gives to a file of the project."""
    return "/" + page.rsplit(".", 1)[0]


def numbered(page: str) -> str:
    """The title of a chapter, with its number."""
    number = re.match(r"\d+", Path(page).stem)
    return f"{number[0]} {title_of(page)[0]}" if number else title_of(page)[0]


def run_name(page: str) -> str:
    """What an executed notebook is called: its folders below outputs/."""
    parts = list(Path(page).parent.parts[1:])
    return " ".join(parts) if parts[-1] == Path(page).stem or len(parts) > 1 else parts[0]


SECTIONS = {  # page: (title, what stands above the list, folder)
    "book": ("The book", "The method, in the order in which it is understood. Each chapter exports its part of the "
             "package: the cells with a coloured bar.", "nbs/book"),
    "course": ("The course", "Lessons for a class.", "nbs/course"),
    "tutorials": ("Tutorials", "From nothing to something that works.", "nbs/tutorials"),
    "reference": ("The reference", "The notebooks that everything else is exported from, room by room.",
                  "nbs/reference"),
    "experiments": ("Experiments and results", "Notebooks with parameters, which `lagm run` executes, and what came "
                    "out: the runs that the numbers of the front page come from, as they were left.", "outputs"),
}


def section_pages(site: Site) -> Iterator[tuple[str, str]]:
    """(name, markdown) of each page that lists notebooks, if there are any."""
    for name, (title, text, folder) in SECTIONS.items():
        pages = [page for page in site.notebooks if page.startswith(f"{folder}/")]
        if not pages: continue
        if name == "reference": body = rooms_body(pages, site)
        elif name == "experiments": body = experiments_body(pages, site)
        else:
            body = "\n".join(entry(page, numbered(page), site) for page in pages) + "\n\n"
            body += toctree([(numbered(page), document(page)) for page in pages])
        yield name, f"# {title}\n\n{text}\n\n{body}"


def rooms_body(pages: list[str], site: Site) -> str:
    """The reference's list, under a heading for each room."""
    parts = []
    for room, own in by_room(pages, 2, "/").items():
        parts.append(f"## [{room}](/reference/{room}.md)\n\n{room_said(room)}\n\n{entries(own, site)}")
    return "\n\n".join(parts) + "\n\n" + toctree([(room, f"reference/{room}") for room in by_room(pages, 2, "/")])


def by_room(names: list[str], place: int, separator: str) -> dict[str, list[str]]:
    """Notebooks or modules by the room that their name tells."""
    found: dict[str, list[str]] = {}
    for name in names: found.setdefault(name.split(separator)[place], []).append(name)
    return found


def room_said(room: str) -> str:
    """The sentence that says what a room holds."""
    path = ROOT / "lagm" / room / "__init__.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") if path.is_file() else ""


def room_pages(site: Site) -> Iterator[tuple[str, str]]:
    """(file, text) of a page for each room of the reference and of the API, which are floors of the sidebar."""
    reference = [page for page in site.notebooks if page.startswith("nbs/reference/")]
    for room, own in by_room(reference, 2, "/").items():
        tree = toctree([("", document(page)) for page in own])
        yield f"reference/{room}.md", f"# {room}\n\n{room_said(room)}\n\n{entries(own, site)}\n\n{tree}"
    for room, own in by_room(site.modules, 1, ".").items():
        if not room_said(room): continue
        names = [f"   {module.removeprefix('lagm.')} <{module}>" for module in own]
        yield f"api/{room}.rst", "\n".join([room, "=" * len(room), "", room_said(room), "", ".. toctree::", "", *names,
                                            ""])


def experiments_body(pages: list[str], site: Site) -> str:
    """The report, the executed runs, the templates and the benchmarks."""
    report = [page for page in pages if page.startswith("outputs/report/")]
    runs = [page for page in pages if page not in report]
    parts = ["## The report\n", *(entry(page, "The report, executed", site) for page in report)]
    parts += ["\n## Executed runs\n", *(entry(page, run_name(page), site) for page in runs)]
    if "outputs/README.md" in site.texts: parts.append("- [What each file in outputs/ is](/outputs/README.md)")
    found = [(run_name(page), document(page)) for page in [*report, *runs]]
    found += [("What is in outputs/", document(text)) for text in site.texts if text.startswith("outputs/")]
    trees = [toctree(found)]
    for folder, title in (("experiments", "Notebooks with parameters"), ("benchmarks", "Benchmarks")):
        own = [page for page in site.notebooks if page.startswith(f"nbs/{folder}/")]
        if not own: continue
        parts += [f"\n## {title}\n", *(entry(page, title_of(page)[0], site) for page in own)]
        trees.append(toctree([("", document(page)) for page in own], title))
    return "\n".join(parts) + "\n\n" + "\n".join(trees)


# ---- the API


def public_names() -> dict[str, list[str]]:
    """The names of `import lagm`, by module, in the order of the table that they come from."""
    tree = ast.parse((ROOT / "lagm" / "__init__.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC")


def module_source(module: str) -> str:
    """The notebook that exports a module."""
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    found = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (?:\.\./)*(\S+\.ipynb)\.$", text, re.M)
    if not found: raise InputError(f"no notebook exports {module}: export it again")
    return found[1]


def module_page(module: str, site: Site) -> str:
    """The page of one module, in reStructuredText."""
    page, title = module_source(module), module.removeprefix("lagm.")
    origin = f":doc:`{page} </{page.removesuffix('.ipynb')}>`" if page in site.shown else f"``{page}``"
    return "\n".join([title, "=" * len(title), "", f"``import {module}``, exported from {origin}.", "",
                      f".. automodule:: {module}", "   :members:", ""])


def api_front(site: Site) -> str:
    """The API's first page: the names that most people need, then every module."""
    public = {module: names for module, names in public_names().items() if module in site.modules}
    count = sum(map(len, public.values()))
    parts = ["The names you need", "==================", "", f"``import lagm`` shows these {count}, in the order "
             "in which an experiment uses them. Everything else is imported from its own module.", ""]
    for room, own in by_room(list(public), 1, ".").items():
        parts += [room, "-" * len(room), "", ".. autosummary::", "",
                  *(f"   ~{module}.{name}" for module in own for name in public[module]), ""]
    parts += ["Every module", "------------", ""]
    rooms = by_room(site.modules, 1, ".")
    for room, own in rooms.items():
        if room_said(room): parts += [f":doc:`{room}`: {room_said(room)}", ""]
        parts += [*(f"- :doc:`{module}`" for module in own), ""]
    pages = [room if room_said(room) else f"lagm.{room}" for room in rooms]
    return "\n".join([*parts, ".. toctree::", "   :hidden:", "", *(f"   {page}" for page in pages), ""])


# ---- all of it


def front_page(site: Site) -> str:
    """README, the front notebook as text, with its links mended, and the sidebar."""
    text = mended(readme.to_markdown(ROOT / "nbs" / "index.ipynb", ROOT), "README.md", site)
    pages = [(SECTIONS[name][0], name) for name, _ in section_pages(site)]
    pages += [("API: the names you need", "api/index")] if site.modules else []
    if GLOSSARY in site.notebooks: pages.append(("Glossary", document(GLOSSARY)))
    texts = [(document(name), name) for name in site.texts if "/" not in name]
    project = [("", page) for page, _ in texts]
    parts = [f"- [{title}](/{page}.{'rst' if page.startswith('api') else 'md'})" for title, page in pages
             if not page.startswith("/")] + [f"- [{title_in(name)}](/{name})" for _, name in texts]
    return "\n".join([text, "## On this site", "", *parts, "", toctree(pages), toctree(project, "The project")])


def stage(folder: Path, notebooks: list[str] | None = None, modules: list[str] | None = None) -> Site:
    """Lay everything out in `folder`, which is emptied; of notebooks and modules those that are named, or all."""
    shutil.rmtree(folder, ignore_errors=True)
    cfg = settings()
    site = Site(folder, f"{cfg['git_url']}/blob/{cfg['branch']}")
    site.notebooks = all_notebooks() if notebooks is None else notebooks
    site.texts = [name for name in TEXTS if (ROOT / name).is_file()]
    site.modules = all_modules() if modules is None else modules
    for page in site.notebooks: stage_notebook(page, site)
    pages = {f"{name}.md": text for name, text in section_pages(site)}
    pages |= dict(room_pages(site))
    pages |= {name: mended((ROOT / name).read_text(encoding="utf-8"), name, site) for name in site.texts}
    if site.modules: pages["api/index.rst"] = api_front(site)
    pages |= {f"api/{module}.rst": module_page(module, site) for module in site.modules}
    pages["index.md"] = front_page(site)
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for image in [*ROOT.glob("nbs/images/*"), *ROOT.glob("outputs/report/*.png")]:
        target = folder / image.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, target)
    stage_mathematics(folder / "_static" / "mathjax")
    shutil.copyfile(HERE / "style.css", folder / "_static" / "style.css")
    return site


def stage_mathematics(folder: Path) -> None:
    """MathJax and its fonts, from the package that holds them: a page needs no network."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if not found: raise InputError("the site's tools are missing: pip install -e '.[docs]'")
    source = Path(found.origin).parent / "static" / "mathjax"
    shutil.copytree(source / "output" / "chtml" / "fonts", folder / "output" / "chtml" / "fonts")
    shutil.copyfile(source / "tex-chtml.js", folder / "tex-chtml.js")
