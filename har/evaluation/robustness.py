"""How a classifier bears what happens to pictures on their way: shifts, blur, JPEG, mirrors.

A perturbation is a pure function of decoded images at the model's input size, (images, size,
size, 3) uint8 to the same. It is drawn from no random numbers: equal images, equal numbers.
"""

import io
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageFilter

from har.data.images import Pixels, decode_rgb
from har.data.manifest import Manifest
from har.evaluation import metrics
from har.evaluation.evaluate import load_test_rows, read_batches
from har.inference.classifier import Classifier
from har.util.errors import UserError
from har.util.progress import progress

MAX_IMAGES = 1000


def shift(images: Pixels, share: float) -> Pixels:
    """Move the picture right and down by `share` of its side, at least one pixel; the edge
    that is laid bare repeats the outermost pixels.
    """
    by = max(1, round(images.shape[1] * share))
    padded = np.pad(images, ((0, 0), (by, 0), (by, 0), (0, 0)), mode="edge")
    return padded[:, :-by, :-by]


def reencode(image: Pixels, quality: int) -> Pixels:
    """One image, (size, size, 3), through Pillow's JPEG: 1 is the worst quality, 95 the best."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode_rgb(file.getvalue())


def blur(image: Pixels, pixels: float) -> Pixels:
    """One image, (size, size, 3), under a Gaussian of that standard deviation, as Pillow
    approximates it.
    """
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(pixels)))


def apply_to_each(change: Callable[[Pixels], Pixels]) -> Callable[[Pixels], Pixels]:
    """A function of many images from a function of one."""
    return lambda images: np.stack([change(image) for image in images])


PERTURBATIONS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": lambda images: images,
    "flip_left_right": lambda images: images[:, :, ::-1],
    "shift_2.5_percent": partial(shift, share=0.025),
    "shift_5_percent": partial(shift, share=0.05),
    "jpeg_quality_50": apply_to_each(partial(reencode, quality=50)),
    "jpeg_quality_20": apply_to_each(partial(reencode, quality=20)),
    "blur_1px": apply_to_each(partial(blur, pixels=1)),
    "blur_2px": apply_to_each(partial(blur, pixels=2)),
}


def measure_robustness(
    classifier: Classifier, manifest: Manifest, most: int = MAX_IMAGES
) -> pd.DataFrame:
    """`measure` on at most `most` images of the test split, decoded as in training.

    Where the split has more, `none` is the accuracy on those that were picked, not the
    accuracy that `evaluation.evaluate` reports.

    Raises:
        UserError: `most` is below 1, or as `evaluation.load_test_rows`.
    """
    if most < 1:
        raise UserError(f"robustness needs at least 1 image; received {most}")
    rows = load_test_rows(classifier, manifest)
    rows = rows.iloc[pick_evenly(rows["label_id"].to_numpy(), most)].reset_index(drop=True)
    batches = read_batches(classifier, manifest, rows)
    pictures = (images for images, _ in batches)
    return measure_perturbations(classifier, pictures, rows["label_id"].to_numpy())


def pick_evenly(label_ids: metrics.Ints, most: int) -> metrics.Ints:
    """Which at most `most` images to take, in ascending order: the same ones each time.

    One in every so many of the images sorted by class, so that each class keeps its share to
    within one image and each is taken from all over the split.
    """
    images = len(label_ids)
    by_class = np.argsort(label_ids, kind="stable")
    picked = np.arange(min(most, images)) * images // min(most, images)
    return np.sort(by_class[picked])


def measure_perturbations(
    classifier: Classifier, batches: Iterable[Pixels], label_ids: metrics.Ints
) -> pd.DataFrame:
    """Evaluate the same images under every perturbation; one row each, shares from 0 to 1:

    perturbation
    accuracy, accuracy_low, accuracy_high          with a 95 % Wilson interval
    difference, difference_low, difference_high    of the accuracy to that of `none`: below 0
        is a loss; a paired 95 % interval, see `metrics.paired_difference`
    same_label    share of images that are called what they are called without perturbation
    images

    `batches` are (batch, size, size, 3) uint8 in the order of `label_ids`, read once; only
    one of them is held at a time.
    """
    predicted: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in PERTURBATIONS}
    with progress("evaluating perturbed images", len(label_ids) * len(PERTURBATIONS)) as advance:
        for images in batches:
            for name, perturb in PERTURBATIONS.items():
                probabilities = classifier.forward(perturb(images))
                predicted[name].append(metrics.predicted_ids(probabilities))
                advance(len(images))
    ids = {name: np.concatenate(parts) for name, parts in predicted.items()}
    return pd.DataFrame(
        [_describe_perturbation(name, ids[name], ids["none"], label_ids) for name in ids]
    )


def _describe_perturbation(
    name: str, predicted: metrics.Ints, plain: metrics.Ints, label_ids: metrics.Ints
) -> dict[str, str | float | int]:
    """One perturbation's row: `predicted` under it, `plain` without."""
    hits, plain_hits = predicted == label_ids, plain == label_ids
    low, high = metrics.wilson_interval(int(hits.sum()), len(hits))
    # nothing is estimated where the images are the same
    paired = (0.0, 0.0, 0.0) if name == "none" else metrics.paired_difference(plain_hits, hits)
    difference, difference_low, difference_high = paired
    return {
        "perturbation": name,
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "difference": difference,
        "difference_low": difference_low,
        "difference_high": difference_high,
        "same_label": float((predicted == plain).mean()),
        "images": len(hits),
    }


def format_table(table: pd.DataFrame) -> str:
    """The table of `measure` as plain text, in percent and percentage points."""
    shown = pd.DataFrame(
        {
            "perturbation": table["perturbation"],
            "accuracy": _with_interval(table, "accuracy", "{:.1%}"),
            "difference (points)": _with_interval(
                100 * table.filter(like="difference"), "difference", "{:+.1f}"
            ),
            "same label": table["same_label"].map("{:.1%}".format),
        }
    )
    return shown.to_string(index=False)


def _with_interval(table: pd.DataFrame, name: str, form: str) -> list[str]:
    """Such as `71.2% (68.3% to 74.0%)` for each row."""
    columns = (table[name], table[f"{name}_low"], table[f"{name}_high"])
    text = f"{form} ({form} to {form})"
    return [text.format(*numbers) for numbers in zip(*columns, strict=True)]
