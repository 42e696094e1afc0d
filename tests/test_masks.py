"""Projected weight mean in the layouts of Linen, Haiku and Equinox, on stacks as well."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from mimicnorm_jax import UserError, equinox_mask, haiku_mask, linen_mask, project_weight_mean

BATCH = (4, 5, 5, 4)


def assert_projected_equals_reparameterized(loss, params, mask, stacked):
    """50 steps of SGD with momentum and weight decay, in float64."""
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    plain = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))
    trained = {}
    for form in ("reparameterized", "projected"):
        projected = form == "projected"
        transform = optax.chain(plain, project_weight_mean(mask)) if projected else plain

        @jax.jit
        def step(params, state, transform=transform, projected=projected):
            def value(params):
                return loss(params if projected else mask.center(params))

            found, gradient = jax.value_and_grad(value)(params)
            updates, state = transform.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, found

        start = mask.center(params) if projected else params
        state, losses = transform.init(start), []
        for _ in range(50):
            start, state, found = step(start, state)
            losses.append(float(found))
        trained[form] = start, losses
    (ours, losses), (theirs, expected) = trained["projected"], trained["reparameterized"]
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        ours,
        mask.center(theirs),
    )
    kernel, axes = stacked(ours)
    np.testing.assert_allclose(kernel.mean(axes), 0.0, atol=1e-14)
    assert np.abs(np.mean(kernel, axes)).size > 8  # of each kernel's channels


def images():
    return jax.random.normal(jax.random.key(1), BATCH, jnp.float64)


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Conv(8, (3, 3), param_dtype=jnp.float64)(x)), None


class LinenNetwork(linen.Module):
    axis: int = 0

    @linen.compact
    def __call__(self, x):
        wide = {"param_dtype": jnp.float64}
        x = jnp.tanh(linen.Conv(8, (3, 3), name="stem", **wide)(x))
        scan = linen.scan(
            Scanned, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4
        )
        x, _ = scan(name="scanned")(x, None)
        for transposed in (False, True):
            up = linen.ConvTranspose(8, (4, 3), (2, 2), transpose_kernel=transposed, **wide)
            x = jnp.tanh(up(x))
        x = linen.Conv(8, (3, 3), feature_group_count=8, name="depthwise", **wide)(x)
        return linen.Dense(3, name="head", **wide)(x.mean((1, 2)))


@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.long)])
def test_linen(axis, float64):
    x, network = images(), LinenNetwork(axis)
    params = network.init(jax.random.key(0), x)["params"]
    mask = linen_mask(network, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert {path[0] for path in mask.centerings} == {
        *("stem", "scanned", "ConvTranspose_0", "ConvTranspose_1")
    }
    assert_projected_equals_reparameterized(
        lambda params: jnp.mean((network.apply({"params": params}, x) - 1) ** 2),
        params,
        mask,
        lambda params: (
            np.moveaxis(params["scanned"]["Conv_0"]["kernel"], axis, 0),
            (1, 2, 3),
        ),
    )


def test_a_transposed_kernel_of_linen_is_centred_by_its_output_channels(float64):
    network, x = LinenNetwork(), images()
    params = linen_mask(network, x).center(network.init(jax.random.key(0), x)["params"])
    plain, turned = (params[f"ConvTranspose_{i}"]["kernel"] for i in (0, 1))
    for i in range(2):  # every phase of the window of 4x3 by itself
        np.testing.assert_allclose(plain[i::2, ::2].mean((0, 1, 2)), 0.0, atol=1e-15)
        np.testing.assert_allclose(turned[i::2, ::2].mean((0, 1, 3)), 0.0, atol=1e-15)
        np.testing.assert_allclose(turned[i::2, 1::2].mean((0, 1, 3)), 0.0, atol=1e-15)


def test_haiku(float64):
    haiku = pytest.importorskip("haiku", reason="haiku is missing: pip install dm-haiku")

    def network(x):
        x = jnp.tanh(haiku.Conv2D(8, 3, name="stem")(x))
        stack = haiku.layer_stack(4)
        x = stack(haiku.transparent(lambda x: jnp.tanh(haiku.Conv2D(8, 3, name="inner")(x))))(x)
        x = jnp.tanh(haiku.Conv2DTranspose(6, (4, 3), stride=2, name="up")(x))
        x = haiku.DepthwiseConv2D(1, 3, name="depthwise")(x)
        return haiku.Linear(3, name="head")(x.mean((1, 2)))

    x, transformed = images(), haiku.without_apply_rng(haiku.transform(network))
    params = transformed.init(jax.random.key(0), x)
    mask = haiku_mask(transformed, x)
    (stacked,) = {name for name, _ in mask.centerings} - {"stem", "up"}
    assert stacked.endswith("/inner")
    centred = mask.center(params)["up"]["w"]  # (4, 3, out, in)
    np.testing.assert_allclose(centred[::2, 1::2].mean((0, 1, 3)), 0.0, atol=1e-15)
    assert_projected_equals_reparameterized(
        lambda params: jnp.mean((transformed.apply(params, x) - 1) ** 2),
        params,
        mask,
        lambda params: (params[stacked]["w"], (1, 2, 3)),
    )


def test_layers_of_haiku_are_told_apart_by_what_they_are_lifted_into():
    haiku = pytest.importorskip("haiku", reason="haiku is missing: pip install dm-haiku")
    inner = haiku.transform(lambda x: haiku.Conv2D(4, 3, name="conv")(x))

    class Lifting(haiku.Module):
        def __call__(self, x):
            key = haiku.maybe_next_rng_key()
            return inner.apply(haiku.transparent_lift(inner.init)(key, x), None, x)

    def network(x, flag):
        assert flag is True
        x = haiku.Conv2DTranspose(4, 3, stride=2, name="conv")(x)
        x = haiku.layer_stack(3, name="a")(lambda x: haiku.Conv2D(4, 3, name="conv")(x))(x)
        x = haiku.layer_stack(3, name="b")(lambda x: haiku.Conv2DTranspose(4, 3, name="conv")(x))(x)
        x = inner.apply(haiku.lift(inner.init, name="c")(haiku.maybe_next_rng_key(), x), None, x)
        return Lifting(name="d")(x)

    mask = haiku_mask(
        haiku.transform(network), jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32), True
    )
    axes = {path[0]: (c.axes, len(c.phases)) for path, c in mask.centerings.items()}
    of_conv, of_transposed = (-4, -3, -2), (-4, -3, -1)
    assert axes == {
        "conv": (of_transposed, 2),
        "a/conv": (of_conv, 0),
        "b/conv": (of_transposed, 0),
        "c/conv": (of_conv, 0),
        "d/conv": (of_conv, 0),
    }


class Flagged(linen.Module):
    @linen.compact
    def __call__(self, x, train, *, scale):
        assert train is True
        scan = linen.scan(
            Scanned, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
        )
        return scan(name="scanned")(linen.Dense(8)(x * scale), None)[0]


def test_flags_are_no_arrays_and_an_open_stack_axis_is_what_one_says(float64):
    x = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float64)
    scale = jax.ShapeDtypeStruct((), jnp.float64)
    for axis in (0, 1):
        mask = linen_mask(Flagged(), x, True, scale=scale, stack_axis=axis)
        (centering,) = mask.centerings.values()
        assert centering.axes == ((-5, -3, -2) if axis == 1 else (-4, -3, -2))


def test_equinox(float64):
    equinox = pytest.importorskip("equinox", reason="equinox is missing: pip install equinox")

    class Network(equinox.Module):
        stem: equinox.nn.Conv2d
        stack: equinox.nn.Conv2d
        up: equinox.nn.ConvTranspose2d
        depthwise: equinox.nn.Conv2d
        head: equinox.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.stem = equinox.nn.Conv2d(4, 8, 3, key=keys[0])
            self.stack = equinox.filter_vmap(
                lambda key: equinox.nn.Conv2d(8, 8, 3, padding=1, key=key)
            )(jax.random.split(keys[1], 4))
            self.up = equinox.nn.ConvTranspose2d(8, 6, (4, 3), 2, groups=2, key=keys[2])
            self.depthwise = equinox.nn.Conv2d(6, 6, 3, groups=6, key=keys[3])
            self.head = equinox.nn.Linear(6, 3, key=keys[4])

        def __call__(self, x):  # (C, H, W)
            x = jnp.tanh(self.stem(x))
            arrays, static = equinox.partition(self.stack, equinox.is_array)
            x, _ = jax.lax.scan(
                lambda x, one: (jnp.tanh(equinox.combine(one, static)(x)), None), x, arrays
            )
            x = self.depthwise(jnp.tanh(self.up(x)))
            return self.head(x.mean((1, 2)))

    x, model = images().transpose(0, 3, 1, 2), Network(jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    mask = equinox_mask(model)
    assert {path[0] for path in mask.centerings} == {"stem", "stack", "up"}
    assert equinox_mask(params).centerings == mask.centerings
    centred = mask.center(params).up.weight  # (out, in / groups, 4, 3)
    np.testing.assert_allclose(centred[:, :, ::2, 1::2].mean((1, 2, 3)), 0.0, atol=1e-15)
    assert_projected_equals_reparameterized(
        lambda params: jnp.mean((jax.vmap(equinox.combine(params, static))(x) - 1) ** 2),
        params,
        mask,
        lambda params: (params.stack.weight, (2, 3, 4)),
    )


class OneByOne(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.Conv(4, (1, 1), name="narrow")(x))


class Masked(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (1, 1), name="masked", mask=jnp.ones((1, 1, 4, 4)))(x)


def test_what_is_refused_is_said():
    with pytest.raises(UserError, match="narrow/kernel has outputs with a fan-in of 1"):
        linen_mask(OneByOne(), jnp.ones((1, 4, 4, 1)))
    with pytest.raises(UserError, match="no kernel is chosen; the network has narrow/kernel, De"):
        linen_mask(OneByOne(), jnp.ones((1, 4, 4, 2)), choose=lambda kernel: False)
    with pytest.raises(UserError, match="no layer that is known"):
        linen_mask(linen.LayerNorm(), jnp.ones((1, 4)))
    with pytest.raises(UserError, match="masked/kernel: a kernel with a mask"):
        linen_mask(Masked(), jnp.ones((1, 4, 4, 4)))
    dense = linen_mask(OneByOne(), jnp.ones((1, 4, 4, 2)), choose=lambda k: k.kind == "Dense")
    assert list(dense.centerings) == [("Dense_0", "kernel")]
    with pytest.raises(ValueError, match="is not among the parameters"):
        dense(OneByOne().init(jax.random.key(0), jnp.ones((1, 4, 4, 2))))  # not ["params"]
