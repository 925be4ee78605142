"""Every variant trains; what must hold for each."""

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.inference import runtimes
from har.models.backbones import FINE_TUNES, build_backbone
from har.recipe import VARIANTS
from har.training.features import Extraction
from har.training.loaders import split_training
from har.training.probe import DEFAULT_C
from har.training.regression import fit_layers
from har.training.train import Result, train
from har.util.errors import UserError
from tests.fixtures import tiny_job, tiny_recipe

pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.fixture
def traced_steps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Each tracing of a training step: a second one takes six seconds more with EfficientNetB7 on a
    CPU.
    """
    traced = []
    step = keras.Model.train_step

    def watched(model: keras.Model, data: object) -> object:
        traced.append(data)
        return step(model, data)

    monkeypatch.setattr(keras.Model, "train_step", watched)
    return traced


# v1, v2 and v4 are steps between the others.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("v1", "v2", "v4") else ())
        for name in VARIANTS
    ],
)
def test_every_variant_trains(variant: str, manifest: Manifest, traced_steps: list[object]) -> None:
    told = []
    recipe = tiny_recipe(variant, strategy=VARIANTS[variant].strategy)
    job = tiny_job(recipe, manifest)
    result = train(job, on_epoch=lambda epoch, metrics: told.append((epoch, metrics)))
    assert told == list(enumerate(result.history, start=1))
    assert len(told) == (1 if recipe.solved else 2)
    # once for each device
    assert len(traced_steps) == (0 if recipe.solved else job.replicas)
    names = {"train_loss", "train_accuracy", "train_top_3_accuracy", "epoch_time_s"}
    names |= {"images_per_second"}
    if recipe.validation_fraction:
        names |= {"val_loss", "val_accuracy", "val_top_3_accuracy"}
    else:
        assert result.validation_images == 0
    assert result.best_epoch in ((1, 2) if recipe.checkpoint == "best" else (None,))
    assert set(told[0][1]) == names
    # a solved head is fitted on all images, and validated on all, out of fold
    validated_too = result.validation_images if recipe.solved else 0
    images = result.train_images + result.validation_images - validated_too
    assert images == len(manifest.rows("train"))
    size = recipe.served_size
    probabilities = result.served(np.zeros((1, size, size, 3), np.uint8)).numpy()
    assert probabilities.shape == (1, 3) and probabilities.dtype == np.float32


def losses(result: Result) -> list[float]:
    return [
        value
        for epoch in result.history
        for name, value in epoch.items()
        if name.endswith(("loss", "accuracy"))
    ]


@pytest.mark.parametrize(
    "variant",
    ["v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("original", "v5"))],
)
def test_same_seed_same_numbers(variant: str, manifest: Manifest) -> None:
    first, again, other = (
        losses(train(tiny_job(tiny_recipe(variant, seed=seed), manifest))) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("validation_fraction", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_a_head_trained_on_features_is_the_one_trained_on_images(
    validation_fraction: float, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same order, the same first weights, the same numbers: only the time differs."""
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: False)
    same = {"validation_fraction": validation_fraction, "epochs": 3, "seed": 5}
    images = train(tiny_job(tiny_recipe("original", **same), manifest))
    for runtime in ("tensorflow", "openvino"):
        recipe = tiny_recipe("original", **same, loader="features")
        features = train(tiny_job(recipe, manifest, runtime))
        np.testing.assert_allclose(losses(features), losses(images), rtol=1e-4, atol=1e-5)
        pairs = zip(images.model.get_weights(), features.model.get_weights(), strict=True)
        for weight, other in pairs:
            np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-4)
        assert features.extracted is not None and features.extracted.runtime == runtime
    assert images.extracted is None


def test_views_are_drawn_anew_each_epoch(manifest: Manifest) -> None:
    """Three views of an image teach something else than one; the same seed the same."""
    recipe = tiny_recipe("v5", augmentation="flip_rotate_zoom_contrast", head="flatten_dense512")
    one, three, again = (
        losses(train(tiny_job(replace(recipe, feature_views=views), manifest)))
        for views in (1, 3, 3)
    )
    assert one != three == again


def test_features_train_on_two_devices_as_on_one(manifest: Manifest) -> None:
    recipe = tiny_recipe("v5", head="flatten_dense512", validation_fraction=0.3, epochs=3)
    one, two = (
        train(tiny_job(replace(recipe, strategy=strategy), manifest))
        for strategy in ("one_device", "mirrored")
    )
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4, atol=1e-5)
    for weight, other in zip(one.model.get_weights(), two.model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fraction", "last_batch"), [(0.35, 3), pytest.param(0.28, 1, marks=pytest.mark.slow)]
)
def test_two_devices_equal_one(fraction: float, last_batch: int, manifest: Manifest) -> None:
    """Also where the last validation batch is uneven, or has fewer images than devices."""
    same = {"head": "flatten_dense512", "validation_fraction": fraction, "epochs": 3}
    one = train(tiny_job(tiny_recipe(**same), manifest))
    two = train(tiny_job(tiny_recipe(**same, strategy="mirrored"), manifest))
    assert one.validation_images % 4 == last_batch
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4, atol=1e-5)
    for weight, other in zip(one.model.get_weights(), two.model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["v4", "v7"])
