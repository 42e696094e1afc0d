"""The claim of every figure, in its numbers; and that the numbers can be drawn."""

import json

import numpy as np
import pytest

from mimicnorm_jax.methods import create_method
from mimicnorm_jax.paper import last_bn, residual, transitions
from mimicnorm_jax.paper.drawing import load, write
from mimicnorm_jax.paper.figures import FIGURES


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def _drawn(name, numbers, folder):
    """The numbers as they are in the file, after the pictures have been drawn from them."""
    write(name, FIGURES[name], numbers, folder)
    for ending in (".png", ".svg"):
        assert (folder / name).with_suffix(ending).stat().st_size > 10_000
    read = json.loads((folder / f"{name}.json").read_text())
    FIGURES[name].draw(read)  # a reader of the JSON can draw it again
    return read


def test_channels_of_a_straight_network_draw_apart(digits, tmp_path):
    """Figure 2."""
    numbers = _drawn("figure2", FIGURES["figure2"].compute(digits, True), tmp_path)
    near, far = numbers["panels"]
    assert (near["layer"], far["layer"]) == (20, 50)
    assert 0.8 < near["between_channels"] < far["between_channels"]
    assert far["between_channels"] > 0.95


def test_channels_stay_alike_with_either_normalization(digits, tmp_path):
    """Figure 3."""
    numbers = _drawn("figure3", FIGURES["figure3"].compute(digits, True), tmp_path)
    assert [panel["kind"] for panel in numbers["panels"]] == ["batch_norm", "weight_mean"]
    for panel in numbers["panels"]:
        assert panel["layer"] == 50 and np.shape(panel["quantiles"]) == (30, 5)
        assert panel["between_channels"] < 0.1


def test_where_transition_operators_cross_the_diagonal(digits, tmp_path):
    """Figure 4."""
    numbers = _drawn("figure4", FIGURES["figure4"].compute(digits, True), tmp_path)
    rho = np.asarray(numbers["rho"])
    for kind, fixed in {"straight": [(1, True)], "weight_mean": [(0, True), (1, False)]}.items():
        found = numbers["kinds"][kind]
        assert [(round(p["rho"], 6), p["stable"]) for p in found["fixed_points"]] == fixed
        distance = np.abs(np.asarray(found["transition"]) - rho)
        assert np.flatnonzero(distance < 2e-5).tolist() == [
            int(np.argmin(np.abs(rho - point))) for point, _ in fixed
        ]


def test_the_multiplier_does_to_branches_what_batch_norm_does(digits):
    """Figure 5, of fewer blocks."""
    images, parts, sums = digits.some(32), {}, {}
    for name, method in {
        "batchnorm": create_method("batchnorm"),
        "multiplier": create_method("weightmean"),
        "no multiplier": residual._WithoutMultiplier(),
    }.items():
        found = residual._moments(method, images, 6, 1)
        parts[name] = (found["branch"] / found["sum"])[0]
        sums[name] = found["sum"][0]
    np.testing.assert_allclose(parts["multiplier"], parts["batchnorm"], rtol=0.35)
    for name in ("batchnorm", "multiplier"):
        assert np.all(np.diff(parts[name]) < 0) and parts[name][-1] < 0.3
        assert sums[name][-1] / sums[name][0] < 8  # like the number of blocks
    assert np.all(parts["no multiplier"] > 0.5)
    assert sums["no multiplier"][-1] / sums["no multiplier"][0] > 2**5 / 2  # doubles each time


@pytest.mark.parametrize("name", ["figure8", pytest.param("figure9", marks=pytest.mark.long)])
def test_pairs_of_images_through_depth(name, digits, tmp_path):
    numbers = _drawn(name, FIGURES[name].compute(digits, True), tmp_path)
    expected = {"figure8": ["straight"], "figure9": ["batch_norm", "weight_mean"]}[name]
    assert list(numbers["kinds"]) == expected
    for kind, found in numbers["kinds"].items():
        rows = np.asarray(found["correlation"])
        assert rows.shape == (22 - 1, 200)
        first, last = rows[0], rows[-1]
        if kind == "straight":
            assert np.all(last > 0.9) and last.min() > first.min() + 0.5
        else:
            assert abs(last.mean()) < 0.1 and np.mean(np.abs(last) < 0.3) > 0.9
        # the theory is of infinite width, and for BatchNorm also of infinitely many images
        assert abs(found["theory"][-1] - last.mean()) < 0.1


@pytest.mark.long
def test_outputs_surge_without_the_last_bn(digits):
    """Figure 10, of a narrower network: with it the variance grows too, but less and less."""
    options = {"width": 1 / 16, "batch": 32, "steps": 40}
    kept = last_bn._variances("vgg11", "mimicnorm", digits, **options)
    lost = last_bn._variances("vgg11", "weightmean", digits, **options)
    assert np.shape(kept) == (40, 10) and np.all(np.isfinite(kept))
    growth = np.diff(np.log(np.mean(kept, axis=1)))
    assert growth[-10:].mean() < growth[:10].mean() / 3
    assert len(lost) < 10  # not finite any more


def test_straight_networks_are_badly_conditioned(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(transitions, "QUICK", transitions.Size(8, 128, 4, (0, 8)))
    numbers = _drawn("conditioning", FIGURES["conditioning"].compute(digits, True), tmp_path)
    assert numbers["depths"] == [0, 8] and list(numbers["kinds"]) == [
        *("straight", "weight_mean", "batch_norm")
    ]
    deep = {kind: found["measured"][1] for kind, found in numbers["kinds"].items()}
    assert deep["weight_mean"] < deep["straight"] / 3 and deep["batch_norm"] < deep["straight"] / 3
    for kind in ("straight", "weight_mean"):
        ratio = numbers["kinds"][kind]["theory"][1] / deep[kind]
        assert 1 / 3 < ratio < 3


def test_the_mean_is_the_direction_that_is_left_out():
    kernel = np.diag([1.0, 2.0, 3.0]) + 7.0  # adds 7 along the mean only
    inner = transitions._without_mean(kernel)
    assert inner.shape == (2, 2)
    centre = np.eye(3) - 1 / 3
    whole = np.linalg.eigvalsh(centre @ np.diag([1.0, 2.0, 3.0]) @ centre)
    np.testing.assert_allclose(np.linalg.eigvalsh(inner), whole[1:], atol=1e-12)
