"""A network that is watched: what its layers measure, and what theory predicts.

A ``Probe`` is made of a network's own code with a ``Method`` that answers with the layers of
another method, each wrapped: they take arrays and note down statistics, or take a ``Signal``
and return the predicted one.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import Dropout
from mimicnorm_jax.layers.last_bn import cross_entropy
from mimicnorm_jax.methods import Branch, Function, Method, Site
from mimicnorm_jax.models import create_model
from mimicnorm_jax.parallel import quick_compilation
from mimicnorm_jax.theory.prediction import predict
from mimicnorm_jax.theory.signal import Signal, divide, observe

CHANNELS_SHOWN = 30  # as many as in the paper's Figure 2
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@flax.struct.dataclass
class Measured:
    """Statistics of a layer's pre-activations ``(B, ..., C)``.

    Attributes:
      mean, variance, second_moment: over everything.
      dead: fraction of the channels that are nowhere positive, so that ReLU shuts them.
      correlation: mean cosine of the pre-activations of two different images.
      quantiles: ``(channels, 5)``, of the values of each of the first channels over images
        and positions, at ``QUANTILES``.
    """

    mean: jax.Array
    variance: jax.Array
    second_moment: jax.Array
    dead: jax.Array
    correlation: jax.Array
    quantiles: jax.Array


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known about one layer (or residual addition).

    Attributes:
      name: its path in the network.
      measured: statistics of its pre-activations.
      gradient_norm: norm of the loss's gradient with respect to its kernel; None for an
        addition, or without labels.
      predicted_second_moment, predicted_correlation: what theory expects.
    """

    name: str
    measured: Measured
    gradient_norm: float | None
    predicted_second_moment: float
    predicted_correlation: float


def measure(x: jax.Array) -> Measured:
    """Statistics of pre-activations ``(B, ..., C)``."""
    x = x.astype(jnp.float32)
    batch = len(x)
    by_channel = x.reshape(-1, x.shape[-1])
    flat = x.reshape(batch, -1)
    norms = jnp.linalg.norm(flat, axis=1, keepdims=True)
    unit = divide(flat, norms)
    pairs = jnp.sum(jnp.square(jnp.sum(unit, axis=0))) - jnp.sum(norms > 0)
    return Measured(
        mean=jnp.mean(x),
        variance=jnp.var(x),
        second_moment=jnp.mean(jnp.square(x)),
        dead=jnp.mean(jnp.max(by_channel, axis=0) <= 0),
        correlation=pairs / max(batch * (batch - 1), 1),
        quantiles=jnp.quantile(by_channel[:, :CHANNELS_SHOWN], jnp.array(QUANTILES), axis=0).T,
    )


class _Tape:
    """What one pass through a network leaves behind.

    Attributes:
      records: ``Measured`` or ``Signal`` by name, in the order of the pass.
      layer: the path of the layer that was passed last.
    """

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.layer = ""

    def record(self, name: str, x: jax.Array | Signal) -> None:
        self.records[name] = x if isinstance(x, Signal) else measure(x)


_TAPE: contextvars.ContextVar[_Tape] = contextvars.ContextVar("tape")


class _Part(nnx.Module):
    """A part of a network that also takes signals.

    ``path``, where it is in the network, is set when that is complete.
    """

    def __init__(self, part: Callable[..., Any]):
        self.part = part
        self.path = ""

    def __call__(self, *inputs: Any) -> Any:
        if isinstance(inputs[0], Signal):
            return predict(self.part, *inputs)
        return self.part(*inputs)


class _Layer(_Part):
    """A convolution or dense layer, whose norm or own end is what is recorded."""

    def __call__(self, *inputs: Any) -> Any:
        _TAPE.get().layer = self.path
        return super().__call__(*inputs)


class _LayerEnd(_Part):
    """A norm, or nothing: its output is the pre-activation of the layer before."""

    def __call__(self, *inputs: Any) -> Any:
        outputs = super().__call__(*inputs)
        tape = _TAPE.get()
        tape.record(tape.layer.removesuffix("/conv"), outputs)
        return outputs


class _LayerWithEnd(_LayerEnd):
    """A dense layer that no norm follows."""

    def __call__(self, *inputs: Any) -> Any:
        _TAPE.get().layer = self.path
        return super().__call__(*inputs)


