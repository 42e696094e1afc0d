"""What a configuration's images will be like, without having them."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from mimicnorm_jax.errors import UserError


class Expected(NamedTuple):
    """What is known of a data set.

    Attributes:
      num_classes: number of classes.
      num_examples: in its training split.
      channels: of an image.
    """

    num_classes: int
    num_examples: int
    channels: int = 3


_MNIST = Expected(10, 60_000, channels=1)
_TFDS = {
    "cifar10": Expected(10, 50_000),
    "cifar100": Expected(100, 50_000),
    "mnist": _MNIST,
    "imagenet2012": Expected(1000, 1_281_167),
}


def expected(data: ConfigDict, num_classes: int | None = None) -> Expected:
    """What the images of ``config.data`` will be like.

    Args:
      data: ``config.data``.
      num_classes: in place of what is known, where that is nothing.

    Raises:
      UserError: the number of classes is not known.
    """
    known = {
        "digits": Expected(10, 1437, channels=1),
        "idx": _MNIST,
        "synthetic": Expected(data.num_classes, data.num_examples),
        "tfds": _TFDS.get(data.tfds_name),
    }.get(data.name)
    if num_classes is not None:
        return (known or Expected(0, 50_000))._replace(num_classes=num_classes)
    if known is None:
        files = {"folder": "images in folders", "webdataset": "images in tar files"}
        what = files.get(data.name, data.tfds_name)
        raise UserError(f"how many classes {what} have is not known here; give --num-classes")
    return known
