"""The table of images: its digests, its checks, and the prepared folder that stores it."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from json.encoder import encode_basestring_ascii
from pathlib import Path

import pandas as pd

from har.data.folders import check_files
from har.data.summary import DataSummary
from har.data.table_files import (
    CSV_FILE,
    MAX_TABLE_BYTES,
    TABLE_FILES,
    decode_table,
    encode_table,
)
from har.util.errors import UserError
from har.util.files import (
    digest_bytes,
    digest_file,
    expand_home,
    read_regular_file,
    replace_file,
    storable,
)
from har.util.locks import file_lock

SUMMARY_FILE = "dataset.json"
# Larger files are not ours: as many strays as images.
MAX_SUMMARY_BYTES = 300_000_000
# In SUMMARY_FILE: the name of the table's file; older versions knew CSV_FILE alone.
TABLE_NAME = "table"
# The digest of that file: the other digests do not cover every column.
TABLE_DIGEST = "table_sha256"
# True if the cells of CSV_FILE are escaped for spreadsheets, as older versions' are not.
ESCAPED = "escaped_cells"
# Rows that a digest takes at once: a million as texts, several times, would be gigabytes.
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set. `table` has the columns of `har.data.table_files`; its paths start from
    `root`.
    """

    name: str
    root: Path
    table: pd.DataFrame
    summary: DataSummary

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Labels, in the order of their ids."""
        by_id = self.table.drop_duplicates("label_id").sort_values("label_id")
        return tuple(by_id["label"])

    def rows(self, split: str) -> pd.DataFrame:
        """Return the rows of one split, numbered from 0."""
        return self.table[self.table["split"] == split].reset_index(drop=True)

    @cached_property
    def dataset_digest(self) -> str:
        """Digest of the path, bytes and label of every file, and of the order of the classes."""
        return _digest_rows(self.table, ["path", "sha256", "label", "label_id"])

    @cached_property
    def test_digest(self) -> str:
        """Digest of the test images and their labels, whatever their paths; `none` without any."""
        test = self.rows("test")
        return "none" if test.empty else _digest_rows(test, ["sha256", "label"])


def hide_test(manifest: Manifest) -> Manifest:
    """Return the same data with the test images among those that nothing uses."""
    table = manifest.table.copy()
    table.loc[table["split"] == "test", "split"] = "unused"
    return replace(manifest, table=table)


def _digest_rows(table: pd.DataFrame, columns: list[str]) -> str:
    """16 hexadecimal digits that do not depend on the order of the rows."""
    rows: list[str] = []
    for start in range(0, len(table), ROWS_AT_ONCE):
        part = table[columns].iloc[start : start + ROWS_AT_ONCE].astype(str)
        cells = [map(encode_basestring_ascii, part[name].tolist()) for name in columns]
        # as `json.dumps` writes a list of texts, which takes five times as long
        rows += [f"[{', '.join(row)}]" for row in zip(*cells, strict=True)]
    rows.sort()
    found = hashlib.sha256()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part_of_text = "\n".join(rows[start : start + ROWS_AT_ONCE])
        found.update(f"\n{part_of_text}".encode() if start else part_of_text.encode())
    return found.hexdigest()[:16]


def format_manifest_files(manifest: Manifest, root: str) -> dict[str, bytes]:
    """Map the name of each file of a prepared folder to its content, dataset.json last; `root` is
    the manifest's as it is written there.
    """
    name, table = encode_table(manifest.table)
    stored = {
        "name": manifest.name,
        "root": root,
        "class_names": list(manifest.class_names),
        "dataset_digest": manifest.dataset_digest,
        "test_digest": manifest.test_digest,
        **manifest.summary.to_json(),
        TABLE_NAME: name,
        ESCAPED: name == CSV_FILE,
        TABLE_DIGEST: digest_bytes(table),
    }
    # a byte of the root that is not UTF-8 becomes JSON's `\\udcff`
    summary = storable(json.dumps(stored, indent=2, ensure_ascii=False))
    return {name: table, SUMMARY_FILE: summary.encode()}


def write_manifest(manifest: Manifest, out: Path) -> None:
    """Write both files of a prepared folder atomically, dataset.json last."""
    lock = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # two processes at once could leave the table of one beside the summary of the other
        with file_lock(lock, hint="choose another folder"):
            try:
                files = format_manifest_files(manifest, str(manifest.root))
                for name, data in files.items():
                    with replace_file(out / name) as file:
                        file.write(data)
                # a table of another size may have been here
                for name in set(TABLE_FILES) - set(files):
                    (out / name).unlink(missing_ok=True)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {out}: {error}") from error


def is_prepared(folder: Path) -> bool:
    """Return True if `write_manifest` wrote to this folder."""
    tables = (folder / name for name in TABLE_FILES)
    return (folder / SUMMARY_FILE).is_file() and any(each.is_file() for each in tables)


def read_manifest(folder: Path, image_root: Path | None = None) -> Manifest:
    """Read the manifest in a prepared folder, and check it and the image files.

    The images' names and sizes are checked. With `image_root`, the new folder of images that were
    moved, their bytes are checked too.
    """
    manifest = _load(folder)
    if image_root is None:
        _check_files(manifest)
    else:
        manifest = replace(manifest, root=image_root.resolve())
        check_images(manifest)
    return manifest


def _load(folder: Path) -> Manifest:
    try:
        stored = json.loads(read_regular_file(folder / SUMMARY_FILE, MAX_SUMMARY_BYTES))
        name = stored.get(TABLE_NAME, CSV_FILE)
        if name not in TABLE_FILES:
            raise ValueError(f"its table is {name!r:.100}, none of {', '.join(TABLE_FILES)}")
        table, table_digest = _read_table(folder / name, escaped=bool(stored.get(ESCAPED)))
        manifest = Manifest(
            name=stored["name"],
            # a run's folder is recorded as `~/...`
            root=Path(expand_home(stored["root"])),
            table=table,
            summary=DataSummary.from_json(stored),
        )
        found = {
            "dataset_digest": manifest.dataset_digest,
            "test_digest": manifest.test_digest,
            TABLE_DIGEST: table_digest,
        }
        # the first versions did not store the digest of the table
        written = {TABLE_DIGEST: found[TABLE_DIGEST], **stored}
        changed = [each for each in found if written[each] != found[each]]
    # JSON nested thousands of levels deep is a RecursionError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a readable prepared folder: {error!r}; run `har prepare` again"
        ) from error
    if changed:
        first = changed[0]
        raise UserError(
            f"{folder / name} was changed after it was prepared ({first} is {found[first]},"
            f" {SUMMARY_FILE} says {written[first]}): run `har prepare` again"
        )
    return manifest


def _read_table(path: Path, *, escaped: bool) -> tuple[pd.DataFrame, str]:
    """Read a table and the digest of its file, whose bytes then need no memory any more."""
    data = read_regular_file(path, MAX_TABLE_BYTES)
    return decode_table(path.name, data, escaped=escaped), digest_bytes(data)


def check_images(manifest: Manifest) -> None:
    """Raise a UserError if an image is missing or changed; this reads every image."""
    _check_files(manifest)
    check_bytes(manifest, manifest.table)


def _check_files(manifest: Manifest) -> None:
    """Raise a UserError if an image is missing or its size has changed; this reads no image."""
    if not manifest.root.is_dir():
        raise UserError(
            f"the images are gone: there is no folder {manifest.root}; if you moved them, add"
            " --image-root DIR"
        )
    paths, sizes = manifest.table["path"], manifest.table["bytes"]
    for path, size, found in zip(paths, sizes, check_files(manifest.root, paths), strict=True):
        if isinstance(found, str):
            raise UserError(
                f"{manifest.root / path} {found}; the prepared table names it: run `har prepare`"
                " again"
            )
        if found != size:
            raise UserError(
                f"{manifest.root / path} was changed after it was prepared ({found} bytes,"
                f" the prepared table says {size}): run `har prepare` again"
            )


def check_bytes(manifest: Manifest, rows: pd.DataFrame) -> None:
    """Raise a UserError if an image of these rows has changed; this reads their files."""
    for path, digest in zip(rows["path"], rows["sha256"], strict=True):
        try:
            found = digest_file(manifest.root / path)
        except OSError as error:
            raise UserError(f"{manifest.root / path} cannot be read: {error.strerror}") from error
        if found != digest:
            raise UserError(
                f"{manifest.root / path} is not the image that was prepared: run `har prepare`"
                " again"
            )
