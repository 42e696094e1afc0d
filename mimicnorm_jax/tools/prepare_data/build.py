"""Builds a data set with tensorflow-datasets, or converts a build of another format."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from mimicnorm_jax.data.tfds import (
    FORMAT,
    IMPORT,
    build_directory,
    finished,
    formats_of,
    read_builder,
    unfinished,
)
from mimicnorm_jax.errors import UserError, first_line, refused_by_system
from mimicnorm_jax.tools.prepare_data.check import DATA_SETS, check, check_import, missing_archives
from mimicnorm_jax.tools.prepare_data.records import Found
from mimicnorm_jax.tools.prepare_data.sources import find
from mimicnorm_jax.tools.prepare_data.write import (
    SPOOL,
    alone,
    check_class_names,
    describe,
    draft_of,
    read_description,
    write,
)


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


def import_images(
    source: pathlib.Path, data_dir: pathlib.Path, *, name: str, label: str = ""
) -> str:
    """Copies images that are there into a build, unless they are in it already, and checks it.

    An interrupted import goes on where it was.

    Args:
      source: see ``sources.find``.
      data_dir: where the build goes.
      name: of the data set.
      label: see ``sources.find``.

    Returns:
      The report of ``check_import``.

    Raises:
      UserError: there are no images, or damaged ones; or the build is there, of other images.
      OSError: the system refuses.
    """
    import tensorflow_datasets as tfds

    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(
            f"--name={name} is a data set of TFDS, which would take that for yours; another name, "
            f"such as --name=my_{name}"
        )
    directory = data_dir / name
    is_new = not directory.exists()
    try:
        found = find(source, draft_of(directory) / SPOOL, label=label)
        check_class_names(next(iter(found.splits.values())).class_names)
        with alone(directory):
            return check_import(_written(found, source, directory))
    finally:
        if is_new and directory.is_dir() and not any(directory.glob("[!.]*")):
            shutil.rmtree(directory)


def _written(found: Found, source: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    if not finished(directory):
        return write(found, directory)
    path = build_directory(directory.parent, directory.name)
    if not (path / IMPORT).is_file() or read_description(path / IMPORT) != describe(found):
        raise UserError(
            f"{path} is there, and of other images than {source}: remove it, or give another --name"
        )
    return path


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
