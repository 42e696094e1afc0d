"""The rules of the conversion, each on a network of a few layers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import UserError, WeightMeanConv
from mimicnorm_jax.convert.layers import NormalizedLogits, Scaled, Shift
from mimicnorm_jax.layers import ScaledConv

SHAPE = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


class Net(nnx.Module):
    """Layers by name, and a function of them and the images."""

    def __init__(self, function, **layers):
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer(nnx.Rngs(0)) if callable(layer) else layer)

    def __call__(self, *args):
        return self.function(self, *args)


def conv(inputs, outputs, size=3, **options):
    return lambda rngs: nnx.Conv(inputs, outputs, (size, size), rngs=rngs, **options)


def norm(features, **options):
    return lambda rngs: nnx.BatchNorm(features, rngs=rngs, **options)


def dense(inputs, outputs=5):
    return lambda rngs: nnx.Linear(inputs, outputs, rngs=rngs)


def net(function, **layers):
    usual = {"stem": conv(3, 8, use_bias=False), "norm": norm(8), "head": dense(8)}
    return Net(function, **{**usual, **layers})


def plain(m, x):
    return m.head(nnx.relu(m.norm(m.stem(x))).mean((1, 2)))


def convert(model, *args, variance="formula", **options):
    return mimicnorm_jax.convert(model, *(args or (SHAPE,)), variance=variance, **options)


def became(report, path):
    (layer,) = (layer for layer in report.layers if layer.path == path)
    return layer


def test_a_norm_behind_one_layer_goes_and_the_layer_gets_its_bias():
    network, report = convert(net(plain))
    assert isinstance(network.stem, WeightMeanConv) and network.stem.bias.shape == (8,)
    assert isinstance(network.head, NormalizedLogits) and network.head.layer.bias is None
    assert [layer.became for layer in report.layers] == [
        "centred, bias",
        "removed",
        "not centred: makes the logits, no bias, last BN",
    ]


def test_a_bias_that_the_norm_subtracted_is_gone():
    model = net(plain, stem=conv(3, 8, bias_init=nnx.initializers.ones_init()))
    network, _ = convert(model)
    assert not np.any(network.stem.bias[...]) and np.all(model.stem.bias[...] == 1)


def test_a_layer_that_feeds_something_else_too_is_centred_and_its_norm_a_shift():
    def function(m, x):
        y = m.stem(x)
        return m.head((nnx.relu(m.norm(y)) + jnp.tanh(y)).mean((1, 2)))

    network, report = convert(net(function))
    assert isinstance(network.norm, Shift) and network.norm.bias.shape == (8,)
    assert became(report, "stem").centered and network.stem.bias is None


def test_a_norm_of_another_axis_is_a_shift_of_that_axis():
    def function(m, x):
        y = m.second(m.norm(m.stem(x)).transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        return m.head(nnx.relu(y).mean((1, 2)))

    model = net(function, second=norm(8, axis=1))
    network, _ = convert(model)
    assert isinstance(network.second, Shift) and network.second.axis == 1
    example = jax.random.normal(jax.random.key(0), SHAPE.shape)
    network.second.bias[...] = jnp.arange(8.0)
    assert network(example).shape == (4, 5)
    model.eval()
    model.second.mean[...] = jnp.arange(8.0)
    folded = mimicnorm_jax.fold(model, example).network
    np.testing.assert_allclose(folded(example), model(example), atol=1e-5)


class Standardized(nnx.Conv):
    """Its kernel's scale has no effect."""

    def __call__(self, x):
        kernel = self.kernel[...]
        plain = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        plain.kernel.set_value(kernel / jnp.std(kernel))
        return plain(x)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.second(m.a(x)),
        lambda m, x: m.second(jnp.pad(m.plain(x), ((0, 0), (1, 1), (1, 1), (0, 0)))),
        lambda m, x: m.second(m.plain(x).transpose(0, 1, 3, 2)),
        lambda m, x: m.second(m.norm(m.plain(x))),
    ],
    ids=["a subclass", "zeros", "another axis", "two norms"],
)
def test_what_cannot_be_folded_exactly_is_not(between):
    model = net(
        lambda m, x: m.head(nnx.relu(between(m, m.stem(x))).mean((1, 2))),
        a=lambda rngs: Standardized(8, 8, (3, 3), use_bias=False, rngs=rngs),
        plain=conv(8, 8),
        second=norm(8),
    )
    model.eval()
    model.second.mean[...] = -jnp.arange(8.0)
    model.second.var[...] = 1 + jnp.arange(8.0)
    example = jax.random.normal(jax.random.key(0), SHAPE.shape)
    folded = mimicnorm_jax.fold(model, example).network
    np.testing.assert_allclose(folded(example), model(example), atol=1e-5)


