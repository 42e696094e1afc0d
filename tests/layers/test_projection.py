import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mimicnorm_jax.layers import center_kernel, project_weight_mean, weight_mean_mask
from mimicnorm_jax.methods import create_method
from mimicnorm_jax.models import create_model


def test_chosen_kernels_stay_centred_and_others_are_untouched():
    params = {
        "a": {"kernel": center_kernel(jax.random.normal(jax.random.key(0), (8, 4)))},
        "b": jnp.ones((8, 4)),
    }
    mask = {"a": {"kernel": True}, "b": False}
    plain = optax.sgd(0.1, momentum=0.9)
    projected = optax.chain(plain, project_weight_mean(mask))
    grads = jax.tree.map(lambda x: jnp.cos(3 * x) + 1, params)
    updates, _ = projected.update(grads, projected.init(params), params)
    unprojected, _ = plain.update(grads, plain.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["a"]["kernel"].mean(0), 0.0, atol=1e-6)
    np.testing.assert_array_equal(updates["b"], unprojected["b"])
    expected = center_kernel(params["a"]["kernel"] + unprojected["a"]["kernel"])
    np.testing.assert_allclose(new["a"]["kernel"], expected, atol=1e-6)


def test_the_mask_may_be_a_function():
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones((2,))}
    transform = project_weight_mean(lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates, _ = transform.update(params, transform.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["kernel"], 0.0)


def test_misuse_is_an_error():
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones((2,))}
    transform = project_weight_mean({"kernel": True, "bias": True})
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(params, transform.init(params))
    with pytest.raises(ValueError, match="at least 2 axes"):
        transform.update(params, transform.init(params), params)
    with pytest.raises(ValueError, match=r"[Dd]ict|key|structure"):
        project_weight_mean({"other": True}).update(params, optax.EmptyState(), params)


def test_the_mask_of_a_model_is_its_projected_kernels():
    method = create_method("mimicnorm", weight_mean="projected")
    model = create_model("resnet20", method=method, num_classes=10, image_size=8, rngs=nnx.Rngs(0))
    mask = weight_mean_mask(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    chosen = [path for path, value in jax.tree_util.tree_leaves_with_path(mask) if value]
    assert len(chosen) == 18  # all convolutions but the 3-channel stem
    assert all(path[-1].key == "kernel" for path in chosen)
    for kernel, is_chosen in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        if is_chosen:
            np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0.0, atol=1e-6)


def test_flax_optimizers_and_states_are_served_too():
    model = create_model(
        "mlp",
        method=create_method("mimicnorm", weight_mean="projected", min_fan_in=10),
        num_classes=4,
        image_size=4,
        rngs=nnx.Rngs(0),
    )
    transform = optax.chain(optax.sgd(0.1), project_weight_mean(weight_mean_mask(model)))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    before = model.layers[0].kernel[...]
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x) + x[:, 0, 0, :1])))(model)
    optimizer.update(model, grads)
    after = model.layers[0].kernel[...]
    assert jnp.max(jnp.abs(after - before)) > 1e-5
    expected = center_kernel(before - 0.1 * grads["layers"][0]["kernel"][...])
    np.testing.assert_allclose(after, expected, atol=1e-6)


def test_a_reparameterized_model_has_nothing_to_project():
    model = create_model(
        "resnet20", method="mimicnorm", num_classes=10, image_size=8, rngs=nnx.Rngs(0)
    )
    assert not any(jax.tree.leaves(weight_mean_mask(model)))
