"""The split of a dataset into training, development and held-out questions."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.dataset import Record
from edge_agent.errors import DatasetEmpty, JobSchema
from edge_agent.job import Fold, Job


@dataclass(frozen=True)
class Split:
    """The parts of a job's records. No question is in two of them, by `same_question`."""

    training: list[Record]
    development: list[Record]
    """All records of the questions that early stopping is decided on."""
    held_out: list[Record]
    """One record for each question to measure on; it has a reference."""


def same_question(text: str) -> str:
    """Return a key that is equal for questions that differ in blanks, case or character forms only."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def split(records: list[Record], evaluation: list[Record] | None, job: Job) -> Split:
    """Return the parts of a job's records; but for the ids of records without one, their order in the file plays no part.

    Held out are the questions of the evaluation file if there is one; else the fold that the job names; else those beyond `limit`;
    else the share `held_out`. Development questions are a share of the training questions. A question without a reference, which
    nothing could be measured against, is never held out. Raises DatasetEmpty where nothing is left to train on, JobSchema for more
    folds than questions.
    """
    groups = _by_question(records)
    questions = sorted(groups)
    random.Random(f"split/{job.seed}").shuffle(questions)
    if evaluation is not None:
        measured = {same_question(r.question) for r in evaluation}
        held_out = measurable(evaluation)
    else:
        references = {q: r for q in questions if (r := next((r for r in groups[q] if r.reference is not None), None))}
        measured = {*(chosen := _held_out(list(references), len(questions), job))}
        held_out = [references[q] for q in chosen]
    questions = [q for q in questions if q not in measured][: job.dataset.limit]
    kept = len(questions) - round(job.evaluation.development * len(questions))
    training, development = ([r for q in part for r in groups[q]] for part in (questions[:kept], questions[kept:]))
    if not training:
        raise DatasetEmpty("dataset.jsonl", "has no record left to train on after holding out")
    return Split(training, development, held_out[: job.evaluation.questions])


def measurable(records: Iterable[Record]) -> list[Record]:
    """Return the first record with a reference of each question that has one."""
    first: dict[str, Record] = {}
    for record in records:
        if record.reference is not None:
            first.setdefault(same_question(record.question), record)
    return list(first.values())


def _by_question(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.question, r.answer or "", r.output or "", r.judgment or "", r.instruction or "")):
        groups.setdefault(same_question(record.question), []).append(record)
    return groups


def _held_out(measurable: list[str], questions: int, job: Job) -> list[str]:
    """Choose of the questions that have a reference, in the order of the shuffle."""
    wanted, limit, count = job.evaluation.held_out, job.dataset.limit, len(measurable)
    if isinstance(wanted, Fold):
        if wanted.of > count:
            raise JobSchema("evaluation.held_out", f"{count} questions that can be measured do not make {wanted.of} folds; ask for fewer")
        return measurable[wanted.fold - 1 :: wanted.of]
    share = round(wanted * questions) if limit is None else max(0, questions - limit)
    return measurable[count - min(job.evaluation.questions, share, count) :]
