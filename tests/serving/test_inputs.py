"""What Python programs may give to `pyfunc.predict`."""

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from har.data.manifest import Manifest
from har.serving.inputs import to_table
from tests.fixtures import new_store, tracking_to
from tests.serving.test_pyfunc import log_tiny

buffer = io.BytesIO()
Image.new("RGB", (8, 8), (250, 5, 5)).save(buffer, "PNG")
PNG = buffer.getvalue()
TEXT = base64.b64encode(PNG).decode()

READ: dict[str, tuple[Any, int]] = {
    "bytes": (PNG, 1),
    "bytearray": (bytearray(PNG), 1),
    "memoryview": (memoryview(PNG), 1),
    "base64": (TEXT, 1),
    "np.fromfile": (np.frombuffer(PNG, np.uint8), 1),
    "list": ([PNG, bytearray(PNG)], 2),
    "tuple": ((PNG, PNG, PNG), 3),
    "list of base64": ([TEXT, TEXT], 2),
    "array of objects": (np.array([PNG, bytearray(PNG)], dtype=object), 2),
    "array of text": (np.array([TEXT, TEXT]), 2),
    "series without a name": (pd.Series([PNG, PNG]), 2),
    "series of another name": (pd.Series([PNG], name="picture"), 1),
    "series": (pd.Series([PNG], name="image"), 1),
    "table": (pd.DataFrame({"image": [PNG, PNG]}), 2),
    "table of bytearray": (pd.DataFrame({"image": [bytearray(PNG)]}), 1),
    "dict": ({"image": [PNG, PNG]}, 2),
    "records": ([{"image": PNG}, {"image": PNG}], 2),
    "nothing": ([], 0),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "pixels": (np.zeros((2, 8, 8, 3), np.uint8), r"ndarray of the shape \(2, 8, 8, 3\), uint8$"),
    "numbers": (np.zeros(3), r"ndarray of the shape \(3,\), float64$"),
    "PIL": (Image.new("RGB", (8, 8)), "received Image$"),
    "none": (None, "received NoneType$"),
    "other column": (pd.DataFrame({"file": [PNG]}), "a table with the columns file$"),
    "other key": ({"images": [PNG]}, "a table with the columns images$"),
    "no column": (pd.DataFrame(), r"a table with the columns \(none\)$"),
}
Predict = Callable[[Any], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def predict(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predict]:
    """A logged model as `mlflow.pyfunc.load_model` gives it."""
    folder = tmp_path_factory.mktemp("inputs")
    with tracking_to(new_store(folder)):
        experiment = mlflow.MlflowClient().create_experiment("inputs", (folder / "a").as_uri())
        mlflow.set_experiment(experiment_id=experiment)
        _, uri = log_tiny(manifest, folder / "classifier", "tensorflow")
        yield mlflow.pyfunc.load_model(uri).predict


@pytest.mark.parametrize("case", READ)
def test_files_are_classified(case: str, predict: Predict) -> None:
    given, count = READ[case]
    rows = predict(given)
    assert [row["error"] for row in rows] == [None] * count


@pytest.mark.parametrize("case", REFUSED)
def test_other_things_are_refused_in_one_line(case: str, predict: Predict) -> None:
    given, reason = REFUSED[case]
    with pytest.raises(MlflowException, match=reason) as caught:
        predict(given)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_a_row(predict: Predict) -> None:
    good, bad = predict([PNG, "photo.jpg"])
    assert good["error"] is None
    assert "not base64: 'photo.jpg'" in bad["error"]


def test_tables_are_not_copied() -> None:
    table = pd.DataFrame({"image": [PNG], "other": [1]})
    assert to_table(table) is table
