"""Runs carried between stores: `har export-runs` and `har import-runs`.

Two sessions record the same recipe in folders of their own, as on a P100 and on two T4s; a third
folder imports both.
"""

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from har.tracking import artifacts, foreign, transfer
from har.util import archives
from har.util.errors import UserError
from tests.fixtures import new_store, tiny_backbones, tracking_server, tracking_to

TINY = (
    "--image-size", 32, "--batch-size", 4, "--epochs", 2, "--backbone", "efficientnet-lite0",
    "--precision", "float32", "--weights", "random",
)  # fmt: skip
GPUS = {"1xP100": "Tesla P100-PCIE-16GB", "2xT4": "Tesla T4,Tesla T4"}


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a store of its own."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    # MLflow keeps a store for each URI that it has seen in this process
    uri = f"sqlite:///{folder}/mlflow.db"
    point_to(uri if (folder / "mlflow.db").exists() else new_store(folder), monkeypatch)


def point_to(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return result


def trainings(experiment: str = "har") -> list[Any]:
    return list(
        mlflow.search_runs(
            experiment_names=[experiment],
            filter_string="tags.job = 'train'",
            output_format="list",
            order_by=["start_time ASC"],
        )
    )


def every_run() -> list[Any]:
    return list(mlflow.search_runs(search_all_experiments=True, output_format="list"))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, tiny_raw: Path, cli) -> dict[str, Path]:
    """The folders of two sessions by hardware; the first also holds a nested run, an unfinished one
    and one that is not ours.
    """
    before, folders = mlflow.get_tracking_uri(), {}
    with pytest.MonkeyPatch.context() as patch, tiny_backbones():
        for hardware, names in GPUS.items():
            folders[hardware] = tmp_path_factory.mktemp("session") / hardware
            use(folders[hardware], patch)
            patch.setenv("HAR_PRETEND_GPUS", names)
            result = ok(
                cli(
                    "run", "--variant", "v6", "--data", tiny_raw, *TINY, "--strategy", "mirrored",
                )
            )  # fmt: skip
            assert "computed by the CPU" in result.stderr
            patch.delenv("HAR_PRETEND_GPUS")
            if hardware == "1xP100":
                add_other_runs()
    mlflow.set_tracking_uri(before)
    return folders


def add_other_runs() -> None:
    (training,) = trainings()
    client, experiment = MlflowClient(), training.info.experiment_id
    nested = client.create_run(
        experiment, tags={"job": "note", "mlflow.parentRunId": training.info.run_id}
    )
    for step in range(3):
        client.log_metric(nested.info.run_id, "loss", 3.0 - step, timestamp=1000 + step, step=step)
    client.set_terminated(nested.info.run_id, "FINISHED", end_time=5000)
    client.create_run(experiment, tags={"job": "train"})
    foreign_run = client.create_run(experiment, tags={"of": "somebody else"})
    client.set_terminated(foreign_run.info.run_id)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an empty store, into which runs are imported."""
    before = mlflow.get_tracking_uri()
    use(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def session_file(sessions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cli) -> bytes:
    """What `har export-runs` writes of the P100's session."""
    out = tmp_path_factory.mktemp("exported") / "runs.zip"
    with pytest.MonkeyPatch.context() as patch, tracking_to(None):
        point_to(f"sqlite:///{sessions['1xP100']}/mlflow.db", patch)
        ok(cli("export-runs", "--out", out))
    return out.read_bytes()


@pytest.fixture
def exported(session_file: bytes, tmp_path: Path, home: Path) -> Path:
    """The P100's session as a file."""
    out = tmp_path / "runs.zip"
    out.write_bytes(session_file)
    return out


