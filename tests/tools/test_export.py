"""``python -m mimicnorm_jax.tools.export``: the network of a run, out and back."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mimicnorm_jax
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools import export, predict
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.setup import set_up
from tests.train.test_init_from import folder_of, logits_at_the_start, random_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("images"), "abcd")


@pytest.fixture(scope="module")
def runs(tiny_config, images, tmp_path_factory):
    """Finished runs, by method, with held-out images and so with a temperature."""
    folders = {}
    for method in ("mimicnorm", "fixup", "weightstandardization"):
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        options = {"method_options__groups": 4} if method.startswith("weights") else {}
        more = {"data__holdout": 0.2, "max_steps": 2, "batch_size": 8}
        train(tiny_config(method=method, **images, **more, **options), folders[method])
    return folders


@pytest.mark.parametrize("method", ["mimicnorm", "fixup", "weightstandardization"])
def test_safetensors_come_back_as_the_network_of_the_run(method, runs, tmp_path, capsys):
    out = tmp_path / "exported"
    assert export.main([str(runs[method]), "--format=safetensors", f"--out={out}"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{runs[method]}: step 2, the best; ")
    assert f"{out}: images (batch, height, width, 3)" in output
    before, after = mimicnorm_jax.load(runs[method]), mimicnorm_jax.load(out)
    x = random_images(3)
    np.testing.assert_allclose(after.logits(x), before.logits(x), atol=1e-5)
    np.testing.assert_allclose(after.predict(x), before.predict(x), atol=1e-6)
    assert (after.classes, after.step, after.mean) == (before.classes, before.step, before.mean)
    assert after.temperature == before.temperature is not None
    np.testing.assert_array_equal(
        after.preprocess(np.zeros((9, 12, 3), np.uint8)), np.zeros((8, 8, 3))
    )
    said = (out / "config.json").read_text()
    assert "data.dir" not in said and str(runs[method].parent) not in said
    image = tmp_path / "image.png"
    Image.fromarray(x[0]).save(image)
    answers = tmp_path / "answers.json"
    assert predict.main([str(out), str(image), f"--json={answers}"]) == 0
    (answer,) = json.loads(answers.read_text())
    assert answer["classes"][0]["class"] == before.classes[before.predict(x[:1])[0].argmax()]
    # and out once more
    assert export.main([str(out), "--format=stablehlo", f"--out={tmp_path / 'again'}"]) == 0
    assert "the best" not in capsys.readouterr().out  # there is one only


@pytest.mark.parametrize("method", ["lastbn", "nonorm"])
def test_a_run_starts_from_an_export(method, runs, tiny_config, images, tmp_path):
    out = tmp_path / "exported"
    assert export.main([str(runs["mimicnorm"]), "--format=safetensors", f"--out={out}"]) == 0
    experiment = set_up(tiny_config(init_from=str(out), method=method, **images))
    expected = mimicnorm_jax.load(out).logits(random_images(3))
    found = logits_at_the_start(experiment, random_images(3))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert experiment.start.said == "resnet8, mimicnorm, step 2; its classifier too"
    with pytest.raises(UserError, match="there is no BatchNorm to fill the network's"):
        set_up(tiny_config(init_from=str(out), method="batchnorm", **images))


def test_stablehlo_of_a_run(runs, tmp_path, capsys):
    out = tmp_path / "network.stablehlo"
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(photo)
    arguments = [str(runs["mimicnorm"]), str(photo), "--format=stablehlo", f"--out={out}"]
    assert export.main([*arguments, "--normalize", "--static", "--weights=beside"]) == 0
    assert "images (1, 8, 8, 3)" in capsys.readouterr().out
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    network = mimicnorm_jax.load(runs["mimicnorm"])
    pixels = network.preprocess(photo)[None]
    weights = load_file(tmp_path / "network.stablehlo.safetensors")
    found = program.call(weights, pixels)
    np.testing.assert_allclose(found, network.logits(pixels), atol=1e-5)
    said = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert said["run"]["network"] == "resnet8" and said["run"]["method"] == "mimicnorm"
    assert said["classes"] == list("abcd")
    assert said["temperature"] == network.temperature
    assert 0 <= said["run"]["test_accuracy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which run"),
        (["RUN"], "--out is missing"),
        (["RUN", "--format=onnx"], "--out is missing"),
        (["RUN", "--out=a.txt"], "--format is missing"),
        (["RUN", "--format=onnx", "--out=a.stablehlo"], "not named as what it is to be: a.onnx"),
        (["RUN", "--format=stablehlo", "--out=a.onnx"], "what it is to be: a.stablehlo"),
        (["RUN", "--format=onnx", "--out=a", "--weights=beside"], "goes with stablehlo"),
        (["nowhere", "--format=onnx", "--out=a"], "nowhere does not exist"),
        (["RUN", "--format=safetensors", "--out=a", "--normalize"], "go with onnx and stablehlo"),
        (["RUN", "nothing.jpg", "--format=stablehlo", "--out=a"], "'nothing.jpg' does not exist"),
        (["RUN", "--format=tflite", "--out=a"], "onnx|stablehlo|safetensors"),
        (["RUN", "--format=stablehlo", "--out=no/where"], "no is not a folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, said, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [str(runs["mimicnorm"]) if a == "RUN" else a for a in arguments]
    assert export.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and said in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_damaged_export_is_named(runs, tmp_path):
    out = tmp_path / "exported"
    assert export.main([str(runs["mimicnorm"]), "--format=safetensors", f"--out={out}"]) == 0
    values = json.loads((out / "config.json").read_text())
    for change, said in (
        ({"format": 2}, "has format 2, and this version"),
        ({"build": {}}, "a network of your own"),
        ({"build": {"config": values["build"]["config"]}}, "is damaged: it has no description"),
    ):
        (out / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=said):
            mimicnorm_jax.load(out)
