"""Networks as outsiders write them: converted in one line, and folded."""

import importlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import LastBN, WeightMeanConv, WeightMeanDense, center_kernel

# What their structure asks for: number of layers centred, of residual blocks, and of BatchNorms
# that become a shift.
EXPECTED = {
    "resnet": (22, 6, 0),
    "preact_resnet": (17, 7, 8),
    "wide_resnet": (16, 6, 6),
    "mobilenet_v2": (13, 3, 0),
    "se_resnet": (15, 6, 0),
    "densenet": (25, 0, 14),
    "googlenet": (33, 0, 1),
    "unet": (11, 0, 2),
    "efficientnet": (13, 3, 0),
    "convnext": (10, 7, 3),
    "vgg_avgpool": (5, 0, 0),
    "scanned_resnet": (15, 9, 0),
    # written without sight of the code, when it was ready for the twelve above
    "repvgg": (18, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 5),
    "resnext": (19, 4, 0),
    "nin": (17, 0, 0),
    "hourglass": (13, 3, 0),
}
# Where a kernel cannot make it: a centred kernel of 1x1 sees nothing of a grey image; and what is
# called on three levels of a pyramid is brought to 1 on the first.
NOT_ONE = {
    ("repvgg", "stage0/layers/0/rbr_1x1/conv"),
    ("hourglass", "head/tower/layers/0"),
    ("hourglass", "head/tower/layers/3"),
}
QUICK = ("scanned_resnet",)
# what others have too
ALIKE = ("wide_resnet", "se_resnet", "googlenet", "resnext", "nin")
SLOW = tuple(name for name in EXPECTED if name not in QUICK)
ALL = (*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW))
SHAPE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


@pytest.fixture(autouse=True)
def _rank_promotion_as_outsiders_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def images():
    digits = sklearn.datasets.load_digits().images[:32, ..., None]
    digits = jnp.asarray((digits - digits.mean()) / digits.std(), jnp.float32)
    return jax.image.resize(digits.repeat(3, -1), (32, 32, 32, 3), "bilinear")


def create(name):
    """A network with initial values by NumPy: to compile JAX's for every shape takes seconds."""
    module = importlib.import_module(f"tests.convert.networks.{name}")
    model = nnx.eval_shape(lambda: module.Network(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape, dtype = variable.shape, variable.dtype
        if path[-1] == "kernel":
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[-3:-1]))
        elif path[-1] in ("scale", "var"):
            value = np.ones(shape)
        else:
            value = np.zeros(shape)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            variable.set_value(jax.random.key(0))
        else:
            variable.set_value(jnp.asarray(value, dtype))
    return model


def run(network, example):
    graph, state = nnx.split(network)

    def outputs(state, example):
        return jax.tree.leaves(nnx.merge(graph, state)(example))

    options = {"xla_backend_optimization_level": 0}
    return jax.device_get(jax.jit(outputs, compiler_options=options)(state, example))


def convert(model, *args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*BatchNorms have a scale other")
        return mimicnorm_jax.convert(model, *args, logits=lambda outputs: outputs, **options)


def scales_of(report):
    """All residual scalars, as l where they begin at 1 / sqrt(l)."""
    scales = [layer.scale for layer in report.layers if layer.scale is not None]
    flat = [s for scale in scales for s in (scale if isinstance(scale, tuple) else (scale,))]
    return sorted(round(scale**-2, 3) for scale in flat)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in ALIKE else ()) for n in EXPECTED]
)
def test_every_layer_gets_what_its_place_asks_for(name):
    model = create(name)
    before = jax.tree.leaves(nnx.state(model, nnx.Param))
    network, report = convert(model, SHAPE, variance="formula")
    centered, blocks, shifts = EXPECTED[name]
    assert report.num_centered == centered
    scales = blocks if isinstance(blocks, list) else list(range(1, blocks + 1))
    assert scales_of(report) == scales
    assert sum(layer.became.startswith("a shift") for layer in report.layers) == shifts
    kinds = [type(module) for _, module in nnx.iter_modules(network)]
    assert nnx.BatchNorm not in kinds
    assert kinds.count(LastBN) == (2 if name == "googlenet" else 1)
    assert sum(kind in (WeightMeanConv, WeightMeanDense) for kind in kinds) == centered
    assert json.loads(report.to_json())["num_centered"] == centered
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_layer_starts_with_a_second_moment_of_one(name):
    network, report = convert(create(name), images())
    moments = {
        layer.path: layer.second_moment
        for layer in report.layers
        if layer.second_moment is not None and "gate" not in layer.became
    }
    assert len(moments) >= EXPECTED[name][0]
    for path, moment in moments.items():
        if (name, path) not in NOT_ONE:
            assert 0.9 < moment < 1.1, path
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, WeightMeanConv | WeightMeanDense):
            kernel = layer.kernel[...]
            stack = kernel.ndim - (4 if isinstance(layer, WeightMeanConv) else 2)
            center = jax.vmap(center_kernel) if stack else center_kernel
            np.testing.assert_allclose(center(kernel), kernel, atol=1e-6)
    network.train()
    for values in run(network, images()[:8]):
        np.testing.assert_allclose(np.mean(values, 0), 0, atol=1e-4)
        np.testing.assert_allclose(np.var(values, 0), 1, atol=1e-2)


def in_float64(model):
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))


def as_if_trained(model):
    """Moves every parameter and statistic away from where it begins."""
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        noise = rng.normal(size=variable.shape)
        if path[-1] == "var":
            variable[...] = variable[...] * np.exp(0.3 * noise)
        else:
            variable[...] = variable[...] + 0.1 * noise


def primitives(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found


def check_folded(model, args, example):
    model.eval()
    plain, report = mimicnorm_jax.fold(model, *args)
    for a, b in zip(run(model, example), run(plain, example), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * np.abs(a).max())
    ours = {
        type(module).__name__
        for _, module in nnx.iter_modules(plain)
        if type(module).__module__.startswith("mimicnorm_jax.")
        and not type(module).__module__.startswith("mimicnorm_jax.models.")
    }
    assert ours <= {"Shift", "ScaleShift"}
    graph, state = nnx.split(plain)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, example)
    assert not primitives(program.jaxpr) & {
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "platform_index",
    }
    return report


def train(network, steps=2):
    """Trains a few steps, in place."""
    network.train()
    example = jax.random.normal(jax.random.key(1), (4, 32, 32, 3), jnp.float64)
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        losses = [-jax.nn.log_softmax(y)[:, 0].mean() for y in jax.tree.leaves(model(example))]
        return sum(losses), nnx.state(model, nnx.Not(nnx.Param))

    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
    for _ in range(steps):
        slopes, rest = step(params, rest)
        params = jax.tree.map(lambda p, slope: p - 0.05 * slope, params, slopes)
    nnx.update(network, params, rest)


@pytest.mark.parametrize("move", [as_if_trained, pytest.param(train, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ALL)
def test_a_folded_network_computes_the_same(float64, name, move):
    model = create(name)
    in_float64(model)
    converted, _ = convert(model, SHAPE, variance="formula")
    in_float64(converted)
    example = jax.random.normal(jax.random.key(0), (4, 32, 32, 3), jnp.float64)
    kinds = nnx.Param, nnx.BatchStat
    for network, args in ((converted, ()), (model, (example,))):
        before = jax.tree.map(np.array, jax.tree.leaves(nnx.state(network, kinds)))
        move(network)
        after = jax.tree.leaves(nnx.state(network, kinds))
        assert sum(np.any(a != b) for a, b in zip(before, after, strict=True)) > len(before) / 2
        check_folded(network, args, example)
