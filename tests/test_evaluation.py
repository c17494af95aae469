"""Evaluation on the shipped model: likelihoods against an independent computation, draws, and an adapter that is not accepted."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from conftest import DEADLINE_S, write_domain
from orders import make_offer, make_order
from rich.console import Console
from typer.testing import CliRunner

from edge_agent.answers import Answer, measure, read_answers
from edge_agent.cli import app
from edge_agent.config import AgentConfig, Size
from edge_agent.console import jobs_table
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.dataset import Record
from edge_agent.delivery import Uplink
from edge_agent.demo.problems import problems
from edge_agent.errors import RecordTooLong
from edge_agent.files import check_writable
from edge_agent.job import Dataset, Evaluation, Job
from edge_agent.jobs import Jobs
from edge_agent.messages import JobResult, decode
from edge_agent.mqtt import Link
from edge_agent.prompts import PROMPTS
from edge_agent.rest import Rest
from edge_agent.store import Store
from edge_agent.training.contexts import answer_ids, prompt_ids
from edge_agent.training.evaluate import evaluate
from profiles.device import device_profile
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model


def _run(*arguments: object) -> Any:
    """Run a command in this process, which has loaded its libraries already."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


FREE_TEXT = Evaluation(verifier="none", max_new_tokens=8)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the shipped model, in NF4."""
    torch.set_num_threads(1)
    files = find_model(str(tiny_model))
    return load_model(files, device_profile("cpu")), load_tokenizer(files)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [Record(p.question, p.answer, id=str(n)) for n, p in enumerate(islice(problems("chain", 5), 7))]


def _evaluate(loaded: tuple[Any, Any], records: list[Record], options: Evaluation, **more: int) -> list[Answer]:
    model, tokenizer = loaded
    settings = {"batch": 16, "context_tokens": 2048} | more
    return evaluate(model, tokenizer, records, PROMPTS["worked"], options, progress=lambda *_: None, **settings)


def test_likelihood_equals_an_independent_computation(loaded: tuple[Any, Any], records: list[Record]) -> None:
    """Log-probability and length of every reference, each in a forward pass of its own with the whole softmax."""
    model, tokenizer = loaded
    for row, record in zip(_evaluate(loaded, records, FREE_TEXT, rows=3, chunk=5), records, strict=True):
        prompt, answer = prompt_ids(tokenizer, PROMPTS["worked"].messages(record.question)), answer_ids(tokenizer, record.answer)
        with torch.no_grad():
            logp_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        wanted = sum(logp_TV[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
        assert row.logp == pytest.approx(wanted, abs=2e-3)
        assert (row.reference_tokens, row.verdicts, len(row.outputs)) == (len(answer), [], 1)


def test_likelihood_needs_no_more_logits_than_a_chunk(loaded: tuple[Any, Any], records: list[Record]) -> None:
    """The output head sees at most `chunk` positions at once while references are scored, and their results do not depend on it."""
    model, seen = loaded[0], []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].shape))
    try:
        small = _evaluate(loaded, records, FREE_TEXT, chunk=5)
    finally:
        hook.remove()
    scored = [shape[0] for shape in seen if len(shape) == 2]
    assert max(scored) == 5
    assert sum(scored) == sum(row.reference_tokens or 0 for row in small)
    large = _evaluate(loaded, records, FREE_TEXT, rows=7, chunk=10_000)
    assert [row.logp for row in small] == pytest.approx([row.logp for row in large], abs=1e-3)


def test_a_reference_that_does_not_fit_is_refused(loaded: tuple[Any, Any], records: list[Record]) -> None:
    """The error names the record and its length; nothing is cut off."""
    tokens = len(prompt_ids(loaded[1], PROMPTS["worked"].messages(records[0].question)))
    with pytest.raises(RecordTooLong, match="record 0: its question with its reference takes"):
        _evaluate(loaded, records[:1], FREE_TEXT, context_tokens=tokens + 8)


def test_answers_that_are_cut_off_are_counted(loaded: tuple[Any, Any], records: list[Record]) -> None:
    """With room for a few tokens every answer is cut off, with room for all none is."""
    short, whole = (_evaluate(loaded, records[:3], Evaluation(max_new_tokens=n)) for n in (4, 120))
    assert [a.cut_off for a in short] == [1, 1, 1]
    assert [a.cut_off for a in whole] == [0, 0, 0]
    assert (measure(whole, short).cut_off_before, measure(whole, short).cut_off_after) == (0, 3)


def test_draws_depend_on_the_seed_only(loaded: tuple[Any, Any], records: list[Record]) -> None:
    """`samples` answers a question, each with its verdict; the same seed draws the same, another seed others."""
    options = Evaluation(samples=3, temperature=1.0, max_new_tokens=40)
    first, again, other = (_evaluate(loaded, records[:4], options, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [a.outputs for a in first] != [a.outputs for a in other]
    assert all(len(a.outputs) == len(a.verdicts) == 3 for a in first)
    assert any(len(set(a.outputs)) > 1 for a in first)
    greedy = _evaluate(loaded, records[:4], Evaluation(max_new_tokens=40))
    assert all(len(a.outputs) == 1 for a in greedy)


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A free-text job whose learning rate spoils the model; the command ends with the exit code for that."""
    base = tmp_path_factory.mktemp("ruined")
    data = write_domain(base / "chain.jsonl", "chain", 24, 1)
    ran = _run(
        "train", "--model", tiny_model, "--data", data, "--budget", "2GiB", "--out", base / "job", "--method", "sft", "--verifier", "none",
        "--learning-rate", 0.2, "--set", "schedule.updates=3", "--set", "evaluation.max_new_tokens=24", "--set", "evaluation.held_out=0.5",
    )  # fmt: skip
    assert ran.exit_code == 16, ran.output
    assert "not accepted" in ran.stdout
    return base / "job"


