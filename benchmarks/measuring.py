"""Parts that all benchmarks share: command line, turns, fresh processes, servers, tables, JSON."""

import base64
import csv
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import mlflow
import psutil

from har.data.manifest import Manifest
from har.util.errors import UserError
from har.util.hardware import available_cpus, cpu_name
from har.util.progress import say

RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("tensorflow", "openvino")
START_TIMEOUT_S = 180

# A table's title to its rows; each row is {"name": ..., column: number or text, ...}.
Tables = dict[str, list[dict[str, Any]]]
# What took turns, to the columns that each turn measured.
Turns = dict[str, list[dict[str, float]]]


class Claim(NamedTuple):
    """A target: `measured` must be `relation` (">=" or "<=") `bound`."""

    text: str
    measured: float
    relation: str
    bound: float

    @property
    def met(self) -> bool:
        """Tell if the target is reached."""
        sign = 1 if self.relation == ">=" else -1
        return sign * self.measured >= sign * self.bound


# --- the command and its report


def run(
    file: str, doc: str, measure: Callable[[str, Path, bool], tuple[Tables, list[Claim]]]
) -> None:
    """Run the benchmark in `file` as a command, which exits with 1 if a claim is not met.

    `measure` gets the images, a folder that is deleted afterwards, and whether to be tiny.
    """
    name = Path(file).stem

    @click.command(help=doc.partition("\n")[0])
    @click.option("--data", default="sample", show_default=True, help="Images, as for `har run`.")
    @click.option("--out", type=Path, default=RESULTS / f"{name}.json", show_default=True)
    @click.option("--tiny", is_flag=True, help="Show that the benchmark runs; measure nothing.")
    def main(data: str, out: Path, tiny: bool) -> None:
        if data not in ("auto", "sample", "kaggle"):
            # commands run in other folders
            data = str(Path(data).resolve())
        machine = _describe_machine()
        click.echo(f"{data}; {machine['cpu']}, {machine['cores']} cores")
        try:
            with tempfile.TemporaryDirectory() as scratch:
                tables, claims = measure(data, Path(scratch), tiny)
        except UserError as error:
            raise click.UsageError(str(error)) from error
        checked = [{"name": each.text, "measured": round(each.measured, 4),
                    "wanted": f"{each.relation} {each.bound:g}", "met": each.met}
                   for each in claims]  # fmt: skip
        found = {"machine": machine, "tables": tables, "claims": checked}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        for title, rows in [*tables.items(), *([("claim", checked)] if checked else [])]:
            click.echo(f"\n{_format_table(title, rows)}")
        click.echo(f"\nwritten: {out}")
        sys.exit(0 if all(each.met for each in claims) else 1)

    main()


