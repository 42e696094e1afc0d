"""Weights of torchvision and timm in our networks: PyTorch's own logits are committed."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mimicnorm_jax import create_model, load_torch_weights
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.methods import create_method
from mimicnorm_jax.weights.layers import layers_of
from tests.weights.generated import images, state_dict, unpacked

REFERENCE = json.loads(pathlib.Path(__file__).with_name("torchvision_reference.json").read_text())
OURS = {"shufflenet_v2_x1_0": "shufflenetv2_x1_0", "vgg16_bn": "vgg16"}


def tensors_of(name):
    return state_dict(unpacked(REFERENCE[name]["shapes"]))


def model_of(name, method, *, num_classes=1000, size=None, **options):
    network = OURS.get(name, name)
    if not network.startswith("vgg"):
        options = {"stem": "large"} | options
    size = size or REFERENCE[name]["size"]
    rngs = nnx.Rngs(0)
    common = {"num_classes": num_classes, "image_size": size, "rngs": rngs}
    return create_model(network, method=method, **common, **options)


def logits_of(model, x):
    model.eval()
    return np.asarray(nnx.jit(lambda model, x: model(x))(model, x))


def saved(tensors, path):
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def assert_torchs_logits(name, method, folder, **options):
    model = model_of(name, method, **options)
    report = load_torch_weights(model, saved(tensors_of(name), folder / "weights.safetensors"))
    assert set(report.loaded) == set(layers_of(model))
    assert not report.new_classifier and not report.left_out
    expected = np.array(REFERENCE[name]["logits"])
    found = logits_of(model, images(REFERENCE[name]["size"]))[:, : expected.shape[1]]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["batchnorm", "lastbn", pytest.param("nonorm", marks=pytest.mark.long)]
)
def test_resnet18_has_pytorchs_logits(method, tmp_path):
    assert_torchs_logits("resnet18", method, tmp_path)


def test_shufflenet_has_pytorchs_logits(tmp_path):
    assert_torchs_logits("shufflenet_v2_x1_0", "batchnorm", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("method", ["batchnorm", "lastbn"])
@pytest.mark.parametrize("name", ["resnet50", "shufflenet_v2_x1_0", "vgg16_bn", "vgg16"])
def test_the_others_have_pytorchs_logits(name, method, tmp_path):
    if name == "vgg16":
        method = "nonorm" if method == "batchnorm" else "lastbn"
    assert_torchs_logits(name, method, tmp_path)


@pytest.mark.long
def test_the_biases_of_vgg_go_where_there_are_none_too(tmp_path):
    for conv_bias in (True, False):
        method = create_method("batchnorm", conv_bias=conv_bias)
        assert_torchs_logits("vgg16_bn", method, tmp_path)


@functools.cache
def resnet18(method, num_classes=1000):
    """One that tests do not change."""
    return model_of("resnet18", method, num_classes=num_classes)


def state_of(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


def test_a_classifier_of_other_classes_stays_and_is_said(tmp_path):
    model = model_of("resnet18", "lastbn", num_classes=10)
    before = np.array(model.classifier.kernel[...])
    report = load_torch_weights(model, saved(tensors_of("resnet18"), tmp_path / "w.safetensors"))
    assert report.new_classifier
    assert report.left_out == ("fc.weight", "fc.bias")
    assert "classifier" not in report.loaded and len(report.loaded) == 20
    assert "the file's has other classes" in str(report)
    np.testing.assert_array_equal(model.classifier.kernel[...], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("layer3.0.bn2.running_var"),
            r"missing: layer3\.0\.bn2\.running_var; by the names in it, that is resnet18",
        ),
        (lambda t: t.update({"head.weight": np.ones((2, 2), "f4")}), r"not in the network: head"),
        (
            lambda t: t.update({"conv1.weight": np.ones((32, 3, 7, 7), "f4")}),
            r"conv1\.weight has the shape \(32, 3, 7, 7\), and the network needs \(64, 3, 7, 7\)",
        ),
    ],
)
def test_what_does_not_match_is_listed_and_nothing_changes(change, message, tmp_path):
    tensors = tensors_of("resnet18")
    change(tensors)
    model = resnet18("batchnorm")
    before = state_of(model)
    with pytest.raises(UserError, match=message):
        load_torch_weights(model, saved(tensors, tmp_path / "w.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, state_of(model), before)


def test_other_resnets_of_timm_are_refused(tmp_path):
    file = saved(tensors_of("timm_resnet50d"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"another ResNet, with a deep stem \(conv1\.0\)"):
        load_torch_weights(resnet18("batchnorm"), file)


def test_timms_resnet18_has_the_same_names():
    assert REFERENCE["timm_resnet18"]["shapes"] == REFERENCE["resnet18"]["shapes"]


def test_weight_mean_refuses_kernels_that_it_would_change(tmp_path):
    file = saved(tensors_of("resnet18"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"weight mean.*lastbn"):
        load_torch_weights(model_of("resnet18", "mimicnorm"), file)


@pytest.mark.parametrize("network", ["resnet20", "mlp", "squeezenet"])
def test_networks_that_torchvision_does_not_have(network, tmp_path):
    common = {"num_classes": 10, "image_size": 32, "rngs": nnx.Rngs(0)}
    model = create_model(network, method="batchnorm", width=0.25, **common)
    with pytest.raises(UserError, match="nothing in torchvision is like"):
        load_torch_weights(model, tmp_path / "none.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "shufflenet_v2_x1_0"])
def test_files_of_pytorch_itself(name, suffix, tmp_path):
    reason = "torchvision is missing: pip install torch torchvision"
    torch = pytest.importorskip("torch", reason=reason)
    torchvision = pytest.importorskip("torchvision", reason=reason)
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_torch)(theirs.state_dict(), path)
    x = images(REFERENCE[name]["size"])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    for method in ("batchnorm", "lastbn"):
        model = model_of(name, method)
        load_torch_weights(model, path)
        np.testing.assert_allclose(logits_of(model, x), expected, rtol=0, atol=1e-4)
