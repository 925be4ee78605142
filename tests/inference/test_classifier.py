"""The classifier on disk and in memory: same answers, a bad file spoils only its own row."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from har.data.images import ImageError, Pixels, decode_small
from har.data.manifest import Manifest
from har.inference import classifier as classifier_module
from har.inference.classifier import (
    FACTS_FILE,
    Classifier,
    decoders,
    load_classifier,
    read_facts,
    save_classifier,
)
from har.inference.runtimes import MODEL_FILE, OPENVINO_FILE, RUNTIMES
from har.models.build import build_model
from har.recipe import Recipe
from har.util.errors import UserError
from tests.conftest import tiny_recipe


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
    probabilities = classifier.forward(images)
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


def test_images_are_decoded_side_by_side_and_keep_their_order(
    classifier: Classifier, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def decode(*arguments: Any) -> Pixels:
        threads.add(threading.current_thread().name)
        return decode_small(*arguments)

    monkeypatch.setattr(classifier_module, "decode_small", decode)
    rows = classifier.classify(list(range(len(files))), lambda index: files[index])
    assert rows == classifier.classify(files)
    assert all(name.startswith("decode") for name in threads)
    assert decoders() is decoders()


def test_a_reader_may_refuse_its_row(classifier: Classifier, files: list[bytes]) -> None:
    def read(data: bytes) -> bytes:
        if data == b"no":
            raise ImageError("not today")
        return data

    rows = classifier.classify([files[0], b"no", files[1]], read)
    assert [row["error"] for row in rows] == [None, "not today", None]


def test_callers_at_once_get_what_they_would_get_alone(
    classifier: Classifier, files: list[bytes]
) -> None:
    # several sizes, bad files among them
    asked = [[*files[start : start + 1 + 3 * start], b"junk"] for start in range(8)]
    alone = [classifier.classify(each) for each in asked]
    with ThreadPoolExecutor(8) as callers:
        together = list(callers.map(classifier.classify, asked * 4))
    for found, expected in zip(together, alone * 4, strict=True):
        assert_same_rows(found, expected)


def assert_same_rows(found: list[dict], expected: list[dict]) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["error"] for row in found] == [row["error"] for row in expected]
    numbers = [
        [[top["probability"] for top in row["top_3"]] for row in rows if row["top_3"]]
        for rows in (found, expected)
    ]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)


def test_numbers_that_are_none_are_an_error(classifier: Classifier) -> None:
    row = classifier.predict_from(np.array([0.5, np.nan, 0.5], np.float32))
    assert row["label"] is None and "not finite" in row["error"]
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_folder_without_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path)
    for facts in ({}, *({"runtime": name} for name in (*RUNTIMES, "gpu"))):
        (tmp_path / "classifier.json").write_text(json.dumps(facts))
        for name in (MODEL_FILE, OPENVINO_FILE):
            (tmp_path / name).write_text("junk")
        with pytest.raises(UserError, match="holds no classifier"):
            load_classifier(tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_changed_files_are_not_loaded(runtime: str, tiny_backbone: None, tmp_path: Path) -> None:
    recipe = tiny_recipe("v3")
    save_classifier(tmp_path, build_model(recipe, 2), ("a", "b"), recipe, runtime)
    load_classifier(tmp_path)
    names = [path.name for path in tmp_path.iterdir() if path.name != FACTS_FILE]
    assert set(read_facts(tmp_path)["sha256"]) == set(names)
    for name in names:
        whole = (tmp_path / name).read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(UserError, match=f"{name} is not the file that was saved"):
            load_classifier(tmp_path)
        (tmp_path / name).write_bytes(whole)
