import dataclasses
import functools
import importlib
import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax import create_model, fold
from mimicnorm_jax.config import default_config
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.benchmark import inference


def has(*modules):
    return all(importlib.util.find_spec(name) for name in modules)


OURS = [inference.FOLDED, inference.UNFOLDED]
IN_TORCH = [inference.FUSED_IN_TORCH, inference.IN_TORCH]


def network_of(name, size=32, **options):
    config = default_config()
    config.update(network=name, width=0.125, method="batchnorm")
    config.data.update(name="synthetic", num_classes=7, image_size=size)
    config.network_options.update(options)
    return inference.create(inference.prepared_config(config))


@functools.cache
def small():
    return network_of("resnet8")


def with_rivals(monkeypatch, **others):
    """Rivals in the place of other libraries."""
    kept = {label: inference.RIVALS[label] for label in OURS}
    monkeypatch.setattr(inference, "RIVALS", kept | others)


def test_every_rival_has_a_row_or_is_said_to_be_missing(run_main, tmp_path):
    path = tmp_path / "inference.json"
    done = run_main(
        *("inference", "--config=configs/cifar100_vgg16.py", "--config.network=vgg11"),
        *("--config.width=0.0625", "--batch=2", "--seconds=0.01", "--rounds=2", f"--json={path}"),
        module="mimicnorm_jax.tools.benchmark",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["network"] == "vgg11" and report["precision"] == "float32"
    assert report["cores"] == 1 and report["rounds"] == 2
    (measured,) = report["batches"]
    assert measured["batch"] == 2
    missing = [] if has("onnx", "onnxruntime") else [inference.ONNXRUNTIME]
    missing += [] if has("torch") else IN_TORCH
    assert [*measured["left_out"]] == missing
    lines = done.stdout.splitlines()
    for label in missing:
        assert sum(line.startswith("without ") and label in line for line in lines) == 1
    rows = measured["methods"]
    assert [row["method"] for row in rows] == [x for x in inference.RIVALS if x not in missing]
    assert rows[0]["method"] == inference.FOLDED and rows[0]["ratio"] == 1.0
    for row in rows:
        assert row["images_per_second"] > 0 and row["flops"] == rows[0]["flops"] > 0
        assert row["logits_difference"] <= 1e-4
        assert any(line.startswith(f"{row['method']}  ") for line in lines)


def test_batches_of_one_and_of_many_are_timed_without_a_flag():
    assert inference.BATCHES == (1, 32)


def slightly_off(network, images):
    graph, state = nnx.split(network.folded)
    state = jax.tree.map(lambda leaf: 1.001 * leaf, state)
    return inference._ready_in_jax(nnx.merge(graph, state), images)


def without_a_norm(network, images):
    model = nnx.clone(network.model)
    model.blocks[0].branch[0].norm = lambda x: x
    return inference._ready_in_jax(model, images)


def not_finite(network, images):
    return inference.Ready(lambda: np.full((len(images), 7), np.nan), 0.0)


@pytest.mark.parametrize("wrong", [slightly_off, without_a_norm, not_finite])
def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch, wrong):
    with_rivals(monkeypatch, wrong=wrong)
    with pytest.raises(UserError, match=r"wrong differs from the network by .* more than 0.0001"):
        inference.prepare(small(), 2)


def test_libraries_that_are_missing_are_left_out(monkeypatch):
    imported = importlib.import_module

    def without(name, *arguments):
        if name in ("torch", "onnxruntime"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    # a network that PyTorch would have: the reason comes before any of its layers is looked at
    prepared = inference.prepare(dataclasses.replace(small(), name="resnet18"), 1)
    assert [*prepared.timed] == [*prepared.differences] == OURS
    assert [*prepared.left_out] == [inference.ONNXRUNTIME, *IN_TORCH]
    for label, reason in prepared.left_out.items():
        library = "torch" if label in IN_TORCH else "onnxruntime"
        assert f"cannot be imported (No module named '{library}')" in reason
    assert [*inference.versions()] == ["jax"]


@pytest.mark.skipif(not has("onnx", "onnxruntime"), reason="onnxruntime is missing")
def test_onnxruntime_computes_the_folded_network():
    images = small().images(2)
    logits = inference.RIVALS[inference.ONNXRUNTIME](small(), images).call()
    np.testing.assert_allclose(logits, small().folded(images), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has("torch"), reason="PyTorch is missing")
@pytest.mark.parametrize(("network", "size"), [("resnet18", 32), ("resnet50", 96), ("vgg11", 64)])
def test_pytorch_computes_with_our_weights(network, size):
    """Of VGG at 64 pixels also the order in which an image is flattened."""
    ours = network_of(network, size)
    images = ours.images(2)
    expected = np.asarray(jax.jit(lambda x: ours.model(x))(images))
    for label in IN_TORCH:
        logits = np.asarray(inference.RIVALS[label](ours, images).call())
        difference = np.abs(logits - expected).max() / np.abs(expected).max()
        assert difference < 1e-4, label


@pytest.mark.skipif(not has("torch"), reason="PyTorch is missing")
def test_a_network_that_pytorch_has_not_is_left_out():
    ours = network_of("resnet18", 96, stem="small")
    with pytest.raises(UserError, match=r"PyTorch's network has the shape \(8, 3, 7, 7\), ours"):
        inference.RIVALS[inference.IN_TORCH](ours, ours.images(1))


@pytest.mark.parametrize(
    ("network", "options"), [("resnet8", {"shortcut": "projection"}), ("vgg11", {})]
)
def test_mimicnorm_and_batchnorm_are_the_same_program_when_folded(network, options):
    """So the times of one are those of the other."""
    options |= {"num_classes": 7, "image_size": 32, "width": 0.0625, "precision": "float32"}
    spec = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    programs = []
    for method in ("batchnorm", "mimicnorm"):
        make = functools.partial(create_model, network, method=method, **options)
        model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        inference._randomize(model)
        graph, state = nnx.split(fold(model, spec).network)

        def call(state, x, graph=graph):
            return nnx.merge(graph, state)(x)

        programs.append(jax.jit(call).lower(state, spec).as_text())
    assert programs[0] == programs[1]


def test_the_process_is_bound_to_one_core_and_set_free_again(monkeypatch):
    before, bound = {2, 3, 5}, []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: before)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    monkeypatch.setattr(inference.xla_bridge, "backends_are_initialized", lambda: False)
    with inference.one_core():
        assert bound == [{5}]
    assert bound == [{5}, before]


def test_threads_that_xla_has_started_before_are_refused(monkeypatch):
    jax.devices()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UserError, match="JAX computes already"), inference.one_core():
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.precision=bfloat16"], "config.precision = 'bfloat16': inference is timed in"),
        (["--batch=0"], "flag --batch=0"),
        (["--json=no/such/folder.json"], "no/such/folder.json cannot be written"),
        (["--config.data.name=folder", "--config.data.dir=/"], "give --num-classes"),
        (["--config.data.image_size=30"], "image size"),
        (["step"], "unexpected argument 'step'"),
    ],
)
def test_a_wrong_command_line_is_one_line(run_main, arguments, message):
    done = run_main(
        *("inference", "--config=configs/cifar100_vgg16.py", *arguments),
        module="mimicnorm_jax.tools.benchmark",
    )
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert message in line
