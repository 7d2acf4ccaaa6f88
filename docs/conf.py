"""Sphinx, as `make docs` calls it: pages of this folder and of others; a link that leads nowhere is an error.

The source folder is the whole checkout, so that pages may link to any file of it. Nothing is fetched while it builds.
"""

from pathlib import Path
from typing import Any

project = "mlm_mpi"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", "DESIGN.md", "kernels/README.md", "examples/README.md"]
_roots = {pattern.split("/")[0] for pattern in include_patterns}
# the rest of the checkout is not even looked into
exclude_patterns = [path.name for path in Path(__file__).parents[1].iterdir() if path.name not in _roots]
myst_heading_anchors = 4  # links to headings, by the names that GitHub gives them
highlight_language = "none"
smartquotes = False
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False


def setup(app: Any) -> None:
    """Pages keep their place in the checkout, so the first one lies a folder deeper than where one looks for it."""
    app.connect("build-finished", _write_entrance)


def _write_entrance(app: Any, exception: Exception | None) -> None:
    entrance = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
    Path(app.outdir, "index.html").write_text(entrance, encoding="utf-8")
