"""What the README promises works as written."""

import re

from .conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec("\n".join(line.removeprefix("  ") for line in block.splitlines()), names)
    assert names["logits"].shape == (8, 100)
    assert names["optimizer"].tx is names["transform"]
    assert names["layer"].name == "classifier"


def test_what_it_links_to_exists_and_nothing_is_left_to_fill_in():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) >= 2
    assert all((ROOT / link).exists() for link in links)
    for name in re.findall(r"`([a-z0-9_]+\.py)`", README):
        assert (ROOT / "configs" / name).exists()
    assert not re.search(r"@[A-Z]+@", README)
