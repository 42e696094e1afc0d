"""Micro-batches have the gradient of the whole batch; so have codes, whatever the devices."""

import json

import jax
import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.memory.compiled import abstract_arguments, images_without_data, program_of
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.variants import parse_variants
from mimicnorm_jax.train import gradient, step
from mimicnorm_jax.train.provenance import config_as_json
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import other_fields
from tests.train.test_step import relative_difference, train

NETWORKS = {
    "mimicnorm": {},
    "fixup": {},
    "dropout": {
        "method": "mimicnorm",
        "network": "vgg11",
        "width": 0.0625,
        "data__image_size": 32,
    },
}


@pytest.mark.parametrize(
    ("name", "devices", "parts"),  # on each
    [
        ("mimicnorm", 4, 2),
        pytest.param("dropout", 4, 2, marks=pytest.mark.long),
        pytest.param("fixup", 1, 4, marks=pytest.mark.long),
        pytest.param("mimicnorm", 1, 4, marks=pytest.mark.long),
        pytest.param("fixup", 4, 2, marks=pytest.mark.long),
    ],
)
def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    name, devices, parts, tiny_config, float64
):
    common = {"method": name, "precision": "float64", "learning_rate": 0.02} | NETWORKS[name]
    whole = train(tiny_config(**common), 3)
    divided = train(tiny_config(**common, num_devices=devices, micro_batches=parts), 3)
    np.testing.assert_allclose(divided.losses, whole.losses, rtol=1e-9)
    assert relative_difference(divided.gradient, whole.gradient) < 1e-9
    states = [jax.device_get(run.state) for run in (divided, whole)]
    assert relative_difference(*(state.params for state in states)) < 1e-9
    if name == "mimicnorm":
        assert relative_difference(*(state.batch_stats for state in states)) < 1e-9


def test_a_loop_over_the_parts_as_on_a_gpu_gives_the_same(tiny_config, float64, monkeypatch):
    common = {"precision": "float64", "learning_rate": 0.02}
    whole = train(tiny_config(**common), 2)

    def looped(*arguments, unroll, **options):
        assert unroll  # what this machine would do
        return gradient.in_micro_batches(*arguments, unroll=False, **options)

    monkeypatch.setattr(step, "in_micro_batches", looped)
    config = tiny_config(**common, num_devices=2, micro_batches=2)
    divided = train(config, 2, set_up(config))  # other tests must not find it
    np.testing.assert_allclose(divided.losses, whole.losses, rtol=1e-9)
    assert relative_difference(divided.gradient, whole.gradient) < 1e-9


def test_the_program_of_a_tpu_reads_the_parts_where_they_lie(tiny_config):
    """What it saves is in ``tests/tools/test_memory.py``, where a TPU's compiler is installed."""
    (variant,) = parse_variants(tiny_config(micro_batches=2), ["mimicnorm"])
    program = program_of(variant, mesh_of("cpu", 1))
    arguments = abstract_arguments(program, images_without_data(program.config))
    traced = program.train_step.trace(*arguments)
    constraints = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("LayoutConstraint")
        for platform in ("tpu", "cpu")
    }
    assert constraints == {"tpu": 4, "cpu": 0}  # forward and backward, of either part


@pytest.mark.parametrize("storage", ["int8", pytest.param("int4", marks=pytest.mark.long)])
def test_codes_do_not_depend_on_devices_parts_or_what_is_computed_again(
    storage, tiny_config, float64
):
    common = {"precision": "float64", "learning_rate": 0.02, "activation_storage": storage}
    whole = train(tiny_config(**common), 2)
    divided = train(tiny_config(**common, num_devices=2, micro_batches=2, remat="block"), 2)
    assert relative_difference(divided.gradient, whole.gradient) < 1e-9
    full = train(tiny_config(**common | {"activation_storage": "full"}), 2)
    distance = relative_difference(whole.gradient, full.gradient)
    assert (1e-4 if storage == "int8" else 3e-3) < distance < (0.02 if storage == "int8" else 0.3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "batchnorm", "micro_batches": 2}, "normalize over the batch"),
        ({"micro_batches": 3}, "batch_size = 32 does not divide by 1 device"),
        ({"micro_batches": 0}, "config.micro_batches = 0 is not allowed"),
        ({"activation_storage": "int2"}, "unknown config.activation_storage 'int2'"),
        ({"remat": "all"}, "unknown config.remat 'all'"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, message, tiny_config):
    with pytest.raises(UserError, match=message) as error:
        set_up(tiny_config(**overrides))
    assert "\n" not in str(error.value)


def test_a_run_from_before_a_field_existed_has_its_default(tiny_config, tmp_path):
    fields = config_as_json(tiny_config())
    del fields["remat"], fields["activation_storage"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert other_fields(tmp_path, tiny_config()) == ""
    assert "config.remat ('none' there" in other_fields(tmp_path, tiny_config(remat="block"))
