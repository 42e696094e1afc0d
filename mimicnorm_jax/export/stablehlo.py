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
from mimicnorm_jax.export.written import Exported, written

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    file: str | os.PathLike[str],
    about: About | None = None,
    normalize: bool = False,
    symbolic: bool = True,
    platforms: Sequence[str] = PLATFORMS,
) -> Exported:
    """Writes the folded network with its weights as a program of ``jax.export``.

    What reads it needs JAX and ``flatbuffers``, and neither Flax nor this package::

      program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
      logits = program.call(images)

    Beside it, ``model.stablehlo.json`` has the metadata.

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
      platforms: on which it can be run.

    Returns:
      What was written.

    Raises:
      UserError: the images do not fit; flatbuffers is missing; the program cannot be made or
        differs from the network by more than 1e-4 of its outputs. Then nothing is written.
    """
    about = about or About()
    prepared = prepare_as(model, *example, about=about, normalize=normalize, symbolic=symbolic)
    path = pathlib.Path(file)
    program = _program(prepared, platforms)
    with written(path, path.with_name(path.name + ".json")) as (content, sidecar):
        content.write_bytes(program)
        difference = compare(prepared, _runner(content), str(path))
        values = metadata(prepared, about, difference) | {"platforms": list(platforms)}
        sidecar.write_text(json.dumps(values, indent=2) + "\n")
    return Exported(path, prepared.shape, difference, prepared.fixed)


def _program(prepared: Prepared, platforms: Sequence[str]) -> bytes:
    try:
        exported = export.export(jax.jit(prepared.function), platforms=tuple(platforms))(
            prepared.spec
        )
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(
            'StableHLO needs flatbuffers: pip install "mimicnorm-jax[export]"'
        ) from error


def _runner(path: pathlib.Path) -> Any:
    program = export.deserialize(bytearray(path.read_bytes()))
    return lambda images: [np.asarray(leaf) for leaf in jax.tree.leaves(program.call(images))]
