"""Selects the best model of an experiment, and decides whether it beats the present champion on
the same test images. Pure functions; `promotion` reads the runs and moves the aliases.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from har.evaluation.metrics import paired_test
from har.tracking.records import Record
from har.util.errors import UserError
from har.util.escaping import for_terminal

MODEL = "har"
CHAMPION, PREVIOUS = "champion", "previous-champion"
# The name of the data set that is drawn to try the program.
SAMPLE = "sample"
# Other sets of test images that are named.
MAX_DIGESTS = 5
SelectedOn = Literal["validation", "test", "request"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for which run is the candidate, and when it replaces the champion.

    Only runs with `test_digest` compete (None: the champion's, else the newest run's); `run_id`
    names the only candidate. The candidate must beat the champion with a p-value below `alpha`,
    unless `ignore_champion`.
    """

    select_by: Literal["auto", "validation", "test"] = "auto"
    test_digest: str | None = None
    alpha: float = 0.05
    ignore_champion: bool = False
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The version that the alias names; `uris` are fixed names of its model, `dataset` the name of
    the data it was trained on.
    """

    version: str
    run_id: str | None
    test_digest: str | None
    uris: tuple[str, ...]
    dataset: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The best record, on which split it is the best, and lines that say among which."""

    record: Record
    selection: SelectedOn
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and why; `version` is the one that became champion."""

    outcome: Literal["promoted", "would promote", "kept", "refused"]
    why: str
    selected: Selected
    champion: Champion | None
    p_value: float | None = None
    version: str | None = None

    @property
    def text(self) -> str:
        """Lines for the person who asked."""
        lines = [*self.selected.notes, f"{self.outcome}: {self.why}"]
        if self.version:
            lines.append(f"{alias_uri(CHAMPION)} is now version {self.version}")
            if self.champion:
                lines.append(f"{alias_uri(PREVIOUS)} is version {self.champion.version}")
        if self.outcome == "would promote":
            lines.append("dry run: nothing was changed")
        return "\n".join(map(for_terminal, lines))


def alias_uri(alias: str) -> str:
    """Return the model URI of an alias."""
    return f"models:/{MODEL}@{alias}"


def select_candidate(records: Sequence[Record], rules: Rules, champions: str | None) -> Selected:
    """Select the best record within one test digest; of equals, the older one.

    Every record has a test accuracy. `champions` is the test digest of the present champion, if
    there is one.
    """
    if rules.run_id:
        (named,) = records
        note = f"candidate: {named.name}, run {named.run_id}, as requested"
        return Selected(record=named, selection="request", notes=(note,))
    digest = _select_digest(records, rules.test_digest, champions)
    within = [each for each in records if each.test_digest == digest]
    validated = [each for each in within if each.val_accuracy is not None]
    if rules.select_by == "validation" and not validated:
        raise UserError(
            f"none of the {len(within)} candidates with test digest {digest} has a validation"
            " accuracy: leave --select-by validation out, or train with a validation split"
        )
    if rules.select_by == "test" or not validated:
        selection: SelectedOn = "test"
        best = min(within, key=lambda r: (-(r.accuracy or 0), r.started, r.run_id))
        score = f"accuracy {best.accuracy:.1%}, too high since selected by it"
    else:
        selection = "validation"
        best = min(validated, key=lambda r: (-(r.val_accuracy or 0), r.started, r.run_id))
        score = f"validation accuracy {best.val_accuracy:.1%}"
    notes = [f"candidates with test digest {digest}: {len(within)}"]
    notes += _describe_left_out(records, digest)
    if selection == "validation" and (unknown := [r for r in within if r.val_accuracy is None]):
        names = ", ".join(each.run_id for each in unknown)
        notes.append(f"not considered, without validation accuracy: {names}")
    notes.append(f"candidate: {best.name}, run {best.run_id}, selected on {selection} ({score})")
    return Selected(record=best, selection=selection, notes=tuple(notes))


def _describe_left_out(records: Sequence[Record], digest: str) -> list[str]:
    """Say which records have other test images, and how to choose among those."""
    others = Counter(
        (each.test_digest, each.dataset) for each in records if each.test_digest != digest
    )
    return [
        f"left out, on other test images ({dataset}): {count} trainings; to choose among them: har"
        f" promote --test-digest {other} --ignore-champion"
        for (other, dataset), count in others.most_common(MAX_DIGESTS)
    ]


def _select_digest(records: Sequence[Record], wanted: str | None, champions: str | None) -> str:
    counts = Counter(each.test_digest for each in records)
    if wanted is not None and wanted not in counts:
        there = ", ".join(f"{digest} ({count})" for digest, count in counts.items())
        raise UserError(f"no candidate has the test digest {wanted}; there are: {there}")
    newest = max(records, key=lambda each: (each.started, each.run_id))
    return wanted or (champions if champions in counts else None) or newest.test_digest


def check_chance(selected: Selected, classes: int) -> Selected:
    """Return `selected`, with a note if the candidate may be no better than guessing.

    Raises:
        UserError: its validation or test accuracy is below that of guessing.
    """
    record, chance = selected.record, 1 / classes
    accuracies = {"validation accuracy": record.val_accuracy, "test accuracy": record.accuracy}
    for name, accuracy in accuracies.items():
        if accuracy is not None and accuracy < chance:
            raise UserError(
                f"run {record.run_id} is not promoted: its {name} is {accuracy:.1%}, below the"
                f" {chance:.1%} of guessing among {classes} classes; train longer, or with a lower"
                " --learning-rate"
            )
    low = record.test_metrics.get("accuracy_low", 1.0)
    if low > chance:
        return selected
    note = (
        f"warning: this run may be no better than guessing: the interval of its accuracy begins at"
        f" {low:.1%}, guessing among {classes} classes has {chance:.1%}"
    )
    return replace(selected, notes=(*selected.notes, note))


def decide_without_test(selected: Selected, champion: Champion | None) -> Decision:
    """Decide where there is no champion to compare with, or it is the candidate or ignored."""
    same = champion is not None and champion.run_id == selected.record.run_id
    if champion is None:
        why = "it is the first champion"
    elif same:
        why = f"the candidate is the present champion, version {champion.version}"
    elif is_of_drawings(champion, selected.record):
        why = f"the champion, version {champion.version}, was trained on the drawn sample only"
    else:
        why = f"not compared with the champion, version {champion.version}: --ignore-champion"
    return Decision(
        outcome="kept" if same else "would promote", why=why, selected=selected, champion=champion
    )


def is_of_drawings(champion: Champion, record: Record) -> bool:
    """Return True if the champion was trained on the drawn sample, and the record's model on other
    images: then they are not compared.
    """
    return champion.dataset == SAMPLE and record.dataset != SAMPLE


def decide(
    selected: Selected,
    champion: Champion,
    predictions: pd.DataFrame,
    champions: pd.DataFrame,
    alpha: float,
) -> Decision:
    """Promote a candidate that is significantly better than the champion on the same images.

    Both tables have the columns path, label and predicted; their rows may be in any order.
    """
    both = predictions.merge(champions, on="path", validate="one_to_one", suffixes=("", "_before"))
    if differing := both.loc[both["label"] != both["label_before"], "path"].tolist():
        raise UserError(
            f"the predictions of candidate and champion cannot be compared: {differing[0]} and"
            f" {len(differing) - 1} more images have another label in each"
        )
    after = (both["predicted"] == both["label"]).to_numpy()
    before = (both["predicted_before"] == both["label"]).to_numpy()
    gained, lost, p_value = paired_test(before, after)
    better, significant = gained > lost, p_value < alpha
    verdict = "it is not better"
    if better:
        below = "below" if significant else "not below"
        verdict = f"p = {p_value:.3g} (McNemar, exact) is {below} {alpha:g}"
    why = (
        f"the candidate is right on {after.sum()} of {len(both)} test images ({after.mean():.1%}),"
        f" the champion, version {champion.version}, on {before.sum()} ({before.mean():.1%});"
        f" only the candidate on {gained}, only the champion on {lost}: {verdict}"
    )
    return Decision(
        outcome="would promote" if better and significant else "kept",
        why=why,
        selected=selected,
        champion=champion,
        p_value=p_value,
    )
