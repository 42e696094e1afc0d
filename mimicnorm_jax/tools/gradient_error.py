"""How far gradients are from exact where activations are kept in few bits, layer by layer.

python -m mimicnorm_jax.tools.gradient_error --config configs/digits_resnet20.py --checkpoint=RUN
"""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from mimicnorm_jax import command_line
from mimicnorm_jax.config import method_of, validate
from mimicnorm_jax.data.augment import example_keys
from mimicnorm_jax.layers import cross_entropy
from mimicnorm_jax.layers.storage import STORAGES
from mimicnorm_jax.models import create_model
from mimicnorm_jax.tools.inspected import restore, training_images
from mimicnorm_jax.tools.report import CHECKPOINT, IMAGES, JSON, check_output, write_json
from mimicnorm_jax.train.optim import parameter_name
from mimicnorm_jax.train.program import network_arguments
from mimicnorm_jax.train.setup import configure_jax
from mimicnorm_jax.train.state import split_network

for _name in ("checkpoint", "images", "json"):  # shown by --help
    flags.declare_key_flag(_name)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two arrays; 1 where both are 0, and 0 where one is."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms:
        return float(a @ b) / norms
    return float(not np.any(a) and not np.any(b))


def gradient_errors(
    config: ConfigDict, *, images: int, checkpoint: pathlib.Path | None = None
) -> dict[str, dict[str, float]]:
    """Cosines of the kernels' gradients with the exact ones, by storage and layer.

    Args:
      config: the configuration; its ``activation_storage`` does not matter.
      images: how many training images, without augmentation.
      checkpoint: the folder of a run of ``config``; None for its initial state.

    Raises:
      UserError: whatever is wrong with the configuration, the data or the run.
    """
    validate(config)
    configure_jax(config)
    known, inputs, labels = training_images(config, images)
    keys = example_keys(config.seed, jnp.zeros((), jnp.int32), jnp.arange(images))
    state = None if checkpoint is None else restore(config, checkpoint)
    gradients = {}
    for storage in STORAGES:
        changed = copy.deepcopy(config)
        changed.activation_storage = storage
        method = method_of(changed)

        def create(method: Any = method) -> nnx.Module:
            return create_model(
                method=method, rngs=nnx.Rngs(config.seed), **network_arguments(config, known)
            )

        network, initial_values = split_network(create)
        params, stats = jax.jit(initial_values)()
        if state is not None:
            params, stats = state.params, state.batch_stats

        def loss(params: Any, stats: Any, network: Any = network) -> jax.Array:
            logits, _ = network.apply_train(params, stats, inputs, keys)
            return cross_entropy(logits, labels).mean()

        gradients[storage] = jax.jit(jax.grad(loss))(params, stats)
    exact = jax.tree_util.tree_leaves_with_path(gradients["full"])
    kernels = [parameter_name(path).endswith("kernel") for path, _ in exact]
    return {
        storage: {
            parameter_name(path): cosine(leaf, of_full)
            for (path, of_full), leaf, kernel in zip(
                exact, jax.tree.leaves(gradients[storage]), kernels, strict=True
            )
            if kernel
        }
        for storage in STORAGES[1:]
    }


def _run() -> None:
    check_output("json", JSON.value, (".json",))
    checkpoint = None if CHECKPOINT.value is None else pathlib.Path(CHECKPOINT.value)
    config, images = command_line.config(), IMAGES.value or 256
    print("compiling the gradient three times …", flush=True)
    errors = gradient_errors(config, images=images, checkpoint=checkpoint)
    names = list(next(iter(errors.values())))
    width = max(map(len, names)) + 2
    print(f"{'cosine to the exact gradient':<{width}}" + "".join(f"{s:>10}" for s in errors))
    for name in names:
        cells = "".join(f"{errors[storage][name]:>10.5f}" for storage in errors)
        print(f"{name:<{width}}{cells}")
    least = "".join(f"{np.min(list(of_one.values())):>10.5f}" for of_one in errors.values())
    print(f"{'least':<{width}}{least}")
    report = {"config": command_line.config_path(), "images": images, "cosines": errors}
    write_json(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program(_run, argv=argv)


if __name__ == "__main__":
    main()
