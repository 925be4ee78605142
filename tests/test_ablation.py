"""What an ablation runs and says, by hand; then a whole one, interrupted and gone on with."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from test_twins import HERE

from har.ablation import (
    Cost,
    Effect,
    describe_table,
    find_effects,
    measure,
    plan,
    say_plainly,
    tabulate,
)
from har.archive import Record
from har.comparison_figures import draw_waterfall
from har.errors import UserError
from har.metrics import mean_paired_difference, paired_difference
from har.recipe import VARIANTS, changes

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
    steps, found = plan(ORIGINAL, V4), changes(ORIGINAL, V4)
    assert (steps[0].recipe, steps[-1].recipe) == (ORIGINAL, V4)
    for kind in ("add", "chain", "leave"):
        assert [step.field for step in steps if step.kind == kind] == list(found)
    for step in steps:
        if step.recipe is not None and step.kind == "add":
            assert list(changes(ORIGINAL, step.recipe)) == [step.field]
        if step.recipe is not None and step.kind == "leave":
            assert list(changes(step.recipe, V4)) == [step.field]
    chain = [step.recipe for step in steps if step.kind == "chain"]
    assert chain[-1] == V4 and None not in chain


def test_forbidden_combinations_are_reported() -> None:
    forbidden = [step for step in plan(ORIGINAL, V4) if step.recipe is None]
    assert {(step.kind, step.field) for step in forbidden} == {
        ("add", "patience"),
        ("add", "checkpoint"),
        ("leave", "validation_fraction"),
    }
    effects = [
        Effect(kind=step.kind, field=step.field, change=step.field, why_not=step.why_not)
        for step in forbidden
    ]
    assert describe_table(effects).count("not known") == 3
    for each in effects:
        assert "not known, " in say_plainly(each)
        assert "validation_fraction is 0" in say_plainly(each)
    assert tabulate(effects)["why_not"].str.contains("validation_fraction is 0").all()


def test_nothing_to_try() -> None:
    with pytest.raises(UserError, match="the same"):
        plan(ORIGINAL, ORIGINAL)


def effect(before: Cost = BEFORE, after: Cost = AFTER, **fields: Any) -> Effect:
    values = {"kind": "chain", "field": "patience", "change": "patience=5", **fields}
    return Effect(before=before, after=after, difference=(0.5, 0.4, 0.6), **values)


def test_causes_add_up_to_the_wall_time() -> None:
    parts = effect().parts
    assert parts == pytest.approx(
        {"time an image": 70.0, "number of images": -150.0, "before and after fit": -10.0}
    )
    assert sum(parts.values()) == pytest.approx(AFTER.wall_s - BEFORE.wall_s)


def test_the_sentence_is_computed() -> None:
    assert say_plainly(effect()) == (
        "patience=5, added to the changes before it, saves 36% of the wall time (time an image"
        " +70 s; number of images -150 s; before and after fit -10 s) and raises accuracy by +50.0"
        " (+40.0 to +60.0) points."
    )
    same = replace(effect(), difference=(0.01, -0.1, 0.12))
    assert "no more than can be told" in say_plainly(same)
    assert "not known" in say_plainly(replace(effect(), difference=None))
    assert "costs 56%" in say_plainly(effect(before=AFTER, after=BEFORE))


def test_effects_compare_with_and_without() -> None:
    base, end = replace(ORIGINAL, epochs=3), replace(ORIGINAL, epochs=5, seed=1)
    steps = plan(base, end)
    kinds = [(step.kind, step.field) for step in steps]
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
    effects = find_effects(steps, costs, changes(base, end))
    pairs = [(each.before.wall_s, each.after.wall_s) for each in effects if each.before]
    assert pairs == [(0, 1), (0, 2), (0, 3), (3, 4), (5, 7), (6, 7)]
    idle = find_effects(steps, [BEFORE] * 8, changes(base, end))
    assert all("same recipe" in each.why_not for each in idle)
    unknown: list[Cost | None] = [*costs[:3], None, *costs[4:]]
    effects = find_effects(steps, unknown, changes(base, end))
    assert effects[2].before is None
    assert "forbidden" in effects[2].why_not
    # what follows an unknown one is compared with the last that is known
    assert effects[3].before is costs[0]


def test_cost_of_trainings() -> None:
    def record(seconds: float, right: str) -> Record:
        table = pd.DataFrame({"path": ["b", "a"], "label": ["x", "x"], "predicted": list(right)})
        return Record(
            training=replace(HERE, seconds=100.0, train_images=70),
            recipe=asdict(ORIGINAL),
            history=[{"epoch_time_s": seconds}, {"epoch_time_s": 3 * seconds}],
            predictions=table,
            root=None,
        )

    cost = measure([record(4.0, "xy"), record(8.0, "xx"), record(6.0, "yy")])
    assert (cost.epochs, cost.images, cost.epoch_s, cost.wall_s) == (2, 128, 12.0, 100.0)
    assert cost.image_s == 24 / 128 and cost.rest_s == 76.0
    assert cost.hits is not None
    assert cost.hits.tolist() == [[False, True], [True, True], [False, False]]
    warm = record(4.0, "xy")
    warm = replace(warm, training=replace(warm.training, saved_s=30.0))
    assert measure([warm]).wall_s == 130.0 and measure([warm]).rest_s == 130.0 - 16.0
    unjudged = replace(record(4.0, "xy"), predictions=None)
    assert measure([unjudged]).hits is None


def test_difference_over_seeds() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random((3, 400)) < 0.5, rng.random((3, 400)) < 0.6
    value, low, high = mean_paired_difference(before, after)
    assert value == pytest.approx(after.mean() - before.mean()) and low < value < high
    one = mean_paired_difference(before[:1], after[:1])
    assert one == paired_difference(before[0], after[0])


def test_waterfall_is_drawn_whatever_is_known(tmp_path: Path) -> None:
    unknown = replace(effect(), before=None, after=None)
    for number, effects in enumerate(([], [unknown], [effect(), unknown, effect(AFTER, BEFORE)])):
        draw_waterfall(effects).savefig(tmp_path / f"{number}.png")


ARGUMENTS = (
    "ablate", "--backbone", "efficientnet-lite0", "--image-size", 32, "--batch-size", 4,
    "--epochs", 1, "--test-fraction", 0.25,
)  # fmt: skip


def test_the_command_and_again(tiny_raw: Path, store: str, cli) -> None:
    ends = ("--from", "v4", "--to", "v5", "--precision", "float32", "--experiment", "ablated")
    result = cli(*ARGUMENTS, *ends, "--data", tiny_raw)
    assert result.exit_code == 0, result.output
    for change in ("loader=features", "augmentation=none"):
        assert result.output.count(f"{change}, added") == 3
    ids = [mlflow.get_experiment_by_name("ablated").experiment_id]
    (parent,) = mlflow.search_runs(ids, "tags.job = 'ablate'", output_format="list")
    children = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    assert len(children) == 4
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        # with another augmentation the test images' features are the same
        warm = child.data.tags["features"] == "warm"
        assert (child.data.metrics.get("saved_time_s", 0.0) > 0) is warm
    assert mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/ablation.txt") in result.output
    # all there: nothing is trained again
    again = cli(*ARGUMENTS, *ends, "--data", tiny_raw)
    assert again.exit_code == 0, again.output
    assert len(mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")) == 4


def test_features_are_shared_and_their_time_counts_all_the_same(
    tiny_raw: Path, store: str, cli
) -> None:
    """One change between two recipes that train on the same features."""
    ends = ("--from", "original", "--to", "v1", "--loader", "features", "--experiment", "shared")
    result = cli(*ARGUMENTS, *ends, "--data", tiny_raw)
    assert result.exit_code == 0, result.output
    ids = [mlflow.get_experiment_by_name("shared").experiment_id]
    (parent,) = mlflow.search_runs(ids, "tags.job = 'ablate'", output_format="list")
    children = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    # what the first has computed, the second finds; its time counts for both
    warm, cold = children
    assert (cold.data.tags["features"], warm.data.tags["features"]) == ("cold", "warm")
    before, after = cold.data.metrics, warm.data.metrics
    assert before["saved_time_s"] == 0 < after["saved_time_s"] < before["extraction_time_s"]
    table = pd.read_csv(
        mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/ablation.csv")
    )
    assert sorted(table["kind"]) == ["add", "chain", "leave"]
    after_s = after["wall_time_s"] + after["saved_time_s"]
    expected = [[before["wall_time_s"], after_s]] * 3
    np.testing.assert_allclose(table[["wall_s_before", "wall_s_after"]], expected)
    assert cli(*ARGUMENTS, *ends, "--data", tiny_raw).exit_code == 0
    assert len(mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "v3", "--to", "v3"], "the same"),
        (["--from", "v2", "--to", "v3"], "the same"),
        (["--from", "v9"], "v9"),
        (["--seeds", "0"], "0"),
        (["--epochs", "-1"], "-1"),
    ],
)
def test_what_cannot_be_ablated(
    arguments: list[str], said: str, tiny_raw: Path, store: str, cli
) -> None:
    before = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    result = cli("ablate", "--data", tiny_raw, *arguments)
    assert result.exit_code == 2 and said in result.output
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == before
