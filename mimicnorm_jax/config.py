"""Every field of a run's configuration: meaning, default, allowed values, one check.

``python -m mimicnorm_jax.config`` prints them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.layers.remat import REMATS
from mimicnorm_jax.layers.storage import STORAGES
from mimicnorm_jax.methods import METHODS, Method, create_method
from mimicnorm_jax.models import NETWORKS, network_options
from mimicnorm_jax.precision import PRECISIONS

DATA_SETS = ("digits", "folder", "idx", "synthetic", "tfds")
SCHEDULES = ("multistep", "constant", "cosine", "linear")

# Epochs are counted exactly, in millionths; more of them than this are a slip of the hand.
SHORTEST, LONGEST = 1e-6, 1e6

# Fields in which even the processes of one run may differ: what their machines have where.
LOCAL_FIELDS = (
    *("compilation_cache", "data.dir", "data.cache_gib", "data.threads", "data.processes"),
)

# Fields that change what is watched or kept, not what is computed: a run may be
# continued with another value of them. (The data themselves may move, not change: a run
# remembers which images it was started with.)
FREE_FIELDS = (
    *("max_steps", "log_every", "checkpoint_every", "keep_checkpoints", "num_devices"),
    *("hang_minutes", "skip_limit"),
    *LOCAL_FIELDS,
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the configuration.

    Attributes:
      default: the default value.
      meaning: what it does, with the unit where there is one.
      choices: the allowed values, where they are names.
      allowed: the allowed values in words, where they are a range.
      check: whether a value is in that range.
      kind: type of the value where the default, None, does not say.
    """

    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    allowed: str = ""
    check: Callable[[Any], bool] | None = None
    kind: type | None = None

    def accepts(self, value: Any) -> bool:
        """Whether a value is in the allowed range."""
        try:
            return self.check is None or self.check(value)
        except (TypeError, ValueError, OverflowError):  # such as a word among numbers
            return False

    def describe(self) -> str:
        """The allowed values, for people."""
        words = " | ".join(self.choices) if self.choices else self.allowed
        return words + (" (or unset)" if self.default is None else "")


def _at_least(low: float, most: float = math.inf) -> dict[str, Any]:
    words = f">= {low:g}" if most == math.inf else f"{low:g} to {most:.10g}"
    return {"allowed": words, "check": lambda v: math.isfinite(v) and low <= v <= most}


def _above(low: float, most: float = math.inf) -> dict[str, Any]:
    words = f"> {low:g}" + ("" if most == math.inf else f", <= {most:g}")
    return {"allowed": words, "check": lambda v: math.isfinite(v) and low < v <= most}


def _in_unit_interval() -> dict[str, Any]:
    return {"allowed": "0 <= value < 1", "check": lambda v: 0 <= v < 1}


def _each(allowed: str, check: Callable[[Any], bool]) -> dict[str, Any]:
    return {"allowed": allowed, "check": lambda values: all(check(v) for v in values)}


def _pair(above: float, most: float) -> dict[str, Any]:
    words = f"two numbers, the first not greater, each > {above:g} and <= {most:g}"
    return {"allowed": words, "check": lambda v: len(v) == 2 and above < v[0] <= v[1] <= most}


def _true_or_false() -> dict[str, Any]:
    return {"allowed": "true | false", "check": lambda v: isinstance(v, bool)}


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


