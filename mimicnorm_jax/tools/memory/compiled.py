"""What the compiler says of a training step: memory, work and traffic, without running it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.mlir.passmanager import PassManager
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimicnorm_jax import kept
from mimicnorm_jax.convert.memory import peak_bytes
from mimicnorm_jax.data.expected import expected
from mimicnorm_jax.parallel import DATA_AXIS
from mimicnorm_jax.tools.memory.chips import chip_of
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.variants import Variant
from mimicnorm_jax.train.program import Images, Program, make_program


@dataclasses.dataclass(frozen=True)
class Row:
    """The training step of one variant of a configuration, compiled for one target.

    Attributes:
      network, method, target: what, how, and for what.
      batch: examples in a step, over all devices.
      num_devices: how many share it.
      precision: of convolutions and matrix products.
      peak_bytes: of one device, arguments included; as all that follows.
      argument_bytes: the state (donated) and the batch.
      state_bytes: parameters, optimizer and statistics.
      activation_bytes: what the peak holds beside the arguments: activations kept for the
        backward pass, gradients, and working space.
      temp_bytes: all that the compiler allots beside arguments and results.
      flops: operations of a step; where the compiler does not count all of them (``is_counted``),
        those of the program before optimization.
      bytes_accessed: bytes read and written by a step; None where it does not count all of them.
      roofline_s: the least time of a step by the chip's data sheet; None where that is unknown.
      compile_s: seconds that compilation took, when it was done.
      program: SHA-256 of what was compiled, and by which versions.
    """

    network: str
    method: str
    target: str
    batch: int
    num_devices: int
    precision: str
    peak_bytes: int
    argument_bytes: int
    state_bytes: int
    activation_bytes: int
    temp_bytes: int
    flops: float
    bytes_accessed: float | None
    roofline_s: float | None
    compile_s: float
    program: str


def images_without_data(config: Any, num_classes: int | None = None) -> Images:
    """What ``make_program`` must know of images that need not be there."""
    known = expected(config.data, num_classes)
    size, channels = config.data.image_size, known.channels
    mean = tuple(config.data.mean) or (0.5,) * channels
    std = tuple(config.data.std) or (0.25,) * channels
    return Images((size, size, channels), known.num_classes, known.num_examples, mean, std)


def program_of(variant: Variant, mesh: Mesh, num_classes: int | None = None) -> Program:
    """The program of a variant for devices that need not be there.

    Raises:
      UserError: configuration and devices do not fit each other.
    """
    config = variant.config
    if config.precision == "auto":
        cpu = mesh.devices.flat[0].platform == "cpu"
        config.precision = "float32" if cpu else "bfloat16"
    images = images_without_data(config, num_classes)
    return make_program(config, images, mesh, method=variant.method)


def abstract_arguments(program: Program, images: Images) -> tuple[Any, Any]:
    """Shapes, types and placement of the state and of a batch."""
    replicated = NamedSharding(program.mesh, P())
    spread = NamedSharding(program.mesh, P(DATA_AXIS))
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        program.abstract_state,
    )
    size = program.config.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *images.shape), np.uint8, sharding=spread),
        "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=spread),
    }
    return state, batch


def analyse(
    variant: Variant,
    target: str,
    mesh: Mesh,
    num_classes: int | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> Row:
    """Compiles the training step of a variant, or remembers what its compilation gave.

    Args:
      variant: the configuration.
      target: the name of the devices.
      mesh: the devices, which need not be there.
      num_classes: where the configuration does not tell.
      known: fields of rows from elsewhere, by ``Row.program``.
    """
    program = program_of(variant, mesh, num_classes)
    config = program.config
    state, batch = abstract_arguments(program, images_without_data(config, num_classes))
    lowered = program.train_step.lower(state, batch)
    device = mesh.devices.flat[0]
    platform = device.platform
    place = f"{target} {device.device_kind}" if platform == "gpu" else target
    digest = _digest(lowered, place)
    if known and digest in known:
        fields = {field.name for field in dataclasses.fields(Row)}
        return Row(**{name: v for name, v in known[digest].items() if name in fields})
    measured = _remembered(lowered, digest, platform)
    flops, traffic = measured["flops"], measured["bytes_accessed"]
    if not is_counted(config, platform):
        traffic = None
        flops = unoptimized_flops(variant, num_classes) / mesh.size
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return Row(
        network=config.network,
        method=variant.label,
        target=target,
        batch=config.batch_size,
        num_devices=mesh.size,
        precision=config.precision,
        peak_bytes=measured["peak"],
        argument_bytes=measured["arguments"],
        state_bytes=sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state)
        ),
        activation_bytes=measured["peak"] - measured["arguments"],
        temp_bytes=measured["temp"],
        flops=flops,
        bytes_accessed=traffic,
        roofline_s=chip.seconds(flops, traffic) if chip and traffic else None,
        compile_s=measured["seconds"],
        program=digest,
    )


def is_counted(config: Any, platform: str) -> bool:
    """Whether the compiler counts all operations and traffic of a step.

    Of a loop over micro-batches it counts one round. A GPU's convolutions and matrix products are
    calls of libraries, of which it counts nothing.
    """
    return platform == "cpu" or (platform != "gpu" and config.micro_batches == 1)


def unoptimized_flops(variant: Variant, num_classes: int | None = None) -> float:
    """Operations of a step without a loop, before optimization, of all devices."""
    program = program_of(variant, mesh_of("cpu", 1), num_classes)
    images = images_without_data(program.config, num_classes)
    traced = program.train_step.trace(*abstract_arguments(program, images))
    # as a device computes it that has loops: on CPUs convolutions have other algorithms
    cost = traced.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    return cost.get("flops", math.nan)


def _digest(lowered: Any, target: str) -> str:
    plugins = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}
    packages = ("jaxlib", *plugins.get(target[:3], ()))
    versions = [f"{name} {_version(name)}" for name in packages]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    said = "\n".join([target, *versions, *flags, _canonical(lowered)])
    return hashlib.sha256(said.encode()).hexdigest()


def _canonical(lowered: Any) -> str:
    """The program as text, the same however it came about.

    Of what is computed in another way on each platform, JAX leaves a branch with one case, and
    numbers its functions through those of all platforms: a layer that becomes faster on a CPU
    would seem to change what a TPU computes.
    """
    module = lowered.compiler_ir()
    with module.context:
        program = module.operation.clone()
        PassManager.parse("builtin.module(canonicalize,cse,symbol-dce)").run(program)
    names: dict[str, str] = {}
    return re.sub(r"@\w+_\d+", lambda m: names.setdefault(m[0], f"@{len(names)}"), str(program))


def _remembered(lowered: Any, digest: str, platform: str) -> dict[str, Any]:
    """``_compile``, whose result is kept: an interrupted report goes on where it was."""
    path = kept.cache_folder() / "compiled" / f"{digest}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        pass
    measured = _compile(lowered, platform)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(measured))
        draft.replace(path)
    except OSError:  # a machine without a home
        pass
    return measured


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _compile(lowered: Any, platform: str) -> dict[str, Any]:
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "peak": peak_bytes(compiled, platform),
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "flops": cost.get("flops", math.nan),
        "bytes_accessed": cost.get("bytes accessed"),
        "seconds": seconds,
    }
