"""A backbone, a head and a metric that somebody adds, through everything that a run does."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest
from keras import layers

from har.data.manifest import Manifest
from har.evaluation.metrics import TEST_METRICS, Metric
from har.inference.classifier import load_classifier, save_classifier
from har.inference.runtimes import RUNTIMES
from har.jobs.train import run_training
from har.models import backbones, build
from har.models.backbones import Backbone, build_backbone, keras_application
from har.models.build import build_model, find_backbone
from har.models.devices import fit_to_hardware
from har.recipe import V3
from har.tracking.ui import VIEW_TAG
from har.training.job import build_job
from har.training.train import train
from tests.fixtures import TINY_SIZE, RecordingBackup, tiny_job, tiny_recipe
from tests.models.test_devices import CPU


def build_tiny_convnext(image_size: int) -> keras.Model:
    """The parts of ConvNeXt that no EfficientNet has: constants in its Normalization, convolutions
    in groups, LayerNormalization, and a sum that is no layer.
    """
    inputs = layers.Input((image_size, image_size, 3))
    x = layers.Normalization(mean=[120.0, 115.0, 100.0], variance=[3400.0, 3300.0, 3400.0])(inputs)
    x = layers.Conv2D(8, 4, strides=4)(x)
    y = layers.Conv2D(8, 3, padding="same", groups=8)(x)
    x = x + layers.LayerNormalization()(y)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="tiny_convnext")


def build_neck(features: object) -> object:
    """A head of several layers in one, with weights that change without a gradient."""
    neck = [layers.BatchNormalization(), layers.Dense(16, "relu"), layers.BatchNormalization()]
    return keras.Sequential([*neck, layers.Dropout(0.2)], name="neck")(features)


@pytest.fixture(params=["backbone", "head"])
def added(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny_backbone: None
) -> None:
    """One entry, in the place of a name that the recipe has."""
    if request.param == "head":
        monkeypatch.setitem(build.HEADS, "gap_dropout", build_neck)
    else:
        tiny = Backbone(build_tiny_convnext, build_tiny_convnext)
        monkeypatch.setitem(backbones.BACKBONES, "efficientnet-lite0", tiny)


def pictures(count: int, size: int = TINY_SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_is_served_as_it_computes(added: None, runtime: str, tmp_path: Path) -> None:
    recipe, images = tiny_recipe(), pictures(5)
    model = build_model(recipe, 3)
    model.fit(images, np.array([0, 1, 2, 0, 1]), verbose=0)
    save_classifier(tmp_path, model, ("a", "b", "c"), recipe, runtime)
    found = load_classifier(tmp_path).forward(images)
    np.testing.assert_allclose(found, model.predict(images, verbose=0), atol=1e-5)


@pytest.mark.parametrize("loader", ["stream", "features"])
def test_it_trains_and_resumes_to_the_bit(
    added: None, loader: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"loader": loader, "augmentation": "none", "epochs": 3}
    recipe = tiny_recipe("v3", **plain)
    backup = RecordingBackup()
    whole = train(tiny_job(recipe, manifest), backup=backup)
    again = RecordingBackup(resume_from=backup.states[0])
    resumed = train(tiny_job(recipe, manifest), backup=again)
    for one, other in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert resumed.history[-1]["val_loss"] == whole.history[-1]["val_loss"]


def test_weights_of_constants_come_from_a_file(added: None, tmp_path: Path) -> None:
    recipe, images = tiny_recipe(weights="random"), pictures(2)
    network = find_backbone(build_model(recipe, 3))
    network.save_weights(file := tmp_path / "tiny.weights.h5")
    again = build_backbone(replace(recipe, weights=str(file)))
    np.testing.assert_array_equal(again.predict(images), network.predict(images))


@pytest.mark.slow
def test_the_real_convnext_tiny_is_one_entry(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest, store: str
) -> None:
    entry = keras_application("ConvNeXtTiny")
    monkeypatch.setitem(backbones.BACKBONES, "efficientnet-lite0", entry)
    for runtime in RUNTIMES:
        recipe = tiny_recipe("v5", weights="random", epochs=1)
        job = build_job("v5", recipe, ("backbone",), manifest, runtime)
        outcome = run_training(job, "convnext", started=0.0)
        assert mlflow.get_run(outcome.run_id).info.status == "FINISHED"


def test_the_cpu_fallback_is_what_the_backbone_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(image_size: int) -> keras.Model:
        raise AssertionError

    other = Backbone(unused, unused, cpu_fallback="efficientnet-lite2")
    monkeypatch.setitem(backbones.BACKBONES, "efficientnetb7", other)
    assert fit_to_hardware(V3, (), CPU)[0].backbone == "efficientnet-lite2"
    # whatever its name begins with
    monkeypatch.setitem(backbones.BACKBONES, "efficientnetb7", Backbone(unused, unused))
    assert fit_to_hardware(V3, (), CPU) == (V3, [])


def spread_of(probabilities: np.ndarray, label_ids: np.ndarray) -> float:
    return float(probabilities.std())


def test_a_metric_reaches_run_comparison_and_view_from_one_entry(
    monkeypatch: pytest.MonkeyPatch,
    tiny_backbone: None,
    manifest: Manifest,
    store: str,
    cli,
    tmp_path: Path,
) -> None:
    entry = Metric(compute=spread_of, heading="my spread", form=".4f")
    monkeypatch.setitem(TEST_METRICS, name := "spread", entry)
    # the comparison lists its columns when it is loaded, which another test may have done
    for module in [each for each in sys.modules if re.match(r"har\.(jobs\.)?compare", each)]:
        monkeypatch.delitem(sys.modules, module)
    for seed in (0, 1):
        recipe = tiny_recipe("original", epochs=1, seed=seed)
        job = build_job("original", recipe, ("backbone",), manifest)
        run = mlflow.get_run(run_training(job, name, started=0.0).run_id)
    value = run.data.metrics[name]
    view = mlflow.get_experiment(run.info.experiment_id).tags[VIEW_TAG]
    assert f"metrics.`{name}`" in view
    result = cli("compare", "--experiment", name, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert f",{name}," in (tmp_path / "runs.csv").read_text().splitlines()[0]
    page = (tmp_path / "report.html").read_text()
    assert "my spread" in page and f"{value:.4f}" in page
    evaluated = cli("evaluate", "--run-id", run.info.run_id, "--data", manifest.root)
    assert f"{name:<18} {value:.4f}" in evaluated.stdout
