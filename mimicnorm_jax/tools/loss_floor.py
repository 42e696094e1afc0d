"""Below what the last BN does not let the training loss, by batch size and number of classes.

python -m mimicnorm_jax.tools.loss_floor --classes=10,100,1000 --batches=8,32,128 --plot=floor.png
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from mimicnorm_jax import command_line
from mimicnorm_jax.errors import UserError, refused_by_system, shown
from mimicnorm_jax.layers.loss_floor import expected_loss_floor
from mimicnorm_jax.tools.report import PLOT, check_output

_DRAWS = 1000
_MOST = 1_000_000  # classes, or examples in a batch
for _name in ("plot",):  # shown by --help
    flags.declare_key_flag(_name)

_CLASSES = flags.DEFINE_list("classes", ["2", "10", "100", "1000"], "Numbers of classes.")
_BATCHES = flags.DEFINE_list("batches", [str(2**n) for n in range(1, 11)], "Sizes of a batch.")
_SMOOTHING = flags.DEFINE_float("label_smoothing", 0.0, "Label smoothing, from 0 to below 1.")


def floors(
    classes: Sequence[int], batches: Sequence[int], *, label_smoothing: float = 0.0
) -> np.ndarray:
    """The floors ``(len(batches), len(classes))`` in nats, see ``expected_loss_floor``."""
    return np.array(
        [
            [
                expected_loss_floor(
                    num_classes=count,
                    batch_size=batch,
                    label_smoothing=label_smoothing,
                    draws=_DRAWS,
                )
                for count in classes
            ]
            for batch in batches
        ]
    )


def draw(
    found: np.ndarray, classes: Sequence[int], batches: Sequence[int], path: pathlib.Path
) -> None:
    """Draws the floors over the batch size, one curve for each number of classes."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for count, column in zip(classes, found.T, strict=True):
        axes.plot(batches, column, marker="o", ms=3, label=f"{count} classes")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="examples in a batch", ylabel="least training loss (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _numbers(flag: flags.FlagHolder[list[str]], least: int) -> list[int]:
    """The numbers of a flag, in order."""
    given = ",".join(flag.value)
    try:
        found = sorted({int(text) for text in flag.value})
    except ValueError:
        found = []
    if not found or found[0] < least or found[-1] > _MOST:
        raise UserError(
            f"--{flag.name}={shown(given)[1:-1]} are no numbers from {least} to {_MOST}, such as "
            f"{least},16"
        )
    return found


def _run() -> None:
    check_output("plot", PLOT.value, (".png", ".svg", ".pdf"))
    classes, batches = _numbers(_CLASSES, 2), _numbers(_BATCHES, 1)
    if not 0 <= _SMOOTHING.value < 1:
        raise UserError(f"--label_smoothing={_SMOOTHING.value:g} is not from 0 to below 1")
    found = floors(classes, batches, label_smoothing=_SMOOTHING.value)
    print("| batch | " + " | ".join(f"{count} classes" for count in classes) + " |")
    print("|" + " --- |" * (len(classes) + 1))
    for batch, row in zip(batches, found, strict=True):
        print(f"| {batch} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    if PLOT.value:
        with refused_by_system(f"--plot={PLOT.value} cannot be written"):
            draw(found, classes, batches, pathlib.Path(PLOT.value))
        print(f"picture: {PLOT.value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program({"": _run}, without_config={""}, argv=argv)


if __name__ == "__main__":
    main()
