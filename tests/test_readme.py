"""What the README promises works as written."""

import re

import numpy as np

from .conftest import ROOT

README = (ROOT / "README.md").read_text()
THEORY = ROOT / "docs" / "theory.md"


def test_the_examples_run():
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec("\n".join(line.removeprefix("  ") for line in block.splitlines()), names)
    assert names["logits"].shape == (8, 100)
    assert names["optimizer"].tx is names["transform"]
    assert names["phase"](names["chi1"]("weight_mean")) == "chaotic"
    assert names["layer"].name == "classifier"


def test_the_examples_of_the_theory_run(float64):
    blocks = re.findall(r"^```python\n(.*?)^```", THEORY.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["found"].ntk.mean.shape == names["found"].ntk.error.shape == (8, 8)
    np.testing.assert_allclose(
        names["transition"](names["rho"], "straight"), [0, 0.109, 0.318, 0.609, 1], atol=5e-4
    )
    pictures = re.findall(r"\]\(\.\./([^)]+)\)", THEORY.read_text())
    assert len(pictures) == 8 and all((ROOT / picture).exists() for picture in pictures)


def test_what_it_links_to_exists_and_nothing_is_left_to_fill_in():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) >= 2
    assert all((ROOT / link).exists() for link in links)
    for name in re.findall(r"`([a-z0-9_]+\.py)`", README):
        assert (ROOT / "configs" / name).exists()
    assert not re.search(r"@[A-Z]+@", README)
