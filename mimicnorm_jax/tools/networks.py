"""Size and cost of every network, as a table in Markdown.

python -m mimicnorm_jax.tools.networks
python -m mimicnorm_jax.tools.networks --image_size=32 --num_classes=100
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from mimicnorm_jax import command_line
from mimicnorm_jax.layers.scaled import ScaledKernel
from mimicnorm_jax.methods import Method, create_method
from mimicnorm_jax.models import BRANCHED, NETWORKS, create_model

METHODS = ("batchnorm", "mimicnorm", "fixup", "weightstandardization", "nonorm")

_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Height and width of the images.", 32)
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Number of classes.", 1)


class Row(NamedTuple):
    """One network with one method.

    Attributes:
      network: its name.
      method: what normalizes it.
      parameters: number of scalars that are learned.
      flops: of the forward pass of one image, as XLA counts them: a multiplication and
        an addition are 2.
      centred: number of layers with weight mean.
      layers: number of convolutions and dense layers.
    """

    network: str
    method: str
    parameters: int
    flops: float
    centred: int
    layers: int


def measure(network: str, method: str | Method, *, image_size: int, num_classes: int) -> Row:
    """Builds a network abstractly, without memory or time for its values."""
    method = create_method(method) if isinstance(method, str) else method
    model = nnx.eval_shape(
        lambda: create_model(
            network,
            method=method,
            num_classes=num_classes,
            image_size=image_size,
            precision="float32",
            rngs=nnx.Rngs(0),
        )
    )
    model.eval()
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    lowered = jax.jit(lambda s, x: nnx.merge(graph, s)(x)).lower(state, images)
    cost = lowered.cost_analysis() or {}
    kernels = [m for _, m in nnx.iter_modules(model) if "kernel" in vars(m)]
    return Row(
        network,
        method.name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        flops=cost["flops"],
        centred=sum(isinstance(m, ScaledKernel) and m.weight_mean is not None for m in kernels),
        layers=len(kernels),
    )


TITLES = (
    *("network", *(f"{m}, M" for m in METHODS), "forward, GFLOP"),
    *("layers", "fan-in above 50", "not depthwise"),
)


def table_line(network: str, *, image_size: int, num_classes: int) -> str:
    """The network's line of the table.

    Parameters in millions with each method that fits, operations without normalization,
    the number of layers, and how many of them MimicNorm centres by either rule.
    """
    sizes = {"image_size": image_size, "num_classes": num_classes}
    rows = {
        method: measure(network, method, **sizes)
        for method in METHODS
        if method != "fixup" or network in BRANCHED
    }
    counts = [f"{rows[m].parameters / 1e6:.3f}" if m in rows else "" for m in METHODS]
    flops, few = rows["nonorm"].flops, rows["mimicnorm"]
    more = measure(network, create_method("mimicnorm", center="not_depthwise"), **sizes)
    cells = (network, *counts, f"{flops / 1e9:.2f}", few.layers, few.centred, more.centred)
    return "| " + " | ".join(map(str, cells)) + " |"


def _run() -> None:
    print("| " + " | ".join(TITLES) + " |\n|" + " --- |" * len(TITLES))
    sizes = {"image_size": _IMAGE_SIZE.value, "num_classes": _NUM_CLASSES.value}
    for network in NETWORKS:
        print(table_line(network, **sizes), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program({"": _run}, without_config={""}, argv=argv)


if __name__ == "__main__":
    main()
