"""ResNet-20 on CIFAR-10 stored as image folders, with the paper's CIFAR recipe.

python -m mimicnorm_jax.main --config configs/cifar10_folder_resnet20.py \
      --config.data.dir=DIR   # DIR/train/<class>/*.jpg and DIR/test/<class>/*.jpg

Hardware: any; 2 CPU cores take about 10 minutes an epoch. Paper: not in it. Ours: not run in full;
after 2 epochs (see results/), test accuracy in %: MimicNorm 61.08, BatchNorm 62.49.
"""

from mimicnorm_jax.recipes import cifar


def get_config():
    config = cifar()
    config.network = "resnet20"
    config.data.name = "folder"
    return config
