"""Which change between two recipes buys what: the trainings to run, and what they say.

Pure functions. Each change is tried alone on the base (add), taken alone out of the end (leave),
and added to those before it (chain). Every number is of trainings that ran.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.evaluation.metrics import in_points, mean_paired_difference
from har.recipe import Recipe, changes
from har.tracking.records import Record, find_hits_by_path
from har.util.errors import UserError

Kind = Literal["base", "add", "chain", "leave", "end"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One recipe of an ablation, or why there can be none; `field` is what was changed last."""

    kind: Kind
    field: str
    recipe: Recipe | None
    why_not: str = ""


def plan_ablation(base: Recipe, end: Recipe) -> list[Step]:
    """Base, each change alone, the chain of changes, the end without each, the end.

    Raises:
        UserError: the two are one recipe.
    """
    found = changes(base, end)
    if not found:
        raise UserError("nothing to try: the two recipes are the same")
    steps = [Step(kind="base", field="", recipe=base)]
    steps += [_build_step("add", name, base, {name: new}) for name, (_, new) in found.items()]
    so_far: dict[str, Any] = {}
    for name, (_, new) in found.items():
        so_far[name] = new
        steps.append(_build_step("chain", name, base, so_far))
    steps += [_build_step("leave", name, end, {name: old}) for name, (old, _) in found.items()]
    return [*steps, Step(kind="end", field="", recipe=end)]


def _build_step(kind: Kind, name: str, recipe: Recipe, values: dict[str, Any]) -> Step:
    """The recipe with these values, or why it is forbidden."""
    try:
        return Step(kind=kind, field=name, recipe=replace(recipe, **values))
    except UserError as error:
        return Step(kind=kind, field=name, recipe=None, why_not=str(error))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one recipe took and reached: medians over its seeds, and hits of each seed.

    `images` is how many were trained on in all epochs; `image_s` the seconds of an image, its
    share of validation in it; `rest_s` what of the wall time is not fit. `hits` is (seeds, images).
    """

    epochs: float
    epoch_s: float
    images: float
    image_s: float
    rest_s: float
    wall_s: float
    accuracy: float | None
    hits: npt.NDArray[np.bool_] | None


def measure_cost(records: Sequence[Record]) -> Cost:
    """Of the trainings of one recipe, which differ in their seeds alone."""
    rows = [_measure_training(each) for each in records]
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    accuracies = [each.accuracy for each in records]
    predictions = [each.predictions for each in records if each.predictions is not None]
    evaluated = len(predictions) == len(records)
    return Cost(
        **medians,
        accuracy=float(np.mean([a for a in accuracies if a is not None])) if evaluated else None,
        hits=np.stack([find_hits_by_path(each).to_numpy() for each in predictions])
        if evaluated
        else None,
    )


def _measure_training(record: Record) -> dict[str, float]:
    """The numbers of one training; epochs are as its history has them, and features that it found
    count as long as they took when they were computed.
    """
    history = record.history
    wall_s = (record.seconds or 0.0) + record.saved_s
    fit_s = sum(epoch["epoch_time_s"] for epoch in history)
    images = len(history) * record.epoch_images
    return {
        "epochs": len(history),
        "epoch_s": float(np.median([epoch["epoch_time_s"] for epoch in history])),
        "images": images,
        "image_s": fit_s / images,
        "rest_s": wall_s - fit_s,
        "wall_s": wall_s,
    }


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one change does to a recipe; `why_not` says why that is not known.

    `wall_s` after minus before is the sum of: `per_image_s`, from the time an image takes;
    `images_s`, from how many images are trained on (fewer a pass, fewer epochs); and `rest_s`.
    `difference` of accuracy with its 95 % interval.
    """

    kind: Kind
    field: str
    change: str
    before: Cost | None = None
    after: Cost | None = None
    difference: tuple[float, float, float] | None = None
    why_not: str = ""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of wall time gained (negative) or lost by each cause; they add up."""
        before, after = self.before, self.after
        assert before is not None and after is not None
        # each cause at the mean of what the other was: no remainder, and no order to choose
        return {
            "time an image": (after.image_s - before.image_s) * (after.images + before.images) / 2,
            "number of images": (after.images - before.images)
            * (after.image_s + before.image_s)
            / 2,
            "before and after fit": after.rest_s - before.rest_s,
        }


def find_effects(
    steps: Sequence[Step], costs: Sequence[Cost | None], found: dict[str, tuple[Any, Any]]
) -> list[Effect]:
    """One for each step but base and end; `costs` of the steps, `found` the changes."""
    base, end = costs[0], costs[-1]
    previous, effects = base, []
    for step, cost in zip(steps[1:-1], costs[1:-1], strict=True):
        before, after = {
            "add": (base, cost),
            "chain": (previous, cost),
            # with the change against without it, as in the others
            "leave": (cost, end),
        }[step.kind]
        if step.kind == "chain" and cost is not None:
            previous = cost
        why_not = step.why_not
        if not why_not and (before is None or after is None):
            why_not = "the recipe that it is compared with is forbidden"
        elif not why_not and before is after:
            why_not = "this machine runs the same recipe with and without it"
        effects.append(_build_effect(step, found[step.field][1], before, after, why_not))
    return effects


def _build_effect(
    step: Step, value: Any, before: Cost | None, after: Cost | None, why_not: str
) -> Effect:
    """With a paired difference where both were evaluated."""
    change = f"{step.field}={value}"
    if why_not or before is None or after is None:
        return Effect(kind=step.kind, field=step.field, change=change, why_not=why_not)
    difference = None
    if before.hits is not None and after.hits is not None:
        difference = mean_paired_difference(before.hits, after.hits)
    return Effect(
        kind=step.kind,
        field=step.field,
        change=change,
        before=before,
        after=after,
        difference=difference,
    )


KINDS = {
    "add": "alone, on the base",
    "chain": "after those above",
    "leave": "last, on all others",
}


def tabulate_effects(effects: Sequence[Effect]) -> pd.DataFrame:
    """One row an effect: what each number was and became; wall time's causes in seconds."""
    return pd.DataFrame([_effect_row(each) for each in effects])


