"""What hardware is here, and what of a recipe it can run."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import psutil
import tensorflow as tf

from har.models.backbones import BACKBONES
from har.recipe import Recipe
from har.util.hardware import available_cpus, cpu_name


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The devices that TensorFlow can use here, and what carries them."""

    gpu_names: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    driver: str
    cpu: str
    cpu_count: int
    memory_gb: float

    @property
    def gpu_type(self) -> str:
        """`P100`, `T4`, ...; `none` without a GPU."""
        return "+".join(dict.fromkeys(short_name(name) for name in self.gpu_names)) or "none"

    @property
    def num_gpus(self) -> int:
        """How many GPUs TensorFlow sees."""
        return len(self.gpu_names)


def short_name(gpu_name: str) -> str:
    """`Tesla P100-PCIE-16GB` to `P100`, `NVIDIA GeForce RTX 4090` to `RTX4090`."""
    words = re.sub(r"\b(NVIDIA|Tesla|GeForce|Quadro|Graphics|Device)\b", " ", gpu_name)
    words = re.sub(r"[- ](PCIE|PCIe|SXM\d?|HBM\w*|\d+ ?GB).*", " ", words)
    return "".join(words.split()) or "GPU"


def format_hardware(hardware: Hardware, replicas: int) -> str:
    """Count x kind of the devices a run used, as `1xP100`, `2xT4`, `1xCPU`."""
    names = [short_name(name) for name in hardware.gpu_names[:replicas]] or ["CPU"] * replicas
    return "+".join(f"{count}x{name}" for name, count in Counter(names).items())


def _list_gpus() -> list[Any]:
    """The GPUs that TensorFlow sees."""
    return list(tf.config.list_physical_devices("GPU"))


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(_list_gpus())


def find_hardware() -> Hardware:
    """Ask TensorFlow and the operating system."""
    gpus = _list_gpus()
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    capabilities = [d.get("compute_capability", ()) for d in details]
    return Hardware(
        gpu_names=tuple(d.get("device_name", "GPU") for d in details),
        compute_capabilities=tuple(".".join(map(str, c)) or "unknown" for c in capabilities),
        driver=_nvidia_driver() or "none",
        cpu=cpu_name(),
        cpu_count=available_cpus(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
    )


def _nvidia_driver() -> str | None:
    """The NVIDIA driver's version where one with at least one GPU is loaded, else None."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion()) if pynvml.nvmlDeviceGetCount() else None
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def fit_to_hardware(
    recipe: Recipe, overridden: Collection[str], hardware: Hardware
) -> tuple[Recipe, list[str]]:
    """The recipe that can run here, and one line of warning if a fallback replaces a setting.

    `overridden` are the fields the user set: those are obeyed whatever they cost.
    """
    if hardware.num_gpus:
        return recipe, []
    instead: dict[str, Any] = {}
    # a weights file belongs to the backbone it was made for
    chosen = "backbone" in overridden or recipe.weights not in ("imagenet", "random")
    if (fallback := BACKBONES[recipe.backbone].cpu_fallback) and not chosen:
        instead["backbone"] = fallback
    if recipe.precision != "float32" and "precision" not in overridden:
        instead["precision"] = "float32"
    if not instead:
        return recipe, []
    given = [f"{name} {value}" for name, value in instead.items()]
    asked = [f"--{name} {getattr(recipe, name)}" for name in instead]
    warning = f"no GPU: using {' and '.join(given)} (to insist: {' '.join(asked)})"
    return replace(recipe, **instead), [warning]


def describe_unused_gpu(hardware: Hardware) -> list[str]:
    """A line that says what to install where a GPU's driver is there but TensorFlow's CUDA
    libraries are not.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hardware.num_gpus or hardware.driver == "none" or hidden:
        return []
    return [
        f"NVIDIA driver {hardware.driver} is loaded, but TensorFlow sees no GPU: install its"
        " CUDA libraries with  pip install 'tensorflow[and-cuda]'"
    ]


def make_deterministic() -> None:
    """Where there is no GPU, have TensorFlow refuse operations that could give other numbers
    the next time. On a GPU that would cost much speed, and is left as it is.
    """
    if not has_gpu():
        tf.config.experimental.enable_op_determinism()


def build_one_device() -> Any:
    """TensorFlow's default: the first GPU, else the CPU."""
    return tf.distribute.get_strategy()


@functools.cache
def build_mirrored() -> Any:
    """One replica for every visible GPU; without one, for every logical CPU device.

    Built once a process: two strategies would number their all-reduces alike, and TensorFlow
    would mix the gradients of one model with those of the other.
    """
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


STRATEGIES: dict[str, Callable[[], Any]] = {
    "one_device": build_one_device,
    "mirrored": build_mirrored,
}


@contextmanager
def precision_policy(precision: str) -> Iterator[None]:
    """Keras' global dtype policy while a model is built."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
