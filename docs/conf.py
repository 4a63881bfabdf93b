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
copybutton_exclude = ".linenos, .gp, .go"

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "deploy/README.md": "kubernetes.md"}
"""Pages that live outside docs/ → the page of the site that includes each."""


def link_within_site(text: str) -> str:
    """Point links to pages outside docs/, and from them into docs/, at the pages of the site."""
    for outside, page in PAGES.items():
        text = re.sub(rf"\]\((\.\./)*{re.escape(outside)}", f"]({page}", text)
    return re.sub(r"\]\((\.\./)?docs/", "](", text)


def setup(app):
    """Rewrite links in pages and in what they include."""

    def read(_app, _name, content):
        content[0] = link_within_site(content[0])

    def include(_app, _path, _parent, content):
        content[0] = link_within_site(content[0])

    app.connect("source-read", read)
    app.connect("include-read", include)
