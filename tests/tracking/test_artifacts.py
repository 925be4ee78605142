"""What a store holds is not believed: a table of hostile artifacts, and how each of them ends."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from har.tracking import artifacts, query
from har.tracking.artifacts import UNREADABLE, open_model, read_artifact
from har.tracking.records import load_details, load_recorded_training, load_records, read_record
from har.util.errors import UserError

TAGS = {
    "job": "train", "variant": "v5", "differs_from_variant": "none", "hardware": "1xT4",
    "source": "measured", "recipe_digest": "r", "dataset_digest": "d", "test_digest": "t",
}  # fmt: skip
RECIPE = json.dumps({"used": {"batch_size": 4, "weights": "~/mine.h5"}})
HISTORY = json.dumps([{"train_accuracy": 0.5, "train_loss": float("nan"), "epoch_time_s": 1.0}])
PREDICTIONS = "path,label,predicted,probability\na.jpg,x,x,0.5\nb.jpg,'=y,x,0.5\n"


@pytest.fixture
def run_id(store: str) -> str:
    """A finished training with whole artifacts, which a test may replace."""
    client = MlflowClient()
    experiment = mlflow.set_experiment("artifacts").experiment_id
    run_id = str(client.create_run(experiment, tags=TAGS).info.run_id)
    client.log_metric(run_id, "accuracy", 0.5)
    client.log_text(run_id, RECIPE, "recipe.json")
    client.log_text(run_id, HISTORY, "history.json")
    client.log_text(run_id, PREDICTIONS, query.PREDICTIONS_ARTIFACT)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def place_of(run_id: str, artifact: str) -> Path:
    return Path(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://")) / artifact


def test_whole_artifacts_are_read(run_id: str) -> None:
    record = load_details(read_record(mlflow.get_run(run_id)))
    assert record.recipe == {"batch_size": 4, "weights": os.path.expanduser("~/mine.h5")}
    assert record.history[0]["train_accuracy"] == 0.5
    assert record.predictions is not None
    assert record.predictions["label"].tolist() == ["x", "=y"]


def link_to(target: str) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), file.symlink_to(target))


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write_bytes(data)


def huge(file: Path) -> None:
    # without data on disk
    os.truncate(file, 10**13)


ANY = {
    "gone": Path.unlink,
    "a pipe": pipe,
    "a folder": folder,
    "a device": link_to("/dev/zero"),
    "a file of somebody": link_to("/etc/hostname"),
    "ten terabytes": huge,
    "no UTF-8": text(b"\xff\xfe\x00"),
    "empty": text(""),
}
JSON = {
    "deep": text("[" * 100_000),
    "deep objects": text('{"used":' * 100_000),
    "a list": text("[1, 2]"),
    "a number": text("7"),
    "5,000 digits": text('{"used": ' + "9" * 5000 + "}"),
}
HOSTILE: dict[str, dict[str, Callable[[Path], Any]]] = {
    "recipe.json": {
        **ANY, **JSON,
        "null": text('{"used": null}'),
        "nested": text('{"used": {"epochs": {"a": 1}}}'),
        "a long text": text(json.dumps({"used": {"weights": "x" * 10**6}})),
        "no batch": text('{"used": {"batch_size": 0}}'),
        "an infinite batch": text('{"used": {"batch_size": Infinity}}'),
    },
    "history.json": {
        **ANY, **JSON,
        "an object": text('{"epochs": []}'),
        "a million epochs": text(json.dumps([{}] * 1_000_000)),
        "an epoch of text": text('[{"train_accuracy": "high", "epoch_time_s": 1}]'),
        "an accuracy of 2": text('[{"train_accuracy": 2, "epoch_time_s": 1}]'),
        "an accuracy of NaN": text('[{"train_accuracy": NaN, "epoch_time_s": 1}]'),
        "an endless epoch": text('[{"train_accuracy": 1, "epoch_time_s": Infinity}]'),
        "a time before": text('[{"train_accuracy": 1, "epoch_time_s": -1}]'),
        "ragged": text('[{"train_accuracy": 1, "epoch_time_s": 1}, {"train_accuracy": 1}]'),
    },
    query.PREDICTIONS_ARTIFACT: {
        **ANY,
        "other columns": text("path,label\na,b\n"),
        "twice": text("path,label,predicted\na,b,b\na,b,c\n"),
        "a long label": text("path,label,predicted\na," + "b" * 10**6 + ",c\n"),
        "an open quote": text('path,label,predicted\n"a,b,c\n' + "d,e,f\n" * 100),
        "too many rows": text("path,label,predicted\n" + "a,b,c\n" * 12),
    },
}  # fmt: skip
CASES = [(artifact, name) for artifact, table in HOSTILE.items() for name in table]


@pytest.mark.parametrize(("artifact", "name"), CASES)
def test_a_hostile_artifact_is_left_out(
    artifact: str,
    name: str,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(query, "MAX_TABLE_ROWS", 10)
    HOSTILE[artifact][name](place_of(run_id, artifact))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (record,) = load_records([mlflow.get_run(run_id)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # kB
    said = capsys.readouterr().err.splitlines()
    (warning,) = (line for line in said if not line.startswith("reading runs"))
    assert "left out: " in warning and len(warning) < 500
    left_out = {
        "recipe.json": record.recipe == {},
        "history.json": record.history == [],
        query.PREDICTIONS_ARTIFACT: record.predictions is None,
    }
    assert [each for each, gone in left_out.items() if gone] == [artifact]
    if artifact == "recipe.json":
        with pytest.raises(UserError, match="cannot be repeated"):
            load_recorded_training(run_id)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5, 1e300])
def test_numbers_that_cannot_be_are_not_read(value: float, run_id: str) -> None:
    client = MlflowClient()
    for name in ("accuracy", "best_val_accuracy", "top_3_accuracy"):
        client.log_metric(run_id, name, value)
    if not 0 <= value <= 1e12:
        client.log_metric(run_id, "wall_time_s", value)
    record = read_record(mlflow.get_run(run_id))
    assert record.test_metrics == {} and record.accuracy is None
    assert record.val_accuracy is None and record.seconds is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_images", "many"), ("train_images", "9" * 5000), ("split_seed", "no"),
     ("test_fraction", "NaN"), ("duplicates", "maybe")],
)  # fmt: skip
def test_a_run_with_foreign_parameters_is_left_out(
    name: str, value: str, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = mlflow.get_run(run_id)
    run.data.params.update({"split_seed": "0", "test_fraction": "0.1", name: value})
    assert load_records([run]) == []
    assert f"left out: run {run_id}" in capsys.readouterr().err


class Remote:
    """A repository whose sizes are what it announces, and whose files are as long as it likes."""

    def __init__(self, announced: int | None, sent: int, count: int = 1) -> None:
        self.announced, self.sent, self.count, self.downloads = announced, sent, count, 0

    def list_artifacts(self, path: str) -> list[Any]:
        names = [f"{number}.bin" for number in range(self.count)]
        return [mlflow.entities.FileInfo(each, False, self.announced) for each in names]

    def download_artifacts(self, path: str, into: str) -> None:
        self.downloads += 1
        with (Path(into) / path).open("wb", buffering=0) as file:
            for _ in range(0, self.sent, 1000):
                file.write(bytes(1000))


@pytest.mark.parametrize(
    ("remote", "downloads", "said"),
    [
        (Remote(5_000, 5_000), 1, ""),
        (Remote(20_000, 20_000), 0, "20,000 bytes, more than 10,000"),
        (Remote(5_000, 10**9), 1, "File too large"),
        (Remote(None, 10**9), 1, "File too large"),
        (Remote(0, 10**9, 0), 0, "there is no 0.bin"),
    ],
)
def test_what_a_server_sends_is_bounded(
    remote: Remote, downloads: int, said: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "get_artifact_repository", lambda uri: remote)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if said:
        with pytest.raises(UNREADABLE, match=said):
            read_artifact(run_id, "0.bin", 10_000)
    else:
        assert read_artifact(run_id, "0.bin", 10_000) == bytes(5_000)
    assert remote.downloads == downloads
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limit


def test_a_model_of_too_many_or_too_large_files_is_not_downloaded(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for remote, said in ((Remote(10**12, 0), "more than"), (Remote(1, 1, 10**5), "100,000 files")):
        monkeypatch.setattr(artifacts, "get_artifact_repository", lambda uri, r=remote: r)
        with pytest.raises(UNREADABLE, match=said), open_model("somewhere", ("0.bin",)):
            pass
        assert remote.downloads == 0
