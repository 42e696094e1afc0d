"""TFDS builds in array_record format, read without TensorFlow."""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.sources import EncodedSource, View, digest
from mimicnorm_jax.errors import UserError, refused_by_system, unknown

FORMAT = "array_record"
_INFO = "dataset_info.json"


def prepare_command(name: str, directory: str | pathlib.Path) -> str:
    """The command that prepares a data set."""
    return f"python -m mimicnorm_jax.tools.prepare_data {name} --data-dir {directory}"


def build_directory(directory: str | pathlib.Path, name: str) -> pathlib.Path:
    """The folder ``directory/name/[config/]version`` of the newest version that is complete.

    Raises:
      UserError: there is none; says how to prepare one.
    """
    root = pathlib.Path(directory).expanduser()
    if "://" in str(directory):
        raise UserError(
            f"config.data.dir = {str(directory)!r} is not a folder; mount remote storage as one"
        )
    found: list[tuple[tuple[int, ...], pathlib.Path]] = []
    begun: list[pathlib.Path] = []
    with refused_by_system(f"config.data.dir = {str(directory)!r} cannot be read"):
        for path in sorted((root / name).glob("**/*")):
            if not path.is_dir():
                continue
            if path.name.startswith("incomplete."):
                begun.append(path)
            elif re.fullmatch(r"\d+\.\d+\.\d+", path.name):
                if (path / _INFO).is_file():
                    found.append((tuple(map(int, path.name.split("."))), path))
                else:
                    begun.append(path)
    if not found:
        half = f"{begun[0]} was not finished" if begun else f"{root / name} has no prepared version"
        raise UserError(f"{half}; prepare it: {prepare_command(name, directory)}")
    return max(found)[1]


def formats_of(builder: Any) -> list[str]:
    """The file formats of a build, its own first."""
    info = builder.info
    return [each.value for each in (info.file_format, *info.alternative_file_formats)]


def open_build(path: pathlib.Path) -> Any:
    """The TFDS builder of a build that is complete.

    Args:
      path: folder of one version, as ``build_directory`` finds it.

    Raises:
      UserError: it is in another format, or a shard is missing or has not the number of
        records that it should have.
    """
    import tensorflow_datasets as tfds  # takes a second, and only this source needs it
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # whatever a damaged JSON file makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged: {reason}") from error
    command = prepare_command(builder.name, path.parent.parent)
    formats = formats_of(builder)
    if FORMAT not in formats:
        raise UserError(
            f"{path} is in {formats[0]} format, which only TensorFlow reads; convert it: {command}"
        )
    if formats[0] != FORMAT:
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)
    for split in builder.info.splits.values():
        for shard, expected in zip(split.filepaths, split.shard_lengths, strict=True):
            if not pathlib.Path(shard).is_file():
                raise UserError(f"{shard} is missing; prepare the data set again: {command}")
            try:
                records = len(ArrayRecordDataSource([str(shard)]))
            except Exception as error:  # a C++ error without a type
                raise UserError(
                    f"{shard} is damaged; remove {path} and prepare the data set again: {command}"
                ) from error
            if records != expected:
                raise UserError(
                    f"{shard} has {records} records instead of {expected}; remove {path} and "
                    f"prepare the data set again: {command}"
                )
    return builder


class TFDSSource(EncodedSource):
    """A split of a TFDS build whose examples have an ``image`` and a ``label``.

    Args:
      builder: of the build, as ``open_build`` returns it.
      split: its name; a part such as ``"train[:10%]"`` is allowed.
      view: what the images become.

    Raises:
      UserError: the build has no such split, or no images with labels.
    """

    def __init__(self, builder: Any, split: str, view: View):
        import tensorflow_datasets as tfds

        features = builder.info.features
        if not {"image", "label"} <= set(features):
            raise UserError(
                f"{builder.data_path} has no image and label, but {', '.join(features)}"
            )
        try:
            self._info = builder.info.splits[split]
        except (KeyError, ValueError) as error:
            raise unknown(f"split of {builder.data_path}", split, builder.info.splits) from error
        self._source = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        self._directory = pathlib.Path(builder.data_path)
        channels = features["image"].shape[-1] or 3
        super().__init__(features["label"].names, view, channels=channels)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[bytes, int]:
        example = self._source[int(index)]
        return example["image"], int(example["label"])

    def describe(self, index: int) -> str:
        for part in self._info.file_instructions:
            if index < part.examples_in_shard:
                return f"{part.filename} record {part.skip + index}"
            index -= part.examples_in_shard
        raise IndexError(index)

    @functools.cached_property
    def identity(self) -> str:
        # where the examples are, and some of them: reading a million would take minutes
        parts = [
            f"{pathlib.Path(part.filename).name} {part.skip} {part.examples_in_shard}\n".encode()
            for part in self._info.file_instructions
        ]
        chosen = np.linspace(0, len(self) - 1, min(100, len(self))).astype(int)
        for index in chosen:
            data, label = self.read(index)
            parts += [data, str(label).encode()]
        return digest(parts)


def open_tfds(data: ConfigDict) -> tuple[TFDSSource, TFDSSource]:
    """The splits of ``config.data.tfds_name`` in ``config.data.dir``."""
    if not data.dir:
        raise UserError(
            f"config.data.dir is not set; it is where {data.tfds_name} was prepared: "
            f"{prepare_command(data.tfds_name, 'DIR')}, then --config.data.dir=DIR"
        )
    builder = open_build(build_directory(data.dir, data.tfds_name))
    view = View.of(data)
    train, test = (
        TFDSSource(builder, split, view) for split in (data.train_split, data.test_split)
    )
    return train, test
