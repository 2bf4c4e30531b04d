"""Build the site and look it over: `python nbs/site/build.py [FOLDER]`, or `make docs`.

Sphinx's warnings are errors. So is a link to nothing, a page that is more than three links away from the first, and
anything that a page would load from the network.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
MOST_CLICKS = 3
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src",
         "object": "data", "embed": "src"}


class Page(HTMLParser):
    """What a page holds: the links of its text and of all of it, its anchors, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.in_text: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.depth = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element."""
        found = dict(attrs)
        if tag == "article": self.depth += 1
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "a" and (target := found.get("href")):
            self.links.append(target)
            if self.depth: self.in_text.append(target)
        if tag == "link" and found.get("rel") not in ("stylesheet", "icon", "preload", "shortcut icon"): return
        if address := found.get(LOADS.get(tag, "")): self.loaded.append(address)

    def handle_endtag(self, tag: str) -> None:
        """The end of one."""
        if tag == "article": self.depth -= 1


def read_pages(folder: Path) -> dict[Path, Page]:
    """All pages of a built site."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}


def inside(link: str, page: Path) -> tuple[Path, str] | None:
    """The file and the anchor that a link of a page leads to; None for a link that leaves the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return target / "index.html" if target.is_dir() else target, unquote(parts.fragment)


def broken(pages: dict[Path, Page], folder: Path) -> Iterator[str]:
    """A sentence for each link to no file or to no anchor, and for each file that a page lacks."""
    for path, page in pages.items():
        for link in dict.fromkeys([*page.links, *page.loaded]):
            place = inside(link, path)
            if place is None: continue
            target, anchor = place
            name = path.relative_to(folder).as_posix()
            if not target.is_file(): yield f"{name}: a link leads to no file: {link}"
            elif anchor and target in pages and anchor not in pages[target].anchors and anchor != "top":
                yield f"{name}: a link leads to no anchor: {link}"


def foreign(pages: dict[Path, Page], folder: Path) -> Iterator[str]:
    """A sentence for each thing that a page or a style sheet would load from elsewhere."""
    for path, page in pages.items():
        for address in dict.fromkeys(page.loaded):
            if urlsplit(address).netloc: yield f"{path.relative_to(folder).as_posix()} loads {address}"
    for path in sorted(folder.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for piece in text.replace("@import", "url(").split("url(")[1:]:
            if piece.lstrip(" \"'(").startswith(("http:", "https:", "//")):
                yield f"{path.relative_to(folder).as_posix()} loads {piece[:60]}"


def distances(pages: dict[Path, Page], first: Path) -> dict[Path, int]:
    """How many links in the text lead to each page from the first; menus do not count."""
    found, queue = {first: 0}, [first]
    while queue:
        path = queue.pop(0)
        for link in pages[path].in_text:
            place = inside(link, path)
            if place and place[0] in pages and place[0] not in found:
                found[place[0]] = found[path] + 1
                queue.append(place[0])
    return found


def problems(folder: Path) -> list[str]:
    """What is wrong with a built site, a sentence for each."""
    folder = folder.resolve()
    pages = read_pages(folder)
    away = distances(pages, folder / "index.html")
    made = {"genindex.html", "py-modindex.html", "search.html"}  # Sphinx's own, reached by the menu
    far = [f"{path.relative_to(folder).as_posix()} is {away.get(path, 'no number of')} links away from the first page"
           for path in pages if path.name not in made and away.get(path, MOST_CLICKS + 1) > MOST_CLICKS]
    return [*broken(pages, folder), *foreign(pages, folder), *far]


def build(folder: Path, notebooks: list[str] | None = None, modules: list[str] | None = None) -> list[str]:
    """Lay out, build into FOLDER/html, look over; what is wrong."""
    sys.path.insert(0, str(HERE))
    from stage import stage
    stage(folder / "source", notebooks, modules)
    shutil.rmtree(folder / "html", ignore_errors=True)  # pages of notebooks that are no more
    words = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", "-c", HERE, "-d",
             folder / "doctrees", folder / "source", folder / "html"]
    done = subprocess.run([str(word) for word in words], env={**os.environ, "PYTHONPATH": str(HERE)})
    return ["Sphinx failed"] if done.returncode else problems(folder / "html")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the site, and look it over.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parents[1] / "_docs",
                        help="where to (default: _docs)")
    folder = parser.parse_args(argv).folder
    found = build(folder)
    print("\n".join(found) if found else f"open {folder / 'html' / 'index.html'}")
    return bool(found)


if __name__ == "__main__": sys.exit(main())
