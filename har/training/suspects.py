"""Suspects: images whose label the linear probe doubts.

They are found by confident learning (Northcutt, Jiang and Chuang, 2021), as the package cleanlab
computes it from predictions that were made without the image itself.
"""

import importlib.util
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from har.util.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


def check_cleanlab() -> None:
    """Raise a UserError unless cleanlab is installed, before any slow work."""
    if importlib.util.find_spec("cleanlab") is None:
        raise UserError(
            "finding labels in doubt needs the package cleanlab: pip install 'cleanlab>=2.9,<3'"
        )


def find_suspects(probabilities: Floats, labels: Ints) -> npt.NDArray[np.bool_]:
    """Mark suspects: (images, classes) out-of-fold probabilities and (images,) label ids to
    (images,).

    For each two classes cleanlab counts the images of the first that are predicted as the second
    with more confidence than images of the second have on average. So many images of that label are
    suspects, those with the strongest doubt. At least one image of each class stays.
    """
    found = np.zeros(len(labels), bool)
    if len(np.unique(labels)) < 2:
        # nothing that a label could be mistaken for
        return found
    check_cleanlab()
    # loads for a second
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        # a class of one image: it is never a suspect
        warnings.simplefilter("ignore")
        # its processes would cost more than the work
        found[:] = find_label_issues(labels, np.clip(probabilities, 0, 1), n_jobs=1)
    return found


def suggest_labels(probabilities: Floats, labels: Ints) -> tuple[Ints, Floats]:
    """Return each image's most probable label id other than its own, and the margin: the own
    label's probability less that one's. It is -1 where the other is certain, 1 where the own is.
    """
    rows = np.arange(len(labels))
    others = np.array(probabilities, copy=True)
    others[rows, labels] = -1.0
    suggested = others.argmax(axis=1)
    return suggested, probabilities[rows, labels] - probabilities[rows, suggested]
