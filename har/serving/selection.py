"""Which trained model is served: an experiment's best, if it beats the present champion on the same
test images. Pure functions; `promotion` reads the runs and moves the aliases.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from har.evaluation.metrics import paired_test
from har.util.errors import UserError

MODEL = "har"
CHAMPION, PREVIOUS = "champion", "previous-champion"
SelectedOn = Literal["validation", "test", "request"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """By what a candidate is selected, among runs of which test digest (None: the champion's,
    else the newest run's), and below which p-value it is better than the champion; with
    `ignore_champion` the champion counts for nothing. `run_id` names the only candidate.
    """

    select_by: Literal["auto", "validation", "test"] = "auto"
    test_digest: str | None = None
    alpha: float = 0.05
    ignore_champion: bool = False
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished training with a model and a test accuracy.

    `started` is in milliseconds since the epoch, `split_options` as typed on the command line.
    """

    run_id: str
    name: str
    variant: str
    hardware: str
    started: int
    test_digest: str
    split_options: str
    accuracy: float
    val_accuracy: float | None
    model_uri: str


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The version that the alias names; `uris` are the names of its model that never move."""

    version: str
    run_id: str | None
    test_digest: str | None
    uris: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The candidate, what it was selected on, and lines that say among which."""

    candidate: Candidate
    selection: SelectedOn
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many of `images` each is right on, and on how many only one of them is.

    `p_value`: how likely so unequal a share is if neither is better.
    """

    images: int
    candidate_right: int
    champion_right: int
    only_candidate: int
    only_champion: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and why; `version` is the one that became champion."""

    outcome: Literal["promoted", "would promote", "kept", "refused"]
    why: str
    choice: Selected
    champion: Champion | None
    p_value: float | None = None
    version: str | None = None

    @property
    def text(self) -> str:
        """For the person who asked."""
        lines = [*self.choice.notes, f"{self.outcome}: {self.why}"]
        if self.version:
            lines.append(f"{alias_uri(CHAMPION)} is now version {self.version}")
            if self.champion:
                lines.append(f"{alias_uri(PREVIOUS)} is version {self.champion.version}")
        if self.outcome == "would promote":
            lines.append("dry run: nothing was changed")
        return "\n".join(lines)


def alias_uri(alias: str) -> str:
    """The model URI of an alias."""
    return f"models:/{MODEL}@{alias}"


def select_candidate(
    candidates: Sequence[Candidate], rules: Rules, champions: str | None
) -> Selected:
    """The best candidate within one test digest; ties: the older run.

    `champions` is the test digest of the present champion, if there is one.

    Raises:
        UserError: no candidate is of the digest, or has the accuracy, that the rules ask for.
    """
    if rules.run_id:
        (named,) = candidates
        note = f"candidate: {named.name}, run {named.run_id}, as requested"
        return Selected(candidate=named, selection="request", notes=(note,))
    digest = _select_digest(candidates, rules.test_digest, champions)
    within = [each for each in candidates if each.test_digest == digest]
    validated = [each for each in within if each.val_accuracy is not None]
    if rules.select_by == "validation" and not validated:
        raise UserError(
            f"none of the {len(within)} candidates with test digest {digest} has a validation"
            " accuracy: leave --select-by validation out, or train with a validation split"
        )
    selection: SelectedOn = "test" if rules.select_by == "test" or not validated else "validation"
    if selection == "validation":
        best = min(validated, key=lambda c: (-(c.val_accuracy or 0), c.started, c.run_id))
        score = f"validation accuracy {best.val_accuracy:.1%}"
    else:
        best = min(within, key=lambda c: (-c.accuracy, c.started, c.run_id))
        score = f"accuracy {best.accuracy:.1%}, which flatters it"
    notes = [f"candidates with test digest {digest}: {len(within)}"]
    if others := len(candidates) - len(within):
        notes.append(
            f"left out, with other test digests: {others} (--ignore-champion, --test-digest)"
        )
    if selection == "validation" and (unknown := [c for c in within if c.val_accuracy is None]):
        names = ", ".join(each.run_id for each in unknown)
        notes.append(f"not considered, without validation accuracy: {names}")
    notes.append(f"candidate: {best.name}, run {best.run_id}, selected on {selection} ({score})")
    return Selected(candidate=best, selection=selection, notes=tuple(notes))


def _select_digest(
    candidates: Sequence[Candidate], wanted: str | None, champions: str | None
) -> str:
    """The test digest that was asked for, else the champion's, else the newest candidate's."""
    counts = Counter(each.test_digest for each in candidates)
    if wanted is not None and wanted not in counts:
        there = ", ".join(f"{digest} ({count})" for digest, count in counts.items())
        raise UserError(f"no candidate has the test digest {wanted}; there are: {there}")
    newest = max(candidates, key=lambda each: (each.started, each.run_id))
    return wanted or (champions if champions in counts else None) or newest.test_digest


def compare_predictions(candidate: pd.DataFrame, champion: pd.DataFrame) -> Comparison:
    """Both on the same images: columns path, label, predicted, rows in any order.

    Raises:
        UserError: an image has two labels.
    """
    both = candidate.merge(champion, on="path", validate="one_to_one", suffixes=("", "_before"))
    if differing := both.loc[both["label"] != both["label_before"], "path"].tolist():
        raise UserError(
            f"the predictions of candidate and champion cannot be compared: {differing[0]} and"
            f" {len(differing) - 1} more images have another label in each"
        )
    after = (both["predicted"] == both["label"]).to_numpy()
    before = (both["predicted_before"] == both["label"]).to_numpy()
    gained, lost, p_value = paired_test(before, after)
    return Comparison(
        images=len(both),
        candidate_right=int(after.sum()),
        champion_right=int(before.sum()),
        only_candidate=gained,
        only_champion=lost,
        p_value=p_value,
    )


def decide(
    choice: Selected, champion: Champion | None, comparison: Comparison | None, level: float
) -> Decision:
    """Promote what is the first, or significantly better; `comparison` is with the champion, None
    where they are one or it counts for nothing.
    """
    if champion is None:
        why = "there is no champion yet"
        return Decision(outcome="would promote", why=why, choice=choice, champion=None)
    if comparison is None and champion.run_id == choice.candidate.run_id:
        why = f"the candidate is the present champion, version {champion.version}"
        return Decision(outcome="kept", why=why, choice=choice, champion=champion)
    if comparison is None:
        why = f"not compared with the champion, version {champion.version}: --ignore-champion"
        return Decision(outcome="would promote", why=why, choice=choice, champion=champion)
    found = comparison
    better = found.only_candidate > found.only_champion
    significant = found.p_value < level
    verdict = f"p = {found.p_value:.3g} (McNemar, exact) is {'' if significant else 'not '}below"
    why = (
        f"the candidate is right on {found.candidate_right} of {found.images} test images"
        f" ({found.candidate_right / found.images:.1%}), the champion, version"
        f" {champion.version}, on {found.champion_right}"
        f" ({found.champion_right / found.images:.1%}); only the candidate on"
        f" {found.only_candidate}, only the champion on {found.only_champion}:"
        f" {f'{verdict} {level:g}' if better else 'it is not better'}"
    )
    return Decision(
        outcome="would promote" if better and significant else "kept",
        why=why,
        choice=choice,
        champion=champion,
        p_value=found.p_value,
    )
