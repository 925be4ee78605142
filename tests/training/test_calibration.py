"""Temperatures: they make probabilities honest, and change no label."""

import numpy as np
import pytest

from har.evaluation.metrics import score
from har.training.calibration import fit_temperature, scale


def draw(sharpness: float, images: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right, made too sure (above 1) or not sure enough; and labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (images, 4))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) < rng.random((images, 1))).sum(axis=1)
    return scale(true, 1 / sharpness), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_was_done(sharpness: float) -> None:
    probabilities, labels = draw(sharpness)
    temperature = fit_temperature(probabilities, labels)
    assert temperature == pytest.approx(sharpness, rel=0.05)
    scaled = scale(probabilities, temperature)
    before, after = (score(each, labels) for each in (probabilities, scaled))
    assert after["calibration_error"] < 0.01
    assert after["calibration_error"] <= before["calibration_error"] + 0.002
    assert after["accuracy"] == before["accuracy"]
    np.testing.assert_array_equal(scaled.argsort(axis=1), probabilities.argsort(axis=1))


def test_certainty_stays_finite() -> None:
    scaled = scale(np.array([[1.0, 0.0, 0.0]], np.float32), 2.0)
    assert np.isfinite(scaled).all() and scaled.sum() == pytest.approx(1)
    assert 0.05 <= fit_temperature(np.array([[1.0, 0.0]]), np.array([1])) <= 20
    assert 0.05 <= fit_temperature(np.array([[0.5, 0.5]]), np.array([1])) <= 20
