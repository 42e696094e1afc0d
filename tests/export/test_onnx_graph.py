"""Functions of JAX as ONNX models: each rule against onnxruntime, and what a graph looks like."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from mimicnorm_jax.export.onnx_graph import to_onnx  # noqa: E402

RANDOM = np.random.default_rng(0)
IMAGES = (2, 8, 6, 4)
TEXT = "b, 4*h, 2*w, 4"
KERNEL = RANDOM.standard_normal((3, 3, 4, 6)).astype(np.float32)
DEPTHWISE = RANDOM.standard_normal((3, 3, 1, 8)).astype(np.float32)
MATRIX = RANDOM.standard_normal((4, 5)).astype(np.float32)
VECTOR = RANDOM.standard_normal(4).astype(np.float32)
NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def _broadcasting():
    with jax.numpy_rank_promotion("allow"):
        yield


def sample(shape, dtype=np.float32):
    if dtype == np.bool_:
        return RANDOM.random(shape) < 0.5
    if np.issubdtype(dtype, np.integer):
        return RANDOM.integers(0, 7, shape).astype(dtype)
    return (2 * RANDOM.standard_normal(shape)).astype(dtype)


def written(function, *arrays, shapes=None):
    shapes = shapes or [array.shape for array in arrays]
    specs = [
        jax.ShapeDtypeStruct(shape, array.dtype)
        for shape, array in zip(shapes, arrays, strict=True)
    ]
    count = len(jax.tree.leaves(jax.eval_shape(function, *specs)))
    return to_onnx(
        function,
        specs,
        input_names=[f"x{number}" for number in range(len(arrays))],
        output_names=[f"y{number}" for number in range(count)],
    )


def run(model, *arrays):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{number}": array for number, array in enumerate(arrays)})


def compare(model, function, *arrays):
    expected = jax.tree.leaves(function(*map(jnp.asarray, arrays)))
    for found, wanted in zip(run(model, *arrays), expected, strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        # of the largest: a convolution's sums cancel
        largest = max(1.0, float(np.abs(np.asarray(wanted, np.float64)).max(initial=0.0)))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * largest)


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def conv(x, kernel=KERNEL, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=NUMBERS, **options)


UNARY = {
    "abs": jnp.abs,
    "cbrt": jnp.cbrt,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "is_finite": lambda x: jnp.isfinite(x / jnp.maximum(jnp.floor(x), 0)),
    "logistic": jax.nn.sigmoid,
    "log": lambda x: jnp.log(jnp.abs(x)),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "neg": jnp.negative,
    "pow": lambda x: jnp.abs(x) ** 1.3,
    "power 2": lambda x: lax.integer_pow(x, 2),
    "power 3": lambda x: lax.integer_pow(x, 3),
    "power 4": lambda x: lax.integer_pow(x, 4),
    "power 5": lambda x: lax.integer_pow(x, 5),
    "power -1": lambda x: lax.integer_pow(x, -1),
    "round to even": lambda x: jnp.round(jnp.round(x * 2) / 2),
    "round away": lambda x: lax.round(jnp.round(x * 2) / 2),
    "rsqrt": lambda x: lax.rsqrt(jnp.abs(x)),
    "sign": jnp.sign,
    "sin": jnp.sin,
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "square": jnp.square,
    "tanh": jnp.tanh,
    "clamp": lambda x: jnp.clip(x, -0.5, 0.7),
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "stop_gradient": lambda x: lax.stop_gradient(x) + 1,
    "barrier": lambda x: lax.optimization_barrier((x, x + 1)),
    "to int": lambda x: x.astype(jnp.int32),
    "to half": lambda x: x.astype(jnp.float16),
    "logic": lambda x: (~(x > 0) | (x > 1)) & (x < 1.5) ^ (x <= 0.1),
    "not equal": lambda x: jnp.floor(x) != 0,
    "remainder": lambda x: lax.rem(x, jnp.full_like(x, 0.7)),
}
SHAPES = {
    "reshape splits": lambda x: x.reshape(*x.shape[:3], 2, 2).transpose(0, 1, 2, 4, 3),
    "reshape joins": lambda x: x.reshape(x.shape[0], -1, 4),
    "reshape all": lambda x: x.reshape(-1),
    "shuffle": lambda x: jnp.stack([x, x + 1], axis=-1).reshape(*x.shape[:3], -1),
    "ones": lambda x: jnp.squeeze(x[:, None, ..., :1], axis=(1, 4)),
    "transpose": lambda x: x.transpose(3, 0, 2, 1),
    "concatenate": lambda x: jnp.concatenate([x, jnp.ones_like(x[..., :1]), 2 * x], axis=-1),
    "split": lambda x: jnp.split(x, [1, 3], axis=-1),
    "slice": lambda x: x[..., 1:3],
    "every second": lambda x: x[:, ::2, 1::2],
    "static indices": lambda x: x[..., jnp.array([2, 0, 0])],
    "last": lambda x: (x[..., -1], x[..., -2:]),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 3)), constant_values=0.5),
    "crop": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 0), (-1, -1, 0), (1, -2, 0))),
    "reverse": lambda x: lax.rev(x, (1, 3)),
    "choice of booleans": lambda x: jnp.where(x[..., :1] > 0, x > 0.5, x < -0.5),
    "first pixel": lambda x: x[:, 0, 0],
    "last row": lambda x: x[:, -1],
    "causal mask": lambda x: jnp.where(jnp.tril(jnp.ones(x.shape[1:3], bool)), x[..., 0], -1.0),
    "argmax of booleans": lambda x: jnp.argmax(x > 0.3, axis=-1),
    "dynamic index": lambda x: jnp.take(x, jnp.argmax(x[0, 0, 0]) + 2, axis=-1, mode="clip"),
    "repeat": lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 3, axis=2),
    "nearest": lambda x: jax.image.resize(
        x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], 4), "nearest"
    ),
    "bilinear": lambda x: jax.image.resize(
        x, (x.shape[0], 2 * x.shape[1], x.shape[2], 4), "bilinear"
    ),
    "count": lambda x: x + jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None],
    "lazy reshape": lambda x: jnp.broadcast_to(x[:, :1], x.shape).reshape(x.shape[0], -1),
    "lazy sum": lambda x: jnp.broadcast_to(x.max(1, keepdims=True), x.shape).sum((1, 3)),
    "lazy constant": lambda x: jnp.broadcast_to(VECTOR, x.shape),
    "lazy concatenate": lambda x: jnp.concatenate([x, jnp.broadcast_to(x[:, :1], x.shape)], 1),
}
REDUCTIONS = {
    "mean": lambda x: x.mean((1, 2)),
    "variance": lambda x: x.var((1, 2), keepdims=True),
    "max": lambda x: x.max((1, 3)),
    "min": lambda x: x.min(2),
    "prod": lambda x: x.prod(3),
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(1),
    "all": lambda x: ((x > -4).all(1), (x > 4).any((2, 3))),
    "cumsum": lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True)),
    "squeeze and excite": lambda x: (
        x * jax.nn.sigmoid(x.mean((1, 2)) @ MATRIX[:, :4])[:, None, None]
    ),
}
POOLS = {
    "max": lambda x: nnx.max_pool(x, (3, 2), (2, 1), "SAME"),
    "max padded": lambda x: nnx.max_pool(x, (3, 3), (2, 2), ((1, 0), (0, 1))),
    "average": lambda x: nnx.avg_pool(x, (2, 2), (2, 2)),
    "average padded": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 0))),
    "min": lambda x: nnx.min_pool(x, (2, 2), (1, 1)),
    "start": lambda x: lax.reduce_window(
        x, 0.5, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (0, 0), (0, 0))
    ),
    "channels": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"),
    "three axes": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 2), (1, 1, 2, 1), "VALID"
    ),
    "all axes": lambda x: lax.reduce_window(
        x.max(3), -jnp.inf, lax.max, (2, 2, 2), (1, 1, 2), "VALID"
    ),
}
CONVS = {
    "strides": lambda x: conv(x, window_strides=(2, 1), padding=((0, 1), (2, 0))),
    "dilation": lambda x: conv(x, rhs_dilation=(2, 1)),
    "depthwise": lambda x: conv(x, DEPTHWISE, feature_group_count=4),
    "groups": lambda x: conv(x, KERNEL[:, :, :2], feature_group_count=2),
    "computed kernel": lambda x: conv(x, KERNEL * x.mean()),
    "transposed": lambda x: conv(x, lhs_dilation=(2, 2), padding=((1, 2), (2, 2))),
    "transposed, grouped": lambda x: conv(
        x, KERNEL[:, :, :2], lhs_dilation=(2, 1), padding=((2, 1), (0, 1)), feature_group_count=2
    ),
    "transposed, beyond": lambda x: conv(x, lhs_dilation=(2, 2), padding=((4, 3), (2, 5))),
    "one axis": lambda x: lax.conv_general_dilated(
        x[:, 0], KERNEL[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "dense": lambda x: x @ MATRIX + VECTOR[0],
    "dense after": lambda x: jax.nn.relu(conv(x, KERNEL[..., :4])) @ MATRIX,
    "computed matrix": lambda x: x @ (MATRIX * x.mean()),
    "attention": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, 2 * x),
    "all axes": lambda x: jnp.einsum("bhwc,bhwc->b", x, x + 1),
    "outer": lambda x: jnp.einsum("bc,bd->bcd", x[:, 0, 0], x[:, 1, 1]),
}
MIXED = {
    "constants": lambda x: conv(x) * jnp.arange(6.0) + jnp.arange(48.0).reshape(8, 1, 6),
    "concatenate": lambda x: jnp.concatenate([conv(x, KERNEL[..., :4]), x], axis=-1),
    "slice": lambda x: conv(x)[:, 1:, :, ::2],
    "operands": lambda x: conv(x, KERNEL[..., :4]) * x.mean(2, keepdims=True) - x,
    "reshape": lambda x: conv(x).reshape(x.shape[0], -1, 3).sum(1),
    "argmax": lambda x: conv(x).argmax(3),
    "pools": lambda x: nnx.avg_pool(nnx.max_pool(conv(x), (2, 2)), (2, 2)).mean((1, 2)),
    "pad": lambda x: jnp.pad(lax.rev(conv(x), (1,)), ((0, 0), (0, 0), (1, 0), (0, 2))),
    "count": lambda x: conv(x) * jnp.arange(x.shape[2], dtype=jnp.float32)[:, None],
    "select": lambda x: jnp.where(conv(x, KERNEL[..., :4]) > 0, x, VECTOR),
}
CALLS = {
    "jit": jax.jit(lambda x: x + 1),
    "remat": jax.checkpoint(lambda x: jnp.sin(x) * 2),
    "scan": lambda x: lax.scan(lambda c, m: (jnp.tanh(c * m), c.sum((1, 2))), x, MATRIX.T[:3]),
    "scan back": lambda x: lax.scan(
        lambda c, p: (c + p[0] * p[1], c), x[0], (x, x + 1), reverse=True
    )[0],
    "cond": lambda x: lax.cond(jnp.asarray(1), jnp.sin, jnp.cos, x),
    "pytree": lambda x: {"b": (x + 1, x), "a": VECTOR, "c": x + 1},
}


@pytest.mark.parametrize("name", UNARY)
def test_elementwise(name):
    x = sample((3, 7))
    compare(written(UNARY[name], x), UNARY[name], x)


@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "div", "max", "min", "atan", "eq", "ge", "gt", "le", "lt", "ne"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_of_two_operands(name, dtype):
    def function(x, y):
        return lax.atan(x / y) if name == "atan" else getattr(lax, name)(x, y)

    arrays = sample((3, 7), dtype), sample((3, 7), dtype) * 2 + 1
    if name == "atan" and dtype != np.float32:
        arrays = tuple(map(np.float32, arrays))
    compare(written(function, *arrays), function, *arrays)


@pytest.mark.parametrize(
    "function",
    [
        *SHAPES.values(),
        *REDUCTIONS.values(),
        *POOLS.values(),
        *CONVS.values(),
        *MIXED.values(),
    ],
    ids=[
        f"{kind} {name}"
        for kind, functions in [
            ("shape", SHAPES),
            ("reduction", REDUCTIONS),
            ("pool", POOLS),
            ("conv", CONVS),
            ("mixed", MIXED),
        ]
        for name in functions
    ],
)
def test_of_images(function):
    """Of fixed and of symbolic extents; these also of another size than the smallest."""
    x = sample(IMAGES)
    compare(written(function, x), function, x)
    if function is MIXED["constants"]:  # is as large as the images
        return
    model = written(function, x, shapes=[jax.export.symbolic_shape(TEXT)])
    for shape in (IMAGES, (3, 12, 10, 4)):
        x = sample(shape)
        compare(model, function, x)


@pytest.mark.parametrize("name", CALLS)
def test_inner_programs(name):
    x = sample((3, 2, 2, 4)) if name == "scan" else sample((3, 4))
    compare(written(CALLS[name], x), CALLS[name], x)


def test_normalizes_images_of_bytes():
    def function(x):
        return conv((x.astype(jnp.float32) / 255 - VECTOR) / 2)

    x = sample(IMAGES, np.uint8)
    compare(written(function, x), function, x)
