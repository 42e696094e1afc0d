"""Layers and networks exported for images of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax import LastBN, WeightMeanConv, WeightMeanConvTranspose, create_model


def exported(function, shape):
    symbolic = jax.export.symbolic_shape(shape)
    program = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(symbolic, jnp.float32))
    return lambda *args: program.call(*args)


def agrees(function, shape, *sizes):
    program = exported(function, shape)
    for size in sizes:
        x = jax.random.normal(jax.random.key(0), size)
        np.testing.assert_allclose(program(x), function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution_of_any_size(size, padding, strides):
    conv = WeightMeanConv(3, 4, size, strides, padding=padding, rngs=nnx.Rngs(0))
    # on CPUs another form for 8 channels and more, and one for images smaller than the kernel
    agrees(lambda x: conv(x), "b, h, w, 3", (2, 9, 8, 3), (1, 5, 6, 3))


def test_other_layers_of_any_size():
    up = WeightMeanConvTranspose(3, 4, (3, 3), 2, rngs=nnx.Rngs(0))
    agrees(lambda x: up(x), "b, h, w, 3", (2, 4, 5, 3))
    norm = LastBN(3, use_running_average=True)
    agrees(lambda x: norm(x), "b, h, 3", (2, 4, 3))
    agrees(lambda x: LastBN(3)(x), "b, h, 3", (2, 4, 3))


def test_a_derivative_of_any_size():
    conv = WeightMeanConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    agrees(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x)))), "b, h, w, 3", (2, 4, 5, 3))


@pytest.mark.parametrize("name", ["resnet20", "squeezenet", "shufflenetv2_x0_5"])
def test_a_network_for_images_of_any_multiple_of_its_stride(name):
    model = create_model(
        name, method="mimicnorm", num_classes=4, image_size=64, width=0.5, rngs=nnx.Rngs(0)
    )
    model.eval()
    agrees(lambda x: model(x), "b, 32*h, 32*w, 3", (2, 64, 32, 3))
