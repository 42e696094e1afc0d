"""Names of classes: which logit of a network one is, and how it fits into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mimicnorm_jax.errors import UserError

Labels = Literal["names", "numbers"]

_MOST_LISTED = 10


def columns_of(
    of_images: Sequence[str], of_network: Sequence[str], labels: Labels = "names"
) -> list[int]:
    """The logit of each class of some images.

    Args:
      of_images: names of their classes.
      of_network: names of the network's classes, in the order of the logits.
      labels: whether the images' classes are named as the network's, or by numbers of logits.

    Raises:
      UserError: classes that the network does not have; it lists them.
    """
    known = {name: column for column, name in enumerate(of_network)}
    if labels == "numbers":
        known = {str(column): column for column in range(len(of_network))}
    strange = [name for name in of_images if _plain(name, labels) not in known]
    if not strange:
        return [known[_plain(name, labels)] for name in of_images]
    listed = ", ".join(map(repr, strange[:_MOST_LISTED]))
    more = f" and {len(strange) - _MOST_LISTED} more" if len(strange) > _MOST_LISTED else ""
    if labels == "numbers":
        raise UserError(
            f"{len(strange)} of the {len(of_images)} classes of the images are no numbers of the "
            f"network's {len(of_network)} logits (0 to {len(of_network) - 1}): {listed}{more}"
        )
    missing = [name for name in of_network if name not in set(of_images)]
    are_numbers = all(name.isdecimal() for name in of_images)
    raise UserError(
        f"{len(strange)} of the {len(of_images)} classes of the images are none of the network's "
        f"{len(of_network)}: {listed}{more}; it has no images of "
        f"{', '.join(map(repr, missing[:_MOST_LISTED]))}"
        f"{f' and {len(missing) - _MOST_LISTED} more' if len(missing) > _MOST_LISTED else ''}"
        + ("; where they are numbers of logits: --labels=numbers" if are_numbers else "")
    )


def _plain(name: str, labels: Labels) -> str:
    """``"007"`` is logit 7."""
    return str(int(name)) if labels == "numbers" and name.isascii() and name.isdecimal() else name


def short(name: str, letters: int = 18) -> str:
    """A class name as it fits into a picture, in letters that Pillow's built-in font has."""
    plain = name.encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}~"
