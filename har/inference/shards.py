"""Predictions in a folder of Parquet or CSV files, each of which is whole or not there.

The file `part-00007.parquet` has the rows of the images from 7 x SHARD_ROWS on, in the order of the
whole list. An interrupted call is resumed at the files that are missing. `_task.json` says which
images and model the folder is of; readers of Parquet folders skip names that begin with `_`.

The folder may be elsewhere (`har.util.places`), and then somebody else's: what is read back from it
is checked.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from har.data.parquet_footer import read_foreign_footer
from har.inference.classifier import Prediction
from har.inference.predict import COLUMNS, Outcome, build_schema, write_csv_row
from har.util.errors import UserError, first_line
from har.util.escaping import from_csv
from har.util.files import storable
from har.util.places import Place, delete_names, list_names, read_place, replace_place

SHARD_ROWS = 1024
# The formats of shards; the first is the default.
FORMATS = ("parquet", "csv")
TASK_FILE = "_task.json"
MAX_TASK_BYTES = 100_000
# A thousand names of 4,096 bytes, each of which an escape makes six, and as many errors.
MAX_SHARD_BYTES, MAX_SHARD_FOOTER = 50_000_000, 1_000_000
# pyarrow's errors are of many types; a CSV file may lack columns.
DAMAGED = (ValueError, KeyError, TypeError, NotImplementedError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The predictions for the images `names` in `folder`, as files of a format of FORMATS.
    `missing` are the shards that are not written yet; the rows that came for them wait in memory
    until they are whole.
    """

    folder: Place
    names: Sequence[str]
    format: str = FORMATS[0]
    missing: set[int] = field(default_factory=set)
    waiting: dict[int, dict[int, Prediction]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of shards, written or missing."""
        return -(-len(self.names) // SHARD_ROWS)

    def rows(self, shard: int) -> range:
        """The numbers of the images in a shard."""
        return range(len(self.names))[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]

    def path(self, shard: int) -> Place:
        """The file of a shard."""
        return self.folder / f"part-{shard:05}.{self.format}"

    @property
    def numbers(self) -> list[int]:
        """The numbers of the images in missing shards."""
        return [number for shard in sorted(self.missing) for number in self.rows(shard)]

    def add(self, number: int, row: Prediction) -> bool:
        """Take the row of an image; return False for a second one, which changes nothing."""
        shard = number // SHARD_ROWS
        if shard not in self.missing or number in self.waiting.get(shard, ()):
            return False
        rows = self.waiting.setdefault(shard, {})
        rows[number] = row
        if len(rows) == len(self.rows(shard)):
            self._write(shard, [rows[each] for each in self.rows(shard)])
            del self.waiting[shard]
            self.missing.remove(shard)
        return True

    def _write(self, shard: int, rows: list[Prediction]) -> None:
        names = [self.names[each] for each in self.rows(shard)]
        try:
            with replace_place(self.path(shard)) as file:
                file.write(_FORMATTERS[self.format](names, rows))
        except OSError as error:
            raise UserError(f"cannot write {self.path(shard)}: {first_line(error)}") from error

    def read(self) -> Iterator[Any]:
        """Yield all rows in the order of the images."""
        for shard in range(self.count):
            yield from self.read_shard(shard)

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """Read the rows of a shard that is written; a UserError if it is damaged or gone."""
        path = self.path(shard)
        try:
            found = _PARSERS[self.format](read_place(path, MAX_SHARD_BYTES))
            if len(found) != len(self.rows(shard)):
                raise ValueError(f"{len(found)} rows")
            return found
        except (OSError, *DAMAGED) as error:
            raise UserError(
                f"{path} cannot be read: {first_line(error)}; if it is damaged, delete it and give"
                " the same command again"
            ) from error

    def join(self, out: Place) -> None:
        """Write all rows into one new .csv or .parquet file."""
        try:
            with replace_place(out) as file:
                if out.suffix == ".csv":
                    self._join_csv(file)
                    return
                import pyarrow
                import pyarrow.parquet

                with pyarrow.parquet.ParquetWriter(file, build_schema()) as writer:
                    for shard in range(self.count):
                        rows = self.read_shard(shard)
                        writer.write_table(pyarrow.Table.from_pylist(rows, build_schema()))
        except OSError as error:
            raise UserError(f"cannot write {out}: {first_line(error)}") from error

    def _join_csv(self, file: Any) -> None:
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        text.write(",".join(COLUMNS) + "\n")
        for row in self.read():
            write_csv_row(text, row["filename"], row)
        text.flush()
        text.detach()

    def delete(self) -> None:
        """Delete the folder."""
        if isinstance(self.folder, Path):
            shutil.rmtree(self.folder)
            return
        names = [self.path(shard).name for shard in range(self.count)]
        delete_names(self.folder, [*names, TASK_FILE])

    def summarise(self) -> Outcome:
        """Count the images, and those without a label."""
        images = failed = 0
        first_error = ""
        for row in self.read():
            images += 1
            failed += row["error"] is not None
            first_error = first_error or row["error"] or ""
        return Outcome(images, failed, first_error)


def _format_parquet(names: Sequence[str], rows: Sequence[Prediction]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {"filename": [storable(name) for name in names]}
    for name in COLUMNS[1:]:
        columns[name] = [row[name] for row in rows]  # type: ignore[literal-required]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, build_schema()), buffer)
    return buffer.getvalue()


def _parse_parquet(data: bytes) -> list[dict[str, Any]]:
    import pyarrow.parquet

    if sum(read_foreign_footer(io.BytesIO(data), MAX_SHARD_FOOTER).group_rows) > SHARD_ROWS:
        raise ValueError(f"more than {SHARD_ROWS:,} rows")
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    if not table.schema.equals(build_schema()):
        raise ValueError(f"other columns than {', '.join(COLUMNS)}")
    return table.to_pylist()


def _format_csv(names: Sequence[str], rows: Sequence[Prediction]) -> bytes:
    text = io.StringIO(newline="")
    text.write(",".join(COLUMNS) + "\n")
    for name, row in zip(names, rows, strict=True):
        write_csv_row(text, name, row)
    return text.getvalue().encode()


def _parse_csv(data: bytes) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
    return [
        {
            "filename": from_csv(row["filename"]),
            "label": from_csv(row["label"]) or None,
            "probability": float(row["probability"]) if row["probability"] else None,
            "error": from_csv(row["error"]) or None,
        }
        for row in rows
    ]


_FORMATTERS = {"parquet": _format_parquet, "csv": _format_csv}
_PARSERS = {"parquet": _parse_parquet, "csv": _parse_csv}


def open_shards(
    folder: Place, names: Sequence[str], model: str, format: str = FORMATS[0]
) -> Shards:
    """Open a folder for the predictions of a model, identified by `model`; create it if need be.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    found = hashlib.sha256("\n".join(map(storable, names)).encode()).hexdigest()
    task = {"model": model, "images": len(names), "names": found, "shard_rows": SHARD_ROWS}
    # a folder of Parquet files says nothing of it, as before there were others
    task |= {"format": format} if format != FORMATS[0] else {}
    try:
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        there = sorted(name for name in list_names(folder) if not name.startswith("."))
        if there and _read_task(folder) != task:
            raise UserError(
                f"--out {folder} holds other files ({', '.join(there[:3])}), or predictions of"
                " another model, of other images or in another format: give a new folder"
            )
        if not there:
            with replace_place(folder / TASK_FILE) as file:
                file.write(json.dumps(task).encode())
    except OSError as error:
        why = error.strerror or first_line(error)
        raise UserError(f"cannot write into {folder}: {why}") from error
    shards = Shards(folder=folder, names=names, format=format)
    written = set(there)
    shards.missing.update(n for n in range(shards.count) if shards.path(n).name not in written)
    return shards


def _read_task(folder: Place) -> Any:
    try:
        return json.loads(read_place(folder / TASK_FILE, MAX_TASK_BYTES))
    except (OSError, ValueError):
        return None
