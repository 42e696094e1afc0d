import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers.last_bn import cross_entropy
from mimicnorm_jax.methods import Method, create_method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.theory import Probe
from mimicnorm_jax.theory.probe import CHANNELS_SHOWN, measure

OPTIONS = {"num_classes": 10, "image_size": 8, "width": 0.5, "precision": "float32"}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (6, 8, 8, 3))


@pytest.fixture(scope="module")
def labels():
    return jnp.arange(6) % 10


def test_statistics_are_those_of_the_pre_activations():
    x = np.random.default_rng(0).standard_normal((5, 4, 4, 40)).astype(np.float32) + 0.3
    x[..., 3] = -np.abs(x[..., 3])
    measured = measure(jnp.asarray(x))
    assert measured.mean == pytest.approx(x.mean(), rel=1e-4)
    assert measured.variance == pytest.approx(x.var(), rel=1e-4)
    assert measured.second_moment == pytest.approx((x**2).mean(), rel=1e-4)
    assert measured.dead == pytest.approx(1 / 40)
    unit = x.reshape(5, -1) / np.linalg.norm(x.reshape(5, -1), axis=1, keepdims=True)
    assert measured.correlation == pytest.approx(
        (unit @ unit.T)[np.triu_indices(5, 1)].mean(), abs=1e-5
    )
    assert measured.quantiles.shape == (CHANNELS_SHOWN, 5)
    np.testing.assert_allclose(measured.quantiles[7, 2], np.median(x[..., 7]), rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    ["mimicnorm", *(pytest.param(m, marks=pytest.mark.long) for m in ("batchnorm", "fixup"))],
)
def test_a_probe_computes_what_the_network_does(images, labels, method):
    """Its parts are in the way of nothing: the same initial values, logits and gradients."""
    model = create_model("resnet8", method=method, rngs=nnx.Rngs(3), **OPTIONS)

    def loss(model):
        return jnp.mean(cross_entropy(model(images), labels))

    gradients = nnx.jit(nnx.grad(loss))(model)
    layers = Probe("resnet8", method=create_method(method), seed=3, **OPTIONS).layers(
        images, labels
    )
    names = [layer.name for layer in layers]
    blocks = [f"blocks/{i}/{part}" for i in range(3) for part in ("branch/0", "branch/1", "merge")]
    assert names == ["stem", *blocks, "classifier"]
    for layer in layers:
        kernels = [
            variable[...]
            for path, variable in nnx.to_flat_state(gradients)
            if "/".join(map(str, path)).startswith(f"{layer.name}/") and path[-1] == "kernel"
        ]
        if layer.name.endswith("merge"):
            assert layer.gradient_norm is None
        else:
            expected = float(jnp.linalg.norm(kernels[0]))
            assert layer.gradient_norm == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_is_measured_follows_the_norm(images):
    layers = Probe("resnet8", method=create_method("batchnorm"), **OPTIONS).layers(images)
    assert layers[0].measured.second_moment == pytest.approx(1.0, abs=0.01)
    assert layers[0].gradient_norm is None  # without labels


def test_another_draw_is_another_network_and_the_same_seed_the_same(images):
    probe = Probe("resnet8", method=create_method("mimicnorm"), seed=0, **OPTIONS)
    first = probe.layers(images)[1].measured.second_moment
    probe.draw(1)
    assert probe.layers(images)[1].measured.second_moment != first
    probe.draw(0)
    assert probe.layers(images)[1].measured.second_moment == first


def test_loading_takes_the_values_of_a_trained_network(images):
    method = create_method("batchnorm")
    model = create_model("resnet8", method=method, rngs=nnx.Rngs(0), **OPTIONS)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params["blocks"][1]["branch"][0]["norm"]["scale"] *= 3
    probe = Probe("resnet8", method=method, **OPTIONS)
    probe.load(params)
    layer = next(la for la in probe.layers(images) if la.name == "blocks/1/branch/0")
    assert layer.measured.second_moment == pytest.approx(9.0, rel=0.01)
    assert layer.predicted_second_moment == pytest.approx(9.0, rel=0.05)


class Swish(Method):
    def activation(self, *, site):
        return jax.nn.swish


def test_an_unknown_part_is_named(images):
    with pytest.raises(UserError, match=r"no prediction for .*silu|swish"):
        Probe("resnet8", method=Swish(), **OPTIONS).layers(images)


def test_a_method_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="needs residual branches"):
        Probe("vgg11", method=create_method("fixup"), **OPTIONS | {"image_size": 32})


def test_a_single_image_is_refused(images):
    with pytest.raises(UserError, match="at least 2 images"):
        Probe("resnet8", method=create_method("nonorm"), **OPTIONS).layers(images[:1])
