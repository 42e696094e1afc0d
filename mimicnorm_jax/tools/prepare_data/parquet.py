"""Images in parquet files, as Hugging Face's data sets come.

Of a row group, which has 20 to 100 MB, nothing can be read alone. So the images of each file are
copied one after the other into a plain file first, from which they are read in any order.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mimicnorm_jax.data.layout import split_of
from mimicnorm_jax.data.sources import digest
from mimicnorm_jax.errors import UserError, first_line, unknown
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.tools.prepare_data.records import Records

_ROWS = 64  # that are in memory at a time
_PART, _PARTS = 2**14, 256  # bytes of a file that its identity has, and how often
_SECRET = -1  # in the place of a label, as test images are published
_MOST_CLASSES = 10**6
_LABELS = ("label", "labels", "fine_label", "class", "target")


class _Columns(NamedTuple):
    """The columns of an image and its label, and the names of the classes, if they are told."""

    image: str
    is_struct: bool
    has_path: bool
    label: str
    class_names: list[str]


class ParquetRecords:
    """A split of images in parquet files.

    Args:
      files: of the split.
      columns: of these.
      labels: of each row.
      class_names: the classes, in the order of the labels.
      spool: a folder for the copies.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        columns: _Columns,
        labels: np.ndarray,
        class_names: list[str],
        spool: pathlib.Path,
    ):
        self._files, self._columns, self._spool = list(files), columns, spool
        self.labels = labels
        self.class_names = class_names
        counts = []
        for path in self._files:
            with _refused(path):
                counts.append(pq.read_metadata(path).num_rows)
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    channels = 3

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def identity(self) -> str:
        names = [name.encode() + b"\n" for name in self.class_names]
        return digest([*map(_sampled, self._files), *names, self.labels])

    @functools.cached_property
    def _names(self) -> list[str]:
        names: list[Any] = [None] * len(self)
        if self._columns.has_path:
            column = f"{self._columns.image}.path"
            rows = (row for path in self._files for row in _column(path, column))
            names = [None if row is None else row["path"] for row in rows]
        return [name or f"{index:08}" for index, name in enumerate(names)]

    def name(self, index: int) -> str:
        return self._names[index]

    def describe(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._files[number]} row {row}"

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def read(self, index: int) -> tuple[bytes, int]:
        number, row = self._place(index)
        copied, offsets = self._copies[number]
        with copied.open("rb") as file:
            file.seek(offsets[row])
            data = file.read(offsets[row + 1] - offsets[row])
        return data, int(self.labels[index])

    @functools.cached_property
    def _copies(self) -> list[tuple[pathlib.Path, list[int]]]:
        """The plain files, and where in them the images are; made by the first that reads."""
        self._spool.mkdir(parents=True, exist_ok=True)
        shown = progress_bar(self._files, "unpacking parquet", len(self._files), unit="file")
        return [self._copy(path, number) for number, path in enumerate(shown)]

    def _copy(self, path: pathlib.Path, number: int) -> tuple[pathlib.Path, list[int]]:
        target = self._spool / f"{number:05}.images"
        offsets_file = target.with_suffix(".json")
        if offsets_file.is_file():  # it comes last, so the other is complete
            return target, json.loads(offsets_file.read_text())
        offsets = [0]
        with target.open("wb") as file:
            for batch in _batches(path, self._columns):
                for data in batch:
                    if not data.is_valid:
                        row = len(offsets) - 1
                        raise UserError(f"{path} row {row} has no image in it, but at most a path")
                    offsets.append(offsets[-1] + file.write(data.as_buffer()))
        draft = offsets_file.with_suffix(".part")
        draft.write_text(json.dumps(offsets))
        draft.rename(offsets_file)
        return target, offsets


def _batches(path: pathlib.Path, columns: _Columns) -> Iterator[Any]:
    name = f"{columns.image}.bytes" if columns.is_struct else columns.image
    with _refused(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[name], use_threads=False):
            column = batch.column(0)
            yield column.field("bytes") if columns.is_struct else column


def read_parquet(place: pathlib.Path, spool: pathlib.Path, label: str) -> dict[str, Records]:
    """The splits of parquet files, by the names of these, or of their folders.

    Args:
      place: a folder, or a file.
      spool: a folder for copies, which is made when the first image is read.
      label: the column of the labels; ``""`` where it is clear.

    Raises:
      UserError: a file is damaged, or it is not clear which columns are meant.
    """
    candidates = [place] if place.is_file() else sorted(place.glob("**/*.parquet"))
    files = [path for path in candidates if path.is_file()]  # a pipe would be waited for
    found: dict[str, tuple[list[pathlib.Path], _Columns, list[Any]]] = {}
    for split, of_split in _by_split(files, place if place.is_dir() else place.parent).items():
        columns = _columns_of_all(of_split, label)
        values = [value for path in of_split for value in _labels(path, columns.label)]
        if set(values) <= {_SECRET}:
            print(f"NOTE: split {split} has no labels: left out", file=sys.stderr)
            continue
        if _SECRET in values:
            raise UserError(f"split {split} of {place} has images without a label: -1 or none")
        found[split] = of_split, columns, values
    told = [columns.class_names for _, columns, _ in found.values()]
    names, numbers = _classes([values for _, _, values in found.values()], told, place)
    return {
        split: ParquetRecords(
            of_split,
            columns,
            np.array([numbers[value] for value in values], np.int32),
            names,
            spool / split,
        )
        for split, (of_split, columns, values) in found.items()
    }


