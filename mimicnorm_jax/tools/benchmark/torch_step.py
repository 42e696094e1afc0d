"""The training step in PyTorch, written as people there write it: what ours is held against.

Of the input it normalizes random uint8 images on the device and flips them; padding and cropping it
leaves out, which cost ours time that this does not take. Loss and optimizer are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax.config import FIELDS, flatten
from mimicnorm_jax.data.pipeline import steps_of
from mimicnorm_jax.errors import UserError, unknown
from mimicnorm_jax.tools.benchmark.step import Timed
from mimicnorm_jax.tools.benchmark.torch_networks import PREFIX, check, create_network, import_torch
from mimicnorm_jax.tools.memory.compiled import images_without_data
from mimicnorm_jax.tools.variants import Variant

PRECISIONS = ("float32", "bfloat16")

# What another value of would make ours another computation than the one here.
_FIXED = (
    *("activation_storage", "remat", "micro_batches", "optimizer.momentum", "optimizer.nesterov"),
    *("optimizer.weight_decay_mask", "optimizer.clip_norm", "optimizer.label_smoothing"),
    *("optimizer.ema_decay", "data.rotation"),
    *(name for name in FIELDS if name.startswith(("network_options.", "method_options."))),
)

Step = Callable[[], Any]


def make_loss(network: Any, device: str, precision: str) -> Callable[[Any, Any], Any]:
    """The loss of a batch as it comes from the host.

    Args:
      network: from ``create_network``.
      device: ``"cpu"`` or ``"cuda"``.
      precision: ``"float32"``, or ``"bfloat16"``: by autocast, parameters in float32.

    Returns:
      A function of images uint8 ``(B, C, H, W)`` and labels int64 ``(B,)``.
    """
    torch = import_torch()

    def loss_of(images: Any, labels: Any) -> Any:
        flips = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        x = torch.where(flips, images.flip(3), images)
        x = (x.float() / 255 - 0.5) / 0.25
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(x)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    return loss_of


def make_step(
    network: Any,
    loss_of: Callable[[Any, Any], Any],
    images: Any,
    labels: Any,
    *,
    learning_rate: float,
    weight_decay: float,
) -> Step:
    """One step of SGD with momentum 0.9 on a fixed batch; returns its loss, a tensor.

    Args:
      network: from ``create_network``.
      loss_of: from ``make_loss``.
      images, labels: its arguments.
      learning_rate, weight_decay: of the optimizer; all parameters decay.
    """
    optimizer = import_torch().optim.SGD(
        network.parameters(),
        lr=learning_rate,
        momentum=0.9,
        weight_decay=weight_decay,
        fused=images.is_cuda,
    )

    def step() -> Any:
        optimizer.zero_grad()
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class TorchStep(Timed):
    """A step in PyTorch that is compiled and warm.

    Args:
      call: one step.
      wait: waits for the device.
      compile_s: seconds of the first step, compilation included; 0 where none is done.
      compiled: whether ``torch.compile`` made it.
      peak: bytes, see ``peak_bytes``.
    """

    def __init__(
        self,
        call: Step,
        wait: Callable[[], None],
        *,
        compile_s: float,
        compiled: bool,
        peak: int | None,
    ):
        super().__init__(call, compile_s, flops=0.0)  # which nobody counts
        self._wait = wait
        self._peak = peak
        self.compiled = compiled

    def seconds(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self._call()
        self._wait()
        return time.perf_counter() - began

    def peak_bytes(self) -> int | None:
        """The most that PyTorch's allocator had in use for a warm step; None on a CPU."""
        return self._peak


def _device(torch: Any) -> str:
    """PyTorch's name of the device that JAX uses: another would be no comparison."""
    backend = jax.default_backend()
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    if backend != "cpu":
        raise UserError(
            f"methods that begin with {PREFIX} run on what JAX uses, {backend}, which PyTorch "
            f"{torch.__version__} does not find; allowed: cpu, or a GPU that both can use"
        )
    return "cpu"


