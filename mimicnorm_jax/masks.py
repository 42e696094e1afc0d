"""The kernels of networks of Linen, Haiku and Equinox, for ``project_weight_mean``.

Where the weights of an output channel are in a kernel is told by the layer that owns it: a
convolution's is HWIO in Linen and Haiku, and OIHW in Equinox; a transposed one's is HWOI in
Haiku; and a scan, ``vmap`` or stack of layers adds axes before them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen

from mimicnorm_jax.convert.trace import Arguments
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers.convolution_arguments import phases
from mimicnorm_jax.layers.kernel import Centering
from mimicnorm_jax.layers.projection import Path, WeightMeanMask, of_stack, path_of


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a network, for the function that chooses which are centred.

    Attributes:
      path: names on the way to it in the parameters.
      kind: name of its layer's class, such as ``Conv2D``.
      shape: of one kernel.
      window: how many of its axes are of the window; 0 for a dense layer.
      fan_in: how many weights make an output together; with strides of a transposed convolution
        the fewest.
      depthwise: whether each output channel sees one input channel.
      centering: which weights its mean is taken over.
      masked: whether its layer multiplies it by a mask.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    window: int
    fan_in: int
    depthwise: bool
    centering: Centering
    masked: bool = False


Choose = Callable[[Kernel], bool]


def convolutions(kernel: Kernel) -> bool:
    """The paper's choice: convolutions, but not depthwise ones, and no dense layers."""
    return kernel.window > 0 and not kernel.depthwise


def _kernel(
    path: Path,
    kind: str,
    shape: Sequence[int],
    *,
    out: int = -1,
    into: int = -2,
    depthwise: bool = False,
    masked: bool = False,
    steps: Any = 1,
    dilation: Any = 1,
) -> Kernel:
    """A kernel, given its shape and where its axes are; those of the window are the others."""
    axes = range(-len(shape), 0)
    window = tuple(axis for axis in axes if axis not in (out, into))
    each = [np.broadcast_to(1 if n is None else n, len(window)).tolist() for n in (steps, dilation)]
    weights = tuple(axis for axis in axes if axis != out)
    centering = Centering(weights, phases(window, *each))
    fan_in = int(centering.fan_in(tuple(shape)).min())
    return Kernel(path, kind, tuple(shape), len(window), fan_in, depthwise, centering, masked)


def _mask(
    found: dict[Path, Kernel], params: dict[Path, Any], choose: Choose, stack_axis: int
) -> WeightMeanMask:
    chosen = {}
    for path, kernel in found.items():
        if not choose(kernel):
            continue
        if kernel.masked:
            raise UserError(f"{'/'.join(path)}: a kernel with a mask has no projected weight mean")
        if kernel.fan_in < 2:
            raise UserError(
                f"{'/'.join(path)} has outputs with a fan-in of {kernel.fan_in}: centring leaves "
                "nothing of a single weight; choose= must leave it out"
            )
        chosen[path] = of_stack(kernel.centering, kernel.shape, params[path], stack_axis=stack_axis)
    if not chosen:
        raise UserError(
            "no kernel is chosen; the network has "
            + (", ".join("/".join(path) for path in found) or "no layer that is known")
        )
    return WeightMeanMask(chosen)


def _by_path(params: Any) -> dict[Path, Any]:
    entries = jax.tree_util.tree_leaves_with_path(linen.meta.unbox(params))
    return {path_of(path): leaf for path, leaf in entries}


