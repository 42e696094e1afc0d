import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mimicnorm_jax.layers import (
    WeightMeanConv,
    WeightMeanConvTranspose,
    WeightMeanDense,
    WeightMeanMask,
    center_kernel,
    project_weight_mean,
    weight_mean_mask,
)
from mimicnorm_jax.layers.kernel import Centering, Phase
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
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = weight_mean_mask(model)(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    chosen = [path for path, value in jax.tree_util.tree_leaves_with_path(mask) if value]
    assert len(chosen) == 18  # all convolutions but the 3-channel stem
    assert all(path[-1].key == "kernel" for path in chosen)
    for kernel, is_chosen in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        if is_chosen:
            np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0.0, atol=1e-6)


def of_state(state):
    return jax.tree.map(lambda x: x.ndim > 1 and x.shape[0] > 10, state)


@pytest.mark.parametrize(
    "mask",
    [
        lambda model: model,
        weight_mean_mask,
        lambda model: weight_mean_mask(model)(nnx.state(model, nnx.Param)),
        lambda model: weight_mean_mask(model)(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
        lambda model: of_state,
    ],
)
def test_flax_optimizers_and_states_are_served_too(mask):
    model = create_model(
        "mlp",
        method=create_method("mimicnorm", weight_mean="projected", min_fan_in=10),
        num_classes=4,
        image_size=4,
        rngs=nnx.Rngs(0),
    )
    transform = optax.chain(optax.sgd(0.1), project_weight_mean(mask(model)))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    before = model.layers[0].kernel[...]
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x) + x[:, 0, 0, :1])))(model)
    optimizer.update(model, grads)
    after = model.layers[0].kernel[...]
    assert jnp.max(jnp.abs(after - before)) > 1e-5
    expected = center_kernel(before - 0.1 * grads["layers"][0]["kernel"][...])
    np.testing.assert_allclose(after, expected, atol=1e-6)


def test_a_mask_that_chooses_nothing_is_said():
    model = create_model(
        "resnet20", method="mimicnorm", num_classes=10, image_size=8, rngs=nnx.Rngs(0)
    )
    assert not weight_mean_mask(model)
    with pytest.warns(UserWarning, match="chooses no kernel.*'reparameterized' need no transform"):
        project_weight_mean(model)
    params = {"kernel": jnp.ones((4, 2))}
    for mask in ({"kernel": False}, lambda params: jax.tree.map(lambda _: False, params)):
        with pytest.warns(UserWarning, match="chooses no kernel"):
            project_weight_mean(mask).init(params)


