"""Networks of ``flax.linen``, whose layers are NNX layers here.

``LinenModule`` holds an NNX layer for each layer of a Linen network, and calls the network with an
interceptor that lets these compute. So all that is done with NNX networks is done with Linen's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from mimicnorm_jax.convert.layers import ForeignLayer, NormalizedLogits
from mimicnorm_jax.convert.trace import Arguments
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.parallel import quick_compilation

Variables = Mapping[str, Any]

_LINEAR = (
    *(linen.Conv, linen.ConvLocal, linen.ConvTranspose, linen.Dense, linen.DenseGeneral),
    linen.Einsum,
)
_COLLECTION = "collection"  # metadata of a variable: where Linen has it


class Part(nnx.Module):
    """A module that is no layer: it computes as it did.

    Args:
      kind_name: the name of its class.
      is_norm: whether that is a subclass of BatchNorm.
    """

    def __init__(self, kind_name: str, *, is_norm: bool):
        self.kind_name = kind_name
        self.is_norm = is_norm

    def __call__(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``proceed(...)``, what the module itself would have returned."""
        return proceed(*args, **kwargs)


class _Variable(NamedTuple):
    """A variable of a module.

    Attributes:
      inside: its path in the state of the NNX module.
      collection, name: where the Linen module has it.
      optional: whether it may be missing: a statistic of ``Meter``, which a stack may not carry
        (``variable_axes``) and a transformation not let out.
      dtype: its type.
    """

    inside: tuple[Any, ...]
    collection: str
    name: str
    optional: bool
    dtype: Any


class _Entry(NamedTuple):
    """What takes the place of a module when it is called.

    Attributes:
      kind: of the Linen module.
      graphdef: of the NNX module.
      variables: its variables.
    """

    kind: type[linen.Module]
    graphdef: Any
    variables: tuple[_Variable, ...]

    def merge(self, scope: Any) -> Any:
        """The NNX module with what the variables are now, of a stack those of one member."""
        state = []
        for inside, collection, name, optional, dtype in self.variables:
            value = linen.meta.unbox(scope.get_variable(collection, name))
            if value is None and optional:
                value = jnp.zeros((), dtype) if dtype == jnp.bool_ else jnp.full((), jnp.nan, dtype)
            state.append((inside, value))
        return nnx.merge(self.graphdef, nnx.from_flat_state(state))

    def put_back(self, scope: Any, module: nnx.Module) -> None:
        """Keeps what a call has changed."""
        state = dict(nnx.to_flat_state(nnx.state(module)))
        for inside, collection, name, optional, _ in self.variables:
            old, new = scope.get_variable(collection, name), state[inside][...]
            lost = optional and (old is None or not scope.is_mutable_collection(collection))
            if collection != "params" and new is not old and not lost:
                scope.put_variable(collection, name, new)


def entry_of(kind: type[linen.Module], module: nnx.Module) -> _Entry:
    """How an NNX module takes the place of a Linen module."""
    graphdef, state = nnx.split(module)
    variables = tuple(
        _Variable(
            inside,
            _collection_of(variable),
            str(inside[-1]),
            variable.get_metadata().get("optional", False),
            variable[...].dtype,
        )
        for inside, variable in nnx.to_flat_state(state)
    )
    return _Entry(kind, graphdef, variables)


def _collection_of(variable: Any) -> str:
    """The collection that Linen has a variable in."""
    usual = "batch_stats" if isinstance(variable, nnx.BatchStat) else "params"
    return str(variable.get_metadata().get(_COLLECTION, usual))


