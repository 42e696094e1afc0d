"""The names are torchvision's, all of them; and VGG's dense layer has our layout."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models import create_model
from mimicnorm_jax.weights import load_torch_weights
from mimicnorm_jax.weights.layers import layers_of
from mimicnorm_jax.weights.torch_names import check_variant, likely_network, torch_names
from tests.weights.generated import NORM, generated, unpacked

REFERENCE = json.loads(pathlib.Path(__file__).with_name("torchvision_reference.json").read_text())
NARROW = 64  # a network of this part of the width has names enough


def narrow(name, *, method="batchnorm", size=224, **options):
    rngs, width = nnx.Rngs(0), 1 / NARROW
    return create_model(
        name, method=method, num_classes=3, image_size=size, width=width, rngs=rngs, **options
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("shufflenetv2_x1_0", "shufflenet_v2_x1_0"),
        ("vgg16", "vgg16_bn"),
        ("vgg16", "vgg16"),
    ],
)
def test_every_name_of_torchvision_is_one_of_our_layers(ours, theirs):
    model = narrow(ours)
    names = torch_names(model, norms=theirs != "vgg16")
    assert set(names) == set(layers_of(model))
    expected = set(unpacked(REFERENCE[theirs]["shapes"]))
    found = {f"{layer}.weight" for layer, _ in names.values()}
    found |= {f"{norm}.{entry}" for _, norm in names.values() if norm for entry in NORM}
    found |= {f"{layer}.bias" for layer, _ in names.values()} & expected
    assert found == expected


def narrow_tensors(model):
    """A state dict for a narrow VGG, whose convolutions have biases there and none here."""
    found, layers = {}, layers_of(model)
    for path, (layer, norm) in torch_names(model).items():
        *spatial, inputs, outputs = layers[path].kernel.shape
        found[f"{layer}.weight"] = (outputs, inputs, *spatial)
        found[f"{layer}.bias"] = (outputs,)
        found |= {f"{norm}.{entry}": (outputs,) for entry in NORM if norm}
    return {name: generated(name, shape) for name, shape in found.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, name) for name in ("resnet18", "resnet34", "resnet50", "vgg11", "vgg16")),
        ("shufflenetv2_x1_0", "a ShuffleNetV2"),
    ],
)
def test_a_network_is_known_by_the_names_in_its_file(name, said):
    model = narrow(name)
    for norms in (True, False) if name.startswith("vgg") else (True,):
        entries = []
        for layer, norm in torch_names(model, norms=norms).values():
            entries += [f"{layer}.weight", f"{layer}.bias"]
            entries += [f"{norm}.weight", f"{norm}.running_var"] if norm else []
        assert likely_network(entries) == said


def test_other_files_are_like_no_network():
    assert likely_network(["features.0.0.weight", "classifier.1.weight"]) is None
    assert likely_network(["layer1.0.conv1.weight", "layer2.0.conv1.weight"]) is None


def test_vggs_first_dense_layer_reads_channels_last(tmp_path):
    model = narrow("vgg11")
    tensors = narrow_tensors(model)
    save_file(tensors, tmp_path / "w.safetensors")
    load_torch_weights(model, tmp_path / "w.safetensors")
    weight, kernel = tensors["classifier.0.weight"], np.asarray(model.hidden[0].kernel[...])
    channels = weight.shape[1] // 49
    assert channels == 8
    for row, column, channel in ((0, 0, 0), (0, 1, 3), (6, 2, 7), (3, 6, 1)):
        theirs = weight[:, channel * 49 + row * 7 + column]
        np.testing.assert_array_equal(kernel[(row * 7 + column) * channels + channel], theirs)
    # The biases of its convolutions are in the running means.
    mean = tensors["features.1.running_mean"] - tensors["features.0.bias"]
    np.testing.assert_allclose(model.stages[0][0].norm.mean[...], mean, rtol=1e-6)


def test_images_of_another_size_do_not_fit_vgg(tmp_path):
    with pytest.raises(UserError, match=r"has 2x2 there: create it with image_size=224, got 64$"):
        load_torch_weights(narrow("vgg11", size=64), tmp_path / "none.safetensors")


def test_a_vgg_without_norms_has_none_to_fill(tmp_path):
    model = narrow("vgg11")
    convolutions = [names.layer for names in torch_names(model).values() if names.norm]
    plain = [names.layer for names in torch_names(model, norms=False).values()]
    tensors = narrow_tensors(model)
    found = {n: v for n, v in tensors.items() if n.startswith("classifier")}
    for old, new in zip(convolutions, plain, strict=False):
        found |= {f"{new}.{entry}": tensors[f"{old}.{entry}"] for entry in ("weight", "bias")}
    save_file(found, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"there is no BatchNorm to fill the network's"):
        load_torch_weights(model, tmp_path / "w.safetensors")
    load_torch_weights(narrow("vgg11", method="nonorm"), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["resnet18", "shufflenetv2_x1_0"])
def test_the_stem_for_small_images_is_refused(name):
    with pytest.raises(UserError, match=r"the stem for small images.*stem=\"large\""):
        torch_names(narrow(name, size=32))


def test_identity_shortcuts_are_refused():
    with pytest.raises(UserError, match=r"nothing in torchvision is like this ResNet"):
        torch_names(narrow("resnet18", shortcut="identity"))


def test_shortcuts_with_a_pool_are_said():
    names = unpacked(REFERENCE["timm_resnet50d"]["shapes"])
    with pytest.raises(UserError, match=r"conv1\.0\) and shortcuts with.*\(downsample\.2\)"):
        check_variant(narrow("resnet50"), names)
    check_variant(narrow("vgg11"), names)  # there a missing name says it
