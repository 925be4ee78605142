"""Splits, loaders, augmentation: what reaches the network, and in what order."""

import keras
import numpy as np
import pytest
from keras import layers

from har.data.images import decode
from har.data.manifest import Manifest
from har.training import augmentation, loaders
from har.training.augmentation import (
    AUGMENTATIONS,
    MIXINGS,
    change_contrast,
    rotate_and_zoom,
)
from har.training.loaders import (
    LOADERS,
    build_training_dataset,
    build_validation_dataset,
    count_steps,
    feature_inputs,
    image_inputs,
    size_evaluation_batches,
    split_training,
    weigh_classes,
)
from har.util.errors import UserError
from tests.fixtures import TINY_SIZE, tiny_recipe

Batches = list[tuple[np.ndarray, np.ndarray]]


def batches(manifest: Manifest, first_epoch: int = 0, **fields: object) -> Batches:
    recipe = tiny_recipe(**fields)
    rows = split_training(manifest, recipe).train
    return list(
        build_training_dataset(
            image_inputs(manifest, rows, recipe, recipe.source_size),
            manifest,
            rows,
            recipe,
            first_epoch,
        ).as_numpy_iterator()
    )


def assert_equal(first: Batches, second: Batches) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_features_come_in_the_order_of_their_images(manifest: Manifest) -> None:
    recipe = tiny_recipe("v5", epochs=3)
    rows = split_training(manifest, recipe).train
    # a feature that says which row and which view it is of
    count = np.arange(len(rows), dtype=np.float32)
    views = np.stack([np.stack([count, np.full_like(count, view)], axis=1) for view in range(3)])
    found = list(
        build_training_dataset(feature_inputs(views), manifest, rows, recipe).as_numpy_iterator()
    )
    images = batches(manifest, augmentation="none", epochs=3)
    assert len(found) == len(images)
    label_ids = rows["label_id"].to_numpy()
    for (features, labels), (_, image_labels) in zip(found, images, strict=True):
        np.testing.assert_array_equal(labels, image_labels)
        np.testing.assert_array_equal(labels, label_ids[features[:, 0].astype(int)])
    assert {view for features, _ in found for view in features[:, 1]} == {0, 1, 2}


def test_validation_features_come_once_and_in_order(manifest: Manifest) -> None:
    rows = manifest.rows("train").reset_index(drop=True)
    features = np.arange(len(rows), dtype=np.float32)[:, None]
    found = build_validation_dataset(
        feature_inputs(features[None]), manifest, rows, tiny_recipe("v5"), 2
    )
    pairs = [(x, y) for batch in found.as_numpy_iterator() for x, y in zip(*batch, strict=True)]
    assert [int(x[0]) for x, _ in pairs] == list(range(len(rows)))
    assert [y for _, y in pairs] == rows["label_id"].tolist()
    empty = build_validation_dataset(
        feature_inputs(features[None, :0]), manifest, rows[:0], tiny_recipe(), 2
    )
    assert empty is None


def test_no_pipeline_tunes_itself(manifest: Manifest) -> None:
    recipe = tiny_recipe()
    rows = manifest.rows("train").reset_index(drop=True)
    features = np.zeros((1, len(rows), 2), np.float32)
    images = image_inputs(manifest, rows, recipe, TINY_SIZE)
    for dataset in (
        build_training_dataset(images, manifest, rows, recipe),
        build_validation_dataset(images, manifest, rows, recipe),
        build_training_dataset(feature_inputs(features), manifest, rows, recipe),
        build_validation_dataset(feature_inputs(features), manifest, rows, recipe),
    ):
        assert dataset is not None and dataset.options().autotune.enabled is False


