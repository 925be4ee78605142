"""Trainings as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from har.util.escaping import for_terminal
from har.util.units import format_seconds

if TYPE_CHECKING:
    from har.jobs.import_runs import Imported
    from har.jobs.sweep import Swept
    from har.tracking.records import Record


# Of a search's trials, these are printed.
BEST_TRIALS = 10


def format_comparison(records: Sequence["Record"]) -> str:
    """Format trainings as one table for each set of test images, the best first."""
    tables = []
    for digest in dict.fromkeys(each.test_digest for each in records):
        group = [each for each in records if each.test_digest == digest]
        group.sort(key=lambda each: -(each.accuracy or 0.0))
        dataset = group[0].dataset or "published runs"
        heading = for_terminal(f"{dataset}, test images {digest or 'unknown'}")
        tables.append(f"{heading}\n{_format_table(group, 8)}")
    return "\n\n".join(tables)


def _format_table(records: Sequence["Record"], id_length: int | None = None) -> str:
    rows = [_format_row(each, id_length) for each in records]
    return _align(rows)


def _align(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), *([for_terminal(text) for text in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _format_row(record: "Record", id_length: int | None) -> Mapping[str, str]:
    accuracy, top_3, time = "no test accuracy", "-", "-"
    scores = {name: f"{value:.1%}" for name, value in record.test_metrics.items()}
    if "accuracy" in scores:
        interval = f"{scores.get('accuracy_low', '?')} to {scores.get('accuracy_high', '?')}"
        accuracy = f"{scores['accuracy']} ({interval})"
        top_3 = scores.get("top_3_accuracy", top_3)
    if record.seconds is not None:
        time = f"{format_seconds(record.seconds)}{' (cache hit)' if record.cache_hit else ''}"
    what = {"variant": record.variant, "hardware": record.hardware}
    if id_length is not None:
        what = {"run": f"{record.name}{' (published)' if record.published else ''}"}
    return {
        **what,
        "accuracy (95 % interval)": accuracy,
        "top-3": top_3,
        "wall time": time,
        "run id": record.run_id[:id_length],
    }


def describe_training(record: "Record") -> str:
    """Describe a training that has just ended, and say how to see more."""
    from har.tracking.ui import describe_run_page

    lines = []
    if record.cache_hit:
        lines.append("cache hit: features were found on disk, so this is not the whole job's time")
    lines.append(f"differs from {record.variant}: {record.differs_from_variant}")
    lines += describe_run_page(record.run_id)
    return "\n".join([_format_table([record]), *map(for_terminal, lines)])


def format_search(found: "Swept", metric: str) -> str:
    """Format the best trials of a search, and the training of the best recipe."""
    from har.tracking.ui import describe_run_page

    progress, rows = found.progress, found.rows
    shown = [
        {
            name: f"{value:.4g}"
            if isinstance(value, float)
            else "-"
            if value is None
            else str(value)
            for name, value in row.items()
            if name not in ("error", "run_id")
        }
        for row in rows[:BEST_TRIALS]
    ]
    more = f"\n... and {len(rows) - len(shown):,} more in trials.csv" if rows[BEST_TRIALS:] else ""
    counts = f"{progress.done:,} trials: {progress.pruned:,} pruned, {progress.failed:,} failed"
    lines = [_align(shown) + more, "", f"{counts}; no trial saw a test image"]
    if found.winner is None:
        lines.append("the process that ends the last trial trains and evaluates the best recipe")
    else:
        lines += [
            f"the best by {metric}, trained and evaluated once:",
            "",
            _format_table([found.winner]),
        ]
    page = map(for_terminal, describe_run_page(found.run_id))
    return "\n".join([*lines, "", for_terminal(found.command), "", *page])


def format_imported(imported: "Imported") -> str:
    """Describe what a source brought: counts, then each new training and the hardware of its
    twins.
    """
    copied = imported.copied
    lines = [
        f"{imported.source}: {len(copied.added):,} runs added, {len(copied.grown):,} updated,"
        f" {len(copied.kept):,} were here already"
    ]
    for record, twins in imported.twins:
        hardware = ", ".join(sorted(each.hardware for each in twins)) or "none"
        lines.append(f"  {record.run_id[:8]}  {record.name}  twins: {hardware}")
    return "\n".join(map(for_terminal, lines))
