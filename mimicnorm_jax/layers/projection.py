"""Weight mean as an optax transform: the projected form (Appendix C)."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen, nnx

from mimicnorm_jax.layers.kernel import Centering, Phase, center_kernel, stable_normal
from mimicnorm_jax.layers.scaled import ScaledKernel, has_drifted, is_there

Path = tuple[str, ...]


class WeightMeanMask:
    """Which parameters are kernels of weight mean, and over which weights each is centred.

    It is a function from parameters to a tree of booleans, and so a mask for ``optax.masked``::

      optax.masked(optax.add_decayed_weights(1e-4), weight_mean_mask(model))

    ``bool(mask)`` says whether any kernel is chosen.

    Attributes:
      centerings: of each kernel, by its path in the parameters.
    """

    def __init__(self, centerings: Mapping[Path, Centering]):
        self.centerings = dict(centerings)

    def __bool__(self) -> bool:
        return bool(self.centerings)

    def __call__(self, params: Any) -> Any:
        """A tree like ``params`` with True for every chosen kernel.

        Args:
          params: the parameters that the mask was made of, or a tree of their structure such as
            their updates: an ``nnx.State``, a pure dictionary or a tree of another library.

        Raises:
          ValueError: they have not all of the chosen kernels.
        """
        return self._map(lambda path, leaf: True, params, lambda leaf: False)

    def center(self, params: Any) -> Any:
        """The parameters with each chosen kernel centred, as training has to start.

        Called in the forward pass it is the reparameterized form, for any library.

        Args:
          params: as for a call.

        Raises:
          ValueError: as a call.
        """
        return self._map(lambda path, leaf: self.centerings[path](leaf), params)

    def initialize(
        self,
        params: Any,
        key: jax.Array,
        *,
        after_relu: bool | Callable[[Path], bool] = True,
    ) -> Any:
        """The parameters with each chosen kernel drawn anew, by the paper's variance, centred.

        Args:
          params: as for a call.
          key: a PRNG key.
          after_relu: whether the inputs of the layers are rectified; or a function that is given
            a kernel's path and says it, as images are not. See ``stable_variance``.

        Raises:
          ValueError: as a call.
        """
        rectified = after_relu if callable(after_relu) else lambda path: after_relu
        order = {path: index for index, path in enumerate(sorted(self.centerings))}

        def draw(path: Path, leaf: Any) -> Any:
            centering = self.centerings[path]
            init = stable_normal(
                centering.fan_in(leaf.shape), centered=True, after_relu=bool(rectified(path))
            )
            return centering(init(jax.random.fold_in(key, order[path]), leaf.shape, leaf.dtype))

        return self._map(lambda path, leaf: draw(path, leaf), params)

    def within(self, params: Any) -> WeightMeanMask:
        """The mask of those of the kernels that ``params`` has, where only a part is trained."""
        entries = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_left_out)
        present = {path_of(path) for path, _ in entries}
        return WeightMeanMask({p: c for p, c in self.centerings.items() if p in present})

    def _map(
        self,
        chosen: Callable[[Path, Any], Any],
        tree: Any,
        others: Callable[[Any], Any] = lambda leaf: leaf,
    ) -> Any:
        entries, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_left_out)
        paths = [path_of(path) for path, _ in entries]
        missing = self.centerings.keys() - set(paths)
        if missing:
            raise ValueError(
                f"the mask's kernel {'/'.join(min(missing))} is not among the parameters, which "
                f"are named like {'/'.join(paths[0]) if paths else '(none)'}; for a part of them "
                "take mask.within(params)"
            )
        leaves = [
            leaf
            if _is_left_out(leaf)
            else chosen(path, leaf)
            if path in self.centerings
            else others(leaf)
            for path, (_, leaf) in zip(paths, entries, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)


def _is_left_out(leaf: Any) -> bool:
    """What ``optax.masked`` puts in the place of parameters that it leaves out."""
    return isinstance(leaf, optax.MaskedNode)


def path_of(path: tuple[Any, ...]) -> Path:
    """Names on the way to a leaf; the ``value`` of an ``nnx.Variable`` is none."""
    keys: list[Any] = []
    for entry in path:
        key = next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
        keys += key if isinstance(key, tuple) else (key,)  # of a flat state
    is_value = bool(keys) and keys[-1] == "value" and hasattr(path[-1], "name")
    return tuple(str(key) for key in (keys[:-1] if is_value else keys))


def project_weight_mean(
    mask: Any, *, axes: int | Sequence[int] | None = None
) -> optax.GradientTransformation:
    """Keeps kernels centred: the projected form of weight mean (Appendix C).

    Must be the last transform of a chain: it replaces the update ``u`` of each chosen
    kernel ``w`` by ``center(w + u) - w``, so that ``w`` stays centred without a backward
    pass through the mean. For SGD with momentum and weight decay this is the same
    training as centring in the forward pass, since every operation is linear.

    Example::

      transform = optax.chain(optax.sgd(0.1, momentum=0.9), project_weight_mean(model))
      optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    Args:
      mask: an ``nnx.Module``, whose layers with ``weight_mean="projected"`` are chosen; what
        ``weight_mean_mask``, ``linen_mask``, ``haiku_mask`` or ``equinox_mask`` make; a tree of
        booleans like the parameters (a pure dictionary does for an ``nnx.State``), or a function
        from the parameters to such a tree. Kernels must be centred at the start: those of
        ``WeightMeanConv`` are, ``mask.center(params)`` makes others so.
      axes: of a tree or function: over which the mean is taken, see ``center_kernel``. The
        others know.

    Returns:
      The transform; it has no state. Where nothing is chosen it warns, at once or in ``init``.

    Raises:
      ValueError: here: ``axes`` for what knows them, or what is no mask, such as a network of
        another library. In ``init`` or ``update``: no parameters given, a mask that does not fit
        them, or a chosen parameter with fewer than 2 axes.
    """
    if isinstance(mask, nnx.Module):
        mask = weight_mean_mask(mask)
    if isinstance(mask, WeightMeanMask):
        if axes is not None:
            raise ValueError("axes are for trees of booleans: this mask has those of its layers")
        center = mask.center
        if not mask:
            _warn_of_nothing(3)
    else:
        _refuse_networks(mask)
        center = functools.partial(_center_chosen, mask, axes)

    def init(params: Any) -> optax.EmptyState:
        if not isinstance(mask, WeightMeanMask) and not any(jax.tree.leaves(_tree(mask, params))):
            _warn_of_nothing(4)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("project_weight_mean needs the parameters: update(..., params)")
        moved = jax.tree.map(lambda w, u: w + u, params, updates)
        projected = jax.tree.map(
            lambda new, whole, w, u: u if new is whole else new - w,
            center(moved),
            moved,
            params,
            updates,
        )
        return projected, state

    return optax.GradientTransformation(init, update)


def _tree(mask: Any, params: Any) -> Any:
    """Booleans for the parameters, or for parts of them, as a pure dictionary."""
    return _pure(mask(params) if callable(mask) else mask)


def _center_chosen(mask: Any, axes: int | Sequence[int] | None, params: Any) -> Any:
    def center(w: Any) -> Any:
        return center_kernel(w, axes)

    centered = jax.tree.map(
        lambda chosen, part: jax.tree.map(center, part) if chosen else part,
        _tree(mask, params),
        _pure(params),
    )
    # A pure dictionary and the state it was made of have the same leaves in one order.
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(centered))


def _refuse_networks(mask: Any) -> None:
    if isinstance(mask, linen.Module):
        raise ValueError("of a network of flax.linen give linen_mask(network, images)")
    leaves = jax.tree.leaves(mask)
    if callable(mask) and any(hasattr(leaf, "shape") for leaf in leaves):
        raise ValueError("of an Equinox model give equinox_mask(model)")
    if not callable(mask) and not all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
        raise ValueError(
            "a mask has True or False for each parameter; weight_mean_mask, linen_mask, haiku_mask "
            "and equinox_mask make one"
        )


def _warn_of_nothing(stacklevel: int) -> None:
    warnings.warn(
        "project_weight_mean: the mask chooses no kernel, so nothing is kept centred; layers with "
        "weight_mean='reparameterized' need no transform",
        stacklevel=stacklevel,
    )


def _pure(tree: Any) -> Any:
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def weight_mean_mask(model: nnx.Module) -> WeightMeanMask:
    """Which parameters of a model are kernels in the projected form of weight mean.

    Args:
      model: any module; layers with ``weight_mean="projected"`` are found at any depth, also
        where ``nnx.vmap`` or ``nnx.scan`` stacked them: each of a stack is centred by itself.
        (Where its shape leaves open which axis numbers them, the one on which they are centred
        now does, or the first.)

    Returns:
      A mask of ``nnx.state(model, nnx.Param)``, or of the pure dictionary of that.
    """
    # of kernels that layers share a state has the first path only
    known = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found: dict[Path, Centering] = {}
    for place, module in nnx.iter_modules(model):
        path = (*map(str, place), "kernel")
        if not isinstance(module, ScaledKernel) or module.weight_mean != "projected":
            continue
        if path in known:
            kernel = module.kernel.get_value()
            found[path] = of_stack(module.centering, module.kernel_shape, kernel)
    return WeightMeanMask(found)


def of_stack(
    centering: Centering, kernel_shape: tuple[int, ...], kernel: Any, *, stack_axis: int = 0
) -> Centering:
    """How a stack of kernels is centred.

    Args:
      centering: of one kernel.
      kernel_shape: of one kernel.
      kernel: the stack, an array or its shape and type.
      stack_axis: where the shape leaves open which axis numbers the kernels: that one, unless the
        numbers show that they are centred on another.

    Raises:
      ValueError: it is no stack of ``kernel_shape``.
    """
    shape = tuple(kernel.shape)
    extra = len(shape) - len(kernel_shape)
    fitting: dict[Centering, bool] = {}
    for stack in itertools.combinations(range(len(shape)), max(extra, 0)):
        own = [axis - len(shape) for axis in range(len(shape)) if axis not in stack]
        if tuple(shape[axis] for axis in own) == kernel_shape:
            one = Centering(
                tuple(own[axis] for axis in centering.axes),
                tuple(Phase(own[p.axis], p.step, p.dilation) for p in centering.phases),
            )
            fitting.setdefault(one, stack_axis % len(shape) in stack)
    if not fitting:
        raise ValueError(f"a kernel of shape {shape} is no stack of kernels {kernel_shape}")
    wanted = [one for one, is_named in fitting.items() if is_named] or list(fitting)
    if len(fitting) > 1 and is_there(kernel):
        centred = [one for one in (*wanted, *fitting) if not has_drifted(kernel, one)]
        wanted = centred or wanted
    return wanted[0]