def _effect_row(effect: Effect) -> dict[str, Any]:
    """Flat, for a CSV file."""
    row: dict[str, Any] = {"kind": effect.kind, "change": effect.change, "why_not": effect.why_not}
    before, after = effect.before, effect.after
    if before is None or after is None:
        return row
    for name in ("image_s", "epoch_s", "epochs", "images", "wall_s", "accuracy"):
        row |= {f"{name}_before": getattr(before, name), f"{name}_after": getattr(after, name)}
    row |= {f"{name}, s": value for name, value in effect.parts.items()}
    if effect.difference is not None:
        row |= dict(zip(("difference", "low", "high"), effect.difference, strict=True))
    return row


def describe_table(effects: Sequence[Effect]) -> str:
    """For the terminal and the run's description."""
    rows = []
    for each in effects:
        row = {"change": each.change, "tried": KINDS[each.kind]}
        if each.before is None or each.after is None:
            # the sentence has room for the reason
            rows.append(row | {"accuracy, points": "not known"})
            continue
        rows.append(
            row
            | {
                "ms/image": _format_pair(
                    1000 * each.before.image_s, 1000 * each.after.image_s, ".2f"
                ),
                "epoch s": _format_pair(each.before.epoch_s, each.after.epoch_s, ".1f"),
                "epochs": _format_pair(each.before.epochs, each.after.epochs, ".0f"),
                "wall s": _format_pair(each.before.wall_s, each.after.wall_s, ",.0f"),
                "accuracy, points": in_points(each.difference) if each.difference else "-",
            }
        )
    return pd.DataFrame(rows).fillna("-").to_string(index=False)


def _format_pair(before: float, after: float, form: str) -> str:
    """`before > after`."""
    return f"{before:{form}} > {after:{form}}"


def summarise_effect(effect: Effect) -> str:
    """One sentence, computed from the numbers."""
    where = {
        "add": "added to the base alone",
        "chain": "added to the changes before it",
        "leave": "added last, to all other changes",
    }[effect.kind]
    if effect.before is None or effect.after is None:
        return f"{effect.change}, {where}: not known, {effect.why_not}."
    before, after = effect.before, effect.after
    quicker = "saves" if after.wall_s < before.wall_s else "costs"
    share = abs(after.wall_s / before.wall_s - 1)
    causes = "; ".join(f"{name} {value:+,.0f} s" for name, value in effect.parts.items())
    return (
        f"{effect.change}, {where}, {quicker} {share:.0%} of the wall time ({causes}) and"
        f" {_summarise_difference(effect.difference)}."
    )


def _summarise_difference(difference: tuple[float, float, float] | None) -> str:
    """What can be said of the accuracy."""
    if difference is None:
        return "its accuracy is not known"
    _, low, high = difference
    if low <= 0 <= high:
        return f"changes accuracy by no more than can be told ({in_points(difference)} points)"
    return f"{'raises' if low > 0 else 'lowers'} accuracy by {in_points(difference)} points"
