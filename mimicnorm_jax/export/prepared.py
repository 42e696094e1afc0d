"""A network made ready to leave: folded, in float32, a function of its images alone."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import export

from mimicnorm_jax.convert import fold
from mimicnorm_jax.convert.linen_network import LinenNetwork
from mimicnorm_jax.convert.substitute import copied
from mimicnorm_jax.data.augment import normalize
from mimicnorm_jax.errors import UserError, first_line

_STRIDES = (1, 2, 4, 8, 16, 32, 64)
_OTHERS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float64)))
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a network beside its weights; all of it may be left out.

    Attributes:
      classes: their names, in the order of the logits.
      temperature: by which the logits are divided for probabilities.
      mean, std: of each channel in units of 1. Where the file takes normalized images, these are
        what to normalize by: ``(images / 255 - mean) / std``.
      resize: the short side of an image in pixels, before its centre is cropped.
      run: what else is told of the run that trained it, such as ``{"network": "resnet20"}``.
      build: of a run, what ``mimicnorm_jax.load`` builds its network from.
    """

    classes: Sequence[str] = ()
    temperature: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: int | None = None
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Brings what NumPy and JAX made to the types of Python, as JSON has them."""
        plain = {
            "classes": tuple(map(str, self.classes)),
            "temperature": None if self.temperature is None else float(self.temperature),
            **{
                name: None if values is None else tuple(map(float, values))
                for name, values in (("mean", self.mean), ("std", self.std))
            },
            "run": json.loads(json.dumps(dict(self.run), default=_of_python)),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def _of_python(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network as it is exported.

    Attributes:
      network: folded, with parameters in float32.
      of_weights: weights and images to outputs.
      weights: of the network, by their paths, such as ``"blocks.0.branch.0.conv.kernel"``.
      expected: outputs of the network as it was given, of the same images.
      images: examples ``(B, H, W, C)``: normalized, or uint8 where the function normalizes.
      text: the shape of the input as ``jax.export.symbolic_shape`` takes it, such as
        ``"batch, 32*height, 32*width, 3"``.
      output_names: of the outputs, in their order.
      fixed: why fewer extents are free than were asked for; empty where none.
    """

    network: nnx.Module
    of_weights: Callable[[Mapping[str, Any], Any], Any]
    weights: dict[str, jax.Array]
    expected: list[np.ndarray]
    images: np.ndarray
    text: str
    output_names: tuple[str, ...]
    fixed: str = ""

    @property
    def function(self) -> Callable[[Any], Any]:
        """Images to outputs; the weights are constants."""
        return functools.partial(self.of_weights, self.weights)

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """Shape, with its free extents, and type of the images."""
        return jax.ShapeDtypeStruct(export.symbolic_shape(self.text), self.images.dtype)

    @property
    def shape(self) -> tuple[str | int, ...]:
        """As in ``text``: ``("batch", "32*height", "32*width", 3)``."""
        parts = (part.strip() for part in self.text.split(","))
        return tuple(int(part) if part.isdecimal() else part for part in parts)

    def of_one_size(self, why: str) -> Prepared:
        """The same with the height and width of its images."""
        text = _text(("batch", *self.images.shape[1:]))
        return dataclasses.replace(self, text=text, fixed=_because(why))

    def less_free(self) -> Iterator[Prepared]:
        """The same, and then with height and width as multiples of larger strides only."""
        yield self
        height, width = self.shape[1:3] if len(self.shape) == 4 else (0, 0)
        if not isinstance(height, str) or not isinstance(width, str):
            return
        now = int(height.partition("*")[0]) if "*" in height else 1
        for stride in _STRIDES:
            if stride > now and not any(extent % stride for extent in self.images.shape[1:3]):
                free = ("batch", _times(stride, "height"), _times(stride, "width"), self.shape[3])
                yield dataclasses.replace(self, text=_text(free))

    def other_images(self) -> np.ndarray | None:
        """Images of another number and, where these are free, of another size; None if none is."""
        if self.shape[0] != "batch":
            return None
        images = self.images[:1]
        for axis in (1, 2):
            extent = self.shape[axis] if axis < len(self.shape) else 0
            if isinstance(extent, str):
                stride, star, _ = extent.partition("*")
                step = int(stride) if star else 1
                images = np.concatenate([images, images.take(range(step), axis)], axis)
        return images


