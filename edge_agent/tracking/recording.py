"""What is recorded of a job that has ended: its settings, numbers and names, and no text of a dataset.

Only numbers of the report come in, so no question, answer, example or text of an error can. Of the job document, texts that people have
written (prompts, and the pattern of a verifier) are recorded by their sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from edge_agent.coordinator.views import JobView
from edge_agent.errors import JobSchema
from edge_agent.job import Job
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import JobResult
from edge_agent.report import Result

MEASURES = (
    "accuracy", "adapter", "budget_bytes", "data", "energy", "kept_update", "peak_bytes", "seconds", "tokens_per_s", "updates",
)  # fmt: skip
"""Fields of the report whose numbers are recorded, by their dotted names (docs/report.md)."""
LOCAL_ID = 16
"""Characters of the sha256 of its report that are the id of a job that no coordinator has."""

LARGEST = 1e38
"""The largest number that every place can keep: TensorBoard's have 32 bits."""

Setting = str | int | float | bool


class Point(NamedTuple):
    """One value of a metric."""

    step: int
    time: float
    """Seconds since 1970."""
    value: float


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A job that has ended, as it is recorded."""

    id: str
    """Never the same for two jobs, and of a local one for two of its reports."""
    name: str
    started: float
    """Seconds since 1970, as all times here."""
    ended: float
    outcome: str
    parameters: dict[str, Setting]
    """Fields of the job document that are not null, by the names that `--set` has for them."""
    metrics: dict[str, list[Point]]
    tags: dict[str, str]


class Tracker(Protocol):
    """A place where jobs are recorded. Both methods raise TrackerAway, DirectoryUnusable or DiskFull."""

    name: str

    def has(self, job: str) -> bool:
        """Whether the job with an id is recorded, from its first value to its last."""

    def record(self, recording: Recording) -> None:
        """Record a job that is not there, or not all of it."""


def recording_of_job(view: JobView, report: Result | None) -> Recording:
    """Return an ended job of a coordinator; without a report, with what its node has told of its end."""
    job, outcome, ended = view.order.job, view.outcome or "failed", view.changed
    told = report or view.result
    started = ended - (told.seconds or 0.0) if told else view.created
    started = min(max(view.created, started), ended)  # whatever a node says
    accepted = view.result.accepted if view.result else None
    tags = _tags(job, outcome, view.digest, accepted) | {"node": view.node} | ({"reason": view.reason} if view.reason else {})
    return Recording(
        id=view.id, name=view.id, started=started, ended=ended, outcome=outcome, parameters=_parameters(job),
        metrics=_metrics(told, started, ended), tags=tags,
    )  # fmt: skip


def id_of_directory(directory: JobDirectory) -> str:
    """Return the id of a local job that has ended. Raises JobSchema."""
    try:
        return hashlib.sha256(directory.result_file.read_bytes()).hexdigest()[:LOCAL_ID]
    except OSError:
        raise JobSchema(str(directory.result_file), "it cannot be read; only a job that has ended is recorded") from None


def recording_of_directory(directory: JobDirectory) -> Recording:
    """Return the job of a directory of this machine. Raises JobSchema where it has not ended."""
    job, report = directory.read_job(), directory.read_result()
    if report is None or report.job != job.digest:
        raise JobSchema(str(directory.result_file), "it is no report of the job in job.json; run the directory again")
    ended = _end_of(directory)
    started = ended - report.seconds
    tags = _tags(job, report.state, report.job, report.accepted) | ({"reason": report.error.code} if report.error else {})
    return Recording(
        id=id_of_directory(directory), name=directory.path.resolve().name, started=started, ended=ended, outcome=report.state,
        parameters=_parameters(job), metrics=_metrics(report, started, ended), tags=tags,
    )  # fmt: skip


def _end_of(directory: JobDirectory) -> float:
    """Return when the run of a directory ended: by its log, which is copied with it, or else when its report was written."""
    try:
        last = msgspec.json.decode(directory.events.read_bytes().splitlines()[-1])
        return float(last["time"])
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return directory.result_file.stat().st_mtime


def _tags(job: Job, outcome: str, digest: str, accepted: bool | None) -> dict[str, str]:
    method = job.method.__struct_config__.tag
    said = {} if accepted is None else {"accepted": "true" if accepted else "false"}
    return {"model": job.model, "method": str(method), "dataset": job.dataset.sha256, "digest": digest, "outcome": outcome, **said}


def _parameters(job: Job) -> dict[str, Setting]:
    document = msgspec.to_builtins(job)
    verifier = document["evaluation"]["verifier"]
    if isinstance(verifier, dict):
        verifier["pattern"] = _sha256(verifier["pattern"])
    if isinstance(document["prompts"], dict):
        document["prompts"] = _sha256(document["prompts"])
    return {name: value for name, value in _leaves(document) if value is not None}


def _sha256(value: object) -> str:
    return "sha256:" + hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in a document by their dotted names; an element of a list has its `k` for a name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, f"{name}.{item['k']}")
    else:
        yield name, value


def _metrics(report: Result | JobResult | None, started: float, ended: float) -> dict[str, list[Point]]:
    """Return the numbers of a report. Its stages lie one after the other before its end, and what was made in training evenly in that."""
    metrics: dict[str, list[Point]] = {}
    for name in MEASURES:
        for leaf, value in _leaves(msgspec.to_builtins(getattr(report, name, None)), name):
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics[leaf] = [Point(0, ended, value)]
    if isinstance(report, Result):
        time = max(started, ended - sum(row.seconds for row in report.stages))
        trained = (time, ended)
        for row in report.stages:
            begun, time = time, min(max(started, time + row.seconds), ended)
            trained = (begun, time) if row.stage == "train" else trained
            for measure in ("seconds", "peak_bytes"):
                points = metrics.setdefault(f"stages.{row.stage}.{measure}", [])
                points.append(Point(len(points), time, getattr(row, measure)))
        metrics["losses"] = _series(report.losses, *trained)
        metrics["development_losses"] = _series(report.development_losses, *trained)
    kept = {name: [point for point in points if abs(point.value) <= LARGEST] for name, points in metrics.items()}
    return {name: points for name, points in kept.items() if points}


def _series(values: Sequence[float], begun: float, ended: float) -> list[Point]:
    return [Point(step, begun + (ended - begun) * step / len(values), value) for step, value in enumerate(values, 1)]
