"""The signal of a network at initialization, predicted position by position.

With many channels, what a layer does to a *given* image is a law of large numbers over the
channels. A ``Signal`` holds what is left of the activations: for every image and position the
mean over channels, the mean square, and the mean products with other positions and images.
Each operation of a network is a function from signal to signal; ``predict`` and the single
dispatch in ``mimicnorm_jax.models`` run a network's own code on them.

What is exact for many channels: convolutions (centred or not, strided, padded, depthwise),
dense layers, additions and concatenations of independent signals, and ReLU of a Gaussian.
What is approximated, as each function says: ReLU of a sum, max-pools, global average pools,
and BatchNorm.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.theory import marginal as marginals

Pads = tuple[tuple[int, int], tuple[int, int]]


class Offset(NamedTuple):
    """The partner of (image b, row y, column x) is (b + images, y + dy, x + dx)."""

    images: int
    dy: int
    dx: int


@flax.struct.dataclass
class Signal:
    """Statistics over the channels x_c of an activation ``(B, H, W, C)``.

    Attributes:
      mean: ``(B, H, W)``, E_c[x_c].
      moment: ``(B, H, W)``, E_c[x_c^2].
      products: ``(D, B, H, W)``, E_c[x_c x'_c] with the partner x' at each offset; 0 where
        the partner is outside of the image. Images are numbered modulo B.
      marginal: ``(G,)``, the distribution of x_c / sqrt(moment), see ``marginal``: one for
        all positions.
      offsets: the D offsets: powers of two along rows, columns and diagonals, and all other
        images at the same position and along a diagonal.
      features: C.
      observed: whether the channels are given, as those of an image are, and not drawn at
        random, as those of a layer are.
    """

    mean: jax.Array
    moment: jax.Array
    products: jax.Array
    marginal: jax.Array
    offsets: tuple[Offset, ...] = flax.struct.field(pytree_node=False)
    features: int = flax.struct.field(pytree_node=False)
    observed: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def variance(self) -> jax.Array:
        """``(B, H, W)``, the variance over channels."""
        return jnp.maximum(self.moment - jnp.square(self.mean), 0.0)

    def second_moment(self) -> jax.Array:
        """Mean of x^2 over images, positions and channels."""
        return jnp.mean(self.moment)

    def correlation(self) -> jax.Array:
        """Mean cosine of the activations of two different images."""
        power = jnp.mean(self.moment, axis=(1, 2))
        batch = len(power)
        total, pairs = jnp.zeros(()), 0
        for products, offset in zip(self.products, self.offsets, strict=True):
            if offset in other_images(self):
                norms = jnp.sqrt(power * jnp.roll(power, -offset.images))
                # half of the batch away, every pair is met twice
                count = batch if 2 * offset.images < batch else batch // 2
                cosines = divide(jnp.mean(products, axis=(1, 2)), norms)
                total += count * jnp.mean(cosines)
                pairs += count
        return total / max(pairs, 1)


def partners_of(field: jax.Array, offsets: tuple[Offset, ...]) -> jax.Array:
    """``(D, B, H, W)``: the values of all partners of ``(B, H, W)``; 0 outside of the image."""
    if not offsets:
        return jnp.zeros((0, *field.shape), field.dtype)
    margin = max(max(abs(offset.dy), abs(offset.dx)) for offset in offsets)
    starts = [(o.images % len(field), margin + o.dy, margin + o.dx) for o in offsets]
    return _cut(field, jnp.array(starts), margin=margin)


@functools.partial(jax.jit, static_argnames="margin")
def _cut(field: jax.Array, starts: jax.Array, *, margin: int) -> jax.Array:
    """Equally large parts of the field, which begins anew after its last image.

    One program, whatever the offsets are: an operation for each would be compiled for each.
    """
    border = (margin, margin)
    padded = jnp.pad(jnp.concatenate([field, field]), ((0, 0), border, border))
    return jax.vmap(lambda start: lax.dynamic_slice(padded, start, field.shape))(starts)


def take(signal: Signal, offsets: tuple[Offset, ...]) -> jax.Array:
    """The products at some of the offsets."""
    indices = [signal.offsets.index(offset) for offset in offsets]
    return signal.products[jnp.array(indices, int)]


def other_images(signal: Signal) -> tuple[Offset, ...]:
    """The offsets of the same position in other images."""
    return tuple(o for o in signal.offsets if o.images and not (o.dy or o.dx))


def after_stride(signal: Signal, stride: int) -> tuple[jax.Array, tuple[Offset, ...]]:
    """The products that are left by a stride, and their offsets after it."""
    kept = tuple(o for o in signal.offsets if o.dy % stride == 0 and o.dx % stride == 0)
    return take(signal, kept), tuple(Offset(o.images, o.dy // stride, o.dx // stride) for o in kept)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and 0 where the denominator is 0: nothing is there."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def observe(images: jax.Array) -> Signal:
    """The signal of given images, from which a network's is predicted.

    Args:
      images: ``(B, H, W, C)``, normalized.

    Returns:
      Their statistics over the channels C, in float32.
    """
    batch, height, width, channels = images.shape
    shifts = range(1, batch // 2 + 1)
    offsets = [Offset(shift, 0, 0) for shift in shifts]
    step = 1
    while step < max(height, width):
        directions = ((0, step), (step, 0), (step, step), (step, -step))
        offsets += [Offset(0, dy, dx) for dy, dx in directions]
        offsets += [Offset(shift, at, at) for shift in shifts for at in (step, -step)]
        step *= 2
    images = jnp.asarray(images, jnp.float32)
    partners = jax.vmap(functools.partial(partners_of, offsets=tuple(offsets)), -1, -1)(images)
    return Signal(
        mean=jnp.mean(images, axis=-1),
        moment=jnp.mean(jnp.square(images), axis=-1),
        products=jnp.mean(images[None] * partners, axis=-1),
        marginal=marginals.gaussian(),
        offsets=tuple(offsets),
        features=channels,
        observed=True,
    )


def window_mean(field: jax.Array, size: tuple[int, int], stride: int, padding: Pads) -> jax.Array:
    """Mean over windows of ``(..., H, W)``, zeros of the padding included."""
    rest = (1,) * (field.ndim - 2)
    total = lax.reduce_window(
        field,
        0.0,
        lax.add,
        (*rest, *size),
        (*rest, stride, stride),
        [(0, 0)] * len(rest) + list(padding),
    )
    return total / math.prod(size)


def window_correlation(signal: Signal, size: tuple[int, int]) -> jax.Array:
    """Mean correlation ``(B, H, W)`` of two different positions of a window.

    Of the pairs of positions those at known offsets count, each as often as it fits into
    the window.
    """
    offsets = tuple(
        o for o in signal.offsets if not o.images and abs(o.dy) < size[0] and abs(o.dx) < size[1]
    )
    if not offsets:
        return jnp.zeros_like(signal.moment)
    fits = jnp.array([(size[0] - abs(o.dy)) * (size[1] - abs(o.dx)) for o in offsets])
    covariance = take(signal, offsets) - signal.mean[None] * partners_of(signal.mean, offsets)
    norms = jnp.sqrt(signal.variance[None] * partners_of(signal.variance, offsets))
    weights = fits[:, None, None, None] * (norms > 0)
    correlation = divide(covariance, norms)
    mean = jnp.sum(weights * correlation, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1)
    return jnp.clip(mean, 0.0, 1.0)


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve(
    signal: Signal, kernel: jax.Array, bias: jax.Array, *, stride: int, padding: Pads
) -> Signal:
    """A convolution whose weights are those of ``kernel`` in random order.

    For one output channel with n weights, of sum t and sum of squares s, and inputs of mean
    m and mean square q over the n places, the expected square over all orders is
    ``(s - t^2/n) n/(n-1) (q - m^2) + t^2 m^2``: a centred kernel (t = 0) sees the variance of
    its inputs only. The mean m itself fluctuates, as it is over finitely many channels.

    Args:
      signal: of the input.
      kernel: ``(h, w, channels of a group, out)``.
      bias: ``(out,)``.
      stride: along both axes.
      padding: zeros before and after each axis.
    """
    size = (kernel.shape[0], kernel.shape[1])
    fan_in = math.prod(kernel.shape[:-1])
    sums = jnp.sum(kernel, axis=(0, 1, 2))
    squares = jnp.sum(jnp.square(kernel), axis=(0, 1, 2))
    square_of_sum = jnp.mean(jnp.square(sums))
    spread = (jnp.mean(squares) * fan_in - square_of_sum) / max(fan_in - 1, 1)
    box = functools.partial(window_mean, size=size, stride=stride, padding=padding)
    mean, moment = box(signal.mean), box(signal.moment)
    products, offsets = after_stride(signal, stride)
    # variance of m over choices of the channels, as a part of the variance of the inputs
    fluctuation = jnp.zeros_like(mean)
    if not signal.observed:
        places = math.prod(size)
        within = box(window_correlation(signal, size))
        fluctuation = (1 + (places - 1) * within) / places / kernel.shape[2]

    def second(product: jax.Array, square: jax.Array, fluctuation: jax.Array) -> jax.Array:
        square = square + fluctuation * (product - square)
        return spread * (product - square) + square_of_sum * square

    bias_terms = jnp.mean(jnp.square(bias)), jnp.mean(bias * sums)

    def with_bias(second: jax.Array, means: jax.Array) -> jax.Array:
        return second + bias_terms[0] + bias_terms[1] * means

    partners = partners_of(mean, offsets)
    inside = partners_of(jnp.ones_like(mean), offsets)
    return Signal(
        mean=jnp.mean(sums) * mean + jnp.mean(bias),
        moment=with_bias(second(moment, jnp.square(mean), fluctuation), 2 * mean),
        products=inside
        * with_bias(
            second(box(products), mean[None] * partners, fluctuation[None]), mean[None] + partners
        ),
        marginal=marginals.gaussian(),
        offsets=offsets,
        features=kernel.shape[-1],
    )


@jax.jit
def relu(signal: Signal) -> Signal:
    """ReLU: exact for Gaussians of mean 0, as after a layer with a random kernel.

    Else (after an addition) two approximations: the distribution over channels has the
    same form at all positions, and two positions are a Gaussian copula.
    """
    rectified = jnp.maximum(signal.marginal, 0)
    moment = marginals.expectation(jnp.square(rectified))
    before = marginals.correlation_table(signal.marginal)
    after = marginals.correlation_table(rectified)
    power = jnp.sqrt(signal.moment)
    norms = power[None] * partners_of(power, signal.offsets)
    cosines = jnp.clip(divide(signal.products, norms), -1.0, 1.0)
    correlations = marginals.copula_correlation(cosines, before)
    return Signal(
        mean=power * marginals.expectation(rectified),
        moment=signal.moment * moment,
        products=moment * norms * marginals.cosine_of(correlations, after),
        marginal=marginals.normalize(rectified),
        offsets=signal.offsets,
        features=signal.features,
    )


@jax.jit
def add(a: Signal, b: Signal) -> Signal:
    """The sum of two signals whose channels are independent of each other."""
    offsets = tuple(offset for offset in a.offsets if offset in b.offsets)
    means_a, means_b = partners_of(a.mean, offsets), partners_of(b.mean, offsets)
    total = marginals.sum_of(
        a.marginal * jnp.sqrt(a.second_moment()), b.marginal * jnp.sqrt(b.second_moment())
    )
    return Signal(
        mean=a.mean + b.mean,
        moment=a.moment + b.moment + 2 * a.mean * b.mean,
        products=take(a, offsets)
        + take(b, offsets)
        + a.mean[None] * means_b
        + b.mean[None] * means_a,
        marginal=marginals.normalize(total),
        offsets=offsets,
        features=a.features,
    )


@jax.jit
def shift(signal: Signal, bias: jax.Array) -> Signal:
    """Adds the scalar ``bias`` to every activation."""
    partners = partners_of(signal.mean, signal.offsets)
    inside = partners_of(jnp.ones_like(signal.mean), signal.offsets)
    shifted = signal.marginal * jnp.sqrt(signal.second_moment()) + bias
    return dataclasses.replace(
        signal,
        mean=signal.mean + bias,
        moment=signal.moment + 2 * bias * signal.mean + bias**2,
        products=signal.products + inside * (bias * (signal.mean[None] + partners) + bias**2),
        marginal=marginals.normalize(shifted),
    )


@jax.jit
def concatenate(a: Signal, b: Signal) -> Signal:
    """The channels of both, in any order."""
    features = a.features + b.features
    fraction = a.features / features
    offsets = tuple(offset for offset in a.offsets if offset in b.offsets)

    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        return fraction * x + (1 - fraction) * y

    mixed = marginals.mixture_of(
        a.marginal * jnp.sqrt(a.second_moment()),
        b.marginal * jnp.sqrt(b.second_moment()),
        fraction,
    )
    return Signal(
        mean=mix(a.mean, b.mean),
        moment=mix(a.moment, b.moment),
        products=mix(take(a, offsets), take(b, offsets)),
        marginal=marginals.normalize(mixed),
        offsets=offsets,
        features=features,
    )


def halves(signal: Signal) -> tuple[Signal, Signal]:
    """Half of the channels, and the others."""
    half = dataclasses.replace(signal, features=signal.features // 2)
    return half, half


def identity_shortcut(signal: Signal, *, strides: int, features: int) -> Signal:
    """Every ``strides``-th position, and channels of zeros."""
    products, offsets = after_stride(signal, strides)
    signal = dataclasses.replace(
        signal,
        mean=signal.mean[:, ::strides, ::strides],
        moment=signal.moment[:, ::strides, ::strides],
        products=products[..., ::strides, ::strides],
        offsets=offsets,
    )
    zeros = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, signal), features=features - signal.features
    )
    return concatenate(signal, zeros) if zeros.features else signal
