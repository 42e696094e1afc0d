"""Checkpoints: asynchronous, never half there, a damaged one skipped for the one before.

A state is the same on every device (``P()``), so process 0 writes it, as host arrays, and every
process reads it. Nothing in a checkpoint depends on the number of devices or processes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mimicnorm_jax.errors import RunError, UserError, first_line
from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.train.json_files import read_json
from mimicnorm_jax.train.state import TrainState, digest
from mimicnorm_jax.train.unreadable import why_unreadable

Progress = dict[str, Any]
DIGEST = "state_sha256"


class Restored(NamedTuple):
    """A checkpoint: the state as host arrays, and what else was saved with it."""

    state: TrainState
    progress: Progress


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a folder, damaged ones included, in order.

    Raises:
      RunError: the system does not list it.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise RunError(f"{directory} cannot be read now: {error.strerror or error}") from error
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(directory: pathlib.Path) -> int:
    """Step of the newest checkpoint in a folder; 0 without one."""
    return max(checkpoint_steps(directory), default=0)


def kept_step(directory: pathlib.Path) -> str:
    """In words, what a run that fails can be resumed from."""
    try:
        step = latest_step(directory)
    except RunError as error:
        return str(error)
    return f"the checkpoint of step {step} is kept in {directory}" if step else "no step is kept"


def _reason(error: BaseException) -> str:
    """The first line of an exception, without the specification that TensorStore adds."""
    return first_line(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]


def _alone() -> ocp.options.MultiprocessingOptions:
    """Each process reads, and process 0 writes, without waiting for the others."""
    index = coordination.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes=None if coordination.process_count() == 1 else {index},
        barrier_sync_key_prefix=f"process_{index}",
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for its look at the preemption service at every save.

    It would tell the service the number of a step, and of an old one when a save is finished,
    where the loop counts calls: then the processes may not agree on where to stop.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass
class _KeepBest(policies.PreservationPolicy):
    """Preserves the checkpoint of one step: the best."""

    step: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def read(directory: pathlib.Path, step: int, target: TrainState) -> Restored:
    """Reads one checkpoint, and makes sure that it is what was saved.

    Args:
      directory: holds one folder a step.
      step: which.
      target: shapes and types.

    Raises:
      ValueError: the state has another digest than the one saved with it, or is of another step.
      RunError: the system does not hand it out, for want of permission or memory, or because a
        disk fails; its content may be right.
      Exception: whatever a damaged file makes a decoder raise.
    """
    try:
        return _read(directory, step, target)
    except Exception as error:
        if reason := why_unreadable(error, directory / str(step)):
            raise RunError(
                f"the checkpoint of step {step} in {directory} cannot be read now: {reason}; it "
                "stays as it is; mend the cause and try again"
            ) from error
        raise


def _read(directory: pathlib.Path, step: int, target: TrainState) -> Restored:
    with contextlib.closing(
        ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone())
    ) as checkpointer:
        restored = checkpointer.restore(
            directory.absolute() / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
    _check_progress(restored.progress)
    # Neither the compression nor the file system promises to notice a block of zeros.
    if digest(restored.state) != restored.progress[DIGEST]:
        raise ValueError("its digest is not the one saved with it")
    if (saved_at := int(restored.state.step)) != step:
        raise ValueError(f"it is that of step {saved_at}, in a folder of another name")
    return Restored(restored.state, restored.progress)


def made_with(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """The ``hardware`` that a checkpoint was made with, without starting JAX, as Orbax does.

    Args:
      directory: holds one folder a step.
      step: which.

    Returns:
      Nothing where it cannot be read: ``read`` says why.
    """
    try:
        progress = read_json(directory / str(step) / "progress" / "metadata", {"hardware": dict})
    except UserError:
        return {}
    return progress["hardware"]


def _check_progress(progress: Any) -> None:
    """Raises ``ValueError`` unless it has what ``Checkpoints.save`` was given."""
    kinds = {DIGEST: str, "hardware": dict, "since_log": list}
    for name, kind in kinds.items():
        if not isinstance(progress, dict) or not isinstance(progress.get(name), kind):
            raise ValueError(f"its progress has no {name}, or one of another kind")
    if type(progress.get("hardware_since", 0)) is not int:  # older versions did not tell it
        raise ValueError("its progress has a hardware_since that is no step")
    for row in progress["since_log"]:
        if not isinstance(row, dict) or not all(type(v) in (int, float) for v in row.values()):
            raise ValueError("its progress has a since_log that is not of metrics")


def _quiet_about_failed_writes() -> None:
    """From now on TensorStore says nothing of each write of a failed checkpoint.

    It tells an event loop, which is closed by then, and what that raises is printed as a traceback
    of a thread of nobody.
    """
    if getattr(sys.unraisablehook, "leaves_out_closed_loops", False):
        return
    show = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            show(raised)

    hook.leaves_out_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run: the latest few and the best.

    Args:
      directory: holds one folder a step.
      keep: number of latest checkpoints to keep, the best one beside them; 0 keeps all.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 0):
        self.directory = directory
        self._keep = keep
        self._best = _KeepBest()
        self._manager: _Manager | None = None  # opened when something is written

    def _open(self) -> _Manager:
        latest = policies.LatestN(self._keep or None)
        options = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            preservation_policy=policies.AnyPreservationPolicy([latest, self._best]),
            multiprocessing_options=_alone(),
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        _quiet_about_failed_writes()
        return _Manager(self.directory.absolute(), options=options)

    def save(self, state: TrainState, progress: Progress, *, best_step: int) -> None:
        """Starts to save in process 0; elsewhere does nothing.

        Args:
          state: of host arrays, which must not be changed afterwards.
          progress: what else the loop needs to go on, as JSON.
          best_step: the checkpoint to keep beside the latest.

        Raises:
          RunError: this or the save before it failed; older checkpoints are as they were.
        """
        step = int(state.step)
        if not coordination.is_first():
            return
        with self._writing():
            if self._manager is None:
                self._manager = self._open()
            self._best.step = best_step
            if step in self._manager.all_steps():
                return
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    # a copy: Orbax writes it later, in another thread
                    progress=ocp.args.JsonSave(copy.deepcopy(progress) | {DIGEST: digest(state)}),
                ),
            )
            if not saved:
                raise RuntimeError(f"there is one of a later step than {step} already")

    def check(self) -> None:
        """Raises ``RunError`` if an asynchronous save has failed."""
        if self._manager is not None:
            with self._writing():
                self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common one
            self._manager = None  # it would raise the same again when closed
            raise RunError(
                f"a checkpoint could not be written: {_reason(error)}; "
                + kept_step(self.directory)
                + "; mend the cause and resume with the same command"
            ) from error

    def restore_latest(self, target: TrainState, *, set_aside: bool = True) -> Restored | None:
        """The newest checkpoint that can be read; None if there are no checkpoints.

        Damaged ones are reported.

        Args:
          target: shapes and types to restore.
          set_aside: move damaged ones to ``damaged/`` beside the checkpoints, where an older one
            can take their place.

        Raises:
          UserError: there are checkpoints, and all of them are damaged.
          RunError: one cannot be read now, and may be right.
        """
        restored, damaged = self._first_readable(checkpoint_steps(self.directory)[::-1], target)
        if damaged and set_aside and coordination.is_first():
            self._set_aside(damaged)
        coordination.wait_for_all("restored")
        return restored

    def restore_best(self, target: TrainState, accuracies: dict[int, float]) -> Restored:
        """The checkpoint of the best accuracy; if damaged, the next best, loudly.

        Args:
          target: shapes and types to restore.
          accuracies: by step; of equal ones the first counts, of steps without one the last.

        Raises:
          UserError: there is none, or all are damaged.
          RunError: one cannot be read now, and may be right.
        """
        steps = checkpoint_steps(self.directory)
        known = sorted(accuracies.keys() & steps, key=lambda step: (-accuracies[step], step))
        unknown = sorted(set(steps) - set(known), reverse=True)
        restored, _ = self._first_readable(known + unknown, target)
        if restored is None:
            raise UserError(f"{self.directory} has no checkpoint")
        return restored

    def _first_readable(
        self, steps: list[int], target: TrainState
    ) -> tuple[Restored | None, list[int]]:
        """The first of process 0's ``steps`` that can be read, and those before it."""
        steps = coordination.exchange("checkpoints", steps)[0]
        if not steps:
            return None, []
        damaged: list[int] = []
        for step in steps:
            restored, reason = None, ""
            try:
                restored = read(self.directory, step, target)
            except RunError:  # no word on its content: the run ends, and the others with it
                raise
            except Exception as error:  # whatever a damaged file makes a decoder raise
                reason = _reason(error)
            reasons = coordination.exchange(f"checkpoint {step}", reason)
            if restored is not None and not any(reasons):
                return restored, damaged
            if not (reason := reasons[0]):  # what process 0 can read is not damaged
                process, reason = next((p, r) for p, r in enumerate(reasons) if r)
                raise RunError(
                    f"{coordination.name_of(process)} cannot read the checkpoint of step {step}, "
                    f"which process 0 can: {reason}; resume with the same command"
                )
            damaged.append(step)
            if coordination.is_first():
                print(
                    f"WARNING: the checkpoint of step {step} is damaged ({reason})", file=sys.stderr
                )
        raise UserError(
            f"none of the checkpoints in {self.directory} can be read; to start again, choose "
            "another --workdir"
        )

    def _set_aside(self, damaged: list[int]) -> None:
        aside = self.directory.parent / "damaged"
        aside.mkdir(exist_ok=True)
        for step in damaged:
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (self.directory / str(step)).rename(aside / str(step))
        print(f"WARNING: moved to {aside}; the checkpoint before it is used", file=sys.stderr)

    def close(self) -> None:
        """Waits until everything is on disk; raises ``RunError`` if it could not be written."""
        if self._manager is not None:
            with self._writing():
                self._manager.close()
            self._manager = None