def test_axes_of_a_tree_are_those_that_are_given():
    params = {"oihw": jax.random.normal(jax.random.key(0), (8, 4, 3, 3))}
    transform = project_weight_mean({"oihw": True}, axes=(1, 2, 3))
    updates, _ = transform.update(params, transform.init(params), params)
    new = optax.apply_updates(params, updates)["oihw"]
    expected = 2 * (params["oihw"] - params["oihw"].mean((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(new, expected, atol=1e-5)
    model = projected_dense()
    with pytest.raises(ValueError, match="axes are for trees"):
        project_weight_mean(model, axes=(0,))
    with pytest.raises(ValueError, match=r"give linen_mask\(network, images\)"):
        project_weight_mean(linen.Dense(3))
    with pytest.raises(ValueError, match=r"give equinox_mask\(model\)"):
        project_weight_mean(jax.tree_util.Partial(jnp.add, jnp.ones(2)))
    np.testing.assert_allclose(center_kernel(jnp.eye(3), 1).sum(1), 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="no axes"):
        center_kernel(params["oihw"], (4,))


def projected_dense():
    return WeightMeanDense(4, 3, weight_mean="projected", rngs=nnx.Rngs(0))


class Stack(nnx.Module):
    """Kernels of a scan, of a nested one, and one whose stack is on its last axis."""

    def __init__(self, form, rngs):
        options = {"weight_mean": form, "param_dtype": jnp.float64}

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def convolutions(rngs):
            return WeightMeanConv(4, 4, (3, 3), **options, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def transposed(rngs):
            return WeightMeanConvTranspose(4, 4, (3, 3), 2, **options, rngs=rngs)

        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=nnx.StateAxes({nnx.Param: -1, ...: None}))
        def dense(rngs):
            return WeightMeanDense(16, 4, **options, rngs=rngs)

        self.convolutions, self.transposed = convolutions(rngs), transposed(rngs)
        self.dense = dense(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def scanned(x, layer):
            return jnp.tanh(layer(x)[:, :4, :4])

        x = scanned(x, self.convolutions)
        x = jnp.tanh(scanned(x, self.transposed))[:, :2, :2].reshape(len(x), -1)
        axes = nnx.StateAxes({nnx.Param: -1, ...: None})
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(self.dense, x)


def test_each_kernel_of_a_stack_is_centred_by_itself(float64):
    """50 steps with momentum and weight decay are those of centring in the forward pass."""
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 4), jnp.float64)
    models = {}
    for form in ("reparameterized", "projected"):
        model = models[form] = Stack(form, nnx.Rngs(0))
        steps = [optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9)]
        if form == "projected":
            steps.append(project_weight_mean(model))
        optimizer = nnx.Optimizer(model, optax.chain(*steps), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer):
            gradient = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
            optimizer.update(model, gradient)

        for _ in range(50):
            train_step(model, optimizer)
    plain, projected = models["reparameterized"], models["projected"]
    np.testing.assert_allclose(projected(x), plain(x), rtol=1e-9)
    for name, axes in (("convolutions", (1, 2, 3)), ("dense", (0,))):
        kernel = getattr(projected, name).kernel[...]
        np.testing.assert_allclose(kernel.mean(axes), 0.0, atol=1e-14)
        theirs = getattr(plain, name).kernel[...]
        np.testing.assert_allclose(kernel, theirs - theirs.mean(axes, keepdims=True), atol=1e-9)


def test_optax_masked_takes_the_mask():
    model = create_model(
        "mlp",
        method=create_method("mimicnorm", weight_mean="projected", min_fan_in=10),
        num_classes=4,
        image_size=4,
        rngs=nnx.Rngs(0),
    )
    state = nnx.state(model, nnx.Param)
    for params in (state, nnx.to_pure_dict(state)):
        mask = weight_mean_mask(model)
        decay = optax.masked(optax.add_decayed_weights(1.0), mask)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = decay.update(zeros, decay.init(params), params)
        for update, chosen in zip(
            jax.tree.leaves(updates), jax.tree.leaves(mask(params)), strict=True
        ):
            assert (jnp.abs(update).max() > 0) == chosen
        # and inside one, where the others are no leaves
        inner = optax.masked(project_weight_mean(mask), mask)
        inner.update(zeros, inner.init(params), params)


def test_a_mask_of_another_model_is_an_error():
    mask = weight_mean_mask(nnx.Sequential(projected_dense()))
    params = nnx.state(projected_dense(), nnx.Param)
    with pytest.raises(ValueError, match=r"layers/0/kernel is not among .* like bias"):
        mask(params)


def test_a_part_of_the_parameters_may_be_trained():
    model = nnx.Sequential(projected_dense(), projected_dense())
    wanted = nnx.All(nnx.Param, nnx.PathContains(1))
    part = nnx.state(model, wanted)
    mask = weight_mean_mask(model)
    with pytest.raises(ValueError, match=r"take mask.within\(params\)"):
        mask(part)
    assert list(mask.within(part).centerings) == [("layers", "1", "kernel")]
    transform = optax.chain(optax.sgd(0.1), project_weight_mean(mask.within(part)))
    optimizer = nnx.Optimizer(model, transform, wrt=wanted)
    optimizer.update(model, jax.tree.map(lambda x: x**2 + 1, part))
    np.testing.assert_allclose(model.layers[1].kernel[...].mean(0), 0.0, atol=1e-6)


def test_kernels_are_drawn_anew_with_the_papers_variance():
    params = {
        "images": jnp.zeros((3, 3, 16, 64)),
        "stack": jnp.zeros((2, 3, 3, 64, 32)),
        "up": jnp.zeros((3, 3, 256, 64)),
        "dense": jnp.ones((4, 4)),
    }
    phases = tuple(Phase(axis, 2, 1) for axis in (-4, -3))
    kernels = {"images": (), "stack": (), "up": phases}
    mask = WeightMeanMask({(k,): Centering((-4, -3, -2), p) for k, p in kernels.items()})
    drawn = mask.initialize(params, jax.random.key(0), after_relu=lambda path: path != ("images",))
    np.testing.assert_array_equal(drawn["dense"], 1.0)
    factor = 2 / (1 - 1 / np.pi)
    assert float(drawn["images"].std() ** 2 * 144) == pytest.approx(1, rel=0.05)
    assert float(drawn["stack"].std() ** 2 * 576) == pytest.approx(factor, rel=0.05)
    assert jnp.abs(drawn["stack"][0] - drawn["stack"][1]).max() > 0.01
    for i in range(2):  # of 4 places and of 1
        part = drawn["up"][i::2, i::2]
        assert float(part.std() ** 2 * part[..., 0].size) == pytest.approx(factor, rel=0.05)
        np.testing.assert_allclose(part.mean((0, 1, 2)), 0.0, atol=1e-6)


@pytest.mark.parametrize("mask", [{"kernel": jnp.ones(2)}, (jnp.sum, jnp.max), {"kernel": 1}])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="a mask has True or False for each parameter"):
        project_weight_mean(mask)


