"""Trains or evaluates (--mode=eval) one configuration, as one process or as one of several.

  python -m mimicnorm_jax.main --config configs/digits_resnet20.py --config.method=batchnorm
  python -m mimicnorm_jax.main --mode=eval --workdir=runs/digits_resnet20-batchnorm-s0
  python -m mimicnorm_jax.main --mode=eval --workdir=RUN --config.data.dir=OTHER --plot=eval.png

``python -m mimicnorm_jax.config`` prints every field that ``--config.FIELD=VALUE`` can set.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, cast

from absl import flags

from mimicnorm_jax import command_line
from mimicnorm_jax.config import validate
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.guest import guests
from mimicnorm_jax.parallel import coordination, startup
from mimicnorm_jax.paths import define_path, expanded
from mimicnorm_jax.tools.report import JSON, PLOT, check_output, write_json
from mimicnorm_jax.version import __version__

for _name in ("json", "plot"):  # shown by --help
    flags.declare_key_flag(_name)

_WORKDIR = define_path("workdir", None, "Default: runs/<config>-<method>-s<seed>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a run.")
_STOPPED_EXIT_CODE = flags.DEFINE_integer(
    "stopped-exit-code",
    0,
    "Exit code of a run that was told to stop: what starts runs again may need another than 0.",
    0,
    255,
)
_RECALIBRATE = flags.DEFINE_bool("recalibrate", False, "Evaluate with exact last-BN statistics.")
_LABELS = flags.DEFINE_enum(
    "labels",
    "names",
    ["names", "numbers"],
    "Whether the classes of the images evaluated are named as the run's, or by the numbers of its "
    "logits, as ImageNet-V2's folders are.",
)
_RESTRICT_CLASSES = flags.DEFINE_bool(
    "restrict-classes",
    False,
    "Evaluate among the classes of the images, not all of the run's.",
)
_OF_EVALUATION = (_RECALIBRATE, _LABELS, _RESTRICT_CLASSES, JSON, PLOT)


def _run() -> None:
    # after parsing, so that --help is quick
    from mimicnorm_jax.train import evaluated_run, loop, setup, workdir

    if _WORKDIR.value == "":
        raise UserError("--workdir= is empty; leave it out for runs/<config>-<method>-s<seed>")
    for flag in _OF_EVALUATION if _MODE.value != "eval" else ():
        if flag.value != flag.default:
            raise UserError(f"--{flag.name} goes with --mode=eval")
    check_output("json", JSON.value, [".json"])
    check_output("plot", PLOT.value, [".png"])
    config = command_line.config()
    validate(config)
    default = workdir.default_workdir(config, command_line.config_path())
    folder = expanded(_WORKDIR.value or default)
    setup.configure_jax(config)
    # Fields in which processes differ are named with their values once they can talk of them.
    given = folder.name if _WORKDIR.value else None
    startup.join({"mimicnorm-jax": __version__, "--workdir": given, "--mode": _MODE.value})
    if _MODE.value == "train":
        code = _STOPPED_EXIT_CODE.value
        if loop.train(config, folder, leave_with=None if guests() else code) is None:
            sys.exit(code)
        return
    question = evaluated_run.Question(
        exact=_RECALIBRATE.value,
        labels=cast(Any, _LABELS.value),
        restrict_classes=_RESTRICT_CLASSES.value,
    )
    found = evaluated_run.evaluate_run(config, folder, question)
    if not coordination.is_first():
        return
    if not found.is_own:
        print(
            f"NOTE: {found.images}, not as {folder} evaluates its own; eval.json stays as it was",
            file=sys.stderr,
        )
    print(json.dumps(found.results, indent=2))
    both = {name: found.results[name] | found.details[name] for name in found.results}
    write_json(json.dumps(both) + "\n")
    if PLOT.value:
        from mimicnorm_jax.train.drawing import plot_evaluation  # slow to import

        name = "best" if "best" in found.details else "latest"
        title = f"{folder.name}, step {found.results[name]['step']}"
        with refused_by_system(f"--plot={PLOT.value} cannot be written"):
            plot_evaluation(found.details[name], title, pathlib.Path(PLOT.value))
        print(f"picture: {PLOT.value}")


def _run_of(argv: list[str]) -> str | None:
    """The folder of the run to be evaluated, or to go on, where no --config is given."""
    folder = command_line.given(argv, "workdir")
    if not folder or command_line.given(argv, "mode") == "eval":
        return folder
    return folder if (expanded(folder) / "config.json").exists() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      argv: its arguments, such as ``["--config", "digits_resnet20"]``, where another program or
        a notebook calls it, as often as it likes; None: those of the command line.

    Returns:
      The exit code, if there are arguments; without them the process ends.
    """
    return command_line.run_program(_run, saved_in=_run_of, argv=argv)


if __name__ == "__main__":
    main()
