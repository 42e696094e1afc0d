"""The configuration of a run as a config file, for programs that are given the run's folder."""

from __future__ import annotations

from ml_collections import ConfigDict

from mimicnorm_jax.paths import expanded
from mimicnorm_jax.train.workdir import saved_config


def get_config(workdir: str) -> ConfigDict:
    """The configuration of the run in ``workdir``; raises ``UserError`` where there is none."""
    return saved_config(expanded(workdir))
