"""The demo: ResNet-20 with MimicNorm on 1,797 real handwritten digits, without a download.

  python -m mimicnorm_jax.main --config configs/digits_resnet20.py

Hardware: 2 CPU cores, 20 seconds. Paper: not in it. Ours, test accuracy, one seed: MimicNorm
99.2 to 100 %, by the processor, whose vector instructions decide how sums are rounded;
BatchNorm 100 %.
"""

from mimicnorm_jax.config import default_config


def get_config():
    config = default_config()
    config.network = "resnet20"
    config.epochs = 12.0
    config.batch_size = 64
    config.learning_rate = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.data.name = "digits"
    config.data.image_size = 16
    config.data.pad_crop = 1
    return config
