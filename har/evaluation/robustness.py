"""Accuracy under image corruptions: shifts, blur, JPEG compression, mirror images.

A perturbation is a function of decoded images at the model's input size: (images, size, size, 3)
uint8 to the same shape and type. It is not random, so equal images give equal numbers.
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
    """Move images right and down by `share` of their side, at least a pixel; repeat the edge."""
    by = max(1, round(images.shape[1] * share))
    padded = np.pad(images, ((0, 0), (by, 0), (by, 0), (0, 0)), mode="edge")
    return padded[:, :-by, :-by]


def _reencode(images: Pixels, quality: int) -> Pixels:
    """Write and read as JPEG; `quality` is Pillow's, from 1 to 95."""

    def reencode_one(image: Pixels) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return decode_rgb(file.getvalue())

    return np.stack([reencode_one(image) for image in images])


def _blur(images: Pixels, pixels: float) -> Pixels:
    """Blur with Pillow's approximation of a Gaussian of this standard deviation."""
    blurred = ImageFilter.GaussianBlur(pixels)
    return np.stack([np.asarray(Image.fromarray(image).filter(blurred)) for image in images])


PERTURBATIONS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": lambda images: images,
    "flip_left_right": lambda images: images[:, :, ::-1],
    "shift_2.5_percent": partial(shift, share=0.025),
    "shift_5_percent": partial(shift, share=0.05),
    "jpeg_quality_50": partial(_reencode, quality=50),
    "jpeg_quality_20": partial(_reencode, quality=20),
    "blur_1px": partial(_blur, pixels=1),
    "blur_2px": partial(_blur, pixels=2),
}


def measure_robustness(
    classifier: Classifier, manifest: Manifest, most: int = MAX_IMAGES
) -> pd.DataFrame:
    """Measure perturbations on at most `most` images of the test split, decoded as in training.

    If the split has more images, the row `none` has the accuracy on the chosen images, which
    differs from the accuracy of `evaluate`.
    """
    if most < 1:
        raise UserError(f"robustness needs at least 1 image; received {most}")
    rows = load_test_rows(classifier, manifest)
    rows = rows.iloc[pick_evenly(rows["label_id"].to_numpy(), most)].reset_index(drop=True)
    batches = (images for images, _ in read_batches(classifier, manifest, rows))
    return measure_perturbations(classifier, batches, rows["label_id"].to_numpy())


def pick_evenly(label_ids: metrics.Ints, most: int) -> metrics.Ints:
    """Return the positions of at most `most` images, ascending, the same in every call.

    Images at equal steps are taken from the images sorted by class, so that every class keeps its
    share, within one image.
    """
    images = len(label_ids)
    by_class = np.argsort(label_ids, kind="stable")
    picked = np.arange(min(most, images)) * images // min(most, images)
    return np.sort(by_class[picked])


def measure_perturbations(
    classifier: Classifier, batches: Iterable[Pixels], label_ids: metrics.Ints
) -> pd.DataFrame:
    """Evaluate the same images under every perturbation; return one row for each:

    perturbation
    accuracy, accuracy_low, accuracy_high: with 95 % Wilson interval
    difference, difference_low, difference_high: accuracy minus that of `none`, with the interval
        of `metrics.paired_difference`; a loss is negative
    same_label: share of images whose predicted class is the same as for `none`
    images: number of images

    `batches` are (batch, size, size, 3) uint8 in the order of `label_ids`. They are read once,
    and one of them is in memory at a time.
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
    """A row of the table; `plain` are the predicted ids for `none`."""
    hits, plain_hits = predicted == label_ids, plain == label_ids
    low, high = metrics.wilson_interval(int(hits.sum()), len(hits))
    # `none` compared with itself has no uncertainty
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
    """Format the table of `measure_robustness` in percent and percentage points."""
    interval = "{accuracy:.1%} ({accuracy_low:.1%} to {accuracy_high:.1%})"
    shown = [
        {
            "perturbation": row["perturbation"],
            "accuracy": interval.format_map(row),
            "difference (points)": metrics.in_points(
                (row["difference"], row["difference_low"], row["difference_high"])
            ),
            "same label": f"{row['same_label']:.1%}",
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(shown).to_string(index=False)
