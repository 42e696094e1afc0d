"""ResNet-18 on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_resnet18.py

Paper, test accuracy in %: BatchNorm 74.72±0.31, MimicNorm 74.96±0.14, Fixup 70.48±0.18.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "resnet18"
    return config
