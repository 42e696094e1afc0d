"""Trains or evaluates (--mode=eval) one configuration.

  python -m mimicnorm_jax.main --config configs/digits_resnet20.py --config.method=batchnorm

``python -m mimicnorm_jax.config`` prints every field that ``--config.FIELD=VALUE`` can set.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mimicnorm_jax.config import FIELDS, validate
from mimicnorm_jax.errors import NonFiniteError, UserError, unknown

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration, a Python file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Default: runs/<config>-<method>-s<seed>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a run.")
_RECALIBRATE = flags.DEFINE_bool("recalibrate", False, "Evaluate with exact last-BN statistics.")


def _parse(argv: list[str]) -> list[str]:
    """Parses the command line; what is wrong with it is a ``UserError``, never a traceback."""
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in FIELDS:
            raise unknown("field", f"--{name}", [f"--config.{field}" for field in FIELDS])
    path = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)
    if "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
    if path is not None and not pathlib.Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error
    except Exception as error:  # a config file is a program: it can fail in any way
        reason = (str(error).splitlines() or [""])[0].partition(" Other fields present")[0]
        raise UserError(f"--config={path} failed: {type(error).__name__}: {reason}") from error
    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config configs/digits_resnet20.py")
    if _WORKDIR.value == "":
        raise UserError("--workdir= is empty; leave it out for runs/<config>-<method>-s<seed>")
    if _RECALIBRATE.value and _MODE.value != "eval":
        raise UserError("--recalibrate goes with --mode=eval; training always reports it")
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def _run(_: list[str]) -> None:
    from mimicnorm_jax.train import loop, workdir  # after parsing, so that --help is quick

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    config = _CONFIG.value
    validate(config)
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    folder = pathlib.Path(_WORKDIR.value or workdir.default_workdir(config, path))
    if _MODE.value == "eval":
        print(json.dumps(loop.evaluate_run(config, folder, exact=_RECALIBRATE.value), indent=2))
    else:
        loop.train(config, folder)


def main() -> None:
    """Runs the program; one line, and exit code 2 for a wrong input, 1 for divergence."""
    try:
        app.run(_run, flags_parser=_parse)
    except (UserError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
