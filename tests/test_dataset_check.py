"""`edge-agent dataset check`: what is in a file, what is wrong with which line, and what leaks into an evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Cli, write_lines
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.dataset import Record, read_rows, write_records
from edge_agent.dataset_check import SHOWN, check, spread
from edge_agent.errors import RecordTooLong
from edge_agent.job import Regex
from edge_agent.prompts import PROMPTS
from edge_agent.training.contexts import contexts_of, encode_target
from edge_agent.training.methods.method import Target
from edge_agent.training.token_lengths import longest_context, token_lengths
from quantization.load import load_tokenizer
from quantization.model_files import find_model

GOOD = {"question": "q", "answer": "1"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(find_model(str(tiny_model)))


def test_check_counts_what_is_there(tmp_path: Path) -> None:
    """Duplicates, near-duplicates, verdicts and lengths are those of a file written by hand."""
    file = write_lines(
        tmp_path / "d.jsonl",
        {"question": "How many?", "answer": "#### 2", "output": "#### 2"},
        {"question": "How many?", "answer": "#### 2", "output": "#### 2"},
        {"question": "how  MANY?", "answer": "#### 2", "output": "#### 2"},
        {"question": "How many?", "answer": "#### 2", "output": "#### 2", "judgment": "Too short."},
        {"question": "Who?", "answer": "nobody", "instruction": "Be kind."},
        {"question": "Why?", "answer": "#### 3", "output": "#### 4"},
        {"question": "Where?", "output": "there", "judgment": "Vague."},
    )
    found, records = check(file)
    assert len(records) == found.records == 7
    assert (found.form, found.questions, found.duplicates, found.near_duplicates) == ("native", 4, 2, 1)
    assert (found.with_answer, found.with_output, found.with_judgment, found.with_instruction) == (6, 6, 2, 1)
    assert (found.outputs.correct, found.outputs.incorrect) == (4, 2)
    named = (found.outputs.not_comparable, found.outputs.judged_but_correct, found.outputs.wrong_but_unjudged)
    assert [finding.records for finding in named] == [["line-5"], ["line-4"], ["line-6"]]
    assert msgspec.to_builtins(found.characters.judgment) == {"min": 6, "median": 6, "p95": 10, "max": 10}
    assert found.error is None


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_spread_is_of_the_values(values: list[int]) -> None:
    """Each number is one of the values, and the share that is no longer is at least what it says."""
    found = spread(values)
    assert found is not None
    assert (found.min, found.max) == (min(values), max(values))
    for value, share in ((found.median, 0.5), (found.p95, 0.95)):
        assert value in values
        assert sum(v <= value for v in values) >= share * len(values)
        assert sum(v < value for v in values) < share * len(values)


def test_check_finds_evaluation_questions_in_the_dataset(tmp_path: Path) -> None:
    """Equal, near-duplicate and overlapping questions are counted once each; a question with half of its words in common is not."""
    words = [f"word{n}" for n in range(60)]
    question = " ".join(words)
    data = write_lines(tmp_path / "d.jsonl", {"question": question, "answer": "1"}, {"question": "short one", "answer": "1"})
    evaluation = write_lines(
        tmp_path / "e.jsonl",
        *(
            {"question": text, "answer": "1", "id": name}
            for name, text in {
                "equal": question,
                "near": question.upper() + " ",
                "overlapping": " ".join(["Other", "beginning:", *words[5:]]),
                "half": " ".join([*words[:30], *(f"new{n}" for n in range(30))]),
                "short": "one short",
            }.items()
        ),
    )
    leakage = check(data, evaluation=evaluation)[0].leakage
    assert leakage is not None
    assert (leakage.questions, leakage.equal, leakage.near_duplicates, leakage.overlapping) == (5, 1, 1, 1)
    assert leakage.records == ["equal", "near", "overlapping"]


def test_check_lists_every_wrong_line(tmp_path: Path, cli: Cli) -> None:
    """Wrong lines are listed with their reasons up to 20, then counted; the exit code is that of a dataset error, table or JSON."""
    wrong = [b'{"question": "q"}', *[b"{"] * (SHOWN + 4)]
    file = write_lines(tmp_path / "d.jsonl", GOOD, *wrong, GOOD)
    ran = cli("dataset", "check", file, "--json")
    assert ran.code == 3
    assert (ran.json["records"], ran.json["duplicates"], ran.json["wrong"]) == (2, 1, len(wrong))
    assert [line["where"] for line in ran.json["wrong_lines"]] == [f"line {n}" for n in range(2, SHOWN + 2)]
    assert ran.json["error"]["code"] == "dataset_schema"
    assert ran.json["error"]["text"].endswith("; 24 more are wrong")
    shown = cli("dataset", "check", file)
    assert shown.code == 3
    for words in ("25 wrong", "line 2 ", "neither an `answer` nor an `output`", "line 21 ", "and 5 more"):
        assert words in shown.out
    assert "line 22 " not in shown.out


def test_check_explains_only_what_it_shows(tmp_path: Path) -> None:
    """Of a file of wrong lines alone, each with another field that is almost a known one, most are only counted."""
    file = tmp_path / "d.jsonl"
    file.write_text("".join(f'{{"question": "q", "answer": "1", "answer{n}": "1"}}\n' for n in range(20_000)))
    started = time.process_time()
    problems = [row.problem for row in read_rows(file)]
    all_s, started = time.process_time() - started, time.process_time()
    found, _ = check(file)
    assert time.process_time() - started < all_s / 2
    assert all(problems)
    assert found.wrong == len(problems)
    assert [line.problem for line in found.wrong_lines] == problems[:SHOWN]


def test_check_shows_real_files(shared_data: Path, cli: Cli) -> None:
    """CUT's and GSM8K's own files are shown with their form and counts, and GSM8K's test questions are not in its training file."""
    cut = cli("dataset", "check", shared_data / "cut" / "alpaca_judged_iter1.json")
    assert cut.code == 0, cut.out + cut.err
    for line in ("Alpaca (instruction, input, output)", "with judgment 287", "correct outputs 713", "incorrect outputs 287"):
        assert line in " ".join(cut.out.split())
    gsm8k, _ = check(shared_data / "gsm8k" / "train.jsonl", evaluation=shared_data / "gsm8k" / "test.jsonl")
    assert (gsm8k.form, gsm8k.records, gsm8k.wrong, gsm8k.outputs.not_comparable.count) == ("gsm8k", 7473, 0, 0)
    assert gsm8k.leakage is not None
    assert (gsm8k.leakage.questions, gsm8k.leakage.equal, gsm8k.leakage.near_duplicates) == (1319, 0, 0)


