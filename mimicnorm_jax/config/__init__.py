"""Every field of a run's configuration: meaning, default, allowed values, one check.

``python -m mimicnorm_jax.config`` prints them all. A group of fields is a file: ``run``,
``options``, ``data``, ``optimization``.
"""

from mimicnorm_jax.config.check import method_of, network_options_of, validate
from mimicnorm_jax.config.data import DATA_SETS
from mimicnorm_jax.config.field import LONGEST, SHORTEST, Field, rate
from mimicnorm_jax.config.fields import (
    FIELDS,
    FREE_FIELDS,
    LOCAL_FIELDS,
    TEST_FIELDS,
    default_config,
    describe_fields,
    flatten,
)
from mimicnorm_jax.config.optimization import SCHEDULES

__all__ = [
    "DATA_SETS",
    "FIELDS",
    "FREE_FIELDS",
    "LOCAL_FIELDS",
    "LONGEST",
    "SCHEDULES",
    "SHORTEST",
    "TEST_FIELDS",
    "Field",
    "default_config",
    "describe_fields",
    "flatten",
    "method_of",
    "network_options_of",
    "rate",
    "validate",
]
