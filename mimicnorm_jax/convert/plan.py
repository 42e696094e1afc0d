"""What becomes of every layer of a network: the rules of the conversion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from flax import nnx

from mimicnorm_jax.convert.formula import expected_moments
from mimicnorm_jax.convert.graph import SHAPES, SUMS, Node, Path, Value, is_affine
from mimicnorm_jax.convert.residual import Join, residual_joins
from mimicnorm_jax.convert.support import unsupported
from mimicnorm_jax.convert.trace import LINEAR, NORMS, Traced
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers import LastBN
from mimicnorm_jax.methods.mimicnorm import MIN_FAN_IN, Center
from mimicnorm_jax.theory.activation import Moments

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
    reason: str | None = None
    centered: bool = False
    scales: list[float] | None = None
    needs_bias: bool = False
    last_bn: Literal["each", "mean"] | None = None


CenterRule = Center | Callable[[Layer], bool]


@dataclasses.dataclass(eq=False)
class Norm:
    """A BatchNorm, and what becomes of it.

    Attributes:
      path: where it is in the network.
      module: the BatchNorm.
      nodes: its calls.
      absorbed: whether it goes altogether: each call is fed by one layer alone.
    """

    path: Path
    module: nnx.Module
    nodes: list[Node]
    absorbed: bool = False


@dataclasses.dataclass
class Plan:
    """What becomes of a network.

    Attributes:
      layers: its layers, in the order of the first call.
      norms: its BatchNorms.
      scaled: modules (other than layers) whose output a residual scalar multiplies, with its
        initial value; of a stack one a member.
      notes: what else is to be said, line by line.
      joins: the residual additions.
    """

    layers: list[Layer]
    norms: list[Norm]
    scaled: dict[Path, list[float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    joins: list[Join] = dataclasses.field(default_factory=list)


def name(path: Path) -> str:
    """A module's path as it is shown."""
    return "/".join(map(str, path)) or "the network itself"


def make_plan(traced: Traced, *, to: To, center: CenterRule) -> Plan:
    """Applies the rules.

    Args:
      traced: the network.
      to: the method; see ``convert``.
      center: which layers that a norm follows are centred; see ``convert``.

    Raises:
      UserError: an unknown ``to`` or ``center``, no BatchNorm, or no layer that makes the logits.
    """
    if to not in get_args(To):
        raise unknown("to", to, get_args(To))
    if not callable(center) and center not in get_args(Center):
        raise unknown("center", center, get_args(Center))
    return _Planner(traced).plan(to, center)