def _labels(path: pathlib.Path, name: str) -> list[Any]:
    """The labels of a file, which are numbers or text; raises ``UserError`` of any other."""
    values = _column(path, name)
    for row, value in enumerate(values):
        if not isinstance(value, int | str) or value == "":
            raise UserError(f"{path} row {row} has no label, but {value!r} in column {name!r}")
        if isinstance(value, int) and not _SECRET <= value < _MOST_CLASSES:
            raise UserError(f"{path} row {row} has a label that is {value}")
    return [int(value) if isinstance(value, bool) else value for value in values]


def _classes(
    values: Sequence[list[Any]], told: Sequence[list[str]], place: pathlib.Path
) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the number of each value of a label."""
    different = {value for of_split in values for value in of_split}
    if different and all(isinstance(value, str) for value in different):
        names = sorted(different)
        return names, {name: number for number, name in enumerate(names)}
    if not all(isinstance(value, int) for value in different):
        raise UserError(f"{place}: the labels are numbers in some rows and text in others")
    count = max(different, default=-1) + 1
    if len({tuple(names) for names in told}) > 1:
        raise UserError(f"{place}: the names of the classes differ between splits")
    names = told[0] if told and told[0] else [f"{n:0{len(str(count - 1))}}" for n in range(count)]
    if count > len(names):
        raise UserError(f"{place} has a label that is {count - 1}; there are {len(names)} classes")
    return names, {number: number for number in range(count)}


def _by_split(files: Sequence[pathlib.Path], root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    splits = {path: split_of([*path.relative_to(root).parts[:-1], path.stem]) for path in files}
    without = [path for path, split in splits.items() if split is None]
    if without and len(without) < len(files):
        raise UserError(
            f"{without[0]} tells no split, and other files do: rename it, or move it elsewhere"
        )
    found: dict[str, list[pathlib.Path]] = {}
    for path, split in splits.items():
        found.setdefault(split or "train", []).append(path)
    for of_split in found.values():
        if len(folders := sorted({path.parent for path in of_split})) > 1:
            raise UserError(
                f"{folders[0]} and {folders[1]} both have parquet files of one split: import one "
                "of these folders"
            )
    return found


def _sampled(path: pathlib.Path) -> bytes:
    """The size of a file, and some of its bytes: to read it all would take minutes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [str(size).encode()]
        for start in sorted({int(at) for at in np.linspace(0, max(0, size - _PART), _PARTS)}):
            file.seek(start)
            parts.append(file.read(_PART))
    return digest(parts).encode()


def _columns_of_all(files: Sequence[pathlib.Path], label: str) -> _Columns:
    first, *others = (_columns(path, label) for path in files)
    for path, columns in zip(files[1:], others, strict=True):
        if columns != first:
            raise UserError(f"{files[0]} and {path} have other columns, or other classes")
    return first


def _column(path: pathlib.Path, name: str) -> list[Any]:
    """The values of a column, or of a part of one, each in a dictionary of that part."""
    # not read_table, which makes a column of its own of such a part
    with _refused(path), pq.ParquetFile(path) as file:
        return file.read(columns=[name]).column(0).to_pylist()


@contextlib.contextmanager
def _refused(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _columns(path: pathlib.Path, label: str) -> _Columns:
    with _refused(path):
        schema = pq.read_schema(path)
    features = _features(schema)
    images = [field for field in schema if _holds_images(field, features)]
    if len(images) != 1:
        what = ", ".join(field.name for field in images) or "none"
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}; expected one of encoded images, it "
            f"has {what}"
        )
    told = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    usual = [name for name in _LABELS if name in schema.names]
    if label and label not in schema.names:
        raise unknown(f"column of {path}", label, schema.names)
    candidates = [label] if label else told or usual
    if len(candidates) != 1:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}; say which has the label: "
            f"--label={(candidates or schema.names)[0]}"
        )
    names = features.get(candidates[0], {}).get("names") or []
    (image,) = images
    kind = image.type
    is_struct = pa.types.is_struct(kind)
    has_path = is_struct and kind.get_field_index("path") >= 0
    return _Columns(image.name, is_struct, has_path, candidates[0], list(names))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata say of the columns; empty where there are none."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in told.items() if isinstance(kind, dict)}
    except (LookupError, ValueError, TypeError, AttributeError):
        return {}


def _holds_images(field: pa.Field, features: dict[str, Any]) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    told = features.get(field.name, {}).get("_type")
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return is_binary and told in (None, "Image")
