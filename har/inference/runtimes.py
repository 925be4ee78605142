"""Runtimes compute a network's forward pass: TensorFlow, or OpenVINO where it is installed.

RUNTIMES is the one list of them, for features and for serving. In float32 all give the numbers
that Keras gives. A framework is imported when it is used.
"""

import importlib.util
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from har.util.errors import UserError
from har.util.garbage import collect_garbage_later
from har.util.hardware import available_cpus, has_bfloat16

# The trained network in Keras' own format: every classifier's folder has it.
MODEL_FILE = "model.keras"
OPENVINO_FILE = "model.xml"
OPENVINO_WEIGHTS = "model.bin"
# The value of --runtime that serves with TensorFlow, and computes features by the fastest runtime.
AUTO = "auto"
# A served batch is padded to one of these sizes, since a runtime prepares for each new shape.
BUCKETS = (1, 2, 4, 8, 16, 32)
BATCH_SIZE = BUCKETS[-1]
# Weights as constants of a graph are up to a fifth faster (B0, one image), but each compilation
# holds several copies of them: for B7 (64 million) 1.6 GB, to gain a twentieth.
MOST_CONSTANTS = 25_000_000
# OpenVINO's buffers for two images a core stay in the processor's caches: on two cores that serves
# a seventh more images a second than batches of 32.
IMAGES_PER_CORE = 2
# The largest relative distance of a runtime's output from Keras' own, by arithmetic. bfloat16's
# rounding alone moves Lite0's features of eight images by up to 0.05 on photographs and 0.13 on the
# sample's drawings, in both runtimes alike. An output of zeros is at 1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}
_STARTING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A network ready to run.

    `run` maps a (batch, ...) array of images to a (batch, ...) array that the caller may keep; any
    number of threads may call it. Over many images it is fastest with `parallel` threads and
    batches of `batch_size`. Call it within `running()`.
    """

    run: Callable[[Any], Any]
    batch_size: int = BATCH_SIZE
    parallel: int = 1
    running: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Maps (images, size, size, 3) uint8, one image or more, to (images, classes) float32
    probabilities.

    `run` is called with batches of the sizes in `buckets` alone, from any number of threads.
    """

    run: Callable[[Any], Any]
    buckets: tuple[int, ...] = BUCKETS

    def __call__(self, images: Any) -> npt.NDArray[np.float32]:
        """Run one bucket after the other."""
        most = self.buckets[-1]
        parts = [self._pad(images[start : start + most]) for start in range(0, len(images), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pad(self, images: Any) -> npt.NDArray[np.float32]:
        count = len(images)
        bucket = next(each for each in self.buckets if each >= count)
        if bucket > count:
            padded = np.zeros((bucket, *images.shape[1:]), np.uint8)
            padded[:count] = images
            images = padded
        return np.asarray(self.run(images))[:count]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model in two: the backbone as the runtime converted it before, and Keras' head."""

    backbone: Any
    head: Any


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One way to compute a forward pass.

    `convert` turns a Keras network into the runtime's own form; `compile` makes that ready for many
    images in float32, bfloat16 or float16. `save` writes what serving needs beside MODEL_FILE, and
    converts only the head where it gets the parts; `load` reads it, in float32. `files` are the
    names of what `save` writes. `check` raises a UserError if the runtime is not installed;
    `packages` are what a server needs for it.
    """

    convert: Callable[[Any], Any]
    compile: Callable[[Any, str], Compiled]
    save: Callable[[Any, Path, Parts | None], None]
    load: Callable[[Path], Forward]
    check: Callable[[], Any] = lambda: None
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def choose_runtime(asked: str, num_gpus: int) -> str:
    """Choose what computes features: for `auto`, OpenVINO on a CPU where it is installed."""
    if asked == AUTO:
        on_cpu = not num_gpus and importlib.util.find_spec("openvino") is not None
        return "openvino" if on_cpu else "tensorflow"
    RUNTIMES[asked].check()
    return asked


def has_gpu() -> bool:
    """Return whether TensorFlow sees a GPU."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def choose_arithmetic(runtime: str, precision: str, exact: bool) -> str:
    """Choose float32 if `exact`; else the recipe's precision on a GPU, bfloat16 on a CPU that
    computes it, which halves the time and costs a hundredth of precision.
    """
    if exact:
        return "float32"
    if runtime == "tensorflow" and has_gpu():
        return precision.removeprefix("mixed_")
    return "bfloat16" if has_bfloat16() else "float32"


def run_batches(
    compiled: Compiled,
    batches: Iterable[tuple[int, Any]],
    sink: Callable[[int, npt.NDArray[Any]], None],
) -> None:
    """Run (first row, images) batches in `compiled.parallel` threads.

    `sink` gets (first row, outputs), in any order, from one thread at a time. All threads have
    ended afterwards.
    """
    iterator, reading, writing = iter(batches), threading.Lock(), threading.Lock()

    def work() -> None:
        while True:
            with reading:
                batch = next(iterator, None)
            if batch is None:
                return
            outputs = compiled.run(batch[1])
            with writing:
                sink(batch[0], outputs)

    with compiled.running(), ThreadPoolExecutor(compiled.parallel) as pool:
        working = [pool.submit(work) for _ in range(compiled.parallel)]
    for each in working:
        each.result()


def check_compiled(
    compiled: Compiled,
    images: Any,
    expected: npt.NDArray[np.float32],
    *,
    runtime: str,
    arithmetic: str,
) -> None:
    """Raise a UserError unless the network gives about `expected`, which Keras computed in
    float32.
    """
    with compiled.running():
        found = np.asarray(compiled.run(images), np.float32)
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not distance <= (allowed := TOLERANCE[arithmetic]):
        other = "tensorflow" if runtime == "openvino" else "openvino"
        raise UserError(
            f"runtime {runtime} ({arithmetic}) differs from Keras by {distance:.3g} of the"
            f" features' length, more than {allowed:g}: try --runtime {other} or --loader stream"
        )


@contextmanager
def hide_modules(*names: str) -> Iterator[None]:
    """Make the import of these modules fail during the block, unless they were imported before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def load_tensorflow(folder: Path) -> Forward:
    """Load a classifier's Keras model, or the graph that was built from it before."""
    with collect_garbage_later():
        # TensorFlow imports Keras, which takes as long again: a graph does without
        with hide_modules("keras"):
            from har.inference.freezing import compile_frozen, compute_float32_in_full
            from har.inference.graph_cache import find_graph, find_key

        compute_float32_in_full()
        key = find_key(folder / MODEL_FILE)
        if graph := find_graph(key):
            return Forward(run=compile_frozen(graph))
        return Forward(run=_build_served(folder / MODEL_FILE, key))


def _build_served(file: Path, key: str) -> Any:
    """Build a Keras file's function, and keep its graph; Keras' safe mode runs no code from it."""
    # Keras imports both where they are installed, for functions that nothing here calls: a second
    # of CPU time and 80 MB
    with hide_modules("matplotlib", "sklearn"):
        import keras

    # makes the layers of transformers known to Keras
    import har.models.vision_transformer  # noqa: F401
    from har.inference.graph_cache import keep_graph

    model = keras.models.load_model(file, compile=False)
    return build_function(model, "uint8", keep=partial(keep_graph, key))


def build_function(
    network: Any,
    dtype: str,
    policy: str = "float32",
    keep: Callable[[Any], None] = lambda graph: None,
) -> Any:
    """Build a TensorFlow function from images of `dtype`, for running a network often, under one
    of Keras' dtype policies. `keep` gets its graph, unless that is large.
    """
    from har.inference.freezing import compile_frozen, freeze, trace
    from har.models.merging import fold_batch_norms

    traced = trace(fold_batch_norms(network, policy), dtype)
    if network.count_params() > MOST_CONSTANTS:
        return traced
    keep(graph := freeze(traced))
    return compile_frozen(graph)


def convert_to_tensorflow(network: Any) -> Any:
    """Return what builds the network's function under a Keras policy, once for each policy."""
    return cache(lambda policy: build_function(network, "float32", policy))


def compile_tensorflow(converted: Any, arithmetic: str) -> Compiled:
    """Compile by Keras' policies on a GPU; on a CPU one graph serves both arithmetics, and oneDNN
    rewrites it to bfloat16.
    """
    rewrite = arithmetic == "bfloat16" and not has_gpu()
    function = converted("float32" if rewrite or arithmetic == "float32" else f"mixed_{arithmetic}")
    return Compiled(
        run=lambda images: function(images).numpy(),
        # on a CPU one batch's small steps fill what another's leave idle
        parallel=1 if has_gpu() else 2,
        # at every use: without the option a function that was rewritten runs as it was
        running=lambda: _onednn_bfloat16(rewrite),
    )


@contextmanager
def _onednn_bfloat16(wanted: bool) -> Iterator[None]:
    import tensorflow as tf

    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: wanted})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report every import to its makers."""
    try:
        with hide_modules("openvino_telemetry"):
            import openvino
            import openvino.tools.ovc
    except ImportError as error:
        raise UserError(
            "runtime openvino needs OpenVINO: pip install openvino, or --runtime tensorflow"
        ) from error
    return openvino


def openvino_core() -> Any:
    """Return the process' only OpenVINO core, which lives until the process ends.

    A core gives the thread that uses it first a signal stack, and takes that stack's memory back
    with itself. Where two cores overlap, or one ends in another thread, the thread is left without:
    the next Ctrl-C is a segmentation fault (2026.4).
    """
    with _STARTING:
        return _start_openvino()


@cache
def _start_openvino() -> Any:
    openvino = import_openvino()
    # The first arrays that two threads hand over at once stop both for ever (2026.4): one waits for
    # Python's lock, whose holder waits for the table of types that the first one is building.
    tensor = openvino.Tensor(np.zeros(1, np.float32))
    assert tensor.data.dtype == np.float32
    return openvino.Core()


def convert_to_openvino(network: Any) -> Any:
    """Convert a Keras network; it takes float32 images.

    Through a file: OpenVINO reads a frozen graph in a fifth of the time that its walk through
    TensorFlow's objects in Python takes (2026.4, EfficientNetB7).
    """
    openvino = import_openvino()
    from har.inference.freezing import freeze, trace

    frozen = freeze(trace(network, "float32"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frozen.pb"
        file.write_bytes(frozen.graph_def.SerializeToString())
        converted = openvino_core().read_model(file)
    # Keras 3.15 exports each swish as one more output, which halves the speed.
    return openvino.Model([converted.output(frozen.output)], converted.get_parameters())


def compile_openvino(converted: Any, arithmetic: str) -> Compiled:
    """Compile for throughput: several small batches at once."""
    return _compile_openvino(
        converted,
        {
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[arithmetic],
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(available_cpus()),
        },
        # small batches stay in the processor's caches: by four, EfficientNetB7 is 4 % faster than
        # by eight in bfloat16, a tenth in float32
        batch_size=4,
        # one thread more than streams: no stream waits for Python to hand it images
        parallel=available_cpus() + 1,
    )


def _compile_openvino(
    source: Any, options: dict[str, str], batch_size: int, parallel: int
) -> Compiled:
    """Compile a network or a file, with one inference request for each of `parallel` threads.

    Not OpenVINO's own queue of requests: that calls Python from OpenVINO's threads, and where the
    last such call is still returning while the network is freed, both wait for each other for ever
    (2026.4).
    """
    compiled = openvino_core().compile_model(source, "CPU", options)
    # a request computes for one caller at a time
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(parallel):
        requests.put(compiled.create_infer_request())

    def run(images: Any) -> npt.NDArray[Any]:
        request = requests.get()
        try:
            inputs = [np.asarray(images)]
            (found,) = request.infer(inputs, share_inputs=True, share_outputs=True).values()
            return np.array(found)
        finally:
            requests.put(request)

    return Compiled(run=run, batch_size=batch_size, parallel=parallel)


def _join_openvino(backbone: Any, head: Any) -> Any:
    """Join both into one network of OpenVINO's; `head` is used up."""
    backbone = backbone.clone()
    (features,), (inputs,) = backbone.outputs, head.get_parameters()
    inputs.output(0).replace(features.get_node().input_value(0))
    return import_openvino().Model(head.get_results(), backbone.get_parameters())


