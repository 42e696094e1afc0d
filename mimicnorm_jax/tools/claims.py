"""What a run claims beside its states: compared with what the states give.

Nothing in the folder of a run is believed here, and nothing outside of it is reached through it.
"""

from __future__ import annotations

import math
import os
import pathlib
import stat
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ml_collections import ConfigDict

from mimicnorm_jax.errors import RunError, UserError, refused_by_system, shown
from mimicnorm_jax.parallel import replicate
from mimicnorm_jax.train.checkpoint import DIGEST, Progress
from mimicnorm_jax.train.evaluation import evaluate, recalibrate
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.json_files import NUMBER_OR_NULL, check_kinds, read_json
from mimicnorm_jax.train.metrics import chooses, evaluations
from mimicnorm_jax.train.provenance import config_as_json, config_digest
from mimicnorm_jax.train.state import TrainState

_ROUNDING = 1e-3  # of accuracies and losses, of another processor or number of threads

#: Reads the state of a step's checkpoint, as host arrays.
ReadState = Callable[[int], TrainState]


class VerificationError(RunError):
    """The run is not what its configuration makes."""


def check_folder(workdir: pathlib.Path) -> None:
    """Makes sure that a folder leads nowhere else, and that each of its files can be read.

    Raises:
      UserError: it has a link that leads out of it, or what is no file, such as a pipe.
    """
    root = pathlib.Path(os.path.realpath(workdir))
    with refused_by_system(f"{workdir} cannot be read"):
        for folder, folders, files in os.walk(workdir):
            for name in (*folders, *files):
                path = pathlib.Path(folder, name)
                target = pathlib.Path(os.path.realpath(path))
                if path.is_symlink() and not target.is_relative_to(root):
                    raise UserError(
                        f"{path} is a link that leads out of the run; verify a copy in which the "
                        "files themselves are: cp -rL"
                    )
                mode = path.stat().st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    raise UserError(f"{path} is neither a file nor a folder")


def check_records(workdir: pathlib.Path, config: ConfigDict, progress: dict[int, Progress]) -> None:
    """Compares what the run recorded of itself: digests of its configuration and its state.

    Args:
      workdir: the run's folder.
      config: its ``config.json``.
      progress: of each checkpoint, by step.

    Raises:
      VerificationError: they do not fit together.
    """
    expected = config_digest(config_as_json(config))
    records = {f"the checkpoint of step {step}": said for step, said in progress.items()}
    if (summary := read_summary(workdir, progress)) is not None:
        records["summary.json"] = summary
        for name in ("network", "method", "seed"):
            if summary.get(name, config[name]) != config[name]:
                raise VerificationError(
                    f"{workdir}: summary.json says {name} {shown(summary[name])}, and config.json "
                    f"{config[name]!r}"
                )
        if config_digest(summary["config"]) != summary["config_sha256"]:
            raise VerificationError(f"{workdir}: summary.json was changed: see its config_sha256")
        step = summary["steps"]
        if step not in progress:
            raise VerificationError(
                f"{workdir}: summary.json tells of step {step}, of which there is no checkpoint"
            )
        if progress[step][DIGEST] != summary[DIGEST]:
            raise VerificationError(
                f"{workdir}: summary.json does not tell of the checkpoint of step {step}: its "
                f"{DIGEST} is another"
            )
    for name, said in records.items():
        if said.get("config_sha256") != expected:
            raise VerificationError(
                f"{workdir}: {name} was made with another configuration than that of config.json"
            )


