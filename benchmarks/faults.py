"""What is done to a training and a server, and what comes of it: injected, survived, lost, doubled.

    python benchmarks/faults.py [--data DIR]

Everything runs in this one command, by the commands that a user types, on the built-in sample or on
images of DIR:

- kills: a training gets kill -9 at a moment drawn by chance and goes on by `har train --resume`;
- outages: a real `mlflow server` is killed and started again, put to sleep and woken, and killed to
  the end of the training, which `har sync` then records;
- files: images are cut, emptied, overwritten, taken away, or become a pipe, and `har prepare` reads
  the folder;
- requests: the trained model is served by `mlflow models serve` and asked what it cannot answer,
  a good request after each.

Lost are epochs that the store lacks or has with other numbers than an untroubled training, good
images that are missing, and good requests without the right answer; doubled are epochs and models
recorded twice. Prints a table, writes JSON, and exits with 1 unless all survived and nothing was
lost or doubled.
"""

import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import mlflow

from har.data.manifest import read_manifest
from har.training.backup import backup_folder, read_state
from har.util.progress import say
from measuring import RESULTS, Bar, find_machine, finish, load_images

EPOCHS = 8
# A command takes seconds; one that hangs is an error of the benchmark.
COMMAND_S = 300
TINY = (
    "--backbone", "efficientnet-lite0", "--image-size", "64", "--batch-size", "16",
    "--patience", "0", "--epochs", str(EPOCHS),
)  # fmt: skip
COMPARED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
START_S = 180
# `har prepare` stops where more than 2 % of the files are bad.
BAD_SHARE = 0.02


@dataclass(kw_only=True)
class Count:
    """What became of one kind of fault."""

    fault: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    doubled: int = 0


# --- a store, trainings in it


class Server:
    """A real MLflow server on a store in `folder`."""

    def __init__(self, folder: Path) -> None:
        """Not started yet."""
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(f"{self.uri}/health")

    def send(self, signal_number: int) -> None:
        """To the server and its workers."""
        os.killpg(self.process.pid, signal_number)

    def kill(self) -> None:
        """With -9."""
        self.send(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(address: str) -> None:
    """Until a server answers there."""
    for _ in range(START_S * 5):
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"no answer from {address}")


