"""The images to score: found in a folder, in a list, or in a Parquet table, here or at a URL; read.

Names are what a row of predictions is called by: no two images may share one.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from har.data.folders import NOT_A_FILE, has_image_suffix, is_hidden, is_image, list_files
from har.data.images import ImageError, check_bytes, read_image
from har.data.layouts import KAGGLE_FOLDER, TEST_FOLDER
from har.data.limits import TRAINING_LIMITS
from har.data.names import NameFinder
from har.data.tables import MAX_BYTES, read_table
from har.inference.image_rows import Row, find_rows, read_row
from har.util.errors import UserError, first_line
from har.util.places import (
    PROTOCOLS,
    WEB,
    Place,
    Url,
    check_protocol,
    decode_place,
    encode_place,
    is_url,
    list_below,
    parse_place,
    read_place,
    read_start,
)
from har.util.progress import say, warn

# Where the bytes of one image are.
Input = Path | Url | Row
TEST_LIST = "Testing_set.csv"
# Left-out files that are named on the terminal.
MAX_NAMED = 5
# Images that are read at a time; elsewhere each takes tens of milliseconds.
READERS = 16


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Find the files named, and all images in the folders named, sorted by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [path / name for name in _list_images(path)]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no such image or folder: {path}")
    return found


def _list_images(folder: Path) -> list[str]:
    """List the images in a folder, and name the files that are left out."""
    listing = list_files(folder)
    images = {path for path in listing.files if is_image(folder, path)}
    # they become rows with an error
    images |= {path for path, why in listing.refused.items() if why == NOT_A_FILE}
    refused = {path: why for path, why in listing.refused.items() if path not in images}
    left_out = [f"{path} ({why})" for path, why in refused.items()]
    left_out += [path for path in listing.files if path not in images]
    return _name_left_out(folder, images, left_out)


def _name_left_out(folder: Place, images: set[str], left_out: list[str]) -> list[str]:
    """Return the images in order; warn about other files, or raise a UserError if all are."""
    if not images:
        found = f"{len(left_out)} other files, such as {left_out[0]}" if left_out else "no files"
        raise UserError(f"no images in {folder}: {found}")
    if left_out:
        more = ", ..." if len(left_out) > MAX_NAMED else ""
        warn(f"{len(left_out)} files are no images: {', '.join(left_out[:MAX_NAMED])}{more}")
    return sorted(images)


def find_inputs(data: Place) -> Mapping[str, Input]:
    """Map the names of the images to score to where they are.

    `data` is a folder, a list (.txt with a path or URL a line, or .csv), a .parquet with images, or
    one image.
    """
    if isinstance(data, Path) and data.is_dir():
        return list_unlabelled(data)
    if find := _FINDERS.get(data.suffix.lower()):
        return find(data)
    if isinstance(data, Path):
        if data.is_file():
            return {data.name: data}
        raise UserError(
            f"no such folder: {data}; --data also takes a list (.txt, .csv), a .parquet with"
            " images, or one image"
        )
    return _find_below(data)


def list_unlabelled(data: Path) -> dict[str, Path]:
    """Map the names of the images to score to their files.

    These are the images of Kaggle's test/ that Testing_set.csv lists, else all of test/, else all
    of a plain folder. In Kaggle's unpacked archive both lie one folder deeper.
    """
    folder = data
    for root in (data, data / KAGGLE_FOLDER):
        if (root / TEST_FOLDER).is_dir():
            folder, listed = root / TEST_FOLDER, root / TEST_LIST
            if listed.is_file():
                return _read_testing_set(listed, root)
            break
    return {name: folder / name for name in _list_images(folder)}


def _read_testing_set(listed: Path, root: Path) -> dict[str, Path]:
    files = [path for path in list_files(root).files if path.startswith(f"{TEST_FOLDER}/")]
    finder = NameFinder(set(files), TEST_FOLDER)
    names = read_table(listed, finder.exists, labelled=False).rows["filename"].tolist()
    folder = root / TEST_FOLDER
    for row, name in enumerate(names, start=1):
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not name or not inside:
            raise UserError(f"row {row} of {listed} names {name!r}, no file inside {folder}")
    if repeated := len(names) - len(set(names)):
        raise UserError(f"{listed} lists {repeated} images more than once")
    paths, notes = finder.find_all(names)
    for note in notes:
        say(f"{TEST_LIST}: {note}")
    return {name: root / path for name, path in zip(names, paths, strict=True)}


def _find_below(folder: Url) -> dict[str, Input]:
    """Find the images in a folder elsewhere by the endings of their names: none is downloaded."""
    if folder.protocol in WEB:
        raise UserError(f"a web server does not list its files: give a list of URLs, not {folder}")
    try:
        found = list_below(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {first_line(error)}") from error
    if found == [""]:
        return {folder.name: folder}
    found = [path for path in found if not any(map(is_hidden, path.split("/")))]
    images = {path for path in found if has_image_suffix(path)}
    left_out = [path for path in found if path not in images]
    return {path: folder / path for path in _name_left_out(folder, images, left_out)}


def _read_lines(listed: Place) -> dict[str, Input]:
    try:
        data = read_place(listed, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{listed} cannot be read: {first_line(error)}") from error
    # names of files, which may not be UTF-8
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    rows = {row: line.rstrip("\r") for row, line in enumerate(lines, start=1)}
    return _find_listed(listed, "line", {row: line for row, line in rows.items() if line.strip()})


def _read_csv(listed: Place) -> dict[str, Input]:
    table = read_table(listed, lambda name: False, labelled=False)
    for note in table.notes:
        say(note)
    return _find_listed(listed, "row", dict(enumerate(table.rows["filename"], start=1)))


def _find_listed(listed: Place, unit: str, entries: dict[int, str]) -> dict[str, Input]:
    """Map the entries of a list, by their rows, to where the images are."""
    if not entries:
        raise UserError(f"{listed} names no images")
    _check_names(listed, unit, entries.items())
    found = {entry: _locate(entry, listed.parent) for entry in entries.values()}
    # one of each protocol; what is unknown becomes a row with its error
    urls = {each.protocol: each for each in found.values() if isinstance(each, Url)}
    for protocol in PROTOCOLS.keys() & urls.keys():
        check_protocol(urls[protocol])
    return found


def _locate(entry: str, folder: Place) -> Input:
    """Return the place of a list's entry; in a list that is elsewhere, never on this machine."""
    if isinstance(folder, Url):
        return Url(entry) if is_url(entry) else folder / entry.lstrip("/")
    try:
        return parse_place(entry) if is_url(entry) else folder / entry
    except UserError:
        # reading it fails for the same reason
        return Url(entry)


