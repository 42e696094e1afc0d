"""``run.json`` of a run: what must be known to use its network where its data are not."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from mimicnorm_jax.data.sources import Source, View
from mimicnorm_jax.data.splits import view_of
from mimicnorm_jax.errors import UserError, shown
from mimicnorm_jax.train.checkpoint import latest_step
from mimicnorm_jax.train.json_files import check_kinds, read_json, write_json
from mimicnorm_jax.train.program import Images

FORMAT = 1
NAME = "run.json"

# Networks that an earlier version built otherwise, of the same parameters: its runs have no
# run.json. Their checkpoints can be read, and mean something else.
_BUILT_OTHERWISE = {"squeezenet": "its max-pools come after fire modules 4 and 8 since"}


@dataclasses.dataclass(frozen=True)
class Description:
    """What must be known of the images that a network was trained on.

    Attributes:
      class_names: the classes, in the order of the logits.
      images: their shape, mean and standard deviation, and how many the network was trained on.
      view: how an image file becomes an array of that shape.
    """

    class_names: tuple[str, ...]
    images: Images
    view: View

    @classmethod
    def of(cls, config: ConfigDict, train: Source, images: Images) -> Description:
        """That of a run on a training split."""
        return cls(tuple(train.class_names), images, view_of(config.data))

    def as_json(self) -> dict[str, Any]:
        """As a file can hold it; ``parse_description`` reads it."""
        return {
            "class_names": list(self.class_names),
            "images": self.images._asdict(),
            "view": dataclasses.asdict(self.view),
        }


def write_description(workdir: pathlib.Path, description: Description) -> None:
    """Writes ``run.json``; raises ``OSError`` where the system refuses."""
    write_json(workdir / NAME, {"format": FORMAT, **description.as_json()})


def read_description(workdir: pathlib.Path) -> Description | None:
    """Reads ``run.json``.

    Args:
      workdir: the run's folder.

    Returns:
      None where a version of this project made the run that wrote none.

    Raises:
      UserError: it is damaged, or of a later version.
    """
    path = workdir / NAME
    if not path.exists():
        return None
    value = read_json(path)
    if (number := value.get("format")) != FORMAT:
        raise UserError(
            f"{path} has format {shown(number)}, and this version of mimicnorm-jax reads {FORMAT}; "
            "use the version that trained the run"
        )
    try:
        return parse_description(value, str(path))
    except UserError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def parse_description(value: dict[str, Any], name: str) -> Description:
    """Reads what ``Description.as_json`` gives.

    Args:
      value: it.
      name: of its file, for the messages.

    Raises:
      LookupError, TypeError, ValueError: it is damaged.
    """
    check_kinds(value, {"images": dict, "view": dict, "class_names": list}, name)
    of_images, names = value["images"], value["class_names"]
    kinds: dict[str, type] = {"shape": list, "mean": list, "std": list}
    check_kinds(of_images, kinds | {"num_classes": int, "num_examples": int}, f"{name}: images")
    check_kinds(value["view"], {"size": int, "resize": int, "upright": bool}, f"{name}: view")
    height, width, channels = map(int, of_images["shape"])
    images = Images(
        shape=(height, width, channels),
        num_classes=int(of_images["num_classes"]),
        num_examples=int(of_images["num_examples"]),
        mean=tuple(map(float, of_images["mean"])),
        std=tuple(map(float, of_images["std"])),
    )
    view = View(**value["view"])
    red, green, blue = map(int, view.background)
    view = dataclasses.replace(view, background=(red, green, blue))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names are no list of words")
    if len(names) != images.num_classes:
        raise ValueError(f"it names {len(names)} of {images.num_classes} classes")
    if not channels == len(images.mean) == len(images.std) or min(images.std) <= 0:
        raise ValueError(f"mean and std are not those of {channels} channels")
    if not height == width == view.size <= view.resize:
        raise ValueError(f"images of {height} x {width} pixels do not come of {view}")
    return Description(tuple(names), images, view)


def check_network(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes sure that this version builds the network of a run as the one that trained it did.

    Raises:
      UserError: an earlier version built it otherwise, or a later one may have.
    """
    description = read_description(workdir)
    changed = _BUILT_OTHERWISE.get(config.network)
    if changed and latest_step(workdir / "checkpoints") and description is None:
        raise UserError(
            f"{workdir} is a run of {config.network} by an earlier version, which built another "
            f"network ({changed}); train it again in another folder, or use that version"
        )
