"""The splits of the configured data set, from wherever they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.config.data import ENCODED
from mimicnorm_jax.data.folder import open_folders
from mimicnorm_jax.data.generated import open_digits, open_synthetic
from mimicnorm_jax.data.holdout import hold_out
from mimicnorm_jax.data.idx import open_idx
from mimicnorm_jax.data.labels_file import read_labels_file
from mimicnorm_jax.data.layout import find_layout
from mimicnorm_jax.data.overlap import warn_of_overlap
from mimicnorm_jax.data.sources import ArraySource, EncodedSource, Source, View, cache
from mimicnorm_jax.data.tfds import open_tfds
from mimicnorm_jax.data.webdataset import open_tars
from mimicnorm_jax.errors import UserError, unknown

SOURCES: dict[str, Callable[[ConfigDict, Sequence[str]], Sequence[Source]]] = {
    "digits": open_digits,
    "folder": open_folders,
    "idx": open_idx,
    "synthetic": open_synthetic,
    "tfds": open_tfds,
    "webdataset": open_tars,
}


def view_of(data: ConfigDict) -> View:
    """How evaluation brings an image of ``config.data`` to its size.

    Encoded ones are resized and cropped as ``View`` says; others are resized.
    """
    view = View.of(data)
    return view if data.name in ENCODED else dataclasses.replace(view, resize=view.size)


def has_test_split(data: ConfigDict) -> bool:
    """Whether the images of ``config.data`` have a test split, or else some are held out.

    Raises:
      UserError: ``config.data.dir`` has neither splits nor classes.
    """
    if not data.test_split or data.name != "folder":
        return bool(data.test_split)
    if data.labels_file:
        return bool(read_labels_file(data).splits)
    return not find_layout(data).is_without_splits


class Splits(NamedTuple):
    """The images of a run.

    Attributes:
      train: trained on.
      test: the results are of these; None where there is no test split.
      holdout: those of the training split that choose the best checkpoint and the temperature;
        None where the test images choose the checkpoint.
    """

    train: Source
    test: Source | None
    holdout: Source | None


def splits_of(config: ConfigDict) -> Splits:
    """Opens the splits of a run, and holds ``config.data.holdout`` of the training images out.

    Raises:
      UserError: as ``open_splits``; or there are none to be held out.
    """
    train, test = open_splits(config.data)
    if not config.data.holdout:
        return Splits(train, test, None)
    kept, out = hold_out(train, config.data.holdout, config.seed)
    if not len(out):
        raise UserError(
            f"config.data.holdout = {config.data.holdout}: no class has more than one of the "
            f"{len(train)} training images"
        )
    return Splits(kept, test, out)


def open_splits(data: ConfigDict) -> tuple[Source, Source | None]:
    """Opens the training and, where there is one, the test split.

    What fits into ``config.data.cache_gib`` is decoded at once and stays in memory, unless
    its crops are random: those are made of the files.

    Raises:
      UserError: what is missing or damaged, by path.
    """
    train, *rest = _opened(data, ("train", "test") if has_test_split(data) else ("train",))
    channels = train.image_shape[-1]
    if data.mean and len(data.mean) != channels:
        raise UserError(
            f"config.data.mean has {len(data.mean)} values, but the images have {channels} channels"
        )
    if data.random_resized_crop:
        if isinstance(train, ArraySource):
            raise UserError(
                f"config.data.random_resized_crop needs encoded images, but {data.name} holds "
                f"pixels; leave it out, or use config.data.pad_crop"
            )
    else:
        train = _cached(train, data.train_split, data.cache_gib)
    if not rest:
        return train, None
    test = _cached(rest[0], data.test_split, data.cache_gib)
    warn_of_overlap(train, test)
    return train, test


def open_test_split(data: ConfigDict, image_shape: tuple[int, int, int]) -> Source:
    """Opens the test split alone: of a folder it may have any classes, or a single one.

    Args:
      data: the fields of the data.
      image_shape: of the images that a network takes.

    Raises:
      UserError: as ``open_splits``; or the images cannot have that shape.
    """
    (test,) = _opened(data, ("test",))
    if isinstance(test, EncodedSource):  # whose images become grey or colours as is wanted
        test.image_shape = (*test.image_shape[:2], image_shape[-1])
    if test.image_shape != image_shape:
        raise UserError(
            f"the images of data.name = {data.name!r} are {test.image_shape}, and the network "
            f"takes {image_shape}"
        )
    return _cached(test, data.test_split, data.cache_gib)


def _opened(data: ConfigDict, parts: Sequence[str]) -> Sequence[Source]:
    if data.name not in SOURCES:
        raise unknown("config.data.name", data.name, SOURCES)
    return SOURCES[data.name](data, parts)


def _cached(split: Source, name: str, most_gib: float) -> Source:
    gib = len(split) * np.prod(split.image_shape) / 2**30
    if isinstance(split, EncodedSource) and gib <= most_gib:
        return cache(split, description=f"decoding {name}")
    return split
