"""A run is evaluated on its own test images and on others, whose classes are matched by name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.calibration import fit_temperature
from mimicnorm_jax.data.classes import columns_of
from mimicnorm_jax.data.generated import open_digits
from mimicnorm_jax.data.splits import splits_of
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.evaluated_run import Question, evaluate_run
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.workdir import saved_config
from mimicnorm_jax.trained import load

NAMES = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]


def write(folder, source, names, *, most=None):
    """Writes images of a split, of the classes that have a name."""
    for number, name in enumerate(names):
        if name is not None:
            (folder / name).mkdir(parents=True)
            for index in np.flatnonzero(source.labels == number)[:most]:
                Image.fromarray(source.images[index][..., 0]).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def digits(tmp_path_factory, tiny_config):
    """Folders of digits: ``train``, ``test``, and others to be evaluated on."""
    root = tmp_path_factory.mktemp("images")
    train, test = open_digits(tiny_config().data, ("train", "test"))
    write(root / "train", train, NAMES)
    write(root / "test", test, NAMES)
    some = [name if name in ("bee", "dog", "jay") else None for name in NAMES]
    write(root / "some", test, some)
    (root / "some" / "cow").mkdir()  # a class without images
    write(root / "single", test, [*NAMES[:1], *[None] * 9])
    write(root / "numbers", test, [f"{number:03d}" for number in range(10)], most=3)
    write(root / "strange", test, [*NAMES[:7], "emu", "owl", "yak"])
    return root


@pytest.fixture(scope="module")
def run(tiny_config, digits, tmp_path_factory):
    """A run on a copy of the digits that is gone, and its test accuracy."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    copy = tmp_path_factory.mktemp("copy") / "digits"
    shutil.copytree(digits, copy)
    config = tiny_config(
        network="mlp",
        max_steps=40,
        epochs=2.0,
        eval_every=20 / 36,
        data__name="folder",
        data__dir=str(copy),
        data__holdout=0.2,
        data__pad_crop=1,
    )
    summary = train(config, workdir)
    shutil.rmtree(copy)
    return workdir, summary


def evaluated(run, *, question=None, **fields):
    workdir, _ = run
    config = saved_config(workdir)
    config.update_from_flattened_dict(
        {f"data.{name}": str(value) for name, value in fields.items()}
    )
    return evaluate_run(config, workdir, question or Question())


def test_its_own_images_may_have_moved_and_no_training_image_is_needed(run, digits, tmp_path):
    workdir, summary = run
    shutil.copytree(digits / "test", tmp_path / "test")
    found = evaluated(run, dir=tmp_path)
    assert found.is_own and found.images == "360 images of 10 classes"
    assert json.loads((workdir / "eval.json").read_text()) == found.results
    latest, best = found.results["latest"], found.results["best"]
    assert latest["test_accuracy"] == summary["final_test_accuracy"]
    assert latest["test_loss"] == pytest.approx(summary["final_test_loss"], rel=1e-5)
    assert best["test_accuracy"] == summary["best_test_accuracy"]
    assert best["temperature"] == summary["calibration"]["temperature"]
    assert best["test_top5_accuracy"] > best["test_accuracy"] > 0.5
    rows = found.details["latest"]["classes"]
    assert [row["class"] for row in rows] == NAMES
    confusion = np.array(found.details["latest"]["confusion"])
    assert confusion.sum() == 360
    assert np.trace(confusion) / 360 == pytest.approx(latest["test_accuracy"])
    assert rows[3]["accuracy"] == confusion[3, 3] / confusion[3].sum()


def test_images_that_are_gone_or_others_are_named(run, digits, tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.dir = .* is not a folder"):
        evaluated(run)
    with pytest.raises(UserError, match=r"has no folder nowhere$"):
        evaluated(run, dir=digits, test_split="nowhere")
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"data.dir": str(tmp_path)}))
    shutil.copytree(digits / "some", tmp_path / "test")
    with pytest.raises(UserError, match="holds a run on other test images"):
        evaluated((other, None))


def test_fewer_classes_are_evaluated_among_all_or_among_themselves(run, digits, capsys):
    kept = (run[0] / "eval.json").read_text() if (run[0] / "eval.json").exists() else None
    network = load(run[0], "latest")
    paths = sorted((digits / "some").glob("*/*.png"))
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    logits = network.logits(paths)
    found = evaluated(run, dir=digits, test_split="some")
    assert not found.is_own
    assert "NOTE: without images in" in capsys.readouterr().err
    assert found.images == f"{len(paths)} images of 3 classes, evaluated among all 10"
    expected = np.mean(logits.argmax(-1) == labels)
    assert found.results["latest"]["test_accuracy"] == pytest.approx(expected)
    rows = found.details["latest"]["classes"]
    assert [row["class"] for row in rows if row["examples"]] == ["bee", "dog", "jay"]

    found = evaluated(run, dir=digits, test_split="some", question=Question(restrict_classes=True))
    chosen = np.array([1, 3, 9])
    expected = np.mean(chosen[logits[:, chosen].argmax(-1)] == labels)
    assert found.results["latest"]["test_accuracy"] == pytest.approx(expected)
    assert "test_top5_accuracy" not in found.results["latest"]
    assert [row["class"] for row in found.details["latest"]["classes"]] == ["bee", "dog", "jay"]
    after = (run[0] / "eval.json").read_text() if (run[0] / "eval.json").exists() else None
    assert after == kept  # which is of the run's own images


