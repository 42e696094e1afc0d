"""Second moments of a network's layers on data, one layer after the other."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.convert.graph import Path
from mimicnorm_jax.convert.trace import Arguments
from mimicnorm_jax.parallel import quick_compilation


class _Moment(nnx.BatchStat):
    """A layer's second moment: a statistic, so that what stacks layers treats it as one."""


@functools.cache
def _measuring(kind: type[nnx.Module]) -> type[nnx.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        y = kind.__call__(self, *args, **kwargs)  # type: ignore[operator]
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        scale = getattr(self, "scale", None)
        bias = getattr(self, "bias", None)
        scale = 1.0 if scale is None else scale[...]
        bias = 0.0 if bias is None else bias[...]
        before = wide / scale - bias
        moment = jnp.mean(jnp.square(before))
        self.measured_moment[...] = moment
        if not self.divides:
            return y
        factor = jnp.where(moment > 0, jax.lax.rsqrt(moment), 1.0)
        return (scale * (before * factor + bias)).astype(y.dtype)

    return type(kind.__name__, (kind,), {"__call__": call})


def second_moments(
    network: nnx.Module,
    layers: Mapping[Path, tuple[nnx.Module, tuple[int, ...]]],
    args: Sequence[Any],
    *,
    divided: frozenset[Path] = frozenset(),
) -> dict[Path, jax.Array]:
    """Second moment of each layer's output, without its bias and before its scalar.

    Args:
      network: the network, which is left as it is; it runs in evaluation mode.
      layers: those to measure, with the axes of their stack.
      args: of the network's call.
      divided: layers whose output is divided by the root of its second moment before it goes on:
        what follows is measured as if their kernels were divided already.

    Returns:
      By path a number, or an array of the shape of the stack; NaN where the layer was not called
      on its own (inside transformations that hand no statistics on).
    """
    copy = nnx.clone(network)
    copy.eval()
    where = {id(module): path for path, module in nnx.iter_modules(network)}
    modules = dict(nnx.iter_modules(copy))
    for path, (module, stack) in layers.items():
        measured = modules[where[id(module)]]
        object.__setattr__(measured, "__class__", _measuring(type(measured)))
        measured.measured_moment = _Moment(jnp.full(stack, jnp.nan))
        measured.divides = path in divided
    graphdef, state = nnx.split(copy)
    arrays, join = Arguments(args).split()

    def run(state: Any, arrays: Sequence[Any]) -> Any:
        model = nnx.merge(graphdef, state)
        model(*join(arrays))
        called = dict(nnx.iter_modules(model))
        return {
            path: called[where[id(module)]].measured_moment[...]
            for path, (module, _) in layers.items()
        }

    options = quick_compilation(jax.default_backend())
    return jax.device_get(jax.jit(run, compiler_options=options)(state, arrays))
