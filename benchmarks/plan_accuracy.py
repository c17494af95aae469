"""Holds the closed-form memory plan against measured peaks: `python benchmarks/plan_accuracy.py` writes results/plan_accuracy.json.

Models of real shapes with random weights, and the shipped tiny model, run the real command on three rungs of the ladder: a
micro-batch of 8, of 1, and activation checkpointing. The budget of each run is the plan's own peak on that rung, so the planner
chooses it by itself. The ratio is (planned - baseline) / (measured - baseline) with the resident set after imports (the peak of
stage `plan` of the same run) as baseline: what a plan can get wrong. Below 1 a run takes more than was planned, above 1 the plan
is wasteful. Measured peaks are the kernel's, stage by stage (profiles/memory.py).

`--models qwen2.5-0.5b tiny` runs some models only, `--out FILE` writes elsewhere. All of it takes about 15 minutes on two cores,
8 GiB of memory and 2 GiB of temporary disk. Does not cover GPUs, and wall time: others may use the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from edge_agent.dataset import Record, read_records, write_records
from edge_agent.demo.problems import judged_mistake, problems
from edge_agent.job_building import build_job
from edge_agent.report import Result
from edge_agent.training.outcome import versions
from edge_agent.training.prepare import prepare_files
from profiles.device import device_name
from quantization.plan import ladder, stage_plans

TINY = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
SEED, HELD_OUT = 30_000, 4
MIB = 2**20
SHAPES: dict[str, PretrainedConfig | None] = {
    "llama-512": LlamaConfig(
        hidden_size=512, num_hidden_layers=8, intermediate_size=1408, num_attention_heads=8, vocab_size=32_000, tie_word_embeddings=False
    ),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576, num_hidden_layers=30, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True,
    ),
    "tiny": None,
}  # fmt: skip
"""Configurations to draw random weights for; None is the shipped model."""
SETTINGS = {
    "device": "cpu", "method.name": "nlft", "method.references": "once", "schedule.updates": 2, "sampling.outputs": 1,
    "evaluation.max_new_tokens": 16, "evaluation.batch": HELD_OUT,
}  # fmt: skip


class Case(msgspec.Struct, frozen=True):
    """A rung to reach, and a job on which it binds: checkpointing needs records so long that training takes more than loading."""

    micro_batch: int
    checkpointing: bool
    batch: int
    records: int
    problems: int
    """In one record."""


CASES = (Case(8, False, 8, 12, 1), Case(1, False, 2, 4, 5), Case(1, True, 2, 4, 5))


class Row(msgspec.Struct):
    """One stage of one run."""

    model: str
    rung: str
    stage: str
    planned_mib: float
    measured_mib: float
    baseline_mib: float
    ratio: float


def write_model(directory: Path, config: PretrainedConfig) -> Path:
    """Write a model with random weights in bf16, with the tokenizer of the shipped model; the ids it has no text for stay unused."""
    torch.manual_seed(SEED)
    config.update({"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None, "max_position_embeddings": 2048})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, directory)
    return directory


def write_dataset(directory: Path, case: Case) -> tuple[Path, Path]:
    """Write (records, held-out questions) of like length; every third record is left for the model to complete."""
    rng, stream = random.Random(SEED), problems("chain", SEED)
    records = []
    for _ in range(200):
        group = list(islice(stream, case.problems))
        mistakes = [judged_mistake(p, rng) for p in group]
        texts = ([p.question for p in group], [p.answer for p in group], *zip(*mistakes, strict=True))
        records.append(Record(*("\n".join(part) for part in texts)))
    records.sort(key=lambda r: -len(r.question + (r.answer or "") + (r.output or "")))
    bare = [Record(r.question, r.answer) for r in records]
    data, held_out = directory / "data.jsonl", directory / "held-out.jsonl"
    data.write_bytes(write_records(r if n % 3 else bare[n] for n, r in enumerate(records[: case.records])))
    held_out.write_bytes(write_records(bare[case.records : case.records + HELD_OUT]))
    return data, held_out


def smallest_budget(model: Path, data: Path, held_out: Path, case: Case) -> int:
    """Return the planned peak on the rung of the case."""
    fields = SETTINGS | {"budget_bytes": 2**50, "schedule.batch": case.batch}
    work = prepare_files(build_job(str(model), data, held_out, fields, []), read_records(data), read_records(held_out))
    rung = next(r for r in ladder(work.job) if (r.micro_batch, r.checkpointing) == (case.micro_batch, case.checkpointing))
    stages = stage_plans(work.shape, work.job, work.lengths, work.device, rung, HELD_OUT)
    return max(s.peak_bytes for s in stages)


def run(model: Path, data: Path, held_out: Path, case: Case, out: Path) -> Result:
    """Run the job as a user would, in a process of its own."""
    files = ["--model", model, "--data", data, "--eval-data", held_out, "--out", out]
    settings = [f"--set={name}={value}" for name, value in {**SETTINGS, "schedule.batch": case.batch}.items()]
    budget = ["--budget", smallest_budget(model, data, held_out, case)]
    command = [sys.executable, "-m", "edge_agent", "train", *map(str, files + budget), *settings, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}  # spinning threads slow down a busy machine
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return msgspec.json.decode((out / "result.json").read_bytes(), type=Result)


def rows(name: str, result: Result) -> Iterator[Row]:
    """Yield the planned stages of a run; of a stage that ran twice the higher peak."""
    peaks: dict[str, int] = {}
    for measured in result.stages:
        peaks[measured.stage] = max(peaks.get(measured.stage, 0), measured.peak_bytes)
    plan, baseline = result.plan, peaks["plan"]
    if plan is None:
        raise SystemExit(f"{name}: the result has no plan")
    rung = f"{plan.rung}: {plan.micro_batch}"
    for stage in plan.stages:
        planned, peak = stage.peak_bytes, peaks[stage.stage]
        ratio = round((planned - baseline) / (peak - baseline), 3)
        yield Row(name, rung, stage.stage, round(planned / MIB, 1), round(peak / MIB, 1), round(baseline / MIB, 1), ratio)


def measure(names: list[str], directory: Path, found: list[Row]) -> None:
    for name in names:
        config = SHAPES[name]
        model = TINY if config is None else write_model(directory / name, config)
        for number, case in enumerate(CASES):
            result = run(model, *write_dataset(directory, case), case, directory / f"job-{name}-{number}")
            found += rows(name, result)


def table(found: list[Row]) -> Table:
    view = Table("model", "rung", "stage", "planned MiB", "measured MiB", "ratio")
    for row in found:
        cells = (f"{row.planned_mib:,.0f}", f"{row.measured_mib:,.0f}", f"{row.ratio:.2f}")
        view.add_row(row.model, row.rung, row.stage, *cells, style="red" if row.ratio < 1 else None, end_section=row.stage == "save")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args()
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        measure(options.models, Path(directory), found)
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": device_name("cpu"),
        "versions": versions(),
        "rows": found,
    }
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console(width=max(Console().width, 100)).print(table(found))


if __name__ == "__main__":
    main()