def test_a_single_class_can_be_evaluated(run, digits):
    found = evaluated(run, dir=digits, test_split="single")
    assert found.images == "36 images of 1 class, evaluated among all 10"
    assert found.details["latest"]["classes"][0]["examples"] == 36
    with pytest.raises(UserError, match=r"a single class, 'ant', which leaves nothing to choose"):
        evaluated(run, dir=digits, test_split="single", question=Question(restrict_classes=True))


def test_folders_named_by_numbers_are_logits_in_the_order_of_numbers(run, digits):
    question = Question(labels="numbers")
    found = evaluated(run, dir=digits, test_split="numbers", question=question)
    network = load(run[0], "latest")
    paths = sorted((digits / "numbers").glob("*/*.png"))
    right = network.logits(paths).argmax(-1) == [int(path.parent.name) for path in paths]
    assert found.results["latest"]["test_accuracy"] == pytest.approx(np.mean(right))
    assert found.results["latest"]["test_examples"] == 30
    with pytest.raises(UserError, match=r"10 of the 10 classes .* '000', .*--labels=numbers"):
        evaluated(run, dir=digits, test_split="numbers")
    with pytest.raises(UserError, match="are no numbers of the network's 10 logits"):
        evaluated(run, dir=digits, test_split="test", question=question)


def test_numbers_are_not_in_the_order_of_strings():
    names = sorted(str(number) for number in range(12))
    assert names[:3] == ["0", "1", "10"]
    columns = columns_of(names, [f"class {i}" for i in range(12)], "numbers")
    assert columns == [int(name) for name in names]
    with pytest.raises(UserError, match=r"1 of the 2 classes .* \(0 to 11\): '12'"):
        columns_of(["11", "12"], [*NAMES, "k", "l"], "numbers")


def test_what_does_not_match_is_listed(run, digits):
    message = r"3 of the 10 .*'emu', 'owl', 'yak'; it has no images of 'hen', 'ibis', 'jay'"
    with pytest.raises(UserError, match=message) as caught:
        evaluated(run, dir=digits, test_split="strange")
    assert "--labels" not in str(caught.value)  # they are no numbers
    with pytest.raises(UserError, match=r"12 of the 12 classes .*'x9' and 2 more; .*and 20 more"):
        columns_of([f"x{i}" for i in range(12)], [f"c{i}" for i in range(30)])


def test_another_field_than_those_of_the_images_is_refused(run, digits):
    config = saved_config(run[0])
    config.seed = 5
    with pytest.raises(UserError, match=r"config\.seed \(0 there, 5 now\); an evaluation takes"):
        evaluate_run(config, run[0])


def test_the_temperature_comes_of_no_training_or_test_image(run, digits, tmp_path):
    """Other training and test images leave it as it is; other images held out do not."""
    _, summary = run
    calibration = json.loads((run[0] / "calibration.json").read_text())
    assert set(calibration) == {str(summary["best_step"]), "40"}
    network = load(run[0])
    assert network.step == summary["best_step"]
    assert network.temperature == calibration[str(network.step)]["temperature"]
    config = saved_config(run[0])
    config.data.dir = str(digits)
    splits = splits_of(config)
    assert calibration[str(network.step)]["examples"] == len(splits.holdout) == 287
    logits = network.logits(splits.holdout.images)
    expected = fit_temperature(logits, splits.holdout.labels)
    assert network.temperature == pytest.approx(expected, rel=1e-4)
    for others in (splits.train, splits.test):
        found = fit_temperature(network.logits(others.images), others.labels)
        assert found != pytest.approx(expected, rel=1e-3)
    # and it is what probabilities are of
    p = network.predict(splits.test.images[:20])
    scaled = np.exp(network.logits(splits.test.images[:20]) / network.temperature)
    np.testing.assert_allclose(p, scaled / scaled.sum(-1, keepdims=True), rtol=1e-5)


def test_where_there_is_no_test_split_the_images_held_out_take_its_place(
    tiny_config, digits, tmp_path, capsys
):
    config = tiny_config(
        network="mlp",
        max_steps=4,
        data__name="folder",
        data__dir=str(digits),
        data__test_split="",
        data__holdout=0.2,
    )
    summary = train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "and 0 test images, 287 held out" in output
    assert "epoch 0.11: holdout_accuracy" in output and "final_holdout_accuracy" in output
    assert (
        f"exact last-BN statistics: {summary['final_holdout_accuracy_recalibrated']:.4f}" in output
    )
    assert summary["final_test_accuracy"] is summary["best_test_accuracy"] is None
    assert summary["best_chosen_by"] == "holdout" and summary["best_holdout_accuracy"] > 0
    assert train(config, tmp_path / "run") == summary
    assert "is finished: final_holdout_accuracy" in capsys.readouterr().out
    found = evaluate_run(config, tmp_path / "run").results["latest"]
    assert found["holdout_accuracy"] == summary["final_holdout_accuracy"]
    assert found["holdout_examples"] == 287 and "test_accuracy" not in found
    assert load(tmp_path / "run").temperature == summary["calibration"]["temperature"]


