"""The paper's training recipes (Section 5), each written once.

A config in ``configs/`` starts from one of them and names its network.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from mimicnorm_jax.config import default_config


def cifar() -> ConfigDict:
    """CIFAR: 150 epochs, batch 256, weight decay 5e-4, pad-crop and flip.

    The defaults of ``config.py`` are this recipe's optimizer and schedule: rate from 0
    to 0.1 in 2 epochs, times 0.1 at epochs 80, 110 and 135.
    """
    config = default_config()
    config.data.image_size = 32
    config.data.pad_crop = 4
    config.data.flip = True
    return config


def cifar100() -> ConfigDict:
    """``cifar`` on CIFAR-100, with the channel statistics of its training set."""
    config = cifar()
    config.data.name = "tfds"
    config.data.tfds_name = "cifar100"
    config.data.mean = (0.50708, 0.48655, 0.44092)
    config.data.std = (0.26733, 0.25644, 0.27615)
    return config


def imagenet() -> ConfigDict:
    """ImageNet: 90 epochs, batch 256, weight decay 1e-4, images of 224 pixels.

    The rate rises to 0.1 in 2 epochs and falls by 10 at epochs 30, 60 and 85. Training sees
    random crops of random size, evaluation the central 224 of 256 pixels. Weight mean
    centres every convolution that is not depthwise.
    """
    config = default_config()
    config.center = "not_depthwise"
    config.epochs = 90.0
    config.optimizer.weight_decay = 1e-4
    config.schedule.milestones = (30.0, 60.0, 85.0)
    config.data.name = "tfds"
    config.data.tfds_name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.resize = 256
    config.data.upright = False
    config.data.random_resized_crop = True
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    return config


def imagenet_shufflenet() -> ConfigDict:
    """ImageNet as ShuffleNetV2's authors train it (Ma et al. 2018), for 200 epochs.

    Batch 1024, rate 0.5 falling linearly to 0, weight decay 4e-5, crops of at least half
    of the image: the one network for which the paper leaves its own recipe.
    """
    config = imagenet()
    config.epochs = 200.0
    config.batch_size = 1024
    config.learning_rate = 0.5
    config.optimizer.weight_decay = 4e-5
    config.schedule.name = "linear"
    config.data.crop_scale = (0.5, 1.0)
    return config
