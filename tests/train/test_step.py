"""Invariant 4: the result does not depend on the number of devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.evaluation import evaluate
from mimicnorm_jax.train.experiment import Experiment
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import TrainState

METHODS = {
    "mimicnorm": {},
    "nonorm": {},
    "fixup": {},
    "batchnorm": {"method_options__bn_sync": "global"},
}


_experiments = {}


def shared_experiment(config):
    """The one of this configuration, which is traced once for all tests of a process."""
    key = config.to_json(sort_keys=True)
    if key not in _experiments:
        _experiments[key] = set_up(config)
    return _experiments[key]


def train(config, steps, experiment=None):
    """Losses of the first steps, the last state, and the gradient of the first step."""
    experiment = experiment or shared_experiment(config)
    state, losses = experiment.initial_state(), []
    for step in range(steps):
        batch = shard_batch(experiment.train_data.batch(step), experiment.mesh)
        state, metrics = experiment.train_step(state, batch)
        losses.append(metrics["loss"].item())
        if step == 0:  # momentum then holds the gradient (and what decay adds to it)
            (gradient,) = (jax.device_get(s.trace) for s in state.opt_state if hasattr(s, "trace"))
    return Run(np.array(losses), state, experiment, gradient)


class Run(NamedTuple):
    losses: np.ndarray
    state: TrainState
    experiment: Experiment
    gradient: dict


def relative_difference(a, b):
    difference = sum(
        np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    return np.sqrt(difference / sum(np.sum(x**2) for x in jax.tree.leaves(b)))


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("mimicnorm", "float64"),
        *(pytest.param(method, "float32", marks=pytest.mark.long) for method in METHODS),
        *(
            pytest.param(m, "float64", marks=pytest.mark.long)
            for m in ("batchnorm", "nonorm", "fixup")
        ),
    ],
)
def test_one_and_four_devices_agree(method, precision, tiny_config, request):
    """In float64 in 10 steps; float32 drifts through ReLU masks, so there at first."""
    steps, tolerance = (10, 1e-9) if precision == "float64" else (2, 1e-5)
    if precision == "float64":
        request.getfixturevalue("float64")
    four, one = (
        train(
            tiny_config(
                method=method,
                precision=precision,
                num_devices=devices,
                learning_rate=0.02,
                optimizer__weight_decay=0.0,
                **METHODS[method],
            ),
            steps,
        )
        for devices in (4, 1)
    )
    assert np.all(np.isfinite(one.losses))
    np.testing.assert_allclose(four.losses, one.losses, rtol=tolerance)
    assert relative_difference(four.gradient, one.gradient) < tolerance
    if steps > 2:
        assert np.ptp(one.losses) > 1e-4  # not 10 times the same; Fixup's classifier starts at 0


def test_local_batchnorm_is_the_one_exception(tiny_config):
    four, one = (
        train(tiny_config(network="mlp", method="batchnorm", num_devices=d), 1).losses
        for d in (4, 1)
    )
    assert abs(four - one) > 1e-4


@pytest.mark.parametrize("network", ["resnet8", pytest.param("vgg11", marks=pytest.mark.long)])
def test_reparameterized_and_projected_are_the_same_training(network, tiny_config, float64):
    """Appendix C: for SGD with momentum and weight decay, everything is linear."""
    options = (
        {"width": 0.125, "data__image_size": 32, "batch_size": 8} if network == "vgg11" else {}
    )

    def config(form):
        return tiny_config(
            network=network, precision="float64", weight_mean=form, learning_rate=0.05, **options
        )

    steps = 20 if network == "resnet8" else 15
    projected, reparameterized = (
        train(config(form), steps) for form in ("projected", "reparameterized")
    )
    assert np.ptp(projected.losses) > 0.1
    np.testing.assert_allclose(projected.losses, reparameterized.losses, rtol=1e-9)
    mask = projected.experiment.network.weight_mean_mask
    chosen = jax.tree.leaves(mask(projected.state.params))
    kernels = [
        kernel
        for kernel, is_chosen in zip(jax.tree.leaves(projected.state.params), chosen, strict=True)
        if is_chosen
    ]
    assert len(kernels) == (6 if network == "resnet8" else 7)
    for kernel in kernels:  # still centred after training
        np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0.0, atol=1e-14)


def test_projected_kernels_stay_centred_in_float32(tiny_config):
    _, state, experiment, _ = train(tiny_config(weight_mean="projected"), 20)
    for kernel, chosen in zip(
        jax.tree.leaves(state.params),
        jax.tree.leaves(experiment.network.weight_mean_mask(state.params)),
        strict=True,
    ):
        if chosen:
            np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0.0, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_counts_every_example_once_on_any_number_of_devices(devices, tiny_config):
    _, state, experiment, _ = train(tiny_config(network="mlp", num_devices=devices), 1)
    assert 360 % experiment.config.batch_size
    result = evaluate(experiment, state)
    assert result["test_examples"] == 360
    logits = jax.jit(experiment.network.apply_eval)(
        *jax.device_get((state.params, state.batch_stats)), normalized(experiment)
    )
    accuracy = np.mean(np.argmax(np.asarray(logits), -1) == experiment.test_data.source.labels)
    assert result["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_the_evaluation_loss_is_the_mean_over_the_examples_not_the_padding(tiny_config):
    _, state, experiment, _ = train(tiny_config(network="mlp"), 1)
    logits = jax.jit(experiment.network.apply_eval)(
        *jax.device_get((state.params, state.batch_stats)), normalized(experiment)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, experiment.test_data.source.labels
    )
    expected = losses.mean().item()
    assert evaluate(experiment, state)["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_reaches_the_loss(tiny_config):
    none, some, more = (
        train(tiny_config(network="mlp", optimizer__label_smoothing=rate), 1).losses[0]
        for rate in (0, 0.2, 0.4)
    )
    assert abs(some - none) > 0.01
    assert more - none == pytest.approx(2 * (some - none), rel=1e-3)  # linear in the rate


def test_the_same_images_are_augmented_differently_in_every_step(tiny_config):
    experiment = set_up(tiny_config(network="mlp", learning_rate=1e-12, method="nonorm"))
    state, batch = experiment.initial_state(), experiment.train_data.batch(0)
    losses = []
    for _ in range(3):
        state, metrics = experiment.train_step(state, shard_batch(batch, experiment.mesh))
        losses.append(metrics["loss"].item())
    assert len({round(loss, 5) for loss in losses}) == 3


def test_fixup_trains_its_scalars_at_a_tenth_of_the_rate(tiny_config):
    def moved(**options):
        config = tiny_config(method="fixup", learning_rate=0.02, **options)
        classifier = train(config, 2).state.params["classifier"]
        return abs(classifier["dense"]["kernel"]).max().item(), abs(classifier["bias_in"]).item()

    slow, fast = moved(), moved(method_options__scalar_rate=1.0)
    assert slow[0] == pytest.approx(fast[0], rel=0.05) and slow[0] > 0
    assert slow[1] == pytest.approx(fast[1] / 10, rel=0.1)


def normalized(experiment):
    train_images = experiment.train_data.source.images / 255.0
    images = experiment.test_data.source.images / 255.0
    return jnp.asarray((images - train_images.mean()) / train_images.std(), jnp.float32)


@pytest.mark.long  # test_gradient.py has both at once
def test_dropout_does_not_depend_on_the_number_of_devices(tiny_config, float64):
    options = {"network": "vgg11", "width": 1 / 16, "data__image_size": 32, "batch_size": 8}
    losses = [
        train(
            tiny_config(
                precision="float64", num_devices=d, network_options__dropout=rate, **options
            ),
            2,
        )[0]
        for d, rate in ((1, 0.5), (4, 0.5), (1, 0.0))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    assert abs(losses[0][0] - losses[2][0]) > 1e-3


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_of_the_parameters_warms_up_and_follows_them(decay, tiny_config):
    experiment = set_up(tiny_config(network="mlp", optimizer__ema_decay=decay))
    state = experiment.initial_state()
    expected = jax.device_get(state.params)
    for step in range(8):
        batch = shard_batch(experiment.train_data.batch(step), experiment.mesh)
        state, _ = experiment.train_step(state, batch)
        d = min(decay, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda e, p, d=d: d * e + (1 - d) * p, expected, jax.device_get(state.params)
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state.ema_params,
        expected,
    )


def test_bfloat16_trains_with_float32_state(tiny_config):
    losses, state, *_ = train(tiny_config(precision="bfloat16"), 30)
    assert losses[-5:].mean() < losses[:5].mean()
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
