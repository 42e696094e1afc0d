"""What becomes of every layer of a network: the rules of the conversion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
from flax import nnx

from mimicnorm_jax.convert.flow import Flow
from mimicnorm_jax.convert.formula import expected_moments
from mimicnorm_jax.convert.graph import Node, Path, Value
from mimicnorm_jax.convert.residual import residual_joins
from mimicnorm_jax.convert.support import kind_of, unsupported
from mimicnorm_jax.convert.trace import LINEAR, NORMS, Traced
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers import LastBN
from mimicnorm_jax.layers.activation import Moments
from mimicnorm_jax.methods.mimicnorm import MIN_FAN_IN, Center

To = Literal["mimicnorm", "weightmean", "lastbn", "nonorm"]


@dataclasses.dataclass(eq=False)
class Layer:
    """A convolution or dense layer, and what becomes of it.

    Attributes:
      path: where it is in the network.
      module: the layer itself.
      nodes: its calls; of a scanned layer one a member.
      fan_in: n, the number of weights of one output channel.
      moments: what theory expects of its input.
      depthwise: whether each output channel sees one input channel.
      before_norm: whether a norm follows, with no layer in between.
      gate: whether all that it does is to decide by what others are multiplied. Its kernel keeps
        its variance: a gate of a squeezed average, which is small, would get weights of ten times
        the usual size.
      curved: whether what it is given is kept in another form: see ``Flow.is_curved``.
      reason: why it stays as it was; None where it does not.
      centered: whether its kernel is to be centred.
      scales: the initial residual scalar of each call; None without.
      needs_bias: whether it takes over the shift of a norm.
      last_bn: ``"each"`` where it makes the logits, ``"mean"`` where its average over places is
        them.
    """

    path: Path
    module: nnx.Module
    nodes: list[Node]
    fan_in: int
    moments: Moments
    depthwise: bool
    before_norm: bool = False
    gate: bool = False
    curved: bool = False
    reason: str | None = None
    centered: bool = False
    scales: list[float] | None = None
    needs_bias: bool = False
    last_bn: Literal["each", "mean"] | None = None


Keep = Literal["input", "depthwise"]
CenterRule = Center | Callable[[Layer], bool]


@dataclasses.dataclass(eq=False)
class Norm:
    """A BatchNorm, and what becomes of it.

    Attributes:
      path: where it is in the network.
      module: the BatchNorm.
      nodes: its calls.
      layers: those that feed it alone, one a call where there is one.
      absorbed: whether it goes altogether: each call is fed by one layer alone.
      reason: why it stays; None where it does not.
      shifts: why it becomes a shift, where it does not go altogether.
    """

    path: Path
    module: nnx.Module
    nodes: list[Node]
    layers: list[Layer] = dataclasses.field(default_factory=list)
    absorbed: bool = False
    reason: str | None = None
    shifts: str = "no layer feeds it alone"


KeepRule = Keep | Callable[[Norm], bool]


@dataclasses.dataclass
class Plan:
    """What becomes of a network.

    Attributes:
      layers: its layers, in the order of the first call.
      norms: its BatchNorms.
      scaled: modules (other than layers) whose output a residual scalar multiplies, with its
        initial value; of a stack one a member.
      notes: what else is to be said, line by line.
    """

    layers: list[Layer]
    norms: list[Norm]
    scaled: dict[Path, list[float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def name(path: Path) -> str:
    """A module's path as it is shown."""
    return "/".join(map(str, path)) or "the network itself"


def make_plan(traced: Traced, *, to: To, center: CenterRule, keep: KeepRule) -> Plan:
    """Applies the rules.

    Args:
      traced: the network.
      to: the method; see ``convert``.
      center: which layers that a norm follows are centred; see ``convert``.
      keep: which norms stay; see ``convert``.

    Raises:
      UserError: an unknown ``to``, ``center`` or ``keep``, no BatchNorm, or no layer that makes the
        logits.
    """
    if to not in get_args(To):
        raise unknown("to", to, get_args(To))
    if not callable(center) and center not in get_args(Center):
        raise unknown("center", center, get_args(Center))
    if not callable(keep) and keep not in get_args(Keep):
        raise unknown("keep", keep, get_args(Keep))
    return _Planner(traced).plan(to, center, keep)