def prepare_as(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    about: About,
    normalize: bool,
    symbolic: bool,
) -> Prepared:
    """``prepare``, with normalization inside by what is known of the network.

    Raises:
      UserError: also where that is not known, or are not as many classes as logits.
    """
    if normalize and (about.mean is None or about.std is None):
        raise UserError("normalize=True needs mean and std: about=About(mean=..., std=...)")
    if not all(0 <= value <= 1 for value in about.mean or ()) or not all(
        0 < value <= 1 for value in about.std or ()
    ):
        raise UserError(
            f"mean = {about.mean} and std = {about.std} are not in units of 1; allowed: 0 to 1, of "
            "pixels divided by 255"
        )
    mean, std = (about.mean, about.std) if normalize else (None, None)
    prepared = prepare(model, *example, mean=mean, std=std, symbolic=symbolic)
    sizes = [output.shape[-1] for output in prepared.expected if output.ndim > 1]
    if about.classes and len(about.classes) not in sizes:
        said = " or ".join(map(str, sizes)) or "no"
        raise UserError(f"{len(about.classes)} classes were given, and there are {said} logits")
    return prepared


def prepare(
    model: nnx.Module | linen.Module | LinenNetwork,
    *example: Any,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    symbolic: bool = True,
) -> Prepared:
    """Folds a network and finds out which extents of its input may be free.

    Args:
      model: as for ``fold``.
      *example: what ``fold`` takes beside it, the images ``(B, ..., C)`` last: real ones, on
        which files are compared; uint8 where ``mean`` is given.
      mean, std: of each channel in units of 1; the file then takes uint8 images, and normalizes
        them to ``(images / 255 - mean) / std``.
      symbolic: let the batch be of any size, and height and width any multiples of the stride,
        where the network allows it.

    Raises:
      UserError: images of another type; a folded network that computes something else than the one
        given.
    """
    *variables, images = example
    images = np.asarray(images)
    if not images.size:
        raise UserError(f"the examples, of shape {images.shape}, have no image to compare on")
    if jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(np.float32)  # NumPy normalizes to float64
    given = _normalized(images, mean, std)
    if isinstance(model, nnx.Module):
        model = copied(model)
        model.eval()
        _to_float32(model)  # before it is folded, which rounds
    network = fold(model, *variables, given).network
    _to_float32(network)
    # How a Linen network is told to evaluate, only its writer knows: there the folded one stands.
    expected = _outputs_of_module(model if isinstance(model, nnx.Module) else network, given)
    plain, weights = as_function(network)

    def of_weights(weights: Mapping[str, Any], x: Any) -> Any:
        return plain(weights, _normalized(x, mean, std))

    function = functools.partial(of_weights, weights)
    found = _outputs_of(function, images)
    check_agreement(found, expected, "the folded network")
    text, fixed = _free_shape(function, images) if symbolic else (_text(images.shape), "")
    names = _output_names(jax.eval_shape(function, jnp.asarray(images)))
    return Prepared(network, of_weights, weights, expected, images, text, names, fixed)


def check_agreement(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], what: str
) -> float:
    """Compares outputs.

    Args:
      found: of ``what``.
      expected: of the network.
      what: begins the message.

    Returns:
      The largest difference, as a multiple of the largest output where that is above 1.

    Raises:
      UserError: it is above 1e-4.
    """
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        if x.shape != y.shape:
            raise UserError(f"{what} puts out {x.shape} where the network puts out {y.shape}")
        scale = max(1.0, float(np.abs(y).max(initial=0.0)))
        difference = float(np.abs(x.astype(np.float64) - y).max(initial=0.0)) / scale
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    if not worst <= TOLERANCE:
        raise UserError(
            f"{what} differs from the network by {worst:.2g} of its largest output, which is more "
            f"than {TOLERANCE:g}"
        )
    return worst


def compare(prepared: Prepared, run: Callable[[np.ndarray], Any], what: str) -> float:
    """Runs a file: on the examples, and where extents are free on other ones.

    Args:
      prepared: the network.
      run: images to a list of outputs, as the file has them.
      what: names the file.

    Returns:
      The largest difference, see ``check_agreement``.

    Raises:
      UserError: it is too large.
    """
    pairs = [(prepared.images, prepared.expected)]
    if (other := prepared.other_images()) is not None:
        pairs.append((other, _outputs_of(prepared.function, other)))
    return max(check_agreement(run(images), expected, what) for images, expected in pairs)


