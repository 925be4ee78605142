"""Predictions in a folder of Parquet files, each of which is whole or not there.

The file `part-00007.parquet` has the rows of the images from 7 x SHARD_ROWS on, in the order of the
whole list. An interrupted call is resumed at the files that are missing. `_task.json` says which
images and model the folder is of; readers of Parquet folders skip names that begin with `_`.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from har.inference.classifier import Prediction
from har.inference.predict import COLUMNS, Outcome, build_schema, write_csv_row
from har.util.errors import UserError
from har.util.files import read_regular_file, replace_file, replace_text, storable

SHARD_ROWS = 1024
TASK_FILE = "_task.json"
MAX_TASK_BYTES = 100_000


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The predictions for the images `names` in `folder`. `missing` are the shards that are not
    written yet; the rows that came for them wait in memory until they are whole.
    """

    folder: Path
    names: Sequence[str]
    missing: set[int] = field(default_factory=set)
    waiting: dict[int, dict[int, Prediction]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of shards, written or missing."""
        return -(-len(self.names) // SHARD_ROWS)

    def rows(self, shard: int) -> range:
        """The numbers of the images in a shard."""
        return range(len(self.names))[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{shard:05}.parquet"

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
            with replace_file(self.path(shard)) as file:
                file.write(self._format(rows, shard))
            del self.waiting[shard]
            self.missing.remove(shard)
        return True

    def _format(self, rows: dict[int, Prediction], shard: int) -> bytes:
        import pyarrow
        import pyarrow.parquet

        ordered = [(storable(self.names[each]), rows[each]) for each in self.rows(shard)]
        columns: dict[str, list[Any]] = {"filename": [name for name, _ in ordered]}
        for name in COLUMNS[1:]:
            columns[name] = [row[name] for _, row in ordered]  # type: ignore[literal-required]
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns, build_schema()), buffer)
        return buffer.getvalue()

    def read(self) -> Iterable[Any]:
        """Yield all rows in the order of the images."""
        for shard in range(self.count):
            yield from self.read_shard(shard)

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """Read the rows of a shard that is written."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path(shard)).to_pylist()

    def join(self, out: Path) -> None:
        """Write all rows into one new .csv or .parquet file."""
        with replace_file(out) as file:
            if out.suffix == ".csv":
                text = TextIOWrapper(file, encoding="utf-8", newline="")
                text.write(",".join(COLUMNS) + "\n")
                for row in self.read():
                    write_csv_row(text, row["filename"], row)
                text.flush()
                text.detach()
                return
            import pyarrow.parquet

            with pyarrow.parquet.ParquetWriter(file, build_schema()) as writer:
                for shard in range(self.count):
                    writer.write_table(pyarrow.parquet.read_table(self.path(shard)))

    def summarise(self) -> Outcome:
        """Count the images, and those without a label."""
        images = failed = 0
        first_error = ""
        for row in self.read():
            images += 1
            failed += row["error"] is not None
            first_error = first_error or row["error"] or ""
        return Outcome(images, failed, first_error)


def open_shards(folder: Path, names: Sequence[str], model: str) -> Shards:
    """Open a folder for the predictions of a model, identified by `model`; create it if need be.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    found = hashlib.sha256("\n".join(map(storable, names)).encode()).hexdigest()
    task = {"model": model, "images": len(names), "names": found, "shard_rows": SHARD_ROWS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        if there and _read_task(folder) != task:
            raise UserError(
                f"--out {folder} holds other files ({', '.join(there[:3])}), or predictions of"
                " another model or other images: give a new folder"
            )
        if not there:
            replace_text(folder / TASK_FILE, json.dumps(task))
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    shards = Shards(folder=folder, names=names)
    shards.missing.update(n for n in range(shards.count) if not shards.path(n).is_file())
    return shards


def _read_task(folder: Path) -> Any:
    try:
        return json.loads(read_regular_file(folder / TASK_FILE, MAX_TASK_BYTES))
    except (OSError, ValueError):
        return None
