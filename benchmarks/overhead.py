"""What the profiler and the events of a run cost: `python benchmarks/overhead.py` writes results/overhead-DEVICE-SHAPE.json.

An epoch of training is run in turns in three ways: bare; with the memory released before it, as at the start of every stage, so that
the stage's peak is its own; and as a job runs it, stages measured, sampler, events written to disk. Each turn goes the other way round than
the last, so that whatever else the machine does hits all alike. From the second to the third is what profiling costs as long as it goes
on, in percent; from the first to the second what a stage costs once, however long it is, in seconds: pages given back are fetched again.
Both are medians over the turns with the 95 % interval of a median (order statistics, no assumption of a distribution), in wall time and in
processor time.

`--shape` takes a model of a real shape with random weights in place of the shipped one, `--device cuda` a GPU. Does not cover the
stages outside training, whose work has fewer steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from page import result_file
from shapes import NAMES, write_model

from edge_agent.dataset import Record
from edge_agent.demo.problems import problems
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.training.contexts import Sample, encode_target
from edge_agent.training.loop import Training, optimize
from edge_agent.training.outcome import versions
from edge_agent.training.prepare import Prepared, prepare_files
from edge_agent.training.reporter import Reporter
from edge_agent.training.scoring import weigh
from edge_agent.training.weighted import Weighted
from profiles.device import device_name
from profiles.energy import find_meter
from profiles.memory import CudaMemory, HostMemory, keep_freed
from profiles.sampler import sampled
from quantization.adapter import attach_adapter
from quantization.load import load_model
from quantization.plan import Plan

SEED, BOUND_PERCENT, BUDGET_BYTES = 40_000, 2.0, 2**40


class Spent(msgspec.Struct, frozen=True):
    """What an epoch took."""

    wall_s: float
    cpu_s: float


class Median(msgspec.Struct, frozen=True):
    """Of all turns, with its 95 % interval."""

    value: float
    low: float
    high: float


class Overhead(msgspec.Struct, frozen=True):
    """By one clock."""

    epoch_s: float
    """Median of the bare epochs."""
    running_percent: Median
    once_s: Median


Way = Literal["bare", "released", "profiled"]
WAYS: tuple[Way, ...] = get_args(Way)


class Report(msgspec.Struct, frozen=True):
    """The committed results."""

    date: str
    machine: str
    versions: dict[str, str]
    device: str
    shape: str
    records: int
    turns: int
    bound_percent: float
    overhead: dict[str, Overhead]
    epochs: list[dict[Way, Spent]]


def silent(*_: object) -> None:
    pass


def prepare(model: Path, device: str, count: int, directory: Path) -> Prepared:
    """Return a job that trains on the standard answers of so many problems: the method with least work in an update."""
    data = directory / "data.jsonl"
    records = [Record(p.question, p.answer) for p in islice(problems("chain", SEED), count)]
    data.write_bytes(msgspec.json.Encoder().encode_lines(records))
    fields = {"budget_bytes": BUDGET_BYTES, "method.name": "sft", "device": device, "evaluation.questions": 0, "schedule.epochs": 1}
    return prepare_files(build_job(str(model), data, None, fields, []), records, None)


def encode(work: Prepared) -> list[Sample]:
    targets = work.method.targets(work.training, work.is_correct)
    return [encode_target(work.tokenizer, work.prompts, target, work.files.context_tokens) for target in targets]


def epoch(work: Prepared, model: Any, samples: list[Sample], plan: Plan, place: Path, way: Way) -> Spent:
    """Train one epoch from the same state, and return what it took with all that belongs to its way."""
    directory = JobDirectory(place)
    training = Training("overhead", work.job.schedule, SEED, plan, work.tokenizer, place, work.method)
    weights = weigh(model, work.method, samples, plan, work.tokenizer.pad_token_id, silent)[1]
    _wait_for(work)
    wall, cpu = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        progress: Any = silent
        if way == "released":
            for memory in (CudaMemory(0), HostMemory()) if work.device.torch_device == "cuda" else (HostMemory(),):
                memory.release()
        elif way == "profiled":
            reporter = Reporter(work.device, directory.append_event, lambda: False, meter=find_meter(work.device))
            stack.enter_context(sampled(reporter.recorder, work.device, directory.profile))
            stack.enter_context(reporter.stage("train"))
            progress = reporter.progress
        optimize(model, Weighted(model, samples, weights, training), training, progress)
        _wait_for(work)
    return Spent(time.monotonic() - wall, time.process_time() - cpu)


def _wait_for(work: Prepared) -> None:
    if work.device.torch_device == "cuda":
        torch.cuda.synchronize()


def turns(work: Prepared, count: int) -> list[dict[Way, Spent]]:
    """Run epochs in all ways; the first turn warms up and is dropped."""
    base, samples, found = load_model(work.files, work.device), encode(work), []
    for number in range(count + 1):
        spent: dict[Way, Spent] = {}
        for way in WAYS if number % 2 else reversed(WAYS):
            model = attach_adapter(base, work.job.lora, SEED, work.job.model)
            with tempfile.TemporaryDirectory() as place:
                spent[way] = epoch(work, model, samples, work.plan(), Path(place), way)
            base = model.unload().eval()
        found.append(spent)
    return found[1:]


def overhead(found: list[dict[Way, Spent]], clock: str) -> Overhead:
    """Compare the ways turn by turn, by one clock."""
    bare, released, profiled = ([getattr(spent[way], clock) for spent in found] for way in WAYS)
    running = [100 * (p / r - 1) for p, r in zip(profiled, released, strict=True)]
    once = [r - b for r, b in zip(released, bare, strict=True)]
    return Overhead(round(statistics.median(bare), 4), median(running), median(once))


def median(values: list[float]) -> Median:
    ordered, out = sorted(values), outside(len(values))
    return Median(*(round(x, 4) for x in (statistics.median(ordered), ordered[out], ordered[-1 - out])))


def outside(n: int) -> int:
    """How many of n sorted values, six at least, lie on each side of the narrowest interval that holds the median with 95 % or more."""
    tail, k = 0.0, 0
    while (tail := tail + comb(n, k) / 2**n) <= 0.025:
        k += 1
    return max(0, k - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=NAMES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--turns", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()  # as a job does whose budget has room
    with tempfile.TemporaryDirectory() as directory:
        work = prepare(write_model(Path(directory) / "model", options.shape), options.device, options.records, Path(directory))
        found = turns(work, options.turns)
    clocks = {clock: overhead(found, clock) for clock in Spent.__struct_fields__}
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    report = Report(
        today, device_name(options.device), versions(), options.device, options.shape, options.records, options.turns, BOUND_PERCENT,
        clocks, found,
    )  # fmt: skip
    out = options.out or result_file("overhead", options.device, options.shape)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    print(json.dumps({clock: msgspec.to_builtins(o) for clock, o in clocks.items()}, indent=2))


if __name__ == "__main__":
    main()
