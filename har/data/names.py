"""Finds the files that a table of labels names, also where it writes them a little differently."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

from har.data.folders import normalise_path

Found = tuple[str, str]
# The places after the usual folder, as notes name them.
PLACES = ("", "from the data folder on", "anywhere in the data folder")


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]


# Forms in which names are compared after their exact form, and what is said of a name found so.
FORMS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda path: path, ""),
    (str.casefold, "found with capital and small letters exchanged"),
    (lambda path: _without_suffix(path.casefold()), "found with another ending, such as .jpg"),
)


class NameFinder:
    """Finds names in a listing of files: in `folder`, else in the data folder, else anywhere.

    One of these places is chosen for a whole table. So a missing file never becomes another one of
    the same name that lies elsewhere.
    """

    def __init__(self, files: Collection[str], folder: str) -> None:
        """`files` are paths from the data folder."""
        self.folder = folder
        # FORMS, and whether only the last part of the path is compared
        self._indices: dict[tuple[int, bool], dict[str, list[str]]] = {}
        self._files = files

    def exists(self, name: str) -> bool:
        """Return True if a file has this name in any of the places."""
        return any(find(name) for find in self._places())

    def find_all(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return the path of each name, and notes on what was assumed.

        The path of a name that is not found is that in `folder`.
        """
        names = list(names)
        asked = [name for name in names if name]
        found: dict[str, Found] = {}
        place = -1
        for number, find in enumerate(self._places()):
            here = {name: hit for name in asked if (hit := find(name))}
            if len(here) > len(found):
                found, place = here, number
            if len(found) * 2 >= len(asked):
                break
        notes = [
            f"{count:,} names {how}"
            for how, count in Counter(how for _, how in found.values()).items()
            if how
        ]
        if place > 0:
            path = next(iter(found.values()))[0]
            notes.append(f"names found {PLACES[place]}, such as {path!r}")
        return [found[name][0] if name in found else self._default(name) for name in names], notes

    def _default(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder and name.strip() else name

    def _places(self) -> list[Callable[[str], Found | None]]:
        return [
            self._find_in_folder,
            self._find,
            self._find_by_last_part,
        ]

    def _find(self, path: str) -> Found | None:
        if path in self._files:
            return path, ""
        path = normalise_path(path.strip())
        for number, (form, how) in enumerate(FORMS):
            hits = self._index(number, last_part=False).get(form(path), [])
            if len(hits) == 1:
                return hits[0], how
        return None

    def _find_in_folder(self, name: str) -> Found | None:
        """Find a name in the usual folder, with which it may also begin."""
        below = self._find(self._default(name)) or self._find(self._default(name.strip()))
        path = normalise_path(name.strip())
        begins_so = bool(self.folder) and path.startswith(f"{self.folder}/")
        return below or (self._find(path) if begins_so else None)

    def _find_by_last_part(self, name: str) -> Found | None:
        """Find a file by its own name, and by the folders above it if several have that name."""
        parts = normalise_path(name.strip()).split("/")
        for number, (form, how) in enumerate(FORMS):
            hits = self._index(number, last_part=True).get(form(parts[-1]), [])
            for depth in range(2, len(parts) + 1):
                if len(hits) > 1:
                    end = form("/".join(parts[-depth:]))
                    hits = [hit for hit in hits if form(normalise_path(hit)).endswith(end)]
            if len(hits) == 1:
                return hits[0], how
        return None

    def _index(self, number: int, last_part: bool) -> dict[str, list[str]]:
        key = (number, last_part)
        if key not in self._indices:
            form, index = FORMS[number][0], defaultdict(list)
            for path in self._files:
                name = normalise_path(path)
                index[form(name.rsplit("/", 1)[-1] if last_part else name)].append(path)
            self._indices[key] = dict(index)
        return self._indices[key]
