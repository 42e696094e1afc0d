"""The layers take what ``nnx.Conv`` and ``nnx.ConvTranspose`` take."""

import inspect
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.layers import (
    ScaledConv,
    WeightMeanConv,
    WeightMeanConvTranspose,
    WeightMeanDense,
    WeightStandardizedConv,
)

WIDE = {"param_dtype": jnp.float64}


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def centred(kernel, *, input_axis, steps, dilation, mask=None):
    """Written out: of each output channel, the mean over the weights that make an output."""
    kernel = np.moveaxis(np.array(kernel), input_axis, -2)
    mask = np.ones_like(kernel) if mask is None else np.moveaxis(np.array(mask), input_axis, -2)
    window = kernel.shape[:-2]
    for out in range(kernel.shape[-1]):
        for phase in itertools.product(*map(range, steps)):
            places = [
                place
                for place in np.ndindex(*window)
                if all(
                    p * d % s == f for p, d, s, f in zip(place, dilation, steps, phase, strict=True)
                )
            ]
            if not places:
                continue
            weights = np.array([kernel[*place, :, out] for place in places])
            kept = np.array([mask[*place, :, out] for place in places])
            mean = (weights * kept).sum() / max(kept.sum(), 1)
            for place, values, factors in zip(places, weights, kept, strict=True):
                kernel[*place, :, out] = (values - mean) * factors
    return np.moveaxis(kernel, -2, input_axis)


def value_and_gradients(layer, x):
    """The output, and the gradients of a fixed sum of it by the parameters and by the input."""

    @jax.jit
    def run(params, x):
        y, transpose = jax.vjp(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
        return y, *transpose(jnp.cos(3 * jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    y, of_params, of_x = run(params, x)
    return y, nnx.to_pure_dict(of_params), of_x


def assert_computes(ours, theirs, x, center):
    """``ours`` is ``theirs`` with a centred kernel: outputs and gradients, to 1e-12."""
    theirs.kernel[...] = center(ours.kernel[...])
    if ours.bias is not None:
        ours.bias[...] = theirs.bias[...] = normal(3, ours.bias[...].shape)
    y, params, of_x = value_and_gradients(ours, x)
    expected, their_params, expected_of_x = value_and_gradients(theirs, x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    their_params["kernel"] = center(their_params["kernel"])  # the adjoint of centring is itself
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max()),
        (y, params, of_x),
        (expected, their_params, expected_of_x),
    )


PADDINGS = ("same", "SAME_LOWER", "Valid", "circular", "REFLECT", 1, ((0, 2), (1, 0)))
CHOICES = {
    "padding": PADDINGS,
    "strides": (None, 2, (1, 3)),
    "input_dilation": (None, 2, (1, 2)),
    "kernel_dilation": (1, (2, 1)),
    "feature_group_count": (1, 2),
    "use_bias": (True, False),
    "masked": (False, True),
    "batch": ((), (2,), (2, 3)),
    "kernel_size": ((3, 3), (2, 1)),
}
PRODUCT = list(itertools.product(*CHOICES.values()))


def covering_all_pairs():
    """So few of the product that every two values of two arguments meet in one of them."""
    names = list(CHOICES)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(CHOICES[names[a]]))
        for y in range(len(CHOICES[names[b]]))
    }
    draw = random.Random(0)
    chosen = []
    while pairs:
        drawn = [tuple(draw.randrange(len(c)) for c in CHOICES.values()) for _ in range(60)]
        met = [set(itertools.combinations(enumerate(one), 2)) & pairs for one in drawn]
        best = max(range(60), key=lambda i: len(met[i]))
        if met[best]:
            pairs -= met[best]
            chosen.append(tuple(c[i] for c, i in zip(CHOICES.values(), drawn[best], strict=True)))
    return chosen


def refused(options, size, x):
    """A dilated input is not padded by a name, neither here nor by lax."""
    name = options["padding"].upper()
    if name != "VALID":
        with pytest.raises(ValueError, match="input_dilation needs padding in numbers"):
            WeightMeanConv(4, 6, size, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="String padding is not implemented"):
        nnx.Conv(4, 6, size, **options | {"padding": name}, **WIDE, rngs=nnx.Rngs(0))(x)


