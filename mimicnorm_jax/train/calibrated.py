"""``calibration.json`` of a run: the temperatures of its checkpoints."""

from __future__ import annotations

import pathlib
from typing import Any

from mimicnorm_jax.calibration import fit_temperature
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.json_files import read_json, write_json
from mimicnorm_jax.train.scores import Outputs, probability_scores

NAME = "calibration.json"

Calibration = dict[str, Any]


def calibrate(outputs: Outputs) -> Calibration:
    """Fits a temperature.

    Args:
      outputs: of a network, for images that it was not trained on.

    Returns:
      ``temperature``; ``examples``, the number of those images; their ``loss`` and
      ``calibration_error`` ``before`` (at temperature 1) and ``after``.
    """
    temperature = fit_temperature(outputs.logits, outputs.labels)
    return {
        "temperature": temperature,
        "examples": len(outputs.labels),
        "before": probability_scores(outputs, 1.0),
        "after": probability_scores(outputs, temperature),
    }


def write_calibrations(workdir: pathlib.Path, found: dict[int, Calibration]) -> None:
    """Writes the temperatures of the checkpoints of some steps, in place of earlier ones."""
    write_json(workdir / NAME, {str(step): calibration for step, calibration in found.items()})


def read_calibration(workdir: pathlib.Path, step: int) -> Calibration | None:
    """What was found for the checkpoint of a step; None where it was not calibrated.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / NAME
    if not path.exists():
        return None
    found = read_json(path).get(str(step))
    if found is None:
        return None
    temperature = found.get("temperature") if isinstance(found, dict) else None
    if not isinstance(temperature, float) or not 0 < temperature < float("inf"):
        raise UserError(f"{path} is damaged: step {step} has no positive temperature")
    return found
