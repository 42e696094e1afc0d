"""The folder of a run: whose it is, and its summary."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax._src import xla_bridge
from ml_collections import ConfigDict

from mimicnorm_jax.config import FIELDS, FREE_FIELDS, TEST_FIELDS, default_config, validate
from mimicnorm_jax.data.sources import Source
from mimicnorm_jax.errors import UserError, first_line, refused_by_system, shown, unknown
from mimicnorm_jax.train.json_files import (
    NUMBER_OR_NULL,
    Kinds,
    check_kinds,
    read_json,
    write_json,
)
from mimicnorm_jax.train.lock import LOCK_NAME, check_unused
from mimicnorm_jax.train.provenance import config_as_json

Summary = dict[str, Any]
DataIdentity = dict[str, dict[str, Any]]


def default_workdir(config: ConfigDict, config_path: str) -> pathlib.Path:
    """``runs/<config>-<method>-s<seed>``."""
    name = pathlib.Path(config_path).stem
    return pathlib.Path("runs") / f"{name}-{config.method}-s{config.seed}"


def check_workdir(
    workdir: pathlib.Path,
    config: ConfigDict,
    *,
    writes: bool = True,
    free: Collection[str] = FREE_FIELDS,
) -> None:
    """Makes sure that a run of ``config`` may use ``workdir``; writes nothing.

    Args:
      workdir: the folder.
      config: the configuration.
      writes: False to evaluate only, which is possible while the run goes on.
      free: fields in which the run may differ from ``config``.

    Raises:
      UserError: it holds the run of another configuration, or files that are no run, or
        is no folder, or cannot be written to, or is being written to by another run.
    """
    with refused_by_system(f"--workdir={workdir} cannot be used"):
        _check_folder(workdir)
        if writes:
            check_unused(workdir)
        if not (workdir / "config.json").exists():
            return
    if differing := other_fields(workdir, config, free):
        advice = "choose another --workdir or delete it"
        if not writes:
            advice = "an evaluation takes the run's own fields, but for those of its images: "
            advice += ", ".join(TEST_FIELDS)
        raise UserError(
            f"--workdir={workdir} holds the run of another configuration: {differing}; {advice}"
        )


def other_fields(
    workdir: pathlib.Path, config: ConfigDict, free: Collection[str] = FREE_FIELDS
) -> str:
    """In words, the first few fields in which the run in ``workdir`` is not one of ``config``."""
    # a run of an earlier version has the defaults of the fields that came later
    before = config_as_json(default_config()) | read_json(workdir / "config.json")
    now = config_as_json(config)
    differing = [
        f"config.{name} ({shown(before.get(name))} there, {shown(now.get(name))} now)"
        for name in sorted(before.keys() | now.keys())
        if name not in free and before.get(name) != now.get(name)
    ]
    return ", ".join(differing[:3])


def saved_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration of the run in ``workdir``.

    But for the folder of compiled programs that it names: these are machine code, which nobody who
    opens the run of someone else asked to run. And but for the number of threads where JAX has its
    own already.

    Raises:
      UserError: there is none, or none that this version understands.
    """
    path = workdir / "config.json"
    if not workdir.exists():
        raise UserError(f"{workdir} does not exist")
    if not path.is_file():
        raise UserError(_is_no_run(workdir))
    config = with_fields(default_config(), read_json(path), path)
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if config.compilation_cache:
        config.compilation_cache = default_config().compilation_cache
    if xla_bridge.backends_are_initialized():
        config.cpu_threads = None
    return config


def _is_no_run(path: pathlib.Path) -> str:
    if path.is_file():
        of_run = (path.parent / "config.json").is_file()
        instead = f"; give its folder, {path.parent}" if of_run else ""
        return f"{path} is a file, not the folder of a run{instead}"
    with refused_by_system(f"{path} cannot be read"):
        runs = sorted(config.parent.name for config in path.glob("*/config.json"))
    instead = f"; there are runs in it: {', '.join(runs[:5])}" if runs else ""
    return f"{path} is not the folder of a run: it has no config.json{instead}"


