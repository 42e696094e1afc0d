"""NNGP and NTK of finite networks: Monte Carlo over initializations of the real modules.

In the paper's theory weights are standard Gaussians, and their variance is a factor of the layer
(NTK parameterization). Modules hold weights of that variance, so the gradient of each kernel is
weighted by it; what starts constant, such as a bias or BatchNorm's scale, has variance 0 and does
not count.

BatchNorm, and the last BN, are taken in training mode: an output then is a function of the whole
batch, and so are its gradient and both kernels. The NTK is that of the map from the parameters to
the outputs of all images of the batch: how they move together in a step on this batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.methods import Method, Site, create_method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.models.channels import flatten
from mimicnorm_jax.models.mlp import MLP
from mimicnorm_jax.models.unit import ConvUnit
from mimicnorm_jax.theory.kernels import KINDS, Kind

# The method whose layers are those of each kind; all layers of the theory are centred.
_METHODS: dict[Kind, tuple[str, dict[str, Any]]] = {
    "straight": ("nonorm", {}),
    "weight_mean": ("weightmean", {"min_fan_in": 1}),
    "batch_norm": ("batchnorm", {}),
}

Create = Callable[[nnx.Rngs], nnx.Module]
Outputs = Callable[[Any, jax.Array], jax.Array]


class Estimate(NamedTuple):
    """A kernel matrix as the mean over initializations.

    Attributes:
      mean: ``(B, B)``.
      error: ``(B, B)``, the standard error of the mean.
    """

    mean: np.ndarray
    error: np.ndarray


class Kernels(NamedTuple):
    """Both kernels of a finite network; ``ntk`` is None where it was not asked for."""

    nngp: Estimate
    ntk: Estimate | None


def mlp(kind: Kind, depth: int, width: int, image_size: int, channels: int = 1) -> Create:
    """The ``mlp`` of the package whose layer ``depth`` is preceded by ``depth`` ReLUs.

    Args:
      kind: ``"straight"``, ``"weight_mean"`` (every layer centred) or ``"batch_norm"``.
      depth: number of transitions.
      width: features of all hidden layers.
      image_size: of the images.
      channels: of the images.

    Returns:
      A function that makes the network, given ``nnx.Rngs``.

    Raises:
      UserError: a wrong kind or number.
    """
    method = _method(kind)
    if depth < 0 or width < 1:
        raise UserError(f"depth = {depth} must be >= 0, width = {width} >= 1")
    return lambda rngs: create_model(
        "mlp",
        method=method,
        num_classes=1,
        image_size=image_size,
        channels=channels,
        precision="float64" if jax.config.jax_enable_x64 else "float32",  # type: ignore[attr-defined]
        depth=depth + 2,
        hidden_features=width,
        rngs=rngs,
    )


class CNN(nnx.Module):
    """3x3 convolutions of equal width, global average pooling, a classifier.

    Args:
      method: what normalizes the network.
      depth: number of convolutions after the first; each follows a ReLU.
      width: channels.
      channels: of the images.
      num_classes: features of the classifier.
      rngs: for the initial values.
    """

    def __init__(
        self,
        method: Method,
        depth: int,
        width: int,
        channels: int,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        sites = [Site("stem", after_relu=False)] + [Site("inner")] * depth
        inputs = [channels] + [width] * depth
        self.units = nnx.List(
            [
                ConvUnit(method, features, width, (3, 3), site=site, padding=1, rngs=rngs)
                for features, site in zip(inputs, sites, strict=True)
            ]
        )
        self.classifier = method.dense(width, num_classes, site=Site("classifier"), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(B, H, W, C)`` to ``(B, num_classes)``."""
        x = images
        for unit in self.units:
            x = unit(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))


def cnn(kind: Kind, depth: int, width: int, channels: int = 1, num_classes: int = 10) -> Create:
    """The network of ``conv_kernels``, in the package's own layers.

    Its classifier's weights have the variance 2/n that follows a ReLU, not 1/n: its kernels are
    twice those of ``conv_kernels``.

    Args:
      kind: as for ``mlp``.
      depth: number of convolutions after the first; each follows a ReLU.
      width: channels of all convolutions.
      channels: of the images.
      num_classes: features of the classifier.

    Returns:
      A function that makes the network, given ``nnx.Rngs``.

    Raises:
      UserError: a wrong kind or number.
    """
    method = _method(kind)
    if depth < 0 or width < 1:
        raise UserError(f"depth = {depth} must be >= 0, width = {width} >= 1")
    return lambda rngs: CNN(method, depth, width, channels, num_classes, rngs=rngs)