def test_validation_comes_from_train_and_never_meets_it(manifest: Manifest) -> None:
    splits = split_training(manifest, tiny_recipe(validation_fraction=0.3))
    train, validation = set(splits.train["path"]), set(splits.validation["path"])
    test = set(manifest.rows("test")["path"])
    assert train.isdisjoint(validation) and (train | validation).isdisjoint(test)
    assert len(train | validation | test) == len(manifest.table)
    assert len(validation) == pytest.approx(0.3 * len(train | validation), abs=1)


def test_training_seed_moves_no_image_between_splits(manifest: Manifest) -> None:
    first = split_training(manifest, tiny_recipe(seed=0))
    other = split_training(manifest, tiny_recipe(seed=1))
    assert first.validation.equals(other.validation)


def test_batch_larger_than_the_images(manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"batch_size 999 is more than the \d+ training images"):
        split_training(manifest, tiny_recipe(batch_size=999))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_loaders_give_the_same_batches(manifest: Manifest, augmentation: str, resize: str) -> None:
    memory, stream = (
        batches(manifest, loader=loader, augmentation=augmentation, resize=resize)
        for loader in LOADERS
    )
    assert_equal(memory, stream)


def test_images_carry_their_own_labels(manifest: Manifest) -> None:
    recipe = tiny_recipe(augmentation="none")
    rows = split_training(manifest, recipe).train
    expected = {
        decode((manifest.root / path).read_bytes(), "bilinear", TINY_SIZE).tobytes(): label_id
        for path, label_id in zip(rows["path"], rows["label_id"], strict=True)
    }
    for images, labels in batches(manifest, augmentation="none"):
        assert [expected[image.tobytes()] for image in images] == labels.tolist()


def test_an_epoch_shows_no_image_twice_and_epochs_differ(manifest: Manifest) -> None:
    recipe = tiny_recipe(augmentation="none")
    steps = count_steps(len(split_training(manifest, recipe).train), recipe)
    seen = [
        image.tobytes() for images, _ in batches(manifest, augmentation="none") for image in images
    ]
    size = steps * recipe.batch_size
    epochs = [seen[:size], seen[size:]]
    assert [len(set(epoch)) for epoch in epochs] == [size, size]
    assert epochs[0] != epochs[1]


