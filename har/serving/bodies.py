"""Reads the body of a request to the model server.

MLflow's own parser reads a cell in four ways, refuses a request for one bad cell, copies all rows
to the length of the longest, and answers 500 to JSON that is deep or holds long numbers. Its place
is taken in `mlflow models serve` and `mlflow models predict`.
"""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
from mlflow.pyfunc import scoring_server

from har.data.limits import RequestLimits
from har.serving.admission import parse_in_turn
from har.serving.refusals import TooLarge, refuse

COLUMN = "image"
FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
# More than any format needs for a row, such as {"image": {"b64": "..."}}.
_MAX_VALUES_OF_ROW = 20


def read_body(body: bytes | str, limits: RequestLimits) -> list[Any]:
    """Return the cells of a JSON body, one for each image, undecoded."""
    if len(body) > limits.bytes:
        raise TooLarge(f"a body of {len(body):,} bytes, more than {limits.bytes:,}")
    data = body.encode() if isinstance(body, str) else body
    # before they become Python objects, of 20 times the bytes
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > limits.rows * _MAX_VALUES_OF_ROW:
        raise TooLarge(f"too many values for {limits.rows:,} images, the most in a request")
    document = _parse_json(data)
    named = [name for name in FORMATS if isinstance(document, dict) and name in document]
    if len(named) != 1:
        raise refuse(f"the body must be a JSON object with one of {', '.join(FORMATS)}")
    read = _read_split if named[0] == "dataframe_split" else _read_values
    cells = read(document[named[0]])
    check_rows(len(cells), limits)
    return cells


def check_rows(count: int, limits: RequestLimits) -> None:
    """Raise TooLarge for more images than a request may have."""
    if count > limits.rows:
        raise TooLarge(f"{count:,} images, more than {limits.rows:,} in a request")


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise refuse("the body is not JSON that can be read: too deep") from None
    # also a number of thousands of digits
    except ValueError as error:
        reason = str(error).splitlines()[0][:100]
        raise refuse(f"the body is not JSON that can be read: {reason}") from None


def _read_split(table: Any) -> list[Any]:
    if not isinstance(table, dict) or "data" not in table:
        raise refuse("dataframe_split must be an object with columns and data")
    rows, columns = table["data"], table.get("columns")
    if isinstance(rows, dict):
        return _read_values(rows)
    if not isinstance(rows, list) or not isinstance(columns, list) or columns.count(COLUMN) != 1:
        raise refuse(f"dataframe_split must have one column {COLUMN}, and rows as data")
    at = columns.index(COLUMN)
    return [(row[at] if at < len(row) else None) if isinstance(row, list) else row for row in rows]


def _read_values(values: Any) -> list[Any]:
    """Read {"image": cells}, or a list of {"image": cell} or of cells."""
    if isinstance(values, dict) and COLUMN in values:
        cells = values[COLUMN]
        return cells if isinstance(cells, list) else [cells]
    if not isinstance(values, list):
        raise refuse(f"the images must be a list, or a list in an object, {COLUMN}")
    others = [each for each in values if isinstance(each, dict) and list(each) != ["b64"]]
    if len(others) == len(values) > 0 and not any(COLUMN in each for each in others):
        raise refuse(f"the rows must be objects with {COLUMN}")
    return [
        each.get(COLUMN) if isinstance(each, dict) and list(each) != ["b64"] else each
        for each in values
    ]


def read_bodies_of(is_ours: Callable[[Any], bool], limits: RequestLimits) -> None:
    """Let MLflow's server, if this process is one, read the bodies for our models with
    `read_body`.
    """
    # a private name: without it, MLflow's own parser stays
    original = getattr(scoring_server, "_parse_json_data", None)
    if original is None or hasattr(original, "of_har"):
        return

    def parse(data: Any, metadata: Any, input_schema: Any) -> Any:
        if not is_ours(metadata):
            return original(data, metadata, input_schema)
        cells = pd.Series(parse_in_turn(lambda: read_body(data, limits), len(data)), dtype=object)
        return scoring_server.ParsedJsonInput(pd.DataFrame({COLUMN: cells}), None, False)

    parse.of_har = True  # type: ignore[attr-defined]
    scoring_server._parse_json_data = parse
