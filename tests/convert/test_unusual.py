"""What few networks have: each was converted wrongly once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax
from tests.convert.test_convert import SHAPE, became, conv, convert, dense, net, norm


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


class NormRelu(nnx.BatchNorm):
    """Does more than a BatchNorm."""

    def __call__(self, x):
        return nnx.relu(super().__call__(x))


def test_a_subclass_of_batch_norm_stays_and_is_named():
    def function(m, x):
        x = m.both(m.conv(nnx.relu(m.norm(m.stem(x)))))
        return m.head(x.mean((1, 2)))

    both = lambda rngs: NormRelu(8, rngs=rngs)  # noqa: E731
    model = net(function, conv=conv(8, 8), both=both)
    network, report = convert(model)
    assert type(network.both) is NormRelu
    assert any("both: NormRelu may do more" in note for note in report.notes)
    images = jax.random.normal(jax.random.key(0), SHAPE.shape)
    model.eval()
    plain, _ = mimicnorm_jax.fold(model, images)
    np.testing.assert_allclose(plain(images), model(images), atol=1e-5)


def test_layers_that_see_no_data_stay_and_are_named():
    def function(m, x):
        grid = jnp.linspace(-1, 1, 64).reshape(8, 8, 1)
        x = nnx.relu(m.norm(m.stem(x))) + nnx.relu(m.places(grid))
        x = m.recurrent(x.reshape(4, -1, 8)[:, :5])
        return m.head(x.mean(1))

    recurrent = lambda rngs: nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs))  # noqa: E731
    network, report = convert(net(function, places=dense(1, 8), recurrent=recurrent))
    assert type(network.places) is nnx.Linear
    assert any("places: nothing that the network is given" in note for note in report.notes)
    assert became(report, "stem").centered
    assert network(jnp.ones(SHAPE.shape) * jnp.arange(4.0)[:, None, None, None]).shape == (4, 5)


def test_the_axis_of_the_norms_becomes_that_of_the_last_bn():
    def function(m, x):
        return m.head(nnx.relu(m.norm(m.stem(x))).mean((1, 2)))

    model = net(function, norm=norm(8, axis_name="batch"))
    network, _ = convert(model)
    assert network.head.last_bn.axis_name == "batch"
    network, _ = convert(model, axis_name="devices")
    assert network.head.last_bn.axis_name == "devices"


@pytest.mark.parametrize(
    ("between", "narrow"),
    [
        (nnx.relu, True),
        (lambda x: nnx.relu6(x) * 2, True),
        (lambda x: nnx.max_pool(nnx.relu(x), (2, 2)), True),
        (nnx.silu, False),
        (nnx.gelu, False),
        (lambda x: x * x.mean((1, 2), keepdims=True), False),
    ],
)
def test_what_is_kept_in_another_form_is_not_kept_rounded_too(between, narrow):
    def function(m, x):
        x = m.conv(between(m.norm(m.stem(x))))
        return m.head(nnx.relu(m.second(x)).mean((1, 2)))

    network, _ = convert(net(function, conv=conv(8, 8), second=norm(8)))
    assert network.conv.narrow is narrow


def test_a_norm_is_not_folded_into_a_layer_that_feeds_something_else_too():
    def function(m, x):
        x = m.stem(x)
        return m.head(jnp.concatenate([x, nnx.relu(m.norm(x))], -1).mean((1, 2)))

    model = net(function, head=dense(16))
    model.norm.mean[...] = jnp.arange(8.0) / 8
    model.eval()
    images = jax.random.normal(jax.random.key(0), SHAPE.shape)
    plain, report = mimicnorm_jax.fold(model, images)
    np.testing.assert_allclose(plain(images), model(images), atol=1e-5)
    assert "stays as a scale and a shift" in became(report, "norm").became