class _Planner:
    def __init__(self, traced: Traced):
        self.traced = traced
        self.graph = traced.graph
        calls: dict[Path, list[Node]] = {}
        for node in self.graph.nodes:
            if node.call is not None:
                calls.setdefault(node.call.path, []).append(node)
        self.norms = {
            path: Norm(path, traced.modules[path], nodes)
            for path, nodes in calls.items()
            if isinstance(traced.modules[path], NORMS)
        }
        moments = expected_moments(self.graph)
        self.layers = {
            path: self._layer(path, nodes, moments)
            for path, nodes in calls.items()
            if isinstance(traced.modules[path], LINEAR)
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

    def plan(self, to: To, center: CenterRule) -> Plan:
        present = [m for m in self.traced.modules.values() if isinstance(m, NORMS)]
        if not present:
            raise UserError("the network has no BatchNorm (nnx.BatchNorm) to convert")
        plan = Plan(list(self.layers.values()), list(self.norms.values()))
        for layer in plan.layers:
            behind = {self._before_norm(node.outputs[0]) for node in layer.nodes}
            layer.before_norm = True in behind
        if to in ("mimicnorm", "lastbn"):
            self._find_classifiers()
        if to != "nonorm":
            self._place_scalars(plan)
        for layer in plan.layers:
            self._check_roles(layer)
        for norm in plan.norms:
            feeding = [self._fed_by(node) for node in norm.nodes]
            norm.absorbed = all(layer is not None for layer in feeding)
            for layer in feeding if norm.absorbed else ():
                assert layer is not None
                layer.needs_bias = layer.last_bn is None
        if to in ("mimicnorm", "weightmean"):
            for layer in plan.layers:
                layer.centered = self._is_centered(layer, center)
        self._name_unreached(plan)
        return plan

    def _is_linear(self, node: Node) -> bool:
        """Whether a node is a layer, or a layer that is written out."""
        if node.call is not None:
            return node.call.path in self.layers
        return node.name in ("conv_general_dilated", "dot_general")

    # What follows a layer

    def _before_norm(self, value: Value) -> bool:
        """Whether a norm follows before the next layer; a gate's product hides what is gated."""
        for node in value.consumers:
            if node.call is not None and node.call.path in self.norms:
                return True
            gate = node.name == "mul" and len(node.active_inputs) > 1
            own = gate and all(v is value for v in node.active_inputs)
            if self._is_linear(node) or node.call is not None or (gate and not own):
                continue
            if any(self._before_norm(result) for result in node.outputs):
                return True
        return False

    def _fed_by(self, norm: Node) -> Layer | None:
        """The layer that feeds a norm alone; None where it is something else."""
        value = norm.inputs[0]
        while value.node is not None and len(value.consumers) == 1:
            if value.node.call is not None:
                layer = self.layers.get(value.node.call.path)
                return None if layer is None or layer.reason else layer
            if value.node.name not in ("convert_element_type", "copy"):
                return None
            value = value.node.inputs[0]
        return None

    def _linear_end(self, value: Value, *, alone: bool = True) -> tuple[Node, bool] | None:
        """The layer of which a value is a linear function, and whether it is averaged on the way.

        Args:
          value: the result.
          alone: whether all on the way must be used for this result only.
        """
        averaged = False
        consumers = 1
        while value.node is not None:
            node = value.node
            if alone and len(value.consumers) > consumers:
                return None
            if node.call is not None:
                if node.call.path in self.layers:
                    return node, averaged
                if node.call.path not in self.norms:
                    return None
            elif node.name in SUMS:
                averaged = True
            elif not (is_affine(node) or (node.name in SHAPES and len(node.active_inputs) == 1)):
                return None
            value = node.active_inputs[0]
        return None

    # The rules

    def _find_classifiers(self) -> None:
        for logits in self.traced.logits:
            found = self._linear_end(logits)
            layer = None if found is None else self.layers[found[0].call.path]  # type: ignore
            if found is None or layer is None or layer.reason:
                why = "" if layer is None else f" ({name(layer.path)}: {layer.reason})"
                raise UserError(
                    "no layer was found of which the logits are a linear function"
                    f"{why}; to='weightmean' needs none"
                )
            layer.last_bn = "mean" if found[1] and len(found[0].outputs[0].shape) > 2 else "each"

    def _place_scalars(self, plan: Plan) -> None:
        plan.joins, parallel = residual_joins(self.graph, self._is_linear)
        placed: dict[Path, dict[Node, float]] = {}
        for join in plan.joins:
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
        found = self._linear_end(branch)
        gated = False
        if found is None and branch.modules:
            path = branch.modules[0].path
            plan.scaled.setdefault(path, []).append(scale)
            if len(plan.scaled[path]) == 1:
                plan.notes.append(
                    f"{name(path)}: a scalar multiplies its output {branch.shape}, which the "
                    "backward pass keeps for it"
                )
            return
        if found is None and branch.node is not None and branch.node.name == "mul":
            gated = True
            whole = [v for v in branch.node.active_inputs if v.shape == branch.shape]
            ends = [self._linear_end(value, alone=False) for value in whole]
            found = next((end for end in ends if end is not None), None)
        if found is None or self.layers[found[0].call.path].reason:  # type: ignore[union-attr]
            kind = "an operation" if branch.node is None else branch.node.name
            plan.notes.append(f"no place for the scalar {scale:.3g}: its branch ends in {kind}")
            return
        node = found[0]
        assert node.call is not None
        placed.setdefault(node.call.path, {})[node] = scale
        if gated:
            plan.notes.append(
                f"{name(node.call.path)}: its scalar also scales what its gate is computed from"
            )

    def _check_roles(self, layer: Layer) -> None:
        """A layer that is called from several places keeps what it has, if these differ."""
        if layer.reason or len({node.call.number for node in layer.nodes}) == 1:  # type: ignore
            members = _members(layer)
            if layer.scales and len(set(layer.scales)) > 1 and members != len(layer.scales):
                layer.reason = "one kernel is used in several residual blocks"
        elif layer.scales and len(set(layer.scales)) > 1:
            layer.reason = "one kernel is used in several residual blocks"
        elif len({self._before_norm(node.outputs[0]) for node in layer.nodes}) > 1:
            layer.reason = "it is called several times, and a norm follows some of the calls only"
        elif layer.last_bn is not None:
            layer.reason = "it makes the logits, and is called several times"
            layer.last_bn = None
        if layer.reason:
            layer.scales = None

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
            if isinstance(module, (*NORMS, *LINEAR)) and path not in reached:
                plan.notes.append(f"{name(path)}: not reached by the call, left as it was")
            elif isinstance(module, LastBN):
                raise UserError(f"the network has a last BN already: {name(path)}")
        for path in self.norms:
            for other, module in self.traced.modules.items():
                if module is self.traced.modules[path] and other != path:
                    plan.notes.append(f"{name(other)} is {name(path)}")


def _members(layer: Layer) -> int:
    """How many kernels are stacked in a layer."""
    call = layer.nodes[0].call
    assert call is not None
    kernel = layer.module.kernel  # type: ignore[attr-defined]
    return math.prod(kernel.shape) // math.prod(call.kernel_shape)
