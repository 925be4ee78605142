"""The values that a search tries for fields of a recipe, as `--param` spells them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from random import Random
from typing import Any

from har.recipe import Recipe, build_recipe, check_value
from har.util.errors import UserError

SPELLINGS = "learning_rate=log:1e-4:1e-2, label_smoothing=0:0.2, or head=gap_dropout,linear_probe"
# These decide which images validate, or nothing at all: no score could compare their values.
NOT_SEARCHED = {
    "validation_fraction": "it decides which images the trials are compared on",
    "seed": "the best of several seeds is luck; give --seed for all trials",
    "diagnostics": "it changes nothing that is trained",
}
FIELDS = {each.name: each for each in fields(Recipe)}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]
    is_discrete = True

    def draw(self, rng: Random) -> Any:
        """Draw a value at random."""
        return rng.choice(self.values)

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number from `low` to `high`, both included; with `log`, equal ratios are equally likely."""

    low: float
    high: float
    log: bool

    @property
    def is_discrete(self) -> bool:
        """Whether the numbers are whole."""
        return isinstance(self.low, int)

    def draw(self, rng: Random) -> int:
        """Draw a whole number at random."""
        return rng.randint(int(self.low), int(self.high))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low!r}:{self.high!r}"


Values = Choice | Range
# From names of recipe fields to what to try, in the order of the fields.
Space = Mapping[str, Values]


def parse_space(texts: Sequence[str]) -> Space:
    """Parse `name=log:low:high`, `name=low:high` and `name=value,value`; a text may hold several,
    separated by spaces.

    Raises:
        UserError: no name of a recipe field, one that cannot be searched, a value that the field
            does not take, or nothing to choose from.
    """
    space: dict[str, Values] = {}
    for text in (part for each in texts for part in _split(each)):
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in FIELDS:
            raise UserError(
                f"--param must be FIELD=VALUES, such as {SPELLINGS}; received {text!r}. The fields"
                f" are {', '.join(FIELDS)}"
            )
        if name in NOT_SEARCHED:
            raise UserError(f"{name} cannot be searched: {NOT_SEARCHED[name]}")
        if name in space:
            raise UserError(f"--param {name} was given twice")
        space[name] = _parse_values(FIELDS[name], values.strip())
    if not space:
        raise UserError(f"nothing to search: give --param FIELD=VALUES, such as {SPELLINGS}")
    return {name: space[name] for name in FIELDS if name in space}


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--param {text!r} cannot be read: {error}") from error


def _parse_values(each: Field[Any], text: str) -> Values:
    number = each.type in (int, float)
    if number and ":" in text:
        return _parse_range(each, text)
    values = tuple(_parse_value(each, part.strip()) for part in text.split(","))
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(
            f"--param {each.name} needs two different values or more; received {text!r}: for one"
            f" value give --{each.name.replace('_', '-')}"
        )
    return Choice(values=values)


def _parse_range(each: Field[Any], text: str) -> Range:
    match = re.fullmatch(r"(log:)?([^:]+):([^:]+)", text)
    if match is None:
        raise UserError(
            f"--param {each.name} must be low:high, log:low:high or a list; received {text!r}"
        )
    low, high = (_parse_value(each, part.strip()) for part in match.groups()[1:])
    if not low < high:
        raise UserError(f"--param {each.name}: {low} is not below {high}")
    if match[1] and low <= 0:
        raise UserError(f"--param {each.name}: a log range starts above 0; received {text!r}")
    return Range(low=low, high=high, log=bool(match[1]))


def _parse_value(each: Field[Any], text: str) -> Any:
    value: Any = text
    if each.type in (int, float):
        try:
            value = each.type(text)
        except ValueError:
            kind = "a whole number" if each.type is int else "a number"
            raise UserError(f"--param {each.name} takes {kind}; received {text!r}") from None
    check_value(each, value)
    return value


def format_space(space: Space) -> str:
    """Format a space as `--param` takes it."""
    return " ".join(f"{name}={values}" for name, values in space.items())


def find_start(space: Space, overrides: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Return the variant's own values of the space's fields; {} if one of them is not in it."""
    recipe = build_recipe(variant, overrides)
    start = {name: getattr(recipe, name) for name in space}
    return start if all(start[name] in values for name, values in space.items()) else {}
