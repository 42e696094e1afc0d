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

from mimicnorm_jax.errors import RunError, UserError, refused_by_system
from mimicnorm_jax.parallel import replicate
from mimicnorm_jax.train.checkpoint import DIGEST, Progress
from mimicnorm_jax.train.evaluation import evaluate, recalibrate
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.json_files import NUMBER_OR_NULL, check_kinds, read_json
from mimicnorm_jax.train.metrics import evaluations
from mimicnorm_jax.train.provenance import config_as_json, config_digest
from mimicnorm_jax.train.state import TrainState

#: Reads the state of a step's checkpoint, as host arrays.
ReadState = Callable[[int], TrainState]


class VerificationError(RunError):
    """The run is not what its configuration makes."""


def check_folder(workdir: pathlib.Path) -> None:
    """Makes sure that a folder leads nowhere else, and that each of its files can be read.

    Raises:
      UserError: it has a link that leads out of it, or what is no file, such as a pipe.
    """
    root = workdir.resolve()
    with refused_by_system(f"{workdir} cannot be read"):
        for folder, folders, files in os.walk(workdir):
            for name in (*folders, *files):
                path = pathlib.Path(folder, name)
                if path.is_symlink() and not path.resolve().is_relative_to(root):
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
    if (summary := _summary(workdir)) is not None:
        records["summary.json"] = summary
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
        if said["config_sha256"] != expected:
            raise VerificationError(
                f"{workdir}: {name} was made with another configuration than that of config.json"
            )


def _summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / "summary.json"
    if not path.exists():
        return None
    kinds: dict[str, Any] = {"config": dict, "config_sha256": str, "steps": int, DIGEST: str}
    return read_json(path, kinds)


def claimed(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """The results that a run claims, by step: in its summary and in its lines of metrics.

    Raises:
      UserError: a file is damaged.
      VerificationError: they contradict each other, or the best is not the best.
    """
    found: dict[int, dict[str, float]] = {}
    rows = evaluations(workdir)
    for row in rows:
        numbers = {k: v for k, v in row.items() if k.startswith(("test_", "holdout_"))}
        found.setdefault(row["step"], {}).update(numbers)
    summary = _summary(workdir)
    if summary is None:
        return found
    path = workdir / "summary.json"
    check_kinds(summary, {"best_step": int}, str(path))
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
        found[summary["steps"]]["test_accuracy_recalibrated"] = exact
    return found


def check_accuracies(
    workdir: pathlib.Path,
    experiment: Experiment,
    steps: Sequence[int],
    replayed: Collection[int],
    read_state: ReadState,
    refuse: Callable[[int, str], Exception],
) -> list[int]:
    """Evaluates checkpoints, and compares what the run says of them.

    Args:
      workdir: the run's folder.
      experiment: the run.
      steps: of the checkpoints.
      replayed: those that are evaluated beside the last and the best.
      read_state: reads one.
      refuse: from a step, and what is not as claimed, to what is raised.

    Returns:
      The steps that were evaluated: those of which the run claims a result.

    Raises:
      VerificationError: the best step has no checkpoint.
    """
    said = claimed(workdir)
    summary = _summary(workdir) or {}
    if summary and summary["best_step"] not in steps:
        raise VerificationError(
            f"{workdir}: the best step is {summary['best_step']}, of which there is no checkpoint"
        )
    wanted = {summary.get("steps"), summary.get("best_step"), *replayed}
    chosen = sorted(said.keys() & set(steps) & wanted)
    for step in chosen:
        state = replicate(read_state(step), experiment.mesh)
        found = evaluate(experiment, state)
        if "test_accuracy_recalibrated" in said[step]:
            exact = evaluate(experiment, recalibrate(experiment, state))
            found["test_accuracy_recalibrated"] = exact["test_accuracy"]
        for name, value in said[step].items():
            if not math.isclose(found.get(name, math.nan), value, rel_tol=1e-9):
                raise refuse(step, f"{name} is {value}, and is found to be {found.get(name)}")
    return chosen
