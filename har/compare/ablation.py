"""Ablation between two recipes: the trainings to run, and what each change does.

Pure functions. Each change is measured in three ways: alone, added to the base (add); added to
the changes before it (chain); and as the last one, added to all others (leave).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from har.compare.costs import Cost, split_difference
from har.evaluation.metrics import in_points, mean_paired_difference
from har.recipe import Recipe, changes
from har.util.errors import UserError

Kind = Literal["base", "add", "chain", "leave", "end"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A recipe of an ablation, None if it is forbidden (`why_not`); `change`, such as
    `head=gap_dropout`, was made last.
    """

    kind: Kind
    change: str
    recipe: Recipe | None
    why_not: str = ""


def group_changes(
    base: Recipe, end: Recipe, groups: Sequence[Sequence[str]]
) -> list[dict[str, tuple[Any, Any]]]:
    """Return the changes to make together, each as field to (old, new): the groups, in their order,
    then every other change by itself.

    Raises:
        UserError: nothing differs, or a group names a field that does not differ, or one twice.
    """
    found = changes(base, end)
    if not found:
        raise UserError("nothing to compare: the two recipes are the same; give two that differ")
    named = [name for group in groups for name in group]
    if unknown := [name for name in named if name not in found]:
        raise UserError(
            f"--group names {unknown[0]}, which does not change; these do: {', '.join(found)}"
        )
    if twice := [name for name in found if named.count(name) > 1]:
        raise UserError(f"--group names {twice[0]} twice")
    single = [[name] for name in found if name not in named]
    return [{name: found[name] for name in group} for group in (*groups, *single)]


def plan_ablation(
    base: Recipe, end: Recipe, groups: Sequence[Sequence[str]] = (), chain_only: bool = False
) -> list[Step]:
    """Plan the base, each change alone, the chain of changes, the end without each, and the end;
    or only the base, the chain and the end.
    """
    found = group_changes(base, end, groups)
    news = [{name: new for name, (_, new) in group.items()} for group in found]
    olds = [{name: old for name, (old, _) in group.items()} for group in found]
    names = [", ".join(f"{name}={new}" for name, new in group.items()) for group in news]
    pairs = list(zip(names, news, olds, strict=True))
    alone = [_build_step("add", name, base, new) for name, new, _ in pairs]
    chain: list[Step] = []
    so_far: dict[str, Any] = {}
    for name, new, _ in pairs:
        so_far = so_far | new
        chain.append(_build_step("chain", name, base, so_far))
    without = [_build_step("leave", name, end, old) for name, _, old in pairs]
    steps = chain if chain_only else [*alone, *chain, *without]
    return [
        Step(kind="base", change="", recipe=base),
        *steps,
        Step(kind="end", change="", recipe=end),
    ]


def _build_step(kind: Kind, change: str, recipe: Recipe, values: dict[str, Any]) -> Step:
    try:
        return Step(kind=kind, change=change, recipe=replace(recipe, **values))
    except UserError as error:
        return Step(kind=kind, change=change, recipe=None, why_not=str(error))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one change on a recipe. If it is unknown, `why_not` says why."""

    kind: Kind
    change: str
    before: Cost | None = None  # without the change
    after: Cost | None = None  # with it
    difference: tuple[float, float, float] | None = None  # of accuracy, with 95 % interval
    why_not: str = ""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of wall time that each cause adds or (negative) saves; they add up to all."""
        assert self.before is not None and self.after is not None
        return split_difference(self.before, self.after)


def find_effects(steps: Sequence[Step], costs: Sequence[Cost | None]) -> list[Effect]:
    """Find the effect of each step but base and end."""
    base, end = costs[0], costs[-1]
    previous, effects = base, []
    for step, cost in zip(steps[1:-1], costs[1:-1], strict=True):
        before, after = {
            "add": (base, cost),
            "chain": (previous, cost),
            # `cost` is without the change
            "leave": (cost, end),
        }[step.kind]
        if step.kind == "chain" and cost is not None:
            previous = cost
        effect = Effect(kind=step.kind, change=step.change)
        effects.append(_compare_costs(effect, before, after, step.why_not))
    return effects


def _compare_costs(effect: Effect, before: Cost | None, after: Cost | None, why_not: str) -> Effect:
    if why_not:
        return replace(effect, why_not=why_not)
    if before is None or after is None:
        return replace(effect, why_not="the recipe to compare with is forbidden")
    if before is after:
        return replace(effect, why_not="this machine runs the same recipe with and without it")
    difference = None
    if before.hits is not None and after.hits is not None:
        difference = mean_paired_difference(before.hits, after.hits)
    return replace(effect, before=before, after=after, difference=difference)


def tabulate_effects(effects: Sequence[Effect]) -> pd.DataFrame:
    """Return one row for each effect: all numbers before and after, and the causes in seconds."""
    rows = []
    for each in effects:
        row: dict[str, Any] = {"kind": each.kind, "change": each.change, "why_not": each.why_not}
        if each.before is not None and each.after is not None:
            for name in ("image_s", "epoch_s", "epochs", "images", "wall_s", "accuracy"):
                row[f"{name}_before"] = getattr(each.before, name)
                row[f"{name}_after"] = getattr(each.after, name)
            row |= {f"{name}, s": value for name, value in each.parts.items()}
        if each.difference is not None:
            row |= dict(zip(("difference", "low", "high"), each.difference, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


# How a change was measured: in the table, and in a sentence.
KINDS = {
    "add": ("alone, on the base", "added to the base alone"),
    "chain": ("after those above", "added to the changes before it"),
    "leave": ("last, on all others", "added last, to all other changes"),
}


def describe_table(effects: Sequence[Effect]) -> str:
    """Format the effects as a table for the terminal."""
    rows = []
    for each in effects:
        row = {"change": each.change, "tried": KINDS[each.kind][0]}
        before, after = each.before, each.after
        if before is None or after is None:
            row["accuracy, points"] = "not known"
        else:
            row |= {
                "ms/image": f"{1000 * before.image_s:.2f} > {1000 * after.image_s:.2f}",
                "epoch s": f"{before.epoch_s:.1f} > {after.epoch_s:.1f}",
                "epochs": f"{before.epochs:.0f} > {after.epochs:.0f}",
                "wall s": f"{before.wall_s:,.0f} > {after.wall_s:,.0f}",
                "accuracy, points": in_points(each.difference) if each.difference else "-",
            }
        rows.append(row)
    return pd.DataFrame(rows).fillna("-").to_string(index=False)


def summarise_effect(effect: Effect) -> str:
    """Describe an effect in one sentence."""
    what, before, after = f"{effect.change}, {KINDS[effect.kind][1]}", effect.before, effect.after
    if before is None or after is None:
        return f"{what}: not known, {effect.why_not}."
    verb = "saves" if after.wall_s < before.wall_s else "costs"
    share = abs(after.wall_s / before.wall_s - 1)
    causes = "; ".join(f"{name} {value:+,.0f} s" for name, value in effect.parts.items())
    accuracy = _summarise_difference(effect.difference)
    return f"{what}, {verb} {share:.0%} of the wall time ({causes}) and {accuracy}."


def _summarise_difference(difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return "its accuracy is not known"
    _, low, high = difference
    if low <= 0 <= high:
        return f"does not change accuracy measurably ({in_points(difference)} points)"
    return f"{'raises' if low > 0 else 'lowers'} accuracy by {in_points(difference)} points"
