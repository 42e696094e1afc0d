"""ReLU and max-pool that keep less for the backward pass, in a program that calls JAX's.

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
from flax import nnx
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from mimicnorm_jax.convert.graph import scan_counts
from mimicnorm_jax.convert.trace import Arguments, is_array
from mimicnorm_jax.layers.relu import relu
from mimicnorm_jax.models.pooling import Window, max_pool


def make_lean(network: nnx.Module) -> None:
    """Lets a network compute ReLU and max-pool by those of this package, in place.

    Its outputs and its derivatives in reverse mode stay what they are.
    """
    object.__setattr__(network, "__class__", _lean(type(network)))


@functools.cache
def _lean(kind: Any) -> type[nnx.Module]:
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if _has_nodes((args, kwargs)):  # which the call may change
            return kind.__call__(self, *args, **kwargs)
        graphdef, state = nnx.split(self)
        attributes: dict[Any, Any] = {}
        kinds: dict[Any, Any] = {}

        def run(state: Any, /, *args: Any, **kwargs: Any) -> Any:
            network = nnx.merge(graphdef, state)
            given = _values(network)
            outputs = kind.__call__(network, *args, **kwargs)
            kinds.update({p: type(v) for p, v in nnx.to_flat_state(nnx.state(network))})
            attributes.update(_static_attributes(network))
            after = _values(network)  # what is sown is no array, and changed where it is
            changed = {p: v for p, v in after.items() if not (is_array(v) and given.get(p) is v)}
            return outputs, changed

        outputs, changed = with_lean_functions(run, state, *args, **kwargs)
        before = dict(nnx.to_flat_state(state))
        for path, value in changed.items():
            if isinstance(before.get(path), nnx.Variable):
                before[path].set_value(value)
            else:  # an array without a Variable, or new, such as what sow keeps
                of_kind = kinds[path](value) if issubclass(kinds[path], nnx.Variable) else value
                setattr(_part_at(self, path[:-1]), path[-1], of_kind)
        own = _static_attributes(self)
        for (path, name), value in attributes.items():
            if own.get((path, name), _PLAIN) is not value:
                setattr(_part_at(self, path), name, value)
        return outputs

    def reduce(self: Any, protocol: Any) -> Any:
        undo_lean(self)
        try:
            make, args, state, *_ = self.__reduce_ex__(protocol)
        finally:
            make_lean(self)
        return _unpickled, (make, args, state)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own = {"__call__": call, "__reduce_ex__": reduce, _PLAIN: kind}
    return type(kind.__name__, (kind,), {**own, **names})


def _unpickled(make: Any, args: Any, state: Any) -> Any:
    network = make(*args)
    if hasattr(network, "__setstate__"):
        network.__setstate__(state)
    else:
        vars(network).update(state)
    make_lean(network)
    return network


def _has_nodes(tree: Any) -> bool:
    """Whether there are modules, random streams or variables of NNX in a tree."""
    kinds = (nnx.Pytree, nnx.Variable)
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(leaf, kinds) for leaf in leaves)


def _values(network: nnx.Module) -> dict[Any, Any]:
    return {
        path: value.get_value() if isinstance(value, nnx.Variable) else value
        for path, value in nnx.to_flat_state(nnx.state(network))
    }


def _static_attributes(network: nnx.Module) -> dict[Any, Any]:
    """Numbers, strings and tuples of these that the modules of a network hold."""
    return {
        (path, name): value
        for path, module in nnx.iter_modules(network)
        for name, value in vars(module).items()
        if not str(name).startswith("_pytree__")
        and isinstance(value, int | float | str | tuple | None)
        and not any(is_array(leaf) for leaf in jax.tree.leaves(value))
    }


def _part_at(network: Any, path: Sequence[Any]) -> Any:
    for key in path:
        network = network[key] if isinstance(network, list | dict) else getattr(network, str(key))
    return network


_PLAIN = "_class_before_make_lean"


def undo_lean(network: nnx.Module) -> None:
    """Undoes ``make_lean``, also where such a network is part of another."""
    for _, module in list(nnx.iter_modules(network)):
        object.__setattr__(module, "__class__", getattr(module, _PLAIN, type(module)))


def with_lean_functions(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
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
        others = [None if is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if is_array(leaf)]

    closed = jax.make_jaxpr(arrays_of)(given.arrays)
    results = iter(_compute(closed.jaxpr, closed.consts, given.arrays))
    leaves = [next(results) if other is None else other for other in others]
    return jax.tree.unflatten(structure, leaves)


def _compute(jaxpr: Jaxpr, consts: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Computes a program, ReLU and max-pool by ours."""
    known: dict[Var, Any] = {}
    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arrays, strict=True))
    consumers = _consumers(jaxpr)
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
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
                elif _is_kept(eqn.outvars[0], consumers) and not _joined(eqn.invars[0], makers):
                    results = [relu(*given)]
                else:
                    results = _bind(eqn, given)
            elif (pool := _pool_of(eqn)) and consumers[eqn.invars[0]] == [eqn]:
                pooled = max_pool(given[0], **pool._asdict())
                results = [relu(pooled) if eqn.invars[0] in waiting else pooled]
            else:
                results = _enter(eqn, given)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# What is linear, and so keeps nothing of what it is given for the backward pass; and what is the