def test_what_is_an_output_too_is_not_for_the_norm_alone():
    def function(m, x):
        y = m.stem(x)
        return m.head(nnx.relu(m.norm(y)).mean((1, 2))), y

    network, _ = convert(net(function), logits=lambda outputs: outputs[0])
    assert isinstance(network.norm, Shift)


def residual(m, x):
    x = nnx.relu(m.norm(m.stem(x)))
    for inner, end in ((m.a, m.b), (m.c, m.d)):
        x = x + end(nnx.relu(inner(x)))
    return m.head(x.mean((1, 2)))


def test_scalars_count_the_additions_along_the_trunk_also_past_a_nested_one():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        y = nnx.relu(m.a(x))
        y = y + m.b(nnx.relu(m.c(y)))  # inside the first branch
        x = x + m.d(nnx.relu(y))
        return m.head((x + m.e(nnx.relu(m.f(x)))).mean((1, 2)))

    layers = {name: conv(8, 8) for name in "abcdef"}
    _, report = convert(net(function, **layers))
    assert became(report, "b").scale == 1
    assert became(report, "d").scale == 1
    assert became(report, "e").scale == pytest.approx(2**-0.5)
    _, report = convert(net(residual, **layers), to="nonorm")
    assert became(report, "d").scale is None and report.num_centered == 0


def test_a_sum_of_three_is_one_addition():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        return m.head((x + m.a(x) + m.b(nnx.relu(m.c(x)))).mean((1, 2)))

    _, report = convert(net(function, a=conv(8, 8), b=conv(8, 8), c=conv(8, 8)))
    assert (became(report, "a").scale, became(report, "b").scale) == (1, 1)


def test_parallel_layers_are_no_residual_branch():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        return m.head((m.a(x) + m.b(x)).mean((1, 2)))

    _, report = convert(net(function, a=conv(8, 8), b=conv(8, 8)))
    assert became(report, "a").scale is None
    assert any("equally deep" in note for note in report.notes)


class Gate(nnx.Module):
    def __init__(self, features, rngs):
        self.squeeze = nnx.Linear(features, 2, rngs=rngs)
        self.excite = nnx.Linear(2, features, rngs=rngs)

    def __call__(self, x):
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(x.mean((1, 2))))))
        return x * gate[:, None, None]


def test_a_gate_keeps_its_variance_and_its_branch_is_scaled_behind_it():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        return m.head((x + m.gate(m.a(x))).mean((1, 2)))

    model = net(function, a=conv(8, 8), gate=lambda rngs: Gate(8, rngs))
    network, report = convert(model)
    assert isinstance(network.gate, Scaled) and network.gate.scale[...] == 1
    assert any("gate: a scalar multiplies" in note for note in report.notes)
    for part in ("squeeze", "excite"):
        given = getattr(model.gate, part).kernel[...]
        np.testing.assert_array_equal(getattr(network.gate.module, part).kernel[...], given)
    example = jax.random.normal(jax.random.key(0), SHAPE.shape)
    _, report = convert(model, example, variance="measured")
    moments = [row.second_moment for row in report.layers if row.second_moment is not None]
    assert sum(abs(moment - 1) < 1e-3 for moment in moments) == 3


