"""One command trains: the real command on the shipped model, and everything that it promises about what it leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_domain
from safetensors.torch import load_file

QUICK = ("--set", "schedule.updates=60", "--set", "evaluation.max_new_tokens=120", "--learning-rate", "0.002", "--seed", "1")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cli: Cli) -> Path:
    """A finished NLFT job on 50 questions of the unseen domain "chain", with 300 held-out questions."""
    base = tmp_path_factory.mktemp("train")
    data, questions = write_domain(base / "chain.jsonl", "chain", 50, 1), write_domain(base / "questions.jsonl", "chain", 300, 1001)
    ran = cli("train", "--model", tiny_model, "--data", data, "--eval-data", questions, "--budget", "2GiB", "--out", base / "job", *QUICK)
    assert ran.code == 0, ran.err
    for words in ("Accuracy on held-out questions", "Stages", "Answers before and after", "adapter", "saliency"):
        assert words in ran.out
    return base / "job"


@pytest.fixture(scope="module")
def result(job: Path) -> Any:
    return json.loads((job / "result.json").read_text())


def test_training_raises_accuracy_by_20_points(result: Any) -> None:
    """On an unseen domain NLFT is at least 20 points above the base model, and the 95 % intervals are disjoint."""
    before, after = result["accuracy"]["before"], result["accuracy"]["after"]
    assert before["n"] == after["n"] == 300
    assert after["value"] - before["value"] >= 0.2
    assert after["low"] > before["high"]
    assert result["accuracy"]["paired"]["p_value"] < 0.001
    assert result["accuracy"]["paired"]["low"] > 0.2
    assert result["accepted"] is True


def test_every_stage_is_measured_and_within_its_plan(result: Any) -> None:
    """Each stage has seconds and a peak; no peak is above the plan of its stage, and the plan is not above the budget."""
    names = [row["stage"] for row in result["stages"]]
    assert names == ["plan", "load", "evaluate", "sample", "repair", "judge", "encode", "score", "train", "evaluate", "save"]
    for row in result["stages"]:
        assert row["seconds"] > 0
        assert 0 < row["peak_bytes"] <= (row["planned_bytes"] or result["budget_bytes"]) <= result["budget_bytes"]
    assert result["tokens_per_s"] > 0
    assert result["versions"].keys() >= {"python", "torch", "transformers", "peft", "bitsandbytes", "edge-agent"}


def test_adapter_loads_with_plain_transformers(job: Path, result: Any, tiny_model: Path) -> None:
    """PEFT loads the adapter over the unquantised model: tensors equal bit for bit, accuracy inside the reported interval."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_agent.dataset import read_records
    from edge_agent.job import Evaluation
    from edge_agent.prompts import PROMPTS
    from edge_agent.training.evaluate import evaluate

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), job / "adapter")
    saved = load_file(job / "adapter" / "adapter_model.safetensors")
    held = model.state_dict()
    assert len(saved) == 4 * 7 * 2
    assert all(torch.equal(tensor, held[name.replace(".weight", ".default.weight")]) for name, tensor in saved.items())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    questions = read_records(job / "evaluation.jsonl")
    options = Evaluation(max_new_tokens=120)
    answers = evaluate(
        model, tokenizer, questions, PROMPTS["worked"], options, batch=64, context_tokens=2048, progress=lambda *_: None
    )  # fmt: skip
    after = result["accuracy"]["after"]
    assert after["low"] <= sum(a.share for a in answers) / len(answers) <= after["high"]


def test_evaluate_repeats_the_reported_accuracy_exactly(job: Path, result: Any, cli: Cli, tiny_model: Path) -> None:
    """With the base loaded in NF4 the adapter gives the reported accuracy to the last question, from the job and from files."""
    assert cli("evaluate", job, "--json").json["accuracy"] == result["accuracy"]["after"]
    files = ("--model", tiny_model, "--data", job / "evaluation.jsonl", "--max-new-tokens", 120)
    assert cli("evaluate", *files, "--adapter", job / "adapter", "--json").json["accuracy"] == result["accuracy"]["after"]
    assert cli("evaluate", *files, "--json").json["accuracy"] == result["accuracy"]["before"]


