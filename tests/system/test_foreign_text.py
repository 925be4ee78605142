"""Hostile names of files, labels, data sets, runs and answers, through the real commands.

On each surface nothing acts: no control character on the terminal, no line that a name begins, no
cell that a spreadsheet runs, no link or picture in a description, no tag in a page.
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from click.testing import Result
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from PIL import Image

from har.data.manifest import read_manifest
from har.inference.inputs import list_unlabelled
from tests.fixtures import answering, read_csv, tiny_backbones, write_csv, write_images

LABELS = {
    "sitting": "=cmd|' /C calc'!A0",
    "running": "<img src=x onerror=alert(1)>[a](http://evil.example)",
    "texting": "@SUM(A1) `x` **b** | $\\frac",
}
FILES = (
    "=cmd|'x'.jpg", "a\nFAKE accuracy 1.0000.jpg", "\x1b[2J\x1b[31mred.jpg", "\u202egpj.exe.jpg",
    "<script>alert(1)<script>.jpg", "-1+1;=2.jpg", "![x](pixel)\r.jpg", "zero\u200bwidth.jpg",
    "café 日本 😀 שלום.jpg",
)  # fmt: skip
DATASET = "=data\n# FAKE\x1b[31m ![x](http:evil) <b>"
RUN_NAME = "run\nFAKE \x1b]0;title\x07\u202e [x](http://evil.example)"
SIZES = (
    "--image-size",
    32,
    "--batch-size",
    4,
    "--epochs",
    1,
    "--precision",
    "float32",
    "--strategy",
    "one_device",
)
ACTING = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f]"
)


def check_terminal(text: str) -> None:
    assert not ACTING.search(text), ascii(text)
    assert not re.search(r"^\W*FAKE", text, re.MULTILINE), text


def check_table(text: str) -> None:
    for row in csv.reader(io.StringIO(text, newline="")):
        for cell in row:
            is_number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)
            assert is_number or not re.match(r"\s*[=+\-@]..", cell), cell


def check_description(text: str) -> None:
    assert not re.search(r"(?<!\\)!?\[[^]]*\](?<!\\)\((?!get-artifact\?)", text), text
    assert "<" not in text and "FAKE" not in re.findall(r"^\W*(\w+)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose folder, files and labels have hostile names; Kaggle's layout."""
    folder = write_images(tmp_path_factory.mktemp("hostile") / DATASET)
    rows = [(name, LABELS[label]) for name, label in read_csv(folder)]
    for number, name in enumerate(FILES):
        (folder / "train" / rows[number][0]).rename(folder / "train" / name)
        rows[number] = (name, rows[number][1])
    write_csv(folder, rows)
    (folder / "test").mkdir()
    for name in FILES:
        shutil.copy(folder / "train" / name, folder / "test" / name)
    return folder


