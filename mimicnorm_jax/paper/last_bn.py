"""Figure 10: the variance of the outputs in the first epochs, with the last BN and without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mimicnorm_jax.config import default_config, validate
from mimicnorm_jax.data.augment import normalize
from mimicnorm_jax.data.images import centre_crop
from mimicnorm_jax.data.pipeline import Pipeline
from mimicnorm_jax.data.sources import channel_statistics
from mimicnorm_jax.paper.drawing import Data, Numbers, PaperFigure, new_figure
from mimicnorm_jax.parallel import make_mesh, shard_batch
from mimicnorm_jax.progress_bar import progress_bar
from mimicnorm_jax.train.program import Images, make_program

_SIZE = 32
_RATE = 0.1
_STEPS = 390  # of 256 images: two epochs of CIFAR
_MOMENTUM = 0.1  # in PyTorch's sense, as the paper says
_NETWORKS = {"vgg11": "VGG11", "resnet18": "ResNet18"}
_METHODS = {
    "mimicnorm": ("#228833", "with the last BN"),
    "weightmean": ("#ccbb44", "without it (weight mean)"),
    "nonorm": ("#4477aa", "without it (straight)"),
}


def _variances(
    network: str, method: str, data: Data, *, width: float, batch: int, steps: int
) -> list[list[float]]:
    """Running variances of what reaches the head: by step, until it is not finite, by class."""
    config = default_config()
    config.network, config.method, config.width = network, method, width
    config.learning_rate, config.batch_size, config.data.image_size = _RATE, batch, _SIZE
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    config.precision = "float32"
    validate(config)
    if data.pixels.shape[1] != _SIZE:  # digits and MNIST, which are grey
        large = [centre_crop(image, _SIZE, _SIZE) for image in data.pixels[..., 0]]
        data = Data(np.stack(large)[..., None], data.labels)
    source = data.source()
    classes = len(source.class_names)
    mean, std = (tuple(values.tolist()) for values in channel_statistics(source))
    mesh = make_mesh(1)
    program = make_program(
        config, Images(source.image_shape, classes, len(source), mean, std), mesh
    )
    keys = jax.random.split(jax.random.key(0), batch)

    @jax.jit
    def variance(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        inputs = normalize(images, mean=mean, std=std, dtype=jnp.float32)
        logits = program.network.apply_body(params, batch_stats, inputs, keys)
        return jnp.var(logits, axis=0, ddof=1)

    state, running, found = program.initial_state(), np.ones(classes), []
    pipeline = Pipeline(source, batch_size=batch, seed=0)
    shown = progress_bar(range(steps), f"{network} {method}", leave=False)
    for step in shown:
        placed = shard_batch(pipeline.batch(step), mesh)
        now = np.asarray(variance(state.params, state.batch_stats, placed["image"]))
        if not np.all(np.isfinite(now)):
            break
        running = (1 - _MOMENTUM) * running + _MOMENTUM * now
        found.append(running.tolist())
        state, _ = program.train_step(state, placed)
    return found


def _figure10(data: Data, quick: bool) -> Numbers:
    width, batch, steps = (1 / 8, 32, 40) if quick else (1.0, 256, _STEPS)
    found: Numbers = {"learning_rate": _RATE, "width": width, "batch": batch, "steps": steps}
    options: dict[str, Any] = {"width": width, "batch": batch, "steps": steps}
    found["networks"] = {
        network: {method: _variances(network, method, data, **options) for method in _METHODS}
        for network in _NETWORKS
    }
    return found


def _draw_figure10(numbers: Numbers) -> Figure:
    figure = new_figure(
        10, 4.2, f"Figure 10: running variance of the outputs at rate {numbers['learning_rate']}"
    )
    for axes, (network, of_network) in zip(
        figure.subplots(1, 2, sharey=True), numbers["networks"].items(), strict=True
    ):
        for method, rows in of_network.items():
            colour, label = _METHODS[method]
            steps = np.arange(1, len(rows) + 1)
            axes.plot(steps, np.asarray(rows), color=colour, lw=0.8, alpha=0.6)
            if len(rows) < numbers["steps"]:
                label += f": not finite after step {len(rows)}"
                axes.plot(len(rows), max(rows[-1]), "x", color=colour, ms=8)
            axes.plot([], [], color=colour, label=label)
        axes.set_yscale("log")
        share = "" if numbers["width"] == 1 else f", {numbers['width']:g} of the channels"
        axes.set_title(f"{_NETWORKS[network]}{share}", fontsize=9)
        axes.set_xlabel(f"step of {numbers['batch']} images")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right")
    figure.axes[0].set_ylabel("running variance of each output")
    return figure


FIGURE10 = PaperFigure(
    _figure10,
    _draw_figure10,
    "at a large rate the outputs' variance surges within steps; the last BN lets it come to rest",
)