def _initialized(init: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The shapes of what ``init`` makes; what is no array, such as a flag, stays what it is."""
    given = Arguments(args, kwargs)

    def call(key: jax.Array, arrays: list[Any]) -> Any:
        return given.call(functools.partial(init, key), arrays)

    return jax.eval_shape(call, jax.random.key(0), given.arrays)


def linen_mask(
    module: linen.Module,
    *args: Any,
    choose: Choose = convolutions,
    stack_axis: int = 0,
    **kwargs: Any,
) -> WeightMeanMask:
    """The mask of a ``flax.linen`` network's ``variables["params"]``.

    Example::

      mask = linen_mask(network, images)
      params = mask.center(network.init(key, images)["params"])
      transform = optax.chain(optax.sgd(0.1, momentum=0.9), project_weight_mean(mask))

    Args:
      module: the network; ``linen.Conv``, ``ConvTranspose`` and ``Dense`` are found at any depth,
        also in ``linen.scan`` and ``linen.vmap``, each kernel of a stack by itself.
      *args, **kwargs: what ``init`` takes behind the key; shapes are enough
        (``jax.ShapeDtypeStruct``).
      choose: is given each ``Kernel``, and says whether it is centred.
      stack_axis: which axis of a stacked kernel numbers the layers, where its shape leaves that
        open: where the stack is as long as the window, such as 3 layers of 3x3.

    Raises:
      UserError: no kernel is chosen, or one with a fan-in of 1 or a mask.
    """
    found: dict[Path, Kernel] = {}

    def watch(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = proceed(*args, **kwargs)
        layer = context.module
        kinds = linen.Conv | linen.ConvTranspose | linen.Dense
        if context.method_name != "__call__" or not isinstance(layer, kinds):
            return result
        path = (*layer.path, "kernel")
        shape = linen.meta.unbox(layer.variables["params"]["kernel"]).shape
        options: dict[str, Any] = {}
        if isinstance(layer, linen.ConvTranspose):
            options = {"steps": layer.strides, "dilation": layer.kernel_dilation}
            if layer.transpose_kernel:
                options |= {"out": -2, "into": -1}
        elif isinstance(layer, linen.Conv):
            options = {"steps": layer.input_dilation, "dilation": layer.kernel_dilation}
            options["depthwise"] = layer.feature_group_count > 1 and shape[-2] == 1
        masked = getattr(layer, "mask", None) is not None
        found[path] = _kernel(path, type(layer).__name__, shape, masked=masked, **options)
        return result

    with linen.intercept_methods(watch):
        variables = _initialized(module.init, args, kwargs)
    return _mask(found, _by_path(variables.get("params", {})), choose, stack_axis)


def haiku_mask(
    transformed: Any, *args: Any, choose: Choose = convolutions, **kwargs: Any
) -> WeightMeanMask:
    """The mask of a Haiku network's parameters; needs ``dm-haiku``.

    Args:
      transformed: what ``haiku.transform`` or ``transform_with_state`` returned; its
        convolutions, also transposed ones, and ``Linear`` are found, also in
        ``haiku.layer_stack`` and ``haiku.lift``.
      *args, **kwargs, choose: as for ``linen_mask``.

    Raises:
      UserError: as ``linen_mask``.
    """
    import haiku

    if not hasattr(transformed, "init"):
        raise UserError("haiku_mask takes what haiku.transform returned, not the function itself")
    seen: list[tuple[list[str], Kernel]] = []
    lifted: list[str] = []  # what the layers that are called now are lifted into

    def watch(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__":
            return proceed(*args, **kwargs)
        if type(layer).__name__ == "LiftingModule":
            lifted.append(layer.module_name)
            try:
                return proceed(*args, **kwargs)
            finally:
                lifted.pop()
        result = proceed(*args, **kwargs)
        # a layer that was lifted is called again, without its prefix, when it is applied
        if haiku.running_init() and (kernel := _of_haiku(haiku, layer)) is not None:
            seen.append((list(lifted), kernel))
        return result

    with haiku.intercept_methods(watch):
        made = _initialized(transformed.init, args, kwargs)
    params = _by_path(made[0] if isinstance(made, tuple) else made)
    found: dict[Path, Kernel] = {}
    for prefix, kernel in seen:
        path = _place(prefix, kernel.path[0], params)
        found[path] = dataclasses.replace(kernel, path=path)
    return _mask(found, params, choose, 0)


def _of_haiku(haiku: Any, layer: Any) -> Kernel | None:
    depthwise = (haiku.DepthwiseConv1D, haiku.DepthwiseConv2D, haiku.DepthwiseConv3D)
    kinds = (haiku.ConvND, haiku.ConvNDTranspose, haiku.Linear, *depthwise)
    if not isinstance(layer, kinds):
        return None
    place = (layer.module_name, "w")
    shape = layer.params_dict()["/".join(place)].shape
    options: dict[str, Any] = {}
    if isinstance(layer, haiku.ConvNDTranspose):
        options = {"out": -2, "into": -1, "steps": layer.stride}
    elif not isinstance(layer, haiku.Linear):
        groups = getattr(layer, "feature_group_count", 2)
        options["depthwise"] = groups > 1 and shape[-2] == 1
    masked = getattr(layer, "mask", None) is not None
    return _kernel(place, type(layer).__name__, shape, masked=masked, **options)


def _place(lifted: Sequence[str], name: str, params: Mapping[Path, Any]) -> Path:
    """Where the kernel of a layer is; a transparent lift adds no name of its own."""
    for kept in itertools.product((True, False), repeat=len(lifted)):
        parts = [
            part if is_kept else part.rpartition("/")[0]
            for part, is_kept in zip(lifted, kept, strict=True)
        ]
        path = ("/".join([*filter(None, parts), name]), "w")
        if path in params:
            return path
    raise UserError(f"the parameters have no kernel of {'/'.join([*lifted, name])}")


def equinox_mask(
    model: Any, *, choose: Choose = convolutions, stack_axis: int = 0
) -> WeightMeanMask:
    """The mask of an Equinox model, or of ``equinox.filter`` of it; needs ``equinox``.

    Args:
      model: its ``Conv``, ``ConvTranspose`` and ``Linear`` are found at any depth, also where
        ``equinox.filter_vmap`` stacked them, each kernel of a stack by itself.
      choose, stack_axis: as for ``linen_mask``.

    Raises:
      UserError: as ``linen_mask``.
    """
    import equinox

    kinds = (equinox.nn.Conv, equinox.nn.ConvTranspose, equinox.nn.Linear)
    entries = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, kinds))
    found: dict[Path, Kernel] = {}
    weights: dict[Path, Any] = {}
    for place, layer in entries:
        if not isinstance(layer, kinds) or layer.weight is None:
            continue
        path = (*path_of(place), "weight")
        weights[path] = jax.ShapeDtypeStruct(layer.weight.shape, layer.weight.dtype)
        kind = type(layer).__name__
        if isinstance(layer, equinox.nn.Linear):
            sizes = [1 if n == "scalar" else n for n in (layer.out_features, layer.in_features)]
            found[path] = _kernel(path, kind, sizes, out=-2, into=-1)
            continue
        into = layer.in_channels // layer.groups
        shape = (layer.out_channels, into, *layer.kernel_size)
        options: dict[str, Any] = {"dilation": layer.dilation}
        if isinstance(layer, equinox.nn.ConvTranspose):
            options["steps"] = layer.stride
        options |= {"out": -len(shape), "into": 1 - len(shape)}
        options["depthwise"] = layer.groups > 1 and into == 1
        found[path] = _kernel(path, kind, shape, **options)
    return _mask(found, weights, choose, stack_axis)
