"""Trains or evaluates (--mode=eval) one configuration, as one process or as one of several.

  python -m mimicnorm_jax.main --config configs/digits_resnet20.py --config.method=batchnorm
  python -m mimicnorm_jax.main --mode=eval --workdir=runs/digits_resnet20-batchnorm-s0

``python -m mimicnorm_jax.config`` prints every field that ``--config.FIELD=VALUE`` can set.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import flags

from mimicnorm_jax import command_line
from mimicnorm_jax.config import validate
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import coordination, startup

_WORKDIR = flags.DEFINE_string("workdir", None, "Default: runs/<config>-<method>-s<seed>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a run.")
_STOPPED_EXIT_CODE = flags.DEFINE_integer(
    "stopped-exit-code",
    0,
    "Exit code of a run that was told to stop: what starts runs again may need another than 0.",
    0,
    255,
)
_RECALIBRATE = flags.DEFINE_bool("recalibrate", False, "Evaluate with exact last-BN statistics.")


def _run() -> None:
    # after parsing, so that --help is quick
    from mimicnorm_jax.train import evaluation, loop, setup, workdir

    if _WORKDIR.value == "":
        raise UserError("--workdir= is empty; leave it out for runs/<config>-<method>-s<seed>")
    if _RECALIBRATE.value and _MODE.value != "eval":
        raise UserError("--recalibrate goes with --mode=eval; training always reports it")
    config = command_line.config()
    validate(config)
    default = workdir.default_workdir(config, command_line.config_path())
    folder = pathlib.Path(_WORKDIR.value or default).expanduser()
    setup.configure_jax(config)
    startup.join()
    if _MODE.value == "train":
        if loop.train(config, folder) is None:
            sys.exit(_STOPPED_EXIT_CODE.value)
        return
    results = evaluation.evaluate_run(config, folder, exact=_RECALIBRATE.value)
    if coordination.is_first():
        print(json.dumps(results, indent=2))


def _run_of(argv: list[str]) -> str | None:
    """The folder of the run to be evaluated, or to go on, where no --config is given."""
    folder = command_line.given(argv, "workdir")
    if not folder or command_line.given(argv, "mode") == "eval":
        return folder
    return folder if (pathlib.Path(folder).expanduser() / "config.json").exists() else None


def main() -> None:
    """Runs the program."""
    command_line.run_program(_run, saved_in=_run_of)


if __name__ == "__main__":
    main()
