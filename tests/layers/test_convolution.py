"""Our convolution against ``lax``'s, in every form that a backend may choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax
from jax.sharding import PartitionSpec as P

from mimicnorm_jax.layers.convolution import convolve
from mimicnorm_jax.layers.convolution_forms import Geometry
from mimicnorm_jax.layers.storage import Codec
from mimicnorm_jax.models import create_model

SAME = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))
CASES = {
    "3x3": ((5, 6), (3, 3), 4, Geometry((1, 1), SAME, (1, 1))),
    "strided": ((7, 8), (3, 3), 4, Geometry((2, 2), SAME, (1, 1))),
    "1x1": ((4, 5), (1, 1), 4, Geometry((1, 1), NONE, (1, 1))),
    "1x1 strided": ((5, 4), (1, 1), 4, Geometry((2, 2), NONE, (1, 1))),
    "image below kernel": ((2, 2), (3, 3), 4, Geometry((1, 1), SAME, (1, 1))),
    "one side below": ((2, 9), (3, 3), 4, Geometry((2, 1), ((1, 2), (0, 1)), (1, 1))),
    "named padding": ((2, 2), (3, 3), 4, Geometry((1, 1), "SAME", (1, 1))),
    "depthwise": ((6, 6), (3, 3), 1, Geometry((2, 2), SAME, (1, 1), 4)),
    "dilated": ((7, 7), (3, 3), 4, Geometry((1, 1), SAME, (2, 2))),
}


ONE = Geometry((1, 1), SAME, (1, 1))


def padded(*sides):
    return ONE._replace(padding=sides)


# batch, extents, channels in and out, geometry; and what a CPU's program has of it, its result and
# both gradients together: convolutions, and matrix products (of tiles: 16 each)
TILES = {
    "all": (32, (4, 4), 192, 192, ONE, (1, 32)),
    "all, with the kernel's": (32, (4, 4), 256, 256, ONE, (0, 48)),
    "gradient of the kernel": (2, (16, 18), 64, 64, ONE, (2, 16)),
    "the kernel's, uneven padding": (2, (16, 18), 64, 64, padded((2, 0), (0, 2)), (2, 16)),
    "the kernel's, padding of columns": (2, (16, 18), 64, 64, padded((0, 0), (2, 2)), (2, 16)),
    "channels in and out differ": (32, (4, 4), 128, 256, ONE._replace(padding="SAME"), (1, 32)),
    "padding of columns": (64, (4, 4), 192, 192, padded((0, 0), (1, 1)), (1, 32)),
    "uneven padding": (32, (4, 4), 192, 192, padded((1, 1), (0, 2)), (1, 32)),
}
# what is not, for one reason each
NO_TILES = {
    "few tiles": (31, (4, 4), 256, 256, ONE, (3, 0)),
    "few tiles of the kernel's": (1, (16, 14), 128, 128, ONE, (3, 0)),
    "few channels": (32, (4, 4), 128, 255, ONE, (3, 0)),
    "few channels of the kernel's": (2, (16, 18), 63, 63, ONE, (3, 0)),
    "kernel's, in and out differ": (2, (16, 18), 64, 128, ONE, (3, 0)),
    "larger": (32, (4, 6), 192, 192, ONE, (3, 0)),
    "smaller": (256, (2, 2), 512, 512, ONE, (0, 27)),
    "many numbers": (257, (32, 32), 64, 64, ONE, (3, 0)),
    "odd padding": (64, (4, 4), 192, 192, padded((1, 2), (1, 1)), (3, 0)),
    "odd": (2, (17, 18), 64, 64, ONE, (3, 0)),
    "negative padding": (128, (4, 4), 192, 192, padded((-1, 1), (1, 1)), (3, 0)),
    "wide padding": (32, (4, 4), 192, 192, padded((3, 1), (1, 1)), (3, 0)),
    "strided": (64, (4, 4), 192, 192, ONE._replace(strides=(2, 2)), (3, 0)),
    "dilated": (
        64,
        (4, 4),
        192,
        192,
        padded((2, 2), (2, 2))._replace(kernel_dilation=(2, 2)),
        (3, 0),
    ),
    "groups": (32, (4, 4), 384, 192, ONE._replace(feature_group_count=2), (3, 0)),
    "precise": (32, (4, 4), 192, 192, ONE._replace(precision=lax.Precision.HIGHEST), (3, 0)),
}


def reference(x, kernel, geometry):
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.feature_group_count,
    )


def operands(extents, window, features_in, out=8, dtype=jnp.float64):
    x = jax.random.normal(jax.random.key(0), (3, *extents, 4), dtype)
    return x, jax.random.normal(jax.random.key(1), (*window, features_in, out), dtype)


def in_tiles(case, dtype=jnp.float64):
    batch, extents, inner, outer, geometry, _ = (TILES | NO_TILES)[case]
    x = jax.random.normal(jax.random.key(0), (batch, *extents, inner), dtype)
    inner //= geometry.feature_group_count
    return x, jax.random.normal(jax.random.key(1), (3, 3, inner, outer), dtype), geometry


@functools.partial(jax.jit, static_argnums=2)
def all_three(x, kernel, geometry):
    y, transpose = jax.vjp(lambda x, k: convolve(x, k, geometry), x, kernel)
    return y, transpose(y)


def convolutions_and_products(traced, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.convolution("), text.count("stablehlo.dot_general")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_lax(case, float64):
    extents, window, features, geometry = CASES[case]
    _assert_equal_to_lax(*operands(extents, window, features), geometry)


@pytest.mark.parametrize("case", TILES)
def test_values_and_gradients_in_tiles_are_those_of_lax(case, float64):
    _assert_equal_to_lax(*in_tiles(case))


@pytest.mark.parametrize("case", TILES | NO_TILES)
def test_what_is_computed_in_tiles_and_only_on_cpus(case):
    *_, geometry, expected = (TILES | NO_TILES)[case]
    operands_ = jax.eval_shape(lambda: in_tiles(case, jnp.float32)[:2])
    traced = jax.jit(all_three, static_argnums=2).trace(*operands_, geometry)
    assert convolutions_and_products(traced, "cpu") == expected
    for platform in ("tpu", "cuda"):
        assert convolutions_and_products(traced, platform) == (3, 0)


def test_images_of_no_pixels_or_any_number_are_convolved():
    """Where there is no tile, and where nobody knows how many."""
    x, kernel, geometry = in_tiles("all", jnp.float32)
    results = all_three(jnp.zeros((0, 4, 4, 192)), kernel, geometry)
    assert [y.shape for y in jax.tree.leaves(results)] == [(0, 4, 4, 192)] * 2 + [kernel.shape]
    valid = geometry._replace(padding="VALID")
    assert convolve(jnp.zeros((64, 2, 2, 192)), kernel, valid).shape == (64, 0, 0, 192)
    # a number of images nobody knows yet
    (batch,) = export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, 4, 4, 192), jnp.float32)
    of_any = export.export(jax.jit(lambda x: convolve(x, kernel, geometry)))(image)
    np.testing.assert_allclose(of_any.call(x), convolve(x, kernel, geometry), rtol=1e-3, atol=1e-3)


def test_a_gradient_of_the_input_alone_is_all_that_is_computed():
    """And codes, which are there to save memory, do not make up for it with tiles."""
    x, kernel, geometry = in_tiles("gradient of the kernel", jnp.float32)
    energy = lambda x, k, codec=None: jnp.sum(convolve(x, k, geometry, codec=codec) ** 2)  # noqa: E731
    of_input = jax.jit(jax.grad(energy)).trace(x, kernel)
    assert convolutions_and_products(of_input, "cpu") == (2, 0)
    encoded = jax.jit(jax.grad(lambda x, k: energy(x, k, Codec(8, False)), (0, 1)))
    assert convolutions_and_products(encoded.trace(x, kernel), "cpu") == (3, 0)


def test_tiles_are_nearly_as_accurate_as_the_direct_sum(float64):
    """In float32; and with bfloat16, where they would not be, there are none."""
    x, kernel, geometry = in_tiles("all, with the kernel's", jnp.float32)
    wide = x.astype(jnp.float64), kernel.astype(jnp.float64)
    y, transpose = jax.vjp(lambda x, k: reference(x, k, geometry), *wide)
    exact = (y, *transpose(y))
    y, transpose = jax.vjp(lambda x, k: convolve(x, k, geometry), x, kernel)
    for ours, theirs in zip((y, *transpose(exact[0].astype(jnp.float32))), exact, strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-6 * np.linalg.norm(theirs)
    short = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    traced = jax.jit(all_three, static_argnums=2).trace(*short, geometry)
    assert convolutions_and_products(traced, "cpu") == (3, 0)


def _assert_equal_to_lax(x, kernel, geometry):
    def values_and_gradients(convolution):
        def of(x, kernel):
            y, transpose = jax.vjp(lambda x, k: convolution(x, k, geometry), x, kernel)
            return y, transpose(jax.random.normal(jax.random.key(2), y.shape, jnp.float64))

        return jax.tree.leaves(jax.jit(of)(x, kernel))  # quicker than operation by operation

    pairs = zip(values_and_gradients(convolve), values_and_gradients(reference), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("codec", [None, Codec(8, False)])
def test_an_offset_is_added_before_the_padding(codec, float64):
    x, kernel = operands((5, 5), (3, 3), 4)
    geometry, offset = CASES["3x3"][3], jnp.asarray(0.7)

    def ours(offset):
        return jnp.sum(jnp.sin(convolve(x, kernel, geometry, offset=offset, codec=codec)))

    def theirs(offset):
        return jnp.sum(jnp.sin(reference(x + offset, kernel, geometry)))

    for mine, other in (
        (ours(offset), theirs(offset)),
        (jax.grad(ours)(offset), jax.grad(theirs)(offset)),
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-10)


@pytest.mark.parametrize("codec", [None, Codec(8, False), Codec(4, False)])
@pytest.mark.parametrize("case", ["3x3", "1x1", "tiles"])
def test_the_gradient_of_a_shared_kernel_is_summed_over_the_devices(case, codec, float64):
    if case == "tiles":
        x, kernel, geometry = in_tiles("all")
    else:
        extents, window, features, geometry = CASES[case]
        _, kernel = operands(extents, window, features)
        x = jax.random.normal(jax.random.key(0), (8, *extents, 4), jnp.float64)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(operands, x):
        kernel, scale = operands
        return jnp.sum(jnp.sin(convolve(x, kernel, geometry, scale=scale, codec=codec)))

    def shared(operands, x):
        return jax.grad(lambda o: lax.psum(loss(o, x), "data"))(operands)

    mapped = jax.jit(jax.shard_map(shared, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    operands_ = (kernel, jnp.asarray(0.7))
    for ours, theirs in zip(mapped(operands_, x), jax.grad(loss)(operands_, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_kernel_spread_over_devices_that_share_the_input(float64):
    """As with tensor parallelism: every device has some of the output channels."""
    x, kernel = operands((5, 5), (3, 3), 4)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, CASES["3x3"][3])))

    def spread(x, kernel):
        return jax.grad(lambda x: lax.psum(loss(x, kernel), "model"))(x)

    specs = (P(), P(None, None, None, "model"))
    mapped = jax.jit(jax.shard_map(spread, mesh=mesh, in_specs=specs, out_specs=P()))
    np.testing.assert_allclose(mapped(x, kernel), jax.grad(loss)(x, kernel), rtol=1e-10)


def test_on_cpu_neither_1x1_nor_small_images_reach_the_slow_convolutions():
    for case in ("1x1", "image below kernel"):
        extents, window, features, geometry = CASES[case]
        x, kernel = operands(extents, window, features, dtype=jnp.float32)
        gradients = jax.grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k, geometry))), (0, 1))  # noqa: B023
        text = jax.jit(gradients).lower(x, kernel).as_text()
        assert "stablehlo.convolution" not in text, case
        assert "stablehlo.dot_general" in text, case


def test_tiles_are_in_memory_one_after_the_other():
    """And the kernel's gradient is there before the layer below begins."""
    x, kernels = jnp.zeros((8, 32, 32, 64)), [jnp.zeros((3, 3, 64, 64))] * 5

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(convolve(x, kernel, ONE))
        return jnp.sum(x)

    compiled = jax.jit(jax.grad(loss)).lower(kernels, x).compile()
    # five inputs, one output, gradient and copy; without order five or six more
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * x.nbytes


