"""Classifies many image files: row by row, or into a file that can be resumed."""

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from har.inference.classifier import Prediction, explain_failure
from har.inference.inputs import Input, read_inputs
from har.util.errors import UserError, first_line
from har.util.escaping import csv_quoting, for_csv, for_terminal, from_csv
from har.util.files import replace_file, replace_text, storable
from har.util.locks import file_lock
from har.util.outputs import check_output_file
from har.util.places import WEB, Place, Url, exists
from har.util.progress import progress, say

# Images in one call of the classifier; an interruption loses no more than the calls under way.
BATCH = 32
# Batches under way: one is decoded while another is computed.
AHEAD = 2
COLUMNS = ("filename", "label", "probability", "error")
Item = TypeVar("Item")
Classify = Callable[[Sequence[bytes]], Iterable[Prediction]]


class FilePrediction(Prediction):
    """A prediction with the name of its file."""

    filename: str


class Outcome(NamedTuple):
    """The number of images, of those without a label, and the error of the first of these."""

    images: int
    failed: int
    first_error: str


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def classify_files(
    inputs: Sequence[Input], classify: Classify, ahead: int = 1
) -> Iterator[FilePrediction]:
    """Classify images in their order, `ahead` batches of BATCH at a time; one that cannot be read
    becomes a row with its error.
    """
    # one thread reads: rows of a table come from a stream
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ahead) as pool:

        def submit(batch: list[Input]) -> "Future[list[FilePrediction]]":
            contents = reader.submit(read_inputs, batch)
            return pool.submit(_classify_batch, batch, contents, classify)

        batches = batched(inputs, BATCH)
        working = deque(submit(batch) for batch in islice(batches, ahead))
        try:
            while working:
                yield from working.popleft().result()
                for batch in islice(batches, 1):
                    working.append(submit(batch))
        finally:
            pool.shutdown(cancel_futures=True)


def _classify_batch(
    batch: Sequence[Input], contents: "Future[list[bytes | str]]", classify: Classify
) -> list[FilePrediction]:
    found = contents.result()
    rows = iter(classify([data for data in found if isinstance(data, bytes)]))
    return [
        {
            "filename": storable(str(place)),
            **(next(rows) if isinstance(data, bytes) else explain_failure(data)),
        }
        for place, data in zip(batch, found, strict=True)
    ]


def format_row(row: FilePrediction) -> str:
    """Format a prediction as one line for people."""
    if row["error"]:
        return for_terminal(f"{row['filename']}  error: {row['error']}")
    others = ", ".join(f"{each['label']} {each['probability']:.0%}" for each in row["top_3"][1:])
    return for_terminal(f"{row['filename']}  {row['label']} {row['probability']:.0%}  ({others})")


def check_output(out: Place) -> None:
    """Raise a UserError unless predictions can be written to `out`: a new .csv or .parquet, or a
    folder, which `open_shards` checks.
    """
    if isinstance(out, Url) and out.protocol in WEB:
        raise UserError(f"--out cannot be a web server; received {out}")
    if out.suffix in WRITERS:
        _check_new(out)
    elif out.suffix or (isinstance(out, Path) and out.is_file()):
        raise UserError(f"--out must be a .csv or .parquet file, or a folder; received {out}")


def _check_new(out: Place) -> None:
    if isinstance(out, Path):
        check_output_file(out)
        return
    try:
        if exists(out):
            raise UserError(f"{out} exists already: move it away, or give another --out")
    except OSError as error:
        raise UserError(f"--out {out} cannot be used: {first_line(error)}") from error


