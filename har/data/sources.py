"""Sources of images: a folder, Kaggle, or the sample that this project draws."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from har.data import sample
from har.data.download import download_folder
from har.data.folders import visible_folders
from har.data.layouts import LABELS_FILE, Source, folder_source
from har.util.errors import UserError
from har.util.files import cache_folder
from har.util.places import Url, parse_place
from har.util.progress import progress, warn

KAGGLE_DATASET = "meetnagadia/human-action-recognition-har-dataset"
KAGGLE_INPUT = Path("/kaggle/input")
# What Kaggle mounts there beside data sets.
NOT_DATA = {"datasets", "models", "notebooks"}
DATA_FOLDER = Path("data")
# Part of the cached folder's name: increase it when the sample is drawn in another way.
SAMPLE_VERSION = 1
SAMPLE_PER_CLASS = 24
SAMPLE_TEST_IMAGES = 30
NO_DATA = "no data found, so the built-in sample is used"
WHERE_DATA_IS_SOUGHT = "no HAR_DATA, no data set in Kaggle's input folder, no images in ./data"


def find_source(data: str | Source) -> Source:
    """Find the images that `--data` names: auto, sample, kaggle, or a folder, here or at a URL; a
    source that was found before stays.
    """
    if isinstance(data, Source):
        return data
    if data == "auto":
        return _find_automatically()
    if data == "sample":
        return _sample_source("the built-in sample")
    if data == "kaggle":
        return replace(_download_from_kaggle(), name="kaggle")
    return find_folder(data, why=f"--data {data}")


def find_folder(data: str, why: str) -> Source:
    """Find the images in a folder, here or at a URL."""
    place = parse_place(data)
    folder = download_folder(place) if isinstance(place, Url) else place.expanduser()
    return folder_source(folder, why)


def _find_automatically() -> Source:
    if named := os.environ.get("HAR_DATA"):
        return find_folder(named, why=f"HAR_DATA={named}")
    if found := _find_kaggle_inputs():
        return found
    if DATA_FOLDER.is_dir():
        try:
            return folder_source(DATA_FOLDER, why="the folder ./data")
        # ./data may also be a folder of something else
        except UserError as error:
            warn(f"./data is not used: {error}")
    source = _sample_source(f"{NO_DATA}: {WHERE_DATA_IS_SOUGHT}")
    warn(f"{NO_DATA}; these are drawings for trying the program. For photographs give --data DIR")
    return source


def _find_kaggle_inputs() -> Source | None:
    """Find the one data set among the inputs of a Kaggle notebook, whatever its name."""
    # /kaggle/input/SLUG, and since 2026 /kaggle/input/datasets/OWNER/SLUG
    owners = visible_folders(KAGGLE_INPUT / "datasets")
    folders = [folder for owner in owners for folder in visible_folders(owner)]
    folders += [each for each in visible_folders(KAGGLE_INPUT) if each.name not in NOT_DATA]
    found: dict[Path, Source] = {}
    refused: list[str] = []
    for folder in folders:
        try:
            source = folder_source(folder, why=f"Kaggle's input folder {folder}")
            name = "kaggle" if source.table and source.table.name == LABELS_FILE else source.name
            found[source.root] = replace(source, name=name)
        except UserError as error:
            refused.append(str(error))
    if len(found) > 1:
        raise UserError(
            f"{KAGGLE_INPUT} holds {len(found)} data sets: {', '.join(map(str, found))}; name one:"
            " --data DIR"
        )
    for reason in refused if not found else []:
        warn(f"not used: {reason}")
    return next(iter(found.values()), None)


def _sample_source(why: str) -> Source:
    """The built-in sample; it is drawn once, into the cache."""
    folder = cache_folder() / f"sample-{SAMPLE_VERSION}-{SAMPLE_PER_CLASS}"
    if not (folder / LABELS_FILE).is_file():
        draw_sample(folder, SAMPLE_PER_CLASS, SAMPLE_TEST_IMAGES, seed=0)
    return replace(folder_source(folder, why), name="sample")


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
    try:
        import kagglehub

        folder = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    # kagglehub raises errors of its own, of requests and of the operating system
    except Exception as error:
        raise UserError(
            f"cannot download {KAGGLE_DATASET} from Kaggle ({type(error).__name__}): check the"
            " network, or download it in a browser, unpack it and give --data FOLDER"
        ) from error
    return folder_source(folder, why="downloaded from Kaggle")
