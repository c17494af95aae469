"""Datasets: every form becomes the same records, every wrong line is named, and methods take of a record what it has."""

from __future__ import annotations

import json
import re
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import write_lines
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.dataset import FORMS, Record, is_correct, read_records, read_rows, write_records
from edge_agent.errors import DatasetEmpty, DatasetSchema, DatasetTooLarge, EdgeAgentError, RecordTooLong
from edge_agent.job import NlftOptions, SftOptions
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.json_items import MAX_FILE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS, json_items
from edge_agent.prompts import PROMPTS
from edge_agent.training.contexts import contexts_of, record_ids
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.methods.sft import Sft
from edge_agent.training.prepare import prepare_files
from edge_agent.training.run import run_job
from edge_agent.verify import numeric_match
from quantization.load import load_tokenizer
from quantization.model_files import find_model

# --- forms


def _chat(*said: tuple[str, str], **more: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said], **more}


FORMED = [
    ({"question": "q", "answer": "a\n#### 1"}, Record("q", "a\n#### 1", id="line-1")),
    ({"question": "q", "output": "o", "judgment": "j", "id": "x", "instruction": "i"}, Record("q", None, "o", "j", "x", "i")),
    ({"instruction": "do", "input": "", "output": "o"}, Record("do", None, "o", id="line-1")),
    ({"instruction": "do", "input": "this", "output": "o", "judgment": None, "id": 7}, Record("do\n\nthis", None, "o", id="7")),
    ({"instruction": "do", "output": "o", "judgment": "j", "answer": "a"}, Record("do", "a", "o", "j", "line-1")),
    (_chat(("user", "q"), ("assistant", "a")), Record("q", "a", id="line-1")),
    (_chat(("system", "s"), ("user", "q"), ("assistant", "a"), output="o"), Record("q", "a", "o", None, "line-1", "s")),
    (_chat(("user", "q"), output="o", judgment="j", answer="a", id=3), Record("q", "a", "o", "j", "3")),
]


@pytest.mark.parametrize(("document", "record"), FORMED)
def test_each_form_becomes_a_record(document: dict[str, Any], record: Record, tmp_path: Path) -> None:
    """Native, GSM8K, Alpaca with and without judgment, and chats give the record that docs/dataset.md says."""
    assert read_records(write_lines(tmp_path / "d.jsonl", document)) == [record]
    assert read_records(write_lines(tmp_path / "d.json", b"[", document, b"]")) == [
        msgspec.structs.replace(record, id=str(record.id).replace("line", "item"))
    ]


def test_gsm8k_is_read_as_it_is(shared_data: Path) -> None:
    """All 7,473 lines of GSM8K's training file are records with its own texts."""
    file = shared_data / "gsm8k" / "train.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(r.question, r.answer, r.output) for r in read_records(file)] == [(x["question"], x["answer"], None) for x in lines]
    assert len(lines) == 7473


def test_cut_is_read_as_it_is(shared_data: Path) -> None:
    """CUT's array of 1,000 gives 287 incorrect outputs with their judgments and 713 demonstrations, with its own texts and ids."""
    file = shared_data / "cut" / "alpaca_judged_iter1.json"
    raw, records = json.loads(file.read_text(encoding="utf-8")), read_records(file)
    assert [(r.id, r.output, r.judgment, r.answer) for r in records] == [(str(x["id"]), x["output"], x["judgment"], None) for x in raw]
    assert all(r.question.startswith(x["instruction"]) and r.question.endswith(x["input"]) for r, x in zip(records, raw, strict=True))
    assert sum(is_correct(r, numeric_match) for r in records) == 713 == len(records) - 287