def _format_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[title, *columns[1:]]]
    lines += [[_format_cell(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def _format_cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _describe_machine() -> dict[str, Any]:
    found = {"cpu": cpu_name(), "cores": available_cpus(), "load_average": os.getloadavg()}
    packages = ("tensorflow", "keras", "mlflow", "pillow", "har")
    return found | {name: version(name) for name in packages}


# --- time and memory


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def watched(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of one call, and the megabytes by which the process grew at most."""
    process, ended = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.01):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return timed(call), (most - before) / 1e6
    finally:
        ended.set()
        watcher.join()


def take_turns(calls: Mapping[str, Callable[[], dict[str, float]]], turns: int) -> Turns:
    """Call all of them in turn, so that a busy machine disturbs them alike.

    The first turn, which compiles and fills caches, does not count.
    """
    found: Turns = {name: [] for name in calls}
    for turn in range(turns + 1):
        say(f"turn {turn} of {turns}")
        for name, call in calls.items():
            result = call()
            if turn:
                found[name].append(result)
    return found


def summarise(turns: Turns) -> list[dict[str, Any]]:
    """Return a table's rows: the median of each column."""
    return [
        {"name": name} | {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in turns.items()
    ]


def median_ratio(turns: Turns, column: str, name: str, other: str) -> float:
    """Return the median, over the turns, of a column's ratio between two rows."""
    pairs = zip(turns[name], turns[other], strict=True)
    return statistics.median(these[column] / those[column] for these, those in pairs)


def fresh_process() -> ProcessPoolExecutor:
    """Return a pool of one new Python process."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a new Python process."""
    with fresh_process() as pool:
        return pool.submit(function, *arguments).result()


# --- images, and the user's commands


def some_images(manifest: Manifest, count: int) -> Manifest:
    """Reduce a manifest to at most `count` images, drawn at random from all splits."""
    drawn = manifest.table.sample(min(count, len(manifest.table)), random_state=0)
    return replace(manifest, table=drawn.sort_index().reset_index(drop=True))


def repeat_images(manifest: Manifest, count: int, folder: Path) -> Path:
    """Write `count` images in Kaggle's layout; where there are fewer, they are repeated."""
    (folder / "train").mkdir(parents=True)
    rows = manifest.table.sample(frac=1, random_state=0)
    with (folder / "Training_set.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "label"))
        pairs = itertools.cycle(zip(rows["path"], rows["label"], strict=True))
        for number, (path, label) in enumerate(itertools.islice(pairs, count)):
            name = f"Image_{number + 1}{Path(path).suffix}"
            shutil.copyfile(manifest.root / path, folder / "train" / name)
            writer.writerow((name, label))
    return folder


def store_in(folder: Path) -> dict[str, str]:
    """Return the environment variables for an MLflow store and a cache in `folder`."""
    store = f"sqlite:///{folder}/mlflow.db"
    return {"MLFLOW_TRACKING_URI": store, "HAR_CACHE": str(folder / "cache")}


def har(*words: str, folder: Path) -> str:
    """Run a `har` command with the store and the cache in `folder`; return what it printed."""
    say(f"har {' '.join(words)}")
    command, environment = [sys.executable, "-m", "har", *words], {**os.environ, **store_in(folder)}
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"har {words[0]} ended with status {done.returncode}")
    return done.stdout


def har_run(variant: str, data: Path | str, folder: Path, *options: str) -> dict[str, Any]:
    """Run `har run` with the store and the cache in `folder`.

    Returns the run's metrics, its `run_id` and its number of `epochs`.
    """
    folder.mkdir(exist_ok=True)
    har("run", "--variant", variant, "--data", str(data), *options, folder=folder)
    client = mlflow.MlflowClient(store_in(folder)["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("har").experiment_id
    run = client.search_runs([experiment], order_by=["start_time DESC"], max_results=1)[0]
    epochs = len(client.get_metric_history(run.info.run_id, "epoch_time_s"))
    return {**run.data.metrics, "run_id": run.info.run_id, "epochs": epochs}


# --- servers


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_server(words: Sequence[str], port: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start `mlflow WORDS` and wait until it answers; its log is in `folder`."""
    log = folder / f"{port}.log"
    # `mlflow models serve` looks for its server there
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            cwd=folder,
            env={**os.environ, "PATH": path},
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return process
        time.sleep(0.1)
    stop_server(process)
    sys.exit(f"the server does not answer:\n{log.read_text()}")


def stop_server(process: subprocess.Popen[bytes], signal_number: int = signal.SIGTERM) -> None:
    """Stop a server and its workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)
    process.wait()


@contextmanager
def serve_model(uri: str, folder: Path) -> Iterator[int]:
    """Run `mlflow models serve`; yield its port."""
    port = free_port()
    words = ("models", "serve", "--env-manager", "local", "--model-uri", uri)
    process = start_server(words, port, folder)
    try:
        yield port
    finally:
        stop_server(process)


def ask(port: int, body: bytes) -> tuple[int, bytes]:
    """Send a request to a served model; return the status and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def encode_request(files: Iterable[bytes]) -> bytes:
    """Encode images as most clients send them."""
    rows = [[base64.b64encode(data).decode()] for data in files]
    return json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()
