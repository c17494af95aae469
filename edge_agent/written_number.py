"""Reads the numbers of a plain text with what stands beside each: sign, scale, currency, percent and unit.

Every repetition is bounded or runs over text that no other search reads again, so reading is linear in the text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

_LETTER = "A-Za-zÀ-ɏ"
MAX_NUMBERS = 16
"""A clause with more numbers is no answer."""
MAX_RUN = 80
"""Characters of one number; a longer one is not read."""
WINDOW = 80
"""Characters beside a number that may change what it says."""
LONGEST_BEFORE = 24
"""Characters that one word or sign before a number can have with the blanks after it: `absolute value of`, `than` and a word."""

# A number with all that is joined to it: a range, date or product is one run, and no number.
RUN = re.compile(
    rf"(?<![{_LETTER}0-9.^])(?<![{_LETTER}][-_])(?<![\^_]\{{)(?:\d+|\.\d+)"
    r"(?:[.,:'eE]\d+|[eE][-+]\d+|[ ]\d{3}(?!\d)|[ ]{1,4}\d{1,32}(?=[ ]?/[ ]?\d)|[ ]?[-+*/^x][ ]?[-+]?\(?\.?\d+)*"
)
_DECIMAL = re.compile(r"(?:\d{1,64}(?:\.\d{1,64})?|\.\d{1,64})(?:[eE][-+]?\d{1,2})?")
_GROUPED = re.compile(r"[1-9]\d{0,2}([,' ])\d{3}(?:\1\d{3})*(?:\.\d{1,64})?")
_EUROPEAN = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d{1,64}|[1-9]\d{0,2}(?:\.\d{3}){2,}")
_FRACTION = re.compile(r"(?:(?P<whole>\d{1,32})[ ]{1,4})?(?P<top>\d{1,32})[ ]?/[ ]?(?P<bottom>\d{1,32})")

_BEFORE = re.compile(
    r"(?:(?P<word>\b(?:negative|minus)\b)[ ]{1,2})?(?P<outer>[-+]?)(?P<currency>[$€£¥₹]?)(?P<blank>[ ]?)(?P<inner>[-+]?)\Z", re.IGNORECASE
)
_FUNCTION = (
    "twice|thrice|doubled?|tripled?|halved|squared|cubed|factorial|log(?:_\\{?[a-z\\d]{1,8}\\}?)?|ln|sin|cos|tan|exp"
    "|(?:root|square|cube|reciprocal|inverse|opposite|factorial|logarithm|absolute value|multiples?|factors?|divisors?|powers?) of"
)
_SPOILED_BEFORE = re.compile(
    r"(?:\b(?:than(?:[ ][a-z]{1,12})?|up to|almost|nearly|barely|hardly|over|under|above|below|beyond|within|exceed(?:s|ing)?|every|minimum"
    rf"|maximum|half|mod|{_FUNCTION}|(?:half|sum|difference|product|quotient|minimum|maximum|excess|short|out) of)"
    r"|[<>≤≥≠±∓√^|‖⌊⌈]=?|[-+][ ]?[(\[{\"'*_`]|/|(?:[\d)\]}]|\b[A-Za-z]|[ ](?=\*[ ]))[ ]?\*"
    r"|\d[ ]{0,2}(?:[:x]|to|and|of)|,(?![ ]))[ *_`]{0,4}\Z",
    re.IGNORECASE,
)
_SAYS = (" is", " are", " was", " be", " get", " answer")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_CLOSERS = re.compile(r"[\"'`)\]}]{0,4}")
_AFTER = re.compile(
    rf"(?:[ ]{{0,3}}(?P<percent>%|(?:percent|per cent|pct)\b))?(?:(?:[ ]{{0,3}}|-)(?P<scale>{'|'.join(_SCALES)})s?\b)?"
    r"(?P<unit>(?:[ ]{0,3}|-)(?:(?P<shape>square|sq\.?|cubic)[ ])?(?P<name>[$€£¥₹¢]|°?[A-Za-zµ]{1,24})(?P<power>[²³]|\^?\{?[23]\}?)?"
    r"(?:[ ]?(?:/|per\b)[ ]?(?P<per>[A-Za-z]{1,24}))?)?",
    re.IGNORECASE,
)
_SPOILED_AFTER = re.compile(
    r"(?i:st|nd|rd|th)\b|[²³^+‰!]|[.,]?\d|,[A-Za-z]|\.\.|…|[\u0300-\u036f\u20d0-\u20f0\ufe0f]|[十百千万萬億亿兆半]|\(\d"
    r"|[ ]{0,3}(?:[kKMBG]\b|[π√<>≤≥±]|[-+*/^:x][ ]?[-+]?\(?[.\d]|[-+*/][ ]?\Z|(?:to|and|of)[ ]\$?[.\d]"
    r"|(?i:bn|tn|mn|mln|mil|mio|mrd|cr|pi|grand|gross|score|per ?mil+e?|ppm|ppb|bps|basis points?)\b)"
    r"|[ -]?(?i:ish|something|odd|recurring|repeating)\b"
)

_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
# A lone "one" is mostly no number: `one of them`.
WORDS = re.compile(
    rf"\b(?=[a-z])(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<ones>{'|'.join(list(_SMALL)[1:10])}))?"
    rf"|(?P<small>{'|'.join(w for w in _SMALL if w != 'one')}|one(?=[ ](?:and|to|in|out)\b))"
    rf"|(?:{'|'.join(_SCALES)})s?|[a-z]{{1,12}}illi(?:on|ard)(?:th)?s?|{_FUNCTION}|tens|half|halves|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)\b",
    re.IGNORECASE,
)
_UNITS = {
    name: unit
    for unit, names in {
        "dollar": "$ dollar buck usd", "cent": "¢ cent penny pennies", "nickel": "nickel", "dime": "dime", "euro": "€ euro eur",
        "pound": "£ pound gbp", "lb": "lb", "yen": "¥ yen jpy", "rupee": "₹ rupee inr", "m": "m meter metre",
        "km": "km kilometer kilometre", "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "mile": "mile mi",
        "yard": "yard yd", "foot": "foot feet ft", "inch": "inch inches", "g": "g gram gramme", "kg": "kg kilogram kilo",
        "mg": "mg milligram", "ton": "ton tonne", "ounce": "ounce oz", "l": "l liter litre", "ml": "ml milliliter millilitre",
        "gallon": "gallon gal", "second": "s sec second", "minute": "min minute", "hour": "h hr hour", "day": "day", "week": "week",
        "month": "month", "year": "year yr", "mile/hour": "mph", "km/hour": "kph kmh kmph", "am": "am", "pm": "pm",
        "celsius": "°c celsius centigrade", "fahrenheit": "°f fahrenheit", "degree": "° degree", "bit": "bit", "byte": "byte",
        "kb": "kb kilobyte", "mb": "mb megabyte", "gb": "gb gigabyte", "tb": "tb terabyte",
    }.items()
    for name in names.split()
}  # fmt: skip
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "²": "2", "³": "3"}


class Number(NamedTuple):
    """A number as it was written, its value, and its unit where that is a known one: `m`, `m2`, `km/hour`, `%`."""

    text: str
    value: Fraction
    unit: str | None

    def equals(self, other: Number) -> bool:
        """Whether both say the same. 50 % is 1/2, and 50 where the percent sign was left out; 0.5 % is not 0.5. Other units differ."""
        if (self.unit == "%") != (other.unit == "%"):
            percent, plain = (self, other) if self.unit == "%" else (other, self)
            return plain.unit is None and (plain.value == percent.value / 100 or (plain.value == percent.value and abs(plain.value) > 1))
        return self.value == other.value and (self.unit == other.unit or self.unit is None or other.unit is None)


def has_number(text: str) -> bool:
    """Whether a text has a number, in digits or words."""
    return RUN.search(text) is not None or WORDS.search(text) is not None


def numbers_of(text: str, start: int, end: int) -> list[Number | None]:
    """Return the numbers of a part of a text in order; None stands for one that cannot be read, or a word that says another one."""
    found: list[Number | None] = []
    words = []
    for run in islice(RUN.finditer(text, start, end), MAX_NUMBERS + 1):
        words += list(WORDS.finditer(text, start, run.start()))
        number, start = _number(text, run)
        found.append(number)
    if not found:
        return []
    words += list(WORDS.finditer(text, start))
    values = {number.value for number in found if number is not None}
    if len(found) > MAX_NUMBERS or any(_word_value(word) not in values for word in words):
        return [None]
    return found


def _word_value(word: re.Match[str]) -> int | None:
    """Return the value of a number word; None for a fraction or a scale, which no number beside it equals."""
    if word["tens"]:
        return _TENS[word["tens"].lower()] + (_SMALL[word["ones"].lower()] if word["ones"] else 0)
    return _SMALL[word["small"].lower()] if word["small"] else None


def _number(text: str, run: re.Match[str]) -> tuple[Number | None, int]:
    """Return the number of a run with what stands beside it, and where its text ends."""
    window = text[max(0, run.start() - WINDOW) : run.start()]
    beside = _CLOSERS.match(text, run.end())
    edge = beside.end() if beside else run.end()
    before = _BEFORE.search(window, max(0, len(window) - LONGEST_BEFORE))
    after = _AFTER.match(text, edge, edge + WINDOW)
    value = _value(run[0])
    if before is None or after is None or value is None or _spoiled(window, before) or _SPOILED_AFTER.match(text, edge):
        return None, run.end()
    name, known = after["name"] or "", _known(after["name"])
    following = text[after.end() : after.end() + 1]
    glued = name and text[run.end()].isalpha() and following.isalnum()
    letter = len(name) == 1 and name.isalpha() and name not in "aI" and known is None and following != "-"
    if glued or letter or (before["currency"] and known not in (None, _known(before["currency"]))):
        return None, run.end()
    if before["word"] or "-" in (before["outer"], before["inner"]):
        value = -value
    if after["scale"]:
        value *= _SCALES[after["scale"].lower()]
    end = max(run.end(), after.end("percent"), after.end("scale"))
    return Number(window[before.start() :].lstrip() + text[run.start() : end], value, _unit(before, after)), end


def _spoiled(window: str, before: re.Match[str]) -> bool:
    """Whether a sign is doubtful (`- 5`, `x-5`, `--5`), or the words before a number make it a bound or a part of something."""
    lead = window[: before.start()]
    signs = [sign for sign in (before["word"], before["outer"], before["inner"]) if sign]
    apart = before["outer"] and before["blank"] and not before["currency"]
    joined = signs and (lead[-1:].isalnum() or lead[-1:] in ("-", "+", ")")) and not lead.lower().endswith(_SAYS)
    return len(signs) > 1 or bool(apart or joined or _SPOILED_BEFORE.search(lead, max(0, len(lead) - LONGEST_BEFORE)))


def _unit(before: re.Match[str], after: re.Match[str]) -> str | None:
    if after["percent"]:
        return "%"
    known = _known(after["name"]) or _known(before["currency"])
    if known is None:
        return None
    power = (after["shape"] or after["power"] or "").strip(".^{}").lower()
    per = f"/{_known(after['per']) or after['per'].lower()}" if after["per"] else ""
    return known + _POWERS.get(power, power) + per


def _known(name: str | None) -> str | None:
    lower = (name or "").lower()
    return _UNITS.get(lower) or _UNITS.get(lower.removesuffix("s"))


def _value(run: str) -> Fraction | None:
    """Return the value of a number without sign, or None where the run is none, or could be two."""
    if len(run) > MAX_RUN:
        return None
    if fraction := _FRACTION.fullmatch(run):
        whole, top, bottom = (int(fraction[name] or 0) for name in ("whole", "top", "bottom"))
        proper = fraction["whole"] is None or top < bottom
        return whole + Fraction(top, bottom) if bottom and proper else None
    if _GROUPED.fullmatch(run):
        return Fraction(re.sub("[,' ]", "", run))
    if _EUROPEAN.fullmatch(run):
        return Fraction(run.replace(".", "").replace(",", "."))
    return Fraction(run) if _DECIMAL.fullmatch(run) else None
