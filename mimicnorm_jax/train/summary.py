"""The summary of a run: ``summary.json`` and ``curves.png``."""

from __future__ import annotations

import pathlib
from typing import Any

from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.train import provenance
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.json_files import write_json
from mimicnorm_jax.train.metrics import plot_curves, read_rows
from mimicnorm_jax.train.state import TrainState, count_parameters, digest
from mimicnorm_jax.train.workdir import Summary


def summarize(
    experiment: Experiment, workdir: pathlib.Path, state: TrainState, results: dict[str, Any]
) -> Summary:
    """Writes, in process 0, the summary of a run that has come to its end, and its curves.

    Args:
      experiment: the run.
      workdir: its folder.
      state: the final state.
      results: what the loop measured.

    Returns:
      The summary: the results, what the run was made with, and the SHA-256 of the final state.
    """
    config = experiment.config
    trained = [row for row in read_rows(workdir) if "train_loss" in row]
    last = trained[-1] if trained else {}
    fields = provenance.config_as_json(config)
    summary = results | {
        "method": config.method,
        "network": config.network,
        "num_parameters": count_parameters(state.params),
        "steps": int(state.step),
        "skipped_steps": None if state.skipped is None else int(state.skipped),
        "final_train_loss": last.get("train_loss"),
        "final_train_loss_floor": last.get("train_loss_floor"),
        "state_sha256": digest(state),
        "data": experiment.data_identity,
        "init_sha256": experiment.pretrained and experiment.pretrained.sha256,
        "config": fields,
        "config_sha256": provenance.config_digest(fields),
        "versions": provenance.versions(),
        **provenance.hardware(experiment.mesh),
        **provenance.code(),
        "finished": True,
    }
    if coordination.is_first():
        plot_curves(workdir, f"{config.network}, {config.method}, {config.data.name}")
        write_json(workdir / "summary.json", summary)
    return summary
