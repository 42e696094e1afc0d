"""Finds out what a person has, and opens it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from mimicnorm_jax.data.folder import FolderSource, annotated
from mimicnorm_jax.data.layout import USUAL_SPLITS, annotations_of, splits_in
from mimicnorm_jax.data.listing import is_class_folder
from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.webdataset import LABEL_FIELD, read_tars, tars_in
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
        place = _unpacked(source) if source.is_dir() else source
        found = _find(place, spool, label)
        if found is None:
            found = _class_folders(place)
    if not found.splits:
        raise UserError(f"{source} has no images with labels")
    if label and found.kind not in _WITH_LABELS:
        raise UserError(f"--label={label}: {found.kind} have one label an image; leave it out")
    _check_classes(found.splits, source)
    return found


def _unpacked(source: pathlib.Path) -> pathlib.Path:
    """The folder in a folder, where that is all there is: archives unpack to one of their name."""
    inner = [path for path in source.iterdir() if is_class_folder(path.name)]
    only = inner[0] if len(inner) == 1 else source
    return source if only.name.lower() in USUAL_SPLITS or not only.is_dir() else only


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
    if place.suffix == ".tar" or (place.is_dir() and tars_in(place)):
        return Found("tar files", read_tars(place, _VIEW, label or LABEL_FIELD))
    return None


def _class_folders(source: pathlib.Path) -> Found:
    if not source.is_dir():
        what = "is none of these" if source.exists() else "does not exist"
        raise UserError(f"{source} {what}: a folder of {_EXPECTED}")
    splits: dict[str, Records] = {}
    for name, folder in splits_in(source).items():
        annotations = annotations_of(folder)
        splits[name] = (
            FolderSource(folder, _VIEW, for_training=name == "train")
            if annotations is None
            else annotated(folder, annotations, _VIEW)
        )
    if not splits:
        raise UserError(f"{source} has no images that can be imported; expected {_EXPECTED}")
    return Found("class folders", splits)


def _check_classes(splits: Mapping[str, Records], source: pathlib.Path) -> None:
    (first, names), *others = ((split, records.class_names) for split, records in splits.items())
    for split, other in others:
        if other != names:
            differing = sorted(set(names) ^ set(other)) or other
            raise UserError(
                f"{source}: the classes of {first} and {split} differ: {', '.join(differing[:5])}"
            )
