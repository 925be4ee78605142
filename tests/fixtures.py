"""A tiny real data set, a tiny backbone, an isolated MLflow store, two logical devices."""

import atexit
import csv
import gc
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from socketserver import BaseServer
from typing import Any

# Before TensorFlow loads: no GPU, and the same arithmetic in every test.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import keras
import mlflow
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from keras import layers
from mlflow.tracking import fluent
from PIL import Image

from har.cli.main import OBJECTS_BETWEEN_COLLECTIONS, main
from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.jobs import train as train_job
from har.models import backbones
from har.models.backbones import Backbone
from har.recipe import VARIANTS, Recipe
from har.serving import promotion
from har.training.backup import Backup
from har.training.epoch_report import OnEpoch
from har.training.job import TrainingJob, build_job
from har.training.state import State

# A shell starts background jobs with SIGINT ignored, and nohup with SIGHUP; what the tests start
# would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# MirroredStrategy is tested as it would run on two GPUs: two devices, two replicas.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# as an activated environment would have it
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CLASSES = ("sitting", "running", "texting")
IMAGES_PER_CLASS = 14
TINY_SIZE = 32


def pytest_collection_finish() -> None:
    # as the command does: else a seventh of the time is Python's search for garbage
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)


def write_images(folder: Path, per_class: int = IMAGES_PER_CLASS, seed: int = 0) -> Path:
    """Kaggle's layout: non-square JPEGs, each class a colour and a stripe, plus noise."""
    rng = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    rows = []
    for i in range(per_class * len(CLASSES)):
        label_id = i % len(CLASSES)
        height, width = rng.integers(30, 70, 2)
        pixels = rng.integers(0, 200, (height, width, 3)) + rng.integers(0, 25, 3)
        pixels[..., label_id] += 12
        pixels[:, :: label_id + 2] += 10
        name = f"Image_{i + 1}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "train" / name, quality=90)
        rows.append((name, CLASSES[label_id]))
    write_csv(folder, rows)
    return folder


