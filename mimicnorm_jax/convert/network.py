"""``convert``: MimicNorm in the place of the BatchNorms of any network."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from mimicnorm_jax.convert.build import Built, build, rescale, stack_of
from mimicnorm_jax.convert.derivatives import twice_differentiable
from mimicnorm_jax.convert.graph import Path
from mimicnorm_jax.convert.lean import make_lean
from mimicnorm_jax.convert.linen import linen_module
from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.convert.measured import Measurement, Meter
from mimicnorm_jax.convert.memory import training_memory
from mimicnorm_jax.convert.plan import CenterRule, KeepRule, Layer, Plan, To, make_plan, name
from mimicnorm_jax.convert.report import LayerReport, Memory, Report, farthest_from_one
from mimicnorm_jax.convert.support import kind_of
from mimicnorm_jax.convert.trace import Arguments, Traced, trace
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers.activation import stable_variance_of
from mimicnorm_jax.layers.convolution import Differentiable

Variance = Literal["measured", "formula"]


_UNUSUAL = (
    20.0  # of the root mean square of images: pixels from 0 to 255 are above, normalized ones not
)


class Conversion(NamedTuple):
    """What ``convert`` returns: ``network, report = convert(...)``.

    Attributes:
      network: the converted copy, of the class of the network that was given; of a network of
        ``flax.linen`` a ``LinenNetwork``, which has its ``init`` and ``apply``.
      report: what was done to each layer.
    """

    network: Any
    report: Report


def convert(
    model: nnx.Module | linen.Module,
    *args: Any,
    logits: Callable[[Any], Any] | None = None,
    center: CenterRule = "not_depthwise",
    keep: KeepRule = "input",
    variance: Variance = "measured",
    to: To = "mimicnorm",
    axis_name: str | None = None,
    lean: bool = True,
    differentiable: Differentiable = "once",
    memory: bool = False,
    **kwargs: Any,
) -> Conversion:
    """Puts MimicNorm in the place of the BatchNorms of a network.

    Which layer feeds which is read from the program that ``model(*args)`` is, not from the names
    of attributes. ``docs/convert.md`` has the rules.

    Example::

      model, report = convert(model, images)
      print(report)

    Args:
      model: a network with ``nnx.BatchNorm``, called as ``model(*args, **kwargs)``. It is left as
        it was. Or a ``flax.linen.Module``: see ``LinenNetwork``.
      *args: a batch, or what else the network takes; some tens of examples of the training data,
        normalized as in training, are good. With ``variance="formula"`` shapes are enough
        (``jax.ShapeDtypeStruct``).
      logits: chooses the logits among the network's outputs, such as ``lambda outputs:
        outputs[0]``; of several heads each gets a last BN. None where there is one output.
      center: which of the layers that a BatchNorm follows are centred: ``"not_depthwise"`` all but
        the depthwise ones; ``"fan_in"`` those with a fan-in above 50; or a function that is
        given each layer (``mimicnorm_jax.convert.Layer``), also those without a BatchNorm.
      keep: which BatchNorms stay: ``"input"`` those that normalize the network's own input;
        ``"depthwise"`` those behind depthwise layers too, without which MobileNets lose accuracy
        at high rates; or a function that is given each (``mimicnorm_jax.convert.Norm``) and
        chooses from the others.
      variance: of the initial weights. ``"measured"``: each kernel, in the order of the data, is
        divided by the root of the second moment of what it puts out on ``args`` (Mishkin and Matas
        2016, "All you need is a good init"). ``"formula"``: what theory gives for the activation
        before the layer, see ``mimicnorm_jax.layers.activation.stable_variance_of``.
      to: ``"mimicnorm"``; ``"weightmean"`` without last BN, where examples may not be coupled;
        ``"lastbn"`` without weight mean; ``"nonorm"`` with neither and without residual scalars.
      axis_name: mapped axis over which the last BN averages its statistics; by default that of the
        network's BatchNorms.
      lean: let the network compute ``nnx.relu`` and ``nnx.max_pool`` by those of this package where
        that saves memory in training. Outputs and gradients stay the same; a call that is not
        compiled (``nnx.jit``) traces the network each time.
      differentiable: ``"twice"``: with derivatives of any order and mode, see
        ``twice_differentiable``; it is not lean then. That also serves ``flax.linen``.
      memory: compile a training step of both networks for this machine and these arguments, and
        report the memory that it needs.
      **kwargs: what else the network is called with.

    Returns:
      The converted network, in the mode (training or evaluation) of the given one, and the report.
      Kernels are those of ``model``, centred and rescaled; biases that a BatchNorm subtracted, and
      what it had learned, are gone (with a warning, where it had). Its derivative is that of
      reverse mode, unless ``differentiable="twice"``.

    Raises:
      UserError: a network without BatchNorm, one with several outputs of which none is chosen,
        logits that no layer makes, arguments that do not fit, or an unknown option.
    """
    if variance not in get_args(Variance):
        raise unknown("variance", variance, get_args(Variance))
    if differentiable not in get_args(Differentiable):
        raise unknown("differentiable", differentiable, get_args(Differentiable))
    given = Arguments(args, kwargs)
    if not isinstance(model, nnx.Module | linen.Module):
        raise UserError(
            f"convert takes an nnx.Module or a linen.Module, got {type(model).__name__}"
        )
    original: Any = linen_module(model, given) if isinstance(model, linen.Module) else model
    network, report = _convert(original, given, logits, center, keep, variance, to, axis_name)
    if differentiable == "twice":
        network, lean = twice_differentiable(network), False
    if lean:
        make_lean(network)
    if memory:
        before, after = (training_memory(one, given, logits) for one in (original, network))
        report = dataclasses.replace(report, memory=Memory(before, after))
    if isinstance(model, linen.Module):
        return Conversion(LinenNetwork(model, original, network, report, lean=lean), report)
    return Conversion(network, report)


def _convert(
    model: Any,
    given: Arguments,
    logits: Callable[[Any], Any] | None,
    center: CenterRule,
    keep: KeepRule,
    variance: Variance,
    to: To,
    axis_name: str | None,
) -> Conversion:
    if logits is None and to in ("weightmean", "nonorm"):
        logits = _all_outputs
    traced = trace(model, given, logits)
    plan = make_plan(traced, to=to, center=center, keep=keep)
    _warn_of_what_was_learned(plan)
    _warn_of_single_outputs(plan, traced)
    axes = {getattr(norm.module, "axis_name", None) for norm in plan.norms}
    if axis_name is None and len(axes) == 1:
        (axis_name,) = axes
    built = build(model, plan, axis_name=axis_name)
    if given.are_shapes and variance == "measured":
        raise UserError("variance='measured' needs arrays; variance='formula' takes shapes")
    if variance == "formula":
        _use_formula(built, plan, plan.layers)
    before: dict[Path, Measurement] = {}
    after: dict[Path, Measurement] = {}
    if not given.are_shapes:
        before, after = _measure(built, plan, given, divide=variance == "measured")
    return Conversion(built.network, _report(plan, built, to, before, after))


def _all_outputs(outputs: Any) -> Any:
    """None of which gets a last BN."""
    return outputs


def _measure(
    built: Built, plan: Plan, given: Arguments, *, divide: bool
) -> tuple[dict[Path, Measurement], dict[Path, Measurement]]:
    """Measures second moments before (if they are asked for) and after kernels are divided."""
    layers = {
        layer.path: (built.layers[layer.path], stack_of(layer))
        for layer in plan.layers
        if hasattr(layer.module, "kernel")
    }
    meter = Meter(built.network, layers, given)
    if not divide:
        return {}, meter.measure()
    _check_arguments(given, plan)
    measurable = frozenset(layers) - {layer.path for layer in plan.layers if layer.gate}
    before = meter.measure(divided=measurable)
    lost = _divide(built, plan, before)
    if lost:  # what follows them was measured with other kernels
        again = meter.measure(divided=measurable - lost)
        _divide(built, plan, {path: again[path] for path in measurable - lost})
    return before, meter.measure()


def _warn_of_what_was_learned(plan: Plan) -> None:
    gone = [norm for norm in plan.norms if not norm.reason]
    learned = [name(norm.path) for norm in gone if _has_learned(norm.module)]
    if learned:
        warnings.warn(
            f"{len(learned)} BatchNorms have a scale other than 1 or a shift other than 0, learned "
            f"or from an initializer, which are dropped with their statistics: "
            f"{', '.join(learned[:3])}" + (" …" if len(learned) > 3 else ""),
            stacklevel=4,
        )


def _warn_of_single_outputs(plan: Plan, traced: Traced) -> None:
    single = any(logits.shape[-1] == 1 for logits in traced.logits)
    if single and any(layer.last_bn for layer in plan.layers):
        warnings.warn(
            "the last BN gives a single output the mean 0 and the variance 1 in each batch: for "
            "regression, or one logit for two classes, use to='weightmean'",
            stacklevel=4,
        )


def _check_arguments(given: Arguments, plan: Plan) -> None:
    """Whether they are what kernels can be measured on."""
    for array in given.arrays:
        if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.uint8):
            continue
        size = float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))
        if not math.isfinite(size):
            raise UserError("the arguments hold numbers that are not finite")
        if size > _UNUSUAL and array.ndim > 2:
            plan.notes.append(
                f"the arguments have a root mean square of {size:.3g}, and kernels are measured on "
                "them: give images as they are normalized in training"
            )


def _has_learned(norm: Any) -> bool:
    return any(
        parameter is not None and bool(jnp.any(parameter[...] != initial))
        for parameter, initial in ((norm.scale, 1), (norm.bias, 0))
    )


def _use_formula(built: Built, plan: Plan, layers: Iterable[Layer]) -> None:
    """Gives kernels the variance of theory."""
    for layer in layers:
        if layer.reason or layer.gate:
            continue
        module = built.layers[layer.path]
        kernel = np.asarray(module.kernel[...], np.float64)
        stack = stack_of(layer)
        flat = kernel.reshape(*stack, -1)
        if not layer.centered:
            flat = flat - flat.mean(axis=-1, keepdims=True)
        square = np.mean(np.square(flat), axis=-1)
        try:
            target = stable_variance_of(layer.moments, layer.fan_in, centered=layer.centered)
        except ValueError:
            plan.notes.append(f"{name(layer.path)}: no variance by the formula, left as it was")
            continue
        if layer.centered:
            target *= (layer.fan_in - 1) / layer.fan_in  # what centring leaves (Lemma 1)
        if not np.all(square > 0):
            plan.notes.append(f"{name(layer.path)}: a constant kernel cannot be rescaled")
            continue
        rescale(module, np.sqrt(target / square))


def _divide(built: Built, plan: Plan, measured: dict[Path, Measurement]) -> frozenset[Path]:
    """Gives kernels the variance by which their output has a second moment of 1.

    Returns:
      The layers of which it is not known, and which have the variance of the formula.
    """
    lost: set[Path] = set()
    for layer in plan.layers:
        if layer.gate or layer.path not in measured:
            continue
        factor = np.asarray(measured[layer.path].factor)
        if np.all(factor > 0) and np.all(np.isfinite(factor)):
            rescale(built.layers[layer.path], factor)
            continue
        why = "was not measured" if np.isnan(factor).any() else "puts out nothing on the arguments"
        plan.notes.append(f"{name(layer.path)}: it {why}, and has the variance of the formula")
        _use_formula(built, plan, [layer])
        lost.add(layer.path)
    return frozenset(lost)


def _report(
    plan: Plan,
    built: Built,
    to: str,
    before: dict[Path, Measurement],
    after: dict[Path, Measurement],
) -> Report:
    rows: list[tuple[int, LayerReport]] = []
    for layer in plan.layers:
        kernel = np.asarray(built.layers[layer.path].kernel[...], np.float64)
        scales = layer.scales
        row = LayerReport(
            path=name(layer.path),
            became=_became(layer),
            centered=layer.centered,
            fan_in=layer.fan_in,
            scale=None if not scales else scales[0] if len(scales) == 1 else tuple(scales),
            variance=float(np.var(kernel)),
            second_moment_before=_moment(before, layer.path),
            second_moment=_moment(after, layer.path),
        )
        rows.append((layer.nodes[0].order, row))
    for path, values in plan.scaled.items():
        scale = values[0] if len(values) == 1 else tuple(values)
        became = "ends a residual branch: a scalar multiplies what it returns"
        order = max(node.order for layer in plan.layers for node in layer.nodes)
        inner = [
            n.order for layer in plan.layers if layer.path[: len(path)] == path for n in layer.nodes
        ]
        rows.append((max(inner, default=order), LayerReport(name(path), became, scale=scale)))
    for norm in plan.norms:
        became = "removed" if norm.absorbed else f"a shift: {norm.shifts}"
        became = f"stays: {norm.reason}" if norm.reason else became
        rows.append((norm.nodes[0].order, LayerReport(name(norm.path), became)))
    rows.sort(key=lambda row: row[0])
    return Report(to, tuple(row for _, row in rows), tuple(plan.notes))


def _moment(measured: dict[Path, Measurement], path: Path) -> float | None:
    return farthest_from_one(measured[path].moment) if path in measured else None


def _became(layer: Layer) -> str:
    """What was done to a layer, and why."""
    if layer.reason:
        return f"stays {kind_of(layer.module)}: {layer.reason}"
    if layer.centered:
        said = ["centred"]
    elif layer.depthwise:
        said = ["not centred: depthwise"]
    elif layer.last_bn:
        said = ["not centred: makes the logits"]
    elif layer.gate:
        said = ["as it was: computes a gate"]
    elif not layer.before_norm:
        said = ["not centred: no BatchNorm behind it"]
    else:
        said = ["not centred"]
    if layer.scales:
        said.append("ends a residual branch")
    if layer.last_bn:
        said.append("no bias, last BN" + (" of the average" if layer.last_bn == "mean" else ""))
    elif layer.needs_bias:
        said.append("bias")
    return ", ".join(said)
