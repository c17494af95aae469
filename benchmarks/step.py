"""Holds an epoch of the engine against TRL and the released scheme: `python benchmarks/step.py` writes a file of results for every setting.

Seconds and peak memory of an epoch of NLFT and of SFT on the same records, beside TRL's SFTTrainer with the same QLoRA settings in each of
its options, and the scheme of the released NLFT code (three padded rows a record, all with gradient). Records are GSM8K questions with a
real model's outputs, half of them wrong, with an instruction of 500 tokens and with an empty one; the model has a real shape and random
weights in NF4, LoRA of rank 16 on all projections, activation checkpointing in all.

Every arm is a process of its own; on a processor rounds go through all arms in turn, one at a time, so that ratios are of neighbours. Of
TRL's options those go through all rounds that took at most a quarter more than the fastest before. A ratio is the median over
the rounds of an arm's seconds over those of the option with the lowest median, in the same round. "TRL, patched" is none of TRL's
options: its loss takes the head of the answers' tokens only, which TRL does on GPUs only, and its adapter has the type of the
activations. Memory is that of a further process, in its first epoch, beside the model.

`--shape` takes the shapes of benchmarks/shapes.py; all arms compute in 32 bits on `cpu`, as jobs do there, and in 16 on `cuda`. On `cuda`,
and with `--in-turn` for shapes of which not all arms fit the host's memory side by side, one arm runs after the other, through all its
rounds. `cpu-bf16` is a processor in 16 bits, which are TRL's default: jobs do not take them there, because PyTorch's
kernels for them keep memory that no plan counts.

Needs GSM8K's train.jsonl and model_outputs_6b.jsonl (`--data`; a line of the second has `question`, `answer`, and `finetuning`: an
output's `solution` and `is_correct`), and trl (the extra `bench`). More than an hour on two cores, and half of that for one step of a
larger model: `--shape qwen2.5-0.5b --in-turn --micro-batch 4 --instruction 500 --records 4 --rounds 1 --warm-up 0`. Does not cover
accuracy: benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from gsm8k import DATA
from page import result_file
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_model
from step_arms import BATCH, OURS, PATCHED, TRL, Epoch, Settings, profile_of

from edge_agent.training.outcome import versions
from profiles.device import device_name

MIB = 2**20
DEVICES = ("cpu", "cpu-bf16", "cuda")
ARMS = (*OURS, *TRL, *PATCHED)
AT_ONCE = 2
"""Processes whose memory is measured, which takes no heed of time."""
NEAR = 1.25
"""Options of TRL whose epoch before the rounds took at most so much of that of the fastest go on."""


class Row(msgspec.Struct):
    """One arm in one setting: every round's seconds, the tokens of an epoch where the arm counts them, and its memory."""

    shape: str
    device: str
    micro_batch: int
    instruction: int
    records: int
    joined: int
    arm: str
    seconds: list[float]
    tokens: int
    peak_bytes: int
    """Above what the process holds between epochs: activations, gradients and what comes and goes."""


class Report(msgspec.Struct, frozen=True):
    """The committed results."""

    date: str
    machine: str
    threads: int
    versions: dict[str, str]
    rows: list[Row]


class Arm:
    """A process that runs an epoch when it is told to."""

    def __init__(self, settings: Settings) -> None:
        command = [sys.executable, str(Path(__file__).parent / "step_arms.py"), msgspec.json.encode(settings).decode()]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "THP_MEM_ALLOC_ENABLE": "1"}
        self.name = settings.arm
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def load(self) -> Arm:
        """Return when it has loaded all it needs."""
        self._heard()
        return self

    def epoch(self) -> Epoch:
        """Run one epoch."""
        if self._process.stdin is None:
            raise SystemExit(f"{self.name}: no pipes")
        with suppress(BrokenPipeError):
            self._process.stdin.write("epoch\n")
            self._process.stdin.flush()
        return msgspec.json.decode(self._heard(), type=Epoch)

    def _heard(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} ended: {self._log.read()[-3000:].decode(errors='replace')}")
        return line

    def close(self) -> None:
        """End the process, if it has not ended."""
        if not self._log.closed:
            self._process.communicate(timeout=60)
            self._log.close()


def measure(settings: list[Settings], rounds: int, shape: str, warm_up: int = 1, in_turn: bool = False) -> list[Row]:
    """Return the rows of one setting: rounds to warm up, the rounds that count, and a process for memory."""
    together = [[s] for s in settings] if in_turn else [settings]
    found = {arm: epochs for group in together for arm, epochs in timed(group, rounds, warm_up).items()}
    with ThreadPoolExecutor(1 if in_turn else AT_ONCE) as pool:
        peaks = list(pool.map(peak_bytes, settings))
    return [
        Row(
            shape, s.device, s.micro_batch, s.instruction, s.records, s.joined, s.arm,
            [round(e.seconds, 3) for e in found[s.arm]], found[s.arm][0].tokens, peak,
        )
        for s, peak in zip(settings, peaks, strict=True)
    ]  # fmt: skip


