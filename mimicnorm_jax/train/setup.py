"""From a configuration to everything a run needs, with nothing written to disk."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Generator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import xla_bridge
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import LOCAL_FIELDS, validate
from mimicnorm_jax.data.pipeline import Pipeline, Workers, prefetch
from mimicnorm_jax.data.random_crop import RandomResizedCrop
from mimicnorm_jax.data.sources import Source, channel_statistics
from mimicnorm_jax.data.splits import Splits, splits_of
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.guest import guests
from mimicnorm_jax.parallel import coordination, make_mesh, shard_batch
from mimicnorm_jax.train.description import Description
from mimicnorm_jax.train.program import Images, Program, make_program
from mimicnorm_jax.train.provenance import config_as_json
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
    """

    train_data: Pipeline
    test_data: Pipeline | None
    holdout_data: Pipeline | None
    total_steps: int
    images: Images

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


def configure_jax(config: ConfigDict) -> None:
    """Sets what must be set before the first computation.

    Raises:
      UserError: in a process where it is too late, or where another run needs it otherwise.
    """
    is_wide = config.precision == "float64"
    if guests() > 1 and is_wide != jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise UserError(
            f"config.precision = {config.precision!r}: another run of this process computes with "
            "other types; wait for its end"
        )
    _keep_compiled_programs(config.compilation_cache)
    if is_wide:
        jax.config.update("jax_enable_x64", True)
    if config.deterministic:
        _choose_deterministic_kernels()


def _choose_deterministic_kernels() -> None:
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    elif jax.default_backend() != "cpu":  # which is deterministic
        raise UserError(
            f"config.deterministic is too late: JAX computes already; start with XLA_FLAGS={flag}"
        )


def _keep_compiled_programs(folder: str) -> None:
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # the default, 1 s, leaves out most of what a small network needs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if folder == "auto":
        if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            return  # the environment says where
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = str(pathlib.Path(home).expanduser() / "mimicnorm_jax")
    if folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError:  # a machine without a home: every start compiles
            return
    jax.config.update("jax_compilation_cache_dir", folder or None)


def silence_false_alarms(mesh: Mesh) -> None:
    """On some processors XLA calls its own CPU programs from the cache unfit, at great length.

    It compares the features of the processor with a list to which it adds preferences of its
    own. JAX_LOGGING_LEVEL brings the messages back.
    """
    if mesh.devices.flat[0].platform == "cpu" and "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")


def images_of(config: ConfigDict, train: Source) -> Images:
    """What a program must know of the training images."""
    mean, std = (
        (np.array(config.data.mean), np.array(config.data.std))
        if config.data.mean
        else channel_statistics(train)
    )
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


def set_up_together(config: ConfigDict) -> Experiment:
    """``set_up`` in every process of a run.

    Raises:
      UserError: also where the processes were not started alike, or see other images.
    """
    check_same_configuration(config)
    experiment = coordination.together("set-up", lambda: set_up(config))
    check_same_images(experiment.splits._asdict())
    return experiment


def check_same_configuration(config: ConfigDict) -> None:
    """Raises ``UserError`` unless every process of a run has the same configuration."""
    said = {"JAX": jax.__version__} | {
        f"config.{name}": value
        for name, value in config_as_json(config).items()
        if name not in LOCAL_FIELDS
    }
    _check_alike("configuration", said)


def check_same_images(splits: Mapping[str, Source | None]) -> None:
    """Raises ``UserError`` unless every process of a run sees the same splits."""
    for split, identity in data_identity(splits).items():
        _check_alike("data", {f"{split} {name}": value for name, value in identity.items()})


def _check_alike(what: str, said: dict[str, Any]) -> None:
    """Raises ``UserError`` unless every process says the same."""
    first, *others = coordination.exchange(what, said)
    for process, other in enumerate(others, start=1):
        for name in first:
            if other.get(name) != first[name]:
                raise UserError(
                    f"the processes differ in {name}: {first[name]!r} in process 0, "
                    f"{other.get(name)!r} in process {process}"
                )


def set_up(config: ConfigDict) -> Experiment:
    """Builds a run from its configuration.

    Raises:
      UserError: whatever is wrong with the configuration, the data, the devices, or
        their combination.
    """
    validate(config)
    configure_jax(config)
    mesh = make_mesh(config.num_devices)
    silence_false_alarms(mesh)
    splits = splits_of(config)
    return experiment_of(config, images_of(config, splits.train), mesh, splits)


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
    )


def fields_of(program: Program) -> dict[str, Any]:
    """The fields of a program by name, of which a larger one is made."""
    return {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
