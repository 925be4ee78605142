"""One spelling of a label, and labels that may be one."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from har.data.spelling import canonical_label, describe_spellings, find_spellings, spelling_key


@given(st.text(max_size=20))
def test_a_stored_label_is_stored_as_it_is(text: str) -> None:
    label = canonical_label(text)
    assert canonical_label(label) == label == unicodedata.normalize("NFC", label)
    assert not any(unicodedata.category(each) == "Cc" for each in label)
    assert label == label.strip()


@pytest.mark.parametrize(
    "text", ["sitting", "a b", "\u0645\u06cc\u200c\u062e", "👩\u200d🚀", "1.0", "C++"]
)
def test_what_can_be_seen_stays(text: str) -> None:
    assert canonical_label(f"\u00a0{text}\t") == text


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1", "1.0", True), ("1", "01", True), ("+1", "1", True), ("-0", "0", True),
        ("0.50", "0.5", True), ("1.5", "15", False), ("1", "-1", False), ("1 1", "11", False),
        ("v1.0", "v1", False), ("using laptop", "Using_Laptop", True), ("a-", "a", False),
        ("100000000000000000001", "100000000000000000002", False),
    ],
)  # fmt: skip
def test_keys(first: str, second: str, same: bool) -> None:
    assert (spelling_key(first) == spelling_key(second)) is same


def test_spellings_are_counted_the_commonest_first() -> None:
    found = find_spellings(["b", "", "B", "B", "c", ""])
    assert found == [{"B": 2, "b": 1}] and list(found[0]) == ["B", "b"]
    assert describe_spellings(found) == "'B' (2), 'b' (1)"
    many = find_spellings([f"{case}{number}" for number in range(13) for case in "aA"])
    assert describe_spellings(many).endswith("; 3 more")