def test_layers_may_share_a_kernel():
    model = nnx.Sequential(projected_dense(), projected_dense())
    model.layers[1].kernel = model.layers[0].kernel
    assert len(weight_mean_mask(model).centerings) == 1
    params = nnx.state(model, nnx.Param)
    weight_mean_mask(model)(params)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stack_as_long_as_the_window_is_known_by_its_numbers(axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=nnx.StateAxes({nnx.Param: axis, ...: None}))
    def make(rngs):
        return WeightMeanConv(4, 4, (3, 3), weight_mean="projected", use_bias=False, rngs=rngs)

    model = make(nnx.Rngs(0))
    assert model.kernel.shape == (3, 3, 3, 4, 4)
    params = nnx.state(model, nnx.Param)
    centred = weight_mean_mask(model).center(params)
    np.testing.assert_allclose(centred["kernel"][...], params["kernel"][...], atol=1e-6)


def test_groups_of_optax_leave_out_each_others_kernels():
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.eye(4)}}
    whole = {"a": True, "b": {"kernel": True}}  # a part of a tree stands for what is below
    groups = {name: optax.chain(optax.sgd(0.1), project_weight_mean(whole)) for name in "ab"}
    transform = optax.partition(groups, {"a": {"kernel": "a"}, "b": {"kernel": "b"}})
    updates, _ = transform.update(params, transform.init(params), params)
    new = optax.apply_updates(params, updates)
    jax.tree.map(lambda w: np.testing.assert_allclose(w.mean(0), 0.0, atol=1e-6), new)


def test_kernels_with_metadata_and_numpy_arrays_are_centred_and_called():
    init = nnx.with_metadata(nnx.initializers.normal(1.0), owner="me")
    dense = WeightMeanDense(8, 4, weight_mean="projected", kernel_init=init, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dense.kernel[...].mean(0), 0.0, atol=1e-6)
    assert dense.kernel.owner == "me"
    dense.kernel.set_value(np.asarray(dense.kernel[...]))
    assert dense(jnp.ones((2, 8))).shape == (2, 4)


def test_a_projected_layer_without_the_transform_is_told_of():
    model = projected_dense()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    x = jnp.ones((2, 4))
    model(x)  # centred: nothing is said
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x)))(model))
    for call in (model, jax.jit(lambda x: model(x))):  # which holds its numbers
        with pytest.warns(UserWarning, match="needs project_weight_mean"):
            call(x)
