"""Features: what Keras computes, in order, whatever interrupts; wrong ones are never trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from har.data.images import decode
from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.inference import runtimes
from har.inference.runtimes import RUNTIMES, Compiled
from har.recipe import Recipe
from har.training import feature_cache, features, loaders
from har.training.feature_cache import Entry
from har.training.features import Extraction, View, digest_weights, extract_splits
from har.training.loaders import split_training
from har.util.errors import UserError
from tests.fixtures import build_tiny, tiny_recipe

AUGMENTED = "flip_rotate_zoom_contrast"
PLAIN, MIRRORED = View(size=32), View(size=32, augmentation="mirror", number=1)


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe("v5")


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16: every number is float32."""
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: False)


def expected(network: keras.Model, manifest: Manifest, paths: list[str]) -> np.ndarray:
    """By Keras, from images decoded one by one."""
    files = [(manifest.root / path).read_bytes() for path in paths]
    images = np.stack([decode(data, "bilinear", 32) for data in files])
    return np.asarray(network(images, training=False))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_split_has_what_keras_computes(
    runtime: str, network: keras.Model, manifest: Manifest, recipe: Recipe, plain_cpu: None
) -> None:
    splits = split_training(manifest, recipe)
    found = extract_splits(Extraction(network, manifest, recipe, runtime), splits)
    rows = {"train": splits.train, "validation": splits.validation, "test": manifest.rows("test")}
    for name, computed in (
        ("train", found.train[0]),
        ("validation", found.validation[0]),
        ("test", found.test[0]),
    ):
        wanted = expected(network, manifest, rows[name]["path"].tolist())
        np.testing.assert_allclose(computed, wanted, rtol=0, atol=1e-5)
    about = found.extracted
    assert (about.arithmetic, about.cache) == ("float32", "miss")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_test_images_are_exact_where_the_cpu_has_bfloat16(
    runtime: str,
    network: keras.Model,
    manifest: Manifest,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: True)
    splits = split_training(manifest, recipe)
    found = extract_splits(Extraction(network, manifest, recipe, runtime), splits)
    assert found.extracted.arithmetic == "bfloat16"
    wanted = expected(network, manifest, splits.train["path"].tolist())
    # oneDNN may keep so small a network in float32
    np.testing.assert_allclose(found.train[0], wanted, rtol=0, atol=0.05 * np.abs(wanted).max())
    wanted = expected(network, manifest, manifest.rows("test")["path"].tolist())
    np.testing.assert_allclose(found.test[0], wanted, rtol=0, atol=1e-5)


