"""Networks of ``flax.linen``: converted as their twins of NNX are, and used as before."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import mimicnorm_jax
from mimicnorm_jax import UserError


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)


class Gate(linen.Module):
    @linen.compact
    def __call__(self, x):
        squeezed = linen.relu(linen.Dense(4)(x.mean((1, 2), keepdims=True)))
        return x * linen.sigmoid(linen.Dense(x.shape[-1])(squeezed))


class Block(linen.Module):
    gated: bool = False

    @linen.compact
    def __call__(self, x, train):
        norm = functools.partial(linen.BatchNorm, use_running_average=not train)
        y = linen.relu(norm()(linen.Conv(8, (3, 3), use_bias=False)(x)))
        y = norm()(linen.Conv(8, (3, 3), padding=1)(y))
        return linen.relu(x + (Gate()(y) if self.gated else y))


class Repeated(Block):
    @linen.compact
    def __call__(self, x, train):
        return Block.__call__(self, x, train), None


class Network(linen.Module):
    blocks: int = 1
    gated: bool = False
    scanned: int = 0
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(8, (3, 3))(x)
        x = linen.relu(linen.BatchNorm()(x, use_running_average=not train))
        for _ in range(self.blocks):
            x = Block(self.gated)(x, train)
        if self.scanned:
            x, _ = linen.scan(
                linen.remat(Repeated, static_argnums=(2,)),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.scanned,
                in_axes=linen.broadcast,
            )(name="stack")(x, train)
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        return linen.Dense(10)(x.mean((1, 2)))


class Twin(nnx.Module):
    """``Network()`` in NNX."""

    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(size, 8, (3, 3), rngs=rngs) for size in (3, 8, 8)])
        self.norms = nnx.List([nnx.BatchNorm(8, momentum=0.99, rngs=rngs) for _ in range(3)])
        self.dense = nnx.Linear(8, 10, rngs=rngs)
        kernels = params["Conv_0"], params["Block_0"]["Conv_0"], params["Block_0"]["Conv_1"]
        for conv, given in zip(self.convs, kernels, strict=True):
            conv.kernel.set_value(given["kernel"])
        self.dense.kernel.set_value(params["Dense_0"]["kernel"])

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.convs[0](x)))
        y = nnx.relu(self.norms[1](self.convs[1](x)))
        x = nnx.relu(x + self.norms[2](self.convs[2](y)))
        return self.dense(x.mean((1, 2)))


def test_is_what_its_twin_of_nnx_becomes():
    module = Network()
    drawn = module.init(jax.random.key(0), IMAGES)
    twin, of_twin = mimicnorm_jax.convert(Twin(drawn["params"]), IMAGES)
    network, report = mimicnorm_jax.convert(module, IMAGES)
    assert report.num_centered == of_twin.num_centered == 3
    variables = network.init(jax.random.key(0), IMAGES)

    def of_linen(params):
        held = {**variables, "params": params}
        logits, updates = network.apply(held, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(3 * logits)), (logits, updates)

    def of_nnx(twin):
        logits = twin(IMAGES)
        return jnp.sum(jnp.sin(3 * logits)), logits

    (_, (logits, updates)), slopes = jax.value_and_grad(of_linen, has_aux=True)(variables["params"])
    (_, expected), twin_slopes = nnx.value_and_grad(of_nnx, has_aux=True)(twin)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    names = [("convs", 0), ("convs", 1), ("convs", 2)]
    found = slopes["Conv_0"], slopes["Block_0"]["Conv_0"], slopes["Block_0"]["Conv_1"]
    # sums of thousands of float32 in another order, which differs between processors
    atol = 1e-5 * max(float(np.abs(slope["kernel"]).max()) for slope in found)
    for (held, place), slope in zip(names, found, strict=True):
        for name, value in slope.items():
            other = twin_slopes[held][place][name][...]
            np.testing.assert_allclose(value, other, atol=atol, err_msg=f"{place} {name}")
    assert set(found[2]) == {"kernel", "bias", "scale"}
    statistics = updates["batch_stats"]["Dense_0"]
    last_bn = twin.dense.last_bn
    np.testing.assert_allclose(statistics["var"], last_bn.var[...], rtol=1e-5)
    twin.eval()
    np.testing.assert_allclose(
        network.apply({**variables, **updates}, IMAGES), twin(IMAGES), atol=1e-5
    )


def test_init_is_traced_and_its_arguments_may_be_zeros():
    network, report = mimicnorm_jax.convert(Network(gated=True), IMAGES)
    zeros = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(5), zeros)
    rows = {row.path: row for row in report.layers}
    for key in (0, 5):
        variables = jax.jit(network.init)(jax.random.key(key), zeros)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
        params = variables["params"]
        for path, kernel in (
            ("Conv_0", params["Conv_0"]["kernel"]),
            ("Block_0/Conv_1", params["Block_0"]["Conv_1"]["kernel"]),
        ):
            np.testing.assert_allclose(np.var(kernel), rows[path].variance, rtol=1e-3)
            assert np.abs(np.mean(kernel, (0, 1, 2))).max() < 1e-6
        logits = network.apply(variables, IMAGES)
        assert 0.2 < np.mean(np.square(logits)) < 5
    gate = rows["Block_0/Gate_0"]
    assert gate.scale == 1 and "ends a residual branch" in gate.became
    assert params["Block_0"]["Gate_0"]["scale"].shape == ()
    another = network.init(jax.random.key(6), zeros)["params"]["Conv_0"]["kernel"]
    assert not np.allclose(another, params["Conv_0"]["kernel"])


def test_each_member_of_a_stack_has_its_own_scalar_and_variance():
    module = Network(scanned=3)
    network, report = mimicnorm_jax.convert(module, IMAGES, train=False)
    variables = network.init(jax.random.key(0), IMAGES)
    stack = variables["params"]["stack"]
    np.testing.assert_allclose(stack["Conv_1"]["scale"], [2**-0.5, 3**-0.5, 0.5], rtol=1e-6)
    kernels = stack["Conv_0"]["kernel"]
    assert kernels.shape == (3, 3, 3, 8, 8)
    assert np.abs(np.mean(kernels, (1, 2, 3))).max() < 1e-6
    variances = np.var(np.asarray(kernels), (1, 2, 3, 4))
    assert len(set(np.round(variances, 6).tolist())) == 3
    assert all(
        row.second_moment == pytest.approx(1, rel=1e-3) for row in report.layers if row.fan_in
    )


def test_trains_with_the_mode_that_the_network_gives_its_norms():
    network, _ = mimicnorm_jax.convert(Network(dropout=0.1), IMAGES)
    variables = network.init(jax.random.key(0), IMAGES)
    labels = jnp.arange(16) % 10
    transform = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, statistics, state, key):
        def loss(params):
            logits, updates = network.apply(
                {"params": params, "batch_stats": statistics},
                IMAGES,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, updates["batch_stats"])

        (value, (logits, statistics)), slopes = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = transform.update(slopes, state, params)
        return optax.apply_updates(params, updates), statistics, state, value, logits

    params, statistics = variables["params"], variables["batch_stats"]
    state = transform.init(params)
    losses = []
    for number in range(40):
        params, statistics, state, value, logits = step(
            params, statistics, state, jax.random.key(number)
        )
        np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)  # of this batch: training
        losses.append(value)
    assert losses[-1] < 0.4 * losses[0]
    trained = {"params": params, "batch_stats": statistics}
    one = network.apply(trained, IMAGES[:1])  # evaluation does not couple examples
    np.testing.assert_allclose(one, network.apply(trained, IMAGES)[:1], atol=1e-5)


def test_folds_into_plain_layers():
    with jax.enable_x64(True):
        images = np.asarray(IMAGES, np.float64)
        wide = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float64))
        rng = np.random.default_rng(1)
        for to, module in (("mimicnorm", Network(0, scanned=2)), (None, Network(gated=True))):
            network = module
            if to is not None:
                network, _ = mimicnorm_jax.convert(module, images, to=to)
            drawn = wide(network.init(jax.random.key(0), images))
            variables = jax.tree.map(lambda a: a + np.abs(rng.normal(size=a.shape)) / 9, drawn)
            plain, _ = mimicnorm_jax.fold(network, variables, images)
            expected = network.apply(variables, images)
            error = np.abs(plain(images) - expected).max() / np.abs(expected).max()
            assert error < 1e-10
            kinds = {type(part).__name__ for _, part in nnx.iter_modules(plain)}
            assert not kinds & {"WeightMeanConv", "ScaledConv", "LastBN", "BatchNorm"}


class Unusual(linen.Module):
    """Layers that stay Linen's own, parameters outside of layers, a head of a taken name."""

    @linen.compact
    def __call__(self, x):
        boxed = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None, None, "m"))
        x = linen.Conv(8, (3, 3), kernel_init=boxed)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.ConvTranspose(8, (2, 2), strides=(2, 2))(x)
        x = x * self.param("gain", linen.initializers.ones, (8,))
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.WeightNorm(linen.Dense(8))(x)
        return linen.Dense(10, name="eval")(x.mean((1, 2)))


