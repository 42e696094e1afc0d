"""Weight mean as an optax transform: the projected form (Appendix C)."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from mimicnorm_jax.layers.weight_mean import ScaledKernel, center_kernel


def project_weight_mean(mask: Any) -> optax.GradientTransformation:
    """Keeps kernels centred: the projected form of weight mean (Appendix C).

    Must be the last transform of a chain: it replaces the update ``u`` of each chosen
    kernel ``w`` by ``center(w + u) - w``, so that ``w`` stays centred without a backward
    pass through the mean. For SGD with momentum and weight decay this is the same
    training as centring in the forward pass, since every operation is linear.

    Example::

      transform = optax.chain(
          optax.sgd(0.1, momentum=0.9), project_weight_mean(weight_mean_mask(model))
      )
      optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    Args:
      mask: tree like the parameters, as a pure dictionary, with True for every kernel to
        centre, or a function from the parameters to such a tree;
        ``weight_mean_mask(model)`` makes one. The parameters themselves may be an
        ``nnx.State`` or a tree of arrays.

    Returns:
      The transform; it has no state.

    Raises:
      ValueError: in its ``update``: no parameters given, a mask that does not fit them, or a chosen
        parameter with fewer than 2 axes.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("project_weight_mean needs the parameters: update(..., params)")
        chosen = mask(params) if callable(mask) else mask
        projected = jax.tree.map(
            lambda centre, u, w: center_kernel(w + u) - w if centre else u,
            chosen,
            _pure(updates),
            _pure(params),
        )
        # A pure dictionary and the state it was made of have the same leaves in one order.
        return jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(projected)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _pure(tree: Any) -> Any:
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def weight_mean_mask(model: nnx.Module) -> dict[str, Any]:
    """Which parameters of a model are kernels in the projected form of weight mean.

    Args:
      model: any module; layers with ``weight_mean="projected"`` are found at any depth.

    Returns:
      A tree of booleans, of the structure of
      ``nnx.to_pure_dict(nnx.state(model, nnx.Param))``.
    """
    chosen = {
        (*path, "kernel")
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ScaledKernel) and module.weight_mean == "projected"
    }
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.to_pure_dict(nnx.from_flat_state([(path, path in chosen) for path, _ in flat]))
