"""``config.init_from``: what a run starts from, and that it goes on without it."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

import mimicnorm_jax
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.layers.relu import relu
from mimicnorm_jax.methods import Site
from mimicnorm_jax.models import create_model
from mimicnorm_jax.tools.verify import VerificationError, verify
from mimicnorm_jax.train.init_from import check_strides
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import saved_config
from tests.runs import Run
from tests.weights.generated import state_dict, unpacked
from tests.weights.test_torchvision import REFERENCE

FROZEN = {"method": "batchnorm", "method_options__frozen": True}


@pytest.fixture(scope="module")
def source(tiny_config, tmp_path_factory):
    """A run of ResNet-8 with BatchNorm, of one epoch."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(tiny_config(method="batchnorm"), folder)
    return folder


def random_images(channels=1):
    return np.random.default_rng(0).integers(0, 256, (16, 8, 8, channels), np.uint8)


def logits_at_the_start(experiment, images):
    state, known = experiment.initial_state(), experiment.images
    mean, std = (np.array(values, np.float32) for values in (known.mean, known.std))
    apply = jax.jit(experiment.network.apply_eval)
    x = (images.astype(np.float32) / 255 - mean) / std
    return np.asarray(apply(state.params, state.batch_stats, x))


def folder_of(folder, classes):
    """Fields of the configuration of a folder of random 8x8 images in colour."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(20):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return {"data__name": "folder", "data__dir": str(folder)}


@pytest.fixture(scope="module")
def colour_source(tiny_config, tmp_path_factory):
    """A run on images in colour, of the classes 0 to 9."""
    folder = tmp_path_factory.mktemp("colour")
    data = folder_of(folder / "images", "0123456789")
    train(tiny_config(method="batchnorm", max_steps=3, **data), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    "target",
    [
        *({"method": name} for name in ("batchnorm", "lastbn", "nonorm", "skipinit")),
        FROZEN,
    ],
    ids=lambda target: "-".join(map(str, target.values())),
)
def test_a_run_starts_as_the_network_that_it_starts_from(source, tiny_config, target):
    experiment = set_up(tiny_config(init_from=str(source), **target))
    expected = mimicnorm_jax.load(source).logits(random_images())
    found = logits_at_the_start(experiment, random_images())
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert "its classifier too" in experiment.start.said
    folded = "BatchNorms folded" in experiment.start.said
    assert folded == (target["method"] != "batchnorm")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mimicnorm"},
        {"method": "mimicnorm", "weight_mean": "reparameterized"},
        {"method": "fixup"},
        {"method": "weightstandardization", "method_options__groups": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_of_the_same_method_is_copied(options, tiny_config, tmp_path):
    train(tiny_config(max_steps=3, **options), tmp_path / "source")
    other = {"activation_storage": "int8"} if options["method"] == "mimicnorm" else {}
    config = tiny_config(init_from=str(tmp_path / "source"), seed=1, **options, **other)
    experiment = set_up(config)
    expected = mimicnorm_jax.load(tmp_path / "source").logits(random_images())
    found = logits_at_the_start(experiment, random_images())
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["lastbn", "batchnorm"])
def test_known_classes_keep_their_columns(method, colour_source, tiny_config, tmp_path):
    data = folder_of(tmp_path, "725")
    experiment = set_up(tiny_config(init_from=str(colour_source), method=method, **data))
    assert "its classifier for 3 of its 10 classes, by name" in experiment.start.said
    expected = mimicnorm_jax.load(colour_source).logits(random_images(3))[:, [2, 5, 7]]
    found = logits_at_the_start(experiment, random_images(3))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["lastbn", "batchnorm"])
def test_other_classes_get_a_new_classifier(method, colour_source, tiny_config, tmp_path):
    data = folder_of(tmp_path, "abcdefghij")  # as many as there
    experiment = set_up(tiny_config(init_from=str(colour_source), method=method, **data))
    assert "a new classifier of 10 classes" in experiment.start.said
    state = experiment.initial_state()
    random = set_up(tiny_config(method=method, **data)).initial_state()

    kernels = {
        jax.tree_util.keystr(path): bool(np.array_equal(leaf, other))
        for (path, leaf), other in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(random.params),
            strict=True,
        )
        if leaf.ndim > 1
    }
    assert [name for name, unchanged in kernels.items() if unchanged] == [
        "['classifier']['kernel']"
    ]


def test_the_images_are_normalized_as_for_the_weights(colour_source, tiny_config, tmp_path):
    there = mimicnorm_jax.load(colour_source)
    options = {"init_from": str(colour_source), "method": "lastbn"} | folder_of(tmp_path, "ab")
    images = set_up(tiny_config(**options)).images
    assert (images.mean, images.std) == (there.mean, there.std)
    own = {"data__mean": (0.25,) * 3, "data__std": (0.5,) * 3}
    images = set_up(tiny_config(**options, **own)).images
    assert (images.mean, images.std) == ((0.25,) * 3, (0.5,) * 3)


def test_another_normalization_than_that_of_the_weights_is_said(
    source, tiny_config, tmp_path, capsys
):
    there = mimicnorm_jax.load(source)
    options = {"init_from": str(source), "method": "lastbn", "max_steps": 1}
    train(tiny_config(**options, data__mean=there.mean, data__std=there.std), tmp_path / "same")
    assert "; images normalized as for these weights\n" in capsys.readouterr().out
    train(tiny_config(**options, data__mean=(0.5,), data__std=(0.25,)), tmp_path / "other")
    output = capsys.readouterr().out
    assert f"not as for these weights ({there.mean[0]:.3g}; {there.std[0]:.3g})" in output
    assert "images normalized as for these weights" not in output


def test_a_run_goes_on_without_what_it_started_from(source, tiny_config, tmp_path, capsys):
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    options = {"method": "lastbn", "init_from": str(moved)}
    whole = train(tiny_config(max_steps=6, **options), tmp_path / "whole")
    output = capsys.readouterr().out
    assert f"starts from {moved}: resnet8, batchnorm, step 45" in output
    assert "images normalized as for these weights" in output
    train(tiny_config(max_steps=3, **options), tmp_path / "run")
    shutil.rmtree(moved)
    resumed = train(tiny_config(max_steps=6, **options), tmp_path / "run")
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert resumed["init_sha256"] == whole["init_sha256"]
    assert resumed["init_sha256"] == json.loads((tmp_path / "run/init.json").read_text())["sha256"]
    # its network needs them neither
    assert mimicnorm_jax.load(tmp_path / "run").mean == mimicnorm_jax.load(source).mean
    with pytest.raises(UserError, match=r"another configuration: config\.init_from"):
        train(tiny_config(max_steps=8, method="lastbn"), tmp_path / "run")


def test_other_weights_under_the_same_name_are_noticed(source, tiny_config, tmp_path):
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    config = tiny_config(max_steps=3, method="lastbn", init_from=str(moved))
    train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # so that the weights are needed again
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "summary.json").unlink()
    train(tiny_config(method="batchnorm", seed=1, max_steps=3), tmp_path / "other")
    shutil.rmtree(moved)
    (tmp_path / "other").rename(moved)
    with pytest.raises(UserError, match="started from other weights"):
        train(config, tmp_path / "run")


def test_a_fine_tuned_run_is_verified(source, tiny_config, tmp_path):
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    config = tiny_config(max_steps=3, init_from=str(moved), network="resnet8", **FROZEN)
    train(config, tmp_path / "run")
    assert verify(tmp_path / "run", count=0) == [(0, 3)]
    record = tmp_path / "run" / "init.json"
    record.write_text(record.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises((UserError, VerificationError), match="other weights"):
        verify(tmp_path / "run", count=0)


def test_frozen_norms_stay_and_examples_are_independent(source, tiny_config, tmp_path):
    options = {"init_from": str(source), "method": "batchnorm", "max_steps": 4, "batch_size": 8}
    config = tiny_config(**options | FROZEN)
    before = set_up(config).initial_state()
    after = train(config, tmp_path / "run")
    in_parts = train(tiny_config(**options | FROZEN, micro_batches=4), tmp_path / "parts")
    assert after["final_train_loss"] == pytest.approx(in_parts["final_train_loss"], rel=1e-4)
    model = mimicnorm_jax.load(tmp_path / "run", "latest").model
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert jax.tree.all(jax.tree.map(np.array_equal, stats, before.batch_stats))
    assert {"scale", "bias", "mean", "var"} == stats["stem"]["norm"].keys()
    assert after["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(before.params))
    train(tiny_config(**options | FROZEN | {"batch_size": 1}), tmp_path / "single")
    with pytest.raises(UserError, match="batch statistics need at least 2"):
        set_up(tiny_config(**options | {"batch_size": 1}))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_keeps_nothing_for_the_backward_pass(frozen):
    method = mimicnorm_jax.create_method("batchnorm", frozen=frozen)
    norm = method.norm(8, site=Site("inner"), rngs=nnx.Rngs(0))

    graph, state = nnx.split(norm)

    def residuals(x):
        return jax.vjp(lambda x: nnx.merge(graph, state, copy=True)(x), x)[1]

    x = jax.ShapeDtypeStruct((64, 16, 16, 8), np.float32)
    kept = max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, x)))
    assert (kept >= x.size) != frozen
    assert (method.activation(site=Site("inner")) is relu) == frozen  # nothing to compute it from


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_from": "nowhere"}, "cannot be read"),
        ({"network": "mlp"}, r"config.network = 'resnet8', and this run 'mlp'"),
        ({"width": 1.0}, r"config.width = 0.5, and this run 1.0"),
        ({"network_options__shortcut": "projection"}, "do not fit the network"),
        ({"method": "mimicnorm"}, "weight mean would change the pretrained kernels"),
        ({"method": "fixup"}, "weights go between"),
        ({"init_from": __file__}, "no folder of a run, and no file of weights"),
        ({"init_from": "."}, "config.json"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    options, said, source, tiny_config, tmp_path
):
    config = tiny_config(**{"init_from": str(source), "method": "lastbn"} | options)
    with pytest.raises(UserError, match=said) as refused:
        train(config, tmp_path / "run")
    assert str(refused.value).startswith("config.init_from = ")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_strides_are_those_that_the_weights_were_trained_with():
    def network(stem):
        options = {"num_classes": 3, "image_size": 64, "stem": stem, "method": "batchnorm"}
        return nnx.eval_shape(
            lambda: create_model("shufflenetv2_x0_5", **options, rngs=nnx.Rngs(0))
        )

    check_strides(network("small"), network("small"))
    with pytest.raises(UserError, match=r"stem/conv has the strides \(1, 1\) .* \(2, 2\) there"):
        check_strides(network("small"), network("large"))


@pytest.mark.long
def test_a_run_of_the_other_stem_is_refused(tiny_config, tmp_path):
    random = np.random.default_rng(0)
    for split, name, index in itertools.product(("train", "test"), "ab", range(8)):
        (tmp_path / "i" / split / name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "i" / split / name / f"{index}.png")
    options = {"data__name": "folder", "data__dir": str(tmp_path / "i"), "data__image_size": 32}
    options |= {"network": "shufflenetv2_x0_5", "width": 1.0, "batch_size": 8, "max_steps": 1}
    train(tiny_config(method="batchnorm", **options), tmp_path / "run")
    options |= {"init_from": str(tmp_path / "run"), "method": "lastbn"}
    assert "folded" in set_up(tiny_config(**options)).start.said
    with pytest.raises(UserError, match=r"--config\.network_options\.stem=small or large"):
        set_up(tiny_config(**options, network_options__stem="large"))


def test_frozen_norms_need_weights(tiny_config, tmp_path):
    with pytest.raises(UserError, match="need weights to start from"):
        train(tiny_config(**FROZEN), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_of_another_number_of_channels_are_refused(source, tiny_config, tmp_path):
    data = folder_of(tmp_path, "ab")
    with pytest.raises(UserError, match=r"images of 1 channel.*these have 3"):
        set_up(tiny_config(init_from=str(source), method="lastbn", **data))


def test_torchvisions_weights_and_their_normalization(tiny_config, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file(state_dict(unpacked(REFERENCE["resnet18"]["shapes"])), path)
    options = {"init_from": str(path), "network": "resnet18", "width": 1.0, "method": "lastbn"}
    data = folder_of(tmp_path / "images", ("cat", "dog")) | {"data__image_size": 32}
    config = tiny_config(network_options__stem="large", **options, **data)
    experiment = set_up(config)
    assert experiment.images.mean == (0.485, 0.456, 0.406)
    assert experiment.images.std == (0.229, 0.224, 0.225)
    assert experiment.start.said == (
        "20 layers, BatchNorms folded into the convolutions; a new classifier of 2 classes"
    )
    with pytest.raises(UserError, match=r"config\.init_from = .*stem"):
        set_up(tiny_config(network_options__stem="small", **options, **data))


def test_every_process_reads_the_same(source, tiny, tmp_path):
    options = ("--config.network=resnet8", "--config.method=lastbn", "--config.max_steps=2")
    config = saved_config(source)
    fields = (f"--config.width={config.width}", f"--config.init_from={source}")
    arguments = (*tiny, *options, *fields, "--config.batch_size=32")
    with Run(tmp_path / "two", *arguments, count=2) as run:
        output = run.succeeds()
    assert "starts from" in output
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    shutil.rmtree(tmp_path / "run")
    with Run(tmp_path / "one", *arguments, devices=2) as run:
        run.succeeds()
    second = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["init_sha256"] == second["init_sha256"]
    assert first["final_train_loss"] == pytest.approx(second["final_train_loss"], rel=1e-5)
