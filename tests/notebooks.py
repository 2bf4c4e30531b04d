"""Small experiment notebooks for the tests of lagm.experiments.notebooks and lagm.cli."""

from pathlib import Path

import nbformat
from nbformat import v4

TYPES = "from typing import Literal, Optional\nRecipe = Literal['fast', 'paper']"
PARAMETERS = """\
k: int = 2  # labelled pictures
rate: float = 1e-3  # learning rate
flip: bool = True
recipe: Recipe = "fast"  # how to train
widths: list[int] = [
    8,
    16,
]  # channels
data: Optional[str] = None
plain = 0.5  # no type
out_dir: str = "."  # where results go"""


def write_experiment(path: Path, *cells: str, parameters: str | None = PARAMETERS,
                     title: str = "# Toy\n\n> Does little.\n> Quickly.", types: str = TYPES) -> Path:
    """Write an experiment notebook with the given code cells after its parameters."""
    nb = v4.new_notebook(cells=[v4.new_markdown_cell(title), v4.new_code_cell(types)])
    if parameters is not None: nb.cells.append(v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [v4.new_code_cell(cell) for cell in cells]
    nb.metadata.kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def printed(path: Path) -> str:
    """All that the cells of an executed notebook printed."""
    return "".join(out.text for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])
                   if out.output_type == "stream")
