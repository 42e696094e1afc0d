"""ReLU and max-pool of this package in the place of JAX's, in a program that calls those.

The derivative of ``jax.nn.relu`` keeps the sign of its input, that of ``lax.reduce_window`` its
input; ours keep what the next layer keeps anyway, or a byte for each output (``layers.relu``,
``models.pooling``). A network calls them in its code, where nothing can be put in their place. So
the network is traced, and its program is computed with the others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from mimicnorm_jax.convert.trace import Arguments
from mimicnorm_jax.layers.relu import relu
from mimicnorm_jax.models.pooling import Window, max_pool


def make_lean(network: nnx.Module) -> None:
    """Lets a network compute ReLU and max-pool by those of this package, in place.

    Its outputs and its derivatives in reverse mode stay what they are.
    """
    object.__setattr__(network, "__class__", _lean(type(network)))


@functools.cache
def _lean(kind: Any) -> type[nnx.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)
        before = dict(nnx.to_flat_state(state))

        def run(state: Any, *args: Any, **kwargs: Any) -> Any:
            network = nnx.merge(graphdef, state)
            given = _values(network)
            outputs = kind.__call__(network, *args, **kwargs)
            kinds.update({p: type(v) for p, v in nnx.to_flat_state(nnx.state(network))})
            after = _values(network)  # what is sown is no array, and changed where it is
            changed = {p: v for p, v in after.items() if not (_is_array(v) and given.get(p) is v)}
            return outputs, changed

        kinds: dict[Any, Any] = {}
        outputs, changed = with_lean_functions(run, state, *args, **kwargs)
        modules: dict[Any, Any] = dict(nnx.iter_modules(self))
        for path, value in changed.items():
            if path in before:
                before[path].set_value(value)
            else:  # such as what sow keeps
                setattr(modules[path[:-1]], path[-1], kinds[path](value))
        return outputs

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"__call__": call, _PLAIN: kind, **names})


def _values(network: nnx.Module) -> dict[Any, Any]:
    return {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(network))}


_PLAIN = "_class_before_make_lean"


def undo_lean(network: nnx.Module) -> None:
    """Undoes ``make_lean``."""
    object.__setattr__(network, "__class__", getattr(network, _PLAIN, type(network)))


def with_lean_functions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(...)``, computed with ReLU and max-pool of this package.

    Args:
      function: returns any tree of arrays and other things.
      *args, **kwargs: trees of arrays and other things.
    """
    given = Arguments(args, kwargs)
    others: list[Any] = []
    structure: Any = None

    def arrays_of(arrays: Sequence[Any]) -> list[Any]:
        nonlocal structure, others
        leaves, structure = jax.tree.flatten(given.call(function, arrays))
        others = [None if _is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if _is_array(leaf)]

    closed = jax.make_jaxpr(arrays_of)(given.arrays)
    results = iter(_compute(closed.jaxpr, closed.consts, given.arrays))
    leaves = [next(results) if other is None else other for other in others]
    return jax.tree.unflatten(structure, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _compute(jaxpr: Jaxpr, consts: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Computes a program, ReLU and max-pool by ours."""
    known: dict[Var, Any] = {}
    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arrays, strict=True))
    consumers = _consumers(jaxpr)
    waiting: set[Var] = set()  # results of ReLU that stand for their input, until they are pooled

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        names = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(names) if names else contextlib.nullcontext():
            if _is_relu(eqn):
                readers = consumers.get(eqn.outvars[0], [])
                if len(readers) == 1 and readers[0] is not None and _pool_of(readers[0]):
                    waiting.add(eqn.outvars[0])
                    results = given
                elif all(reader and reader.primitive.name in _SUMS for reader in readers):
                    results = _bind(eqn, given)  # an average keeps nothing that ours could share
                else:
                    results = [relu(*given)]
            elif (pool := _pool_of(eqn)) and consumers[eqn.invars[0]] == [eqn]:
                pooled = max_pool(given[0], **pool._asdict())
                results = [relu(pooled) if eqn.invars[0] in waiting else pooled]
            else:
                results = _enter(eqn, given)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


_SUMS = frozenset({"reduce_sum", "reduce_window_sum"})


def _consumers(jaxpr: Jaxpr) -> dict[Any, list[Any]]:
    """What reads each variable; None stands for the program's results."""
    consumers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for var in {atom for atom in eqn.invars if not isinstance(atom, Literal)}:
            consumers.setdefault(var, []).append(eqn)
    for result in jaxpr.outvars:
        consumers.setdefault(result, []).append(None)
    return consumers


def _enter(eqn: JaxprEqn, given: list[Any]) -> list[Any]:
    """Computes an operation, and what it calls as ``_compute`` does."""
    name, params = eqn.primitive.name, eqn.params
    inner = params.get("jaxpr")
    if inner is None or not _has_something(inner):
        return _bind(eqn, given)
    if name in ("jit", "pjit"):
        return _compute(inner.jaxpr, inner.consts, given)
    if name in ("remat", "remat2", "checkpoint"):
        body = functools.partial(_compute, inner, [])
        options = {key: params[key] for key in ("policy", "prevent_cse")}
        return list(jax.checkpoint(lambda *arrays: body(arrays), **options)(*given))
    if name == "scan":
        return _scan(inner, given, params)
    return _bind(eqn, given)


def _scan(inner: ClosedJaxpr, given: list[Any], params: dict[str, Any]) -> list[Any]:
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, given = given[:num_consts], given[num_consts:]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _compute(inner.jaxpr, inner.consts, [*consts, *carry, *xs])
        return results[:num_carry], results[num_carry:]

    options = {key: params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, given[:num_carry], given[num_carry:], **options)
    return [*carry, *ys]


def _has_something(inner: Jaxpr | ClosedJaxpr) -> bool:
    """Whether a program that is called has a ReLU or a max-pool."""
    jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    for eqn in jaxpr.eqns:
        called = eqn.params.get("jaxpr")
        if _is_relu(eqn) or _pool_of(eqn) or (called is not None and _has_something(called)):
            return True
    return False


def _bind(eqn: JaxprEqn, given: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions: Sequence[Any] = ()
    if isinstance(params, tuple):  # JAX before 0.10
        functions, params = params
    results = eqn.primitive.bind(*functions, *given, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _written_at(jaxpr: Any) -> str:
    """Where in Python the function was written that a program was traced from."""
    return str(jaxpr.jaxpr.debug_info.func_src_info)


@functools.cache
def _where_relu_is() -> str:
    return _written_at(jax.make_jaxpr(jax.nn.relu)(0.0).eqns[0].params["call_jaxpr"])


def _aval(eqn: JaxprEqn) -> Any:
    return eqn.invars[0].aval


def _is_relu(eqn: JaxprEqn) -> bool:
    """Whether an operation is ``jax.nn.relu``; another's derivative may be another."""
    if eqn.primitive.name != "custom_jvp_call" or _aval(eqn).ndim < 2:
        return False
    return _written_at(eqn.params["call_jaxpr"]) == _where_relu_is()


def _pool_of(eqn: JaxprEqn) -> Window | None:
    """The window of a ``max_pool`` that does what an operation does, if one does."""
    if eqn.primitive.name != "reduce_window_max" or _aval(eqn).ndim != 4:
        return None
    params = eqn.params
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        return None
    batch, *window, channels = params["window_dimensions"]
    batch_step, *stride, channel_step = params["window_strides"]
    sides = {side for pair in params["padding"][1:3] for side in pair}
    outer = {*params["padding"][0], *params["padding"][3]}
    if {batch, channels, batch_step, channel_step} != {1} or outer != {0}:
        return None
    if len(set(window)) > 1 or len(set(stride)) > 1 or len(sides) > 1:
        return None
    if not jnp.issubdtype(_aval(eqn).dtype, jnp.floating):
        return None
    return Window(window[0], stride[0], sides.pop())
