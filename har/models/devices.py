"""The hardware of this machine, and the settings of a recipe that it can run."""

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
from har.util.errors import UserError, first_line
from har.util.hardware import available_cpus, cpu_name

# An environment variable: names of GPUs, separated by commas, to record runs under without having
# them. It is for trying how runs of several machines are compared.
PRETEND = "HAR_PRETEND_GPUS"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs that TensorFlow can use, their driver, the CPU, and the RAM; `pretended` if the GPUs
    are only said to be there, by PRETEND.
    """

    gpu_names: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    driver: str
    cpu: str
    cpu_count: int
    memory_gb: float
    pretended: bool = False

    @property
    def gpu_type(self) -> str:
        """`P100`, `T4`, ...; `none` without a GPU."""
        return "+".join(dict.fromkeys(short_name(name) for name in self.gpu_names)) or "none"

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that TensorFlow can use, or that are pretended."""
        return len(self.gpu_names)

    @property
    def is_cpu(self) -> bool:
        """Return whether the CPU does the work."""
        return self.pretended or not self.gpu_names


def short_name(gpu_name: str) -> str:
    """Shorten `Tesla P100-PCIE-16GB` to `P100`, `NVIDIA GeForce RTX 4090` to `RTX4090`."""
    words = re.sub(r"\b(NVIDIA|Tesla|GeForce|Quadro|Graphics|Device)\b", " ", gpu_name)
    words = re.sub(r"[- ](PCIE|PCIe|SXM\d?|HBM\w*|\d+ ?GB).*", " ", words)
    return "".join(words.split()) or "GPU"


def format_hardware(hardware: Hardware, replicas: int) -> str:
    """Format the devices that a run uses: `1xP100`, `2xT4`, `1xCPU`."""
    names = [short_name(name) for name in hardware.gpu_names[:replicas]] or ["CPU"] * replicas
    return "+".join(f"{count}x{name}" for name, count in Counter(names).items())


def find_hardware() -> Hardware:
    """Ask TensorFlow and the operating system for the hardware."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    capabilities = [d.get("compute_capability", ()) for d in details]
    pretended = [name.strip() for name in os.environ.get(PRETEND, "").split(",") if name.strip()]
    return Hardware(
        gpu_names=tuple(pretended or [d.get("device_name", "GPU") for d in details]),
        pretended=bool(pretended),
        compute_capabilities=tuple(".".join(map(str, c)) or "unknown" for c in capabilities),
        driver=_nvidia_driver() or "none",
        cpu=cpu_name(),
        cpu_count=available_cpus(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
    )


def _nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, if it is loaded and has a GPU."""
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
    """Replace settings that would take hours without a GPU by fallbacks; also return warnings.

    Fields in `overridden`, which the user gave, stay as they are.
    """
    if not hardware.is_cpu:
        return recipe, []
    fallbacks: dict[str, Any] = {}
    # a weights file fits only its own backbone
    chosen = "backbone" in overridden or recipe.weights not in ("imagenet", "random")
    if (cpu_fallback := BACKBONES[recipe.backbone].cpu_fallback) and not chosen:
        fallbacks["backbone"] = cpu_fallback
    if recipe.precision != "float32" and "precision" not in overridden:
        fallbacks["precision"] = "float32"
    if not fallbacks:
        return recipe, []
    used = " and ".join(f"{name} {value}" for name, value in fallbacks.items())
    insist = " ".join(f"--{name} {getattr(recipe, name)}" for name in fallbacks)
    return replace(recipe, **fallbacks), [f"no GPU: using {used} (to insist: {insist})"]


def check_gpus(hardware: Hardware) -> None:
    """Raise a UserError if TensorFlow sees a GPU but has no code for it: the first step would fail,
    after minutes of other work.
    """
    if hardware.is_cpu:
        return
    for gpu, name, capability in zip(
        tf.config.list_logical_devices("GPU"),
        hardware.gpu_names,
        hardware.compute_capabilities,
        strict=False,
    ):
        try:
            with tf.device(gpu.name):
                float(tf.reduce_sum(tf.matmul(tf.ones((8, 8)), tf.ones((8, 8)))))
        except tf.errors.OpError as error:
            raise UserError(
                f"TensorFlow {tf.__version__} sees the GPU {name} (compute capability {capability})"
                f" but cannot compute on it: {first_line(error)}; choose another GPU, or install"
                " the build that has code for 6.0 (P100) and newer,  pip install"
                " 'tensorflow[and-cuda]>=2.21,<2.22', or set CUDA_VISIBLE_DEVICES= to use the CPU"
            ) from error


def describe_unused_gpu(hardware: Hardware) -> list[str]:
    """Say what to install if there is a GPU and its driver, but no CUDA libraries; say that GPUs
    are pretended; else [].
    """
    if hardware.pretended:
        return [f"{PRETEND}: recorded as of {', '.join(hardware.gpu_names)}, computed by the CPU"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hardware.num_gpus or hardware.driver == "none" or hidden:
        return []
    return [
        f"NVIDIA driver {hardware.driver} is loaded, but TensorFlow finds no GPU: install the CUDA"
        " libraries with  pip install 'tensorflow[and-cuda]'"
    ]


def make_deterministic() -> None:
    """Make TensorFlow's operations repeatable on a CPU; on a GPU this would cost much speed."""
    if not tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()


def build_one_device() -> Any:
    """Return TensorFlow's default strategy: the first GPU, or the CPU."""
    return tf.distribute.get_strategy()


@functools.cache
def build_mirrored() -> Any:
    """Build one replica for each visible GPU, or for each logical CPU device without a GPU.

    There is one strategy in a process: two would give the same numbers to their all-reduces, and
    TensorFlow would mix the gradients of two models.
    """
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


STRATEGIES: dict[str, Callable[[], Any]] = {
    "one_device": build_one_device,
    "mirrored": build_mirrored,
}


@contextmanager
def precision_policy(precision: str) -> Iterator[None]:
    """Set Keras' global dtype policy during the block."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
