"""One recipe by hardware."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from har.compare.hardware import COLUMNS, find_families
from har.tracking.records import Record
from tests.compare.conftest import HERE, PUBLISHED


def run_of(
    hardware: str, seconds: float, epoch_s: float, epochs: int = 10, **fields: Any
) -> Record:
    history = [{"train_accuracy": 0.5, "epoch_time_s": epoch_s}] * epochs
    return replace(
        HERE, run_id=hardware, hardware=hardware, seconds=seconds, history=history,
        recipe={"batch_size": 32}, **fields,
    )  # fmt: skip


def test_a_family_has_a_row_for_each_hardware_and_what_the_difference_is_made_of() -> None:
    p100, t4 = run_of("1xP100", 1000.0, 90.0), run_of("2xT4", 600.0, 50.0)
    older = run_of("1xP100", 5.0, 1.0, started=0)
    family, *others = find_families([p100, older, t4])
    assert not others and not family.published and family.name == "v3"
    rows = {row["hardware"]: row for row in family.table.to_dict("records")}
    assert list(rows) == ["1xP100", "2xT4"] and list(family.table) == list(COLUMNS)
    assert rows["1xP100"]["runs"] == 2 and rows["1xP100"]["wall_time_s"] == 1000
    assert rows["2xT4"]["times_as_fast"] == pytest.approx(1000 / 600)
    causes = [rows["2xT4"][name] for name in COLUMNS if name.startswith("of_")]
    assert sum(causes) == pytest.approx(600 - 1000)
    assert causes == pytest.approx([-400, 0, 0])


def test_fewer_epochs_and_fixed_costs_are_told_apart() -> None:
    (family,) = find_families([run_of("a", 1000.0, 90.0), run_of("b", 650.0, 90.0, epochs=5)])
    row = family.table.iloc[1]
    assert row["of_time_an_image"] == pytest.approx(0)
    assert row["of_number_of_images"] == pytest.approx(-450)
    assert row["of_before_and_after_fit"] == pytest.approx(100)


def test_published_measured_and_pretended_stand_apart() -> None:
    measured, pretended = run_of("1xCPU", 50.0, 1.0), run_of("2xT4", 40.0, 1.0, pretended=True)
    other = replace(measured, digests=("other", "d", "t"), differs_from_variant="epochs=5")
    families = find_families([PUBLISHED, measured, pretended, other])
    assert [each.name for each in families][:2] == ["v3", "v3 with epochs=5"]
    assert families[-1].published and len(families) == 3
    assert dict(zip(families[0].table["hardware"], families[0].table["source"], strict=True)) == {
        "1xCPU": "measured", "2xT4": "pretended",
    }  # fmt: skip


def test_what_is_not_known_or_not_whole_has_no_ratio() -> None:
    cached = run_of("1xCPU", 5.0, 1.0, cache_hit=True)
    bare = replace(run_of("2xT4", 9.0, 1.0), history=[], recipe={})
    (family,) = find_families([cached, bare])
    table = family.table.set_index("hardware")
    assert pd.isna(table.loc["1xCPU", "wall_time_s"]) and pd.isna(
        table.loc["1xCPU", "times_as_fast"]
    )
    assert all(pd.isna(table.loc["2xT4", name]) for name in COLUMNS if name.startswith("of_"))
