"""Trains networks with their BatchNorms and converted: ``python -m tests.convert.training --help``.

Every finished run is a line of the results, which a repeated command does not compute again.
"""

import argparse
import importlib
import json
import pathlib
import time
import warnings

import jax
import numpy as np
import optax
import sklearn.datasets
from flax import nnx

import mimicnorm_jax
from mimicnorm_jax.data.images import decode

NETWORKS = (
    *("resnet", "preact_resnet", "wide_resnet", "mobilenet_v2", "se_resnet", "densenet"),
    *("googlenet", "unet", "efficientnet", "convnext", "vgg_avgpool", "scanned_resnet"),
)
ON_CIFAR = ("resnet", "mobilenet_v2", "vgg_avgpool")
RATES = (0.02, 0.1, 0.3)
SEEDS = (0, 1, 2)
BATCH = 64
AUXILIARY = 0.3  # weight of the loss of GoogLeNet's second head


def digits():
    """Handwritten digits, 8x8, brought to 32x32: images and labels to train with, and to test."""
    data = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jax.image.resize(data.images[order, ..., None], (len(order), 32, 32, 1), "bilinear")
    images = np.asarray((images - images.mean()) / images.std(), np.float32)
    labels = data.target[order]
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def cifar10(folder, train):
    """``train`` images of ``folder/train/<class>/*``, and all of ``folder/test``."""

    def read(split, count):
        classes = sorted(path.name for path in (folder / split).iterdir())
        files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / split / name).iterdir())[: count and count // len(classes)]
        ]
        images = np.stack([decode(path.read_bytes(), upright=False) for path, _ in files])
        return images.astype(np.float32), np.array([label for _, label in files])

    (images, labels), (test_images, test_labels) = read("train", train), read("test", None)
    mean, deviation = images.mean((0, 1, 2)), images.std((0, 1, 2))
    order = np.random.default_rng(0).permutation(len(labels))
    return (
        ((images[order] - mean) / deviation, labels[order]),
        ((test_images - mean) / deviation, test_labels),
    )


def create(name, channels, seed):
    module = importlib.import_module(f"tests.convert.networks.{name}")
    return module.Network(num_classes=10, channels=channels, rngs=nnx.Rngs(seed))


def converted(model, images, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*BatchNorms have a scale other")
        return mimicnorm_jax.convert(model, images, logits=lambda outputs: outputs, **options)


class Trainer:
    """Trains networks of one structure: compiled once, for all rates and seeds."""

    def __init__(self, model, steps):
        model.train()
        self.train_graph, *_ = nnx.split(model, nnx.Param, ...)
        model.eval()
        self.eval_graph, *_ = nnx.split(model, nnx.Param, ...)
        self.steps = steps
        self.step = jax.jit(self._step, donate_argnums=(0, 1, 2))
        self.logits = jax.jit(self._logits)

    def _transform(self, rate):
        warmup = self.steps // 10
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)
        decay = optax.add_decayed_weights(
            5e-4, mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
        )
        return optax.chain(
            decay, optax.trace(0.9), optax.scale_by_learning_rate(lambda step: rate * shape(step))
        )

    def _step(self, params, rest, state, rate, images, labels):
        def loss(params):
            model = nnx.merge(self.train_graph, params, rest, copy=True)
            outputs = jax.tree.leaves(model(images))
            losses = [
                optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                for logits in outputs
            ]
            total = losses[0] + AUXILIARY * sum(losses[1:])
            return total, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = self._transform(rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    def _logits(self, params, rest, images):
        model = nnx.merge(self.eval_graph, params, rest)
        return jax.tree.leaves(model(images))[0]

    def run(self, model, rate, seed, train, test):
        """Trains; returns the test accuracy in % and the mean training loss of the last steps."""
        model.train()
        _, params, rest = nnx.split(model, nnx.Param, ...)
        state = self._transform(rate).init(params)
        images, labels = train
        order = np.random.default_rng(seed)
        losses, queue = [], np.empty(0, int)
        for _ in range(self.steps):
            if len(queue) < BATCH:
                queue = np.concatenate([queue, order.permutation(len(labels))])
            batch, queue = queue[:BATCH], queue[BATCH:]
            params, rest, state, loss = self.step(
                params, rest, state, rate, images[batch], labels[batch]
            )
            losses.append(loss)
        right = 0
        for start in range(0, len(test[1]), 360):
            chosen = slice(start, start + 360)
            logits = np.asarray(self.logits(params, rest, test[0][chosen]))
            right += int((logits.argmax(-1) == test[1][chosen]).sum())
        return 100 * right / len(test[1]), float(np.mean(jax.device_get(losses[-20:])))


def table(cells):
    """Markdown: for each network the rate that was best with BatchNorm, and both means there."""
    lines = [
        "| network | epochs | rate | BatchNorm | converted | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def accuracies(**wanted):
        return [c["accuracy"] for c in cells if all(c.get(k) == v for k, v in wanted.items())]

    for name, epochs, rate, keep in dict.fromkeys(
        (cell["network"], cell["epochs"], cell["rate"], cell.get("keep"))
        for cell in cells
        if cell["variant"] == "converted"
    ):
        run = {"network": name, "epochs": epochs, "rate": rate}
        before = accuracies(**run, variant="batchnorm")
        after = accuracies(**run, variant="converted", keep=keep)
        if len(before) == len(after) == len(SEEDS):
            a, b = float(np.mean(before)), float(np.mean(after))
            said = f'`{name}`, `keep="{keep}"`' if keep else f"`{name}`"
            lines.append(f"| {said} | {epochs} | {rate} | {a:.2f} | {b:.2f} | {b - a:+.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--cifar10", type=pathlib.Path, help="a folder of images; else digits")
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-10, to train with")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    parser.add_argument("--options", type=json.loads, default={}, help="of convert")
    parser.add_argument("--table", action="store_true", help="print a finished file only")
    args = parser.parse_args()
    if args.table:
        return print(table(json.loads(args.out.read_text())))
    train, test = digits() if args.cifar10 is None else cifar10(args.cifar10, args.images)
    channels = train[0].shape[-1]
    steps = args.epochs * len(train[1]) // BATCH
    cells = json.loads(args.out.read_text()) if args.out.exists() else []

    def keep(trainer, model, **cell):
        done = next((c for c in cells if all(c.get(k) == v for k, v in cell.items())), None)
        if done is None:
            begun = time.time()
            accuracy, loss = trainer.run(model, cell["rate"], cell["seed"], train, test)
            seconds = round(time.time() - begun, 1)
            done = {**cell, "accuracy": accuracy, "loss": loss, "seconds": seconds}
            cells.append(done)
            args.out.write_text(json.dumps(cells, indent=0))
            print(done, flush=True)
        return done["accuracy"]

    for name in args.networks:
        trainer = Trainer(create(name, channels, 0), steps)
        cell = {"network": name, "variant": "batchnorm", "epochs": args.epochs}
        by_rate = {
            rate: keep(trainer, create(name, channels, 0), **cell, rate=rate, seed=0)
            for rate in RATES
        }
        rate = max(by_rate, key=by_rate.get)
        for seed in SEEDS[1:]:
            keep(trainer, create(name, channels, seed), **cell, rate=rate, seed=seed)
        trainer = None
        for seed in SEEDS:
            model, _ = converted(create(name, channels, seed), train[0][:64], **args.options)
            if trainer is None:
                trainer = Trainer(model, steps)
            variant = {"variant": "converted", **args.options}
            keep(trainer, model, **{**cell, **variant}, rate=rate, seed=seed)


if __name__ == "__main__":
    main()
