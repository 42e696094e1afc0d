"""What mean-field theory says about a network at initialization.

Of infinite width, as in the paper: ``dual`` and ``kernels`` (NNGP and NTK in closed form, phases,
fixed points), ``activation`` (others than ReLU), ``patches`` (of convolutional networks),
``batches`` (with BatchNorm, on a real batch). ``finite`` estimates both kernels of real networks.
``docs/theory.md`` is the guide.

Of any network and real images: ``signal`` predicts the statistics of a layer, with distributions
over channels from ``marginal``; ``pooling`` and ``normalization`` are its harder operations.
``prediction`` says what each part of a network makes of a signal, and ``probe`` runs a whole
network on signals and measures the same on its real activations.
"""

from mimicnorm_jax.theory.activation import chi1_of, dual_activation_of
from mimicnorm_jax.theory.batches import batch_kernels, batch_norm_kernel
from mimicnorm_jax.theory.dual import dual_activation, dual_activation_derivative
from mimicnorm_jax.theory.finite import empirical_kernels
from mimicnorm_jax.theory.kernels import (
    chi1,
    condition_number,
    fixed_points,
    nngp,
    ntk,
    phase,
    stable_weight_variance,
    transition,
    transition_derivative,
)
from mimicnorm_jax.theory.patches import conv_kernels
from mimicnorm_jax.theory.probe import Layer, Probe
from mimicnorm_jax.theory.signal import Signal, observe

__all__ = [
    "Layer",
    "Probe",
    "Signal",
    "batch_kernels",
    "batch_norm_kernel",
    "chi1",
    "chi1_of",
    "condition_number",
    "conv_kernels",
    "dual_activation",
    "dual_activation_derivative",
    "dual_activation_of",
    "empirical_kernels",
    "fixed_points",
    "nngp",
    "ntk",
    "observe",
    "phase",
    "stable_weight_variance",
    "transition",
    "transition_derivative",
]
