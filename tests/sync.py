"""Check that notebooks are clean, that lagm/ is what they export and README.md what nbs/index.ipynb says.

Cleaning and exporting are done in place and compared with the files as they were, so this works on changes that
are not committed yet. After a failure the notebooks and lagm/ are right (what was edited by hand in lagm/ is gone,
and shown): look at the difference and run it again.
"""

import difflib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60  # that are shown of a notebook's difference


def notebooks(root: Path = ROOT) -> list[Path]:
    """All notebooks that nbdev reads."""
    found = sorted((root / "nbs").rglob("*.ipynb"))
    return [path for path in found if not any(part[0] in "._" for part in path.relative_to(root).parts)]


def modules(root: Path = ROOT) -> list[Path]:
    """The package's modules."""
    return sorted((root / "lagm").rglob("*.py"))


def differences(before: dict[Path, str], after: dict[Path, str], root: Path = ROOT) -> list[str]:
    """One text per file that changed, came or went."""
    found = []
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path): continue
        name, old, new = path.relative_to(root).as_posix(), before.get(path, ""), after.get(path, "")
        lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), f"{name} as it was",
                                          f"{name} as it should be", lineterm="", n=1))
        shown = lines[:MOST_LINES] + ["..."] if path.suffix == ".ipynb" and len(lines) > MOST_LINES else lines
        found.append("\n".join(shown) or f"{name}: only its line ends differ")
    return found


def unchanged_by(command: list[str], files: Callable[[Path], list[Path]], root: Path = ROOT) -> bool:
    """Run a command; tell whether it left the files as they were, and print what it changed."""
    before = {path: path.read_bytes().decode("utf-8") for path in files(root)}
    done = subprocess.run(command, cwd=root)
    after = {path: path.read_bytes().decode("utf-8") for path in files(root)}
    changed = differences(before, after, root)
    if changed: print("\n".join(changed))
    if done.returncode: print(f"sync: {' '.join(command)} failed", file=sys.stderr)
    return not changed and not done.returncode


def main(root: Path = ROOT) -> int:
    """Do all checks and say what to do about each that fails."""
    if not notebooks(root):
        print("sync: there are no notebooks in nbs/", file=sys.stderr)
        return 1
    advice = []
    if not unchanged_by(["nbdev_clean"], notebooks, root):
        advice.append("notebooks were not clean; they are now (nbdev_clean). "
                      "To have git see to it: make install-dev")
    if not unchanged_by([sys.executable, "tests/export.py"], modules, root):
        advice.append("lagm/ was not what the notebooks export; it is now (make export). Edit the notebooks, not lagm/")
    if subprocess.run([sys.executable, "-m", "lagm.experiments.readme", "--check"], cwd=root).returncode:
        advice.append("README.md is out of date or nbs/index.ipynb is broken; see above")
    for line in advice: print(f"sync: {line}", file=sys.stderr)
    if not advice:
        print(f"sync: {len(notebooks(root))} notebooks are clean, lagm/ is what they export, README.md is up to date")
    return 1 if advice else 0


if __name__ == "__main__": sys.exit(main())