GOOD = {"question": "q", "answer": "1"}
WRONG = [
    (b"\xef\xbb\xbf" + b'{"question": "q", "answer": "1"}', "line 1", "byte-order mark"),
    ('{"question": "q"}'.encode("utf-16"), "line 1", "UTF-16"),
    ('{"question": "q"}'.encode("utf-16-le"), "line 1", "UTF-16"),
    (b'{"question": "q", "answer": "1",}', "line 1", "trailing comma"),
    (b'{"question": "q", "answer": "1"},', "line 1", "ends in a comma"),
    (b'{"question": "q", "answer": 1e999}', "line 1", "`$.answer`"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "line 1", "`$.answer`"),
    (b'{"question": "q", "answer": NaN}', "line 1", "malformed"),
    (b'{"question": "\\ud800", "answer": "1"}', "line 1", ""),
    (b'{"question": "\xff", "answer": "1"}', "line 1", "not valid UTF-8"),
    (b'{"question": ' + b"[" * 500_000, "line 1", "nested"),
    (b'{"question": "q", "answer": ' + b"[" * 500_000, "line 1", "nested"),
    (b'{"question": "q"} {"question": "q"}', "line 1", "trailing characters"),
    (b"3", "line 1", "Expected `object`, got `int`"),
    (b'{"prompt": "q"}', "line 1", "none of `question` (native), `messages` (chat), `instruction` (alpaca)"),
    (b'{"question": "q", "answer": "1", "anwser": "1"}', "line 1", "`anwser`"),
    (b'{"question": "q", "answer": " "}', "line 1", "`answer` is blank"),
    (b'{"question": "q", "answer": "1", "judgment": "j"}', "line 1", "`judgment` and no `output`"),
    (b'{"question": "q"}', "line 1", "neither an `answer` nor an `output`"),
    (b'{"instruction": "i", "output": "\\n"}', "line 1", "`output` is blank"),
    (b'{"instruction": "i", "output": "o", "text": "t"}', "line 1", "an unknown field (it takes `answer`, `id`, `input`, `instruction`, "),
    (b'{"instruction": "i", "output": "o", "id": -1}', "line 1", "`$.id`"),
    ({"instruction": "i" * 200_000, "input": "i" * 200_000, "output": "o"}, "line 1", "`instruction` and `input` together"),
    (b'{"messages": []}', "line 1", "`$.messages`"),
    (b'{"messages": [{"role": "user", "content": " "}]}', "line 1", "`content` is blank - at `$.messages[0]`"),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', "line 1", "`$.messages[0].role`"),
    (_chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "line 1", "several exchanges"),
    (_chat(("assistant", "b"), ("user", "a")), "line 1", "`messages` must be"),
    (_chat(("system", "s"), ("assistant", "b")), "line 1", "`messages` must be"),
    (_chat(("user", "a"), ("assistant", "b"), answer="c"), "line 1", "one too many"),
    (b'[{"question": "q", "answer": "1"},]', "item 2", "a comma, and no record"),
    (b'[{"question": "q", "answer": "1"},,{"question": "q", "answer": "1"}]', "item 2", "a comma, and no record"),
    (b'[{"question": "q", "answer": "1"} {"question": "q", "answer": "1"}]', "item 1", "trailing characters"),
    (b'[{"question": "q", "answer": "1"}', "item 1", "no end"),
    (b'[{"question": "q", "answer": "1"}, {"question": "]', "item 2", "no end"),
    (b'[{"question": "q", "answer": "1"}] x', "after item 1", "no part of its array"),
    (b'[{"question": "q", "answer": "1"}}', "after item 1", "no part of its array"),
    (b'[{"question": "q", "answer": "1"}, {"question": "q", "answer": 1}]', "item 2", "`$.answer`"),
    (b"[" * 500_000 + b"]" * 500_000, "item 1", "Expected `object`, got `array`"),
    (b'[{"question": ' + b"[" * 500_000 + b"]" * 500_000 + b"}]", "item 1", "nested"),
]


