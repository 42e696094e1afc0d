import importlib.util

import pytest

from mimicnorm_jax.config import FIELDS, default_config, describe_fields, flatten, validate
from mimicnorm_jax.errors import UserError

from .conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    module = load(path)
    config = module.get_config()
    if config.data.name == "folder":
        config.data.dir = "."
    validate(config)
    assert f"--config configs/{path.name}" in module.__doc__
    for method in ("mimicnorm", "batchnorm", "nonorm"):
        config.method = method
        validate(config)


def test_the_defaults_are_valid_and_every_field_is_described():
    config = default_config()
    validate(config)
    assert flatten(config).keys() == FIELDS.keys()
    page = describe_fields()
    for name, field in FIELDS.items():
        assert f"config.{name}  (default:" in page
        assert field.meaning.endswith(".")
        if field.choices:
            assert field.choices[0] in field.describe()


def test_the_fields_the_recipes_share_are_top_level():
    shared = (
        *("method", "network", "epochs", "max_steps", "batch_size", "seed", "learning_rate"),
        *("precision", "log_every", "weight_mean"),
    )
    for name in shared:
        assert name in FIELDS


def test_any_number_of_epochs_is_valid_alone():
    for epochs in (0.5, 1.0, 7.0, 1000.0):
        config = load(ROOT / "configs/cifar100_vgg16.py").get_config()
        config.epochs = epochs
        validate(config)


WRONG = {
    "method": "layernorm",
    "network": "resnet19",
    "width": 0.0,
    "epochs": -1.0,
    "max_steps": 0,
    "batch_size": 0,
    "seed": -1,
    "learning_rate": float("nan"),
    "precision": "float16",
    "weight_mean": "both",
    "num_devices": 0,
    "log_every": 0,
    "eval_every": 1e-320,
    "checkpoint_every": 0.0,
    "keep_checkpoints": -1,
    "on_nonfinite": "ignore",
    "skip_limit": -1,
    "hang_minutes": -1.0,
    "network_options.stem": "huge",
    "network_options.dropout": 1.0,
    "network_options.depth": 3,  # resnet20 has none
    "method_options.bn_sync": "local",  # mimicnorm has none
    "method_options.residual_init": "zero",
    "data.name": "mnist",
    "data.image_size": 0,
    "data.mean": (0.5,),  # without data.std
    "data.std": (float("inf"),),
    "data.pad_crop": 32,
    "data.num_classes": 1,
    "optimizer.momentum": 1.0,
    "optimizer.weight_decay": -1.0,
    "optimizer.weight_decay_mask": "(",
    "optimizer.clip_norm": 0.0,
    "optimizer.label_smoothing": 1.0,
    "optimizer.ema_decay": 1.0,
    "schedule.name": "step",
    "schedule.milestones": (80.0, 30.0),
    "schedule.gamma": 0.0,
    "schedule.warmup_epochs": 1e300,
}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    config = default_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"config\.{name}\b") as error:
        validate(config)
    assert "\n" not in str(error.value)


def test_a_field_that_does_not_exist_is_an_error():
    config = default_config()
    with pytest.raises(AttributeError):
        config.lerning_rate = 0.1
    with config.unlocked():
        config.lerning_rate = 0.1
    with pytest.raises(UserError, match=r"did you mean 'config\.learning_rate'"):
        validate(config)
