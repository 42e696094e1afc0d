import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.data.augment import augment, example_keys, normalize
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.evaluation import averaged, evaluate, recalibrate
from mimicnorm_jax.train.setup import set_up


def trained(config, steps=3):
    experiment = set_up(config)
    state = experiment.initial_state()
    for step in range(steps):
        batch = shard_batch(experiment.train_data.batch(step), experiment.mesh)
        state, _ = experiment.train_step(state, batch)
    return experiment, state


@pytest.mark.parametrize(
    ("network", "devices", "ema"),
    [
        ("mlp", 1, 0.0),
        ("mlp", 4, 0.5),
        pytest.param("resnet8", 4, 0.5, marks=pytest.mark.long),
    ],
)
def test_recalibration_gives_the_last_bn_the_moments_of_all_training_logits(
    network, devices, ema, tiny_config, float64
):
    config = tiny_config(
        network=network, precision="float64", num_devices=devices, optimizer__ema_decay=ema
    )
    experiment, state = trained(config)
    assert len(experiment.train_data.source) % config.batch_size  # a padded batch is among them
    exact = recalibrate(experiment, state)

    images = experiment.train_data.source.images / 255.0
    logits = jax.jit(experiment.network.apply_measure)(
        *jax.device_get((state.evaluated_params, state.batch_stats)),
        jnp.asarray((images - images.mean()) / images.std()),
    )
    np.testing.assert_allclose(exact.batch_stats["head"]["mean"], logits.mean(0), rtol=1e-9)
    np.testing.assert_allclose(exact.batch_stats["head"]["var"], logits.var(0, ddof=1), rtol=1e-9)
    # in evaluation the training logits are then normalized
    normalized = jax.jit(experiment.network.apply_eval)(
        *jax.device_get((exact.params, exact.batch_stats)),
        jnp.asarray((images - images.mean()) / images.std()),
    )
    np.testing.assert_allclose(normalized.mean(0), 0.0, atol=1e-9)
    assert evaluate(experiment, exact) != evaluate(experiment, state)
    # and the state that is trained on is left as it was
    assert not np.allclose(state.batch_stats["head"]["mean"], exact.batch_stats["head"]["mean"])


def test_without_a_last_bn_there_is_nothing_to_recalibrate(tiny_config):
    experiment, state = trained(tiny_config(network="mlp", method="batchnorm"), steps=1)
    with pytest.raises(UserError, match="'batchnorm' has no last BN"):
        recalibrate(experiment, state)


def on_one_device(apply):
    """As ``shard_map`` with a single device calls it."""
    mapped = jax.vmap(apply, in_axes=(None, None, 0), axis_name="data")
    return jax.jit(
        lambda params, stats, x: jax.tree.map(lambda y: y[0], mapped(params, stats, x[None]))
    )


@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm"])
def test_averaged_parameters_have_statistics_of_their_own(method, tiny_config, float64):
    """The means over the batches that come next; on four devices, with a norm of each device's."""
    count = 3
    config = tiny_config(
        network="mlp",
        method=method,
        precision="float64",
        num_devices=4,
        optimizer__ema_decay=0.9,
        optimizer__ema_batches=count,
    )
    experiment, state = trained(config, steps=5)
    found = averaged(experiment, state)
    assert found.ema_params is None
    jax.tree.map(np.testing.assert_array_equal, found.params, state.ema_params)

    params, running = jax.device_get((state.ema_params, state.batch_stats))
    pixels = experiment.train_data.source.images / 255
    statistics = {"mean": (pixels.mean(),), "std": (pixels.std(),), "dtype": jnp.float64}
    parts = 4 if method == "batchnorm" else 1
    run = on_one_device(lambda *given: experiment.network.apply_train(*given, None)[1])
    total = jax.tree.map(np.zeros_like, running)
    for step in range(5, 5 + count):
        keys = jax.vmap(jax.random.split)(example_keys(config.seed, step, jnp.arange(32)))
        images = jnp.asarray(experiment.train_data.batch(step)["image"])
        images = augment(images, keys[:, 0], pad_crop=1, flip=True)  # as that step will
        images = np.asarray(normalize(images, **statistics))
        for part in np.split(images, parts):
            new = run(params, running, part)
            # undo the weight of the old average
            total = jax.tree.map(
                lambda t, n, r: t + (n - 0.9 * r) / 0.1 / (count * parts), total, new, running
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        found.batch_stats,
        jax.device_get(total),
    )
    # which are used, wherever averages are evaluated
    result = evaluate(experiment, state)
    assert result == evaluate(experiment, found)
    mixed = state.replace(params=state.ema_params, ema_params=None)
    assert abs(result["test_loss"] - evaluate(experiment, mixed)["test_loss"]) > 0.01


@pytest.mark.long
@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm"])
def test_estimated_statistics_are_as_good_as_exact_ones(method, tiny_config):
    """Those of all training images, as they are stored, as one batch."""
    config = tiny_config(
        network="resnet8",
        width=0.25,
        method=method,
        epochs=60.0,
        batch_size=128,
        data__image_size=16,
        data__flip=False,
        optimizer__ema_decay=0.999,
    )
    experiment, state = trained(config, steps=135)
    estimated = averaged(experiment, state)
    images = experiment.train_data.source.images
    images = (images - images.mean()) / images.std()
    exact = on_one_device(experiment.network.apply_statistics)(
        *jax.device_get((estimated.params, state.batch_stats)), jnp.asarray(images, jnp.float32)
    )
    accuracies = [
        evaluate(experiment, s)["test_accuracy"]
        for s in (estimated, estimated.replace(batch_stats=exact))
    ]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    assert accuracies[1] > 0.9