def test_a_gate_that_is_written_out_scales_the_layer_it_gates():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        y = m.a(x)
        gate = nnx.sigmoid(m.b(y.mean((1, 2))))
        return m.head((x + y * gate[:, None, None]).mean((1, 2)))

    _, report = convert(net(function, a=conv(8, 8), b=dense(8, 8)))
    assert became(report, "a").scale == 1
    assert any("also scales what its gate" in note for note in report.notes)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (conv(8, 8, feature_group_count=8), "not centred: depthwise, bias"),
        (conv(8, 8, padding="CIRCULAR"), "centred, bias"),
        (conv(8, 8, input_dilation=2, padding=1), "stays Conv: its input is dilated"),
        (conv(8, 8, mask=jnp.ones((3, 3, 8, 8))), "stays Conv: its kernel has a mask"),
        (
            lambda rngs: ScaledConv(8, 8, (3, 3), input_dilation=2, padding=1, rngs=rngs),
            "stays ScaledConv: its input is dilated",
        ),
        (conv(8, 8, padding="same", strides=None), "centred, bias"),
        (
            lambda rngs: nnx.Conv(8, 8, 3, rngs=rngs),  # an axis short: along rows only
            "stays Conv: its kernel_size (3,) does not cover the 2 axes of its input",
        ),
        (
            lambda rngs: nnx.ConvTranspose(8, 8, (2, 2), rngs=rngs),
            "stays ConvTranspose: transposed convolutions are not converted",
        ),
    ],
)
def test_what_cannot_be_centred_is_named(layer, says):
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        return m.head(nnx.relu(m.second(m.layer(x))).mean((1, 2)))

    network, report = convert(net(function, layer=layer, second=norm(8)))
    assert became(report, "layer").became == says
    assert isinstance(network.second, Shift) == says.startswith("stays")
    assert network(jnp.ones(SHAPE.shape) * jnp.arange(4.0)[:, None, None, None]).shape == (4, 5)


def test_a_kernel_in_two_residual_blocks_stays_as_it_was():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        for _ in range(2):
            x = x + m.shared(nnx.relu(m.a(x)))
        return m.head(x.mean((1, 2)))

    model = net(function, shared=conv(8, 8), a=conv(8, 8))
    network, report = convert(model)
    assert "used in several residual blocks" in became(report, "shared").became
    np.testing.assert_array_equal(network.shared.kernel[...], model.shared.kernel[...])


def test_logits_that_are_averaged_are_normalized_by_the_average():
    def function(m, x):
        return m.head(nnx.relu(m.norm(m.stem(x)))).mean((1, 2))

    network, report = convert(net(function, head=conv(8, 5, 1)))
    assert "last BN of the average" in became(report, "head").became
    example = jax.random.normal(jax.random.key(0), SHAPE.shape)
    logits = network(example)
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(logits.var(0), 1, atol=0.05)  # less by epsilon
    network.eval()
    np.testing.assert_allclose(
        mimicnorm_jax.fold(network).network(example), network(example), atol=1e-5
    )


