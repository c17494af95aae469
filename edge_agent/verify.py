"""Answer verifiers: does the final answer of an output equal the final answer of the standard answer?"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction

# Every repetition is bounded and no blank spans a line, so that reading is linear in the text and numbers stay apart.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,16}(?!\d)|\d{1,64})(?:\.\d{1,64})?|\.\d{1,64}"
_NUMBER = re.compile(
    rf"(?P<sign>[-−][ ]?)?[$€£]?[ ]?(?P<inner>[-−])?"
    rf"(?:(?:(?P<whole>\d{{1,32}})[ ]{{1,4}})?(?P<top>\d{{1,32}})[ ]?/[ ]?(?P<bottom>[1-9]\d{{0,31}})(?![\d/])|(?P<value>{_DIGITS}))"
    rf"[ ]?(?P<percent>%)?"
)
_MARKER = re.compile(r"####|(?im:^[ \t]*A[ \t]*:)|(?i:\bfinal answer(?: is)?\b[ \t]*:?)|(?i:\banswer is\b[ \t]*:?)|(?i:\banswer[ \t]*:)")
_CHOICE = re.compile(r"\(?\b([A-Z])\b\)?")


def final_answer(text: str) -> str | None:
    """Return the number that a worked text ends with, as written: the one after its last marker, else its last number."""
    found = _final_number(text)
    return None if found is None else found.group(0).strip()


def _final_number(text: str) -> re.Match[str] | None:
    numbers = list(_NUMBER.finditer(text))
    ends = [n.end() for n in numbers]
    for marker in reversed(list(_MARKER.finditer(text))):
        after = bisect_right(ends, marker.end())
        if after < len(numbers):
            return numbers[after]
    return numbers[-1] if numbers else None


def _values(match: re.Match[str]) -> set[Fraction]:
    """All values a number may stand for: `50%` is 50 and 1/2."""
    part = match.group
    if part("top"):
        value = Fraction(int(part("top")), int(part("bottom"))) + int(part("whole") or 0)
    else:
        value = Fraction(part("value").replace(",", ""))
    if part("sign") or part("inner"):
        value = -value
    return {value, value / 100} if part("percent") else {value}


def numeric(output: str, answer: str) -> bool:
    """True where both texts end in the same number.

    Reads `#### 42`, `A: 42`, `the answer is 42`, thousands separators, units, currency, negatives, decimals, fractions, mixed
    numbers and percent; falls back to the last number of the text.
    """
    ours, theirs = _final_number(output), _final_number(answer)
    return ours is not None and theirs is not None and bool(_values(ours) & _values(theirs))


def exact(output: str, answer: str) -> bool:
    """True where the texts after the last `####` (or the whole texts) are equal, apart from case and blanks."""
    ours, theirs = (" ".join(x.rpartition("####")[2].split()).casefold() for x in (output, answer))
    return bool(theirs) and ours == theirs


def choice(output: str, answer: str) -> bool:
    """True where both texts end in the same choice letter, `B` or `(B)`, after their last marker if they have one."""
    ours, theirs = _last_choice(output), _last_choice(answer)
    return theirs is not None and ours == theirs


def _last_choice(text: str) -> str | None:
    markers = list(_MARKER.finditer(text))
    if markers and (found := _CHOICE.search(text, markers[-1].end())):
        return found.group(1)
    letters = _CHOICE.findall(text)
    return letters[-1] if letters else None


VERIFIERS: dict[str, Callable[[str, str], bool]] = {"numeric": numeric, "exact": exact, "choice": choice}
