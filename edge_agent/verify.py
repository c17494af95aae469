"""Answer verifiers: does the final answer of an output equal the final answer of the standard answer? No code from outside runs here."""

from __future__ import annotations

import re

from edge_agent.dataset import Verify
from edge_agent.final_number import REASON, denied, final_number, marked_clauses, plain_text
from edge_agent.job import Regex, Verifier
from edge_agent.patterns import last_match

# `I` is a word unless it stands in brackets, and so is an `A` before a word where no marker says that an answer follows.
_CHOICE = re.compile(r"\(([A-Z])\)|(?<![A-Za-z0-9'])([A-HJ-Z])(?![A-Za-z0-9'+])")
_ARTICLE = re.compile(r"\bA(?= (?!or\b|and\b)[a-z])")


def numeric_match(prediction: str, answer: str) -> bool:
    """True where both texts certainly end in the same number; `final_number` says how it is read, and what is not.

    Rounded numbers differ: 0.33 is not 1/3. Units are compared where both texts have a known one.
    """
    ours, theirs = final_number(prediction), final_number(answer)
    return ours is not None and theirs is not None and ours.equals(theirs)


def exact_match(prediction: str, answer: str) -> bool:
    """True where the texts after the last `####` (or the whole texts) are equal, apart from case and blanks."""
    ours, theirs = (_folded(text.rpartition("####")[2]) for text in (prediction, answer))
    return bool(theirs) and ours == theirs


def choice_match(prediction: str, answer: str) -> bool:
    """True where both texts choose the same letter, `B` or `(B)`.

    It is the only one after the last marker of an answer; without a marker, the only one in the last line that has any. A letter that is
    denied, asked, only supposed, or taken back later is no choice.
    """
    theirs = _choice(answer)
    return theirs is not None and _choice(prediction) == theirs


def _choice(text: str) -> str | None:
    plain = plain_text(text)
    clauses = marked_clauses(plain)
    if clauses:
        return None if clauses[-1].denied else _only_choice(clauses[-1].text)
    lines = _ARTICLE.sub("", plain).splitlines()
    last = max((n for n, line in enumerate(lines) if _CHOICE.search(line)), default=None)
    if last is None or denied(lines[last], "\n".join(lines[last + 1 :])):
        return None
    return _only_choice(lines[last])


def _only_choice(text: str) -> str | None:
    letters = {bracketed or alone for bracketed, alone in _CHOICE.findall(REASON.sub("", text))}
    return letters.pop() if len(letters) == 1 else None


def regex_match(pattern: str, prediction: str, answer: str) -> bool:
    """True where the last match of a pattern is the same in both texts, apart from case and blanks.

    Compared is its first group, or all of it where it has none; where that is blank, or a text has more than 1,000 matches, nothing is.
    """
    ours, theirs = (_folded(last_match(pattern, text) or "") for text in (prediction, answer))
    return bool(theirs) and ours == theirs


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def final_answer(text: str) -> str | None:
    """Return the number that a worked text ends with, as written, or None where none is certain."""
    number = final_number(text)
    return None if number is None else number.text


def find_verifier(option: Verifier) -> Verify | None:
    """Return the verifier that a job names; None for free text."""
    if isinstance(option, Regex):
        return lambda prediction, answer: regex_match(option.pattern, prediction, answer)
    return _VERIFIERS[option]


_VERIFIERS: dict[str, Verify | None] = {"numeric": numeric_match, "exact": exact_match, "choice": choice_match, "none": None}
