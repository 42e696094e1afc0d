"""The graph of a network: its call, traced with a mark at the begin and end of every layer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from mimicnorm_jax.convert.graph import Call, Graph, Path, Value
from mimicnorm_jax.convert.layers import ForeignLayer
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.layers import LastBN, ScaledConv, ScaledDense
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm

NORMS = (nnx.BatchNorm, ShiftedBatchNorm)
LINEAR = (
    *(nnx.Conv, nnx.Linear, nnx.ConvTranspose, nnx.LinearGeneral),
    *(ScaledConv, ScaledDense, ForeignLayer),
)


def is_of(module: nnx.Module, kinds: tuple[type[nnx.Module], ...]) -> bool:
    """Whether a module is of one of some kinds; a subclass of a norm may do something else."""
    return isinstance(module, kinds) and (not isinstance(module, NORMS) or type(module) in NORMS)


# The identity, with a name of what lies between two of them.
_mark = Primitive("mark")
_mark.def_impl(lambda x, **_: x)
_mark.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[_mark] = lambda args, dims, **params: (
    _mark.bind(*args, **params),
    dims[0],
)
ad.deflinear2(_mark, lambda cotangent, _, **params: [cotangent])

_numbers = itertools.count()
_MODE = "use_running_average"


def _marked(value: jax.Array, kind: str, call: Call) -> jax.Array:
    return _mark.bind(value, kind=kind, call=call)


@functools.cache
def _watched_layer(kind: Any) -> type[nnx.Module]:
    def call(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        kernel = getattr(self, "kernel", None)
        place = Call(
            self.path_in_network,
            next(_numbers),
            kernel_shape=() if kernel is None else tuple(kernel.shape),
            ndim=jax.numpy.ndim(x),
            told_mode=any(flag is not None for flag in (*args, kwargs.get(_MODE))),
            masked=kwargs.get("mask") is not None,
        )
        y = kind.__call__(self, _marked(x, "begin", place), *args, **kwargs)
        return _marked(y, "end", place)

    return type(kind.__name__, (kind,), {"__call__": call})


@functools.cache
def _watched_module(kind: Any) -> type[nnx.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)  # type: ignore[operator]
        if not isinstance(y, jax.Array):
            return y
        return _marked(y, "module", Call(self.path_in_network, next(_numbers)))

    return type(kind.__name__, (kind,), {"__call__": call})


def _watch(model: nnx.Module) -> None:
    """Makes every module of a network mark what it takes and returns."""
    modules: list[tuple[Path, Any]] = list(nnx.iter_modules(model))
    for path, module in modules:
        kind: Any = type(module)
        if is_of(module, (*NORMS, *LINEAR, LastBN)):
            watched = _watched_layer(kind)
        elif path and "__call__" in dir(kind):
            watched = _watched_module(kind)
        else:
            continue
        object.__setattr__(module, "__class__", watched)
        module.path_in_network = path


@dataclasses.dataclass(frozen=True)
class Traced:
    """A network as it was traced.

    Attributes:
      graph: its layers and operations.
      modules: its modules by path.
      logits: the outputs that were chosen.
    """

    graph: Graph
    modules: dict[Path, nnx.Module]
    logits: list[Value]


def is_array(leaf: Any) -> bool:
    """Whether a leaf of what a network takes or returns is an array, or the shape of one."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a network is called with: arrays, and what is no array.

    Args:
      args, kwargs: as they are given to the network.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _leaves(self) -> tuple[list[Any], Any]:
        return jax.tree.flatten((tuple(self.args), dict(self.kwargs)))

    @property
    def arrays(self) -> list[Any]:
        """The arrays among them, or their shapes and types."""
        return [leaf for leaf in self._leaves[0] if is_array(leaf)]

    @property
    def are_shapes(self) -> bool:
        """Whether shapes and types are given in place of arrays."""
        return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self._leaves[0])

    def call(self, function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Calls a function with other arrays in the places of these."""
        leaves, structure = self._leaves
        given = iter(arrays)
        filled = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)


def trace(model: nnx.Module, given: Arguments, logits: Callable[[Any], Any] | None) -> Traced:
    """Traces the call of a network in evaluation mode.

    Args:
      model: the network, which is left as it is.
      given: its arguments; shapes and types (``jax.ShapeDtypeStruct``) are enough.
      logits: chooses the logits among the outputs; None where there is one output.

    Raises:
      UserError: the network raises an error; the outputs are several, and none is chosen; or
        ``logits`` does not fit them.
    """
    watched = nnx.clone(model)
    watched.eval()
    _watch(watched)
    graphdef, *states = nnx.split(watched, nnx.Param, ...)
    constants, structure = jax.tree.flatten(states)
    num_learned = len(jax.tree.leaves(states[0]))
    if not given.arrays:
        raise UserError(
            "the network's arguments are needed, arrays or shapes: convert(model, images), or "
            "convert(model, jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32), "
            "variance='formula')"
        )

    def run(constants: Sequence[Any], arrays: Sequence[Any]) -> Any:
        network = nnx.merge(graphdef, *jax.tree.unflatten(structure, constants))
        outputs = given.call(network, arrays)
        chosen = chosen_logits(outputs, logits)
        return chosen, [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "shape")]

    try:
        closed, (chosen, _) = jax.make_jaxpr(run, return_shape=True)(constants, given.arrays)
    except UserError as error:
        raise UserError(str(error)) from None  # without JAX's note about its traceback
    except Exception as error:  # whatever a network of somebody else raises
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the network cannot be called with these arguments: {why}") from error
    graph = Graph(closed, constants, num_learned)
    return Traced(graph, dict(nnx.iter_modules(model)), graph.outputs[: len(chosen)])


def chosen_logits(outputs: Any, logits: Callable[[Any], Any] | None) -> list[jax.Array]:
    """The logits among a network's outputs; see ``trace``."""
    example = "such as logits=lambda outputs: outputs[0]"
    if logits is None:
        chosen = jax.tree.leaves(outputs)
        if len(chosen) != 1:
            raise UserError(
                f"the network returns {len(chosen)} arrays: say which are logits, {example}"
            )
        return chosen
    if not callable(logits):
        raise UserError(f"logits is a function of the network's outputs, {example}: got {logits!r}")
    try:
        return jax.tree.leaves(logits(outputs))
    except Exception as error:  # whatever a function of somebody else raises
        shapes = jax.tree.map(jax.numpy.shape, outputs)
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"logits does not fit what the network returns, of shapes {shapes}: {why}"
        ) from error
