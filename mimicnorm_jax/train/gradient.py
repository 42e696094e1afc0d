"""The gradient of a batch, at once or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

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

    size = len(images) // count

    def take(x: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, part * size, size)

    def examples(part: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        return after(_as_batches_lie(take(images, part)), done), take(indices, part)

    def forward(done: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = body(local, *examples(part, done))
        return logits[0, 0], logits

    def backward(total: Tree, part: jax.Array) -> tuple[Tree, None]:
        done = jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(total)]).sum()
        chosen = examples(part, done)
        _, transpose = jax.vjp(lambda params: body(params, *chosen), local)
        return jax.tree.map(jnp.add, total, *transpose(take(cotangent, part))), None

    parts = jnp.arange(count)
    scan = _unrolled if unroll else lax.scan
    shape = jax.eval_shape(body, local, images[:size], indices[:size])
    start = as_varying(jnp.zeros((), shape.dtype), (DATA_AXIS,))
    _, before_head = scan(forward, start, parts)
    before_head = before_head.reshape(-1, *before_head.shape[2:])

    def loss(params: Tree, before_head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        logits, stats = network.apply_head(params, batch_stats, before_head)
        return loss_of(logits), (logits, stats)

    differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (logits, stats)), (of_head, cotangent) = differentiate(params, before_head)
    zeros = jax.tree.map(jnp.zeros_like, local)
    of_body, _ = scan(backward, zeros, parts)
    return value, logits, stats, jax.tree.map(jnp.add, of_head, lax.psum(of_body, DATA_AXIS))


def _as_batches_lie(images: jax.Array) -> jax.Array:
    """Images in the layout that a TPU gives to a batch: the batch innermost, then the width.

    The layout that its convolutions prefer would reach out of the loop over the micro-batches
    to the whole batch, of which the program would then keep a second, padded copy.
    """

    def constrained(images: jax.Array) -> jax.Array:
        return with_layout_constraint(images, Layout(major_to_minor=(1, 3, 2, 0)))

    return lax.platform_dependent(images, tpu=constrained, default=lambda images: images)


def _unrolled(step: Callable[..., Any], carry: Any, parts: Any) -> tuple[Any, Any]:
    """``lax.scan`` without a loop, in which XLA's CPU convolutions are 30 times slower."""
    outputs = []
    for index in range(len(jax.tree.leaves(parts)[0])):
        carry, output = step(carry, jax.tree.map(lambda x, i=index: x[i], parts))
        outputs.append(output)
    return carry, None if outputs[0] is None else jnp.stack(outputs)
