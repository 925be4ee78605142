"""Trainings as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from har.tracking.records import Record


def format_trainings(records: Sequence["Record"], *, short_ids: bool = False) -> str:
    """Format trainings as a table: what was trained, how good it is, and how long it took."""
    rows = [_format_row(each, 8 if short_ids else None) for each in records]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _format_row(record: "Record", id_length: int | None) -> Mapping[str, str]:
    accuracy, top_3, time = "no test accuracy", "-", "-"
    if scores := record.test_metrics:
        interval = f"{scores['accuracy_low']:.1%} to {scores['accuracy_high']:.1%}"
        accuracy = f"{scores['accuracy']:.1%} ({interval})"
        top_3 = f"{scores['top_3_accuracy']:.1%}"
    if record.seconds is not None:
        minutes, rest = divmod(round(record.seconds), 60)
        time = f"{minutes} min {rest:02} s{' (cache hit)' if record.cache_hit else ''}"
    return {
        "variant": record.variant,
        "hardware": f"{record.hardware}{' (published)' if record.published else ''}",
        "accuracy (95 % interval)": accuracy,
        "top-3": top_3,
        "wall time": time,
        "run id": record.run_id[:id_length],
    }


def describe_training(record: "Record") -> str:
    """Describe a training that has just ended, and say how to see more."""
    from har.tracking.ui import describe_run_page

    lines = [format_trainings([record])]
    if record.cache_hit:
        lines.append("cache hit: features were found on disk, so this is not the whole job's time")
    lines.append(f"differs from {record.variant}: {record.differs_from_variant}")
    lines.append(f"see it: {describe_run_page(record.run_id)}")
    return "\n".join(lines)
