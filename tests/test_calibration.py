"""Temperatures and calibration errors, on logits whose right probabilities are known."""

import numpy as np
import pytest
from scipy.special import softmax

from mimicnorm_jax.calibration import fit_temperature, log_probabilities, reliability
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train.calibrated import calibrate, read_calibration, write_calibrations
from mimicnorm_jax.train.scores import (
    Outputs,
    confusion_of,
    details,
    probability_scores,
    scores,
    top_accuracy,
)


def drawn(count, *, classes=10, sharpness=2.0, seed=0):
    """Logits, and labels drawn with the probabilities that they say."""
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.normal(size=(count, classes))
    cumulative = np.cumsum(softmax(logits, -1), -1)
    labels = (generator.random((count, 1)) > cumulative).sum(-1)
    return logits, np.minimum(labels, classes - 1)


@pytest.mark.parametrize("wrong", [0.2, 1.0, 5.0])
def test_the_temperature_undoes_what_made_the_logits_wrong(wrong):
    logits, labels = drawn(40_000)
    assert fit_temperature(logits * wrong, labels) == pytest.approx(wrong, rel=0.02)
    # float32, as networks give them, in parts
    found = fit_temperature((logits * wrong).astype(np.float32), labels)
    assert found == pytest.approx(fit_temperature(logits * wrong, labels), rel=1e-4)


def test_it_is_where_the_likelihood_is_greatest():
    logits, labels = drawn(500, sharpness=3.0)
    best = fit_temperature(logits, labels)
    found = {
        factor: -np.mean(log_probabilities(logits, factor * best)[np.arange(500), labels])
        for factor in (0.9, 1.0, 1.1)
    }
    assert found[1.0] < min(found[0.9], found[1.1])


def test_who_is_right_about_all_is_not_sure_of_everything():
    """Without the doubt of one more example the temperature would be 0."""
    labels = np.arange(200) % 10
    logits = 3.0 * np.eye(10)[labels] - 0.3
    temperature = fit_temperature(logits, labels)
    p = np.exp(log_probabilities(logits[:1], temperature))[0]
    # 200 of 201 right, and of the 201st a tenth
    assert p[0] == pytest.approx((200 + 0.1) / 201, abs=1e-4)
    more = fit_temperature(np.tile(logits, (10, 1)), np.tile(labels, 10))
    assert 0 < more < temperature


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature(np.zeros((0, 10)), np.zeros(0, int))


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    confidence = np.array([0.55, 0.58, 0.95, 1.0, 0.6])
    correct = np.array([True, False, True, True, False])
    found = reliability(confidence, correct, bins=10)
    assert found.count.tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 2]  # 0.6 is in (0.5, 0.6]
    gaps = 3 * abs((0.55 + 0.58 + 0.6) / 3 - 1 / 3) + 2 * abs(0.975 - 1)
    assert found.error == pytest.approx(gaps / 5)
    logits, labels = drawn(60_000)
    outputs = Outputs(logits, labels)
    assert probability_scores(outputs, 1.0)["calibration_error"] < 0.01
    assert probability_scores(Outputs(3 * logits, labels), 1.0)["calibration_error"] > 0.15


def test_a_temperature_improves_what_it_is_judged_by_and_changes_no_prediction():
    logits, labels = drawn(3000)
    outputs = Outputs((0.3 * logits).astype(np.float32), labels)
    found = calibrate(outputs)
    assert found["examples"] == 3000
    for name in ("loss", "calibration_error"):
        assert found["after"][name] < found["before"][name] - 0.05
    numbers = scores(outputs, found["temperature"])
    assert numbers["loss"] == found["before"]["loss"]
    assert numbers["loss_calibrated"] == found["after"]["loss"]
    assert numbers["accuracy"] == scores(outputs, None)["accuracy"]
    assert "loss_calibrated" not in scores(outputs, None)


def test_what_is_kept_is_what_is_read_and_damage_is_named(tmp_path):
    assert read_calibration(tmp_path, 5) is None
    found = calibrate(Outputs(*drawn(50)))
    write_calibrations(tmp_path, {5: found})
    assert read_calibration(tmp_path, 5) == found and read_calibration(tmp_path, 6) is None
    for value in ('{"5": {"temperature": 0.0}}', '{"5": [1]}', '{"5": {"temperature": NaN}}'):
        (tmp_path / "calibration.json").write_text(value)
        with pytest.raises(UserError, match="step 5 has no positive temperature"):
            read_calibration(tmp_path, 5)


def test_top_5_confusion_and_classes():
    logits = np.array([[9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
    outputs = Outputs(logits.astype(float), np.array([4, 5, 1]))
    assert top_accuracy(outputs) == pytest.approx(1 / 3)  # of equals the first five count
    assert top_accuracy(outputs, 6) == 1.0
    confusion = confusion_of(outputs)
    assert [(i, j) for i in (4, 5, 1) for j in range(7) if confusion[i, j]] == [
        (4, 0),
        (5, 0),
        (1, 6),
    ]
    outputs = Outputs(np.eye(7)[[2, 2, 3]], np.array([2, 2, 2]))
    rows = details(outputs, list("abcdefg"), None)["classes"]
    assert rows[2] == {"class": "c", "examples": 3, "accuracy": pytest.approx(2 / 3)}
    assert rows[3] == {"class": "d", "examples": 0, "accuracy": None}
    nan = Outputs(np.full((2, 7), np.nan), np.array([0, 1]))
    assert top_accuracy(nan) == 0.0


def test_among_some_of_the_classes_the_others_are_no_choice():
    logits = np.array([[5.0, 1.0, 2.0, 0.0], [0.0, 4.0, 1.0, 3.0]])
    outputs = Outputs(logits, np.array([2, 3]))
    assert scores(outputs, None)["accuracy"] == 0.0
    among = outputs.restricted([2, 3])
    assert among.labels.tolist() == [0, 1] and among.logits.tolist() == [[2, 0], [1, 3]]
    assert scores(among, None)["accuracy"] == 1.0
