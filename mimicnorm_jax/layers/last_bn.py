"""Last BN, the second of MimicNorm's two operations: a layer, and a loss that holds it.

Fei et al., "MimicNorm: Weight Mean and Last BN Layer Mimic the Dynamic of Batch
Normalization" (2020), Section 4.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mimicnorm_jax.layers.kernel import at_least_float32


def _batch_moments(
    x: jax.Array, axis_name: str | None, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Mean (C,), biased variance (C,) and number of logits a class of the global batch."""
    axes = tuple(range(x.ndim - 1))
    if mask is not None:
        return _masked_moments(x, axis_name, mask)
    count = math.prod(x.shape[:-1]) * (1 if axis_name is None else lax.psum(1, axis_name))
    _check_count(count)

    def mean_over_batch(values: jax.Array) -> jax.Array:
        local = jnp.mean(values, axis=axes)
        return local if axis_name is None else lax.pmean(local, axis_name)

    mean = mean_over_batch(x)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation,
    # which is what the logits of an untrained deep network look like.
    return mean, mean_over_batch(jnp.square(x - _per_class(mean, x.ndim))), count


def _masked_moments(
    x: jax.Array, axis_name: str | None, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``_batch_moments``, of the examples that a mask (B, ...) keeps; devices may keep few."""
    kept = mask[..., None]

    def total(values: jax.Array) -> jax.Array:
        local = jnp.sum(values, axis=tuple(range(values.ndim - 1)))
        return local if axis_name is None else lax.psum(local, axis_name)

    count = total(kept.astype(x.dtype))[0]
    divisor = jnp.maximum(count, 1)
    mean = total(jnp.where(kept, x, 0)) / divisor
    centred = jnp.where(kept, x - _per_class(mean, x.ndim), 0)
    return mean, total(jnp.square(centred)) / divisor, count


def _check_count(count: Any) -> None:
    if isinstance(count, int) and count < 2:
        raise ValueError("the last BN needs at least 2 examples in the (global) batch to train")


def checked_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """A mask for every logit of a class, ``x.shape[:-1]``, of one that has fewer axes.

    Raises:
      ValueError: it does not fit.
    """
    if mask is None:
        return None
    given = jnp.asarray(mask)
    if given.ndim == x.ndim and given.shape[-1] == 1:  # as Flax's BatchNorm takes it
        given = given[..., 0]
    wide = given.reshape(given.shape + (1,) * (x.ndim - 1 - given.ndim))
    fits = wide.ndim == x.ndim - 1 and all(
        n in (1, m) for n, m in zip(wide.shape, x.shape[:-1], strict=True)
    )
    if not fits or (given.ndim < 1 < x.ndim):
        allowed = " or ".join(dict.fromkeys((str(x.shape[:1]), str(x.shape[:-1]))))
        raise ValueError(
            f"the mask of logits {x.shape} says of examples, not of classes, which count: its "
            f"shape is {allowed}, got {jnp.shape(mask)}"
        )
    return jnp.broadcast_to(wide.astype(bool), x.shape[:-1])


def _check_logits(x: jax.Array, axis_name: str | None) -> None:
    if x.ndim < (2 if axis_name is None else 1):
        raise ValueError(
            "the last BN normalizes logits (B, ..., C) over a batch, which a single vector of "
            f"shape {x.shape} is not; under jax.vmap call it on the whole batch, or give axis_name"
        )


def _per_class(values: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(values, tuple(range(ndim - 1)))


def normalize(x: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float) -> jax.Array:
    """Normalizes ``(B, ..., C)`` by statistics ``(C,)``."""
    return (x - _per_class(mean, x.ndim)) * _per_class(lax.rsqrt(var + epsilon), x.ndim)


def update_average(average: nnx.BatchStat[jax.Array], value: jax.Array, momentum: Any) -> None:
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

    In training each example's output depends on all of its batch: there is no gradient of a
    single example's loss by itself (as differential privacy and ``jax.vmap(jax.grad(...))`` want
    it), and a batch of 1 is refused. Running averages start at mean 0 and variance 1, and keep
    ``momentum**n`` of that after n steps: 35 % after 10, 0.003 % after 100. After so short a
    run evaluate with ``mimicnorm_jax.recalibrate``.

    Args:
      num_features: C, the number of classes.
      use_running_average: evaluate instead of train; ``model.eval()``, ``model.train()``,
        ``nnx.view`` and the call set it.
      momentum: weight of the old running average at each step.
      epsilon: added to the variance.
      axis_name: mapped axis (``shard_map``, ``pmap``, ``vmap``) over whose members the
        statistics are averaged, so that they are those of the global batch.
      param_dtype: type of the running averages, if it is wider than float32, in which they are
        kept else.

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
        self.num_features = num_features
        wide = at_least_float32(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), wide))
        self.var = nnx.BatchStat(jnp.ones((num_features,), wide))
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.epsilon = epsilon
        self.axis_name = axis_name
        self.pass_through = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view(model, use_running_average=...)`` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(
        self,
        logits: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``(B, ..., C)`` logits, over all but the last axis.

        Args:
          logits: ``(B, ..., C)``; in evaluation also ``(C,)``.
          use_running_average: as of the layer, whose own it overrides; None: the layer's.
          mask: True for what counts in the statistics, such as examples that are not padding:
            ``(B,)`` or ``(B, ...)``. What does not is normalized too; what is not finite there
            counts as 0. Where fewer than 2 are left the running averages stay.

        Returns:
          The normalized logits, in at least float32.

        Raises:
          ValueError: in training a single example, whose variance is 0, or no batch axis; logits
            of another number of classes; a mask that does not fit.
        """
        logits = logits.astype(at_least_float32(logits.dtype))
        if self.pass_through:
            return logits
        kept = checked_mask(mask, logits)
        if kept is not None:  # so that the gradient of the others does not meet it
            logits = jnp.where(kept[..., None] | jnp.isfinite(logits), logits, 0)
        statistics = self.statistics(logits, use_running_average, mask=kept)
        return normalize(logits, *statistics, self.epsilon)

    def statistics(
        self,
        logits: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and variance ``(C,)`` to normalize by; training takes the running ones further.

        Args:
          logits: ``(B, ..., C)``, in at least float32.
          use_running_average, mask: as for a call.

        Raises:
          ValueError: as ``__call__``.
        """
        own = self.use_running_average
        evaluates = own if use_running_average is None else use_running_average
        if not evaluates:
            _check_logits(logits, self.axis_name)
        if logits.shape[-1:] != self.mean[...].shape:
            raise ValueError(
                f"expected logits of {self.num_features} classes (..., {self.num_features}), got "
                f"shape {logits.shape}"
            )
        chosen = checked_mask(mask, logits)
        if evaluates:
            return self.mean[...], self.var[...]
        mean, var, count = _batch_moments(logits, self.axis_name, chosen)
        if chosen is None:
            unbiased = var * (count / (count - 1))
            momentum: Any = self.momentum
        else:
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            momentum = jnp.where(count < 2, 1.0, self.momentum)
        update_average(self.mean, mean, momentum)
        update_average(self.var, unbiased, momentum)
        return mean, var


def last_bn_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    axis_name: str | None = None,
    *,
    epsilon: float = 1e-5,
    label_smoothing: float = 0.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last BN folded into the loss, as the paper's conclusion proposes.

    Equals ``LastBN`` in training followed by softmax cross-entropy; the network itself
    then needs no last BN, and the caller keeps the running statistics for evaluation. As there,
    examples are coupled: the gradient of one example's loss runs through the others'.

    Args:
      logits: ``(B, ..., C)`` outputs of the classifier, normalized over all but the last axis.
      labels: ``(B, ...)`` class indices.
      axis_name: mapped axis over which the batch is spread; see ``LastBN``.
      epsilon: added to the variance.
      label_smoothing: weight of the uniform distribution in the target.
      mask: True for what counts in the statistics, ``(B,)`` or ``(B, ...)``. The loss of what
        does not is 0: the mean over the rest is ``losses.sum()`` over the number of labels that
        count, which for ``(B, ...)`` labels and a mask ``(B,)`` is not ``mask.sum()``.

    Returns:
      The loss of every label ``(B, ...)``, in nats, the batch mean ``(C,)`` and the **biased**
      batch variance ``(C,)``, in at least float32. ``LastBN`` keeps the unbiased one,
      ``n / (n - 1)`` times that, of n labels in the global batch.

    Raises:
      ValueError: a single example, whose variance is 0; no batch axis; labels or a mask that do
        not fit the logits, or labels that are no integers.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    _check_logits(logits, axis_name)
    chosen = checked_mask(mask, logits)
    if chosen is not None:  # so that no gradient meets what padding may hold
        logits = jnp.where(chosen[..., None], logits, 0)
        labels = jnp.where(chosen, labels, jnp.zeros_like(labels))
    mean, var, _ = _batch_moments(logits, axis_name, chosen)
    losses = cross_entropy(normalize(logits, mean, var, epsilon), labels, label_smoothing)
    return losses if chosen is None else jnp.where(chosen, losses, 0), mean, var


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of every example.

    Args:
      logits: ``(B, ..., C)``.
      labels: ``(B, ...)`` class indices.
      label_smoothing: weight of the uniform distribution in the target.

    Returns:
      ``(B, ...)``, in nats and in the type of the logits.

    Raises:
      ValueError: labels of another shape, or no integers.
    """
    labels = jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"expected a class index for each of {logits.shape[:-1]} logits, got labels of type "
            f"{labels.dtype} and shape {labels.shape}"
        )
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
