"""Trainings as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_training(
    variant: str,
    hardware: str,
    scores: Mapping[str, float] | None,
    seconds: float | None,
    cache_hit: bool,
    run_id: str,
) -> dict[str, str]:
    """Build one row of the table: what was trained, how good it is, and how long it took.

    `scores` are metrics of the test split, None or empty without one; `cache_hit`: the features
    were found on disk, so that `seconds` is not the whole job's time.
    """
    accuracy, top_3, time = "no test accuracy", "-", "-"
    if scores and "accuracy" in scores:
        interval = f"{scores['accuracy_low']:.1%} to {scores['accuracy_high']:.1%}"
        accuracy = f"{scores['accuracy']:.1%} ({interval})"
        top_3 = f"{scores['top_3_accuracy']:.1%}"
    if seconds is not None:
        minutes, rest = divmod(round(seconds), 60)
        time = f"{minutes} min {rest:02} s{' (cache hit)' if cache_hit else ''}"
    return {
        "variant": variant,
        "hardware": hardware,
        "accuracy (95 % interval)": accuracy,
        "top-3": top_3,
        "wall time": time,
        "run id": run_id,
    }


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Align rows that have the same columns under their names."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def describe_outcome(outcome: Any) -> str:
    """Describe a training that has just ended, and say how to see more."""
    row = format_training(
        outcome.variant,
        outcome.hardware,
        outcome.scores,
        outcome.wall_time_s,
        outcome.cache_hit,
        outcome.run_id,
    )
    lines = [format_table([row])]
    if outcome.cache_hit:
        lines.append("cache hit: features were found on disk, so this is not the whole job's time")
    lines.append(f"differs from {outcome.variant}: {outcome.differs_from_variant}")
    lines.append(f"see it: {outcome.see}")
    return "\n".join(lines)
