"""ResNet-50 on CIFAR-100: Table 1 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_resnet50.py

Paper, test accuracy in %: BatchNorm 78.53±0.26, MimicNorm 77.91±0.20, Fixup 72.81±0.10.
Batch 128, as the authors train this one network.
Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "resnet50"
    config.batch_size = 128
    return config
