#!/usr/bin/env bash
# A plain array that an nnx.Module holds, such as the mask of nnx.Conv, is part of its state where
# the module is made eagerly, but not where it is made inside a jitted function: there it stays in
# the graph definition, as a tracer that outlives its trace.
#
# Versions: flax 0.12.8, jax 0.10.1, Python 3.11 on Linux.
# Source: flax/nnx/pytreelib.py: "Data types are: jax.Array, np.ndarray, Variables, ..." are
# recognized as data when they are assigned to an attribute.
#
# What one expects: a model that is made inside jax.jit (the documented way to create it sharded,
# or without copies in between) and returned by nnx.split has the state that it has when it is made
# eagerly, and can be called after nnx.merge; nnx.jit of its constructor returns a usable model.
# What happens: the mask is missing in the state; after nnx.merge it is a tracer, and the first call
# raises UnexpectedTracerError. nnx.jit of the constructor does the same. nnx.eval_shape raises
# nothing either. An nnx.Variable around the array is what it takes.
#
# Output seen:
#   state, made eagerly: bias kernel mask
#   state, made in jax.jit: bias kernel
#   called after nnx.merge: UnexpectedTracerError
#   called after nnx.jit: UnexpectedTracerError
#   as an nnx.Variable: bias kernel mask
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.1 flax==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from flax import nnx


def make():
    mask = jnp.tril(jnp.ones((4, 4)))[None, None]
    return nnx.Conv(4, 4, (1, 1), mask=mask, rngs=nnx.Rngs(0))


def make_with_variable():
    mask = nnx.Variable(jnp.tril(jnp.ones((4, 4)))[None, None])
    return nnx.Conv(4, 4, (1, 1), mask=mask, rngs=nnx.Rngs(0))


def names(state):
    return " ".join(sorted(str(path[0]) for path in nnx.to_flat_state(state).paths))


def called(make):
    try:
        return str(make()(jnp.ones((1, 2, 2, 4))).shape)
    except Exception as error:
        return type(error).__name__


seen = [
    f"state, made eagerly: {names(nnx.state(make()))}",
    f"state, made in jax.jit: {names(jax.jit(lambda: nnx.split(make()))()[1])}",
    f"called after nnx.merge: {called(lambda: nnx.merge(*jax.jit(lambda: nnx.split(make()))()))}",
    f"called after nnx.jit: {called(nnx.jit(make))}",
    f"as an nnx.Variable: {names(jax.jit(lambda: nnx.split(make_with_variable()))()[1])}",
]
print("\n".join(seen))
expected = [
    "state, made eagerly: bias kernel mask",
    "state, made in jax.jit: bias kernel",
    "called after nnx.merge: UnexpectedTracerError",
    "called after nnx.jit: UnexpectedTracerError",
    "as an nnx.Variable: bias kernel mask",
]
sys.exit(seen != expected)
PYTHON
