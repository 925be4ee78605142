"""What computes a network's forward pass: TensorFlow, or OpenVINO where it is installed.

Both run the same Keras model in float32 and take any number of images up to BATCH_SIZE, in few
shapes. A framework is imported when it is used.
"""

import importlib.util
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from har.util.errors import UserError
from har.util.hardware import available_cpus

# The trained network in Keras' own format: every classifier's folder has it.
MODEL_FILE = "model.keras"
OPENVINO_FILE = "model.xml"
# As an option: what serves is TensorFlow then, and features are computed by what is fastest here.
AUTO = "auto"
# A batch is filled up to one of these: few shapes, for each of which a runtime prepares once.
BUCKETS = (1, 2, 4, 8, 16, 32)
BATCH_SIZE = BUCKETS[-1]
# Weights as constants of a graph are up to a fifth faster (B0, one image), but each compilation
# holds several copies of them: for B7 (64 million) 1.6 GB, to gain a twentieth.
MOST_CONSTANTS = 25_000_000
# OpenVINO's buffers for so few images stay in a processor's caches: a seventh faster than 32 at
# once on two cores.
IMAGES_A_CORE = 2


@dataclass(frozen=True, kw_only=True)
class Forward:
    """(images, size, size, 3) uint8, one or more, to (images, classes) float32 probabilities.
    `compiled` is run in the shapes of `buckets`, by any number of threads at once; what is more
    than the largest is run in parts.
    """

    compiled: Callable[[Any], Any]
    buckets: tuple[int, ...] = BUCKETS

    def __call__(self, images: Any) -> npt.NDArray[np.float32]:
        """The parts one after the other."""
        most = self.buckets[-1]
        parts = [self.run(images[start : start + most]) for start in range(0, len(images), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run(self, images: Any) -> npt.NDArray[np.float32]:
        """Filled up with black images to a bucket; their rows are dropped."""
        count = len(images)
        bucket = next(each for each in self.buckets if each >= count)
        if bucket > count:
            filled = np.zeros((bucket, *images.shape[1:]), np.uint8)
            filled[:count] = images
            images = filled
        return np.asarray(self.compiled(images))[:count]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model in two: the backbone as a runtime has converted it, and Keras' head behind it."""

    backbone: Any
    head: Any


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model gets into a folder for this runtime, beside MODEL_FILE, and out again.

    `save(model, folder, parts)` converts the head alone where it is given the parts; `check` raises
    a UserError if this is not installed; `packages` are what reading the model needs beside what
    every served model needs.
    """

    save: Callable[[Any, Path, Parts | None], None]
    load: Callable[[Path], Forward]
    check: Callable[[], Any] = lambda: None
    packages: tuple[str, ...] = ()


def choose_runtime(asked: str, num_gpus: int) -> str:
    """For features: OpenVINO on a CPU where it is installed, unless one was asked for.

    Raises:
        UserError: what was asked for is not installed.
    """
    if asked == AUTO:
        on_cpu = not num_gpus and importlib.util.find_spec("openvino") is not None
        return "openvino" if on_cpu else "tensorflow"
    RUNTIMES[asked].check()
    return asked


@contextmanager
def hide_modules(*names: str) -> Iterator[None]:
    """While this lasts, importing these fails, unless that was done before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def load_tensorflow(folder: Path) -> Forward:
    """The folder's network as a compiled function; Keras' safe mode runs no code from the file."""
    import keras

    from har.inference.freezing import compute_float32_in_full

    compute_float32_in_full()
    model = keras.models.load_model(folder / MODEL_FILE, compile=False)
    return Forward(compiled=compile_tensorflow(model, "uint8"))


def compile_tensorflow(model: Any, dtype: str) -> Any:
    """A network as a function of images of `dtype`, for running it often."""
    from har.inference.freezing import compile_frozen, fold_batch_norms, freeze, trace

    traced = trace(fold_batch_norms(model), dtype)
    return traced if model.count_params() > MOST_CONSTANTS else compile_frozen(freeze(traced))


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would report every import to its makers.

    Raises:
        UserError: it is not installed.
    """
    try:
        with hide_modules("openvino_telemetry"):
            import openvino
            import openvino.tools.ovc
    except ImportError as error:
        raise UserError(
            "runtime openvino needs OpenVINO: pip install openvino, or --runtime tensorflow"
        ) from error
    return openvino


@cache
def openvino_core() -> Any:
    """OpenVINO, one for the whole process and to its end.

    Each gives the thread that uses it first a signal stack, and takes that stack's memory back with
    itself. Where two overlap, or one ends in another thread, the thread is left without: the next
    Ctrl-C is a segmentation fault (2026.4).
    """
    return import_openvino().Core()


def convert_to_openvino(traced: Any) -> Any:
    """A traced network as one of OpenVINO's.

    By a file: OpenVINO reads a frozen graph in a fifth of the time that its walk through
    TensorFlow's objects in Python takes (2026.4, EfficientNetB7).
    """
    openvino = import_openvino()
    from har.inference.freezing import freeze

    frozen = freeze(traced)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frozen.pb"
        file.write_bytes(frozen.graph_def.SerializeToString())
        network = openvino_core().read_model(file)
    # Each swish is one more output otherwise: half the speed for what nobody reads (Keras 3.15).
    return openvino.Model([network.output(frozen.output)], network.get_parameters())


def _join_openvino(backbone: Any, head: Any) -> Any:
    """Both as one network of OpenVINO's; `head` is used up."""
    backbone = backbone.clone()
    (features,), (inputs,) = backbone.outputs, head.get_parameters()
    inputs.output(0).replace(features.get_node().input_value(0))
    return import_openvino().Model(head.get_results(), backbone.get_parameters())


def save_openvino(model: Any, folder: Path, parts: Parts | None) -> None:
    """OPENVINO_FILE and its weights, a .bin beside it; uint8 images go in."""
    openvino = import_openvino()
    from har.inference.freezing import trace

    network = convert_to_openvino(trace(parts.head if parts else model, "float32"))
    if parts:
        network = _join_openvino(parts.backbone, network)
    images = openvino.preprocess.PrePostProcessor(network)
    images.input().tensor().set_element_type(openvino.Type.u8)
    openvino.save_model(images.build(), folder / OPENVINO_FILE, compress_to_fp16=False)


def load_openvino(folder: Path) -> Forward:
    """What `save_openvino` wrote, compiled for this machine's CPU."""
    compiled = openvino_core().compile_model(
        folder / OPENVINO_FILE,
        "CPU",
        # Where the CPU has bfloat16 OpenVINO would use it: three digits, other answers.
        {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
    )
    request = compiled.create_infer_request()
    # A request computes for one caller at a time, with every core.
    lock = threading.Lock()
    most = IMAGES_A_CORE * available_cpus()

    def infer(images: Any) -> npt.NDArray[np.float32]:
        with lock:
            (found,) = request.infer([np.asarray(images)], share_inputs=True).values()
            return np.array(found)

    return Forward(compiled=infer, buckets=tuple(each for each in BUCKETS if each <= most))


RUNTIMES: dict[str, Runtime] = {
    "tensorflow": Runtime(save=lambda model, folder, parts: None, load=load_tensorflow),
    "openvino": Runtime(
        save=save_openvino, load=load_openvino, check=import_openvino, packages=("openvino",)
    ),
}
