"""Recipes are frozen values; the variants' differences are computed and recorded."""

import re
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from har.data import images
from har.models import backbones, build, devices
from har.recipe import (
    NATIVE_SIZES,
    ORIGINAL,
    PATCH_SIZES,
    V2,
    V3,
    V4,
    V7,
    VARIANTS,
    Backbone,
    Recipe,
    axis,
    build_recipe,
    changes,
    describe_changes,
    digest_recipe,
    field_values,
    parent_of,
)
from har.training import augmentation, diagnostics, inputs
from har.util.errors import UserError

GOLDEN = Path(__file__).parent / "goldens" / "variants.txt"


TABLES = {
    "loader": inputs.FIT_INPUTS,
    "resize": images.RESIZERS,
    "augmentation": augmentation.AUGMENTATIONS,
    "backbone": backbones.BACKBONES,
    "fine_tune": backbones.FINE_TUNES,
    "head": build.HEADS,
    "optimizer": build.OPTIMIZERS,
    "schedule": build.SCHEDULES,
    "mixing": augmentation.MIXINGS,
    "loss": build.LOSSES,
    "strategy": devices.STRATEGIES,
    "diagnostics": diagnostics.DIAGNOSTICS,
}


def resolved() -> str:
    lines = [
        f"{name}.{each.name}: {value}"
        for name, recipe in VARIANTS.items()
        for each, value in field_values(recipe)
    ]
    return "\n".join(lines) + "\n"


def test_resolved_variants_equal_the_golden(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-goldens"):
        GOLDEN.write_text(resolved())
    assert resolved() == GOLDEN.read_text()


def test_recipe_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ORIGINAL.epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", TABLES)
def test_every_literal_has_its_builder(name: str) -> None:
    (field,) = (f for f in fields(Recipe) if f.name == name)
    assert set(TABLES[name]) == set(get_args(field.type))


@pytest.mark.parametrize(
    ("variant", "given", "sizes"),
    [
        ("v6", {"backbone": "convnext-base"}, (224, 0)),
        ("v7", {"backbone": "convnext-base"}, (224, 256)),
        ("v7", {"backbone": "efficientnetv2-m"}, (480, 576)),
        ("v7", {"backbone": "dinov2-small"}, (224, 266)),
        # as the user says, and as the variant says where it is no newer backbone, or no v6 or v7
        ("v6", {"backbone": "convnext-base", "image_size": 96}, (96, 0)),
        ("v7", {"backbone": "convnext-base", "evaluation_size": 96}, (260, 96)),
        ("v6", {"backbone": "efficientnet-lite0"}, (416, 0)),
        ("v7", {"backbone": "efficientnetb0"}, (260, 320)),
        ("v7", {}, (260, 320)),
        ("v5", {"backbone": "convnext-base"}, (160, 0)),
    ],
)
def test_v6_and_v7_take_the_size_of_a_backbone_that_is_named(
    variant: str, given: dict[str, Any], sizes: tuple[int, int]
) -> None:
    recipe = build_recipe(variant, given)
    assert (recipe.image_size, recipe.evaluation_size) == sizes
    both = {"image_size": sizes[0], "evaluation_size": sizes[1]}
    assert recipe == replace(VARIANTS[variant], **{**given, **both})


def test_sizes_are_of_backbones_and_fit_their_stride() -> None:
    assert set(NATIVE_SIZES) < set(get_args(Backbone))
    for name in NATIVE_SIZES:
        recipe = build_recipe("v7", {"backbone": name})
        assert recipe.evaluation_size % PATCH_SIZES.get(name, 32) == 0
        assert 1.1 < recipe.evaluation_size / recipe.image_size < 1.3
    # which is what v7 has with its own backbone
    assert V7.evaluation_size == 32 * round(1.2 * V7.image_size / 32)


@pytest.mark.parametrize("field", ["image_size", "evaluation_size"])
def test_a_size_of_broken_patches_names_two_that_fit(field: str) -> None:
    option = field.replace("_", "-")
    with pytest.raises(
        UserError, match=rf"{field} must be a multiple of 14 .*--{option} 154 or 168"
    ):
        build_recipe("v7", {"backbone": "dinov2-small", "image_size": 224, field: 160})


def test_every_field_has_help() -> None:
    assert all(each.metadata["help"] for each in fields(Recipe))


def test_differences_of_the_notebooks() -> None:
    assert changes(ORIGINAL, VARIANTS["v1"]) == {"diagnostics": ("none", "explore")}
    assert V2 == V3
    assert changes(V4, VARIANTS["v5"]) == {
        "loader": ("stream", "features"),
        "augmentation": ("flip_rotate_zoom_contrast", "none"),
    }
    assert changes(V3, V4) == {"precision": ("float32", "mixed_float16")}
    assert describe_changes(V3, replace(V4, epochs=3)) == "epochs=3, precision=mixed_float16"
    assert [parent_of(name) for name in VARIANTS] == [
        None, "original", "v1", "v2", "v3", "v4", "v5", "v6"
    ]  # fmt: skip


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda f: f.name)
def test_bad_value_names_field_and_value(field) -> None:
    bad = "" if field.type is str else "nonsense"
    with pytest.raises(UserError, match=rf"{field.name} must be .*received {bad!r}"):
        replace(V2, **{field.name: bad})


