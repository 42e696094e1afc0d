import dataclasses
import pathlib
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimicnorm_jax.models
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import (
    LastBN,
    WeightMeanConv,
    WeightMeanDense,
    WeightStandardizedConv,
    WeightStandardizedDense,
)
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.layers.relu import Relu
from mimicnorm_jax.methods import METHODS, Method, create_method
from mimicnorm_jax.methods.base import Site, identity
from mimicnorm_jax.models import BRANCHED, NETWORKS, create_model


def make(network, method, **options):
    options = {"num_classes": 10, "image_size": 32, "width": 0.25} | options
    return create_model(network, method=method, rngs=nnx.Rngs(0), **options)


def modules(model, kind):
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, kind)]


def test_no_network_names_a_method():
    """Invariant 1: the cut between methods and networks."""
    names = re.compile(rf"\b({'|'.join(METHODS)})\b", re.IGNORECASE)
    for path in pathlib.Path(mimicnorm_jax.models.__file__).parent.glob("*.py"):
        assert not names.findall(path.read_text()), path.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softplus(Method):
    """Replaces every ReLU, and counts the calls."""

    calls: ClassVar[list[str]] = []

    def activation(self, *, site):
        def counted(x):
            self.calls.append(site.role)
            return jax.nn.softplus(x)

        return counted


# Activations of one forward pass: one for each convolution and hidden dense layer, but
# in a residual block the last convolution has its activation after the merge.
ACTIVATIONS = {
    "mlp": 2,
    **{f"vgg{depth}": depth - 1 for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": depth - 1 for depth in (18, 34, 50, 101, 152, 8, 20, 32, 44, 56, 110)},
    "squeezenet": 1 + 8 * 3,
    # stem, 3 units of stride 2, 13 of stride 1, last convolution
    **{f"shufflenetv2_x{size}": 1 + 3 * 3 + 13 * 2 + 1 for size in ("0_5", "1_0", "1_5", "2_0")},
}


def test_every_network_is_counted():
    assert ACTIVATIONS.keys() == NETWORKS.keys()


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(name, marks=pytest.mark.long if ACTIVATIONS[name] > 40 else ())
        for name in NETWORKS
    ],
)
def test_a_method_can_replace_every_activation(network, monkeypatch):
    """The second proof of the cut: no network has a ReLU of its own."""

    def forbidden(*args):
        raise AssertionError("a network calls ReLU itself")

    monkeypatch.setattr(jax.nn, "relu", forbidden)
    monkeypatch.setattr(nnx, "relu", forbidden)
    Softplus.calls.clear()
    width = 1 / 16
    jax.eval_shape(
        lambda: make(network, Softplus(), width=width).__call__(
            jnp.zeros((1, 32, 32, 3)), keys=jax.random.split(jax.random.key(0), 1)
        )
    )
    assert len(Softplus.calls) == ACTIVATIONS[network]


def test_the_ablations_each_leave_out_one_operation():
    both, no_last, no_mean, none = (
        make("resnet20", name, width=1.0)
        for name in ("mimicnorm", "weightmean", "lastbn", "nonorm")
    )
    assert [len(modules(m, WeightMeanConv)) for m in (both, no_last, no_mean, none)] == [
        18,
        18,
        0,
        0,
    ]
    assert [len(modules(m, LastBN)) for m in (both, no_last, no_mean, none)] == [1, 0, 1, 0]


@pytest.mark.parametrize(("option", "power"), [("inverse_sqrt", 0.5), ("inverse", 1.0)])
def test_the_residual_scalar_of_block_l_starts_at_the_papers_value(option, power):
    model = make("resnet20", create_method("mimicnorm", residual_init=option))
    scales = [float(block.branch[-1].conv.scale[...]) for block in model.blocks]
    np.testing.assert_allclose(scales, [index**-power for index in range(1, 10)], rtol=1e-6)
    assert all(unit.conv.scale is None for block in model.blocks for unit in block.branch[:-1])


@pytest.mark.parametrize(("network", "width"), [("resnet20", 1.0), ("vgg11", 0.5)])
def test_initial_variances_are_the_stable_ones(network, width):
    model = make(network, "mimicnorm", width=width)
    layers = modules(model, WeightMeanConv)
    for layer in layers:
        n = np.prod(layer.kernel.shape[:-1])
        expected = 2 / ((n - 1) * (1 - 1 / np.pi))
        assert np.var(layer.kernel[...]) == pytest.approx(expected, rel=0.1)
    stem = (model.stem if network == "resnet20" else model.stages[0][0]).conv
    assert np.var(stem.kernel[...]) == pytest.approx(1 / 27, rel=0.15)


def test_a_first_layer_is_initialized_for_an_image_that_is_not_rectified():
    large = make("resnet18", "mimicnorm", width=1.0, image_size=224).stem.conv
    first, second = make("mlp", "mimicnorm", width=1.0).layers
    for layer, after_relu in ((large, False), (first, False), (second, True)):
        assert isinstance(layer, (WeightMeanConv, WeightMeanDense))
        n = np.prod(layer.kernel.shape[:-1])
        expected = (2 / (1 - 1 / np.pi) if after_relu else 1) / (n - 1)
        assert np.var(layer.kernel[...]) == pytest.approx(expected, rel=0.05)


