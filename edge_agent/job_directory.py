"""A job as a directory: what goes in, what comes out, and the lock that keeps two trainers apart.

job.json dataset.jsonl [evaluation.jsonl]        in
options.json saliency.wanted                     in, while it runs
events.jsonl before.jsonl outputs.jsonl
repairs.jsonl judgments.jsonl records.jsonl      on the way, kept for a later run of the same job
scores.safetensors products.bin rescored.bin
checkpoint.safetensors
misses.jsonl plan.json profile.jsonl
after.jsonl adapter/ saliency.json result.json   out
trace.json memory_snapshot.pickle                out, where a trace was asked for
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_agent.dataset import Record, check_sha256, file_sha256, read_records
from edge_agent.errors import Busy, Conflict, DirectoryUnusable, JobSchema
from edge_agent.files import copy_file, write_file
from edge_agent.hints import explain
from edge_agent.job import Job
from edge_agent.new_options import NewOptions
from edge_agent.report import Event, Miss, Result
from profiles.recorder import StageName
from quantization.plan import Plan

T = TypeVar("T")

MADE = (
    "before.jsonl", "outputs.jsonl", "repairs.jsonl", "judgments.jsonl", "records.jsonl", "after.jsonl", "saliency.json", "result.json",
    "misses.jsonl", "trace.json", "memory_snapshot.pickle",
)  # fmt: skip
"""Files of a run, which belong to one job and model."""
PARTS = ("checkpoint.safetensors", "scores.safetensors", "products.bin", "rescored.bin")
"""Of these, those that only an unfinished run needs."""


class JobDirectory:
    """Names and typed contents of the files of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.saliency = path / "saliency.json"
        self.saliency_wanted = path / "saliency.wanted"
        self.events = path / "events.jsonl"
        self.profile = path / "profile.jsonl"
        self.trace = path / "trace.json"
        self.memory_snapshot = path / "memory_snapshot.pickle"
        self.result_file = path / "result.json"
        self.options_file = path / "options.json"

    def create(self, job: Job, dataset: Path, evaluation: Path | None) -> None:
        """Lay down the inputs of a job.

        The same job again changes nothing, and a job that was refused before it began may be replaced. Raises Conflict where
        another job has begun, DirectoryUnusable where nothing can be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "job.json").exists() and any(not f.name.startswith(".") for f in self.path.iterdir()):
                raise DirectoryUnusable(self.path, "it holds other files")
            with self.locked():
                self._lay_down(job, dataset, evaluation)
        except OSError as error:
            raise DirectoryUnusable(self.path, error.strerror or type(error).__name__) from None

    def _lay_down(self, job: Job, dataset: Path, evaluation: Path | None) -> None:
        if self.begun and self.read_job() != job:
            raise Conflict(self.path, "model, data or options")
        write_file(self.path / "job.json", msgspec.json.format(msgspec.json.encode(job)) + b"\n")
        for source, name in ((dataset, "dataset.jsonl"), (evaluation, "evaluation.jsonl")):
            if source is not None:
                copy_file(self.path / name, source)

    def read_job(self) -> Job:
        """Return the job document. Raises JobSchema with the path of what is wrong in it."""
        file = self.path / "job.json"
        try:
            return msgspec.json.decode(file.read_bytes(), type=Job)
        except FileNotFoundError:
            raise JobSchema(str(file), "there is no such file; give a job directory, or --model, --data and --out") from None
        except OSError as error:
            raise JobSchema(str(file), f"it cannot be read ({error.strerror}); give a job directory") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise JobSchema(str(file), explain(error, Job)) from None

    def read_options(self) -> NewOptions:
        """Return the new options that were laid down. Raises JobSchema with the path of what is wrong in them."""
        try:
            return msgspec.json.decode(self.options_file.read_bytes(), type=NewOptions)
        except OSError as error:
            raise JobSchema(str(self.options_file), f"it cannot be read ({error.strerror})") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise JobSchema(str(self.options_file), str(error)) from None

    def write_options(self, options: NewOptions) -> None:
        """Lay down new options for the run, where they are not there already. Raises DiskFull."""
        data = msgspec.json.format(msgspec.json.encode(options)) + b"\n"
        if not self.options_file.is_file() or self.options_file.read_bytes() != data:
            write_file(self.options_file, data)

    def read_dataset(self, job: Job, room_bytes: int | None = None) -> tuple[list[Record], list[Record] | None]:
        """Return (records, evaluation records or None), their digests checked against the job; each may take `room_bytes` of memory."""
        file = self.path / "dataset.jsonl"
        check_sha256(file, job.dataset.sha256)
        if job.dataset.evaluation_sha256 is None:
            return read_records(file, room_bytes), None
        evaluation = self.path / "evaluation.jsonl"
        check_sha256(evaluation, job.dataset.evaluation_sha256)
        return read_records(file, room_bytes), read_records(evaluation, room_bytes)

    @property
    def begun(self) -> bool:
        """Whether a run has begun here before."""
        return (self.path / ".key").exists()

    def begin(self, key: str) -> None:
        """Keep what an earlier run of the same job and model left, and drop what any other left."""
        if not self._has_begun(key):
            self.forget_parts()
            for name in MADE:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.adapter, ignore_errors=True)
            write_file(self.path / ".key", key.encode())

    def _has_begun(self, key: str) -> bool:
        file = self.path / ".key"
        return file.exists() and file.read_text(encoding="utf-8") == key

    def read_rows(self, name: str, kind: type[T]) -> list[T] | None:
        """Return the rows that an earlier run of this job left in a JSONL file, or None."""
        try:
            return msgspec.json.Decoder(kind).decode_lines((self.path / name).read_bytes())
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def write_rows(self, name: str, rows: list[T]) -> None:
        write_file(self.path / name, msgspec.json.Encoder().encode_lines(rows))

    def read_result(self) -> Result | None:
        """Return the result of an earlier run, or None."""
        try:
            return msgspec.json.decode(self.result_file.read_bytes(), type=Result)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def read_misses(self, key: str) -> list[Miss]:
        """Return the plans of the same job and model that did not hold."""
        return (self.read_rows("misses.jsonl", Miss) or []) if self._has_begun(key) else []

    def add_miss(self, stage: StageName, text: str) -> Miss:
        """Write down that memory lacked in a stage although it was planned; the next plan takes it into account."""
        plan = msgspec.json.decode((self.path / "plan.json").read_bytes(), type=Plan)
        miss = Miss(stage, plan.rung, plan.planned_bytes(stage) or plan.peak_bytes, text)
        self.write_rows("misses.jsonl", [*(self.read_rows("misses.jsonl", Miss) or []), miss])
        (self.path / "plan.json").unlink()
        return miss

    def read_plan(self, key: str) -> Plan | None:
        """Return the plan that the same job and model have begun with, which a later run keeps; None where it has to be made."""
        try:
            return msgspec.json.decode((self.path / "plan.json").read_bytes(), type=Plan) if self._has_begun(key) else None
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def write_plan(self, plan: Plan) -> None:
        write_file(self.path / "plan.json", msgspec.json.format(msgspec.json.encode(plan)) + b"\n")

    def write_result(self, result: Result) -> None:
        write_file(self.result_file, msgspec.json.format(msgspec.json.encode(result)) + b"\n")

    def append_event(self, event: Event) -> None:
        with self.events.open("ab") as file:
            file.write(msgspec.json.encode(event) + b"\n")

    def has_adapter(self, sha256: str) -> bool:
        """Whether the adapter is there, with the digest that a report names."""
        file = self.adapter / "adapter_model.safetensors"
        return file.is_file() and file_sha256(file) == sha256

    @property
    def made_bytes(self) -> int:
        """What an earlier run has left on disk."""
        there = [self.path / name for name in (*MADE, *PARTS)] + [*self.adapter.glob("*")]
        return sum(file.stat().st_size for file in there if file.is_file())

    def forget_parts(self) -> None:
        """Remove what only an unfinished run needs, and the leftovers of writes that were cut off."""
        for name in PARTS:
            (self.path / name).unlink(missing_ok=True)
        for part in self.path.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process. Raises Busy; the kernel drops the lock when the process ends, however it ends."""
        try:
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise DirectoryUnusable(self.path, error.strerror or type(error).__name__) from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(self.path) from None
            yield