# same array in another shape.
_LINEAR = frozenset(
    {
        *("add", "add_any", "concatenate", "convert_element_type", "dynamic_slice", "gather"),
        *("neg", "pad", "reduce_sum", "reduce_window_sum", "select_n", "slice", "split", "sub"),
        "transpose",
    }
)
_SAME = frozenset({"copy", "expand_dims", "reshape", "squeeze"})


def _is_kept(var: Any, consumers: dict[Any, list[Any]]) -> bool:
    """Whether the backward pass keeps an array anyway, which ReLU then can share."""

    def keeps(reader: JaxprEqn | None) -> bool:
        if reader is None:
            return True  # a result of a program within: read by the next one
        name = reader.primitive.name
        if name in _LINEAR:
            return False
        if name in ("mul", "div"):
            return not any(isinstance(atom, Literal) for atom in reader.invars)
        if name in _SAME:
            return _is_kept(reader.outvars[0], consumers)
        if name in ("jit", "pjit"):
            inner = reader.params["jaxpr"].jaxpr
            taken = [
                own for own, atom in zip(inner.invars, reader.invars, strict=True) if atom is var
            ]
            return any(_is_kept(own, _consumers(inner)) for own in taken)
        return True

    return any(keeps(reader) for reader in consumers.get(var, []))


def _consumers(jaxpr: Jaxpr) -> dict[Any, list[Any]]:
    """What reads each variable; None stands for the program's results."""
    consumers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for var in {atom for atom in eqn.invars if not isinstance(atom, Literal)}:
            consumers.setdefault(var, []).append(eqn)
    for result in jaxpr.outvars:
        consumers.setdefault(result, []).append(None)
    return consumers


def _joined(var: Any, makers: dict[Any, JaxprEqn]) -> bool:
    """Whether an array is a concatenation, shifted at most, as in DenseNet.

    Its parts are kept once for all the concatenations that they are in. From them the compiler
    computes again what ReLU makes of each.
    """
    seen, stack = set(), [var]
    while stack:
        maker = makers.get(stack.pop())
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.primitive.name == "concatenate":
            return True
        if maker.primitive.name in ("add", "sub", "mul"):
            stack.extend(atom for atom in maker.invars if isinstance(atom, Var))
    return False


def _enter(eqn: JaxprEqn, given: list[Any]) -> list[Any]:
    """Computes an operation, and what it calls as ``_compute`` does."""
    name, params = eqn.primitive.name, eqn.params
    inner = params.get("jaxpr")
    if inner is None or not _has_something(inner):
        return _bind(eqn, given)
    if name in ("jit", "pjit"):
        return list(_compiled(inner)(given))
    if name in ("remat", "remat2", "checkpoint"):
        options = {key: params[key] for key in ("policy", "prevent_cse")}
        return list(jax.checkpoint(functools.partial(_compute, inner, []), **options)(given))
    if name == "scan":
        return _scan(inner, given, params)
    return _bind(eqn, given)


@functools.lru_cache(maxsize=128)
def _compiled(inner: ClosedJaxpr) -> Callable[[list[Any]], list[Any]]:
    """A program that was compiled before, and whose text JAX keeps, is compiled once only."""
    return jax.jit(lambda given: _compute(inner.jaxpr, inner.consts, given))


def _scan(inner: ClosedJaxpr, given: list[Any], params: dict[str, Any]) -> list[Any]:
    num_consts, num_carry = scan_counts(params, len(given))
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


_MAX_WINDOW = 5  # ours compares as many slices as a window has places


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
    (side,) = sides
    if side >= window[0]:  # windows of padding alone, which ReLU must not come after
        return None
    if window[0] > _MAX_WINDOW or not jnp.issubdtype(_aval(eqn).dtype, jnp.floating):
        return None
    return Window(window[0], stride[0], side)
