"""Features that do not fit the memory are read from disk, and change no number of a training."""

import os
from pathlib import Path

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.training import features, loaders
from har.training.disk_features import PickedFeatures, map_features
from har.training.feature_cache import features_folder
from har.training.train import Result, train
from har.util.errors import UserError
from tests.fixtures import tiny_job, tiny_recipe

RECIPES = {
    # validation is computed with the training images, or with other views of its own
    "v5": tiny_recipe("v5"),
    "augmented views": tiny_recipe(
        "v5", augmentation="flip_rotate_zoom_contrast", feature_views=3, test_time="mirror"
    ),
    "last blocks": tiny_recipe("v7", evaluation_size=0, validation_fraction=0.3),
}


def numbers(result: Result) -> list[dict[str, float]]:
    timed = ("epoch_time_s", "images_per_second")
    return [{k: v for k, v in epoch.items() if k not in timed} for epoch in result.history]


@pytest.mark.usefixtures("tiny_backbone")
@pytest.mark.parametrize(
    "name", ["augmented views", "last blocks", pytest.param("v5", marks=pytest.mark.slow)]
)
def test_training_from_disk_gives_the_numbers_of_memory(
    name: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # several shards, also where they are read back from the cache
    monkeypatch.setattr("har.training.feature_cache.SHARD_ROWS", 8)
    monkeypatch.setattr(features, "READ_SIZE", 8)
    job = tiny_job(RECIPES[name], manifest)
    in_memory = train(job)
    mapped = []
    map_before = features.map_features
    monkeypatch.setattr(
        features, "map_features", lambda *shape: mapped.append(shape) or map_before(*shape)
    )
    monkeypatch.setattr(features, "fits_memory", lambda size: False)
    from_disk = train(job)
    assert "each epoch reads them from disk" in capsys.readouterr().err
    assert len(mapped) == 1
    assert numbers(from_disk) == numbers(in_memory)
    for ours, theirs in zip(
        from_disk.model.get_weights(), in_memory.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    # the file has no name
    assert not [
        each for each in features_folder().iterdir() if each.is_file() and each.suffix == ""
    ]


def test_a_limit_of_the_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, images, size = tiny_recipe("v5"), 1000, 32
    # validation is computed at once with v5's only view
    enough = 2 * images * size / loaders.MAX_MEMORY_SHARE
    for free, from_disk in ((enough + 1, False), (enough - 1, True)):
        monkeypatch.setattr(loaders, "free_memory", lambda free=free: free)
        assert features._exceeds_memory(recipe, images, size) is from_disk
    monkeypatch.setattr(loaders, "free_memory", lambda: 1)
    with pytest.raises(UserError, match="loader features needs"):
        features._exceeds_memory(tiny_recipe("v6"), images, size)


def test_picked_rows_are_those_of_the_array() -> None:
    array = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    numbers = np.array([4, 0, 2])
    picked, copied = PickedFeatures(array, numbers), array[:, numbers]
    assert picked.shape == copied.shape
    rows, views = np.array([2, 2, 0]), np.array([1, 0, 1])
    np.testing.assert_array_equal(picked[0, rows], copied[0, rows])
    np.testing.assert_array_equal(picked[views, rows], copied[views, rows])
    assert picked[:, :0].shape == copied[:, :0].shape


def test_a_mapped_array_outlives_its_file_and_a_full_disk_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = map_features((2, 3, 4), np.dtype(np.float16))
    array[:] = 7
    assert array.shape == (2, 3, 4) and (array == 7).all() and type(array) is np.ndarray
    assert list(features_folder().iterdir()) == []

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UserError, match=r"No space left on device; set HAR_CACHE to another"):
        map_features((2, 3, 4), np.dtype(np.float16))
    assert list(features_folder().iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the features do not fit the memory, and need"):
        map_features((1, 1), np.dtype(np.float32))
