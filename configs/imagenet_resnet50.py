"""ResNet-50 on ImageNet: Table 3 of the paper.

  python -m mimicnorm_jax.main --config configs/imagenet_resnet50.py

Paper, validation accuracy in %: BatchNorm 76.48, MimicNorm 76.84, Fixup 72.40.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import imagenet


def get_config():
    config = imagenet()
    config.network = "resnet50"
    return config