def _method(kind: Kind) -> Method:
    if kind not in KINDS:
        raise unknown("kind of network", kind, KINDS)
    name, options = _METHODS[kind]
    return create_method(name, **options)


def layer_outputs(model: MLP, images: jax.Array) -> list[jax.Array]:
    """What reaches the activation of each hidden layer of an ``mlp``, after its norm.

    These are the paper's h^1, h^2, ... (eq. 1), ``(B, width)`` each, of images ``(B, H, W, C)``.
    """
    x, outputs = flatten(images), []
    for layer, norm, activation in zip(model.layers, model.norms, model.activations, strict=True):
        outputs.append(norm(layer(x)))
        x = activation(outputs[-1])
    return outputs


def pre_activations(depth: int) -> Outputs:
    """The outputs of the layer that ``depth`` ReLUs precede, for ``empirical_kernels``.

    Args:
      depth: number of ReLUs before the layer.

    Returns:
      A function of an ``mlp`` and images ``(B, H, W, C)``, whose result is ``(B, width)``.

    Raises:
      UserError: a negative number.
    """
    if depth < 0:
        raise UserError(f"depth = {depth} is below 0")
    return lambda model, images: layer_outputs(model, images)[depth]


def logits(model: nnx.Module, images: jax.Array) -> jax.Array:
    """The outputs of a whole network, the last BN included where it has one."""
    return model(images)  # type: ignore[operator]


def empirical_kernels(
    create: Create,
    images: jax.Array,
    *,
    outputs: Outputs = logits,
    count: int,
    seed: int = 0,
    directions: int = 0,
    quiet: bool = True,
) -> Kernels:
    """NNGP, and NTK if asked for, of a network at initialization.

    For outputs f of F features, ``nngp = E[f(x) . f(x')] / F`` and
    ``ntk = E[sum_p s_p (df/dp)(x) . (df/dp)(x')] / F``, with s_p the variance with which the
    parameter p starts. The sum over features is taken along random signs v, as
    ``E_v[d(v.f) d(v.f)]``, so it costs one Jacobian of B numbers a direction.

    Args:
      create: makes a network from ``nnx.Rngs``, such as ``mlp(...)``.
      images: ``(B, H, W, C)``, normalized.
      outputs: what the kernels are of; such as ``pre_activations(depth)``.
      count: number of initializations.
      seed: decides them.
      directions: random signs for each initialization; 0 leaves the NTK out. Memory is B times
        that of the parameters.
      quiet: show no progress.

    Returns:
      Both kernels with their standard errors, ``(B, B)`` each.

    Raises:
      UserError: ``count`` is below 2, so that there is no standard error.
    """
    if count < 2:
        raise UserError(f"count = {count}; a standard error needs at least 2 initializations")

    @jax.jit
    def of_one(key: jax.Array) -> dict[str, jax.Array]:
        init_key, sign_key = jax.random.split(key)
        graph, *states = nnx.split(create(nnx.Rngs(init_key)), nnx.Param, ...)
        params, rest = states

        def run(params: Any) -> jax.Array:
            return outputs(nnx.merge(graph, params, rest, copy=True), images)

        out = run(params)
        features = out.shape[1]
        kernels = {"nngp": out @ out.T / features}
        if directions:
            signs = jax.random.rademacher(sign_key, (directions, features), out.dtype)
            of_direction = jax.lax.map(lambda sign: _contracted(run, params, sign), signs)
            kernels["ntk"] = jnp.mean(of_direction, axis=0) / features
        return kernels

    keys = jax.random.split(jax.random.key(seed), count)
    samples = [of_one(key) for key in tqdm(keys, "initializations", disable=quiet)]
    return Kernels(
        _estimate([sample["nngp"] for sample in samples]),
        _estimate([sample["ntk"] for sample in samples]) if directions else None,
    )


def _contracted(run: Callable[[Any], jax.Array], params: Any, sign: jax.Array) -> jax.Array:
    """``sum_p s_p d(v.f)/dp d(v.f)/dp``: ``(B, B)``."""
    jacobian = jax.jacrev(lambda params: run(params) @ sign)(params)
    total = jnp.zeros(())
    for leaf, gradient in zip(jax.tree.leaves(params), jax.tree.leaves(jacobian), strict=True):
        rows = gradient.reshape(len(gradient), -1)
        total = total + jnp.var(leaf) * (rows @ rows.T)
    return total


def _estimate(samples: list[jax.Array]) -> Estimate:
    stacked = np.stack([np.asarray(sample, np.float64) for sample in samples])
    return Estimate(stacked.mean(0), stacked.std(0, ddof=1) / len(stacked) ** 0.5)
