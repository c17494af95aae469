"""Trains a shape under budgets on a device: `python benchmarks/budgets.py` writes results/budgets-DEVICE-SHAPE.json.

A job of supervised fine-tuning with LoRA of rank 16 on the MLP, on rows of at most `--tokens` tokens, is run by the command line: with as
much memory as it likes, under every `--budget`, and under the smallest one that the planner names. Told are the planned peak, the peak
that the job measured and, on a GPU, the one that the driver saw from outside, misses, tokens per second, and the share of the rate at which
the device multiplies matrices: of a token forward and backward through the frozen weights, four operations a weight, work that is
done again for want of memory left out.

`--device cuda --shape llama-3-8b` is what it is made for: it takes 16 GB of temporary disk for random weights, as much memory of the host
as a layer, and a GPU with 10 GiB. Does not cover accuracy, nor other programs on the same GPU, which the driver's figure would contain.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from shapes import NAMES, write_model

from edge_agent.dataset import Record, read_records, write_records
from edge_agent.demo.problems import problems
from edge_agent.files import write_file
from edge_agent.job import Job
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.prompts import PROMPTS
from edge_agent.sizes import parse_size
from edge_agent.training.contexts import answer_ids, record_ids
from edge_agent.training.outcome import versions
from edge_agent.training.prepare import prepare_files
from profiles import nvidia
from profiles.device import detect_profile, device_name
from profiles.host import HERE
from quantization.load import load_tokenizer
from quantization.model_files import find_model
from quantization.shape import read_shape

MIB, UNLIMITED = 2**20, 2**50
RECORDS, UPDATES, LOOK_S, SIDE, PRODUCTS = 16, 4, 0.05, 4096, 20
FIELDS = {
    "method.name": "sft", "lora.rank": 16, "lora.targets": "mlp", "schedule.batch": 8, "schedule.updates": UPDATES,
    "evaluation.questions": 0, "evaluation.verifier": "exact",
}  # fmt: skip


class Run(msgspec.Struct, frozen=True):
    """One job. `budget_bytes` is None for as much memory as it likes; `seen_bytes` is None without a driver that tells it."""

    budget_bytes: int | None
    rung: str
    planned_bytes: int
    measured_bytes: int
    seen_bytes: int | None
    misses: int
    tokens_per_s: float | None
    share: float | None
    """Of the device's rate of matrix products."""


class Report(msgspec.Struct, frozen=True):
    """The committed results."""

    date: str
    machine: str
    versions: dict[str, str]
    shape: str
    tokens: int
    products_per_s: float
    """Multiplications and additions a second, in the type that the model computes in."""
    runs: list[Run]


def write_rows(file: Path, model: Path, tokens: int) -> Path:
    """Write records of several problems each, as long as fits."""
    tokenizer, drawn = load_tokenizer(find_model(str(model))), problems("chain", 1)

    def grown() -> Record:
        record = None
        while True:
            group: list[Any] = [record, next(drawn)] if record else [next(drawn)]
            longer = Record("\n".join(p.question for p in group), "\n".join(p.answer or "" for p in group))
            taken = record_ids(tokenizer, PROMPTS["worked"], longer), answer_ids(tokenizer, longer.answer or "")
            if record and sum(map(len, taken)) > tokens:
                return record
            record = longer

    write_file(file, write_records(grown() for _ in range(RECORDS)))
    return file


def products_per_s(device: str, dtype: torch.dtype) -> float:
    """Return how many multiplications and additions a second the device does in products of square matrices."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    left @ right
    wait()
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ right
    wait()
    return 2 * PRODUCTS * SIDE**3 / (time.perf_counter() - began)


def job_of(model: Path, data: Path, device: str, budget_bytes: int) -> Job:
    return build_job(str(model), data, None, {**FIELDS, "device": device, "budget_bytes": budget_bytes}, [])


def seen(device: str) -> Callable[[], int | None]:
    """Return what says how much of a GPU's memory is in use now, more than when this was called."""
    gpu = nvidia.find_gpu() if device == "cuda" else None
    if gpu is None or gpu.total_bytes is None:
        return lambda: None
    before = nvidia.free_bytes(HERE)
    return lambda: int(before - nvidia.free_bytes(HERE))


def train(model: Path, data: Path, device: str, budget_bytes: int, out: Path, rate: float) -> Run:
    """Run a job by the command line in a process of its own."""
    directory, in_use, most = JobDirectory(out), seen(device), 0
    directory.create(job_of(model, data, device, budget_bytes), data, None)
    command, log = [sys.executable, "-m", "edge_agent", "train", str(out)], out.with_suffix(".log")
    environment = os.environ | {"XDG_STATE_HOME": f"{out}-state"}  # each as a node that has not learned yet
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as child:  # noqa: S603
        while child.poll() is None:
            most = max(most, in_use() or 0)
            time.sleep(LOOK_S)
    result = directory.read_result()
    if result is None or result.plan is None:
        raise SystemExit(f"with {budget_bytes / MIB:.0f} MiB: {log.read_text()[-2000:]}")
    weights, rows = read_shape(find_model(str(model))).linear_elements, result.tokens_per_s
    return Run(
        None if budget_bytes == UNLIMITED else budget_bytes, result.plan.rung, result.plan.peak_bytes, result.peak_bytes, most or None,
        len(result.misses), rows, rows and 4 * weights * rows / rate,
    )  # fmt: skip


def runs(model: Path, data: Path, device: str, budgets: list[int], rate: float) -> Iterator[Run]:
    """Train with all memory, under each budget, and under the smallest."""
    work = prepare_files(job_of(model, data, device, UNLIMITED), read_records(data), None)
    for number, budget_bytes in enumerate([UNLIMITED, *budgets, work.rehearsal().survey(work.plan()).smallest_budget_bytes]):
        yield train(model, data, device, budget_bytes, data.parent / f"job-{number}", rate)


def table(report: Report) -> Table:
    view = Table(
        "budget MiB", "rung", "planned", "measured", "of plan", "seen", "misses", "tokens/s", "of matrix products",
        title=f"{report.shape}, rows of {report.tokens} tokens, {report.machine}",
    )  # fmt: skip
    for run in report.runs:
        planned, measured = run.planned_bytes / MIB, run.measured_bytes / MIB
        view.add_row(
            f"{run.budget_bytes / MIB:,.0f}" if run.budget_bytes else "-", run.rung, f"{planned:,.0f}", f"{measured:,.0f}",
            f"{planned / measured - 1:+.1%}", f"{run.seen_bytes / MIB:,.0f}" if run.seen_bytes else "-", str(run.misses),
            f"{run.tokens_per_s:,.1f}" if run.tokens_per_s else "-", f"{run.share:.0%}" if run.share else "-",
        )  # fmt: skip
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=NAMES, default="llama-100m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=parse_size, nargs="*", default=[], help="such as 8GiB 6GiB")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    profile = detect_profile(options.device)
    rate = products_per_s(profile.torch_device, getattr(torch, profile.compute_dtype))
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_STATE_HOME"] = f"{place}/state"  # the planner has learned nothing
        model = write_model(Path(place) / "model", options.shape)
        data = write_rows(Path(place) / "records.jsonl", model, options.tokens)
        found = list(runs(model, data, options.device, options.budget, rate))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    report = Report(today, device_name(profile.torch_device), versions(), options.shape, options.tokens, rate, found)
    out = options.out or Path(__file__).parent / "results" / f"budgets-{options.device}-{options.shape}.json"
    write_file(out, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console(width=max(Console().width, 140)).print(table(report))


if __name__ == "__main__":
    main()
