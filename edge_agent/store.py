"""What an agent must not lose: its jobs and the messages that nobody has acknowledged yet, in one SQLite file.

All states, transitions and SQL of the agent are in this file. Every change of a job and the message that tells of it are one
transaction, on disk before the call returns (WAL, synchronous=FULL).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_agent.clocks import RunningTime
from edge_agent.database import open_database, transaction
from edge_agent.messages import LONGEST_ORDER_S, JobResult, JobStatus, OptionsState, Outcome, Phase, Reason, encode, new_id, read_order
from edge_agent.new_options import NewOptions
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
"""The phases in which a job has a trainer; in `paused` it waits for memory that others have, or for the device to cool."""

MOST_CLOSED = 10_000
"""Jobs that are remembered as closed; the oldest go first, so that nobody can fill the disk with them."""
CLOSED_S = 2 * LONGEST_ORDER_S
"""How long they are remembered, by the time that the agent runs: their orders have expired by then, also where clocks differ by days."""
LARGEST = 2**53 - 1
"""Of what goes over the wire."""

VERSIONS = (
    """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL,                -- of the job document
    payload BLOB NOT NULL,               -- JSON of the order, as it was signed
    priority INTEGER NOT NULL,
    arrived REAL NOT NULL,               -- seconds since 1970
    phase TEXT NOT NULL,
    outcome TEXT,
    result BLOB,                         -- JSON of the JobResult, with the outcome
    attempt INTEGER NOT NULL DEFAULT 0,  -- starts of the trainer
    crashes INTEGER NOT NULL DEFAULT 0,  -- starts that ended without a result and without a request to stop
    cancel INTEGER NOT NULL DEFAULT 0,   -- whether a cancel has been asked for
    seq INTEGER NOT NULL DEFAULT 0,      -- messages written about this job
    settled REAL,                        -- seconds since 1970; when the coordinator had acknowledged the end
    pid INTEGER, pid_ticks INTEGER       -- the trainer that was started last, in one row only
);
CREATE TABLE closed (
    id TEXT PRIMARY KEY,                 -- of a job that is not here, and must not come again: deleted, rejected, canceled before it came
    until REAL NOT NULL,                 -- seconds since 1970; then its order has expired
    status BLOB NOT NULL                 -- JSON of the JobStatus that answers its offer
);
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,             -- of the message; its acknowledgement deletes the row
    job TEXT NOT NULL,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL
);
""",
    """
ALTER TABLE jobs ADD COLUMN ran_s REAL NOT NULL DEFAULT 0;     -- what all its trainers have run, without what they waited
ALTER TABLE jobs ADD COLUMN cooled_s REAL NOT NULL DEFAULT 0;  -- what they have waited for the device to cool
""",
    """
-- From here on `arrived`, `settled` and `until` are seconds that the agent has run, over all its starts.
UPDATE jobs SET arrived = 0, settled = iif(settled IS NULL, NULL, 0);
UPDATE closed SET until = 5184000;
""",
    """
ALTER TABLE jobs ADD COLUMN options BLOB;          -- JSON of the NewOptions that its trainer is to go on with; null: its own
ALTER TABLE jobs ADD COLUMN options_state BLOB;    -- JSON of the OptionsState that is told of them; null: it was sent none
""",
    """
