"""`kill -9` at any moment of training, then the same command: the final adapter is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEADLINE_S, Cli, write_domain

from edge_agent.job_directory import JobDirectory
from edge_agent.training import run
from edge_agent.training.methods.method import Scores, Weights
from profiles.device import device_profile

ADAPTER = Path("adapter") / "adapter_model.safetensors"
# It allows no whole update at once.
BUDGET = device_profile("cpu").overhead_bytes + 80 * 2**20
# With dropout, and a checkpoint after each update.
OPTIONS = (
    "--budget", BUDGET, "--questions", "10", "--learning-rate", "0.002", "--set", "evaluation.max_new_tokens=60", "--set",
    "schedule.batch=12", "--set", "schedule.updates=8", "--set", "schedule.checkpoint_s=0",
    "--set", "lora.dropout=0.05", "--set", "sampling.outputs=2",
)  # fmt: skip


def _arguments(base: Path, out: str, tiny_model: Path) -> list[object]:
    return ["train", "--model", tiny_model, "--data", base / "chain.jsonl", "--out", base / out, *OPTIONS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cli: Cli) -> Path:
    """An uninterrupted run, and its directory's parent for others on the same data."""
    base = tmp_path_factory.mktemp("resume")
    write_domain(base / "chain.jsonl", "chain", 24, 5)
    ran = cli(*_arguments(base, "whole", tiny_model), "--json")
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["resumed"] is False
    assert ran.json["plan"]["micro_batch"] < 12
    return base / "whole"


def _progress(events: Path) -> list[Any]:
    if not events.exists():
        return []
    complete = events.read_text().rpartition("\n")[0].splitlines()
    return [e for e in map(json.loads, complete) if e["event"] == "progress" and e["stage"] == "train"]


def _kill_after_update(command: list[str], events: Path, update: int) -> None:
    """Start the command and kill it in the middle of the update after the given one."""
    # It must not plan by what other runs have taught, as the run that it is held against did not.
    environment = os.environ | {"XDG_STATE_HOME": str(events.parent.parent / "state")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
    deadline = time.monotonic() + DEADLINE_S
    while not any(e["done"] >= update for e in _progress(events)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)


def test_killed_in_training_the_adapter_is_bit_identical(whole: Path, tiny_model: Path, cli: Cli) -> None:
    """Killed twice in the middle of an accumulation, then run to the end by the same command."""
    base, out = whole.parent, "killed"
    command = [sys.executable, "-m", "edge_agent", *map(str, _arguments(base, out, tiny_model))]
    directory = base / out
    for update in (2, 5):
        _kill_after_update(command, directory / "events.jsonl", update)
        assert (directory / "checkpoint.safetensors").exists()
        assert (directory / "scores.safetensors").exists()
        assert not (directory / "result.json").exists()
    ran = cli(*_arguments(base, out, tiny_model), "--json")
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["resumed"] is True
    assert [row["tokens"] for row in ran.json["stages"] if row["stage"] == "score"] == [0]
    assert not (directory / "scores.safetensors").exists()
    whole_result = json.loads((whole / "result.json").read_text())
    assert ran.json["losses"] == whole_result["losses"]
    assert ran.json["accuracy"] == whole_result["accuracy"]
    assert (directory / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.slow
def test_a_torn_checkpoint_is_not_used(whole: Path, tiny_model: Path, cli: Cli) -> None:
    """A checkpoint that was cut off is ignored: training starts anew and gives the same adapter."""
    base, out = whole.parent, "torn"
    directory = base / out
    command = [sys.executable, "-m", "edge_agent", *map(str, _arguments(base, out, tiny_model))]
    _kill_after_update(command, directory / "events.jsonl", 3)
    checkpoint = directory / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    ran = cli(*_arguments(base, out, tiny_model), "--json")
    assert ran.code == 0, ran.out + ran.err
    assert (directory / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.slow
def test_micro_batches_do_not_change_the_result(whole: Path, tiny_model: Path, cli: Cli) -> None:
    """A budget that forces smaller micro-batches gives the same losses up to rounding."""
    base, more = whole.parent, ("--set", "lora.dropout=0.0", "--json")
    small = cli(*_arguments(base, "small", tiny_model), *more)
    assert small.code == 0, small.out + small.err
    large = cli(*(a if a != BUDGET else 2 * BUDGET for a in _arguments(base, "large", tiny_model)), *more)
    assert small.json["plan"]["micro_batch"] < large.json["plan"]["micro_batch"]
    assert small.json["losses"] == pytest.approx(large.json["losses"], rel=2e-2)


def test_two_trainers_do_not_share_a_directory(whole: Path, tiny_model: Path, cli: Cli) -> None:
    """While one process works in a job directory, a second one is refused with `busy`."""
    base, out = whole.parent, "shared"
    command = [sys.executable, "-m", "edge_agent", *map(str, _arguments(base, out, tiny_model))]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (base / out / "events.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = cli("train", base / out, "--json")
        assert second.code == 4
        assert second.json["error"]["code"] == "busy"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(DEADLINE_S)


def test_scores_of_another_vocabulary_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary in NF4 gives other probabilities: what was scored with one in 16 bits does not count for it, nor the other way round."""
    taken: list[bool] = []

    def weigh(*_: Any, **__: Any) -> tuple[list[Scores], list[Weights]]:
        taken.append(True)
        return [Scores(torch.ones(2))], [Weights(torch.ones(2), torch.zeros(2))]

    monkeypatch.setattr(run, "weigh", weigh)
    directory = JobDirectory(tmp_path)
    job, tokenizer = SimpleNamespace(method=None), SimpleNamespace(pad_token_id=0)
    nothing = SimpleNamespace(job=job, method=None, tokenizer=tokenizer, progress=None)
    for quantized, resumed in ((False, False), (False, True), (True, False), (True, True), (False, False)):
        plan = SimpleNamespace(vocabulary={"quantized_head": quantized, "embedding_on_host": False})
        (scores, _), found = run._score(directory, None, nothing, [None], plan, nothing, "key", None)  # type: ignore[arg-type,list-item]
        assert found is resumed
        assert scores[0].base_logp_T.tolist() == [1, 1]
    assert len(taken) == 3
