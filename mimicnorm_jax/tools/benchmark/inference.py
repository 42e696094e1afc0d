"""The speed of inference on one core: the folded network in JAX, onnxruntime and PyTorch.

All rivals compute one function, that of a BatchNorm network with random weights and statistics.
Other methods need no run of their own: folded, a MimicNorm network has the same layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src import xla_bridge
from ml_collections import ConfigDict

from mimicnorm_jax.config import method_of, validate
from mimicnorm_jax.convert import fold
from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.export.prepared import check_agreement
from mimicnorm_jax.models import create_model
from mimicnorm_jax.tools.benchmark import torch_networks
from mimicnorm_jax.tools.benchmark.step import Timed
from mimicnorm_jax.tools.memory.compiled import images_without_data
from mimicnorm_jax.tools.variants import with_method
from mimicnorm_jax.train.program import network_arguments
from mimicnorm_jax.weights.layers import Layer, layers_of

BATCHES = (1, 32)
FOLDED, UNFOLDED, ONNXRUNTIME = "folded", "batchnorm", "onnxruntime"
IN_TORCH = f"{torch_networks.PREFIX}batchnorm"
FUSED_IN_TORCH = f"{IN_TORCH} fused"
PRECISIONS = ("auto", "float32")


@dataclasses.dataclass(frozen=True)
class Network:
    """What is timed.

    Attributes:
      name: of the network.
      model: with BatchNorms, in evaluation mode.
      folded: the same function as plain layers.
      arguments: of ``create_model``.
    """

    name: str
    model: nnx.Module
    folded: nnx.Module
    arguments: dict[str, Any]

    def images(self, batch: int) -> np.ndarray:
        """Random normalized images ``(B, H, W, C)``."""
        size = self.arguments["image_size"]
        shape = (batch, size, size, self.arguments["channels"])
        return np.random.default_rng(0).standard_normal(shape, np.float32)


class Ready(NamedTuple):
    """A program that waits for its call, which returns logits when they are there."""

    call: Callable[[], Any]
    compile_s: float


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Binds the process to one core inside the ``with`` block.

    Raises:
      UserError: the system cannot do it, or XLA has started its threads already: as many as there
        were cores then.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("inference is timed on one core, which needs Linux's sched_setaffinity")
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 1 and xla_bridge.backends_are_initialized():
        raise UserError(
            "inference is timed on one core, and JAX computes already in this process, on "
            f"{len(allowed)}: start the benchmark as a process of its own"
        )
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def prepared_config(config: ConfigDict) -> ConfigDict:
    """The configuration as it is timed: its network with BatchNorms, in float32.

    Raises:
      UserError: it does not fit, or has another precision.
    """
    if config.precision not in PRECISIONS:
        raise UserError(
            f"config.precision = {config.precision!r}: inference is timed in float32; allowed: "
            + ", ".join(map(repr, PRECISIONS))
        )
    config = with_method(config, "batchnorm")
    config.precision = "float32"
    # Programs with their weights inside: kept, they would fill the disk.
    config.compilation_cache = ""
    validate(config)
    return config


def create(config: ConfigDict, num_classes: int | None = None) -> Network:
    """Makes the network of a configuration of ``prepared_config``.

    Args:
      config: the configuration.
      num_classes: where it does not tell.

    Raises:
      UserError: the network does not fit the images.
    """
    images = images_without_data(config, num_classes)
    arguments = network_arguments(config, images)
    method = method_of(config)
    model: Any = nnx.eval_shape(
        lambda: create_model(method=method, rngs=nnx.Rngs(config.seed), **arguments)
    )
    _randomize(model)
    model.eval()
    spec = jax.ShapeDtypeStruct((1, *images.shape), jnp.float32)
    return Network(config.network, model, fold(model, spec).network, arguments)


_LOW_HIGH = {"scale": (0.5, 1.0), "bias": (-0.2, 0.2), "mean": (-0.2, 0.2), "var": (0.5, 1.5)}


def _randomize(model: nnx.Module) -> None:
    """Gives a network of shapes its values.

    BatchNorms that are as training starts would do nothing, and a rival could leave them out. To
    compile the initial values takes a ResNet-18 half a minute of one core.
    """
    generator = np.random.default_rng(0)
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Variable):
            continue
        spec: Any = variable.get_value()
        if path[-1] == "kernel":
            values = generator.standard_normal(spec.shape, np.float32)
            values *= math.sqrt(2 / math.prod(spec.shape[:-1]))
        else:
            values = generator.uniform(*_LOW_HIGH[str(path[-1])], spec.shape)
        variable.set_value(jnp.asarray(values, spec.dtype))


def _ready_in_jax(model: Any, images: np.ndarray) -> Ready:
    """A compiled network, whose weights are constants of the program.

    As in the other rivals. As arguments they took 1 to 8 % longer folded, and 9 to 39 % unfolded,
    where the compiler transforms kernels beforehand (ResNet-18 and -50, VGG16). Compiling takes up
    to five times as long with constants, which is no part of an inference.
    """
    x = jnp.asarray(images)
    began = time.perf_counter()
    compiled = jax.jit(lambda x: model(x)).lower(x).compile()
    seconds = time.perf_counter() - began
    # one after the other, as the other libraries do it
    return Ready(lambda: jax.block_until_ready(compiled(x)), seconds)


def _folded(network: Network, images: np.ndarray) -> Ready:
    return _ready_in_jax(network.folded, images)


def _unfolded(network: Network, images: np.ndarray) -> Ready:
    return _ready_in_jax(network.model, images)


def _onnxruntime(network: Network, images: np.ndarray) -> Ready:
    from mimicnorm_jax.export.onnx import INPUT
    from mimicnorm_jax.export.onnx_graph import to_onnx  # many rules, which few imports need

    try:
        onnxruntime = importlib.import_module(ONNXRUNTIME)
    except ImportError as error:
        raise UserError(
            f"it cannot be imported ({first_line(error)}): pip install onnx onnxruntime"
        ) from error
    folded: Any = network.folded
    spec = jax.ShapeDtypeStruct(images.shape, images.dtype)
    graph = to_onnx(lambda x: folded(x), [spec], input_names=[INPUT], output_names=["logits"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    file = graph.SerializeToString()
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - began
    return Ready(lambda: session.run(None, {INPUT: images})[0], seconds)


def _torch(network: Network, images: np.ndarray, *, fuses: bool) -> Ready:
    torch_networks.check(network.name, "batchnorm")
    torch = torch_networks.import_torch()
    torch.set_num_threads(1)
    names = ("num_classes", "image_size", "channels", "width")
    sizes = {name: network.arguments[name] for name in names}
    model = torch_networks.create_network(network.name, "batchnorm", **sizes).eval()
    put_in_torch(model, in_order(layers_of(network.model)))
    began = time.perf_counter()
    if fuses:
        model = importlib.import_module("torch.fx.experimental.optimization").fuse(model)
    seconds = time.perf_counter() - began if fuses else 0.0
    # as ours; fused, 4 to 13 % faster than with channels first
    model.to(memory_format=torch.channels_last)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Ready(torch.inference_mode()(lambda: model(x)), seconds)


def in_order(layers: dict[str, Layer]) -> list[Layer]:
    """Layers by their paths, in the order of ``torch_networks``: the stem comes first."""
    paths = sorted(layers, key=lambda path: not path.startswith("stem/"))
    return [layers[path] for path in paths]


def put_in_torch(network: Any, layers: Sequence[Layer]) -> None:
    """Writes our layers into a network of ``torch_networks``, in place.

    Args:
      network: with BatchNorms.
      layers: from ``in_order``.

    Raises:
      UserError: the networks differ, as where one has another stem.
    """
    torch = torch_networks.import_torch()
    remaining, layer, channels = list(layers), None, 0
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                if not remaining:
                    raise UserError(f"PyTorch's network has more layers than our {len(layers)}")
                layer = remaining.pop(0)
                kernel = layer.kernel
                if kernel.ndim == 2 and channels:  # it flattens images with their channels first
                    size = round((kernel.shape[0] / channels) ** 0.5)
                    kernel = kernel.reshape(size, size, channels, -1)
                    kernel = kernel.transpose(2, 0, 1, 3).reshape(layer.kernel.shape)
                channels = kernel.shape[-1] if kernel.ndim == 4 else 0
                _write(module.weight, np.moveaxis(kernel, (-1, -2), (0, 1)))
                if module.bias is not None:
                    zeros = np.zeros(kernel.shape[-1], np.float32)
                    _write(module.bias, zeros if layer.bias is None else layer.bias)
            elif isinstance(module, torch.nn.BatchNorm2d):
                norm = layer.norm if layer else None
                assert norm is not None
                module.eps = norm.epsilon
                _write(module.weight, norm.scale)
                _write(module.bias, norm.bias)
                _write(module.running_mean, norm.mean)
                _write(module.running_var, norm.var)
    if remaining:
        raise UserError(f"PyTorch's network has {len(remaining)} of our {len(layers)} layers less")


def _write(tensor: Any, values: np.ndarray) -> None:
    if tuple(tensor.shape) != values.shape:
        shape = tuple(tensor.shape)
        raise UserError(f"a layer of PyTorch's network has the shape {shape}, ours {values.shape}")
    tensor.copy_(torch_networks.import_torch().from_numpy(np.ascontiguousarray(values)))


#: What makes a rival ready, by its label; ratios are to the first.
RIVALS: dict[str, Callable[[Network, np.ndarray], Ready]] = {
    FOLDED: _folded,
    ONNXRUNTIME: _onnxruntime,
    FUSED_IN_TORCH: functools.partial(_torch, fuses=True),
    IN_TORCH: functools.partial(_torch, fuses=False),
    UNFOLDED: _unfolded,
}


class Prepared(NamedTuple):
    """Rivals that compute the same.

    Attributes:
      timed: by their labels.
      differences: of their logits from those of ``UNFOLDED``, as a part of the largest.
      left_out: why, of those that are missing here.
    """

    timed: dict[str, Timed]
    differences: dict[str, float]
    left_out: dict[str, str]


def prepare(network: Network, batch: int) -> Prepared:
    """Compiles all rivals, calls them once, and compares their logits.

    Args:
      network: what they compute.
      batch: images in a call.

    Raises:
      UserError: the logits of one differ, see ``check_agreement``: it is another network.
    """
    images = network.images(batch)
    ready: dict[str, Ready] = {}
    left_out: dict[str, str] = {}
    for label, make in RIVALS.items():
        try:
            ready[label] = make(network, images)
        except UserError as error:
            left_out[label] = str(error)
    logits = {label: np.asarray(one.call()) for label, one in ready.items()}
    differences = {
        label: check_agreement([found], [logits[UNFOLDED]], label)
        for label, found in logits.items()
    }
    flops = _flops(network, images)
    timed = {label: Timed(one.call, one.compile_s, flops) for label, one in ready.items()}
    return Prepared(timed, differences, left_out)


def _flops(network: Network, images: np.ndarray) -> float:
    """Operations of a call, of all rivals alike: those of the folded network as it is written."""
    folded: Any = network.folded
    cost = jax.jit(lambda x: folded(x)).lower(jnp.asarray(images)).cost_analysis() or {}
    return cost.get("flops", 0.0)


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    found = {"jax": jax.__version__}
    for name in ("torch", ONNXRUNTIME):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found
