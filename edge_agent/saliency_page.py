"""The Saliency Map as a page: what a job directory or a coordinator has of it, in one document."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from edge_agent.errors import SaliencyUnusable
from edge_agent.job import Job
from edge_agent.job_directory import JobDirectory
from edge_agent.saliency import Rescored, Saliency, SaliencyRecord
from edge_agent.web.document import document

WAIT_S = 30.0
"""For a trainer to write its map: the time between two updates."""
AT_WORK_S = 300.0
"""A trainer that is at work has told something in this time."""


def page_of(data: bytes, job: Job | None, source: object) -> tuple[bytes, str]:
    """Return the page of a `saliency.json` and its content security policy; `source` names it in errors. Raises SaliencyUnusable.

    `Use these options` changes the job.
    """
    return document("Saliency Map", "page", "saliency", msgspec.json.encode({"saliency": _read(data, source), "job": job}))


def saliency_page(directory: JobDirectory, wait_s: float = 0.0) -> tuple[bytes, str]:
    """Return the page of a job directory as `page_of` does; where a job has not ended there, its trainer may write the map first.

    Raises SaliencyUnusable, JobSchema.
    """
    if not directory.path.is_dir():
        raise SaliencyUnusable(directory.path, "is no directory")
    if not directory.result_file.exists() and _age_s(directory.events) < AT_WORK_S:
        _await_map(directory, wait_s)
    try:
        data = directory.saliency.read_bytes()
    except FileNotFoundError:
        raise SaliencyUnusable(directory.path, "has no saliency.json") from None
    except OSError as error:
        raise SaliencyUnusable(directory.saliency, f"cannot be read ({error.strerror})") from None
    return page_of(data, directory.read_job() if (directory.path / "job.json").exists() else None, directory.saliency)


def _await_map(directory: JobDirectory, wait_s: float) -> None:
    """Ask the trainer that may work in a directory for the map as it stands, and wait until it has written it."""
    until = time.monotonic() + wait_s
    with suppress(OSError):  # a directory that cannot be written to may have a map nevertheless
        directory.saliency_wanted.touch()
        while directory.saliency_wanted.exists() and not directory.result_file.exists() and time.monotonic() < until:
            time.sleep(0.1)
        directory.saliency_wanted.unlink(missing_ok=True)


def _age_s(file: Path) -> float:
    """Return for how long nothing was written to a file; for ever where there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return math.inf


def _read(data: bytes, source: object) -> Saliency:
    try:
        saliency = msgspec.json.decode(data, type=Saliency)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SaliencyUnusable(source, f"is not valid: {error}") from None
    for number, record in enumerate(saliency.records):
        if problem := _problem(record):
            raise SaliencyUnusable(source, f"is not valid: {problem} - at `$.records[{number}]`")
    return saliency


def _problem(record: SaliencyRecord) -> str | None:
    """Return what is wrong with a record that has the right types, or None."""
    length = len(record.tokens)
    if length == 0:
        return "it has no tokens"
    if (record.judge is None) != (record.kind == "correct"):
        return "an incorrect answer, and no other, has `judge`"
    scorings: list[SaliencyRecord | Rescored] = [record, *record.rescored]
    lists = [record.likelihood, record.unlikelihood]
    lists += [numbers for s in scorings for numbers in (s.base, s.standard, s.judge) if numbers is not None]
    if any(len(numbers) != length for numbers in lists):
        return "its lists have different lengths"
    if record.products is not None and (not record.products or len(record.products) % (4 * length)):
        return "`products` has no whole rows"
    return None
