"""Images whose classes a table tells: a CSV file of path and label, and maybe split."""

from __future__ import annotations

import csv
from typing import NamedTuple

from ml_collections import ConfigDict

from mimicnorm_jax.data import listing
from mimicnorm_jax.data.layout import other_names
from mimicnorm_jax.errors import UserError, first_line, refused_by_system
from mimicnorm_jax.paths import expanded

_PATHS = (
    *("path", "file", "filename", "file_name", "filepath"),
    *("image", "image_path", "image_id", "id", "name"),
)
_LABELS = ("label", "class", "class_name", "category", "target", "species", "breed")
_SPLITS = ("split", "set", "subset", "partition")


class Table(NamedTuple):
    """A labels file.

    Attributes:
      classes: the class of each image, by its path below ``config.data.dir``.
      splits: the split of each, likewise; empty where the file tells none.
    """

    classes: dict[str, str]
    splits: dict[str, str]

    def of_split(self, name: str) -> list[str]:
        """The images of a split, sorted; by another name that means the same, where it has none."""
        there = {split.lower() for split in self.splits.values()}
        chosen = next((n for n in (name.lower(), *other_names(name)) if n in there), None)
        return sorted(path for path, split in self.splits.items() if split.lower() == chosen)


def read_labels_file(data: ConfigDict) -> Table:
    """Reads ``config.data.labels_file``.

    Its columns are found by their names, such as ``path`` and ``label``, or else are the first
    two. A path may lack its suffix, or its folder.

    Raises:
      UserError: it cannot be read, is no such table, names an image that is not there, or one
        twice.
    """
    root = expanded(data.dir)
    file = root / expanded(data.labels_file)
    what = f"config.data.labels_file = {data.labels_file!r}"
    with refused_by_system(f"{what} cannot be read"):
        try:
            with file.open(newline="", encoding="utf-8-sig") as opened:
                first = opened.readline()
                opened.seek(0)
                header, *rows = csv.reader(opened, delimiter=_delimiter(first))
        except (ValueError, csv.Error) as error:  # empty, or no text
            raise UserError(f"{what} is no table: {first_line(error)}") from error
        images = listing.list_class(root).files
    known = _names_of(images)
    if len(header) == 2 and header[0].strip().removeprefix("./") in known:
        header, rows = ["path", "label"], [header, *rows]  # no header, but an image
    paths, labels, splits = _columns(header, what)
    table = Table({}, {})
    missing = []
    for row in (row for row in rows if row):
        if len(row) <= max(paths, labels, splits or 0):
            raise UserError(f"{what} has a row of {len(row)} columns: {','.join(row)[:60]}")
        given = row[paths].strip().removeprefix("./")
        path = known.get(given)
        if path is None:
            missing.append(given)
            continue
        if not row[labels].strip():
            raise UserError(f"{what} has no label for {path}")
        if path in table.classes:
            raise UserError(f"{what} has {path} twice")
        table.classes[path] = row[labels].strip()
        if splits is not None:
            table.splits[path] = row[splits].strip()
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{what} names images that are not in {root}, or not clearly: {missing[0]}{more}"
        )
    if len(set(table.classes.values())) < 2:
        raise UserError(f"{what} has fewer than two classes in column {header[labels]!r}")
    return table


def _delimiter(first_line: str) -> str:
    return next((each for each in ",;\t" if each in first_line), ",")


def _names_of(images: list[str]) -> dict[str, str | None]:
    """What a table may call an image: its path, with or without suffix, or its name if no other's.

    None stands for what several images are called.
    """
    known: dict[str, str | None] = {path: path for path in images}
    for path in images:
        name = path.rpartition("/")[2]
        for short in {path.rpartition(".")[0], name, name.rpartition(".")[0]} - {path}:
            known[short] = None if short in known else path
    return known


def _columns(header: list[str], what: str) -> tuple[int, int, int | None]:
    names = [name.strip().lower() for name in header]

    def of(known: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    paths, labels, splits = of(_PATHS), of(_LABELS), of(_SPLITS)
    if paths is None and labels is None and len(names) == 2:
        paths, labels = 0, 1
    if paths is None or labels is None:
        raise UserError(f"{what} has the columns {', '.join(header)}; expected: path, label")
    return paths, labels, splits