def test_gain_scales_the_layers_whose_input_is_not_rectified():
    """The stem, and 1x1 convolutions after depthwise ones; no others."""
    plain, scaled = (
        nnx.to_flat_state(nnx.state(make("shufflenetv2_x0_5", method), nnx.Param))
        for method in (create_method("mimicnorm"), create_method("mimicnorm", gain=3.0))
    )
    factors = {
        "/".join(map(str, path)): float(jnp.std(b[...]) / jnp.std(a[...]))
        for (path, a), (_, b) in zip(plain, scaled, strict=True)
        if path[-1] == "kernel"
    }
    after_depthwise = {
        f"units/{unit}/{part}/conv/kernel"
        for unit in range(16)
        for part in ("branch/2", *(["shortcut/1"] if unit in (0, 4, 12) else []))
    }
    for name, factor in factors.items():
        expected = 3.0 if name in after_depthwise | {"stem/conv/kernel"} else 1.0
        assert factor == pytest.approx(expected, rel=1e-3), name
    with pytest.raises(UserError, match="gain must be positive"):
        create_method("mimicnorm", gain=0.0)


def test_a_bias_is_where_no_norm_follows():
    for name, expected in (("nonorm", True), ("mimicnorm", True), ("batchnorm", False)):
        model = make("resnet20", name)
        assert (model.blocks[0].branch[0].conv.bias is not None) == expected
    assert make("resnet20", "mimicnorm").classifier.bias is None  # the last BN follows
    for without_last_bn in ("batchnorm", "weightmean"):
        assert make("resnet20", without_last_bn).classifier.bias is not None
    assert (
        make("vgg11", create_method("batchnorm", conv_bias=True)).stages[0][0].conv.bias is not None
    )


@pytest.mark.parametrize("name", METHODS)
def test_an_activation_knows_whether_a_normalization_precedes_it(name):
    """On GPUs what is kept depends on it."""
    for role in ("stem", "inner", "branch_end", "hidden_dense"):
        method, site = create_method(name), Site(role)
        normalized = method.norm(8, site=site, rngs=nnx.Rngs(0)) is not identity
        assert normalized == method.normalizes(site)
        if name in ("batchnorm", "weightstandardization"):
            assert normalized == (role != "hidden_dense")
        assert (method.activation(site=site) == Relu(normalized=True)) == normalized
        for bits in (8, 4):
            stored = create_method(name, activation_storage=f"int{bits}")
            assert stored.activation(site=site) == Relu(bits)


def test_batchnorm_has_one_norm_a_convolution_and_global_statistics_only_if_asked():
    for bn_sync, axis in (("local", None), ("global", "data")):
        method = create_method("batchnorm", bn_sync=bn_sync, axis_name="data")
        norms = modules(make("resnet20", method), ShiftedBatchNorm)
        assert len(norms) == 19
        assert all(norm.axis_name == axis and norm.momentum == 0.9 for norm in norms)


