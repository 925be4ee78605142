"""A classifier judged on the test split."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe
from matplotlib.figure import Figure

from har.classifier import Classifier, load_classifier, save_classifier
from har.errors import UserError
from har.evaluation import Evaluation, draw_confusion, draw_curves, evaluate
from har.manifest import Manifest
from har.model import build_model


@pytest.fixture
def classifier(tiny_backbone: None, manifest: Manifest, tmp_path: Path) -> Classifier:
    recipe = tiny_recipe()
    save_classifier(tmp_path, build_model(recipe, 3), manifest.class_names, recipe)
    return load_classifier(tmp_path)


def test_judged_as_classified(classifier: Classifier, manifest: Manifest) -> None:
    found = evaluate(classifier, manifest)
    rows = manifest.rows("test")
    answers = classifier.classify([(manifest.root / p).read_bytes() for p in rows["path"]])
    assert found.paths == rows["path"].tolist()
    assert found.predictions["predicted"].tolist() == [answer["label"] for answer in answers]
    np.testing.assert_allclose(
        found.predictions["probability"], [a["probability"] for a in answers], rtol=1e-5
    )
    hits = [a["label"] == label for a, label in zip(answers, rows["label"], strict=True)]
    assert found.scores.accuracy == pytest.approx(np.mean(hits))
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


def pixels(figure: Figure, path: Path) -> int:
    figure.savefig(path)
    return path.stat().st_size


@pytest.mark.parametrize("classes", [2, 15])
def test_figures_are_drawn(classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    evaluation = Evaluation(
        class_names=tuple(f"class_{i}" for i in range(classes)),
        paths=[str(i) for i in range(60)],
        label_ids=rng.integers(0, classes, 60),
        probabilities=rng.dirichlet(np.ones(classes), 60).astype(np.float32),
    )
    figure = draw_confusion(evaluation)
    (axes, _) = figure.axes
    counts = [int(text.get_text()) for text in axes.texts]
    assert sum(counts) == 60
    assert "of 60 test images" in axes.get_title()
    assert pixels(figure, tmp_path / "confusion.png") > 5000


def test_curves_show_validation_only_where_there_is_one(tmp_path: Path) -> None:
    epoch = {"train_loss": 1.0, "train_accuracy": 0.5}
    assert len(draw_curves([epoch]).axes[0].lines) == 1
    both = {**epoch, "val_loss": 1.0, "val_accuracy": 0.4}
    figure = draw_curves([both, both])
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert pixels(figure, tmp_path / "curves.png") > 5000
