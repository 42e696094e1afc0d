import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimicnorm_jax.config import default_config, validate
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import WeightMeanMask
from mimicnorm_jax.recipes import cifar, imagenet
from mimicnorm_jax.train.optim import decay_mask, make_optimizer, make_schedule

NO_KERNELS = WeightMeanMask({})

CIFAR, IMAGENET, TEN = Fraction(50_000, 256), Fraction(1_281_167, 256), Fraction(10)


def schedule_of(config, steps_per_epoch=CIFAR):
    def steps(epochs):
        return Fraction(epochs) * steps_per_epoch

    return make_schedule(config, steps, math.ceil(steps(config.epochs)))


def rates(config, epochs, steps_per_epoch=CIFAR):
    schedule = schedule_of(config, steps_per_epoch)
    return [float(schedule(round(epoch * steps_per_epoch))) for epoch in epochs]


def test_the_cifar_recipe_is_the_papers():
    epochs = (0, 1, 2, 79.9, 80.1, 109.9, 110.1, 134.9, 135.1, 150)
    expected = (0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001)
    np.testing.assert_allclose(rates(cifar(), epochs), expected, rtol=1e-2, atol=1e-9)


def test_the_imagenet_recipe_is_the_papers():
    epochs = (0, 1, 2, 29.9, 30.1, 59.9, 60.1, 84.9, 85.1, 90)
    expected = (0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001)
    np.testing.assert_allclose(rates(imagenet(), epochs, IMAGENET), expected, rtol=1e-2, atol=1e-9)


def test_warm_up_rises_step_by_step():
    schedule = schedule_of(cifar(), TEN)
    np.testing.assert_allclose([schedule(s) for s in range(21)], np.linspace(0, 0.1, 21), atol=1e-7)


def test_milestones_beyond_the_end_never_come():
    config = cifar()
    config.epochs = 4.0
    assert rates(config, [4])[0] == pytest.approx(0.1)


def test_milestones_within_the_warm_up_apply_at_its_end():
    config = cifar()
    config.schedule.milestones = (1.0, 3.0)
    np.testing.assert_allclose(rates(config, (2.01, 2.9, 3.1)), (0.01, 0.01, 0.001), rtol=1e-5)


def test_milestones_that_share_a_step_all_apply():
    config = cifar()
    config.learning_rate = 1.0
    config.schedule.milestones = (1.0, 1.5, 3.0, 3.01)
    np.testing.assert_allclose(rates(config, (2, 2.9, 3), TEN), (1e-2, 1e-2, 1e-4), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", (0.1, 0.1, 0.1)), ("cosine", (0.1, 0.05, 0)), ("linear", (0.1, 0.05, 0))],
)
def test_other_schedules_end_where_they_should(name, expected):
    config = cifar()
    config.schedule.name = name
    np.testing.assert_allclose(rates(config, (2, 76, 150)), expected, rtol=2e-3, atol=1e-4)


def test_max_steps_moves_no_schedule():
    config = cifar()
    config.schedule.name = "cosine"
    before = rates(config, (50,))
    config.max_steps = 10
    assert rates(config, (50,)) == before


def sgd_by_hand(config, grads_of, w, steps):
    """PyTorch's rule, which the paper's numbers come from."""
    velocity = 0.0
    for _ in range(steps):
        gradient = grads_of(w) + config.optimizer.weight_decay * w
        velocity = config.optimizer.momentum * velocity + gradient
        update = (
            gradient + config.optimizer.momentum * velocity
            if config.optimizer.nesterov
            else velocity
        )
        w = w - config.learning_rate * update
    return w


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov, float64):
    config = default_config()
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    config.optimizer.nesterov = nesterov
    config.optimizer.weight_decay = 0.01
    params = {"kernel": jnp.asarray(np.linspace(-1, 1, 6).reshape(3, 2))}
    optimizer = make_optimizer(config, schedule_of(config), params, NO_KERNELS)
    expected = sgd_by_hand(config, np.sin, np.asarray(params["kernel"]), 5)
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-10)


