"""What an ablation runs and says, by hand."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from har.compare.ablation import (
    Effect,
    describe_table,
    find_effects,
    plan_ablation,
    summarise_effect,
    tabulate_effects,
)
from har.compare.costs import Cost, measure_cost
from har.evaluation.metrics import mean_paired_difference, paired_difference
from har.recipe import VARIANTS, changes, describe_changes
from har.tracking.records import Record
from har.util.errors import UserError
from tests.compare.conftest import HERE

ORIGINAL, V4 = VARIANTS["original"], VARIANTS["v4"]


BEFORE = Cost(
    epochs=10,
    epoch_s=20.0,
    images=1000,
    image_s=0.2,
    rest_s=50.0,
    wall_s=250.0,
    accuracy=0.5,
    hits=np.array([[True, False] * 50]),
)


AFTER = replace(
    BEFORE,
    epochs=5,
    images=400,
    image_s=0.3,
    rest_s=40.0,
    wall_s=160.0,
    hits=np.array([[True, True] * 50]),
)


def test_each_change_is_tried_alone_last_and_in_the_chain() -> None:
    steps, found = plan_ablation(ORIGINAL, V4), changes(ORIGINAL, V4)
    assert (steps[0].recipe, steps[-1].recipe) == (ORIGINAL, V4)
    for kind in ("add", "chain", "leave"):
        fields = [step.change.partition("=")[0] for step in steps if step.kind == kind]
        assert fields == list(found)
    for step in steps:
        if step.recipe is not None and step.kind == "add":
            assert describe_changes(ORIGINAL, step.recipe) == step.change
        if step.recipe is not None and step.kind == "leave":
            assert describe_changes(step.recipe, V4) == step.change
    chain = [step.recipe for step in steps if step.kind == "chain"]
    assert chain[-1] == V4 and None not in chain


def test_forbidden_combinations_are_reported() -> None:
    forbidden = [step for step in plan_ablation(ORIGINAL, V4) if step.recipe is None]
    assert {(step.kind, step.change) for step in forbidden} == {
        ("add", "patience=5"),
        ("add", "checkpoint=best"),
        ("leave", "validation_fraction=0.2"),
    }
    effects = [
        Effect(kind=step.kind, change=step.change, why_not=step.why_not) for step in forbidden
    ]
    assert describe_table(effects).count("not known") == 3
    for each in effects:
        assert "not known, " in summarise_effect(each)
        assert "validation_fraction is 0" in summarise_effect(each)
    assert tabulate_effects(effects)["why_not"].str.contains("validation_fraction is 0").all()


def test_grouped_changes_are_made_together() -> None:
    groups = [("head", "loss"), ("validation_fraction", "patience", "checkpoint")]
    steps = plan_ablation(ORIGINAL, V4, groups)
    chain = [step for step in steps if step.kind == "chain"]
    assert chain[0].change == "head=gap_dropout, loss=sparse_categorical_crossentropy"
    assert chain[1].change == "validation_fraction=0.2, patience=5, checkpoint=best"
    others = set(changes(ORIGINAL, V4)) - {name for group in groups for name in group}
    assert len(chain) == 2 + len(others)
    # together they are no forbidden combination
    assert all(step.recipe is not None for step in steps)
    assert chain[-1].recipe == V4
    short = plan_ablation(ORIGINAL, V4, groups, chain_only=True)
    assert short == [steps[0], *chain, steps[-1]]


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([("head", "nonsense")], "names nonsense, which does not change; these do: .*head"),
        ([("seed",)], "names seed, which does not change"),
        ([("head",), ("loss", "head")], "names head twice"),
    ],
)
def test_a_group_names_what_changes_once(groups: list[tuple[str, ...]], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        plan_ablation(ORIGINAL, V4, groups)


def test_nothing_to_try() -> None:
    with pytest.raises(UserError, match="the same"):
        plan_ablation(ORIGINAL, ORIGINAL)


def effect(before: Cost = BEFORE, after: Cost = AFTER, **fields: Any) -> Effect:
    values = {"kind": "chain", "change": "patience=5", **fields}
    return Effect(before=before, after=after, difference=(0.5, 0.4, 0.6), **values)


def test_causes_add_up_to_the_wall_time() -> None:
    parts = effect().parts
    assert parts == pytest.approx(
        {"time an image": 70.0, "number of images": -150.0, "before and after fit": -10.0}
    )
    assert sum(parts.values()) == pytest.approx(AFTER.wall_s - BEFORE.wall_s)


def test_the_sentence_is_computed() -> None:
    assert summarise_effect(effect()) == (
        "patience=5, added to the changes before it, saves 36% of the wall time (time an image"
        " +70 s; number of images -150 s; before and after fit -10 s) and raises accuracy by +50.0"
        " (+40.0 to +60.0) points."
    )
    same = replace(effect(), difference=(0.01, -0.1, 0.12))
    assert "does not change accuracy measurably" in summarise_effect(same)
    assert "not known" in summarise_effect(replace(effect(), difference=None))
    assert "costs 56%" in summarise_effect(effect(before=AFTER, after=BEFORE))


def test_effects_compare_with_and_without() -> None:
    base, end = replace(ORIGINAL, epochs=3), replace(ORIGINAL, epochs=5, seed=1)
    steps = plan_ablation(base, end)
    kinds = [(step.kind, step.change.partition("=")[0]) for step in steps]
    assert kinds == [
        ("base", ""),
        ("add", "epochs"),
        ("add", "seed"),
        ("chain", "epochs"),
        ("chain", "seed"),
        ("leave", "epochs"),
        ("leave", "seed"),
        ("end", ""),
    ]
    costs = [replace(BEFORE, wall_s=float(number)) for number in range(8)]
    effects = find_effects(steps, costs)
    pairs = [(each.before.wall_s, each.after.wall_s) for each in effects if each.before]
    assert pairs == [(0, 1), (0, 2), (0, 3), (3, 4), (5, 7), (6, 7)]
    idle = find_effects(steps, [BEFORE] * 8)
    assert all("same recipe" in each.why_not for each in idle)
    unknown: list[Cost | None] = [*costs[:3], None, *costs[4:]]
    effects = find_effects(steps, unknown)
    assert effects[2].before is None
    assert "forbidden" in effects[2].why_not
    # what follows an unknown one is compared with the last that is known
    assert effects[3].before is costs[0]


def test_cost_of_trainings() -> None:
    def record(seconds: float, right: str) -> Record:
        table = pd.DataFrame({"path": ["b", "a"], "label": ["x", "x"], "predicted": list(right)})
        return replace(
            HERE,
            seconds=100.0,
            train_images=70,
            recipe=asdict(ORIGINAL),
            history=[{"epoch_time_s": seconds}, {"epoch_time_s": 3 * seconds}],
            predictions=table,
        )

    cost = measure_cost([record(4.0, "xy"), record(8.0, "xx"), record(6.0, "yy")])
    assert (cost.epochs, cost.images, cost.epoch_s, cost.wall_s) == (2, 128, 12.0, 100.0)
    assert cost.image_s == 24 / 128 and cost.rest_s == 76.0
    assert cost.hits is not None
    assert cost.hits.tolist() == [[False, True], [True, True], [False, False]]
    warm = record(4.0, "xy")
    warm = replace(warm, saved_s=30.0)
    assert measure_cost([warm]).wall_s == 130.0 and measure_cost([warm]).rest_s == 130.0 - 16.0
    unevaluated = replace(record(4.0, "xy"), predictions=None)
    assert measure_cost([unevaluated]).hits is None


def test_difference_over_seeds() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random((3, 400)) < 0.5, rng.random((3, 400)) < 0.6
    value, low, high = mean_paired_difference(before, after)
    assert value == pytest.approx(after.mean() - before.mean()) and low < value < high
    one = mean_paired_difference(before[:1], after[:1])
    assert one == paired_difference(before[0], after[0])


ARGUMENTS = (
    "ablate", "--backbone", "efficientnet-lite0", "--image-size", 32, "--batch-size", 4,
    "--epochs", 1, "--test-fraction", 0.25,
)  # fmt: skip
