"""A training split that lives on the devices: its batches are gathered there.

For small images and fast devices: a step moves a kilobyte of indices in place of its images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.data.pipeline import prefetch
from mimicnorm_jax.data.sources import ArraySource, Source
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import DATA_AXIS, replicate, replicated, shard_batch
from mimicnorm_jax.train.experiment import Experiment, fields_of


class ResidentSplit:
    """All examples of a split on every device of a mesh.

    Args:
      source: the split; it has to be in memory.
      mesh: the devices, of one process.

    Raises:
      UserError: the split is not in memory.
    """

    def __init__(self, source: Source, mesh: Mesh):
        if not isinstance(source, ArraySource):
            raise UserError(
                f"{len(source)} images of {source.image_shape} are not in memory, so they cannot "
                "go to the devices; raise config.data.cache_gib, without random_resized_crop"
            )
        self._mesh = mesh
        self._examples = replicate({"image": source.images, "label": source.labels}, mesh)
        everywhere, spread = replicated(mesh), NamedSharding(mesh, P(DATA_AXIS))
        self._gather = jax.jit(
            lambda examples, indices: jax.tree.map(lambda x: x[indices], examples),
            in_shardings=(everywhere, spread),
            out_shardings=spread,
        )

    def batch(self, indices: np.ndarray) -> dict[str, jax.Array]:
        """``image`` uint8 ``(B, H, W, C)`` and ``label`` int32 ``(B,)``, spread over the mesh.

        Args:
          indices: of the examples, ``(B,)``.
        """
        placed = shard_batch(indices.astype(np.int32), self._mesh)
        return self._gather(self._examples, placed)


@dataclasses.dataclass(frozen=True)
class ResidentExperiment(Experiment):
    """An experiment of one process whose training images are on its devices.

    Attributes:
      resident: the training split.
    """

    resident: ResidentSplit

    def batches(self, first: int, last: int, *, in_processes: bool = True) -> Generator[Any]:
        """The batches of ``Experiment.batches``, with the same content; nothing is decoded."""
        indices = (self.train_data.indices(step) for step in range(first, last))
        return prefetch(indices, self.resident.batch)


def with_resident(experiment: Experiment, resident: ResidentSplit) -> ResidentExperiment:
    """The same experiment, reading its training batches from ``resident``."""
    return ResidentExperiment(**fields_of(experiment), resident=resident)
