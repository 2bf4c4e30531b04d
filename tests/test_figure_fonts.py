"""Letters in the figures that people look at: large enough in a window of 1,300 pixels, as far as code says."""

import ast
import base64
import struct

import nbformat
import pytest
from sync import ROOT

from lagm.evaluation.figures import STYLE

WINDOW, BESIDE = 1300, 150  # pixels; what JupyterLab keeps of its width for itself, with the file browser closed
SMALLEST = 10  # pixels of the body of a letter as it is displayed
SIZES = {"fontsize", "labelsize", "titlesize", "title_fontsize"}
PAGES = [path for folder in ("course", "tutorials", "experiments", "benchmarks", "book", "reference")
         for path in sorted((ROOT / "nbs" / folder).rglob("[!.]*.ipynb"))]


def widths(cell):
    """In pixels, of the pictures that a cell stored."""
    pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [struct.unpack(">I", base64.b64decode(text)[16:20])[0] for text in pictures]


def keywords(source, names):
    """The numbers that a cell's calls give for the keywords."""
    tree = ast.parse("\n".join("pass" if line.lstrip()[:1] in ("!", "%") else line for line in source.splitlines()))
    return [node.value.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in names
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, (int, float))]


def smallest_letters(cell):
    """In pixels as displayed; None if the cell neither draws nor says a size."""
    sizes, dots, found = keywords(cell.source, SIZES), keywords(cell.source, {"dpi"}), widths(cell)
    if not sizes and not dots: return None
    scale = min(1, (WINDOW - BESIDE) / max(found, default=1))
    return min([*sizes, STYLE["font.size"]]) * min(dots, default=STYLE["figure.dpi"]) / 72 * scale


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_letters_can_be_read_at_a_hundred_per_cent(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or (pixels := smallest_letters(cell)) is None: continue
        assert pixels >= SMALLEST - 1e-6, f"cell {cell.id}: letters of {pixels:.1f} pixels; a larger fontsize, or dpi"


def test_the_letters_of_the_style_can_be_read_in_the_widest_figure_that_is_stored():
    widest = max(width for path in PAGES for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
                 for width in widths(cell))
    sizes = [value for name, value in STYLE.items() if name.endswith(("size", "fontsize")) and value < 20]
    assert len(sizes) >= 5
    assert min(sizes) * STYLE["figure.dpi"] / 72 * min(1, (WINDOW - BESIDE) / widest) >= SMALLEST


def test_a_small_letter_is_found():
    cell = nbformat.v4.new_code_cell("plt.subplots(dpi=80)\nax.set_title('x', fontsize=7)")
    assert smallest_letters(cell) < 8 and smallest_letters(nbformat.v4.new_code_cell("x = 1")) is None
    wide = base64.b64encode(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 2300, 10)).decode()
    cell = nbformat.v4.new_code_cell("ax.text(0, 0, 'x', fontsize=10)",
                                     outputs=[nbformat.v4.new_output("display_data", {"image/png": wide})])
    assert 6.9 < smallest_letters(cell) < 7