FIELDS: dict[str, Field] = {
    "method": Field("mimicnorm", "What normalizes the network.", tuple(METHODS)),
    "network": Field("resnet20", "The architecture.", tuple(NETWORKS)),
    "width": Field(1.0, "Multiplier of the network's features.", **_above(0, 100)),
    "epochs": Field(150.0, "Length of the run in epochs; may be a fraction.", **_at_least(SHORTEST, LONGEST)),
    "max_steps": Field(None, "Stop after this many steps even if epochs are left.", **_at_least(1), kind=int),
    "batch_size": Field(256, "Examples in a step, over all devices.", **_at_least(1, 2**24)),
    "seed": Field(0, "Decides initial values, order, augmentation and dropout.", **_at_least(0, 2**32 - 1)),
    "learning_rate": Field(0.1, "Learning rate after warm-up.", **_above(0)),
    "precision": Field("auto", "Type of convolutions and matrix products; auto is bfloat16 on GPU and TPU, float32 on CPU.", PRECISIONS),
    "weight_mean": Field("projected", "How weight mean is kept: by the optimizer (projected), or in the forward pass (reparameterized).", ("projected", "reparameterized")),
    "activation_storage": Field("full", "How convolutions keep their inputs for the backward pass: as they are, or in 8 or 4 bits.", STORAGES),
    "remat": Field("none", "What the backward pass computes again: nothing, whole blocks, or all but convolutions and matrix products.", REMATS),
    "micro_batches": Field(1, "Parts in which a batch is computed, for its exact gradient in the memory of one part.", **_at_least(1, 2**24)),
    "steps_per_call": Field(1, "Steps that a GPU or TPU does without asking the host again, for networks whose steps are short; a CPU always does one.", **_at_least(1, 2**10)),
    "deterministic": Field(False, "Deterministic GPU kernels, for bit-exact resume on GPUs (slower).", **_true_or_false()),
    "num_devices": Field(None, "Devices to use, over all processes; unset uses all.", **_at_least(1), kind=int),
    "log_every": Field(10, "Steps between two lines of metrics.", **_at_least(1)),
    "eval_every": Field(1.0, "Epochs between two evaluations; the end is always evaluated.", **_at_least(SHORTEST, LONGEST)),
    "checkpoint_every": Field(1.0, "Epochs between two checkpoints; the end is always kept.", **_at_least(SHORTEST, LONGEST)),
    "keep_checkpoints": Field(2, "Latest checkpoints to keep, beside the best one; 0 keeps all, for tools.verify.", **_at_least(0)),
    "on_nonfinite": Field("stop", "A step whose loss, gradient or result is infinite or NaN stops the run, or changes nothing and is counted (skip).", ("stop", "skip")),
    "skip_limit": Field(100, "skip: the run stops when more steps than this were skipped.", **_at_least(0)),
    "hang_minutes": Field(30.0, "Without a step for so long, all stacks are printed and the run ends; 0 never does.", **_at_least(0)),
    "compilation_cache": Field("auto", "Folder that keeps compiled programs, so that a restart compiles nothing; auto: JAX_COMPILATION_CACHE_DIR, else ~/.cache/mimicnorm_jax; empty: none."),
    "network_options.stem": Field(None, "resnet*, squeezenet, shufflenetv2*: first layers.", ("auto", "small", "large"), kind=str),
    "network_options.shortcut": Field(None, "resnet*: what meets a changed shape.", ("auto", "identity", "projection"), kind=str),
    "network_options.dropout": Field(None, "vgg*: dropout rate after the hidden dense layers.", **_in_unit_interval(), kind=float),
    "network_options.depth": Field(None, "mlp: number of dense layers.", **_at_least(2), kind=int),
    "network_options.hidden_features": Field(None, "mlp: features of the hidden layers.", **_at_least(1), kind=int),
    "method_options.bn_sync": Field(None, "batchnorm: statistics of each device's part of the batch (local) or of all of it (global).", ("local", "global"), kind=str),
    "method_options.conv_bias": Field(None, "batchnorm: keep convolution biases, as the published VGGs do.", **_true_or_false(), kind=bool),
    "method_options.min_fan_in": Field(None, "mimicnorm: layers with a fan-in above this are centred (unset: 50).", **_at_least(1), kind=int),
    "method_options.center_dense": Field(None, "mimicnorm: centre the dense layers before the classifier too.", **_true_or_false(), kind=bool),
    "method_options.residual_init": Field(None, "mimicnorm: residual scalar at the start, 1/sqrt(l) or 1/l.", ("inverse_sqrt", "inverse"), kind=str),
    "method_options.gain": Field(None, "mimicnorm: factor of the initial standard deviation of layers whose input is not rectified: the stem, and 1x1 convolutions after depthwise ones (unset: 1).", **_above(0), kind=float),
    "method_options.groups": Field(None, "weightstandardization: groups of each GroupNorm (unset: 32).", **_at_least(1), kind=int),
    "method_options.scalar_rate": Field(None, "Learning rate of scalar parameters as a multiple of the others' (unset: 0.1 for fixup, else 1).", **_above(0), kind=float),
    "data.name": Field("digits", "The data set: scikit-learn's handwritten digits, images in class folders, MNIST's own files, random images with random labels, or a TFDS build.", DATA_SETS),
    "data.dir": Field("", "folder: the directory with <split>/<class>/*.jpg; tfds: that of prepare_data; idx: that of train-images-idx3-ubyte.gz and its like."),
    "data.tfds_name": Field("", "tfds: name of the data set, such as cifar100."),
    "data.train_split": Field("train", "Name of the training split or its folder."),
    "data.test_split": Field("test", "Name of the test split or its folder."),
    "data.image_size": Field(32, "Height and width of the images in pixels; others are resized.", **_at_least(1, 8192)),
    "data.resize": Field(None, "folder, tfds: short side of an image before its centre is cropped to image_size (unset: image_size).", **_at_least(1, 8192), kind=int),
    "data.upright": Field(True, "folder, tfds: turn images as their EXIF orientation says, which published ImageNet results do not.", **_true_or_false()),
    "data.random_resized_crop": Field(False, "folder, tfds: train on crops of random size and shape, resized to image_size.", **_true_or_false()),
    "data.crop_scale": Field((0.08, 1.0), "Least and greatest share of the area in such a crop.", **_pair(0, 1)),
    "data.crop_ratio": Field((3 / 4, 4 / 3), "Least and greatest ratio of its width to its height.", **_pair(0, 100)),
    "data.threads": Field(None, "folder, tfds: decoding threads in each process (unset: one a core).", **_at_least(1, 1024), kind=int),
    "data.processes": Field(0, "folder, tfds: worker processes that decode; 0 decodes in the threads of the training process.", **_at_least(0, 1024)),
    "data.cache_gib": Field(2.0, "folder, tfds: decode a split once and keep it in memory if it takes at most this many GiB.", **_at_least(0)),
    "data.mean": Field((), "Channel means for normalization, in units of 1; empty: measured on the training set.", **_each("numbers in [0, 1], one a channel", lambda x: 0 <= x <= 1)),
    "data.std": Field((), "Channel standard deviations, likewise.", **_each("positive numbers, one a channel", lambda x: 0 < x < math.inf)),
    "data.pad_crop": Field(0, "Zero pixels padded on each side before a random crop back to size.", **_at_least(0)),
    "data.rotation": Field(0.0, "Random rotation by up to this many degrees either way, with zeros outside; the authors' code has 15 for CIFAR.", **_at_least(0, 180)),
    "data.flip": Field(False, "Random horizontal flip.", **_true_or_false()),
    "data.num_classes": Field(10, "synthetic: number of classes.", **_at_least(2)),
    "data.num_examples": Field(1024, "synthetic: examples in the training split; the test split has a quarter.", **_at_least(4)),
    "optimizer.momentum": Field(0.9, "SGD momentum; 0 for none.", **_in_unit_interval()),
    "optimizer.nesterov": Field(False, "Nesterov's form of momentum.", **_true_or_false()),
    "optimizer.weight_decay": Field(5e-4, "Added to the gradient, times the parameter.", **_at_least(0)),
    "optimizer.weight_decay_mask": Field(".*", "Parameters that decay: a regular expression searched in names such as blocks/0/branch/1/conv/kernel; the paper decays all.", allowed="a regular expression", check=_is_regex),
    "optimizer.clip_norm": Field(None, "Clip the gradient to this global norm.", **_above(0), kind=float),
    "optimizer.label_smoothing": Field(0.0, "Weight of the uniform distribution in the target.", **_in_unit_interval()),
    "optimizer.ema_decay": Field(0.0, "Decay of an average of the parameters, which is then what is evaluated; 0 for none.", **_in_unit_interval()),
    "schedule.name": Field("multistep", "Learning rate after warm-up.", SCHEDULES),
    "schedule.warmup_epochs": Field(2.0, "Epochs in which the rate rises from 0, step by step.", **_at_least(0, LONGEST)),
    "schedule.milestones": Field((80.0, 110.0, 135.0), "multistep: epochs at which the rate is multiplied by gamma; those beyond the end never come.", **_each("increasing epochs > 0", lambda x: 0 < x <= LONGEST)),
    "schedule.gamma": Field(0.1, "multistep: the multiplier.", **_above(0)),
}  # fmt: skip