def test_check_counts_tokens_as_a_job_does(tiny_model: Path, tokenizer: Any) -> None:
    """The longest context is to the token what a job computes, whichever it is; a record of one token too many is found."""
    records = [
        Record("How many?", "#### 1", "A longer output.\n#### 2", "No.", "standard"),
        Record("How many?", "#### 1", "#### 2", "A judgment that is longer than the answer.", "judge"),
        Record("How many?", None, "#### 2", None, "base"),
    ]
    for record in records:
        targets = [Target(record, text, "correct", contexts_of(record)) for text in (record.answer, record.output) if text]
        assert longest_context(tokenizer, record) == max(encode_target(tokenizer, PROMPTS["worked"], t, 2048).longest for t in targets)
    room = 2048 - longest_context(tokenizer, Record("How many?", None, "7")) + 1
    fits = [Record("How many?", None, "7" * n, id=str(n)) for n in (room - 1, room, room + 1)]
    refused = [r.id for r in fits if longest_context(tokenizer, r) > 2048]
    tokens = token_lengths([*records, *fits], str(tiny_model))
    assert tokens.too_long.records == refused
    assert refused == [str(room + 1)]
    for record in (r for r in fits if r.id in refused):
        with pytest.raises(RecordTooLong):
            encode_target(tokenizer, PROMPTS["worked"], Target(record, str(record.output), "correct"), 2048)
    assert tokens.texts.answer is not None
    assert tokens.texts.answer.max == len(tokenizer("#### 1")["input_ids"])


def test_check_takes_every_verifier(tmp_path: Path, cli: Cli) -> None:
    """By a regex, and by the judgments alone where the verifier is none; a name in brackets is shown as it is."""
    records = [Record("q", "so [x=7]", text, judgment) for text, judgment in (("it is [x=7]", "Wrong."), ("[x=8]", None), ("none", None))]
    file = tmp_path / "[red]d.jsonl"
    file.write_bytes(write_records(records))
    by_regex, by_judgment = (check(file, verifier)[0].outputs for verifier in (Regex(r"\[x=\d\]"), "none"))
    assert (by_regex.verifier, by_regex.correct, by_regex.incorrect) == (r"regex:\[x=\d\]", 1, 2)
    assert (by_regex.judged_but_correct.count, by_regex.wrong_but_unjudged.count, by_regex.not_comparable.count) == (1, 2, 0)
    assert (by_judgment.verifier, by_judgment.correct, by_judgment.incorrect) == ("none", 2, 1)
    shown = cli("dataset", "check", file, "--verifier", r"regex:\[x=\d\]", "--eval-data", file)
    assert "Verdicts (regex)" in shown.out
    assert "Leakage into [red]d.jsonl" in shown.out


def test_check_refuses_what_it_cannot_use(tmp_path: Path, cli: Cli) -> None:
    """An unknown verifier and an evaluation file that is not there are named."""
    file = write_lines(tmp_path / "d.jsonl", GOOD)
    for option, value, code in (("--verifier", "magic", 4), ("--eval-data", tmp_path / "none.jsonl", 3)):
        ran = cli("dataset", "check", file, option, value, "--json")
        assert (ran.code, str(value) in ran.json["error"]["text"] or "--verifier" in ran.json["error"]["text"]) == (code, True)
