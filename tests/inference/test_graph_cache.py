"""Graphs of served models on disk: the same numbers without Keras, and nothing but arithmetic."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from har.inference import graph_cache
from har.inference.freezing import FrozenGraph, freeze, trace
from har.inference.graph_cache import clear_graphs, find_graph, find_key, graphs_folder, keep_graph
from har.inference.runtimes import MODEL_FILE, MOST_CONSTANTS, load_tensorflow
from har.models.build import build_model
from har.models.merging import fold_batch_norms
from har.recipe import NATIVE_SIZES, PATCH_SIZES
from tests.fixtures import tiny_recipe


@pytest.fixture
def file(tiny_backbone: None, tmp_path: Path) -> Path:
    """A classifier's Keras file."""
    build_model(tiny_recipe(), 3).save(tmp_path / MODEL_FILE)
    return tmp_path / MODEL_FILE


@pytest.fixture
def no_keras(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the reading of Keras files fail from now on."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("Keras read the file")

    return lambda: monkeypatch.setattr(keras.models, "load_model", refuse)


def noise(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def kept() -> list[Path]:
    return list(graphs_folder().glob("*.graph"))


def test_a_graph_gives_the_numbers_of_its_file(file: Path, no_keras: Callable[[], None]) -> None:
    first = load_tensorflow(file.parent)(noise())
    assert len(kept()) == 1
    no_keras()
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), first)


def test_a_process_with_a_graph_does_without_keras(file: Path) -> None:
    expected = load_tensorflow(file.parent)(noise(1))
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from har.inference.runtimes import load_tensorflow\n"
        "forward = load_tensorflow(Path('.'))\n"
        "np.save('found', forward(np.load('in.npy')))\n"
        "print('keras' in sys.modules)\n"
        "import keras, tensorflow; print(tensorflow.keras.__name__)"
    )
    np.save(file.parent / "in", noise(1))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=file.parent)
    assert done.stdout.split() == ["False", "keras._tf_keras.keras"]
    np.testing.assert_allclose(np.load(file.parent / "found.npy"), expected, rtol=0, atol=1e-6)


def test_another_file_has_another_graph(file: Path, no_keras: Callable[[], None]) -> None:
    before = load_tensorflow(file.parent)(noise())
    model = keras.models.load_model(file)
    model.layers[-1].bias.assign([3.0, 0.0, 0.0])
    model.save(file)
    after = load_tensorflow(file.parent)(noise())
    assert len(kept()) == 2 and np.abs(after - before).max() > 0.1
    clear_graphs()
    assert kept() == []
    no_keras()
    with pytest.raises(AssertionError, match="Keras read the file"):
        load_tensorflow(file.parent)


def a_graph(build: Callable[[Any], Any], size: int = 32) -> FrozenGraph:
    """A graph of `build`, of a batch of images."""
    images = tf.TensorSpec((None, size, size, 3), tf.uint8)
    traced = tf.function(build, input_signature=[images]).get_concrete_function()
    return FrozenGraph(
        graph_def=traced.graph.as_graph_def(),
        input=traced.inputs[0].op.name,
        output=traced.outputs[0].name,
        signature=(images,),
    )


def pack(graph: FrozenGraph, **facts: Any) -> bytes:
    body = graph.graph_def.SerializeToString()
    named = {"input": graph.input, "output": graph.output, "size": 32, "dtype": "uint8"}
    named |= {"sha256": hashlib.sha256(body).hexdigest(), **facts}
    return json.dumps(named).encode() + b"\n" + body


def reading(images: Any) -> Any:
    return tf.io.decode_raw(tf.io.read_file("/etc/passwd"), tf.uint8), images


def writing(images: Any) -> Any:
    tf.io.write_file("/tmp/har-test-was-here", "x")
    return tf.identity(images)


def calling(images: Any) -> Any:
    return tf.numpy_function(lambda x: x, [images], tf.uint8)


def branching(images: Any) -> Any:
    return tf.cond(tf.size(images) > 0, lambda: images, lambda: images + 1)


@pytest.mark.parametrize("build", [reading, writing, calling, branching])
def test_only_arithmetic_is_kept_and_read(
    build: Callable[[Any], Any], file: Path, no_keras: Callable[[], None]
) -> None:
    graph = a_graph(build)
    keep_graph(find_key(file), graph)
    assert kept() == []
    # the same, put there by somebody else
    expected = load_tensorflow(file.parent)(noise())
    (there,) = kept()
    there.write_bytes(pack(graph))
    assert find_graph(find_key(file)) is None
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)
    assert not Path("/tmp/har-test-was-here").exists()
    # which mended it
    no_keras()
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)


