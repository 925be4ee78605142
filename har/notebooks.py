"""The five published notebook runs, as data.

Source: the outputs saved in the Kaggle notebooks named here. No notebook measured accuracy on
held-out images: `train_accuracy` is the TRAINING accuracy of the last epoch.
"""

import textwrap
from dataclasses import dataclass

from har.recipe import VARIANTS, describe_changes, field_values, parent_of


@dataclass(frozen=True)
class Notebook:
    """One published run: `minutes` of wall time on `hardware` (number x type of GPUs)."""

    variant: str
    file: str
    minutes: int
    hardware: str
    train_accuracy: float | None = None


_PUBLISHED = (
    Notebook("original", "original-har-2024-36min-GPU-P100.ipynb", 36, "1xP100", 0.9858),
    Notebook("v1", "version1-har-20260117-36min-GPU-P100.ipynb", 36, "1xP100", 0.9869),
    Notebook("v2", "version2-har-enhancement-20260111-28min-GPU-2T4s.ipynb", 28, "2xT4"),
    Notebook("v3", "verion3-har-enhancement-20260111-22min-GPU-P100.ipynb", 22, "1xP100"),
    Notebook("v4", "version4-har-enhancement-20260111-21min-GPU-2T4s.ipynb", 21, "2xT4"),
)
# The variants that are not notebooks.
OURS = {
    "v5": "not a notebook; the fastest",
    "v6": "not a notebook; more accurate, in minutes without a GPU",
    "v7": "not a notebook; the most accurate",
}
NOTEBOOKS: dict[str, Notebook] = {each.variant: each for each in _PUBLISHED}


def describe_variants() -> str:
    """Describe each variant by its notebook and by what it changes from its parent."""
    lines = []
    for name, recipe in VARIANTS.items():
        notebook, parent = NOTEBOOKS.get(name), parent_of(name)
        if notebook is None:
            lines.append(f"{name:<8} {OURS[name]}, see below")
        else:
            where = f"{notebook.minutes} min on {notebook.hardware}"
            lines.append(f"{name:<8} {where}, {notebook.file}")
        if parent is None:
            content = ", ".join(f"{each.name}={value}" for each, value in field_values(recipe))
        elif difference := describe_changes(VARIANTS[parent], recipe):
            content = f"{parent} with {difference}"
        else:
            content = f"the same recipe as {parent}, on other hardware"
        indent = " " * 9
        lines += textwrap.wrap(
            content, 88, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    lines.append(
        "\nWithout a GPU use v7, or v6 where a quarter of an hour is too long. v5 takes a 25th\n"
        "of v3's time and is at least as accurate."
    )
    lines.append("\nOur choices where the notebooks do not state a value:")
    for each, _ in field_values(VARIANTS["original"]):
        if choice := each.metadata["our_choice"]:
            lines.append(f"  {each.name}: {choice}")
    return "\n".join(lines)
