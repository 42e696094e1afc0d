"""Exact statistics for the norms of a network, from a pass over data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimicnorm_jax.convert.substitute import copied
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import LastBN
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.layers.last_bn import checked_mask

Call = Callable[[Any, Any], Any]


def recalibrate(model: nnx.Module, batches: Iterable[Any], *, call: Call | None = None) -> None:
    """Replaces running statistics by those of all the given data, in place.

    Running averages follow a network that is still moving, and after few steps still hold their
    initial values. These hold neither: the mean and variance over every example once, whatever
    the batches are, for each last BN in evaluation mode.

    Where there are BatchNorms as well (``nnx.BatchNorm``), theirs come first, in a pass of its
    own, in which each batch is normalized by its own statistics as in training; dropout drops
    nothing (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", Section 3).

    Example::

      recalibrate(model, [images[i : i + 256] for i in range(0, len(images), 256)])
      model.eval()

    Args:
      model: a network; its parameters and its mode stay.
      batches: of training data, without augmentation. A batch is an array, or a tuple of what
        the network is called with. With BatchNorms they are gone through twice, so a generator
        does not do.
        Labels are none of what a network is called with: of pairs of images and labels give
        ``call``.
      call: ``call(model, batch)`` calls the network with a batch of another kind, such as
        ``lambda model, batch: model(batch["image"])`` or ``model(batch[0])``.

    Raises:
      UserError: a network without norms, no batches, fewer than 2 values for a norm, numbers that
        are not finite, a norm that the network never calls, or an iterator where two passes are
        needed.
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"recalibrate takes an nnx.Module, got {type(model).__name__}")
    if isinstance(batches, np.ndarray | jax.Array):
        raise UserError("recalibrate takes a list of batches: give [images] for a single one")
    originals: dict[Any, Any] = dict(nnx.iter_modules(model))
    last = [path for path, module in originals.items() if isinstance(module, LastBN)]
    others = [path for path, m in originals.items() if isinstance(m, _BATCH_NORMS)]
    if not last and not others:
        raise UserError("the network has no LastBN and no BatchNorm to recalibrate")
    for path in (*last, *others):
        if originals[path].mean[...].ndim != 1:
            raise UserError(
                f"{_name(path)} is a stack of norms (nnx.vmap, nnx.scan), which recalibrate does "
                "not understand"
            )
    if last and others and iter(batches) is batches:
        raise UserError(
            "a network with BatchNorms and a last BN needs two passes over the batches: give a "
            f"list rather than a {type(batches).__name__}"
        )
    for paths, evaluates in ((others, False), (last, True)):
        if paths:
            trains = [] if evaluates else others
            found = _moments(model, paths, batches, call or _call, trains)
            for path, moments in found.items():
                moments.store(originals[path], _name(path))


def _name(path: Any) -> str:
    return "/".join(map(str, path)) or "the norm"


