"""Scores against values worked out by hand or published."""

import numpy as np
import pytest
from scipy.stats import binomtest

from har.evaluation import metrics
from har.evaluation.metrics import correct_for_many


def test_holm_by_hand() -> None:
    # 4 tests: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1, never falling
    found = correct_for_many(np.array([0.04, 0.01, 0.03, 0.02]))
    np.testing.assert_allclose(found, [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(correct_for_many(np.array([0.9, 0.8])), [1.0, 1.0])
    assert len(correct_for_many(np.array([]))) == 0


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


def test_wilson_intervals_equal_scipys_and_hold_the_share() -> None:
    totals = np.repeat(np.arange(1, 13), 13)
    successes = np.minimum(np.tile(np.arange(13), 12), totals)
    low, high = metrics.wilson_intervals(successes, totals, 0.9)
    for i, (k, n) in enumerate(zip(successes, totals, strict=True)):
        expected = binomtest(k, n).proportion_ci(0.9, method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low[i] <= k / n <= high[i] <= 1


def test_of_nothing_nothing_is_known() -> None:
    assert metrics.wilson_interval(0, 0) == (0, 1)


def paired(both: int, lost: int, gained: int, neither: int) -> tuple[float, float, float]:
    before = np.repeat([True, True, False, False], [both, lost, gained, neither])
    after = np.repeat([True, False, True, False], [both, lost, gained, neither])
    return metrics.paired_difference(before, after)


def test_paired_difference_equals_published_values() -> None:
    # Cavo et al. 2012 as in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency
    # Tables, chapter 8: Bonett and Price's interval of 59, 6, 16, 80, first minus second
    found = paired(59, 16, 6, 80)
    assert found == pytest.approx((-0.0621, -0.1195, -0.0032), abs=5e-5)
    difference, low, high = paired(59, 6, 16, 80)
    assert (-difference, -high, -low) == pytest.approx(found)


def test_paired_difference_counts_only_images_that_differ() -> None:
    assert paired(900, 8, 2, 90)[0] == paired(90, 8, 2, 900)[0] == pytest.approx(-0.006)
    assert paired(900, 8, 2, 90) == pytest.approx(paired(90, 8, 2, 900))
    difference, low, high = paired(50, 0, 0, 50)
    assert difference == 0
    # z * sqrt(2) / (images + 2)
    assert (low, high) == pytest.approx((-0.02717, 0.02717), abs=1e-5)
    assert paired(0, 3, 0, 0)[:2] == (-1, -1)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        # Bentur et al. as in Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology
        # 13: 2 (C(8,0) + C(8,1)) / 2^8; then Cavo et al., as above: the sum of C(22,0) to C(22,6)
        (7, 1, 18 / 256),
        (16, 6, 2 * 110056 / 2**22),
        (6, 0, 2 / 64),
        (5, 0, 2 / 32),
        (3, 3, 1),
        (0, 0, 1),
    ],
)
def test_paired_test_by_hand(gained: int, lost: int, p_value: float) -> None:
    before = np.repeat([True, True, False, False], [40, lost, gained, 9])
    after = np.repeat([True, False, True, False], [40, lost, gained, 9])
    assert metrics.paired_test(before, after) == (gained, lost, pytest.approx(p_value))
    assert metrics.paired_test(after, before) == (lost, gained, pytest.approx(p_value))


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


def test_reliability_by_hand() -> None:
    probabilities = np.array([[0.3, 0.7], [0.65, 0.35], [0.9, 0.1], [1.0, 0.0], [0.5, 0.5]])
    found = metrics.reliability(probabilities, np.array([1, 1, 0, 0, 1]), bins=5)
    assert found["confidence_from"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert found["confidence_to"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert found["images"].tolist() == [0, 0, 1, 2, 2]
    assert found["confidence"] == pytest.approx([np.nan, np.nan, 0.5, 0.675, 0.95], nan_ok=True)
    assert found["accuracy"] == pytest.approx([np.nan, np.nan, 0, 0.5, 1], nan_ok=True)
    assert found["accuracy_low"] == pytest.approx([0, 0, 0, 0.0945, 0.3424], abs=1e-4)
    assert found["accuracy_high"] == pytest.approx([1, 1, 0.7935, 0.9055, 1], abs=1e-4)
    # (1 * 0.5 + 2 * 0.175 + 2 * 0.05) / 5
    error = metrics.calibration_error(probabilities, np.array([1, 1, 0, 0, 1]), bins=5)
    assert error == pytest.approx(0.19)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_is_the_weighted_gap(bins: int) -> None:
    rng = np.random.default_rng(bins)
    probabilities = rng.dirichlet(np.ones(6) / 2, 400).astype(np.float32)
    label_ids = rng.integers(0, 6, 400)
    found = metrics.reliability(probabilities, label_ids, bins)
    some = found["images"] > 0
    assert found["images"].sum() == 400
    assert all(len(column) == bins for column in found.values())
    inside = found["confidence"][some], found["confidence_from"][some], found["confidence_to"][some]
    assert (inside[1] <= inside[0] + 1e-6).all() and (inside[0] <= inside[2] + 1e-6).all()
    assert (found["accuracy_low"] <= found["accuracy"])[some].all()
    assert (found["accuracy"] <= found["accuracy_high"])[some].all()
    gap = np.abs(found["confidence"] - found["accuracy"])[some]
    weighted = np.average(gap, weights=found["images"][some])
    assert metrics.calibration_error(probabilities, label_ids, bins) == pytest.approx(weighted)


def test_class_scores_have_intervals_of_recall() -> None:
    found = metrics.class_scores(PROBABILITIES, LABELS)
    assert found["images"].tolist() == [2, 0, 1, 1]
    assert found["precision"] == pytest.approx([0.5, 0, 1, 0])
    assert found["recall"] == pytest.approx([0.5, 0, 1, 0])
    # without images: 0 to 1
    assert found["recall_low"] == pytest.approx([0.0945, 0, 0.2065, 0], abs=1e-4)
    assert found["recall_high"] == pytest.approx([0.9055, 1, 1, 0.7935], abs=1e-4)


def test_score_agrees_with_its_parts() -> None:
    scores = metrics.score(PROBABILITIES, LABELS)
    assert scores["accuracy"] == 0.5
    assert scores["accuracy_low"] < 0.5 < scores["accuracy_high"]
    # class 0: precision 1/2, recall 1/2; class 2: 1, 1; class 3: 0; class 1: no image, counted 0
    assert scores["macro_f1"] == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_confusion_counts_pairs_of_true_and_predicted() -> None:
    counts = metrics.confusion(PROBABILITIES, LABELS)
    assert counts.tolist() == [[0, 0, 1], [0, 3, 1], [2, 2, 1], [3, 0, 1]]


@pytest.mark.parametrize(
    ("pairs", "most", "ids"),
    [
        ([[0, 0, 9], [3, 4, 2], [1, 4, 5]], 2, [1, 4]),  # 9 images that are right do not count
        ([[0, 0, 9], [3, 4, 2], [1, 4, 5]], 3, [1, 3, 4]),
        ([[0, 0, 9], [3, 4, 2], [1, 4, 5]], 4, [0, 1, 3, 4]),
        ([[0, 0, 9]], 3, [0, 1, 2]),
        ([[0, 0, 9], [3, 4, 2], [1, 4, 5]], 30, [0, 1, 2, 3, 4]),
    ],
)
def test_the_most_confused_classes(pairs: list[list[int]], most: int, ids: list[int]) -> None:
    assert metrics.most_confused(np.array(pairs), 5, most).tolist() == ids


def test_a_hundred_thousand_classes_take_no_square_of_memory() -> None:
    """A matrix of them would have 80 GB."""
    ids, classes = np.arange(20), 100_000
    probabilities = np.zeros((20, classes), np.float32)
    probabilities[ids, ids + 1] = 1.0
    assert len(metrics.confusion(probabilities, ids)) == 20
    assert metrics.score(probabilities, ids)["accuracy"] == 0
