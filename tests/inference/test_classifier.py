"""The classifier on disk and in memory: same answers, a bad file spoils only its own row."""

import io
import json
import os
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
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
from har.models import keras_file
from har.models.build import build_model
from har.models.keras_file import check_keras_file
from har.recipe import Recipe
from har.util.errors import UserError
from har.util.files import digest_file
from tests.fixtures import tiny_recipe


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


# What a classifier.json that is not ours may say beside what it should.
FACTS: dict[str, Any] = {
    "deep": "[" * 100_000,
    "a list": "[]",
    "5,000 digits": "9" * 5000,
    "large": " " * 30_000_000,
    "a device": {"sha256": {"/dev/zero": "0"}},
    "a path": {"sha256": {"../secret": "0"}},
    "an inner path": {"sha256": {"a/b": "0"}},
    "the folder": {"sha256": {".": "0"}},
    "a zero byte": {"sha256": {"a\0b": "0"}},
    "no name": {"sha256": {"": "0"}},
    "no digests": {"sha256": {}},
    "digests of a list": {"sha256": ["model.keras"]},
    "no classes": {"class_names": []},
    "classes of numbers": {"class_names": [1, 2, 3]},
    "a text of classes": {"class_names": "abc"},
    "another runtime": {"runtime": "magic"},
    "a runtime without its files": {"runtime": "openvino"},
    "a recipe of text": {"recipe": "v3"},
}


@pytest.mark.parametrize("name", FACTS)
def test_hostile_facts_are_one_line(name: str, folder: Path) -> None:
    file, changed = folder / FACTS_FILE, FACTS[name]
    facts = json.loads(file.read_text())
    file.write_text(changed if isinstance(changed, str) else json.dumps(facts | changed))
    with pytest.raises(UserError, match="holds no classifier") as caught:
        load_classifier(folder)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def _link(target: str) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), file.symlink_to(target))


@pytest.mark.parametrize("of", [FACTS_FILE, MODEL_FILE])
@pytest.mark.parametrize(
    "replace_it",
    [
        Path.unlink,
        _link("/dev/zero"),
        _link("/etc/hostname"),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: os.truncate(file, 10**13),
    ],
    ids=["gone", "device", "link", "pipe", "folder", "terabytes"],
)
def test_files_that_are_none_are_one_line(
    of: str, replace_it: Callable[[Path], object], folder: Path
) -> None:
    replace_it(folder / of)
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(folder)


def weights_of(**datasets: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for name, shape in datasets.items():
            # chunks that nobody wrote take no place
            opened.create_dataset(name, shape, "f4", chunks=(1,) * len(shape))
    return file.getvalue()


def dense(units: int) -> str:
    return json.dumps({"class_name": "Dense", "config": {"units": units}})


KERAS_FILES: dict[str, dict[str, str | bytes]] = {
    "no network": {"metadata.json": "{}"},
    "a deep network": {"config.json": "[" * 100_000},
    "a layer of a billion": {"config.json": dense(10**9)},
    "a scale of a billion": {"config.json": dense(10**9).replace("units", "projection_dim")},
    "layers of 4 TB": {"config.json": f"[{dense(90_000)}, {dense(90_000)}]"},
    "weights of 4 TB": {"config.json": "{}", "model.weights.h5": weights_of(a=(10**6, 10**6))},
    "weights beyond 64 bits": {
        "config.json": "{}", "model.weights.h5": weights_of(a=(2**32, 2**32)),
    },
    "damaged weights": {"config.json": "{}", "model.weights.h5": b"\x89HDF"},
    "a bomb": {"config.json": "{}", "model.weights.h5": bytes(20_000_000)},
    "many parts": {str(number): "" for number in range(1000)},
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS_FILES)
def test_a_hostile_network_is_not_loaded(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras_file, "MAX_WEIGHT_BYTES", 10_000_000)
    with zipfile.ZipFile(folder / MODEL_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, data in KERAS_FILES[name].items():
            archive.writestr(part, data)
    facts = json.loads((folder / FACTS_FILE).read_text())
    facts["sha256"] = {MODEL_FILE: digest_file(folder / MODEL_FILE)}
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(folder)
    with pytest.raises((ValueError, KeyError, OSError)):
        check_keras_file(folder / MODEL_FILE)
