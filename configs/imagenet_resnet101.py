"""ResNet-101 on ImageNet: Table 3 of the paper.

  python -m mimicnorm_jax.main --config configs/imagenet_resnet101.py

Paper, validation accuracy in %: BatchNorm 77.37, MimicNorm 77.52.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import imagenet


def get_config():
    config = imagenet()
    config.network = "resnet101"
    return config
