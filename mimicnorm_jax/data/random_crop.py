"""Random crops of random size, on the host: Inception's, as in torchvision."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mimicnorm_jax.data.images import Crop

_ATTEMPTS = 10
_CROP_STREAM = 1  # tells this use of (seed, step, …) from the order of the examples


def uniforms(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Random numbers of the examples of one step.

    Args:
      seed: of the run.
      step: of the batch.
      batch_size: examples in the global batch.
      count: how many each.

    Returns:
      ``(batch_size, count)`` float64 in [0, 1), which no version of NumPy changes: made from
      the raw stream of the generator. A row does not depend on the batch size.
    """
    # The tag comes last: SeedSequence pads with zeros, so (a, b) and (a, b, 0) are one.
    sequence = np.random.SeedSequence((seed, step, _CROP_STREAM))
    raw = np.random.Philox(sequence).random_raw(batch_size * count)
    return (raw >> np.uint64(11)).reshape(batch_size, count) * 2.0**-53


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A crop whose share of the area and whose aspect ratio are random (Szegedy et al. 2015).

    Attributes:
      scale: least and greatest share of the area; uniform between them.
      ratio: least and greatest ratio of width to height; uniform in the logarithm.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    draws = 2 * _ATTEMPTS + 2

    def choose(self, height: int, width: int, u: np.ndarray) -> Crop:
        """The crop of an image of ``height`` x ``width`` pixels.

        Ten attempts at a crop that fits; else the largest one in the centre whose ratio is
        allowed.

        Args:
          height: of the image.
          width: of the image.
          u: ``(draws,)`` uniform random numbers in [0, 1).
        """
        logs = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_ATTEMPTS):
            u_area, u_ratio = u[2 * attempt : 2 * attempt + 2].tolist()
            area = height * width * (self.scale[0] + u_area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(logs[0] + u_ratio * (logs[1] - logs[0]))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                u_top, u_left = u[-2:].tolist()
                return Crop(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
        h = min(height, max(1, round(width / self.ratio[0])))
        w = min(width, max(1, round(height * self.ratio[1])))
        return Crop((height - h) // 2, (width - w) // 2, h, w)
