"""A network as a StableHLO program, which JAX loads without this package."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from jax import export

from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export.metadata import metadata
from mimicnorm_jax.export.prepared import About, Prepared, compare, prepare_as
from mimicnorm_jax.export.safetensors import as_safetensors
from mimicnorm_jax.export.written import SUFFIXES, Exported, check_suffix, written
from mimicnorm_jax.weights.files import read_safetensors

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")
WEIGHTS = ("inside", "beside")


def export_stablehlo(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    file: str | os.PathLike[str],
    about: About | None = None,
    normalize: bool = False,
    symbolic: bool = True,
    weights: str = "inside",
    platforms: Sequence[str] = PLATFORMS,
) -> Exported:
    """Writes the folded network with its weights as a program of ``jax.export``.

    What reads it needs JAX and ``flatbuffers``, and neither Flax nor this package::

      program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
      logits = program.call(images)

    Beside it, ``model.stablehlo.json`` has the metadata. XLA reads weights inside a program one
    by one whenever it compiles it, a second for every ten million. Beside it they cost nothing::

      weights = safetensors.numpy.load_file("model.stablehlo.safetensors")
      weights = jax.device_put(weights)
      logits = program.call(weights, images)

    Args:
      model: as for ``fold``.
      *example: real images ``(B, ..., C)``, before them a Linen network's variables. On them the
        file is compared.
      file: where it goes; a file there is replaced.
      about: what else is known of the network.
      normalize: take uint8 images, which ``example`` then has, and normalize them inside by mean
        and standard deviation of ``about``.
      symbolic: leave the batch, and height and width as multiples of the stride, free where the
        network allows it. Such a file is for JAX from the version that wrote it on; one of fixed
        extents also for earlier ones.
      weights: ``"inside"`` the program, or ``"beside"`` it, as its first argument: a dictionary by
        their names, in a file of safetensors.
      platforms: on which it can be run.

    Returns:
      What was written.

    Raises:
      UserError: the images do not fit; flatbuffers or safetensors is missing; the program cannot
        be made, or differs from the network by more than 1e-4 of its outputs. Then nothing is
        written.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r}; allowed: {', '.join(WEIGHTS)}")
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_KNOWN):
        raise UserError(f"platforms={platforms!r}; allowed: some of {', '.join(_KNOWN)}, in a list")
    beside = weights == "beside"
    path = pathlib.Path(file)
    check_suffix(path, SUFFIXES["stablehlo"])
    about = about or About()
    prepared = prepare_as(model, *example, about=about, normalize=normalize, symbolic=symbolic)
    program = _program(prepared, beside, platforms)
    suffixes = ("", ".json", ".safetensors") if beside else ("", ".json")
    stale = [] if beside else _weights_beside(path)
    with written(*(path.with_name(path.name + suffix) for suffix in suffixes)) as files:
        content, sidecar = files[:2]
        content.write_bytes(program)
        for file_of_weights in files[2:]:
            file_of_weights.write_bytes(as_safetensors(prepared.weights))
        difference = compare(prepared, _runner(content, *files[2:]), str(path))
        values = metadata(prepared, about, difference) | {"platforms": list(platforms)}
        sidecar.write_text(json.dumps(values | {"weights": weights}, indent=2) + "\n")
    for left in stale:
        left.unlink(missing_ok=True)
    return Exported(path, prepared.shape, difference, prepared.fixed)


def _weights_beside(path: pathlib.Path) -> list[pathlib.Path]:
    """The file of weights of an earlier export of this name, if it had one."""
    try:
        before = json.loads(path.with_name(path.name + ".json").read_text())
    except (OSError, ValueError):
        return []
    there = isinstance(before, dict) and before.get("weights") == "beside"
    return [path.with_name(path.name + ".safetensors")] if there else []


def _program(prepared: Prepared, beside: bool, platforms: Sequence[str]) -> bytes:
    function: Any = prepared.of_weights if beside else prepared.function
    arguments = [prepared.weights, prepared.spec] if beside else [prepared.spec]
    try:
        exported = export.export(jax.jit(function), platforms=tuple(platforms))(*arguments)
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(
            'StableHLO needs flatbuffers: pip install "mimicnorm-jax[export]"'
        ) from error


def _runner(path: pathlib.Path, *weights: pathlib.Path) -> Any:
    program = export.deserialize(bytearray(path.read_bytes()))
    given = [read_safetensors(file) for file in weights]

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(program.call(*given, images))]

    return run