def read_summary(workdir: pathlib.Path, steps: Collection[int]) -> dict[str, Any] | None:
    """The summary of a run; None where there is none, or the run went on since it was written.

    Args:
      workdir: the run's folder.
      steps: of its checkpoints.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    kinds: dict[str, Any] = {"config": dict, "config_sha256": str, "steps": int, DIGEST: str}
    summary = read_json(path, kinds | {"best_step": int})
    return None if max(steps, default=0) > summary["steps"] else summary


def claimed(workdir: pathlib.Path, steps: Collection[int]) -> dict[int, dict[str, float]]:
    """The results that a run claims, by step: in its summary and in its lines of metrics.

    Args:
      workdir: the run's folder.
      steps: of its checkpoints.

    Raises:
      UserError: a file is damaged.
      VerificationError: they contradict each other, or the best is not the best.
    """
    found: dict[int, dict[str, float]] = {}
    rows = evaluations(workdir)
    for row in rows:
        # null stands for what is not finite, and so for nothing good
        results = {k: v for k, v in row.items() if k.startswith(("test_", "holdout_"))}
        numbers = {name: value for name, value in results.items() if value is not None}
        found.setdefault(row["step"], {}).update(numbers)
    summary = read_summary(workdir, steps)
    if summary is None:
        return found
    path = workdir / "summary.json"
    for prefix, step in (("final", summary["steps"]), ("best", summary["best_step"])):
        for split in ("test", "holdout"):
            key = f"{prefix}_{split}_accuracy"
            value = check_kinds({key: None} | summary, {key: NUMBER_OR_NULL}, str(path))[key]
            if value is None:
                continue
            known = found.setdefault(step, {}).setdefault(f"{split}_accuracy", value)
            if known != value:
                raise VerificationError(
                    f"{workdir}: {key} is {value} in summary.json and {known} in metrics.jsonl"
                )
    chosen_by = summary.get("best_chosen_by", "test")
    accuracies = [row[f"{chosen_by}_accuracy"] for row in rows if f"{chosen_by}_accuracy" in row]
    best = summary.get(f"best_{chosen_by}_accuracy")
    if accuracies and best != max(accuracies):
        raise VerificationError(
            f"{workdir}: best_{chosen_by}_accuracy is {best} in summary.json, and the best in "
            f"metrics.jsonl {max(accuracies)}"
        )
    exact = check_kinds(
        {"final_test_accuracy_recalibrated": None} | summary,
        {"final_test_accuracy_recalibrated": NUMBER_OR_NULL},
        str(path),
    )["final_test_accuracy_recalibrated"]
    if exact is not None:
        found.setdefault(summary["steps"], {})["test_accuracy_recalibrated"] = exact
    return found


def check_accuracies(
    workdir: pathlib.Path,
    experiment: Experiment,
    steps: Sequence[int],
    replayed: Collection[int],
    read_state: ReadState,
) -> list[int]:
    """Evaluates checkpoints, and compares what the run says of them.

    Args:
      workdir: the run's folder.
      experiment: the run.
      steps: of the checkpoints.
      replayed: those that are evaluated beside the last and the best; their bits are right.
      read_state: reads one.

    Returns:
      The steps that were evaluated: those of which the run claims a result.

    Raises:
      VerificationError: a result is better or worse, or the best step has no checkpoint.
      UserError: it differs by no more than another order of sums may make it.
    """
    said = claimed(workdir, steps)
    summary = read_summary(workdir, steps)
    if summary is not None and summary["best_step"] not in steps:
        raise VerificationError(
            f"{workdir}: the best step is {summary['best_step']}, of which there is no checkpoint"
        )
    accuracies = {row["step"]: chooses(row) for row in evaluations(workdir)}
    known = {step: accuracy for step, accuracy in accuracies.items() if step in steps}
    best = max(known, key=lambda step: known[step], default=None)
    wanted = {max(steps), best, *replayed} | ({summary["best_step"]} if summary else set())
    chosen = sorted(said.keys() & set(steps) & wanted)
    for step in chosen:
        state = replicate(read_state(step), experiment.mesh)
        found = evaluate(experiment, state)
        if "test_accuracy_recalibrated" in said[step]:
            exact = evaluate(experiment, recalibrate(experiment, state))
            found["test_accuracy_recalibrated"] = exact["test_accuracy"]
        for name, value in said[step].items():
            got = found.get(name, math.nan)
            if math.isclose(got, value, rel_tol=1e-9):
                continue
            what = f"{name} is {value}, and is found to be {got}"
            unknown = (
                f"{workdir}: whether the checkpoint of step {step} is as good as claimed cannot"
            )
            if math.isclose(got, value, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
                raise UserError(
                    f"{unknown} be found out here: {what}; so little can come of another machine"
                )
            if experiment.config.optimizer.ema_decay:
                raise UserError(
                    f"{unknown} be found out: {what}, with statistics of "
                    f"config.optimizer.ema_batches = {experiment.config.optimizer.ema_batches} "
                    "batches, which may have been others"
                )
            raise VerificationError(
                f"{workdir}: the checkpoint of step {step} is not as good as claimed: {what}"
            )
    return chosen
