"""What is in a dataset, what is wrong with it, and what of it leaks into an evaluation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Literal

import msgspec

from edge_agent.dataset import Record, Row, file_sha256, is_correct, read_records, read_rows
from edge_agent.errors import DatasetEmpty, DatasetSchema
from edge_agent.job import Verifier
from edge_agent.report import Failure
from edge_agent.splitting import same_question
from edge_agent.verify import find_verifier

SHOWN = 20
"""Wrong lines that are listed, and records that a finding names."""
OVERLAP_WORDS = 8
OVERLAP_SHARE = 0.7
"""A question overlaps where this share of its sequences of that many words stands in training questions (arXiv 2204.02311, section 8)."""
OVERLAP_SAMPLE = 32
"""Sequences that are looked up of each evaluation question, those of the smallest digest: what is held in memory stays small."""


class WrongLine(msgspec.Struct, frozen=True):
    """A line that is no valid record, and why."""

    where: str
    problem: str


class Finding(msgspec.Struct, frozen=True):
    """How many records something is found of, and the ids of the first."""

    count: int
    records: list[str]


class Spread(msgspec.Struct, frozen=True):
    """Of the lengths of texts; the percentile is the nearest rank."""

    min: int
    median: int
    p95: int
    max: int


class Lengths(msgspec.Struct, frozen=True):
    """Lengths of each kind of text, in one unit; None where no record has one."""

    question: Spread | None
    answer: Spread | None
    output: Spread | None
    judgment: Spread | None


class Tokens(msgspec.Struct, frozen=True):
    """Lengths in tokens of a model."""

    model: str
    context_tokens: int
    texts: Lengths
    longest_context: Spread | None
    """Of each record: its longest prompt, in the prompt set `worked`, with the longer of its answer and output."""
    too_long: Finding
    """Records whose longest context does not fit the model's."""


class Outputs(msgspec.Struct, frozen=True):
    """Verdicts on outputs and answers."""

    verifier: str
    correct: int
    incorrect: int
    not_comparable: Finding
    """Standard answers in which the verifier finds nothing to compare."""
    judged_but_correct: Finding
    wrong_but_unjudged: Finding


class Leakage(msgspec.Struct, frozen=True):
    """Evaluation questions that are training questions too; each is counted once, in the first class that fits."""

    file: str
    questions: int
    equal: int
    """The same text."""
    near_duplicates: int
    """The same but for blanks, case and character forms."""
    overlapping: int
    """At least 70 % of its sequences of 8 words stand in training questions."""
    records: list[str]