def test_dense_logits_are_normalized_over_places_too():
    network, _ = convert(net(lambda m, x: m.head(m.norm(m.stem(x))), head=conv(8, 5, 1)))
    logits = network(jax.random.normal(jax.random.key(0), SHAPE.shape))
    assert logits.shape == (4, 8, 8, 5)
    np.testing.assert_allclose(logits.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(logits.var((0, 1, 2)), 1, atol=1e-3)


def test_what_a_norm_had_learned_is_dropped_with_a_warning():
    model = net(plain, norm=norm(8, scale_init=nnx.initializers.zeros_init()))
    with pytest.warns(UserWarning, match="1 BatchNorms have a scale other than 1"):
        convert(model)


def test_every_activation_has_its_own_variance():
    def function(m, x):
        y = jnp.clip(m.norm(m.stem(x)), -1.0, 1.0)
        return m.head(m.a(y).mean((1, 2)))

    network, _ = convert(net(function, a=conv(8, 64), head=dense(64)))
    z = np.random.default_rng(0).normal(size=10**6)
    expected = 1 / (72 * np.mean(np.clip(z, -1, 1) ** 2))
    assert np.var(network.a.kernel[...]) == pytest.approx(expected, rel=3e-3)


def test_dead_and_constant_kernels_are_named():
    model = net(plain, stem=conv(3, 8, kernel_init=nnx.initializers.ones_init()))
    _, report = convert(model)
    assert any("stem: a constant kernel cannot be rescaled" in note for note in report.notes)
    _, report = convert(model, jnp.ones(SHAPE.shape), variance="measured")
    assert any("stem: it puts out nothing on the arguments" in note for note in report.notes)


def test_mode_and_axis_name_are_those_asked_for():
    model = net(plain)
    model.eval()
    network, _ = convert(model, axis_name="data")
    assert network.head.last_bn.use_running_average
    assert network.head.last_bn.axis_name == "data"
    told = net(lambda m, x: m.head(m.norm(m.stem(x), use_running_average=False).mean((1, 2))))
    _, report = convert(told)
    assert any("says use_running_average" in note for note in report.notes)


def test_layers_that_the_call_does_not_reach_are_named():
    network, report = convert(net(plain, unused=conv(3, 3)))
    assert "unused: nothing that the network is given reaches it, left as it was" in report.notes
    assert type(network.unused) is nnx.Conv


def test_other_methods():
    network, report = convert(net(plain), to="weightmean")
    assert type(network.head) is nnx.Linear and network.head.bias is not None
    assert report.num_centered == 1
    network, report = convert(net(plain), to="lastbn")
    assert type(network.stem) is ScaledConv and isinstance(network.head, NormalizedLogits)
    assert report.num_centered == 0


def test_the_order_of_a_dictionary_is_kept():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        return m.head(
            jnp.concatenate([branch(x) for branch in m.branches.values()], -1).mean((1, 2))
        )

    def branches(rngs):
        return nnx.Dict({name: conv(8, 4)(rngs) for name in ("one", "three", "five")})

    model = net(function, branches=branches, head=dense(12))
    model.eval()
    example = jax.random.normal(jax.random.key(0), SHAPE.shape)
    np.testing.assert_allclose(
        mimicnorm_jax.fold(model, example).network(example), model(example), atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "args", "options", "says"),
    [
        (net(plain), (), {"to": "mimic"}, r"unknown to 'mimic' \(did you mean 'mimicnorm'"),
        (net(plain), (), {"center": "all"}, "unknown center 'all'; allowed: fan_in, not_depthwise"),
        (net(plain), (), {"variance": "he"}, "unknown variance 'he'; allowed: measured, formula"),
        (net(plain), (), {"variance": "measured"}, "needs arrays; variance='formula' takes shapes"),
        (net(plain), ("x",), {}, r"arguments are needed, arrays or shapes: "),
        (net(lambda m, x: m.head(m.stem(x).mean((1, 2)))), (), {}, "calls no BatchNorm"),
        (net(plain), (SHAPE, 1), {}, "cannot be called with these arguments: TypeError: "),
        (net(lambda m, x: nnx.softmax(plain(m, x))), (), {}, "the logits are a linear function"),
        (net(lambda m, x: (plain(m, x),) * 2), (), {}, "returns 2 arrays: say which are logits"),
        (net(lambda m, x: plain(m, x)[0]), (), {}, r"logits have shape \(B, ..., C\), the network"),
        (lambda x: x, (), {}, "convert takes an nnx.Module or a linen.Module, got function"),
    ],
)
def test_what_it_refuses(model, args, options, says):
    with pytest.raises(UserError, match=says):
        convert(model, *args, **options)


def test_a_converted_network_is_refused():
    network, _ = convert(net(plain, other=norm(3)))
    with pytest.raises(UserError, match="has a last BN already: head/last_bn"):
        convert(network)
