"""What the profiler and the events of a run cost: `python benchmarks/overhead.py` writes benchmarks/results/overhead.json.

An epoch of training is run in pairs, once as a job runs it (stages measured, sampler, events written to disk) and once bare, in
turns of order, so that whatever else the machine does hits both alike. The overhead is the median of the pairs' ratios less 1, with the
95 % interval of a median (order statistics, no assumption of a distribution), in wall time and in processor time.

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
from typing import Any

import msgspec
import torch
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
from profiles.memory import fix_malloc
from profiles.sampler import sampled
from quantization.adapter import attach_adapter
from quantization.load import load_model
from quantization.plan import Plan

RESULTS = Path(__file__).parent / "results" / "overhead.json"
SEED, BOUND_PERCENT, BUDGET_BYTES = 40_000, 2.0, 2**40


class Spent(msgspec.Struct, frozen=True):
    """What an epoch took."""

    wall_s: float
    cpu_s: float


class Overhead(msgspec.Struct, frozen=True):
    """Of one clock: medians of both sides, and the median of the pairs' overheads with its 95 % interval."""

    bare_s: float
    profiled_s: float
    percent: float
    low: float
    high: float


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


def epoch(work: Prepared, model: Any, samples: list[Sample], plan: Plan, place: Path, profiled: bool) -> Spent:
    """Train one epoch from the same state, and return what it took with all that belongs to the profiler."""
    directory = JobDirectory(place)
    training = Training("overhead", work.job.schedule, SEED, plan, work.tokenizer, place, work.method)
    weights = weigh(model, work.method, samples, plan, work.tokenizer.pad_token_id, silent)[1]
    _wait_for(work)
    wall, cpu = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        progress: Any = silent
        if profiled:
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


def pairs(work: Prepared, count: int) -> list[tuple[Spent, Spent]]:
    """Run (bare, profiled) epochs, the order of each pair the other way round than the last; the first pair warms up and is dropped."""
    base, samples, found = load_model(work.files, work.device), encode(work), []
    for number in range(count + 1):
        spent: dict[bool, Spent] = {}
        for profiled in (False, True) if number % 2 else (True, False):
            model = attach_adapter(base, work.job.lora, SEED, work.job.model)
            with tempfile.TemporaryDirectory() as place:
                spent[profiled] = epoch(work, model, samples, work.plan(), Path(place), profiled)
            base = model.unload().eval()
        found.append((spent[False], spent[True]))
    return found[1:]


def overhead(bare: list[float], profiled: list[float]) -> Overhead:
    """Compare the seconds of one clock, pair by pair."""
    ratios = sorted(100 * (p / b - 1) for b, p in zip(bare, profiled, strict=True))
    out = outside(len(ratios))
    rounded = (round(x, 3) for x in (statistics.median(ratios), ratios[out], ratios[-1 - out]))
    return Overhead(round(statistics.median(bare), 4), round(statistics.median(profiled), 4), *rounded)


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
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    fix_malloc()  # as a job does
    with tempfile.TemporaryDirectory() as directory:
        work = prepare(write_model(Path(directory) / "model", options.shape), options.device, options.records, Path(directory))
        found = pairs(work, options.pairs)
    clocks = {clock: overhead(*([getattr(s, clock) for s in side] for side in zip(*found, strict=True))) for clock in ("wall_s", "cpu_s")}
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": device_name(options.device),
        "versions": versions(),
        "shape": options.shape,
        "records": options.records,
        "pairs": options.pairs,
        "bound_percent": BOUND_PERCENT,
        "overhead": clocks,
        "epochs": found,
    }
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    print(json.dumps({clock: msgspec.to_builtins(o) for clock, o in clocks.items()}, indent=2))


if __name__ == "__main__":
    main()
