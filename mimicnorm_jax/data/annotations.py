"""Classes that a file tells beside the images, as ImageNet's validation images come."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Iterator

from mimicnorm_jax.errors import UserError, first_line, refused_by_system

_KAGGLE = "LOC_val_solution.csv"
_TINY = "val_annotations.txt"
_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_ABOVE = 4  # folders between Kaggle's images and its table


def find_annotations(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that tells the classes of the images in a folder; None where there is none.

    Tiny ImageNet's ``val_annotations.txt`` in it, Kaggle's ``LOC_val_solution.csv`` in it or up to
    four folders above, or the ground truth of ImageNet's development kit in it or beside it.
    """
    above = [folder, *folder.absolute().parents[:_ABOVE]]
    kit = [
        place / inner for place in above[:2] for inner in ("", "data", "ILSVRC2012_devkit_t12/data")
    ]
    candidates = [
        folder / _TINY,
        *(place / _KAGGLE for place in above),
        *(place / _DEVKIT for place in kit),
    ]
    return next((path for path in candidates if path.is_file()), None)


def read_annotations(path: pathlib.Path) -> dict[str, str]:
    """The class of each image, by the name of its file without what is behind the dot.

    Args:
      path: as ``find_annotations`` finds it.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    readers: dict[str, Callable[[pathlib.Path], Iterator[tuple[str, str]]]] = {
        _TINY: _tiny,
        _KAGGLE: _kaggle,
        _DEVKIT: _devkit,
    }
    with refused_by_system(f"{path} cannot be read"):
        try:
            found = dict(readers[path.name](path))
        except UserError:
            raise
        except (LookupError, ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if not found:
        raise UserError(f"{path} names no image")
    return found


def _tiny(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        yield name.rpartition(".")[0], wnid


def _kaggle(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield row["ImageId"], row["PredictionString"].split()[0]


def _devkit(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Its numbers are those of a table of its own, not of the sorted names."""
    meta = path.with_name(_META)
    if not meta.is_file():
        raise UserError(f"{path} counts classes as {meta} does, which is missing")
    wnids = _wnids(meta)
    for number, line in enumerate(path.read_text().split(), start=1):
        yield f"ILSVRC2012_val_{number:08}", wnids[int(line)]


def _wnids(meta: pathlib.Path) -> dict[int, str]:
    from scipy.io import loadmat  # slow to import

    try:
        table = loadmat(str(meta), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # whatever damaged bytes make of it
        raise UserError(f"{meta} is damaged: {first_line(error)}") from error
