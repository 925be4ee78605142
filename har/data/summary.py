"""Facts about a prepared data set: what `prepare` found, and how it chose the test images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from har.data.splits import BEFORE_OPTIONS, Split
from har.util.files import expand_home


@dataclass(frozen=True)
class BadImage:
    """A labelled image that cannot be used, and the reason."""

    file: str  # the CSV that lists the image; "" for an image of a class folder
    row: int  # counts from 1 below the header of the CSV; 0 for an image of a class folder
    filename: str
    reason: str

    def __str__(self) -> str:
        place = f"row {self.row} of {self.file}, " if self.file else ""
        return f"{place}{self.filename!r}: {self.reason}"


@dataclass(frozen=True)
class Leak:
    """An image of Kaggle's own folder test/ that is an exact or near copy of a training image."""

    test: str  # this path and the next start from the data folder
    train: str
    kind: str  # exact or near


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Facts about a prepared data set, as `dataset.json` stores them."""

    split: Split  # the options that chose the test images
    images: int
    images_by_split: dict[str, int]
    images_by_label: dict[str, int]
    duplicate_groups: int  # groups of at least two images that are copies of each other
    near_duplicate_groups: int = 0  # those of them that hold near copies
    largest_duplicate_group: int = 1  # its number of images; 1 without copies
    conflicting_groups: int = 0  # groups of copies with different labels
    test_folder_images: int = 0  # readable images in Kaggle's own test/, labelled or not
    leaks: tuple[Leak, ...] = ()
    dropped: tuple[BadImage, ...] = ()
    strays: tuple[str, ...] = ()  # files without a label; their paths start from the data folder
    blank: tuple[str, ...] = ()  # images of one colour, fully transparent ones included
    notes: tuple[str, ...] = ()  # what was assumed to read names and labels

    def to_json(self) -> dict[str, Any]:
        """Return one flat dict, with the split's options first."""
        values = asdict(self)
        return {**values.pop("split"), **values}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "DataSummary":
        """Read what `to_json` wrote, also in older versions, which knew fewer facts.

        A missing option of the split is a KeyError, a missing field without default a TypeError.
        """
        values = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        options = {**BEFORE_OPTIONS, **stored}
        # a run's files are recorded as `~/...`
        options["test_file"] = expand_home(options["test_file"])
        values["split"] = Split(**{each.name: options[each.name] for each in fields(Split)})
        values["leaks"] = tuple(Leak(**each) for each in stored.get("leaks", ()))
        values["dropped"] = tuple(BadImage(**each) for each in stored.get("dropped", ()))
        for name in ("strays", "blank", "notes"):
            values[name] = tuple(stored.get(name, ()))
        return cls(**values)
