"""Fields of the optimizer and of the learning rate."""

from __future__ import annotations

from mimicnorm_jax.config.field import (
    LONGEST,
    Field,
    above,
    at_least,
    each,
    in_unit_interval,
    is_rate,
    is_regex,
    true_or_false,
)

SCHEDULES = ("multistep", "constant", "cosine", "linear")

FIELDS: dict[str, Field] = {
    "optimizer.momentum": Field(0.9, "SGD momentum; 0 for none.", **in_unit_interval()),
    "optimizer.nesterov": Field(False, "Nesterov's form of momentum.", **true_or_false()),
    "optimizer.weight_decay": Field(5e-4, "Added to the gradient, times the parameter.", **at_least(0)),
    "optimizer.weight_decay_mask": Field(".*", "Parameters that decay: a regular expression searched in names such as blocks/0/branch/1/conv/kernel; the paper decays all.", allowed="a regular expression", check=is_regex),
    "optimizer.rates": Field((), "Learning rates of some parameters as a multiple of the others': PATTERN=FACTOR, such as ^(stem|blocks/[0-3]/)=0.1 or ^(?!classifier)=0, a regular expression searched in the parameters' names; of several that match, the first. 0 keeps parameters as they are.", **each("PATTERN=FACTOR, with a regular expression and a number >= 0", is_rate)),
    "optimizer.clip_norm": Field(None, "Clip the gradient to this global norm.", **above(0), kind=float),
    "optimizer.label_smoothing": Field(0.0, "Weight of the uniform distribution in the target.", **in_unit_interval()),
    "optimizer.ema_decay": Field(0.0, "Decay of an average of the parameters, which is then what is evaluated; after t steps at most (1+t)/(10+t); 0 for none.", **in_unit_interval()),
    "optimizer.ema_batches": Field(20, "ema_decay: training batches on which, at every evaluation, the batch statistics of the averaged parameters are estimated.", **at_least(1, 10**6)),
    "schedule.name": Field("multistep", "Learning rate after warm-up.", SCHEDULES),
    "schedule.warmup_epochs": Field(2.0, "Epochs in which the rate rises from 0, step by step.", **at_least(0, LONGEST)),
    "schedule.milestones": Field((80.0, 110.0, 135.0), "multistep: epochs at which the rate is multiplied by gamma; those beyond the end never come.", **each("increasing epochs > 0", lambda x: 0 < x <= LONGEST)),
    "schedule.gamma": Field(0.1, "multistep: the multiplier.", **above(0)),
}  # fmt: skip
