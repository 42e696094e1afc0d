"""Every network trains on real images with every method that fits, also in bfloat16.

How long a pair takes is how long it takes to compile, so every method is trained on ResNet-8, and
the paper's on one or more of each kind; ``bash launch/test.sh --all`` adds the rest.
"""

import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.layers.scaled import ScaledKernel
from mimicnorm_jax.methods import METHODS, create_method
from mimicnorm_jax.models import BRANCHED, NETWORKS, create_model
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.setup import set_up

STEPS, STEPS_OF_THE_DEEPEST = 30, 60
DEEPEST = ("resnet101", "resnet152")

# How many layers are centred at full width on images of 32 pixels.
CENTRED = {
    "mlp": 2,
    **{f"vgg{depth}": depth - 4 for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": depth + 1 for depth in (18, 34)},
    **{f"resnet{depth}": depth + 2 for depth in (50, 101, 152)},
    **{f"resnet{depth}": depth - 2 for depth in (8, 20, 32, 44, 56, 110)},
    "squeezenet": 19,
    "shufflenetv2_x0_5": 10,
    "shufflenetv2_x1_0": 34,
    "shufflenetv2_x1_5": 34,
    "shufflenetv2_x2_0": 34,
}
# With a quarter of the width and of the paper's min_fan_in the same layers are centred; with
# an eighth, of those that are slow to compute, the stem too: its fan-in is 9.
NARROW, EIGHTH = (0.25, 12), (0.125, 6)
IN_AN_EIGHTH = {"resnet50", "resnet101", "resnet152"}


def count_centred(model):
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, ScaledKernel)]
    return sum(layer.weight_mean is not None for layer in layers)


def fits(network, method):
    return network in BRANCHED or not METHODS[method].needs_branches


def long_unless(quick, *values):
    return pytest.param(*values, marks=() if quick else pytest.mark.long)


def pairs():
    return [
        long_unless(is_quick(network, method), network, method)
        for network in NETWORKS
        for method in METHODS
        if fits(network, method)
    ]


def is_quick(network, method):
    return network == "resnet8" or (method == "mimicnorm" and network == "mlp")


def learning_rate(network, method):
    """What lets a pair learn in a few steps, for which very deep networks differ."""
    if network in DEEPEST:
        return {"batchnorm": 0.05, "weightstandardization": 0.2}.get(method, 0.01)
    return 0.01 if network in IN_AN_EIGHTH else 0.05


def train(tiny_config, network, method, precision):
    """The loss of each of a few steps on the same images, with the project's own step."""
    options = {}
    width, min_fan_in = EIGHTH if network in IN_AN_EIGHTH else NARROW
    if hasattr(create_method(method), "min_fan_in"):
        options["method_options__min_fan_in"] = min_fan_in
    if network.startswith("vgg"):
        options["network_options__dropout"] = 0.0  # 30 steps are too few to learn with it
    config = tiny_config(
        network=network,
        method=method,
        precision=precision,
        width=width,
        batch_size=8,
        learning_rate=learning_rate(network, method),
        optimizer__clip_norm=1.0,  # for those without any normalization
        data__image_size=32,
        data__pad_crop=0,
        data__flip=False,
        schedule__warmup_epochs=0.05,
        **options,
    )
    experiment = set_up(config)
    if method == "mimicnorm":
        abstract = experiment.abstract_state
        graph = experiment.network.train_graph
        model = nnx.merge(graph, abstract.params, abstract.batch_stats)
        assert count_centred(model) == CENTRED[network] + (network in IN_AN_EIGHTH)
    state = experiment.initial_state()
    batch = shard_batch(experiment.train_data.batch(0), experiment.mesh)
    losses = []
    for _ in range(STEPS_OF_THE_DEEPEST if network in DEEPEST else STEPS):
        state, metrics = experiment.train_step(state, batch)
        losses.append(metrics["loss"])
    return np.array([float(loss) for loss in losses])


def assert_learned(losses):
    """Against the mean of a few: at the start, without normalization, single losses jump."""
    assert np.all(np.isfinite(losses))
    assert losses[-5:].mean() < 0.9 * losses[0], losses


@pytest.mark.parametrize("network", [long_unless(CENTRED.get(n, 0) < 60, n) for n in NETWORKS])
def test_every_network_is_made_by_name_and_centres_the_layers_of_the_table(network):
    assert CENTRED.keys() == NETWORKS.keys()
    model = nnx.eval_shape(
        lambda: create_model(
            network, method="mimicnorm", num_classes=10, image_size=32, rngs=nnx.Rngs(0)
        )
    )
    assert count_centred(model) == CENTRED[network]
    assert model.classifier.kernel.shape[-1] == 10


@pytest.mark.parametrize(("network", "method"), pairs())
def test_every_pair_learns_real_digits_in_a_few_steps(tiny_config, network, method):
    assert_learned(train(tiny_config, network, method, "float32"))


@pytest.mark.parametrize("network", [long_unless(n == "resnet8", n) for n in NETWORKS])
def test_every_kind_of_network_learns_in_bfloat16_too(tiny_config, network):
    assert_learned(train(tiny_config, network, "mimicnorm", "bfloat16"))
