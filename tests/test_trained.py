"""A run's folder is enough to use its network, of earlier versions too."""

import json
import pathlib
import re
import shutil
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

import mimicnorm_jax
from mimicnorm_jax.data.generated import read_digits
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.evaluated_run import evaluate_run
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.workdir import saved_config
from tests.runs import TINY

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "predict.md"
EARLIER = pathlib.Path(__file__).parent / "train" / "runs_of_894fa89.tar.xz"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Wide images of noise in folders of three classes."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for name in ("ant", "bee", "cow"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 31, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(tiny_config, photographs, tmp_path_factory):
    """A run on images that are gone afterwards."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    data = {"name": "folder", "image_size": 12, "resize": 16}
    config = tiny_config(network="mlp", batch_size=8, **{f"data__{k}": v for k, v in data.items()})
    config.data.dir = str(tmp_path_factory.mktemp("gone") / "images")
    shutil.copytree(photographs, config.data.dir)
    train(config, workdir)
    _, test = open_splits(config.data)
    evaluation = evaluate_run(config, workdir).results
    shutil.rmtree(config.data.dir)
    return workdir, test, evaluation


def test_it_needs_no_data_and_says_what_the_evaluation_did(run):
    workdir, test, evaluation = run
    for which in ("best", "latest"):
        network = mimicnorm_jax.load(workdir, which)
        assert network.step == evaluation[which]["step"]
        assert network.classes == ("ant", "bee", "cow")
        logits = network.logits(test.images)
        accuracy = np.mean(logits.argmax(-1) == test.labels)
        assert accuracy == pytest.approx(evaluation[which]["test_accuracy"], abs=1e-6)
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, test.labels[:, None], -1)[:, 0]
        loss = np.mean(np.log(np.exp(shifted).sum(-1)) - chosen)
        assert loss == pytest.approx(evaluation[which]["test_loss"], rel=1e-5)
        probabilities = network.predict(test.images)
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(probabilities.argmax(-1), logits.argmax(-1))


def test_an_image_gets_the_same_answer_alone_and_among_64(run):
    network = mimicnorm_jax.load(run[0])
    images = np.random.default_rng(1).integers(0, 256, (64, *network.image_shape), np.uint8)
    together = network.predict(images)
    alone = np.concatenate([network.predict(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)
    assert np.ptp(together[:, 0]) > 0.1  # they do not all get the same


def test_a_file_becomes_what_the_evaluation_made_of_it(run, photographs):
    workdir, test, _ = run
    network = mimicnorm_jax.load(workdir)
    paths = sorted((photographs / "test").glob("*/*"))
    made = np.stack([network.preprocess(path) for path in paths])
    np.testing.assert_array_equal(made, test.images)
    with Image.open(paths[0]) as opened:
        pixels = np.asarray(opened)
        kinds = (paths[0].read_bytes(), pixels, jax.numpy.asarray(pixels), str(paths[0]), opened)
        for image in kinds:
            np.testing.assert_array_equal(network.preprocess(image), made[0])
    np.testing.assert_array_equal(network.logits(jax.numpy.asarray(made)), network.logits(made))


def test_one_image_at_a_time_is_the_same_as_many(run, photographs):
    workdir, test, _ = run
    network = mimicnorm_jax.load(workdir)
    many = np.concatenate([test.images] * 12)[:67]  # more than are computed at a time
    together = network.predict(many)
    one_by_one = np.concatenate([network.predict(image[None]) for image in many[:5]])
    np.testing.assert_allclose(together[:5], one_by_one, rtol=1e-5)
    np.testing.assert_allclose(together[-1], network.predict(many[-1:])[0], rtol=1e-5)
    assert network.predict([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", r"one image was given; put it into a list"),
        (np.zeros((2, 12, 12, 3)), r"float64 and shape .*; allowed: uint8 \('N', 12, 12, 3\)"),
        (np.zeros((12, 12, 3), np.uint8), r"allowed: uint8 \('N', 12, 12, 3\)"),
        ([np.zeros((5, 5, 4), np.uint8)], r"shape \(5, 5, 4\); allowed: uint8 \(H, W\)"),
        ([b"no image"], "^cannot read image of 8 bytes: it is no image of a kind that is read$"),
        ([None], "an image is a NoneType; allowed: a path, bytes or an array"),
        (None, "images are a NoneType; allowed: a list, or an array"),
        (["a\0b"], "^'a.x00b' is no path: it has a zero byte"),
        (["nowhere.png"], "^cannot read image nowhere.png: No such file"),
    ],
)
def test_what_is_no_image_is_one_line(run, images, message):
    network = mimicnorm_jax.load(run[0])
    with pytest.raises(UserError, match=message):
        network.predict(images)


def test_grey_images_are_coloured_and_coloured_ones_become_grey(run, earlier):
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    colour = np.stack([grey] * 3, -1)
    coloured = mimicnorm_jax.load(run[0])
    as_stored = [coloured.preprocess(image) for image in (grey, grey[..., None], colour)]
    np.testing.assert_array_equal(as_stored, [as_stored[0]] * 3)
    assert mimicnorm_jax.load(earlier / "mimicnorm").preprocess(colour).shape == (8, 8, 1)


def test_what_is_no_run_is_one_line(run, tmp_path):
    workdir = run[0]
    with pytest.raises(UserError, match="is not the folder of a run"):
        mimicnorm_jax.load(tmp_path)
    with pytest.raises(UserError, match=r"unknown which 'last'.*allowed: best, latest"):
        mimicnorm_jax.load(workdir, "last")
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    description = json.loads((copy / "run.json").read_text())
    images, view = description["images"], description["view"]
    for change, message in [
        ({"format": 2}, "run.json has format 2, and this version of mimicnorm-jax reads 1"),
        ({"class_names": ["ant"]}, "run.json is damaged: .*names 1 of 3 classes"),
        ({"class_names": "ant"}, "run.json is damaged: class_names is .*not a list"),
        ({"view": {}}, r"run.json: view is damaged: it has no size \(a whole number\)"),
        ({"view": view | {"size": 8}}, "run.json is damaged: .*12 x 12 pixels do not come of"),
        ({"view": view | {"size": None}}, "run.json: view is damaged: size is None"),
        ({"images": []}, r"run.json is damaged: images is \[\], not an object"),
        ({"images": images | {"shape": [12, 12]}}, "run.json is damaged"),
        ({"images": images | {"std": [0, 1, 1]}}, "run.json is damaged: .*mean and std"),
        (
            {"images": images | {"std": "abc"}},
            "run.json: images is damaged: std is 'abc', not a list",
        ),
    ]:
        (copy / "run.json").write_text(json.dumps(description | change))
        with pytest.raises(UserError, match=message):
            mimicnorm_jax.load(copy)
    more = {"class_names": [*"abcd"], "images": images | {"num_classes": 4}}
    (copy / "run.json").write_text(json.dumps(description | more))
    with pytest.raises(UserError, match="a checkpoint of another network"):
        mimicnorm_jax.load(copy)
    (copy / "run.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"cannot read .*run\.json"):
        mimicnorm_jax.load(copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.copy(workdir / "run.json", copy)
    for which in ("best", "latest"):
        with pytest.raises(UserError, match="has no checkpoint"):
            mimicnorm_jax.load(copy, which)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Runs of ResNet-8 on digits by commit 894fa89, which wrote no ``run.json``."""
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(EARLIER) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.mark.parametrize("method", ["mimicnorm", "batchnorm"])
def test_a_run_of_an_earlier_version_is_what_it_was(earlier, method):
    workdir = earlier / method
    summary = json.loads((workdir / "summary.json").read_text())
    network = mimicnorm_jax.load(workdir)
    assert network.classes == tuple("0123456789")
    _, test = open_splits(network.config.data)
    accuracy = np.mean(network.predict(test.images).argmax(-1) == test.labels)
    assert accuracy == pytest.approx(summary["best_test_accuracy"], abs=1e-6)
    found = evaluate_run(saved_config(workdir), workdir).results["latest"]
    assert found["test_accuracy"] == pytest.approx(summary["final_test_accuracy"], abs=1e-6)
    # digits as they come, which are smaller than what the network was trained on
    images, labels = read_digits()
    assert np.mean(network.predict(list(images[:200])).argmax(-1) == labels[:200]) > 0.6


