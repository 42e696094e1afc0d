"""Accelerators: how fast they compute and read their memory, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator, as JAX sees it: one device.

    Attributes:
      flops: dense bfloat16 operations per second; float32 convolutions run at this rate on TPUs,
        whose default precision rounds their operands.
      bandwidth: bytes per second between the chip and its memory.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, bytes_accessed: float) -> float:
        """The roofline: the least time of a program, by the scarcer of work and traffic."""
        return max(flops / self.flops, bytes_accessed / self.bandwidth)


# by Device.device_kind, or what it begins with; the first that fits counts
_CHIPS = {
    "TPU v5 lite": Chip(197e12, 819e9),
    "TPU v5e": Chip(197e12, 819e9),
    "TPU v6": Chip(918e12, 1640e9),
    "TPU v5": Chip(459e12, 2765e9),
    "TPU v4": Chip(275e12, 1228e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1935e9),
    "NVIDIA A100": Chip(312e12, 1555e9),
    "NVIDIA H100 PCIe": Chip(756e12, 2000e9),
    "NVIDIA H100": Chip(989e12, 3350e9),
    "NVIDIA H200": Chip(989e12, 4800e9),
    "NVIDIA L40S": Chip(362e12, 864e9),
    "Tesla V100": Chip(125e12, 900e9),
    "Tesla T4": Chip(65e12, 320e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a ``Device.device_kind``; None for others, such as CPUs."""
    return next((chip for kind, chip in _CHIPS.items() if device_kind.startswith(kind)), None)