class _Merge(_Part):
    """A residual addition."""

    def __call__(self, *inputs: Any) -> Any:
        outputs = super().__call__(*inputs)
        _TAPE.get().record(self.path, outputs)
        return outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Watched(Method):
    """The answers of another method, as parts that also take signals."""

    method: Method

    def _answers(self) -> Method:
        return dataclasses.replace(self.method, precision=self.precision)

    def conv(self, *args: Any, **kwargs: Any) -> Function:
        return _Layer(self._answers().conv(*args, **kwargs))

    def dense(self, in_features: int, out_features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        alone = site.role in ("hidden_dense", "classifier")
        dense = self._answers().dense(in_features, out_features, site=site, rngs=rngs)
        return (_LayerWithEnd if alone else _Layer)(dense)

    def norm(self, features: int, *, site: Site, rngs: nnx.Rngs) -> Function:
        return _LayerEnd(self._answers().norm(features, site=site, rngs=rngs))

    def activation(self, *, site: Site) -> Function:
        return _Part(self._answers().activation(site=site))

    def merge(self, *, branch: Branch) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return _Merge(self._answers().merge(branch=branch))

    def head(self, num_classes: int) -> Function:
        return _Part(self._answers().head(num_classes))


class Probe:
    """A network under observation.

    Example::

      probe = Probe("vgg16", method=create_method("mimicnorm"), num_classes=10, image_size=32)
      for layer in probe.layers(images, labels):
          print(layer.name, layer.measured.second_moment, layer.predicted_second_moment)

    Args:
      name: of ``mimicnorm_jax.models.NETWORKS``.
      method: what normalizes it.
      seed: decides the initial values.
      **options: as for ``create_model``.

    Raises:
      UserError: as ``create_model``.
    """

    def __init__(self, name: str, *, method: Method, seed: int = 0, **options: Any):
        create = functools.partial(create_model, name, **options)
        nnx.eval_shape(lambda: create(method=method, rngs=nnx.Rngs(0)))  # does it fit?

        def watched(seed: int | jax.Array) -> nnx.Module:
            rngs = nnx.Rngs(jax.random.key(seed))
            return _find_parts(create(method=_Watched(method=method), rngs=rngs))

        def initial_values(seed: jax.Array) -> Any:
            return nnx.split(watched(seed), nnx.Param, nnx.BatchStat)[1:]

        abstract = nnx.eval_shape(lambda: watched(0))
        self._graph = nnx.split(abstract, nnx.Param, nnx.BatchStat)[0]
        self._initialize = jax.jit(
            initial_values, compiler_options=quick_compilation(jax.default_backend())
        )
        self._differentiate = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        self.draw(seed)

    def draw(self, seed: int) -> None:
        """Draws other initial values.

        Args:
          seed: decides them.
        """
        self._params, self._stats = self._initialize(jnp.uint32(seed))

    def load(self, params: Any) -> None:
        """Takes the parameters of a ``TrainState`` of the same network and method.

        Its running statistics are not needed: a probe normalizes by the batch.
        """
        for path, variable in nnx.to_flat_state(self._params):
            value = params
            for key in path:
                if key != "part":
                    value = value[key]
            variable[...] = value

    def layers(self, images: jax.Array, labels: jax.Array | None = None) -> list[Layer]:
        """Measures and predicts every layer, in training mode without dropout.

        Args:
          images: normalized, ``(B, H, W, C)``, B at least 2.
          labels: ``(B,)``, for the gradient of the mean cross-entropy; None for none.

        Returns:
          What is known about every layer and residual addition, in the order of the network.

        Raises:
          UserError: a single image, or a part of the network that has no prediction.
        """
        if len(images) < 2:
            raise UserError("a probe needs at least 2 images: batch statistics are of several")
        norms: list[tuple[str, float]] = []
        if labels is None:
            tape, _ = self._run(self._params, images)
            measured = tape.records
        else:
            (_, statistics), gradients = self._differentiate(self._params, images, labels)
            measured = dict(zip(self._names, statistics, strict=True))
            norms = _kernel_norms(gradients)
        predicted = self.predict(images)
        return [
            Layer(
                name=name,
                measured=jax.device_get(statistics),
                gradient_norm=next((n for k, n in norms if k.startswith(f"{name}/")), None),
                predicted_second_moment=float(predicted[name].second_moment()),
                predicted_correlation=float(predicted[name].correlation()),
            )
            for name, statistics in measured.items()
        ]

    def predict(self, images: jax.Array) -> dict[str, Signal]:
        """The predicted signal of every layer, by name and in the order of the network.

        Args:
          images: normalized, ``(B, H, W, C)``.

        Raises:
          UserError: a part of the network has no prediction.
        """
        tape, _ = self._run(self._params, observe(images))
        return tape.records

    def _run(self, params: Any, inputs: jax.Array | Signal) -> tuple[_Tape, Any]:
        token = _TAPE.set(_Tape())
        try:
            model = nnx.merge(self._graph, params, self._stats, copy=True)
            outputs = model(inputs)
            return _TAPE.get(), outputs
        finally:
            _TAPE.reset(token)

    def _loss(self, params: Any, images: jax.Array, labels: jax.Array) -> Any:
        tape, logits = self._run(params, images)
        self._names = list(tape.records)  # as it is traced; arrays only may be returned
        return jnp.mean(cross_entropy(logits, labels)), list(tape.records.values())


def _find_parts(model: nnx.Module) -> nnx.Module:
    """Tells the parts where they are, and switches dropout off."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Part):
            module.path = "/".join(map(str, path))
        if isinstance(module, Dropout):
            module.deterministic = True
    return model


def _kernel_norms(gradients: Any) -> list[tuple[str, float]]:
    """Path and gradient norm of every kernel."""
    return [
        ("/".join(map(str, path)), float(jnp.linalg.norm(variable[...])))
        for path, variable in nnx.to_flat_state(gradients)
        if path[-1] == "kernel"
    ]
