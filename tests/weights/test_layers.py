"""A network of one method, written into one of another, is the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.methods import create_method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.weights.layers import Layer, Norm, folded, layers_of, put_layers


def network(method, name="resnet8", *, seed=0, size=8, **options):
    """Small, in evaluation, with parameters and statistics none of which is 0 or 1."""
    model = create_model(
        name,
        method=create_method(method, **options.pop("of_method", {})),
        num_classes=3,
        image_size=size,
        width={"resnet8": 0.5, "mlp": 0.1}.get(name, 0.05),
        rngs=nnx.Rngs(seed),
        **options,
    )
    model.eval()
    random = np.random.default_rng(seed)
    for variable in jax.tree.leaves(
        nnx.variables(model), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        value = np.asarray(variable[...])
        if value.ndim < 2:
            noise = random.uniform(0.5, 1.5, value.shape)
            variable[...] = jnp.asarray(value * noise + 0.2 * noise, value.dtype)
    return model


@nnx.jit
def logits(model, images):
    return model(images)


def difference(source, target, size=8):
    images = jax.random.normal(
        jax.random.key(1), (4, size, size, 3), jax.dtypes.canonicalize_dtype(float)
    )
    expected, got = logits(source, images), logits(target, images)
    assert jnp.abs(expected).max() > 0.1
    assert jnp.std(expected, axis=0).max() > 1e-3
    return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())


PAIRS = [
    ("batchnorm", "batchnorm"),
    ("batchnorm", "lastbn"),
    ("batchnorm", "nonorm"),
    ("batchnorm", "skipinit"),
    ("mimicnorm", "nonorm"),
    ("mimicnorm", "mimicnorm"),
    ("mimicnorm", "lastbn"),
    ("mimicnorm", "weightmean"),
    ("lastbn", "lastbn"),
    ("skipinit", "nonorm"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_the_function_stays(source, target, float64):
    given = network(source, precision="float64")
    made = network(target, seed=1, precision="float64")
    assert difference(given, made) > 1e-2
    put_layers(made, layers_of(given))
    assert difference(given, made) < 1e-9


@pytest.mark.parametrize(
    ("name", "target"),
    [("mlp", "batchnorm"), ("mlp", "lastbn"), ("vgg11", "nonorm"), ("squeezenet", "lastbn")],
)
def test_of_other_networks(name, target):
    size = 32 if name == "vgg11" else 16
    given = network("batchnorm", name, size=size)
    made = network(target, name, seed=1, size=size)
    put_layers(made, layers_of(given))
    assert difference(given, made, size) < 1e-5


@pytest.mark.parametrize("weight_mean", ["reparameterized", "projected"])
def test_weight_mean_keeps_what_is_centred(weight_mean):
    given, made = network("mimicnorm"), network("mimicnorm", of_method={"weight_mean": weight_mean})
    put_layers(made, layers_of(given))
    assert difference(given, made) < 1e-5


def test_a_bias_goes_into_the_running_mean(float64):
    """And back it is none: the mean has it."""
    given = network("batchnorm", of_method={"conv_bias": True}, precision="float64")
    without = network("batchnorm", seed=1, precision="float64")
    put_layers(without, layers_of(given))
    assert difference(given, without) < 1e-9
    back = network("batchnorm", seed=2, of_method={"conv_bias": True}, precision="float64")
    put_layers(back, layers_of(without))
    assert difference(given, back) < 1e-9
    assert not np.any(back.stem.conv.bias[...])


def test_layers_have_their_paths_and_effective_kernels():
    model = network("mimicnorm")
    layers = layers_of(model)
    end = model.blocks[1].branch[1].conv
    assert set(layers) >= {"stem/conv", "blocks/0/branch/0/conv", "blocks/2/branch/1/conv"}
    assert len(layers) == 8
    layer = layers["blocks/1/branch/1/conv"]
    np.testing.assert_allclose(layer.kernel, end.effective_kernel(), rtol=1e-6)
    np.testing.assert_allclose(layer.bias, end.bias[...] * end.scale[...], rtol=1e-6)
    assert abs(layer.kernel.mean((0, 1, 2))).max() < 1e-7 and layer.norm is None
    norm = layers["classifier"].norm
    np.testing.assert_array_equal(norm.mean, model.head.mean[...])
    assert norm.scale.tolist() == [1, 1, 1] and norm.bias.tolist() == [0, 0, 0]
    hidden = layers_of(network("batchnorm", "vgg11", size=32))
    assert {"hidden/0", "hidden/1", "stages/4/1/conv", "classifier"} <= set(hidden)
    assert isinstance(hidden["stages/4/1/conv"].norm, Norm) and hidden["hidden/1"].norm is None


def test_a_residual_scalar_becomes_1_and_types_stay():
    made = network("lastbn", precision="bfloat16")
    put_layers(made, layers_of(network("batchnorm")))
    end = made.blocks[1].branch[1].conv
    assert end.scale[...] == 1
    before = network("lastbn", precision="bfloat16").blocks[1].branch[1].conv
    assert end.kernel[...].dtype == before.kernel[...].dtype
    assert made.head.var[...].dtype == jnp.float32


def state_of(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def changed(layers, path, **values):
    return layers | {path: layers[path]._replace(**values)}


REFUSED = [
    ("mimicnorm", lambda layers: layers,
     r"weight mean would change the pretrained kernels; methods that fit: lastbn.* and 2 more\)$"),
    ("batchnorm", lambda layers: changed(layers, "stem/conv", norm=None),
     r"there is no BatchNorm to fill the network's \(stem/conv\)"),
    ("batchnorm", lambda layers: changed(
        layers, "stem/conv", norm=layers["stem/conv"].norm._replace(epsilon=1e-3)),
     r"the BatchNorm has epsilon 0\.001, and the network's 1e-05 \(stem/conv\)"),
    ("nonorm", lambda layers: changed(layers, "stem/conv", kernel=np.zeros((7, 7, 3, 8))),
     r"kernel has the shape \(7, 7, 3, 8\), and the network's \(3, 3, 3, 8\) \(stem/conv\)"),
    ("nonorm", lambda layers: {p: v for p, v in layers.items() if p != "classifier"},
     r"the weights do not fit the network: missing classifier$"),
    ("nonorm", lambda layers: layers | {"extra": layers["classifier"]},
     r"the network has no extra$"),
    ("fixup", lambda layers: layers, r"is a FixupConv, which is more than a kernel"),
    ("weightstandardization", lambda layers: layers, r"is a WeightStandardizedConv, which is more"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "change", "said"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_written(target, change, said):
    layers = change(layers_of(network("batchnorm")))
    made = network(target, seed=1)
    before = state_of(made)
    with pytest.raises(UserError, match=said) as caught:
        put_layers(made, layers)
    assert "\n" not in str(caught.value)
    for old, new in zip(before, state_of(made), strict=True):
        np.testing.assert_array_equal(old, new)


def test_other_methods_and_modules_are_not_read():
    for method, said in (("fixup", "FixupConv"), ("weightstandardization", "WeightStandardized")):
        with pytest.raises(UserError, match=said):
            layers_of(network(method))
    with pytest.raises(UserError, match=r"weights go between batchnorm, lastbn"):
        layers_of(network("weightstandardization", "mlp"))
    with pytest.raises(UserError, match=r"networks of create_model, got Linear"):
        layers_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = network("nonorm")
    model.blocks[0].merge = jnp.maximum
    with pytest.raises(UserError, match=r"^blocks/0/merge is a "):
        layers_of(model)
    model = network("nonorm")
    model.head = nnx.Dropout(0.5)
    with pytest.raises(UserError, match=r"^head is a Dropout"):
        layers_of(model)
    model = network("batchnorm")
    model.stem.norm = nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"^the norm of stem/conv is a GroupNorm"):
        layers_of(model)


def test_a_layer_without_a_bias_takes_none():
    made = network("nonorm")
    made.stem.conv.bias = None
    layers = layers_of(network("batchnorm"))
    with pytest.raises(UserError, match=r"has no bias to fold into \(stem/conv\)$"):
        put_layers(made, layers)
    stem = layers["stem/conv"]
    put_layers(made, layers | {"stem/conv": Layer(stem.kernel, np.zeros(8), None)})
    np.testing.assert_array_equal(made.stem.conv.kernel[...], stem.kernel)


def test_kept_layers_stay():
    made, layers = network("lastbn", seed=1), layers_of(network("batchnorm"))
    before = np.asarray(made.classifier.kernel[...]), np.asarray(made.head.mean[...])
    del layers["classifier"]
    put_layers(made, layers, keep=("classifier",))
    np.testing.assert_array_equal(made.classifier.kernel[...], before[0])
    np.testing.assert_array_equal(made.head.mean[...], before[1])


def test_the_last_bn_gives_the_logits_themselves():
    """Of a classifier without one; of an affine norm too, by its folded form."""
    made, layers = network("lastbn"), layers_of(network("batchnorm"))
    put_layers(made, layers)
    np.testing.assert_array_equal(made.head.mean[...], -layers["classifier"].bias)
    np.testing.assert_allclose(made.head.var[...] + made.head.epsilon, 1, rtol=2e-7)
    values = np.linspace(0.5, 1.5, 3)
    norm = Norm(values, values, -values, values, 1e-3)
    affine = layers["classifier"]._replace(norm=norm)
    put_layers(made, layers | {"classifier": affine})
    np.testing.assert_allclose(made.head.mean[...], -folded(affine).bias, rtol=1e-6)
    np.testing.assert_allclose(made.classifier.kernel[...], folded(affine).kernel, rtol=1e-6)
