"""A network as an ONNX file."""

from __future__ import annotations

import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen, nnx

from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.export.metadata import as_text, metadata
from mimicnorm_jax.export.prepared import About, Prepared, compare, prepare_as
from mimicnorm_jax.export.written import SUFFIXES, Exported, check_suffix, written

INPUT = "images"


def export_onnx(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    file: str | os.PathLike[str],
    about: About | None = None,
    normalize: bool = False,
    symbolic: bool = True,
) -> Exported:
    """Writes the folded network as ONNX, opset 17, in float32.

    Its input ``images`` has the channels last, as here; its output is ``logits``. The file is run
    by onnxruntime::

      session = onnxruntime.InferenceSession("model.onnx")
      (logits,) = session.run(None, {"images": images})

    Args:
      model: as for ``fold``.
      *example: real images ``(B, ..., C)``, before them a Linen network's variables. On them the
        file is compared.
      file: where it goes; a file there is replaced.
      about: what else is known of the network; it goes into the file's ``metadata_props``.
      normalize: take uint8 images, which ``example`` then has, and normalize them inside by mean
        and standard deviation of ``about``.
      symbolic: leave the batch, and height and width as multiples of the stride, free where the
        network allows it.

    Returns:
      What was written.

    Raises:
      UserError: the images do not fit; onnx or onnxruntime is missing; the network does something
        that cannot be written; or onnxruntime differs from it by more than 1e-4 of its outputs.
        Then nothing is written.
    """
    from mimicnorm_jax.export.onnx_graph import to_onnx  # many rules, which few imports need

    path = pathlib.Path(file)
    check_suffix(path, SUFFIXES["onnx"])
    onnx, onnxruntime = _library("onnx"), _library("onnxruntime")
    about = about or About()
    prepared = prepare_as(model, *example, about=about, normalize=normalize, symbolic=symbolic)

    def attempt(prepared: Prepared) -> tuple[Any, Any]:
        outputs = list(prepared.output_names)
        graph = to_onnx(
            prepared.function, [prepared.spec], input_names=[INPUT], output_names=outputs
        )
        return graph, _runner(onnxruntime, graph.SerializeToString(), prepared)

    (graph, run), prepared = _freest(attempt, prepared)
    difference = compare(prepared, run, "what onnxruntime makes of it")
    for name, text in as_text(metadata(prepared, about, difference)).items():
        graph.metadata_props.add(key=name, value=text)
    with written(path) as (content,):
        onnx.save(graph, content)
        compare(prepared, _runner(onnxruntime, content.read_bytes(), prepared), str(path))
    return Exported(path, prepared.shape, difference, prepared.fixed)


def _freest(attempt: Callable[[Prepared], Any], prepared: Prepared) -> tuple[Any, Prepared]:
    """What an attempt makes of the freest extents with which it succeeds, and these."""
    first: UserError | None = None
    for candidate in prepared.less_free():
        try:
            return attempt(candidate), candidate
        except UserError as error:  # padding that depends on the extent, or a window as large
            first = first or error
    assert first is not None
    if not any(isinstance(extent, str) for extent in prepared.shape[1:]):
        raise first
    prepared = prepared.of_one_size(str(first))
    return attempt(prepared), prepared


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'ONNX needs {name}: pip install "mimicnorm-jax[export]"') from error


def _runner(onnxruntime: Any, content: bytes, prepared: Prepared) -> Any:
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of its own type
        raise UserError(f"onnxruntime refuses the file: {first_line(error)}") from error

    def run(images: np.ndarray) -> list[np.ndarray]:
        return list(session.run(list(prepared.output_names), {INPUT: images}))

    return run
