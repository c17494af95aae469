"""Records: strict parsing with limits, digest, checks, and the split into training and held-out questions."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.errors import DatasetChecksum, DatasetEmpty, DatasetSchema, DatasetTooLarge
from edge_agent.job import Job

MAX_FILE_BYTES = 256 * 2**20
MAX_LINE_BYTES = 2**20
MAX_RECORDS = 200_000

Text = Annotated[str, Meta(min_length=1, max_length=2**18)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of a dataset. GSM8K's own lines are such records."""

    question: Text
    answer: Text
    """The standard answer, worked where the domain has worked answers."""
    output: Text | None = None
    """A worked answer that a model wrote."""
    judgment: Text | None = None
    """What is wrong with `output`, in natural language."""
    id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """Named in errors and reports; the reader gives `line-7` where a file has none."""

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"`{name}` is blank")


def read_records(path: Path) -> list[Record]:
    """Read a JSONL dataset strictly. Raises DatasetSchema with the line, DatasetEmpty or DatasetTooLarge."""
    records = list(_records(path))
    if not records:
        raise DatasetEmpty(path.name)
    return records


def _records(path: Path) -> Iterator[Record]:
    decode = msgspec.json.Decoder(Record).decode
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DatasetTooLarge(path.name, f"the file ({path.stat().st_size:,} bytes)", f"{MAX_FILE_BYTES:,} bytes")
    count = 0
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise DatasetTooLarge(path.name, f"line {number}", f"{MAX_LINE_BYTES:,} bytes a line")
            if not raw.strip():
                continue
            try:
                record = decode(raw)
            except UnicodeDecodeError:
                raise DatasetSchema(path.name, f"line {number}", "not valid UTF-8") from None
            except msgspec.MsgspecError as error:
                raise DatasetSchema(path.name, f"line {number}", str(error)) from None
            count += 1
            if count > MAX_RECORDS:
                raise DatasetTooLarge(path.name, f"record {count:,}", f"{MAX_RECORDS:,} records")
            yield record if record.id else msgspec.structs.replace(record, id=f"line-{number}")


def write_records(records: Iterable[Record]) -> bytes:
    """Return records as JSONL, in the form that `read_records` reads."""
    return msgspec.json.Encoder().encode_lines(records)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, wanted: str) -> None:
    """Raise DatasetChecksum where the file is not the named one."""
    found = file_sha256(path) if path.is_file() else "missing"
    if found != wanted:
        raise DatasetChecksum(path.name, wanted, found)


def same_question(text: str) -> str:
    """Return a key that is equal for questions that differ in blanks, case or character forms only."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def split(records: list[Record], evaluation: list[Record] | None, job: Job) -> tuple[list[Record], list[Record]]:
    """Return (training records, held-out records) of a job; no question is in both.

    Questions are shuffled by the job's seed. With an evaluation file, its questions are held out and dropped from training;
    with `limit`, the rows left over are; otherwise the share `held_out` is.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(same_question(record.question), []).append(record)
    questions = sorted(groups)
    random.Random(f"split/{job.seed}").shuffle(questions)
    limit, wanted = job.dataset.limit, job.evaluation.questions
    if evaluation is not None:
        held = {same_question(r.question): r for r in evaluation}
        questions = [q for q in questions if q not in held]
        held_out = list(held.values())[:wanted]
    else:
        share = round(job.evaluation.held_out * len(questions)) if limit is None else max(0, len(questions) - limit)
        cut = len(questions) - min(wanted, share)
        held_out = [groups[q][0] for q in questions[cut:]]
        questions = questions[:cut]
    training = [r for q in questions[:limit] for r in groups[q]]
    if not training:
        raise DatasetEmpty("dataset.jsonl", "has no record left to train on after holding out")
    return training, held_out


class Check(msgspec.Struct, frozen=True):
    """What `edge-agent dataset check` says of a file."""

    file: str
    sha256: str
    records: int
    questions: int
    duplicates: int
    with_output: int
    with_judgment: int
    longest_characters: int


def check(path: Path) -> Check:
    """Read a whole dataset strictly and count what is in it; duplicates are records equal in question and output."""
    records = read_records(path)
    distinct = {(r.question, r.output or "") for r in records}
    return Check(
        file=path.name,
        sha256=file_sha256(path),
        records=len(records),
        questions=len({r.question for r in records}),
        duplicates=len(records) - len(distinct),
        with_output=sum(r.output is not None for r in records),
        with_judgment=sum(r.judgment is not None for r in records),
        longest_characters=max(len(r.question) + len(r.answer) + len(r.output or "") + len(r.judgment or "") for r in records),
    )