@pytest.mark.parametrize(
    "field", [f for f in fields(Recipe) if f.type in (int, float)], ids=lambda f: f.name
)
def test_numbers_are_bounded(field) -> None:
    for bad in (field.metadata["low"] - 1, field.metadata["high"] + 1, float("nan"), True):
        with pytest.raises(UserError, match=f"{field.name} must be"):
            replace(V2, **{field.name: bad})


def test_literals_name_every_allowed_value() -> None:
    for field in fields(Recipe):
        if get_origin(field.type) is Literal:
            with pytest.raises(UserError) as caught:
                replace(V2, **{field.name: "x"})
            assert all(value in str(caught.value) for value in get_args(field.type))


@pytest.mark.parametrize(("name", "value"), [("patience", 3), ("checkpoint", "best")])
def test_watching_validation_needs_validation(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name}={value} .*validation_fraction is 0"):
        replace(ORIGINAL, **{name: value})


FEATURES = {"loader": "features", "augmentation": "none", "patience": 0, "checkpoint": "last"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"label_smoothing": 0.1}, "--label-smoothing 0"),
        ({"mixing": "mixup"}, "--mixing none"),
        ({"weight_decay": 0.1}, "use --optimizer adamw, or --weight-decay 0"),
        ({"warmup_epochs": 1.0}, "use --schedule cosine, or --warmup-epochs 0"),
        ({"schedule": "cosine", "warmup_epochs": 3.0, "epochs": 3}, "received epochs=3"),
        ({"ema_momentum": 0.9}, "use --checkpoint last, or --ema-momentum 0"),
        ({"evaluation_size": 31}, "evaluation_size must be 0 or from 32 to 1024; received 31"),
        ({"cut": "block6a"}, "use --fine-tune last_blocks, or --cut auto"),
        ({"head": "linear_probe"}, "--head gap_dropout --head-start linear_probe"),
        ({"head_start": "linear_probe", "head": "flatten_dense512"}, "use --head gap_dropout"),
        ({**FEATURES, "augmentation": "mirror"}, "use --feature-views 2"),
        ({**FEATURES, "augmentation": "mirror", "feature_views": 3}, "received feature_views=3"),
        ({**FEATURES, "head": "linear_probe", "fine_tune": "last_blocks"}, "--fine-tune frozen"),
    ],
)  # fmt: skip
def test_what_cannot_be_together_says_what_to_use(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        replace(V3, **values)


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [("calibration", "temperature", "none"), ("patience", 3, "0")],
)
def test_what_is_fitted_out_of_fold_needs_validation(name: str, value: str, off: str) -> None:
    with pytest.raises(UserError, match=rf"use --validation-fraction 0\.2, or --{name} {off}$"):
        replace(ORIGINAL, **{name: value})


def test_suspects_are_found_in_three_folds() -> None:
    with pytest.raises(UserError, match=r"received validation_fraction=0\.4: use --validation"):
        replace(VARIANTS["v6"], suspects="leave_out", validation_fraction=0.4)
    assert replace(VARIANTS["v6"], suspects="leave_out", validation_fraction=0.39)


def test_features_are_of_a_backbone_that_stays_as_it_is() -> None:
    with pytest.raises(
        UserError, match="fine_tune=top changes it: use --fine-tune frozen or last_blocks"
    ):
        replace(V4, loader="features", fine_tune="top")
    for refused in (
        {"loader": "stream", "feature_views": 2},
        {"loader": "features", "augmentation": "none", "feature_views": 2},
    ):
        with pytest.raises(UserError, match="feature_views=2 are augmented views"):
            replace(V4, **refused)
    assert replace(V4, loader="features", feature_views=2).augmentation != "none"


# Twins, `train --reproduce` and resumed runs are found by these: they must never change.
DIGESTS = {
    "original": "e0a3ea4fb3120240",
    "v1": "5d75be51aba4ca60",
    "v2": "b1cad635abfe295a",
    "v3": "b1cad635abfe295a",
    "v4": "5f70de9f735f04b9",
    "v5": "9d8b8c11a22ab597",
    "v6": "64922fd1c3aa3dfa",
    "v7": "72a1f3cd880470bf",
}


def test_digests_of_the_variants_stay() -> None:
    assert {name: digest_recipe(recipe) for name, recipe in VARIANTS.items()} == DIGESTS


@dataclass(frozen=True, kw_only=True)
class Wider(Recipe):
    """The recipe with one axis more, as a later version may have it."""

    mystery: float = axis(0.0, "an axis of a later version", added=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_added_axis_changes_no_digest_until_it_is_used(variant: str) -> None:
    recipe = asdict(VARIANTS[variant])
    # what an older version recorded reads as the neutral value
    assert digest_recipe(Wider(**recipe)) == DIGESTS[variant]
    assert digest_recipe(Wider(**recipe, mystery=0.1)) != DIGESTS[variant]
    assert digest_recipe(Wider(**{**recipe, "seed": 1})) != DIGESTS[variant]


def test_digest_is_of_the_values_alone() -> None:
    assert digest_recipe(V2) == digest_recipe(V3) != digest_recipe(V4)
    assert digest_recipe(replace(V2, learning_rate=1)) == digest_recipe(
        replace(V2, learning_rate=1.0)
    )
    assert re.fullmatch("[0-9a-f]{16}", digest_recipe(V2))
    assert len({digest_recipe(replace(V2, seed=seed)) for seed in range(5)}) == 5
