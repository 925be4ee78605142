"""The served model in this process: every kind of body, bad rows beside good ones, and junk of
every sort. The same through the real `mlflow models serve` is in tests/system/test_mlproject.py.
"""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from har.data.manifest import Manifest
from har.evaluation.evaluate import Evaluation, evaluate
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier, save_classifier
from har.inference.runtimes import RUNTIMES
from har.models.build import build_model
from har.serving.package import SERVING_PACKAGES, log_classifier
from har.serving.pyfunc import UNEXPECTED, ServedClassifier
from tests.fixtures import new_store, tiny_backbones, tiny_recipe, tracking_to

ROOT = Path(__file__).parents[2]


JSON = "application/json"


PARQUET = "application/vnd.apache.parquet"


URI = "models:/har@champion"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = new_store(tmp_path_factory.mktemp("serving"))
    with tracking_to(uri):
        yield uri


@pytest.fixture(scope="module")
def classifier(
    store: str, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Classifier:
    """A classifier of the tiny backbone, logged and registered as the champion."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    mlflow.set_experiment(
        experiment_id=MlflowClient().create_experiment("serving", artifacts.as_uri())
    )
    classifier, uri = log_tiny(manifest, tmp_path_factory.mktemp("classifier"), "tensorflow")
    version = mlflow.register_model(uri, "har").version
    MlflowClient().set_registered_model_alias("har", "champion", version)
    return classifier


def log_tiny(manifest: Manifest, scratch: Path, runtime: str) -> tuple[Classifier, str]:
    """A classifier of the tiny backbone, and the address of its logged model."""
    folder, recipe = scratch / "classifier", tiny_recipe()
    with tiny_backbones():
        save_classifier(folder, build_model(recipe, 3), manifest.class_names, recipe, runtime)
    classifier = load_classifier(folder)
    with mlflow.start_run():
        return classifier, f"models:/{log_classifier(folder)}"


@pytest.fixture(scope="module")
def evaluated(classifier: Classifier, manifest: Manifest) -> Evaluation:
    return evaluate(classifier, manifest)


@pytest.fixture(scope="module")
def files(evaluated: Evaluation, manifest: Manifest) -> list[bytes]:
    """The test images, in the evaluation's order."""
    return [(manifest.root / path).read_bytes() for path in evaluated.paths]


@pytest.fixture(scope="module")
def model(classifier: Classifier) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(URI)


Answer = tuple[int, str]


Ask = Callable[[bytes, str], Answer]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask_in_process(model: mlflow.pyfunc.PyFuncModel) -> Ask:
    """What MLflow's server does with a body, without the server."""
    schema = model.metadata.get_input_schema()

    def ask(body: bytes, content_type: str) -> Answer:
        try:
            answer = scoring_server.invocations(body, content_type, model, schema)
            return answer.status, answer.response
        except MlflowException as error:
            return error.get_http_status_code(), error.serialize_as_json()

    return ask


def parse(text: str) -> Any:
    """JSON, in which NaN and Infinity do not exist."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows_of(answer: Answer) -> list[dict[str, Any]]:
    status, text = answer
    assert status == 200, text
    return parse(text)["predictions"]


def as_parquet(column: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame({"image": column}).to_parquet(buffer)
    return buffer.getvalue()


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()


# Each way to send images, from their bytes.
BODIES: dict[str, tuple[Callable[[list[bytes]], bytes], str]] = {
    "dataframe_split": (
        lambda files: as_json(
            {"dataframe_split": {"columns": ["image"], "data": [[text_of(f)] for f in files]}}
        ),
        JSON,
    ),
    "dataframe_records": (
        lambda files: as_json({"dataframe_records": [{"image": text_of(f)} for f in files]}),
        JSON,
    ),
    "parquet": (as_parquet, PARQUET),
    "parquet of text": (lambda files: as_parquet([text_of(f) for f in files]), PARQUET),
    "inputs": (lambda files: as_json({"inputs": [text_of(f) for f in files]}), JSON),
    "inputs by column": (
        lambda files: as_json({"inputs": {"image": [text_of(f) for f in files]}}),
        JSON,
    ),
    "instances": (lambda files: as_json({"instances": [text_of(f) for f in files]}), JSON),
    "instances of rows": (
        lambda files: as_json({"instances": [{"image": text_of(f)} for f in files]}),
        JSON,
    ),
}


def assert_as_evaluated(rows: list[dict[str, Any]], evaluated: Evaluation) -> None:
    """Equal to what `har evaluate` reports, which passes the same images in other batches."""
    names = evaluated.class_names
    assert [row["label"] for row in rows] == evaluated.predictions["predicted"].tolist()
    for row, expected in zip(rows, evaluated.probabilities, strict=True):
        assert row["error"] is None and len(row["top_3"]) == 3
        assert row["top_3"][0] == {"label": row["label"], "probability": row["probability"]}
        for top in row["top_3"]:
            right = expected[names.index(top["label"])]
            assert top["probability"] == pytest.approx(float(right), abs=1e-6)


def bad_files(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Files with no image to classify, and what their rows say."""
    return {
        "not an image": (b"just text", "not an image"),
        "truncated": (good[:-200], "truncated"),
        "no pixel data": (good[:300], "an"),
        "bomb": (encode(Image.new("1", (10_000, 10_000)), "PNG"), "10000x10000 pixels"),
        "of another kind": (encode(Image.new("L", (9, 9)), "ICO"), "not an image"),
        "zero bytes": (b"", "0 bytes"),
    }


def assert_only_bad_rows_are_bad(ask: Ask, kind: str, files: list[bytes]) -> None:
    """Good images, among them every kind of bad one."""
    good = files[:3]
    bad = bad_files(good[0])
    build, content_type = BODIES[kind]
    alone = rows_of(ask(build(good), content_type))
    mixed = [good[0], *(data for data, _ in bad.values()), *good[1:]]
    rows = rows_of(ask(build(mixed), content_type))
    neighbours = [rows[0], *rows[-2:]]
    assert [row["label"] for row in neighbours] == [row["label"] for row in alone]
    assert [row["probability"] for row in neighbours] == pytest.approx(
        [row["probability"] for row in alone], abs=1e-6
    )
    for row, (_, message) in zip(rows[1:-2], bad.values(), strict=True):
        assert message in row.pop("error")
        assert row == {"label": None, "probability": None, "top_3": []}


@pytest.mark.parametrize("kind", BODIES)
def test_every_body_equals_evaluate(
    model: mlflow.pyfunc.PyFuncModel, files: list[bytes], evaluated: Evaluation, kind: str
) -> None:
    build, content_type = BODIES[kind]
    assert_as_evaluated(rows_of(ask_in_process(model)(build(files), content_type)), evaluated)


def test_a_model_of_openvino_serves_what_it_was_evaluated_with(
    classifier: Classifier, manifest: Manifest, files: list[bytes], tmp_path: Path
) -> None:
    fast, uri = log_tiny(manifest, tmp_path, "openvino")
    model = mlflow.pyfunc.load_model(uri)
    build, content_type = BODIES["dataframe_split"]
    rows = rows_of(ask_in_process(model)(build(files), content_type))
    assert_as_evaluated(rows, evaluate(fast, manifest))
    assert model.metadata.metadata["runtime"] == model.unwrap_python_model().classifier.runtime
    needed = Path(mlflow.pyfunc.get_model_dependencies(uri)).read_text()
    assert f"openvino=={version('openvino')}" in needed
    assert "openvino" not in Path(mlflow.pyfunc.get_model_dependencies(URI)).read_text()


@pytest.mark.parametrize("kind", BODIES)
def test_a_bad_row_spoils_no_other(
    model: mlflow.pyfunc.PyFuncModel, files: list[bytes], kind: str
) -> None:
    assert_only_bad_rows_are_bad(ask_in_process(model), kind, files)


def test_columns_of_any_type_are_rows_with_errors(
    model: mlflow.pyfunc.PyFuncModel, files: list[bytes]
) -> None:
    cells = [
        files[0],
        None,
        float("nan"),
        3,
        2.5,
        True,
        [1],
        {"a": 1},
        text_of(files[0]),
        bytearray(files[0]),
    ]
    rows = model.predict(pd.DataFrame({"image": cells}))
    assert [row["error"] is None for row in rows] == [True, *[False] * 7, True, True]
    assert rows[0]["label"] == rows[-2]["label"] == rows[-1]["label"]
    parse(json.dumps(rows))


def test_a_table_without_the_column_is_refused(classifier: Classifier) -> None:
    served = ServedClassifier()
    served.classifier = classifier
    for junk in (pd.DataFrame({"picture": [b""]}), [b""], None, {"image": 3}, np.zeros((2, 2))):
        with pytest.raises(MlflowException, match="one column, image") as caught:
            served.predict(None, junk)
        assert caught.value.get_http_status_code() == 400


def test_what_nobody_foresaw_is_logged_and_not_sent(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    served = ServedClassifier()
    served.classifier = classifier
    monkeypatch.setattr(Classifier, "classify", fail)
    rows = served.predict(None, pd.DataFrame({"image": [b"a", b"b"]}))
    assert [row["error"] for row in rows] == [UNEXPECTED] * 2
    assert "secret" not in json.dumps(rows) and "secret detail" in caplog.text


def test_the_server_is_warm_when_it_is_ready(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed = []

    def warm(self: Classifier) -> None:
        warmed.append(self)

    monkeypatch.setattr(Classifier, "warm", warm)
    model = mlflow.pyfunc.load_model(URI)
    assert warmed == [model.unwrap_python_model().classifier]


DECODING = ("images", "encoded", "kinds", "limits", "jpeg", "chunks", "bitmaps", "pixels")
UTIL_MODULES = ("errors", "escaping", "files", "garbage", "hardware", "json_text")
UTIL = {f"util.{name}" for name in UTIL_MODULES}


def har_imports(module: str, seen: dict[str, set[str]]) -> dict[str, set[str]]:
    """What each module of ours that `module` needs imports, at any depth."""
    tree = ast.parse((ROOT / "har" / f"{module.replace('.', '/')}.py").read_text())
    names = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    seen[module] = names
    for name in names:
        inner = name.removeprefix("har.")
        if name.startswith("har.") and inner not in seen:
            har_imports(inner, seen)
    return seen


def test_serving_needs_only_the_packages_it_pins() -> None:
    found = har_imports("serving.pyfunc", {})
    inner = {f"inference.{name}" for name in ("classifier", "runtimes", "freezing", "turns")}
    inner |= {"inference.graph_cache"}
    inner |= {f"data.{name}" for name in DECODING}
    inner |= {f"serving.{name}" for name in ("pyfunc", "cells", "bodies", "inputs")}
    inner |= {f"serving.{name}" for name in ("admission", "parquet", "refusals")}
    inner |= {f"models.{name}" for name in ("keras_file", "merging", "vision_transformer")}
    assert set(found) == inner | {"recipe", "data.parquet_footer", *UTIL}
    packages = {name.split(".")[0] for names in found.values() for name in names}
    pinned = {name.replace("pillow", "PIL") for name in SERVING_PACKAGES}
    pinned |= {name for runtime in RUNTIMES.values() for name in runtime.packages}
    # Keras requires h5py, and MLflow pyarrow
    assert packages - set(sys.stdlib_module_names) - {"har", "h5py", "pyarrow"} <= pinned


def test_serving_loads_no_more_than_it_needs(classifier: Classifier) -> None:
    model = mlflow.artifacts.download_artifacts(URI)
    code = (
        "import sys, types, har.serving.pyfunc as serving; served = serving.ServedClassifier()\n"
        f"folder = {str(Path(model) / 'artifacts' / CLASSIFIER_FOLDER)!r}\n"
        "served.load_context(types.SimpleNamespace(artifacts={'classifier': folder}))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.split())
    ours = {name for name in modules if re.match(r"har(\.|$)", name)}
    modules_of_ours = {f"har.{name}" for name in har_imports("serving.pyfunc", {})}
    packages = {name.rpartition(".")[0] for name in modules_of_ours}
    # `import har` makes TensorFlow load quietly
    quiet = {"har", "har.util", "har.util.quiet", "har.util.progress"}
    assert ours == quiet | modules_of_ours | packages
    # MLflow itself brings scipy and psutil; these came with Keras
    assert not modules & {"matplotlib", "sklearn", "imagehash", "jinja2", "kagglehub", "pynvml"}


def seeds() -> list[bytes]:
    """A small picture in each format, as a start for damaged ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [encode(image, kind) for kind in ("PNG", "BMP", "GIF", "WEBP", "TIFF")]
    found += [encode(image, "JPEG", exif=exif), encode(image, "JPEG", progressive=True)]
    found += [encode(image.convert(mode), "PNG") for mode in ("P", "LA", "RGBA", "1", "I;16")]
    found += [encode(image.convert("CMYK"), "JPEG")]
    found += [
        encode(image, kind, save_all=True, append_images=[image.rotate(90)])
        for kind in ("GIF", "WEBP", "PNG", "MPO")
    ]
    return found


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image with some bytes changed, cut off, put in, or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["set", "cut", "insert", "remove", "double"]))
        if change == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif change == "cut":
            del data[at:]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 32))]
        else:
            data += data[at:]
    return bytes(data)


SEEDS = seeds()


MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0")


FILES = st.one_of(
    damaged(),
    st.binary(max_size=200),
    st.builds(bytes.__add__, st.sampled_from(MAGIC), st.binary(max_size=100)),
)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("")
)


CELLS = st.one_of(FILES.map(text_of), st.text(max_size=30), SCALARS)


VALUES = st.recursive(
    CELLS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["image", "b64", "x", "data", "columns"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


FORMS = st.sampled_from(["dataframe_split", "dataframe_records", "inputs", "instances"])


TABLES = st.fixed_dictionaries(
    {"data": st.one_of(VALUES, st.lists(st.lists(CELLS, max_size=2), max_size=4))},
    optional={
        "columns": st.one_of(VALUES, st.just(["image"]), st.just(["image", "x"])),
        "index": VALUES,
    },
)


RECORDS = st.lists(st.dictionaries(st.sampled_from(["image", "x"]), VALUES, max_size=2), max_size=4)


REQUESTS = st.one_of(
    st.builds(lambda table: {"dataframe_split": table}, TABLES),
    st.builds(lambda form, rows: {form: rows}, FORMS, RECORDS),
    st.builds(lambda form, cells: {form: cells}, FORMS, st.lists(CELLS, max_size=4)),
    st.builds(lambda form, cells: {form: {"image": cells}}, FORMS, VALUES),
    st.builds(lambda form, value, more: {form: value, "params": more}, FORMS, VALUES, VALUES),
    st.dictionaries(st.sampled_from(["inputs", "instances", "input", "image"]), VALUES, max_size=3),
    VALUES,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """JSON of many shapes, at times cut off or no JSON at all."""
    text = json.dumps(draw(REQUESTS)).encode()
    how = draw(st.sampled_from(["whole"] * 8 + ["cut", "junk"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text)))]
    return draw(st.binary(max_size=40)) if how == "junk" else text


def fuzz(examples: int) -> settings:
    """The same examples each time in the default run; others each time in the long one."""
    return settings(
        max_examples=examples,
        derandomize=examples <= 300,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def check_answer(answer: Answer) -> None:
    status, text = answer
    assert status == 200 or 400 <= status < 500, text
    parsed = parse(text)
    assert "Traceback" not in text and "stack_trace" not in text
    if status == 200:
        rows = parsed["predictions"] if isinstance(parsed, dict) else parsed
        for row in rows:
            assert set(row) == {"label", "probability", "top_3", "error"}
            assert (row["error"] is None) == (row["label"] is not None)
            assert row["error"] != UNEXPECTED


def check_files(model: mlflow.pyfunc.PyFuncModel, found: list[bytes], good: bytes) -> None:
    """Any bytes between two good images."""
    rows = model.predict(pd.DataFrame({"image": [good, *found, good]}))
    assert len(rows) == len(found) + 2
    check_answer((200, json.dumps({"predictions": rows})))
    assert rows[0]["error"] is None and rows[0]["label"] == rows[-1]["label"]
    assert rows[0]["probability"] == pytest.approx(rows[-1]["probability"], abs=1e-6)


@fuzz(200)
@given(found=st.lists(FILES, max_size=5))
def test_any_files(
    model: mlflow.pyfunc.PyFuncModel, files: list[bytes], found: list[bytes]
) -> None:
    check_files(model, found, files[0])


@fuzz(200)
@given(body=requests())
def test_any_json(model: mlflow.pyfunc.PyFuncModel, body: bytes) -> None:
    check_answer(ask_in_process(model)(body, JSON))


@pytest.mark.slow
@fuzz(5000)
@given(found=st.lists(FILES, max_size=5))
def test_many_files(
    model: mlflow.pyfunc.PyFuncModel, files: list[bytes], found: list[bytes]
) -> None:
    check_files(model, found, files[0])


@pytest.mark.slow
@fuzz(5000)
@given(body=requests())
def test_many_json(model: mlflow.pyfunc.PyFuncModel, body: bytes) -> None:
    check_answer(ask_in_process(model)(body, JSON))
