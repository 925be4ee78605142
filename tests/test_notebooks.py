"""The published runs, as data."""

from har.notebooks import NOTEBOOKS, OURS, describe_variants
from har.recipe import VARIANTS


def test_every_variant_has_its_notebook() -> None:
    assert [*NOTEBOOKS, *OURS] == list(VARIANTS)
    assert [each.minutes for each in NOTEBOOKS.values()] == [36, 36, 28, 22, 21]
    assert [each.hardware for each in NOTEBOOKS.values()] == [
        "1xP100",
        "1xP100",
        "2xT4",
        "1xP100",
        "2xT4",
    ]


def test_description_names_file_minutes_hardware_and_change() -> None:
    text = describe_variants()
    for each in NOTEBOOKS.values():
        assert f"{each.minutes} min on {each.hardware}, {each.file}" in text
    assert "v3 with precision=mixed_float16" in text
    assert "Without a GPU use v7" in text
    assert "the same recipe as v2, on other hardware" in text
    assert max(map(len, text.splitlines())) <= 88
