"""What a network is given and what it returns: what cannot be seen in its layers, and is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import mimicnorm_jax
from mimicnorm_jax import UserError
from mimicnorm_jax.convert.layers import Scaled
from tests.convert.test_convert import became, conv, convert, dense, net, norm, plain

IMAGES = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def noted(report, text):
    return any(text in note for note in report.notes)


@pytest.mark.parametrize(
    ("padding", "center", "blind"),
    [
        ("VALID", "not_depthwise", True),
        ("SAME", "not_depthwise", False),
        ("VALID", "fan_in", False),
    ],
)
def test_a_first_layer_that_is_blind_to_brightness_is_told(padding, center, blind):
    model = net(plain, stem=conv(3, 8, padding=padding))
    network, report = convert(model, IMAGES, variance="measured", center=center)
    assert noted(report, "stem: it is centred, and so blind to a number") == blind
    moved = float(jnp.abs(network.stem(IMAGES + 1) - network.stem(IMAGES)).max())
    assert (moved < 1e-4) == blind


def test_a_norm_of_the_input_stays_and_what_follows_is_measured_behind_it():
    def function(m, x):
        return plain(m, m.first(x) if x.ndim == 4 else x)

    model = net(function, first=norm(3))
    raw = IMAGES * jnp.array([1e-2, 1.0, 1e3]) + jnp.array([0.0, 0.0, 5e3])
    model.norm.scale[...] = 2 * model.norm.scale[...]
    model.first.scale[...] = 1.5 * model.first.scale[...]
    with pytest.warns(UserWarning, match="scale other than 1") as warned:
        network, report = convert(model, raw, variance="measured")
    assert "first" not in str(warned[0].message)  # it keeps what it had learned
    assert type(network.first) is nnx.BatchNorm
    assert became(report, "first").became == "stays: it normalizes the network's input"
    network.train()
    second = jnp.mean(jnp.square(network.stem(network.first(raw))))
    assert second == pytest.approx(1, rel=1e-3)
    logits = network(raw)
    np.testing.assert_allclose(logits.var(0), 1, atol=1e-2)


def test_a_norm_of_the_input_stays_in_linen():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(x)
            x = linen.Conv(8, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            return linen.Dense(5)(x.mean((1, 2)))

    raw = 1e3 * IMAGES + 5e3
    network, report = mimicnorm_jax.convert(Network(), raw, train=False)
    assert became(report, "BatchNorm_0").became == "stays: it normalizes the network's input"
    assert became(report, "Conv_0").variance == pytest.approx(1 / 27, rel=0.5)  # not 1e-6 / 27
    variables = network.init(jax.random.key(0), raw, train=False)
    _, updates = network.apply(variables, raw, train=True, mutable=["batch_stats"])
    mean = updates["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * raw.mean((0, 1, 2)), rtol=1e-3)
    plain, _ = mimicnorm_jax.fold(network, {**variables, **updates}, raw, train=False)
    expected = network.apply({**variables, **updates}, raw, train=False)
    np.testing.assert_allclose(plain(raw, train=False), expected, rtol=1e-3, atol=1e-3)


def depthwise(m, x):
    x = nnx.relu(m.wide(m.deep(nnx.relu(m.norm(m.stem(x))))))
    return m.head(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("input", ()), ("depthwise", ("wide",)), (lambda norm: norm.path == ("norm",), ("norm",))],
)
def test_norms_that_are_to_stay_do(keep, kept):
    model = net(depthwise, deep=conv(8, 8, feature_group_count=8), wide=norm(8))
    network, report = convert(model, IMAGES, variance="measured", keep=keep)
    for name in ("norm", "wide"):
        assert isinstance(getattr(network, name), nnx.BatchNorm) == (name in kept)
        assert became(report, name).became.startswith("stays: " if name in kept else "removed")
    network.eval()
    folded, _ = mimicnorm_jax.fold(network, IMAGES)
    np.testing.assert_allclose(folded(IMAGES), network(IMAGES), atol=1e-4)


def test_the_scalar_of_a_branch_that_ends_in_a_norm_that_stays_is_behind_it():
    """A norm would take away again what the layer before it is scaled by."""

    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        x = nnx.relu(x + m.ends(m.conv(x)))
        return m.head(x.mean((1, 2)))

    model = net(function, conv=conv(8, 8), ends=norm(8))
    network, report = convert(model, IMAGES, keep=lambda norm: norm.path == ("ends",))
    assert isinstance(network.ends, Scaled)
    assert getattr(network.conv, "scale", None) is None
    assert [layer.path for layer in report.layers if layer.scale is not None] == ["ends"]
    network.eval()
    folded, _ = mimicnorm_jax.fold(network, IMAGES)
    np.testing.assert_allclose(folded(IMAGES), network(IMAGES), atol=1e-4)
    _, report = convert(model, IMAGES, keep=lambda norm: True, to="weightmean")
    assert noted(report, "the examples of a batch stay coupled by what stays: norm")


def test_a_single_output_is_warned_of():
    model = net(plain, head=dense(8, 1))
    with pytest.warns(UserWarning, match="for regression, or one logit for two classes"):
        convert(model)
    convert(model, to="weightmean")


@pytest.mark.parametrize("to", ["weightmean", "nonorm"])
def test_without_last_bn_any_output_will_do(to):
    network, _ = convert(net(lambda m, x: (plain(m, x)[:, 0], {"all": plain(m, x)})), to=to)
    first, others = network(IMAGES)
    assert first.shape == (16,) and others["all"].shape == (16, 5)


def test_layers_that_are_called_on_what_they_made_stay():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        state = jnp.zeros((len(x), 8))
        for step in range(4):
            state = jnp.tanh(m.again(state) + m.taken(x[:, step].mean(1)))
        return m.head(state)

    model = net(function, again=dense(8, 8), taken=dense(8, 8))
    network, report = convert(model, IMAGES, variance="measured")
    why = "stays Linear: it is called on what it made before, as in a recurrent network"
    assert became(report, "again").became == why
    np.testing.assert_array_equal(network.again.kernel, model.again.kernel)
    assert "stays" not in became(report, "taken").became


def test_a_mask_that_nothing_heeds_any_more_is_told():
    def function(m, x):
        mask = jnp.arange(16)[:, None, None, None] < 12
        return m.head(nnx.relu(m.norm(m.stem(x), mask=mask)).mean((1, 2)))

    _, report = convert(net(function), IMAGES)
    assert noted(report, "gives its BatchNorms a mask")
    assert not noted(convert(net(plain), IMAGES)[1], "mask")


def test_a_convolution_that_is_no_layer_is_named():
    def function(m, x):
        x = nnx.relu(m.norm(m.stem(x)))
        x = lax.conv_general_dilated(
            x, m.own[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return m.head(nnx.relu(m.after(x)).mean((1, 2)))

    own = nnx.Param(jax.random.normal(jax.random.key(1), (3, 3, 8, 8)))
    model = net(function, after=norm(8))
    model.own = own
    _, report = convert(model, IMAGES)
    assert noted(report, "after: a convolution or product that is no layer of Flax feeds it")
    assert became(report, "after").became == (
        "a shift: what feeds it is no layer of Flax, and stays as it is"
    )


def test_pixels_and_what_is_no_number_are_told():
    pixels = jax.random.randint(jax.random.key(0), (4, 8, 8, 3), 0, 256).astype(jnp.uint8)
    model = net(lambda m, x: plain(m, x.astype(jnp.float32)))
    _, report = convert(model, pixels, variance="measured")
    assert noted(report, "the arguments have a root mean square of 1")
    _, report = convert(model, IMAGES, variance="measured")
    assert not noted(report, "root mean square")
    with pytest.raises(UserError, match="numbers that are not finite"):
        convert(model, IMAGES.at[0, 0].set(jnp.nan), variance="measured")


def test_it_measures_where_jax_looks_for_what_is_no_number():
    with jax.debug_nans(True):
        _, report = convert(net(plain), IMAGES, variance="measured")
    assert became(report, "stem").second_moment == pytest.approx(1, rel=1e-3)


def test_memory_of_a_network_that_averages_over_devices():
    model = net(plain, norm=norm(8, axis_name="devices"))
    _, report = convert(model, IMAGES, memory=True)
    assert report.memory.before > 0 and report.memory.after > 0


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        ("logits", r"logits is a function of the network's outputs, .*: got 'logits'"),
        (0, "logits is a function"),
        (lambda outputs: outputs["logits"], r"of shapes \(4, 5\): "),
    ],
)
def test_logits_that_do_not_fit_are_told(logits, says):
    with pytest.raises(UserError, match=says):
        convert(net(plain), logits=logits)


def test_fold_takes_networks():
    with pytest.raises(UserError, match="fold takes a network, got Conversion; convert returns"):
        mimicnorm_jax.fold(convert(net(plain)))
    with pytest.raises(UserError, match="got NoneType"):
        mimicnorm_jax.fold(None)
