"""Where in a folder the training and the test images are."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from mimicnorm_jax.data import listing
from mimicnorm_jax.data.annotations import find_annotations
from mimicnorm_jax.errors import UserError, refused_by_system, unknown
from mimicnorm_jax.paths import expanded

_TRAINING = ("train", "training")
_TESTS = ("test", "testing")
_VALIDATION = ("val", "valid", "validation")
HELD_OUT = " --config.data.test_split= --config.data.holdout=0.1"
USUAL_SPLITS = (*_TRAINING, *_TESTS, *_VALIDATION)


_IMPORT = (
    "copy them into a build: python -m mimicnorm_jax.tools.prepare_data import {dir} --data-dir "
    "data --name NAME"
)
_OTHER_FORMATS = (  # of a folder without class folders, or the folder in it
    ("**/*.parquet", f"parquet files, of which no image can be read alone; {_IMPORT}"),
    ("**/*.tar", "tar files; if they are WebDataset's: --config.data.name=webdataset"),
    ("data_batch_1*", f"CIFAR-10's files; {_IMPORT}"),
    ("train.bin", f"CIFAR-100's files; {_IMPORT}"),
    ("meta", f"CIFAR-100's files; {_IMPORT}"),
    ("*_32x32.mat", f"SVHN's files; {_IMPORT}"),
    ("train_X.bin", f"STL-10's files; {_IMPORT}"),
    ("*-images-idx3-ubyte*", "files in MNIST's format: --config.data.name=idx"),
)


class Layout(NamedTuple):
    """The folders of the splits.

    Attributes:
      train: of the training images; None where it is not there, which a test alone does not need.
      test: of the test images; None where there is none.
      said: how they were found, where not by the configured names; else empty.
      is_without_splits: the training images are all there are.
    """

    train: pathlib.Path | None
    test: pathlib.Path | None
    said: str = ""
    is_without_splits: bool = False

    def folder(self, part: str, data: ConfigDict) -> pathlib.Path:
        """That of ``"train"`` or ``"test"``.

        Raises:
          UserError: it is not there.
        """
        found = self.train if part == "train" else self.test
        if found is not None:
            return found
        raise UserError(f"config.data.dir = {data.dir!r} has no folder {data[f'{part}_split']}")


def find_layout(data: ConfigDict) -> Layout:
    """The folders of ``config.data.dir`` that have the splits.

    By the configured names; by the usual ones where these are not there; or the folder itself,
    where its folders are classes, not splits.

    Raises:
      UserError: there is no such folder, or it has neither splits nor classes.
    """
    root = expanded(data.dir)
    with refused_by_system(f"config.data.dir = {data.dir!r} cannot be read"):
        if not root.is_dir():
            where = "" if root.is_absolute() else f" below {pathlib.Path.cwd()}"
            raise UserError(f"config.data.dir = {data.dir!r} is not a folder{where}")
        train, test = _split(root, data.train_split), _split(root, data.test_split)
        if train is None and test is None:
            if _has_classes(root):
                return _without_splits(root, data)
            raise UserError(_nothing_found(root, data))
    return Layout(train, test, _said(root, data, train, test))


def split_of(names: Sequence[str], *, whole: bool = False) -> str | None:
    """The split that names of files and folders tell, or None.

    ``training`` is ``train``, ``testing`` is ``test``, in small letters.

    Args:
      names: the last counts first.
      whole: a name is that of the split, or has it as a word, as ``birds-train-0001`` has.
    """
    for name in reversed(names):
        words = [name] if whole else re.split("[^a-zA-Z]+", name)
        for word in map(str.lower, words):
            if word in USUAL_SPLITS:
                return {"training": "train", "testing": "test"}.get(word, word)
    return None


def chosen_split(data: ConfigDict, part: str, there: Collection[str], where: str) -> str:
    """Which of some splits is that of ``"train"`` or ``"test"``: its own, or another usual name.

    Raises:
      UserError: there is none.
    """
    wanted = data[f"{part}_split"]
    name = next((n for n in (wanted, *other_names(wanted)) if n in there), None)
    if name is None:
        hint = f"; to test on a tenth of each training class:{HELD_OUT}" if part == "test" else ""
        raise UserError(f"{unknown(f'split of {where}', wanted, there)}{hint}")
    if name != wanted:
        print(f"NOTE: in {where}, {name} for {wanted}", file=sys.stderr)
    return name


def splits_in(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of all splits in a folder, by the usual names; or itself as ``train``.

    Empty where there are neither splits nor classes.

    Raises:
      UserError: its folders are neither, but data sets, or splits by other names.
      OSError: the system refuses.
    """
    folders = listing.folders_in(root)
    found = {
        split: folder
        for folder in folders
        if (split := split_of([folder.name], whole=True)) and _is_split(root, folder)
    }
    if found or not _has_classes(root):
        return found
    if all(split_of([folder.name]) for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{root} has {names}: rename them to train and test")
    if inner := [folder for folder in folders if _split(folder, "train") is not None]:
        raise UserError(f"{root} has several data sets; take one: {inner[0]}")
    print(f"NOTE: {root} has no splits: its folders are taken as classes", file=sys.stderr)
    return {"train": root}


def annotations_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that tells the classes of a split's images; None where its folders do."""
    return find_annotations(folder) if _is_one_heap(folder) else None


def _is_one_heap(folder: pathlib.Path) -> bool:
    """Whether images are in a folder, or in one called ``images``, not in those of classes."""
    folders = [inner.name for inner in listing.folders_in(folder)]
    return folders == ["images"] or (not folders and listing.count_images(folder) > 0)


def _is_split(root: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether the images in a folder have classes; a class may be named like a split, too."""
    return folder == root or not _is_one_heap(folder) or find_annotations(folder) is not None


def other_names(name: str) -> tuple[str, ...]:
    """Names of a split that mean the same, the nearest first; none of one that is not usual."""
    if name.lower() in _TRAINING:
        return _TRAINING
    if name.lower() in _TESTS:
        return _TESTS + _VALIDATION
    return _VALIDATION + _TESTS if name.lower() in _VALIDATION else ()


def _split(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder of a split: of its name, or of another that means the same."""
    if not name:
        return None
    if (root / name).is_dir() and _is_split(root, root / name):
        return root / name
    there = {path.name.lower(): path for path in listing.folders_in(root)}
    usual_there = (there[other] for other in other_names(name) if other in there)
    return next((folder for folder in usual_there if _is_split(root, folder)), None)


def _has_classes(root: pathlib.Path) -> bool:
    return any(listing.list_class(folder).files for folder in listing.folders_in(root))


def _without_splits(root: pathlib.Path, data: ConfigDict) -> Layout:
    if root.name.lower() in _TRAINING and _split(root.parent, data.test_split) is not None:
        raise UserError(
            f"config.data.dir = {data.dir!r} are training images; give the folder that has them "
            f"and the test images: --config.data.dir={root.parent}"
        )
    names = {folder.name.lower() for folder in listing.folders_in(root)}
    if names <= {*USUAL_SPLITS}:
        raise UserError(
            f"config.data.dir = {data.dir!r}: the images in {', '.join(sorted(names))} have no "
            f"classes; expected {data.train_split}/<class>/*.jpg"
        )
    inner = [folder for folder in listing.folders_in(root) if _split(folder, data.train_split)]
    if inner:
        raise UserError(
            f"config.data.dir = {data.dir!r} has no {data.train_split}; {inner[0]} has: "
            f"--config.data.dir={inner[0]}"
        )
    only = listing.folders_in(root)
    if len(only) == 1 and (tables := sorted(root.glob("*.csv"))):
        raise UserError(
            f"config.data.dir = {data.dir!r} has the images of one folder, {only[0].name}; if "
            f"{tables[0].name} has their classes: --config.data.labels_file={tables[0].name}"
        )
    if len(only) == 1 and len(listing.folders_in(only[0])) > 1:
        raise UserError(
            f"config.data.dir = {data.dir!r} has one folder, {only[0].name}; if that has the "
            f"classes: --config.data.dir={only[0]}"
        )
    if not data.holdout:
        raise UserError(
            f"config.data.dir = {data.dir!r} has classes, but neither {data.train_split} nor "
            f"{data.test_split or 'a test split'}: to test on a tenth of each class, "
            "--config.data.holdout=0.1"
        )
    said = f"{root} has no splits: its folders are taken as classes"
    return Layout(root, None, said, is_without_splits=True)


def _nothing_found(root: pathlib.Path, data: ConfigDict) -> str:
    for pattern, what in _OTHER_FORMATS:
        if any(root.glob(pattern)) or any(root.glob(f"*/{pattern}")):
            return f"config.data.dir = {data.dir!r} has {what.format(dir=data.dir)}"
    there = [folder.name for folder in listing.folders_in(root)]
    found = f"it has {', '.join(there[:5])}" if there else "it has no folders"
    return (
        f"config.data.dir = {data.dir!r} has no images in {data.train_split}/<class> or <class>; "
        f"{found}"
    )


def _said(
    root: pathlib.Path,
    data: ConfigDict,
    train: pathlib.Path | None,
    test: pathlib.Path | None,
) -> str:
    found = {data.train_split: train, data.test_split: test}
    others = [
        f"{path.name} for {name}"
        for name, path in found.items()
        if path is not None and path != root / name
    ]
    return f"in {root}, {' and '.join(others)}" if others else ""
