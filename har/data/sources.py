"""Where images come from: a folder, Kaggle, or the sample drawn by this project."""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from har.data import sample
from har.data.manifest import is_prepared
from har.util.errors import UserError
from har.util.files import cache_folder
from har.util.progress import progress

KAGGLE_DATASET = "meetnagadia/human-action-recognition-har-dataset"
KAGGLE_FOLDER = "Human Action Recognition"
KAGGLE_INPUT = Path("/kaggle/input/human-action-recognition-har-dataset") / KAGGLE_FOLDER
LABELS_FILE = "Training_set.csv"
TRAIN_FOLDER = "train"
TEST_FOLDER = "test"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# Part of the folder's name, so that a change in how the sample is drawn draws it anew.
SAMPLE_VERSION = 1
SAMPLE_PER_CLASS = 24
SAMPLE_TEST_IMAGES = 30


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of images and what says their labels.

    kaggle: Training_set.csv (filename,label) beside train/ and, if there is one, test/;
    class_folders: a folder of images for each label; prepared: a manifest, images elsewhere.
    """

    name: str
    root: Path
    why: str
    layout: Literal["kaggle", "class_folders", "prepared"] = "kaggle"

    @property
    def image_folders(self) -> list[Path]:
        """Those that hold its images, in order of their names."""
        if self.layout == "class_folders":
            return _list_class_folders(self.root)
        named = (self.root / TRAIN_FOLDER, self.root / TEST_FOLDER)
        return [folder for folder in named if folder.is_dir()]


def _list_class_folders(root: Path) -> list[Path]:
    """Subfolders with an image directly in them; a hidden one is none."""
    return [
        folder
        for folder in sorted(root.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and any(is_image_name(path) for path in folder.iterdir())
    ]


def is_image_name(path: Path) -> bool:
    """Whether a file is called like an image and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_source(data: str) -> Source:
    """What `--data` means: auto, sample, kaggle, or a folder.

    Raises:
        UserError: the folder is not there or not in Kaggle's layout; Kaggle not reached.
    """
    if data == "auto":
        return _find_automatically()
    if data == "sample":
        return Source(name="sample", root=_draw_sample_once(), why="the built-in sample")
    if data == "kaggle":
        return Source(name="kaggle", root=_download_from_kaggle(), why="downloaded from Kaggle")
    return folder_source(Path(data), why=f"--data {data}")


def _find_automatically() -> Source:
    """$HAR_DATA, else Kaggle's own input folder, else ./data, else the built-in sample."""
    if named := os.environ.get("HAR_DATA"):
        return folder_source(Path(named), why=f"HAR_DATA={named}")
    if KAGGLE_INPUT.is_dir():
        found = folder_source(KAGGLE_INPUT, why="Kaggle's input folder")
        return replace(found, name="kaggle")
    # a folder of that name may hold anything
    with suppress(UserError):
        return folder_source(Path("data"), why="the folder ./data")
    why = "the built-in sample: no HAR_DATA, no Kaggle input folder, no images in ./data"
    return Source(name="sample", root=_draw_sample_once(), why=why)


def folder_source(folder: Path, why: str) -> Source:
    """A prepared folder, one in Kaggle's layout or that holds Kaggle's unpacked archive, or
    one of class folders.

    Raises:
        UserError: it is none of these, or not there.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} ({why})")
    name = folder.resolve().name
    if is_prepared(folder):
        return Source(name=name, root=folder.resolve(), why=why, layout="prepared")
    for root in (folder, folder / KAGGLE_FOLDER):
        if (root / LABELS_FILE).is_file():
            return Source(name=name, root=root.resolve(), why=why)
    found = [each.name for each in _list_class_folders(folder)]
    # Kaggle's own folders without their CSV say nothing of labels
    if len(found) >= 2 and not {TRAIN_FOLDER, TEST_FOLDER} & set(found):
        return Source(name=name, root=folder.resolve(), why=why, layout="class_folders")
    raise UserError(
        f"{folder} ({why}) holds no {LABELS_FILE}: expected Kaggle's layout, that is"
        f" {LABELS_FILE} with the columns filename,label beside a folder {TRAIN_FOLDER}/; or a"
        " folder of images for each of 2 or more labels"
    )


def _draw_sample_once() -> Path:
    """The folder of the built-in sample, drawn now if it has not been."""
    folder = cache_folder() / f"sample-{SAMPLE_VERSION}-{SAMPLE_PER_CLASS}"
    if (folder / LABELS_FILE).is_file():
        return folder
    return draw_sample(folder, SAMPLE_PER_CLASS, SAMPLE_TEST_IMAGES, seed=0)


def draw_sample(out: Path, per_class: int, test_images: int, seed: int) -> Path:
    """Draw the 15-action sample into `out` with a progress bar, whole or not at all.

    Raises:
        UserError: `out` exists and is not empty, or cannot be written.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder")
    total = per_class * len(sample.ACTIONS) + test_images
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            with progress("drawing the sample", total) as advance:
                drawn = sample.write_sample(
                    Path(scratch) / "drawn", per_class, test_images, seed, advance
                )
            if out.exists():  # and empty; it may be the working folder, so it must stay
                for each in drawn.iterdir():
                    os.replace(each, out / each.name)
            else:
                os.replace(drawn, out)
    except OSError as error:
        # another process may have put the same sample there meanwhile
        if (out / LABELS_FILE).is_file():
            return out
        raise UserError(f"cannot write the sample to {out}: {error}") from error
    return out


def _download_from_kaggle() -> Path:
    """The Kaggle data set, by kagglehub into its own cache; public, so without an account.

    Raises:
        UserError: Kaggle cannot be reached, or the download is not in the known layout.
    """
    import kagglehub

    try:
        folder = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    # kagglehub raises its own, requests' and OSError kinds, all meaning this one thing
    except Exception as error:
        raise UserError(
            f"cannot download {KAGGLE_DATASET} from Kaggle ({type(error).__name__}): check the"
            " network, or download it in a browser, unpack it and give --data FOLDER"
        ) from error
    return folder_source(folder, why="downloaded from Kaggle").root