def prepare(
    network: str,
    method: str,
    *,
    image_size: int,
    num_classes: int,
    channels: int,
    width: float,
    batch_size: int,
    precision: str,
    learning_rate: float,
    weight_decay: float,
) -> TorchStep:
    """Compiles a training step (on a GPU; on a CPU it is eager), and runs it on random images.

    Where JAX uses a GPU too, ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` leaves memory for this.

    Args:
      network, method, image_size, num_classes, channels, width: as for ``create_network``.
      batch_size: examples in a step.
      precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 on a GPU.
      learning_rate, weight_decay: as for ``make_step``.

    Raises:
      UserError: what is not offered, or PyTorch or its GPU is missing.
    """
    check(network, method)
    torch = import_torch()
    device = _device(torch)
    on_gpu = device == "cuda"
    if precision == "auto":
        precision = "bfloat16" if on_gpu else "float32"
    if precision not in PRECISIONS:
        raise unknown(f"precision for methods that begin with {PREFIX}", precision, PRECISIONS)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, which XLA uses too
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    held = torch.cuda.memory_allocated() if on_gpu else 0  # by steps that were prepared before

    torch.manual_seed(0)
    model = create_network(
        network,
        method,
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        width=width,
    ).to(device, memory_format=torch.channels_last)
    shape = (batch_size, channels, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch_size,), device=device)
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    eager = make_loss(model, device, precision)
    call, compiled, began = make_step(model, eager, images, labels, **rates), False, 0.0
    if on_gpu:
        began = time.perf_counter()
        fast = make_step(model, torch.compile(eager), images, labels, **rates)
        if compiled := _compiles(fast, torch):
            call = fast
        wait()
    compile_s = time.perf_counter() - began if compiled else 0.0
    for _ in range(2):
        call()
    wait()
    peak = None
    if on_gpu:
        # from here on: while it chooses algorithms, cuDNN tries some that need more
        torch.cuda.reset_peak_memory_stats()
        call()
        wait()
        peak = torch.cuda.max_memory_allocated() - held
    return TorchStep(call, wait, compile_s=compile_s, compiled=compiled, peak=peak)


def _compiles(step: Step, torch: Any) -> bool:
    """Runs a compiled step for the first time; says so where it cannot be compiled.

    Its compiler needs Triton and a C compiler, which not every machine has.
    """
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"torch.compile failed, so PyTorch runs eagerly: {reason}", flush=True)
        return False
    return True


def check_variant(variant: Variant) -> None:
    """Finds out whether a variant of a configuration has a step here.

    Raises:
      UserError: it has not.
    """
    check(variant.config.network, variant.label.partition(":")[0])
    values = flatten(variant.config)
    for name in _FIXED:
        if values[name] != FIELDS[name].default:
            raise UserError(
                f"--methods={PREFIX}{variant.label}: config.{name} = {values[name]!r} is not "
                f"offered in PyTorch; allowed: {FIELDS[name].default!r}"
            )


def prepare_variant(variant: Variant, mesh: Mesh, num_classes: int | None = None) -> TorchStep:
    """``prepare`` for a variant of a configuration.

    Args:
      variant: what has passed ``check_variant``.
      mesh: of one device.
      num_classes: where the configuration does not tell.

    Raises:
      UserError: it is not offered.
    """
    if mesh.size > 1:
        raise UserError(
            f"methods that begin with {PREFIX} use one device, not {mesh.size}: "
            "--config.num_devices=1"
        )
    config = variant.config
    images = images_without_data(config, num_classes)
    size, _, channels = images.shape
    return prepare(
        config.network,
        config.method,
        image_size=size,
        num_classes=images.num_classes,
        channels=channels,
        width=config.width,
        batch_size=config.batch_size,
        precision=config.precision,
        learning_rate=_first_rate(config, images.num_examples),
        weight_decay=config.optimizer.weight_decay,
    )


def _first_rate(config: ConfigDict, num_examples: int) -> float:
    """The learning rate of the first steps of a run: what ours are timed at."""
    warmup = round(steps_of(config.schedule.warmup_epochs, num_examples, config.batch_size))
    return config.learning_rate / max(1, warmup)
