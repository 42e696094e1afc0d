"""How Sphinx makes the site of the Markdown pages and the docstrings: ``bash launch/docs.sh``.

The source folder is the whole repository, so that a link from a page to a file works on the site
as it does where the repository is browsed, and ``results/README.md`` has one copy.
"""

import os
import pathlib
import re
import sys
from typing import Any

from flax import nnx
from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "mimicnorm-jax"
author = "The mimicnorm-jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]

root_doc = "docs/index"
include_patterns = [
    *("docs/**.md", "results/README.md", "results/memory/*.md", "results/gpu/*.md"),
    *("findings/README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
]
exclude_patterns = [".*", "runs", "site", "build", "dist"]

smartquotes_action = "D"  # only dashes

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # the address without a path

myst_heading_anchors = 4  # links to headings, as where the repository is browsed
myst_enable_extensions = ["fieldlist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True  # a reference to a name of this project that does not exist is an error
nitpick_ignore_regex = [(r"py:.*", r"(?!mimicnorm_jax\.).*")]


class Name(str):
    """A name that is its own representation."""

    def __repr__(self) -> str:
        return str(self)


def of_module(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, given: str | None, returned: str
) -> tuple[str, str] | None:
    """The signature of a Flax module is that of ``__init__``, not that of its metaclass."""
    if what != "class" or not issubclass(obj, nnx.Module):
        return None
    found = signature(obj.__init__, bound_method=True)
    if "args" in found.parameters:  # a subclass that adds to what its base takes
        base = signature(obj.__base__.__init__, bound_method=True).parameters.values()
        own = [p for p in found.parameters.values() if p.kind is p.KEYWORD_ONLY]
        found = found.replace(parameters=[*base, *own])
    # a function or class as a default is shown by its name
    shown = [
        p.replace(default=Name(p.default.__name__))
        if p.default is not p.empty and hasattr(p.default, "__name__")
        else p
        for p in found.parameters.values()
    ]
    text = stringify_signature(found.replace(parameters=shown), show_annotation=False)
    return text, ""


def readable(app: Sphinx, name: str, source: list[str]) -> None:
    """A number stays on the line of its %; tables that a program has written get a title."""
    source[0] = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", source[0])
    if name.startswith("results/memory/"):
        source[0] = f"# Memory: {name.rpartition('/')[2]}\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", readable)
    app.connect("autodoc-process-signature", of_module)
