"""Models read back from the store, and those that are never loaded."""

import os
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from har.serving.load import load_logged_model, load_served
from har.tracking.store import quiet_mlflow
from har.util.errors import UserError
from tests.fixtures import new_store, tracking_to


@pytest.mark.parametrize("uri", ["runs:/0123456789abcdef0123456789abcdef/model", "models:/no@one"])
def test_unknown_model_is_named(uri: str, store: str) -> None:
    mlflow.search_experiments()  # creates the store
    with pytest.raises(UserError, match=f"no model at {uri}"):
        load_logged_model(uri)


def test_a_model_may_be_named_by_its_run(store: str) -> None:
    mlflow.search_experiments()
    run_id = "0123456789abcdef0123456789abcdef"
    with pytest.raises(UserError, match=f"no model at runs:/{run_id}/model: .*a run's id"):
        load_logged_model(run_id)
    with pytest.raises(UserError, match=r"no run id in .* begins with 0123456"):
        load_logged_model("0123456")


@pytest.mark.parametrize("name", ["no folder", "README"])
def test_a_folder_without_a_model_is_named(name: str, store: str) -> None:
    with pytest.raises(UserError, match=f"no model at {name}: .*a folder that holds its MLmodel"):
        load_logged_model(name)


def test_a_missing_champion_says_how_one_is_made(tmp_path: Path) -> None:
    # a store of its own: in the others' a test may have promoted
    made = pytest.raises(UserError, match=r"no model at models:/har@champion: .*`har promote`")
    with tracking_to(new_store(tmp_path)), made:
        load_logged_model("models:/har@champion")


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


HOSTILE = """
from pathlib import Path
import mlflow
from mlflow.pyfunc import PythonModel

Path({witness!r}).touch()


class Served(PythonModel):
    def predict(self, context, model_input, params=None):
        return []


mlflow.models.set_model(Served())
"""


def test_our_commands_never_run_the_code_of_a_model(store: str, tmp_path: Path, cli) -> None:
    """Whoever can write to the store can put any code into a model."""
    witness = tmp_path / "witness"
    (tmp_path / "serving.py").write_text(HOSTILE.format(witness=str(witness)))
    mlflow.set_experiment("hostile")
    with mlflow.start_run(tags={"job": "train"}) as run:
        # logging it runs it once
        model = mlflow.pyfunc.log_model(
            name="model", python_model=str(tmp_path / "serving.py"), pip_requirements=[]
        )
    witness.unlink()
    uri = f"models:/{model.model_id}"
    with pytest.raises(UserError, match="holds no classifier"):
        load_logged_model(uri)
    for words in (
        ["evaluate", "--model", uri],
        ["evaluate", run.info.run_id],
        ["classify", "x.jpg"],
    ):
        assert cli(*words).exit_code == 2
    assert not witness.exists()


def _replace(file: Path, how: Callable[[Path], object]) -> None:
    file.unlink()
    how(file)


DESCRIPTIONS: dict[str, Callable[[Path], object]] = {
    "gone": lambda file: None,
    "a pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "ten terabytes": lambda file: (file.touch(), os.truncate(file, 10**13)),
    "deep": lambda file: file.write_text("a: " + "[" * 5_000),
    "a list": lambda file: file.write_text("[1]"),
    "empty": lambda file: file.write_text(""),
    "a Python object": lambda file: file.write_text("!!python/object/apply:os.getcwd []"),
    "no YAML": lambda file: file.write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_hostile_description_is_one_line(name: str, store: str, tmp_path: Path) -> None:
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    _replace(tmp_path / "model" / "MLmodel", DESCRIPTIONS[name])
    with pytest.raises(UserError, match="no model at") as caught:
        load_logged_model(str(tmp_path / "model"))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