@pytest.mark.parametrize(
    "precision", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)]
)
def test_mixed_precision_trains_and_leaves_a_float32_model(
    variant: str, precision: str, manifest: Manifest
) -> None:
    result = train(tiny_job(tiny_recipe(variant, precision=precision), manifest))
    assert np.isfinite(losses(result)).all()
    assert {weight.dtype for weight in result.model.get_weights()} == {np.dtype("float32")}
    assert {layer.compute_dtype for layer in result.model.layers} == {"float32"}


# The tiny backbone's layers that each value of the axis trains.
MOVING = {
    "frozen": (),
    "top": ("block2_conv",),
    "all": ("block1_conv", "block2_conv"),
    "last_blocks": ("block2_conv",),
}


@pytest.mark.parametrize("variant", ["original", "v3"])
@pytest.mark.parametrize("fine_tune", FINE_TUNES)
def test_backbone_moves_only_as_fine_tune_says(
    variant: str, fine_tune: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However hard it is trained; batch normalisation moves neither weights nor statistics."""
    before: list[list[np.ndarray]] = []
    fit = keras.Model.fit

    def watched(model: keras.Model, *arguments: object, **options: object) -> object:
        _, backbone, *_, output = model.layers
        before.extend(layer.get_weights() for layer in (*backbone.layers, output))
        return fit(model, *arguments, **options)

    monkeypatch.setattr(keras.Model, "fit", watched)
    recipe = tiny_recipe(variant, fine_tune=fine_tune, epochs=3, checkpoint="last")
    _, backbone, *_, output = train(tiny_job(recipe, manifest)).model.layers
    for layer, earlier in zip((*backbone.layers, output), before, strict=True):
        moves = layer is output or layer.name in MOVING[fine_tune]
        for weight, other in zip(layer.get_weights(), earlier, strict=True):
            assert (weight != other).any() == moves, layer.name


def test_fine_tune_top_is_the_last_fifth_of_the_convolutions() -> None:
    recipe = tiny_recipe(fine_tune="top", weights="random", backbone="efficientnet-lite1")
    backbone = build_backbone(recipe)
    kinds = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    convolutions = [x for x in backbone.layers if isinstance(x, kinds)]
    trained = [layer for layer in backbone.layers if layer.trainable and layer.weights]
    assert trained[-1].name == "conv_head" and set(trained) <= set(backbone.layers[-50:])
    assert not [x for x in trained if isinstance(x, keras.layers.BatchNormalization)]
    assert len(trained) == -(-len(convolutions) // 5)


def test_patience_stops_and_best_weights_are_kept(manifest: Manifest) -> None:
    """A learning rate of 10 ruins the head, so the best epoch is an early one."""
    recipe = tiny_recipe(learning_rate=10.0, epochs=12, patience=2)
    stopped = train(tiny_job(recipe, manifest))
    assert len(stopped.history) < 12
    assert len(stopped.history) == stopped.best_epoch + 2
    short = tiny_recipe(learning_rate=10.0, epochs=stopped.best_epoch, patience=2)
    best = train(tiny_job(short, manifest))
    for weight, other in zip(best.model.get_weights(), stopped.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


def test_patience_0_never_stops(manifest: Manifest) -> None:
    recipe = tiny_recipe(learning_rate=10.0, epochs=9, patience=0)
    assert len(train(tiny_job(recipe, manifest)).history) == 9


def test_batch_must_divide_over_the_devices(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="batch_size 5 does not divide evenly over 2 devices"):
        train(tiny_job(tiny_recipe(batch_size=5, strategy="mirrored"), manifest))


@pytest.mark.parametrize("variant", ["v3", "v5"])
@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_an_image_that_changes_while_training_is_named(
    variant: str, damage: str, raw: Path, tmp_path: Path
) -> None:
    source = folder_source(raw, why="a test")
    manifest = prepare(source, tmp_path / "prepared", Split(test_fraction=0.25))
    image = manifest.root / manifest.rows("train")["path"].iloc[3]

    def spoil(*_: object) -> None:
        if not image.exists():
            return
        data = image.read_bytes()
        image.unlink()
        if damage == "cut":
            image.write_bytes(data[:90])
        if damage == "another":
            image.write_text("no image")

    recipe = tiny_recipe(variant, epochs=9, patience=0)
    if variant == "v5":
        spoil()
    with pytest.raises(UserError, match=image.name):
        train(tiny_job(recipe, manifest), on_epoch=spoil if variant == "v3" else None)


def exhaust(*_: object, **options: object) -> None:
    raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")


@pytest.mark.parametrize(("most", "said"), [(2, "--batch-size 2 fits"), (1, "--batch-size 1 fits"),
    (0, "with every smaller one: take a smaller --backbone or --image-size")])  # fmt: skip
def test_too_little_memory_says_which_batch_fits(
    most: int, said: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the one that TensorFlow raises where a GPU is full; none is here to fill."""
    step = keras.Model.train_on_batch

    def limited(model: keras.Model, images: tf.Tensor, labels: tf.Tensor) -> None:
        step(model, images, labels) if len(images) <= most else exhaust()

    monkeypatch.setattr(keras.Model, "fit", exhaust)
    monkeypatch.setattr(keras.Model, "train_on_batch", limited)
    with pytest.raises(UserError, match=f"batch_size 4 at 32 px.*{said}"):
        train(tiny_job(tiny_recipe("v3"), manifest))


def test_after_xla_no_smaller_batch_is_tried(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(model: keras.Model, *_: object, **options: object) -> None:
        # Keras would refuse: it knows that there is no GPU
        model._jit_compile = True
        exhaust()

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(keras.Model, "train_on_batch", None)
    with pytest.raises(UserError, match="batch_size 4 at 32 px: try --batch-size 2"):
        train(tiny_job(tiny_recipe("v3"), manifest))


def test_last_blocks_on_features_are_those_trained_on_images(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without random changes, the same order gives the same numbers; features are of 16 bits."""
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: False)
    same = {"fine_tune": "last_blocks", "epochs": 3, "augmentation": "none", "seed": 5}
    images = train(tiny_job(tiny_recipe("v3", **same), manifest))
    recipe = tiny_recipe("v3", **same, loader="features")
    for runtime in ("tensorflow", "openvino"):
        features = train(tiny_job(recipe, manifest, runtime))
        np.testing.assert_allclose(losses(features), losses(images), rtol=2e-3, atol=2e-3)
        pairs = zip(images.model.get_weights(), features.model.get_weights(), strict=True)
        for weight, other in pairs:
            np.testing.assert_allclose(weight, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("precision", "strategy", "fine_tune"),
    [
        ("float32", "one_device", "last_blocks"),
        ("mixed_float16", "one_device", "all"),
        ("float32", "mirrored", "last_blocks"),
        pytest.param("float32", "one_device", "all", marks=pytest.mark.slow),
        pytest.param("mixed_float16", "one_device", "last_blocks", marks=pytest.mark.slow),
        pytest.param("float32", "mirrored", "all", marks=pytest.mark.slow),
    ],
)
def test_a_head_starts_from_a_probe_of_float32_features(
    precision: str,
    strategy: str,
    fine_tune: str,
    manifest: Manifest,
    traced_steps: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the model computes in 16 bits: at a rate near 0, both end with the same head."""
    computed: list[np.ndarray] = []
    extract = Extraction.features

    def watched(self: Extraction, *arguments: object, **options: object) -> np.ndarray:
        computed.append(extract(self, *arguments, **options))
        assert self.network.compute_dtype == "float32"
        assert {layer.compute_dtype for layer in self.network.layers} == {"float32"}
        return computed[-1]

    monkeypatch.setattr(Extraction, "features", watched)
    recipe = tiny_recipe(
        "v3", fine_tune=fine_tune, head_start="linear_probe", precision=precision,
        strategy=strategy, learning_rate=1e-9, epochs=1,
    )  # fmt: skip
    result = train(job := tiny_job(recipe, manifest))
    assert len(traced_steps) == job.replicas
    (features,) = computed
    labels = split_training(manifest, recipe).train["label_id"].to_numpy()
    (layer,) = fit_layers(features[None], labels, 3, [DEFAULT_C], recipe)
    np.testing.assert_allclose(
        result.model.get_layer("label").get_weights()[0], layer.kernel, atol=1e-4
    )


def test_the_averaged_weights_are_validated_and_kept(manifest: Manifest) -> None:
    """With a momentum near 1 the average stays where the first step led."""
    same = {"fine_tune": "all", "checkpoint": "last", "patience": 0, "epochs": 3, "seed": 1}
    start = train(tiny_job(tiny_recipe("v3", **same, learning_rate=1e-9), manifest))
    moved = train(tiny_job(tiny_recipe("v3", **same, learning_rate=0.05), manifest))
    kept = train(
        tiny_job(tiny_recipe("v3", **same, learning_rate=0.05, ema_momentum=0.9999), manifest)
    )

    def distance(result: Result) -> float:
        pairs = zip(result.model.get_weights(), start.model.get_weights(), strict=True)
        return max(float(np.abs(weight - other).max()) for weight, other in pairs)

    assert distance(kept) < 0.1 * distance(moved)
    # the loss on training images is that of the weights that move
    validated, trained = ([e[name] for e in kept.history] for name in ("val_loss", "train_loss"))
    assert np.ptp(validated) < 0.1 * np.ptp(trained)


def test_a_diverging_training_stops_whatever_its_recipe(manifest: Manifest) -> None:
    recipe = tiny_recipe("v7", learning_rate=10.0, global_clipnorm=0.0, epochs=5)
    recipe = replace(recipe, ema_momentum=0.0, weight_decay=1.0, warmup_epochs=0.0)
    with pytest.raises(UserError, match=r"the training diverged in epoch [1-5]"):
        train(tiny_job(recipe, manifest))
