"""The folder of a run: whether it may go on there, its lock, what the system refuses."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from mimicnorm_jax.errors import RunError, UserError, refused_by_system
from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.train.checkpoint import kept_step, latest_step
from mimicnorm_jax.train.description import check_network, write_description
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.lock import WorkdirLock
from mimicnorm_jax.train.pretrained import check_pretrained, write_pretrained
from mimicnorm_jax.train.workdir import check_data, check_workdir, open_workdir


@contextlib.contextmanager
def opened(experiment: Experiment, workdir: pathlib.Path) -> Iterator[WorkdirLock]:
    """Creates and locks the folder of the run."""
    config = experiment.config

    def open_() -> None:
        check_workdir(workdir, config, writes=False)  # another run may have come first
        if coordination.is_first():
            open_workdir(workdir, config, experiment.data_identity)
            with refused_by_system(f"--workdir={workdir} cannot be written to"):
                write_description(workdir, experiment.description)
                # before anything is logged: a run that has metrics and no such folder lost it
                (workdir / "checkpoints").mkdir(exist_ok=True)
                if experiment.pretrained is not None:
                    write_pretrained(workdir, experiment.pretrained)

    with contextlib.closing(WorkdirLock(workdir)) as lock:
        coordination.together("open", open_)
        yield lock


@contextlib.contextmanager
def explained(workdir: pathlib.Path, lock: WorkdirLock) -> Iterator[None]:
    """Turns what the system refuses into a ``RunError`` that says what is kept."""
    try:
        yield
    except BrokenPipeError:  # of the output, not of the workdir
        raise
    except (OSError, RunError) as error:
        lock.check()  # a folder that has vanished explains the rest
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"--workdir={workdir} cannot be written to: {error.strerror or error}; "
            + kept_step(workdir / "checkpoints")
            + "; mend the cause and resume with the same command"
        ) from error


def check_run(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Makes sure that ``workdir`` holds no longer run, and none on other images."""
    check_network(workdir, experiment.config)
    check_data(workdir, experiment.data_identity)
    check_pretrained(workdir, experiment.pretrained)
    if (workdir / "metrics.jsonl").exists() and not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"--workdir={workdir} holds a run whose checkpoints are gone; put the folder "
            "checkpoints back, or delete --workdir to begin anew"
        )
    done = latest_step(workdir / "checkpoints")
    if done > experiment.total_steps:
        raise UserError(
            f"--workdir={workdir} holds a run of {done} steps already, more than the "
            f"{experiment.total_steps} of config.max_steps; choose another --workdir"
        )
