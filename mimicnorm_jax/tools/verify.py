"""Replays parts of a run between its checkpoints: is it what its configuration makes?

  python -m mimicnorm_jax.tools.verify RUN [--intervals K]

An interval is the way from one checkpoint of RUN (or the initial state) to the next. K of them are
chosen at random, recomputed, and compared bit for bit. How many there are is up to the run's
``config.keep_checkpoints``: 0 keeps all. Then its checkpoints are evaluated, and compared with the
accuracies that it claims. Nothing of the run is believed but its configuration and its data.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import random
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from jax._src import xla_bridge
from ml_collections import ConfigDict

from mimicnorm_jax.arguments import Parser, run
from mimicnorm_jax.config import FIELDS
from mimicnorm_jax.errors import RunError, UserError, first_line
from mimicnorm_jax.parallel import replicate
from mimicnorm_jax.parallel.backend import print_warnings_of_jax, started
from mimicnorm_jax.paths import expanded
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.claims import (
    VerificationError,
    check_accuracies,
    check_folder,
    check_records,
    read_summary,
)
from mimicnorm_jax.train.checkpoint import (
    DIGEST,
    Restored,
    checkpoint_steps,
    latest_step,
    made_with,
    read,
)
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.pretrained import check_pretrained
from mimicnorm_jax.train.provenance import differences, hardware
from mimicnorm_jax.train.setup import configure_jax, set_up
from mimicnorm_jax.train.state import TrainState, digest, host_copy
from mimicnorm_jax.train.workdir import check_data, saved_config

Interval = tuple[int, int]


@contextlib.contextmanager
def _no_word_on_it() -> Iterator[None]:
    """What cannot be read now is neither right nor wrong."""
    try:
        yield
    except VerificationError:
        raise
    except RunError as error:
        raise UserError(str(error)) from error


def intervals(steps: Sequence[int]) -> list[Interval]:
    """The intervals between checkpoints, from the initial state on.

    Args:
      steps: of the checkpoints, in order.
    """
    return list(zip([0, *steps], steps, strict=False))


def replay(experiment: Experiment, state: TrainState, interval: Interval) -> str:
    """Trains from one step to another; returns the digest of the state.

    Args:
      experiment: the run.
      state: at the first step, on its devices; it is donated.
      interval: the two steps.
    """
    first, last = interval
    ahead = experiment.batches(first, last)
    steps = iter(
        progress_bar(
            ahead,
            f"steps {first} to {last}",
            last - first,
            unit="step",
            leave=False,
        )
    )
    with contextlib.closing(ahead):
        while batches := list(itertools.islice(steps, experiment.steps_per_call)):
            state, metrics = experiment.train(state, batches)
            metrics["loss"].block_until_ready()
    return digest(host_copy(state))


def _compute_as_the_run_did(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Starts JAX with as many threads on CPUs and as many devices as the run had last.

    These follow the machine where nothing sets them, and the bits follow them.
    """
    directory = workdir / "checkpoints"
    with _no_word_on_it():
        before = made_with(directory, latest_step(directory))
    threads, devices = before.get("threads"), before.get("num_devices")
    is_set = "NPROC" in os.environ or xla_bridge.backends_are_initialized()
    if not is_set and type(threads) is int and FIELDS["cpu_threads"].accepts(threads):
        config.cpu_threads = threads
    configure_jax(config)
    if type(devices) is int and 1 <= devices <= len(started(jax.devices)):
        config.num_devices = devices


