"""Models read back from the store, and those that are never loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from har.serving.load import load_logged_model, load_served, open_served
from har.tracking.store import quiet_mlflow
from har.util.errors import UserError


@pytest.mark.parametrize("uri", ["runs:/0123456789abcdef0123456789abcdef/model", "models:/no@one"])
def test_unknown_model_is_named(uri: str, store: str) -> None:
    with pytest.raises(UserError, match=f"no model at {uri}"):
        load_logged_model(uri)


class Pickled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input):  # type: ignore[no-untyped-def]
        return model_input


def test_a_pickled_model_is_never_loaded(store: str, tmp_path: Path) -> None:
    """Reading it would run whatever its maker likes."""
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    assert list((tmp_path / "model").glob("*.pkl"))
    quiet_mlflow()
    uri = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"cannot be loaded.*PICKLE"):
        load_served(uri)
    # nor in a process of its own
    with pytest.raises(UserError, match=r"cannot be loaded.*PICKLE"), open_served(uri):
        pass


OLDER = """
import mlflow
from mlflow.pyfunc import PythonModel

from har.classifier import answer


class Served(PythonModel):
    def predict(self, context, model_input, params=None):
        print("what a model prints is no answer")
        return [answer(each) for each in model_input["image"]]


mlflow.models.set_model(Served())
"""
ANSWER = """
def answer(data):
    if data == b"end": raise SystemExit
    if data == b"fail": raise RuntimeError("as it does")
    return {"label": str(len(data)), "probability": 1.0, "top_3": [], "error": None}
"""


LOG = """
import sys, mlflow
mlflow.set_experiment("older")
model = mlflow.pyfunc.log_model(
    name="model", python_model="serving.py", code_paths=["har"], pip_requirements=["mlflow"]
)
print(model.model_id, file=sys.stderr)
"""


@pytest.fixture
def older(store: str, tmp_path: Path) -> str:
    """A model that carries a package `har` with other modules than this version has."""
    code = tmp_path / "har"
    code.mkdir()
    (code / "__init__.py").touch()
    (code / "classifier.py").write_text(ANSWER)
    (tmp_path / "serving.py").write_text(OLDER)
    # logging imports it
    done = subprocess.run(
        [sys.executable, "-c", LOG], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return f"models:/{done.stderr.split()[-1]}"


def ask(model: Any, *images: bytes) -> list[dict[str, Any]]:
    return model.predict(pd.DataFrame({"image": images}))


def test_a_model_of_an_older_version_answers_with_its_own_code(older: str) -> None:
    with open_served(older) as model:
        assert [each["label"] for each in ask(model, b"\x00\xff", b"123")] == ["2", "3"]
        with pytest.raises(UserError, match="RuntimeError: as it does"):
            ask(model, b"fail")
        assert ask(model, b"1")[0]["label"] == "1"
        with pytest.raises(UserError, match="its process ended"):
            ask(model, b"end")
    assert model.process.returncode is not None
    with pytest.raises(UserError, match=r"No module named 'har.classifier'"):
        load_served(older)


def test_what_cannot_be_loaded_in_its_own_process_is_named(older: str, tmp_path: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(older, dst_path=str(tmp_path / "copy")))
    (folder / "code" / "har" / "classifier.py").unlink()
    with (
        pytest.raises(UserError, match=r"cannot be loaded.*No module named 'har.classifier'"),
        open_served(str(folder)),
    ):
        pass
