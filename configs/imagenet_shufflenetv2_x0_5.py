"""ShuffleNetV2 0.5× on ImageNet: Table 3 of the paper.

  python -m mimicnorm_jax.main --config configs/imagenet_shufflenetv2_x0_5.py

Paper, validation accuracy in %: BatchNorm 59.77, MimicNorm 58.31.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import imagenet_shufflenet


def get_config():
    config = imagenet_shufflenet()
    config.network = "shufflenetv2_x0_5"
    return config
