"""Networks with derivatives of any order and mode."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

from mimicnorm_jax.convert.lean import undo_lean
from mimicnorm_jax.convert.substitute import copied
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import ScaledConv
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.layers.relu import Relu, relu
from mimicnorm_jax.layers.storage import NO_SECOND_DERIVATIVE
from mimicnorm_jax.models.pooling import Window

_Network = TypeVar("_Network", bound=nnx.Module)


def twice_differentiable(network: _Network) -> _Network:
    """The same network with JAX's own derivatives, which exist in any order and mode.

    To save memory in training, convolutions, ReLU, max-pools and BatchNorms of this package have
    backward passes of their own. So their derivative is that of reverse mode: ``jax.jvp``,
    ``jax.linearize``, ``jax.hessian`` and forward over reverse raise. In what is returned all of
    these work; it needs more memory, and is for looking at a network rather than for training it.

    Example::

      network = twice_differentiable(model)
      graph, params, rest = nnx.split(network, nnx.Param, ...)

      def loss(params):
          return cross_entropy(nnx.merge(graph, params, rest, copy=True)(images), labels).mean()

      product = jax.jvp(jax.grad(loss), (params,), (vector,))[1]  # Hessian times vector

    Args:
      network: one of ``create_model`` or ``convert``, or any module with layers of this package.
        It is left as it was.

    Returns:
      A copy with the same arrays and the same outputs.

    Raises:
      ValueError: activations are stored in codes, which have no second derivative; or what is no
        ``nnx.Module``.
    """
    if not isinstance(network, nnx.Module):
        raise UserError(f"twice_differentiable takes an nnx.Module, got {type(network).__name__}")
    copy: Any = copied(network)
    undo_lean(copy)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, ScaledConv):
            if module.codec is not None:
                raise ValueError(NO_SECOND_DERIVATIVE)
            module.differentiable = "twice"
        elif isinstance(module, ShiftedBatchNorm):
            module.differentiable = "twice"
    use_plain_functions(copy)
    return copy  # type: ignore[no-any-return]


def use_plain_functions(network: nnx.Module) -> None:
    """Puts JAX's own ReLU and max-pool in the place of those with derivatives of their own."""
    for _, module in nnx.iter_modules(network):
        for attribute, value in list(vars(module).items()):
            if (plain := _plain(value)) is not value:
                setattr(module, attribute, plain)


def _plain(value: Any) -> Any:
    """What stands for an attribute; for most the attribute itself."""
    if value is relu or isinstance(value, Relu):
        return jax.nn.relu
    if isinstance(value, Window):
        return value._replace(plain=True)
    if type(value) in (tuple, list):
        parts = [_plain(part) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            return type(value)(parts)
    return value
