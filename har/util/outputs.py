"""Folders and files to write into, checked before any work: nobody's own files are replaced."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from har.util.errors import UserError

# What file managers and git leave in a folder that its owner calls empty.
EMPTY_NAMES = (".DS_Store", ".gitkeep", "Thumbs.db", "desktop.ini")
# The lock and the unfinished files of a command that was killed (`har.util.files.replace_file`).
UNFINISHED = re.compile(r"\.lock|\..+\.[0-9a-f]{32}")
LISTED = 3
# The tracking store that --offline uses; it lies in the working folder.
LOCAL_STORE = "sqlite:///mlflow.db"
# A file that tells what wrote it does so within this many bytes of its beginning, or of its end.
MARK_BYTES = 1000
# In the metadata of a table in Parquet, which stand at its end.
PARQUET_MARK = "har prepare: a table of images"


@dataclass(frozen=True, kw_only=True)
class OutputKind:
    """A kind of folder that a command writes: it holds a file that contains its mark.

    `marks` maps such files to their marks.
    """

    name: str
    what: str
    marks: Mapping[str, bytes]


# The table and report.html are written first, so a folder half written has them too.
PREPARED = OutputKind(
    name="prepared",
    what="prepared data",
    marks={
        "manifest.csv": b"path,label,label_id,width,height,bytes,",
        "manifest.parquet": PARQUET_MARK.encode(),
    },
)
COMPARISON = OutputKind(
    name="comparison",
    what="comparison",
    marks={"report.html": b"<title>Comparison of "},
)
AUDIT = OutputKind(
    name="audit",
    what="audit of labels",
    marks={"report.html": b"<title>Labels in doubt: "},
)
KINDS = (PREPARED, COMPARISON, AUDIT)


def is_output(folder: Path) -> bool:
    """Return True for a folder that one of our commands wrote."""
    try:
        return any(_has_mark(folder, kind) for kind in KINDS)
    except OSError:
        return False


def check_output_folder(out: Path, kind: OutputKind) -> None:
    """Raise a UserError unless `out` is new, is empty, or holds what `kind` describes."""
    try:
        if not _exists(out):
            _check_parent(out)
            return
        if not out.is_dir():
            raise UserError(f"--out {out} is no folder: give a new one, {_suggest(out, kind)}")
        _check_writable(out)
        names = sorted(each.name for each in out.iterdir())
        foreign = [name for name in names if not _is_nothing(name)]
        if not foreign or _has_mark(out, kind):
            return
    except OSError as error:
        raise UserError(f"--out {out} cannot be used: {error.strerror}") from error
    listed = ", ".join(foreign[:LISTED])
    more = f" and {len(foreign) - LISTED} more" if len(foreign) > LISTED else ""
    raise UserError(
        f"--out {out} holds other files ({listed}{more}), and no {kind.what}:"
        f" give a new folder, {_suggest(out, kind)}"
    )


def check_output_file(out: Path) -> None:
    """Raise a UserError unless `out` is a new file in a folder that can be written."""
    try:
        # a link to nothing is replaced
        if _exists(out) and os.path.exists(out):
            raise UserError(f"{out} exists already: move it away, or give another --out")
        _check_parent(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be used: {error.strerror}") from error


def _exists(path: Path) -> bool:
    """Like `os.path.lexists`, but a name that is too long or may not be read raises OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_nothing(name: str) -> bool:
    return name in EMPTY_NAMES or UNFINISHED.fullmatch(name) is not None


def _has_mark(folder: Path, kind: OutputKind) -> bool:
    return any(mark in _read_ends(folder / name) for name, mark in kind.marks.items())


def _read_ends(file: Path) -> bytes:
    """Read the beginning and the end of a file, without quotes, in which names of columns may be;
    nothing where there is no file.
    """
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        start = opened.read(MARK_BYTES)
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - MARK_BYTES))
        return (start + b"\n" + opened.read(MARK_BYTES)).replace(b'"', b"")


def _check_parent(out: Path) -> None:
    """Check the first folder above `out` that exists; the ones between are created later."""
    parent = next(each for each in out.absolute().parents if _exists(each))
    if not parent.is_dir():
        raise UserError(f"--out {out} cannot be created: {parent} is no folder")
    _check_writable(parent)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out cannot be written: no permission to write into {folder}")


def _suggest(out: Path, kind: OutputKind) -> str:
    """Suggest a folder that does not exist: beside `out`, or in the working folder."""
    here = Path.cwd()
    # not resolved: it may be a link to itself
    taken = Path(os.path.abspath(out))
    inside = taken in (here, *here.parents)
    first = here / kind.name if inside else taken.with_name(f"{taken.name}-{kind.name}")
    new = next(each for each in _number(first) if not os.path.lexists(each))
    return f"such as --out {shlex.quote(os.path.relpath(new))}"


def _number(first: Path) -> Iterator[Path]:
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}-{number}")