def test_leaves_to_linen_what_nnx_does_not_have():
    network, report = mimicnorm_jax.convert(Unusual(), IMAGES)
    rows = {row.path: row for row in report.layers}
    assert rows["ConvTranspose_0"].became.startswith("stays ConvTranspose: ")
    assert rows["ConvTranspose_0"].second_moment == pytest.approx(1, rel=1e-4)
    assert any("WeightNorm" not in note and "not measured" in note for note in report.notes)
    variables = network.init(jax.random.key(0), IMAGES)
    kernel = variables["params"]["Conv_0"]["kernel"]
    assert isinstance(kernel, linen.Partitioned) and kernel.names[-1] == "m"
    assert variables["params"]["gain"].shape == (8,)
    assert variables["batch_stats"]["eval"]["mean"].shape == (10,)
    logits = network.apply(variables, IMAGES)
    np.testing.assert_allclose(network.bind(variables)(IMAGES), logits, atol=1e-6)


def test_without_a_last_bn_the_collection_of_statistics_is_empty():
    network, _ = mimicnorm_jax.convert(Network(), IMAGES, to="weightmean")
    variables = network.init(jax.random.key(0), IMAGES)
    assert variables["batch_stats"] == {}
    logits, updates = network.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert updates == {"batch_stats": {}} and logits.shape == (16, 10)


