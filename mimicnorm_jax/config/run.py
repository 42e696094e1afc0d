"""Fields of a run: what is trained, how long, where it computes, what it keeps."""

from __future__ import annotations

from typing import get_args

from mimicnorm_jax.config.field import LONGEST, SHORTEST, Field, above, at_least, true_or_false
from mimicnorm_jax.layers.remat import REMATS
from mimicnorm_jax.layers.storage import STORAGES
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.methods.mimicnorm import Center
from mimicnorm_jax.models import NETWORKS
from mimicnorm_jax.precision import PRECISIONS

FIELDS: dict[str, Field] = {
    "method": Field("mimicnorm", "What normalizes the network.", tuple(METHODS)),
    "network": Field("resnet20", "The architecture.", tuple(NETWORKS)),
    "init_from": Field("", "Weights to start from: the folder of a run, of which the best checkpoint is taken, or a file of torchvision's or timm's weights (.safetensors, .pth); BatchNorms are folded where the method has none, and other classes get a new classifier. Empty data.mean: its mean and standard deviation."),
    "width": Field(1.0, "Multiplier of the network's features.", **above(0, 100)),
    "epochs": Field(150.0, "Length of the run in epochs; may be a fraction.", **at_least(SHORTEST, LONGEST)),
    "max_steps": Field(None, "Stop after this many steps even if epochs are left.", **at_least(1), kind=int),
    "batch_size": Field(256, "Examples in a step, over all devices.", **at_least(1, 2**24)),
    "seed": Field(0, "Decides initial values, order, augmentation and dropout.", **at_least(0, 2**32 - 1)),
    "learning_rate": Field(0.1, "Learning rate after warm-up.", **above(0)),
    "precision": Field("auto", "Type of convolutions and matrix products; auto is bfloat16 on GPU and TPU, float32 on CPU.", PRECISIONS),
    "weight_mean": Field("projected", "How weight mean is kept: by the optimizer (projected), or in the forward pass (reparameterized).", ("projected", "reparameterized")),
    "center": Field("fan_in", "Which convolutions weight mean centres: those with a fan-in above method_options.min_fan_in (the authors' rule for CIFAR), or all that are not depthwise (theirs for ImageNet).", get_args(Center)),
    "activation_storage": Field("full", "How convolutions keep their inputs for the backward pass: as they are, or in 8 or 4 bits.", STORAGES),
    "remat": Field("none", "What the backward pass computes again: nothing, whole blocks, or all but convolutions and matrix products.", REMATS),
    "micro_batches": Field(1, "Parts in which a batch is computed, for its exact gradient in the memory of one part.", **at_least(1, 2**24)),
    "steps_per_call": Field(1, "Steps that a GPU or TPU does without asking the host again, for networks whose steps are short; a CPU always does one.", **at_least(1, 2**10)),
    "require_same_machine": Field(False, "Refuse to resume where processor, vector instructions, threads, devices, JAX or XLA's flags are others than those that saved: the bits may differ.", **true_or_false()),
    "cpu_threads": Field(None, "Threads that XLA computes with on CPUs; unset: NPROC, else one a processor. The bits of some networks follow their number: set, they do not follow that of the processors.", **at_least(1, 1024), kind=int),
    "deterministic": Field(False, "Deterministic GPU kernels, for bit-exact resume on GPUs (slower).", **true_or_false()),
    "num_devices": Field(None, "Devices to use, over all processes; unset uses all.", **at_least(1), kind=int),
    "log_every": Field(10, "Steps between two lines of metrics.", **at_least(1)),
    "eval_every": Field(1.0, "Epochs between two evaluations; the end is always evaluated.", **at_least(SHORTEST, LONGEST)),
    "checkpoint_every": Field(1.0, "Epochs between two checkpoints; the end is always kept.", **at_least(SHORTEST, LONGEST)),
    "keep_checkpoints": Field(2, "Latest checkpoints to keep, beside the best one; 0 keeps all, for tools.verify.", **at_least(0)),
    "on_nonfinite": Field("stop", "A step whose loss, gradient or result is infinite or NaN stops the run, or changes nothing and is counted (skip).", ("stop", "skip")),
    "skip_limit": Field(100, "skip: the run stops when more steps than this were skipped.", **at_least(0)),
    "hang_minutes": Field(30.0, "Without a step for so long, all stacks are printed and the run ends; 0 never does.", **at_least(0)),
    "compilation_cache": Field("auto", "Folder that keeps compiled programs, so that a restart compiles nothing; auto: JAX_COMPILATION_CACHE_DIR, else ~/.cache/mimicnorm_jax; empty: none."),
}  # fmt: skip