class _Planner:
    def __init__(self, traced: Traced):
        self.traced = traced
        self.flow = Flow(traced)
        self.norms = {
            path: Norm(path, traced.modules[path], nodes)
            for path, nodes in self.flow.calls_of(NORMS).items()
        }
        moments = expected_moments(traced.graph)
        self.layers = {
            path: self._layer(path, nodes, moments)
            for path, nodes in self.flow.calls_of(LINEAR).items()
        }

    def _layer(self, path: Path, nodes: list[Node], moments: dict[Value, Moments]) -> Layer:
        module = self.traced.modules[path]
        assert nodes[0].call is not None
        shape = nodes[0].call.kernel_shape
        groups = getattr(module, "feature_group_count", 1)
        return Layer(
            path,
            module,
            nodes,
            fan_in=math.prod(shape[:-1]),
            moments=moments[nodes[0].inputs[0]],
            depthwise=groups > 1 and shape[-2] == 1,
            reason=unsupported(module, nodes[0].call.ndim),
        )

    def plan(self, to: To, center: CenterRule, keep: KeepRule) -> Plan:
        for path, module in self.traced.modules.items():
            if isinstance(module, LastBN):
                raise UserError(f"the network has a last BN already: {name(path)}")
        if not self.norms:
            raise UserError("the network calls no BatchNorm (nnx.BatchNorm): nothing to convert")
        plan = Plan(list(self.layers.values()), list(self.norms.values()))
        for layer in plan.layers:
            results = [node.outputs[0] for node in layer.nodes]
            layer.before_norm = any(map(self.flow.before_norm, results))
            layer.curved = all(self.flow.is_curved(node.inputs[0]) for node in layer.nodes)
            layer.gate = not layer.before_norm and all(map(self.flow.gates_only, results))
        for norm in plan.norms:
            self._keep(norm, keep)
        if to in ("mimicnorm", "lastbn"):
            self._find_classifiers()
        if to != "nonorm":
            self._place_scalars(plan)
        for layer in plan.layers:
            self._check_roles(layer)
        for norm in plan.norms:
            self._decide(norm, plan)
        if to in ("mimicnorm", "weightmean"):
            for layer in plan.layers:
                layer.centered = self._is_centered(layer, center)
        self._name_unreached(plan)
        self._say_what_is_lost(plan)
        return plan

    def _keep(self, norm: Norm, keep: KeepRule) -> None:
        """Whether a norm stays."""
        feeding = [self._layer_before(norm, node) for node in norm.nodes]
        norm.layers = [layer for layer in feeding if layer is not None]
        if all(self.flow.from_input(node.inputs[0]) for node in norm.nodes):
            norm.reason = "it normalizes the network's input"
        elif callable(keep) and keep(norm):
            norm.reason = "keep says so"
        elif keep == "depthwise" and any(layer.depthwise for layer in norm.layers):
            norm.reason = "behind a depthwise layer"
        if norm.reason:
            self.flow.kept.add(norm.path)

    def _decide(self, norm: Norm, plan: Plan) -> None:
        """What becomes of a norm that does not stay."""
        if norm.reason:
            return
        taken = [layer for layer in norm.layers if not layer.reason]
        norm.absorbed = len(taken) == len(norm.nodes)
        for layer in taken if norm.absorbed else ():
            layer.needs_bias = layer.last_bn is None
        if any(self.flow.written_out(node.inputs[0]) for node in norm.nodes):
            norm.shifts = "what feeds it is no layer of Flax, and stays as it is"
            plan.notes.append(
                f"{name(norm.path)}: a convolution or product that is no layer of Flax feeds it, "
                "and is neither centred nor rescaled: make it an nnx.Conv or nnx.Linear"
            )
        elif not norm.absorbed and len(norm.nodes) == len(norm.layers):
            norm.shifts = "the layer before it stays as it was"

    def _say_what_is_lost(self, plan: Plan) -> None:
        calls = [node.call for norm in plan.norms for node in norm.nodes if node.call]
        has_last_bn = any(layer.last_bn for layer in plan.layers)
        if has_last_bn and any(call.told_mode for call in calls):
            plan.notes.append(
                "the network says use_running_average at the call of its BatchNorms; the last BN "
                "goes by model.train() and model.eval()"
            )
        kept = [name(norm.path) for norm in plan.norms if norm.reason]
        if kept and not has_last_bn:
            plan.notes.append(f"the examples of a batch stay coupled by what stays: {kept[0]}")
        if any(call.masked for call in calls):
            plan.notes.append(
                "the network gives its BatchNorms a mask; no other layer heeds it, nor does the "
                "last BN: what is padded counts"
            )
        for layer in plan.layers:
            if layer.centered and self._sees_input_only(layer):
                plan.notes.append(
                    f"{name(layer.path)}: it is centred, and so blind to a number that is added to "
                    "all of its input, such as brightness; center='fan_in' or a function leaves it"
                )

    def _sees_input_only(self, layer: Layer) -> bool:
        """Whether a layer takes the network's input, with nothing that it could be told by."""
        sides = getattr(layer.module, "padding", "VALID")
        unpadded = sides == "VALID" or not any(jax.tree.leaves(sides))
        return unpadded and all(self.flow.from_input(node.inputs[0]) for node in layer.nodes)

    def _layer_before(self, norm: Norm, node: Node) -> Layer | None:
        """The layer that feeds a norm of its last axis, and nothing else."""
        last = getattr(norm.module, "axis", -1) in (-1, len(node.inputs[0].shape) - 1)
        return self._layer_of(self.flow.fed_by(node)) if last else None

    def _layer_of(self, node: Node | None) -> Layer | None:
        return None if node is None or node.call is None else self.layers[node.call.path]

    def _find_classifiers(self) -> None:
        for logits in self.traced.logits:
            if len(logits.shape) < 2:
                raise UserError(
                    f"logits have shape (B, ..., C), the network returns {logits.shape}; "
                    "to='weightmean' takes any"
                )
            end = self.flow.linear_end(logits)
            layer = None if end is None else self._layer_of(end.layer)
            if end is None or layer is None or layer.reason:
                why = "" if layer is None else f" ({name(layer.path)}: {layer.reason})"
                raise UserError(
                    "no layer was found of which the logits are a linear function"
                    f"{why}: return what a softmax or sigmoid is given; to='weightmean' needs none"
                )
            layer.last_bn = "mean" if end.averaged else "each"

    def _place_scalars(self, plan: Plan) -> None:
        joins, parallel = residual_joins(self.traced.graph, self.flow.is_linear)
        placed: dict[Path, dict[Node, float]] = {}
        for join in joins:
            for branch in join.branches:
                self._place_scalar(plan, join.index**-0.5, branch, placed)
        for path, scales in placed.items():
            layer = self.layers[path]
            if set(scales) == set(layer.nodes):
                layer.scales = [scales[node] for node in layer.nodes]
            else:
                layer.reason = "it ends a residual branch in one call and not in another"
        for node in parallel:
            shape = node.outputs[0].shape
            plan.notes.append(
                f"a sum of equally deep branches {shape} is no residual addition: no scalar"
            )

    def _place_scalar(
        self, plan: Plan, scale: float, branch: Value, placed: dict[Path, dict[Node, float]]
    ) -> None:
        if self.flow.is_kept(branch.node):  # it would take away again what a layer is scaled by
            self._scale_module(plan, scale, branch.node.call.path, branch)  # type: ignore[union-attr]
            return
        end = self.flow.linear_end(branch)
        if end is None and branch.modules:
            self._scale_module(plan, scale, branch.modules[0].path, branch)
            return
        gated = end is None and branch.node is not None and branch.node.name == "mul"
        if gated:
            assert branch.node is not None
            factors = [v for v in branch.node.active_inputs if v.shape == branch.shape]
            ends = (self.flow.linear_end(value, alone=False) for value in factors)
            end = next((end for end in ends if end is not None), None)
        layer = None if end is None else self._layer_of(end.layer)
        if end is None or layer is None or layer.reason:
            kind = "the input" if branch.node is None else branch.node.name
            plan.notes.append(f"no place for the scalar {scale:.3g}: its branch ends in {kind}")
            return
        placed.setdefault(layer.path, {})[end.layer] = scale
        if gated:
            plan.notes.append(
                f"{name(layer.path)}: its scalar also scales what its gate is computed from"
            )

    def _scale_module(self, plan: Plan, scale: float, path: Path, branch: Value) -> None:
        if path not in plan.scaled:
            plan.notes.append(
                f"{name(path)}: a scalar multiplies its output {branch.shape}, which the backward "
                "pass keeps for it"
            )
        plan.scaled.setdefault(path, []).append(scale)

    def _check_roles(self, layer: Layer) -> None:
        """A layer that is called from several places keeps what it has, if these differ."""
        if layer.reason is None and (conflict := self._conflict(layer)):
            layer.reason, layer.last_bn = conflict, None
        if layer.reason:
            layer.scales = None
        elif layer.scales and len(layer.scales) != _members(layer):
            layer.scales = layer.scales[:1]

    def _conflict(self, layer: Layer) -> str | None:
        """What of a layer's calls does not go together."""
        members = _members(layer)
        several = len({node.call.number for node in layer.nodes}) > 1  # type: ignore[union-attr]
        scales = layer.scales or []
        if len(set(scales)) > 1 and (several or len(scales) != members):
            return "one kernel is used in several residual blocks"
        if members == 1 and self._is_recurrent(layer):
            return "it is called on what it made before, as in a recurrent network"
        if several and len({self.flow.before_norm(node.outputs[0]) for node in layer.nodes}) > 1:
            return "it is called several times, and a norm follows some of the calls only"
        if several and layer.last_bn is not None:
            return "it makes the logits, and is called several times"
        return None

    def _is_recurrent(self, layer: Layer) -> bool:
        """Whether a layer feeds itself with no norm of its own in between."""
        if len(layer.nodes) == 1 or not self.flow.is_recurrent(layer.nodes):
            return False
        return not any(
            self._layer_before(norm, node) is layer
            for norm in self.norms.values()
            for node in norm.nodes
        )

    def _is_centered(self, layer: Layer, center: CenterRule) -> bool:
        if layer.reason or layer.fan_in < 2:
            return False
        if callable(center):
            return bool(center(layer))
        if not layer.before_norm or layer.depthwise:
            return False
        return center == "not_depthwise" or layer.fan_in > MIN_FAN_IN

    def _name_unreached(self, plan: Plan) -> None:
        reached = {*self.layers, *self.norms}
        for path, module in self.traced.modules.items():
            is_norm = isinstance(module, NORMS) or getattr(module, "is_norm", False)
            if is_norm and type(module) not in NORMS:
                kind = kind_of(module)
                plan.notes.append(f"{name(path)}: {kind} may do more than BatchNorm, it stays")
            elif isinstance(module, (*NORMS, *LINEAR)) and path not in reached:
                plan.notes.append(
                    f"{name(path)}: nothing that the network is given reaches it, left as it was"
                )


def _members(layer: Layer) -> int:
    """How many kernels are stacked in a layer."""
    call = layer.nodes[0].call
    assert call is not None
    kernel = layer.module.kernel  # type: ignore[attr-defined]
    return math.prod(kernel.shape) // math.prod(call.kernel_shape)