def huge_constant() -> bytes:
    graph = a_graph(lambda images: tf.cast(images, tf.float32) + tf.constant([1.0]))
    for node in graph.graph_def.node:
        if node.op == "Const":
            for _ in range(3):
                node.attr["value"].tensor.tensor_shape.dim.add(size=100_000)
    return pack(graph)


def plain() -> FrozenGraph:
    return a_graph(lambda images: tf.cast(images, tf.float32) * 2.0)


DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no JSON": lambda: b"\xff\n" + plain().graph_def.SerializeToString(),
    "another JSON": lambda: b"[]\n",
    "cut": lambda: pack(plain())[:-20],
    "noise": lambda: pack(plain())[:60] + os.urandom(2000),
    "no graph": lambda: pack(plain()).partition(b"\n")[0],
    "a size of text": lambda: pack(plain(), size="32"),
    "a size of a million": lambda: pack(plain(), size=1_000_000),
    "another type": lambda: pack(plain(), dtype="string"),
    "a huge constant": huge_constant,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_graph_is_built_anew(name: str, file: Path, no_keras: Callable[[], None]) -> None:
    expected = load_tensorflow(file.parent)(noise())
    (there,) = kept()
    there.write_bytes(DAMAGED[name]())
    assert find_graph(find_key(file)) is None
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)
    no_keras()
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)


def test_the_newest_are_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 2)
    for age, key in enumerate("abc"):
        keep_graph(key, plain())
        os.utime(graph_cache._file_of(key), (age, age))
    # the use of one makes it new
    assert [find_graph(key) is not None for key in "abc"] == [False, True, True]
    os.utime(graph_cache._file_of("c"), (1, 1))
    # left by a process that was killed, and one that is being written
    for name, age in ((".x.graph.1", 0), (".y.graph.2", time.time())):
        (graphs_folder() / name).write_bytes(b"cut")
        os.utime(graphs_folder() / name, (age, age))
    keep_graph("d", plain())
    assert [find_graph(key) is not None for key in "abc"] == [False, True, False]
    assert [each.name for each in graphs_folder().glob(".*")] == [".y.graph.2"]
    clear_graphs()
    assert not list(graphs_folder().iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_tensorflow(file.parent)(noise())
    monkeypatch.setenv("HAR_CACHE", "/proc/nowhere")
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)


def test_a_file_that_is_replaced_meanwhile_keeps_no_graph(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model, new = keras.models.load_model, build_model(tiny_recipe(), 3)
    new.layers[-1].bias.assign([3.0, 0.0, 0.0])

    def load_then_replace(path: Path, **options: Any) -> Any:
        model = load_model(path, **options)
        new.save(file)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(keras.models, "load_model", load_then_replace)
        before = load_tensorflow(file.parent)(noise())
    assert np.abs(load_tensorflow(file.parent)(noise()) - before).max() > 0.1


def test_a_user_without_a_home_is_served(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_tensorflow(file.parent)(noise())

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for variable in ("HAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)


def test_a_cache_that_is_read_alone(
    file: Path, no_keras: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_tensorflow(file.parent)(noise())

    def refuse(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    no_keras()
    np.testing.assert_array_equal(load_tensorflow(file.parent)(noise()), expected)


SMALL = [
    pytest.param(name, marks=[] if name == "mobilenetv3-large" else pytest.mark.slow)
    for name in ("efficientnet-lite0", "efficientnetb0", *NATIVE_SIZES)
]


@pytest.mark.parametrize("name", SMALL)
def test_the_graphs_of_all_small_networks_are_arithmetic(name: str) -> None:
    size = 70 if PATCH_SIZES.get(name) == 14 else 64
    recipe = tiny_recipe("v6", backbone=name, image_size=size, weights="random", test_time="mirror")
    model = build_model(recipe, 3)
    if model.count_params() > MOST_CONSTANTS:
        pytest.skip("too large to be a graph of constants")
    keep_graph(name, freeze(trace(fold_batch_norms(model), "uint8")))
    assert find_graph(name) is not None
