"""The table of images: what it holds, how it is written, read, checked and digested.

Columns, one row an image:
    path             relative to the data folder, with forward slashes
    label            the class name
    label_id         its integer, in order of first appearance in the source's CSV
    width, height    in pixels, as stored
    bytes            of the file
    plain_jpeg       whether the fast decoder may be used (see har.data.images)
    sha256           of the file's bytes, hexadecimal
    perceptual_hash  what the image looks like (see har.data.duplicates), hexadecimal
    duplicate_group  integer; images of one group never straddle a split
    split            "train", "test", or "unused" (see har.data.splits); validation is carved out of
                     train by the recipe
"""

import hashlib
import json
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from har.data.summary import DataSummary
from har.util.errors import ChangedError, UserError
from har.util.files import digest_bytes, digest_file, replace_text

COLUMNS = {
    "path": str,
    "label": str,
    "label_id": int,
    "width": int,
    "height": int,
    "bytes": int,
    "plain_jpeg": bool,
    "sha256": str,
    "perceptual_hash": str,
    "duplicate_group": int,
    "split": str,
}
TABLE_FILE = "manifest.csv"
SUMMARY_FILE = "dataset.json"
# Of the table's file, in dataset.json: the other digests do not see every column.
TABLE_DIGEST = "table_sha256"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set.

    `table` has the columns above; `root` is the folder that `path` starts from.
    """

    name: str
    root: Path
    table: pd.DataFrame
    summary: DataSummary

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label by label id."""
        by_id = self.table.drop_duplicates("label_id").sort_values("label_id")
        return tuple(by_id["label"])

    def rows(self, split: str) -> pd.DataFrame:
        """The rows of one split, numbered from 0."""
        return self.table[self.table["split"] == split].reset_index(drop=True)

    @property
    def described(self) -> dict[str, Any]:
        """What dataset.json holds."""
        return {
            "name": self.name,
            "root": str(self.root),
            "class_names": list(self.class_names),
            "dataset_digest": self.dataset_digest,
            "test_digest": self.test_digest,
            **self.summary.to_json(),
        }

    @property
    def dataset_digest(self) -> str:
        """Of every file's path, bytes and label, and of the order of the classes."""
        return _digest_rows(self.table, ["path", "sha256", "label", "label_id"])

    @property
    def test_digest(self) -> str:
        """Of the test images and their labels alone, wherever they lie; `none` for none."""
        test = self.rows("test")
        return "none" if test.empty else _digest_rows(test, ["sha256", "label"])


def _digest_rows(table: pd.DataFrame, columns: list[str]) -> str:
    """16 hexadecimal digits that do not depend on the order of the rows."""
    rows = sorted(json.dumps(row) for row in table[columns].astype(str).to_numpy().tolist())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def format_manifest_files(manifest: Manifest) -> dict[str, str]:
    """What both files of a prepared folder hold, by their names."""
    table = manifest.table.to_csv(index=False, lineterminator="\n")
    described = manifest.described | {TABLE_DIGEST: digest_bytes(table.encode())}
    return {TABLE_FILE: table, SUMMARY_FILE: json.dumps(described, indent=2, ensure_ascii=False)}


def write_manifest(manifest: Manifest, out: Path) -> None:
    """Write both files into `out`, each whole or not at all; dataset.json comes last.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # or another process' table could come to lie beside this summary
        with FileLock(lock := out / ".lock"):
            try:
                for name, text in format_manifest_files(manifest).items():
                    replace_text(out / name, text)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {out}: {error}") from error


def is_prepared(folder: Path) -> bool:
    """Whether `folder` is what `write` left behind."""
    return (folder / SUMMARY_FILE).is_file() and (folder / TABLE_FILE).is_file()


def read_manifest(folder: Path, image_root: Path | None = None) -> Manifest:
    """The manifest in a prepared folder, checked against its own digests.

    `image_root` is where its images lie now, if they were moved; then every one is read and
    compared with its digest.

    Raises:
        UserError: a file is missing or damaged, a column is missing, the table was edited
            since it was written, or the images are gone or others.
    """
    try:
        stored = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        data = (folder / TABLE_FILE).read_bytes()
        # a label or a file may be called "NA": text columns are read as they stand
        table = pd.read_csv(
            BytesIO(data),
            dtype=COLUMNS,  # type: ignore[arg-type]
            keep_default_na=False,
        )
        manifest = Manifest(
            name=stored["name"],
            root=Path(stored["root"]),
            table=table[list(COLUMNS)],
            summary=DataSummary.from_json(stored),
        )
        digests = {
            "dataset_digest": (stored["dataset_digest"], manifest.dataset_digest),
            "test_digest": (stored["test_digest"], manifest.test_digest),
        }
        # the first versions did not store a digest of the whole table
        if TABLE_DIGEST in stored:
            digests[TABLE_DIGEST] = (stored[TABLE_DIGEST], digest_bytes(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is no readable prepared folder: {error!r}; prepare it again"
        ) from error
    for name, (written, found) in digests.items():
        if written != found:
            raise UserError(
                f"{folder / TABLE_FILE} was changed after it was prepared"
                f" ({name} is {found}, {SUMMARY_FILE} says {written}): prepare it again"
            )
    if image_root is not None:
        manifest = replace(manifest, root=image_root.resolve())
    _check_files(manifest)
    if image_root is not None:
        check_bytes(manifest, manifest.table)
    return manifest


def check_images(manifest: Manifest) -> None:
    """Raise a UserError that names an image which is gone or not what was prepared; reads all."""
    _check_files(manifest)
    check_bytes(manifest, manifest.table)


def _check_files(manifest: Manifest) -> None:
    """Raise a UserError unless every image is in the folder with its size; reads none."""
    if not manifest.root.is_dir():
        raise UserError(
            f"the images are gone: there is no folder {manifest.root}; say with --image-root where"
            " they lie now"
        )
    for path, size in zip(manifest.table["path"], manifest.table["bytes"], strict=True):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{TABLE_FILE} names {path!r}: paths must stay inside the folder")
        try:
            found = (manifest.root / path).stat().st_size
        except OSError as error:
            raise UserError(f"{manifest.root / path} is gone: {error.strerror}") from error
        if found != size:
            raise UserError(
                f"{manifest.root / path} was changed after it was prepared ({found} bytes,"
                f" {TABLE_FILE} says {size}): prepare the images again"
            )


def check_bytes(manifest: Manifest, rows: pd.DataFrame) -> None:
    """Raise a UserError unless the image of every row has its digest; reads them all."""
    for path, digest in zip(rows["path"], rows["sha256"], strict=True):
        try:
            found = digest_file(manifest.root / path)
        except OSError as error:
            raise UserError(f"{manifest.root / path} cannot be read: {error.strerror}") from error
        if found != digest:
            raise ChangedError(f"{manifest.root / path} is not the image that was prepared")
