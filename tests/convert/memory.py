"""Memory of a training step for a TPU v5e: ``python -m tests.convert.memory --out FILE``.

It needs libtpu (``pip install -e .[tpu]``), and no TPU. Each network with its BatchNorms and
converted, batch 256, float32 (a TPU multiplies in bfloat16).
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.convert.layers import Shift
from mimicnorm_jax.convert.memory import peak_bytes
from mimicnorm_jax.convert.substitute import substitute
from mimicnorm_jax.tools.memory.targets import mesh_of
from tests.convert.training import AUXILIARY, NETWORKS, converted, create

BATCH = 256
# "not lean" with nnx.relu and nnx.max_pool; "biases" is the network with a bias in the place
# of each BatchNorm: what activations and products keep anyway
VARIANTS = "batchnorm", "converted", "not lean", "biases"


def peak_mib(model, mesh):
    """Peak of one step of SGD with momentum, parameters and batch included."""
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    transform = optax.sgd(0.1, momentum=0.9)

    def step(params, rest, state, images, labels):
        def loss(params):
            network = nnx.merge(graph, params, rest, copy=True)
            losses = [
                optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                for logits in jax.tree.leaves(network(images))
            ]
            total = losses[0] + AUXILIARY * sum(losses[1:])
            return total, nnx.split(network, nnx.Param, ...)[2]

        (_, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), rest, state

    sharding = NamedSharding(mesh, P())

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(transform.init, params)
    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    arguments = jax.tree.map(abstract, (params, rest, state, images, labels))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    return peak_bytes(compiled, "tpu") / 2**20


def variant_of(name, variant):
    model = create(name, 3, 0)
    if variant == "batchnorm":
        return model
    if variant == "biases":
        norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
        biases = {id(m): Shift(jnp.zeros(m.mean[...].shape), axis=m.axis) for m in norms}
        substitute(model, biases)
        return model
    shape = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    return converted(model, shape, variance="formula", lean=variant == "converted")[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS[:3])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    args = parser.parse_args()
    mesh = mesh_of("tpu:v5e:2x2", 1)
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.networks:
        row = rows.setdefault(name, {})
        for variant in args.variants:
            if variant not in row:
                row[variant] = round(peak_mib(variant_of(name, variant), mesh), 1)
                args.out.write_text(json.dumps(rows, indent=1))
        row["ratio"] = round(row["converted"] / row["batchnorm"], 3)
        args.out.write_text(json.dumps(rows, indent=1))
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
