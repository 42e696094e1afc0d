"""Two directives for pages that the program itself writes: its fields, and the tools' flags."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PACKAGE = "mimicnorm_jax"


class Fields(SphinxDirective):
    """``config-fields``: every field of a configuration, by group."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        from mimicnorm_jax.config import FIELDS

        found: list[nodes.Node] = []
        by_group = itertools.groupby(FIELDS.items(), lambda item: item[0].rpartition(".")[0])
        for group, fields in by_group:
            title = f"config.{group}" if group else "config"
            section = nodes.section("", nodes.title("", title), ids=[title.replace(".", "-")])
            entries = nodes.definition_list()
            for name, field in fields:
                default = "unset" if field.default is None else repr(field.default)
                about = [_paragraph(field.meaning)]
                if allowed := field.describe():
                    about.append(nodes.paragraph("", f"Allowed: {allowed}."))
                entries += _entry(f"config.{name}", default, about)
            section += entries
            found.append(section)
        return found


class Flags(SphinxDirective):
    """``program-flags MODULE``: what the program says about itself, and its flags."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        module = self.arguments[0]
        try:
            help_text = _output(module, "--help")
        except ValueError as error:
            raise self.error(str(error)) from error
        if "Try --helpfull" not in help_text:  # of argparse
            return [nodes.literal_block(help_text, help_text, language="text")]
        about = help_text.partition("\nflags:")[0].strip()
        entries = nodes.definition_list()
        for name, default, meaning in _flags(_output(module, "--helpxml")):
            entries += _entry(f"--{name}", default, [_paragraph(meaning)])
        return [nodes.literal_block(about, about, language="text"), entries]


def _entry(name: str, default: str, about: list[nodes.paragraph]) -> nodes.definition_list_item:
    term = nodes.term("", "", nodes.literal("", name))
    if default:
        term += [nodes.Text(" default "), nodes.literal("", default)]
    return nodes.definition_list_item("", term, nodes.definition("", *about))


def _paragraph(text: str) -> nodes.paragraph:
    """Text in which flags are set as such."""
    parts = re.split(r"(--[a-z][\w.-]*(?:=[\w.]+)?)", text)
    return nodes.paragraph(
        "", "", *(nodes.literal("", p) if i % 2 else nodes.Text(p) for i, p in enumerate(parts))
    )


def _output(module: str, flag: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, flag],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "90", "PYTHONPATH": os.getcwd()},
    )
    if not done.stdout:
        raise ValueError(f"python -m {module} {flag} printed nothing: {done.stderr[-500:]}")
    return done.stdout


def _flags(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of the flags that are defined in this package."""
    for flag in xml.etree.ElementTree.fromstring(text).iter("flag"):
        found = {child.tag: child.text or "" for child in flag}
        if found["file"].startswith(PACKAGE) or found.get("key") == "yes":
            default = found.get("default", "")
            yield found["name"], "" if default == "None" else default, found["meaning"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("config-fields", Fields)
    app.add_directive("program-flags", Flags)
    return {"parallel_read_safe": True}