ShownForm = Literal["native", "gsm8k", "chat", "alpaca"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-agent dataset check` says of a file."""

    file: str
    sha256: str
    form: ShownForm | None
    records: int
    questions: int
    duplicates: int
    near_duplicates: int
    with_answer: int
    with_output: int
    with_judgment: int
    with_instruction: int
    outputs: Outputs
    characters: Lengths
    tokens: Tokens | None = None
    leakage: Leakage | None = None
    wrong: int
    wrong_lines: list[WrongLine]
    error: Failure | None = None


def check(path: Path, verifier: Verifier = "numeric", evaluation: Path | None = None) -> tuple[Check, list[Record]]:
    """Return what is in a file, read to its end whatever is wrong in it, and its valid records.

    Raises DatasetEmpty where there is no line, DatasetTooLarge at a limit, and DatasetSchema for a wrong line of the evaluation file.
    """
    rows = list(read_rows(path, SHOWN))
    if not rows:
        raise DatasetEmpty(path.name)
    records = [row.record for row in rows if row.record]
    wrong = [row for row in rows if row.record is None]
    distinct = {(r.question, r.answer, r.output) for r in records}
    found = Check(
        file=path.name,
        sha256=file_sha256(path),
        form=_form(rows, records),
        records=len(records),
        questions=len({same_question(r.question) for r in records}),
        duplicates=len(records) - len(distinct),
        near_duplicates=len(distinct) - len({tuple(same_question(text or "") for text in texts) for texts in distinct}),
        with_answer=sum(r.answer is not None for r in records),
        with_output=sum(r.output is not None for r in records),
        with_judgment=sum(r.judgment is not None for r in records),
        with_instruction=sum(r.instruction is not None for r in records),
        outputs=_outputs(records, verifier),
        characters=lengths(records, lambda texts: [len(text) for text in texts]),
        leakage=_leakage(records, evaluation) if evaluation else None,
        wrong=len(wrong),
        wrong_lines=[WrongLine(row.where, row.problem) for row in wrong[:SHOWN]],
        error=_failure(path, wrong) if wrong else None,
    )
    return found, records


def _failure(path: Path, wrong: list[Row]) -> Failure:
    first = DatasetSchema(path.name, wrong[0].where, wrong[0].problem)
    return Failure(first.code, f"{first}" + (f"; {len(wrong) - 1:,} more are wrong" if len(wrong) > 1 else ""))


def _form(rows: list[Row], records: list[Record]) -> ShownForm | None:
    """Lines of GSM8K are native records, so only a whole file can be told from others."""
    bare = all(r.output is None and r.instruction is None and "####" in (r.answer or "") for r in records)
    return "gsm8k" if records and bare and rows[0].form == "native" else next((row.form for row in rows if row.form), None)


def find(records: Iterable[Record]) -> Finding:
    """Return how many records these are, and name the first."""
    ids = [r.id or "" for r in records]
    return Finding(len(ids), ids[:SHOWN])


def _outputs(records: list[Record], option: Verifier) -> Outputs:
    verifier = find_verifier(option)
    written = [r for r in records if r.output is not None]
    correct = [r for r in written if is_correct(r, verifier)]
    incorrect = [r for r in written if not is_correct(r, verifier)]
    return Outputs(
        verifier=option if isinstance(option, str) else f"regex:{option.pattern}",
        correct=len(correct),
        incorrect=len(incorrect),
        not_comparable=find(r for r in records if verifier and r.answer is not None and not verifier(r.answer, r.answer)),
        judged_but_correct=find(r for r in correct if r.judgment is not None),
        wrong_but_unjudged=find(r for r in incorrect if r.judgment is None),
    )


def lengths(records: list[Record], measure: Callable[[list[str]], list[int]]) -> Lengths:
    """Return the lengths of all texts; `measure` gives those of a list of texts."""
    kinds = ([r.question for r in records], *([t for r in records if (t := getattr(r, kind))] for kind in ("answer", "output", "judgment")))
    return Lengths(*(spread(measure(texts)) for texts in kinds))


def spread(values: Sequence[int]) -> Spread | None:
    """Return where values lie; None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    median, p95 = (ordered[-(-share * len(ordered) // 100) - 1] for share in (50, 95))
    return Spread(ordered[0], median, p95, ordered[-1])


def _leakage(records: list[Record], evaluation: Path) -> Leakage:
    """Count each question of an evaluation file once; time is linear in the texts."""
    equal = {r.question for r in records}
    same = {same_question(question) for question in equal}
    asked = {r.question: r for r in read_records(evaluation)}
    sampled = {q: nsmallest(OVERLAP_SAMPLE, set(_sequences(q))) for q in asked if same_question(q) not in same}
    wanted = {digest for digests in sampled.values() for digest in digests}
    seen = {digest for question in equal for digest in _sequences(question) if digest in wanted}
    overlapping = {q for q, digests in sampled.items() if digests and len(seen.intersection(digests)) >= OVERLAP_SHARE * len(digests)}
    leaked = [r for q, r in asked.items() if q not in sampled or q in overlapping]
    exact = sum(q in equal for q in asked)
    return Leakage(
        file=evaluation.name,
        questions=len(asked),
        equal=exact,
        near_duplicates=len(asked) - len(sampled) - exact,
        overlapping=len(overlapping),
        records=find(leaked).records,
    )


def _sequences(question: str) -> list[bytes]:
    """Return the digests of all sequences of OVERLAP_WORDS words, without what is no letter or digit."""
    words = re.findall(r"\w+", same_question(question))
    starts = range(len(words) - OVERLAP_WORDS + 1)
    return [hashlib.blake2b(" ".join(words[i : i + OVERLAP_WORDS]).encode(), digest_size=8).digest() for i in starts]
