"""The splits of the configured data set, from wherever they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.folder import open_folders
from mimicnorm_jax.data.generated import open_digits, open_synthetic
from mimicnorm_jax.data.idx import open_idx
from mimicnorm_jax.data.sources import ArraySource, EncodedSource, Source, View, cache
from mimicnorm_jax.data.tfds import open_tfds
from mimicnorm_jax.errors import UserError, unknown

SOURCES: dict[str, Callable[[ConfigDict], tuple[Source, Source]]] = {
    "digits": open_digits,
    "folder": open_folders,
    "idx": open_idx,
    "synthetic": open_synthetic,
    "tfds": open_tfds,
}


# Sources that resize and crop images as ``View`` says; the others resize them to their size.
_WITH_VIEW = ("folder", "tfds")


def view_of(data: ConfigDict) -> View:
    """How evaluation brings an image of ``config.data`` to its size."""
    view = View.of(data)
    return view if data.name in _WITH_VIEW else dataclasses.replace(view, resize=view.size)


def open_splits(data: ConfigDict) -> tuple[Source, Source]:
    """Opens the training and the test split of ``config.data``.

    What fits into ``config.data.cache_gib`` is decoded at once and stays in memory, unless
    its crops are random: those are made of the files.

    Raises:
      UserError: what is missing or damaged, by path.
    """
    if data.name not in SOURCES:
        raise unknown("config.data.name", data.name, SOURCES)
    train, test = SOURCES[data.name](data)
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
        return train, _cached(test, data.test_split, data.cache_gib)
    return (
        _cached(train, data.train_split, data.cache_gib),
        _cached(test, data.test_split, data.cache_gib),
    )


def _cached(split: Source, name: str, most_gib: float) -> Source:
    gib = len(split) * np.prod(split.image_shape) / 2**30
    if isinstance(split, EncodedSource) and gib <= most_gib:
        return cache(split, description=f"decoding {name}")
    return split
