"""`--param`: what it takes, what it refuses, and what a search starts from."""

from random import Random

import pytest

from har.recipe import VARIANTS
from har.search.space import Choice, Range, find_start, format_space, parse_space
from har.util.errors import UserError


def test_spellings() -> None:
    texts = [
        "learning-rate=log:1e-4:1e-2 head=gap_dropout,linear_probe",
        "epochs=5:40",
        "patience=0,5",
    ]
    space = parse_space(texts)
    assert space == {
        "head": Choice(values=("gap_dropout", "linear_probe")),
        "learning_rate": Range(low=1e-4, high=1e-2, log=True),
        "epochs": Range(low=5, high=40, log=False),
        "patience": Choice(values=(0, 5)),
    }
    # in the order of the fields, whatever the user's: the same search
    assert parse_space(texts[::-1]) == space and list(parse_space(texts[::-1])) == list(space)
    assert parse_space([format_space(space)]) == space


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing to search"),
        ("learning_rate", "FIELD=VALUES"),
        ("lr=1:2", "the fields are loader"),
        ("seed=0,1", "luck"),
        ("validation_fraction=0.1,0.2", "compared on"),
        ("learning_rate=0.01", "two different values or more"),
        ("learning_rate=0.01,0.010", "two different values or more"),
        ("learning_rate=1e-2:1e-4", "not below"),
        ("learning_rate=log:0:1", "learning_rate must be a number from 1e-09"),
        ("label_smoothing=log:0:0.1", "starts above 0"),
        ("learning_rate=1:2:3", "low:high"),
        ("learning_rate=a:b", "takes a number"),
        ("learning_rate=nan:1", "must be a number"),
        ("epochs=1.5:3", "takes a whole number"),
        ("epochs=0:3", "from 1 to"),
        ("head=gap_dropout,other", "head must be one of"),
        ("head=gap_dropout,'", "cannot be read"),
        ("epochs=1,2 epochs=2,3", "twice"),
    ],
)
def test_what_cannot_be_searched(text: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_space([text])
    assert said.lower() in str(raised.value).lower()


def test_the_variant_itself_is_the_start_where_the_space_has_it() -> None:
    space = parse_space(["learning_rate=log:1e-4:1e-2", "batch_size=16,32"])
    assert find_start(space, {}, "v5") == {"learning_rate": 1e-3, "batch_size": 32}
    assert find_start(space, {"learning_rate": 0.5}, "v5") == {}
    assert VARIANTS["v5"].batch_size == 32


def test_draws_are_within() -> None:
    rng = Random(0)
    words, numbers = parse_space(["epochs=3:5 head=gap_dropout,linear_probe"]).values()
    assert {numbers.draw(rng) for _ in range(50)} == {3, 4, 5}
    assert {words.draw(rng) for _ in range(50)} == set(words.values)