def test_an_adapter_that_is_worse_is_not_accepted(ruined: Path) -> None:
    """The job has succeeded, its adapter is there, and the report says that it is not accepted, and by how much it is worse."""
    result = json.loads((ruined / "result.json").read_text())
    measured = result["accuracy"]
    assert result["state"] == "succeeded"
    assert (ruined / "adapter" / "adapter_model.safetensors").is_file()
    assert result["accepted"] is False
    assert "lies below 0" in result["acceptance"]
    assert measured["text_difference"]["high"] < 0
    assert measured["text_after"]["logp"] - measured["text_before"]["logp"] == pytest.approx(measured["text_difference"]["value"])
    assert measured["before"] is measured["after"] is measured["paired"] is None
    assert 0 <= measured["text_after"]["chrf"] < measured["text_before"]["chrf"] <= 100


def test_an_agent_sees_success_where_an_adapter_is_not_accepted(ruined: Path) -> None:
    """Under an agent, which reads the report, the trainer ends with 0."""
    command = [sys.executable, "-m", "edge_agent", "train", str(ruined), "--supervised"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert process.wait(DEADLINE_S) == 0


def test_evaluate_repeats_free_text_and_compare_reads_what_it_writes(ruined: Path, tmp_path: Path) -> None:
    """The adapter measured again writes the rows of after.jsonl; held against those before training they give the job's own result."""
    out = tmp_path / "again.jsonl"
    ran = json.loads(_run("evaluate", ruined, "--out", out, "--json").stdout)
    result = json.loads((ruined / "result.json").read_text())
    assert ran["text"] == result["accuracy"]["text_after"]
    assert read_answers(out) == read_answers(ruined / "after.jsonl")
    assert json.loads(_run("compare", ruined, out, "--before", "--json").stdout)["measured"] == result["accuracy"]


def test_evaluate_refuses_a_place_for_its_answers_before_it_works(tmp_path: Path) -> None:
    """A directory, or a place below a file, is refused before the model is looked for; directories that are missing are made."""
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "answers.jsonl"):
        ran = _run("evaluate", "--model", "none", "--data", tmp_path / "file", "--out", out, "--json")
        assert (ran.exit_code, json.loads(ran.stdout)["error"]["code"]) == (4, "directory")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "q", "answer": "#### 1"}\n')
    ran = _run("evaluate", "--model", "none", "--data", data, "--out", data, "--json")
    assert "something other than answers" in json.loads(ran.stdout)["error"]["text"]
    check_writable(tmp_path / "a" / "b" / "answers.jsonl")
    assert [*(tmp_path / "a" / "b").iterdir()] == []


def test_evaluate_takes_any_verifier_prompts_and_draws(ruined: Path, tiny_model: Path) -> None:
    """A regex, the other prompts and several draws on a file, without a job; a pattern that is none is refused."""
    files = ("evaluate", "--model", tiny_model, "--data", ruined / "dataset.jsonl", "--questions", 4, "--max-new-tokens", 30)
    drawn = ("--samples", 2, "--temperature", 0.7, "--prompts", "plain", "--verifier", r"regex:#### (\d+)", "--json")
    found = json.loads(_run(*files, *drawn).stdout)
    assert found["accuracy"]["n"] == 4
    assert [p["k"] for p in found["pass_at"]] == [2]
    assert all(len(a["verdicts"]) == 2 for a in found["answers"])
    blind = _run(*files, "--verifier", "choice", "--json")
    assert (blind.exit_code, json.loads(blind.stdout)["error"]["code"]) == (3, "dataset_schema")
    refused = _run(*files, "--verifier", "regex:(", "--json")
    error = json.loads(refused.stdout)["error"]
    assert (refused.exit_code, error["code"]) == (4, "job_schema")
    assert "RE2" in error["text"]


def test_acceptance_travels_to_the_coordinator(ruined: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The node's result message says that the adapter is not accepted and why, and the coordinator's list of jobs shows it."""
    order = make_order(Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**30), 1, node="n")
    job, envelope = order.id, make_offer(order).order
    config = AgentConfig("n", tmp_path, Size(2**30), {"tiny": tiny_model})
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / job).symlink_to(ruined)
    store = Store(tmp_path / "agent.sqlite", "f", "n")
    link = Link(config.broker, "n", [], SimpleQueue(), lambda: None)
    jobs = Jobs(config, device_profile("cpu"), store, Uplink(link, "f", "n", store), SimpleQueue(), Rest(config.rest, lambda: None))
    store.accept(job, order.job.digest, envelope.payload, 4)
    for phase in ("staging", "ready", "running", "finalizing"):
        store.move(job, phase)  # type: ignore[arg-type]
    jobs.tick()
    message = decode(store.message(store.waiting()[-1]).payload, JobResult)  # type: ignore[union-attr]
    store.close()
    assert message.data.accepted is False
    assert "lies below 0" in (message.data.text or "")
    coordinator = CoordinatorStore(tmp_path / "coordinator.sqlite", 3600)
    coordinator.add_job(order, envelope)
    coordinator.apply_result(coordinator.jobs(1)[0], message)
    [view] = coordinator.jobs(1)
    coordinator.close()
    assert view.result is not None
    assert view.result.accepted is False
    console = Console(width=200, record=True)
    console.print(jobs_table([view]))
    assert "not accepted" in console.export_text()
