"""What a file says of the network in it."""

from __future__ import annotations

import json
from typing import Any

from mimicnorm_jax.export.prepared import About, Prepared

FORMAT = 1


def metadata(prepared: Prepared, about: About, difference: float) -> dict[str, Any]:
    """What goes into a file, or beside it.

    Args:
      prepared: the network.
      about: what is known of it.
      difference: the largest that was found when the file was run.
    """
    from mimicnorm_jax.train.provenance import versions  # imports what a network does not need

    inside = prepared.images.dtype == "uint8"
    return {
        "format": FORMAT,
        "input": {
            "shape": list(prepared.shape),
            "layout": "NHWC",
            "type": str(prepared.images.dtype),
            "values": "pixels, 0 to 255: normalized inside" if inside else "normalized",
            "mean": None if about.mean is None else list(about.mean),
            "std": None if about.std is None else list(about.std),
            "resize": about.resize,
        },
        "outputs": list(prepared.output_names),
        "classes": list(about.classes),
        "temperature": about.temperature,
        "difference": difference,
        "run": about.run,
        "versions": versions(),
    }


def as_text(values: dict[str, Any]) -> dict[str, str]:
    """The same for formats that keep words only: everything that is none as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
