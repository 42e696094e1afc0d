"""How long runs may be that have to end within a given time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Part of the time that is kept back: machines do not repeat a measurement exactly.
RESERVE = 0.1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run costs, as measured.

    Attributes:
      fixed_s: seconds that do not depend on its length: compilation, the last evaluations.
      epoch_s: seconds of an epoch of training and its evaluation.
    """

    fixed_s: float
    epoch_s: float

    def seconds(self, epochs: int) -> float:
        """Seconds of a run of so many epochs, with the reserve."""
        return (self.fixed_s + epochs * self.epoch_s) * (1 + RESERVE)

    def no_cheaper_than(self, known: Cost | None) -> Cost:
        """This cost, with the greater of both fixed parts.

        What was quick because the compiler's cache had it is not so with another seed, which
        is another program.

        Args:
          known: of the same network and method, measured before, if it was.
        """
        if known is None:
            return self
        return dataclasses.replace(self, fixed_s=max(self.fixed_s, known.fixed_s))


def fits(seconds: float, cost: Cost, epochs: int) -> bool:
    """Whether a run of so many epochs ends within so many seconds."""
    return cost.seconds(epochs) <= seconds


def choose_epochs(
    seconds: float, wanted: Sequence[Cost], *, share: float, least: int, most: int
) -> int:
    """The length of runs that are to be compared, and so are equally long.

    As many epochs as all of them can have in their share of the time. Where that is too little,
    what they get is the least that is worth running, if all of the time suffices for it.

    Args:
      seconds: that are left.
      wanted: the runs' costs.
      share: in (0, 1], the part of the time that is theirs where others are wanted too.
      least: no run is shorter.
      most: no run is longer.

    Returns:
      Epochs of each of the runs, or 0 where not all of them can end in time.
    """
    if not wanted or not 0 < share <= 1 or not 1 <= least <= most:
        raise ValueError(f"wanted={wanted}, share={share}, least={least}, most={most}")

    def together(epochs: int) -> float:
        return sum(cost.seconds(epochs) for cost in wanted)

    per_epoch = together(1) - together(0)
    epochs = min(most, math.floor((seconds * share - together(0)) / per_epoch))
    if epochs < least:
        epochs = least
    # asked again, since rounding must not start what cannot end
    return epochs if together(epochs) <= seconds else 0
