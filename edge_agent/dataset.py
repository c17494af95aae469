"""Records, and the forms of files that they are read from: strict, within limits, and every wrong line with its reason."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_agent.errors import DatasetChecksum, DatasetEmpty, DatasetSchema, DatasetTooLarge, human_bytes
from edge_agent.hints import explain_unquoted
from edge_agent.json_items import MAX_RECORDS, json_items

MAX_CHARACTERS = 2**18
"""Of one text."""

Text = Annotated[str, Meta(min_length=1, max_length=MAX_CHARACTERS)]
Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Verify = Callable[[str, str], bool]
"""(output, standard answer) -> whether the output is correct."""


class _Texts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """No text of it is blank; Alpaca's own files write a missing `input` as an empty text."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, str) and name != "input" and not value.strip():
                raise ValueError(f"`{name}` is blank")


class Record(_Texts, frozen=True):
    """One question with its standard answer, or with an output of a model, or both."""

    question: Text
    answer: Text | None = None
    """The standard answer, worked where the domain has worked answers."""
    output: Text | None = None
    """An answer that a model wrote, or a demonstration."""
    judgment: Text | None = None
    """What is wrong with `output`, in natural language."""
    id: Name | None = None
    """Named in errors and reports; the reader gives `line-7` or `item-7` where a file has none."""
    instruction: Text | None = None
    """Replaces the instruction of the prompt set in this record's system message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer is None and self.output is None:
            raise ValueError("it has neither an `answer` nor an `output`")
        if self.judgment is not None and self.output is None:
            raise ValueError("it has a `judgment` and no `output` that it could be about")

    @property
    def reference(self) -> str | None:
        """What an answer to the question is measured against: the standard answer, else an output that is not judged wrong."""
        return self.answer or (self.output if self.judgment is None else None)

    @property
    def memory_bytes(self) -> int:
        """What it takes as an object; a text with one character beyond its script may take four bytes for each of them."""
        texts = (self.question, self.answer, self.output, self.judgment, self.id, self.instruction)
        return sys.getsizeof(self) + sum(sys.getsizeof(text) for text in texts if text is not None)


def is_correct(record: Record, verifier: Verify | None) -> bool:
    """True where the record's output is correct.

    By the verifier where there is one and the record has a standard answer; otherwise an output with a judgment is incorrect and
    one without is correct.
    """
    if record.output is None:
        return False
    if verifier is None or record.answer is None:
        return record.judgment is None
    return verifier(record.output, record.answer)


class Alpaca(_Texts, frozen=True):
    """The form of Alpaca, of CUT and of NLFT's released data; an output without a judgment is a demonstration."""

    instruction: Text
    input: Annotated[str, Meta(max_length=MAX_CHARACTERS)] | None = None
    output: Text | None = None
    judgment: Text | None = None
    answer: Text | None = None
    id: Number | Name | None = None

    def record(self) -> Record:
        """Return it as a record: its question is the instruction, with the input after a blank line."""
        question = f"{self.instruction}\n\n{self.input}" if self.input and self.input.strip() else self.instruction
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"`instruction` and `input` together are over the limit of {MAX_CHARACTERS:,} characters")
        return Record(question, self.answer, self.output, self.judgment, _name(self.id))


class Message(_Texts, frozen=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Chat(_Texts, frozen=True):
    """A chat of one exchange: a system message if any, the user's, and the assistant's if any."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1024)]
    output: Text | None = None
    judgment: Text | None = None
    answer: Text | None = None
    id: Number | Name | None = None

    def record(self) -> Record:
        """Return it as a record: the assistant's message is its standard answer, the system message its instruction."""
        said = {message.role: message.content for message in self.messages}
        roles = [message.role for message in self.messages]
        if roles.count("user") > 1:
            raise ValueError("`messages` holds several exchanges, and a record is one")
        if roles != [role for role in ("system", "user", "assistant") if role in said] or "user" not in said:
            raise ValueError("`messages` must be a system message if any, one of the user, and one of the assistant if any")
        if self.answer is not None and "assistant" in said:
            raise ValueError("the assistant's message is its answer, so `answer` is one too many")
        answer = said.get("assistant", self.answer)
        return Record(said["user"], answer, self.output, self.judgment, _name(self.id), said.get("system"))


def _name(number: int | str | None) -> str | None:
    return None if number is None else str(number)


FormName = Literal["native", "chat", "alpaca"]


class Form(NamedTuple):
    """A form of records: the field that only it has, its type, and how it becomes a record."""

    mark: str
    type: type
    record: Callable[[Any], Record]


FORMS: dict[FormName, Form] = {
    "native": Form("question", Record, lambda record: record),
    "chat": Form("messages", Chat, Chat.record),
    "alpaca": Form("instruction", Alpaca, Alpaca.record),
}
"""In the order in which they are tried: a native record may have an `instruction` too."""


class Row(NamedTuple):
    """What stands at one place of a file: a record, or what is wrong there."""

    where: str
    form: FormName | None
    record: Record | None
    problem: str = ""
    """Quotes no text of the file; blank past the wrong rows that are explained."""


def read_records(path: Path, room_bytes: int | None = None) -> list[Record]:
    """Read a dataset strictly. Raises DatasetSchema with the first wrong line, DatasetEmpty or DatasetTooLarge.

    Without `room_bytes` the records may take as much memory as they like.
    """
    records, taken_bytes = [], 0
    for row in read_rows(path):
        if row.record is None:
            raise DatasetSchema(path.name, row.where, row.problem)
        records.append(row.record)
        taken_bytes += row.record.memory_bytes
        if room_bytes is not None and taken_bytes > room_bytes:
            limit = f"{human_bytes(room_bytes)} of memory that the budget leaves for it"
            raise DatasetTooLarge(path.name, f"the text up to {row.where}", limit)
    if not records:
        raise DatasetEmpty(path.name)
    return records


def read_rows(path: Path, explained: int = MAX_RECORDS) -> Iterator[Row]:
    """Yield every record of a file and every wrong line in its place, the first `explained` of these with what is wrong; the first record
    decides the form of all.

    Raises DatasetTooLarge, and DatasetEmpty where there is no file.
    """
    if not path.is_file():
        raise DatasetEmpty(str(path), "does not exist, or is no file")
    form: FormName | None = None
    wrong = 0
    for where, raw, problem in json_items(path):
        record = None
        try:
            if not problem:
                form = form or _form_of(raw)
                record = _decode(raw, FORMS[form], where)
        except UnicodeDecodeError:
            problem = "not valid UTF-8"
        except RecursionError:
            problem = "nested too deeply"
        except msgspec.ValidationError as error:
            if wrong < explained:
                problem = explain_unquoted(error, FORMS[form].type) if form else str(error)
        except msgspec.DecodeError as error:
            problem = f"it is no whole JSON object: {error}"
        except ValueError as error:
            problem = str(error)
        wrong += record is None
        yield Row(where, form, record, problem)


def _form_of(raw: bytes) -> FormName:
    fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    for name, form in FORMS.items():
        if form.mark in fields:
            return name
    marks = ", ".join(f"`{form.mark}` ({name})" for name, form in FORMS.items())
    raise ValueError(f"it is of no known form: it has none of {marks}")


def _decode(raw: bytes, form: Form, where: str) -> Record:
    record = form.record(msgspec.json.decode(raw, type=form.type))
    return record if record.id else msgspec.structs.replace(record, id=where.replace(" ", "-"))


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