def test_going_on_at_an_epoch_shows_what_would_have_come(manifest: Manifest) -> None:
    whole = batches(manifest, epochs=3)
    assert_equal(batches(manifest, first_epoch=2, epochs=3), whole[-len(whole) // 3 :])


def test_seed_decides_order_and_augmentation(manifest: Manifest) -> None:
    assert_equal(batches(manifest, seed=5), batches(manifest, seed=5))
    assert (batches(manifest, seed=5)[0][0] != batches(manifest, seed=6)[0][0]).any()


def test_labels_are_encoded_for_the_loss(manifest: Manifest) -> None:
    one_hot = batches(manifest, loss="categorical_crossentropy")
    ids = batches(manifest, loss="sparse_categorical_crossentropy")
    assert one_hot[0][1].shape == (4, 3) and ids[0][1].shape == (4,)
    np.testing.assert_array_equal(one_hot[0][1].argmax(axis=1), ids[0][1])


@pytest.mark.parametrize("loader", LOADERS)
def test_validation_is_every_image_once_in_order_unchanged(manifest: Manifest, loader: str) -> None:
    recipe = tiny_recipe(validation_fraction=0.3, loader=loader)
    rows = split_training(manifest, recipe).validation
    found = list(
        build_validation_dataset(
            image_inputs(manifest, rows, recipe, TINY_SIZE), manifest, rows, recipe
        ).as_numpy_iterator()
    )
    images = np.concatenate([images for images, _ in found])
    expected = [
        decode((manifest.root / path).read_bytes(), recipe.resize, TINY_SIZE)
        for path in rows["path"]
    ]
    np.testing.assert_array_equal(images, expected)
    assert np.concatenate([labels for _, labels in found]).tolist() == rows["label_id"].tolist()


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_every_validation_batch_has_an_image_for_every_replica(replicas: int) -> None:
    for images in range(40, 140):
        size, last = size_evaluation_batches(images, 8 * replicas, replicas)
        assert size % replicas == 0 and size <= 8 * replicas
        assert (images - last) % size == 0 and images - last >= size
        for batch in {size, last or size}:
            part = -(-batch // replicas)
            assert batch - (replicas - 1) * part > 0


def test_one_device_takes_whole_batches_and_the_rest() -> None:
    assert size_evaluation_batches(100, 32, 1) == (32, 4)
    assert size_evaluation_batches(96, 32, 1) == (32, 0)
    assert size_evaluation_batches(5, 32, 1) == (5, 0)


def test_fewer_validation_images_than_devices_are_refused() -> None:
    with pytest.raises(UserError, match="1 validation images cannot be split over 2 devices"):
        size_evaluation_batches(1, 32, 2)


def test_memory_loader_refuses_before_it_would_not_fit(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"needs .* for \d+ images .*use --loader stream"):
        batches(manifest, loader="memory")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:40]
    return np.stack([4 * x, 4 * y, 80 + 60 * np.sin(x / 4)], -1).astype(np.float32)[None]


@pytest.mark.parametrize("degrees", [0, 20, -33])
def test_rotation_equals_keras_layer(picture: np.ndarray, degrees: float) -> None:
    turns = degrees / 360
    layer = layers.RandomRotation((turns, turns), fill_mode="reflect", interpolation="bilinear")
    keras_own = layer(picture, training=True)
    ours = rotate_and_zoom(picture, np.float32([np.deg2rad(degrees)]), [1.0], [1.0])
    inside = (slice(None), slice(9, -9), slice(9, -9))  # borders are filled, not compared
    np.testing.assert_allclose(ours[inside], keras_own[inside], atol=0.5)


def test_mirror_and_zoom(picture: np.ndarray) -> None:
    mirrored = rotate_and_zoom(picture, [0.0], [1.0], [-1.0])
    np.testing.assert_allclose(mirrored, picture[:, :, ::-1], atol=1e-3)
    smaller = rotate_and_zoom(picture, [0.0], [1.1], [1.0]).numpy()
    # a ramp of 4 a pixel becomes one of 4.4, about the same centre
    np.testing.assert_allclose(np.diff(smaller[0, 20, 6:-6, 0]), 4.4, atol=1e-3)
    assert smaller[0, 20, 19:21, 0].mean() == pytest.approx(
        picture[0, 20, 19:21, 0].mean(), abs=0.1
    )


def test_contrast_equals_keras_layer(picture: np.ndarray) -> None:
    layer = layers.RandomContrast(0.5, value_range=(0, 255))
    factor = np.float32([1.3])
    keras_own = layer.transform_images(
        picture,
        {"contrast_factor": factor[:, None, None, None], "input_shape": picture.shape},
        True,
    )
    np.testing.assert_allclose(
        change_contrast(picture, factor), keras.ops.clip(keras_own, 0, 255), atol=1e-2
    )


def test_augmentation_stays_in_range_and_differs_by_image(picture: np.ndarray) -> None:
    images = np.repeat(picture, 8, axis=0).astype(np.uint8)
    changed = AUGMENTATIONS["flip_rotate_zoom_contrast"](images, [0, 1], tiny_recipe()).numpy()
    assert changed.min() >= 0 and changed.max() <= 255
    assert len({image.tobytes() for image in changed}) == 8


def crop(images: np.ndarray, **fields: object) -> np.ndarray:
    recipe = tiny_recipe(augmentation="crop_flip_color", **fields)
    return AUGMENTATIONS["crop_flip_color"](images, [0, 1], recipe).numpy()


def test_crops_are_parts_of_the_image(picture: np.ndarray) -> None:
    """A picture of its own coordinates says where each crop is from."""
    y, x = np.mgrid[0:40, 0:40].astype(np.float32)
    images = np.repeat(np.stack([x, y, np.zeros_like(x)], -1)[None], 200, axis=0)
    # brightness and contrast would move the numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "CROP_BRIGHTNESS", 0.0)
        patch.setattr(augmentation, "CROP_CONTRAST", 0.0)
        found = crop(images, crop_area=0.25)
    assert found.shape == (200, TINY_SIZE, TINY_SIZE, 3)
    left, right = found[:, 0, 0, 0], found[:, 0, -1, 0]
    top, bottom = found[:, 0, 0, 1], found[:, -1, 0, 1]
    assert min(left.min(), right.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 39
    width, height = np.abs(right - left) / 39, (bottom - top) / 39
    area = width * height
    assert 0.2 < area.min() < 0.3 and 0.85 < area.max() <= 1.0001
    assert np.all(width / height < 4 / 3 + 1e-3) and np.all(height / width < 4 / 3 + 1e-3)
    flipped = (right < left).mean()
    assert 0.4 < flipped < 0.6


def test_a_crop_of_everything_is_the_image(picture: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CROP_BRIGHTNESS", 0.0), ("CROP_CONTRAST", 0.0), ("CROP_RATIO", 1.0)):
            patch.setattr(augmentation, name, value)
        found = crop(np.repeat(picture, 8, axis=0), image_size=40, crop_area=1.0)
    same = [np.abs(image - picture[0]).max() < 1e-2 for image in found]
    mirrored = [np.abs(image - picture[0, :, ::-1]).max() < 1e-2 for image in found]
    assert all(one != other for one, other in zip(same, mirrored, strict=True))
    assert any(same) and any(mirrored)


def test_crops_stay_in_range_and_differ_in_brightness(picture: np.ndarray) -> None:
    found = crop(np.full((50, 40, 40, 3), 200, np.uint8))
    assert found.min() >= 0 and found.max() <= 255
    means = found.mean(axis=(1, 2, 3))
    assert means.min() < 175 and means.max() > 225


def test_half_of_the_images_are_mirrored(picture: np.ndarray) -> None:
    images = np.repeat(picture, 100, axis=0)
    found = AUGMENTATIONS["mirror"](images, [0, 1], tiny_recipe()).numpy()
    mirrored = [np.array_equal(image, picture[0, :, ::-1]) for image in found]
    plain = [np.array_equal(image, picture[0]) for image in found]
    assert 30 < sum(mirrored) < 70 and sum(mirrored) + sum(plain) == 100


def test_mixup_blends_images_and_labels_alike() -> None:
    """Images that show their own label as a colour still do so."""
    labels = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    images = np.broadcast_to(labels[:, None, None], (60, 4, 4, 3))
    mixed, shares = MIXINGS["mixup"](images, labels, [0, 1])
    np.testing.assert_allclose(mixed[:, 0, 0], shares, atol=1e-6)
    np.testing.assert_allclose(shares.numpy().sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(shares).all()
    largest = shares.numpy().max(axis=1)
    # alpha 0.2 leaves most images nearly alone
    assert largest.min() < 0.8 and (largest > 0.95).mean() > 0.4


def test_rare_classes_weigh_more(manifest: Manifest) -> None:
    rows = manifest.rows("train")
    rows = rows[(rows["label_id"] != 1) | (rows.index % 3 == 0)]
    assert weigh_classes(rows, tiny_recipe(), 3) is None
    weights = weigh_classes(rows, tiny_recipe(class_weight="balanced"), 3)
    assert weights is not None
    totals = [weights[label] * (rows["label_id"] == label).sum() for label in range(3)]
    assert totals == pytest.approx([len(rows) / 3] * 3)


def test_a_solved_head_validates_every_image(manifest: Manifest) -> None:
    recipe = tiny_recipe("v6")
    splits = split_training(manifest, recipe)
    assert len(splits.train) == len(manifest.rows("train"))
    assert splits.validation["path"].tolist() == splits.train["path"].tolist()
