"""How Sphinx builds the site; `build.py` lays out what it reads."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from hooks import linkcode_resolve  # noqa: E402, F401
from stage import settings  # noqa: E402

cfg = settings()
project, author, copyright, release = cfg["lib_name"], cfg["author"], cfg["copyright"], cfg["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.linkcode",
              "sphinx.ext.mathjax", "sphinx_copybutton", "hooks"]

# notebooks are shown with the outputs that are stored in them
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
myst_heading_slug_func = "hooks.slug"

# parameters are explained in the docstrings, which the exporter writes from the comments beside them
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
autosummary_generate = False
napoleon_google_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # there are two classes Trained, and a type names one of them by its last name

html_theme = "furo"
pygments_dark_style = "github-dark"
html_favicon = "favicon.svg"
html_title = f"{cfg['title']} {release}"
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
mathjax_path = "mathjax/tex-chtml.js"
html_theme_options = {"source_repository": cfg["git_url"], "source_branch": cfg["branch"], "source_directory": "",
                      "top_of_page_buttons": ["view"]}
copybutton_exclude = ".linenos, .gp, .go"
