"""Whole networks as ONNX, run by onnxruntime: those of the package, and converted ones."""

import importlib
import json
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax import export_onnx
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools import export
from tests.convert.test_networks import ALL
from tests.export.test_files import ABOUT, evaluated, model_of, normalized, perturbed, pixels
from tests.tools.test_export import images, runs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

__all__ = ["images", "runs"]  # fixtures
LARGE = {"stem": "large"}
FREE = ("batch", "height", "width", 3)


def session_of(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def operations(file):
    return [node.op_type for node in onnx.load(file).graph.node]


def assert_is(model, file, *inputs):
    session = session_of(file)
    for x in inputs:
        expected = evaluated(model, x)
        (found,) = session.run(None, {"images": x})
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("name", "method", "size", "options", "shape"),
    [
        ("mlp", "mimicnorm", 16, {}, ("batch", 16, 16, 3)),
        ("resnet8", "mimicnorm", 16, {}, FREE),
        ("resnet8", "fixup", 16, {}, FREE),
        ("resnet8", "batchnorm", 16, {}, FREE),
        ("shufflenetv2_x0_5", "mimicnorm", 32, LARGE, FREE),
        ("squeezenet", "mimicnorm", 64, LARGE, FREE),
        *(
            pytest.param(*network, marks=pytest.mark.long)
            for network in (
                ("resnet8", "weightstandardization", 16, {}, FREE),
                ("resnet8", "skipinit", 16, {}, FREE),
                ("vgg11", "mimicnorm", 32, {}, ("batch", 32, 32, 3)),
                ("vgg16", "batchnorm", 32, {}, ("batch", 32, 32, 3)),
                ("resnet18", "mimicnorm", 64, LARGE, FREE),
                ("resnet18", "mimicnorm", 32, {}, FREE),
                ("resnet34", "mimicnorm", 32, {}, FREE),
                ("resnet50", "mimicnorm", 64, LARGE, FREE),
                ("squeezenet", "mimicnorm", 32, {}, FREE),
                ("shufflenetv2_x1_0", "batchnorm", 32, {}, FREE),
            )
        ),
    ],
)
def test_onnxruntime_computes_the_network(name, method, size, options, shape, tmp_path):
    if method == "weightstandardization":
        method = mimicnorm_jax.create_method(method, groups=4)
    model, file = model_of(name, method, size=size, **options), tmp_path / "network.onnx"
    exported = export_onnx(model, normalized(pixels(size=size)), file=file)
    assert exported.input_shape == shape
    assert exported.difference < 1e-4
    inputs = [normalized(pixels(1, size))]
    if isinstance(shape[1], str):
        inputs.append(normalized(pixels(2, size + size // 4)))
    assert_is(model, file, *inputs)
    found = operations(file)
    assert "BatchNormalization" not in found
    if name.startswith("resnet") and not isinstance(method, mimicnorm_jax.Method):
        assert found.count("Transpose") == 1  # to channels first, once
        assert "Expand" not in found
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ALL)
def test_converted_networks(name, tmp_path):
    module = importlib.import_module(f"tests.convert.networks.{name}")
    network = module.Network(num_classes=7, channels=3, rngs=nnx.Rngs(0))
    x, file = normalized(pixels(size=32)), tmp_path / "network.onnx"
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = mimicnorm_jax.convert(network, x, logits=lambda outputs: outputs)
        model = perturbed(model)
        exported = export_onnx(model, x, file=file)
        assert exported.input_shape[0] == "batch"
        model.eval()
        expected = jax.tree.leaves(model(x[:3]))
    found = session_of(file).run(None, {"images": x[:3]})
    for one, other in zip(found, expected, strict=True):
        scale = max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=1e-4 * scale)


def test_paddings_that_depend_on_the_size_leave_multiples_of_the_stride_free(tmp_path):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)  # SAME, by default
            self.second = nnx.Conv(4, 4, (4, 4), strides=2, rngs=rngs)
            self.dense = nnx.Linear(4, 7, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.second(nnx.relu(self.first(x))).mean((1, 2)))

    model, file = Network(nnx.Rngs(0)), tmp_path / "network.onnx"
    exported = export_onnx(model, normalized(pixels()), file=file)
    assert exported.input_shape == ("batch", "4*height", "4*width", 3) and not exported.note
    assert_is(model, file, normalized(pixels(1, 16)), normalized(pixels(3, 28)))


def test_what_onnxruntime_refuses_of_free_extents_is_written_for_one_size(monkeypatch, tmp_path):
    module = sys.modules["mimicnorm_jax.export.onnx"]
    runner = module._runner

    def picky(library, content, prepared):
        if isinstance(prepared.shape[1], str):
            raise UserError("onnxruntime refuses the file: too free")
        return runner(library, content, prepared)

    monkeypatch.setattr(module, "_runner", picky)
    exported = export_onnx(model_of(), normalized(pixels()), file=tmp_path / "network.onnx")
    assert exported.input_shape == ("batch", 16, 16, 3)
    assert exported.note.endswith("onnxruntime refuses the file: too free")


def test_pixels_are_normalized_inside_and_metadata_tell(tmp_path):
    model, file = model_of(), tmp_path / "network.onnx"
    export_onnx(model, pixels(), file=file, about=ABOUT, normalize=True)
    session = session_of(file)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (found,) = session.run(None, {"images": pixels(3, 24)})
    expected = evaluated(model, normalized(pixels(3, 24)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list("abcdefg")
    assert json.loads(said["temperature"]) == 0.5
    assert json.loads(said["input"])["mean"] == [0.4, 0.5, 0.6]
    assert json.loads(said["versions"])["jax"] == jax.__version__
    assert json.loads(said["difference"]) < 1e-4


def test_a_static_file_has_no_free_extent(tmp_path):
    file = tmp_path / "network.onnx"
    export_onnx(model_of(), normalized(pixels(1)), file=file, symbolic=False)
    assert session_of(file).get_inputs()[0].shape == [1, 16, 16, 3]
    assert "Shape" not in operations(file)


def test_what_differs_is_not_kept(monkeypatch, tmp_path):
    module = sys.modules["mimicnorm_jax.export.onnx"]
    runner = module._runner
    monkeypatch.setattr(
        module, "_runner", lambda *args: lambda x: [leaf + 0.01 for leaf in runner(*args)(x)]
    )
    with pytest.raises(UserError, match="what onnxruntime makes of it differs"):
        export_onnx(model_of(), normalized(pixels()), file=tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_a_missing_library_is_named(library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install .*\[export\]"):
        export_onnx(model_of(), normalized(pixels()), file=tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_an_operation_without_a_rule_is_named(tmp_path):
    def network(x):
        return jax.numpy.fft.rfft(x).real.sum((1, 2))

    class Network(nnx.Module):
        def __call__(self, x):
            return network(x)

    with pytest.raises(UserError, match=r"ONNX.* fft"):
        export_onnx(Network(), normalized(pixels()), file=tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_of_a_run(runs, tmp_path, capsys):
    out = tmp_path / "network.onnx"
    run = runs["mimicnorm"]
    assert export.main([str(run), "--format=onnx", f"--out={out}", "--normalize"]) == 0
    assert f"{out}: images (batch, height, width, 3)" in capsys.readouterr().out
    network = mimicnorm_jax.load(run)
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    (found,) = session_of(out).run(None, {"images": x})
    np.testing.assert_allclose(found, network.logits(x), atol=1e-5)
