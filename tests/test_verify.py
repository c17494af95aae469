"""Verifiers against real model outputs with published verdicts, and against the forms that answers take."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numeric_pairs import DOUBTFUL, OTHER, SAME

from edge_agent.job import Regex, Verifier
from edge_agent.verify import choice_match, exact_match, final_answer, find_verifier, numeric_match

AMOUNTS = st.fractions(-(10**9), 10**9, max_denominator=1).map(int) | st.decimals(-(10**6), 10**6, places=2)
"""Whole numbers and hundredths, as answers have them."""


def test_numeric_agrees_with_every_published_verdict(shared_data: Path) -> None:
    """All 2,638 outputs of real models on GSM8K get the verdict that was published with them."""
    lines = (shared_data / "gsm8k" / "model_outputs_6b.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    verdicts = [(row[key], row["answer"]) for row in rows for key in ("finetuning", "verification")]
    assert len(verdicts) == 2638
    wrong = [v["solution"] for v, answer in verdicts if numeric_match(v["solution"], answer) != v["is_correct"]]
    assert wrong == []


def test_numeric_reads_every_standard_answer_of_gsm8k(shared_data: Path) -> None:
    """All 8,792 standard answers are read as the number after their `####`."""
    lines = [line for name in ("train", "test") for line in (shared_data / "gsm8k" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 8792
    assert [a for a in answers if final_answer(a) != a.rpartition("#### ")[2].strip()] == []


def test_there_are_enough_adversarial_pairs() -> None:
    """At least 800 pairs, none of them twice."""
    pairs = [pair for table in (SAME, OTHER, DOUBTFUL) for theme in table.values() for pair in theme]
    assert len(set(pairs)) == len(pairs) >= 800


@pytest.mark.parametrize("theme", SAME)
def test_numeric_accepts_other_ways_to_write_a_number(theme: str) -> None:
    """Both texts say the same number, whichever of them is the prediction."""
    assert [pair for pair in SAME[theme] if not (numeric_match(*pair) and numeric_match(*reversed(pair)))] == []


@pytest.mark.parametrize("theme", OTHER)
def test_numeric_accepts_nothing_else(theme: str) -> None:
    """No false positive: the prediction says another number, two of them, or none."""
    assert [pair for pair in OTHER[theme] if numeric_match(*pair)] == []


@pytest.mark.parametrize("theme", DOUBTFUL)
def test_numeric_refuses_what_has_a_second_reading(theme: str) -> None:
    """A missed answer is better than a wrong one taken: what these cost is written down here."""
    assert [pair for pair in DOUBTFUL[theme] if numeric_match(*pair)] == []


def _forms(n: object) -> list[str]:
    """A number as answers write it."""
    plain, grouped = f"{n}", f"{n:,}"
    zeros = f"{plain}.000" if "." not in plain else f"{plain}0"
    sign, digits = ("-", grouped[1:]) if grouped.startswith("-") else ("", grouped)
    spaced = grouped.replace(",", " ")
    return [
        plain, grouped, spaced, grouped.replace(",", "\u202f"), grouped.replace(",", "'"), zeros, f"**{plain}**", f"\\boxed{{{grouped}}}",
        f"{sign}${digits}", f"{grouped} dollars", f"{plain} €"[: -2 if sign else None], f"x = {plain}", f"{plain.replace('-', '−')}",
        f"{grouped} apples", f"{plain}. That is all of the 3 boxes.",
    ]  # fmt: skip


@given(AMOUNTS)
def test_numeric_is_invariant_to_form(n: object) -> None:
    """A number equals itself however its thousands, zeros, currency, units and markup are written."""
    wanted = f"#### {n}"
    assert [form for form in _forms(n) if not numeric_match(f"so it is\n#### {form}", wanted)] == []


@given(AMOUNTS, AMOUNTS)
def test_numeric_never_matches_different_numbers(n: object, other: object) -> None:
    """Two numbers that differ are not equal in any of their forms."""
    if Fraction(str(n)) != Fraction(str(other)):
        assert [form for form in _forms(n) if numeric_match(f"#### {form}", f"#### {other}")] == []


@given(AMOUNTS, AMOUNTS, st.sampled_from([" or ", ", ", " to ", " and ", "-", "\n#### ", " * ", ": ", " of "]))
def test_numeric_takes_no_one_of_two(n: object, other: object, between: str) -> None:
    """A text that says two different numbers matches neither."""
    if Fraction(str(n)) != Fraction(str(other)):
        text = f"#### {n}{between}{other}"
        assert not numeric_match(text, f"#### {n}")
        assert not numeric_match(text, f"#### {other}")


@given(st.text(max_size=300), st.text(max_size=300))
@example("#### ¹²³", "#### ⅐⅐")
@example("\\boxed{", "####")
def test_verifiers_never_fail(output: str, answer: str) -> None:
    """Any text gets a verdict, and a text that can be compared equals itself."""
    for verify in (numeric_match, exact_match, choice_match):
        assert verify(output, answer) in (True, False)
        if verify(output, answer):
            assert verify(output, output)
            assert verify(answer, output)


@given(
    st.lists(
        st.sampled_from(["#### ", "answer is ", "12", "1,000", ".5", " ", "-", "/", "=", "%", "$", "five", "\\frac{", "{", "}", "\n", "½"])
    )
)
def test_numeric_is_symmetric_on_fragments(parts: list[str]) -> None:
    """What is made of pieces of numbers is read, or is not, without an error; what is read equals what was read of it."""
    text = "".join(parts)
    if numeric_match(text, text):
        assert numeric_match(f"#### {final_answer(text)}", text)


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 200_000, "####" * 60_000, "1" * 250_000, "1," * 100_000, "1 " * 100_000, "- $ " * 60_000, "the answer is " * 15_000,
        "#### 1 2 " * 20_000, "=" * 200_000, "#### 1=" + "1+" * 100_000, "answer to " * 20_000, "\\boxed{{" * 30_000, "<<" * 100_000,
        "\\frac{" * 30_000, "1/" * 100_000, "five or " * 30_000, "½" * 100_000, "A:\n" * 60_000, "is 5. " * 40_000,
        "*a " * 80_000, "$" * 250_000, "\\boxed{5} " * 25_000, "5 max " * 40_000, "#### a " + "6, not 5 because " * 15_000,
    ],
)  # fmt: skip
def test_the_longest_texts_have_no_answer(text: str) -> None:
    """Texts of the longest allowed length, on which a pattern that reads again and again would not end, say nothing for certain."""
    assert final_answer(text) is None
    assert [letter for letter in "AB" if choice_match(text, f"#### {letter}")] == []


@pytest.mark.parametrize("lead", ["absolute value of", "than twelveletter", "log_{abcdefgh}", "difference of", "3  and", "- {"])
@pytest.mark.parametrize("blanks", [" ", " ```", "**` "])
def test_longest_words_before_a_number_count(lead: str, blanks: str) -> None:
    """What stands before a number is looked at as far as its longest word and the blanks after it go, whatever stands before that."""
    for before in ("", "the box has ", "pears and apples " * 8):
        assert final_answer(f"#### {before}{lead}{blanks}5") is None
    assert final_answer("#### negative  $5") == "negative  $5"


def test_marked_answers_that_agree_are_one() -> None:
    """However many there are; one that differs, is denied or cannot be read is enough for none, wherever it stands."""
    same = ["#### 5 apples\n"] * 4_000
    assert final_answer("".join(same)) == "5"
    for other in ("#### 6 apples\n", "#### not 5\n", "#### 5 or so\n", "#### 5 6\n"):
        for place in (0, 2_000, 4_000):
            assert final_answer("".join([*same[:place], other, *same[place:]])) is None
    assert final_answer("#### none\n" + "".join(same)) == "5", "what stands before the first"


def test_exact_ignores_case_and_blanks() -> None:
    """Compared is what stands after the last marker, or the whole text."""
    assert exact_match("It is\n####  Paris ", "#### paris")
    assert not exact_match("Paris", "Rome")
    assert not exact_match("", "")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("Because … the answer is (B).", "B"),
        ("#### B", "B"),
        ("The answer is A because I said so.", "A"),
        ("Answer: B, as A is too small", "B"),
        ("**Answer:** C", "C"),
        ("A train leaves.\nB", "B"),
        ("the answer is A or B", None),
        ("A or B", None),
        ("I think so", None),
        ("The answer is B. No, A.", None),
        ("The answer is B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B) because it is not red", "B"),
        ("B", "B"),
        ("\\boxed{B}", "B"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("The answer is **(B)**.", "B"),
        ("B. because A is wrong", "B"),
        ("The answer is B because A is wrong.", "B"),
        ("Answer: B. Paris", "B"),
        ("But the answer is B!", "B"),
        ("The correct answer is (B)", "B"),
        ("The answer is not A.\nThe answer is B.", "B"),
        ("Answer: B) Paris, as it is not in Spain", "B"),
        ("The answer is not B.", None),
        ("The answer is B? No", None),
        ("B is wrong", None),
        ("anything but B", None),
        ("#### B\nI mean C", None),
        ("It isn't B", None),
        ("The answer isn't B.", None),
        ("I don't think the answer is B", None),
        ("The answer is B. That is wrong.", None),
        ("not B", None),
        ("Not (B)", None),
        ("B?", None),
        ("B is incorrect.", None),
        ("B is not correct", None),
        ("B cannot be right", None),
        ("everything except B", None),
        ("all but B", None),
        ("It can't be B", None),
        ("If the answer is B", None),
        ("The answer is B, if I am right", None),
        ("\\boxed{B} is wrong", None),
        ("not \\boxed{B}", None),
        ("It is not true that the answer is B.", None),
        ("The answer is B. Wait, C.", None),
        ("#### B\nOops, C", None),
        ("B\nThat is wrong.", None),
        ("(B) is false", None),
        ("Suppose the answer is B.", None),
        ("Answer: B or C", None),
        ("B is eliminated", None),
        ("rule out B", None),
        ("The answer is B. I made a mistake.", None),
        ("Is it B?", None),
        ("It is unlikely to be B", None),
        ("neither B", None),
        ("B was my first answer", None),
        ("#### B\nThe answer is wrong.", None),
        ("I doubt it is B", None),
        ("The answer is B. Sorry, C", None),
        ("No B", None),
        ("~~B~~", None),
        ("none of B", None),
        ("B ❌", None),
        ("B is too small", None),
        ("B+", None),
        ("", None),
    ],
)
def test_choice_takes_the_only_letter(output: str, letter: str | None) -> None:
    """The letter after the last marker, or of the last line with one. Two letters, the words `I` and `A`, and what is denied are none."""
    assert [c for c in "ABCI" if choice_match(output, f"#### ({c})")] == ([letter] if letter else [])


@pytest.mark.parametrize(
    ("pattern", "output", "answer", "correct"),
    [
        (r"Verdict:\s+(\w+)", "Verdict: guilty\nVerdict:  Innocent", "verdict: no\nVerdict: innocent", True),
        (r"Verdict: (\w+)", "Verdict: guilty", "Verdict: innocent", False),
        (r"[a-z]+@[a-z.]+", "write to a@b.org", "A@B.org a@b.org", True),
        (r"x(y)?", "x", "x", False),
        (r"z", "no match", "no match", False),
        (r"\s*", "empty matches only", "empty matches only", False),
        (r"(?i)größe: (.+)", "Größe: 5 µm", "GRÖSSE: 5\nGRÖßE: 5 µm", True),
        (r"a", "a" * 1001, "a", False),
    ],
)
def test_regex_compares_the_last_match(pattern: str, output: str, answer: str, correct: bool) -> None:
    """Its first group or all of it, apart from case and blanks; blank matches and more than 1,000 of them are no answer."""
    verify = find_verifier(Regex(pattern))
    assert verify is not None
    assert verify(output, answer) is correct


@given(st.text(min_size=1, max_size=30), st.text(max_size=100))
def test_regex_gives_a_verdict_or_refuses_the_pattern(pattern: str, text: str) -> None:
    """A pattern is refused when the job is read, or it works on any text."""
    try:
        verify = find_verifier(Regex(pattern))
    except ValueError:
        return
    assert verify is not None
    assert verify(text, text) in (True, False)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*b", r"a.*b|a"])
def test_regex_finds_no_last_match_where_backtracking_would_not_end(pattern: str) -> None:
    """A backtracking engine needs exponential time for these, or has a match at every place: there is no verdict of `correct`."""
    verify = find_verifier(Regex(pattern))
    assert verify is not None
    text = "a" * 100_000 + "c"
    assert verify(text, text) is False


@pytest.mark.parametrize(
    "verifier",
    [{"name": "regex", "pattern": p} for p in ("(", "(?=a)", r"\1", "x" * 1025, "é" * 600, "")]
    + ["words", {"name": "regex"}, {"name": "exact"}, {"name": "regex", "pattern": "a", "flags": "i"}],
)
def test_a_verifier_that_is_none_is_refused_with_its_path(verifier: object) -> None:
    """Patterns that RE2 does not take or that are over 1 KiB, unknown names and unknown fields are errors of the document."""
    with pytest.raises(msgspec.ValidationError, match=r"\$"):
        msgspec.convert({"verifier": verifier}, msgspec.defstruct("Options", [("verifier", Verifier)]))


def test_free_text_has_no_verifier() -> None:
    """`none` verifies nothing."""
    assert find_verifier("none") is None
    assert find_verifier("exact") is exact_match


def test_final_answer_is_shown_as_written() -> None:
    """The critic quotes the answer as the text has it."""
    assert final_answer("so\n#### $1,200") == "$1,200"
    assert final_answer("so\n#### -5.50 % of it") == "-5.50 %"
    assert final_answer("#### 5 or 6") is None
