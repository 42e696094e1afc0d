"""The package's own networks with BatchNorm, converted, are those with MimicNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import LastBN, create_method, create_model
from mimicnorm_jax.layers.scaled import ScaledKernel
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.models import BRANCHED, NETWORKS
from tests.convert.test_networks import as_if_trained, check_folded

SHAPE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
QUICK = ("mlp", "resnet8")
long = pytest.mark.long


def create(name, method, **options):
    options = {"width": 0.5, "precision": "float32", **options}
    return create_model(
        name, method=method, num_classes=10, image_size=32, rngs=nnx.Rngs(0), **options
    )


def layers(model):
    """Kernel and scalar of each layer, and whether it is centred."""
    return {
        "/".join(map(str, path)).replace("classifier/layer", "classifier"): (
            np.asarray(module.kernel[...], np.float64),
            getattr(module, "weight_mean", None) is not None,
            None if getattr(module, "scale", None) is None else float(module.scale[...]),
            None if module.bias is None else module.bias.shape,
        )
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ScaledKernel | nnx.Linear)
    }


def published_as_a_convolution(layer):
    """SqueezeNet's classifier, which is computed as a dense layer after the average."""
    return layer.path == ("classifier",) and layer.fan_in > 50


@pytest.mark.parametrize("center", ["not_depthwise", "fan_in"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=long) for name in NETWORKS]
)
def test_converted_equals_created(name, center):
    def rule(layer):
        usual = layer.before_norm and not layer.depthwise
        if name == "squeezenet":
            usual = usual or published_as_a_convolution(layer)
        return usual and (center == "not_depthwise" or layer.fan_in > 50)

    converted, report = mimicnorm_jax.convert(
        create(name, "batchnorm"),
        SHAPE,
        variance="formula",
        center=rule if name == "squeezenet" else center,
    )
    method = create_method("mimicnorm", center=center, center_dense=name == "mlp")
    got, expected = layers(converted), layers(create(name, method))
    assert set(got) == set(expected)
    for path, (kernel, centered, scale, bias) in expected.items():
        assert got[path][1:] == (centered, pytest.approx(scale), bias), path
        # the variance of a sample of that size, to five standard errors
        mine, theirs = (np.mean(np.square(centre(k, centered))) for k in (got[path][0], kernel))
        assert mine == pytest.approx(theirs, rel=5 * np.sqrt(2 / kernel.size)), path
    assert sum(isinstance(module, LastBN) for _, module in nnx.iter_modules(converted)) == 1
    assert report.num_centered == sum(centered for _, centered, *_ in expected.values())


def centre(kernel, centered):
    return kernel - kernel.mean(axis=tuple(range(kernel.ndim - 1))) if centered else kernel


def pairs():
    quick = {("resnet8", "fixup"), ("resnet8", "mimicnorm")}
    for name in NETWORKS:
        for method, kind in METHODS.items():
            if name in BRANCHED or not kind.needs_branches:
                pair = name, method
                yield pytest.param(*pair, marks=() if pair in quick else long)


@pytest.mark.parametrize(("name", "method"), list(pairs()))
def test_a_folded_network_computes_the_same(float64, name, method):
    with jax.numpy_rank_promotion("allow"):
        model = create(name, method, width=0.25, precision="float64")
        as_if_trained(model)
        example = jax.random.normal(jax.random.key(0), (4, 32, 32, 3), jnp.float64)
        check_folded(model, (example,), example)
