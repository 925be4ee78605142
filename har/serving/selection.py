"""Selects the best model of an experiment, and decides whether it beats the present champion on
the same test images. Pure functions; `promotion` reads the runs and moves the aliases.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from har.evaluation.metrics import paired_test
from har.tracking.records import Record
from har.util.errors import UserError
from har.util.escaping import for_terminal

MODEL = "har"
CHAMPION, PREVIOUS = "champion", "previous-champion"
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
    """The version that the alias names; `uris` are fixed names of its model."""

    version: str
    run_id: str | None
    test_digest: str | None
    uris: tuple[str, ...]


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
    if others := len(records) - len(within):
        notes.append(
            f"left out, with other test digests: {others} (--ignore-champion, --test-digest)"
        )
    if selection == "validation" and (unknown := [r for r in within if r.val_accuracy is None]):
        names = ", ".join(each.run_id for each in unknown)
        notes.append(f"not considered, without validation accuracy: {names}")
    notes.append(f"candidate: {best.name}, run {best.run_id}, selected on {selection} ({score})")
    return Selected(record=best, selection=selection, notes=tuple(notes))


def _select_digest(records: Sequence[Record], wanted: str | None, champions: str | None) -> str:
    counts = Counter(each.test_digest for each in records)
    if wanted is not None and wanted not in counts:
        there = ", ".join(f"{digest} ({count})" for digest, count in counts.items())
        raise UserError(f"no candidate has the test digest {wanted}; there are: {there}")
    newest = max(records, key=lambda each: (each.started, each.run_id))
    return wanted or (champions if champions in counts else None) or newest.test_digest


def decide_without_test(selected: Selected, champion: Champion | None) -> Decision:
    """Decide where there is no champion to compare with, or it is the candidate or ignored."""
    same = champion is not None and champion.run_id == selected.record.run_id
    if champion is None:
        why = "it is the first champion"
    elif same:
        why = f"the candidate is the present champion, version {champion.version}"
    else:
        why = f"not compared with the champion, version {champion.version}: --ignore-champion"
    return Decision(
        outcome="kept" if same else "would promote", why=why, selected=selected, champion=champion
    )


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
