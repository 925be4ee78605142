"""Disturb trainings and servers at random moments; count what survives, is lost, or is doubled.

    python benchmarks/faults.py [--data DIR]

- kills: a training gets kill -9, and `har train --resume` continues it;
- outages: a real `mlflow server` is killed and started again, put to sleep and woken, or killed to
  the end of the training, which `har sync` then records;
- restarts: a real PostgreSQL, in which trainings are recorded without a server, is stopped as by a
  crash and started again, at once or after some epochs; left out where it is not installed;
- files: images are damaged, and `har prepare` reads the folder;
- requests: the trained model is served by `mlflow models serve` and gets requests that it cannot
  answer, and a good request after each.

Lost are epochs that differ from those of an undisturbed training, good images that are missing, and
good requests without the right answer. Doubled are epochs, models and images recorded twice. The
command exits with 1 unless all survived and nothing was lost or doubled.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow

import measuring
import services
from har.data.prepare import load_manifest
from har.util.progress import say
from measuring import Claim, Tables

EPOCHS = 8
HAR = (sys.executable, "-m", "har")
COMMAND_S = 300  # one that takes longer hangs
TRAIN = (
    "train", "--backbone", "efficientnet-lite0", "--image-size", "64", "--batch-size", "16",
    "--patience", "0", "--epochs", str(EPOCHS), "--data",
)  # fmt: skip
COMPARED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
COUNTS = ("injected", "survived", "lost", "doubled")
# `har prepare` stops where more of the files are bad.
BAD_SHARE = 0.02


# --- trainings


def _har(*words: str) -> subprocess.CompletedProcess[str]:
    say(f"har {' '.join(words)}")
    command = [*HAR, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)


def _start_training(experiment: str, data: Path) -> subprocess.Popen[str]:
    """Start `har train` in an experiment of its own."""
    say(f"training: {experiment}")
    command = [*HAR, *TRAIN, str(data), "--experiment", experiment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _read_until(process: subprocess.Popen[str], start: str) -> str:
    """Wait for a line of stderr that begins with `start`; return all lines up to it."""
    said = ""
    for line in process.stderr or ():
        said += line
        if line.startswith(start):
            break
    return said


def _read_run(experiment: str) -> tuple[Any, list[tuple[str, int, float]]]:
    """Read an experiment's one run, and the (name, epoch, value) of its compared metrics."""
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in COMPARED}
    return run, [(name, e.step, e.value) for name, found in histories.items() for e in found]


def _compare_with_whole(count: Counter[str], experiment: str) -> None:
    """Compare a disturbed training with the one in experiment `whole`, which nothing disturbed."""
    run, epochs = _read_run(experiment)
    whole, wanted = _read_run("whole")
    models = mlflow.MlflowClient().search_logged_models([run.info.experiment_id])
    count["survived"] += run.info.status == "FINISHED"
    count["lost"] += len({epoch for _, epoch, _ in set(wanted) - set(epochs)})
    count["lost"] += run.data.metrics.get("accuracy") != whole.data.metrics["accuracy"]
    times = Counter((name, epoch) for name, epoch, _ in epochs)
    count["doubled"] += len({epoch for (_, epoch), n in times.items() if n > 1})
    count["doubled"] += max(0, len(models) - 1)


def _inject_kills(data: Path, number: int, chance: random.Random) -> Counter[str]:
    """Kill trainings at a random moment before the last epoch, and resume them."""
    count = Counter(injected=number)
    for each in range(number):
        name = f"kill {each}"
        process = _start_training(name, data)
        said = _read_until(process, f"epoch {chance.randint(1, EPOCHS - 1)}/{EPOCHS}  loss")
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        said += process.communicate()[1]
        run, _ = _read_run(name)
        resumed = _har("train", "--resume", run.info.run_id).stderr
        # where there is a backup, training does not start again
        restarted = f"epoch 1/{EPOCHS}  loss" in resumed
        count["lost"] += restarted and "backup to resume from" in said
        _compare_with_whole(count, name)
    return count


def _inject_outages(data: Path, server: "_TrackingServer") -> Counter[str]:
    """Kill the tracking server, put it to sleep, and kill it to the end of a training."""
    count = Counter(injected=3)
    for kind in ("killed", "asleep", "away"):
        process = _start_training(f"server {kind}", data)
        _read_until(process, f"epoch 2/{EPOCHS}  loss")
        server.send(signal.SIGSTOP) if kind == "asleep" else server.kill()
        if kind != "away":
            _read_until(process, f"epoch {EPOCHS - 1}/{EPOCHS}  loss")
            server.send(signal.SIGCONT) if kind == "asleep" else server.start()
        process.communicate(timeout=COMMAND_S)
        if kind == "away":
            server.start()
            _har("sync")
        _compare_with_whole(count, f"server {kind}")
    return count


def _inject_restarts(data: Path) -> Counter[str]:
    """Stop PostgreSQL during trainings that record into it, and start it again."""
    count, before = Counter(injected=2), os.environ["MLFLOW_TRACKING_URI"]
    with services.running_postgres() as database:
        os.environ["MLFLOW_TRACKING_URI"] = database.create("faults")
        try:
            _start_training("whole", data).communicate(timeout=COMMAND_S)
            for kind in ("restarted", "stopped"):
                process = _start_training(f"database {kind}", data)
                _read_until(process, f"epoch 2/{EPOCHS}  loss")
                database.stop()
                if kind == "stopped":
                    _read_until(process, f"epoch {EPOCHS - 2}/{EPOCHS}  loss")
                database.start()
                process.communicate(timeout=COMMAND_S)
                _compare_with_whole(count, f"database {kind}")
        finally:
            os.environ["MLFLOW_TRACKING_URI"] = before
    return count