def _normalized(images: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Any:
    if mean is None or std is None:
        if (mean is None) != (std is None):
            raise UserError("mean and std go together")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images of type {images.dtype}; allowed: normalized ones in float32, or uint8 "
                "with normalize=True, mean and std"
            )
        return images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != len(mean):
        raise UserError(
            f"images of type {images.dtype} and shape {images.shape}; allowed: uint8 "
            f"(B, H, W, {len(mean)})"
        )
    return normalize(images, mean=mean, std=std, dtype=jnp.dtype(jnp.float32))


def as_function(
    network: nnx.Module,
) -> tuple[Callable[[Mapping[str, Any], Any], Any], dict[str, jax.Array]]:
    """A network as a function of its weights and images, and the weights, by their paths.

    Only numbers are weights: what else the network keeps, such as a counter, stays in the function.
    """
    graph, state, *others = nnx.split(network, is_weight, ...)
    variables = {".".join(map(str, path)): (path, node) for path, node in nnx.to_flat_state(state)}

    def function(weights: Mapping[str, Any], x: Any) -> Any:
        given = nnx.from_flat_state(
            [(path, node.replace(weights[name])) for name, (path, node) in variables.items()]
        )
        # A module of another trace cannot be taken apart, as nnx.scan in a network does.
        model: Any = nnx.merge(graph, given, *others, copy=True)
        return model(x)

    return function, {name: node[...] for name, (_, node) in variables.items()}


def is_weight(path: Any, node: Any) -> bool:
    """Whether a node of a network, as ``nnx.iter_graph`` gives them, is a variable of floats."""
    return isinstance(node, nnx.Variable) and jnp.issubdtype(node[...].dtype, jnp.floating)


def _outputs_of(function: Callable[[Any], Any], images: Any) -> list[np.ndarray]:
    compiled = jax.jit(lambda x: function(x))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(jnp.asarray(images)))]


def _outputs_of_module(network: nnx.Module, images: Any) -> list[np.ndarray]:
    graph, state = nnx.split(network)

    @jax.jit
    def outputs(state: Any, x: Any) -> Any:  # constant weights XLA would centre at compilation
        model: Any = nnx.merge(graph, state, copy=True)
        return model(x)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs(state, jnp.asarray(images)))]


def _to_float32(network: nnx.Module) -> None:
    """Everything in float32: what the libraries that read the file have kernels for."""
    modules: list[Any] = [module for _, module in nnx.iter_modules(network)]
    for module in modules:
        if _computes_in_another_type(module):
            module.dtype = jnp.float32
    for path, node in nnx.iter_graph(network):
        if is_weight(path, node):
            node.set_value(jnp.asarray(node[...], jnp.float32))


def _computes_in_another_type(module: Any) -> bool:
    given = getattr(module, "dtype", None)
    try:
        return given is not None and jnp.dtype(given) in _OTHERS
    except TypeError:  # a dtype that means something else to its writer
        return False


def _text(shape: Sequence[Any]) -> str:
    return ", ".join(map(str, shape))


def _free_shape(function: Callable[[Any], Any], images: np.ndarray) -> tuple[str, str]:
    """The freest shape of images with which the network can be traced."""
    rest = images.shape[1:]
    of_image = [
        ("batch", _times(stride, "height"), _times(stride, "width"), images.shape[3])
        for stride in (_STRIDES if images.ndim == 4 else ())
        if not any(extent % stride for extent in rest[:2])
    ]
    why = ""
    for shape in (*of_image, ("batch", *rest)):
        spec = jax.ShapeDtypeStruct(export.symbolic_shape(_text(shape)), images.dtype)
        try:
            outputs = jax.tree.leaves(jax.eval_shape(function, spec))
        except Exception as error:  # whatever code of the network says of an unknown number
            why = why or first_line(error)
            continue
        if all(out.ndim and str(out.shape[0]) == "batch" for out in outputs):
            return _text(shape), "" if shape in of_image or not of_image else _because(why)
    return _text(images.shape), f"the batch is fixed: {why or 'an output has none'}"


def _times(stride: int, name: str) -> str:
    return name if stride == 1 else f"{stride}*{name}"


def _because(why: str) -> str:
    return f"height and width are fixed: {why}"


def _output_names(outputs: Any) -> tuple[str, ...]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(outputs)]
    if len(paths) == 1:
        return ("logits",)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path in paths)
    return tuple(f"output.{name}" for name in names)
