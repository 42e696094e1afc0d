"""Options that some networks and some methods have."""

from __future__ import annotations

from mimicnorm_jax.config.field import Field, above, at_least, in_unit_interval, true_or_false

FIELDS: dict[str, Field] = {
    "network_options.stem": Field(None, "resnet*, squeezenet, shufflenetv2*: first layers.", ("auto", "small", "large"), kind=str),
    "network_options.shortcut": Field(None, "resnet*: what meets a changed shape.", ("auto", "identity", "projection"), kind=str),
    "network_options.dropout": Field(None, "vgg*: dropout rate after the hidden dense layers.", **in_unit_interval(), kind=float),
    "network_options.depth": Field(None, "mlp: number of dense layers.", **at_least(2), kind=int),
    "network_options.hidden_features": Field(None, "mlp: features of the hidden layers.", **at_least(1), kind=int),
    "method_options.bn_sync": Field(None, "batchnorm: statistics of each device's part of the batch (local) or of all of it (global).", ("local", "global"), kind=str),
    "method_options.conv_bias": Field(None, "batchnorm: keep convolution biases, as the published VGGs do.", **true_or_false(), kind=bool),
    "method_options.frozen": Field(None, "batchnorm: its statistics, scales and biases stay those of config.init_from.", **true_or_false(), kind=bool),
    "method_options.min_fan_in": Field(None, "mimicnorm: with center=fan_in, layers with a fan-in above this are centred (unset: 50).", **at_least(1), kind=int),
    "method_options.center_dense": Field(None, "mimicnorm: centre the dense layers before the classifier too.", **true_or_false(), kind=bool),
    "method_options.residual_init": Field(None, "mimicnorm: residual scalar at the start, 1/sqrt(l) or 1/l.", ("inverse_sqrt", "inverse"), kind=str),
    "method_options.gain": Field(None, "mimicnorm: factor of the initial standard deviation of layers whose input is not rectified: the stem, and 1x1 convolutions after depthwise ones (unset: 1).", **above(0), kind=float),
    "method_options.groups": Field(None, "weightstandardization: groups of each GroupNorm (unset: 32).", **at_least(1), kind=int),
    "method_options.scalar_rate": Field(None, "Learning rate of scalar parameters as a multiple of the others' (unset: 0.1 for fixup, else 1).", **above(0), kind=float),
}  # fmt: skip
