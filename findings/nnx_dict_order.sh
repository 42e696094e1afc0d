#!/usr/bin/env bash
# nnx.Dict changes its order when it is copied, split or jitted, so a network that concatenates
# what its entries return computes something else under nnx.jit than it does eagerly.
#
# Versions: flax 0.12.8, jax 0.10.1, Python 3.11 on Linux.
# Source: flax/nnx: graph nodes list their attributes sorted by name (nnx.split, nnx.merge, and with
# them nnx.clone, nnx.jit, nnx.grad); nnx.Dict keeps its entries as attributes, and iterating over
# it gives their order in the instance.
#
# What one expects: as a Python dictionary, an nnx.Dict is read in the order in which it was filled,
# always; nnx.jit of a model computes what the model does.
# What happens: .values() gives the order of filling only until the module has been through split
# and merge. Inside nnx.jit, and in a clone, it gives the alphabetical one; and the model that was
# given to nnx.jit has it too from then on, so that the same eager call gives another result before
# and after. No error is raised: shapes agree.
#
# Output seen:
#   values() as filled: one three five
#   values() of a clone: five one three
#   eager and clone agree: False
#   eager and nnx.jit agree: False
#   eager before and after nnx.jit agree: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.1 flax==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax.numpy as jnp
from flax import nnx

names = ("one", "three", "five")


class Branches(nnx.Module):
    def __init__(self, rngs):
        self.branches = nnx.Dict({name: nnx.Linear(2, 2, rngs=rngs) for name in names})

    def __call__(self, x):
        return jnp.concatenate([branch(x) for branch in self.branches.values()], axis=-1)


def order(model):
    by_id = {id(model.branches[name]): name for name in names}
    return " ".join(by_id[id(branch)] for branch in model.branches.values())


def same(a, b):
    return bool(jnp.allclose(a, b))


x = jnp.ones((1, 2))
model = Branches(nnx.Rngs(0))
jitted = nnx.jit(lambda model, x: model(x))
before = model(x)
seen = [
    f"values() as filled: {order(model)}",
    f"values() of a clone: {order(nnx.clone(model))}",
    f"eager and clone agree: {same(before, nnx.clone(model)(x))}",
    f"eager and nnx.jit agree: {same(before, jitted(model, x))}",
    f"eager before and after nnx.jit agree: {same(before, model(x))}",
]
print("\n".join(seen))
expected = [
    "values() as filled: one three five",
    "values() of a clone: five one three",
    "eager and clone agree: False",
    "eager and nnx.jit agree: False",
    "eager before and after nnx.jit agree: False",
]
sys.exit(seen != expected)
PYTHON
