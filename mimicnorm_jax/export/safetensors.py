"""A network as a folder like those of Hugging Face: its weights, a configuration, a model card."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.export.metadata import metadata
from mimicnorm_jax.export.model_card import model_card
from mimicnorm_jax.export.prepared import About, as_function, compare, is_weight, prepare_as
from mimicnorm_jax.export.written import Exported
from mimicnorm_jax.weights.files import check_shapes, listed, read_safetensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_CARD = "README.md"


def export_safetensors(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    folder: str | os.PathLike[str],
    about: About | None = None,
) -> Exported:
    """Writes the folded network's weights, with what must be known to use them.

    ``model.safetensors`` has the arrays by their paths, such as ``blocks.0.branch.0.conv.kernel``
    of shape ``(H, W, I, O)``; ``config.json`` the metadata, with ``id2label``; ``README.md`` is a
    model card to be filled in. ``mimicnorm_jax.load`` reads the folder of a network of this
    package; into one of your own, ``load_safetensors`` does.

    Args:
      model: as for ``fold``.
      *example: real images ``(B, ..., C)``, normalized; before them a Linen network's variables.
      folder: where it goes; an earlier export there is replaced.
      about: what else is known of the network.

    Returns:
      What was written.

    Raises:
      UserError: the images do not fit; safetensors is missing; ``folder`` has other files; or what
        was read back differs. Then nothing is written.
    """
    path, place = pathlib.Path(folder), pathlib.Path(folder).resolve()
    _check_folder(path)
    about = about or About()
    prepared = prepare_as(model, *example, about=about, normalize=False, symbolic=True)
    with refused_by_system(f"{path} cannot be written"):
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=place.parent))
        try:
            arrays = {name: value[...] for name, value in _arrays(prepared.network).items()}
            (temporary / WEIGHTS).write_bytes(as_safetensors(arrays))
            load_safetensors(prepared.network, temporary)
            difference = compare(prepared, _runner(*as_function(prepared.network)), str(path))
            values = _config(metadata(prepared, about, difference) | {"build": about.build})
            (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
            (temporary / _CARD).write_text(model_card(place.name, values))
            place.mkdir(exist_ok=True)
            # Without a configuration it is no export: what is interrupted cannot be mixed.
            (place / CONFIG).unlink(missing_ok=True)
            for name in (WEIGHTS, _CARD, CONFIG):
                os.replace(temporary / name, place / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Exported(path, prepared.shape, difference, prepared.fixed)


def as_safetensors(arrays: Mapping[str, Any]) -> bytes:
    """Arrays by their names as the content of a file.

    Raises:
      UserError: safetensors is missing.
    """
    try:
        numpy = importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise UserError('this needs safetensors: pip install "mimicnorm-jax[export]"') from error
    # It writes the memory of a view: a transposed one would come back scrambled. And not its
    # save_file, which lets only its owner read the file.
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content: bytes = numpy.save(whole, metadata={"format": "flax"})
    return content


def load_safetensors(network: nnx.Module, folder: str | os.PathLike[str]) -> None:
    """Loads an export's weights into a network of the same structure, in place.

    Example::

      plain, _ = mimicnorm_jax.fold(Network(rngs=nnx.Rngs(0)), images)
      load_safetensors(plain, "exported")

    Args:
      network: folded, as the exported one was.
      folder: of the export.

    Raises:
      UserError: it cannot be read, or its arrays are not those of the network, which is left as
        it was.
    """
    path = pathlib.Path(folder) / WEIGHTS
    tensors, arrays = read_safetensors(path), _arrays(network)
    check_shapes(tensors, {name: value[...].shape for name, value in arrays.items()}, str(path))
    for name, variable in arrays.items():
        variable[...] = jnp.asarray(tensors[name], variable[...].dtype)


def _arrays(network: nnx.Module) -> dict[str, Any]:
    """The weights of a network by their paths: not the keys and counters of random numbers."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(network)
        if is_weight(path, node)
    }


def _runner(function: Any, weights: Any) -> Any:
    compiled = jax.jit(function)
    return lambda images: [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(weights, images))]


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, with the fields that programs of Hugging Face look for."""
    classes = values["classes"]
    return {
        "architectures": [values["run"].get("network", "unknown")],
        "model_type": "mimicnorm-jax",
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        **values,
    }


def _check_folder(path: pathlib.Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path} cannot be written: {parent} is not a folder")
    if path.is_file():
        raise UserError(f"{path} cannot be written: that is a file, and this format is a folder")
    if path.is_dir():
        others = {entry.name for entry in path.iterdir()} - {WEIGHTS, CONFIG, _CARD}
        if others:
            raise UserError(
                f"{path} cannot be written: it has other files ({listed(sorted(others))}); "
                "allowed: a new name, or that of an earlier export"
            )
