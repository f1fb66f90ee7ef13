"""Builds README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ into a website with Sphinx.

`make lint` builds it into build/docs/ and fails on a dead link, a dead anchor or a page that the
index does not name.

The pages are plain Markdown that GitHub shows as well. A link to any other file of the repository
becomes a download.
"""

import re

from sphinx.application import Sphinx

project = "npair"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build", "data", "gallery", "model_repository", "runs"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 3


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)


def add_navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    """List the pages that the index links to in the sidebar; Markdown has no notation for it."""
    if page == root_doc:
        pages = re.findall(r"\]\(([^)]+)\.md\)", source[0])
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", *pages, "```"])
