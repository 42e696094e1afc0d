"""Finds out what a person has, and opens it."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping, Sequence

from mimicnorm_jax.data.folder import FolderSource, annotated
from mimicnorm_jax.data.layout import annotations_of, split_of, splits_in
from mimicnorm_jax.data.listing import is_class_folder
from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.tar_index import tars_in
from mimicnorm_jax.data.webdataset import LABEL_FIELD, read_tars
from mimicnorm_jax.errors import UserError, refused_by_system
from mimicnorm_jax.tools.prepare_data import pixels
from mimicnorm_jax.tools.prepare_data.cifar import form_of, read_cifar
from mimicnorm_jax.tools.prepare_data.records import Found, Records

_VIEW = View(size=1, resize=1, upright=False)  # nothing is decoded
_WITH_LABELS = ("parquet files", "tar files", "python CIFAR-100", "binary CIFAR-100")
_EXPECTED = (
    "class folders, parquet files, WebDataset's tar files, SVHN's .mat files, STL-10's .bin files, "
    "MNIST's idx files, CIFAR's batches"
)


def find(source: pathlib.Path, spool: pathlib.Path, *, label: str = "") -> Found:
    """Opens a source, of whichever kind it is.

    Args:
      source: a folder, or a file of several that belong together.
      spool: a folder for temporary copies, which only parquet needs.
      label: which of several labels of an image is meant.

    Raises:
      UserError: there is nothing of a known kind, or something is damaged or missing.
    """
    with refused_by_system(f"{source} cannot be read"):
        places = _places(source)
        found = next((f for place in places if (f := _find(place, spool, label))), None)
        if found is None:
            found = _class_folders(source, places)
    if not found.splits:
        raise UserError(f"{source} has no images with labels")
    if label and found.kind not in _WITH_LABELS:
        raise UserError(f"--label={label}: {found.kind} have one label an image; leave it out")
    _check_classes(found.splits, source)
    return found


def _places(source: pathlib.Path) -> list[pathlib.Path]:
    """It, and the only folder in it, and so on: archives unpack to a folder of their name."""
    places = [source]
    while places[-1].is_dir():
        inner = [
            path for path in places[-1].iterdir() if path.is_dir() and is_class_folder(path.name)
        ]
        if len(inner) != 1 or split_of([inner[0].name], whole=True):
            break
        places += inner
    return places


def _find(place: pathlib.Path, spool: pathlib.Path, label: str) -> Found | None:
    """What a place has of all that is no class folders."""
    if form := form_of(place):
        return Found(form, read_cifar(place, label))
    if any((place / name).is_file() for name in pixels.SVHN):
        return Found("SVHN", pixels.read_svhn(place))
    if any((place / name).is_file() for name in pixels.STL10):
        return Found("STL-10", pixels.read_stl10(place))
    if place.is_dir() and pixels.idx_sets(place):
        return Found("idx files", pixels.read_idx_files(place))
    if not place.exists() and pixels.idx_sets(place.parent, place.name):
        return Found("idx files", pixels.read_idx_files(place))
    if place.suffix == ".parquet" or (place.is_dir() and any(place.glob("**/*.parquet"))):
        from mimicnorm_jax.tools.prepare_data.parquet import read_parquet  # slow to import

        return Found("parquet files", read_parquet(place, spool, label))
    if place.exists() and _has_tars(place):
        return Found("tar files", read_tars(place, _VIEW, label or LABEL_FIELD))
    return None


def _has_tars(place: pathlib.Path) -> bool:
    """Compressed ones count for a file that is given: beside a folder they are what it is from."""
    if place.is_file():
        return bool(tars_in(place))
    with contextlib.suppress(UserError):
        return bool(tars_in(place))
    return False


def _class_folders(source: pathlib.Path, places: Sequence[pathlib.Path]) -> Found:
    if not source.is_dir():
        what = "is none of these" if source.exists() else "does not exist"
        raise UserError(f"{source} {what}: a folder of {_EXPECTED}")
    for place in reversed(places):
        splits: dict[str, Records] = {}
        for name, folder in splits_in(place).items():
            annotations = annotations_of(folder)
            splits[name] = (
                FolderSource(folder, _VIEW, for_training=name == "train")
                if annotations is None
                else annotated(folder, annotations, _VIEW)
            )
        if splits:
            return Found("class folders", splits)
    raise UserError(f"{source} has no images that can be imported; expected {_EXPECTED}")


def _check_classes(splits: Mapping[str, Records], source: pathlib.Path) -> None:
    for split, records in splits.items():
        if split == "train" and len(records.class_names) == 1:
            raise UserError(
                f"{source} has a single class, {records.class_names[0]}: nothing to learn"
            )
    (first, names), *others = ((split, records.class_names) for split, records in splits.items())
    for split, other in others:
        if other != names:
            differing = sorted(set(names) ^ set(other)) or other
            raise UserError(
                f"{source}: the classes of {first} and {split} differ: {', '.join(differing[:5])}"
            )