def test_the_gradient_of_a_kernel_in_tiles_keeps_no_padded_copy():
    """A quarter of both operands is there at a time: half of one, where they are as large."""
    x, kernel = jnp.zeros((8, 32, 32, 64)), jnp.zeros((3, 3, 64, 64))

    def of_kernel(kernel, x, gradient):
        return jax.vjp(lambda kernel: convolve(x, kernel, ONE), kernel)[1](gradient)

    compiled = jax.jit(of_kernel).lower(kernel, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * x.nbytes


def test_on_cpu_the_input_is_not_transposed_before_its_gradient_is_due():
    """Memory of five convolutions in a row: of each the input is kept once, not twice."""
    x = jnp.zeros((16, 32, 32, 16))
    kernels = [jnp.zeros((3, 3, 16, 16))] * 6
    geometry = CASES["3x3"][3]

    def memory(convolution):
        def loss(kernels):
            y = x
            for kernel in kernels:
                y = jax.nn.relu(convolution(y, kernel, geometry))
            return jnp.sum(jnp.square(y))

        return jax.jit(jax.grad(loss)).lower(kernels).compile().memory_analysis().temp_size_in_bytes

    assert memory(convolve) < 0.8 * memory(reference)


def test_a_tpu_takes_for_the_kernel_gradient_what_its_convolution_takes(monkeypatch):
    """bfloat16 of a float32 input, and everybody else the input itself."""
    x, kernel = operands((5, 5), (3, 3), 4, dtype=jnp.float32)
    geometry = CASES["3x3"][3]

    def kernel_gradient(x):
        return jax.grad(lambda k: jnp.sum(jnp.sin(convolve(x, k, geometry))))(kernel)

    exact = kernel_gradient(x)

    def on_tpu(*operands, default, tpu=None, **_):
        return (tpu or default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", on_tpu)
    narrow = x.astype(jnp.bfloat16).astype(jnp.float32)
    cotangent = jnp.cos(reference(x, kernel, geometry))
    expected = jax.vjp(lambda k: reference(narrow, k, geometry), kernel)[1](cotangent)[0]
    np.testing.assert_allclose(kernel_gradient(x), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - exact).max() > 1e-3


def test_what_a_norm_puts_out_is_not_kept_narrow():
    """It is computed again; else our BatchNorm would be heavier than Flax's."""

    def backward(method):
        model = create_model(
            "resnet8", method=method, num_classes=2, image_size=8, rngs=nnx.Rngs(0)
        )
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            return nnx.merge(graph, params, rest, copy=True)(jnp.zeros((2, 8, 8, 3))).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params))

    assert "bf16" not in backward("batchnorm")
    assert "bf16" in backward("mimicnorm")


def test_what_a_tpu_keeps_of_float32_is_bfloat16_in_its_program_only():
    x, kernel = operands((5, 5), (3, 3), 4, dtype=jnp.float32)
    geometry = CASES["3x3"][3]
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(convolve(x, k, geometry)))))
    traced = gradient.trace(kernel)
    uses = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("xbf16>) -> tensor")
        for platform in ("tpu", "cpu")
    }
    assert uses["tpu"] > uses["cpu"] == 0
