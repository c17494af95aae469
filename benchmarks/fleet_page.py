"""The results of fleet.py as they stand in docs/scale.md: `python benchmarks/fleet_page.py` writes them there again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec
from many_fleet import Span
from page import RESULTS

from edge_agent.files import write_file

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
MARKS = "<!-- fleet -->\n", "<!-- end of fleet -->"
AWS_MARKS = "<!-- aws -->\n", "<!-- end of aws -->"
NODES = {"1,000": 1_000, "10,000": 10_000, "100,000": 100_000}
JOBS_A_DAY = 24
"""Of a node, in the extrapolation."""
HEARD = ("up/state", "up/info", "up/job/progress", "up/plan/answer", "up/file/block")
"""What every coordinator hears (topics.shared_subscriptions), at the ear; `changed` is apart: one a second of each."""
TAKEN = ("up/hello", "up/heartbeat", "up/job/status", "up/job/result", "up/job/forgotten", "up/file/request")
"""What one of them takes."""
HALF, MOST_COORDINATORS = 0.5, 1000
TOLD_PER_S, SLACK = 1, 1.5
"""Messages of a coordinator to the others; a run with so many times more of them, or hellos of a node that starts, is an earlier one."""
AWS_MESSAGES_PER_S = 100
"""Of one connection."""
PARTS = {"broker": "Broker", "coordinators": "Coordinators", "database": "Database"}


class Times(msgspec.Struct):
    """Of events, in seconds."""

    count: int
    median_s: float
    p95_s: float
    p99_s: float
    longest_s: float


@dataclass
class Cost:
    """What a part takes: cores = base + per_node * nodes + per_job * jobs a second, and seconds of one = per_start * nodes that start."""

    base: float
    per_node: float
    per_job: float
    per_start: float
    more: Cost | None = None
    """What each coordinator above those of the run adds: that it is there, and that it hears what all hear.

    How much of the whole such a message is cannot be measured from outside: it counts as the mean of all that coordinators take in, and
    what they tell each other as nothing. Most of the others are acknowledged besides, so it should be less.
    """


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


def costs(report: Report) -> dict[str, Cost]:
    """Return what each part takes, by the spans that were empty, idle and busy, and that of the start."""
    spans, found = report.spans, {}
    work, start = spans["jobs"], spans["start"]

    def cores(name: str, part: str) -> float:
        return spans[name].use[part].cores if part in spans[name].use else 0.0

    for part in PARTS:
        empty, idle = cores("empty", part), cores("idle", part)
        found[part] = Cost(
            empty, max(0.0, idle - empty) / report.nodes, max(0.0, cores("jobs", part) - idle) * work.seconds / report.jobs,
            max(0.0, cores("start", part) - empty) * start.seconds / report.nodes,
        )  # fmt: skip
    of_job, of_start = messages(report, HEARD), sum(start.messages_per_s.get(k, 0.0) for k in HEARD) * start.seconds / report.nodes
    for part in ("coordinators", "database"):
        cost = found[part]
        a_message = cost.per_job / (messages(report, TAKEN) + report.coordinators * of_job)
        cost.more = Cost(cost.base / report.coordinators, 0.0, of_job * a_message, of_start * a_message)
    return found


def messages(report: Report, kinds: Collection[str]) -> float:
    """Return how many messages of some kinds a job has, above those of idle nodes."""
    busy, idle = report.spans["jobs"], report.spans["idle"].messages_per_s
    return sum(max(0.0, busy.messages_per_s.get(kind, 0.0) - idle.get(kind, 0.0)) for kind in kinds) * busy.seconds / report.jobs


def sent(report: Report) -> float:
    """Return how many messages coordinators send nodes for a job."""
    return messages(report, [kind for kind in report.spans["jobs"].messages_per_s if kind.startswith("down/")])


def cores(cost: Cost, nodes: int, more: int = 0) -> float:
    """Return the cores that a part takes for a fleet, with so many coordinators more than in the run."""
    found = cost.base + nodes * (cost.per_node + JOBS_A_DAY / 86_400 * cost.per_job)
    return found + more * cores(cost.more, nodes) if cost.more else found


def start_s(cost: Cost, nodes: int, more: int = 0) -> float:
    """Return the processor seconds that a part takes for all nodes of a fleet to start, likewise."""
    return nodes * cost.per_start + (more * start_s(cost.more, nodes) if cost.more else 0.0)


def coordinators(report: Report, nodes: int, load: float) -> int | None:
    """Return how many coordinators a fleet takes, those of the run at least, where each has so much of a core; None: no number does."""
    own = costs(report)["coordinators"]
    fits = (n for n in range(report.coordinators, MOST_COORDINATORS) if cores(own, nodes, n - report.coordinators) <= n * load)
    return next(fits, None)


def lines(report: Report) -> list[str]:
    """Return what the page says of a run."""

    def ms(times: Times) -> str:
        return f"{1000 * times.median_s:,.0f} / {1000 * times.p95_s:,.0f} / {1000 * times.p99_s:,.0f} ms"

    one = {name: span.use["one daemon"] for name, span in report.spans.items() if "one daemon" in span.use}
    said = [
        f"{report.nodes:,} nodes, {report.jobs:,} jobs at {report.jobs_per_s:g} a second, {report.coordinators} coordinators, "
        f"{report.database}, {report.broker}{', TLS' if report.tls else ', without TLS'}; {report.date}, {report.machine}; {report.note}.",
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
        f"| Part | Base, cores | A node, millicores | A job, s | A start, ms | {' | '.join(f'{name} nodes, cores' for name in NODES)} |",
        "|---|---|---|---|---|" + "---|" * len(NODES),
    ]
    found = costs(report)
    for part, name in PARTS.items():
        if part in report.spans["jobs"].use:
            said.append(_row(name, found[part]))
            if (more := found[part].more) is not None:
                said.append(_row(f"{name}, one coordinator more", more))
    own = found["coordinators"]
    said += ["", "| Coordinators | " + " | ".join(f"{name} nodes" for name in NODES) + " |", "|---|" + "---|" * len(NODES)]
    for text, load in (("half a core", HALF), ("a core", 1.0)):
        numbers = [coordinators(report, nodes, load) for nodes in NODES.values()]
        row = " | ".join(str(n or "no number does") for n in numbers)
        said.append(f"| Needed, {report.coordinators} at least, where each has {text} | {row} |")
    times = []
    for nodes in NODES.values():
        number = coordinators(report, nodes, HALF) or coordinators(report, nodes, 1.0) or report.coordinators
        took = max(start_s(own, nodes, number - report.coordinators) / number, start_s(found["broker"], nodes), report.start_jitter_s)
        times.append(f"{took:,.0f} s, of {number}")
    said.append(f"| All nodes start within {report.start_jitter_s:.0f} s: known after, where each has a core | {' | '.join(times)} |")
    told = sum(n for kind, n in report.spans["jobs"].messages_per_s.items() if kind.endswith("/changed")) / report.coordinators
    hellos = report.spans["start"].messages_per_s.get("up/hello", 0.0) * report.spans["start"].seconds / report.nodes
    if told > SLACK * TOLD_PER_S or hellos > SLACK:
        said += [
            "",
            f"The run is of an earlier version: a coordinator told the others of changes {told:.1f} times a second while there were jobs, "
            f"now once; a node that started said hello {hellos:.1f} times, now once where it is answered. Those figures are in the tables.",
        ]
    return said


def _row(name: str, cost: Cost) -> str:
    fleets = " | ".join(f"{cores(cost, nodes):.2f}" for nodes in NODES.values())
    return f"| {name} | {cost.base:.3f} | {1000 * cost.per_node:.3f} | {cost.per_job:.4f} | {1000 * cost.per_start:.1f} | {fleets} |"


def aws_lines(report: Report) -> list[str]:
    """Return what follows for a broker that limits the messages of a connection."""
    rate = (AWS_MESSAGES_PER_S - TOLD_PER_S) / sent(report)
    return [
        f"A connection publishes {AWS_MESSAGES_PER_S} messages a second and 512 KiB. Coordinators sent {sent(report):.1f} for a job, "
        f"strikes included, so one does some {rate:.0f} jobs a second at most, and large files go by HTTPS."
    ]


def write(report: Report) -> None:
    """Put what a run has measured between its marks on the page."""
    for marks, said in ((MARKS, lines(report)), (AWS_MARKS, aws_lines(report))):
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(marks[0])
        write_file(PAGE, (head + marks[0] + "\n" + "\n".join(said) + "\n\n" + marks[1] + rest.partition(marks[1])[2]).encode())


if __name__ == "__main__":
    write(msgspec.json.decode((RESULTS / "fleet.json").read_bytes(), type=Report))
