import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.methods import METHODS, create_method
from mimicnorm_jax.models import BRANCHED, create_model
from mimicnorm_jax.models.pooling import max_pool
from mimicnorm_jax.models.resnet import identity_shortcut
from mimicnorm_jax.models.shufflenet import interleave


def count_parameters(network, method, **options):
    model = nnx.eval_shape(
        lambda: create_model(network, method=method, rngs=nnx.Rngs(0), **options)
    )
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_866_088,
    "vgg16": 138_361_768,
    "shufflenetv2_x0_5": 1_366_792,
    "shufflenetv2_x1_0": 2_278_604,
    "shufflenetv2_x1_5": 3_503_624,
    "shufflenetv2_x2_0": 7_393_996,
}


DEEPEST = ("resnet101", "resnet152")


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        pytest.param(*pair, marks=pytest.mark.long if pair[0] in DEEPEST else ())
        for pair in PUBLISHED.items()
    ],
)
def test_parameter_counts_are_the_published_ones(network, parameters):
    assert count_parameters(network, "batchnorm", num_classes=1000, image_size=224) == parameters


def test_squeezenet_with_biases_and_without_norms_is_the_published_one():
    count = count_parameters("squeezenet", "nonorm", num_classes=1000, image_size=224)
    assert count == 1_248_424


def test_vgg_with_convolution_biases_and_the_thin_resnet_are_the_published_ones():
    biased = create_method("batchnorm", conv_bias=True)
    assert count_parameters("vgg16", biased, num_classes=1000, image_size=224) == 138_365_992
    assert count_parameters("vgg11", biased, num_classes=1000, image_size=224) == 132_868_840
    thin = {"num_classes": 10, "image_size": 32}
    assert count_parameters("resnet110", "batchnorm", **thin) == pytest.approx(1.73e6, rel=0.003)
    assert count_parameters("resnet20", "batchnorm", **thin) == pytest.approx(0.27e6, rel=0.01)


SHUFFLENET = "shufflenetv2_x0_5"
# test_every_pair.py trains ResNet-8 with every method, and each of these but ResNet-50 with
# mimicnorm. Here each network is in a quick pair; the rest is long.
QUICK = {
    *(("vgg11", "weightstandardization"), ("squeezenet", "nonorm"), (SHUFFLENET, "skipinit")),
}
MADE_FOR_EACH_OTHER = [
    pytest.param(network, method, marks=() if (network, method) in QUICK else pytest.mark.long)
    for network in ("vgg11", "resnet50", "squeezenet", SHUFFLENET)
    for method in METHODS
    if network in BRANCHED or not METHODS[method].needs_branches
]


@pytest.mark.parametrize(("network", "method"), MADE_FOR_EACH_OTHER)
def test_every_method_makes_a_network_with_finite_logits_and_gradients(network, method):
    model = create_model(
        network, method=method, num_classes=7, image_size=32, width=1 / 8, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    keys = jax.random.split(jax.random.key(1), 4)

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graph, params, rest, copy=True)(x, keys=keys)
            return jnp.sum(jnp.sin(logits + jnp.arange(7.0)[None])), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = run(params)
    assert logits.shape == (4, 7) and logits.dtype == jnp.float32
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((logits, grads)))
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32():
    for method in METHODS:
        model = create_model(
            "resnet8",
            method=method,
            num_classes=10,
            image_size=8,
            precision="bfloat16",
            rngs=nnx.Rngs(0),
        )

        @nnx.eval_shape  # types are known before anything is computed
        def results(model=model):
            x = jnp.ones((4, 8, 8, 3), jnp.bfloat16)
            model = nnx.merge(*nnx.split(model), copy=True)  # whose statistics may change here
            stem = model.stem(x)
            return stem, model.blocks[0](stem), model(x)

        types = [result.dtype for result in results]
        assert types == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))


def test_bfloat16_logits_are_near_those_of_float32():
    """So large that XLA's CPU backend calls its libraries, which it does not for a few images."""
    x = jax.random.normal(jax.random.key(0), (64, 16, 16, 1))

    def logits(precision):
        model = create_model(
            "resnet8",
            method="nonorm",
            num_classes=10,
            image_size=16,
            channels=1,
            precision=precision,
            rngs=nnx.Rngs(0),
        )
        model.eval()
        definition, state = nnx.split(model)
        run = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
        return run(state, x.astype(precision))

    exact = logits("float32")
    distance = jnp.max(jnp.abs(logits("bfloat16") - exact))
    assert distance < 0.05 * jnp.max(jnp.abs(exact))


