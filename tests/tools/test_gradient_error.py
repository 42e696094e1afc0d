"""The report of how far coded activations turn the gradient."""

import json

import numpy as np
import pytest

from mimicnorm_jax.tools.gradient_error import cosine


def test_the_cosine_of_two_arrays():
    a, b = np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]])
    assert cosine(a, b) == pytest.approx(0.96)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(a, 0 * a) == 0 and cosine(0 * a, 0 * a) == 1


def test_eight_bits_turn_the_gradient_less_than_four(run_main, tmp_path):
    path = tmp_path / "errors.json"
    done = run_main(
        *("--config=configs/digits_resnet20.py", "--config.network=resnet8", "--images=32"),
        *("--config.data.image_size=8", f"--json={path}"),
        module="mimicnorm_jax.tools.gradient_error",
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 0, done.stderr
    cosines = json.loads(path.read_text())["cosines"]
    assert len(cosines["int8"]) == 8
    # the classifier's input is kept as it is
    assert cosines["int8"]["classifier/kernel"] == pytest.approx(1, abs=1e-12)
    coded = [name for name in cosines["int8"] if name != "classifier/kernel"]
    assert all(cosines["int8"][name] > 0.999 for name in coded)
    assert all(0.97 < cosines["int4"][name] < cosines["int8"][name] for name in coded)
    assert "least" in done.stdout and "0.99" in done.stdout