@pytest.mark.parametrize(("content", "where", "says"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named_with_its_place(content: bytes | dict[str, Any], where: str, says: str, tmp_path: Path) -> None:
    """A file with one wrong line is refused with the place, the field and what is wrong; nothing else ever comes out."""
    with pytest.raises(DatasetSchema) as raised:
        read_records(write_lines(tmp_path / "d.jsonl", content))
    assert str(raised.value).startswith(f"d.jsonl, {where}: ")
    assert says in str(raised.value)


PRIVATE = "Jane Doe, born 1971"
QUOTING: list[dict[str, Any] | bytes] = [
    {"messages": [{"role": PRIVATE, "content": "c"}]},
    {"messages": [{"role": f"{PRIVATE}'s", "content": "c"}]},
    {"messages": [{"role": "user", "content": "c", PRIVATE: "c"}]},
    GOOD | {PRIVATE: "1"},
    GOOD | {f"answers` - at `$.{PRIVATE}": "1"},
    GOOD | {"answer": {PRIVATE: PRIVATE}},
    GOOD | {"id": [PRIVATE]},
    {"instruction": PRIVATE, "id": -1},
    {PRIVATE: PRIVATE},
    {"question": PRIVATE},
    {"question": PRIVATE, "answer": " "},
    _chat(("user", PRIVATE), ("user", PRIVATE)),
    json.dumps(PRIVATE).encode(),
    json.dumps(GOOD).encode() + PRIVATE.encode(),
    b'{"question": "' + PRIVATE.encode(),
    b'{"question": "' + PRIVATE.encode() + b'\xff"}',
    b'{"question": "\\x' + PRIVATE.encode() + b'"}',
    b'{"question": ' + PRIVATE.encode() + b"}",
]


@pytest.mark.parametrize("line", QUOTING, ids=range(len(QUOTING)))
def test_what_is_wrong_quotes_no_text(line: dict[str, Any] | bytes, tmp_path: Path) -> None:
    """What a file holds stays in it, whatever is wrong there: errors go to logs and topics."""
    with pytest.raises(DatasetSchema) as raised:
        read_records(write_lines(tmp_path / "d.jsonl", line))
    assert not {"Jane", "Doe", "born", "1971"} & set(re.findall(r"\w+", str(raised.value)))


def test_a_file_has_one_form(tmp_path: Path) -> None:
    """A record of another form than the first is wrong, in whichever order they come."""
    documents = (GOOD, {"instruction": "i", "output": "o"}, _chat(("user", "q"), ("assistant", "a")))
    for first in documents:
        for second in documents:
            rows = list(read_rows(write_lines(tmp_path / "d.jsonl", first, second)))
            assert [row.record is not None for row in rows] == [True, first is second]


def test_blanks_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    """CRLF, blank lines and a missing last line end change nothing but the numbers of the lines."""
    line = json.dumps(GOOD).encode()
    records = read_records(write_lines(tmp_path / "d.jsonl", line + b"\r", b"", b" \t", b"\t" + line))
    assert [(r.question, r.answer, r.id) for r in records] == [("q", "1", "line-1"), ("q", "1", "line-4")]
    (tmp_path / "d.jsonl").write_bytes(b" " * 200_000 + b"\r\n[\r\n" + line + b"\r\n]\r\n \r\n")
    assert [r.id for r in read_records(tmp_path / "d.jsonl")] == ["item-1"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"[]", b" [ ] "])
def test_a_file_without_records_is_empty(content: bytes, tmp_path: Path) -> None:
    """Nothing, blanks and an empty array are an empty dataset."""
    with pytest.raises(DatasetEmpty):
        read_records(write_lines(tmp_path / "d.jsonl", content))


texts = st.text(min_size=1, max_size=30).filter(str.strip)
awkward = st.lists(st.sampled_from(['"', "\\", "[", "]", "{", "}", ",", "\\\\", "é", "\n", "a", "𝄞"]), min_size=1).map("".join)
readable = st.builds(
    Record,
    question=awkward.filter(str.strip) | texts,
    answer=texts,
    output=texts | st.none(),
    id=st.text(min_size=1, max_size=9).filter(str.strip),
)


@given(st.lists(readable, min_size=1, max_size=8), st.sampled_from([None, 0, 3]), st.booleans())
def test_lines_and_arrays_give_the_same_records(tmp_path_factory: Any, records: list[Record], indent: int | None, ascii_only: bool) -> None:
    """Whatever the texts hold, and however an array is laid out, both kinds of file give back the records."""
    file = tmp_path_factory.getbasetemp() / "same.json"
    file.write_bytes(write_records(records))
    assert read_records(file) == records
    file.write_text(json.dumps(msgspec.to_builtins(records), indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read_records(file) == records


# --- limits


def test_an_array_is_read_a_record_at_a_time(tmp_path: Path) -> None:
    """An array of 24 MiB whose records lie across every block boundary is read whole, with less than 16 MiB held at any time."""
    element = json.dumps({"question": 'q "[{,' * 50_000, "answer": "1"}).encode()
    count = 24 * 2**20 // len(element)
    (tmp_path / "d.json").write_bytes(b"[" + b", ".join([element] * count) + b"]")
    tracemalloc.start()
    try:
        assert sum(item.raw == element for item in json_items(tmp_path / "d.json")) == count
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opening", [b"", b"[", b"[1, "])
def test_limits_are_named(opening: bytes, tmp_path: Path) -> None:
    """A line, or a record of an array, of one byte too many; one record too many; a file of one byte too many."""
    file = tmp_path / "d.jsonl"
    for size in (MAX_RECORD_BYTES - 1, MAX_RECORD_BYTES + 1):
        file.write_bytes(opening + b'"' + b"x" * (size - 2) + b'"' + (b"]" if opening else b""))
        if size < MAX_RECORD_BYTES:
            assert len(list(json_items(file))[-1].raw) == size
            continue
        with pytest.raises(DatasetTooLarge, match=r"(line|item) . is over the limit of 1,048,576 bytes"):
            list(json_items(file))
    separator = b"," if opening else b"\n"
    file.write_bytes(opening[:1] + separator.join([b"1"] * (MAX_RECORDS + 1)) + (b"]" if opening else b""))
    with pytest.raises(DatasetTooLarge, match="record 200,001 is over the limit of 200,000 records"):
        list(json_items(file))
    with file.open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DatasetTooLarge, match=r"the file .* is over the limit"):
        list(json_items(file))


# --- verdicts, prompts, targets


@pytest.mark.parametrize(
    ("record", "by_verifier", "by_judgment"),
    [
        (Record("q", "#### 2", "#### 2"), True, True),
        (Record("q", "#### 2", "#### 3"), False, True),
        (Record("q", "#### 2", "#### 2", "too short"), True, False),
        (Record("q", "#### 2", "#### 3", "wrong"), False, False),
        (Record("q", None, "#### 2"), True, True),
        (Record("q", None, "#### 2", "wrong"), False, False),
        (Record("q", "#### 2"), False, False),
    ],
)
def test_verdicts(record: Record, by_verifier: bool, by_judgment: bool) -> None:
    """The verifier decides where there is one and an answer; else the judgment; no output is not correct."""
    assert is_correct(record, numeric_match) == by_verifier
    assert is_correct(record, None) == by_judgment


MIXED = [
    Record("one", "#### 1", id="answer"),
    Record("two", "#### 2", "so\n#### 2", id="right"),
    Record("two", "#### 2", "so\n#### 3", "Step 1 is wrong.", id="wrong"),
    Record("three", None, "a demonstration", id="demonstration"),
    Record("four", None, "a bad answer", "It is rude.", id="judged"),
    Record("one", "#### 1", id="again", instruction="Be brief."),
]


def test_methods_use_what_a_record_has() -> None:
    """Standard answers once for each instruction, question and text; of outputs the right ones; contexts only where their text exists."""
    verdict = partial(is_correct, verifier=numeric_match)

    def sft(targets: Any) -> list[tuple[str | None, str]]:
        return [(t.record.id, t.text) for t in Sft(SftOptions(targets=targets)).targets(MIXED, verdict)]

    answers = [("answer", "#### 1"), ("right", "#### 2"), ("again", "#### 1")]
    outputs = [("right", "so\n#### 2"), ("demonstration", "a demonstration")]
    assert sorted(sft("answers")) == sorted(answers)
    assert sft("outputs") == outputs
    assert sorted(sft("both")) == sorted(answers + outputs)
    nlft = {(t.record.id, t.text): (t.kind, t.contexts) for t in Nlft(NlftOptions()).targets(MIXED, verdict)}
    assert nlft == {
        **dict.fromkeys(answers, ("correct", ("standard",))),
        ("right", "so\n#### 2"): ("correct", ("standard",)),
        ("wrong", "so\n#### 3"): ("incorrect", ("standard", "judge")),
        ("demonstration", "a demonstration"): ("correct", ()),
        ("judged", "a bad answer"): ("incorrect", ("judge",)),
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(find_model(str(tiny_model)))


def test_the_instruction_of_a_record_replaces_that_of_the_prompts(tokenizer: Any) -> None:
    """In every context that a record has, its own instruction stands in the prompt and that of the set does not."""
    own = Record("two", "#### 2", "#### 3", "Wrong.", instruction="Answer as a pirate.")
    bare = msgspec.structs.replace(own, instruction=None)
    assert contexts_of(own) == ("standard", "judge")
    for context in ("base", "standard", "judge"):
        texts = [tokenizer.decode(record_ids(tokenizer, PROMPTS["worked"], r, context)) for r in (own, bare)]
        assert ["Answer as a pirate." in text for text in texts] == [True, False]
        assert [PROMPTS["worked"].instruction in text for text in texts] == [False, True]


# --- a job


def _plain_alpaca(path: Path, count: int) -> Path:
    return write_lines(path, *({"instruction": f"Say {n}.", "input": "", "output": f"I say {n}: {n}\n#### {n}"} for n in range(count)))


def test_plain_alpaca_trains_with_sft(tmp_path: Path, tiny_model: Path) -> None:
    """A plain Alpaca file trains SFT on its outputs: the questions of no part are in another, and all held-out ones are measured."""
    data = _plain_alpaca(tmp_path / "alpaca.jsonl", 20)
    settings = [
        "method.targets=outputs", "schedule.updates=2", "evaluation.max_new_tokens=8", "evaluation.held_out.fold=2",
        "evaluation.held_out.of=5", "evaluation.development=0.25", "schedule.patience=9",
    ]  # fmt: skip
    job = build_job(str(tiny_model), data, None, {"budget_bytes": 2**31, "method.name": "sft", "device": "cpu"}, settings)
    work = prepare_files(job, read_records(data), None)
    parts = [{r.question for r in part} for part in (work.training, work.development, work.held_out)]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert len(set.union(*parts)) == 20
    long = [msgspec.structs.replace(r, output="word " * 3000) if r == work.development[0] else r for r in read_records(data)]
    with pytest.raises(RecordTooLong, match=str(work.development[0].id)):
        prepare_files(job, long, None).plan()
    directory = JobDirectory(tmp_path / "job")
    directory.create(job, data, None)
    result = run_job(directory, lambda event: None, job)
    assert result.state == "succeeded"
    assert result.data is not None
    assert (result.data.samples, result.data.correct_outputs, result.data.held_out) == (12, 12, 4)
    assert result.accuracy is not None
    assert result.accuracy.after is not None
    assert result.accuracy.after.n == 4


def test_a_reference_without_a_number_is_refused_before_a_model_is_loaded(tmp_path: Path, tiny_model: Path) -> None:
    """Held-out demonstrations that the verifier cannot compare with would make every answer wrong: the job names the record."""
    data = write_lines(tmp_path / "d.jsonl", *({"instruction": f"Say {word}.", "output": word} for word in ("a", "b", "c", "d", "e")))
    job = build_job(str(tiny_model), data, None, {"budget_bytes": 2**31, "method.name": "sft", "device": "cpu"}, ["method.targets=outputs"])
    with pytest.raises(EdgeAgentError, match=r"held-out questions, record line-.: its answer holds nothing that the verifier 'numeric'"):
        prepare_files(job, read_records(data), None).plan()


def test_every_form_is_tried(tmp_path: Path) -> None:
    """The table of forms has no form that a file cannot be of."""
    seen = {next(read_rows(write_lines(tmp_path / "d.jsonl", document))).form for document, _ in FORMED}
    assert seen == set(FORMS)
