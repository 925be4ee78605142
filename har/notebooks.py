"""The five published notebook runs, as data.

Source: the outputs saved in the Kaggle notebooks named here. None of them measured
accuracy on held-out images; `train_accuracy` is the last epoch's TRAINING accuracy.
"""

import textwrap
from dataclasses import dataclass, fields

from har.recipe import VARIANTS, describe_changes, parent_of


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """One published run: `minutes` of wall time on `hardware` (count x GPU type)."""

    variant: str
    file: str
    minutes: int
    hardware: str
    train_accuracy: float | None = None


NOTEBOOKS: dict[str, Notebook] = {
    each.variant: each
    for each in (
        Notebook(
            variant="original",
            file="original-har-2024-36min-GPU-P100.ipynb",
            minutes=36,
            hardware="1xP100",
            train_accuracy=0.9858,
        ),
        Notebook(
            variant="v1",
            file="version1-har-20260117-36min-GPU-P100.ipynb",
            minutes=36,
            hardware="1xP100",
            train_accuracy=0.9869,
        ),
        Notebook(
            variant="v2",
            file="version2-har-enhancement-20260111-28min-GPU-2T4s.ipynb",
            minutes=28,
            hardware="2xT4",
        ),
        Notebook(
            variant="v3",
            file="verion3-har-enhancement-20260111-22min-GPU-P100.ipynb",
            minutes=22,
            hardware="1xP100",
        ),
        Notebook(
            variant="v4",
            file="version4-har-enhancement-20260111-21min-GPU-2T4s.ipynb",
            minutes=21,
            hardware="2xT4",
        ),
    )
}


def describe_variants() -> str:
    """The chain of variants as text: each one's notebook and what it changes."""
    lines = []
    for name, recipe in VARIANTS.items():
        notebook, parent = NOTEBOOKS.get(name), parent_of(name)
        if notebook is None:
            lines.append(f"{name:<8} ours, no notebook's")
        else:
            where = f"{notebook.minutes} min on {notebook.hardware}"
            lines.append(f"{name:<8} {where}, {notebook.file}")
        if parent is None:
            resolved = ", ".join(f"{f.name}={getattr(recipe, f.name)}" for f in fields(recipe))
            lines += _wrap(resolved)
        elif difference := describe_changes(VARIANTS[parent], recipe):
            lines += _wrap(f"{parent} with {difference}")
        else:
            lines += _wrap(f"the same recipe as {parent}, on other hardware")
    lines.append("\nOur choices, where the notebooks leave a value open:")
    for each in fields(next(iter(VARIANTS.values()))):
        if choice := each.metadata["our_choice"]:
            lines.append(f"  {each.name}: {choice}")
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    """`text` as lines of at most 88 characters, indented under a variant's name."""
    indent = " " * 9
    return textwrap.wrap(
        text,
        88,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
