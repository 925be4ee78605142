"""The classifier on disk and in memory: same answers, a bad file spoils only its own row."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe

from har.classifier import Classifier, load_classifier, save_classifier
from har.errors import UserError
from har.manifest import Manifest
from har.model import build_model
from har.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(resize="bicubic")


@pytest.fixture
def folder(tiny_backbone: None, manifest: Manifest, recipe: Recipe, tmp_path: Path) -> Path:
    save_classifier(tmp_path, build_model(recipe, 3), manifest.class_names, recipe)
    return tmp_path


@pytest.fixture
def classifier(folder: Path) -> Classifier:
    return load_classifier(folder)


@pytest.fixture
def files(manifest: Manifest) -> list[bytes]:
    return [(manifest.root / path).read_bytes() for path in manifest.table["path"]]


def test_loaded_equals_saved(
    folder: Path, classifier: Classifier, recipe: Recipe, manifest: Manifest, files: list[bytes]
) -> None:
    assert classifier.recipe == recipe and classifier.class_names == manifest.class_names
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.json", "model.keras"]
    again = load_classifier(folder)
    assert again.classify(files[:3]) == classifier.classify(files[:3])


def test_rows_hold_label_probability_and_top_3(classifier: Classifier, files: list[bytes]) -> None:
    rows = classifier.classify(files)
    images = np.stack([classifier.decode(data) for data in files])
    probabilities = classifier.probabilities(images)
    assert len(rows) == len(files) > 32  # more than one batch
    for row, expected in zip(rows, probabilities, strict=True):
        assert row["label"] == classifier.class_names[expected.argmax()]
        assert row["probability"] == float(expected.max()) == row["top_3"][0]["probability"]
        assert [each["probability"] for each in row["top_3"]] == sorted(expected.tolist())[::-1]
        assert row["error"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_a_bad_file_spoils_only_its_own_row(classifier: Classifier, files: list[bytes]) -> None:
    alone = classifier.classify(files[:2])
    rows = classifier.classify([files[0], b"junk", None, files[1], files[2][:-200], float("nan")])
    assert [rows[0], rows[3]] == [
        {**row, "probability": pytest.approx(row["probability"]), "top_3": rows[i]["top_3"]}
        for i, row in zip((0, 3), alone, strict=True)
    ]
    for index, message in ((1, "not an image"), (2, "NoneType"), (4, "cannot"), (5, "float")):
        assert message in rows[index]["error"]
        assert rows[index] == {
            "label": None,
            "probability": None,
            "top_3": [],
            "error": rows[index]["error"],
        }


def test_nothing_in_nothing_out(classifier: Classifier) -> None:
    assert classifier.classify([]) == []
    assert [row["label"] for row in classifier.classify([b"", b"x"])] == [None, None]


def test_batch_sizes_are_not_traced_anew(classifier: Classifier, files: list[bytes]) -> None:
    for count in (1, 2, 5, 40):
        classifier.classify(files[:count])
    assert classifier.forward.experimental_get_tracing_count() == 1


def test_folder_without_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text("{}")
    (tmp_path / "model.keras").write_text("junk")
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path)