class _Moments(NamedTuple):
    """Of the values of each channel, merged after Chan et al. 1979.

    Attributes:
      count: number of values.
      mean: ``(C,)``.
      squares: sum of the squared distances from the mean, ``(C,)``.
    """

    count: Any
    mean: Any
    squares: Any

    def merged(self, other: _Moments, divide: Callable[[Any, Any], Any]) -> _Moments:
        count = self.count + other.count
        step, share = other.mean - self.mean, divide(other.count, count)
        squares = self.squares + other.squares + step**2 * self.count * share
        return _Moments(count, self.mean + step * share, squares)

    def store(self, norm: Any, name: str) -> None:
        if not self.count:
            raise UserError(f"{name}: the network did not call it with these batches")
        if self.count < 2:
            raise UserError(f"{name}: statistics need at least 2 values, got {int(self.count)}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.squares).all()):
            raise UserError(f"{name}: not all of what reaches it is finite")
        keeps_biased = isinstance(norm, nnx.BatchNorm)  # as each of them does in training
        var = self.squares / (self.count if keeps_biased else self.count - 1)
        for statistic, value in ((norm.mean, self.mean), (norm.var, var)):
            statistic[...] = jnp.asarray(value, statistic[...].dtype)


def _divide(a: Any, b: Any) -> Any:
    return a / jnp.maximum(b, 1)


def _moments_of(x: jax.Array, axes: tuple[int, ...], mask: Any) -> _Moments:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kept = jnp.broadcast_to(jnp.ones((), bool) if mask is None else mask, x.shape)
    count = jnp.sum(kept, axis=axes).astype(wide.dtype)
    mean = jnp.sum(jnp.where(kept, wide, 0), axis=axes) / jnp.maximum(count, 1)
    around = jnp.where(kept, wide - jnp.expand_dims(mean, axes), 0)
    return _Moments(count.max(), mean, jnp.sum(jnp.square(around), axis=axes))


class _Record(nnx.Variable):  # type: ignore[type-arg]
    """The moments of what a norm was given."""


def _record(norm: Any, x: jax.Array, axes: tuple[int, ...], mask: Any = None) -> None:
    found = _moments_of(x, axes, mask)
    norm.record.set_value(tuple(_Moments(*norm.record.get_value()).merged(found, _divide)))


class _RecordingLastBN(LastBN):
    def statistics(self, logits: Any, *_: Any, mask: Any = None) -> Any:
        chosen = checked_mask(mask, logits)
        kept = None if chosen is None else chosen[..., None]
        _record(self, logits, tuple(range(logits.ndim - 1)), kept)
        return super().statistics(logits, mask=mask)


class _RecordingShiftedBatchNorm(ShiftedBatchNorm):
    def __call__(self, x: jax.Array) -> jax.Array:
        _record(self, x, tuple(range(x.ndim - 1)))
        return super().__call__(x)


class _RecordingBatchNorm(nnx.BatchNorm):
    def __call__(self, x: Any, *_: Any, mask: Any = None, **__: Any) -> Any:
        # Whether it evaluates is not the caller's to say here.
        features = {axis % x.ndim for axis in np.atleast_1d(self.axis).tolist()}
        _record(self, x, tuple(axis for axis in range(x.ndim) if axis not in features), mask)
        return super().__call__(x, mask=mask)


_RECORDING = {
    LastBN: _RecordingLastBN,
    ShiftedBatchNorm: _RecordingShiftedBatchNorm,
    nnx.BatchNorm: _RecordingBatchNorm,
}
_BATCH_NORMS = (ShiftedBatchNorm, nnx.BatchNorm)


@functools.cache
def _recording(kind: Any) -> Any:
    """A class of norms that records, behind whatever a subclass does before it calls the norm."""
    base = next(recording for norm, recording in _RECORDING.items() if issubclass(kind, norm))
    own = (base,) if base.__base__ is kind else (kind, base)
    return type(kind.__name__, own, {"__module__": kind.__module__})


def _call(model: Any, batch: Any) -> Any:
    if isinstance(batch, dict):
        raise UserError(
            f"a batch with names ({', '.join(map(str, batch))}) needs call=, such as "
            "lambda model, batch: model(batch['image'])"
        )
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    try:
        inspect.signature(type(model).__call__).bind(model, *args)
    except TypeError as error:
        raise UserError(
            f"a batch of {len(args)} parts does not fit the network ({error}): say how it is "
            "called, such as call=lambda model, batch: model(batch[0])"
        ) from None
    return model(*args)


def _moments(
    model: nnx.Module, paths: list[Any], batches: Iterable[Any], call: Call, trains: list[Any]
) -> dict[Any, _Moments]:
    """What some norms are given, over all batches; float64.

    Args:
      model: the network.
      paths: of the norms.
      batches, call: of ``recalibrate``.
      trains: the norms that normalize by the statistics of each batch meanwhile.
    """
    copy = copied(model)
    copy.eval()
    for path, module in nnx.iter_modules(copy):
        if not isinstance(module, LastBN | nnx.BatchNorm | ShiftedBatchNorm):
            continue
        norm: Any = module
        kind: Any = type(norm)
        object.__setattr__(norm, "__class__", _recording(kind))
        zeros = jnp.zeros(norm.mean.shape, jnp.promote_types(norm.mean.dtype, jnp.float32))
        norm.record = _Record((zeros.sum(), zeros, zeros))
        norm.use_running_average, norm.axis_name = path not in trains, None
    graph, state = nnx.split(copy)

    @functools.partial(jax.jit, static_argnums=0)
    def run(fixed: _Fixed, state: Any, arrays: Any) -> dict[Any, Any]:
        network = nnx.merge(graph, state, copy=True)
        call(network, fixed.with_arrays(arrays))
        parts: dict[Any, Any] = dict(nnx.iter_modules(network))
        return {str(path): parts[path].record.get_value() for path in paths}

    total: dict[Any, _Moments] = {}
    for batch in batches:
        found = jax.device_get(run(*_Fixed.of(batch, state)))
        for path in paths:
            new = _Moments(*(np.asarray(part, np.float64) for part in found[str(path)]))
            total[path] = total[path].merged(new, _divide_host) if path in total else new
    if not total:
        raise UserError("recalibrate was given no batches")
    return total


def _divide_host(a: Any, b: Any) -> Any:
    return a / np.maximum(b, 1)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What is no array in a batch, such as ``True``: a part of the program."""

    structure: Any
    others: tuple[Any, ...]

    @classmethod
    def of(cls, batch: Any, state: Any) -> tuple[_Fixed, Any, list[Any]]:
        leaves, structure = jax.tree.flatten(batch)
        is_array = [isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves]
        others = tuple(None if a else x for a, x in zip(is_array, leaves, strict=True))
        arrays = [x for a, x in zip(is_array, leaves, strict=True) if a]
        return cls(structure, others), state, arrays

    def with_arrays(self, arrays: list[Any]) -> Any:
        given = iter(arrays)
        leaves = [next(given) if one is None else one for one in self.others]
        return jax.tree.unflatten(self.structure, leaves)
