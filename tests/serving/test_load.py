"""Models read back from the store, and those that are never loaded."""

from pathlib import Path

import mlflow
import pytest

from har.serving.load import load_logged_model, load_served
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
    with pytest.raises(UserError, match=r"cannot be loaded.*PICKLE"):
        load_served(str(tmp_path / "model"))