def test_clipping_bounds_the_global_norm():
    config = default_config()
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    config.optimizer.update(momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    params = {"a": jnp.zeros((3,)), "b": jnp.zeros((4,))}
    optimizer = make_optimizer(config, schedule_of(config), params, NO_KERNELS)
    updates, _ = optimizer.update(
        jax.tree.map(lambda x: x + 10.0, params), optimizer.init(params), params
    )
    assert optax.global_norm(updates) == pytest.approx(config.learning_rate, rel=1e-5)


def test_clipping_comes_before_decay_and_decay_is_masked(float64):
    config = default_config()
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    config.optimizer.update(
        momentum=0.5, weight_decay=0.2, clip_norm=1.0, weight_decay_mask="kernel"
    )
    params = {"kernel": jnp.full((4,), 3.0), "bias": jnp.full((4,), 3.0)}
    optimizer = make_optimizer(config, schedule_of(config), params, NO_KERNELS)
    state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    clipped = 1 / np.sqrt(8)
    for momentum in (1.0, 1.5):  # the second step adds half of the first
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["bias"], -0.1 * momentum * clipped)
        np.testing.assert_allclose(updates["kernel"], -0.1 * momentum * (clipped + 0.2 * 3.0))


def test_scalars_may_have_a_rate_of_their_own():
    config = default_config()
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    optimizer = make_optimizer(config, schedule_of(config), params, NO_KERNELS, scalar_rate=0.1)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(updates[name], -0.1 * (1 + 5e-4), rtol=1e-5)
    np.testing.assert_allclose(updates["scale"], -0.01 * (1 + 5e-4), rtol=1e-5)


def test_weight_decay_reaches_every_parameter_unless_told():
    params = {
        "conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "blocks": {0: {"scale": jnp.ones(())}},
    }
    assert all(jax.tree.leaves(decay_mask(default_config().optimizer.weight_decay_mask, params)))
    mask = decay_mask("kernel$|blocks/0", params)
    assert mask == {"conv": {"kernel": True, "bias": False}, "blocks": {0: {"scale": True}}}
    with pytest.raises(UserError, match=r"weight_decay_mask = 'gamma'.*blocks/0/scale"):
        decay_mask("gamma", params)


def test_parameters_may_have_rates_of_their_own():
    config = default_config()
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    config.optimizer.rates = ("^stem/=0", "kernel$=0.1", "blocks=0.5")
    params = {
        "stem": {"kernel": jnp.ones((2, 2))},
        "blocks": {0: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
        "classifier": {"bias": jnp.ones(2)},
    }
    optimizer = make_optimizer(config, schedule_of(config), params, NO_KERNELS)
    state = optimizer.init(params)
    for momentum in (1.0, 1.9):
        updates, state = optimizer.update(params, state, params)
        usual = -0.1 * (1 + 5e-4) * momentum
        np.testing.assert_array_equal(updates["stem"]["kernel"], 0.0)
        for value, factor in (
            (updates["blocks"][0]["kernel"], 0.1),  # the first pattern that matches
            (updates["blocks"][0]["bias"], 0.5),
            (updates["classifier"]["bias"], 1.0),
        ):
            np.testing.assert_allclose(value, factor * usual, rtol=1e-5)


def test_a_pattern_of_rates_that_matches_nothing_is_an_error():
    config = default_config()
    config.optimizer.rates = ("kernel=0.5", "steem=0")
    params = {"stem": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(UserError, match=r"'steem' matches no parameter; .* stem/kernel"):
        make_optimizer(config, schedule_of(config), params, NO_KERNELS)


@pytest.mark.parametrize("rate", ["stem", "stem=fast", "stem=-1", "(=1", "=1", "stem=inf"])
def test_rates_that_mean_nothing_are_refused(rate):
    config = default_config()
    config.optimizer.rates = (rate,)
    with pytest.raises(UserError, match=r"config\.optimizer\.rates = .*PATTERN=FACTOR"):
        validate(config)
