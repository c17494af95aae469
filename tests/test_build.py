"""Datasets are built from questions and standard answers, by parts: outputs, the draw among them, and their judgments."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
import torch
from chat_server import COST, KEY, Server, endpoint, said
from conftest import DEADLINE_S, TINY, Cli, write_domain
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import silent

from edge_agent.critic import judge_output
from edge_agent.dataset import Record, file_sha256, is_correct, read_records
from edge_agent.errors import BuildConflict, DatasetEmpty, RecordTooLong
from edge_agent.files import lock_file
from edge_agent.job import Dataset, Evaluation, Job, Judging, NlftOptions, Sampling, Schedule
from edge_agent.job_building import build_job, build_options
from edge_agent.job_directory import JobDirectory
from edge_agent.journal import Journal
from edge_agent.prompts import PROMPTS
from edge_agent.runner import Trainer, TrainerEnded
from edge_agent.training.build import build_dataset
from edge_agent.training.completion import JUDGMENT_TOKENS, Completion, draw, judge_outputs, own_outputs, sample_outputs
from edge_agent.training.contexts import prompt_ids
from edge_agent.training.prepare import prepare_files
from edge_agent.verify import numeric_match
from profiles.device import device_profile
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model

VERDICT = partial(is_correct, verifier=numeric_match)
torch.set_num_threads(1)


# parts and the draw


def test_journal_cut_anywhere_keeps_the_whole_rows_before_the_cut(tmp_path: Path) -> None:
    """Wherever writing ended, the rows before are there, and rows that are added then stand after them."""
    file = tmp_path / "rows.jsonl"
    journal = Journal(file, list[int])
    for row in ([1], [22, 3], []):
        journal.append(row)
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        taken_up = Journal(file, list[int])
        assert taken_up.rows == [[1], [22, 3], []][: whole[:cut].count(b"\n")]
        taken_up.append([9])
        assert Journal(file, list[int]).rows == taken_up.rows
    file.write_bytes(b"[1]\n\xff\n[2]\n")
    assert Journal(file, list[int]).rows == [[1]]


def _outputs(verdicts: list[list[bool]]) -> list[Record]:
    """Questions with an output for every verdict, or without any."""
    records = []
    for q, outputs in enumerate(verdicts):
        texts = [f"way {k} #### {7 if correct else 8}" for k, correct in enumerate(outputs)] or [None]
        records += [Record(f"question {q}", "#### 7", text, id=f"{q}/{k}") for k, text in enumerate(texts)]
    return records


def _kinds(records: list[Record]) -> Counter[bool]:
    return Counter(VERDICT(r) for r in records if r.output is not None)


VERDICTS = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=12)


@given(VERDICTS, st.floats(0, 1), st.integers(0, 9))
def test_draw_gives_the_share_and_loses_no_question(verdicts: list[list[bool]], share: float, seed: int) -> None:
    """The scarce kind is whole, the other is as large as the share asks for; every question is there, in order; the seed decides."""
    records = _outputs(verdicts)
    drawn = draw(records, VERDICT, Sampling(correct_share=share), seed)
    before, after = _kinds(records), _kinds(drawn)
    if before[True] and before[False]:
        assert after[True] == before[True] or after[False] == before[False] or share in (0, 1)
        assert abs(after[True] - share * after.total()) <= 1
    elif 0 < share < 1:
        assert after == before
    assert [r.question for r in drawn] == sorted((r.question for r in drawn), key=lambda q: int(q.split()[1]))
    assert {r.question for r in drawn} == {r.question for r in records}
    assert [r for r in drawn if r.output is not None] == [r for r in records if r in drawn and r.output is not None]
    assert draw(records, VERDICT, Sampling(correct_share=share), seed) == drawn


def test_draw_spreads_over_the_questions() -> None:
    """Of 10 questions with 8 wrong outputs each, beside one with 10 correct ones, each gives one wrong output; another seed, others."""
    records = _outputs([[False] * 8] * 10 + [[True] * 10])
    drawn = {seed: draw(records, VERDICT, Sampling(correct_share=0.5), seed) for seed in (1, 2)}
    for rows in drawn.values():
        assert Counter(r.question for r in rows) == {f"question {q}": 1 if q < 10 else 10 for q in range(11)}
    assert drawn[1] != drawn[2]
    assert draw(records, VERDICT, Sampling(), 1) == records


def test_draw_bounds_the_outputs_of_a_question() -> None:
    """`per_question` holds for each kind, before the share is drawn."""
    records = _outputs([[True] * 5 + [False] * 4, [True], []])
    drawn = draw(records, VERDICT, Sampling(per_question=2), 1)
    assert [len([r for r in drawn if r.question == f"question {q}"]) for q in range(3)] == [4, 1, 1]
    assert _kinds(draw(records, VERDICT, Sampling(per_question=2, correct_share=0.5), 1)) == {True: 2, False: 2}


def test_draw_and_judging_take_records_without_a_standard_answer(tmp_path: Path) -> None:
    """Their verdict is their judgment: they are drawn by it, are gone where they are not drawn, and nobody judges them again."""
    bare = [Record(f"q{n}", None, f"text {n}", "It is rude." if n else None, id=str(n)) for n in range(5)]
    answered = Record("q9", "#### 7", "#### 7", id="9", instruction="Answer in verse.")
    assert draw(bare, VERDICT, Sampling(correct_share=0.5), 1)[0] == bare[0]
    assert len(draw(bare, VERDICT, Sampling(correct_share=0.5), 1)) == 2
    kept = draw([*bare, answered], VERDICT, Sampling(correct_share=0.0), 1)
    assert kept == [*bare[1:], msgspec.structs.replace(answered, output=None)]
    completion = _completion((None, None), tmp_path)
    judged, counts, _ = judge_outputs(completion, [*bare, answered])
    assert judged == [*bare, answered]
    assert (counts.given, counts.critic) == (4, 0)


def test_own_outputs_keep_all_that_their_record_says() -> None:
    """The model's own outputs have the question, the standard answer and the instruction of their record."""
    record = Record("q", "#### 7", id="a", instruction="Answer in verse.")
    assert own_outputs([record], ["#### 7", " #### 7", ""], 3) == [msgspec.structs.replace(record, output="#### 7", id="a/1")]


