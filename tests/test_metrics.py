"""Scores against values worked out by hand or published."""

import numpy as np
import pytest

from har import metrics

PROBABILITIES = np.array(
    [[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.0, 0.1, 0.9, 0.0]]
)
LABELS = np.array([0, 0, 3, 2])


def test_top_k_breaks_ties_by_the_lower_id() -> None:
    assert metrics.top_k_hits(PROBABILITIES, LABELS, 1).tolist() == [True, False, False, True]
    assert metrics.top_k_hits(PROBABILITIES, LABELS, 3).tolist() == [True, False, False, True]
    assert metrics.top_k_hits(PROBABILITIES, LABELS, 4).all()


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(
    successes: int, total: int, low: float, high: float
) -> None:
    assert metrics.wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_log_loss() -> None:
    expected = -np.log([0.7, 0.1, 0.25, 0.9]).mean()
    assert metrics.log_loss(PROBABILITIES, LABELS) == pytest.approx(expected)
    hopeless = np.array([[1.0, 0.0]], np.float32)
    assert np.isfinite(metrics.log_loss(hopeless, np.array([1])))


def test_calibration_error_is_zero_when_confidence_is_right() -> None:
    probabilities = np.tile([0.75, 0.25], (8, 1))
    assert metrics.calibration_error(probabilities, np.array([0, 0, 0, 1] * 2)) == pytest.approx(0)
    assert metrics.calibration_error(probabilities, np.ones(8, int)) == pytest.approx(0.75)
    certain = np.tile([1.0, 0.0], (4, 1))
    assert metrics.calibration_error(certain, np.zeros(4, int)) == pytest.approx(0)


def test_score_agrees_with_its_parts() -> None:
    scores = metrics.score(PROBABILITIES, LABELS)
    assert scores.accuracy == 0.5
    assert scores.accuracy_low < 0.5 < scores.accuracy_high
    # class 0: precision 1/2, recall 1/2; class 2: 1, 1; class 3: 0; class 1: no image, counted 0
    assert scores.macro_f1 == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_confusion_rows_are_true_classes() -> None:
    counts = metrics.confusion(PROBABILITIES, LABELS)
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
