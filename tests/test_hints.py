"""Strict reading says what it would have taken."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.dataset import FORMS
from edge_agent.hints import LONGEST_TEXT, explain, explain_unquoted
from edge_agent.job import Job

JOB: dict[str, Any] = {"model": "tiny", "dataset": {"sha256": "0" * 64}}
RECORD: dict[str, Any] = {"question": "1 + 1?", "answer": "2"}


def _explained(document: Any, kind: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(document, type=kind)
    text = explain(refused.value, kind)
    assert text.startswith(str(refused.value))
    return text.removeprefix(str(refused.value))


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"schedule": {"epoch": 3}}, " (did you mean `schedule.epochs`?)"),
        ({"epochs": 3}, " (did you mean `schedule.epochs`?)"),
        ({"sampling": {"temprature": 1}}, " (did you mean `sampling.temperature`?)"),
        ({"temperatur": 1}, " (did you mean `evaluation.temperature` or `sampling.temperature`?)"),
        ({"method": {"name": "nlft", "turning_rato": 0.1}}, " (did you mean `method.turning_ratio`?)"),
        ({"budget_byte": 1}, " (did you mean `budget_bytes`?)"),
        ({"zzz": 1}, ""),
        ({"schedule": {"a` - at `$.b": 1}}, ""),
        ({"method": {"name": "nlft", "references": "onec"}}, " (it takes `epoch`, `live`, `once`)"),
        ({"device": "gpu"}, " (it takes `auto`, `cpu`, `cuda`)"),
        ({"evaluation": {"verifier": "numric"}}, " (it takes `choice`, `exact`, `none`, `numeric`)"),
        ({"evaluation": {"verifier": {"name": "regx"}}}, " (it takes `regex`)"),
        ({"schedule": {"epochs": "many"}}, ""),
        ({"schedule": {"epochs": -1}}, ""),
    ],
)
def test_jobs(fields: dict[str, Any], hint: str) -> None:
    """A field with a similar name is told where it stands, words in alphabetical order; what nothing is like gets no hint."""
    assert _explained(JOB | fields, Job) == hint


def test_methods() -> None:
    """A wrong name of a method is answered with every name that there is."""
    assert _explained(JOB | {"method": {"name": "nflt"}}, Job) == " (it takes `cut`, `dft`, `nlft`, `reft`, `sft`)"


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"broker": {"hots": "x"}}, " (did you mean `broker.host`?)"),
        ({"broker": {"host": "x", "protocol": "5.0"}}, " (it takes `3.1.1`, `5`, `auto`)"),
        ({"judges": {"one": {"ulr": "x"}}}, " (did you mean `judges.url`?)"),
    ],
)
def test_configurations(fields: dict[str, Any], hint: str) -> None:
    """Tables of any names are no step of the path."""
    assert _explained({"node": "a", "fleet": "f"} | fields, AgentConfig) == hint


@pytest.mark.parametrize(
    "name", ["x" * 2**20, "[" * 2**20, "` - at `$." * 2**17, "a` - at `$." + "[.]" * 2**18, "a` - at `$.b" + "." * 2**20]
)
def test_name_without_end(name: str) -> None:
    """A megabyte that is no field is neither repeated nor compared, in whatever characters; the words that would do are told still."""
    for document, kind, hint in (
        (JOB | {name: 1}, Job, ""),
        (JOB | {"device": name}, Job, " (it takes `auto`, `cpu`, `cuda`)"),
    ):
        with pytest.raises(msgspec.ValidationError) as refused:
            msgspec.convert(document, type=kind)
        started = time.process_time()
        texts = [explain(refused.value, kind) for _ in range(10)]
        assert time.process_time() - started < 0.1
        assert set(texts) == {str(refused.value)[:LONGEST_TEXT] + hint}


def _explained_unquoted(document: Any, kind: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(document, type=kind)
    return explain_unquoted(refused.value, kind)


NATIVE_FIELDS = "`answer`, `id`, `instruction`, `judgment`, `output`, `question`"
ROLES = " - at `$.messages[0].role` (it takes `assistant`, `system`, `user`)"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"anwser": "2"}, "Object contains unknown field `anwser` (did you mean `answer`?)"),
        *(
            ({name: "2"}, f"Object contains an unknown field (it takes {NATIVE_FIELDS})")
            for name in ("Jane Doe", "", "answer Jane Doe", "answe` - at `$.Jane Doe", "a` - at `$.b", "answer" * 11)
        ),
        ({"answer": 7}, "Expected `str | null`, got `int` - at `$.answer`"),
        ({"question": " "}, "`question` is blank"),
    ],
)
def test_records(fields: dict[str, Any], says: str) -> None:
    """Of a record nothing is quoted, but the name of a field that is hardly another than a known one."""
    assert _explained_unquoted(RECORD | fields, FORMS["native"].type) == says


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "usr", "content": "a"}, f"Invalid value{ROLES}"),
        ({"role": "Jane Doe, born 1971", "content": "a"}, f"Invalid value{ROLES}"),
        ({"role": "it's Jane` - at `$.messages", "content": "a"}, f"Invalid value{ROLES}"),
        (
            {"role": "user", "content": "a", "contents": "b"},
            "Object contains unknown field `contents` - at `$.messages[0]` (did you mean `messages.content`?)",
        ),
        (
            {"role": "user", "content": "a", "Jane Doe": "b"},
            "Object contains an unknown field - at `$.messages[0]` (it takes `content`, `role`)",
        ),
    ],
)
def test_messages_of_records(message: dict[str, Any], says: str) -> None:
    """Within a chat likewise, with the place in it."""
    assert _explained_unquoted({"messages": [message]}, FORMS["chat"].type) == says