def har(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it said on stderr, and its exit status."""
    say(f"har {' '.join(words)}")
    command = [sys.executable, "-m", "har", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMMAND_S)


@contextmanager
def training(experiment: str, data: Path) -> Iterator[subprocess.Popen[str]]:
    """`har train`, at work."""
    words = ["train", "--data", str(data), "--experiment", experiment, *TINY]
    say(f"har {' '.join(words)}")
    command = [sys.executable, "-m", "har", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process


def read_to_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    """Until it has said that an epoch is done."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"epoch {epoch}/{EPOCHS}  loss"):
            return


def end(process: subprocess.Popen[str]) -> int:
    """Wait for it."""
    process.communicate(timeout=COMMAND_S)
    return int(process.returncode)


def find_run(experiment: str) -> Any:
    """The experiment's one run."""
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def histories(run: Any) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every compared metric, as recorded."""
    client = mlflow.MlflowClient()
    return {
        name: [(e.step, e.value) for e in client.get_metric_history(run.info.run_id, name)]
        for name in COMPARED
    }


def evaluate_training(count: Count, experiment: str, whole: Any) -> None:
    """Count what became of a training in comparison with the untroubled one."""
    run, wanted = find_run(experiment), histories(whole)
    models = mlflow.MlflowClient().search_logged_models([run.info.experiment_id])
    count.survived += run.info.status == "FINISHED"
    lost, doubled = set(), set()
    for name, found in histories(run).items():
        steps = Counter(step for step, _ in found)
        lost |= {step for step, value in wanted[name] if (step, value) not in found}
        doubled |= {step for step, times in steps.items() if times > 1}
    count.lost += len(lost) + (run.data.metrics.get("accuracy") != whole.data.metrics["accuracy"])
    count.doubled += len(doubled) + max(0, len(models) - 1)


# --- faults


def inject_kills(data: Path, whole: Any, number: int, chance: random.Random) -> Count:
    """kill -9 at a random moment before the last epoch."""
    count = Count(fault="kill -9 while training")
    for each in range(number):
        name = f"kill {each}"
        with training(name, data) as process:
            read_to_epoch(process, chance.randint(1, EPOCHS - 1))
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
            end(process)
        count.injected += 1
        run_id = find_run(name).info.run_id
        state, _ = read_state(backup_folder(run_id))
        next_epoch = len(state.history) + 1 if state else 1
        said = har("train", "--resume", run_id).stderr
        first = re.search(rf"^epoch (\d+)/{EPOCHS}  loss", said, re.MULTILINE)
        # what the backup holds is not trained again
        count.lost += first is None or int(first[1]) != next_epoch
        evaluate_training(count, name, whole)
    return count


def inject_outages(data: Path, whole: Any, server: Server, number: int) -> Count:
    """The server killed, asleep, and away to the end, in turn."""
    count = Count(fault="tracking server away")
    for each in range(number):
        name, kind = f"outage {each}", ("killed", "asleep", "late")[each % 3]
        with training(name, data) as process:
            read_to_epoch(process, 2)
            server.send(signal.SIGSTOP) if kind == "asleep" else server.kill()
            if kind != "late":
                read_to_epoch(process, EPOCHS - 1)
                server.send(signal.SIGCONT) if kind == "asleep" else server.start()
            end(process)
        count.injected += 1
        if kind == "late":
            server.start()
            har("sync")
        evaluate_training(count, name, whole)
    return count


def cut(file: Path) -> None:
    """The first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def take_away(file: Path) -> None:
    """Gone."""
    file.unlink()


def make_pipe(file: Path) -> None:
    """Nobody writes into it."""
    file.unlink()
    os.mkfifo(file)


def make_loop(file: Path) -> None:
    """A link to itself."""
    file.unlink()
    file.symlink_to(file)


DAMAGES: tuple[Callable[[Path], Any], ...] = (
    cut,
    take_away,
    make_pipe,
    make_loop,
    lambda file: file.write_bytes(b""),
    lambda file: file.write_text("no image"),
    lambda file: file.write_bytes(os.urandom(4000)),
)


def inject_bad_files(data: Path, scratch: Path, number: int, chance: random.Random) -> Count:
    """As many as a folder may have, in copies of the data, until `number` are reached."""
    count = Count(fault="bad image file")
    while count.injected < number:
        folder = scratch / f"files {count.injected}"
        shutil.copytree(data, folder)
        files = sorted((folder / "train").iterdir())
        chosen = chance.sample(files, min(int(BAD_SHARE * len(files)), number - count.injected))
        for file in chosen:
            chance.choice(DAMAGES)(file)
        out = scratch / f"prepared {count.injected}"
        count.injected += len(chosen)
        if har("prepare", "--data", str(folder), "--out", str(out)).returncode:
            continue
        found = read_manifest(out)
        named = {Path(each.filename).name for each in found.summary.dropped}
        kept = Counter(Path(path).name for path in found.table["path"])
        count.survived += len(named & {file.name for file in chosen})
        count.lost += len(files) - len(chosen) - len(kept)
        count.doubled += sum(kept.values()) - len(kept)
    return count


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


def ask(address: str, body: bytes) -> tuple[int, Any]:
    """Status, and what the answer says."""
    request = urllib.request.Request(
        f"{address}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


def inject_bad_requests(run: Any, data: Path, scratch: Path, number: int) -> Count:
    """Each is refused or answered with an error in its row, and a good one is answered after it."""
    count = Count(fault="bad request")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", f"runs:/{run.info.run_id}/model", "--port", str(port)]
    image = next(iter(sorted((data / "train").iterdir()))).read_bytes()
    good = json.dumps({"inputs": [base64.b64encode(image).decode()]}).encode()
    with (scratch / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        try:
            wait_for(f"{address}/health")
            _, wanted = ask(address, good)
            for each in range(number):
                status, answer = ask(address, BAD_REQUESTS[each % len(BAD_REQUESTS)])
                count.injected += 1
                in_row = status == 200 and all(row["error"] for row in answer["predictions"])
                count.survived += in_row or 400 <= status < 500
                count.lost += ask(address, good) != (200, wanted)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return count


# --- the measurement


def count_lines(counts: list[Count]) -> list[str]:
    """One row a kind of fault."""
    heads = ("injected", "survived", "lost", "doubled")
    lines = [f"{'fault':<28}" + "".join(f"{head:>10}" for head in heads)]
    for count in counts:
        numbers = "".join(f"{getattr(count, head):>10}" for head in heads)
        lines.append(f"{count.fault:<28}{numbers}")
    return lines


def build_bars(counts: list[Count]) -> list[Bar]:
    """All survived, none lost, none doubled."""
    bars = []
    for count in counts:
        share = count.survived / count.injected
        bars += [
            Bar(claim=f"{count.fault}: survived", measured=share, bound=1.0, at_least=True),
            Bar(claim=f"{count.fault}: lost", measured=count.lost, bound=0.0, at_least=False),
            Bar(claim=f"{count.fault}: doubled", measured=count.doubled, bound=0.0, at_least=False),
        ]
    return bars


def copy_data(data: str, folder: Path) -> Path:
    """The labelled images in Kaggle's layout, once each."""
    from time_to_accuracy import repeat_images

    manifest = load_images(data)
    return repeat_images(manifest, len(manifest.table), folder)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", default="sample", show_default=True, help="images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "faults.json", show_default=True)
@click.option("--kills", type=click.IntRange(1), default=4, show_default=True)
@click.option("--outages", type=click.IntRange(1), default=3, show_default=True)
@click.option("--files", type=click.IntRange(1), default=28, show_default=True)
@click.option("--requests", type=click.IntRange(1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    data: str, out: Path, kills: int, outages: int, files: int, requests: int, seed: int
) -> None:
    """Inject, count, print, write, evaluate."""
    chance, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        images = copy_data(data, scratch / "images")
        server = Server(scratch)
        os.environ |= {"MLFLOW_TRACKING_URI": server.uri, "HAR_CACHE": str(scratch / "cache")}
        mlflow.set_tracking_uri(server.uri)
        server.start()
        try:
            with training("whole", images) as process:
                end(process)
            whole = find_run("whole")
            counts = [
                inject_kills(images, whole, kills, chance),
                inject_outages(images, whole, server, outages),
                inject_bad_files(images, scratch, files, chance),
                inject_bad_requests(whole, images, scratch, requests),
            ]
        finally:
            server.kill()
    click.echo("\n".join(count_lines(counts)))
    click.echo(f"in {(time.monotonic() - began) / 60:.1f} minutes, seed {seed}")
    found = {"machine": find_machine(), "counts": [asdict(each) for each in counts]}
    finish(out, found, build_bars(counts))


if __name__ == "__main__":
    main()
