"""One training step in float64 against torchvision's networks with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mimicnorm_jax.methods import create_method
from mimicnorm_jax.models import create_model

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


def pairs(network, ours, theirs):
    """Our layers and torchvision's that do the same: convolutions, norms, dense layers."""
    units = []
    if network.startswith("resnet"):
        units.append((ours.stem, theirs.conv1, theirs.bn1))
        stages = (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
        blocks = [block for stage in stages for block in stage]
        for block, other in zip(ours.blocks, blocks, strict=True):
            for index, unit in enumerate(block.branch, start=1):
                layers = getattr(other, f"conv{index}"), getattr(other, f"bn{index}")
                units.append((unit, *layers))
            assert (block.projection is None) == (other.downsample is None)
            if block.projection is not None:
                units.append((block.projection, *other.downsample))
        dense = [(ours.classifier, theirs.fc)]
    elif network.startswith("vgg"):
        features = [f for f in theirs.features if hasattr(f, "weight")]
        convolutions = [unit for stage in ours.stages for unit in stage]
        units = list(zip(convolutions, features[::2], features[1::2], strict=True))
        linear = [layer for layer in theirs.classifier if hasattr(layer, "weight")]
        dense = list(zip([*ours.hidden, ours.classifier], linear, strict=True))
    else:
        units.append((ours.stem, *list(theirs.conv1)[:2]))
        others = [unit for stage in (theirs.stage2, theirs.stage3, theirs.stage4) for unit in stage]
        for unit, other in zip(ours.units, others, strict=True):
            for our_side, side in ((unit.shortcut, other.branch1), (unit.branch, other.branch2)):
                layers = [layer for layer in side if hasattr(layer, "weight")]
                mine = our_side or ()
                units += zip(mine, layers[::2], layers[1::2], strict=True)
        units.append((ours.last, *list(theirs.conv5)[:2]))
        dense = [(ours.classifier, theirs.fc)]
    return units, dense


def tensors(network, ours, theirs, attribute="data"):
    """Pairs of our variable and what torchvision has in its place, as we lay it out."""

    def of(tensor):
        return getattr(tensor, attribute).numpy()

    units, dense = pairs(network, ours, theirs)
    for unit, convolution, norm in units:
        yield unit.conv.kernel, of(convolution.weight).transpose(2, 3, 1, 0)
        if convolution.bias is not None:
            yield unit.conv.bias, of(convolution.bias)
        yield unit.norm.scale, of(norm.weight)
        yield unit.norm.bias, of(norm.bias)
    for index, (layer, linear) in enumerate(dense):
        weight = of(linear.weight)
        if network.startswith("vgg") and index == 0:  # flattened channels first there
            weight = weight.reshape(-1, 512, 7, 7).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        yield layer.kernel, weight.T
        yield layer.bias, of(linear.bias)


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
    for variable, value in tensors(network, model, theirs):
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
    for variable, value in tensors(network, model, theirs, "grad"):
        assert_close(variable[...], value)
    nnx.update(model, statistics)
    for unit, _, norm in pairs(network, model, theirs)[0]:
        assert_close(unit.norm.mean[...], norm.running_mean.numpy())
        assert_close(unit.norm.var[...], norm.running_var.numpy())
