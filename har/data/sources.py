"""Sources of images: a folder, Kaggle, or the sample that this project draws."""

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
# Part of the cached folder's name: increase it when the sample is drawn in another way.
SAMPLE_VERSION = 1
SAMPLE_PER_CLASS = 24
SAMPLE_TEST_IMAGES = 30


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of images and the way its labels are stored.

    `layout` is kaggle (Training_set.csv with the columns filename,label beside a folder train/
    and perhaps test/), class_folders (one folder of images for each label), or prepared (a
    manifest, with the images elsewhere). `why` says how the folder was chosen.
    """

    name: str
    root: Path
    why: str
    layout: Literal["kaggle", "class_folders", "prepared"] = "kaggle"

    @property
    def image_folders(self) -> list[Path]:
        """Folders that hold its images, in alphabetical order."""
        if self.layout == "class_folders":
            return _list_class_folders(self.root)
        both = (self.root / TRAIN_FOLDER, self.root / TEST_FOLDER)
        return [folder for folder in both if folder.is_dir()]


def _list_class_folders(root: Path) -> list[Path]:
    return [
        folder
        for folder in sorted(root.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and any(is_image_name(path) for path in folder.iterdir())
    ]


def is_image_name(path: Path) -> bool:
    """Return True for a file that has an image's suffix and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_source(data: str) -> Source:
    """Find the images that `--data` names: auto, sample, kaggle, or a folder."""
    if data == "auto":
        return _find_automatically()
    if data == "sample":
        return _sample_source("the built-in sample")
    if data == "kaggle":
        return replace(_download_from_kaggle(), name="kaggle")
    return folder_source(Path(data), why=f"--data {data}")


def _find_automatically() -> Source:
    if named := os.environ.get("HAR_DATA"):
        return folder_source(Path(named), why=f"HAR_DATA={named}")
    if KAGGLE_INPUT.is_dir():
        return replace(folder_source(KAGGLE_INPUT, why="Kaggle's input folder"), name="kaggle")
    # ./data may also be a folder of something else
    with suppress(UserError):
        return folder_source(Path("data"), why="the folder ./data")
    return _sample_source(
        "the built-in sample: no HAR_DATA, no Kaggle input folder, no images in ./data"
    )


def folder_source(folder: Path, why: str) -> Source:
    """Recognise a folder: prepared, Kaggle's layout (also one level down), or class folders."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} ({why})")
    name = folder.resolve().name
    if is_prepared(folder):
        return Source(name=name, root=folder.resolve(), why=why, layout="prepared")
    for root in (folder, folder / KAGGLE_FOLDER):
        if (root / LABELS_FILE).is_file():
            return Source(name=name, root=root.resolve(), why=why)
    labels = {each.name for each in _list_class_folders(folder)}
    # train/ and test/ are Kaggle's folders without the CSV, not class folders
    if len(labels) >= 2 and not labels & {TRAIN_FOLDER, TEST_FOLDER}:
        return Source(name=name, root=folder.resolve(), why=why, layout="class_folders")
    raise UserError(
        f"{folder} ({why}) holds no {LABELS_FILE}: expected Kaggle's layout, which is"
        f" {LABELS_FILE} with the columns filename,label beside a folder {TRAIN_FOLDER}/; or one"
        " folder of images for each label, and at least 2 labels"
    )


def _sample_source(why: str) -> Source:
    """The built-in sample; it is drawn once, into the cache."""
    folder = cache_folder() / f"sample-{SAMPLE_VERSION}-{SAMPLE_PER_CLASS}"
    if not (folder / LABELS_FILE).is_file():
        draw_sample(folder, SAMPLE_PER_CLASS, SAMPLE_TEST_IMAGES, seed=0)
    return Source(name="sample", root=folder, why=why)


def draw_sample(out: Path, per_class: int, test_images: int, seed: int) -> Path:
    """Draw the 15-action sample into `out`; if interrupted, leave nothing behind."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder: give another --out")
    total = per_class * len(sample.ACTIONS) + test_images
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            with progress("drawing the sample", total) as advance:
                drawn = sample.write_sample(
                    Path(scratch) / "drawn", per_class, test_images, seed, advance
                )
            if out.exists():  # an empty folder, perhaps the working folder: keep it
                for each in drawn.iterdir():
                    os.replace(each, out / each.name)
            else:
                os.replace(drawn, out)
    except OSError as error:
        # another process may have drawn the same sample meanwhile
        if (out / LABELS_FILE).is_file():
            return out
        raise UserError(f"cannot write the sample to {out}: {error}") from error
    return out


def _download_from_kaggle() -> Source:
    """The public Kaggle data set, downloaded without an account into kagglehub's own cache."""
    import kagglehub

    try:
        folder = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    # kagglehub raises errors of its own, of requests and of the operating system
    except Exception as error:
        raise UserError(
            f"cannot download {KAGGLE_DATASET} from Kaggle ({type(error).__name__}): check the"
            " network, or download it in a browser, unpack it and give --data FOLDER"
        ) from error
    return folder_source(folder, why="downloaded from Kaggle")