def default_config() -> ConfigDict:
    """All fields at their defaults, locked: an unknown field is an error.

    A config file calls this, sets what it changes, and returns it from ``get_config``.
    """
    config = ConfigDict()
    for name, field in FIELDS.items():
        *groups, leaf = name.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        kind = field.kind
        node[leaf] = field.default if kind is None else config_dict.placeholder(kind)
    return config.lock()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by dotted name."""

    def walk(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config, ""))


def validate(config: ConfigDict) -> None:
    """Checks every field and how they fit together; reads no file, starts no backend.

    Raises:
      UserError: naming the field, its value and what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the configuration is a {type(config).__name__}, not a ConfigDict; a config file's "
            "get_config() starts from default_config() and returns it"
        )
    values = flatten(config)
    for name in values:
        if name not in FIELDS:
            raise unknown("field", f"config.{name}", [f"config.{known}" for known in FIELDS])
    for name, field in FIELDS.items():
        if name not in values:
            raise UserError(f"config.{name} is missing; start from default_config()")
        value = values[name]
        if value is None and field.default is None:
            continue
        if field.choices and value not in field.choices:
            raise unknown(f"config.{name}", value, field.choices)
        if not field.accepts(value):
            raise UserError(f"config.{name} = {value!r} is not allowed; allowed: {field.allowed}")
    _validate_schedule(config)
    _validate_data(config)
    method_of(config)
    network_options_of(config)


