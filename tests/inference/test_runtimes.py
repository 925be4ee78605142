"""The runtimes: each computes what Keras computes, in few shapes, for many callers at once."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from har.cli.main import main
from har.inference import runtimes
from har.inference.runtimes import (
    AUTO,
    BATCH_SIZE,
    BUCKETS,
    MODEL_FILE,
    OPENVINO_FILE,
    RUNTIMES,
    Compiled,
    Forward,
    Parts,
    build_function,
    check_compiled,
    choose_arithmetic,
    choose_runtime,
    convert_to_openvino,
    openvino_core,
    run_batches,
)
from har.models.build import build_model, build_trained_head, find_backbone
from har.util.errors import UserError
from har.util.hardware import has_bfloat16
from tests.fixtures import tiny_recipe


@pytest.fixture
def model(tiny_backbone: None) -> keras.Model:
    return build_model(tiny_recipe(), 3)


@pytest.fixture(params=RUNTIMES)
def forward(request: pytest.FixtureRequest, model: keras.Model, tmp_path: Path) -> Forward:
    return load(request.param, model, tmp_path)


def load(runtime: str, model: keras.Model, folder: Path, parts: Parts | None = None) -> Forward:
    """Through files, as a classifier does it."""
    model.save(folder / MODEL_FILE)
    RUNTIMES[runtime].save(model, folder, parts)
    return RUNTIMES[runtime].load(folder)


def noise(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_float32_is_not_rounded_on_a_gpu_that_could(model: keras.Model, tmp_path: Path) -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    load("tensorflow", model, tmp_path)
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_every_runtime_computes_what_keras_does(forward: Forward, model: keras.Model) -> None:
    images = noise(5)
    found = forward(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model(images, training=False), rtol=0, atol=1e-6)


def test_numbers_do_not_depend_on_the_bucket(forward: Forward) -> None:
    images = noise(BATCH_SIZE)
    whole = forward(images)
    for count in range(1, BATCH_SIZE):
        np.testing.assert_allclose(forward(images[:count]), whole[:count], rtol=0, atol=1e-6)


def test_callers_at_once_get_what_they_would_get_alone(forward: Forward) -> None:
    asked = [noise(BATCH_SIZE)[start : start + 3 + start % 5] for start in range(24)]
    alone = [forward(images) for images in asked]
    with ThreadPoolExecutor(8) as callers:
        together = list(callers.map(forward, asked * 4))
    for found, expected in zip(together, alone * 4, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_an_answer_is_the_callers_to_keep(forward: Forward) -> None:
    first = forward(noise(4))
    kept = first.copy()
    forward(255 - noise(4))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("buckets", [BUCKETS, (1, 2, 4)])
def test_only_the_buckets_shapes_are_run(buckets: tuple[int, ...]) -> None:
    shapes = set()

    def compiled(images: np.ndarray) -> np.ndarray:
        shapes.add(len(images))
        return images[:, 0, 0].astype(np.float32)

    forward = Forward(run=compiled, buckets=buckets)
    for count in range(1, BATCH_SIZE + 1):
        images = noise(count)
        np.testing.assert_array_equal(forward(images), images[:, 0, 0])
    assert shapes == set(buckets)


def test_no_batch_size_is_traced_anew(model: keras.Model, tmp_path: Path) -> None:
    forward = load("tensorflow", model, tmp_path)
    for count in range(1, BATCH_SIZE + 1):
        assert forward(noise(count)).shape == (count, 3)
    assert forward.run.experimental_get_tracing_count() == 1


def test_weights_are_constants_only_up_to_a_limit(
    model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise(5)
    expected = model(images, training=False)
    for most in (0, 10**9):
        monkeypatch.setattr(runtimes, "MOST_CONSTANTS", most)
        found = build_function(model, "uint8")
        np.testing.assert_allclose(found(images), expected, rtol=0, atol=1e-6)
        function = found.get_concrete_function() if most else found
        assert (len(function.variables) == 0) is (most > 0)


def test_a_head_is_joined_to_the_backbone_that_was_converted_before(
    model: keras.Model, tmp_path: Path
) -> None:
    network = find_backbone(model)
    backbone = convert_to_openvino(network)
    parts = Parts(backbone=backbone, head=build_trained_head(model, tiny_recipe()))
    images = noise(5)
    whole = load("openvino", model, tmp_path)(images)
    np.testing.assert_array_equal(load("openvino", model, tmp_path, parts)(images), whole)
    # and the backbone is what it was
    compiled = openvino_core().compile_model(backbone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (found,) = compiled([images.astype(np.float32)]).values()
    np.testing.assert_allclose(found, network(images, training=False), rtol=0, atol=1e-5)


def test_openvino_gives_the_probabilities_alone_of_a_network_with_swish(tmp_path: Path) -> None:
    """Keras 3.15 exports each swish as an output too, which halves the speed of B0 to B7."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, activation="swish")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    forward = load("openvino", model, tmp_path)
    images = noise(3)
    np.testing.assert_allclose(forward(images), model(images, training=False), atol=1e-6)
    network = openvino_core().read_model(tmp_path / OPENVINO_FILE)
    assert len(network.outputs) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.bin",
        MODEL_FILE,
        "model.xml",
    ]