@pytest.mark.parametrize("ema", [0.0, pytest.param(0.9, marks=pytest.mark.long)])
def test_a_run_on_more_devices_is_evaluated_here_with_the_same_numbers(
    tiny_config, digits, tmp_path, ema
):
    config = tiny_config(
        network="mlp",
        max_steps=2,
        num_devices=4,
        optimizer__ema_decay=ema,
        data__name="folder",
        data__dir=str(digits),
    )
    summary = train(config, tmp_path / "run")
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields | {"num_devices": 512}))
    found = evaluate_run(saved_config(tmp_path / "run"), tmp_path / "run").results["latest"]
    assert found["test_loss"] == pytest.approx(summary["final_test_loss"], rel=1e-4)
    config.num_devices = 1024
    with pytest.raises(UserError, match=r"config\.num_devices = 1024, but the number of"):
        evaluate_run(config, tmp_path / "run")


def test_averaged_parameters_without_statistics_are_evaluated_too(tiny_config, tmp_path):
    config = tiny_config(
        network="mlp", method="nonorm", learning_rate=0.01, optimizer__ema_decay=0.9, max_steps=4
    )
    summary = train(config, tmp_path / "run")
    found = evaluate_run(config, tmp_path / "run").results["latest"]
    assert found["test_loss"] == pytest.approx(summary["final_test_loss"], rel=1e-6)


def test_other_images_of_a_run_without_a_test_split_are_not_silently_its_own(
    tiny_config, digits, tmp_path
):
    images = tmp_path / "images"
    shutil.copytree(digits / "train", images / "train")
    config = tiny_config(
        network="mlp",
        max_steps=1,
        data__name="folder",
        data__dir=str(images),
        data__test_split="",
        data__holdout=0.2,
    )
    train(config, tmp_path / "run")
    for other, message in (("nowhere", "is not a folder"), (str(digits), None)):
        config.data.dir = other
        if message is None:  # the same images elsewhere
            assert evaluate_run(config, tmp_path / "run").is_own
        else:
            with pytest.raises(UserError, match=message):
                evaluate_run(config, tmp_path / "run")
    next((images / "train" / "ant").iterdir()).unlink()
    config.data.dir = str(images)
    with pytest.raises(UserError, match="on other train images"):
        evaluate_run(config, tmp_path / "run")


def test_the_test_images_of_a_run_need_not_have_all_its_classes(tiny_config, tmp_path):
    """Files of MNIST's format do not name their classes."""
    for prefix, classes in (("train", 12), ("t10k", 11)):
        labels = np.arange(48, dtype=np.uint8) % classes
        pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8)).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(size.to_bytes(4, "big") for size in array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    config = tiny_config(network="mlp", max_steps=1, data__name="idx", data__dir=str(tmp_path))
    summary = train(config, tmp_path / "run")
    found = evaluate_run(config, tmp_path / "run")
    assert found.is_own
    assert found.results["latest"]["test_accuracy"] == summary["final_test_accuracy"]


def test_two_folders_of_one_class_are_one_class(run, digits, tmp_path):
    for name in ("001", "002", "003"):
        shutil.copytree(digits / "numbers" / name, tmp_path / "twice" / name)
    shutil.copytree(digits / "numbers" / "001", tmp_path / "twice" / "1")
    question = Question(labels="numbers", restrict_classes=True)
    found = evaluated(run, dir=tmp_path, test_split="twice", question=question)
    assert found.images == (
        "12 images of 3 classes (001 is 'bee', 002 is 'cow', 003 is 'dog' …), evaluated among these"
    )
    rows = found.details["latest"]["classes"]
    assert [(row["class"], row["examples"]) for row in rows] == [("bee", 6), ("cow", 3), ("dog", 3)]


@pytest.mark.parametrize(
    ("fields", "question"),
    [({"resize": 12}, Question()), ({"test_split": "some"}, Question(restrict_classes=True))],
)
def test_what_a_run_keeps_is_of_its_own_evaluation(fields, question, run, digits):
    config = saved_config(run[0])
    config.data.dir = str(digits)
    evaluate_run(config, run[0])
    kept = (run[0] / "eval.json").read_text()
    config.update_from_flattened_dict({f"data.{name}": value for name, value in fields.items()})
    assert not evaluate_run(config, run[0], question).is_own
    assert (run[0] / "eval.json").read_text() == kept


def test_exact_statistics_have_no_temperature_which_was_found_with_others(run, digits):
    config = saved_config(run[0])
    config.data.dir = str(digits)
    found = evaluate_run(config, run[0], Question(exact=True)).results
    assert found["best"]["temperature"] is not None
    assert found["best_recalibrated"]["temperature"] is None
    assert "test_loss_calibrated" not in found["best_recalibrated"]
