"""What all figures share: their images, their colours, and how they are written."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mimicnorm_jax.data.generated import read_digits
from mimicnorm_jax.data.idx import read_split
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.theory.kernels import Kind

COLOURS: dict[Kind, str] = {
    "straight": "#4477aa",
    "batch_norm": "#ee6677",
    "weight_mean": "#228833",
}
NAMES: dict[Kind, str] = {
    "straight": "straight",
    "batch_norm": "BatchNorm",
    "weight_mean": "weight mean",
}
Numbers = dict[str, Any]
_FEWEST = 16  # images of the smallest figure


class Data(NamedTuple):
    """Real images.

    Attributes:
      pixels: uint8 ``(N, H, W)``.
      labels: int ``(N,)``.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def some(self, count: int) -> jax.Array:
        """``count`` images, or all if there are fewer, chosen at random.

        They are float32 ``(count, H, W, 1)``; all images together have mean 0 and variance 1.
        """
        chosen = np.random.default_rng(0).permutation(len(self.pixels))[:count]
        pixels = self.pixels[chosen].astype(np.float32)[..., None]
        return jnp.asarray((pixels - self.pixels.mean()) / self.pixels.std())


class PaperFigure(NamedTuple):
    """One figure.

    Attributes:
      compute: ``compute(data, quick)``: the numbers.
      draw: draws numbers.
      claim: what the paper says that it shows.
    """

    compute: Callable[[Data, bool], Numbers]
    draw: Callable[[Numbers], Figure]
    claim: str


def load(data: str) -> Data:
    """Real images and their labels.

    Args:
      data: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; or a folder
        with MNIST's own files, of the training split if it is there, else of the test split.

    Raises:
      UserError: there are no such images.
    """
    if data == "digits":
        return Data(*read_digits())
    folder = pathlib.Path(data).expanduser()
    with refused_by_system(f"--data={data} cannot be read"):
        if not folder.is_dir():
            raise UserError(f"--data={data} is neither digits nor a folder with MNIST's files")
        split = "train" if any(folder.glob("train-*-ubyte*")) else "test"
    pixels, labels = read_split(folder, split)
    if len(pixels) < _FEWEST or pixels.shape[1] != pixels.shape[2] or not pixels.std() > 0:
        raise UserError(f"--data={data} has not {_FEWEST} square images of something")
    return Data(pixels, labels)


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def make_folder(folder: pathlib.Path) -> None:
    """Makes the folder for results, before the work, and finds out whether they can be written.

    Raises:
      UserError: they cannot.
    """
    with refused_by_system(f"--out={folder} cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write(name: str, figure: PaperFigure, numbers: Numbers, folder: pathlib.Path) -> None:
    """Writes ``<name>.png``, ``.svg`` and ``.json`` into a folder that is there."""
    drawn = figure.draw(numbers)
    with refused_by_system(f"--out={folder} cannot be written to"):
        drawn.savefig(folder / f"{name}.png", dpi=110)
        drawn.savefig(folder / f"{name}.svg")
        record = {"claim": figure.claim} | numbers
        (folder / f"{name}.json").write_text(json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    """As JSON, with five digits: what is drawn, not every bit of it."""
    if isinstance(value, dict):
        return {str(key): _rounded(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
        return _rounded(np.asarray(value).tolist())
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value