def facts(run: Any, client: MlflowClient) -> dict[str, Any]:
    """All of a run that a copy must have too."""
    moved = ("twin.", "mlflow.parentRunId", "original_run_id", "imported_", "mlflow.log-model")
    own, every = run.info.run_id, run.data.tags.items()
    tags = {k: v.replace(own, "ID") for k, v in every if not k.startswith(moved)}
    history = {
        name: [
            (m.value, m.timestamp, m.step) for m in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }
    inputs = [
        (
            each.dataset.name,
            each.dataset.digest,
            each.dataset.source,
            {t.key: t.value for t in each.tags},
        )
        for each in run.inputs.dataset_inputs
    ]
    info = run.info
    return {
        "info": (info.run_name, info.status, info.start_time, info.end_time),
        "params": run.data.params, "tags": tags, "history": history, "inputs": inputs,
        "files": list_files(client, info.run_id), "models": len(run.outputs.model_outputs),
    }  # fmt: skip


def list_files(client: MlflowClient, run_id: str) -> dict[str, int]:
    found, folders = {}, [""]
    while folders:
        for each in client.list_artifacts(run_id, folders.pop() or None):
            if each.is_dir:
                folders.append(each.path)
            else:
                found[each.path] = each.file_size
    return found


@pytest.mark.slow
def test_two_sessions_meet_in_one_comparison(
    sessions: dict[str, Path], exported: Path, home: Path, tmp_path: Path, tiny_raw: Path, cli,
    guessing_is_enough: None, tiny_backbone: None,
) -> None:  # fmt: skip
    moved = tmp_path / "downloads" / "output"
    shutil.copytree(sessions["2xT4"], moved)
    result = ok(cli("import-runs", exported, moved))
    assert "runs.zip: 2 runs added, 0 updated, 0 were here already" in result.stdout
    assert "twins: 1xP100" in result.stdout
    p100, t4 = sorted(trainings(), key=lambda run: run.data.tags["hardware"])
    assert p100.data.tags["twin.2xT4"] == t4.info.run_id
    assert t4.data.tags["twin.1xP100"] == p100.info.run_id
    assert {p100.data.tags["hardware_pretended"], t4.data.tags["hardware_pretended"]} == {"yes"}
    assert (p100.data.tags["imported_from"], t4.data.tags["imported_from"]) == (
        "runs.zip",
        "output",
    )
    # a copy has what the original has
    for copy, hardware in ((p100, "1xP100"), (t4, "2xT4")):
        origin = MlflowClient(f"sqlite:///{sessions[hardware]}/mlflow.db")
        original = origin.get_run(copy.data.tags["original_run_id"])
        assert facts(copy, MlflowClient()) == facts(original, origin)
        assert copy.info.run_id != original.info.run_id
    # the links between metrics and models
    (model,) = mlflow.search_logged_models(
        [p100.info.experiment_id], f"source_run_id = '{p100.info.run_id}'", output_format="list"
    )
    linked = {metric.key: metric for metric in model.metrics}
    assert linked["accuracy"].value == p100.data.metrics["accuracy"]
    assert linked["accuracy"].dataset_digest
    (nested,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.job = 'note'", output_format="list"
    )
    assert nested.data.tags["mlflow.parentRunId"] == p100.info.run_id
    # and every command works on it
    table = ok(cli("twins", p100.info.run_id)).stdout
    assert "1xP100" in table and "2xT4" in table
    assert ok(cli("compare")).stdout.count("v6 · lite0") == 2
    promoted = ok(cli("promote", p100.info.run_id, "--ignore-champion"))
    assert "this model is not of this store: it came with runs.zip" in promoted.stderr
    evaluated = ok(cli("evaluate", "--run-id", t4.info.run_id, "--robustness-images", 0))
    assert "it came with output" in evaluated.stderr
    again = ok(cli("train", "--reproduce", p100.info.run_id, "--data", tiny_raw))
    assert f"{p100.data.metrics['accuracy']:.1%}" in again.stdout
    picture = next((tiny_raw / "train").glob("*.jpg"))
    assert ok(cli("classify", picture)).stdout


def test_a_run_is_copied_once_by_whatever_way_it_comes(
    sessions: dict[str, Path], exported: Path, home: Path, tmp_path: Path, cli
) -> None:
    folder = sessions["1xP100"]
    archive = shutil.make_archive(str(tmp_path / "output"), "gztar", folder)
    assert "2 runs added" in ok(cli("import-runs", exported)).stdout
    runs = {run.info.run_id for run in every_run()}
    for source in (
        exported,
        folder,
        folder / "mlflow.db",
        f"sqlite:///{folder}/mlflow.db",
        archive,
    ):
        said = ok(cli("import-runs", source))
        assert "0 runs added, 0 updated, 2 were here already" in said.stdout
        assert "left out" in said.stderr or source == exported
    # also what was exported here, and again at home
    ok(cli("export-runs", "--out", tmp_path / "again.zip"))
    assert "0 runs added" in ok(cli("import-runs", tmp_path / "again.zip")).stdout
    assert {run.info.run_id for run in every_run()} == runs
    use(sessions["1xP100"], pytest.MonkeyPatch())
    before = len(every_run())
    assert "0 runs added" in ok(cli("import-runs", tmp_path / "again.zip")).stdout
    assert len(every_run()) == before


def test_what_a_source_has_gained_is_added(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(sessions["1xP100"], grown)
    ok(cli("import-runs", grown))
    client = MlflowClient(f"sqlite:///{grown}/mlflow.db")
    experiment = client.get_experiment_by_name("har").experiment_id
    (training,) = client.search_runs([experiment], "tags.job='train' and tags.recipe_digest != ''")
    new = client.create_run(experiment, tags={"job": "note", "mlflow.runName": "later"})
    client.set_terminated(new.info.run_id)
    client.log_metric(training.info.run_id, "later", 0.5, timestamp=7, step=1)
    client.set_tag(training.info.run_id, "remark", "the best")
    said = ok(cli("import-runs", grown)).stdout
    assert "1 runs added, 1 updated, 1 were here already" in said
    (copy,) = trainings()
    assert copy.data.metrics["later"] == 0.5 and copy.data.tags["remark"] == "the best"
    assert len(copy.outputs.model_outputs) == 1
    assert "0 runs added, 0 updated, 3" in ok(cli("import-runs", grown)).stdout


SLOW_STEPS = ("create_logged_model", "log_batch", "log_outputs", "log_artifact")


@pytest.mark.parametrize(
    "step",
    [
        "log_model_artifacts",
        "set_terminated",
        *(pytest.param(step, marks=pytest.mark.slow) for step in SLOW_STEPS),
    ],
)
def test_an_interrupted_import_goes_on(
    step: str, sessions: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, stop)
        assert cli("import-runs", sessions["1xP100"]).exit_code != 0
    assert "2 runs added" in ok(cli("import-runs", sessions["1xP100"])).stdout
    assert len(every_run()) == 2
    (copy,) = trainings()
    origin = MlflowClient(f"sqlite:///{sessions['1xP100']}/mlflow.db")
    original = origin.get_run(copy.data.tags["original_run_id"])
    assert facts(copy, MlflowClient()) == facts(original, origin)


@pytest.mark.slow
def test_a_killed_import_goes_on(sessions: dict[str, Path], home: Path, cli) -> None:
    for delay in (4.0, 5.0, 5.5, 6.0, 6.5):
        command = [sys.executable, "-m", "har", "import-runs", str(sessions["1xP100"])]
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ok(cli("import-runs", sessions["1xP100"]))
    assert len([run for run in every_run() if run.info.status == "FINISHED"]) == 2
    assert len(every_run()) == 2


@pytest.mark.slow
def test_from_a_server_to_sqlite_and_back(
    sessions: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli,
    guessing_is_enough: None,
) -> None:  # fmt: skip
    (tmp_path / "server").mkdir()
    with tracking_server(tmp_path / "server") as address:
        point_to(address, monkeypatch)
        assert "2 runs added" in ok(cli("import-runs", sessions["1xP100"])).stdout
        assert "0 runs added" in ok(cli("import-runs", sessions["1xP100"])).stdout
        on_server = [facts(run, MlflowClient()) for run in trainings()]
        ok(cli("promote", trainings()[0].info.run_id))
        point_to(f"sqlite:///{home}/mlflow.db", monkeypatch)
        assert "2 runs added" in ok(cli("import-runs", address)).stdout
        assert [facts(run, MlflowClient()) for run in trainings()] == on_server
        ok(cli("export-runs", "--out", tmp_path / "back.zip"))
        point_to(address, monkeypatch)
        assert "0 runs added, 0 updated, 2" in ok(cli("import-runs", tmp_path / "back.zip")).stdout
        assert "1 runs added" in ok(cli("import-runs", sessions["2xT4"])).stdout


# --- hostile sources


def rebuild(source: Path, out: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Write an export again with other content; its digests are made to fit."""
    with zipfile.ZipFile(source) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    del files["digests.json"]
    change(files)
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out


def write_zip(out: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out


def link_in_zip(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def write_tar(out: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    with tarfile.open(out, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(b"abc") if info.size else None)
    return out


ARCHIVES: dict[str, Callable[[Path, bytes], Path]] = {
    "zip: out of the folder": lambda out, db: write_zip(out, ("mlruns/../../../evil", b"x")),
    "zip: absolute": lambda out, db: write_zip(out, ("/tmp/har-evil/mlruns/x", b"x")),
    "zip: backslashes": lambda out, db: write_zip(out, ("mlruns/..\\..\\evil", b"x")),
    "zip: a drive": lambda out, db: write_zip(out, ("C:/mlruns/evil", b"x")),
    "zip: a link": lambda out, db: write_zip(out, (link_in_zip("mlruns/1/a"), b"/etc/passwd")),
    "zip: the database is a link": lambda out, db: write_zip(
        out, (link_in_zip("mlflow.db"), b"/etc/passwd")
    ),
    "zip: a bomb": lambda out, db: write_zip(
        out, ("mlflow.db", db), ("mlruns/zeros", bytes(60_000_000))
    ),
    "zip: too many": lambda out, db: write_zip(out, *((f"mlruns/{i}", b"") for i in range(600))),
    "zip: empty": lambda out, db: write_zip(out),
    "zip: no store": lambda out, db: write_zip(out, ("photo.jpg", b"x")),
    "tar: out of the folder": lambda out, db: write_tar(out, "mlruns/../../../evil"),
    "tar: absolute": lambda out, db: write_tar(out, "/tmp/har-evil/mlruns/x"),
    "tar: a link": lambda out, db: write_tar(out, "mlruns/a", tarfile.SYMTYPE, "/etc/passwd"),
    "tar: a hard link": lambda out, db: write_tar(out, "mlruns/a", tarfile.LNKTYPE, "/etc/passwd"),
    "tar: a device": lambda out, db: write_tar(out, "mlruns/a", tarfile.CHRTYPE),
    "tar: a pipe": lambda out, db: write_tar(out, "mlruns/a", tarfile.FIFOTYPE),
    "no archive": lambda out, db: (out.write_bytes(b"junk" * 99), out)[1],
    "an empty file": lambda out, db: (out.touch(), out)[1],
    "no database": lambda out, db: write_zip(out, ("mlflow.db", b"SQLite format 3\0" + b"x" * 999)),
    "a text as database": lambda out, db: write_zip(out, ("mlflow.db", b"hello")),
    "half a database": lambda out, db: write_zip(out, ("mlflow.db", db[: len(db) // 2])),
    "two databases": lambda out, db: write_zip(out, ("a/mlflow.db", db), ("b/mlflow.db", db)),
}


def assert_refused(result: Any, home: Path, said: str = "") -> None:
    lines = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("unpacking", "reading", "left out"))
    ]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        result.output
    )
    assert said in lines[0], lines
    assert not Path("/tmp/har-evil").exists() and not (home.parent / "evil").exists()
    # nothing was imported
    assert not Path("mlflow.db").exists() or not every_run()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_one_error(
    name: str, sessions: dict[str, Path], home: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, cli,
) -> None:  # fmt: skip
    monkeypatch.setattr(archives, "MAX_BYTES", 50_000_000)
    monkeypatch.setattr(archives, "MAX_FILES", 500)
    database = (sessions["1xP100"] / "mlflow.db").read_bytes()
    assert_refused(cli("import-runs", ARCHIVES[name](tmp_path / "hostile", database)), home)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_export_is_one_error(share: float, exported: Path, home: Path, cli) -> None:
    data = exported.read_bytes()
    exported.write_bytes(data[: int(share * len(data))])
    assert_refused(cli("import-runs", exported), home)


def test_a_changed_export_is_one_error(exported: Path, home: Path, tmp_path: Path, cli) -> None:
    with zipfile.ZipFile(exported) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    victim = next(name for name in files if name.endswith("recipe.json"))
    for change in ("altered", "missing", "added"):
        changed = dict(files)
        if change == "altered":
            changed[victim] = files[victim].replace(b"v6", b"v5")
        elif change == "missing":
            del changed[victim]
        else:
            changed["mlruns/0/extra"] = b"x"
        out = write_zip(tmp_path / f"{change}.zip", *changed.items())
        assert_refused(cli("import-runs", out), home, "damaged or was changed")
    for digests in (b"[]", b"{", b"[" * 100_000, b"null", b'{"a": {}}'):
        out = write_zip(tmp_path / "d.zip", *(files | {"digests.json": digests}).items())
        assert_refused(cli("import-runs", out), home, "damaged")


DATABASES = {
    "newer": ("UPDATE alembic_version SET version_num = 'f00d'", "newer MLflow than"),
    "no revision": ("DELETE FROM alembic_version", "no MLflow database"),
    "no column": ("ALTER TABLE runs RENAME COLUMN deleted_time TO gone", "cannot be read"),
    "a view": (
        "ALTER TABLE runs RENAME TO r; CREATE VIEW runs AS SELECT * FROM r",
        "computed when it is read",
    ),
    "a computed column": (
        "CREATE TABLE evil (a INT, b TEXT GENERATED ALWAYS AS (hex(zeroblob(1000000000))))",
        "computed when it is read",
    ),
    "a virtual table": (
        "PRAGMA writable_schema = ON; INSERT INTO sqlite_master VALUES"
        " ('table', 'evil', 'evil', 0, 'CREATE VIRTUAL TABLE evil USING csv(filename=passwd)')",
        "no MLflow database",
    ),
    "a hidden computed column": (
        "CREATE TABLE evil (a INT, b TEXT GENERATED ALWAYS AS/**/(hex(zeroblob(1000000000))))",
        "computed when it is read",
    ),
    "a name of a model that MLflow refuses": (
        "UPDATE logged_models SET name = 'a/b'",
        "Invalid model name",
    ),
    "a digest that is no digest": (
        "UPDATE tags SET value = char(39) || 'x' WHERE key = 'recipe_digest'",
        "",
    ),
    "a long cell": ("UPDATE params SET value = hex(zeroblob(600000))", "too large"),
    "text for a time": ("UPDATE runs SET start_time = 'soon'", "is 'soon'"),
    "text for a step": ("UPDATE metrics SET step = 'first' WHERE key = 'accuracy'", "is 'first'"),
    "no time": ("UPDATE runs SET start_time = NULL, end_time = NULL", ""),
    "an impossible status": (
        "PRAGMA ignore_check_constraints = ON; UPDATE runs SET status = 'GREAT'", "no finished runs"
    ),
    "a name that is a path": (
        "UPDATE latest_metrics SET key = '../../x' WHERE key = 'accuracy';"
        "UPDATE metrics SET key = '../../x' WHERE key = 'accuracy'",
        "cannot be read",
    ),
    "no experiment": ("UPDATE experiments SET name = ' ' WHERE name = 'har'", ""),
    "an id that is a path": (
        "UPDATE runs SET run_uuid = '../../../etc' WHERE name LIKE 'v6%'", ""
    ),
    "models of nobody": ("UPDATE logged_models SET model_id = '../../evil'", "has no file MLmodel"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATABASES)
def test_a_hostile_database_is_one_error_or_harmless(
    name: str, sessions: dict[str, Path], home: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, cli,
) -> None:  # fmt: skip
    monkeypatch.setattr(foreign, "MAX_CELL", 1_000_000)
    folder = tmp_path / "hostile"
    shutil.copytree(sessions["1xP100"], folder)
    script, said = DATABASES[name]
    connection = sqlite3.connect(folder / "mlflow.db")
    connection.executescript(f"PRAGMA foreign_keys = OFF; {script}")
    connection.close()
    before = (folder / "mlflow.db").read_bytes()
    result = cli("import-runs", folder)
    if result.exit_code == 0:
        assert not said, result.output
    else:
        assert_refused(result, home, said)
    assert (folder / "mlflow.db").read_bytes() == before


def test_a_trigger_does_nothing(sessions: dict[str, Path], home: Path, tmp_path: Path, cli) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(sessions["1xP100"], folder)
    connection = sqlite3.connect(folder / "mlflow.db")
    connection.executescript(
        "CREATE TRIGGER evil AFTER INSERT ON experiments BEGIN DELETE FROM runs; END"
    )
    connection.close()
    assert "2 runs added" in ok(cli("import-runs", folder)).stdout


def find_model(folder: Path) -> Path:
    (found,) = folder.glob("mlruns/*/models/*/artifacts")
    return found


def test_models_are_files_without_pickles_and_links(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(sessions["1xP100"], folder)
    model = find_model(folder)
    pickled = model / "artifacts" / "python_model.pkl"
    pickled.write_bytes(b"cos\nsystem\n(S'touch /tmp/har-evil'\ntR.")
    assert_refused(cli("import-runs", folder), home, "a pickle")
    pickled.unlink()
    described = (model / "MLmodel").read_bytes()
    for text in (
        described.replace(b"run_id: ", b'"run_id": '),
        described.replace(b"run_id: ", b"run_id : "),
        described + b"x: \xff\n",
        b"{" * 9999,
    ):
        (model / "MLmodel").write_bytes(text)
        assert_refused(cli("import-runs", folder), home, "MLmodel")
    (model / "MLmodel").write_bytes(described)
    link = model / "passwords"
    link.symlink_to("/etc/passwd")
    assert_refused(cli("import-runs", folder), home, "is a link or a device")
    link.unlink()
    os.mkfifo(link)
    assert_refused(cli("import-runs", folder), home, "is a link or a device")
    link.unlink()
    (model / "MLmodel").rename(model / "Other")
    assert_refused(cli("import-runs", folder), home, "has no file MLmodel")
    shutil.rmtree(model.parent)
    assert_refused(cli("import-runs", folder), home, "has no file MLmodel")


def beside_a_secret(session: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a session, and a folder with a file that nobody may import."""
    hostile, secret = folder / "hostile", folder / "secret"
    shutil.copytree(session, hostile)
    secret.mkdir()
    (secret / "key").write_text("mine")
    return hostile, secret


def test_paths_of_the_other_machine_are_not_followed(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder, secret = beside_a_secret(sessions["1xP100"], tmp_path)
    connection = sqlite3.connect(folder / "mlflow.db")
    connection.execute("UPDATE runs SET artifact_uri = ?", (secret.as_uri(),))
    connection.execute("UPDATE logged_models SET artifact_location = ?", (secret.as_uri(),))
    connection.execute("UPDATE experiments SET artifact_location = ?", (secret.as_uri(),))
    connection.commit()
    connection.close()
    ok(cli("import-runs", folder))
    assert not list(home.rglob("key"))
    (copy,) = trainings()
    assert "recipe.json" in list_files(MlflowClient(), copy.info.run_id)


def test_a_link_into_the_store_is_not_followed(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "mlflow.db").symlink_to(sessions["1xP100"] / "mlflow.db")
    assert_refused(cli("import-runs", folder), home, "it is a link")
    shutil.copytree(sessions["1xP100"], tmp_path / "real")
    shutil.move(tmp_path / "real" / "mlruns", tmp_path / "elsewhere")
    (tmp_path / "real" / "mlruns").symlink_to(tmp_path / "elsewhere")
    assert_refused(cli("import-runs", tmp_path / "real"), home, "is a link: it is not followed")


def test_a_link_to_artifacts_is_not_followed(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder, secret = beside_a_secret(sessions["1xP100"], tmp_path)
    artifacts_of = find_model(folder)
    shutil.rmtree(artifacts_of)
    artifacts_of.symlink_to(secret)
    assert_refused(cli("import-runs", folder), home, "is a link: it is not followed")


def test_checking_a_database_ends(
    sessions: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.setattr(foreign, "CHECK_TIMEOUT_S", 0)
    monkeypatch.setattr(foreign, "STEPS_BETWEEN_LOOKS", 1)
    assert_refused(cli("import-runs", sessions["1xP100"]), home, "no MLflow database")


def test_a_database_that_was_being_written_is_refused(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(sessions["1xP100"], folder)
    (folder / "mlflow.db-journal").write_bytes(b"x" * 512)
    assert_refused(cli("import-runs", folder), home, "a program was writing it")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_that_unpack_without_a_limit_are_refused(
    method: int, home: Path, tmp_path: Path, cli
) -> None:
    out = tmp_path / "bomb.zip"
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("mlflow.db", bytes(1_000_000))
    assert_refused(cli("import-runs", out), home, "in another way than deflate")


def test_a_tar_with_a_header_of_megabytes_is_refused(home: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "bomb.tar.gz"
    with tarfile.open(out, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("mlflow.db")
        info.pax_headers = {"comment": "x" * 20_000_000}
        archive.addfile(info)
    assert_refused(cli("import-runs", out), home, "a header is too large")


def test_what_came_before_a_bad_source_is_shown(sessions: dict[str, Path], home: Path, cli) -> None:
    result = cli("import-runs", sessions["1xP100"], "nowhere")
    assert result.exit_code == 2 and "nothing to import from nowhere" in result.stderr
    assert "2 runs added" in result.stdout and len(every_run()) == 2


def test_a_child_that_comes_before_its_parent_is_linked_later(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    folder = tmp_path / "child"
    shutil.copytree(sessions["1xP100"], folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("har").experiment_id
    (parent,) = client.search_runs([experiment], "tags.job='train' and tags.recipe_digest != ''")
    client.delete_run(parent.info.run_id)
    assert "1 runs added" in ok(cli("import-runs", folder)).stdout
    assert "1 runs added, 0 updated, 1" in ok(cli("import-runs", sessions["1xP100"])).stdout
    (training,) = trainings()
    (nested,) = [run for run in every_run() if run.data.tags["job"] == "note"]
    assert nested.data.tags["mlflow.parentRunId"] == training.info.run_id


def test_the_password_of_the_own_server_goes_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    with tracking_to("http://own.example"):
        with foreign.without_credentials("http://other.example"):
            assert "MLFLOW_TRACKING_USERNAME" not in os.environ
        with foreign.without_credentials("http://own.example"):
            assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"


PLACES = (
    "file:///etc",
    "/etc",
    "runs:/abc/",
    "models:/m/1",
    "http://x/y",
    "mlflow-artifacts://h/x",
)


@pytest.mark.parametrize("where", PLACES)
def test_a_server_names_no_place_to_read_from(where: str) -> None:
    info = mlflow.entities.RunInfo("a" * 32, "1", "u", "FINISHED", 1, 2, "active", where)
    store = foreign._open_server("http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be read from here"):
        store.list_files(mlflow.entities.Run(info, None))


def test_an_older_database_is_brought_up_to_date_in_a_copy(
    sessions: dict[str, Path], home: Path, tmp_path: Path, cli
) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    folder = tmp_path / "older"
    shutil.copytree(sessions["1xP100"], folder)
    config = _get_alembic_config(f"sqlite:///{folder}/mlflow.db")
    command.stamp(config, "head")
    try:
        command.downgrade(config, "-1")
    except Exception:
        pytest.skip("this MLflow cannot go back one revision")
    before = (folder / "mlflow.db").read_bytes()
    result = ok(cli("import-runs", folder))
    assert "of an older MLflow" in result.stderr and "2 runs added" in result.stdout
    assert (folder / "mlflow.db").read_bytes() == before


class Endless:
    """A server's repository with a folder in each folder."""

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        return [mlflow.entities.FileInfo(f"{path or ''}a/b"[-100:], True, None)]


def test_folders_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "MAX_RUN_FILES", 100)
    with pytest.raises(ValueError, match="more than 100 files"):
        artifacts.list_all(Endless())


class Lying:
    """A server's repository that names files outside."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        return [mlflow.entities.FileInfo(name, False, 3) for name in self.names] if not path else []

    def download_artifacts(self, path: str, folder: str) -> None:
        raise AssertionError(f"{path} was asked for")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../evil", "..\\evil"])
def test_a_server_names_no_file_outside(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside of its folder"):
        artifacts.download_all(Lying(name), tmp_path)
    with pytest.raises(ValueError, match="comes twice"):
        artifacts.download_all(Lying("a", "a"), tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("import-runs", "nowhere.zip"), "nothing to import from nowhere.zip: give a file of"),
        (("import-runs", "."), "holds no mlflow.db: it is no MLflow store"),
        (("export-runs",), "no runs are recorded here"),
        (("import-runs", "http://127.0.0.1:9"), "cannot be"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, home: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (home / "mlflow.db").unlink()
    result = cli(*words)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1


def test_an_export_says_what_it_cannot_take(
    sessions: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    use(sessions["1xP100"], monkeypatch)
    (unfinished,) = mlflow.search_runs(
        experiment_names=["har"], filter_string="attributes.status = 'RUNNING'",
        output_format="list",
    )  # fmt: skip
    result = cli("export-runs", unfinished.info.run_id, "--out", tmp_path / "x.zip")
    assert result.exit_code == 2 and "is not finished: its status is RUNNING" in result.stderr
    (tmp_path / "taken.zip").touch()
    result = cli("export-runs", "--out", tmp_path / "taken.zip")
    assert result.exit_code == 2 and "exists already" in result.stderr
    # a run brings its nested runs
    (training,) = [run for run in trainings() if run.info.status == "FINISHED"]
    result = ok(cli("export-runs", training.info.run_id[:8], "--out", tmp_path / "one.zip"))
    assert result.stdout.startswith("2 runs")
    with zipfile.ZipFile(tmp_path / "one.zip") as opened:
        digests = json.loads(opened.read("digests.json"))
        assert set(digests) == set(opened.namelist()) - {"digests.json"}


def test_names_of_models_are_rewritten_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "MLmodel"
    file.write_text("a: 1\nmetadata:\n  run_id: x\nmodel_id: m-1\nmodel_uuid: m-1\nrun_id: old\n")
    transfer._rename_ids(file, {"run_id": "new", "model": "m-2"})
    assert file.read_text() == (
        "a: 1\nmetadata:\n  run_id: x\nmodel_id: m-2\nmodel_uuid: m-2\nrun_id: new\n"
    )
