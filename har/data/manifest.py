"""The table of images: its columns, digests, checks, and the two files that store it."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import pandas as pd

from har.data.folders import check_files
from har.data.summary import DataSummary
from har.util.errors import UserError
from har.util.escaping import format_csv, from_csv
from har.util.files import (
    digest_bytes,
    digest_file,
    expand_home,
    read_regular_file,
    replace_text,
    storable,
)
from har.util.locks import file_lock

# The table has one row for each image.
COLUMNS = {
    "path": str,  # from the data folder, with forward slashes
    "label": str,  # the class name
    "label_id": int,  # in order of first appearance in the source's CSV
    "width": int,  # in pixels, as stored
    "height": int,
    "bytes": int,  # size of the file
    "plain_jpeg": bool,  # True if TensorFlow decodes it like Pillow (see har.data.images)
    "sha256": str,  # of the file's bytes, hexadecimal
    "perceptual_hash": str,  # hexadecimal; similar for look-alikes, empty for a plain picture
    "duplicate_group": int,  # copies of one image share it and stay on one side of a split
    "split": str,  # train, test or unused; the recipe takes validation images out of train
}
TABLE_FILE = "manifest.csv"
SUMMARY_FILE = "dataset.json"
# Larger files are not ours: 300 bytes a row, and as many strays as images.
MAX_TABLE_BYTES = 1_000_000_000
MAX_SUMMARY_BYTES = 300_000_000
# Digest of TABLE_FILE, stored in SUMMARY_FILE: the other digests do not cover every column.
TABLE_DIGEST = "table_sha256"
# In SUMMARY_FILE: the cells of TABLE_FILE are escaped for spreadsheets, as older versions' are not.
ESCAPED = "escaped_cells"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set. `table` has the columns above; its paths start from `root`."""

    name: str
    root: Path
    table: pd.DataFrame
    summary: DataSummary

    @property
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
    rows = sorted(json.dumps(row) for row in table[columns].astype(str).to_numpy().tolist())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def format_manifest_files(manifest: Manifest, root: str) -> dict[str, str]:
    """Map the name of each file of a prepared folder to its text; `root` is the manifest's as it
    is written there.
    """
    table = format_csv(manifest.table)
    stored = {
        "name": manifest.name,
        "root": root,
        "class_names": list(manifest.class_names),
        "dataset_digest": manifest.dataset_digest,
        "test_digest": manifest.test_digest,
        **manifest.summary.to_json(),
        ESCAPED: True,
        TABLE_DIGEST: digest_bytes(table.encode()),
    }
    # a byte of the root that is not UTF-8 becomes JSON's `\\udcff`
    summary = storable(json.dumps(stored, indent=2, ensure_ascii=False))
    return {TABLE_FILE: table, SUMMARY_FILE: summary}


def write_manifest(manifest: Manifest, out: Path) -> None:
    """Write both files of a prepared folder atomically, dataset.json last."""
    lock = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # two processes at once could leave the table of one beside the summary of the other
        with file_lock(lock, hint="choose another folder"):
            try:
                for name, text in format_manifest_files(manifest, str(manifest.root)).items():
                    replace_text(out / name, text)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {out}: {error}") from error


def is_prepared(folder: Path) -> bool:
    """Return True if `write_manifest` wrote to this folder."""
    return (folder / SUMMARY_FILE).is_file() and (folder / TABLE_FILE).is_file()


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
        data = read_regular_file(folder / TABLE_FILE, MAX_TABLE_BYTES)
        table = pd.read_csv(
            BytesIO(data),
            dtype=COLUMNS,  # type: ignore[arg-type]
            keep_default_na=False,  # "NA" may be a label or a file name
        )
        if stored.get(ESCAPED):
            table[["path", "label"]] = table[["path", "label"]].map(from_csv)
        manifest = Manifest(
            name=stored["name"],
            # a run's folder is recorded as `~/...`
            root=Path(expand_home(stored["root"])),
            table=table[list(COLUMNS)],
            summary=DataSummary.from_json(stored),
        )
        found = {
            "dataset_digest": manifest.dataset_digest,
            "test_digest": manifest.test_digest,
            TABLE_DIGEST: digest_bytes(data),
        }
        # the first versions did not store the digest of the table
        written = {TABLE_DIGEST: found[TABLE_DIGEST], **stored}
        changed = [name for name in found if written[name] != found[name]]
    # JSON nested thousands of levels deep is a RecursionError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a readable prepared folder: {error!r}; run `har prepare` again"
        ) from error
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder / TABLE_FILE} was changed after it was prepared ({name} is {found[name]},"
            f" {SUMMARY_FILE} says {written[name]}): run `har prepare` again"
        )
    return manifest


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
                f"{manifest.root / path} {found}; {TABLE_FILE} names it: run `har prepare` again"
            )
        if found != size:
            raise UserError(
                f"{manifest.root / path} was changed after it was prepared ({found} bytes,"
                f" {TABLE_FILE} says {size}): run `har prepare` again"
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
