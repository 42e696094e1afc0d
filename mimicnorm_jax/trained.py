"""A trained network as its run left it, ready to be asked: ``mimicnorm_jax.load``."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mimicnorm_jax.errors import UserError, refused_by_system, unknown
from mimicnorm_jax.paths import expanded

if TYPE_CHECKING:  # slow to import
    from flax import nnx
    from ml_collections import ConfigDict

    from mimicnorm_jax.train.description import Description

Which = Literal["best", "latest"]
ImageLike = str | os.PathLike[str] | bytes | np.typing.ArrayLike
Images = np.ndarray | Iterable[ImageLike]

_MOST = 64  # images in a batch: what predictions take at a time


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedNetwork:
    """A network with what is needed to use it. ``load`` makes one.

    Attributes:
      model: the network in evaluation mode: normalized images ``(B, H, W, C)`` to logits
        ``(B, num_classes)``.
      classes: their names, in the order of the logits.
      image_shape: ``(H, W, C)``.
      mean, std: of each channel, in units of 1: images are normalized to
        ``(image / 255 - mean) / std``.
      step: of the checkpoint.
      temperature: by which the logits are divided for the probabilities; None where the run held no
        images out (``config.data.holdout``) to find it.
      config: the run's configuration.
      description: of the images that it was trained on.
    """

    model: nnx.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    temperature: float | None
    config: ConfigDict
    description: Description

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        return (
            f"<TrainedNetwork {self.config.network}, {self.config.method}: {len(self.classes)} "
            f"classes, images of {shape}, step {self.step}>"
        )

    def preprocess(self, image: ImageLike) -> np.ndarray:
        """Brings one image to the size that the network takes, as its evaluation did.

        The short side is resized, and the centre cropped.

        Args:
          image: the path of an image file; its content; or pixels of any size, uint8 ``(H, W)``,
            ``(H, W, 1)`` or ``(H, W, 3)``, as an array of NumPy or JAX or an image of Pillow.

        Returns:
          uint8 ``image_shape``.

        Raises:
          UserError: no image, or a damaged one.
        """
        from mimicnorm_jax.data.images import centre_crop, with_channels

        view = self.description.view
        cropped = centre_crop(self._decode(image), view.size, view.resize)
        return with_channels(cropped, self.image_shape[-1])

    def _decode(self, image: ImageLike) -> np.ndarray:
        from mimicnorm_jax.data.images import decode

        if hasattr(image, "__array__") or hasattr(image, "__array_interface__"):  # of Pillow
            return _checked(np.asarray(image))
        if not isinstance(image, str | bytes | os.PathLike):
            raise UserError(
                f"an image is a {type(image).__name__}; allowed: a path, bytes or an array"
            )
        name = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
        if not isinstance(image, bytes):
            with refused_by_system(f"cannot read image {name}"):
                image = expanded(image).read_bytes()
        try:
            return decode(image, upright=self.description.view.upright)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"cannot read image {name}: {reason}") from error

    def logits(self, images: Images) -> np.ndarray:
        """What the network puts out, float32 or float64 ``(N, num_classes)``.

        Args:
          images: uint8 ``(N, *image_shape)``; or a list of what ``preprocess`` takes.

        Raises:
          UserError: as ``preprocess``; or pixels of another type or shape.
        """
        pixels = self._batch(images)
        found = [np.zeros((0, len(self.classes)), np.float32)] if not len(pixels) else []
        for start in range(0, len(pixels), _MOST):
            part = pixels[start : start + _MOST]
            # few sizes are compiled: powers of two
            size = 1 << (len(part) - 1).bit_length()
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            found.append(np.asarray(self._forward(padded))[: len(part)])
        return np.concatenate(found)

    def _batch(self, images: Images) -> np.ndarray:
        if isinstance(images, str | bytes | os.PathLike):
            raise UserError("one image was given; put it into a list: [image]")
        if hasattr(images, "__array__"):
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
                raise UserError(
                    f"images of type {images.dtype} and shape {images.shape}; allowed: uint8 "
                    f"{('N', *self.image_shape)}, or a list of images of any size"
                )
            return images
        if not isinstance(images, Iterable):
            raise UserError(f"images are a {type(images).__name__}; allowed: a list, or an array")
        made = [self.preprocess(image) for image in images]
        return np.stack(made) if made else np.zeros((0, *self.image_shape), np.uint8)

    @functools.cached_property
    def _forward(self) -> Any:
        import jax
        from flax import nnx

        from mimicnorm_jax.data.augment import normalize
        from mimicnorm_jax.precision import resolve_precision

        precision = resolve_precision(self.config.precision)
        graph, state = nnx.split(self.model)

        def forward(state: Any, images: jax.Array) -> jax.Array:
            x = normalize(images, mean=self.mean, std=self.std, dtype=precision.param_dtype)
            model: Any = nnx.merge(graph, state)
            return model(x.astype(precision.dtype))

        return functools.partial(jax.jit(forward), state)

    def predict(self, images: Images) -> np.ndarray:
        """Probabilities of the classes, float32 or float64 ``(N, num_classes)``.

        They are the softmax of the logits, divided by the temperature if there is one. Without
        it, with a last BN, which bounds the logits, even a network that is always right looks
        unsure: 10 classes leave it at about 0.76.

        Arguments and errors as ``logits``.
        """
        x = self.logits(images)
        x = x / np.asarray(self.temperature or 1.0, x.dtype)
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def _checked(image: np.ndarray) -> np.ndarray:
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    if image.dtype != np.uint8 or not is_image or not image.size:
        raise UserError(
            f"an image of type {image.dtype} and shape {image.shape}; allowed: uint8 (H, W), "
            "(H, W, 1) or (H, W, 3)"
        )
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def load(run: str | os.PathLike[str], which: Which = "best") -> TrainedNetwork:
    """The network of a run, to be used.

    It needs no data of the run, unless a version made it that did not keep the names of the
    classes; or unless it averages its parameters (``optimizer.ema_decay``), whose statistics
    are estimated on training images.

    Args:
      run: the run's folder; or one that ``python -m mimicnorm_jax.tools.export`` made of it, which
        has one network only.
      which: the checkpoint of the best accuracy (on the images held out; without them on the test
        images), or the latest.

    Raises:
      UserError: no run, one without checkpoints that can be read, one of another version, or
        data that are needed and missing.
    """
    if which not in get_args(Which):
        raise unknown("which", which, get_args(Which))
    from mimicnorm_jax.export.rebuilt import is_export, restore_export
    from mimicnorm_jax.train.restored import restore

    folder = expanded(run)
    found = restore_export(folder) if is_export(folder) else restore(folder, which)
    images = found.description.images
    return TrainedNetwork(
        model=found.model,
        classes=found.description.class_names,
        image_shape=images.shape,
        mean=images.mean,
        std=images.std,
        step=found.step,
        temperature=found.temperature,
        config=found.config,
        description=found.description,
    )
