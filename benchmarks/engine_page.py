"""Writes what the engine's benchmarks found into docs/benchmarks.md, with its plots: `python benchmarks/engine_page.py`.

Reads the committed results of benchmarks/step.py, scaling.py, load.py, rungs.py, memory_plan.py and overhead.py, and computes nothing
that is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import median

import load
import memory_plan
import msgspec
import overhead
import rungs
import scaling
import step
from page import drawn, result_files, write_parts
from step_arms import OURS

MIB = 2**20
EPOCHS = 10
"""Over which single scores are spread."""


def read_rows(benchmark: str) -> list[step.Row]:
    """Return the rows of all results of step.py or scaling.py."""
    return [row for file in result_files(benchmark) for row in msgspec.json.decode(file.read_bytes(), type=step.Report).rows]


def settings(rows: list[step.Row]) -> Iterator[list[step.Row]]:
    """Yield the rows of each setting."""
    for _, group in groupby(rows, key=lambda r: (r.shape, r.device, r.micro_batch, r.instruction)):
        yield list(group)


def step_lines(rows: list[step.Row]) -> list[str]:
    """Return the table of every arm in every setting."""
    lines = [
        "| shape | device | micro-batch | instruction | | s an epoch | rounds | to TRL | least to greatest | MiB beside the model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in settings(rows):
        of_trl = step.ratios(group)
        for r in group:
            middle, least, greatest = of_trl[r.arm]
            seconds = f"{median(r.seconds):.1f} | {len(r.seconds)} | {middle:.2f} | {least:.2f} to {greatest:.2f}"
            lines.append(
                f"| {r.shape} | {r.device} | {r.micro_batch} | {r.instruction} | {r.arm} | {seconds} | {r.peak_bytes / MIB:,.0f} |"
            )
    return lines


def claim_lines(rows: list[step.Row]) -> list[str]:
    """Return what the engine is held to, by setting; ratios are medians over the rounds, with the least and the greatest."""
    lines = [
        "| shape | device | micro-batch | instruction | SFT to TRL, s | MiB | NLFT, single scores, 10 epochs, to TRL's SFT, s | MiB "
        "| NLFT, scored in every epoch, to TRL's SFT, s | NLFT, live scores, to the released scheme, s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in settings(rows):
        arms = {r.arm: r for r in group}
        trl = step.fastest_of_trl(group)
        parts = list(zip(arms["NLFT, scored before"].seconds, arms["scoring"].seconds, strict=True))
        once = [epoch + scoring / EPOCHS for epoch, scoring in parts]
        # Until the arm is measured: the sum, which scores contexts that it leaves out.
        anew = arms["NLFT, scored in each epoch"].seconds if "NLFT, scored in each epoch" in arms else [sum(part) for part in parts]
        peak = max(arms["NLFT, scored before"].peak_bytes, arms["scoring"].peak_bytes)
        cells = [
            *_ratio(arms["SFT"].seconds, trl.seconds),
            _memory(arms["SFT"].peak_bytes, trl),
            *_ratio(once, trl.seconds),
            _memory(peak, trl),
            *_ratio(anew, trl.seconds),
        ]
        if released := arms.get("released scheme"):
            live = arms["NLFT, scored live"]
            cells += [*_ratio(live.seconds, released.seconds), _memory(live.peak_bytes, released)]
        else:
            cells += ["", ""]
        first = group[0]
        lines.append(f"| {first.shape} | {first.device} | {first.micro_batch} | {first.instruction} | {' | '.join(cells)} |")
    return lines


def _ratio(own: list[float], other: list[float]) -> Iterator[str]:
    found = [a / b for a, b in zip(own, other, strict=False)]
    yield f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _memory(own_bytes: int, other: step.Row) -> str:
    return f"{own_bytes / other.peak_bytes:.2f}"


def scaling_lines(rows: list[step.Row]) -> list[str]:
    """Return seconds and exponents of every sweep."""
    lines = [
        "| what grows | values | | tokens of an epoch | s an epoch | exponent | of tokens | MiB |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, of_arms in scaling.sweeps(rows).items():
        for arm, found in of_arms.items():
            seconds = [median(r.seconds) for r in found]
            slopes = scaling.exponent(scaling.SWEEPS[name], seconds), scaling.exponent([r.tokens for r in found], seconds)
            texts = (
                ", ".join(map(str, scaling.SWEEPS[name])), arm, " · ".join(f"{r.tokens:,}" for r in found),
                " · ".join(f"{s:.1f}" for s in seconds), *(f"{slope:.2f}" for slope in slopes),
                " · ".join(f"{r.peak_bytes / MIB:,.0f}" for r in found),
            )  # fmt: skip
            lines.append(f"| {scaling.TITLES[name]} | {' | '.join(texts)} |")
    return lines


def overhead_lines() -> list[str]:
    """Return both clocks of every shape."""
    lines = ["| shape | device | clock | bare epoch, s | as long as it goes on, % | once a stage, s |", "|---|---|---|---|---|---|"]
    for file in result_files("overhead"):
        report = msgspec.json.decode(file.read_bytes(), type=overhead.Report)
        for clock, found in report.overhead.items():
            running, once = found.running_percent, found.once_s
            cells = f"{running.value:.2f} [{running.low:.2f}, {running.high:.2f}]", f"{once.value:.3f} [{once.low:.3f}, {once.high:.3f}]"
            lines.append(f"| {report.shape} | {report.device} | {clock} | {found.epoch_s:.2f} | {' | '.join(cells)} |")
    return lines


def load_lines() -> list[str]:
    """Return every kind of load of every shape, seconds to those of transformers."""
    lines = [
        "| shape | device | file, MiB | load | s | to transformers' | peak, MiB | MiB afterwards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in result_files("load"):
        report = msgspec.json.decode(file.read_bytes(), type=load.Report)
        for row in report.rows:
            found, base = row.median, report.rows[0].median
            cells = f"{found.seconds:.1f} | {found.seconds / base.seconds:.2f} | {found.peak_mib:,.0f} | {found.held_mib:,.0f}"
            lines.append(f"| {row.shape} | {report.device} | {row.file_mib:,.0f} | {row.kind} | {cells} |")
    return lines


def parts() -> dict[str, list[str]]:
    """Return the generated parts of the page by their names, of what has been measured."""
    planned = msgspec.json.decode(memory_plan.RESULTS.read_bytes(), type=memory_plan.Report)
    held = msgspec.json.decode(rungs.RESULTS.read_bytes(), type=rungs.Report)
    found = {"overhead": overhead_lines(), "load": load_lines(), "memory plan": memory_plan.page(planned), **rungs.page(held)}
    if rows := read_rows("step"):
        found |= {"claims": claim_lines(rows), "step": step_lines(rows)}
    if rows := read_rows("scaling"):
        found["scaling"] = scaling_lines(rows)
    return found


def plot_steps(rows: list[step.Row]) -> None:
    """Draw seconds and memory of every arm, a panel for each setting."""
    groups = list(settings(rows))
    with drawn("step.svg", 2, len(groups), figsize=(4.5 * len(groups), 7), sharey=True) as axes:
        for group, (upper, lower) in zip(groups, zip(*axes, strict=True), strict=True):
            names = [r.arm for r in group]
            colours = ["tab:blue" if n in OURS and n != "released scheme" else "tab:gray" for n in names]
            upper.barh(names, [median(r.seconds) for r in group], color=colours)
            lower.barh(names, [r.peak_bytes / MIB for r in group], color=colours)
            first = group[0]
            upper.set(
                title=f"{first.shape} on {first.device}, micro-batch {first.micro_batch}\ninstruction of {first.instruction} tokens",
                xlabel="s an epoch",
            )
            lower.set(xlabel="MiB beside the model")
            for axis in (upper, lower):
                axis.set_xscale("log")
        axes[0][0].invert_yaxis()


def plot_scaling(rows: list[step.Row]) -> None:
    """Draw seconds over what grows, a panel for each sweep."""
    sweeps = scaling.sweeps(rows)
    with drawn("scaling.svg", 1, len(sweeps), figsize=(4 * len(sweeps), 3.5)) as axes:
        for axis, (name, of_arms) in zip(axes[0], sweeps.items(), strict=True):
            for arm, found in of_arms.items():
                points = [(v, median(r.seconds)) for v, r in zip(scaling.SWEEPS[name], found, strict=True) if v]
                axis.plot(*zip(*points, strict=True), marker="o", label=arm)
            axis.set(xlabel=scaling.TITLES[name], ylabel="s an epoch", xscale="log", yscale="log")
            axis.legend(fontsize="small")


def main() -> None:
    write_parts(parts())
    if rows := read_rows("step"):
        plot_steps(rows)
    if rows := read_rows("scaling"):
        plot_scaling(rows)


if __name__ == "__main__":
    main()
