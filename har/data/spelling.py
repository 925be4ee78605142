"""Labels in one spelling: what cannot be seen is removed, and likely misspellings are found."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Letters that are drawn as nothing: fillers of Hangul, and the empty Braille pattern.
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
# They join or part letters in Persian and Indian scripts, and make one emoji of two.
JOINERS = "\u200c\u200d"
NUMBER = re.compile(r"([+-]?)(\d+)(?:\.(\d*))?")
SEPARATOR = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")
MAX_SHOWN = 10


def canonical_label(text: str) -> str:
    """Return a label as it is stored: NFC, plain spaces, and none around it; nothing invisible."""
    visible = "".join(map(_show_character, unicodedata.normalize("NFC", text)))
    return visible.strip(f" {JOINERS}")


def _show_character(each: str) -> str:
    if each.isspace():
        return " "
    hidden = unicodedata.category(each) in ("Cc", "Cf") and each not in JOINERS
    return "" if hidden or each in BLANK_LETTERS else each


def spelling_key(label: str) -> str:
    """Return a text that is equal for labels that differ only by case, by space, `_` or `-`
    between words, by letter width, or as 1 and 1.0 do.
    """
    folded = unicodedata.normalize("NFKC", label).casefold()
    folded = "".join(each for each in folded if each not in JOINERS)
    if number := NUMBER.fullmatch(folded):
        sign, whole, fraction = (part or "" for part in number.groups())
        digits = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}"
        return digits if digits == "0." else sign.replace("+", "") + digits
    # 1-1 is not 11
    return SEPARATOR.sub(
        lambda gap: " " if _between_digits(folded, gap.start(), gap.end()) else "", folded
    )


def _between_digits(text: str, start: int, end: int) -> bool:
    return text[start - 1].isdigit() and text[end].isdigit()


def find_spellings(labels: Iterable[str]) -> list[Counter[str]]:
    """Return, for each label with several spellings, how often each occurs, the commonest first.

    Labels are canonical; empty ones are no label.
    """
    by_key: dict[str, Counter[str]] = {}
    for label, count in Counter(label for label in labels if label).items():
        by_key.setdefault(spelling_key(label), Counter())[label] = count
    return [Counter(dict(each.most_common())) for each in by_key.values() if len(each) > 1]


def describe_spellings(found: list[Counter[str]]) -> str:
    """List spellings as `'running' (12), 'Running' (3)`, the groups separated by semicolons."""
    groups = [
        ", ".join(f"{label!r} ({count})" for label, count in each.items())
        for each in found[:MAX_SHOWN]
    ]
    more = [f"{len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
    return "; ".join(groups + more)
