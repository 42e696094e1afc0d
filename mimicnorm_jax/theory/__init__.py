"""What mean-field theory says about a network at initialization.

``signal`` predicts the statistics of a layer for given images, with distributions over
channels from ``marginal``; ``pooling`` and ``normalization`` are its harder operations.
``prediction`` says what each part of a network makes of a signal, and ``probe`` runs a whole
network on signals and measures the same on its real activations.
"""

from mimicnorm_jax.theory.probe import Layer, Probe
from mimicnorm_jax.theory.signal import Signal, observe

__all__ = ["Layer", "Probe", "Signal", "observe"]
