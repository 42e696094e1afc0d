"""What the README and the pages promise works as written, and no public name is left out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import theory
from mimicnorm_jax.config import FREE_FIELDS
from tests.conftest import ROOT

PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *(page for folder in ("docs", "results") for page in (ROOT / folder).rglob("*.md")),
    }
)
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n+)?^( *)```python\n(.*?)^ *```", re.M | re.S)


def blocks(text):
    """The Python blocks that are not marked with a reason why they must not run."""
    for marked, indent, code in BLOCK.findall(text):
        if not marked:
            yield "\n".join(line.removeprefix(indent) for line in code.splitlines())


WITH_CODE = [page for page in PAGES if any(blocks(page.read_text()))]


def name_of(page):
    return str(page.relative_to(ROOT))


class OfTheReader(nnx.Module):
    """The network that the README takes as the reader's."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.classifier = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, images):
        return self.classifier(nnx.relu(self.norm(self.conv(images))).mean((1, 2)))


GIVEN = {
    "README.md": lambda: {
        "Network": OfTheReader,
        "images": jax.random.normal(jax.random.key(0), (8, 16, 16, 3)),
        "labels": jnp.arange(8) % 5,
    }
}


def of_the_reader(names):
    model, images = names["model"], names["images"]
    model.eval()
    np.testing.assert_allclose(names["plain"](images), model(images), atol=1e-5)
    assert names["report"].num_centered == 1
    return nnx.BatchNorm not in {type(module) for _, module in nnx.iter_modules(model)}


@pytest.fixture
def run():
    """Runs a page's blocks one after the other, and gives what they define."""

    def run_page(page):
        names = GIVEN.get(name_of(page), dict)()
        with jax.numpy_rank_promotion("allow"):  # nnx.BatchNorm needs it
            for block in blocks(page.read_text()):
                exec(block, names)
        return names

    yield run_page
    jax.config.update("jax_enable_x64", False)  # which a page may have turned on


PRINTED = ["layer", "fan-in", "scalar", "variance", "2nd", "moment", "what", "was", "done"]
EXPECTED = {
    "README.md": of_the_reader,
    "docs/index.md": lambda names: names["logits"].shape == (8, 10),
    "docs/convert.md": lambda names: (
        names["report"].num_centered == 5
        and names["difference"] < 1e-5
        and names["by_formula"].num_centered == 5
        and names["after"] < names["before"]
        and names["of_linen"].num_centered == 2
        and abs(names["logits"].mean(0)).max() < 1e-5
        and str(names["report"]).splitlines()[0].split() == PRINTED
    ),
    "docs/own_network.md": lambda names: (
        names["loss"].shape == (8,)
        and names["optimizer"].tx is names["transform"]
        and names["predicted"].shape == (8,)
        and names["blocks"][2].last.scale[...] == np.float32(3**-0.5)
        and abs(float(names["linen_params"]["Conv_1"]["kernel"].mean())) < 1e-7
        and names["any_size"].shape == (2, 10)
        and np.isfinite(names["product"]["stem"]["conv"]["kernel"][...]).all()
    ),
    "docs/haiku.md": lambda names: (
        abs(names["params"]["conv2_d"]["w"].mean((0, 1, 2))).max() < 1e-6
        and names["logits"].shape == (2, 10)
    ),
    "docs/equinox.md": lambda names: (
        abs(names["params"].second.weight.mean((1, 2, 3))).max() < 1e-6
        and names["logits"].shape == (10,)
    ),
    "docs/probe.md": lambda names: names["layer"].name == "classifier",
    "docs/train.md": lambda names: round(names["floor"], 3) == 0.309,
    "docs/theory.md": lambda names: names["found"].ntk.mean.shape == (8, 8),
}


OPTIONAL = {"docs/haiku.md": "haiku", "docs/equinox.md": "equinox"}


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_examples_run(page, run):
    if library := OPTIONAL.get(name_of(page)):
        pytest.importorskip(library, reason=f"{library} is missing: pip install -e '.[{library}]'")
    assert EXPECTED[name_of(page)](run(page))


def test_the_numbers_in_the_theory_are_what_comes_out(run):
    names = run(ROOT / "docs" / "theory.md")
    np.testing.assert_allclose(
        names["transition"](names["rho"], "straight"), [0, 0.109, 0.318, 0.609, 1], atol=5e-4
    )


def test_a_block_that_must_not_run_is_marked_with_a_reason():
    text = "<!-- not run: it needs a GPU -->\n```python\n1 / 0\n```\n  ```python\n  x = 1\n  ```\n"
    assert list(blocks(text)) == ["x = 1"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).is_file(), link  # in the site a folder is no page
    assert not re.search(r"@[A-Z]+@|TODO", text)


def test_configs_that_a_page_names_exist():
    for page in (ROOT / "README.md", ROOT / "docs" / "train.md"):
        for name in re.findall(r"`([a-z0-9_]+\.py)`", page.read_text()):
            assert (ROOT / "configs" / name).exists()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(re.findall(r"!\[", text)) == 1


@pytest.mark.parametrize("module", [mimicnorm_jax, theory], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api(module):
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", pages, re.M))
    assert set(module.__all__) <= documented


def test_every_program_is_in_the_api():
    page = (ROOT / "docs" / "api" / "programs.md").read_text()
    documented = set(re.findall(r"program-flags} (\S+)", page))
    programs = {"mimicnorm_jax.main", "mimicnorm_jax.paper"}
    for path in (ROOT / "mimicnorm_jax" / "tools").rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            programs.add(".".join(parts).removesuffix(".__main__"))
    assert documented == programs


def test_the_pages_of_the_site_are_in_its_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"<{page.stem}>" in index


def test_the_fields_that_may_change_are_listed():
    page = (ROOT / "docs" / "train.md").read_text()
    (listed,) = re.findall(r"may be others then \((.*?)\); all else", page, re.DOTALL)
    assert sorted(re.findall(r"`([\w.]+)`", listed)) == sorted(FREE_FIELDS)
