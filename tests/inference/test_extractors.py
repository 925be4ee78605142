"""A backbone over many images: by each runtime what Keras computes, in the arithmetic asked for."""

import keras
import numpy as np
import pytest

from har.inference import extractors
from har.inference.extractors import EXTRACTORS, TOLERANCE, choose_arithmetic
from har.inference.freezing import trace
from har.util.hardware import has_bfloat16
from tests.conftest import tiny_recipe


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "precision", "exact", "arithmetic"),
    [
        (False, False, "float32", False, "float32"),
        (False, True, "float32", False, "bfloat16"),
        (False, True, "float32", True, "float32"),
        (True, True, "float32", False, "float32"),
        (True, False, "mixed_float16", False, "float16"),
        (True, False, "mixed_float16", True, "float32"),
        (True, False, "mixed_bfloat16", False, "bfloat16"),
    ],
)
def test_arithmetic_is_the_machines_best_but_for_test_images(
    gpu: bool,
    bfloat16: bool,
    precision: str,
    exact: bool,
    arithmetic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extractors, "has_gpu", lambda: gpu)
    monkeypatch.setattr(extractors, "has_bfloat16", lambda: bfloat16)
    recipe = tiny_recipe("v5", precision=precision)
    assert choose_arithmetic("tensorflow", recipe, exact) == arithmetic


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_gpus_precision_is_computed_by_keras_policy(
    precision: str,
    network: keras.Model,
    tiny_backbone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU here: that the weights are carried over, and the precision is as asked for."""
    monkeypatch.setattr(extractors, "has_gpu", lambda: True)
    recipe = tiny_recipe("v5", precision=precision)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.float32)
    prepared = EXTRACTORS["tensorflow"](network, trace(network, "float32"), recipe)
    extractor = prepared.compile(precision.removeprefix("mixed_"))
    found = np.zeros((6, 8), np.float32)

    def sink(start: int, features: np.ndarray) -> None:
        assert features.dtype.name == precision.removeprefix("mixed_")
        found[start : start + len(features)] = features

    extractor.run([(0, images)], sink)
    wanted = np.asarray(network(images, training=False))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU computes no bfloat16 by itself")
def test_one_network_is_computed_in_either_arithmetic_in_turn(
    network: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractors, "has_gpu", lambda: False)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype(np.float32)
    prepared = EXTRACTORS["tensorflow"](network, trace(network, "float32"), tiny_recipe("v5"))
    found = {name: np.zeros((40, 8), np.float32) for name in ("float32", "bfloat16")}
    wanted = np.asarray(network(images, training=False))
    for name in ("float32", "bfloat16", "float32"):

        def sink(start: int, features: np.ndarray, into: np.ndarray = found[name]) -> None:
            into[start : start + len(features)] = features

        prepared.compile(name).run([(0, images[:32]), (32, images[32:])], sink)
        distance = np.linalg.norm(found[name] - wanted) / np.linalg.norm(wanted)
        assert distance <= 1e-5 if name == "float32" else 1e-4 < distance < TOLERANCE["bfloat16"]