@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1)]
)
@pytest.mark.parametrize(("size", "levels"), [(7, None), (8, None), (8, 3)])
def test_max_pool_equals_reduce_window(window, stride, padding, size, levels):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 3))
    if levels:  # many equal values: the first of them gets the gradient
        x = jnp.round(levels * jnp.tanh(x))
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def reference(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), sides
        )

    def ours(x):
        return max_pool(x, window=window, stride=stride, padding=padding)

    np.testing.assert_array_equal(ours(x), reference(x))
    gradients = [jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x) for f in (ours, reference)]  # noqa: B023
    np.testing.assert_allclose(*gradients, rtol=1e-6)


def test_the_identity_shortcut_subsamples_and_pads_with_zero_channels():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    y = identity_shortcut(x, strides=2, features=6)
    np.testing.assert_array_equal(y[..., :4], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 4:], 0.0)


def test_a_shuffle_unit_interleaves_its_halves_and_passes_one_through():
    a, b = jnp.arange(24.0).reshape(2, 2, 2, 3), -jnp.arange(24.0).reshape(2, 2, 2, 3)
    shuffled = jnp.concatenate([a, b], -1).reshape(2, 2, 2, 2, 3).swapaxes(-1, -2)
    np.testing.assert_array_equal(interleave(a, b), shuffled.reshape(2, 2, 2, 6))

    model = create_model(
        SHUFFLENET, method="nonorm", num_classes=3, image_size=32, rngs=nnx.Rngs(0)
    )
    assert [unit.shortcut is not None for unit in model.units] == [
        index in (0, 4, 12) for index in range(16)
    ]
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 48))
    np.testing.assert_array_equal(model.units[1](x)[..., ::2], x[..., :24])


def test_the_two_dropouts_of_vgg_draw_different_masks():
    model = create_model(
        "vgg11", method="nonorm", num_classes=3, image_size=32, width=1 / 16, rngs=nnx.Rngs(0)
    )
    first, second = (
        layer(jnp.ones((1, 256)), jax.random.split(jax.random.key(0), 1))
        for layer in model.dropouts
    )
    assert 0.3 < jnp.mean((first > 0) == (second > 0)) < 0.7


def test_the_stem_follows_the_image_size_unless_told():
    def stem(image_size, **options):
        model = nnx.eval_shape(
            lambda: create_model(
                "resnet18",
                method="nonorm",
                num_classes=10,
                image_size=image_size,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
        return model.stem.conv.kernel.shape[:2], model.stem.pool is not None

    assert stem(32) == ((3, 3), False)
    assert stem(224) == ((7, 7), True)
    assert stem(32, stem="large") == ((7, 7), True)
    assert stem(224, stem="small") == ((3, 3), False)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("resnet19", {}, "unknown network 'resnet19'.*did you mean"),
        ("resnet20", {"stme": "small"}, "stem, shortcut"),
        ("mlp", {"stem": "small"}, "depth, hidden_features"),
        ("resnet18", {"stem": "huge"}, "auto, small, large"),
        ("resnet18", {"shortcut": "none"}, "identity, projection"),
        ("vgg11", {"image_size": 16}, "multiple of 32, got 16"),
        ("vgg11", {"image_size": 48}, "multiple of 32, got 48"),
        ("resnet18", {"image_size": 4}, "too small"),
        ("resnet20", {"image_size": 2}, "too small"),
        ("squeezenet", {"image_size": 4}, "too small"),
        ("shufflenetv2_x1_0", {"image_size": 16, "stem": "large"}, "its total stride is 32"),
        ("mlp", {"depth": 1}, "depth >= 2"),
        ("resnet20", {"width": 0.0}, "width must be positive"),
        ("resnet20", {"num_classes": 0}, "num_classes must be positive"),
        ("resnet20", {"precision": "float16"}, "unknown precision 'float16'"),
        ("resnet20", {"precision": "float64"}, "JAX_ENABLE_X64"),
        ("resnet20", {"method": "layernorm"}, "unknown method 'layernorm'"),
    ],
)
def test_wrong_arguments_are_named(network, options, message):
    arguments = {"method": "mimicnorm", "num_classes": 10, "image_size": 32} | options
    with pytest.raises(UserError, match=message):
        create_model(network, rngs=nnx.Rngs(0), **arguments)