def verify(
    workdir: pathlib.Path, *, count: int, seed: int | None = None, data_dir: str | None = None
) -> list[Interval]:
    """Replays intervals of a run.

    Args:
      workdir: the run's folder; nothing is written to it.
      count: how many intervals, 0 for all.
      seed: chooses them.
      data_dir: where the data are, if not where the run found them.

    Returns:
      The intervals that were replayed, all of them right.

    Raises:
      VerificationError: something is not what the configuration makes.
      UserError: the run cannot be replayed here.
    """
    check_folder(workdir)
    config = saved_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    _compute_as_the_run_did(config, workdir)
    experiment = set_up(config)
    check_data(workdir, experiment.data_identity)
    check_pretrained(workdir, experiment.pretrained)
    directory = workdir / "checkpoints"
    with _no_word_on_it():
        steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"{workdir} has no checkpoints to replay from")

    def read_step(step: int) -> Restored:
        with _no_word_on_it():
            try:
                return read(directory, step, experiment.abstract_state)
            except RunError:
                raise
            except Exception as error:  # whatever a damaged file makes a decoder raise
                raise VerificationError(
                    f"{workdir}: the checkpoint of step {step}: {first_line(error)}"
                ) from error

    # each is compared with its digest; all their states at once may not fit
    progress = {step: read_step(step).progress for step in steps}
    check_records(workdir, config, progress)
    chosen = intervals(steps)
    if count:
        chosen = sorted(random.Random(seed).sample(chosen, min(count, len(chosen))))
    print(
        f"{workdir}: {len(steps)} checkpoints; replaying {len(chosen)} of {len(steps)} intervals, "
        f"{sum(b - a for a, b in chosen)} of {steps[-1]} steps",
        flush=True,
    )
    for first, last in chosen:
        state = (
            replicate(read_step(first).state, experiment.mesh)
            if first
            else experiment.initial_state()
        )
        got = replay(experiment, state, (first, last))
        if got != progress[last][DIGEST]:
            moved = progress[last].get("hardware_since", 0)
            elsewhere = differences(progress[last]["hardware"], hardware(experiment.mesh))
            if first < moved:
                elsewhere.append(f"up to step {moved} on another machine, or by other versions")
            if elsewhere:
                raise UserError(
                    f"{workdir}: whether the checkpoint of step {last} is right cannot be found "
                    f"out here: the bits differ, and it was made elsewhere: {'; '.join(elsewhere)}"
                )
            raise VerificationError(
                f"{workdir}: the checkpoint of step {last} is not what the configuration makes of "
                f"{f'that of step {first}' if first else 'the initial state'}: its {DIGEST} is "
                f"{progress[last][DIGEST][:12]}…, replayed it is {got[:12]}…"
            )
        print(f"steps {first} to {last}: the same, {DIGEST} {got[:12]}…", flush=True)
    if (workdir / "summary.json").exists() and read_summary(workdir, steps) is None:
        print("summary.json is of before the run went on, and is not looked at", flush=True)
    evaluated = check_accuracies(
        workdir,
        experiment,
        steps,
        {last for _, last in chosen},
        lambda step: read_step(step).state,
    )
    if evaluated:
        print(f"evaluated as claimed: steps {', '.join(map(str, evaluated))}", flush=True)
    return chosen


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m mimicnorm_jax.tools.verify", str(__doc__))
    parser.add_argument("run", type=expanded, help="folder of the run; nothing is written to it")
    parser.add_argument("--intervals", type=int, default=3, help="how many (default 3); 0: all")
    parser.add_argument("--seed", type=int, help="chooses the intervals (default: by chance)")
    parser.add_argument("--data-dir", help="config.data.dir, where the data are elsewhere now")
    options = parser.parse_args(arguments)
    if options.intervals < 0:
        raise UserError(f"--intervals={options.intervals} is below 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program: exit code 0 if all is right, 1 if not, 2 if it cannot be found out."""
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file it reads
    print_warnings_of_jax()

    def program() -> None:
        options = _parse(arguments)
        verify(options.run, count=options.intervals, seed=options.seed, data_dir=options.data_dir)
        print("verified: states and what they are evaluated to; not losses, times and versions")

    # only what is wrong is 1: what fails while it is looked at is no word on the run
    run(program, code_of=lambda error: 1 if isinstance(error, VerificationError) else 2)


if __name__ == "__main__":
    main()