def save_openvino(model: Any, folder: Path, parts: Parts | None) -> None:
    """Write OPENVINO_FILE and its weights, a .bin beside it; the network takes uint8 images."""
    openvino = import_openvino()
    converted = convert_to_openvino(parts.head if parts else model)
    if parts:
        converted = _join_openvino(parts.backbone, converted)
    images = openvino.preprocess.PrePostProcessor(converted)
    images.input().tensor().set_element_type(openvino.Type.u8)
    openvino.save_model(images.build(), folder / OPENVINO_FILE, compress_to_fp16=False)


def load_openvino(folder: Path) -> Forward:
    """Load what `save_openvino` wrote, compiled for short answers on this machine's CPU."""
    # where the CPU has bfloat16, OpenVINO would use it: three digits, other answers
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    most = IMAGES_PER_CORE * available_cpus()
    # one request, since each computes with every core
    compiled = _compile_openvino(folder / OPENVINO_FILE, options, batch_size=most, parallel=1)
    return Forward(run=compiled.run, buckets=tuple(each for each in BUCKETS if each <= most))


RUNTIMES: dict[str, Runtime] = {
    "tensorflow": Runtime(
        convert=convert_to_tensorflow,
        compile=compile_tensorflow,
        save=lambda model, folder, parts: None,
        load=load_tensorflow,
    ),
    "openvino": Runtime(
        convert=convert_to_openvino,
        compile=compile_openvino,
        save=save_openvino,
        load=load_openvino,
        check=import_openvino,
        packages=("openvino",),
        files=(OPENVINO_FILE, OPENVINO_WEIGHTS),
    ),
}
