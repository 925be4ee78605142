"""The notebooks' own way of doing things, beside ours; docs/notebooks.md cites these tests."""

import ast
import functools
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

from har.data.images import decode, decode_in_graph
from har.data.manifest import Manifest
from har.data.splits import Split, hold_out
from har.evaluation.metrics import top_k_hits
from har.models import backbones
from har.models.backbones import Backbone, build_backbone, copy_weights
from har.models.build import LOSSES, build_model
from har.models.devices import Hardware, build_mirrored
from har.notebooks import NOTEBOOKS
from har.recipe import ORIGINAL, V2, V4, VARIANTS, Recipe
from har.training import augmentation, loaders
from har.training.augmentation import rotate_and_zoom
from har.training.diagnostics import explore
from har.training.epoch_report import EpochReport
from har.training.loaders import (
    build_label_encoder,
    build_training_dataset,
    build_validation_dataset,
    image_inputs,
    read_images,
    split_training,
)
from har.training.train import build_stopping, train
from har.util.errors import UserError
from tests.fixtures import TINY_SIZE, build_tiny, tiny_job, tiny_recipe

ROOT = Path(__file__).parents[2]


DOC = ROOT / "docs" / "notebooks.md"


B7_FEATURES = 2560


FIRST_TWO, LATER = ("original", "v1"), ("v2", "v3", "v4")


@pytest.fixture(scope="module", params=[(84, 84), (183, 275), (478, 318)], ids=str)
def jpeg(request: pytest.FixtureRequest) -> bytes:
    """Smooth shapes and noise, from Kaggle's smallest thumbnail to its largest."""
    height, width = request.param
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), 255 * x / width]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    buffer = io.BytesIO()
    pixels = (np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def both_ways(jpeg: bytes, resize: str, size: int, folder: Path) -> list[np.ndarray]:
    """Decoded by the function that serves, and by the one inside the training pipeline."""
    (folder / "a.jpg").write_bytes(jpeg)
    rows = tf.data.Dataset.from_tensors((str(folder / "a.jpg"), True))
    (in_graph,) = rows.map(lambda path, plain: decode_in_graph(path, plain, resize, size))
    return [decode(jpeg, resize, size), in_graph.numpy()]


def test_bicubic_equals_pillow_at_every_scale(jpeg: bytes, tmp_path: Path) -> None:
    expected = np.asarray(Image.open(io.BytesIO(jpeg)).resize((160, 160)))
    for found in both_ways(jpeg, "bicubic", 160, tmp_path):
        np.testing.assert_array_equal(found, expected)


def test_bilinear_equals_tensorflow_at_every_scale(jpeg: bytes, tmp_path: Path) -> None:
    pixels = tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
    expected = tf.image.resize(pixels, (160, 160)).numpy()
    for found in both_ways(jpeg, "bilinear", 160, tmp_path):
        np.testing.assert_array_equal(found, np.rint(expected))


def test_tensorflows_default_dct_is_the_fast_one(jpeg: bytes) -> None:
    """The one place where v2's pixels and ours differ by more than rounding."""
    default, fast, accurate = (
        tf.io.decode_jpeg(jpeg, channels=3, dct_method=method).numpy().astype(int)
        for method in ("", "INTEGER_FAST", "INTEGER_ACCURATE")
    )
    np.testing.assert_array_equal(default, fast)
    np.testing.assert_array_equal(accurate, np.asarray(Image.open(io.BytesIO(jpeg))))
    assert 0 < np.abs(default - accurate).mean() < 3


def test_memory_holds_what_the_originals_loop_makes(manifest: Manifest) -> None:
    recipe = tiny_recipe("original")
    rows = manifest.rows("train")
    size = (TINY_SIZE, TINY_SIZE)
    loop = [np.asarray(Image.open(manifest.root / path).resize(size)) for path in rows["path"]]
    found = read_images(manifest, rows, recipe).numpy()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.array(loop))


def test_stream_yields_what_v2s_pipeline_makes(manifest: Manifest) -> None:
    recipe = tiny_recipe("v2", validation_fraction=0.3)
    rows = split_training(manifest, recipe).validation
    paths = [str(manifest.root / path) for path in rows["path"]]

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method="INTEGER_ACCURATE")
        return tf.image.resize(image, (TINY_SIZE, TINY_SIZE)), label

    files = tf.data.Dataset.from_tensor_slices((paths, rows["label_id"].to_numpy()))
    theirs = list(files.map(load, tf.data.AUTOTUNE).batch(4).prefetch(tf.data.AUTOTUNE))
    ours = list(
        build_validation_dataset(
            image_inputs(manifest, rows, recipe, recipe.image_size), manifest, rows, recipe
        )
    )
    assert len(ours) == len(theirs) > 1
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(images, np.rint(their_images))
        np.testing.assert_array_equal(labels, their_labels)


