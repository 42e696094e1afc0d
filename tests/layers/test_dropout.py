import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax.layers import Dropout


def test_an_examples_mask_depends_on_its_key_alone():
    x, keys = jnp.ones((8, 100)), jax.random.split(jax.random.key(0), 8)
    dropout = Dropout(0.5)
    whole = dropout(x, keys)
    np.testing.assert_array_equal(whole[3:5], dropout(x[3:5], keys[3:5]))
    assert not np.array_equal(whole[0], whole[1])


def test_the_mean_is_kept_and_the_rate_is_met():
    y = Dropout(0.25)(jnp.ones((64, 1000)), jax.random.split(jax.random.key(0), 64))
    assert jnp.mean(y == 0) == pytest.approx(0.25, abs=0.01)
    assert jnp.mean(y) == pytest.approx(1.0, abs=0.02)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_a_view_evaluates():
    layer = Dropout(0.5)
    x = jnp.ones((2, 8))
    np.testing.assert_array_equal(nnx.view(layer, deterministic=True)(x, None), x)
    assert not layer.deterministic


def test_two_layers_drop_different_values():
    x, keys = jnp.ones((4, 100)), jax.random.split(jax.random.key(0), 4)
    assert not np.array_equal(Dropout(0.5, index=0)(x, keys), Dropout(0.5, index=1)(x, keys))


def test_evaluation_passes_through_and_training_needs_keys():
    x, dropout = jnp.ones((4, 10)), Dropout(0.5)
    with pytest.raises(ValueError, match="keys"):
        dropout(x, None)
    dropout.eval()
    np.testing.assert_array_equal(dropout(x, None), x)


def test_a_rate_of_one_is_an_error():
    with pytest.raises(ValueError, match="rate"):
        Dropout(1.0)
