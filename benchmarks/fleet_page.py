"""The results of fleet.py as they stand in docs/scale.md: `python benchmarks/fleet_page.py` writes them there again."""

from __future__ import annotations

from pathlib import Path

import msgspec
from many_fleet import Span
from page import RESULTS

from edge_agent.files import write_file

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
MARKS = "<!-- fleet -->\n", "<!-- end of fleet -->"
NODES = {"1,000": 1_000, "10,000": 10_000, "100,000": 100_000}
JOBS_A_DAY = 24
"""Of a node, in the extrapolation."""
PARTS = {"broker": "Broker", "coordinators": "Coordinators", "database": "Database"}


class Times(msgspec.Struct):
    """Of events, in seconds."""

    count: int
    median_s: float
    p95_s: float
    p99_s: float
    longest_s: float


class Cost(msgspec.Struct):
    """What a part takes: cores = base + per_node * nodes + per_job * jobs a second."""

    base: float
    per_node: float
    per_job: float


class Report(msgspec.Struct):
    """The committed results."""

    date: str
    machine: str
    note: str
    versions: dict[str, str]
    broker: str
    database: str
    tls: bool
    coordinators: int
    nodes: int
    jobs: int
    jobs_per_s: float
    simulated: str
    start_jitter_s: float
    connect_s: Times
    """From the start of a node, with the jitter."""
    known_s: float
    """From the start of the last node until the coordinators knew all."""
    accepted_s: Times
    """From an offer to its acceptance, at the broker."""
    accepted_undisturbed_s: Times
    """The same, without offers of when the broker or a coordinator was away."""
    acknowledged_s: Times
    """From a status or result to its acknowledgement."""
    broker_back_s: float
    """From the start of the broker after it was killed until all nodes were connected again."""
    taken_over_s: float | None
    """From the end of the coordinator that led until another did."""
    messages_of_job: dict[str, float]
    ended: int
    lost: int
    double: int
    late: int
    spans: dict[str, Span]
    cost: dict[str, Cost]
    cores: dict[str, dict[str, float]]
    """By nodes and part, at so many jobs a day of each node."""
    jobs_a_day: int


def extrapolate(costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Return the cores that fleets take, without their nodes."""
    rate = JOBS_A_DAY / 86_400
    return {
        name: {
            part: round(c.base + nodes * (c.per_node + rate * c.per_job), 2) for part, c in costs.items() if part != "nodes"
        }
        for name, nodes in NODES.items()
    }  # fmt: skip


def lines(report: Report) -> list[str]:
    """Return what the page says of a run."""

    def ms(times: Times) -> str:
        return f"{1000 * times.median_s:,.0f} / {1000 * times.p95_s:,.0f} / {1000 * times.p99_s:,.0f} ms"

    one = {name: span.use["one daemon"] for name, span in report.spans.items() if "one daemon" in span.use}
    said = [
        f"{report.nodes:,} nodes, {report.jobs:,} jobs at {report.jobs_per_s:g} a second, {report.coordinators} coordinators, "
        f"{report.database}, {report.broker}{', TLS' if report.tls else ''}; {report.date}, {report.machine}; {report.note}.",
        "",
        "| Measured | |",
        "|---|---|",
        f"| Jobs with one result, at their node and in the database | {report.ended:,} |",
        f"| Lost, double | {report.lost:,}, {report.double:,} |",
        f"| Last node connected, of at most {report.start_jitter_s:.0f} s start jitter | {report.connect_s.longest_s:.1f} s |",
        f"| Last node known to the coordinators | {report.known_s:.1f} s |",
        f"| Offer to acceptance: median / 95 % / 99 % | {ms(report.accepted_s)} |",
        f"| The same, while nothing was away | {ms(report.accepted_undisturbed_s)} |",
        f"| Status or result to acknowledgement: median / 95 % / 99 % | {ms(report.acknowledged_s)} |",
        f"| Broker killed and started again: all nodes back | {report.broker_back_s:.1f} s |",
    ]
    if report.taken_over_s is not None:
        said.append(f"| Coordinator that leads killed: another leads | {report.taken_over_s:.1f} s |")
    said += [
        f"| Daemon of one node: memory | {one['jobs'].peak_mib:.0f} MiB |",
        f"| Its processor idle, and with its jobs | {100 * one['idle'].cores:.2f} %, {100 * one['jobs'].cores:.2f} % |",
        "",
        "| Part | Base, cores | A node, millicores | A job, s | " + " | ".join(f"{name} nodes, cores" for name in NODES) + " |",
        "|---|---|---|---|" + "---|" * len(NODES),
    ]
    for part, name in PARTS.items():
        if (cost := report.cost.get(part)) is not None:
            cores = " | ".join(f"{report.cores[nodes][part]:.2f}" for nodes in NODES)
            said.append(f"| {name} | {cost.base:.3f} | {1000 * cost.per_node:.3f} | {cost.per_job:.4f} | {cores} |")
    return said


def write(report: Report) -> None:
    """Put what a run has measured between its marks on the page."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    write_file(PAGE, (head + MARKS[0] + "\n" + "\n".join(lines(report)) + "\n\n" + MARKS[1] + rest.partition(MARKS[1])[2]).encode())


if __name__ == "__main__":
    write(msgspec.json.decode((RESULTS / "fleet.json").read_bytes(), type=Report))