@pytest.mark.parametrize(
    ("asked", "num_gpus", "installed", "chosen"),
    [
        ("auto", 0, True, "openvino"),
        ("auto", 0, False, "tensorflow"),
        ("auto", 1, True, "tensorflow"),
        ("tensorflow", 0, True, "tensorflow"),
        ("openvino", 1, True, "openvino"),
    ],
)
def test_features_are_computed_by_what_is_fastest_here(
    asked: str, num_gpus: int, installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec("numpy") if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert choose_runtime(asked, num_gpus) == chosen


def test_a_runtime_that_is_not_installed_is_named() -> None:
    """In a process of its own: here it is loaded already."""
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from har.inference.runtimes import RUNTIMES\n"
        "RUNTIMES['tensorflow'].check()\n"
        "try: RUNTIMES['openvino'].check()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(UserError.__name__)
    assert "pip install openvino" in done.stdout


def test_openvino_does_not_report_its_use() -> None:
    code = (
        "import sys; from har.inference.runtimes import import_openvino; import_openvino()\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_option_names_every_runtime() -> None:
    (option,) = (each for each in main.commands["run"].params if each.name == "runtime")
    assert list(option.type.choices) == [AUTO, *RUNTIMES]


def test_ctrl_c_after_openvinos_networks_are_gone(model: keras.Model, tmp_path: Path) -> None:
    """In a process of its own, which a segmentation fault would end."""
    load("openvino", model, tmp_path)
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from har.inference.runtimes import RUNTIMES\n"
        "networks = [RUNTIMES['openvino'].load(Path(sys.argv[1])) for _ in range(2)]\n"
        "while networks: networks.pop(0)\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: print('caught')"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "caught"


FIRST_ARRAYS = """
import sys, threading
import numpy as np
from har.inference.runtimes import _compile_openvino, import_openvino
openvino = import_openvino()
from openvino import opset13
x = opset13.parameter([-1, 4], np.float32)
network = openvino.Model([opset13.relu(x)], [x])
compiled = _compile_openvino(network, {}, batch_size=4, parallel=4)
start = threading.Barrier(4)
def work():
    start.wait()
    compiled.run(np.zeros((2, 4), np.float32))
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
"""


def test_the_first_arrays_of_several_threads_do_not_stop_openvino() -> None:
    """Without the care taken in `openvino_core`, three of four such processes hang."""
    pytest.importorskip("openvino")
    for _ in range(4):
        subprocess.run([sys.executable, "-c", FIRST_ARRAYS], check=True, timeout=60)


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
    monkeypatch.setattr(runtimes, "has_gpu", lambda: gpu)
    monkeypatch.setattr(runtimes, "has_bfloat16", lambda: bfloat16)
    assert choose_arithmetic("tensorflow", precision, exact) == arithmetic


def run_many(compiled: Compiled, images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The images in batches, as features are computed."""
    found = np.zeros((len(images), *shape), np.float32)
    size = compiled.batch_size

    def sink(start: int, outputs: np.ndarray) -> None:
        found[start : start + len(outputs)] = outputs

    starts = range(0, len(images), size)
    run_batches(compiled, ((at, images[at : at + size]) for at in starts), sink)
    return found


def floats(count: int) -> np.ndarray:
    return noise(count).astype(np.float32)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_gpus_precision_is_computed_by_keras_policy(
    precision: str, network: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU here: that the weights are carried over, and the precision is as asked for."""
    monkeypatch.setattr(runtimes, "has_gpu", lambda: True)
    runtime, arithmetic = RUNTIMES["tensorflow"], precision.removeprefix("mixed_")
    compiled = runtime.compile(runtime.convert(network), arithmetic)
    assert compiled.run(floats(2)).dtype.name == arithmetic
    wanted = np.asarray(network(floats(6), training=False))
    found = run_many(compiled, floats(6), (8,))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())
    assert {layer.dtype_policy.name for layer in network.layers} == {"float32"}


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU computes no bfloat16 by itself")
@pytest.mark.parametrize("name", RUNTIMES)
def test_one_network_is_computed_in_either_arithmetic_in_turn(
    name: str, network: keras.Model
) -> None:
    runtime, wanted = RUNTIMES[name], np.asarray(network(floats(40), training=False))
    converted = runtime.convert(network)
    for arithmetic in ("float32", "bfloat16", "float32"):
        found = run_many(runtime.compile(converted, arithmetic), floats(40), (8,))
        distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        if arithmetic == "float32":
            assert distance <= 1e-5
        else:
            assert 1e-4 < distance < 0.1


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_networks_first_layers_are_computed_too(name: str, network: keras.Model) -> None:
    first = keras.Model(network.input, network.layers[-2].output)
    runtime, wanted = RUNTIMES[name], np.asarray(first(floats(10), training=False))
    assert wanted.ndim == 4
    found = run_many(
        runtime.compile(runtime.convert(first), "float32"), floats(10), wanted.shape[1:]
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_an_error_in_one_batch_ends_all() -> None:
    def run(images: np.ndarray) -> np.ndarray:
        if images[0] == 3:
            raise RuntimeError("the third")
        return images

    batches = ((at, np.array([at])) for at in range(100))
    with pytest.raises(RuntimeError, match="the third"):
        run_batches(Compiled(run=run, parallel=3), batches, lambda *_: None)


@pytest.mark.parametrize("wrong", [0.0, np.nan, 3.0])
def test_a_network_that_disagrees_with_keras_is_refused(wrong: float) -> None:
    compiled = Compiled(run=lambda images: np.full((len(images), 8), wrong, np.float32))
    message = r"runtime openvino \(bfloat16\) differs from Keras by .* try --runtime tensorflow"
    with pytest.raises(UserError, match=message):
        check_compiled(
            compiled,
            floats(2),
            np.ones((2, 8), np.float32),
            runtime="openvino",
            arithmetic="bfloat16",
        )