def test_refuses_in_one_line():
    module = Network()
    drawn = module.init(jax.random.key(0), IMAGES)
    network, _ = mimicnorm_jax.convert(
        module, jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32), variance="formula"
    )
    with pytest.raises(UserError, match=r"no params/.*/bias: .* come from its own init"):
        network.apply(drawn, IMAGES)
    with pytest.raises(UserError, match="variables come first"):
        mimicnorm_jax.fold(network, IMAGES)
    with pytest.raises(UserError, match="arguments are needed"):
        mimicnorm_jax.convert(module)
    with pytest.raises(UserError, match="unexpected keyword argument 'varience'"):
        mimicnorm_jax.convert(module, IMAGES, varience="formula")
    with pytest.raises(UserError, match="calls no BatchNorm"):
        mimicnorm_jax.convert(linen.Dense(3), IMAGES)


class EarlyHead(linen.Module):
    """Logits before the first BatchNorm, and modules of names that an NNX module has."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.relu(linen.Conv(8, (3, 3), name="entries")(x))
        early = linen.Dense(10, name="early")(x.mean((1, 2)))
        x = linen.relu(
            linen.BatchNorm(use_running_average=not train)(linen.Conv(8, (3, 3), name="eval")(x))
        )
        return early, linen.Dense(10)(x.mean((1, 2)))


def test_logits_before_the_first_norm_and_names_of_methods():
    network, report = mimicnorm_jax.convert(
        EarlyHead(), IMAGES, train=True, logits=lambda outputs: outputs
    )
    variables = network.init(jax.random.key(1), IMAGES, train=True)
    kernel = variables["params"]["eval"]["kernel"]
    assert report.num_centered == 1 and np.abs(np.mean(kernel, (0, 1, 2))).max() < 1e-6
    outputs, updates = network.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    for logits in outputs:
        np.testing.assert_allclose(np.std(logits, 0), 1, atol=1e-2)
    assert np.any(updates["batch_stats"]["early"]["mean"])
    early, _ = network.apply({**variables, **updates}, IMAGES[:1], train=False)
    assert np.all(np.isfinite(early))


class NormAndMore(linen.BatchNorm):
    def __call__(self, x):
        return 100 + super().__call__(x, use_running_average=True)


class Step(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.relu(linen.BatchNorm(use_running_average=True)(linen.Dense(3)(x))), None


class Shared(linen.Module):
    """A block whose weights a scan shares, and a subclass of BatchNorm."""

    @linen.compact
    def __call__(self, x):
        shared = ["params", "batch_stats"]
        scanned = linen.scan(
            Step, variable_broadcast=shared, split_rngs={"params": False}, length=2
        )
        x, _ = scanned()(x, None)
        return linen.Dense(10)(NormAndMore()(x).mean((1, 2)))


def test_what_cannot_be_measured_is_said_and_a_subclass_stays():
    with pytest.raises(UserError, match=r"cannot be measured .* variance='formula' with shapes"):
        mimicnorm_jax.convert(Shared(), IMAGES)
    shape = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    network, report = mimicnorm_jax.convert(Shared(), shape, variance="formula")
    assert any("NormAndMore_0: NormAndMore" in note for note in report.notes)
    variables = network.init(jax.random.key(0), IMAGES)
    assert network.apply(variables, IMAGES).shape == (16, 10)
    assert pickle.loads(pickle.dumps(network)).apply(variables, IMAGES).shape == (16, 10)
