"""The Saliency Map as a page: what a job directory has of it, in one document."""

from __future__ import annotations

import msgspec

from edge_agent.errors import SaliencyUnusable
from edge_agent.job import NlftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.saliency import Rescored, Saliency, SaliencyRecord
from edge_agent.web.document import document


def saliency_page(directory: JobDirectory) -> tuple[bytes, str]:
    """Return the page of a job and its content security policy. Raises SaliencyUnusable, JobSchema."""
    return document("Saliency Map", "page", "saliency", msgspec.json.encode(page_data(directory)))


def page_data(directory: JobDirectory) -> dict[str, object]:
    """Return what the page shows: the saliency, the job that `Use these options` changes, and the presets."""
    if not directory.path.is_dir():
        raise SaliencyUnusable(directory.path, "is no directory")
    saliency = _read(directory)
    job = directory.read_job() if (directory.path / "job.json").exists() else None
    presets = {"corrected": NlftOptions(), "released": NlftOptions.released()}
    return {"saliency": saliency, "job": job, "presets": presets}


def _read(directory: JobDirectory) -> Saliency:
    try:
        saliency = msgspec.json.decode(directory.saliency.read_bytes(), type=Saliency)
    except FileNotFoundError:
        raise SaliencyUnusable(directory.path, "has no saliency.json") from None
    except OSError as error:
        raise SaliencyUnusable(directory.saliency, f"cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SaliencyUnusable(directory.saliency, f"is not valid: {error}") from None
    for number, record in enumerate(saliency.records):
        if problem := _problem(record):
            raise SaliencyUnusable(directory.saliency, f"is not valid: {problem} - at `$.records[{number}]`")
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
