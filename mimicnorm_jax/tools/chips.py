"""Accelerators: how fast they compute and read their memory, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator, as JAX sees it: one device.

    Attributes:
      name: as people call it.
      flops: dense bfloat16 operations per second; float32 convolutions run at this rate on TPUs,
        whose default precision rounds their operands.
      bandwidth: bytes per second between the chip and its memory.
      memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float

    def seconds(self, flops: float, bytes_accessed: float) -> float:
        """The roofline: the least time of a program, by the scarcer of work and traffic."""
        return max(flops / self.flops, bytes_accessed / self.bandwidth)


# by what Device.device_kind begins with; the first that fits counts
_CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 197e12, 819e9, 16 * 2**30),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 1640e9, 32 * 2**30),
    "TPU v5": Chip("TPU v5p", 459e12, 2765e9, 95 * 2**30),
    "TPU v4": Chip("TPU v4", 275e12, 1228e9, 32 * 2**30),
    "NVIDIA A100": Chip("A100", 312e12, 1555e9, 40 * 2**30),
    "NVIDIA H100": Chip("H100", 989e12, 3350e9, 80 * 2**30),
    "NVIDIA H200": Chip("H200", 989e12, 4800e9, 141 * 2**30),
    "NVIDIA L4": Chip("L4", 121e12, 300e9, 24 * 2**30),
    "Tesla V100": Chip("V100", 125e12, 900e9, 16 * 2**30),
    "Tesla T4": Chip("T4", 65e12, 320e9, 16 * 2**30),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a ``Device.device_kind``; None for others, such as CPUs."""
    return next((chip for kind, chip in _CHIPS.items() if device_kind.startswith(kind)), None)
