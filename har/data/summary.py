"""Facts about a prepared data set: what `prepare` found, and how it chose the test images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from har.data.splits import Split


@dataclass(frozen=True)
class BadImage:
    """A labelled image that cannot be used, and the reason.

    `file` is the CSV that lists the image, and `row` counts from 1 below the CSV's header; they
    are "" and 0 for an image of a class folder.
    """

    file: str
    row: int
    filename: str
    reason: str

    def __str__(self) -> str:
        place = f"row {self.row} of {self.file}, " if self.file else ""
        return f"{place}{self.filename!r}: {self.reason}"


@dataclass(frozen=True)
class Leak:
    """An image of Kaggle's own folder test/ that is an exact or near copy of a training image."""

    test: str
    train: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Facts about a prepared data set, as `dataset.json` stores them.

    Attributes:
        split: the options that chose the test images.
        images, images_by_split, images_by_label: numbers of images.
        duplicate_groups: groups of at least two images that are copies of each other.
        near_duplicate_groups: those of them that hold near copies.
        conflicting_groups: those of them whose images carry different labels.
        largest_duplicate_group: number of images in the largest group; 1 if there are no copies.
        test_folder_images: readable images in Kaggle's own test/ folder, labelled or not.
        leaks: pairs of copies between that folder and the training images.
        dropped: labelled images that cannot be used.
        strays: files without a label, as paths that start from the data folder.
    """

    split: Split
    images: int
    images_by_split: dict[str, int]
    images_by_label: dict[str, int]
    duplicate_groups: int
    near_duplicate_groups: int = 0
    largest_duplicate_group: int = 1
    conflicting_groups: int = 0
    test_folder_images: int = 0
    leaks: tuple[Leak, ...] = ()
    dropped: tuple[BadImage, ...] = ()
    strays: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return one flat dict, with the split's options first."""
        values = asdict(self)
        return {**values.pop("split"), **values}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "DataSummary":
        """Read what `to_json` wrote, also in an older version that knew fewer facts.

        Raises:
            KeyError, TypeError: an option of the split or a field without a default is missing.
        """
        values = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        values["split"] = Split(**{each.name: stored[each.name] for each in fields(Split)})
        values["leaks"] = tuple(Leak(**each) for each in stored.get("leaks", ()))
        values["dropped"] = tuple(BadImage(**each) for each in stored.get("dropped", ()))
        values["strays"] = tuple(stored.get("strays", ()))
        return cls(**values)
