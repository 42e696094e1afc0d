"""Writes images as a TFDS build in array_record format, without TensorFlow.

The examples are those that TFDS itself would write (``tf.train.Example`` with ``image``, ``label``
and ``file_name``), and the description is written by it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mimicnorm_jax.data import images
from mimicnorm_jax.data.tfds import FORMAT, IMPORT
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.prepare_data.records import Found, Records, order_of

VERSION = "1.0.0"
SPOOL = "spool"
_SHARD = 2**28  # bytes, about
_SAMPLED = 100  # examples, of which the number of shards follows
_OPTIONS = "group_size:1,uncompressed"  # else random access is slow; images are compressed
_THREADS = 8


def draft_of(directory: pathlib.Path) -> pathlib.Path:
    """Where a build is written before it is complete."""
    return directory / f"incomplete.import_{VERSION}"


def write(found: Found, directory: pathlib.Path) -> pathlib.Path:
    """Writes all splits, or goes on where an interrupted attempt stopped.

    A shard gets its name when it is complete, and the folder of the version when all are.

    Args:
      found: the images.
      directory: ``DATA_DIR/NAME``.

    Returns:
      The folder of the version.

    Raises:
      UserError: an image cannot be read.
      OSError: the system refuses.
    """
    target, draft = directory / VERSION, draft_of(directory)
    if target.exists():
        raise UserError(f"{target} is there, but not complete: remove it")
    description = describe(found)
    begun = draft / IMPORT
    if begun.exists() and read_description(begun) != description:
        print(f"removing {draft}, which is of other images", file=sys.stderr)
        shutil.rmtree(draft)
    draft.mkdir(parents=True, exist_ok=True)
    written = begun.with_suffix(".part")
    written.write_text(json.dumps(description, indent=1))
    written.replace(begun)
    lengths = {
        split: _write_split(records, draft, directory.name, split)
        for split, records in found.splits.items()
    }
    _write_description(found, draft, directory.name, lengths)
    shutil.rmtree(draft / SPOOL, ignore_errors=True)
    draft.rename(target)
    return target


@contextlib.contextmanager
def alone(directory: pathlib.Path) -> Iterator[None]:
    """Lets one import to a folder run at a time.

    Raises:
      UserError: another one runs.
      OSError: the system refuses.
    """
    import fcntl  # not on Windows, where array_record is not, either

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".import.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another import to {directory} is running") from error
        yield


def read_description(path: pathlib.Path) -> Any:
    """What ``describe`` said of a build; None where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def check_class_names(names: Sequence[str]) -> None:
    """TFDS stores one a line, without blanks around it.

    Raises:
      UserError: a name would not be the same again.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the class name {name!r} is no text in UTF-8") from error
        if name != name.strip() or name.splitlines() != [name]:
            raise UserError(
                f"the class name {name!r} has blanks around it, or a line break: rename it"
            )


def describe(found: Found) -> dict[str, Any]:
    """What tells these images from others, and where they are from."""
    return {
        "from": found.kind,
        "identity": {split: records.identity for split, records in found.splits.items()},
    }


def _write_split(
    records: Records, draft: pathlib.Path, name: str, split: str
) -> list[tuple[int, int]]:
    """Returns the number of examples of each shard, and its bytes."""
    order = order_of(records)
    chosen = np.linspace(0, len(order) - 1, min(_SAMPLED, len(order))).astype(int)
    size = np.mean([_check_decoded(records, index) for index in order[chosen].tolist()])
    count = min(len(order), max(1, round(len(order) * size / _SHARD)))
    written = []
    with progress_bar(None, f"importing {split}", len(order), unit="image") as bar:
        for number, part in enumerate(np.array_split(order, count)):
            path = draft / f"{name}-{split}.{FORMAT}-{number:05}-of-{count:05}"
            if path.is_file():
                bar.update(len(part))
            else:
                _write_shard(records, part, path, bar)
            written.append((len(part), path.stat().st_size))
    return written


def _check_decoded(records: Records, index: int) -> int:
    """Decodes an image, and returns how many bytes it has."""
    data = _read(records, index)
    try:
        images.decode(data, upright=False)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise UserError(
            f"cannot read image {records.describe(index)}: {first_line(error)}"
        ) from error
    return len(data)


def _write_shard(records: Records, indices: np.ndarray, path: pathlib.Path, bar: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    part = path.with_name(f"{path.name}.part")
    writer = ArrayRecordWriter(str(part), _OPTIONS)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for example in pool.map(lambda i: _example(records, i), indices.tolist()):
                writer.write(example)
                bar.update()
        writer.close()
    except RuntimeError as error:  # array_record's, of the disk
        raise UserError(f"cannot write {part}: {first_line(error)}") from error
    finally:
        with contextlib.suppress(RuntimeError):
            writer.close()
    part.rename(path)


def _read(records: Records, index: int) -> bytes:
    try:
        data = records.read(index)[0]
        images.check_whole(data)
        return data
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read image {records.describe(index)}: {reason}") from error


def _example(records: Records, index: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(_read(records, index))
    feature["label"].int64_list.value.append(int(records.labels[index]))
    feature["file_name"].bytes_list.value.append(records.name(index).encode(errors="replace"))
    return example.SerializeToString(deterministic=True)


def _write_description(
    found: Found, draft: pathlib.Path, name: str, lengths: dict[str, list[tuple[int, int]]]
) -> None:
    import tensorflow_datasets as tfds

    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[examples for examples, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=draft, dataset_name=name, split=split, filetype_suffix=FORMAT
            ),
        )
        for split, shards in lengths.items()
    ]
    first = next(iter(found.splits.values()))
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, first.channels)),
            "label": tfds.features.ClassLabel(names=first.class_names),
            "file_name": tfds.features.Text(),
        }
    )
    tfds.folder_dataset.write_metadata(
        data_dir=draft,
        features=features,
        split_infos=splits,
        version=VERSION,
        check_data=False,
        description=f"Imported from {found.kind}.",
    )
