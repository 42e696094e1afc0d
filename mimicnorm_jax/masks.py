"""The kernels of networks of Linen, Haiku and Equinox, for ``project_weight_mean``.

Where the weights of an output channel are in a kernel is told by the layer that owns it: a
convolution's is HWIO in Linen and Haiku, and OIHW in Equinox; a transposed one's is HWOI in
Haiku; and a scan, ``vmap`` or stack of layers adds axes before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen

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
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    window: int
    fan_in: int
    depthwise: bool
    centering: Centering


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
    return Kernel(path, kind, tuple(shape), len(window), fan_in, depthwise, centering)


def _mask(found: dict[Path, Kernel], shapes: dict[Path, tuple[int, ...]], choose: Choose) -> Any:
    chosen = {}
    for path, kernel in found.items():
        if not choose(kernel):
            continue
        if kernel.fan_in < 2:
            raise UserError(
                f"{'/'.join(path)} has outputs with a fan-in of {kernel.fan_in}: centring leaves "
                "nothing of a single weight; choose= must leave it out"
            )
        chosen[path] = of_stack(kernel.centering, kernel.shape, shapes[path])
    if not chosen:
        raise UserError(
            "no kernel is chosen; the network has "
            + (", ".join("/".join(path) for path in found) or "no layer that is known")
        )
    return WeightMeanMask(chosen)


def _shapes(params: Any) -> dict[Path, tuple[int, ...]]:
    return {
        path_of(path): tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(linen.meta.unbox(params))
    }


def _refuse_mask(path: Path, mask: Any) -> None:
    if mask is not None:
        raise UserError(f"{'/'.join(path)}: a kernel with a mask has no projected weight mean")


def linen_mask(
    module: linen.Module, *args: Any, choose: Choose = convolutions, **kwargs: Any
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
        kernel = _kernel(path, type(layer).__name__, shape, **options)
        if choose(kernel):
            _refuse_mask(path, getattr(layer, "mask", None))
        found[path] = kernel
        return result

    with linen.intercept_methods(watch):
        variables = jax.eval_shape(
            lambda key, *args: module.init(key, *args, **kwargs), jax.random.key(0), *args
        )
    return _mask(found, _shapes(variables.get("params", {})), choose)


def haiku_mask(
    transformed: Any, *args: Any, choose: Choose = convolutions, **kwargs: Any
) -> WeightMeanMask:
    """The mask of a Haiku network's parameters; needs ``dm-haiku``.

    Args:
      transformed: what ``haiku.transform`` or ``transform_with_state`` returned; its
        convolutions, also transposed ones, and ``Linear`` are found, also in
        ``haiku.layer_stack``.
      *args, **kwargs, choose: as for ``linen_mask``.

    Raises:
      UserError: as ``linen_mask``.
    """
    import haiku

    seen: list[tuple[str, Kernel]] = []
    depthwise = (haiku.DepthwiseConv1D, haiku.DepthwiseConv2D, haiku.DepthwiseConv3D)
    kinds = (haiku.ConvND, haiku.ConvNDTranspose, haiku.Linear, *depthwise)

    def watch(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = proceed(*args, **kwargs)
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, kinds):
            return result
        place = (layer.module_name, "w")
        shape = layer.params_dict()["/".join(place)].shape
        options: dict[str, Any] = {}
        if isinstance(layer, haiku.ConvNDTranspose):
            options = {"out": -2, "into": -1, "steps": layer.stride}
        elif not isinstance(layer, haiku.Linear):
            groups = getattr(layer, "feature_group_count", 2)
            options["depthwise"] = groups > 1 and shape[-2] == 1
        kernel = _kernel(place, type(layer).__name__, shape, **options)
        if choose(kernel):
            _refuse_mask(place, getattr(layer, "mask", None))
        seen.append((layer.module_name, kernel))
        return result

    with haiku.intercept_methods(watch):
        made = jax.eval_shape(
            lambda key, *args: transformed.init(key, *args, **kwargs), jax.random.key(0), *args
        )
    params = made[0] if isinstance(made, tuple) else made
    shapes = _shapes(params)
    found = {}
    for path, shape in shapes.items():
        if path[-1] == "w" and (kernel := _owner(path, shape, seen)) is not None:
            found[path] = dataclasses.replace(kernel, path=path)
    return _mask(found, shapes, choose)


def _owner(path: Path, shape: tuple[int, ...], seen: list[tuple[str, Kernel]]) -> Kernel | None:
    """The layer whose parameter it is; in a ``layer_stack`` layers have the end of its name."""
    fitting: dict[str, Kernel] = {}
    for name, kernel in seen:
        is_own = path[0] == name and shape == kernel.shape
        in_stack = path[0].endswith("/" + name) and len(shape) > len(kernel.shape)
        if is_own or in_stack:
            try:
                of_stack(kernel.centering, kernel.shape, shape)
            except ValueError:
                continue
            fitting[name] = kernel
    return fitting[max(fitting, key=len)] if fitting else None


def equinox_mask(model: Any, *, choose: Choose = convolutions) -> WeightMeanMask:
    """The mask of an Equinox model, or of ``equinox.filter`` of it; needs ``equinox``.

    Args:
      model: its ``Conv``, ``ConvTranspose`` and ``Linear`` are found at any depth, also where
        ``equinox.filter_vmap`` stacked them, each kernel of a stack by itself.
      choose: as for ``linen_mask``.

    Raises:
      UserError: as ``linen_mask``.
    """
    import equinox

    kinds = (equinox.nn.Conv, equinox.nn.ConvTranspose, equinox.nn.Linear)
    entries = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, kinds))
    found: dict[Path, Kernel] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    for place, layer in entries:
        if not isinstance(layer, kinds) or layer.weight is None:
            continue
        path = (*path_of(place), "weight")
        shapes[path] = tuple(layer.weight.shape)
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
    return _mask(found, shapes, choose)