def timed(settings: list[Settings], rounds: int, warm_up: int) -> dict[str, list[Epoch]]:
    """Return the epochs of arms that take turns; those of TRL's options that are far from the fastest have the one that told it.

    They are ended before the other arms start, because all that go on share the memory.
    """
    with ExitStack() as stack:

        def started(chosen: list[Settings]) -> list[Arm]:
            arms = [Arm(s) for s in chosen]
            for arm in arms:
                stack.callback(arm.close)
            for arm in [arm.load() for arm in arms]:
                for _ in range(warm_up):
                    arm.epoch()
            return arms

        options = started([s for s in settings if s.arm in TRL and len(settings) > 1])
        tried = {arm.name: arm.epoch() for arm in options}
        fastest = min((epoch.seconds for epoch in tried.values()), default=0.0)
        near = [arm for arm in options if tried[arm.name].seconds <= NEAR * fastest]
        for arm in options:
            if arm not in near:
                arm.close()
        going_on = started([s for s in settings if s.arm not in tried]) + near
        found: dict[str, list[Epoch]] = {arm.name: [] for arm in going_on}
        for _ in range(rounds):
            for arm in going_on:
                found[arm.name].append(arm.epoch())
    return {name: [epoch] for name, epoch in tried.items()} | found


def peak_bytes(settings: Settings) -> int:
    """Return what the first epoch of a new process takes beside the model."""
    arm = Arm(msgspec.structs.replace(settings, memory=True))
    try:
        return arm.load().epoch().peak_bytes
    finally:
        arm.close()


def fastest_of_trl(rows: list[Row]) -> Row:
    """Return the option of TRL with the lowest median, of those that went through all rounds."""
    options = [r for r in rows if r.arm in TRL]
    rounds = max(len(r.seconds) for r in options)
    return min((r for r in options if len(r.seconds) == rounds), key=lambda r: median(r.seconds))


def ratios(rows: list[Row]) -> dict[str, tuple[float, float, float]]:
    """Return of every arm the median, least and greatest ratio of its seconds to those of TRL's fastest option in the same round."""
    if not any(r.arm in TRL for r in rows):
        return {}
    fastest, found = fastest_of_trl(rows), {}
    for row in rows:
        per_round = [own / other for own, other in zip(row.seconds, fastest.seconds, strict=False)]
        found[row.arm] = median(per_round), min(per_round), max(per_round)
    return found


def table(rows: list[Row]) -> Table:
    first = rows[0]
    sizes = f"{first.records} records, micro-batch {first.micro_batch}, instruction of {first.instruction} tokens"
    view = Table(
        "arm", "s an epoch", "to TRL", "least to greatest", "MiB", "tokens",
        title=f"{first.shape} on {first.device}, {sizes}",
    )  # fmt: skip
    of_trl = ratios(rows)
    for row in rows:
        middle, least, greatest = of_trl.get(row.arm, (float("nan"),) * 3)
        spread = f"{least:.2f} to {greatest:.2f}"
        tokens = f"{row.tokens:,}" if row.tokens else ""
        cells = f"{median(row.seconds):.2f}", f"{middle:.2f}", spread, f"{row.peak_bytes / MIB:,.0f}", tokens
        view.add_row(row.arm, *cells)
    return view


def write_report(out: Path, device: str, rows: list[Row]) -> None:
    """Write rows with machine, versions and date."""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    report = Report(
        today, device_name(profile_of(device).torch_device), torch.get_num_threads(), versions() | {"trl": version("trl")}, rows
    )
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-100m")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="directory of GSM8K's train.jsonl and model_outputs_6b.jsonl")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--instruction", type=int, nargs="+", default=[500, 0], help="tokens")
    parser.add_argument("--records", type=int, default=8, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count, before the others")
    parser.add_argument("--in-turn", action="store_true", help="one arm after the other, where they do not fit side by side")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    options: Any = parser.parse_args()
    if options.records > BATCH and options.records % BATCH:
        parser.error(f"an epoch is whole updates: up to {BATCH} records, or a multiple of that")
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / options.shape, options.shape)
        for instruction in options.instruction:
            for micro in options.micro_batch:
                names = (str(model), str(options.data), options.device)
                settings = [Settings(arm, *names, micro, instruction, options.records) for arm in options.arms]
                in_turn = options.in_turn or options.device == "cuda"  # a GPU has no room for all models at once
                found = measure(settings, options.rounds, options.shape, options.warm_up, in_turn)
                Console(width=max(Console().width, 100)).print(table(found))
                setting = f"{options.shape}-micro-batch-{micro}-instruction-{instruction}"
                write_report(result_file("step", options.device, setting), options.device, found)


if __name__ == "__main__":
    main()
