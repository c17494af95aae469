"""What an epoch costs as it grows: `python benchmarks/scaling.py` writes benchmarks/results/scaling-DEVICE-SHAPE.json.

One of records, tokens of a record, tokens of the instruction, and micro-batch grows, the rest stays. The exponents are the slopes of the
logarithm of the seconds over that of what grows, and over that of the tokens that an epoch computes: 1 is in proportion. Records differ in
length, so only the second is to be 1 for them; and where more of an epoch is shared (a longer instruction, a larger micro-batch) it
computes fewer tokens. The arms are those of benchmarks/step.py, a process each; seconds are medians of the rounds.

About 35 minutes on two cores, 20 with `--rounds 1`. Does not cover accuracy.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import msgspec
from gsm8k import DATA
from page import result_file
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_model
from step import DEVICES, Row, measure, write_report
from step_arms import Settings

MIB = 2**20
ARMS = ("SFT", "NLFT, scored live")
BASE: dict[str, Any] = {"micro_batch": 4, "instruction": 500, "records": 4, "joined": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "records": (4, 8, 16), "joined": (1, 2, 4), "instruction": (0, 250, 500, 1000, 2000), "micro_batch": (1, 2, 4),
}  # fmt: skip
TITLES = {
    "records": "records", "joined": "questions in a record", "instruction": "tokens of the instruction", "micro_batch": "micro-batch",
}  # fmt: skip


def exponent(values: Sequence[int], seconds: list[float]) -> float:
    """Return the slope of the logarithms, over the values that are not 0."""
    pairs = [(math.log(v), math.log(s)) for v, s in zip(values, seconds, strict=True) if v]
    return linear_regression(*map(list, zip(*pairs, strict=True))).slope


def sweeps(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows, as they were measured, by sweep and arm."""
    rest = iter(rows)
    return {name: _by_arm(list(islice(rest, len(values) * len(ARMS)))) for name, values in SWEEPS.items()}


def _by_arm(rows: list[Row]) -> dict[str, list[Row]]:
    return {arm: [r for r in rows if r.arm == arm] for arm in ARMS}


def table(name: str, rows: list[Row]) -> Table:
    view = Table("arm", *map(str, SWEEPS[name]), "exponent", "of tokens", title=f"seconds an epoch (MiB) by {name}")
    for arm, of_arm in _by_arm(rows).items():
        seconds = [median(r.seconds) for r in of_arm]
        cells = [f"{s:.2f} ({r.peak_bytes / MIB:,.0f})" for s, r in zip(seconds, of_arm, strict=True)]
        slopes = exponent(SWEEPS[name], seconds), exponent([r.tokens for r in of_arm], seconds)
        view.add_row(arm, *cells, *(f"{slope:.2f}" for slope in slopes))
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-100m")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="directory of GSM8K's train.jsonl and model_outputs_6b.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options: Any = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / options.shape, options.shape)
        for name, values in SWEEPS.items():
            found: list[Row] = []
            for value in values:
                base = Settings("", str(model), str(options.data), options.device, **BASE)
                settings = [msgspec.structs.replace(base, arm=arm, **{name: value}) for arm in ARMS]
                found += measure(settings, options.rounds, options.shape, in_turn=options.device == "cuda")
            Console(width=max(Console().width, 100)).print(table(name, found))
            rows += found
    write_report(options.out or result_file("scaling", options.device, options.shape), options.device, rows)


if __name__ == "__main__":
    main()
