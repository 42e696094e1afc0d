import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import shard_batch
from mimicnorm_jax.train.evaluation import evaluate, recalibrate
from mimicnorm_jax.train.setup import set_up


def trained(config, steps=3):
    experiment = set_up(config)
    state = experiment.initial_state()
    for step in range(steps):
        batch = shard_batch(experiment.train_data.batch(step), experiment.mesh)
        state, _ = experiment.train_step(state, batch)
    return experiment, state


@pytest.mark.parametrize(("network", "devices", "ema"), [("mlp", 1, 0.0), ("resnet8", 4, 0.5)])
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
        *jax.device_get((exact.evaluated_params, exact.batch_stats)),
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