def write_csv(folder: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ()) -> None:
    with (folder / "Training_set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header or ("filename", "label"), *rows])


def read_csv(folder: Path) -> list[tuple[str, str]]:
    with (folder / "Training_set.csv").open(newline="") as file:
        return [(name, label) for name, label in list(csv.reader(file))[1:]]


def build_tiny(image_size: int | None) -> keras.Model:
    """A backbone of the real ones' kind (convolutions, batch norm, pooling), 8 features."""
    inputs = layers.Input((image_size, image_size, 3))
    x = layers.Rescaling(1 / 128, offset=-1)(inputs)
    for block, kernel, stride in (("block1", 3, 4), ("block2", 1, 1)):
        x = layers.Conv2D(8, kernel, strides=stride, use_bias=False, name=f"{block}_conv")(x)
        x = layers.BatchNormalization(name=f"{block}_norm")(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="tiny")


@pytest.fixture
def network() -> keras.Model:
    """A tiny backbone, with the same weights each time."""
    keras.utils.set_random_seed(0)
    return build_tiny(32)


def tiny_recipe(variant: str = "v3", **fields: object) -> Recipe:
    """A variant small enough for a test: the tiny backbone, 32 pixels, two epochs, one device.

    Two devices take three times as long: a test of them gives `strategy="mirrored"`.
    """
    small: dict[str, Any] = {
        "backbone": "efficientnet-lite0",
        "image_size": TINY_SIZE,
        "batch_size": 4,
        "epochs": 2,
        "precision": "float32",
        "strategy": "one_device",
        "feature_views": min(VARIANTS[variant].feature_views, 2),
    }
    if VARIANTS[variant].evaluation_size:
        # of 32 images, a tenth is too few for two devices
        small |= {"evaluation_size": 40, "validation_fraction": 0.2}
    return replace(VARIANTS[variant], **{**small, **fields})


def tiny_job(recipe: Recipe, manifest: Manifest, runtime: str = "tensorflow") -> TrainingJob:
    """The training of this very recipe: no fallback replaces anything."""
    every_field = [each.name for each in fields(Recipe)]
    return build_job("v3", recipe, every_field, manifest, runtime)


class RecordingBackup(Backup):
    """Keeps the state after every epoch in memory."""

    def __init__(self, resume_from: State | None = None) -> None:
        super().__init__(folder=Path("unused"), started=0.0, state=resume_from)
        self.states: list[State] = []

    def is_due(self, last: bool) -> bool:
        return True

    def save(self, state: State) -> None:
        self.states.append(state)


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Own cache, own working folder, no data of the user's, float32 policy afterwards."""
    monkeypatch.setenv("HAR_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("HAR_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    keras.config.set_dtype_policy("float32")


TINY = Backbone(build_tiny, build_tiny, cut="block2")


@pytest.fixture
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone in the place of EfficientNet-Lite0."""
    monkeypatch.setitem(backbones.BACKBONES, "efficientnet-lite0", TINY)


@contextmanager
def tiny_backbones() -> Iterator[None]:
    """The same for what is shared by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.BACKBONES, "efficientnet-lite0", TINY)
        yield


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A fresh folder of images that a test may damage."""
    return write_images(tmp_path / "raw")


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("tiny") / "images")


@pytest.fixture(scope="session")
def manifest(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    source = folder_source(tiny_raw, why="a test")
    return prepare(source, tmp_path_factory.mktemp("prepared"), Split(test_fraction=0.25))


@cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mlflow.db")
        mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
        with closing(sqlite3.connect(file)) as database, database:
            # the first to use the store makes it, with the folder for its artifacts
            database.execute("DELETE FROM experiments")
        return file.read_bytes()


def new_store(folder: Path) -> str:
    """Put an empty MLflow store into a folder; return its URI. MLflow takes two seconds for one."""
    folder.mkdir(exist_ok=True)
    (folder / "mlflow.db").write_bytes(_empty_store())
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def store(store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An MLflow store for this test session; artifacts beside the test."""
    mlflow.set_tracking_uri(store_uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    yield store_uri
    while mlflow.active_run():
        mlflow.end_run()


@contextmanager
def tracking_to(uri: str | None) -> Iterator[None]:
    """Another MLflow store, until the block ends; None: the one that the environment names."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def cli():
    """Run a command in this process: `cli("run", "--epochs", "2")`."""

    def invoke(*arguments: object):
        # in a new process no experiment has been chosen
        if fluent._active_experiment_id is not None:
            fluent._active_experiment_id = None
            os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        return CliRunner().invoke(main, [str(each) for each in arguments])

    return invoke


@pytest.fixture
def after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], None]:
    """Do something when an epoch has been logged, in this process: `after_each_epoch(action)`."""
    open_epoch_log = train_job.open_epoch_log

    def do(action: Callable[[int], object]) -> None:
        @contextmanager
        def open_and_act(*arguments: Any) -> Iterator[OnEpoch]:
            with open_epoch_log(*arguments) as log_epoch:

                def log_and_act(epoch: int, metrics: dict[str, float]) -> None:
                    log_epoch(epoch, metrics)
                    action(epoch)

                yield log_and_act

        monkeypatch.setattr(train_job, "open_epoch_log", open_and_act)

    return do


@contextmanager
def answering(server: BaseServer) -> Iterator[None]:
    """Let a server of this process answer until the block ends."""
    # it looks this often whether it is to end; by default twice a second
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(command: list[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """Run a server until the block ends; yields its address once it answers."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": PATH, **environment},
            start_new_session=True,
        )
        try:
            for _ in range(600):  # it may be a busy machine
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"no answer: {log.read_text()}")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """A real MLflow server that keeps everything in a folder; yields its address."""
    command = ["mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", new_store(folder)]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    # the server's own jobs would start four processes more
    with serving(
        command, free_port(), folder / "log", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
    ) as address:
        yield address


@pytest.fixture
def guessing_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network after an epoch is no better than guessing; promote it all the same."""
    monkeypatch.setattr(promotion, "check_chance", lambda selected, classes: selected)
