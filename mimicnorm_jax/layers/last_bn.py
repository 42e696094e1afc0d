"""Last BN, the second of MimicNorm's two operations: a layer, and a loss that holds it.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020), Section 4.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mimicnorm_jax.layers.weight_mean import at_least_float32


def _batch_moments(
    x: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Mean (C,), biased variance (C,) and number of logits a class of the global batch."""
    count = math.prod(x.shape[:-1]) * (1 if axis_name is None else lax.psum(1, axis_name))
    if isinstance(count, int) and count < 2:
        raise ValueError("the last BN needs at least 2 examples in the (global) batch to train")

    def mean_over_batch(values: jax.Array) -> jax.Array:
        local = jnp.mean(values, axis=tuple(range(x.ndim - 1)))
        return local if axis_name is None else lax.pmean(local, axis_name)

    mean = mean_over_batch(x)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation,
    # which is what the logits of an untrained deep network look like.
    return mean, mean_over_batch(jnp.square(x - _per_class(mean, x.ndim))), count


def _per_class(values: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(values, tuple(range(ndim - 1)))


def normalize(x: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float) -> jax.Array:
    """Normalizes ``(B, ..., C)`` by statistics ``(C,)``."""
    return (x - _per_class(mean, x.ndim)) * _per_class(lax.rsqrt(var + epsilon), x.ndim)


def update_average(average: nnx.BatchStat[jax.Array], value: jax.Array, momentum: float) -> None:
    """Takes a batch's value into a running average, whose old value has the weight ``momentum``."""
    new = momentum * average[...] + (1 - momentum) * lax.stop_gradient(value)
    average[...] = new.astype(average[...].dtype)


class LastBN(nnx.Module):
    """The affine-free BatchNorm on logits (Section 4, "Last BN Layer").

    The paper's logits are ``(B, C)``; of ``(B, ..., C)``, as for segmentation, each class is
    normalized over everything else.


    Training normalizes by the batch's mean and biased variance and keeps running
    averages, of the unbiased variance as PyTorch does; evaluation normalizes by those.
    Everything is computed in at least float32. The training loss has a floor: see
    ``last_bn_loss_floor``.

    Args:
      num_features: C, the number of classes.
      use_running_average: evaluate instead of train; ``model.eval()`` and
        ``model.train()`` set it.
      momentum: weight of the old running average at each step.
      epsilon: added to the variance.
      axis_name: mapped axis (``shard_map``, ``pmap``, ``vmap``) over whose members the
        statistics are averaged, so that they are those of the global batch.
      param_dtype: type of the running averages.

    Attributes:
      mean, var: the running averages ``(C,)``.
      pass_through: False; True returns the logits as they are, to measure them.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: str | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), param_dtype))
        self.var = nnx.BatchStat(jnp.ones((num_features,), param_dtype))
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.epsilon = epsilon
        self.axis_name = axis_name
        self.pass_through = False

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Normalizes ``(B, ..., C)`` logits, over all but the last axis.

        Returns:
          The normalized logits, in at least float32.

        Raises:
          ValueError: a single example in training, whose variance is 0.
        """
        logits = logits.astype(at_least_float32(logits.dtype))
        if self.pass_through:
            return logits
        return normalize(logits, *self.statistics(logits), self.epsilon)

    def statistics(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance ``(C,)`` to normalize by; training takes the running ones further.

        Args:
          logits: ``(B, ..., C)``, in at least float32.

        Raises:
          ValueError: as ``__call__``.
        """
        if self.use_running_average:
            return self.mean[...], self.var[...]
        mean, var, count = _batch_moments(logits, self.axis_name)
        update_average(self.mean, mean, self.momentum)
        update_average(self.var, var * (count / (count - 1)), self.momentum)
        return mean, var


def last_bn_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    axis_name: str | None = None,
    *,
    epsilon: float = 1e-5,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last BN folded into the loss, as the paper's conclusion proposes.

    Equals ``LastBN`` in training followed by softmax cross-entropy; the network itself
    then needs no last BN, and the caller keeps the running statistics for evaluation.

    Args:
      logits: ``(B, C)`` outputs of the classifier.
      labels: ``(B,)`` class indices.
      axis_name: mapped axis over which the batch is spread; see ``LastBN``.
      epsilon: added to the variance.
      label_smoothing: weight of the uniform distribution in the target.

    Returns:
      The per-example loss ``(B,)``, the batch mean ``(C,)`` and the biased batch
      variance ``(C,)``, in at least float32. The loss is in nats.

    Raises:
      ValueError: a single example, whose variance is 0.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    mean, var, _ = _batch_moments(logits, axis_name)
    normalized = normalize(logits, mean, var, epsilon)
    return cross_entropy(normalized, labels, label_smoothing), mean, var


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of every example.

    Args:
      logits: ``(B, C)``.
      labels: ``(B,)`` class indices.
      label_smoothing: weight of the uniform distribution in the target.

    Returns:
      ``(B,)``, in nats and in the type of the logits.
    """
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
