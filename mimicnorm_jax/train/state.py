"""The state of a run as plain pytrees, and the network as static graphs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mimicnorm_jax.layers import LastBN, WeightMeanMask, weight_mean_mask
from mimicnorm_jax.methods.base import identity

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on.

    Attributes:
      step: int32 scalar, number of steps done.
      params: nested dict of parameters.
      batch_stats: nested dict of running statistics.
      opt_state: state of the optax optimizer.
      ema_params: moving average of the parameters, or None where none is kept.
      skipped: int32 scalar, number of steps that changed nothing because they were not finite,
        or None where such a step stops the run.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    ema_params: Tree = None
    skipped: jax.Array | None = None

    @property
    def evaluated_params(self) -> Tree:
        """The averaged parameters where they are kept, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params


@dataclasses.dataclass(frozen=True)
class Network:
    """A module taken apart once; from then on there are only pytrees.

    Attributes:
      train_graph: static structure of the module in training mode.
      eval_graph: the same in evaluation mode.
      measure_graph: the same in evaluation mode, without the last BN.
      statistics_graph: the same in evaluation mode, but that the norms take the batch's
        statistics, and keep those of the last batch in place of running averages.
      last_bn: path of the last BN's statistics in the batch statistics; None without one.
      weight_mean_mask: which parameters ``project_weight_mean`` keeps centred.
    """

    train_graph: nnx.GraphDef[Any]
    eval_graph: nnx.GraphDef[Any]
    measure_graph: nnx.GraphDef[Any]
    statistics_graph: nnx.GraphDef[Any]
    last_bn: tuple[Any, ...] | None
    weight_mean_mask: WeightMeanMask

    def apply_train(
        self, params: Tree, batch_stats: Tree, images: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Logits ``(B, num_classes)`` and the new batch statistics."""
        # A copy, because the caller's statistics must survive the update inside.
        model = nnx.merge(self.train_graph, params, batch_stats, copy=True)
        logits = model(images, keys=keys)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def apply_body(
        self, params: Tree, batch_stats: Tree, images: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """What reaches the head ``(B, num_classes)`` in training."""
        model: Any = nnx.merge(self.train_graph, params, batch_stats, copy=True)
        model.head = identity
        return model(images, keys=keys)

    def apply_head(
        self, params: Tree, batch_stats: Tree, logits: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """``apply_train``, given the result of ``apply_body``."""
        model: Any = nnx.merge(self.train_graph, params, batch_stats, copy=True)
        return model.head(logits), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def apply_eval(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Logits ``(B, num_classes)`` with the running statistics."""
        return nnx.merge(self.eval_graph, params, batch_stats, copy=True)(images)

    def apply_measure(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Logits ``(B, num_classes)`` as they reach the last BN."""
        return nnx.merge(self.measure_graph, params, batch_stats, copy=True)(images)

    def apply_statistics(self, params: Tree, batch_stats: Tree, images: jax.Array) -> Tree:
        """The statistics of one batch in place of the running ones; dropout drops nothing."""
        model: Any = nnx.merge(self.statistics_graph, params, batch_stats, copy=True)
        model(images)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def last_bn_statistics(self, batch_stats: Tree) -> dict[str, jax.Array]:
        """The last BN's ``mean`` and ``var`` ``(num_classes,)``: a part of ``batch_stats``."""
        for key in self.last_bn or ():
            batch_stats = batch_stats[key]
        return batch_stats


def split_network(create: Callable[[], nnx.Module]) -> tuple[Network, Callable[[], Any]]:
    """Takes a module apart without computing its initial values.

    Args:
      create: makes the module.

    Returns:
      The static structure, and a function without arguments, to be jitted, that returns
      the initial ``(params, batch_stats)``.
    """
    abstract = nnx.eval_shape(create)
    mask = weight_mean_mask(abstract)
    # raises if the module has any state beside these two kinds
    train_graph = nnx.split(abstract, nnx.Param, nnx.BatchStat)[0]
    abstract.eval()
    eval_graph = nnx.graphdef(abstract)
    last_bn, measure_graph = None, eval_graph
    for path, module in nnx.iter_modules(abstract):
        if isinstance(module, LastBN):
            last_bn, module.pass_through = path, True
            measure_graph = nnx.graphdef(abstract)
            module.pass_through = False
    norms: list[Any] = [m for _, m in nnx.iter_modules(abstract) if hasattr(m, "momentum")]
    for norm in norms:
        norm.use_running_average, norm.momentum = False, 0.0
    statistics_graph = nnx.graphdef(abstract)
    network = Network(train_graph, eval_graph, measure_graph, statistics_graph, last_bn, mask)

    def initial_values() -> tuple[Tree, ...]:
        model = create()
        return tuple(
            nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)
        )

    return network, initial_values


def create_state(
    initial_values: Callable[[], tuple[Tree, ...]],
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    counts_skips: bool = False,
) -> TrainState:
    """The state at step 0; to be jitted or shape-evaluated."""
    params, batch_stats = initial_values()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32) if counts_skips else None,
    )


def host_copy(state: TrainState) -> TrainState:
    """The state as NumPy arrays of their own memory.

    On CPU an array may look into the device's, which the next step reuses (it is donated).
    """
    return jax.tree.map(lambda leaf: np.array(jax.device_get(leaf)), state)


def digest(state: Any) -> str:
    """SHA-256 over every leaf of the state, in a fixed order, with name, type and shape.

    Two runs with the same digest have the same step, parameters, statistics and
    optimizer state, bit for bit.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(jax.device_get(leaf))
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def count_parameters(params: Tree) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
