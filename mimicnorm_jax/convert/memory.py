"""Memory of a training step, by the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mimicnorm_jax.convert.trace import Arguments, chosen_logits


def peak_bytes(compiled: Any, platform: str) -> int:
    """What a compiled program needs at its peak, arguments and results included.

    Args:
      compiled: of ``jax.stages.Compiled``.
      platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
    """
    memory = compiled.memory_analysis()
    # Donated arguments are results too. A TPU's own peak counts all that lives at one time; of the
    # other backends' programs, temporaries are allotted at once, and the CPU's peak omits them.
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes
    return int(memory.peak_memory_in_bytes if platform == "tpu" else whole)


def training_memory(
    model: nnx.Module, given: Arguments, logits: Callable[[Any], Any] | None
) -> int:
    """Bytes that the gradient of a cross-entropy needs, with parameters and batch.

    Args:
      model: the network, which is left as it is.
      given: its arguments; shapes are enough.
      logits: chooses the logits among the outputs.
    """
    network = nnx.clone(model)
    network.train()
    for _, module in nnx.iter_modules(network):
        if hasattr(module, "axis_name"):  # nothing is mapped here
            module.axis_name = None
    split: Any = nnx.split(network, nnx.Param, ...)
    graphdef, params, rest = split

    def loss(params: Any, rest: Any, arrays: Any) -> Any:
        trained = nnx.merge(graphdef, params, rest, copy=True)
        outputs = chosen_logits(given.call(trained, arrays), logits)
        losses = [-jax.nn.log_softmax(output)[..., 0].mean() for output in outputs]
        return sum(losses), nnx.state(trained, nnx.Not(nnx.Param))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = step.lower(params, rest, given.arrays).compile()
    return peak_bytes(compiled, jax.default_backend())
