"""Run the cells of an experiment notebook in this process, without a kernel: the same code, a second less each."""

from pathlib import Path
from typing import Any

import matplotlib
import nbformat

from lagm.experiments.notebooks import check_parameters


def run_cells(notebook: str | Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Execute the code cells in order, with other parameters, and return the namespace."""
    matplotlib.use("Agg")
    values, namespace = check_parameters(notebook, parameters), {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        if cell.cell_type != "code": continue
        exec(compile(cell.source, f"{Path(notebook).name}, cell {number}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []): namespace.update(values)
    return namespace
