"""One training step in float64 against torchvision's networks with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mimicnorm_jax.methods import create_method
from mimicnorm_jax.models import create_model
from mimicnorm_jax.weights.layers import places_of
from mimicnorm_jax.weights.torch_names import torch_names

pytestmark = pytest.mark.long
REASON = "torchvision is missing: pip install torch torchvision"
torch = pytest.importorskip("torch", reason=REASON)
torchvision = pytest.importorskip("torchvision", reason=REASON)

# Network, what torchvision calls it, its options, ours, images' size and number.
NETWORKS = [
    ("resnet18", "resnet18", {}, {"stem": "large"}, 64, 4),
    ("resnet50", "resnet50", {}, {"stem": "large"}, 64, 16),
    ("shufflenetv2_x1_0", "shufflenet_v2_x1_0", {}, {"stem": "large"}, 64, 16),
    ("vgg16", "vgg16_bn", {"dropout": 0.0}, {"dropout": 0.0}, 224, 2),
]


def units_of(ours, theirs):
    """Our layers with their norms, and torchvision's that do the same."""
    names, places = torch_names(ours), places_of(ours)
    for path, (layer, norm) in names.items():
        yield (
            *(path, places[path], theirs.get_submodule(layer)),
            None if norm is None else theirs.get_submodule(norm),
        )


def tensors(ours, theirs, attribute="data"):
    """Pairs of our variable and what torchvision has in its place, as we lay it out."""

    def of(tensor):
        return getattr(tensor, attribute).numpy()

    for path, place, layer, norm in units_of(ours, theirs):
        weight = of(layer.weight)
        if path == "hidden/0":  # of VGG: flattened channels first there
            weight = weight.reshape(-1, 512, 7, 7).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        yield place.layer.kernel, weight.transpose(*range(2, weight.ndim), 1, 0)
        if layer.bias is not None:
            yield place.layer.bias, of(layer.bias)
        if norm is not None:
            yield place.norm.scale, of(norm.weight)
            yield place.norm.bias, of(norm.bias)


def assert_close(a, b):
    scale = np.abs(b).max()
    assert scale > 0
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(scale, 1.0))


@pytest.mark.parametrize(
    ("network", "name", "options", "ours", "size", "batch"), NETWORKS, ids=[n[0] for n in NETWORKS]
)
def test_a_training_step_is_torchvisions(network, name, options, ours, size, batch, float64):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10, **options).double().train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # which start at 0 or 1
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    model = create_model(
        network,
        method=create_method("batchnorm", conv_bias=network == "vgg16"),
        num_classes=10,
        image_size=size,
        precision="float64",
        rngs=nnx.Rngs(0),
        **ours,
    )
    for variable, value in tensors(model, theirs):
        assert variable[...].shape == value.shape
        variable[...] = jnp.asarray(value)
    images = np.random.default_rng(1).standard_normal((batch, size, size, 3))
    labels = np.arange(batch) % 10
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, images):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            keys = jax.random.split(jax.random.key(0), batch)
            logits = model(images, keys=keys)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, nnx.state(model, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    gradients, (logits, statistics) = step(params, rest, jnp.asarray(images))
    expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels)).backward()

    assert_close(logits, expected.detach().numpy())
    nnx.update(model, gradients)
    for variable, value in tensors(model, theirs, "grad"):
        assert_close(variable[...], value)
    nnx.update(model, statistics)
    for _, place, _, norm in units_of(model, theirs):
        if norm is not None:
            assert_close(place.norm.mean[...], norm.running_mean.numpy())
            assert_close(place.norm.var[...], norm.running_var.numpy())
