"""Every network against an independent list of its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.layers import ScaledConv
from mimicnorm_jax.models import NETWORKS, create_model
from tests.models.published import (
    Conv,
    Dense,
    Step,
    kernel_shapes,
    layers_of,
    run,
    squeezenet,
)

# One of each family, and both kinds of block; the rest is long.
QUICK = ("mlp", "vgg11", "resnet8", "resnet18", "resnet50", "squeezenet", "shufflenetv2_x0_5")


def as_published(layer):
    """A layer of the package in the words of the list."""
    if isinstance(layer, nnx.Linear):
        return Dense(layer.in_features, layer.out_features)
    (kernel, _), (stride, _), ((padding, _), _) = layer.kernel_size, layer.strides, layer.padding
    assert layer.kernel_size == (kernel, kernel) and layer.strides == (stride, stride)
    assert layer.padding == ((padding, padding),) * 2 and set(layer.kernel_dilation) == {1}
    channels = layer.in_features, layer.out_features
    return Conv(kernel, stride, padding, *channels, layer.feature_group_count)


@pytest.fixture
def called(monkeypatch):
    """The package's layers in the order in which they are called, with their shapes."""
    calls = []
    for kind in (ScaledConv, nnx.Linear):

        def record(layer, x, *rest, computed=kind.__call__):
            y = computed(layer, x, *rest)
            calls.append((layer, Step(as_published(layer), x.shape, y.shape)))
            return y

        monkeypatch.setattr(kind, "__call__", record)
    return calls


def steps_of(layers, image_size):
    """What a list computes of one image."""
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kernel_shapes(layers)]
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    steps = []
    jax.eval_shape(lambda image, kernels: run(layers, image, iter(kernels), steps), image, kernels)
    return steps


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in NETWORKS],
)
def test_every_layer_has_the_place_and_the_shapes_of_the_list(network, image_size, called):
    def logits(image):
        model = create_model(
            network, method="nonorm", num_classes=10, image_size=image_size, rngs=nnx.Rngs(0)
        )
        model.eval()
        return model(image)

    jax.eval_shape(logits, jnp.zeros((1, image_size, image_size, 3)))
    layers = layers_of(network, classes=10, image_size=image_size)
    assert [step for _, step in called] == steps_of(layers, image_size)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("squeezenet", {}),
        ("shufflenetv2_x0_5", {}),
        ("resnet8", {}),
        ("resnet18", {}),
        pytest.param("vgg11", {}, marks=pytest.mark.long),
        pytest.param("resnet50", {}, marks=pytest.mark.long),
        *(
            pytest.param(network, {"image_size": 96}, marks=pytest.mark.long)
            for network in ("squeezenet", "shufflenetv2_x0_5", "resnet18")
        ),
    ],
)
def test_logits_are_those_of_the_list(network, options, called, float64):
    """Which also says where pools, additions, concatenations and shuffles are."""
    image_size = options.get("image_size", 32)
    model = create_model(
        network,
        method="nonorm",
        num_classes=10,
        image_size=image_size,
        precision="float64",
        rngs=nnx.Rngs(0),
    )
    model.eval()
    images = jax.random.normal(jax.random.key(1), (2, image_size, image_size, 3), jnp.float64)
    graph, state = nnx.split(model)
    ours = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)
    called.clear()
    jax.eval_shape(model, images)  # for the kernels, in order
    kernels = [layer.kernel[...] for layer, _ in called]
    layers = layers_of(network, classes=10, image_size=image_size)
    theirs = jax.jit(lambda images, kernels: run(layers, images, iter(kernels), []))(
        images, kernels
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


# Multiplications of one image of 224 pixels with 1000 classes, in thousands of millions, rounded as
# torchvision's documentation of its weights prints them ("GFLOPS"; ShuffleNetV2's paper has 0.041,
# 0.146, 0.299 and 0.591 with other roundings of the classifier and pools).
TORCHVISION = {
    "vgg11": 7.61,
    "vgg13": 11.31,
    "vgg16": 15.47,
    "vgg19": 19.63,
    "resnet18": 1.81,
    "resnet34": 3.66,
    "resnet50": 4.09,
    "resnet101": 7.80,
    "resnet152": 11.51,
    "shufflenetv2_x0_5": 0.04,
    "shufflenetv2_x1_0": 0.14,
    "shufflenetv2_x1_5": 0.30,
    "shufflenetv2_x2_0": 0.58,
}


def multiplications(layers):
    return sum(step.multiplications for step in steps_of(layers, 224))


@pytest.mark.parametrize("network", TORCHVISION)
def test_the_lists_have_the_published_work(network):
    work = multiplications(layers_of(network, classes=1000, image_size=224))
    assert round(work / 1e9, 2) == TORCHVISION[network]


def test_squeezenets_work_is_not_torchvisions_for_known_reasons():
    """Which are first convolution, pools and the place of the last layer: with these, 0.82."""
    theirs = squeezenet(classes=1000, image_size=224, as_torchvision=True)
    assert round(multiplications(theirs) / 1e9, 2) == 0.82
    assert round(multiplications(squeezenet(classes=1000, image_size=224)) / 1e9, 3) == 0.788
