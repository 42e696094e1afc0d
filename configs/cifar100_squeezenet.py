"""SqueezeNet on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_squeezenet.py

Paper, test accuracy in %: BatchNorm 70.88±0.08, MimicNorm 71.15±0.10.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "squeezenet"
    return config