-- Which trainer was started last is in a file of its own, which outlives this one.
ALTER TABLE jobs DROP COLUMN pid;
ALTER TABLE jobs DROP COLUMN pid_ticks;
""",
)
"""The tables. A later version of the file is a further text that leads to it; those that are here never change."""
# Begins at the clock: an agent whose disk was wiped is newer than its last will. Where the clock was wrong, the coordinator says so.
COUNT_BOOT = """INSERT INTO meta VALUES ('boot', ?) ON CONFLICT (name) DO UPDATE SET value = min(max(value + 1, excluded.value), ?)
RETURNING value"""
SET_FLAG = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
GET_FLAG = "SELECT value FROM meta WHERE name = ?"
INSERT_JOB = "INSERT OR IGNORE INTO jobs (id, digest, payload, priority, arrived, phase) VALUES (?, ?, ?, ?, ?, 'accepted')"
GET_JOB = "SELECT * FROM jobs WHERE id = ?"
OPEN_JOBS = "SELECT * FROM jobs WHERE phase != 'ended' ORDER BY priority DESC, arrived, id"
OPEN_PAYLOADS = "SELECT id, payload FROM jobs WHERE phase != 'ended' ORDER BY arrived, id"
UNACKNOWLEDGED_JOBS = "SELECT * FROM jobs WHERE phase != 'ended' OR id IN (SELECT job FROM outbox) ORDER BY arrived, id"
MOVE_JOB = "UPDATE jobs SET phase = ? WHERE id = ?"
END_JOB = "UPDATE jobs SET phase = 'ended', outcome = ?, result = ? WHERE id = ?"
COUNT_START = "UPDATE jobs SET attempt = attempt + 1 WHERE id = ?"
COUNT_CRASH = "UPDATE jobs SET crashes = crashes + 1 WHERE id = ?"
SPEND_TIME = "UPDATE jobs SET ran_s = ?, cooled_s = ? WHERE id = ?"
ASK_CANCEL = "UPDATE jobs SET cancel = 1 WHERE id = ?"
SET_OPTIONS = "UPDATE jobs SET options = coalesce(?, options), options_state = ? WHERE id = ?"
GET_OPTIONS_STATE = "SELECT options_state FROM jobs WHERE id = ?"
COUNT_MESSAGE = "UPDATE jobs SET seq = seq + 1 WHERE id = ? RETURNING seq, attempt"
ALL_JOBS = "SELECT * FROM jobs ORDER BY arrived, id"
DELETE_JOB = "DELETE FROM jobs WHERE id = ? AND phase = 'ended'"
CLOSE = "INSERT OR REPLACE INTO closed (id, until, status) VALUES (?, ?, ?)"
CLOSED = "SELECT status FROM closed WHERE id = ?"
OPEN_AGAIN = "DELETE FROM closed WHERE until < ? OR rowid <= (SELECT max(rowid) FROM closed) - ?"
DELETE_MESSAGES = "DELETE FROM outbox WHERE job = ?"
INSERT_MESSAGE = "INSERT INTO outbox (id, job, topic, payload) VALUES (?, ?, ?, ?)"
DELETE_MESSAGE = "DELETE FROM outbox WHERE id = ? RETURNING job"
SETTLE = """UPDATE jobs SET settled = ? WHERE id = ? AND phase = 'ended' AND settled IS NULL
AND NOT EXISTS (SELECT 1 FROM outbox WHERE job = jobs.id)"""
SETTLED_BEFORE = "SELECT id FROM jobs WHERE settled < ? ORDER BY settled LIMIT 1"
WAITING_FOR_JOB = "SELECT 1 FROM outbox WHERE job = ?"
WAITING_MESSAGES = "SELECT id FROM outbox ORDER BY number"
GET_MESSAGE = "SELECT id, topic, payload FROM outbox WHERE id = ?"


@dataclass(frozen=True)
class JobRow:
    """A job as the agent keeps it; the fields are those of the table."""

    id: str
    digest: str
    payload: bytes
    priority: int
    arrived: float
    phase: Phase
    outcome: Outcome | None
    result: bytes | None
    attempt: int
    crashes: int
    cancel: bool
    seq: int
    settled: float | None
    ran_s: float
    cooled_s: float
    options: bytes | None
    options_state: bytes | None

    @property
    def new_options(self) -> NewOptions | None:
        return msgspec.json.decode(self.options, type=NewOptions) if self.options else None

    @property
    def sent_options(self) -> OptionsState:
        """What is told of the options that it was sent."""
        return msgspec.json.decode(self.options_state, type=OptionsState) if self.options_state else OptionsState()


@dataclass(frozen=True)
class Waiting:
    """A message that has not been acknowledged."""

    id: str
    topic: str
    payload: bytes


class Store:
    """The agent's database. One thread uses it. Raises StateUnusable where it cannot be opened."""

    def __init__(self, path: Path, fleet: str, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._node, self._source = fleet, node, f"edge1/{fleet}/{node}"
        self._db = open_database(path, VERSIONS, replace_damaged=True)
        self.clock = RunningTime(self._db, clock)
        self.boot: int = self._db.execute(COUNT_BOOT, (int(time.time()), LARGEST)).fetchone()[0]
        self.command = self._flag("command")
        """Number of the last word on whether new jobs are refused. Other threads may read it."""

    def close(self) -> None:
        with suppress(sqlite3.Error):  # of a disk that is full
            self.clock.keep()
        self._db.close()

    def raise_boot(self, known: int) -> None:
        """Make the number of this start higher than one that is known of an earlier one, whose database was lost."""
        self.boot = min(known + 1, LARGEST)
        self._db.execute(SET_FLAG, ("boot", self.boot))

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused; kept over restarts."""
        return bool(self._flag("draining"))

    def set_draining(self, value: bool, command: int) -> bool:
        """Keep whether new jobs are refused, by the word of a number; False where that is an older one, or another of this number."""
        if (command, value) != (self.command, self.draining) and command <= self.command:
            return False
        with transaction(self._db):
            self._db.execute(SET_FLAG, ("draining", int(value)))
            self._db.execute(SET_FLAG, ("command", command))
        self.command = command
        return True

    def _flag(self, name: str) -> int:
        row = self._db.execute(GET_FLAG, (name,)).fetchone()
        return int(row[0]) if row else 0

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

    def accept(self, job: str, digest: str, payload: bytes, priority: int) -> None:
        """Keep a new job and the message that it was accepted. A job that is there already changes nothing."""
        with transaction(self._db):
            if self._db.execute(INSERT_JOB, (job, digest, payload, priority, self.clock.keep())).rowcount:
                self._tell(job, JobStatus(digest, "accepted"))

    def move(
        self, job: str, phase: Phase, *, start: bool = False, crashed: bool = False, reason: Reason | None = None, text: str | None = None
    ) -> JobRow:
        """Move a job to a phase that is not its end, and keep the message that tells it, with its reason where it has one."""
        with transaction(self._db):
            row = self._checked(job, phase)
            self._db.execute(MOVE_JOB, (phase, job))
            if start:
                self._db.execute(COUNT_START, (job,))
            if crashed:
                self._db.execute(COUNT_CRASH, (job,))
            self._tell(job, JobStatus(row.digest, phase, None, reason, text))
        moved = self.job(job)
        if moved is None:
            raise LookupError(job)
        return moved

    def end(self, job: str, result: JobResult) -> None:
        """End a job and keep its result, in one transaction."""
        with transaction(self._db):
            self._checked(job, "ended")
            self._end(job, result)

    def tell_again(self, row: JobRow) -> None:
        """Keep a message with the current view of a job once more, unless what was said last is still to be acknowledged."""
        with transaction(self._db):
            if self._db.execute(WAITING_FOR_JOB, (row.id,)).fetchone():
                return
            if row.result is not None:
                self._tell(row.id, msgspec.json.decode(row.result, type=JobResult))
            else:
                self._tell(row.id, JobStatus(row.digest, row.phase))

    def spend_time(self, job: str, ran_s: float, cooled_s: float) -> None:
        """Keep what all trainers of a job have run, and waited for the device to cool."""
        self._db.execute(SPEND_TIME, (ran_s, cooled_s, job))

    def ask_cancel(self, job: str) -> None:
        self._db.execute(ASK_CANCEL, (job,))

    def set_options(self, job: str, state: OptionsState, options: NewOptions | None = None) -> None:
        """Keep what has become of the options that a job was sent, new ones where they are to be taken, and the message that tells it."""
        row = self.job(job)
        if row is None or row.phase == "ended":
            raise LookupError(f"job {job} takes no options")
        with transaction(self._db):
            self._db.execute(SET_OPTIONS, (msgspec.json.encode(options) if options else None, msgspec.json.encode(state), job))
            self._tell(job, JobStatus(row.digest, row.phase))

    def forget(self, job: str, status: JobStatus) -> None:
        """Delete a job that has ended, or is unknown, with what was still to be said of it, and close it."""
        with transaction(self._db):
            self._db.execute(DELETE_JOB, (job,))
            self._db.execute(DELETE_MESSAGES, (job,))
            self._close(job, status)

    def close_job(self, job: str, status: JobStatus) -> None:
        """Remember that a job must not come, and what is said to its offer, until that has expired."""
        with transaction(self._db):
            self._close(job, status)

    def _close(self, job: str, status: JobStatus) -> None:
        now = self.clock.keep()
        self._db.execute(CLOSE, (job, now + CLOSED_S, msgspec.json.encode(status)))
        self._db.execute(OPEN_AGAIN, (now, MOST_CLOSED))

    def closed(self, job: str) -> JobStatus | None:
        """Return what is said to the offer of a job that must not come."""
        row = self._db.execute(CLOSED, (job,)).fetchone()
        return msgspec.json.decode(row[0], type=JobStatus) if row else None

    def waiting(self) -> list[str]:
        """The messages that have not been acknowledged, by their ids, the oldest first."""
        return [row[0] for row in self._db.execute(WAITING_MESSAGES)]

    def message(self, message: str) -> Waiting | None:
        """Return a message that has not been acknowledged."""
        row = self._db.execute(GET_MESSAGE, (message,)).fetchone()
        return Waiting(*row) if row else None

    def acknowledged(self, message: str) -> bool:
        """Delete a message that has been stored at its destination; False where it was not there."""
        with transaction(self._db):
            row = self._db.execute(DELETE_MESSAGE, (message,)).fetchone()
            if row is not None:
                self._db.execute(SETTLE, (self.clock.keep(), row[0]))
        return row is not None

    def settled_for(self, age_s: float) -> str | None:
        """Return the ended job whose end was acknowledged first, if the agent has run longer than that since then."""
        row = self._db.execute(SETTLED_BEFORE, (self.clock.now() - age_s,)).fetchone()
        return row[0] if row else None

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
        if isinstance(data, JobStatus) and (state := self._db.execute(GET_OPTIONS_STATE, (job,)).fetchone()[0]):
            data = msgspec.structs.replace(data, options=msgspec.json.decode(state, type=OptionsState))
        message, kind = new_id(), "result" if isinstance(data, JobResult) else "status"
        payload = encode(data, self._source, boot=self.boot, attempt=attempt, seq=seq, message_id=message)
        self._db.execute(INSERT_MESSAGE, (message, job, up(self._fleet, self._node, "job", job, kind), payload))


def jobs_of_model(path: Path, model: str) -> list[str]:
    """Return the jobs in the file of an agent, which may be running, that have not ended and name a model. Raises sqlite3.Error."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as db:  # SQLite reads a log beside it with `rw` only
        return [job for job, payload in db.execute(OPEN_PAYLOADS) if read_order(payload).job.model == model]