class _TrackingServer:
    """A real MLflow server, which keeps its port and its store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, measuring.free_port()
        self.start()

    def start(self) -> None:
        words = ["server", "--workers", "1", "--artifacts-destination", f"{self.folder}/artifacts"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        self.process = measuring.start_server(words, self.port, self.folder)

    def kill(self) -> None:
        measuring.stop_server(self.process, signal.SIGKILL)

    def send(self, signal_number: int) -> None:
        """Send a signal to it and its workers."""
        os.killpg(self.process.pid, signal_number)


# --- files


def _replace_by(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Return a damage that removes a file and makes something else in its place."""
    return lambda file: (file.unlink(), make(file))


DAMAGES: tuple[Callable[[Path], Any], ...] = (
    lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    Path.unlink,
    # nobody writes into this pipe
    _replace_by(os.mkfifo),
    _replace_by(lambda file: file.symlink_to(file)),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_text("no image"),
    lambda file: file.write_bytes(os.urandom(4000)),
)


def _inject_bad_files(
    data: Path, scratch: Path, number: int, chance: random.Random
) -> Counter[str]:
    """Damage images in copies of the data, in each as many as `har prepare` bears."""
    count: Counter[str] = Counter()
    while count["injected"] < number:
        folder = scratch / f"files {count['injected']}"
        out = scratch / f"prepared {count['injected']}"
        shutil.copytree(data, folder)
        files = sorted((folder / "train").iterdir())
        most = min(int(BAD_SHARE * len(files)), number - count["injected"])
        bad = {file.name for file in chance.sample(files, most)}
        for name in sorted(bad):
            chance.choice(DAMAGES)(folder / "train" / name)
        count["injected"] += len(bad)
        if _har("prepare", "--data", str(folder), "--out", str(out)).returncode:
            continue
        dropped = json.loads((out / "dataset.json").read_text())["dropped"]
        with (out / "manifest.csv").open(newline="") as file:
            kept = Counter(Path(row["path"]).name for row in csv.DictReader(file))
        count["survived"] += len(bad & {Path(each["filename"]).name for each in dropped})
        count["lost"] += len(files) - len(bad) - len(kept)
        count["doubled"] += sum(kept.values()) - len(kept)
    return count


# --- requests

BAD_REQUESTS = (
    b"",
    b"no json",
    b"[]",
    b'{"inputs": []}',
    b'{"inputs": [1, 2]}',
    b'{"inputs": ["not base64!"]}',
    b'{"inputs": ["bm8gaW1hZ2U="]}',
    b'{"inputs": [null]}',
    b'{"dataframe_split": {"columns": ["picture"], "data": [["bm8="]]}}',
    b'{"dataframe_split": {"columns": ["image"], "data": [[{"a": 1}]]}}',
    b'{"inputs": "' + b"A" * 1_000_000 + b'"}',
    b"\xff\xfe\x00",
)


def _inject_bad_requests(data: Path, scratch: Path, number: int) -> Counter[str]:
    """Send bad requests: each is refused or answered by an error in its row, the next one well."""
    count = Counter(injected=number)
    image = min((data / "train").iterdir()).read_bytes()
    good = measuring.encode_request([image])
    run, _ = _read_run("whole")
    with measuring.serve_model(f"runs:/{run.info.run_id}/model", scratch) as port:
        wanted = measuring.ask(port, good)
        for each in range(number):
            body = BAD_REQUESTS[each % len(BAD_REQUESTS)]
            status, answer = measuring.ask(port, body)
            in_rows = status == 200 and all(r["error"] for r in json.loads(answer)["predictions"])
            count["survived"] += in_rows or 400 <= status < 500
            count["lost"] += measuring.ask(port, good) != wanted or wanted[0] != 200
    return count


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Inject every kind of fault and count."""
    chance = random.Random(0)
    manifest = load_manifest(data)
    images = measuring.repeat_images(manifest, len(manifest.table), scratch / "images")
    if not (there := services.find_postgres() is not None):
        say("left out: PostgreSQL is not installed")
    server = _TrackingServer(scratch)
    uri = f"http://127.0.0.1:{server.port}"
    os.environ |= {"MLFLOW_TRACKING_URI": uri, "HAR_CACHE": str(scratch / "cache")}
    try:
        _start_training("whole", images).communicate(timeout=COMMAND_S)
        counts = {
            "kill -9 while training": _inject_kills(images, 1 if tiny else 4, chance),
            "tracking server away": _inject_outages(images, server),
            **({"PostgreSQL restarted": _inject_restarts(images)} if there else {}),
            "bad image file": _inject_bad_files(images, scratch, 7 if tiny else 28, chance),
            "bad request": _inject_bad_requests(images, scratch, 12 if tiny else 60),
        }
    finally:
        server.kill()
    rows = [
        {"name": fault, **{each: count[each] for each in COUNTS}} for fault, count in counts.items()
    ]
    total = sum(counts.values(), Counter())
    return {"fault": rows}, [
        Claim("survived / injected", total["survived"] / total["injected"], ">=", 1),
        Claim("lost or doubled", total["lost"] + total["doubled"], "<=", 0),
    ]


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
