"""What this site adds to Sphinx: docstrings in plain English, links from names to cells and from words to the glossary.

The package's docstrings are Markdown with numpy's sections; `as_rst` makes of them what Sphinx reads, and links the
names of the package that stand in backticks. `linkcode_resolve` leads from a name to the cell that defines it. The
first time that a chapter or a tutorial uses a term of the glossary, `TermLinks` links it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.transforms import Transform
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from stage import ROOT, all_modules, glossary_rows, settings

SECTION = re.compile(r"^(Parameters|Attributes|Returns|Yields)$")
MARKER = re.compile(r"^# %% (?:\.\./)*(\S+\.ipynb) #(\S+)$")
LINKED = ("nbs/book/", "nbs/tutorials/", "nbs/course/")  # where words lead to the glossary
# Words that people also use in their everyday sense: the glossary explains them, and nothing links to it from them.
EVERYDAY = {"anchor", "checkpoint", "control", "finish", "fold", "parts", "record", "resample", "stage", "teacher",
            "tangent", "recipe", "inversion"}
where: dict[str, Path] = {}  # the folder that Sphinx reads


def slug(text: str) -> str:
    """The anchor of a heading, as Jupyter writes it."""
    return text.strip().replace(" ", "-")


# ---- names of the package


@cache
def definitions(module: str) -> dict[str, tuple[str, str]]:
    """By qualified name: the notebook and the cell that define a function, class or method of a module."""
    path = ROOT / (module.replace(".", "/") + ".py")
    text = path.read_text(encoding="utf-8")
    marks = [(i, match[1], match[2]) for i, line in enumerate(text.splitlines(), 1) if (match := MARKER.match(line))]
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef): continue
            before = [mark for mark in marks if mark[0] < node.lineno]
            if before: found[prefix + node.name] = before[-1][1:]
            if isinstance(node, ast.ClassDef): visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(text).body, "")
    return found


@cache
def homes() -> dict[str, str]:
    """The full name of each public name that one module only defines."""
    every: dict[str, list[str]] = {}
    for module in all_modules():
        for name in definitions(module):
            if "." not in name and not name.startswith("_"): every.setdefault(name, []).append(f"{module}.{name}")
    return {name: full[0] for name, full in every.items() if len(full) == 1}


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where a name is defined: the cell in its chapter, from a page of api/."""
    if domain != "py" or not info["module"] or not (ROOT / (info["module"].replace(".", "/") + ".py")).is_file():
        return None
    found, name = definitions(info["module"]), info["fullname"]
    while name and name not in found: name = name.rpartition(".")[0]
    if not name: return None
    page, cell = found[name]
    if (where["source"] / page).is_file(): return f"../{page.removesuffix('.ipynb')}.html#cell-{cell}"
    cfg = settings()
    return f"{cfg['git_url']}/blob/{cfg['branch']}/{page}"


# ---- docstrings


def inline(text: str) -> str:
    """A line of Markdown as reStructuredText."""
    return "".join(code(part[1:-1]) if i % 2 else escaped(part)
                   for i, part in enumerate(re.split(r"(`[^`]+`)", text.replace("``", "`"))))


def code(text: str) -> str:
    """What stood in backticks: a link to a name of the package, or code."""
    name = text.removesuffix("()")
    return f":py:obj:`~{homes()[name]}`\\ " if name in homes() else f"``{text.strip()}``\\ "


def escaped(text: str) -> str:
    """Prose in which nothing is markup."""
    return re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", text)


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText; the names and types of numpy's sections stay as they are."""
    found, section = [], False
    for i, line in enumerate(lines):
        underlined = i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1].strip())
        section = section or bool(SECTION.match(line.strip()) and underlined)
        as_it_is = underlined or re.fullmatch(r"\s*-{3,}\s*", line) or section and line[:1] not in ("", " ")
        found.append(line if as_it_is else inline(line))
    return found


def process_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Sphinx's event for each docstring: change its lines in place."""
    lines[:] = as_rst(lines)


# ---- words


def terms() -> dict[str, str]:
    """What to look for in the text, in small letters, and the term of the glossary that it is."""
    found = {}
    for term, _, _ in glossary_rows():
        if term in EVERYDAY: continue
        for word in term.split(", "):
            found[word.lower()] = term
            if word[-1:].isalpha() and not word.endswith("s"): found[f"{word.lower()}s"] = term
    return found


class TermLinks(Transform):
    """Links the first use of each term, in the running text of a page."""

    default_priority = 500

    def apply(self) -> None:
        """Docutils calls this once a page has been read."""
        page = self.document.settings.env.docname
        if not page.startswith(LINKED) or page.endswith("glossary"): return
        known = terms()
        pattern = re.compile(r"(?<![\w-])(" + "|".join(sorted(map(re.escape, known), key=len, reverse=True))
                             + r")(?![\w-])", re.I)
        left = set(known.values())
        for text in list(self.running_text()):
            parts = list(split(text.astext(), pattern, known, left, page))
            if len(parts) > 1: text.parent.replace(text, parts)

    def running_text(self) -> Iterator[nodes.Text]:
        """The texts of paragraphs that are neither links nor code nor mathematics."""
        for text in self.document.findall(nodes.Text):
            if isinstance(text.parent, nodes.paragraph): yield text


def split(text: str, pattern: re.Pattern[str], known: dict[str, str], left: set[str], page: str
          ) -> Iterator[nodes.Node]:
    """The text in pieces; the terms that were still `left` are links, and are no longer."""
    start = 0
    for match in pattern.finditer(text):
        term = known[match[0].lower()]
        if term not in left: continue
        left.remove(term)
        if match.start() > start: yield nodes.Text(text[start:match.start()])
        link = pending_xref(match[0], refdomain="std", reftype="term", reftarget=term, refdoc=page, refwarn=True,
                            refexplicit=True)
        link += nodes.inline(match[0], match[0], classes=["xref", "std", "std-term"])
        yield link
        start = match.end()
    if start < len(text): yield nodes.Text(text[start:])


# ---- pages


def drop_links_to_no_source(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """A page that was made here has no file in the repository to look at."""
    if not (ROOT / f"{page}{context.get('page_source_suffix') or '.md'}").is_file():
        for key in ("theme_source_repository", "theme_source_view_link"): context.pop(key, None)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this first."""
    where["source"] = Path(app.srcdir)
    app.config.html_static_path = [str(Path(app.srcdir) / "_static")]
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # napoleon, at 500, reads the sections
    app.connect("html-page-context", drop_links_to_no_source)
    if (Path(app.srcdir) / "nbs/book/00_glossary.ipynb").is_file(): app.add_transform(TermLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
