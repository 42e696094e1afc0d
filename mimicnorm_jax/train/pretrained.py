"""Pretrained weights that a run starts from, and what its folder remembers of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.json_files import read_json, write_json

NAME = "init.json"

#: Writes the weights into a network that has classes of these names, and says what it did.
Put = Callable[[nnx.Module, Sequence[str]], str]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The weights that ``config.init_from`` names.

    Attributes:
      source: what it names.
      sha256: of the weights.
      mean, std: of each channel: by which the images were normalized for them.
      put: writes them; it raises ``UserError`` where they do not fit. None where they were not
        read: a run that goes on needs them no more.
    """

    source: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    put: Put | None = None

    def start(self, model: nnx.Module, class_names: Sequence[str]) -> Start:
        """What a run starts with.

        Args:
          model: its network, with random values; it is changed.
          class_names: the run's.

        Raises:
          UserError: the weights do not fit the network.
        """
        assert self.put is not None
        try:
            said = self.put(model, class_names)
        except UserError as error:
            raise refused(self.source, error) from error
        return Start(jax.tree.map(np.array, values_of(model)), said)


class Start(NamedTuple):
    """What a run starts with.

    Attributes:
      values: parameters and statistics, as host arrays.
      said: in words, what of the weights is in them.
    """

    values: tuple[Any, Any]
    said: str


def values_of(model: nnx.Module) -> tuple[Any, Any]:
    """Parameters and statistics of a network as nested dicts of arrays."""
    kinds = nnx.Param, nnx.BatchStat
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in kinds)
    return params, stats


def refused(source: str, error: UserError) -> UserError:
    """What is wrong with the weights that ``config.init_from`` names."""
    return UserError(f"config.init_from = {source!r}: {error}")


def check_pretrained(workdir: pathlib.Path, pretrained: Pretrained | None) -> None:
    """Raises ``UserError`` if the run in ``workdir`` was started from other weights."""
    path = workdir / NAME
    if pretrained is None or not path.exists():
        return
    before = read_json(path).get("sha256")
    if before != pretrained.sha256:
        raise UserError(
            f"{workdir} started from other weights than config.init_from = {pretrained.source!r} "
            f"has now: their SHA-256 was {str(before)[:12]}…, and is {pretrained.sha256[:12]}…"
        )


def write_pretrained(workdir: pathlib.Path, pretrained: Pretrained) -> None:
    """Writes ``init.json``; raises ``OSError`` where the system refuses."""
    value = {name: getattr(pretrained, name) for name in ("source", "sha256", "mean", "std")}
    write_json(workdir / NAME, value)


def remembered(workdir: pathlib.Path) -> Pretrained | None:
    """What ``init.json`` says of the weights, which need not be there any more.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / NAME
    if not path.exists():
        return None
    value = read_json(path)
    try:
        return Pretrained(
            source=str(value["source"]),
            sha256=str(value["sha256"]),
            mean=tuple(map(float, value["mean"])),
            std=tuple(map(float, value["std"])),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
