"""VGG16 on ImageNet: Table 3 of the paper.

  python -m mimicnorm_jax.main --config configs/imagenet_vgg16.py

Paper, validation accuracy in %: BatchNorm 73.89, MimicNorm 73.31, no normalization 71.59.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import imagenet


def get_config():
    config = imagenet()
    config.network = "vgg16"
    return config
