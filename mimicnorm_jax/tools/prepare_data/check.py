"""What is there of a prepared data set, and what is missing."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Any

import numpy as np

from mimicnorm_jax.data.layout import HELD_OUT
from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.tfds import (
    TFDSSource,
    build_directory,
    open_build,
)
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data.contact_sheet import CELL, draw_contact_sheet

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
        lines.append(_checked(builder, split, source, f"{len(source)} of {expected} examples"))
    return "\n".join(lines)


def check_import(path: pathlib.Path) -> str:
    """Reads a build that was imported, and draws images of each class of each split.

    Args:
      path: folder of its version.

    Returns:
      A report, with the paths of the pictures, and how to train on it.

    Raises:
      UserError: it is damaged.
      OSError: the system refuses.
    """
    builder = open_build(path)
    lines = [str(path)]
    for split in builder.info.splits:
        source = TFDSSource(builder, split, View(size=CELL, resize=CELL, upright=True))
        lines.append(_checked(builder, split, source, f"{len(source)} examples"))
        picture = path / f"images_{split}.png"
        draw_contact_sheet(source, picture)
        lines.append(f"    {picture}")
    command = "python -m mimicnorm_jax.main --config CONFIG --config.data.name=tfds"
    place = shlex.quote(str(path.parent.parent))
    fields = f"--config.data.tfds_name={builder.name} --config.data.dir={place}"
    lines.append(f"to train on it: {command} {fields}{_of_splits(list(builder.info.splits))}")
    return "\n".join(lines)


def _of_splits(splits: list[str]) -> str:
    """The fields that choose them, where they are not the default."""
    train = "train" if "train" in splits else splits[0]
    others = [split for split in splits if split != train]
    chosen = "" if train == "train" else f" --config.data.train_split={train}"
    if not others:
        return chosen + HELD_OUT
    return chosen if "test" in others else f"{chosen} --config.data.test_split={others[0]}"


def _checked(builder: Any, split: str, source: TFDSSource, counted: str) -> str:
    chosen = np.linspace(0, len(source) - 1, min(_DECODED, len(source))).astype(int)
    for index in chosen:
        source[int(index)]
    info = builder.info.splits[split]
    return (
        f"  {split}: {counted}, {len(source.class_names)} classes, "
        f"{info.num_bytes / 2**20:.1f} MiB in {info.num_shards} shard(s); {len(chosen)} decoded"
    )


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
