"""Labels in doubt: planted errors are found, little else is, and nothing crashes."""

import importlib.util

import numpy as np
import pytest

from har.training.suspects import check_cleanlab, find_suspects, suggest_labels
from har.util.errors import UserError

CLASSES = 4


def predict(images: int = 800, certainty: float = 3.0, seed: int = 0):
    """True labels, and predictions that are right of nine images in ten."""
    rng = np.random.default_rng(seed)
    true = np.arange(images) % CLASSES
    logits = rng.normal(0, 1, (images, CLASSES))
    logits[np.arange(images), true] += certainty
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return true, probabilities.astype(np.float32)


def plant(true: np.ndarray, share: float = 0.05, seed: int = 1):
    """Labels of which a share is wrong, and which."""
    rng = np.random.default_rng(seed)
    planted = rng.random(len(true)) < share
    return np.where(planted, (true + rng.integers(1, CLASSES, len(true))) % CLASSES, true), planted


def test_planted_errors_are_found() -> None:
    true, probabilities = predict()
    labels, planted = plant(true)
    assert 30 < planted.sum() < 50
    found = find_suspects(probabilities, labels)
    recall, precision = found[planted].mean(), planted[found].mean()
    assert recall >= 0.85 and precision >= 0.5, (recall, precision)
    # what is wrongly in doubt is what the predictions have wrong
    assert (probabilities[found].argmax(axis=1) != labels[found]).all()


def test_the_strongest_doubts_are_the_planted_errors() -> None:
    true, probabilities = predict()
    labels, planted = plant(true)
    found = np.flatnonzero(find_suspects(probabilities, labels))
    suggested, margins = suggest_labels(probabilities, labels)
    worst = found[np.argsort(margins[found])][:15]
    assert planted[worst].all() and (suggested[worst] == true[worst]).all()


def test_right_labels_that_are_predicted_are_not_in_doubt() -> None:
    true, probabilities = predict(certainty=20)
    assert not find_suspects(probabilities, true).any()


def test_suggestions_and_margins_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0, 0, 1]], np.float32)
    suggested, margins = suggest_labels(probabilities, np.array([0, 1, 0]))
    assert suggested.tolist() == [1, 0, 2]
    np.testing.assert_allclose(margins, [0.5, -0.5, -1], rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "labels", [[], [0], [1, 1, 1], [0, 2, 2, 0, 0], [3, 0], [0, 1, 2, 3]], ids=str
)
def test_tiny_data_and_classes_without_images(labels: list[int]) -> None:
    _, probabilities = predict(images=len(labels))
    # a softmax in float32 may exceed 1 by rounding
    probabilities[:1] = [1.0000001, 0, 0, 0]
    found = find_suspects(probabilities, np.array(labels, np.int64))
    assert found.shape == (len(labels),) and found.dtype == bool
    assert set(np.array(labels)[~found]) == set(labels)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'cleanlab"):
        check_cleanlab()