def with_fields(config: ConfigDict, fields: Mapping[str, Any], path: pathlib.Path) -> ConfigDict:
    """Sets fields of a configuration that a file has.

    Args:
      config: is changed.
      fields: by dotted name; None stands for the default.
      path: of the file, for the messages.

    Returns:
      ``config``.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            raise unknown("field", f"{path}: {name}", FIELDS)
        if value is not None:
            value = tuple(value) if isinstance(value, list) else value
            try:
                config.update_from_flattened_dict({name: value})
            except (TypeError, ValueError) as error:
                reason = shown(first_line(error))[1:-1]
                raise UserError(f"{path}: {name} = {shown(value)}: {reason}") from error
    return config


def _check_folder(workdir: pathlib.Path) -> None:
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir={workdir} is not UTF-8, which TensorStore needs to write checkpoints"
        ) from error
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; allowed: a folder, or a new name")
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written to: no permission for {existing}")
    # what a run leaves that is killed in its very first moment
    early = {"config.tmp", LOCK_NAME}
    names = {path.name for path in workdir.iterdir()} - early if workdir.exists() else ()
    if names and "config.json" not in names:
        raise UserError(f"--workdir={workdir} is not empty and holds no run; allowed: a new name")


_OF_SUMMARY: dict[str, type | Kinds] = {
    "config": dict,
    "config_sha256": str,
    "state_sha256": str,
    "steps": int,
    "final_test_accuracy": NUMBER_OR_NULL,
}


def data_identity(splits: Mapping[str, Source | None]) -> DataIdentity:
    """What a run remembers of its data: counts and digests, not where they are stored."""
    return {
        name: {
            "examples": len(split),
            "classes": len(split.class_names),
            "sha256": split.identity,
        }
        for name, split in splits.items()
        if split is not None
    }


def same_images(
    there: Mapping[str, Any],
    now: Mapping[str, Any],
    counted: Sequence[str] = ("examples", "classes"),
) -> bool:
    """Whether two identities are of the same images, as far as can be told.

    Args:
      there: as a run remembers them.
      now: as they are.
      counted: what is compared besides the digest; and alone where the run is of a version of this
        project that made another digest.
    """
    same = bool(there) and all(there[name] == now[name] for name in counted)
    return same and (there["sha256"] == now["sha256"] or _is_older(there, now))


def _is_older(there: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether digests were made in other ways, which a version before the colon tells."""
    versions = {known["sha256"].rpartition(":")[0] for known in (there, now)}
    return len(versions) > 1


def read_identity(path: pathlib.Path) -> DataIdentity:
    """Reads what a run remembers of its data; raises ``UserError`` where that is damaged."""
    kinds: dict[str, type] = {"examples": int, "classes": int, "sha256": str}
    value = read_json(path)
    for split in value:
        check_kinds(check_kinds(value, {split: dict}, str(path))[split], kinds, f"{path}: {split}")
    return value


def check_data(workdir: pathlib.Path, data: DataIdentity) -> None:
    """Raises ``UserError`` if the run in ``workdir`` was started with other images."""
    path = workdir / "data.json"
    before = read_identity(path) if path.exists() else data
    for split, now in data.items():
        there = before.get(split, {})
        if there and _is_older(there, now):
            print(
                f"NOTE: {workdir} knows its {split} images by their names and sizes only, as "
                "earlier versions did: go on with the same ones",
                file=sys.stderr,
            )
        if not same_images(there, now):
            raise UserError(
                f"--workdir={workdir} holds a run on other {split} images ("
                f"{there.get('examples')} of {there.get('classes')} classes there, "
                f"{now['examples']} of {now['classes']} now); choose another --workdir"
            )


def open_workdir(workdir: pathlib.Path, config: ConfigDict, data: DataIdentity) -> None:
    """Writes the folder's ``config.json`` and ``data.json``.

    Raises:
      UserError: the system refuses.
    """
    with refused_by_system(f"--workdir={workdir} cannot be written to"):
        write_json(workdir / "config.json", config_as_json(config))
        write_json(workdir / "data.json", data)


def finished_summary(workdir: pathlib.Path) -> Summary | None:
    """The summary of a run that came to its end, else None."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path, {"finished": bool})
    if not summary["finished"]:
        return None
    check_kinds(summary, _OF_SUMMARY, str(path))
    if summary["final_test_accuracy"] is None:
        check_kinds(summary, {"final_holdout_accuracy": float}, str(path))
    return summary
