"""A run that is ready to start: its program, its data, and what it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.data.pipeline import Pipeline, Workers, prefetch
from mimicnorm_jax.data.random_crop import RandomResizedCrop
from mimicnorm_jax.data.sources import Source, channel_statistics
from mimicnorm_jax.data.splits import Splits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import coordination, shard_batch
from mimicnorm_jax.train.description import Description
from mimicnorm_jax.train.pretrained import Pretrained, Start
from mimicnorm_jax.train.program import Images, Program, Values, make_program
from mimicnorm_jax.train.state import TrainState, host_copy
from mimicnorm_jax.train.workdir import DataIdentity, data_identity


class Due(NamedTuple):
    """What the host has to do after a step."""

    log: bool
    evaluation: bool
    checkpoint: bool


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """A run that is ready to start: its program, and its data.

    Attributes:
      train_data: training batches by step.
      test_data: the test split; None where there is none.
      holdout_data: images that choose the best checkpoint and the temperature; None where the
        test split chooses the checkpoint.
      total_steps: length of the run.
      images: what is known of the training images.
      pretrained: the weights that the run starts from; None for random ones.
      start: what they give, where they were read: a run that goes on needs them no more.
    """

    train_data: Pipeline
    test_data: Pipeline | None
    holdout_data: Pipeline | None
    total_steps: int
    images: Images
    pretrained: Pretrained | None
    start: Start | None

    def initial_state(self, values: Values | None = None) -> TrainState:
        """The state at step 0: random, or of the pretrained weights."""
        if values is None and self.pretrained is not None:
            assert self.start is not None  # else there is a checkpoint to go on from
            values = self.start.values
        return super().initial_state(values)

    def start_from(self, pretrained: Pretrained) -> Start:
        """What pretrained weights give this run.

        Raises:
          UserError: they do not fit its network.
        """
        state = host_copy(super().initial_state())
        values = jax.tree.map(jnp.asarray, (state.params, state.batch_stats))
        model: Any = nnx.merge(self.network.eval_graph, *values, copy=True)
        return pretrained.start(model, self.train_data.source.class_names)

    @property
    def description(self) -> Description:
        """What the network takes and puts out."""
        return Description.of(self.config, self.train_data.source, self.images)

    @property
    def data_identity(self) -> DataIdentity:
        """What tells the images of this run from others, wherever they are stored."""
        return data_identity(self.splits._asdict())

    @property
    def splits(self) -> Splits:
        """The images."""
        test, holdout = (
            None if data is None else data.source for data in (self.test_data, self.holdout_data)
        )
        return Splits(self.train_data.source, test, holdout)

    def due(self, step: int) -> Due:
        """What is done after a step; after the last one everything."""
        at_end = step == self.total_steps

        def completes(every_epochs: float) -> bool:
            period = self.train_data.steps(every_epochs)
            return at_end or Fraction(step) // period > Fraction(step - 1) // period

        return Due(
            log=at_end or step % self.config.log_every == 0,
            evaluation=completes(self.config.eval_every),
            checkpoint=completes(self.config.checkpoint_every),
        )

    def batches(self, first: int, last: int, *, in_processes: bool = True) -> Generator[Any]:
        """The training batches of steps ``first`` to ``last`` (not included), on the devices."""
        host = self.train_data.batches(first, last, in_processes=in_processes)
        return prefetch(host, lambda batch: shard_batch(batch, self.mesh))


def images_of(
    config: ConfigDict,
    train: Source,
    pretrained: Pretrained | None = None,
    before: Images | None = None,
) -> Images:
    """What a program must know of the training images.

    Args:
      config: the configuration.
      train: the training split.
      pretrained: the weights that the run starts from, which were made for a mean and a standard
        deviation of their own.
      before: what a run that goes on measured when it began.

    Raises:
      UserError: these are of another number of channels.
    """
    if config.data.mean:
        mean, std = np.array(config.data.mean), np.array(config.data.std)
    elif before is not None:
        mean, std = np.array(before.mean), np.array(before.std)
    elif pretrained is not None:
        mean, std = np.array(pretrained.mean), np.array(pretrained.std)
        if len(mean) != train.image_shape[-1]:
            raise UserError(
                f"config.init_from = {config.init_from!r}: it is for images of {len(mean)} "
                f"channel(s), and these have {train.image_shape[-1]}"
            )
    else:
        mean, std = channel_statistics(train)
    return Images(
        shape=train.image_shape,
        num_classes=len(train.class_names),
        num_examples=len(train),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def pipelines(config: ConfigDict, splits: Splits) -> dict[str, Pipeline | None]:
    """The configured pipelines of the splits, as fields of an experiment."""
    data = config.data
    crop = None
    if data.random_resized_crop:
        crop = RandomResizedCrop(tuple(data.crop_scale), tuple(data.crop_ratio))
    return {
        "train_data": pipeline_of(config, splits.train, crop),
        "test_data": None if splits.test is None else pipeline_of(config, splits.test),
        "holdout_data": None if splits.holdout is None else pipeline_of(config, splits.holdout),
    }


def pipeline_of(
    config: ConfigDict, source: Source, crop: RandomResizedCrop | None = None
) -> Pipeline:
    """The configured pipeline of one split, for this process."""
    return Pipeline(
        source,
        crop=crop,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=Workers(config.data.threads or Workers.threads, config.data.processes),
        process_index=coordination.process_index(),
        process_count=coordination.process_count(),
    )


def experiment_of(config: ConfigDict, images: Images, mesh: Mesh, splits: Splits) -> Experiment:
    """Builds a run on splits that are open already.

    Args:
      config: the configuration, which has been validated.
      images: from ``images_of``, of the training split.
      mesh: the devices.
      splits: of ``config``.

    Raises:
      UserError: images, devices and configuration do not fit each other.
    """
    program = make_program(config, images, mesh)
    data: dict[str, Any] = pipelines(config, splits)
    return Experiment(
        **fields_of(program),
        **data,
        total_steps=min(program.epoch_steps, config.max_steps or program.epoch_steps),
        images=images,
        pretrained=None,
        start=None,
    )


def fields_of(program: Program) -> dict[str, Any]:
    """The fields of a program by name, of which a larger one is made."""
    return {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
