"""Which layers weight mean centres, and what the others start with."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.config import method_of
from mimicnorm_jax.config.packaged import config_files
from mimicnorm_jax.layers import WeightMeanConv, WeightMeanDense
from mimicnorm_jax.methods import create_method
from tests.methods.test_methods import make, modules
from tests.models.published import convolutions, layers_of


@pytest.mark.parametrize(
    ("network", "centred"),
    # all convolutions whose fan-in is above 50: not the 3-channel 3x3 stem
    [
        *(("vgg11", 7), ("vgg16", 12), ("resnet18", 19), ("resnet50", 52), ("resnet20", 18)),
        ("mlp", 2),
        # all squeezing and all 3x3 convolutions, the last 2 modules' expanding 1x1s, the classifier
        ("squeezenet", 8 + 8 + 2 + 1),
        # the 1x1 convolutions of 24 units' halves, but for the fan-ins of 24, and the last
        ("shufflenetv2_x1_0", 13 * 2 + 3 * 3 - 2 + 1),
    ],
)
def test_the_centred_layers_are_those_with_a_fan_in_above_50(network, centred):
    model = nnx.eval_shape(lambda: make(network, "mimicnorm", width=1.0))
    layers = modules(model, (WeightMeanConv, WeightMeanDense))
    assert len(layers) == centred
    assert all(np.prod(layer.kernel.shape[:-1]) > 50 for layer in layers)


CENTRED = {
    "cifar100_resnet18": 19,
    "cifar100_resnet50": 52,
    "cifar100_shufflenetv2": 34,
    "cifar100_squeezenet": 19,
    "cifar100_vgg11": 7,
    "cifar100_vgg16": 12,
    "cifar100_vgg16_lr": 12,
    "cifar10_folder_resnet20": 18,
    "digits_resnet20": 18,
    "imagenet_resnet101": 104,
    "imagenet_resnet18": 20,
    "imagenet_resnet50": 53,
    "imagenet_shufflenetv2_x0_5": 37,
    "imagenet_vgg16": 13,
}


QUICK = ("digits_resnet20", "cifar100_squeezenet", "imagenet_shufflenetv2_x0_5", "imagenet_vgg16")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, marks=() if name in QUICK else pytest.mark.long, id=name)
        for name, path in config_files().items()
    ],
)
def test_a_config_centres_the_layers_that_the_authors_do(name, path):
    """CIFAR: a fan-in above 50. ImageNet: all of one group. By the package and by the list."""
    config = runpy.run_path(str(path))["get_config"]()
    image_size = config.data.image_size
    model = nnx.eval_shape(
        lambda: make(config.network, method_of(config), width=1.0, image_size=image_size)
    )
    centred = modules(model, (WeightMeanConv, WeightMeanDense))
    assert len(centred) == CENTRED[name]
    published = layers_of(config.network, classes=10, image_size=32 if image_size < 96 else 224)
    kinds = [
        layer.groups == 1 if name.startswith("imagenet") else layer.fan_in > 50
        for layer in convolutions(published)
    ]
    assert len(centred) == sum(kinds) + (config.network == "squeezenet")  # its last one, as dense
    if name == "imagenet_shufflenetv2_x0_5":
        assert len(kinds) == 56


@pytest.mark.parametrize(("gain", "ratio"), [(1.0, 0.98), (2.0, 3.94)])
def test_gain_1_keeps_the_second_moment_through_a_shuffle_branch(gain, ratio):
    """After its last convolution over after its first; the authors' code comes to 0.99."""
    method = create_method("mimicnorm", gain=gain, center="not_depthwise")
    model = make("shufflenetv2_x1_0", method, width=1.0)
    x = nnx.relu(jax.random.normal(jax.random.key(0), (8, 28, 28, 116)))
    moments = []
    for unit in model.units[5:12]:
        first, depthwise, last = unit.branch
        before = first.conv(x)
        moments.append((jnp.mean(last.conv(depthwise(nnx.relu(before))) ** 2), jnp.mean(before**2)))
    after, before = np.mean(moments, axis=0)
    assert after / before == pytest.approx(ratio, rel=0.05)