def _check_names(where: Place, unit: str, names: Iterable[tuple[int, str]]) -> None:
    """Raise a UserError unless every row has a name, and no two the same."""
    first: dict[str, int] = {}
    for row, name in names:
        if not name:
            raise UserError(f"{unit} {row} of {where} names no image")
        if (other := first.setdefault(name, row)) != row:
            raise UserError(
                f"{unit}s {other} and {row} of {where} both name {name!r}: name each image once"
            )


def _read_parquet(table: Place) -> dict[str, Input]:
    names, rows = find_rows(table)
    if not names:
        raise UserError(f"{table} has no rows")
    _check_names(table, "row", enumerate(names))
    return dict(zip(names, rows, strict=True))


_FINDERS: dict[str, Callable[[Any], Mapping[str, Input]]] = {
    ".txt": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "read")


def read_inputs(inputs: Sequence[Input]) -> list[bytes | str]:
    """Read images, files several at a time; a text says why an image cannot be read."""
    if any(isinstance(each, Row) for each in inputs):
        return [_read_or_explain(each) for each in inputs]
    return list(_readers().map(_read_or_explain, inputs))


def _read_or_explain(place: Input) -> bytes | str:
    try:
        if isinstance(place, Row):
            return read_row(place)
        return read_image(place) if isinstance(place, Path) else _read_url(place)
    except ImageError as error:
        return str(error)


def _read_url(url: Url) -> bytes:
    most = TRAINING_LIMITS.bytes
    try:
        data = read_start(url, most + 1)
    except UserError as error:
        raise ImageError(str(error)) from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except OSError as error:
        raise ImageError(f"cannot be read: {first_line(error)}") from error
    if len(data) > most:
        raise ImageError(f"more than {most:,} bytes")
    check_bytes(len(data), most)
    return data


def pack_inputs(inputs: Sequence[Input]) -> dict[str, list[Any]]:
    """Return columns of bytes and numbers, which can travel to other machines."""
    places = [each.table if isinstance(each, Row) else each for each in inputs]
    rows = [(each.group, each.at) if isinstance(each, Row) else (-1, -1) for each in inputs]
    return {
        "place": [encode_place(each) for each in places],
        "group": [group for group, _ in rows],
        "at": [at for _, at in rows],
    }


def unpack_inputs(columns: Mapping[str, Any]) -> list[Input]:
    """Return the inputs that `pack_inputs` packed."""
    rows = zip(columns["place"], columns["group"], columns["at"], strict=True)
    return [
        decode_place(place) if group < 0 else Row(decode_place(place), int(group), int(at))
        for place, group, at in rows
    ]