# the model


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """The shipped model and its tokenizer."""
    files = find_model(str(TINY))
    return load_model(files, device_profile("cpu")), load_tokenizer(files)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domain(tmp_path_factory.mktemp("questions") / "chain.jsonl", "chain", 8, 5)


def _completion(tiny: tuple[Any, Any], directory: Path, **more: Any) -> Completion:
    given = {
        "prompts": PROMPTS["worked"], "sampling": Sampling(outputs=2), "judging": Judging(), "endpoint": None, "is_correct": VERDICT,
        "seed": 3, "context_tokens": 2048, "contexts": ("standard", "judge"), "max_new_tokens": 40, "batch": 4, "progress": silent,
    }  # fmt: skip
    return Completion(model=tiny[0], tokenizer=tiny[1], directory=directory, **given | more)


def test_sampling_goes_on_at_any_batch_with_the_same_outputs(tiny: tuple[Any, Any], questions: Path, tmp_path: Path) -> None:
    """Cut after any batch, or inside one, the rest is sampled and nothing before it; the records are identical."""
    records = read_records(questions)
    whole, _, resumed = sample_outputs(_completion(tiny, tmp_path), records)
    assert not resumed
    assert len({r.question for r in whole}) == len(records) < len(whole)
    file = tmp_path / "outputs.jsonl"
    content = file.read_bytes()
    batches = content.count(b"\n")
    for kept in (0, 2, batches):
        lines = content.splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:20])
        heard: list[int] = []
        again, _, resumed = sample_outputs(_completion(tiny, tmp_path, progress=lambda done, *_, heard=heard: heard.append(done)), records)
        assert again == whole
        assert resumed == (kept > 0)
        assert heard == [4 * n for n in range(kept + 1, batches + 1)]
        assert file.read_bytes() == content


