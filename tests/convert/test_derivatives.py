"""Second derivatives, in every order of modes, against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

from mimicnorm_jax import UserError, convert, create_method, create_model, twice_differentiable
from mimicnorm_jax.layers import ScaledConv, cross_entropy
from mimicnorm_jax.layers.relu import relu
from mimicnorm_jax.models.pooling import Window

pytestmark = pytest.mark.usefixtures("_rank_promotion_as_flax_needs_it")
STEP = 1e-6


@pytest.fixture
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def built_in(name, method="mimicnorm", **options):
    made = create_method(method, **options)
    model = create_model(
        name,
        method=made,
        num_classes=4,
        image_size=16 if name != "vgg11" else 32,
        width=0.25,
        precision="float64",
        rngs=nnx.Rngs(0),
    )
    model.set_attributes(deterministic=True, raise_if_not_found=False)  # dropout
    return model


class Own(nnx.Module):
    """With a max-pool, a residual branch and functions of JAX."""

    def __init__(self, rngs):
        wide = {"param_dtype": jnp.float64, "rngs": rngs}
        self.stem, self.inner, self.last = (
            nnx.Conv(n, 8, (3, 3), use_bias=False, **wide) for n in (3, 8, 8)
        )
        self.norms = nnx.List([nnx.BatchNorm(8, **wide) for _ in range(3)])
        self.head = nnx.Linear(8, 4, **wide)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norms[0](self.stem(x))), (2, 2), (2, 2))
        y = nnx.relu(self.norms[1](self.inner(x)))
        x = nnx.relu(x + self.norms[2](self.last(y)))
        return self.head(x.mean((1, 2)))


def images(size=16):
    return jax.random.normal(jax.random.key(1), (4, size, size, 3), jnp.float64)


def loss_of(model, x):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    flat, unravel = ravel_pytree(params)
    # away from biases of 0, where what a dead channel feeds is at the kink of its ReLU
    flat = flat + 0.01 * jax.random.normal(jax.random.key(2), flat.shape, flat.dtype)

    def loss(flat):
        network = nnx.merge(graph, unravel(flat), rest, copy=True)
        return cross_entropy(network(x), jnp.arange(4)).mean()

    return loss, flat


def products(loss, flat):
    """A vector, and what multiplies it by the Hessian, by name."""
    vector = jax.random.normal(jax.random.key(5), flat.shape, jnp.float64)
    vector = vector / jnp.linalg.norm(vector)
    gradient = jax.jit(jax.grad(loss))
    return (
        vector,
        gradient,
        {
            "reverse over reverse": lambda w: jax.grad(lambda w: jnp.vdot(gradient(w), vector))(w),
            "forward over reverse": lambda w: jax.jvp(gradient, (w,), (vector,))[1],
            "reverse over forward": lambda w: jax.grad(lambda w: jax.jvp(loss, (w,), (vector,))[1])(
                w
            ),
            "linearized": lambda w: jax.linearize(gradient, w)[1](vector),
        },
    )


def assert_all_modes(model, x, modes):
    plain, flat = loss_of(model, x)
    loss, _ = loss_of(twice_differentiable(model), x)
    vector, gradient, by_mode = products(loss, flat)
    np.testing.assert_allclose(gradient(flat), jax.jit(jax.grad(plain))(flat), atol=1e-10)
    ahead, behind = gradient(flat + STEP * vector), gradient(flat - STEP * vector)
    expected = (ahead - behind) / (2 * STEP)
    scale = float(jnp.abs(expected).max())
    assert scale > 1e-3
    for mode in modes:
        got = jax.jit(by_mode[mode])(flat)
        np.testing.assert_allclose(got, expected, atol=1e-6 * scale, err_msg=mode)


QUICK = ("reverse over reverse", "forward over reverse")
ALL = (*QUICK, "reverse over forward", "linearized")


@pytest.mark.parametrize("name", ["resnet20", pytest.param("vgg11", marks=pytest.mark.long)])
def test_hessian_vector_products_of_built_in_networks(name, float64):
    assert_all_modes(built_in(name), images(32 if name == "vgg11" else 16), QUICK)


def test_hessian_vector_products_of_a_converted_network(float64):
    model, _ = convert(Own(nnx.Rngs(0)), images())
    assert_all_modes(model, images(), ALL)


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet20", "resnet50", "vgg11", "squeezenet", "mlp",
                                  "shufflenetv2_x0_5"])  # fmt: skip
@pytest.mark.parametrize("method", ["mimicnorm", "batchnorm", "nonorm"])
def test_hessian_vector_products_of_all_methods(name, method, float64):
    assert_all_modes(built_in(name, method), images(32 if name == "vgg11" else 16), ALL)


def test_the_whole_hessian_and_its_copy_of_the_network(float64):
    model = ScaledConv(2, 2, (1, 1), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    twice = twice_differentiable(model)
    assert (model.differentiable, twice.differentiable) == ("once", "twice")
    graph, params = nnx.split(twice)
    flat, unravel = ravel_pytree(params)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 2), jnp.float64)

    def loss(flat):
        return jnp.sum(jnp.sin(nnx.merge(graph, unravel(flat))(x)))

    hessian = jax.hessian(loss)(flat)
    reverse = jax.jacrev(jax.grad(loss))(flat)
    assert jnp.abs(hessian).max() > 0.1
    np.testing.assert_allclose(hessian, reverse, atol=1e-12)
    with pytest.raises(TypeError, match="custom_vjp"):  # what the switch is for
        jax.jvp(model, (x,), (x,))


def test_functions_in_tuples_are_replaced_and_other_things_are_refused():
    model = nnx.Module()
    model.functions = (relu, Window(2, 2))
    plain = twice_differentiable(model).functions
    assert plain[0] is jax.nn.relu and plain[1].plain
    with pytest.raises(UserError, match=r"takes an nnx.Module, got str"):
        twice_differentiable("a network")


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), use_bias=False, param_dtype=jnp.float64)(x)
        x = linen.relu(linen.BatchNorm(not train, param_dtype=jnp.float64)(x))
        return linen.Dense(4, param_dtype=jnp.float64)(x.mean((1, 2)))


def test_a_converted_network_of_linen_is_converted_for_it(float64):
    x = images(8)
    network, _ = convert(LinenNetwork(), x, train=True, differentiable="twice")
    variables = network.init(jax.random.key(0), x, train=True)

    def loss(params):
        logits, _ = network.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, jnp.arange(4)).mean()

    params = variables["params"]
    ones = jax.tree.map(jnp.ones_like, params)
    forward = jax.jvp(jax.grad(loss), (params,), (ones,))[1]
    reverse = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(jax.grad(loss)(p)))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), forward, reverse)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reverse)) > 1e-3


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_codes_have_no_second_derivative_and_say_so(storage, float64):
    model = built_in("resnet20", activation_storage=storage)
    with pytest.raises(ValueError, match=r"stored in codes.*use activation_storage"):
        twice_differentiable(model)
    conv = model.stem.conv
    graph, params = nnx.split(conv)
    x = images(8)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x))  # linear: no gradient reaches back but ones

    first = jax.grad(loss)(params, x)
    assert jnp.abs(first["kernel"][...]).max() > 0
    with pytest.raises(ValueError, match="stored in codes"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss)(params, x)["kernel"][...]))(x)


def test_codes_of_a_whole_network_have_no_second_derivative(float64):
    loss, flat = loss_of(built_in("mlp", activation_storage="int8"), images())
    jax.jit(jax.grad(loss))(flat)
    with pytest.raises(ValueError, match="stored in codes"):
        jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(flat)
