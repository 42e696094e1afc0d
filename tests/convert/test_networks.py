"""Networks as outsiders write them: converted in one line, and folded."""

import importlib
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import LastBN, WeightMeanConv, WeightMeanDense, center_kernel
from tests.convert.training import NETWORKS

# What the structure of each network asks for: layers centred, residual scalars (as 1/l; of a stack
# in order), BatchNorms that become a shift.
EXPECTED = {
    "resnet": (22, [1, 2, 3, 4, 5, 6], 0),
    "preact_resnet": (17, [1, 2, 3, 4, 5, 6, 7], 8),
    "wide_resnet": (16, [1, 2, 3, 4, 5, 6], 6),
    "mobilenet_v2": (None, None, 0),
    "se_resnet": (15, [1, 2, 3, 4, 5, 6], 0),
    "densenet": (25, [], 15),
    "googlenet": (33, [], 1),
    "unet": (14, [], 3),
    "efficientnet": (None, None, 0),
    "convnext": (None, None, None),
    "vgg_avgpool": (6, [], 0),
    "scanned_resnet": (15, [1, 2, 3, 4, 5, 6, 7, 8, 9], 0),
}


def images(channels=3):
    digits = sklearn.datasets.load_digits().images[:32, ..., None]
    digits = (digits - digits.mean()) / digits.std()
    return jax.image.resize(
        jnp.asarray(digits, jnp.float32).repeat(channels, -1), (32, 32, 32, channels), "bilinear"
    )


def create(name, **options):
    module = importlib.import_module(f"tests.convert.networks.{name}")
    return module.Network(rngs=nnx.Rngs(0), **options)


def convert(model, *args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*BatchNorms have a scale other")
        return mimicnorm_jax.convert(model, *args, logits=lambda outputs: outputs, **options)


def inverse_squares(report):
    scales = [layer.scale for layer in report.layers if layer.scale is not None]
    flat = [s for scale in scales for s in (scale if isinstance(scale, tuple) else (scale,))]
    return [round(scale**-2) for scale in flat]


@pytest.fixture(autouse=True)
def _rank_promotion_as_outsiders_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield

def test_print():
    for name in NETWORKS:
        shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        network, report = convert(create(name), shape, variance="formula")
        print(name, report.num_centered, inverse_squares(report), [l.path for l in report.layers if "a shift" in l.became].__len__(), report.notes)