def test_report_names_the_adapter_by_its_digest(job: Path, result: Any) -> None:
    """The sha256 in the report is that of the file."""
    data = (job / "adapter" / "adapter_model.safetensors").read_bytes()
    assert result["adapter"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert result["adapter"]["size_bytes"] == len(data)


def test_a_finished_job_is_not_trained_again(job: Path, result: Any, cli: Cli) -> None:
    """The same command on the directory returns the same result and changes no file."""
    times = {f: f.stat().st_mtime_ns for f in job.rglob("*") if f.is_file() and f.name != ".lock"}
    again = cli("train", job, "--json")
    assert again.code == 0
    assert again.json == result
    assert times == {f: f.stat().st_mtime_ns for f in job.rglob("*") if f.is_file() and f.name != ".lock"}


def test_saliency_has_a_weight_for_every_token(job: Path) -> None:
    """Every trained answer is there with its tokens, log-probabilities and weights; only wrong ones have a judge context."""
    import msgspec

    from edge_agent.saliency import Saliency
    from edge_agent.training.methods.nlft import token_weights

    saliency = msgspec.json.decode((job / "saliency.json").read_bytes(), type=Saliency)
    assert {r.kind for r in saliency.records} == {"correct", "incorrect"}
    for record in saliency.records:
        lists = (record.base, record.standard, record.likelihood, record.unlikelihood, record.judge or record.base)
        assert {len(x) for x in lists} == {len(record.tokens)}
        assert (record.judge is None) == (record.judgment is None) == (record.kind == "correct")
        assert max(record.base) <= 0
        assert "".join(record.tokens).endswith("<|end|>")
        assert record.question
        assert record.products is not None
        assert len(record.products) == 4 * len(record.tokens) * min(33, len(record.tokens))
        assert record.rescored == []
        scores = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (record.base, record.standard, record.judge))
        weights = token_weights(record.kind, *scores, None, saliency.options)
        assert weights.likelihood_T.tolist() == pytest.approx(record.likelihood, abs=1e-4)
        assert weights.unlikelihood_T.tolist() == pytest.approx(record.unlikelihood, abs=1e-4)
    standard = next(r for r in saliency.records if r.standard_answer)
    assert "".join(standard.tokens) == f"{standard.answer}<|end|>"
    assert (job / "saliency.json").stat().st_mode & 0o777 == 0o600


def test_nothing_unfinished_is_left(job: Path) -> None:
    """A finished job has no checkpoint and no half-written file."""
    assert not list(job.rglob("*.part")) + list(job.glob("checkpoint*"))


def test_completed_records_are_a_dataset(job: Path, cli: Cli) -> None:
    """records.jsonl, with the model's own outputs and their judgments, is itself a valid dataset."""
    checked = cli("dataset", "check", job / "records.jsonl", "--json").json
    assert checked["with_output"] == checked["records"] > 50
    assert checked["with_judgment"] > 0


def test_events_tell_the_whole_run(job: Path) -> None:
    """Each stage starts and finishes, progress has loss, tokens/s and memory against the budget, and the end is told."""
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    finished = [e["stage"] for e in events if e["event"] == "stage_finished"]
    assert finished == [e["stage"] for e in events if e["event"] == "stage_started"]
    training = [e for e in events if e["event"] == "progress" and e["stage"] == "train"]
    assert training
    assert all(e["loss"] >= 0 and e["tokens_per_s"] > 0 and 0 < e["memory_bytes"] < e["budget_bytes"] for e in training)
    assert events[-1]["event"] == "finished"


@pytest.mark.slow
def test_gsm8k_file_goes_through_unchanged(tmp_path: Path, cli: Cli, tiny_model: Path, shared_data: Path) -> None:
    """GSM8K's own file, some questions of it and held-out rows of it; the accuracy is whatever it is."""
    ran = cli(
        "train", "--model", tiny_model, "--data", shared_data / "gsm8k" / "train.jsonl", "--limit", 20, "--questions", 8,
        "--budget", "2GiB", "--out", tmp_path / "job", "--set", "schedule.updates=4", "--set", "evaluation.max_new_tokens=64", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["data"]["questions"] == 20
    assert ran.json["accuracy"]["after"]["n"] == 8
    trained = {json.loads(line)["question"] for line in (tmp_path / "job" / "records.jsonl").read_text().splitlines()}
    held_out = {json.loads(line)["question"] for line in (tmp_path / "job" / "after.jsonl").read_text().splitlines()}
    assert not trained & held_out
