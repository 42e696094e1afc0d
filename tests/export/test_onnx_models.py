"""ONNX models as a whole: what is fused, what extents are called, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mimicnorm_jax.errors import UserError
from tests.export.test_onnx_graph import (
    IMAGES,
    KERNEL,
    MATRIX,
    REDUCTIONS,
    TEXT,
    VECTOR,
    _broadcasting,
    compare,
    conv,
    operators,
    run,
    sample,
    written,
)

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from mimicnorm_jax.export.onnx_graph import to_onnx  # noqa: E402

__all__ = ["_broadcasting"]


def test_biases_are_of_the_convolution_and_one_transpose_is_enough():
    def function(x):
        x = jax.nn.relu(conv(x, KERNEL[..., :4]) + VECTOR)
        x = nnx.max_pool(x + conv(x, KERNEL[..., :4]), (2, 2), (2, 2))
        return x.mean((1, 2)) @ MATRIX + jnp.arange(5.0)

    x = sample(IMAGES)
    model = written(function, x)
    compare(model, function, x)
    assert operators(model) == {
        "Transpose": 1,
        "Conv": 2,
        "Relu": 1,
        "Add": 1,
        "MaxPool": 1,
        "ReduceMean": 1,
        "Gemm": 1,
    }
    inputs = [len(node.input) for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert inputs == [3, 2, 3]


def test_a_bias_stays_where_the_sum_without_it_is_read_too():
    def function(x):
        y = conv(x)
        return y, y + jnp.arange(6.0)

    x = sample(IMAGES)
    model = written(function, x)
    compare(model, function, x)
    assert operators(model)["Add"] == 1


def test_constants_are_computed_and_unused_ones_left_out():
    large = np.ones((100, 4), np.float32)

    def function(x):
        _ = x * large.sum()
        return x + jnp.sin(VECTOR) * 2

    x = sample((3, 4))
    model = written(function, x)
    compare(model, function, x)
    assert operators(model) == {"Add": 1}
    assert [list(constant.dims) for constant in model.graph.initializer] == [[4]]


def test_extents_follow_from_the_input():
    def function(x):
        a, b = x.shape
        return x.reshape(b, a), jnp.arange(a * a + b // 2) + (a + 1) % 3

    model = written(function, sample((2, 3)), shapes=[jax.export.symbolic_shape("a, 3*b + 2")])
    for shape in ((2, 5), (7, 8)):
        compare(model, function, sample(shape))


def test_describes_itself():
    model = written(lambda x: x + 1, sample(IMAGES), shapes=[jax.export.symbolic_shape(TEXT)])
    extents = model.graph.input[0].type.tensor_type.shape.dim
    assert [extent.dim_param or extent.dim_value for extent in extents] == ["b", "4*h", "2*w", 4]
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    assert model.producer_name == "mimicnorm-jax"
    assert [output.name for output in model.graph.output] == ["y0"]


def test_later_opsets():
    x = sample((3, 4))
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    function = REDUCTIONS["min"]
    model = to_onnx(
        lambda x: (function(x[None, :, None]), x.mean(1), x.prod(0)),
        [spec],
        input_names=["x0"],
        output_names=["a", "b", "c"],
        opset=18,
    )
    found = run(model, x)
    wanted = x[None], x.mean(1), x.prod(0)
    np.testing.assert_allclose(found[0], x[None, :, None].min(2), rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x), r"no rule for the primitive sort \(.*test_onnx_models.py:\d+"),
        (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), "primitive while"),
        (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), "no cond whose branch depends"),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 1), (0, 0, 0))), "no pad between elements"),
        (lambda x: x[x.argmax().astype(jnp.int32) % 3], "depends on the input|may be outside"),
    ],
)
def test_refuses(function, message):
    with pytest.raises(UserError, match=message):
        written(function, sample((3, 4)))


def test_refuses_names_that_do_not_match():
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(UserError, match="1 arrays that the function returns have 2 names: a, b"):
        to_onnx(jnp.sin, [spec], input_names=["x"], output_names=["a", "b"])
    with pytest.raises(UserError, match="1 arrays that the function takes have 0 names"):
        to_onnx(jnp.sin, [spec], input_names=[], output_names=["a"])
    with pytest.raises(UserError, match="names of the arrays must differ: x, x"):
        to_onnx(jnp.sin, [spec], input_names=["x"], output_names=["x"])


def test_outputs_may_be_called_like_nodes():
    x = sample((3,))
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs = ["cos", "sin", "x"]
    model = to_onnx(
        lambda x: (jnp.sin(x), jnp.cos(x) + jnp.sin(x), x),
        [spec],
        input_names=["x0"],
        output_names=outputs,
    )
    for found, wanted in zip(run(model, x), (np.sin(x), np.cos(x) + np.sin(x), x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert [output.name for output in model.graph.output] == outputs
