"""ReLU and max-pool of this package in the place of Flax's: the same function, less is kept."""

import itertools
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import mimicnorm_jax
from mimicnorm_jax.convert.lean import make_lean, undo_lean, with_lean_functions

pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow")
IMAGES = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def count(function, *args):
    """How many ReLUs of JAX, and max-pools, a function calls, also in what it calls."""
    text = str(jax.make_jaxpr(function)(*args))
    return len(re.findall(r"custom_jvp_call\[\s*name=relu\s", text)), text.count(
        "reduce_window_max"
    )


def agrees(function, *args):
    def loss(function, *args):
        leaves = jax.tree.leaves(function(*args))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves if hasattr(leaf, "shape"))

    def lean(*args):
        return with_lean_functions(function, *args)

    places = tuple(range(len(args)))
    expected = jax.value_and_grad(loss, places_after(places))(function, *args)
    for found, right in zip(
        jax.tree.leaves(jax.value_and_grad(loss, places_after(places))(lean, *args)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    return lean


def places_after(places):
    return tuple(place + 1 for place in places)


KERNEL = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, k: nnx.relu(x @ k) @ k,
        lambda x, k: jax.jit(lambda x: nnx.relu(x @ k) @ k)(x),
        lambda x, k: jax.checkpoint(lambda x: nnx.relu(x @ k) @ k)(x),
        lambda x, k: jax.lax.scan(lambda x, k: (nnx.relu(x @ k), x), x, jnp.stack([k, -k])),
        lambda x, k: jax.vmap(lambda x: nnx.relu(x @ k) @ k)(x),
        lambda x, k: nnx.max_pool(nnx.relu(x @ k), (3, 3), (2, 2)) @ k,
        lambda x, k: nnx.max_pool(x @ k - 1, (2, 2), (2, 2), padding=((1, 1), (1, 1))),
        lambda x, k: {"logits": nnx.relu(x @ k) @ k, "name": "text", "none": None},
    ],
    ids=["plain", "jit", "checkpoint", "scan", "vmap", "relu and pool", "pool", "other outputs"],
)
def test_is_the_same_function_with_the_same_derivative(call):
    lean = agrees(call, IMAGES, KERNEL)
    given = jax.tree.structure(call(IMAGES, KERNEL))
    assert jax.tree.structure(lean(IMAGES, KERNEL)) == given

    def arrays(*args):
        return [leaf for leaf in jax.tree.leaves(lean(*args)) if hasattr(leaf, "shape")]

    assert count(arrays, IMAGES, KERNEL) == (0, 0)


@jax.custom_jvp
@jax.jit
def relu(x):
    """Forward as ``nnx.relu``; its derivative is 1 everywhere."""
    return jnp.maximum(x, 0)


relu.defjvps(lambda slope, _, x: slope)


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (lambda x, k: nnx.avg_pool(nnx.relu(x @ k), (2, 2), (2, 2)), (1, 0)),  # it would keep more
        (lambda x, k: jnp.where(x > 0, nnx.relu(x @ k) / 0.9, 0) @ k, (1, 0)),  # dropout
        (lambda x, k: jnp.concatenate([nnx.relu(x @ k), x], 2) @ k, (1, 0)),
        (lambda x, k: relu(x @ k) @ k, (1, 0)),  # another derivative
        (lambda x, k: nnx.max_pool(x @ k, (2, 3), (2, 2)), (0, 1)),
        (lambda x, k: nnx.max_pool(x @ k, (16, 16)), (0, 1)),  # too many places to compare
        (lambda x, k: nnx.relu(jnp.concatenate([x, x], -1) + 1) @ jnp.vstack([k, k]), (1, 0)),
        (lambda x, k: nnx.max_pool(x @ k, (2, 2), (2, 1)), (0, 1)),
        (lambda x, k: nnx.max_pool(x, (3, 3), (2, 2), padding="SAME") @ k, (0, 1)),  # one side
        (lambda x, k: [x @ x.swapaxes(2, 3), nnx.max_pool(x, (2, 2), (2, 2))], (0, 1)),  # x is kept
        (lambda x, k: nnx.relu6(x @ k) + nnx.leaky_relu(x @ k) + jnp.maximum(x @ k, 0), (0, 0)),
    ],
)
def test_what_it_leaves_alone(call, left):
    assert count(agrees(call, IMAGES, KERNEL), IMAGES, KERNEL) == left