def _validate_schedule(config: ConfigDict) -> None:
    milestones = list(config.schedule.milestones)
    if milestones != sorted(set(milestones)):
        raise UserError(
            f"config.schedule.milestones = {tuple(milestones)} are out of order; "
            "allowed: increasing epochs"
        )


def _validate_data(config: ConfigDict) -> None:
    data = config.data
    if data.name == "folder" and not data.dir:
        raise UserError(
            "config.data.dir is not set; data.name = 'folder' needs the directory that holds "
            f"{data.train_split}/<class>/*.jpg: --config.data.dir=DIR"
        )
    if data.name == "idx" and not data.dir:
        raise UserError(
            "config.data.dir is not set; data.name = 'idx' needs the directory that holds "
            "train-images-idx3-ubyte.gz and its like: --config.data.dir=DIR"
        )
    if data.name == "tfds" and not data.tfds_name:
        raise UserError("config.data.tfds_name is not set; data.name = 'tfds' needs one")
    if data.resize is not None and data.resize < data.image_size:
        raise UserError(
            f"config.data.resize = {data.resize} is below "
            f"config.data.image_size = {data.image_size}"
        )
    if len(data.mean) != len(data.std):
        raise UserError(
            f"config.data.mean has {len(data.mean)} values and config.data.std "
            f"{len(data.std)}; allowed: the same number"
        )
    if data.pad_crop >= data.image_size:
        raise UserError(
            f"config.data.pad_crop = {data.pad_crop} is not below "
            f"config.data.image_size = {data.image_size}"
        )


def method_of(config: ConfigDict, *, axis_name: str | None = None) -> Method:
    """The configured method.

    Args:
      config: the configuration.
      axis_name: mapped axis over which batch statistics are averaged.

    Raises:
      UserError: an option that is set but that the method does not have.
    """
    options = {name: v for name, v in config.method_options.items() if v is not None}
    fields = {field.name for field in dataclasses.fields(METHODS[config.method])}
    if "weight_mean" in fields:
        options["weight_mean"] = config.weight_mean
    for option in options:
        if option not in fields:
            raise UserError(
                f"config.method_options.{option} does not apply to method {config.method!r}"
            )
    method = create_method(
        config.method,
        axis_name=axis_name,
        activation_storage=config.activation_storage,
        remat=config.remat,
        **options,
    )
    if config.micro_batches > 1 and method.couples_examples:
        raise UserError(
            f"config.micro_batches = {config.micro_batches} does not go with method "
            f"{config.method!r}, whose inner layers normalize over the batch: parts of it have "
            "other statistics than the whole, and so another gradient; allowed: 1"
        )
    return method


def network_options_of(config: ConfigDict) -> dict[str, Any]:
    """The network options that are set.

    Raises:
      UserError: an option that the network does not have.
    """
    options = {name: v for name, v in config.network_options.items() if v is not None}
    allowed = network_options(config.network)
    for option in options:
        if option not in allowed:
            raise UserError(
                f"config.network_options.{option} does not apply to network "
                f"{config.network!r}; its options: {', '.join(allowed) or 'none'}"
            )
    return options


def describe_fields() -> str:
    """A page that lists every field with its meaning, default and allowed values."""
    lines = []
    for name, field in FIELDS.items():
        default = "unset" if field.default is None else repr(field.default)
        lines.append(f"config.{name}  (default: {default})")
        lines += textwrap.wrap(field.meaning, 92, initial_indent="    ", subsequent_indent="    ")
        if described := field.describe():
            lines += textwrap.wrap(
                f"allowed: {described}", 92, initial_indent="    ", subsequent_indent="      "
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe_fields())
