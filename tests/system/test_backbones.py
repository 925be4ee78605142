"""Every backbone of keras.applications and KerasHub with random weights, through everything that a
run does: the smallest of each family always, the others with the slow tests.
"""

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import pytest
from keras import layers

from har.data.manifest import Manifest
from har.inference.freezing import freeze, trace
from har.inference.runtimes import RUNTIMES, TOLERANCE, run_batches
from har.jobs.children import in_own_process
from har.jobs.train import _log_model, run_training
from har.models.backbones import BACKBONES, _find_block, build_backbone
from har.models.build import build_model, find_backbone, split_backbone
from har.models.merging import fold_batch_norms
from har.recipe import NATIVE_SIZES, PATCH_SIZES
from har.serving.load import load_served
from har.training.job import build_job
from har.training.train import train
from har.util.errors import UserError
from tests.fixtures import RecordingBackup, tiny_job, tiny_recipe
from tests.models.test_backbones import SCALES, spread

SMALLEST = (
    "efficientnetv2-b0", "convnext-tiny", "mobilenetv3-large", "resnet50v2", "dinov2-small",
)  # fmt: skip
EVERY = [
    pytest.param(name, marks=[] if name in SMALLEST else pytest.mark.slow) for name in NATIVE_SIZES
]
SIZE = 64


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Networks, one after the other, must not pile up."""
    yield
    keras.backend.clear_session()
    gc.collect()


def run_apart(check: Callable[..., None], name: str, *given: Any) -> None:
    """Run `check` in a process of its own, unless the backbone is small: TensorFlow and OpenVINO
    keep some memory of each network, of all of them 15 GB.
    """
    if name in SMALLEST:
        check(name, *given)
    else:
        in_own_process(check, name, *given)


def sizes_of(name: str) -> tuple[int, int]:
    """Two sizes that the backbone takes, small and larger."""
    return (70, 98) if PATCH_SIZES.get(name) == 14 else (SIZE, 96)


def pictures(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def distance_of(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def recipe_of(variant: str, name: str, **fields: Any):
    small = {"backbone": name, "weights": "random", "image_size": sizes_of(name)[0]}
    # with one image TensorFlow multiplies a matrix by a vector, and their product ends in other
    # digits where they lie elsewhere in memory
    batch = {"batch_size": 4 if name in SMALLEST else 2}
    return tiny_recipe(variant, **{**small, **batch, **fields})


@pytest.mark.parametrize("name", EVERY)
def test_both_runtimes_compute_what_keras_computes(name: str) -> None:
    run_apart(compare_runtimes, name)


def compare_runtimes(name: str) -> None:
    keras.utils.set_random_seed(0)
    network = spread(build_backbone(recipe_of("v5", name)), name)
    images = pictures(3, sizes_of(name)[0])
    # layer by layer: a graph of all would take longer to make than to check
    wanted = np.asarray(network(images, training=False))
    # so that what follows says something: Keras agrees with itself, and images differ by more
    again = np.asarray(network(images[:1], training=False))
    assert distance_of(again, wanted[:1]) < TOLERANCE["float32"] / 10
    assert distance_of(wanted[[1, 2, 0]], wanted) > 5 * TOLERANCE["float32"]
    for runtime in RUNTIMES.values():
        compiled = runtime.compile(runtime.convert(network), "float32")
        found = np.empty_like(wanted)

        def keep(start: int, outputs: np.ndarray, found: np.ndarray = found) -> None:
            found[start : start + len(outputs)] = outputs

        run_batches(compiled, [(0, images)], keep)
        assert distance_of(found, wanted) < TOLERANCE["float32"]


# With the three other small ones this takes as long as ten other tests.
STEPS = [
    pytest.param(name, marks=[] if name == "mobilenetv3-large" else pytest.mark.slow)
    for name in NATIVE_SIZES
]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_trains_what_the_recipe_says(name: str) -> None:
    run_apart(check_step, name)


def check_step(name: str) -> None:
    keras.utils.set_random_seed(0)
    model = build_model(recipe_of("v3", name, fine_tune="top"), 3)
    backbone = find_backbone(model)
    before = {layer.name: layer.get_weights() for layer in backbone.layers}
    loss, *_ = model.train_on_batch(pictures(2, sizes_of(name)[0]), np.array([0, 1]))
    assert np.isfinite(loss)
    moved = {
        layer.name
        for layer in backbone.layers
        if any(
            np.any(one != other)
            for one, other in zip(before[layer.name], layer.get_weights(), strict=True)
        )
    }
    trained = {layer.name for layer in backbone.layers if layer.trainable and layer.weights}
    # behind a new layer scale of a millionth some gradients are 0
    assert moved and moved <= trained
    frozen = [x for x in backbone.layers if isinstance(x, layers.BatchNormalization)]
    assert not any(layer.trainable for layer in frozen)


# a block of each family that a user may cut at
LATE_BLOCKS = {
    "convnext-tiny": "convnext_tiny_stage_3_block_2",
    "mobilenetv3-large": "expanded_conv_14",
    "resnet50v2": "conv5_block3",
    "efficientnetv2-b0": "block6h",
    "dinov2-small": "blocks.11",
}


@pytest.mark.parametrize("name", EVERY)
def test_it_is_cut_where_nothing_bypasses_the_cut(name: str) -> None:
    run_apart(check_cut, name)


def check_cut(name: str) -> None:
    recipe = recipe_of("v7", name, evaluation_size=sizes_of(name)[1])
    model = build_model(recipe, 3)
    before, after = split_backbone(model, recipe)
    for size in sizes_of(name):
        images = pictures(2, size)
        inner = before(images)
        if patch := PATCH_SIZES.get(name):
            # the class token and registers, if there are any, come first
            assert 0 <= inner.shape[1] - (size // patch) ** 2 <= 5
        else:
            assert inner.shape[1] in (size // 16, size // 32)
        features = find_backbone(model)(images, training=False)
        np.testing.assert_allclose(after(inner, training=False), features, rtol=1e-4, atol=1e-5)
    trained = {layer.name for layer in after.layers if layer.weights and layer.trainable}
    assert trained == {x.name for x in find_backbone(model).layers if x.weights and x.trainable}
    # a step on a CPU needs no other compiler
    assert not any(getattr(layer, "groups", 1) > 1 for layer in find_backbone(model).layers)
    check_named_cuts(
        [x.name for x in find_backbone(model).layers if x.weights], LATE_BLOCKS.get(name)
    )


def check_named_cuts(layers_of: list[str], late_block: str | None) -> None:
    """An unknown cut lists names that can be cut at."""
    with pytest.raises(UserError, match=r"no block 'nothing'") as caught:
        _find_block(layers_of, "nothing")
    named = re.split(r"the blocks are |, ", str(caught.value))[1:]
    assert late_block is None or late_block in named
    for each in named:
        assert layers_of[_find_block(layers_of, each)].startswith(each)


# v7 with images of one size for the quickest; all others, and two sizes as v7 has them, are slow.
STORIES = [
    ("mobilenetv3-large", 0),
    *(pytest.param(name, sizes_of(name)[1], marks=pytest.mark.slow) for name in NATIVE_SIZES),
]


@pytest.mark.parametrize(("name", "evaluation_size"), STORIES)
def test_v7_trains_resumes_logs_and_serves(
    name: str, evaluation_size: int, manifest: Manifest, store: str, tmp_path: Path
) -> None:
    run_apart(tell_story, name, evaluation_size, manifest, tmp_path)


def tell_story(name: str, evaluation_size: int, manifest: Manifest, folder: Path) -> None:
    fields: dict[str, Any] = {"weights": "random"}
    if SCALES.get(name, 1) < 1:
        # new weights of so deep a network let rounding alone decide, and every step throw it far
        fields = {"weights": str(folder / "calm.weights.h5"), "learning_rate": 1e-6}
        calm = spread(build_backbone(recipe_of("v5", name)), name)
        *_, last = (each for each in calm.layers if isinstance(each, layers.BatchNormalization))
        # features of about 1, with which no head begins with a loss of 50
        gamma, beta, *rest = last.get_weights()
        last.set_weights([0.01 * gamma, 0.01 * beta, *rest])
        calm.save_weights(fields["weights"])
    # a head that starts from a linear probe needs the features of the whole backbone too; of deep
    # networks with random weights they are too much alike for it
    start = "linear_probe" if evaluation_size and SCALES.get(name, 1) >= 1 else "random"
    sizes = {"evaluation_size": evaluation_size, "feature_views": 1}
    recipe = recipe_of("v7", name, head_start=start, **fields, **sizes)
    job, backup = tiny_job(recipe, manifest, "openvino"), RecordingBackup()
    whole = train(job, backup=backup)
    resumed = train(job, backup=RecordingBackup(backup.states[0]))
    for one, other in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with mlflow.start_run():
        model_id = _log_model(job, whole)
    _, classifier = load_served(f"models:/{model_id}")
    images = np.resize(pictures(2), (2, *whole.served.input_shape[1:])).astype(np.uint8)
    wanted = whole.served.predict(images, verbose=0)
    np.testing.assert_allclose(classifier.forward(images), wanted, atol=1e-4)
    (answer,) = classifier.classify([(manifest.root / manifest.table["path"][0]).read_bytes()])
    assert answer["error"] is None and answer["label"] in manifest.class_names


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v6", "v7"])
def test_a_whole_run_is_finished(variant: str, manifest: Manifest, store: str) -> None:
    recipe = recipe_of(variant, "convnext-tiny")
    job = build_job(variant, recipe, ("backbone",), manifest)
    record = run_training(job, "backbones", started=0.0)
    run = mlflow.get_run(record.run_id)
    assert run.info.status == "FINISHED" and 0 <= run.data.metrics["accuracy"] <= 1


def needs_xla(network: keras.Model) -> bool:
    return "_XlaMustCompile" in str(freeze(trace(network, "float32")).graph_def.library)


def test_the_graph_of_a_server_compiles_nothing_by_xla() -> None:
    """Keras' own ConvNeXt would, at the first image of each size of a batch."""
    network = BACKBONES["convnext-tiny"].build_random(SIZE)
    traced = trace(network, "float32").graph.as_graph_def()
    assert "_XlaMustCompile" in str(traced.library)
    assert not needs_xla(fold_batch_norms(network))