def test_model_judges_what_fits_its_context(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """Wrong outputs get one bounded line of the model, resumed by batch; a given judgment stays, a too long request goes to the critic,
    and correct outputs get none."""
    asked = [("Ana has 3 boxes of 4 pens. How many pens?", f"<<3*4={n}>>\n#### {n}") for n in (13, 14, 15, 12)]
    records = [Record(q, "<<3*4=12>>\n#### 12", text, id=str(i)) for i, (q, text) in enumerate(asked)]
    records[1] = msgspec.structs.replace(records[1], judgment="given")
    records.append(msgspec.structs.replace(records[0], output="so " * 200 + "#### 13", id="long"))
    request = PROMPTS["worked"].judging_messages(records[0].question, records[0].answer or "", records[0].output or "")
    limit = len(prompt_ids(tiny[1], request)) + JUDGMENT_TOKENS + 10
    completion = _completion(tiny, tmp_path, judging=Judging("model"), context_tokens=limit, batch=1)
    judged, counts, resumed = judge_outputs(completion, records)
    assert (counts.given, counts.model, counts.critic, counts.endpoint, resumed) == (1, 2, 1, 0, False)
    assert [r.judgment for r in judged[1:]][::2] == ["given", None]
    assert judged[4].judgment == judge_output(records[4].output or "", records[4].answer or "")
    for record in (judged[0], judged[2]):
        assert record.judgment
        assert len(tiny[1](record.judgment)["input_ids"]) <= JUDGMENT_TOKENS
    file = tmp_path / "judgments.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert judge_outputs(completion, records) == (judged, counts, True)


def test_judgment_of_an_endpoint_fits_the_plan(tiny: tuple[Any, Any], server: Server, tmp_path: Path) -> None:
    """A long text with special tokens of the tokenizer keeps at most 128 tokens, none of them special; of what is empty then the critic
    judges."""
    tokenizer = tiny[1]
    special = tokenizer.eos_token
    server.script = [said(f"Step 1 {special} is wrong. " + "x y z " * 150), said(special)]
    records = [Record("q?", "#### 7", f"#### {n}", id=str(n)) for n in (8, 9)]
    completion = _completion(tiny, tmp_path, judging=Judging("endpoint", "stub"), endpoint=endpoint(server, None))
    judged, counts, _ = judge_outputs(completion, records)
    ids = tokenizer(judged[0].judgment)["input_ids"]
    assert 100 < len(ids) <= JUDGMENT_TOKENS
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert judged[1].judgment == "The final answer is 9. It should be 7."
    assert (counts.endpoint, counts.critic, counts.requests) == (1, 1, 2)
    assert counts.spent == pytest.approx(2 * COST)


def test_cut_off_outputs_are_dropped_and_counted(tiny: tuple[Any, Any], questions: Path, tmp_path: Path) -> None:
    """What has no end has no final answer and no end-of-sequence to train on; with room for all, nothing is cut off."""
    records = read_records(questions)[:4]
    short, cut_off, _ = sample_outputs(_completion(tiny, tmp_path, max_new_tokens=5), records)
    assert (short, cut_off) == (records, 8)
    whole, cut_off, _ = sample_outputs(_completion(tiny, tmp_path, max_new_tokens=120), records)
    assert cut_off == 0
    assert all(r.output for r in whole)


def test_record_that_leaves_no_room_is_named(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """A question that fills the context with its standard answer is an error, not a cut output."""
    records = [Record("how many? " * 60, "#### 7", id="r7")]
    with pytest.raises(RecordTooLong, match=r"record r7.* with its standard answer or a judgment"):
        sample_outputs(_completion(tiny, tmp_path, context_tokens=200), records)


def test_job_that_cannot_write_its_outputs_is_refused_before_its_model_is_loaded(tmp_path: Path) -> None:
    """By the room that the method needs: a question that is too long beside a judgment is not too long for SFT on outputs; and where a
    method has nothing to train on, whatever would be sampled."""
    data = tmp_path / "data.jsonl"
    long = {"question": "many? " * 300, "answer": "so " * 400 + "#### 7", "id": "r7"}
    data.write_text("".join(json.dumps(row) + "\n" for row in [long, {"question": "q", "answer": "#### 7"}]))
    fields = {"budget_bytes": 2**33, "evaluation.questions": 0, "evaluation.max_new_tokens": 40, "device": "cpu"}

    def prepared(*settings: str) -> Any:
        return prepare_files(build_job(str(TINY), data, None, fields, settings), read_records(data), None)

    with pytest.raises(RecordTooLong, match="record r7"):
        prepared("method.name=nlft", "evaluation.held_out=0").plan()
    assert prepared("method.name=sft", "method.targets=outputs", "evaluation.held_out=0").plan().peak_bytes
    for settings in (["method.name=sft", "method.targets=outputs"], ["method.name=cut"]):
        with pytest.raises(DatasetEmpty, match="nothing to train on"):
            prepared(*settings, "sampling.outputs=0")


# the command


def _build(questions: Path, out: Path, config: Path) -> list[str]:
    return [
        "dataset", "build", "--model", str(TINY), "--data", str(questions), "--out", str(out), "--outputs", "2", "--max-new-tokens", "40",
        "--batch", "2", "--correct-share", "0.25", "--judge", "endpoint:stub", "--config", str(config), "--device", "cpu", "--json",
    ]  # fmt: skip


def _kill_in_sampling(command: list[str], file: Path, batches: int) -> None:
    """Start the command and kill it when some batches are there."""
    process = subprocess.Popen([sys.executable, "-m", "edge_agent", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not file.exists() or file.read_bytes().count(b"\n") < batches:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)


@pytest.mark.slow
def test_killed_build_goes_on_to_the_same_dataset(questions: Path, server: Server, key_file: Path, tmp_path: Path, cli: Cli) -> None:
    """Killed in the middle of sampling, the same command writes the file that an uninterrupted build writes, and says what it did;
    with another option, or where another file stands, it is refused; the dataset is one that `train` reads."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'node = "n"\nstate_directory = "s"\nbudget = "1GiB"\nmodels = {{}}\n[judges.stub]\nurl = "{server.url}"\nmodel = "judge-1"\n'
        f'key_file = "{key_file}"\ninput_price = 1\noutput_price = 10\nspending_cap = 1\n'
    )
    options = build_options("endpoint:stub", {
        "sampling.outputs": 2, "sampling.correct_share": 0.25, "evaluation.max_new_tokens": 40, "evaluation.batch": 2, "device": "cpu",
    })  # fmt: skip
    judges = {"stub": endpoint(server, key_file)}
    whole = build_dataset(str(TINY), questions, tmp_path / "whole.jsonl", options, silent, judges)
    out = tmp_path / "killed.jsonl"
    _kill_in_sampling(_build(questions, out, config), tmp_path / "killed.jsonl.build" / "outputs.jsonl", 2)
    assert (tmp_path / "killed.jsonl.build" / "outputs.jsonl").read_bytes().count(b"\n") < 8
    assert not out.exists()
    ran = cli(*_build(questions, out, config))
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["resumed"] is True
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ran.json["sha256"] == whole.sha256 == file_sha256(out)
    assert msgspec.convert(ran.json["judgments"], type(whole.judgments)) == whole.judgments

    records = read_records(out)
    kinds = _kinds(records)
    assert (whole.records, whole.correct, whole.incorrect) == (len(records), kinds[True], kinds[False])
    assert (whole.questions, whole.outputs, whole.judgments.endpoint) == (8, 16, kinds[False])
    assert kinds[True] == round(0.25 / 0.75 * kinds[False]) or kinds[False] == round(3 * kinds[True])
    assert all((r.judgment or "").startswith("Wrong: ") for r in records if r.output and not VERDICT(r))
    assert KEY not in "".join(f.read_text() for f in [out, *(tmp_path / "killed.jsonl.build").iterdir()]) + ran.out + ran.err

    other = msgspec.structs.replace(options, seed=7)
    for place, options_there in ((out, other), (questions, options)):
        content = place.read_bytes()
        with pytest.raises(BuildConflict, match="give another --out"):
            build_dataset(str(TINY), questions, place, options_there, silent, judges)
        assert place.read_bytes() == content


def test_build_says_what_is_wrong_with_its_dataset(tmp_path: Path) -> None:
    """Questions without an output and a share that cannot be drawn are named; what the data brought is judged and kept."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": "q1", "answer": "#### 7", "output": "3+5=8 #### 8"}, {"question": "q2", "answer": "#### 7", "id": "mine"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = build_options(None, {"sampling.outputs": 0, "sampling.correct_share": 0.5, "device": "cpu"})
    built = build_dataset(str(TINY), data, tmp_path / "out.jsonl", options, silent, {})
    assert built.problems == [
        "1 records have no output that is not blank (mine)", "all outputs are incorrect: correct_share could not be drawn, all are kept",
    ]  # fmt: skip
    assert (built.correct, built.incorrect, built.judgments.critic) == (0, 1, 1)
    first, second = read_records(tmp_path / "out.jsonl")
    assert first.judgment == "The final answer is 8. It should be 7."
    assert (second.output, second.id) == (None, "mine")


def test_build_without_a_verifier_samples_nothing(tmp_path: Path) -> None:
    """In free text nothing tells which outputs would be correct; those given are correct unless they are judged."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"q{n}", "answer": "a", "output": "b", "judgment": j} for n, j in enumerate(["It is rude.", None])]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "q2", "answer": "a"}]))
    options = build_options(None, {"evaluation.verifier": "none", "sampling.per_question": 1, "device": "cpu"})
    built = build_dataset(str(TINY), data, tmp_path / "out.jsonl", options, silent, {})
    assert (built.outputs, built.correct, built.incorrect, built.judgments.given) == (0, 1, 1, 1)
    assert built.problems[0].startswith("the verifier 'none' tells no correct outputs")
    assert [r.output for r in read_records(tmp_path / "out.jsonl")] == ["b", "b", None]


def test_build_compares_by_a_regex(tmp_path: Path, cli: Cli) -> None:
    """The pattern is an option of the command, and part of what the build is known by."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{"question": "q", "answer": "x=7", "output": f"so x={n}"} for n in (7, 8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["dataset", "build", "--model", str(TINY), "--data", str(data), "--out", str(out), "--device", "cpu", "--json"]
    ran = cli(*command, "--verifier", r"regex:x=(\d+)")
    assert (ran.json["correct"], ran.json["incorrect"], ran.json["judgments"]["critic"]) == (1, 1, 1)
    other = cli(*command, "--verifier", r"regex:x=\d+")
    assert other.json["error"]["code"] == "conflict"


# the job


@pytest.mark.slow
def test_job_is_judged_by_an_endpoint_of_its_node(questions: Path, server: Server, key_file: Path, tmp_path: Path) -> None:
    """Started as the agent starts it, the trainer judges through the endpoint within its plan, and reports how many and for how much;
    the key is on no command line, in no environment and in no file of the job."""
    job = Job(
        model=str(TINY), dataset=Dataset(file_sha256(questions)), budget_bytes=2**31, device="cpu", method=NlftOptions(references="once"),
        sampling=Sampling(outputs=2), judging=Judging("endpoint", "stub"), evaluation=Evaluation(questions=0, max_new_tokens=40),
        schedule=Schedule(updates=1, batch=2),
    )  # fmt: skip
    directory = JobDirectory(tmp_path / "job")
    directory.create(job, questions, None)
    lock = lock_file(tmp_path / "lock")
    assert lock is not None
    events: SimpleQueue[Any] = SimpleQueue()
    trainer = Trainer("j", directory.path, lock, 600.0, 1, events, {"stub": endpoint(server, key_file)})
    process = Path(f"/proc/{trainer.pid}")
    shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    assert KEY.encode() not in shown
    while not isinstance(ended := events.get(timeout=DEADLINE_S), TrainerEnded):
        pass
    assert ended.code == 0, (directory.path / "trainer.log").read_text()
    result = directory.read_result()
    assert result is not None
    assert result.data is not None
    judgments = result.data.judgments
    assert (judgments.endpoint, judgments.critic, judgments.stopped) == (result.data.incorrect_outputs, 0, None)
    assert judgments.requests == len(server.requests) == judgments.endpoint > 0
    assert judgments.spent == pytest.approx(COST * judgments.requests)
    [row] = [row for row in result.stages if row.stage == "judge"]
    assert 0 < row.peak_bytes <= (row.planned_bytes or 0)
    assert row.tokens == 20 * judgments.requests
    assert not [f for f in directory.path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


@pytest.mark.slow
def test_judging_model_is_part_of_the_plan(questions: Path, tmp_path: Path) -> None:
    """A job whose model judges plans for the longest request with its judgment; where the critic judges, that stage takes nothing more."""
    peaks = {}
    for source in ("critic", "model"):
        job = build_job(str(TINY), questions, None, {"budget_bytes": 2**33, "method.name": "nlft"}, [f"judging.source={source}"])
        work = prepare_files(job, read_records(questions), None)
        peaks[source] = work.plan().planned_bytes("judge") or 0, work.plan().planned_bytes("sample") or 0
    longest = max(len(prompt_ids(work.tokenizer, work.prompts.judging_messages(r.question, r.answer or "", ""))) for r in work.training)
    assert work.lengths.judge == (longest + 256, JUDGMENT_TOKENS)
    assert peaks["model"][0] > peaks["model"][1] == peaks["critic"][1] > peaks["critic"][0]
