"""The notebook, run from top to bottom as Jupyter does, but for the cell that installs."""

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from .conftest import ROOT

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
SHORT = {"epochs": 1, "max_steps": 3, "network": "resnet8", "width": 0.25, "batch_size": 32}


@pytest.fixture
def photos(tmp_path):
    """A class folder of generated pictures."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for shade, name in ((60, "dark"), (180, "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = shade + generator.integers(-40, 40, (40, 48, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return cell


def printed(cell):
    """What a cell wrote, and what it displayed as text."""
    parts = [output.get("text", "") for output in cell.outputs]
    return "".join(parts) + "".join(
        output.data.get("text/plain", "") for output in cell.outputs if "data" in output
    )


def cell_with(notebook, text):
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)
    return cell


def test_it_runs_from_top_to_bottom(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, 4)
    notebook.cells.remove(tagged(notebook, "install"))
    short = SHORT | {"data.image_size": 16}
    picture = next((photos / "test" / "dark").iterdir())
    settings = tagged(notebook, "parameters")
    settings.source += f"\nPHOTOS, PICTURE = {str(photos)!r}, {str(picture)!r}"
    settings.source += f"\nOVERRIDES = {short!r}"
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()

    assert "computes on: cpu" in printed(cell_with(notebook, "jax.devices()"))
    assert "there is no GPU (Runtime" in printed(cell_with(notebook, "jax.devices()"))
    training = cell_with(notebook, '"runs/digits", overrides')
    assert "test accuracy: " in printed(training) and "100%|" in printed(training)
    lines = [line for line in printed(training).splitlines() if "%|" in line]
    assert lines and all(len(line) < 80 for line in lines)
    assert (tmp_path / "runs" / "photos" / "calibration.json").exists()
    assert '"test_accuracy"' in printed(cell_with(notebook, "--mode=eval"))
    answers = printed(cell_with(notebook, "network.predict"))
    assert " % dark" in answers and " % light" in answers
    assert "1 layer centred, method mimicnorm" in printed(cell_with(notebook, "convert("))
    assert "batchnorm" in printed(cell_with(notebook, "tools.memory"))
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 5
    for name in ("evaluation.png", "probe.png", "runs/digits/curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 500


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 16  # which a person can read


def test_what_installs_keeps_what_others_need():
    """The packages of the first cell, for a runtime with a GPU, a TPU, and neither."""
    cell = tagged(nbformat.read(NOTEBOOK, 4), "install").source
    assert cell.splitlines()[-1].startswith("%pip install")
    body = cell.replace("%pip install", "pass  # ").replace("from importlib.metadata import", "# ")
    gpu = {"jaxlib": "0.7.2", "jax_cuda12_plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"}
    for runtime, expected in [
        ({}, ["jax==0.8.2"]),
        (gpu, ["jax==0.8.2", *(f"{n.replace('_', '-')}==0.8.2" for n in gpu)]),
        ({"jaxlib": "0.7.2", "libtpu": "0.0.21"}, ["jax[tpu]==0.8.2", "jaxlib==0.8.2"]),
    ]:
        found = runtime | {"numpy": "2.0.2", "protobuf": "5.29.6"}
        names = {"distributions": lambda found=found: map(Distribution, found, found.values())}
        exec(body, names)
        assert names["wanted"] == [*expected, "numpy==2.0.2", "protobuf==5.29.6"]


class Distribution:
    def __init__(self, name, version):
        self.name, self.version = name, version
