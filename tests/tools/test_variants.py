"""The methods that a report compares, each with fields of its own."""

import pytest
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers import ScaledConv
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm
from mimicnorm_jax.methods import Site
from mimicnorm_jax.models import create_model
from mimicnorm_jax.recipes import cifar100
from mimicnorm_jax.tools.variants import PlainBatchNorm, parse_variants


def test_plain_is_of_flaxs_own_layers():
    model = nnx.eval_shape(
        lambda: create_model(
            "resnet8", method=PlainBatchNorm(), num_classes=10, image_size=8, rngs=nnx.Rngs(0)
        )
    )
    kinds = [type(module) for _, module in nnx.iter_modules(model)]
    assert (kinds.count(nnx.Conv), kinds.count(nnx.BatchNorm)) == (7, 7)
    assert not {ScaledConv, ShiftedBatchNorm} & set(kinds)


def test_plain_normalizes_where_batchnorm_does():
    def norm(role):
        return PlainBatchNorm().norm(4, site=Site(role), rngs=nnx.Rngs(0))

    assert isinstance(norm("inner"), nnx.BatchNorm)
    assert not isinstance(norm("classifier"), nnx.BatchNorm)


def test_a_variant_leaves_the_others_as_they_were():
    config = cifar100()
    config.method_options.min_fan_in = 20
    labels = ["mimicnorm:optimizer.momentum=0.5", "batchnorm", "mimicnorm"]
    changed, other, same = (variant.config for variant in parse_variants(config, labels))
    assert changed.optimizer.momentum == 0.5
    assert other.method_options.min_fan_in is None and other.optimizer.momentum == 0.9
    assert same.to_json() == config.to_json()
    assert same.method_options.min_fan_in == 20


def test_a_field_of_a_variant_has_the_kind_of_the_field():
    label = "mimicnorm:optimizer.nesterov=false:data.flip=true:width=0.5:batch_size=7"
    (variant,) = parse_variants(cifar100(), [label])
    config = variant.config
    found = (config.optimizer.nesterov, config.data.flip, config.width, config.batch_size)
    assert found == (False, True, 0.5, 7)
    with pytest.raises(UserError, match=r"data\.flip=yes sets no bool"):
        parse_variants(cifar100(), ["mimicnorm:data.flip=yes"])


def test_fixup_needs_residual_branches():
    config = cifar100()
    config.network = "vgg11"
    with pytest.raises(UserError, match=r"^--methods=fixup: vgg11 has no residual branches$"):
        parse_variants(config, ["batchnorm", "fixup"])