@contextlib.contextmanager
def computed_by(entries: Mapping[str, _Entry], *, uses_average: bool | None) -> Iterator[None]:
    """Lets NNX modules compute what the modules of a Linen network do.

    Args:
      entries: by the module's path.
      uses_average: whether BatchNorms use their running averages; None: as the network says.
    """
    told = uses_average  # the BatchNorm that was called last; the last BN follows it
    active: set[str] = set()

    def intercept(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal told
        module = context.module
        if uses_average and isinstance(module, linen.Dropout):
            return args[0] if args else kwargs["inputs"]
        path = _attribute(module.path) if context.method_name == "__call__" else ""
        entry = entries.get(path)
        if entry is None or path in active or type(module) is not entry.kind:
            return proceed(*args, **kwargs)
        part = entry.merge(module.scope)
        if isinstance(module, linen.BatchNorm):
            said = _uses_average(module, *args, **kwargs)
            if uses_average is None and said is not None:
                told = said
        for _, inner in nnx.iter_modules(part):
            if hasattr(inner, "use_running_average"):
                trains = module.is_mutable_collection("batch_stats")  # where no BatchNorm told yet
                inner.use_running_average = not trains if told is None else told
        active.add(path)
        try:
            if entry.kind is linen.BatchNorm:
                y = part(args[0] if args else kwargs["x"], mask=kwargs.get("mask"))
            elif not isinstance(module, _LINEAR):
                y = part(proceed, *args, **kwargs)
            else:
                x, *others = args or (kwargs.pop("inputs"),)
                proceed = functools.partial(_after, proceed, others, kwargs)
                y = part(x, proceed) if _is_foreign(part) else part(x)
        finally:
            active.discard(path)
        entry.put_back(module.scope, part)
        return y

    with linen.intercept_methods(intercept):
        yield


def _after(proceed: Any, others: Any, kwargs: Any, x: jax.Array) -> Any:
    return proceed(x, *others, **kwargs)


def _is_foreign(part: Any) -> bool:
    layer = part.layer if isinstance(part, NormalizedLogits) else part
    return isinstance(layer, ForeignLayer)


def _uses_average(
    norm: linen.BatchNorm, x: Any = None, use_running_average: bool | None = None, **_: Any
) -> bool | None:
    return norm.use_running_average if use_running_average is None else use_running_average


class _Network:
    """The Linen network that a ``LinenModule`` stands for.

    Args:
      module: the network.
      kinds: the types of its modules, by the name of the attribute that stands for it.
      paths: of its modules and of its variables outside of layers, by that name.
    """

    def __init__(
        self,
        module: linen.Module,
        kinds: Mapping[str, type[linen.Module]],
        paths: Mapping[str, tuple[str, ...]],
    ):
        self.module = module
        self.kinds = kinds
        self.paths = paths


def _attribute(path: Sequence[str]) -> str:
    """The attribute of a ``LinenModule`` that stands for a path, and the path as it is shown."""
    name = "/".join(path)
    return f"./{name}" if name in _TAKEN or hasattr(LinenModule, name) else name


_TAKEN = ("network", "use_running_average")
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class LinenModule(nnx.Module):
    """A Linen network as an NNX module, called as the network is called.

    Its attributes are its layers and modules by their path, such as ``"Block_0/Conv_0"``.

    Args:
      network: the network.
      parts: what computes in the place of its modules, by the name of the attribute.
      others: its variables outside of layers, by attribute: the collection, and the value.

    Attributes:
      use_running_average: of all BatchNorms, whatever the arguments say; ``model.eval()`` and
        ``model.train()`` set it.
    """

    def __init__(
        self,
        network: _Network,
        parts: Mapping[str, nnx.Module],
        others: Mapping[str, tuple[str, jax.Array]],
    ):
        self.network = network
        self.use_running_average = False
        for attribute, part in parts.items():
            setattr(self, attribute, part)
        for attribute, (collection, value) in others.items():
            kind: Any = _KINDS.get(collection, nnx.Variable)
            setattr(self, attribute, kind(value, **{_COLLECTION: collection}))

    def entries(self) -> dict[str, _Entry]:
        """What computes in the place of each module."""
        kinds = self.network.kinds
        return {path: entry_of(kind, getattr(self, path)) for path, kind in kinds.items()}

    def layer_at(self, path: Sequence[str]) -> Any:
        """What computes in the place of the module at a path."""
        part = getattr(self, _attribute(path), None)
        return part.layer if isinstance(part, NormalizedLogits) else part

    def placed(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Its variables, with collection and path that they have in Linen."""
        for (attribute, *inside), variable in nnx.to_flat_state(nnx.state(self)):
            path = self.network.paths[str(attribute)]
            yield (_collection_of(variable), *path, *map(str, inside[-1:])), variable

    def variables(self) -> dict[str, Any]:
        """The variables as Linen has them."""
        flat = {place: variable[...] for place, variable in self.placed()}
        return dict(traverse_util.unflatten_dict(flat))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network; statistics are kept here."""
        module, variables = self.network.module, self.variables()
        with computed_by(self.entries(), uses_average=self.use_running_average):
            outputs, changed = module.apply(
                variables, *args, mutable=linen.DenyList("params"), **kwargs
            )
        flat = traverse_util.flatten_dict(changed)
        for place, variable in self.placed():
            if place in flat:
                variable[...] = flat[place]
        return outputs


def linen_module(
    module: linen.Module, given: Arguments, variables: Variables | None = None
) -> LinenModule:
    """A Linen network as an NNX module.

    Args:
      module: the network.
      given: what it is called with; shapes are enough.
      variables: its variables; None takes those of ``init`` with key 0.

    Raises:
      UserError: the network cannot be called so, or its variables are not those of ``init``.
    """
    seen: dict[str, linen.Module] = {}

    def record(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and context.module.path:
            # of a module within another of its name (a transformed one) the inner one stays
            seen[_attribute(context.module.path)] = context.module
        return proceed(*args, **kwargs)

    def init(key: jax.Array, arrays: Any) -> Any:
        return given.call(functools.partial(module.init, key), arrays)

    if not given.arrays:
        raise UserError("the network's arguments are needed: convert(model, images)")
    key = jax.random.key(0)
    try:
        with linen.intercept_methods(record):
            jax.eval_shape(init, key, given.arrays)
        if variables is None:
            arrays = [jnp.zeros(array.shape, array.dtype) for array in given.arrays]
            options = quick_compilation(jax.default_backend())
            variables = jax.jit(init, compiler_options=options)(key, arrays)
    except Exception as error:  # whatever a network of somebody else raises
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the network cannot be called with these arguments: {why}") from error
    flat = traverse_util.flatten_dict(linen.meta.unbox(dict(variables)))
    parts: dict[str, nnx.Module] = {}
    for attribute, called in seen.items():
        is_layer = isinstance(called, _LINEAR) or type(called) is linen.BatchNorm
        own = [place for place in flat if is_layer and place[1:-1] == tuple(called.path)]
        parts[attribute] = _part(called, {place[-1]: flat.pop(place) for place in own})
    kinds = {attribute: type(called) for attribute, called in seen.items()}
    paths = {attribute: tuple(called.path) for attribute, called in seen.items()}
    others = {f"{'/'.join(path)}:{path[0]}": (path[0], value) for path, value in flat.items()}
    paths.update({f"{'/'.join(path)}:{path[0]}": path[1:] for path in flat})
    return LinenModule(_Network(module, kinds, paths), parts, others)


_OWN = ("conv_general_dilated", "conv_general_dilated_cls", "dot_general", "dot_general_cls")


def _part(module: Any, held: dict[str, Any]) -> nnx.Module:
    """What computes in the place of a Linen module, with its variables."""
    part: Any
    if type(module) is linen.BatchNorm:
        part = nnx.BatchNorm(
            1,
            axis=module.axis,
            momentum=module.momentum,
            epsilon=module.epsilon,
            use_bias=module.use_bias,
            use_scale=module.use_scale,
            dtype=module.dtype,
            axis_name=module.axis_name,
            rngs=nnx.Rngs(0),
        )
    elif not isinstance(module, _LINEAR):
        return Part(type(module).__name__, is_norm=isinstance(module, linen.BatchNorm))
    elif type(module) is linen.Dense and _is_usual(module):
        part = nnx.Linear(1, 1, **_shared(module))
        part.in_features, part.out_features = held["kernel"].shape[-2:]
    elif type(module) is linen.Conv and _is_usual(module):
        size = module.kernel_size
        part = nnx.Conv(
            module.feature_group_count,
            module.feature_group_count,
            (size,) if isinstance(size, int) else tuple(size),
            1 if module.strides is None else module.strides,
            padding=module.padding,
            input_dilation=1 if module.input_dilation is None else module.input_dilation,
            kernel_dilation=1 if module.kernel_dilation is None else module.kernel_dilation,
            feature_group_count=module.feature_group_count,
            **_shared(module),
        )
        in_features, out_features = held["kernel"].shape[-2:]
        part.in_features = in_features * module.feature_group_count
        part.out_features = out_features
    else:
        return ForeignLayer(type(module).__name__, held)
    for name, value in held.items():
        getattr(part, name).set_value(value)
    return part


def _shared(module: Any) -> dict[str, Any]:
    return {
        "use_bias": module.use_bias,
        "dtype": module.dtype,
        "param_dtype": module.param_dtype,
        "precision": module.precision,
        "rngs": nnx.Rngs(0),
    }


def _is_usual(layer: Any) -> bool:
    """Whether a layer computes as that of NNX, without functions of its own."""
    if getattr(layer, "mask", None) is not None:
        return False
    return all(getattr(layer, name, None) is None for name in _OWN) and (
        layer.promote_dtype is linen.dtypes.promote_dtype
    )
