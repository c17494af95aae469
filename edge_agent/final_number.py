"""Reads the number that a worked text ends with, or nothing where that is not certain: a wrong reading is worse than none.

Every repetition is bounded or runs over text that no other search reads again, so reading is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from edge_agent.written_number import RUN, WINDOW, WORDS, Number, has_number, numbers_of

# How answers are written, brought to plain text.
_MARKUP = (
    (re.compile(r"<<[^<>\n]{0,128}>>"), ""),  # calculator marks of GSM8K
    (re.compile(r"</?[A-Za-z][^<>\n]{0,40}>"), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)[ ]?\{([^{}\n]{0,200})\}"), r"\1"),
    (re.compile(r"(?<![\w\\$])\$\$?((?:\\.|[^$\\\n]){1,200}?)\$\$?(?![\w$])"), r"\1"),
    (re.compile(r"(?<![\w*`])(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![\w*`])"), r"\2"),
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac[ ]?\{[ ]?(-?\d{1,32})[ ]?\}[ ]?\{[ ]?(\d{1,32})[ ]?\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^[ ]?\{?[ ]?\\circ[ ]?\}?"), "°"),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\(?:[,;:! ()\[\]]|(?:left|right|q?quad|approx|therefore|implies|Rightarrow|displaystyle)\b)"), " "),
    (re.compile(r"\\(?:times|cdot|div)\b"), "*"),
    (re.compile(r"(?i)(?:°|\bdeg(?:ree)?s?\b)[ ]{0,2}([CF])(?:elsius|ahrenheit)?\b"), r"°\1"),
    (re.compile(r"(?i)(?<=[\d ])([ap])\.[ ]?m\b"), r"\1m"),
    (re.compile(r"(?i)(\bis[ ]\$?[\d.,]{1,40})!(?!\S)"), r"\1."),  # the end of a sentence; elsewhere `5!` is a factorial
)
_MARKER = re.compile(
    r"""(?P<boxed>\\boxed[ ]?\{)
    | (?P<hashes>\#{4,8})
    | (?P<final>(?i:\bfinal\ answers?\b["'`*_]{0,4}(?:[ \t]{0,4}(?::|=|(?:is|are)\b))?))
    | (?i:\banswers?\b(?:\ to\b[^.\n]{1,60}?)?["'`*_]{0,4}[ \t]{0,4}
        (?::|=|\b(?:is|are|was|equals|would\ be|should\ be|will\ be)\b))
    | (?im:^[ \t>*_]{0,8}A(?:ns)?\.?[*_]{0,4}[ \t]{0,8}:)""",
    re.VERBOSE,
)
_HEADING = re.compile(r"\s{0,8}(?:step|part|question|problem|example|case|section|solution|explanation|note)\b", re.IGNORECASE)
_LEVELS = {"boxed": 3, "hashes": 2, "final": 1, None: 0}
_GAP = re.compile(r"[ \t*_:`'\"]{0,16}(?:\n\s*)?")
_BOXED = re.compile(r"(?:[^{}]|\{[^{}]{0,80}\}){0,200}")
_STOP = re.compile(r"(?:\.|(?<![\d)])!)(?=\s|$)|\b(?:because|since)\b", re.IGNORECASE)
_CUT = re.compile(r"(?<=\?)\s|[.,;](?=\s)|[=\n]")
REASON = re.compile(r"\b(?:because|since|as)\b[^.!?\n]*")
_EXCESS = "too (?:high|low|large|small|big|much|many|few)"
# `(?=[a-z])` changes nothing: where a word cannot begin, its many alternatives need not be tried.
_DENIED = re.compile(
    r"[?‽✗✘❌]|~~|n't\b|\bno(?=\W*\Z|:? (?:\d|[b-hj-z]\b))"
    r"|\b(?=[a-z])(?:(?:is|are|was|do|does|did|ca|wo)nt|not|never|neither|nor|none of|cannot|wrong\w*|incorrect\w*|mistaken\w*|false|untrue"
    r"|error|invalid|un(?:known|defined|determined)|doubt\w*|impossible|unlikely|excep\w+|exclud\w+|eliminat\w+|rul(?:e[sd]?|ing) out"
    rf"|(?:(?:any|every|no)thing|all|any|none) but|(?:instead|rather|other|apart|far) (?:of|than|from)|{_EXCESS}"
    r"|no (?:way|longer|answer|chance|means)|if|unless|whether|suppos\w+|assum\w+|pretend|imagine|let(?!'s| us)"
    r"|(?:first|initial|old|earlier|previous|partial|intermediate|naive|tempting) answer)\b"
    r"|\b(?=[a-z])(?:when|once|given|for|where|with|try|say) [a-z] ?=",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\A\W*(?:(?:or|no|not|wait|actually|sorry|hmm|but|rather|alternatively|instead)\b"
    r"|(?:it|that|this)(?:'s| is| was)(?: [a-z]{1,12})? \$?\d)"
    r"|\b(?=[a-z])(?:wrong\w*|incorrect\w*|mistaken?|mistakes|error|erroneous|false|untrue|invalid|impossible|oops|whoops|nope|cannot|correction"
    r"|corrected|i mean|i meant|my bad|mis(?:read|took|count\w*|calculat\w+|understood)|try again|second thoughts?|disregard|retract"
    r"|re-?(?:consider|calculat|count|check|comput|do|think|try)\w*|(?:scratch|strike|forget|ignore|take) (?:it|that|this)|never ?mind"
    rf"|{_EXCESS}|should have been|it should be|kidding|joking"
    r"|(?:it|that|this|which|answer|result|i|we)(?:'s|'m| [a-z]{2,6})?(?: not|n't))\b",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(r"\W*(?:so|thus|therefore|hence|finally|altogether|overall|in (?:total|all|conclusion))\b", re.IGNORECASE)
_SPOILED = re.compile(
    r"\b(?=[a-z])(?:or|either|plus|sqrt|(?:at|the) (?:very )?(?:least|most)|and (?:up|above|over|below|under|beyond|more|less|fewer"
    r"|counting|higher|lower|older|younger|change)|(?:up|on|down)wards?|(?:less|fewer) than|(?:divided|multiplied) by|raised to|binary"
    r"|octal|hex|(?:of|than|times|mod|choose|over) [b-hj-z])\b|[¤√~…∞]|\.\.\.|[<>!]=|[a-z]\("
    r"|\b(?:negative|minus)\b(?![ ]{1,2}[$€£¥₹]?[.\d])|(?<=\d)[^\d=]{0,40}\b(?-i:minimum|maximum|max)\b"
    r"|\\[a-z]"
    r"|(?-i:\b(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b)",
    re.IGNORECASE,
)
_APART = re.compile(r",\s|;|\band\b", re.IGNORECASE)
_UNKNOWN = re.compile(r"\b[A-Za-z][ ]?(?:[-+*/^²³!|]|mod\b)|\S[ ]?[-+*/^][ ]?[A-Za-z]\b|[-|][A-Za-z]\b|\d[A-Za-z]\b")
_OPERATION = re.compile(r"[ ][-+*/^][ ]?\(?[A-Za-z]|\d[ ]?[-+*/^:]{1,2}[ ]?(?:\(|[A-Za-z]\b)")


class Clause(NamedTuple):
    """What stands after a marker of a final answer, as plain text, and what stands beside it; the level orders the kinds of markers."""

    level: int
    before: str
    text: str
    after: str
    rest: str
    """What follows the whole, up to the next marker."""
    cut_off: bool = False

    @property
    def denied(self) -> bool:
        """Whether it is no answer, by itself or by what follows it."""
        return self.cut_off or denied(self.before + self.text + self.after, self.rest)


def final_number(text: str) -> Number | None:
    """Return the number that a text gives as its final answer, or None where it gives none, or more than one.

    Markers are `\\boxed{42}`, `#### 42`, `final answer: 42`, and `the answer is 42`, `Answer: 42`, `A: 42`. From the first of the strongest
    kind on, all marked answers must be equal; of what stands before it, and of sentences after it, only a denial counts. Without
    a marker, the last sentence with a number must be the only one, end in an equation, or begin with a word such as `so` or `therefore`.

    A clause is read where it has one number, where all its numbers are equal, or at the right of its last equals sign. Not read are
    ranges, alternatives, lists, bounds (`at least 5`, `5 minimum`), questions, suppositions, what is denied (`I don't think the answer is
    5`) or taken back later (`That is wrong`), expressions that are not worked out (`10 / x`, `5!`), a box that is a part of one
    (`3 + \\boxed{4}`), functions of an unknown (`x^2 = 5`), powers, ordinals, dates, times, ratios, and numbers of more than 80
    characters. `1,234`, `1 234` and `1'234` are 1234 and `1.000,5` is 1000.5; `1.000` is 1, `0,5` is not read.
    """
    plain = plain_text(text)
    clauses = marked_clauses(plain)
    if not clauses:
        return _unmarked(plain)
    heading = {text: _HEADING.match(text) is not None for text in {c.text for c in clauses}}
    numeric = {text: not heading[text] and has_number(text) for text in heading}
    top = max((c.level for c in clauses if numeric[c.text]), default=None)
    first = next((n for n, c in enumerate(clauses) if numeric[c.text] and c.level == top), len(clauses))
    said = dict.fromkeys(clauses[first:])  # the same again says nothing new, and the first that differs decides
    return _agreed(_read(c) for c in said if numeric[c.text] or (not heading[c.text] and c.denied))


def denied(said: str, rest: str) -> bool:
    """Whether what is said is denied, asked, or only supposed, or the rest of the text takes it back. Reasons may say `not`."""
    said, rest = (REASON.sub("", text) for text in (said, rest))
    return _DENIED.search(said) is not None or _TAKEN_BACK.search(rest) is not None


def marked_clauses(plain: str) -> list[Clause]:
    """Return what stands after each marker of a final answer: the rest of its line, or the next line; up to the next marker."""
    markers = list(_MARKER.finditer(plain))
    limits = [*(marker.start() for marker in markers[1:]), len(plain)]
    return [(_boxed if m["boxed"] else _clause)(plain, m, limit) for m, limit in zip(markers, limits, strict=False)]


def _clause(plain: str, marker: re.Match[str], limit: int) -> Clause:
    """A clause ends with the sentence of its first number."""
    gap = _GAP.match(plain, marker.end(), limit)
    start = gap.end() if gap else marker.end()
    line = plain.find("\n", start, limit)
    end = limit if line < 0 else line
    number = RUN.search(plain, start, end)
    stop = _STOP.search(plain, number.end() if number else start, end)
    end = stop.start() if stop else end
    before, text = _lead(plain, marker.start()) + plain[marker.start() : start], plain[start:end]
    return Clause(_LEVELS[marker.lastgroup], before, text, "", plain[end:limit])


def _boxed(plain: str, marker: re.Match[str], limit: int) -> Clause:
    """A box is read in its sentence, as if its braces were not there. One without an end is cut off, and not read."""
    inside = _BOXED.match(plain, marker.end(), limit)
    end = inside.end() if inside else marker.end()
    before, text = _lead(plain, marker.start()), plain[marker.end() : end]
    after = _CUT.split(plain[end + 1 : min(limit, end + 1 + WINDOW)], maxsplit=1)[0]
    return Clause(_LEVELS["boxed"], before, text, after, plain[end + 1 : limit], plain[end : end + 1] != "}")


def _lead(plain: str, start: int) -> str:
    """Return the part of a sentence before a marker."""
    return _CUT.split(plain[max(0, start - WINDOW) : start])[-1]


def _unmarked(plain: str) -> Number | None:
    sentences = re.split(r"(?<=[.!?])\s+|\n+", plain)
    numeric = [n for n, sentence in enumerate(sentences) if has_number(sentence)]
    if not numeric:
        return None
    last, rest = sentences[numeric[-1]], " ".join(sentences[numeric[-1] + 1 :])
    final = len(numeric) == 1 or "=" in last or _CONCLUDES.match(last)
    return _read(Clause(0, "", last, "", rest)) if final else None


def _read(clause: Clause) -> Number | None:
    """Return the one number that a clause says."""
    context = clause.before + clause.text + clause.after
    left, equals, right = clause.text.rpartition("=")
    end = len(clause.before) + len(clause.text)
    start = end - len(right)
    if clause.denied or _SPOILED.search(context) or _OPERATION.search(context, start):
        return None
    if _UNKNOWN.search(left if equals else re.split(r"\d", right, maxsplit=1)[0]):
        return None
    numbers = numbers_of(context, start, end)
    return None if equals and not _leads_to(left, numbers) else _agreed(numbers)


def _leads_to(left: str, numbers: list[Number | None]) -> bool:
    """Whether what stands left of the last equals sign is an expression or a name of these numbers, and states no other."""
    digit = re.search(r"\d", left)
    if digit and _APART.search(left, digit.start()):
        return False
    said = left.rpartition("=")[2]
    before = numbers_of(said, 0, len(said))
    if not before:
        return WORDS.search(said) is None
    alone = len(before) == 1 and before[0] is not None and "/" not in before[0].text
    return not alone or _agreed(before + numbers) is not None


def _agreed(numbers: Iterable[Number | None]) -> Number | None:
    """Return the first number, where all have been read and are equal; those after one that is not are not asked for."""
    rest = iter(numbers)
    first = next(rest, None)
    return first if first is not None and all(n is not None and first.equals(n) for n in rest) else None


def plain_text(text: str) -> str:
    """Return the text with its markup and the forms of characters brought to those that are read here."""
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f]", lambda match: _plain_character(match[0]), text)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


_CHARACTERS = {
    **dict.fromkeys("−﹣‐‑‒–", "-"), **dict.fromkeys("—―", ", "), **dict.fromkeys("×·∙⋅✕✖÷", "*"), **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("’‘ʼ", "'"), "٬": ",", "٫": ".", "。": ". ", "，": ", ", "、": ", ", "²": "²", "³": "³", "٪": "%", "℃": "°C", "℉": "°F",
}  # fmt: skip


@lru_cache(4096)
def _plain_character(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    kind, folded = unicodedata.category(character), unicodedata.normalize("NFKC", character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind in ("No", "Nl"):
        return " " + folded.replace("⁄", "/") if re.fullmatch(r"\d{1,2}⁄\d{1,2}", folded) else "¤"
    if kind == "Zs":
        return " "
    return folded if len(folded) == 1 and folded.isascii() else character
