"""Prepares a data set for training, or says what is missing.

python -m mimicnorm_jax.tools.prepare_data cifar100 --data-dir data
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --manual-dir archives
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --check

Builds it with tensorflow-datasets, in array_record format, which training reads without
TensorFlow; a build in tfrecord format gets array_record files beside its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.tfds import (
    FORMAT,
    PREPARABLE,
    TFDSSource,
    build_directory,
    finished,
    formats_of,
    open_build,
    read_builder,
    unfinished,
)
from mimicnorm_jax.errors import UserError, first_line, refused_by_system

_DECODED = 64  # examples a split that are decoded by a check


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as it was published.

    Attributes:
      examples: number of examples of each split.
      archives: for those that nobody may pass on: file names, with their sizes in bytes.
      source: where a person gets the archives.
    """

    examples: dict[str, int]
    archives: dict[str, int] = dataclasses.field(default_factory=dict)
    source: str = ""


DATA_SETS: dict[str, Published] = {
    "cifar10": Published({"train": 50_000, "test": 10_000}),
    "cifar100": Published({"train": 50_000, "test": 10_000}),
    "mnist": Published({"train": 60_000, "test": 10_000}),
    "imagenet2012": Published(
        {"train": 1_281_167, "validation": 50_000},
        {
            "ILSVRC2012_img_train.tar": 147_897_477_120,
            "ILSVRC2012_img_val.tar": 6_744_924_160,
        },
        "https://image-net.org/download-images (after registration)",
    ),
}


def check(name: str, data_dir: pathlib.Path, *, sample: bool = False) -> str:
    """Reads a prepared data set and says what is there.

    Every shard is opened and its records counted, and some examples of each split decoded.

    Args:
      name: of the data set.
      data_dir: where it was prepared.
      sample: whether it may be a part of the published one.

    Returns:
      A report, a line a split.

    Raises:
      UserError: what is missing, damaged, or not of the published size.
    """
    path = build_directory(data_dir, name)
    builder = open_build(path)
    lines = [str(path)]
    for split, expected in DATA_SETS[name].examples.items():
        source = TFDSSource(builder, split, View(size=32, resize=32, upright=False))
        if len(source) != expected and not sample:
            raise UserError(
                f"{path}: split {split} has {len(source)} examples instead of {expected}; if that "
                "is meant, --sample"
            )
        chosen = np.linspace(0, len(source) - 1, min(_DECODED, len(source))).astype(int)
        for index in chosen:
            source[int(index)]
        info = builder.info.splits[split]
        lines.append(
            f"  {split}: {len(source)} of {expected} examples, {len(source.class_names)} classes, "
            f"{info.num_bytes / 2**20:.1f} MiB in {info.num_shards} shard(s); "
            f"{len(chosen)} decoded"
        )
    return "\n".join(lines)


def missing_archives(name: str, manual_dir: pathlib.Path, *, sample: bool = False) -> list[str]:
    """What a person still has to fetch, a line a file; empty if nothing.

    Args:
      name: of the data set.
      manual_dir: where the archives belong.
      sample: whether they may be smaller than the published ones.
    """
    lines = []
    for file_name, size in DATA_SETS[name].archives.items():
        path = manual_dir / file_name
        if not path.is_file():
            lines.append(f"{path} is missing ({size} bytes)")
        elif path.stat().st_size != size and not sample:
            lines.append(f"{path} has {path.stat().st_size} bytes instead of {size}")
    return lines


def prepare(
    name: str,
    data_dir: pathlib.Path,
    *,
    manual_dir: pathlib.Path | None = None,
    sample: bool = False,
) -> str:
    """Builds or converts a data set, unless it is there already, and checks it.

    TFDS writes to a folder whose name begins with ``incomplete.`` and renames it at the
    end; what an interrupted attempt left is removed, a version without description included.

    Args:
      name: of the data set.
      data_dir: where it goes.
      manual_dir: where the archives are; default: ``data_dir/archives``.
      sample: take archives that hold a part of the published data set.

    Returns:
      The report of ``check``.

    Raises:
      UserError: what is missing or damaged.
    """
    manual_dir = manual_dir or data_dir / "archives"
    with refused_by_system(f"--data-dir={data_dir} cannot be used"):
        data_dir.mkdir(parents=True, exist_ok=True)
        is_there = finished(data_dir / name)
    if is_there:
        _convert(build_directory(data_dir, name))
    else:
        _build(name, data_dir, manual_dir, sample=sample)
    return check(name, data_dir, sample=sample)


def _import_tfds() -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "writing a data set needs the extra prepare: pip install 'mimicnorm-jax[prepare]'"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    return tfds