def predict_to_file(
    data: Place, files: Mapping[str, Input], out: Path, classify: Classify, model: str
) -> Outcome:
    """Score `files`, the images of `data` by their names, into `out`, a .csv or .parquet with
    COLUMNS.

    Finished rows are kept beside `out`, and the same call after an interruption resumes there,
    unless `model`, the model's id, is another one.
    """
    names = list(files)
    part = out.with_name(f".{out.name}.part")
    task = {
        "folder": str(data.resolve() if isinstance(data, Path) else data),
        "model": model,
        "names": len(names),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock_output(out, part.with_suffix(".lock")):
            check_output(out)
            done = _count_rows_done(part, task, names)
            with part.open("a", newline="", encoding="utf-8") as file:
                _write_rows(file, files, done, classify)
            errors = [row["error"] for row in _read_rows(part) if row["error"]]
            WRITERS[out.suffix](part, out)
            part.with_suffix(".json").unlink()
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return Outcome(len(names), len(errors), next(iter(errors), ""))


@contextmanager
def lock_output(out: Path, lock: Path) -> Iterator[None]:
    """Hold the lock of an output, or raise a UserError if another process writes it."""
    busy = f"another process is writing {out}: give another --out"
    with file_lock(lock, busy=busy, hint="give another --out"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _count_rows_done(part: Path, task: dict[str, Any], names: list[str]) -> int:
    """Count the rows that an interrupted call left to resume after; if there are none, start the
    file.
    """
    about = part.with_suffix(".json")
    if _is_own(part) and _is_own(about) and _read_task(about) == task:
        text = part.read_bytes()
        # the last line may have been cut in two
        with replace_file(part) as file:
            file.write(text[: text.rfind(b"\n") + 1])
        found = [row["filename"] for row in _read_rows(part)]
        if found and found == [_format_name(name) for name in names[: len(found)]]:
            say(f"resuming after {len(found):,} images that are scored already")
            return len(found)
    # replaced: either could be a link to a file of somebody else
    replace_text(about, json.dumps(task))
    replace_text(part, ",".join(COLUMNS) + "\n")
    return 0


def _is_own(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read_task(about: Path) -> Any:
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _format_name(name: str) -> str:
    return str(for_csv(storable(name)))


def _write_rows(file: Any, files: Mapping[str, Input], done: int, classify: Classify) -> None:
    names = list(files)
    rows = classify_files(list(files.values())[done:], classify, AHEAD)
    with progress("scoring", len(names)) as advance:
        advance(done)
        for batch in batched(zip(names[done:], rows, strict=True), BATCH):
            for name, row in batch:
                write_csv_row(file, name, row)
            file.flush()
            os.fsync(file.fileno())
            advance(len(batch))


def write_csv_row(file: Any, name: str, row: Prediction) -> None:
    """Write an image's prediction as one line, so that a cut file can be resumed."""
    error = " ".join((row["error"] or "").split())
    texts = _format_name(name), for_csv(row["label"] or ""), for_csv(error)
    writer = csv.writer(file, lineterminator="\n", quoting=csv_quoting(texts))
    writer.writerow((*texts[:2], row["probability"] or "", texts[2]))


def _read_rows(part: Path) -> Iterator[dict[str, str]]:
    with part.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def write_csv(part: Path, out: Path) -> None:
    """Give the finished file its name."""
    os.replace(part, out)


def build_schema() -> Any:
    """Build Parquet's schema of COLUMNS."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    return pyarrow.schema([(name, number if name == "probability" else text) for name in COLUMNS])


def write_parquet(part: Path, out: Path) -> None:
    """Write the same rows as Parquet, a few thousand at a time; there, texts need no escape."""
    import pyarrow
    import pyarrow.parquet

    schema = build_schema()
    with replace_file(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in batched(_read_rows(part), 4096):
            columns: dict[str, list[Any]] = {
                name: [from_csv(row[name]) or None for row in rows] for name in COLUMNS
            }
            columns["probability"] = [float(p) if p else None for p in columns["probability"]]
            writer.write_table(pyarrow.table(columns, schema))


WRITERS: dict[str, Callable[[Path, Path], None]] = {".csv": write_csv, ".parquet": write_parquet}
