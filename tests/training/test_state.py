"""A training that goes on ends as one that never stopped."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.inference import runtimes
from har.models.build import build_model
from har.recipe import Recipe
from har.training.state import capture_state, find_changing_variables, restore_state
from har.training.train import Result, train
from har.util.errors import UserError
from tests.fixtures import RecordingBackup, tiny_job, tiny_recipe

pytestmark = pytest.mark.usefixtures("tiny_backbone")


LAST = {"checkpoint": "last", "patience": 0}
ONE_HOT = {"loss": "categorical_crossentropy"}
RECIPES: dict[str, dict[str, Any]] = {
    "original": {},
    "v3": {},
    "v4": {"patience": 2},
    "v5": {"augmentation": "flip_rotate_zoom_contrast", "feature_views": 3},
    "v2": {"fine_tune": "all", **LAST},
    "v7": {},
    # each axis by itself, where images are decoded in every epoch
    "v3 mirrored": {"strategy": "mirrored"},
    "v3 optimizer": {"optimizer": "adamw", "weight_decay": 0.1},
    "v3 schedule": {"schedule": "cosine", "warmup_epochs": 1.5},
    "v3 label_smoothing": {"label_smoothing": 0.2, **ONE_HOT},
    "v3 augmentation": {"augmentation": "crop_flip_color", "evaluation_size": 40},
    "v3 mirror": {"augmentation": "mirror", "test_time": "mirror", "calibration": "temperature"},
    "v3 mixing": {"mixing": "mixup", **ONE_HOT},
    "v3 ema_momentum": {"ema_momentum": 0.9, "fine_tune": "all", **LAST},
    "v3 global_clipnorm": {"global_clipnorm": 0.01},
    "v3 class_weight": {"class_weight": "balanced"},
    "v3 head_start": {"head_start": "linear_probe"},
    "v3 last_blocks": {"fine_tune": "last_blocks"},
    "v3 suspects": {"suspects": "leave_out"},
    # and all together, on features on two devices
    "v7 mirrored": {"mixing": "mixup", "class_weight": "balanced", "strategy": "mirrored"},
}


def recipe_of(name: str) -> Recipe:
    variant, *axis = name.split()
    return tiny_recipe(variant, epochs=2 if axis else 4, **RECIPES[name])


def numbers(result: Result) -> list[dict[str, float]]:
    timed = ("epoch_time_s", "images_per_second")
    return [
        {name: value for name, value in epoch.items() if name not in timed}
        for epoch in result.history
    ]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: False)


@pytest.mark.parametrize(
    "variant",
    [
        # on images, on features, and on views that passed some blocks
        pytest.param(name, marks=() if name in ("v3", "v5", "v7") else pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_it_goes_on_to_the_same_numbers_and_weights(variant: str, manifest: Manifest) -> None:
    recipe = recipe_of(variant)
    backup = RecordingBackup()
    whole, states = train(tiny_job(recipe, manifest), backup=backup), backup.states
    assert len(states) == len(whole.history)
    after_epochs: Sequence[int] = (1,) if " " in variant else (1, len(states))
    if variant == "original":
        after_epochs = range(1, 5)
    for done in after_epochs:
        state = states[done - 1]
        told: dict[int, dict[str, float]] = {}
        backup = RecordingBackup(resume_from=state)
        result = train(tiny_job(recipe, manifest), on_epoch=told.__setitem__, backup=backup)
        assert numbers(result) == numbers(whole)
        assert list(told) == list(range(done + 1, len(whole.history) + 1))
        assert result.best_epoch == whole.best_epoch
        assert result.temperature == whole.temperature
        assert result.train_time_s > state.train_time_s
        pairs = zip(result.model.get_weights(), whole.model.get_weights(), strict=True)
        for weight, other in pairs:
            np.testing.assert_array_equal(weight, other)


def test_patience_is_remembered(manifest: Manifest) -> None:
    """A training that early stopping had ended is not trained on."""
    recipe = tiny_recipe("v3", epochs=9, patience=1, learning_rate=1e-9)
    backup = RecordingBackup()
    whole, states = train(tiny_job(recipe, manifest), backup=backup), backup.states
    assert len(whole.history) < 9
    result = train(tiny_job(recipe, manifest), backup=RecordingBackup(resume_from=states[-1]))
    assert numbers(result) == numbers(whole)
    for weight, other in zip(result.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


def test_a_frozen_backbone_is_not_in_the_state(manifest: Manifest) -> None:
    model = build_model(tiny_recipe("original"), 3)
    kept = sum(int(np.prod(each.shape)) for each in find_changing_variables(model))
    head = 8 * 512 + 512 + 512 * 3 + 3
    assert head <= kept <= head + 20
    model = build_model(tiny_recipe("original", fine_tune="all"), 3)
    assert sum(int(np.prod(each.shape)) for each in find_changing_variables(model)) > head + 200


def test_the_state_of_another_model_is_refused(manifest: Manifest) -> None:
    model = build_model(tiny_recipe("original"), 3)
    model.optimizer.build(model.trainable_variables)
    state = capture_state(model, None, [], 0.0)
    restore_state(build_model(tiny_recipe("original"), 3), state)
    for other in (build_model(tiny_recipe("original"), 4), build_model(tiny_recipe("v3"), 3)):
        with pytest.raises(UserError, match="another model"):
            restore_state(other, state)
    cut = replace(state, arrays={**state.arrays, "optimizer/0": np.zeros((7,))})
    with pytest.raises(UserError, match="the backup's optimizer"):
        restore_state(build_model(tiny_recipe("original"), 3), cut)
