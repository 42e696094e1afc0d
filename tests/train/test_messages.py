"""What a run says of its loss, and a resumed one of the devices it was moved to."""

import pytest

from mimicnorm_jax.train.messages import loss_floor, resumed
from mimicnorm_jax.train.provenance import hardware
from mimicnorm_jax.train.setup import set_up


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        ({"method": "mimicnorm"}, False),
        ({"method": "batchnorm"}, True),
        ({"method": "batchnorm", "method_options__bn_sync": "global"}, False),
    ],
)
def test_only_what_normalizes_per_device_is_warned_of(overrides, warns, tiny_config):
    experiment = set_up(tiny_config(num_devices=4, **overrides))
    same = hardware(experiment.mesh)
    assert resumed(experiment, 7, same) == "resumed from the checkpoint of step 7"
    line = resumed(experiment, 7, same | {"threads": 99})
    assert "threads 99, now" in line and "the bits may differ" in line
    line = resumed(experiment, 7, same | {"num_devices": 2, "num_processes": 2})
    assert "saved by 2 process(es) with 2 device(s): the same run, but not bit for bit" in line
    assert ("WARNING: batchnorm normalizes per device" in line) == warns
    if warns:
        assert "from now on over 8 examples, not 16" in line


@pytest.mark.parametrize(
    ("batch", "classes", "warns", "says"),
    [
        (64, 10, False, "above 0.33 on average"),
        (256, 1000, False, "above 0.0015 on average"),
        (32, 100, True, "(with ever larger ones 0.0043)"),
        (2, 10, True, "with 2 examples its outputs are +1 and -1"),
    ],
)
def test_small_batches_are_warned_of(batch, classes, warns, says, tiny_config):
    line = loss_floor(tiny_config(batch_size=batch), classes)
    assert says in line and f"batches of {batch}, {classes} equally frequent classes" in line
    assert line.startswith("WARNING") == warns
    assert ("config.micro_batches" in line) == warns
