"""Hostile text, on the terminal, in CSV cells and in Markdown; ordinary text stays as it is."""

import csv
import io
import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from har.util.escaping import for_csv, for_markdown, for_terminal, format_csv, from_csv

ORDINARY = (
    "café", "日本語 の写真", "naïve-Größe_1 (2).jpg", "שלום עולם", "مرحبا", "می‌خواهم", "क्‍ष",
    "😀", "👩‍🚀", "❤️‍🔥", "👍🏽", "1️⃣", "a\\nb", "C:\\new\\x1b", "100 %", "a b",
)  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_readable(text: str) -> None:
    assert for_terminal(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nresult  0.99", "a\\nresult  0.99"),
        ("a\rresult", "a\\rresult"),
        ("\x1b[2J\x1b[31m", "\\x1b[2J\\x1b[31m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\x08\x08b\x7f", "a\\x08\\x08b\\x7f"),
        ("a\x85b\u2028c\u2029d\x0b\x0c", "a\\x85b\\u2028c\\u2029d\\x0b\\x0c"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("\u2066x\u2069\u200e\u061c", "\\u2066x\\u2069\\u200e\\u061c"),
        ("sit\u200bting\u2060\ufeff\xad", "sit\\u200bting\\u2060\\ufeff\\xad"),
        ("sit\u200d\u200cting", "sit\\u200d\\u200cting"),
        ("a\ufe0f\u3164\u115f", "a\\ufe0f\\u3164\\u115f"),
        ("a\U000e0041\U000e007f", "a\\U000e0041\\U000e007f"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\0", "\\x00"),
    ],
)
def test_a_terminal_obeys_no_name(text: str, shown: str) -> None:
    assert for_terminal(text) == shown
    assert for_terminal(shown) == shown


@given(st.text(st.characters(codec=None)))
def test_what_is_shown_is_one_line_that_any_utf8_terminal_can_print(text: str) -> None:
    shown = for_terminal(text)
    assert len(shown.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("cell", "escaped"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t'=1"),
        ("\rx", "'\rx"),
        ("  =1", "'  =1"),
        ("\xa0\u3000=1", "'\xa0\u3000=1"),
        ("\u200b\ufeff=1", "'\u200b\ufeff=1"),
        ('"=1"', '\'"=1"'),
        ("'=1", "''=1"),
        ("\uff1d1", "'\uff1d1"),
        ("\uff0b1\uff0d\uff20", "'\uff0b1\uff0d\uff20"),
        ("a;=1", "a;'=1"),
        ("a\n=1", "a\n'=1"),
        ("sitting", "sitting"),
        ("a-b=c@d+e", "a-b=c@d+e"),
        ("-", "-"),
        ("", ""),
        (-3, -3),
        (None, None),
    ],
)
def test_a_spreadsheet_runs_no_cell(cell: object, escaped: object) -> None:
    assert for_csv(cell) == escaped
    if isinstance(escaped, str):
        assert from_csv(escaped) == cell


CELLS = st.text(
    st.sampled_from("=+-@'\"\t\r\n;, aé\u200b\uff1d") | st.characters(exclude_categories=["Cs"]),
    max_size=8,
)


@given(CELLS)
def test_an_escaped_cell_is_restored(cell: str) -> None:
    assert from_csv(for_csv(cell)) == cell


@settings(deadline=None)
@given(st.lists(st.tuples(CELLS.filter(lambda text: "\0" not in text), st.integers()), max_size=4))
def test_a_table_is_read_back(rows: list[tuple[str, int]]) -> None:
    table = pd.DataFrame(rows, columns=["=name", "number"])
    read = pd.read_csv(io.StringIO(format_csv(table), newline=""), keep_default_na=False)
    assert list(read) == ["'=name", "number"]
    plain = list(csv.reader(io.StringIO(format_csv(table), newline="")))[1:]
    assert [(from_csv(text), int(number)) for text, number in plain] == rows


def test_numbers_stay_numbers_in_a_table() -> None:
    table = pd.DataFrame({"label": ["-1", "b"], "accuracy": [-0.5, float("nan")], "n": [1, -2]})
    assert format_csv(table) == "label,accuracy,n\n'-1,-0.5,1\nb,,-2\n"


@pytest.mark.parametrize(
    "text",
    [
        "[click](http://evil)", "![x](http://evil/pixel.png)", "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>", "a | b", "# heading", "**bold** _it_ ~~no~~", "`code`",
        "http://evil.example", "www.evil.example", "me@evil.example @user", "&lt;b&gt; &#60;b&#62;",
        "a\n\n# heading", "- item", "1. item", "    code", ":smile:", "a\\", "[ref]: http://evil",
    ],
)  # fmt: skip
def test_markdown_stays_text(text: str) -> None:
    escaped = for_markdown(text)
    assert "\n" not in escaped
    # without the escaped characters, nothing is left that has a meaning
    rest = re.sub(r"\\.|&(amp|lt|gt|#64|#58);", "", escaped)
    assert not re.search(r"[<>&@`*_\[\]()#~|!:.=]", rest)


def test_plain_words_stay_plain_in_markdown() -> None:
    assert for_markdown("class folders 2, café") == "class folders 2, café"
