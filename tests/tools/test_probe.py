import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.theory.probe import Layer, Measured
from mimicnorm_jax.tools.probe.rows import Row, average, probe, table
from mimicnorm_jax.train.loop import train

TINY = (
    *("--config=configs/digits_resnet20.py", "--config.network=mlp"),
    *("--config.width=0.5", "--config.data.image_size=8", "--images=4"),
)


@pytest.fixture
def run_probe(run_main, tmp_path):
    def run(*arguments, cwd=tmp_path):
        here = os.getcwd()
        absolute = [a.replace("=configs/", f"={here}/configs/") for a in (*TINY, *arguments)]
        return run_main(*absolute, module="mimicnorm_jax.tools.probe", cwd=cwd, COLUMNS="200")

    return run


def test_methods_are_put_side_by_side_in_table_picture_and_file(run_probe, tmp_path):
    done = run_probe("--methods=nonorm,mimicnorm", "--json=numbers.json", "--draws=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["|", "nonorm", "|", "mimicnorm"]
    assert [line.split()[0] for line in lines[2:5]] == ["layers/0", "layers/1", "classifier"]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers.keys() == {"nonorm", "mimicnorm"}
    row = numbers["mimicnorm"][0]
    assert row["layer"] == "layers/0" and "quantiles" not in row
    assert f"{row['second_moment']:.3f}" in lines[2]
    with Image.open(tmp_path / "probe.png") as picture:
        assert picture.size[0] > 1000


def test_a_row_is_the_mean_over_initializations():
    first = Measured(1.0, 2.0, 3.0, 0.4, 0.5, np.zeros((1, 5)))
    second = Measured(3.0, 4.0, 5.0, 0.6, 0.7, np.ones((1, 5)))
    layers = (Layer("stem", first, 9.0, 10.0, 0.1), Layer("stem", second, None, 20.0, 0.3))
    row = average(layers)
    assert (row.mean, row.variance, row.second_moment) == (2.0, 3.0, 4.0)
    assert (row.dead, row.correlation) == (pytest.approx(0.5), pytest.approx(0.6))
    assert (row.predicted_second_moment, row.predicted_correlation) == (15.0, pytest.approx(0.2))
    assert row.gradient_norm == 9.0 and row.quantiles == [[0.0] * 5]


def test_a_trained_state_is_probed(tiny_config, tmp_path):
    run = tmp_path / "run"
    train(tiny_config(network="mlp", max_steps=2), run)
    fresh, trained = (
        probe(tiny_config(network="mlp"), ["mimicnorm"], images=4, checkpoint=checkpoint)[
            "mimicnorm"
        ]
        for checkpoint in (None, run)
    )
    moved = [a.second_moment != b.second_moment for a, b in zip(trained, fresh, strict=True)]
    assert any(moved)
    other = tiny_config(network="mlp", learning_rate=0.5)
    with pytest.raises(UserError, match=r"config\.learning_rate \(0\.1 there, 0\.5 now\)"):
        probe(other, ["mimicnorm"], images=4, checkpoint=run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=nonorm,mimicnrm"], "did you mean 'mimicnorm'|mimicnorm"),
        (["--methods=nonorm", "--checkpoint=nowhere"], "leave out --methods"),
        (["--checkpoint=nowhere"], "nowhere is not the folder of a run"),
        (["--images=1"], "images"),
        (["--methods="], "--methods= is empty"),
        (["--methods=batchnorm", "--config.method_options.gain=2"], "gain does not apply to batch"),
        (["--json=."], "does not end in .json"),
        (["--images=100000"], "more than the 1437 training images"),
        (["--plot=no/such/x.png"], "--plot=no/such/x.png cannot be written: .* is not a folder"),
        (["--plot=picture.xyz"], "does not end in .png or"),
        (["--config.network=vgg11", "--config.method=fixup"], "needs residual branches"),
    ],
)
def test_a_wrong_input_is_one_line(run_probe, arguments, message):
    done = run_probe(*arguments)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_narrow_terminal_gets_one_method_after_the_other():
    row = Row("stem", 0.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.0, None, [])
    rows = {"nonorm": [row], "mimicnorm": [row]}
    assert len(table(rows, columns=200).splitlines()) == 3
    narrow = table(rows, columns=80).splitlines()
    assert len(narrow) == 2 * 3 + 1
    assert max(map(len, narrow)) <= 80