def check_convolution(values):
    options = dict(zip(CHOICES, values, strict=True))
    masked, batch, size = (options.pop(n) for n in ("masked", "batch", "kernel_size"))
    shape = (*size, 4 // options["feature_group_count"], 6)
    if masked:
        mask = np.random.default_rng(0).integers(0, 2, shape).astype(float)
        mask[..., :2, :] = 1.0  # centring needs two weights
        mask[..., 5] = 0.0  # or none
        options["mask"] = jnp.asarray(mask)
    x = normal(2, (*batch, 9, 8, 4))
    if isinstance(options["padding"], str) and options["input_dilation"] is not None:
        refused(options, size, x)
        options["padding"] = "VALID"  # which lax refuses, though it can only mean one thing
    ours = WeightMeanConv(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    if isinstance(options["padding"], str):
        named = options["padding"].upper()
        options["padding"] = 0 if options["input_dilation"] is not None else named
    theirs = nnx.Conv(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    assert_computes(
        ours,
        theirs,
        x,
        lambda kernel: centred(
            kernel,
            input_axis=-2,
            steps=np.broadcast_to(options["input_dilation"] or 1, 2),
            dilation=np.broadcast_to(options["kernel_dilation"], 2),
            mask=options.get("mask"),
        ),
    )


@pytest.mark.parametrize("values", covering_all_pairs(), ids=str)
def test_a_convolution_is_flaxs_with_the_centred_kernel(values, float64):
    check_convolution(values)


@pytest.mark.long
@pytest.mark.parametrize("values", PRODUCT, ids=str)
def test_a_convolution_is_flaxs_in_the_whole_product_of_arguments(values, float64):
    check_convolution(values)


@pytest.mark.parametrize(
    ("size", "shape", "options"),
    [
        (3, (2, 9, 4), {"padding": "CAUSAL", "kernel_dilation": 2}),
        ((4,), (9, 4), {"padding": "causal", "strides": 2}),
        ((3, 2, 2), (2, 5, 4, 4, 4), {"padding": "REFLECT", "strides": (2, 1, 1)}),
        ((3, 3), (2, 2, 2, 4), {"padding": "SAME"}),  # matrix products on CPUs
        ((1, 1), (1, 1, 2, 2, 3, 4), {"padding": "CIRCULAR"}),
        ((2, 4), (2, 5, 6, 4), {"padding": "CIRCULAR", "strides": 2}),
        ((2, 4), (2, 5, 6, 4), {"padding": "REFLECT", "kernel_dilation": (1, 2)}),
        ((3, 3), (0, 8, 8, 4), {}),
    ],
)
def test_other_axes_and_forms(size, shape, options, float64):
    ours = WeightMeanConv(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    options = {k: v.upper() if k == "padding" else v for k, v in options.items()}
    theirs = nnx.Conv(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    theirs.kernel[...] = ours.kernel[...] - ours.kernel[...].mean(
        tuple(range(ours.kernel[...].ndim - 1)), keepdims=True
    )
    x = normal(2, shape)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


TRANSPOSED = {
    "padding": ("same", "VALID", "circular", 1, ((0, 2), (1, 0))),
    "strides": (None, 2, (1, 3)),
    "kernel_dilation": (None, (2, 1)),
    "transpose_kernel": (False, True),
    "use_bias": (True, False),
    "masked": (True, False),
    "batch": ((), (2,), (2, 3)),
    "kernel_size": ((4, 3), (2, 2)),
}


@pytest.mark.parametrize(
    "values", random.Random(0).sample([*itertools.product(*TRANSPOSED.values())], 16)
)
def test_a_transposed_convolution_is_flaxs_with_the_centred_kernel(values, float64):
    options = dict(zip(TRANSPOSED, values, strict=True))
    masked, batch, size = (options.pop(n) for n in ("masked", "batch", "kernel_size"))
    if masked:
        shape = (*size, *((6, 4) if options["transpose_kernel"] else (4, 6)))
        mask = np.random.default_rng(0).integers(0, 2, shape).astype(float)
        mask[..., :3, :3] = 1.0  # centring needs two weights, of either order of the channels
        mask[..., 3:, :3] = mask[..., :3, 3:] = 1.0
        options["mask"] = jnp.asarray(mask)
    ours = WeightMeanConvTranspose(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    if isinstance(options["padding"], str):
        options["padding"] = options["padding"].upper()
    theirs = nnx.ConvTranspose(4, 6, size, **options, **WIDE, rngs=nnx.Rngs(0))
    assert_computes(
        ours,
        theirs,
        normal(2, (*batch, 7, 6, 4)),
        lambda kernel: centred(
            kernel,
            input_axis=-1 if options["transpose_kernel"] else -2,
            steps=np.broadcast_to(options["strides"] or 1, 2),
            dilation=np.broadcast_to(options["kernel_dilation"] or 1, 2),
            mask=options.get("mask"),
        ),
    )


@pytest.mark.parametrize("strides", [1, 2, 3])
def test_the_mean_of_the_input_leaves_nothing_at_any_output(strides):
    """Of a kernel with one mean for all places it would leave a pattern of period ``strides``."""
    up = WeightMeanConvTranspose(8, 4, (3, 3), strides, padding="CIRCULAR", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(up(jnp.full((1, 6, 6, 8), 5.0)), 0.0, atol=1e-5)
    dilated = WeightMeanConv(
        8, 4, (3, 3), input_dilation=strides, padding="VALID", rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(dilated(jnp.full((1, 6, 6, 8), 5.0)), 0.0, atol=1e-5)


@pytest.mark.parametrize("layer", [WeightMeanConvTranspose, WeightMeanConv])
def test_every_place_of_a_dilated_input_starts_with_second_moment_one(layer):
    steps = {"strides": 2} if layer is WeightMeanConvTranspose else {"input_dilation": 2}
    up = layer(256, 64, (3, 3), **steps, padding="VALID", rngs=nnx.Rngs(0))
    y = up(nnx.relu(jax.random.normal(jax.random.key(1), (8, 8, 8, 256))))[:, 3:-3, 3:-3]
    for i, j in itertools.product((0, 1), (0, 1)):  # of 4, 2, 2 and 1 places
        assert jnp.mean(y[:, i::2, j::2] ** 2) == pytest.approx(1.0, abs=0.08)


def test_a_mask_counts_in_the_initial_variance():
    mask = np.ones((3, 3, 64, 256))
    mask[:, :, 16:, 128:] = 0.0
    conv = WeightMeanConv(64, 256, (3, 3), mask=mask, padding="VALID", rngs=nnx.Rngs(0))
    y = conv(nnx.relu(jax.random.normal(jax.random.key(1), (8, 8, 8, 64))))
    for half in (y[..., :128], y[..., 128:]):
        assert jnp.mean(half**2) == pytest.approx(1.0, abs=0.1)


def test_a_mask_may_be_made_where_the_layer_is_traced():
    def make():
        mask = jnp.tril(jnp.ones((64, 64)))[None, None]
        return WeightMeanConv(64, 64, (1, 1), mask=mask.at[..., 63].set(1.0), rngs=nnx.Rngs(0))

    assert nnx.eval_shape(make).kernel.shape == (1, 1, 64, 64)
    conv = nnx.merge(*jax.jit(lambda: nnx.split(make()))())
    kept = conv.effective_kernel()[0, 0, :, 31]  # of 33 weights
    np.testing.assert_allclose(kept[:31], 0.0)
    np.testing.assert_allclose(kept.mean(), 0.0, atol=1e-6)
    deviation = float(jnp.std(conv.kernel[...][0, 0, :, 31]))
    assert deviation == pytest.approx(np.sqrt(2 / 32 / (1 - 1 / np.pi)), rel=0.4)


def test_a_preferred_type_is_that_of_the_result():
    x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
    for layer in (
        WeightMeanConv(8, 4, (3, 3), dtype=jnp.bfloat16, preferred_element_type=jnp.float32,
                       rngs=nnx.Rngs(0)),
        WeightMeanConvTranspose(8, 4, (3, 3), dtype=jnp.bfloat16,
                                preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)),
        WeightMeanDense(8, 4, dtype=jnp.bfloat16, preferred_element_type=jnp.float32,
                        rngs=nnx.Rngs(0)),
    ):  # fmt: skip
        y = layer(x)
        assert y.dtype == jnp.float32
        if not isinstance(layer, nnx.ConvTranspose):  # JAX 0.8 raises, as for Flax's
            assert jax.vjp(layer, x)[1](y)[0].dtype == jnp.bfloat16


def test_a_standardized_kernel_counts_what_a_mask_leaves(float64):
    mask = np.ones((3, 3, 4, 6))
    mask[1:] = 0.0
    conv = WeightStandardizedConv(4, 6, (3, 3), mask=mask, **WIDE, rngs=nnx.Rngs(0))
    kernel = conv.effective_kernel()
    np.testing.assert_array_equal(kernel[1:], 0.0)
    np.testing.assert_allclose(kernel[0].mean((0, 1)), 0.0, atol=1e-12)
    np.testing.assert_allclose(kernel[0].var((0, 1)), 1.0, rtol=1e-2)


@pytest.mark.parametrize("layer", [WeightMeanConv, WeightMeanConvTranspose, WeightMeanDense])
def test_an_editor_shows_all_arguments(layer):
    names = inspect.signature(layer).parameters
    flax = {WeightMeanConv: nnx.Conv, WeightMeanDense: nnx.Linear}.get(layer, nnx.ConvTranspose)
    missing = {"self", "promote_dtype", "conv_general_dilated", "dot_general"}
    assert set(inspect.signature(flax.__init__).parameters) - missing <= set(names)
    assert {"weight_mean", "after_relu", "scale"} <= set(names) and "args" not in names


def test_an_editor_shows_a_subclasss_own_arguments():
    class Three(WeightMeanConv):
        def __init__(self, features, *, rngs):
            super().__init__(features, features, (3, 3), rngs=rngs)

    assert list(inspect.signature(Three).parameters) == ["features", "rngs"]
    assert Three(4, rngs=nnx.Rngs(0)).kernel.shape == (3, 3, 4, 4)


def test_metadata_reaches_the_parameters():
    conv = WeightMeanConv(
        4, 6, (3, 3), kernel_metadata={"owner": "me"}, bias_metadata={"owner": "you"},
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert (conv.kernel.owner, conv.bias.owner) == ("me", "you")


def zeros(*args, **kwargs):
    return nnx.initializers.zeros_init()(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: WeightMeanConv(1, 4, (1, 1), kernel_init=zeros, rngs=r), "fan-in of 1"),
        (lambda r: WeightMeanConv(4, 4, (1, 1), feature_group_count=4, kernel_init=zeros,
                                  weight_mean="projected", rngs=r), "fan-in of 1"),
        (lambda r: WeightMeanDense(1, 4, kernel_init=zeros, rngs=r), "fan-in of 1"),
        (lambda r: WeightMeanConvTranspose(1, 4, (2, 2), 2, rngs=r), "fan-in of 1"),
        (lambda r: WeightMeanConv(2, 4, (1, 1), mask=jnp.ones((1, 1, 2, 4)),
                                  weight_mean="projected", rngs=r), "a mask needs"),
        (lambda r: WeightMeanConv(2, 4, (1, 1), mask=jnp.ones((1, 2, 4)), rngs=r),
         "mask must have the shape of the kernel"),
        (lambda r: WeightMeanConv(2, 4, (3, 3), padding="CAUSAL", rngs=r), "of 1 axis"),
        (lambda r: WeightMeanConv(2, 4, (3, 3), padding="ZEROS", rngs=r), "SAME.*CAUSAL or"),
        (lambda r: WeightMeanConv(2, 4, (3, 3), padding=(1, 1, 1), rngs=r), "each of 2 axes"),
        (lambda r: WeightMeanConv(2, 4, (3, 3), (1, 2, 3), rngs=r), "strides must be positive"),
        (lambda r: WeightMeanConv(2, 4, (3, 3), input_dilation=0, rngs=r), "input_dilation must"),
        (lambda r: ScaledConv(2, 4, 3, feature_group_count=0, rngs=r), "feature_group_count must"),
        (lambda r: ScaledConv(2, 4, (3, 3), rngs=r)(jnp.zeros((3, 2))), "2 spatial axes"),
        (lambda r: WeightMeanConvTranspose(2, 4, (3, 3), weight_mean="no", rngs=r), "weight_mean"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
