r"""Writes the network of a run as ONNX, StableHLO or safetensors.

  python -m mimicnorm_jax.tools.export RUN --format=onnx --out=network.onnx
  python -m mimicnorm_jax.tools.export RUN --format=onnx --out=network.onnx --normalize photo.jpg

RUN is the folder of a run; --which chooses its checkpoint. What normalized the network in training
is folded into its weights. The file is run, and compared with the network, on the images that are
given, or else on two photographs that come with scikit-learn; it is kept only if they agree, and
replaces a file of its name.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from sklearn.datasets import load_sample_images

from mimicnorm_jax import command_line
from mimicnorm_jax.data.augment import normalize
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export import (
    About,
    Exported,
    export_onnx,
    export_safetensors,
    export_stablehlo,
)
from mimicnorm_jax.export.rebuilt import fields_to_build, is_export
from mimicnorm_jax.export.stablehlo import WEIGHTS
from mimicnorm_jax.export.written import SUFFIXES
from mimicnorm_jax.parallel import make_mesh
from mimicnorm_jax.paths import define_path, expanded
from mimicnorm_jax.tools.predict import images_in
from mimicnorm_jax.tools.report import WHICH
from mimicnorm_jax.train.json_files import read_json
from mimicnorm_jax.train.setup import configure_jax, silence_false_alarms
from mimicnorm_jax.train.workdir import saved_config
from mimicnorm_jax.trained import TrainedNetwork, load

FORMATS = ("onnx", "stablehlo", "safetensors")

_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "What is written; unset: by the end of --out.")
_OUT = define_path("out", None, "The file; of safetensors the folder.")
flags.declare_key_flag("which")
_NORMALIZE = flags.DEFINE_bool(
    "normalize", False, "onnx, stablehlo: take uint8 images, and normalize them inside."
)
_STATIC = flags.DEFINE_bool(
    "static", False, "onnx, stablehlo: one image of the size of the run's, for what needs that."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    "inside",
    WEIGHTS,
    "stablehlo: inside the program, or beside it in a file of safetensors.",
)
_MOST = 16  # images to compare on


def about_run(network: TrainedNetwork, folder: pathlib.Path) -> About:
    """What a file says of the network of a run.

    Args:
      network: of the run.
      folder: of the run, or of an export of it.
    """
    config, view = network.config, network.description.view
    run: dict[str, Any] = {
        "network": config.network,
        "method": config.method,
        "step": network.step,
        "test_accuracy": _test_accuracy(folder, network.step),
    }
    return About(
        classes=network.classes,
        temperature=network.temperature,
        mean=network.mean,
        std=network.std,
        resize=view.resize,
        run=run,
        build=fields_to_build(config, network.description),
    )


def _test_accuracy(folder: pathlib.Path, step: int) -> float | None:
    """That which the run measured at a step, where it came to its end."""
    if not (folder / "summary.json").exists():
        return None
    summary = read_json(folder / "summary.json")
    found = {
        summary.get("best_step"): summary.get("best_test_accuracy"),
        summary.get("steps"): summary.get("final_test_accuracy"),
    }
    return found.get(step)


def photographs(network: TrainedNetwork) -> np.ndarray:
    """Real images that are always at hand, as the network takes them: uint8 ``(4, H, W, C)``."""
    halves = [half for image in load_sample_images().images for half in np.split(image, 2, axis=1)]
    return np.stack([network.preprocess(half) for half in halves])


def export_run(
    run: pathlib.Path,
    kind: str,
    out: pathlib.Path,
    *,
    which: Any = "best",
    inside: bool = False,
    symbolic: bool = True,
    weights: str = "inside",
    images: Sequence[pathlib.Path] = (),
) -> Exported:
    """Exports the network of a run.

    Args:
      run: its folder.
      kind: one of ``FORMATS``.
      out: the file or folder to write.
      which: the checkpoint.
      inside: normalize images inside the file, which then takes uint8.
      symbolic: leave the batch, height and width free where the network allows it.
      weights: of stablehlo, as ``export_stablehlo`` takes them.
      images: to compare on, in the place of ``photographs``.

    Raises:
      UserError: as ``load`` and the exports raise.
    """
    network = load(run, which)
    if not is_export(run):
        print(f"{run}: step {network.step}, the {which}; folding it, and comparing", flush=True)
    pixels = photographs(network)
    if images:
        pixels = np.stack([network.preprocess(path) for path in images[:_MOST]])
    if not symbolic:
        pixels = pixels[:1]
    options: dict[str, Any] = {"about": about_run(network, run)}
    given = pixels
    if not inside:
        given = np.asarray(
            normalize(
                jnp.asarray(pixels), mean=network.mean, std=network.std, dtype=jnp.dtype("float32")
            )
        )
    if kind == "safetensors":
        return export_safetensors(network.model, given, folder=out, **options)
    options |= {"normalize": inside, "symbolic": symbolic}
    if kind == "onnx":
        return export_onnx(network.model, given, file=out, **options)
    return export_stablehlo(network.model, given, file=out, weights=weights, **options)


def _run(run: str = "", *images: str) -> None:
    if not run:
        raise UserError("say which run: RUN --format=onnx --out=network.onnx")
    out = _OUT.value
    if not out:
        raise UserError("--out is missing: RUN --format=onnx --out=network.onnx")
    suffix = pathlib.Path(out).suffix
    kind = _FORMAT.value or next((k for k, known in SUFFIXES.items() if known == suffix), None)
    if not kind:
        raise UserError("--format is missing: RUN --format=onnx --out=network.onnx")
    if kind == "safetensors" and (_NORMALIZE.value or _STATIC.value):
        raise UserError("--normalize and --static go with onnx and stablehlo")
    if kind != "stablehlo" and _WEIGHTS.value != "inside":
        raise UserError("--weights=beside goes with stablehlo")
    folder = expanded(run)
    if not is_export(folder):
        configure_jax(saved_config(folder))
    silence_false_alarms(make_mesh(1))
    exported = export_run(
        folder,
        kind,
        expanded(out),
        which=WHICH.value,
        inside=_NORMALIZE.value,
        symbolic=not _STATIC.value,
        weights=_WEIGHTS.value,
        images=images_in(images),
    )
    print(exported)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program(
        {"": _run}, without_config={""}, takes_arguments=True, argv=argv
    )


if __name__ == "__main__":
    main()
