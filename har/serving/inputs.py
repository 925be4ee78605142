"""Reads what Python programs give to `pyfunc.predict`: also image files that are in no table.

MLflow's own check refuses them with a message that repeats all their bytes.
"""

from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.types.schema import DataType

from har.serving.bodies import COLUMN


def to_table(images: Any) -> Any:
    """Make a table with the one column `image` of a file's bytes, or of several files'.

    Tables, and whatever else MLflow makes one of, come back as they are.

    Raises:
        MlflowException: the images are no files, or a table has no such column.
    """
    if isinstance(images, bytes | bytearray | memoryview | str):
        return _table_of([images])
    if isinstance(images, np.ndarray):
        # as np.fromfile reads one file
        if images.dtype == np.uint8 and images.ndim == 1:
            return _table_of([images.tobytes()])
        if images.ndim == 1 and images.dtype.kind in "OSU":
            return _table_of(images.tolist())
    elif isinstance(images, pd.Series) and images.name != COLUMN:
        return _table_of(images.tolist())
    elif isinstance(images, list | tuple) and not any(isinstance(each, dict) for each in images):
        return _table_of(list(images))
    elif isinstance(images, pd.DataFrame | dict):
        if COLUMN in images:
            return images
        raise _refuse(f"a table with the columns {', '.join(map(str, images))[:80] or '(none)'}")
    elif isinstance(images, pd.Series | list | tuple):
        return images
    shape = f" of the shape {images.shape}, {images.dtype}" if hasattr(images, "shape") else ""
    raise _refuse(f"{type(images).__name__}{shape}")


def _table_of(cells: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({COLUMN: pd.Series(cells, dtype=object)})


def _refuse(received: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(
        f"the input must be the bytes of image files, in a list or in a table's column {COLUMN}:"
        f" received {received}"
    )


def read_inputs_of_ours() -> None:
    """Let `pyfunc.predict` of this process pass the input of our models through `to_table`."""
    # a private name: without it, MLflow's own check stays
    original = getattr(mlflow.pyfunc, "_validate_prediction_input", None)
    if original is None or hasattr(original, "of_har"):
        return

    def validate(data: Any, params: Any, input_schema: Any, *others: Any, **named: Any) -> Any:
        if _is_ours(input_schema):
            data = to_table(data)
        return original(data, params, input_schema, *others, **named)

    validate.of_har = True  # type: ignore[attr-defined]
    mlflow.pyfunc._validate_prediction_input = validate


def _is_ours(schema: Any) -> bool:
    return (
        schema is not None
        and not schema.is_tensor_spec()
        and schema.input_names() == [COLUMN]
        and schema.input_types() == [DataType.binary]
    )
