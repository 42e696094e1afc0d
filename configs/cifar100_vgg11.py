"""VGG11 on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_vgg11.py

Paper, test accuracy in %: BatchNorm 67.90±0.14, MimicNorm 67.87±0.20, no normalization 65.33±0.08.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "vgg11"
    return config
