"""The training step and the evaluation step: the only ``shard_map`` of the project."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mimicnorm_jax.data.augment import augment, example_keys, normalize
from mimicnorm_jax.layers import cross_entropy
from mimicnorm_jax.parallel import DATA_AXIS, replicated
from mimicnorm_jax.precision import Precision
from mimicnorm_jax.train.gradient import in_micro_batches, whole_batch
from mimicnorm_jax.train.state import Network, TrainState

Metrics = dict[str, jax.Array]


class TrainStep(Protocol):
    """A jitted step of training: called, or lowered for devices that need not be there."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered: ...

    def trace(self, state: TrainState, batch: Any) -> jax.stages.Traced: ...


StatisticsStep = Callable[[Any, Any, Any, int, Any], Any]
SeveralSteps = Callable[[TrainState, tuple[Any, ...], jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Any], Metrics]


def make_train_step(
    config: ConfigDict,
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    mesh: Mesh,
    precision: Precision,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> TrainStep:
    """Compiles one step of training for all devices of a mesh.

    Args:
      config: ``seed``, ``data`` (augmentation) and ``optimizer`` are read.
      network: from ``split_network``.
      optimizer: from ``make_optimizer``.
      schedule: its learning rate, for the metrics.
      mesh: the devices.
      precision: number types.
      mean, std: of each channel, for normalization.

    Returns:
      ``step(state, batch) -> (state, metrics)``; the old state is donated. ``batch`` has
      ``image`` uint8 ``(B, H, W, C)`` and ``label`` int32 ``(B,)``, spread over the mesh.
      Metrics, of the global batch: ``loss``, ``correct`` (count), ``learning_rate``,
      ``gradient_norm``; where steps may be skipped also ``skipped`` (count so far); with a last
      BN also ``class_counts`` ``(num_classes,)``, the examples of each class.
    """
    options = config.optimizer
    inputs_of = _make_inputs(config, precision=precision, mean=mean, std=std)
    gradient_of: Any = whole_batch
    if config.micro_batches > 1:
        unroll = mesh.devices.flat[0].platform == "cpu"
        gradient_of = functools.partial(in_micro_batches, count=config.micro_batches, unroll=unroll)

    def local_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        labels = batch["label"]
        local = len(labels)

        def loss_of(logits: jax.Array) -> jax.Array:
            losses = cross_entropy(logits, labels, options.label_smoothing)
            # Under shard_map, gradients of replicated parameters are already summed over
            # the devices. So the mean belongs into the loss: a pmean of the gradients
            # would leave them too large by the number of devices.
            return lax.pmean(losses.mean(), DATA_AXIS)

        loss, logits, stats, grads = gradient_of(
            network,
            functools.partial(inputs_of, state.step),
            loss_of,
            state.params,
            state.batch_stats,
            batch["image"],
            _indices(local),
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema_params
        if options.ema_decay:
            # Warms up: at a constant decay of 0.999 the average after 135 steps is 87 % what
            # the parameters were before the first one.
            decay = jnp.minimum(options.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, (1.0 - decay).astype(loss.dtype))
        correct = jnp.sum(jnp.argmax(logits, -1) == labels)
        metrics = {
            "loss": loss,
            "correct": lax.psum(correct, DATA_AXIS),
            "learning_rate": jnp.asarray(schedule(state.step), loss.dtype),
            "gradient_norm": optax.global_norm(grads),
        }
        if network.last_bn is not None:  # which bounds the loss by them
            counts = jnp.zeros(logits.shape[-1], jnp.int32).at[labels].add(1)
            metrics["class_counts"] = lax.psum(counts, DATA_AXIS)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            # Equal on all devices already, but for a BatchNorm with local statistics.
            batch_stats=lax.pmean(stats, DATA_AXIS),
            opt_state=opt_state,
            ema_params=ema,
            skipped=state.skipped,
        )
        if state.skipped is not None:
            finite = is_finite((loss, grads, new_state))
            new_state = keep_unless(finite, new_state, state)
            metrics["skipped"] = new_state.skipped
        return new_state, metrics

    mapped = jax.shard_map(
        local_step, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=(P(), P())
    )
    return jax.jit(mapped, donate_argnums=0)


def _make_inputs(
    config: ConfigDict, *, precision: Precision, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Makes what augments and normalizes training images.

    Returns:
      ``inputs(step, images, indices) -> (images, keys)``: for uint8 images ``(B, H, W, C)`` with
      these indices in the global batch of a step, the network's input and keys for its dropout.
    """

    def inputs(
        step: jax.Array, images: jax.Array, indices: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        images, keys = augmented(config, step, images, indices)
        images = normalize(images, mean=mean, std=std, dtype=precision.param_dtype)
        return images.astype(precision.dtype), keys

    return inputs


def augmented(
    config: ConfigDict, step: jax.Array | int, images: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Training images as a step augments them.

    Args:
      config: ``seed`` and ``data`` are read.
      step: its number.
      images: uint8 ``(B, H, W, C)``.
      indices: ``(B,)`` positions in the global batch.

    Returns:
      The images, and ``(B,)`` keys for what else is random.
    """
    options = {name: config.data[name] for name in ("pad_crop", "flip", "rotation")}
    keys = jax.vmap(jax.random.split)(example_keys(config.seed, jnp.asarray(step), indices))
    return augment(images, keys[:, 0], **options), keys[:, 1]


def _indices(local: int) -> jax.Array:
    """Of this device's ``local`` examples, in the global batch."""
    return lax.axis_index(DATA_AXIS) * local + jnp.arange(local)


def make_several_steps(step: TrainStep) -> SeveralSteps:
    """Compiles several steps of training as one program, of which the first few may be run.

    Args:
      step: from ``make_train_step``.

    Returns:
      ``steps(state, batches, count) -> (state, metrics)``, for a tuple of batches of which the
      first ``count`` (a scalar) are used; the old state is donated. Every metric has an entry
      for each batch.
    """

    def several(
        state: TrainState, batches: tuple[Any, ...], count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        _, shapes = jax.eval_shape(step, state, batches[0])
        metrics = jax.tree.map(lambda x: jnp.zeros((len(batches), *x.shape), x.dtype), shapes)

        def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            state, new = step(state, jax.tree.map(lambda x: x[i], stacked))
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), metrics, new)

        return lax.fori_loop(0, count, one, (state, metrics))

    return jax.jit(several, donate_argnums=0)


def is_finite(tree: Any) -> jax.Array:
    """Whether no number in a tree is infinite or NaN: a scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def keep_unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The state after a step that is skipped, and counted, unless it was ``finite``.

    The step's number, and the optimizer's own count of it, go on: the learning rate stays that
    of the schedule.
    """

    def choose(after: jax.Array, before: jax.Array) -> jax.Array:
        if not jnp.issubdtype(after.dtype, jnp.inexact):
            return after
        return jnp.where(finite, after, before)

    assert old.skipped is not None
    kept = jax.tree.map(choose, new, old)
    return kept.replace(skipped=old.skipped + jnp.where(finite, 0, 1).astype(jnp.int32))


def _evaluation_inputs(
    precision: Precision, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """What the network takes of a batch that is not augmented."""

    def inputs_of(batch: dict[str, jax.Array]) -> jax.Array:
        images = normalize(batch["image"], mean=mean, std=std, dtype=precision.param_dtype)
        return images.astype(precision.dtype)

    return inputs_of


def make_eval_step(
    network: Network,
    *,
    mesh: Mesh,
    precision: Precision,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> EvalStep:
    """Compiles the evaluation of one batch; arguments as for ``make_train_step``.

    Returns:
      ``step(params, batch_stats, batch) -> metrics`` with the sums over the batch's real
      examples: ``loss``, ``correct`` and ``count``. ``batch`` also has ``mask`` (B,).
    """
    inputs_of = _evaluation_inputs(precision, mean, std)

    def local_step(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Metrics:
        logits = network.apply_eval(params, batch_stats, inputs_of(batch))
        mask = batch["mask"].astype(logits.dtype)
        losses = cross_entropy(logits, batch["label"])
        correct = jnp.argmax(logits, -1) == batch["label"]
        # where, not a product: the loss of a padded example may be infinite
        sums = {
            "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
            "correct": jnp.sum(jnp.where(mask > 0, correct, False)),
            "count": jnp.sum(mask > 0),
        }
        return lax.psum(sums, DATA_AXIS)

    return _mapped_over_batch(local_step, mesh)


def make_logits_step(
    network: Network,
    *,
    mesh: Mesh,
    precision: Precision,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> EvalStep:
    """Compiles the logits of one batch; arguments as for ``make_train_step``.

    Returns:
      ``step(params, batch_stats, batch) -> outputs``: ``logits`` (B, num_classes), ``label`` (B,)
      and ``mask`` (B,) of the whole batch, on every device.
    """
    inputs_of = _evaluation_inputs(precision, mean, std)

    def local_step(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Metrics:
        logits = network.apply_eval(params, batch_stats, inputs_of(batch))
        return {"logits": logits, "label": batch["label"], "mask": batch["mask"]}

    mapped = jax.shard_map(
        local_step, mesh=mesh, in_specs=(P(), P(), P(DATA_AXIS)), out_specs=P(DATA_AXIS)
    )
    return jax.jit(mapped, out_shardings=replicated(mesh))


def make_moments_step(
    network: Network,
    *,
    mesh: Mesh,
    precision: Precision,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> EvalStep:
    """Compiles the moments of the logits that reach the last BN, over one batch.

    Returns:
      ``step(params, batch_stats, batch) -> moments``: of the batch's real examples,
      ``count`` (), and the sums ``first`` and ``second`` ``(num_classes,)`` of the
      differences from the running mean, and of their squares.
    """
    inputs_of = _evaluation_inputs(precision, mean, std)

    def local_step(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Metrics:
        logits = network.apply_measure(params, batch_stats, inputs_of(batch))
        # From a point near the mean, so that the variance does not cancel.
        differences = logits - network.last_bn_statistics(batch_stats)["mean"][None]
        differences = jnp.where(batch["mask"][:, None] > 0, differences, 0.0)
        sums = {
            "count": jnp.sum(batch["mask"] > 0),
            "first": jnp.sum(differences, axis=0),
            "second": jnp.sum(jnp.square(differences), axis=0),
        }
        return lax.psum(sums, DATA_AXIS)

    return _mapped_over_batch(local_step, mesh)


def make_statistics_step(
    config: ConfigDict,
    network: Network,
    *,
    mesh: Mesh,
    precision: Precision,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> StatisticsStep:
    """Compiles what adds up the statistics that a batch of training gives to parameters.

    Returns:
      ``step(params, batch_stats, batch, number, total) -> total``: the batch is that of training
      step ``number``, augmented as there; to ``total``, a tree like ``batch_stats``, is added what
      a norm would keep of the batch, divided by ``config.optimizer.ema_batches``.
    """
    inputs_of = _make_inputs(config, precision=precision, mean=mean, std=std)

    def local_step(
        params: Any, batch_stats: Any, batch: dict[str, jax.Array], number: jax.Array, total: Any
    ) -> Any:
        images, _ = inputs_of(number, batch["image"], _indices(len(batch["label"])))
        found = network.apply_statistics(params, batch_stats, images)
        found = lax.pmean(found, DATA_AXIS)  # as in training
        return jax.tree.map(lambda t, x: t + x / config.optimizer.ema_batches, total, found)

    mapped = jax.shard_map(
        local_step, mesh=mesh, in_specs=(P(), P(), P(DATA_AXIS), P(), P()), out_specs=P()
    )
    return jax.jit(mapped)


def _mapped_over_batch(local_step: EvalStep, mesh: Mesh) -> EvalStep:
    mapped = jax.shard_map(local_step, mesh=mesh, in_specs=(P(), P(), P(DATA_AXIS)), out_specs=P())
    return jax.jit(mapped)
