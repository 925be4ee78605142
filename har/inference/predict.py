"""Many images through a classifier: a table for a few, a file that can be resumed for many."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from filelock import FileLock, Timeout

from har.data.images import ImageError, read_image
from har.data.sources import IMAGE_SUFFIXES, KAGGLE_FOLDER, TEST_FOLDER, is_image_name
from har.util.errors import UserError, first_line
from har.util.files import printable
from har.util.progress import progress, say

# What one call of the classifier gets; also how much an interruption can lose.
BATCH = 32
COLUMNS = ("filename", "label", "probability", "error")
TEST_LIST = "Testing_set.csv"
Item = TypeVar("Item")
# Bytes of images to one row each: label, probability, top_3, error.
Classify = Callable[[Sequence[bytes]], list[dict[str, Any]]]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size`, the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and every image in the folders named, in order of their names.

    Raises:
        UserError: a path is not there, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [each for each in sorted(path.rglob("*")) if is_image_name(each)]
            if not inside:
                raise UserError(f"no images in {path}: looked for {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no such image or folder: {path}")
    return found


def list_unlabelled(data: Path) -> tuple[Path, list[str]]:
    """A folder and the names of the images in it to score: what Testing_set.csv lists of
    Kaggle's test/, else all of test/, else all of a plain folder. Kaggle's unpacked archive has
    both in a folder of its own.

    Raises:
        UserError: no such folder, no images, or a list that cannot be read or leads elsewhere.
    """
    if not data.is_dir():
        raise UserError(f"no such folder: {data}")
    folder = data
    for root in (data, data / KAGGLE_FOLDER):
        if (root / TEST_FOLDER).is_dir():
            folder, listed = root / TEST_FOLDER, root / TEST_LIST
            if listed.is_file():
                return folder, _read_list(listed, folder)
            break
    return folder, [path.relative_to(folder).as_posix() for path in find_images([folder])]


def _read_list(listed: Path, folder: Path) -> list[str]:
    """The column filename; every name stays inside `folder`."""
    try:
        names = pd.read_csv(listed, dtype=str, keep_default_na=False)["filename"].tolist()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{listed} has no readable column filename: {first_line(error)}") from error
    for row, name in enumerate(names, start=1):
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not name or not inside:
            raise UserError(f"row {row} of {listed} names {name!r}, no file inside {folder}")
    if repeated := len(names) - len(set(names)):
        raise UserError(f"{listed} lists {repeated} images more than once")
    return names


def classify_files(paths: Sequence[Path], classify: Classify) -> Iterator[dict[str, Any]]:
    """One row a file, BATCH files in memory at a time; a file that cannot be read is a row
    with its error.
    """
    for batch in batched(paths, BATCH):
        contents = [_read_or_explain(path) for path in batch]
        rows = iter(classify([data for data in contents if isinstance(data, bytes)]))
        for path, data in zip(batch, contents, strict=True):
            unread: dict[str, Any] = {
                "label": None,
                "probability": None,
                "top_3": [],
                "error": data,
            }
            name = printable(str(path))
            yield {"filename": name, **(next(rows) if isinstance(data, bytes) else unread)}


def format_row(row: dict[str, Any]) -> str:
    """One line for people: file, label, probability, and what else it may be."""
    if row["error"]:
        return f"{row['filename']}  error: {row['error']}"
    others = ", ".join(f"{each['label']} {each['probability']:.0%}" for each in row["top_3"][1:])
    return f"{row['filename']}  {row['label']} {row['probability']:.0%}  ({others})"


def _read_or_explain(path: Path) -> bytes | str:
    """Its bytes, or why it cannot be read."""
    try:
        return read_image(path)
    except ImageError as error:
        return str(error)


def predict_to_file(data: Path, out: Path, classify: Classify, model: str) -> int:
    """Score the images of `data` into `out`, .csv or .parquet, with COLUMNS; how many are bad.

    Rows are kept beside `out` as they come; the same call after an interruption goes on there.
    `model` says which model it is: rows of another model are not resumed.

    Raises:
        UserError: as `list_unlabelled`; `out` exists, is of another kind, or cannot be written, or
            another process is writing it.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"--out must end in .csv or .parquet; received {out}")
    folder, names = list_unlabelled(data)
    part = out.with_name(f".{out.name}.part")
    task = {"folder": str(folder.resolve()), "model": model, "names": len(names)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock_output(out, part.with_suffix(".lock")):
            done = _count_rows_done(part, task, names)
            with part.open("a", newline="", encoding="utf-8") as file:
                _write_rows(file, folder, names, done, classify)
            bad = sum(bool(row["error"]) for row in _read_rows(part))
            WRITERS[out.suffix](part, out)
            part.with_suffix(".json").unlink()
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return bad


@contextmanager
def _lock_output(out: Path, lock: Path) -> Iterator[None]:
    """Meanwhile no other process writes `out`.

    Raises:
        UserError: another is writing it, or it is there already.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing {out}: give another --out") from None
    except NotImplementedError as error:
        raise UserError(f"cannot write {out}: no file can be locked there: {error}") from error
    try:
        if out.exists():
            raise UserError(f"{out} exists already: move it away, or give another --out")
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


def _count_rows_done(part: Path, task: dict[str, Any], names: list[str]) -> int:
    """How many rows an interrupted call left that this one can go on from; else starts anew."""
    about = part.with_suffix(".json")
    if part.exists() and about.exists() and json.loads(about.read_text()) == task:
        text = part.read_bytes()
        # the last line may have been cut in two
        part.write_bytes(text[: text.rfind(b"\n") + 1])
        found = [row["filename"] for row in _read_rows(part)]
        if found and found == [printable(name) for name in names[: len(found)]]:
            say(f"resuming after {len(found):,} images that were scored before")
            return len(found)
    about.write_text(json.dumps(task))
    part.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    return 0


def _write_rows(file: Any, folder: Path, names: list[str], done: int, classify: Classify) -> None:
    """Append a row for each image after the first `done`, whole batches at a time."""
    writer = csv.writer(file, lineterminator="\n")
    rows = classify_files([folder / name for name in names[done:]], classify)
    with progress("scoring", len(names)) as advance:
        advance(done)
        for batch in batched(zip(names[done:], rows, strict=True), BATCH):
            for name, row in batch:
                # an error is one line, so that a cut file ends in a whole row
                error = " ".join((row["error"] or "").split())
                writer.writerow(
                    (printable(name), row["label"] or "", row["probability"] or "", error)
                )
            file.flush()
            os.fsync(file.fileno())
            advance(len(batch))


def _read_rows(part: Path) -> Iterator[dict[str, str]]:
    """The rows written so far."""
    with part.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def write_csv(part: Path, out: Path) -> None:
    """The file is ready: give it its name."""
    os.replace(part, out)


def write_parquet(part: Path, out: Path) -> None:
    """The same rows as Parquet, a few thousand at a time."""
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float64()
    kinds = [(name, number if name == "probability" else text) for name in COLUMNS]
    schema = pyarrow.schema(kinds)
    beside = part.with_suffix(".parquet")
    with pyarrow.parquet.ParquetWriter(beside, schema) as writer:
        for rows in batched(_read_rows(part), 4096):
            columns: dict[str, list[Any]] = {
                name: [row[name] or None for row in rows] for name in COLUMNS
            }
            columns["probability"] = [float(p) if p else None for p in columns["probability"]]
            writer.write_table(pyarrow.table(columns, schema))
    os.replace(beside, out)


WRITERS: dict[str, Callable[[Path, Path], None]] = {".csv": write_csv, ".parquet": write_parquet}
