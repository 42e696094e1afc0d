"""Rematerialization changes what is computed twice, not what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax import create_method, create_model
from mimicnorm_jax.layers.remat import REMATS, run


class Block(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(self.norm(conv(x)))
        return x


X = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))


def loss_of(remat):
    graph, params, stats = nnx.split(Block(), nnx.Param, nnx.BatchStat)

    def loss(params):
        block = nnx.merge(graph, params, stats, copy=True)
        y = run(block, X, remat)
        return jnp.sum(jnp.sin(y)), nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    return jax.value_and_grad(loss, has_aux=True), params


@pytest.mark.parametrize("remat", REMATS)
def test_value_gradient_and_statistics_stay_the_same(remat):
    function, params = loss_of(remat)
    expected, _ = loss_of("none")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(function)(params),
        jax.jit(expected)(params),
    )
    (_, statistics), _ = function(params)
    assert np.any(statistics["norm"]["mean"] != 0)


def convolutions(remat):
    function, params = loss_of(remat)
    return str(jax.make_jaxpr(function)(params)).count("conv_general_dilated[")


def test_a_block_convolves_once_more_and_dots_saveable_does_not():
    assert convolutions("block") == convolutions("none") + 2
    assert convolutions("dots_saveable") == convolutions("none")


def test_a_function_without_parameters_is_called():
    assert run(lambda x: 2 * x, jnp.ones(()), "block") == 2


def test_networks_that_are_built_alike_have_the_same_structure():
    def graph(**options):
        method = create_method("mimicnorm", **options)
        return nnx.graphdef(
            nnx.eval_shape(
                lambda: create_model(
                    "resnet8", method=method, num_classes=10, image_size=8, rngs=nnx.Rngs(0)
                )
            )
        )

    for options in ({}, {"remat": "block", "activation_storage": "int8"}):
        assert graph(**options) == graph(**options)
    assert graph() != graph(remat="block")
