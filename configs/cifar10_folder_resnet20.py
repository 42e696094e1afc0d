"""ResNet-20 on CIFAR-10 stored as image folders, with the paper's CIFAR recipe.

python -m mimicnorm_jax.main --config configs/cifar10_folder_resnet20.py \
      --config.data.dir=DIR   # DIR/train/<class>/*.jpg and DIR/test/<class>/*.jpg
"""

from mimicnorm_jax.recipes import cifar


def get_config():
    config = cifar()
    config.network = "resnet20"
    config.data.name = "folder"
    return config
