"""ShuffleNetV2 1.0× on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_shufflenetv2.py

Paper, test accuracy in %: BatchNorm 71.10±0.49, MimicNorm 70.93±0.13.
The paper does not say which width; 1.0 is the common one.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "shufflenetv2_x1_0"
    return config