class TestFixup:
    """Zhang, Dauphin and Ma 2019, Section 3."""

    @pytest.mark.parametrize(
        "network", ["resnet20", "resnet18", pytest.param("resnet50", marks=pytest.mark.long)]
    )
    def test_logits_and_branches_are_zero_at_the_start(self, network):
        model = make(network, "fixup")
        x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
        np.testing.assert_array_equal(model(x), 0.0)
        x = model.stem(x)
        for block in model.blocks:
            branch = x
            for unit in block.branch:
                branch = unit(branch)
            np.testing.assert_array_equal(branch, 0.0)
            x = block(x)
        assert jnp.all(jnp.isfinite(x)) and jnp.max(x) > 0.1

    @pytest.mark.parametrize(
        ("network", "blocks", "layers"), [("resnet20", 9, 2), ("resnet50", 16, 3)]
    )
    def test_inner_layers_start_at_he_times_l_to_the_power(self, network, blocks, layers):
        model = make(network, "fixup", width=0.5)
        assert len(model.blocks) == blocks
        factor = blocks ** (-1 / (2 * layers - 2))
        for block in model.blocks:
            assert len(block.branch) == layers
            for unit in block.branch[:-1]:
                kernel = unit.conv.conv.kernel[...]
                he = np.sqrt(2 / np.prod(kernel.shape[:-1]))
                assert np.std(kernel) == pytest.approx(factor * he, rel=0.1)
        shortcuts = [block.projection for block in model.blocks if block.projection is not None]
        for unit in shortcuts:  # not part of a branch: plain He
            kernel = unit.conv.conv.kernel[...]
            assert np.std(kernel) == pytest.approx(np.sqrt(2 / kernel.shape[2]), rel=0.1)

    def test_scalar_biases_before_each_layer_and_activation_and_one_multiplier_a_branch(self):
        model = make("resnet20", "fixup")
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        names = [
            "/".join(str(k.key) for k in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]

        def count(ending):
            return sum(name.endswith(ending) for name in names)

        convolutions, blocks = 19, 9
        assert count("bias_in") == convolutions - 1 + 1  # not before the stem; the classifier
        assert count("bias_out") == convolutions
        assert count("scale") == blocks
        assert count("/bias") == 1  # of the classifier
        scalars = jax.tree_util.tree_map_with_path(
            lambda path, x: x.shape == () or "kernel" in str(path) or "dense" in str(path), params
        )
        assert all(jax.tree.leaves(scalars))

    def test_the_biases_and_the_multiplier_do_what_they_are_named_for(self):
        unit = make("resnet20", "fixup").blocks[0].branch[-1].conv
        unit.conv.kernel[...] = jax.random.normal(jax.random.key(1), unit.conv.kernel.shape)
        x = jax.random.normal(jax.random.key(0), (2, 8, 8, unit.conv.in_features))
        unit.bias_in[...], unit.bias_out[...] = jnp.float32(0.3), jnp.float32(-0.2)
        unit.conv.scale[...] = jnp.float32(1.7)
        plain = jax.lax.conv_general_dilated(
            x + 0.3,
            unit.conv.kernel[...],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(unit(x), 1.7 * plain - 0.2, rtol=1e-4, atol=1e-4)
        classifier = make("resnet20", "fixup").classifier
        classifier.dense.kernel[...] = jnp.ones_like(classifier.dense.kernel[...])
        features = jnp.zeros((1, classifier.dense.in_features))
        classifier.bias_in[...] = jnp.float32(0.5)
        np.testing.assert_allclose(classifier(features), 0.5 * features.size)

    @pytest.mark.parametrize("method", ["fixup", "skipinit"])
    @pytest.mark.parametrize("network", sorted(set(NETWORKS) - BRANCHED))
    def test_a_network_without_branches_is_an_error_that_lists_what_fits(self, network, method):
        with pytest.raises(UserError, match=r"residual branches.*mimicnorm"):
            make(network, method)


@pytest.mark.parametrize("network", ["resnet20", "resnet50"])
def test_skipinit_starts_as_the_shortcuts_alone(network):
    """De and Smith 2020: the scalar at the end of each branch starts at 0."""
    model = make(network, "skipinit")
    x = model.stem(jax.random.normal(jax.random.key(0), (2, 32, 32, 3)))
    for block in model.blocks:
        branch = x
        for unit in block.branch[:-1]:
            branch = unit(branch)
        assert jnp.max(jnp.abs(branch)) > 0.1  # only the scalar is 0
        end = block.branch[-1].conv
        assert end.scale[...] == 0.0 and jnp.std(end.kernel[...]) > 0
        np.testing.assert_array_equal(block.branch[-1](branch), 0.0)
        x = block(x)
    assert not modules(model, (WeightMeanConv, LastBN, ShiftedBatchNorm))


def test_weight_standardization_standardizes_every_convolution_and_normalizes_groups():
    model = make("resnet20", "weightstandardization", width=1.0)
    layers, norms = modules(model, WeightStandardizedConv), modules(model, nnx.GroupNorm)
    assert len(layers) == len(norms) == 19
    for layer in layers:
        kernel = layer.effective_kernel()
        np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0.0, atol=1e-5)
        np.testing.assert_allclose(kernel.std((0, 1, 2)), 1.0, rtol=0.05)
        assert layer.bias is None
    assert {norm.num_groups for norm in norms} == {16, 32}  # 16, 32 and 64 features
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    layer = model.stem.conv
    scaled = layer(x)
    layer.kernel[...] = 7.0 * layer.kernel[...] + 3.0
    np.testing.assert_allclose(layer(x), scaled, rtol=1e-2, atol=1e-2)  # what makes it one
    assert len(modules(make("mlp", "weightstandardization"), WeightStandardizedDense)) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("weightstandardization", {"groups": 0}, "groups must be at least 1"),
        ("mimicnrom", {}, "did you mean 'mimicnorm'"),
        ("batchnorm", {"bn_sink": "local"}, "bn_sync"),
        ("batchnorm", {"bn_sync": "some"}, "local, global"),
        ("mimicnorm", {"weight_mean": "twice"}, "reparameterized, projected"),
        ("mimicnorm", {"residual_init": "zero"}, "inverse_sqrt, inverse"),
        ("mimicnorm", {"min_fan_in": 0}, "at least 1"),
        ("mimicnorm", {"center": "all"}, "fan_in, not_depthwise"),
        ("mimicnorm", {"center": "not_depthwise", "min_fan_in": 9}, "allowed: center = 'fan_in'"),
        ("fixup", {"scalar_rate": 0.0}, "scalar_rate must be positive"),
        ("nonorm", {"weight_mean": "projected"}, "weight_mean"),
    ],
)
def test_wrong_names_and_options_list_what_is_allowed(name, options, message):
    with pytest.raises(UserError, match=message):
        create_method(name, **options)
