"""Every format of a body times every kind of cell, and bodies that are refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from har.data.limits import SERVED_REQUEST, UNLIMITED
from har.data.manifest import Manifest
from har.serving.bodies import read_body
from har.serving.refusals import TooLarge
from tests.fixtures import new_store, tracking_to
from tests.serving.test_cells import GOOD, JSON_CELLS, JSON_JUNK, PYTHON_CELLS, PYTHON_JUNK, TEXT
from tests.serving.test_pyfunc import log_tiny


@pytest.fixture(scope="module")
def model(
    manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mlflow.pyfunc.PyFuncModel]:
    folder = tmp_path_factory.mktemp("bodies")
    with tracking_to(new_store(folder)):
        experiment = MlflowClient().create_experiment("bodies", (folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment_id=experiment)
        yield mlflow.pyfunc.load_model(log_tiny(manifest, folder, "tensorflow")[1])


Build = Callable[[list[Any]], Any]
FORMATS: dict[str, Build] = {
    "dataframe_split": lambda cells: {"columns": ["image"], "data": [[cell] for cell in cells]},
    "dataframe_records": lambda cells: [{"image": cell} for cell in cells],
    "instances": lambda cells: cells,
    "instances of rows": lambda cells: [{"image": cell} for cell in cells],
    "inputs": lambda cells: cells,
    "inputs of rows": lambda cells: [{"image": cell} for cell in cells],
    "inputs by column": lambda cells: {"image": cells},
    "dataframe_split by column": lambda cells: {"data": {"image": cells}},
}
# A cell that is an object is taken for the row.
AS_ROWS = ("instances", "inputs")


def body_of(form: str, cells: list[Any]) -> bytes:
    return json.dumps({form.split(" ")[0]: FORMATS[form](cells)}).encode()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [*JSON_CELLS, *JSON_JUNK])
def test_each_cell_in_each_format(form: str, name: str, model: mlflow.pyfunc.PyFuncModel) -> None:
    good = name in JSON_CELLS
    cell, message = (JSON_CELLS[name], "") if good else JSON_JUNK[name]
    schema = model.metadata.get_input_schema()
    body = body_of(form, [TEXT, cell, f"data:image/jpeg;base64,{TEXT}"])
    answer = scoring_server.invocations(body, "application/json", model, schema)
    before, row, after = json.loads(answer.response)["predictions"]
    assert before["error"] is after["error"] is None and before == after
    if good:
        assert row == before
    elif form in AS_ROWS and name == "object":
        assert "null" in row["error"]
    else:
        assert message.replace("\\", "") in row["error"].replace("\\", "")


@pytest.mark.parametrize("name", [*PYTHON_CELLS, *PYTHON_JUNK])
def test_each_cell_of_a_table(name: str, model: mlflow.pyfunc.PyFuncModel) -> None:
    cell = PYTHON_CELLS[name] if name in PYTHON_CELLS else PYTHON_JUNK[name][0]
    column = pd.Series([GOOD, cell, bytearray(GOOD)], dtype=object)
    before, row, after = model.predict(pd.DataFrame({"image": column}))
    assert before == after and before["error"] is None
    assert (row == before) == (name in PYTHON_CELLS)


def test_a_table_of_numbers_is_an_error_of_mlflow(model: mlflow.pyfunc.PyFuncModel) -> None:
    # MLflow checks the signature before our code
    with pytest.raises(MlflowException, match="schema"):
        model.predict(pd.DataFrame({"image": [1, 2]}))


def test_a_dict_of_a_column_is_a_table(model: mlflow.pyfunc.PyFuncModel) -> None:
    rows = model.predict({"image": [GOOD, bytearray(GOOD)]})
    assert [row["error"] for row in rows] == [None, None]


MISSING = {"dataframe_split": {"columns": ["picture"], "data": [["A"]]}}
REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "not JSON"),
    "nothing": (b"", "not JSON"),
    "not UTF-8": (b'{"inputs": ["\xff"]}', "not JSON"),
    "cut": (body_of("inputs", [TEXT])[:-5], "not JSON"),
    "deep lists": (b"[" * 15_000, "too deep"),
    "deep lists in a cell": (b'{"inputs": ' + b"[" * 9_000 + b"]" * 9_000 + b"}", "too deep"),
    "deep objects": (b'{"inputs": ' * 9_000 + b"1" + b"}" * 9_000, "too deep"),
    "5,000 digits": (b'{"inputs": [' + b"9" * 5_000 + b"]}", "not JSON"),
    "a million digits": (b'{"inputs": [-' + b"1" * 1_000_000 + b"]}", "not JSON"),
    "digits as an index": (
        b'{"dataframe_split": {"index": ['
        + b"9" * 5_000
        + b'], "columns": ["image"], "data": []}}',
        "not JSON",
    ),
    "a list": ([TEXT], "JSON object with one of"),
    "a number": (3, "JSON object with one of"),
    "no format": ({"image": [TEXT]}, "JSON object with one of"),
    "two formats": ({"inputs": [TEXT], "instances": [TEXT]}, "JSON object with one of"),
    "a language model's": ({"messages": []}, "JSON object with one of"),
    "another column": (MISSING, "one column image"),
    "no columns": ({"dataframe_split": {"data": [[TEXT]]}}, "one column image"),
    "columns of no list": ({"dataframe_split": {"columns": 3, "data": []}}, "one column image"),
    "no data": ({"dataframe_split": {"columns": ["image"]}}, "columns and data"),
    "data of text": ({"dataframe_split": {"columns": ["image"], "data": TEXT}}, "one column"),
    "records of another column": ({"dataframe_records": [{"x": TEXT}]}, "objects with image"),
    "records of no list": ({"dataframe_records": {"x": 1}}, "must be a list"),
    "inputs of text": ({"inputs": TEXT}, "must be a list"),
    "instances of null": ({"instances": None}, "must be a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_refused(name: str) -> None:
    body, message = REFUSED[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(MlflowException, match=message) as caught:
        read_body(data, SERVED_REQUEST)
    assert caught.value.get_http_status_code() == 400
    # no client's data in it, and one line
    assert len(str(caught.value)) < 250 and len(str(caught.value).splitlines()) == 1


TOO_LARGE = {
    "rows": body_of("inputs", ["A"] * 1001),
    "rows of a table": body_of("dataframe_split", [None] * 1001),
    "rows of nothing": b'{"inputs": [' + b"[]," * 10_000_000 + b"[]]}",
    "columns of nothing": b'{"inputs": {' + b'"a":{},' * 3_000_000 + b'"image": []}}',
    "numbers": b'{"inputs": [' + b"1," * 15_000_000 + b"1]}",
    "deep": b"[" * 30_000_000,
    "bytes": b'{"inputs": ["' + b"A" * 36_000_000 + b'"]}',
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_body_beyond_a_limit(name: str) -> None:
    with pytest.raises(TooLarge) as caught:
        read_body(TOO_LARGE[name], SERVED_REQUEST)
    assert caught.value.get_http_status_code() == 413


def test_limits_are_the_servers_alone() -> None:
    body = body_of("inputs", ["A"] * 5000)
    assert len(read_body(body, UNLIMITED)) == 5000
    assert len(read_body(body, replace(SERVED_REQUEST, rows=5000))) == 5000


@pytest.mark.parametrize("rows", [[["x", TEXT], ["y", None], [], None, TEXT]])
def test_rows_of_other_lengths(rows: list[Any]) -> None:
    table = {"columns": ["name", "image"], "data": rows}
    cells = read_body(json.dumps({"dataframe_split": table}), SERVED_REQUEST)
    assert cells == [TEXT, None, None, None, TEXT]


def test_models_of_others_keep_mlflows_parser(model: mlflow.pyfunc.PyFuncModel) -> None:
    class Other:
        metadata = None

    body = json.dumps({"inputs": [1, 2]}).encode()
    parsed = scoring_server._parse_json_data(body, Other(), None)
    assert isinstance(parsed.data, np.ndarray)
