"""What an agent must not lose: its jobs and the messages that nobody has acknowledged yet, in one SQLite file.

All states, transitions and SQL of the agent are in this file. Every change of a job and the message that tells of it are one
transaction, on disk before the call returns (WAL, synchronous=FULL).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_agent.database import open_database, transaction
from edge_agent.messages import JobResult, JobStatus, Outcome, Phase, Reason, encode, new_id
from edge_agent.topics import up

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    "accepted": frozenset({"staging", "ended"}),
    "staging": frozenset({"ready", "ended"}),
    "ready": frozenset({"running", "ended"}),
    "running": frozenset({"paused", "ready", "finalizing", "ended"}),  # ready: the trainer was interrupted and goes on later
    "paused": frozenset({"running", "ready", "finalizing", "ended"}),  # finalizing: it has ended before its word that it goes on was heard
    "finalizing": frozenset({"ended"}),
    "ended": frozenset(),
}
"""The phases a job may go to. `ended` has an outcome and never changes."""
HAS_TRAINER: frozenset[Phase] = frozenset({"running", "paused"})
"""The phases in which a job has a trainer; in `paused` it waits for memory that others have."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL,                -- of the job document; empty for a job canceled before its offer came
    offer BLOB NOT NULL,                 -- JSON of the offer without inline files
    priority INTEGER NOT NULL,
    arrived REAL NOT NULL,               -- seconds since 1970
    phase TEXT NOT NULL,
    outcome TEXT,
    result BLOB,                         -- JSON of the JobResult, with the outcome
    attempt INTEGER NOT NULL DEFAULT 0,  -- starts of the trainer
    crashes INTEGER NOT NULL DEFAULT 0,  -- starts that ended without a result and without a request to stop
    cancel INTEGER NOT NULL DEFAULT 0,   -- whether a cancel has been asked for
    seq INTEGER NOT NULL DEFAULT 0,      -- messages written about this job
    pid INTEGER, pid_ticks INTEGER       -- the trainer that was started last, in one row only
);
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,             -- of the message; its acknowledgement deletes the row
    job TEXT NOT NULL,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL
);
"""
# Begins at the clock: also an agent whose disk was wiped is newer than its last will.
COUNT_BOOT = """INSERT INTO meta VALUES ('boot', ?) ON CONFLICT (name) DO UPDATE SET value = max(value + 1, excluded.value)
RETURNING value"""
SET_FLAG = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
GET_FLAG = "SELECT value FROM meta WHERE name = ?"
INSERT_JOB = "INSERT OR IGNORE INTO jobs (id, digest, offer, priority, arrived, phase) VALUES (?, ?, ?, ?, ?, 'accepted')"
GET_JOB = "SELECT * FROM jobs WHERE id = ?"
OPEN_JOBS = "SELECT * FROM jobs WHERE phase != 'ended' ORDER BY priority DESC, arrived, id"
UNACKNOWLEDGED_JOBS = "SELECT * FROM jobs WHERE phase != 'ended' OR id IN (SELECT job FROM outbox) ORDER BY arrived, id"
MOVE_JOB = "UPDATE jobs SET phase = ? WHERE id = ?"
END_JOB = "UPDATE jobs SET phase = 'ended', outcome = ?, result = ? WHERE id = ?"
COUNT_START = "UPDATE jobs SET attempt = attempt + 1 WHERE id = ?"
COUNT_CRASH = "UPDATE jobs SET crashes = crashes + 1 WHERE id = ?"
NO_TRAINER = "UPDATE jobs SET pid = NULL, pid_ticks = NULL WHERE pid IS NOT NULL"
SET_TRAINER = "UPDATE jobs SET pid = ?, pid_ticks = ? WHERE id = ?"
LAST_TRAINER = "SELECT pid, pid_ticks FROM jobs WHERE pid IS NOT NULL"
ASK_CANCEL = "UPDATE jobs SET cancel = 1 WHERE id = ?"
COUNT_MESSAGE = "UPDATE jobs SET seq = seq + 1 WHERE id = ? RETURNING seq, attempt"
ALL_JOBS = "SELECT * FROM jobs ORDER BY arrived, id"
DELETE_JOB = "DELETE FROM jobs WHERE id = ? AND phase = 'ended'"
DELETE_MESSAGES = "DELETE FROM outbox WHERE job = ?"
INSERT_MESSAGE = "INSERT INTO outbox (id, job, topic, payload) VALUES (?, ?, ?, ?)"
DELETE_MESSAGE = "DELETE FROM outbox WHERE id = ?"
WAITING_FOR_JOB = "SELECT 1 FROM outbox WHERE job = ?"
WAITING_MESSAGES = "SELECT id, topic, payload FROM outbox ORDER BY number LIMIT ?"


@dataclass(frozen=True)
class JobRow:
    """A job as the agent keeps it; the fields are those of the table."""

    id: str
    digest: str
    offer: bytes
    priority: int
    arrived: float
    phase: Phase
    outcome: Outcome | None
    result: bytes | None
    attempt: int
    crashes: int
    cancel: bool
    seq: int
    pid: int | None
    pid_ticks: int | None


@dataclass(frozen=True)
class Waiting:
    """A message that has not been acknowledged."""

    id: str
    topic: str
    payload: bytes


class Store:
    """The agent's database. One thread uses it. Raises StateUnusable where it cannot be opened."""

    def __init__(self, path: Path, fleet: str, node: str) -> None:
        self._fleet, self._node, self._source = fleet, node, f"edge1/{fleet}/{node}"
        self._db = open_database(path, SCHEMA)
        self.boot: int = self._db.execute(COUNT_BOOT, (int(time.time()),)).fetchone()[0]

    def close(self) -> None:
        self._db.close()

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused; kept over restarts."""
        row = self._db.execute(GET_FLAG, ("draining",)).fetchone()
        return bool(row and row[0])

    @draining.setter
    def draining(self, value: bool) -> None:
        self._db.execute(SET_FLAG, ("draining", int(value)))

    def job(self, job: str) -> JobRow | None:
        row = self._db.execute(GET_JOB, (job,)).fetchone()
        return JobRow(*row) if row else None

    def open_jobs(self) -> list[JobRow]:
        """Jobs that have not ended: by priority, then arrival."""
        return [JobRow(*row) for row in self._db.execute(OPEN_JOBS)]

    def jobs(self) -> list[JobRow]:
        """All jobs, the oldest first."""
        return [JobRow(*row) for row in self._db.execute(ALL_JOBS)]

    def unacknowledged_jobs(self) -> list[JobRow]:
        """Jobs that have not ended, or of whose end the coordinator may not know."""
        return [JobRow(*row) for row in self._db.execute(UNACKNOWLEDGED_JOBS)]

    def accept(self, job: str, digest: str, offer: bytes, priority: int) -> None:
        """Keep a new job and the message that it was accepted. A job that is there already changes nothing."""
        with transaction(self._db):
            if self._db.execute(INSERT_JOB, (job, digest, offer, priority, time.time())).rowcount:
                self._tell(job, JobStatus(digest, "accepted"))

    def reject(self, job: str, digest: str | None, reason: Reason, text: str) -> None:
        """Keep the message that an offer was rejected, and nothing else of it."""
        status = JobStatus(digest, "ended", "rejected", reason, text[:1024])
        with transaction(self._db):
            self._write(job, "status", status, seq=None, attempt=None)

    def move(self, job: str, phase: Phase, *, start: bool = False, crashed: bool = False) -> JobRow:
        """Move a job to a phase that is not its end, and keep the message that tells it."""
        with transaction(self._db):
            row = self._checked(job, phase)
            self._db.execute(MOVE_JOB, (phase, job))
            if start:
                self._db.execute(COUNT_START, (job,))
            if crashed:
                self._db.execute(COUNT_CRASH, (job,))
            self._tell(job, JobStatus(row.digest, phase))
        moved = self.job(job)
        if moved is None:
            raise LookupError(job)
        return moved

    def end(self, job: str, result: JobResult) -> None:
        """End a job and keep its result, in one transaction."""
        with transaction(self._db):
            self._checked(job, "ended")
            self._end(job, result)

    def cancel_unknown(self, job: str) -> None:
        """Keep the end of a job that is canceled before its offer came, so that a late offer does not start it."""
        with transaction(self._db):
            self._db.execute(INSERT_JOB, (job, "", b"", 0, time.time()))
            self._end(job, JobResult(None, "canceled", "canceled", "it was canceled before its offer came"))

    def tell_again(self, row: JobRow) -> None:
        """Keep a message with the current view of a job once more, unless what was said last is still to be acknowledged."""
        with transaction(self._db):
            if self._db.execute(WAITING_FOR_JOB, (row.id,)).fetchone():
                return
            if row.result is not None:
                self._tell(row.id, msgspec.json.decode(row.result, type=JobResult))
            else:
                self._tell(row.id, JobStatus(row.digest, row.phase))

    def ask_cancel(self, job: str) -> None:
        self._db.execute(ASK_CANCEL, (job,))

    def set_trainer(self, job: str, pid: int, ticks: int) -> None:
        """Remember the process of a job's trainer by its id and its start in ticks since the machine's own."""
        with transaction(self._db):
            self._db.execute(NO_TRAINER)
            self._db.execute(SET_TRAINER, (pid, ticks, job))

    def last_trainer(self) -> tuple[int, int] | None:
        row = self._db.execute(LAST_TRAINER).fetchone()
        return (row[0], row[1]) if row else None

    def forget(self, job: str) -> bool:
        """Delete a job that has ended, and what was still to be said of it; False where it has not ended, or is unknown."""
        with transaction(self._db):
            deleted = bool(self._db.execute(DELETE_JOB, (job,)).rowcount)
            if deleted:
                self._db.execute(DELETE_MESSAGES, (job,))
        return deleted

    def waiting(self, limit: int) -> list[Waiting]:
        """The oldest messages that have not been acknowledged."""
        return [Waiting(*row) for row in self._db.execute(WAITING_MESSAGES, (limit,))]

    def acknowledged(self, message: str) -> bool:
        """Delete a message that has been stored at its destination; False where it was not there."""
        return bool(self._db.execute(DELETE_MESSAGE, (message,)).rowcount)

    def _checked(self, job: str, phase: Phase) -> JobRow:
        row = self.job(job)
        if row is None or phase not in TRANSITIONS[row.phase]:
            raise LookupError(f"job {job} cannot go from {row.phase if row else 'nothing'} to {phase}")
        return row

    def _end(self, job: str, result: JobResult) -> None:
        self._db.execute(END_JOB, (result.outcome, msgspec.json.encode(result), job))
        self._tell(job, result)

    def _tell(self, job: str, data: JobStatus | JobResult) -> None:
        seq, attempt = self._db.execute(COUNT_MESSAGE, (job,)).fetchone()
        self._write(job, "result" if isinstance(data, JobResult) else "status", data, seq, attempt)

    def _write(self, job: str, kind: str, data: JobStatus | JobResult, seq: int | None, attempt: int | None) -> None:
        message = new_id()
        payload = encode(data, self._source, boot=self.boot, attempt=attempt, seq=seq, message_id=message)
        self._db.execute(INSERT_MESSAGE, (message, job, up(self._fleet, self._node, "job", job, kind), payload))
