"""VGG16 on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_vgg16.py

Paper, test accuracy in %: BatchNorm 72.28±0.05, MimicNorm 72.47±0.02, no normalization 68.97±0.36.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "vgg16"
    return config
