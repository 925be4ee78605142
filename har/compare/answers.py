"""What a comparison says first: which run is the most accurate, which is the fastest, and which
runs no other beats in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from har.compare.tables import Group
from har.tracking.records import Record
from har.util.units import format_seconds


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question and its answer, one sentence for each run; `note` says what to make of it."""

    question: str
    sentences: tuple[str, ...]
    note: str = ""


def find_answers(group: Group, front: Sequence[Record], looks: int) -> list[Answer]:
    """Answer what a reader asks first of runs that were evaluated on the same images.

    `front` is the group's Pareto front. `looks` counts the evaluations on these images in the whole
    experiment.
    """
    found = [_find_best(group)]
    timed = [each for each in group.ranked if each.seconds and not each.cache_hit]
    if timed:
        fastest = min(timed, key=lambda each: (each.seconds or 0, each.run_id))
        found.append(Answer(question="Fastest", sentences=(_describe(fastest),)))
    if looks:
        found.append(
            Answer(
                question="How often these test images were used",
                sentences=(f"{looks:,} evaluations in this experiment.",),
                note="With each, the highest test accuracy owes more to luck.",
            )
        )
    if len(front) > 1:
        found.append(
            Answer(
                question="Beaten by none in both accuracy and time",
                sentences=tuple(_describe(each) for each in front),
            )
        )
    return found


def _find_best(group: Group) -> Answer:
    validated = [each for each in group.ranked if each.val_accuracy is not None]
    if not validated:
        return Answer(
            question="Most accurate on test images",
            sentences=(_describe(group.ranked[0]),),
            note="No run has a validation accuracy. The best of several by its test accuracy looks"
            " better than it is.",
        )
    best = max(validated, key=lambda each: (each.val_accuracy or 0, -each.started, each.run_id))
    return Answer(
        question="Most accurate on validation images",
        sentences=(f"{_describe(best)} On validation images it has {best.val_accuracy:.1%}.",),
        note="Choose by validation: a run that is chosen by its test accuracy looks better than it"
        " is.",
    )


def _describe(record: Record) -> str:
    low, high = (record.test_metrics.get(f"accuracy_{end}") for end in ("low", "high"))
    interval = f" ({low:.1%} to {high:.1%})" if low is not None and high is not None else ""
    time = f", after {format_seconds(record.seconds)}" if record.seconds else ""
    cached = ", with features from the cache" if record.cache_hit else ""
    return (
        f"{record.name} ({record.run_id[:8]}): {record.accuracy or 0:.1%}{interval} of test images"
        f" right{time}{cached}."
    )
