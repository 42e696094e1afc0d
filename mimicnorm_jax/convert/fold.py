"""``fold``: the plain network for inference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from mimicnorm_jax.convert.derivatives import use_plain_functions
from mimicnorm_jax.convert.flow import Flow
from mimicnorm_jax.convert.graph import Path
from mimicnorm_jax.convert.layers import NormalizedLogits, Scaled, ScaleShift, Shift, passed_on
from mimicnorm_jax.convert.lean import undo_lean
from mimicnorm_jax.convert.linen import linen_module
from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.convert.plan import name
from mimicnorm_jax.convert.report import INFERENCE, LayerReport, Report
from mimicnorm_jax.convert.substitute import copied, substitute
from mimicnorm_jax.convert.trace import LINEAR, NORMS, Arguments, is_of, trace
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import Dropout, LastBN, ScaledConv, ScaledConvTranspose, ScaledDense
from mimicnorm_jax.layers.kernel import at_least_float32
from mimicnorm_jax.layers.remat import Runner, run
from mimicnorm_jax.methods.base import Upcast
from mimicnorm_jax.methods.fixup import FixupConv, FixupDense


class Folded(NamedTuple):
    """What ``fold`` returns: ``network, report = fold(...)``.

    Attributes:
      network: the plain copy, in evaluation mode.
      report: what became of each layer.
    """

    network: nnx.Module
    report: Report


def fold(model: nnx.Module | linen.Module | LinenNetwork, *args: Any, **kwargs: Any) -> Folded:
    """The same function as plain layers, for inference.

    Layers of this package become ``nnx.Conv`` and ``nnx.Linear``, with their kernels centred and
    scaled. BatchNorms and last BNs, with their running statistics, go into the layer before them,
    where that feeds nothing else; otherwise they stay as a scale and a shift per channel. Nothing
    is left with a derivative of its own, and nothing that depends on the platform.

    Example::

      plain, report = fold(model, images)

    Args:
      model: a trained network: converted, of ``create_model``, or with ``nnx.BatchNorm``. It is
        left as it was. Of ``flax.linen``, a network or what it was converted to: then ``args``
        begin with its variables, and the plain network, an ``nnx.Module``, is called with the rest.
      *args, **kwargs: what it is called with; shapes (``jax.ShapeDtypeStruct``) are enough. From
        them it is read which layer feeds which BatchNorm. A converted network needs none.

    Returns:
      The plain network and the report.

    Raises:
      UserError: the network cannot be called with ``args``.
    """
    given: Any = model
    if not isinstance(given, nnx.Module | linen.Module | LinenNetwork):
        kind = type(given).__name__
        raise UserError(f"fold takes a network, got {kind}; convert returns a network and a report")
    if isinstance(model, linen.Module | LinenNetwork):
        if not args or not isinstance(args[0], Mapping):
            raise UserError("of flax.linen variables come first: fold(model, variables, images)")
        variables, args = args[0], args[1:]
        if isinstance(model, LinenNetwork):
            model = model.bind(variables)
        else:
            model = linen_module(model, Arguments(args, kwargs), variables)
    return _Folder(model, Arguments(args, kwargs)).fold()


class _Folder:
    """One folding.

    ``made`` has what takes the place of a module, by the path of that; ``became`` what is said.
    """

    def __init__(self, model: nnx.Module, given: Arguments):
        self.network = copied(model)
        undo_lean(self.network)
        self.network.eval()
        self.modules: dict[Path, Any] = dict(nnx.iter_modules(self.network))
        self.flow = None
        if given.arrays:
            self.flow = Flow(trace(self.network, given, lambda outputs: outputs))
        self.made: dict[Path, Any] = {}
        self.became: dict[Path, str] = {}

    def fold(self) -> Folded:
        for path, module in self.modules.items():
            self._make_plain(path, module)
        norms = [path for path, m in self.modules.items() if is_of(m, (*NORMS, LastBN))]
        for path in norms:
            if path not in self.made:
                self._fold_norm(path)
        substitute(self.network, {id(self.modules[path]): new for path, new in self.made.items()})
        _use_plain_functions(self.network)
        lines = [LayerReport(name(path), said) for path, said in self.became.items()]
        return Folded(self.network, Report(INFERENCE, tuple(lines), ()))

    def _keep(self, path: Path, new: Any, said: str) -> None:
        self.made[path] = new
        self.became[path] = said

    def _make_plain(self, path: Path, module: Any) -> None:
        if isinstance(module, ScaledConv | ScaledConvTranspose | ScaledDense):
            new = _plain_layer(module)
            self._keep(path, new, f"{type(module).__name__}, now nnx.{type(new).__name__}")
        elif isinstance(module, NormalizedLogits):
            layer = self.made.get((*path, "layer"), module.layer)
            _absorb(layer, *scale_and_shift(module.last_bn))
            self._keep(path, layer, "the last BN is in it now")
            self.made[(*path, "last_bn")] = module.last_bn  # done
        elif isinstance(module, FixupConv):
            conv = self.made[(*path, "conv")]
            self._keep(path, *_fixup_conv(module, conv))
        elif isinstance(module, FixupDense):
            dense: Any = module.dense
            shift = module.bias_in[...] * dense.kernel[...].sum(axis=0)
            dense.bias[...] = dense.bias[...] + shift
            self._keep(path, dense, "its bias before is in its bias behind")
        elif isinstance(module, Scaled):
            inner = self.made.get((*path, "module"), module.module)
            scale = module.scale[...]
            channels = nnx.Sequential(inner, ScaleShift(scale[..., None], 0 * scale[..., None]))
            self._keep(path, channels, "its scalar stays, as a scale of all channels")
        elif isinstance(module, Upcast):
            cast = functools.partial(jax.lax.convert_element_type, new_dtype=module.dtype)
            self.made[path] = nnx.Sequential(cast)
        elif isinstance(module, Dropout):
            self.made[path] = nnx.Sequential(passed_on)
        elif isinstance(module, Shift):
            self.became[path] = "stays: a shift"

    def _fold_norm(self, path: Path) -> None:
        norm = self.modules[path]
        scale, shift = scale_and_shift(norm)
        layer = self._layer_before(path)
        if layer is None:
            new = ScaleShift(
                *(jnp.asarray(v, at_least_float32(norm.mean[...].dtype)) for v in (scale, shift)),
                axis=_axis(norm),
            )
            said = "stays as a scale and a shift: no layer feeds it alone"
            self._keep(path, new, said if self.flow else "a scale and a shift: no arguments given")
            return
        place, factor = layer
        target = self.made.get(place, self.modules[place])
        _absorb(target, scale, shift, factor=factor)
        self._keep(path, nnx.Sequential(passed_on), f"now in {name(place)}")

    def _layer_before(self, path: Path) -> tuple[Path, float] | None:
        """The layer that takes up a norm, and by what the network multiplies in between."""
        if self.flow is None:
            return None
        norm = self.modules[path]
        nodes = self.flow.calls_of((*NORMS, LastBN)).get(path, [])
        ends = [self.flow.channels_of(node.inputs[0]) for node in nodes]
        if not ends or any(end is None or not np.isfinite(end.factor) for end in ends):
            return None
        places = {end.layer.call.path for end in ends if end is not None and end.layer.call}
        if len(places) != 1 or _axis(norm) not in (-1, len(nodes[0].inputs[0].shape) - 1):
            return None
        (place,) = places
        if {end.layer for end in ends if end is not None} != set(self.flow.calls_of(LINEAR)[place]):
            return None  # it also feeds something else
        target = self.made.get(place, self.modules[place])
        if type(target) not in (nnx.Conv, nnx.Linear):  # a subclass may do more with its kernel
            return None
        assert ends[0] is not None
        return place, ends[0].factor


def _axis(norm: Any) -> int:
    return int(getattr(norm, "axis", -1))


def scale_and_shift(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """A BatchNorm in evaluation, a module or its arrays, as ``x * scale + shift``, in float64."""

    def wide(parameter: Any, usual: float) -> Any:
        return usual if parameter is None else np.asarray(parameter[...], np.float64)

    deviation = np.sqrt(wide(norm.var, 1.0) + norm.epsilon)
    scale = wide(getattr(norm, "scale", None), 1.0) / deviation
    return scale, wide(getattr(norm, "bias", None), 0.0) - wide(norm.mean, 0.0) * scale


def _absorb(layer: Any, scale: np.ndarray, shift: np.ndarray, *, factor: float = 1.0) -> None:
    """Lets a layer, whose output is multiplied by ``factor``, do what ``y * scale + shift`` did."""
    kernel = layer.kernel[...]
    stacked = scale.reshape(*scale.shape[:-1], *(1,) * (kernel.ndim - scale.ndim), scale.shape[-1])
    layer.kernel[...] = jnp.asarray(np.asarray(kernel, np.float64) * stacked, kernel.dtype)
    old = 0.0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    bias = jnp.asarray(old * scale + shift / factor, kernel.dtype)
    if layer.bias is None:
        layer.bias = nnx.Param(bias)
        layer.use_bias = True
    else:
        layer.bias[...] = bias


def _of_members(module: Any, stack: int, compute: Callable[[Any], Any]) -> Any:
    """``compute(module)``, of a stack for each of its members."""
    graphdef, state = nnx.split(module)

    def one(state: Any) -> Any:
        return compute(nnx.merge(graphdef, state))

    for _ in range(stack):
        one = jax.vmap(one)
    return one(state)


def _plain_layer(module: Any) -> Any:
    """The layer of Flax that computes the same."""
    stack = module.kernel[...].ndim - len(module.kernel_shape)
    kernel = _of_members(module, stack, lambda layer: layer.effective_kernel())
    bias = None
    if module.bias is not None:
        bias = _of_members(module, stack, lambda layer: layer.effective_bias())
    shared: dict[str, Any] = {
        "use_bias": bias is not None,
        "dtype": module.dtype,
        "precision": module.precision,
        "preferred_element_type": module.preferred_element_type,
        "param_dtype": kernel.dtype,
        "kernel_init": nnx.initializers.zeros_init(),
        "rngs": nnx.Rngs(0),
    }
    features = module.in_features, module.out_features
    if isinstance(module, ScaledDense):
        plain: Any = nnx.Linear(*features, **shared)
    elif isinstance(module, ScaledConvTranspose):
        plain = nnx.ConvTranspose(
            *features,
            module.kernel_size,
            module.strides,
            padding=module.padding,
            kernel_dilation=module.kernel_dilation,
            transpose_kernel=module.transpose_kernel,
            **shared,
        )
    else:
        plain = nnx.Conv(
            *features,
            module.kernel_size,
            module.strides,
            padding=module.padding,
            input_dilation=module.input_dilation,
            kernel_dilation=module.kernel_dilation,
            feature_group_count=module.feature_group_count,
            **shared,
        )
    plain.kernel = nnx.Param(kernel)
    if bias is not None:
        plain.bias = nnx.Param(bias)
    return plain


def _fixup_conv(module: Any, conv: Any) -> tuple[Any, str]:
    """Fixup's scalar biases, before and behind its convolution."""
    features = conv.kernel[...].shape[-1]
    shift = (
        np.zeros(features) if module.bias_out is None else np.full(features, module.bias_out[...])
    )
    before, said = None, "its biases are in its convolution"
    if module.bias_in is not None:
        if _is_padded(conv):
            # the zeros around the image come after the offset
            before = Shift(jnp.full(conv.in_features, module.bias_in[...]))
            said = "its bias before the padding stays: a shift"
        else:
            axes = tuple(range(conv.kernel[...].ndim - 1))
            shift = shift + np.asarray(conv.kernel[...].sum(axes) * module.bias_in[...])
    _absorb(conv, np.ones(features), shift)
    return (conv if before is None else nnx.Sequential(before, conv)), said


def _is_padded(conv: nnx.Conv) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding != "VALID" and any(size > 1 for size in conv.kernel_size)
    return any(side for pair in conv.padding for side in pair)  # type: ignore[union-attr]


def _run_once(block: Callable[[Any], Any], x: Any) -> Any:
    return run(block, x, "none")


def _use_plain_functions(network: nnx.Module) -> None:
    """Leaves nothing of this package where Flax and JAX have their own."""
    use_plain_functions(network)
    for _, module in nnx.iter_modules(network):
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Runner):
                setattr(module, attribute, _run_once)
