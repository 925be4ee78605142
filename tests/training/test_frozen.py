"""Trainings that share frozen features give the numbers that each gives alone."""

from dataclasses import replace

import pytest

from har.data.manifest import Manifest, hide_test
from har.training import frozen
from har.training.frozen import FrozenFeatures
from har.training.train import Result, train
from tests.fixtures import tiny_job, tiny_recipe

V5 = tiny_recipe("v5")
SHARING = (
    V5,
    replace(V5, learning_rate=0.01, epochs=3),
    replace(V5, head_start="linear_probe"),
)
NOT_SHARING = (
    # it is validated on other images
    replace(V5, head="linear_probe"),
    replace(V5, seed=1),
    replace(V5, image_size=40),
    replace(V5, validation_fraction=0.3),
)


def numbers(result: Result) -> list[dict[str, float]]:
    timed = ("epoch_time_s", "images_per_second")
    return [{k: v for k, v in epoch.items() if k not in timed} for epoch in result.history]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_backbone")
def test_sharing_changes_no_number(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = frozen.build_backbone
    monkeypatch.setattr(
        frozen, "build_backbone", lambda recipe: built.append(recipe) or build(recipe)
    )
    kept, hidden = FrozenFeatures(), hide_test(manifest)
    recipes = (*SHARING, *NOT_SHARING)
    together = [numbers(train(tiny_job(each, hidden), kept=kept)) for each in recipes]
    assert built[1:] and len(built) == 1 + len(NOT_SHARING)
    alone = [numbers(train(tiny_job(each, manifest))) for each in recipes]
    assert together == alone
    # the output layer that was solved for is a better start than a random one
    assert alone[2] != alone[0]


def test_hidden_test_images_are_in_no_split(manifest: Manifest) -> None:
    hidden = hide_test(manifest)
    assert hidden.rows("test").empty and not manifest.rows("test").empty
    assert hidden.rows("train").equals(manifest.rows("train"))
    assert len(hidden.table) == len(manifest.table)
    assert hidden.class_names == manifest.class_names