class Network(nnx.Module):
    """What changes in a call: statistics, random numbers, what is sown."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        x = nnx.relu(self.norm(self.conv1(x)))
        self.sow(nnx.Intermediate, "seen", x.mean())
        x = nnx.relu(self.conv2(self.dropout(x)))
        return scale * self.head(x.mean((1, 2)))


def test_a_network_changes_as_it_would():
    networks = [Network(nnx.Rngs(0)) for _ in range(2)]
    make_lean(networks[1])
    assert isinstance(networks[1], Network) and type(networks[1]).__name__ == "Network"
    for _ in range(2):
        first, second = (network(IMAGES, scale=2.0) for network in networks)
        np.testing.assert_allclose(first, second, atol=1e-5)
    first, second = (jax.tree.leaves(nnx.state(network)) for network in networks)
    for one, other in zip(first, second, strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, atol=1e-5)
        else:
            assert (one == other).all()
    assert len(networks[1].seen.get_value()) == 2
    undo_lean(networks[1])
    assert type(networks[1]) is Network


class Holder(nnx.Module):
    """What networks have beside Variables, and what is changed beside them."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.mean, self.deviation = jnp.array([0.1, 0.2, 0.3]), np.array([0.5, 0.4, 0.3])
        self.head = nnx.Linear(4, 10, rngs=rngs)
        self.calls = 0

    def __call__(self, x, *, state=None, flip=False, rngs=None):
        self.calls += 1
        x = (x - self.mean) / self.deviation
        x = x[:, ::-1] if flip else x
        x = nnx.relu(self.norm(self.conv(x)))
        x = x if rngs is None else self.dropout(x, rngs=rngs)
        x = x if state is None else x + state
        return self.head(x.mean((1, 2)))


def test_what_else_a_network_holds_and_takes():
    models = [
        mimicnorm_jax.convert(Holder(nnx.Rngs(0)), IMAGES, lean=lean).network
        for lean in (True, False)
    ]
    streams = [nnx.Rngs(1), nnx.Rngs(1)]
    for options in ({}, {"state": jnp.ones(())}, {"flip": np.bool_(True)}, {}, {}):
        given = [dict(options) for _ in models]
        if options == {}:
            given = [{"rngs": rngs} for rngs in streams]
        first, second = (
            nnx.jit(lambda model, options: model(IMAGES, **options))(model, own)
            if "rngs" in own
            else model(IMAGES, **own)
            for model, own in zip(models, given, strict=True)
        )
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert [rngs.dropout.count[...] for rngs in streams] == [3, 3]
    assert models[0].calls == models[1].calls > 3


def test_a_lean_network_is_pickled_and_part_of_another():
    model, _ = mimicnorm_jax.convert(Chain(nnx.Rngs(0)), IMAGES, variance="formula")
    model.eval()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    np.testing.assert_array_equal(again(IMAGES), model(IMAGES))
    plain, _ = mimicnorm_jax.fold(nnx.Sequential(model, nnx.Linear(10, 2, rngs=nnx.Rngs(0))))
    assert "custom_vjp" not in str(jax.make_jaxpr(plain)(IMAGES))


def test_what_was_compiled_within_stays_compiled():
    traced = []

    class Inner(Chain):
        @nnx.jit
        def __call__(self, x):
            traced.append(x)
            return Chain.__call__(self, x)

    model, _ = mimicnorm_jax.convert(Inner(nnx.Rngs(0)), IMAGES, variance="formula")
    model.eval()
    for _ in range(2):
        seen = model(IMAGES), len(traced)
    np.testing.assert_allclose(model(IMAGES), seen[0], atol=1e-6)
    assert len(traced) == seen[1]


class Chain(nnx.Module):
    def __init__(self, rngs):
        pairs = itertools.pairwise([3, 16, 16, 16, 16])
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs) for _ in self.convs])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(norm(conv(x)))
            if number == 1:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


def test_convert_is_lean_and_can_be_told_not_to_be():
    shape = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    sizes = []
    for lean in (True, False):
        model, report = mimicnorm_jax.convert(
            Chain(nnx.Rngs(0)), shape, variance="formula", lean=lean, memory=True
        )
        sizes.append(report.memory)
        model.eval()
        assert count(model, shape) == ((1, 0) if lean else (4, 1))  # the last is averaged
        plain, _ = mimicnorm_jax.fold(model)
        assert count(plain, shape) == (4, 1)
    assert sizes[0].before == sizes[1].before
    assert sizes[0].after < 0.95 * sizes[1].after < 0.95 * sizes[1].before
    assert "memory of a training step: " in str(report)
    assert json.loads(report.to_json())["memory"] == sizes[1]._asdict()


class LinenChain(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        for features in (8, 16):
            x = linen.Conv(features, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            x = linen.max_pool(x, (2, 2), (2, 2))
        return linen.Dense(10)(x.reshape(len(x), -1))


def test_networks_of_linen_are_lean_too():
    calls = []
    for lean in (True, False):
        network, _ = mimicnorm_jax.convert(LinenChain(), IMAGES, train=False, lean=lean)
        variables = network.init(jax.random.key(0), IMAGES, train=False)

        def call(variables, network=network):
            return network.apply(variables, IMAGES, train=True, mutable=["batch_stats"])

        assert count(call, variables) == ((0, 0) if lean else (2, 2))
        calls.append(call(variables))
    _, report = mimicnorm_jax.convert(LinenChain(), IMAGES, train=True, memory=True)
    assert report.memory.after < report.memory.before
    for one, other in zip(*map(jax.tree.leaves, calls), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
