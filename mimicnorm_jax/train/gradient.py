"""The gradient of a batch, at once or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.layers.order import after
from mimicnorm_jax.layers.varying import as_varying
from mimicnorm_jax.parallel import DATA_AXIS
from mimicnorm_jax.train.state import Network, Tree

Inputs = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Loss = Callable[[jax.Array], jax.Array]
# loss, logits, new batch statistics, gradient
Result = tuple[jax.Array, jax.Array, Tree, Tree]


def whole_batch(
    network: Network,
    inputs: Inputs,
    loss_of: Loss,
    params: Tree,
    batch_stats: Tree,
    images: jax.Array,
    indices: jax.Array,
) -> Result:
    """Loss and gradient of a batch, all of which is in memory at once.

    Args:
      network: from ``split_network``.
      inputs: from images and their indices to what the network takes, and dropout keys.
      loss_of: the loss ``()`` of the global batch, given the logits of this device's part.
      params, batch_stats: of the network.
      images: ``(b, H, W, C)``, this device's part of the batch.
      indices: ``(b,)``, their places in the batch.

    Returns:
      The loss, the logits ``(b, num_classes)``, the new batch statistics, the gradient.
    """

    def loss(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        logits, stats = network.apply_train(params, batch_stats, *inputs(images, indices))
        return loss_of(logits), (logits, stats)

    (value, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, logits, stats, gradient


def in_micro_batches(
    network: Network,
    inputs: Inputs,
    loss_of: Loss,
    params: Tree,
    batch_stats: Tree,
    images: jax.Array,
    indices: jax.Array,
    *,
    count: int,
    unroll: bool,
) -> Result:
    """The same loss and gradient in the memory of ``b / count`` examples.

    Where only the head couples examples, the gradient of the whole batch is the sum over its
    parts of the gradient of ``<logits of the part, g>``, g being the loss's gradient with respect
    to the logits that reach the head. So: a forward pass over the parts, the head, the loss
    and g for the whole batch, then forward and backward for each part.

    Args:
      network, inputs, loss_of, params, batch_stats, images, indices: as for ``whole_batch``.
      count: number of parts, a divisor of b.
      unroll: repeat the program of a part instead of looping over it.
    """
    local = as_varying(params, (DATA_AXIS,))  # summed over devices once, not for every part

    def body(params: Tree, images: jax.Array, indices: jax.Array) -> jax.Array:
        return network.apply_body(params, batch_stats, *inputs(images, indices))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(count, -1, *x.shape[1:])

    def forward(done: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        logits = body(local, after(part[0], done), part[1])
        return logits[0, 0], logits

    def backward(total: Tree, part: Any) -> tuple[Tree, None]:
        images, indices, cotangent = part
        images = after(
            images, jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(total)]).sum()
        )
        _, transpose = jax.vjp(lambda params: body(params, images, indices), local)
        return jax.tree.map(jnp.add, total, *transpose(cotangent)), None

    parts = (split(images), split(indices))
    scan = _unrolled if unroll else lax.scan
    shape = jax.eval_shape(body, local, parts[0][0], parts[1][0])
    start = as_varying(jnp.zeros((), shape.dtype), (DATA_AXIS,))
    _, before_head = scan(forward, start, parts)
    before_head = before_head.reshape(-1, *before_head.shape[2:])

    def loss(params: Tree, before_head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        logits, stats = network.apply_head(params, batch_stats, before_head)
        return loss_of(logits), (logits, stats)

    differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (logits, stats)), (of_head, cotangent) = differentiate(params, before_head)
    zeros = jax.tree.map(jnp.zeros_like, local)
    of_body, _ = scan(backward, zeros, (*parts, split(cotangent)))
    return value, logits, stats, jax.tree.map(jnp.add, of_head, lax.psum(of_body, DATA_AXIS))


def _unrolled(step: Callable[..., Any], carry: Any, parts: Any) -> tuple[Any, Any]:
    """``lax.scan`` without a loop, in which XLA's CPU convolutions are 30 times slower."""
    outputs = []
    for index in range(len(jax.tree.leaves(parts)[0])):
        carry, output = step(carry, jax.tree.map(lambda x, i=index: x[i], parts))
        outputs.append(output)
    return carry, None if outputs[0] is None else jnp.stack(outputs)