def test_a_second_time_nothing_is_computed(
    network: keras.Model, manifest: Manifest, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = split_training(manifest, recipe)
    first = extract_splits(Extraction(network, manifest, recipe, "tensorflow"), splits)
    monkeypatch.setitem(RUNTIMES, "tensorflow", None)
    # other heads, losses and rates have the same features
    other = replace(recipe, head="flatten_dense512", learning_rate=0.1, epochs=1)
    again = extract_splits(Extraction(network, manifest, other, "tensorflow"), splits)
    assert (again.extracted.cache, again.extracted.computed) == ("hit", 0)
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    # and so has another share of validation
    less = replace(recipe, validation_fraction=0.4)
    fewer = extract_splits(
        Extraction(network, manifest, less, "tensorflow"), split_training(manifest, less)
    )
    assert fewer.extracted.cache == "hit" and len(fewer.train[0]) < len(first.train[0])


def test_other_weights_are_other_features(
    network: keras.Model, manifest: Manifest, recipe: Recipe
) -> None:
    rows = manifest.rows("test")
    first = Extraction(network, manifest, recipe, "tensorflow").features(rows)
    other = build_tiny(32)
    assert digest_weights(other) != digest_weights(network)
    found = Extraction(other, manifest, recipe, "tensorflow")
    assert not np.array_equal(found.features(rows), first)
    assert found.computed == len(rows)


def test_views_are_augmented_each_its_own_way(
    network: keras.Model, manifest: Manifest, plain_cpu: None
) -> None:
    recipe = tiny_recipe("v5", augmentation=AUGMENTED, feature_views=2)
    splits = split_training(manifest, recipe)
    found = extract_splits(Extraction(network, manifest, recipe, "tensorflow"), splits)
    plain = expected(network, manifest, splits.train["path"].tolist())
    assert found.train.shape == (2, *plain.shape)
    for one, other in (
        (found.train[0], found.train[1]),
        (found.train[0], plain),
        (found.train[1], plain),
    ):
        assert (np.abs(one - other).max(axis=1) > 1e-4).all()
    # validation is evaluated as it is
    wanted = expected(network, manifest, splits.validation["path"].tolist())
    np.testing.assert_allclose(found.validation[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("view", [PLAIN, MIRRORED, View(size=32, augmentation=AUGMENTED, number=1)])
def test_interrupted_extraction_ends_as_an_uninterrupted_one(
    runtime: str,
    view: View,
    network: keras.Model,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe("v5", augmentation=AUGMENTED, feature_views=2)
    rows = manifest.rows("train")
    monkeypatch.setattr(features, "READ_SIZE", 8)
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 8)
    whole = Extraction(network, manifest, recipe, runtime).features(rows, view=view)

    monkeypatch.setenv("HAR_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "write", stop_after(Entry.write, shards=2))
        with pytest.raises(KeyboardInterrupt):
            Extraction(network, manifest, recipe, runtime).features(rows, view=view)
    # and a shard in the middle may be damaged since
    (entry,) = feature_cache.list_entries()
    (entry.folder / "00000.npz").write_bytes(b"")
    again = Extraction(network, manifest, recipe, runtime)
    np.testing.assert_array_equal(again.features(rows, view=view), whole)
    assert (again.computed, again.needed) == (len(rows) - 8, len(rows))
    assert again.saved_s > 0


def stop_after(write: Callable[..., None], shards: int) -> Callable[..., None]:
    calls = []

    def stopping(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > shards:
            raise KeyboardInterrupt
        write(*arguments)

    return stopping


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_features_of_a_middle_layer(
    runtime: str, network: keras.Model, manifest: Manifest, recipe: Recipe, plain_cpu: None
) -> None:
    rows = manifest.rows("train")
    first = keras.Model(network.input, network.layers[-2].output)
    found = Extraction(first, manifest, recipe, runtime, "block2").features(rows)
    wanted = expected(first, manifest, rows["path"].tolist())
    assert found.shape == (len(rows), 8, 8, 8) and found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    again = Extraction(first, manifest, recipe, runtime, "block2")
    np.testing.assert_array_equal(again.features(rows), found)
    assert again.computed == 0
    # the whole backbone has the same weights, and is another entry
    pooled = Extraction(network, manifest, recipe, runtime)
    assert pooled.features(rows).shape == (len(rows), 8) and pooled.computed == len(rows)


@pytest.mark.parametrize("wrong", [0.0, np.nan, 3.0])
def test_a_runtime_that_disagrees_with_keras_stops_it(
    wrong: float,
    network: keras.Model,
    manifest: Manifest,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Compiled(run=lambda images: np.full((len(images), 8), wrong, np.float32))
    runtime = replace(RUNTIMES["tensorflow"], compile=lambda *_: broken)
    monkeypatch.setitem(RUNTIMES, "tensorflow", runtime)
    with pytest.raises(UserError, match="differs from Keras by"):
        Extraction(network, manifest, recipe, "tensorflow").features(manifest.rows("test"))


def test_an_image_that_vanished_is_named_and_finished_shards_stay(
    network: keras.Model, raw: Path, tmp_path: Path, recipe: Recipe
) -> None:
    source = folder_source(raw, why="a test")
    manifest = prepare(source, tmp_path / "prepared", Split(test_fraction=0.25))
    rows = manifest.rows("train")
    gone = manifest.root / rows["path"].iloc[-1]
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone.name}.*features computed so far are cached"):
        Extraction(network, manifest, recipe, "openvino").features(rows)
    gone.write_bytes(data)
    assert len(Extraction(network, manifest, recipe, "openvino").features(rows)) == len(rows)


def test_features_of_another_image_are_never_kept(
    network: keras.Model, raw: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """One that took an image's place for a while, and can be decoded."""
    source = folder_source(raw, why="a test")
    manifest = prepare(source, tmp_path / "prepared", Split(test_fraction=0.25))
    rows = manifest.rows("train")
    right = Extraction(network, manifest, recipe, "tensorflow").features(rows).copy()
    for entry in feature_cache.list_entries():
        assert feature_cache.delete_entry(entry)
    one, other = (manifest.root / rows["path"].iloc[at] for at in (0, -1))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=f"{one.name} is not the image that was prepared"):
        Extraction(network, manifest, recipe, "tensorflow").features(rows)
    one.write_bytes(data)
    again = Extraction(network, manifest, recipe, "tensorflow")
    np.testing.assert_array_equal(again.features(rows), right)
    assert again.computed == len(rows)


def test_views_without_memory_for_them_are_refused_where_all_are_needed_at_once(
    network: keras.Model, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "free_memory", lambda: 1000)
    recipe = tiny_recipe("v5", head="linear_probe")
    splits = split_training(manifest, recipe)
    with pytest.raises(UserError, match=r"loader features needs .* take fewer --feature-views"):
        extract_splits(Extraction(network, manifest, recipe, "tensorflow"), splits)


def test_views_that_would_push_each_other_out_are_refused(
    network: keras.Model, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("v5", augmentation=AUGMENTED, feature_views=100)
    monkeypatch.setenv("HAR_CACHE_GB", "0.00005")
    splits = split_training(manifest, recipe)
    with pytest.raises(UserError, match="raise HAR_CACHE_GB"):
        extract_splits(Extraction(network, manifest, recipe, "tensorflow"), splits)


def test_no_rows_are_no_features(network: keras.Model, manifest: Manifest, recipe: Recipe) -> None:
    nothing = Extraction(network, manifest, recipe, "tensorflow").features(manifest.table[:0])
    assert nothing.shape == (0, 8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_mirror_images_and_a_larger_size(runtime: str, manifest: Manifest, plain_cpu: None) -> None:
    """Of a network that takes any size: training at one, validation and test at another."""
    keras.utils.set_random_seed(0)
    network = build_tiny(None)
    recipe = tiny_recipe(
        "v5", augmentation="mirror", feature_views=2, test_time="mirror", evaluation_size=48
    )
    splits = split_training(manifest, recipe)
    found = extract_splits(Extraction(network, manifest, recipe, runtime), splits)
    for computed, rows, size in (
        (found.train, splits.train, 32),
        (found.validation, splits.validation, 48),
        (found.test, manifest.rows("test"), 48),
    ):
        files = [(manifest.root / path).read_bytes() for path in rows["path"]]
        images = np.stack([decode(data, "bilinear", size) for data in files])
        for view, shown in zip(computed, (images, images[:, :, ::-1]), strict=True):
            np.testing.assert_allclose(view, network(shown, training=False), rtol=0, atol=1e-5)


def test_test_images_before_a_cut_are_not_computed(
    network: keras.Model, manifest: Manifest, recipe: Recipe
) -> None:
    first = keras.Model(network.input, network.layers[-2].output)
    splits = split_training(manifest, recipe)
    found = extract_splits(Extraction(first, manifest, recipe, "tensorflow", "block2"), splits)
    assert found.test is None and found.extracted.converted is None
    assert found.extracted.needed == len(splits.train) + len(splits.validation)