def _build(name: str, data_dir: pathlib.Path, manual_dir: pathlib.Path, *, sample: bool) -> None:
    published = DATA_SETS[name]
    if lines := missing_archives(name, manual_dir, sample=sample):
        raise UserError(f"{'; '.join(lines)}; from {published.source}")
    tfds = _import_tfds()
    extracted_prefix = f"extracted-{name}-"
    for leftover in (*unfinished(data_dir / name), *data_dir.glob(f"{extracted_prefix}*")):
        print(f"removing {leftover}, which was not finished", file=sys.stderr)
        shutil.rmtree(leftover)
    builder = tfds.builder(name, data_dir=data_dir, file_format=FORMAT)
    if sample:
        _accept_any_archive(builder, manual_dir)
    # An extracted archive is known by its name alone: one of another try must not be reused.
    with tempfile.TemporaryDirectory(prefix=extracted_prefix, dir=data_dir) as extracted:
        config = tfds.download.DownloadConfig(
            manual_dir=manual_dir if manual_dir.is_dir() else None, extract_dir=extracted
        )
        try:
            builder.download_and_prepare(download_config=config)
        except tfds.core.download.download_manager.NonMatchingChecksumError as error:
            raise UserError(
                f"{str(error).splitlines()[0].rstrip(':')}; if it is a sample, --sample"
            ) from error
        except Exception as error:  # of the network, the disk, and all that reads archives
            raise UserError(_what_failed(builder, manual_dir, error)) from error


def _accept_any_archive(builder: Any, manual_dir: pathlib.Path) -> None:
    """Makes TFDS take the archives in ``manual_dir``, whatever their checksums."""
    from tensorflow_datasets.core.download import checksums

    for url, info in list(builder.url_infos.items()):
        path = manual_dir / (info.filename or "")
        if path.is_file():
            builder.url_infos[url] = checksums.compute_url_info(path)


def _what_failed(builder: Any, manual_dir: pathlib.Path, error: Exception) -> str:
    reason = first_line(error)
    files = ", ".join(
        f"{url} ({info.size} bytes) as {manual_dir / info.filename}"
        for url, info in builder.url_infos.items()
        if info.filename
    )
    advice = f"; if this is the network, put {files}" if files else ""
    return f"{builder.name} could not be prepared: {type(error).__name__}: {reason}{advice}"


def _convert(path: pathlib.Path) -> None:
    """Writes array_record files beside those of another format, shard by shard.

    A shard gets its name when it is complete, and the build says that it has this format
    when all are; so an interrupted conversion goes on where it was.
    """
    builder = read_builder(path)
    formats = formats_of(builder)
    if FORMAT in formats:
        return
    _import_tfds()
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    shards = [shard for split in builder.info.splits.values() for shard in split.filepaths]
    for shard in tqdm(shards, f"converting {builder.name}", unit="shard"):
        old = pathlib.Path(shard)
        new = old.with_name(old.name.replace(f".{formats[0]}-", f".{FORMAT}-"))
        if new.is_file():
            continue
        part = new.with_name(f"{new.name}.part")
        writer = ArrayRecordWriter(str(part), "group_size:1")  # else random access is slow
        try:
            for record in tf.data.TFRecordDataset(str(old)).as_numpy_iterator():
                writer.write(record)
        except tf.errors.OpError as error:
            reason = (error.message.splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read {old}: {reason}") from error
        finally:
            writer.close()
        part.rename(new)
    builder.info.add_alternative_file_format(FORMAT)
    builder.info.write_to_directory(path)


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser()  # which no shell does in --data-dir=~/data


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m mimicnorm_jax.tools.prepare_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=PREPARABLE, help="the data set")
    parser.add_argument("--data-dir", type=_path, required=True, help="where it goes")
    parser.add_argument(
        "--manual-dir",
        type=_path,
        help="where the archives are (default: DATA_DIR/archives)",
    )
    parser.add_argument("--check", action="store_true", help="only say what is there or missing")
    parser.add_argument(
        "--sample", action="store_true", help="the archives hold a part of the published data set"
    )
    return parser.parse_args(arguments)


def _check_only(options: argparse.Namespace) -> str:
    try:
        return check(options.name, options.data_dir, sample=options.sample)
    except UserError as error:
        manual_dir = options.manual_dir or options.data_dir / "archives"
        lines = missing_archives(options.name, manual_dir, sample=options.sample)
        raise UserError("; ".join([str(error), *lines])) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    try:
        options = _parse(arguments)
        if options.check:
            print(_check_only(options))
        else:
            print(
                prepare(
                    options.name,
                    options.data_dir,
                    manual_dir=options.manual_dir,
                    sample=options.sample,
                )
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
