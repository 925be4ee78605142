"""The job `predict` with images and predictions elsewhere: interrupted, resumed, the same rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from har.inference import shards
from har.inference.inputs import find_inputs
from har.jobs import predict as predict_job
from har.jobs.predict import Scoring, run_prediction
from har.util.errors import UserError
from har.util.places import Place, Url, list_below, read_place, replace_place
from tests.util.test_places import memory as memory


class Model:
    """A model that knows sizes, counts what it is asked, and may be interrupted."""

    asked, stop_after = 0, 10**9

    def classify(self, contents: Sequence[bytes]) -> list[dict]:
        if self.asked + len(contents) > self.stop_after:
            raise KeyboardInterrupt
        self.asked += len(contents)
        return [
            {"label": f"size {len(data)}", "probability": 0.5, "top_3": [], "error": None}
            for data in contents
        ]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(shards, "SHARD_ROWS", 32)
    found = Model()
    logged = SimpleNamespace(classifier=found, identity="m")
    monkeypatch.setattr(predict_job, "load_logged_model", lambda uri: logged)
    return found


@pytest.fixture
def images(memory: Url) -> Url:
    folder = memory / "images"
    for number in range(150):
        with replace_place(folder / f"{number:03}.jpg") as file:
            file.write(b"x" * number)
    return folder


def score(data: Place, out: Place, **options: Any) -> Any:
    return run_prediction(
        Scoring(data=data, files=find_inputs(data), out=out, model="m", **options)
    )


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_a_folder_elsewhere_is_resumed(
    images: Url, memory: Url, model: Model, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = memory / "out"
    model.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        score(images, out, shards=format)
    written = [name for name in list_below(out) if name.startswith("part")]
    assert 1 <= len(written) <= 3
    model.asked, model.stop_after = 0, 10**9
    outcome = score(images, out, shards=format)
    assert (outcome.images, outcome.failed, outcome.first_error) == (150, 1, "empty: 0 bytes")
    assert f"resuming: {len(written)} of 5 parts are there" in capsys.readouterr().err
    # an empty image is never asked for
    assert model.asked == 150 - 32 * len(written) - ("part-00000" not in str(written))
    assert list_below(out) == ["_task.json", *(f"part-0000{n}.{format}" for n in range(5))]
    assert json.loads(read_place(out / "_task.json", 1000))["images"] == 150


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_elsewhere_is_that_of_this_machine(
    images: Url, memory: Url, model: Model, tmp_path: Path, suffix: str
) -> None:
    out = memory / f"p.{suffix}"
    model.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        score(images, out)
    parts = f".p.{suffix}.shards/"
    assert any(name.startswith(parts) for name in list_below(memory))
    model.stop_after = 10**9
    assert score(images, out).images == 150
    assert not any(name.startswith(parts) for name in list_below(memory))
    here = tmp_path / f"p.{suffix}"
    assert score(images, here).failed == 1
    found = tmp_path / f"found.{suffix}"
    found.write_bytes(read_place(out, 1_000_000))
    if suffix == "csv":
        assert found.read_bytes() == here.read_bytes()
    else:
        pd.testing.assert_frame_equal(pd.read_parquet(found), pd.read_parquet(here))
    with pytest.raises(UserError, match="exists already"):
        score(images, out)


def test_two_commands_at_once_write_the_same(images: Url, memory: Url, model: Model) -> None:
    """There is no lock: the second begins and ends while the first is under way."""
    out, classify = memory / "out", model.classify
    found: list[Any] = []

    def run_another(contents: Sequence[bytes]) -> list[dict]:
        if not found:
            found.append(None)
            found[0] = score(images, out)
        return classify(contents)

    model.classify = run_another  # type: ignore[method-assign]
    assert score(images, out) == found[0]
    assert len(list_below(out)) == 6


def test_what_the_command_says(images: Url, memory: Url, model: Model, cli: Any) -> None:
    done = cli("predict", "--data", images, "--out", memory / "o", "--shards", "csv")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{memory}/o\n" and "part-00004.csv" in list_below(memory / "o")
    for words, said in (
        (("--data", "zip://a::s3://b/c"), "must not have '::'"),
        (("--data", "odd://a"), "odd:// is not read here"),
        (("--data", images, "--out", "https://host/p.csv"), "--out cannot be a web server"),
        (("--data", images, "--out", memory / "p.txt"), "--out must be a .csv or .parquet file"),
        (("--data", images, "--out", memory / "p.csv", "--shards", "csv"), "is for a folder"),
        (("--data", memory / "none\x1b", "--out", memory / "p"), "no images in"),
        (("--data", images, "--out", images), "holds other files (000.jpg"),
    ):
        refused = cli("predict", *words)
        assert refused.exit_code == 2 and said in refused.output, refused.output
        assert len(refused.output.splitlines()) == 1 and "\x1b" not in refused.output