@pytest.fixture(scope="module")
def trained(
    hostile: Path, store_uri: str, cli: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The ids of a run on these images, whose name is hostile too, and of a published run."""
    with pytest.MonkeyPatch.context() as patch, tiny_backbones():
        patch.setenv("MLFLOW_TRACKING_URI", store_uri)
        patch.setenv("HAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        mlflow.set_tracking_uri(store_uri)
        options = ("--experiment", "hostile", "--run-name", RUN_NAME, *SIZES)
        result = cli("run", "--data", hostile, "--test-fraction", "0.3", *options)
        assert result.exit_code == 0, result.output
        check_terminal(result.stdout)
        check_terminal(result.stderr)
        assert cli("import-notebooks", "--experiment", "hostile").exit_code == 0
    found = mlflow.search_runs(experiment_names=["hostile"], output_format="list")
    return [
        each.info.run_id for each in sorted(found, key=lambda run: run.info.run_name != RUN_NAME)
    ][:2]


def test_a_training_is_recorded_harmlessly(trained: list[str], hostile: Path, store: str) -> None:
    run = mlflow.get_run(trained[0])
    assert run.info.run_name == RUN_NAME
    check_description(run.data.tags[MLFLOW_RUN_NOTE])
    folder = Path(mlflow.artifacts.download_artifacts(run_id=trained[0], artifact_path=""))
    tables = list(folder.rglob("*.csv"))
    assert len(tables) >= 5
    for each in tables:
        check_table(each.read_text(encoding="utf-8"))
    labels = pd.read_csv(folder / "evaluation/per_class.csv")["label"]
    assert any(label.startswith("'=cmd") for label in labels)


def run_all(cli: Any, hostile: Path, out: Path, runs: list[str]) -> Iterator[tuple[str, Result]]:
    model, data = ("--model", f"runs:/{runs[0]}/model"), ("--data", hostile)
    yield "prepare", cli("prepare", *data, "--out", out / "prepared\nFAKE")
    yield "evaluate", cli("evaluate", *model, *data, "--robustness-images", 2)
    yield "classify", cli("classify", hostile / "test", *model)
    yield "predict", cli("predict", *data, "--out", out / "p\x1b\nFAKE.csv", *model)
    yield (
        "compare",
        cli("compare", *runs, "--out", out / "comparison\nFAKE", "--experiment", "hostile"),
    )
    yield "twins", cli("twins", runs[0])
    yield "promote", cli("promote", runs[0])
    yield "champion", cli("champion")
    yield "cache", cli("cache")


def test_every_command_prints_harmlessly(
    trained: list[str],
    hostile: Path,
    store: str,
    cli: Any,
    tmp_path: Path,
    guessing_is_enough: None,
) -> None:
    printed = {}
    for command, result in run_all(cli, hostile, tmp_path, trained):
        assert result.exit_code == 0, (command, result.output)
        check_terminal(result.stdout)
        check_terminal(result.stderr)
        printed[command] = result.stdout
    for name in ("=cmd", "café 日本 😀 שלום.jpg", "\\x1b[2J\\x1b[31mred.jpg", "a\\nFAKE"):
        assert name in printed["classify"]
    assert "run\\nFAKE \\x1b]0;title\\x07\\u202e" in printed["compare"]
    assert "run\\nFAKE" in printed["promote"] and "run\\nFAKE" in printed["champion"]
    tables = [*(tmp_path / "comparison\nFAKE").glob("*.csv"), tmp_path / "p\x1b\nFAKE.csv"]
    assert len(tables) == 5
    for each in tables:
        check_table(each.read_text(encoding="utf-8"))
    for page in tmp_path.glob("*/report.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img src=x" not in text and "&lt;" in text
    for run in mlflow.search_runs(experiment_names=["hostile", "har"], output_format="list"):
        check_description(run.data.tags.get(MLFLOW_RUN_NOTE, ""))


def test_predictions_name_the_files_and_resume(hostile: Path, tmp_path: Path) -> None:
    from har.inference.predict import BATCH, COLUMNS, batched, predict_to_file

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2 * BATCH):
        name = f"{number:03} {FILES[number % len(FILES)]}" if number % 2 else f"={number:03}.jpg"
        shutil.copy(hostile / "test" / FILES[0], folder / name)
    files, calls = list_unlabelled(folder), []
    # the first image of the second batch: two batches are under way at once, in any order
    Image.new("RGB", (8, 8)).save(list(files.values())[BATCH])
    stop_at = list(files.values())[BATCH].read_bytes()

    def classify(images: Any, stop: bool = False) -> list[Any]:
        if stop and images[0] == stop_at:
            raise KeyboardInterrupt
        calls.append(len(images))
        return [{"label": "=1+1", "probability": 0.5, "top_3": [], "error": None} for _ in images]

    for suffix in ("csv", "parquet"):
        out = tmp_path / f"p.{suffix}"
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            predict_to_file(folder, files, out, lambda images: classify(images, True), "m")
        predict_to_file(folder, files, out, classify, "m")
        assert calls == [BATCH, BATCH], "the second call resumed"
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    check_table(text)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == list(COLUMNS) and {row[1] for row in rows[1:]} == {"'=1+1"}
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table["filename"].tolist() == list(files) and set(table["label"]) == {"=1+1"}
    assert len(list(batched(files, BATCH))) == 2


def test_a_prepared_folder_is_read_back(
    hostile: Path, cli: Any, store: str, tmp_path: Path
) -> None:
    assert cli("prepare", "--data", hostile, "--out", tmp_path / "out").exit_code == 0
    check_table((tmp_path / "out/manifest.csv").read_text(encoding="utf-8"))
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.class_names) == set(LABELS.values())
    assert {f"train/{name}" for name in FILES} <= set(manifest.table["path"])
    # as older versions wrote it: nothing is escaped, and nothing may be restored
    table = manifest.table.assign(label="'=old")
    (tmp_path / "old").mkdir()
    stored = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))
    for name in ("escaped_cells", "table_sha256"):
        del stored[name]
    old = replace(manifest, table=table)
    stored |= {name: getattr(old, name) for name in ("dataset_digest", "test_digest")}
    (tmp_path / "old/dataset.json").write_text(json.dumps(stored), encoding="utf-8")
    table.to_csv(tmp_path / "old/manifest.csv", index=False, lineterminator="\r\n")
    assert set(read_manifest(tmp_path / "old").table["label"]) == {"'=old"}


class HostileServer(BaseHTTPRequestHandler):
    """Answers with escape codes and false lines."""

    def do_POST(self) -> None:
        row = {
            "label": "sitting\nFAKE 100 %\x1b[31m",
            "probability": 0.5,
            "top_3": [
                {"label": "x", "probability": 0.5},
                {"label": "y\x9b\nFAKE", "probability": 0.1},
            ],
            "error": None,
        }
        body = json.dumps({"predictions": [row, {**row, "error": "why\nFAKE\x07\u202e"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_answers_of_a_server_are_shown_harmlessly(raw: Path, cli: Any) -> None:
    server = HTTPServer(("127.0.0.1", 0), HostileServer)
    images = sorted((raw / "train").iterdir())[:2]
    with answering(server):
        result = cli("classify", *images, "--url", f"http://127.0.0.1:{server.server_port}")
    assert result.exit_code == 0, result.output
    check_terminal(result.output)
    assert len(result.stdout.splitlines()) == 2 and "sitting FAKE" in result.stdout


HOSTILE_WORD = "x\nFAKE: \x1b[31m\u202e\x07\udcff"


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--data", HOSTILE_WORD],
        ["run", "--loader", HOSTILE_WORD],
        [HOSTILE_WORD],
        ["prepare", "--data", "sample", "--out", f"file/{HOSTILE_WORD}"],
        ["predict", "--data", ".", "--out", f"{HOSTILE_WORD}.txt"],
        ["predict", "--data", HOSTILE_WORD],
        ["classify", HOSTILE_WORD],
        ["classify", "file", "--url", f"http://127.0.0.1:1/{HOSTILE_WORD}"],
        ["evaluate", HOSTILE_WORD, "--data", "raw"],
        ["evaluate", "--model", HOSTILE_WORD, "--data", "raw"],
        ["compare", HOSTILE_WORD],
        ["compare", "--experiment", HOSTILE_WORD],
        ["promote", HOSTILE_WORD],
        ["twins", HOSTILE_WORD],
        ["train", "--resume", HOSTILE_WORD],
    ],
)
def test_an_error_is_one_harmless_line(
    words: list[str], cli: Any, store: str, tiny_raw: Path
) -> None:
    Path("file").write_text("no image")
    Path("raw").symlink_to(tiny_raw)
    result = cli(*words)
    assert result.exit_code == 2, result.output
    check_terminal(result.output)
    assert [line[:7] for line in result.stderr.splitlines() if "FAKE" in line] == ["error: "]


def test_names_from_the_store_and_the_cache_are_harmless(
    store: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from har.util.files import cache_folder

    backup = cache_folder() / "trainings" / "id\nFAKE\x1b[31m"
    backup.mkdir(parents=True)
    (backup / "job.json").write_text("{}")
    entry = cache_folder() / "features" / "entry"
    entry.mkdir(parents=True)
    key = {
        "augmentation": "none",
        "backbone": "b\nFAKE\x07",
        "image_size": 1,
        "runtime": "\x1b",
        "arithmetic": "f",
    }
    (entry / "about.json").write_text(json.dumps({"key": key, "shape": [1, 2]}))
    mlflow.set_experiment("name\nFAKE \x1b[31m")
    with mlflow.start_run(
        tags={"job": "train", "recipe_digest": "d", MLFLOW_RUN_NAME: "\x1b\nFAKE"}
    ):
        pass
    for words in (
        ["cache"],
        ["sync"],
        ["compare"],
        ["compare", "--experiment", "none"],
        ["promote"],
    ):
        result = cli(*words)
        check_terminal(result.output)
