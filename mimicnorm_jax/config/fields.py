"""All fields of a run's configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from mimicnorm_jax.config import data, optimization, options, run
from mimicnorm_jax.config.field import Field

FIELDS: dict[str, Field] = run.FIELDS | options.FIELDS | data.FIELDS | optimization.FIELDS

# Fields in which even the processes of one run may differ: what their machines have where.
LOCAL_FIELDS = (
    *("compilation_cache", "data.dir", "data.cache_gib", "data.threads", "data.processes"),
)

# Fields that change what is watched or kept, not what is computed: a run may be
# continued with another value of them. (The data themselves may move, not change: a run
# remembers which images it was started with.)
FREE_FIELDS = (
    *("max_steps", "log_every", "checkpoint_every", "keep_checkpoints", "num_devices"),
    *("hang_minutes", "skip_limit", "optimizer.ema_batches", "require_same_machine", "cpu_threads"),
    *LOCAL_FIELDS,
)

# Fields that choose the images of an evaluation: a run may be evaluated on others than its own.
TEST_FIELDS = (
    *("data.name", "data.dir", "data.tfds_name", "data.labels_file", "data.test_split"),
    *("data.resize", "data.upright"),
)


def default_config() -> ConfigDict:
    """All fields at their defaults, locked: an unknown field is an error.

    A config file calls this, sets what it changes, and returns it from ``get_config``.
    """
    config = ConfigDict()
    for name, field in FIELDS.items():
        *groups, leaf = name.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        kind = field.kind
        node[leaf] = field.default if kind is None else config_dict.placeholder(kind)
    return config.lock()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by dotted name."""

    def walk(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config, ""))


def describe_fields() -> str:
    """A page that lists every field with its meaning, default and allowed values."""
    lines = []
    for name, field in FIELDS.items():
        default = "unset" if field.default is None else repr(field.default)
        lines.append(f"config.{name}  (default: {default})")
        lines += textwrap.wrap(field.meaning, 92, initial_indent="    ", subsequent_indent="    ")
        if described := field.describe():
            lines += textwrap.wrap(
                f"allowed: {described}", 92, initial_indent="    ", subsequent_indent="      "
            )
    return "\n".join(lines)
