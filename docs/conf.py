"""The site, built by `make site` with Sphinx. A new page needs one line in a list of docs/index.md, nothing here."""

import re

from pipeline.run import artifacts

project = "notbugs"
release = artifacts.version("notbugs")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
myst_heading_anchors = 4  # as on GitHub, so that links work in both places
autodoc_typehints = "description"
html_theme = "furo"  # self-contained: no font, script or style from elsewhere
html_title = project
html_copy_source = False
html_show_copyright = False
highlight_language = "none"  # of blocks that name no language: commands and what they print
default_role = "literal"  # a single backtick of a docstring, as in Markdown

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "kubernetes.md",
}
"""Pages that live outside docs/ → the page of the site that stands for each."""


def link_within_site(content):
    """Point links to pages outside docs/, and from them into docs/, at the pages of the site."""
    for outside, page in PAGES.items():
        content[0] = re.sub(rf"\]\((\.\./)*{re.escape(outside)}", f"]({page}", content[0])
    content[0] = re.sub(r"\]\((\.\./)?docs/", "](", content[0])


def setup(app):
    """Rewrite the links of pages, and of what they include."""
    app.connect("source-read", lambda _app, _page, content: link_within_site(content))
    app.connect("include-read", lambda _app, _path, _page, content: link_within_site(content))
