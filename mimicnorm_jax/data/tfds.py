"""TFDS builds in array_record format, read without TensorFlow."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.data.layout import chosen_split
from mimicnorm_jax.data.sources import EncodedSource, View, digest
from mimicnorm_jax.errors import UserError, first_line, refused_by_system, unknown
from mimicnorm_jax.paths import expanded

FORMAT = "array_record"
PREPARABLE = ("cifar10", "cifar100", "mnist", "imagenet2012")
IMPORT = "import.json"  # beside the description of a build that was imported
_INFO = "dataset_info.json"
_VERSION = r"\d+\.\d+\.\d+"
_LONGEST_NAME = 255  # of a folder, which it names
_OTHER_FILES = 256  # that a process may have open beside the shards


def how_to_prepare(name: str, directory: str | pathlib.Path) -> str:
    """What a person does to have a data set prepared."""
    tool = "python -m mimicnorm_jax.tools.prepare_data"
    if name in PREPARABLE:
        return f"prepare it: {tool} {name} --data-dir {directory}"
    return (
        f"import your own images: {tool} import SOURCE --data-dir {directory} --name {name}, or "
        f"prepare TFDS's: tfds build {name} --file_format={FORMAT} --data_dir={directory}"
    )


def finished(root: pathlib.Path) -> list[pathlib.Path]:
    """Folders of versions below ``root`` whose preparations came to their end."""
    infos = sorted(root.glob(f"**/{_INFO}"))
    return [info.parent for info in infos if re.fullmatch(_VERSION, info.parent.name)]


def unfinished(root: pathlib.Path) -> list[pathlib.Path]:
    """Folders below ``root`` that preparations left which did not come to their end."""
    return [
        path
        for path in sorted(root.glob("**/*"))
        if path.is_dir()
        and (
            path.name.startswith("incomplete.")
            or (re.fullmatch(_VERSION, path.name) and not (path / _INFO).is_file())
        )
    ]


def build_directory(directory: str | pathlib.Path, name: str) -> pathlib.Path:
    """The folder ``directory/name/[config/]version`` of the newest version that is complete.

    Raises:
      UserError: there is none; says how to prepare one.
    """
    root = expanded(directory)
    if "://" in str(directory):
        raise UserError(
            f"config.data.dir = {str(directory)!r} is not a folder; mount remote storage as one"
        )
    with refused_by_system(f"config.data.dir = {str(directory)!r} cannot be read"):
        found = finished(root / name)
        begun = unfinished(root / name)
    if not found:
        half = f"{begun[0]} was not finished" if begun else f"{root / name} has no prepared version"
        above = next((path for path in root.absolute().parents[:3] if finished(path / name)), None)
        if above is not None:
            raise UserError(
                f"config.data.dir = {str(directory)!r} is too deep: {name} lies in {above}: "
                f"--config.data.dir={above}"
            )
        raise UserError(f"{half}; {how_to_prepare(name, directory)}")
    configs = sorted({str(path.parent.relative_to(root)) for path in found})
    if len(configs) > 1:
        raise UserError(f"{root / name} has several configurations; say which: {configs}")
    return max(found, key=lambda path: tuple(map(int, path.name.split("."))))


def formats_of(builder: Any) -> list[str]:
    """The file formats of a build, its own first."""
    info = builder.info
    return [each.value for each in (info.file_format, *info.alternative_file_formats)]


def read_builder(path: pathlib.Path) -> Any:
    """The TFDS builder of the build in a folder, complete or not.

    Raises:
      UserError: its description is damaged, or of another version of TFDS.
    """
    import tensorflow_datasets as tfds  # takes a second, and only this source needs it

    _refuse_foreign_code(path / "features.json")
    try:
        builder = tfds.builder_from_directory(path)
        for split in builder.info.splits.values():
            _ = split.filepaths  # which it makes of the description when asked
        if len(builder.name) > _LONGEST_NAME:
            raise ValueError(f"its name has {len(builder.name)} letters")
        return builder
    except Exception as error:  # whatever a damaged JSON file makes it raise
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as a TFDS build: {reason}") from error


def _refuse_foreign_code(path: pathlib.Path) -> None:
    """TFDS imports the modules that the description of features names: only its own may be."""
    try:
        described = json.loads(path.read_bytes())
    except FileNotFoundError:  # which TFDS says itself
        return
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"cannot read {path}: {reason}") from error
    for name in _named_classes(described):
        if not name.startswith("tensorflow_datasets.core.features."):
            raise UserError(
                f"{path} names {name[:80]!r}, which reading it would import; only features of TFDS "
                "itself are read"
            )


def _named_classes(described: Any) -> Iterator[str]:
    """At any depth, by each of the keys that TFDS takes them from."""
    left = [described]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                if isinstance(value.get(key), str):
                    yield value[key]
            left += value.values()
        elif isinstance(value, list):
            left += value


def allow_open_files(count: int) -> None:
    """Lets this process, and those it starts, have ``count`` shards open.

    Each shard that has been read stays open, and ImageNet has more of them than the usual
    limit of 1024.

    Raises:
      UserError: the system does not allow as many.
    """
    if os.name == "nt":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft in (resource.RLIM_INFINITY, -1) or soft >= needed:
        return
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        raise UserError(
            f"{count} shards take as many open files, and this system allows {hard}; raise that: "
            f"ulimit -n {needed}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_build(path: pathlib.Path) -> Any:
    """The TFDS builder of a build that is complete.

    Args:
      path: folder of one version, as ``build_directory`` finds it.

    Raises:
      UserError: it is in another format, or a shard is missing or has not the number of
        records that it should have.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    builder = read_builder(path)
    root = next((folder.parent for folder in path.parents if folder.name == builder.name), path)
    advice = how_to_prepare(builder.name, root)
    if (path / IMPORT).is_file():
        advice = (
            "import it again: python -m mimicnorm_jax.tools.prepare_data import SOURCE --data-dir "
            f"{root} --name {builder.name}"
        )
    formats = formats_of(builder)
    if FORMAT not in formats:
        raise UserError(
            f"{path} is in {formats[0]} format, which only TensorFlow reads; to convert it, "
            f"{advice}"
        )
    if formats[0] != FORMAT:
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)
    shards = sum(split.num_shards for split in builder.info.splits.values())
    allow_open_files(shards)
    for split in builder.info.splits.values():
        for shard, expected in zip(split.filepaths, split.shard_lengths, strict=True):
            if not os.path.isfile(shard):
                raise UserError(f"{shard} is missing; remove {path} and {advice}")
            try:
                records = len(ArrayRecordDataSource([str(shard)]))
            except Exception as error:  # a C++ error without a type
                raise UserError(f"{shard} is damaged; remove {path} and {advice}") from error
            if records != expected:
                raise UserError(
                    f"{shard} has {records} records instead of {expected}; remove {path} and "
                    f"{advice}"
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
        wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        for name, kind in wanted.items():
            if name not in features or not isinstance(features[name], kind):
                raise UserError(
                    f"{builder.data_path} has no {name} of type {kind.__name__}, but "
                    f"{', '.join(features)}"
                )
        channels = features["image"].shape[-1] or 3
        if channels not in (1, 3):
            raise UserError(f"{builder.data_path} has images of {channels} channels, not 1 or 3")
        try:
            self._info = builder.info.splits[split]
        except (KeyError, ValueError) as error:
            raise unknown(f"split of {builder.data_path}", split, builder.info.splits) from error
        if self._info.num_examples <= 0:
            raise UserError(f"split {split!r} of {builder.data_path} has no examples")
        self._source = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        self._directory = pathlib.Path(builder.data_path)
        super().__init__(features["label"].names, view, channels=channels)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[bytes, int]:
        try:
            example = self._source[int(index)]
        except Exception as error:  # a C++ error without a type
            reason = first_line(error)
            raise UserError(
                f"cannot read {self.describe(index)}: {reason}; remove {self._directory} and "
                "prepare it again"
            ) from error
        return example["image"], int(example["label"])

    def _file_name(self, index: int) -> str:
        """The name that an image had before, where the build knows it."""
        try:
            name = self._source[index].get("file_name", b"")
        except Exception:  # a damaged record, which is being said
            name = b""
        return f" ({name.decode(errors='replace')})" if name else ""

    def describe(self, index: int) -> str:
        at = int(index)
        for part in self._info.file_instructions:
            if index < part.take:
                return f"{part.filename} record {part.skip + index}{self._file_name(at)}"
            index -= part.take
        raise IndexError(index)

    @functools.cached_property
    def identity(self) -> str:
        # where the examples are, and some of them: reading a million would take minutes
        parts = [
            f"{pathlib.Path(part.filename).name} {part.skip} {part.take}\n".encode()
            for part in self._info.file_instructions
        ]
        chosen = np.linspace(0, len(self) - 1, min(100, len(self))).astype(int)
        for index in chosen:
            data, label = self.read(index)
            parts += [data, str(label).encode()]
        return digest(parts)


def open_tfds(data: ConfigDict, parts: Sequence[str]) -> list[TFDSSource]:
    """The splits of ``config.data.tfds_name`` for ``"train"`` and ``"test"``, or one of them."""
    if not data.dir:
        raise UserError(
            f"config.data.dir is not set; it is where {data.tfds_name} was prepared: "
            f"{how_to_prepare(data.tfds_name, 'DIR')}, then --config.data.dir=DIR"
        )
    builder = open_build(build_directory(data.dir, data.tfds_name))
    view = View.of(data)
    found = []
    for part in parts:
        split = data[f"{part}_split"]
        if re.fullmatch(r"\w+", split):  # not a part, such as train[:10%]
            split = chosen_split(data, part, builder.info.splits, str(builder.data_path))
        found.append(TFDSSource(builder, split, view))
    return found
