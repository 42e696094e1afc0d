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

from mimicnorm_jax.data.folder import FolderSource
from mimicnorm_jax.data.generated import read_digits
from mimicnorm_jax.data.idx import read_split
from mimicnorm_jax.data.sources import ArraySource, View, cache, channel_statistics
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.paths import expanded
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
_SIZE = 32  # of images in class folders, as CIFAR's


class Data(NamedTuple):
    """Real images.

    Attributes:
      pixels: uint8 ``(N, H, W, C)``, square.
      labels: int ``(N,)``.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def some(self, count: int) -> jax.Array:
        """``count`` images, or all if there are fewer, chosen at random.

        They are float32 ``(count, H, W, C)``; every channel of all images together has mean 0
        and variance 1.
        """
        chosen = np.random.default_rng(0).permutation(len(self.pixels))[:count]
        mean, std = channel_statistics(self.source())
        return jnp.asarray((self.pixels[chosen] / 255 - mean) / std, jnp.float32)

    def source(self) -> ArraySource:
        """For ``data.pipeline.Pipeline``."""
        names = [str(label) for label in range(int(self.labels.max()) + 1)]
        return ArraySource(self.pixels, self.labels, names)


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
      data: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a folder
        with MNIST's own files, of the training split if it is there, else of the test split; or a
        folder with images in ``train/<class>/``, made 32 x 32 pixels.

    Raises:
      UserError: there are no such images.
    """
    if data == "digits":
        pixels, labels = read_digits()
        return Data(pixels[..., None], labels)
    folder = expanded(data)
    with refused_by_system(f"--data={data} cannot be read"):
        if not folder.is_dir():
            raise UserError(f"--data={data} is neither digits nor a folder")
        classes = (folder / "train").is_dir()
        split = "train" if any(folder.glob("train-*-ubyte*")) else "test"
    if classes:
        view = View(size=_SIZE, resize=_SIZE, upright=True)
        found = cache(FolderSource(folder / "train", view), description="decoding")
        pixels, labels = found.images, found.labels
    else:
        pixels, labels = read_split(folder, split)
        pixels = pixels[..., None]
    square = pixels.shape[1] == pixels.shape[2]
    if len(pixels) < _FEWEST or not square or len(np.unique(labels)) < 2 or not np.ptp(pixels) > 0:
        raise UserError(f"--data={data} has not {_FEWEST} square images of two things or more")
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
