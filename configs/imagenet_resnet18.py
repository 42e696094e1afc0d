"""ResNet-18 on ImageNet: Table 3 of the paper.

  python -m mimicnorm_jax.main --config configs/imagenet_resnet18.py

Paper, validation accuracy in %: BatchNorm 69.76, MimicNorm 70.15.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import imagenet


def get_config():
    config = imagenet()
    config.network = "resnet18"
    return config
