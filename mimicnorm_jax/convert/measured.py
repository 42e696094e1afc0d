"""Second moments of a network's layers on data, one layer after the other."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.convert.graph import Path
from mimicnorm_jax.convert.trace import NORMS, Arguments, is_of
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel import quick_compilation


class _Statistic(nnx.BatchStat):
    """What is kept in a layer; called a statistic, so that what stacks layers stacks it too."""


# Of what independent inputs would make of a kernel, by which it counts as nothing: rounding, where
# a centred kernel sees equal channels, as of a grey image.
_NOTHING = 1e-6


@functools.cache
def _measuring(kind: Any) -> type[nnx.Module]:
    def call(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        y = kind.__call__(self, x, *args, **kwargs)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        scale = getattr(self, "scale", None)
        bias = getattr(self, "bias", None)
        scale = 1.0 if scale is None else scale[...]
        bias = 0.0 if bias is None else bias[...]
        before = wide / scale - bias
        moment = jnp.mean(jnp.square(before))
        kernel = self.kernel[...].astype(wide.dtype)
        weights = jnp.sum(jnp.square(kernel)) / kernel.shape[-1]
        usual = weights * jnp.mean(jnp.square(x.astype(wide.dtype)))
        measured = jnp.where(moment > _NOTHING * usual, jax.lax.rsqrt(moment), 0.0)
        # Called several times, the first decides, and the farthest from 1 is told.
        first = jnp.isnan(self.factor[...])
        self.factor[...] = jnp.where(first, measured, self.factor[...])
        farther = jnp.abs(jnp.log(moment)) > jnp.abs(jnp.log(self.moment[...]))
        self.moment[...] = jnp.where(first | farther, moment, self.moment[...])
        divides = self.divides[...] & (self.factor[...] > 0)
        factor = jnp.where(divides, self.factor[...], 1.0)
        return (scale * (before * factor + bias)).astype(y.dtype)

    return type(kind.__name__, (kind,), {"__call__": call})


class _Training(nnx.BatchNorm):
    """A BatchNorm that trains, whatever its call says, or Linen."""

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        return super().__call__(x, use_running_average=False, mask=mask)


class Measurement(NamedTuple):
    """What was measured of a layer: numbers, or arrays of the shape of its stack.

    Attributes:
      moment: the second moment of its output; NaN where it was called where no statistics come
        from, as inside other transformations than those of Flax.
      factor: what its kernel is to be multiplied by; 0 where it puts out nothing, NaN as above.
    """

    moment: jax.Array
    factor: jax.Array


class Meter:
    """Measures the second moment of each layer's output, without its bias and before its scalar.

    Args:
      network: runs in evaluation mode; it is left as it is.
      layers: those to measure, with the axes of their stack, by a name.
      given: the arguments of the network's call.
    """

    def __init__(
        self,
        network: nnx.Module,
        layers: Mapping[Path, tuple[nnx.Module, tuple[int, ...]]],
        given: Arguments,
    ):
        self._network = network
        self._layers = layers
        self._arrays = given.arrays
        where = {id(module): path for path, module in nnx.iter_modules(network)}
        self._where = {name: where[id(module)] for name, (module, _) in layers.items()}
        graphdef, _ = self._split(frozenset())

        def run(state: Any, arrays: Sequence[Any]) -> Any:
            model = nnx.merge(graphdef, state)
            given.call(model, arrays)
            called: dict[Path, Any] = dict(nnx.iter_modules(model))
            return {
                name: Measurement(called[path].moment[...], called[path].factor[...])
                for name, path in self._where.items()
            }

        options = quick_compilation(jax.default_backend())
        self._run = jax.jit(run, compiler_options=options)

    def _split(self, divided: frozenset[Path]) -> tuple[Any, Any]:
        with jax.debug_nans(False):  # what is not measured yet is none
            return self._prepared(divided)

    def _prepared(self, divided: frozenset[Path]) -> tuple[Any, Any]:
        copy = nnx.clone(self._network)
        copy.eval()
        for _, module in nnx.iter_modules(copy):
            norm: Any = module
            if is_of(norm, NORMS):  # it stays: what follows is trained behind it
                norm.use_running_average, norm.axis_name = False, None
            if type(norm) is nnx.BatchNorm:
                object.__setattr__(norm, "__class__", _Training)
        modules: dict[Path, Any] = dict(nnx.iter_modules(copy))
        for name, (_, stack) in self._layers.items():
            measured = modules[self._where[name]]
            kind: Any = type(measured)
            object.__setattr__(measured, "__class__", _measuring(kind))
            measured.moment = _Statistic(jnp.full(stack, jnp.nan), optional=True)
            measured.factor = _Statistic(jnp.full(stack, jnp.nan), optional=True)
            measured.divides = _Statistic(jnp.full(stack, name in divided), optional=True)
        return nnx.split(copy)

    def measure(self, *, divided: frozenset[Path] = frozenset()) -> dict[Path, Measurement]:
        """Runs the network as it is now.

        Args:
          divided: layers whose output is divided by the root of its second moment before it goes
            on: what follows is measured as if their kernels were divided already.

        Raises:
          UserError: the network cannot be run with what is measured, as where ``linen.scan``
            broadcasts its statistics.
        """
        try:
            with jax.debug_nans(False):
                return jax.device_get(self._run(self._split(divided)[1], self._arrays))
        except Exception as error:  # whatever a network of somebody else raises
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                "second moments cannot be measured in this network; variance='formula' with shapes "
                f"(jax.ShapeDtypeStruct) needs none: {why}"
            ) from error