def changed(workdir, folder, **fields):
    """A copy of a run, of which fields say something else."""
    shutil.copytree(workdir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_an_earlier_run_says_what_its_images_are_needed_for(earlier, tmp_path):
    fields = {"data.name": "folder", "data.dir": "gone"}
    workdir = changed(earlier / "mimicnorm", tmp_path / "run", **fields)
    with pytest.raises(UserError, match=r"needs its training images for its classes, .*'gone'"):
        mimicnorm_jax.load(workdir)


def test_images_that_are_needed_have_to_be_those_of_the_run(earlier, tmp_path):
    workdir = changed(earlier / "mimicnorm", tmp_path / "run")
    data = json.loads((workdir / "data.json").read_text())
    data["train"]["sha256"] = "of others"
    (workdir / "data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"needs its training images .* on other train images"):
        mimicnorm_jax.load(workdir)


def test_what_resizes_images_does_so_here(tiny_config, tmp_path):
    """Digits know no ``data.resize``, and so nothing is cut off their files."""
    config = tiny_config(network="mlp", data__resize=12, max_steps=1)
    train(config, tmp_path / "run")
    network = mimicnorm_jax.load(tmp_path / "run")
    image = read_digits()[0][0]
    np.testing.assert_array_equal(network.preprocess(image)[..., 0], image)


def test_a_run_of_a_later_version_does_not_go_on_here(tiny_config, tmp_path):
    config = tiny_config(network="mlp", max_steps=1)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    config.max_steps = 2
    with pytest.raises(UserError, match="format 2"):
        train(config, tmp_path / "run")
    with pytest.raises(UserError, match="format 2"):
        evaluate_run(config, tmp_path / "run")


def test_a_network_that_was_built_otherwise_is_refused_by_name(earlier, tmp_path, run_main):
    workdir = changed(earlier / "mimicnorm", tmp_path / "run", network="squeezenet")
    message = "a run of squeezenet by an earlier version, which built another network"
    with pytest.raises(UserError, match=message):
        mimicnorm_jax.load(workdir)
    (workdir / "summary.json").unlink()
    for mode in ("eval", "train"):
        done = run_main(f"--mode={mode}", f"--workdir={workdir}")
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_run_in_float64_needs_64_bit_types(tiny_config, tmp_path, float64):
    config = tiny_config(network="mlp", precision="float64")
    train(config, tmp_path / "run")
    assert mimicnorm_jax.load(tmp_path / "run").predict([np.eye(8, dtype=np.uint8)]).dtype == float
    with jax.enable_x64(False), pytest.raises(UserError, match="was trained in float64: first"):
        mimicnorm_jax.load(tmp_path / "run")


def test_the_page_of_the_docs_works(run, photographs, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], "runs/digits_resnet20-mimicnorm-s0")
    shutil.copy(next(photographs.glob("test/*/*")), "photo.jpg")
    names = {}
    exec(block, names)
    assert names["probabilities"].shape == (1, 3)
    assert capsys.readouterr().out.strip() in ("ant", "bee", "cow")


def test_a_run_of_averages_has_statistics_of_them(tiny_config, tmp_path):
    config = tiny_config(network="mlp", optimizer__ema_decay=0.9)
    train(config, tmp_path / "run")
    evaluation = evaluate_run(config, tmp_path / "run").results["latest"]
    network = mimicnorm_jax.load(tmp_path / "run", "latest")
    _, test = open_splits(config.data)
    accuracy = np.mean(network.predict(test.images).argmax(-1) == test.labels)
    assert accuracy == pytest.approx(evaluation["test_accuracy"], abs=1e-6)


def test_a_run_is_evaluated_and_resumed_without_repeating_its_fields(run_main, tmp_path):
    workdir = tmp_path / "run"
    overrides = (
        *("--config.seed=3", "--config.batch_size=48", "--config.learning_rate=0.05"),
        *("--config.data.pad_crop=2", "--config.optimizer.nesterov=true", "--config.epochs=2"),
        *("--config.optimizer.label_smoothing=0.1", "--config.schedule.name=constant"),
    )
    begun = run_main(*TINY, *overrides, f"--workdir={workdir}", "--config.max_steps=9")
    assert begun.returncode == 0, begun.stderr
    done = run_main("--mode=eval", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    evaluation = json.loads((workdir / "eval.json").read_text())
    assert evaluation["latest"]["step"] == 9
    assert evaluation["latest"]["test_accuracy"] == summary["final_test_accuracy"]
    done = run_main("--workdir", workdir, "--config.max_steps=12")
    assert done.returncode == 0, done.stderr
    resumed = json.loads((workdir / "summary.json").read_text())
    assert (resumed["steps"], resumed["resumed_from_step"]) == (12, 9)
    assert resumed["config"] == summary["config"] | {"max_steps": 12}
    done = run_main("--mode=eval", f"--workdir={workdir}", "--config.seed=4")
    assert done.returncode == 2 and "config.seed (3 there, 4 now)" in done.stderr
    for folder, message in [
        (tmp_path / "none", "does not exist"),
        (tmp_path, "it has no config.json; there are runs in it: " + workdir.name),
        (
            workdir / "summary.json",
            f"is a file, not the folder of a run; give its folder, {workdir}",
        ),
    ]:
        done = run_main("--mode=eval", f"--workdir={folder}")
        assert done.returncode == 2 and message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "or --workdir=RUN of a run that was begun" in run_main("--mode=eval").stderr
