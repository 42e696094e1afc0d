r"""VGG16 on CIFAR-100 for 10 epochs at several learning rates: Table 2 of the paper.

  python -m mimicnorm_jax.main --config configs/cifar100_vgg16_lr.py \
      --config.method=METHOD --config.learning_rate=RATE --workdir=runs/lr-METHOD-RATE

Paper, best test accuracy in % in the first 10 epochs:

  ==========  =====  =====  =====  =====  =====  =====  =====
  rate         0.01   0.02   0.05    0.1    0.2    0.5    1.0
  ==========  =====  =====  =====  =====  =====  =====  =====
  nonorm      22.12  26.76  25.63   1.24   1.77   1.00   1.00
  weightmean  34.81  43.07  42.63  36.49   1.00   1.00   1.00
  mimicnorm   38.39  44.32  49.53  46.92  39.41  22.03   9.83
  batchnorm   37.82  40.49  37.97  32.40  25.50   8.26   3.93
  ==========  =====  =====  =====  =====  =====  =====  =====

Ours: not run yet, so neither are hardware and hours known.
"""

from mimicnorm_jax.recipes import cifar100


def get_config():
    config = cifar100()
    config.network = "vgg16"
    config.epochs = 10.0
    return config
