"""A classifier evaluated on the test split."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.evaluation import evaluate as evaluate_module
from har.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_features,
    format_classes,
    load_test_rows,
    read_batches,
)
from har.inference.classifier import Classifier, load_classifier, save_classifier
from har.models.build import build_model
from har.util.errors import UserError
from tests.fixtures import tiny_recipe


@pytest.fixture
def classifier(tiny_backbone: None, manifest: Manifest, tmp_path: Path) -> Classifier:
    recipe = tiny_recipe()
    save_classifier(tmp_path, build_model(recipe, 3), manifest.class_names, recipe)
    return load_classifier(tmp_path)


def test_evaluated_as_classified(classifier: Classifier, manifest: Manifest) -> None:
    found = evaluate(classifier, manifest)
    rows = manifest.rows("test")
    answers = classifier.classify([(manifest.root / p).read_bytes() for p in rows["path"]])
    assert found.paths == rows["path"].tolist()
    assert found.predictions["predicted"].tolist() == [answer["label"] for answer in answers]
    np.testing.assert_allclose(
        found.predictions["probability"], [a["probability"] for a in answers], rtol=1e-5
    )
    hits = [a["label"] == label for a, label in zip(answers, rows["label"], strict=True)]
    assert found.scores["accuracy"] == pytest.approx(np.mean(hits))
    assert found.per_class["images"].sum() == len(rows)


def test_another_order_of_classes_is_matched_by_name(
    classifier: Classifier, manifest: Manifest
) -> None:
    table = manifest.table.assign(label_id=2 - manifest.table["label_id"])
    assert evaluate(classifier, replace(manifest, table=table)).scores == (
        evaluate(classifier, manifest).scores
    )


def test_unknown_label_is_named(classifier: Classifier, manifest: Manifest) -> None:
    table = manifest.table.assign(label=manifest.table["label"].replace("running", "flying"))
    with pytest.raises(UserError, match="does not know the labels flying; it knows sitting"):
        evaluate(classifier, replace(manifest, table=table))


def test_no_test_split_is_said(classifier: Classifier, manifest: Manifest) -> None:
    with pytest.raises(UserError, match="no test split"):
        evaluate(classifier, replace(manifest, table=manifest.table.assign(split="train")))


def test_a_training_that_diverged_is_named(
    tiny_backbone: None, manifest: Manifest, tmp_path: Path
) -> None:
    model = build_model(tiny_recipe(), 3)
    model.set_weights([np.full_like(each, np.nan) for each in model.get_weights()])
    save_classifier(tmp_path, model, manifest.class_names, tiny_recipe())
    diverged = load_classifier(tmp_path)
    features = np.full((len(manifest.rows("test")), 3), np.nan, np.float32)
    for evaluate_diverged in (
        lambda: evaluate(diverged, manifest),
        lambda: evaluate_features(diverged, manifest, lambda batch: batch, features[None], 1.0),
    ):
        with pytest.raises(UserError, match="not finite: its training diverged"):
            evaluate_diverged()


EVALUATION = Evaluation(
    class_names=("a", "b", "c"),
    paths=["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"],
    label_ids=np.array([0, 1, 0, 0, 1]),
    probabilities=np.array(
        [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.9, 0.0], [0.1, 0.3, 0.6], [0.1, 0.8, 0.1]],
        np.float32,
    ),
)


def test_mistakes_are_the_wrong_ones_the_surest_first() -> None:
    table = EVALUATION.mistakes
    assert list(table) == ["path", "label", "predicted", "probability"]
    # of equally sure ones the first stays first
    assert table["path"].tolist() == ["2.jpg", "1.jpg", "3.jpg"]
    assert table["label"].tolist() == ["a", "b", "a"]
    assert table["predicted"].tolist() == ["b", "a", "c"]
    assert table["probability"].tolist() == pytest.approx([0.9, 0.6, 0.6])
    assert table.index.tolist() == [0, 1, 2]


def test_per_class_table() -> None:
    table = EVALUATION.per_class
    columns = ["label", "precision", "recall", "recall_low", "recall_high", "f1", "images"]
    assert list(table) == columns
    assert table["recall"].tolist() == pytest.approx([1 / 3, 1 / 2, 0])
    assert (table["recall_low"] <= table["recall"]).all()
    assert (table["recall"] <= table["recall_high"]).all()
    assert table["images"].tolist() == [3, 2, 0]
    assert table.notna().all(axis=None)


def test_reliability_table() -> None:
    table = EVALUATION.reliability
    assert len(table) == 15
    assert table["images"].sum() == 5
    gap = (table["confidence"] - table["accuracy"]).abs() * table["images"] / 5
    assert EVALUATION.scores["calibration_error"] == pytest.approx(gap.sum())


def test_rows_are_read_in_order_and_decoded_as_in_training(
    classifier: Classifier, manifest: Manifest
) -> None:
    rows = load_test_rows(classifier, manifest)
    batches = list(read_batches(classifier, manifest, rows))
    assert np.concatenate([indices for _, indices in batches]).tolist() == list(range(len(rows)))
    expected = [classifier.decode((manifest.root / path).read_bytes()) for path in rows["path"]]
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), expected)


@pytest.mark.parametrize("classes", [2, 15, 400])
def test_tables_of_many_classes(classes: int) -> None:
    ids = np.arange(classes)
    evaluation = Evaluation(
        class_names=tuple(f"class {number}" for number in ids),
        paths=[f"{number}.jpg" for number in ids],
        label_ids=ids,
        probabilities=np.roll(np.eye(classes, dtype=np.float32), 1, axis=1),
    )
    found = evaluation.confusion
    assert list(found) == ["true", "predicted", "count"] and len(found) == classes
    assert found["count"].sum() == classes and not (found["true"] == found["predicted"]).any()
    lines = format_classes(evaluation.per_class).splitlines()
    assert len(lines) == (classes + 1 if classes <= 50 else 52)
    assert ("50 of 400 classes" in lines[-1]) is (classes == 400)


def test_probabilities_of_too_many_classes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(
        class_names=("a", "b"),
        paths=["x", "y"],
        label_ids=np.array([0, 1]),
        probabilities=np.eye(2, dtype=np.float32),
    )
    plain = ["path", "label", "predicted", "probability"]
    assert list(evaluation.predictions) == [*plain, "p_a", "p_b"]
    monkeypatch.setattr(evaluate_module, "MOST_PROBABILITIES", 3)
    assert list(evaluation.predictions) == plain


def test_a_message_lists_few_labels(classifier: Classifier, manifest: Manifest) -> None:
    many = tuple(f"class {number}" for number in range(1000))
    with pytest.raises(UserError, match="and 980 more") as caught:
        load_test_rows(replace(classifier, class_names=many), manifest)
    assert len(str(caught.value)) < 1000
