"""Verifiers against real model outputs with published verdicts, and against the forms that answers take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.verify import choice, exact, final_answer, numeric


def test_numeric_agrees_with_every_published_verdict(shared_data: Path) -> None:
    """All 2,638 outputs of real models on GSM8K get the verdict that was published with them."""
    lines = (shared_data / "gsm8k" / "model_outputs_6b.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    verdicts = [(row[key], row["answer"]) for row in rows for key in ("finetuning", "verification")]
    assert len(verdicts) == 2638
    wrong = [v["solution"] for v, answer in verdicts if numeric(v["solution"], answer) != v["is_correct"]]
    assert wrong == []


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("so 42 apples\n#### 42", "#### 42"),
        ("#### 18.00", "#### 18"),
        ("A: 1,234", "#### 1234"),
        ("The answer is $5.50.", "#### 5.5"),
        ("the answer is -3", "#### -3"),
        ("Final answer: −3", "#### -3"),
        ("#### $-3", "#### -$3"),
        ("it is 50%", "#### 0.5"),
        ("it is 50 %", "#### 50"),
        ("#### 3/4", "#### 0.75"),
        ("#### 1 1/2", "#### 1.5"),
        ("we get 7 and then 8", "#### 8"),
        ("#### 12 dollars each", "#### 12"),
        ("first #### 3, no: #### 4", "#### 4"),
        ("#### 72\n\n3 bananas left", "#### 72"),
        ("The answer is 12\n2 dozen", "#### 12"),
        ("A: 5\n\n2. next", "#### 5"),
    ],
)
def test_numeric_accepts(output: str, answer: str) -> None:
    """Two ways of writing one number are equal."""
    assert numeric(output, answer)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("#### 18.01", "#### 18"),
        ("", "#### 3"),
        ("no idea", "#### 3"),
        ("#### 3", "no number"),
        ("#### 1,234", "#### 1"),
        ("#### 30", "#### 3"),
    ],
)
def test_numeric_refuses(output: str, answer: str) -> None:
    """Other numbers, or none, are not equal."""
    assert not numeric(output, answer)


@given(st.integers(-(10**12), 10**12))
def test_numeric_reads_every_integer_however_written(n: int) -> None:
    """An integer equals itself with separators, with decimals and as a plain word."""
    assert all(numeric(f"so it is\n#### {text}", f"#### {n}") for text in (str(n), f"{n:,}", f"{n}.0"))


@given(st.text(max_size=300), st.text(max_size=300))
def test_verifiers_never_fail(output: str, answer: str) -> None:
    """Any text gets a verdict."""
    for verify in (numeric, exact, choice):
        assert verify(output, answer) in (True, False)


@pytest.mark.parametrize(
    "text", ["\n" * 200_000, "####" * 60_000, "1" * 250_000, "1," * 100_000, "- $ " * 60_000, "the answer is " * 15_000]
)
def test_reading_takes_time_in_proportion_to_the_text(text: str) -> None:
    """Texts of the longest allowed length that a careless pattern would read again and again end well within the deadline."""
    numeric(text, "#### 1")


def test_exact_and_choice() -> None:
    """Case and blanks do not matter to `exact`; `choice` compares the letter."""
    assert exact("It is\n####  Paris ", "#### paris")
    assert not exact("Paris", "Rome")
    assert choice("Because … the answer is (B).", "#### B")
    assert not choice("the answer is C", "#### B")


def test_final_answer_is_shown_as_written() -> None:
    """The critic quotes the answer as the text has it."""
    assert final_answer("so\n#### $1,200") == "$1,200"
