"""What ``convert`` makes of a network of ``flax.linen``: its ``init`` and ``apply``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx, traverse_util
from flax.core.scope import in_filter

from mimicnorm_jax.convert.lean import undo_lean, with_lean_functions
from mimicnorm_jax.convert.linen import LinenModule, computed_by
from mimicnorm_jax.convert.report import Report
from mimicnorm_jax.errors import UserError

_Place = tuple[str, ...]  # collection, path and name of a variable


class _Kernel(NamedTuple):
    """How a kernel is made of the one that the network's own ``init`` draws.

    Attributes:
      axes: of one kernel; what is before them is a stack.
      centered: whether its mean is subtracted.
      square: its mean square, of a stack one a member.
    """

    axes: tuple[int, ...]
    centered: bool
    square: np.ndarray

    def make(self, drawn: jax.Array) -> jax.Array:
        wide = drawn.astype(jnp.promote_types(drawn.dtype, jnp.float32))
        if self.centered:
            wide = wide - jnp.mean(wide, axis=self.axes[:-1], keepdims=True)
        square = jnp.mean(jnp.square(wide), axis=self.axes, keepdims=True)
        factor = jnp.sqrt(self.square / jnp.where(square > 0, square, 1))
        return (wide * factor).astype(drawn.dtype)


class LinenNetwork:
    """A converted network of ``flax.linen``, used as the network itself is.

    Example::

      network, report = convert(module, images, train=False)
      variables = network.init(jax.random.key(0), images, train=False)
      logits, updates = network.apply(variables, images, train=True, mutable=["batch_stats"])

    The last BN is in the mode that the network gives its BatchNorms.

    Args:
      module: the network that was given.
      original: its layers as ``module.init`` makes them.
      converted: its layers now.
      report: of the conversion.
      lean: whether ReLU and max-pool are those of this package, see ``convert``.
    """

    def __init__(
        self,
        module: linen.Module,
        original: LinenModule,
        converted: LinenModule,
        report: Report,
        *,
        lean: bool,
    ):
        self.module = module
        self._apply = functools.partial(with_lean_functions, module.apply) if lean else module.apply
        self._entries = converted.entries()
        undo_lean(converted)
        self._graphdef, state = nnx.split(converted)
        self._states = [place for place, _ in nnx.to_flat_state(state)]
        self._places = [place for place, _ in converted.placed()]
        drawn = {place: np.asarray(variable[...]) for place, variable in original.placed()}
        self._dropped = drawn.keys() - set(self._places)
        self._has_statistics = any(place[0] == "batch_stats" for place in drawn)
        self._kernels: dict[_Place, _Kernel] = {}
        self._constants: dict[_Place, np.ndarray] = {}
        paths = converted.network.paths
        centered = {paths[row.path] for row in report.layers if row.centered}
        for place, variable in converted.placed():
            value = np.asarray(variable[...])
            if place in drawn and np.array_equal(drawn[place], value):
                continue
            if place in drawn and place[-1] == "kernel":
                path = place[1:-1]
                size = getattr(converted.layer_at(path), "kernel_size", ())
                axes = tuple(range(value.ndim - len(size) - 2, value.ndim))
                square = np.mean(np.square(value, dtype=np.float64), axis=axes, keepdims=True)
                self._kernels[place] = _Kernel(axes, path in centered, square.astype(np.float32))
            else:
                self._constants[place] = value

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The variables of the converted network.

        Each kernel is the one that the network's own ``init`` draws, centred, and with the
        variance that it had in the report: what was measured there is not measured again, so this
        may be traced (``jax.jit``, ``jax.eval_shape``), and the arguments may be zeros.

        Args:
          rngs, *args, **kwargs: of the network's own ``init``.
        """
        drawn = traverse_util.flatten_dict(dict(self.module.init(rngs, *args, **kwargs)))
        lost = [p for p in self._places if p not in drawn and p not in self._constants]
        if lost:
            raise UserError(
                f"init makes no {'/'.join(lost[0])} with these arguments: give those of convert"
            )
        known = {*self._places, *self._dropped}
        made: dict[_Place, Any] = {p: value for p, value in drawn.items() if p not in known}
        for place in self._places:
            box = drawn.get(place)
            value = linen.meta.unbox(box)
            if place in self._constants:
                value = jnp.asarray(self._constants[place])
            elif place in self._kernels:
                value = self._kernels[place].make(value)
            is_boxed = isinstance(box, linen.meta.AxisMetadata)
            made[place] = box.replace_boxed(value) if is_boxed else value
        variables = dict(traverse_util.unflatten_dict(made))
        if self._has_statistics:
            variables.setdefault("batch_stats", {})
        return variables

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Calls the converted network, as ``apply`` of ``flax.linen.Module`` does.

        Args:
          variables: of ``init``.
          *args, **kwargs: what the network is called with.
          rngs, method, mutable, capture_intermediates: as there.

        Raises:
          UserError: variables of the network before its conversion.
        """
        self._check(variables)
        with computed_by(self._entries, uses_average=None):
            results = self._apply(
                variables,
                *args,
                rngs=rngs,
                method=method,
                mutable=mutable,
                capture_intermediates=capture_intermediates,
                **kwargs,
            )
        if mutable is not False and self._has_statistics:
            outputs, updates = results
            if in_filter(mutable, "batch_stats"):
                updates = {"batch_stats": {}, **updates}
            return outputs, updates
        return results

    def bind(self, variables: Mapping[str, Any]) -> LinenModule:
        """The network with its variables, called as ``network(images)``, in evaluation mode."""
        self._check(variables)
        flat = traverse_util.flatten_dict(linen.meta.unbox(dict(variables)))
        pairs = zip(self._states, self._places, strict=True)
        state = nnx.from_flat_state([(inside, flat[place]) for inside, place in pairs])
        bound: LinenModule = nnx.merge(self._graphdef, state)
        bound.eval()
        return bound

    def _check(self, variables: Mapping[str, Any]) -> None:
        flat = traverse_util.flatten_dict(dict(variables))
        missing = [place for place in self._places if place not in flat]
        if missing:
            raise UserError(
                f"the variables have no {'/'.join(missing[0])}: those of the converted network "
                "come from its own init"
            )