def test_memory_loader_refuses_with_the_numbers_and_reads_nothing(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(loaders, "free_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(loaders, "build_decoder", fail)
    with pytest.raises(UserError) as caught:
        loaders.check_memory(12_600, 160)
    assert str(caught.value) == (
        "loader memory needs 1.94 GB for 12,600 images at 160 px, but may use 1.6 GB of 2 GB free:"
        " use --loader stream"
    )
    rows = manifest.rows("train")
    too_little = 2 * len(rows) * TINY_SIZE**2 * 3
    monkeypatch.setattr(loaders, "free_memory", lambda: too_little)
    with pytest.raises(UserError, match=f"for {len(rows)} images at {TINY_SIZE} px"):
        read_images(manifest, rows, tiny_recipe("original"))


def factorized(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """File name to label id, and the class names, as the notebooks get them."""
    csv = pd.read_csv(folder / "Training_set.csv")
    ids, names = pd.factorize(csv["label"])
    return dict(zip(csv["filename"], map(int, ids), strict=True)), tuple(names)


def test_label_ids_equal_pd_factorize(manifest: Manifest, tiny_raw: Path) -> None:
    ids, names = factorized(tiny_raw)
    assert manifest.class_names == names != tuple(sorted(names))
    files = [Path(path).name for path in manifest.table["path"]]
    assert dict(zip(files, manifest.table["label_id"], strict=True)) == ids


def test_one_hot_rows_equal_to_categorical(manifest: Manifest) -> None:
    rows = manifest.table
    encode = build_label_encoder(manifest, rows, tiny_recipe("original"))
    found = encode(tf.range(len(rows))).numpy()
    np.testing.assert_array_equal(found, keras.utils.to_categorical(rows["label_id"]))


def test_exploration_says_what_is_true_of_the_data(manifest: Manifest, tiny_raw: Path) -> None:
    hardware = Hardware(
        gpu_names=("Tesla P100-PCIE-16GB", "Tesla T4"),
        compute_capabilities=("6.0", "7.5"),
        driver="1",
        cpu="a CPU",
        cpu_count=2,
        memory_gb=24.0,
    )
    encode = build_label_encoder(manifest, manifest.table, tiny_recipe("v1"))
    _, names = factorized(tiny_raw)
    lines = explore(manifest, hardware).splitlines()
    assert f"labels: {len(names)}" in lines
    assert f"length of a one-hot row: {encode(tf.range(1)).shape[1]}" in lines
    assert f"label map: {', '.join(f'{name}={i}' for i, name in enumerate(names))}" in lines
    assert "GPUs: Tesla P100-PCIE-16GB, Tesla T4" in lines


def test_validation_is_a_stratified_fifth() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([f"c{i}" for i in range(15)], 40))
    table = pd.DataFrame({"label": labels, "duplicate_group": np.arange(len(labels))})
    table["sha256"] = table["duplicate_group"].astype(str)
    held_out = hold_out(table, Split(), V2.validation_fraction, "validation")
    assert set(table[held_out]["label"].value_counts()) == {8}


def test_a_pass_is_the_whole_batches_of_all_training_images(manifest: Manifest) -> None:
    recipe = tiny_recipe("original", epochs=1, batch_size=5)
    rows = split_training(manifest, recipe).train
    assert len(rows) == len(manifest.rows("train")) and len(rows) % 5
    batches = list(
        build_training_dataset(
            image_inputs(manifest, rows, recipe, recipe.image_size), manifest, rows, recipe
        )
    )
    assert [len(images) for images, _ in batches] == [5] * (len(rows) // 5)


def build_wide(image_size: int) -> keras.Model:
    """As many features as EfficientNetB7 has, at no cost."""
    inputs = layers.Input((image_size, image_size, 3))
    return keras.Model(inputs, layers.Dense(B7_FEATURES)(layers.GlobalAveragePooling2D()(inputs)))


def wide_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> keras.Model:
    monkeypatch.setitem(backbones.BACKBONES, recipe.backbone, Backbone(build_wide, build_wide))
    return build_model(recipe, 15)


def trainable_parameters(model: keras.Model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize("variant", FIRST_TWO)
def test_first_head_is_flatten_dense_dense(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model(VARIANTS[variant], monkeypatch)
    flatten, hidden, output = model.layers[2:]
    assert isinstance(flatten, layers.Flatten)
    assert isinstance(hidden, layers.Dense) and isinstance(output, layers.Dense)
    assert (hidden.units, hidden.activation) == (512, keras.activations.relu)
    assert (output.units, output.activation) == (15, keras.activations.softmax)
    expected = B7_FEATURES * 512 + 512 + 512 * 15 + 15
    assert trainable_parameters(model) == expected == 1_318_927
    assert expected + 64_097_687 == 65_416_614


@pytest.mark.parametrize("variant", LATER)
def test_later_head_is_dropout_dense(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model(VARIANTS[variant], monkeypatch)
    dropout, output = model.layers[2:]
    assert isinstance(dropout, layers.Dropout) and dropout.rate == 0.2
    assert isinstance(output, layers.Dense) and output.activation == keras.activations.softmax
    assert output.compute_dtype == "float32"
    assert trainable_parameters(model) == B7_FEATURES * 15 + 15


@pytest.mark.parametrize("variant", [*NOTEBOOKS, "v5"])
def test_b7_is_asked_of_keras_as_in_the_notebooks(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def efficientnet_b7(**options: Any) -> keras.Model:
        asked.append(options)
        return build_tiny(160)

    monkeypatch.setattr(keras.applications, "EfficientNetB7", efficientnet_b7)
    network = build_backbone(VARIANTS[variant])
    shape = {"include_top": False, "input_shape": (160, 160, 3), "pooling": "avg"}
    assert asked[0] == {**shape, "weights": "imagenet"}
    assert network.trainable_weights == [] and network.weights


@pytest.fixture(scope="module")
def b0() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_backbone(tiny_recipe(backbone="efficientnetb0", image_size=64, weights="random"))


IMAGES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.float32)


def test_pooling_avg_equals_global_average_pooling(b0: keras.Model) -> None:
    """So v2's own pooling layer and the original's `pooling="avg"` are one network here."""
    maps = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(64, 64, 3)
    )
    copy_weights(b0, maps)
    pooled = layers.GlobalAveragePooling2D()(maps(IMAGES)).numpy()
    assert pooled.max() > 0
    np.testing.assert_allclose(b0(IMAGES), pooled, rtol=1e-4, atol=1e-5 * pooled.max())
    np.testing.assert_array_equal(layers.Flatten()(pooled), pooled)


def test_stochastic_depth_acts_in_training_though_frozen(b0: keras.Model) -> None:
    first, other = (b0(IMAGES, training=True).numpy() for _ in range(2))
    assert np.abs(first - other).max() > 0.01 * np.abs(first).max()
    np.testing.assert_array_equal(b0(IMAGES, training=False), b0(IMAGES, training=False))


@pytest.mark.parametrize("variant", [*NOTEBOOKS, "v5"])
def test_optimizer_is_keras_default_adam(tiny_backbone: None, variant: str) -> None:
    precision = VARIANTS[variant].precision
    optimizer = build_model(tiny_recipe(variant, precision=precision), 3).optimizer
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (variant in ("v4", "v5"))
    adam = optimizer.inner_optimizer if scaled else optimizer
    assert type(adam) is keras.optimizers.Adam
    default = keras.optimizers.Adam().get_config()
    assert adam.get_config() == {**default, "name": adam.name}


def test_batch_size_is_what_keras_takes_by_itself() -> None:
    model = keras.Sequential([layers.Input((1,)), layers.Dense(1)])
    model.compile(loss="mse")
    for images, steps in ((64, 2), (65, 3)):  # 32 is the only size that gives both
        history = model.fit(np.zeros((images, 1)), np.zeros(images), verbose=0)
        assert history.params["steps"] == steps
    assert {recipe.batch_size for recipe in VARIANTS.values()} == {32}


def measured(loss: str, labels: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """The loss, then its metrics: accuracy and top-3."""
    metrics = [float(metric(labels, probabilities)) for metric in LOSSES[loss]()]
    return [float(np.mean(keras.losses.get(loss)(labels, probabilities))), *metrics]


def test_label_ids_and_one_hot_rows_give_equal_numbers() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(15), 200).astype(np.float32)
    label_ids = rng.integers(0, 15, 200)
    one_hot = keras.utils.to_categorical(label_ids, 15)
    by_ids = measured("sparse_categorical_crossentropy", label_ids, probabilities)
    assert measured("categorical_crossentropy", one_hot, probabilities) == pytest.approx(by_ids)
    assert by_ids[2] == pytest.approx(top_k_hits(probabilities, label_ids, 3).mean())
    top_3 = LOSSES["sparse_categorical_crossentropy"]()[1]
    assert isinstance(top_3, keras.metrics.SparseTopKCategoricalAccuracy) and top_3.k == 3


@pytest.fixture
def fitted(tiny_backbone: None, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a variant's training hands to Keras' `fit`, which does nothing here."""

    def handed_to_fit(variant: str) -> dict[str, Any]:
        handed: dict[str, Any] = {}

        def fit(model: keras.Model, data: Any, **options: Any) -> None:
            handed.update(options, data=data, model=model)

        monkeypatch.setattr(keras.Model, "fit", fit)
        train(tiny_job(tiny_recipe(variant), manifest))
        mine = handed["callbacks"]
        return {**handed, "callbacks": [c for c in mine if not isinstance(c, EpochReport)]}

    return handed_to_fit


@pytest.mark.parametrize("variant", FIRST_TWO)
def test_first_two_have_no_validation_augmentation_or_callbacks(
    variant: str, fitted: Any, manifest: Manifest
) -> None:
    handed = fitted(variant)
    assert handed["validation_data"] is None and handed["callbacks"] == []
    recipe = tiny_recipe(variant)
    decoded = read_images(manifest, manifest.rows("train"), recipe).numpy()
    unchanged = {image.tobytes() for image in decoded}
    for images, labels in handed["data"].take(3):
        assert {image.tobytes() for image in images.numpy()} <= unchanged
        np.testing.assert_array_equal(np.sum(labels, axis=1), 1)
    assert handed["model"].loss == "categorical_crossentropy"


@pytest.mark.parametrize("variant", LATER)
def test_later_ones_validate_stop_early_and_keep_the_best(variant: str, fitted: Any) -> None:
    handed = fitted(variant)
    (stopping,) = handed["callbacks"]
    assert isinstance(stopping, keras.callbacks.EarlyStopping)
    assert (stopping.monitor, stopping.patience) == ("val_accuracy", 5)
    assert stopping.restore_best_weights
    assert handed["validation_data"] is not None
    for images, label_ids in handed["data"].take(1):
        assert images.dtype == tf.float32 and label_ids.shape == (4,)
    assert handed["model"].loss == "sparse_categorical_crossentropy"


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (2, 4)])
def test_best_weights_come_back_stopped_early_or_not(patience: int, epochs: int) -> None:
    model = keras.Sequential([layers.Input((1,)), layers.Dense(1, use_bias=False)])
    stopping = build_stopping(replace(V2, epochs=5, patience=patience))
    assert stopping is not None
    stopping.set_model(model)
    model.stop_training = False
    stopping.on_train_begin()
    for epoch, accuracy in enumerate([0.3, 0.8, 0.5, 0.8, 0.7]):
        model.set_weights([np.full((1, 1), epoch, np.float32)])
        stopping.on_epoch_end(epoch, {"val_accuracy": accuracy, "val_loss": 1 - epoch})
        if model.stop_training:
            break
    assert epoch + 1 == epochs
    stopping.on_train_end()
    assert model.get_weights()[0].item() == 1


def test_mirrored_is_tensorflows_over_every_device() -> None:
    strategy = build_mirrored()
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert strategy.num_replicas_in_sync == len(tf.config.list_logical_devices("CPU")) == 2
    batches = strategy.experimental_distribute_dataset(tf.data.Dataset.range(8).batch(8))
    (parts,) = (strategy.experimental_local_results(batch) for batch in batches)
    assert [part.numpy().tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:40]
    return np.stack([4 * x, 4 * y, 80 + 60 * np.sin(x / 4)], -1).astype(np.float32)[None]


@pytest.mark.parametrize("share", [0.1, -0.1])
def test_zoom_equals_keras_layer(picture: np.ndarray, share: float) -> None:
    layer = layers.RandomZoom((share, share), fill_mode="reflect", interpolation="bilinear")
    ours = rotate_and_zoom(picture, [0.0], np.float32([1 + share]), [1.0])
    inside = (slice(None), slice(6, -6), slice(6, -6))  # borders are filled, not compared
    np.testing.assert_allclose(ours[inside], layer(picture, training=True)[inside], atol=0.5)


def test_flip_equals_keras_layer(picture: np.ndarray) -> None:
    layer = layers.RandomFlip("horizontal", seed=0)
    theirs = {layer(picture, training=True).numpy().round().tobytes() for _ in range(20)}
    ours = {
        rotate_and_zoom(picture, [0.0], [1.0], [side]).numpy().round().tobytes()
        for side in (1.0, -1.0)
    }
    assert ours == theirs and len(ours) == 2


def test_augmentation_draws_from_the_ranges_it_names(
    picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, np.ndarray] = {}

    def watch(images: Any, angle: Any, zoom: Any, mirror: Any) -> Any:
        drawn.update(turns=angle / (2 * np.pi), zoom=zoom - 1, mirror=mirror)
        return images

    def watch_contrast(images: Any, factor: Any) -> Any:
        drawn.update(contrast=factor - 1)
        return images

    monkeypatch.setattr(augmentation, "rotate_and_zoom", watch)
    monkeypatch.setattr(augmentation, "change_contrast", watch_contrast)
    augmentation.augment(np.repeat(picture, 2000, axis=0), [0, 1], ORIGINAL)
    for name in ("turns", "zoom", "contrast"):
        assert np.min(drawn[name]) == pytest.approx(-0.1, abs=2e-3)
        assert np.max(drawn[name]) == pytest.approx(0.1, abs=2e-3)
    assert set(np.unique(drawn["mirror"])) == {-1.0, 1.0}
    assert np.mean(drawn["mirror"]) == pytest.approx(0, abs=0.1)
    (field,) = (f for f in Recipe.__dataclass_fields__.values() if f.name == "augmentation")
    told = "flip left-right, rotation +-0.1 turns, zoom +-10 %, contrast +-10 %"
    assert field.metadata["our_choice"] == told


def test_published_numbers_are_the_notebooks() -> None:
    accuracies = {name: each.train_accuracy for name, each in NOTEBOOKS.items()}
    assert accuracies == {"original": 0.9858, "v1": 0.9869, "v2": None, "v3": None, "v4": None}
    text = DOC.read_text()
    for each in NOTEBOOKS.values():
        assert f"{each.file}` | {each.minutes} | {each.hardware}" in text
        assert each.train_accuracy is None or f"{each.train_accuracy}" in text


def test_recipes_are_the_notebooks() -> None:
    assert (ORIGINAL.image_size, ORIGINAL.batch_size, ORIGINAL.epochs) == (160, 32, 40)
    assert (V2.validation_fraction, V2.patience, V2.checkpoint) == (0.2, 5, "best")
    assert VARIANTS["v3"] == V2 and replace(V4, precision="float32") == V2


def table_rows() -> list[list[str]]:
    """The cells of each row that cites code or a test."""
    lines = [line for line in DOC.read_text().splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if "`har/" in line or "`tests/" in line
    ]


def bound(node: ast.stmt) -> set[str]:
    """The names that one statement defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


@functools.cache
def defined(file: str) -> set[str]:
    """`name` and `Class.name` of what a file of this project defines; empty if there is none."""
    if not (ROOT / file).is_file():
        return set()
    names: set[str] = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        names |= bound(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for child in node.body for name in bound(child)}
    return names


def test_every_row_says_where_and_which_test() -> None:
    rows = table_rows()
    assert len(rows) > 30
    for cells in rows:
        assert len(cells) == 3, cells
        assert re.search(r"`har/[\w/]+\.py: [\w.]+`", cells[1]), cells[0]
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", cells[2]), cells[0]


def test_everything_cited_exists() -> None:
    text = DOC.read_text()
    cited = re.findall(r"`((?:har|tests)/[^`]*)`", text)
    missing = []
    for each in cited:
        file, _, name = each.partition("::" if each.startswith("tests/") else ": ")
        if name not in defined(file):
            missing.append(each)
    assert missing == [] and len(cited) > 60


def test_every_test_here_of_a_claim_is_cited() -> None:
    about_the_table = {
        "test_every_row_says_where_and_which_test",
        "test_everything_cited_exists",
        "test_every_test_here_of_a_claim_is_cited",
    }
    here = {name for name in defined("tests/system/test_fidelity.py") if name.startswith("test_")}
    cited = set(re.findall(r"`tests/system/test_fidelity\.py::(test_\w+)`", DOC.read_text()))
    assert here - cited <= about_the_table
