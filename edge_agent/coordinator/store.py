"""What a coordinator must not lose: jobs, what nodes have said of them, and nodes, in one SQLite file. All its SQL is here."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_agent.clocks import RunningTime
from edge_agent.database import open_database, transaction
from edge_agent.dataset_check import Check
from edge_agent.messages import (
    Artifact,
    Envelope,
    Heartbeat,
    JobResult,
    JobStatus,
    Message,
    NodeInfo,
    NodeState,
    Order,
    Outcome,
    Phase,
    Reason,
    read_order,
)

MANY = 2**31
"""As a limit: all."""
MOST_HISTORY = 1000
"""Messages of a job that are kept; the oldest go first, so that no node can fill the disk with them."""
MOST_AUDITED = 100_000
"""Requests that are kept; the oldest go first."""
VERSIONS = (
    """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    digest TEXT NOT NULL,
    envelope BLOB NOT NULL,              -- JSON of the envelope with the order
    created REAL NOT NULL,               -- seconds since 1970, as all times here
    changed REAL NOT NULL,
    phase TEXT NOT NULL,                 -- created, offered, then the phases of the agent
    outcome TEXT, reason TEXT, text TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    boot INTEGER NOT NULL DEFAULT 0,     -- the start of the agent that the newest message about this job came from
    seq INTEGER NOT NULL DEFAULT 0,      -- and its number
    cancel INTEGER NOT NULL DEFAULT 0,   -- whether somebody has asked for its end
    forget INTEGER NOT NULL DEFAULT 0,   -- whether somebody has asked for its deletion, which awaits its node
    result BLOB                          -- JSON of the JobResult, once it has come
);
CREATE TABLE history (
    message TEXT PRIMARY KEY,            -- id of the message: a repeated one is known here
    job TEXT NOT NULL,
    time REAL NOT NULL,
    seq INTEGER, attempt INTEGER,
    phase TEXT NOT NULL,
    outcome TEXT, reason TEXT, text TEXT,
    late INTEGER NOT NULL                -- whether it came after a newer one and changed nothing
);
CREATE INDEX history_of_job ON history (job, time);
CREATE TABLE nodes (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    boot INTEGER NOT NULL, conn INTEGER NOT NULL,
    seen REAL NOT NULL,                  -- when the node itself last spoke
    info BLOB, heartbeat BLOB,
    drain INTEGER                        -- whether it is to take no new jobs; null: nobody has said
);
""",
    """
ALTER TABLE nodes ADD COLUMN drain_command INTEGER NOT NULL DEFAULT 0;  -- the number under which it is told so
ALTER TABLE nodes ADD COLUMN told INTEGER NOT NULL DEFAULT 0;           -- and that which it says to have done last
""",
    """
ALTER TABLE nodes ADD COLUMN heard REAL NOT NULL DEFAULT 0;  -- as `seen`, in seconds that the coordinator has run, over all its starts
""",
    """
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    digest BLOB NOT NULL,                -- sha256 of its secret
    scope TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL                         -- null: never
);
CREATE TABLE datasets (
    sha256 TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    uploaded REAL NOT NULL,
    found BLOB NOT NULL                  -- JSON of its check
);
CREATE TABLE audit (
    number INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    who TEXT NOT NULL,                   -- name of the token, or local
    address TEXT,                        -- null: on the socket
    what TEXT NOT NULL,                  -- method and path
    made TEXT,                           -- path of what it has made
    status INTEGER NOT NULL
);
ALTER TABLE jobs ADD COLUMN retry_of TEXT; -- the job that it is run again for
""",
)
"""The tables. A later version of the file is a further text that leads to it; those that are here never change."""
# Begins at the clock: also a coordinator whose disk was wiped is newer than its last will.
COUNT_EPOCH = """INSERT INTO meta VALUES ('epoch', ?) ON CONFLICT (name) DO UPDATE SET value = max(value + 1, excluded.value)
RETURNING value"""
INSERT_JOB = "INSERT INTO jobs (id, node, digest, envelope, created, changed, phase, retry_of) VALUES (?, ?, ?, ?, ?, ?, 'created', ?)"
JOBS = """SELECT jobs.*, jobs.rowid AS number, phase NOT IN ('created', 'offered', 'ended') AND ifnull(heard, 0) < ?1 AS lost
FROM jobs LEFT JOIN nodes ON nodes.id = jobs.node"""
GET_JOB = f"{JOBS} WHERE jobs.id = ?2"
LIST_JOBS = f"""{JOBS} WHERE (?2 IS NULL OR jobs.rowid < ?2) AND (?3 IS NULL OR phase = ?3) AND (?4 IS NULL OR outcome = ?4)
AND (?5 IS NULL OR node = ?5) ORDER BY jobs.rowid DESC LIMIT ?6"""
GET_ENVELOPE = "SELECT envelope FROM jobs WHERE id = ?"
OPEN_JOBS = f"{JOBS} WHERE phase != 'ended' ORDER BY jobs.rowid"
SET_PHASE = "UPDATE jobs SET phase = ?, changed = ? WHERE id = ?"
SET_STATUS = """UPDATE jobs SET phase = ?, outcome = ?, reason = ?, text = ?, attempt = ?, boot = ?, seq = ?, changed = ?, result = NULL
WHERE id = ?"""
SET_RESULT = "UPDATE jobs SET phase = 'finalizing', result = ?, attempt = ?, boot = ?, seq = ?, changed = ? WHERE id = ?"
END_JOB = "UPDATE jobs SET phase = 'ended', outcome = ?, reason = ?, text = ?, changed = ? WHERE id = ?"
ASK_CANCEL = "UPDATE jobs SET cancel = 1, changed = ? WHERE id = ?"
ASK_FORGET = "UPDATE jobs SET forget = 1, changed = ? WHERE id = ?"
FORGOTTEN_JOBS = f"{JOBS} WHERE forget ORDER BY jobs.rowid"
DELETE_JOB = "DELETE FROM jobs WHERE id = ?"
DELETE_HISTORY = "DELETE FROM history WHERE job = ?"
SET_DRAIN = "UPDATE nodes SET drain = ?, drain_command = max(drain_command, min(told, ?)) + 1 WHERE id = ?"
KNOWN_MESSAGE = "SELECT 1 FROM history WHERE message = ?"
INSERT_HISTORY = "INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
CUT_HISTORY = """DELETE FROM history WHERE job = ?1
AND rowid <= (SELECT rowid FROM history WHERE job = ?1 ORDER BY rowid DESC LIMIT 1 OFFSET ?2)"""
GET_HISTORY = """SELECT * FROM (SELECT rowid AS number, time, seq, attempt, phase, outcome, reason, text, late FROM history WHERE job = ?
ORDER BY rowid DESC LIMIT ?) ORDER BY number"""
GET_NODE = "SELECT * FROM nodes WHERE id = ?"
LIST_NODES = "SELECT * FROM nodes WHERE (?1 IS NULL OR id > ?1) AND (?2 IS NULL OR state = ?2) ORDER BY id LIMIT ?3"
INSERT_TOKEN = "INSERT INTO tokens (name, digest, scope, created, expires) VALUES (?, ?, ?, ?, ?)"  # noqa: S105
DELETE_TOKEN = "DELETE FROM tokens WHERE name = ?"  # noqa: S105
KEEP_DATASET = """INSERT INTO datasets VALUES (?, ?, ?, ?, ?)
ON CONFLICT (sha256) DO UPDATE SET name = excluded.name, uploaded = excluded.uploaded, found = excluded.found"""
GET_DATASET = "SELECT * FROM datasets WHERE sha256 = ?"
LIST_DATASETS = "SELECT * FROM datasets WHERE ?1 IS NULL OR sha256 > ?1 ORDER BY sha256 LIMIT ?2"
DELETE_DATASET = "DELETE FROM datasets WHERE sha256 = ?"
ADD_AUDIT = "INSERT INTO audit (time, who, address, what, made, status) VALUES (?, ?, ?, ?, ?, ?)"
CUT_AUDIT = "DELETE FROM audit WHERE number <= (SELECT max(number) FROM audit) - ?"
LIST_AUDIT = "SELECT * FROM audit WHERE ?1 IS NULL OR number < ?1 ORDER BY number DESC LIMIT ?2"
COUNT_NODES = "SELECT state, count(*) FROM nodes GROUP BY state"
COUNT_UNANSWERED = "SELECT count(*) FROM jobs WHERE phase = 'offered' OR (cancel AND phase != 'ended') OR forget"
COUNT_JOBS = "SELECT phase, ifnull(outcome, ''), count(*) FROM jobs GROUP BY 1, 2"
ALL_TOKENS = "SELECT * FROM tokens ORDER BY name"
SET_STATE = """INSERT INTO nodes (id, state, boot, conn, told, seen, heard) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, boot = excluded.boot, conn = excluded.conn, told = excluded.told"""
SET_SEEN = "UPDATE nodes SET seen = ?, heard = ? WHERE id = ?"
SET_INFO = """INSERT INTO nodes (id, state, boot, conn, seen, heard, info) VALUES (?, 'init', 0, 0, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET info = excluded.info"""
SET_HEARTBEAT = "UPDATE nodes SET heartbeat = ? WHERE id = ?"

MOST_TOLD = 2**52
"""What a node says of the last command that it has done is not signed: no higher number is believed, so there is always one above it."""

MOST_BOOT, BOOT_STEP = 2**40, 2**16
"""Likewise the number of its start: above the first (a time in 36,000 years) only one that is a few above the last known is believed, so
nobody who speaks in a node's name can use up the numbers that it has yet to come to."""

CoordinatorPhase = Literal["created", "offered"] | Phase
CoordinatorOutcome = Outcome | Literal["expired"]


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the coordinator knows it."""

    id: str
    node: str
    digest: str
    order: Order
    created: float
    changed: float
    phase: CoordinatorPhase
    outcome: CoordinatorOutcome | None
    reason: Reason | None
    text: str | None
    attempt: int
    boot: int
    seq: int
    cancel: bool
    forget: bool
    lost: bool
    """Whether it is at a node that has been silent for longer than the lease: it may be lost, and may come back."""
    result: JobResult | None
    retry_of: str | None = None
    """The job that it is run again for."""

    @property
    def files(self) -> set[str]:
        """The files that the job brought and made, by their sha256."""
        return {file.sha256 for file in self.order.files} | {artifact.sha256 for artifact in self.artifacts}

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return self.result.artifacts if self.result else ()


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a list has; null: whatever they have."""

    phase: CoordinatorPhase | None = None
    outcome: CoordinatorOutcome | None = None
    node: str | None = None


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs, the newest first."""

    items: list[JobView]
    next: str | None
    """What `after` is to be for the page that follows; null: there is none."""


class HistoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One message that a node sent about a job."""

    time: float
    seq: int | None
    attempt: int | None
    phase: Phase
    outcome: Outcome | None
    reason: Reason | None
    text: str | None
    late: bool


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the coordinator knows it."""

    id: str
    state: Literal["init", "ready", "draining", "offline", "lost"]
    boot: int
    conn: int
    seen: float
    info: NodeInfo | None
    heartbeat: Heartbeat | None
    drain: bool | None
    drain_command: int
    """The number under which it is told so."""
    told: int
    """That of the last one that it has done, as it says."""

    @property
    def present(self) -> bool:
        return self.state in ("ready", "draining")


class NodePage(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes by their names."""

    items: list[NodeView]
    next: str | None
    """As of jobs."""


class DatasetView(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset that was uploaded."""

    sha256: str
    name: str
    size_bytes: int
    uploaded: float
    found: Check
    """What is in it."""


class DatasetPage(msgspec.Struct, frozen=True, kw_only=True):
    """Datasets by their sha256."""

    items: list[DatasetView]
    next: str | None
    """As of jobs."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a token; nobody can tell its secret."""

    name: str
    scope: Literal["read", "submit", "admin"]
    created: float
    expires: float | None


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was to change something."""

    time: float
    who: str
    """Name of the token, or `local`."""
    address: str | None
    """null: on the socket."""
    what: str
    """Method and path."""
    made: str | None
    """Path of what it has made."""
    status: int


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the newest first."""

    items: list[Audited]
    next: str | None
    """As of jobs."""


class CoordinatorStore:
    """The coordinator's database. One thread uses it. Raises StateUnusable where it cannot be opened."""

    def __init__(self, path: Path, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`lease_s`: how long a node may be silent, while the coordinator runs, until what it has taken counts as lost."""
        self._db, self._lease_s = open_database(path, VERSIONS), lease_s
        self.clock = RunningTime(self._db, clock)
        self.late = 0
        """Messages that came after newer ones, since the start."""
        self.epoch: int = self._db.execute(COUNT_EPOCH, (int(time.time()),)).fetchone()[0]

    def close(self) -> None:
        with suppress(sqlite3.Error):  # of a disk that is full
            self.clock.keep()
        self._db.close()

    # jobs

    def conclude(self, job: str, text: str) -> None:
        """End a job by the result that has come, although not all of its files have."""
        view = self.job(job)
        if view is not None and view.result is not None and view.phase != "ended":
            self.end(job, view.result.outcome, view.result.reason, text)

    def add_job(self, order: Order, envelope: Envelope, retry_of: str | None = None) -> None:
        """Keep an order and the envelope that it is in."""
        now = time.time()
        self._db.execute(INSERT_JOB, (order.id, order.node, order.job.digest, msgspec.json.encode(envelope), now, now, retry_of))

    def job(self, job: str) -> JobView | None:
        found = self._jobs(GET_JOB, job)
        return found[0] if found else None

    def envelope(self, job: str) -> Envelope:
        """That around the order of a job which is there."""
        return msgspec.json.decode(self._db.execute(GET_ENVELOPE, (job,)).fetchone()["envelope"], type=Envelope)

    def jobs(self, limit: int) -> list[JobView]:
        """The newest jobs first."""
        return self.job_page(JobFilter(), None, limit).items

    def job_page(self, which: JobFilter, after: str | None, limit: int) -> JobPage:
        """The newest jobs first, from where a page before has ended."""
        before = None if after is None else int(after)
        rows = self._db.execute(LIST_JOBS, (self._silent, before, which.phase, which.outcome, which.node, limit + 1)).fetchall()
        return JobPage(items=[_job(row) for row in rows[:limit]], next=str(rows[limit - 1]["number"]) if len(rows) > limit else None)

    def open_jobs(self) -> list[JobView]:
        return self._jobs(OPEN_JOBS)

    def _jobs(self, query: str, *arguments: object) -> list[JobView]:
        return [_job(row) for row in self._db.execute(query, (self._silent, *arguments))]

    @property
    def _silent(self) -> float:
        """A node that has not spoken since then is lost."""
        return self.clock.now() - self._lease_s

    def history(self, job: str) -> list[HistoryRow]:
        """The last messages about a job, the oldest first."""
        rows = self._db.execute(GET_HISTORY, (job, MOST_HISTORY))
        return [msgspec.convert(dict(row) | {"late": bool(row["late"])}, HistoryRow) for row in rows]

    def offered(self, job: str) -> None:
        self._db.execute(SET_PHASE, ("offered", time.time(), job))

    def ask_cancel(self, job: str) -> None:
        self._db.execute(ASK_CANCEL, (time.time(), job))

    def ask_forget(self, job: str) -> None:
        self._db.execute(ASK_FORGET, (time.time(), job))

    def forgotten_jobs(self) -> list[JobView]:
        """Jobs whose deletion has been asked for."""
        return self._jobs(FORGOTTEN_JOBS)

    def delete_job(self, job: str) -> None:
        """Delete a job and what was said of it."""
        with transaction(self._db):
            self._db.execute(DELETE_HISTORY, (job,))
            self._db.execute(DELETE_JOB, (job,))

    def end(self, job: str, outcome: str, reason: str | None, text: str | None) -> None:
        """End a job for good."""
        self._db.execute(END_JOB, (outcome, reason, text, time.time(), job))

    def apply_status(self, view: JobView, message: Message[JobStatus]) -> bool:
        """Keep a status; it changes the job if it is newer than what is known and the job has not ended. False where one is missing."""
        status, place = message.data, _place(message, view)
        # A rejection of a job that the node has taken answers an offer that came again, unless it has lost its disk or deleted the job.
        again = status.outcome == "rejected" and view.phase not in ("created", "offered")
        taken = again and status.reason != "replayed" and place[0] <= view.boot
        late = view.phase == "ended" or taken or place <= (view.boot, view.seq)
        with transaction(self._db):
            if not self._keep(view.id, message, status.phase, late):
                return True
            if not late:
                attempt = message.attempt or view.attempt
                told = (status.phase, status.outcome, status.reason, status.text, attempt, *place, time.time(), view.id)
                self._db.execute(SET_STATUS, told)
        return message.seq is None or message.seq == view.seq + 1 or (message.seq == 1 and place[0] > view.boot)

    def apply_result(self, view: JobView, message: Message[JobResult]) -> None:
        """Keep the end of a job; it becomes the job's own when every artifact is here."""
        late = view.result is not None or view.phase == "ended"
        with transaction(self._db):
            if self._keep(view.id, message, "ended", late) and not late:
                told = (msgspec.json.encode(message.data), message.attempt or view.attempt, *_place(message, view), time.time(), view.id)
                self._db.execute(SET_RESULT, told)

    def _keep(self, job: str, message: Message[Any], phase: Phase, late: bool) -> bool:
        """Write a message into the history; False where it is there already."""
        if self._db.execute(KNOWN_MESSAGE, (message.id,)).fetchone():
            return False
        self.late += late
        data = message.data
        row = (message.id, job, message.time.timestamp(), message.seq, message.attempt, phase, data.outcome, data.reason, data.text, late)
        self._db.execute(INSERT_HISTORY, row)
        self._db.execute(CUT_HISTORY, (job, MOST_HISTORY))
        return True

    # nodes

    def node(self, node: str) -> NodeView | None:
        row = self._db.execute(GET_NODE, (node,)).fetchone()
        return _node(row) if row else None

    def nodes(self) -> list[NodeView]:
        return self.node_page(None, None, MANY).items

    def node_page(self, state: str | None, after: str | None, limit: int) -> NodePage:
        nodes = [_node(row) for row in self._db.execute(LIST_NODES, (after, state, limit + 1))]
        return NodePage(items=nodes[:limit], next=nodes[limit - 1].id if len(nodes) > limit else None)

    def set_state(self, node: str, state: NodeState, *, retained: bool) -> bool:
        """Keep the presence of a node; False where it is of an earlier connection than the one that is known, or of a start that cannot be.

        A last will is the broker's word and a retained message is of the past: neither says that the node is there now.
        """
        known = self.node(node)
        if known is not None and (state.boot, state.conn) < (known.boot, known.conn):
            return False
        if state.boot > max(MOST_BOOT, (known.boot if known else 0) + BOOT_STEP):
            return False
        with transaction(self._db):
            now = time.time(), self.clock.now()
            self._db.execute(SET_STATE, (node, state.state, state.boot, state.conn, state.command, *now))
            if not retained and state.state != "lost":
                self._db.execute(SET_SEEN, (*now, node))
        return True

    def set_drain(self, node: str, drain: bool) -> None:
        """Keep whether a node is to take no new jobs, under a number above all that it has been told before."""
        self._db.execute(SET_DRAIN, (drain, MOST_TOLD, node))

    def set_info(self, node: str, info: NodeInfo) -> None:
        self._db.execute(SET_INFO, (node, time.time(), self.clock.now(), msgspec.json.encode(info)))

    def set_heartbeat(self, node: str, heartbeat: Heartbeat) -> None:
        with transaction(self._db):
            self._db.execute(SET_HEARTBEAT, (msgspec.json.encode(heartbeat), node))
            self._db.execute(SET_SEEN, (time.time(), self.clock.now(), node))

    # datasets

    def keep_dataset(self, view: DatasetView) -> None:
        row = (view.sha256, view.name, view.size_bytes, view.uploaded, msgspec.json.encode(view.found))
        self._db.execute(KEEP_DATASET, row)

    def dataset(self, sha256: str) -> DatasetView | None:
        row = self._db.execute(GET_DATASET, (sha256,)).fetchone()
        return _dataset(row) if row else None

    def dataset_page(self, after: str | None, limit: int) -> DatasetPage:
        datasets = [_dataset(row) for row in self._db.execute(LIST_DATASETS, (after, limit + 1))]
        return DatasetPage(items=datasets[:limit], next=datasets[limit - 1].sha256 if len(datasets) > limit else None)

    def delete_dataset(self, sha256: str) -> None:
        self._db.execute(DELETE_DATASET, (sha256,))

    # what was asked for

    def audit(self, request: Audited) -> None:
        with transaction(self._db):
            self._db.execute(ADD_AUDIT, (request.time, request.who, request.address, request.what, request.made, request.status))
            self._db.execute(CUT_AUDIT, (MOST_AUDITED,))

    def audit_page(self, after: str | None, limit: int) -> AuditPage:
        """The newest requests first, from where a page before has ended."""
        rows = self._db.execute(LIST_AUDIT, (None if after is None else int(after), limit + 1)).fetchall()
        items = [msgspec.convert({name: row[name] for name in Audited.__struct_fields__}, Audited) for row in rows[:limit]]
        return AuditPage(items=items, next=str(rows[limit - 1]["number"]) if len(rows) > limit else None)

    def counts(self) -> tuple[dict[str, int], dict[tuple[str, str], int], int]:
        """Return how many nodes there are by state, jobs by phase and outcome, and jobs that wait for an answer of their node."""
        nodes: dict[str, int] = dict(map(tuple, self._db.execute(COUNT_NODES)))
        jobs = {(phase, outcome): count for phase, outcome, count in self._db.execute(COUNT_JOBS)}
        return nodes, jobs, self._db.execute(COUNT_UNANSWERED).fetchone()[0]

    # tokens

    def add_token(self, token: Token, digest: bytes) -> None:
        self._db.execute(INSERT_TOKEN, (token.name, digest, token.scope, token.created, token.expires))

    def delete_token(self, name: str) -> None:
        self._db.execute(DELETE_TOKEN, (name,))

    def tokens(self) -> list[Token]:
        return [token for token, _ in self.token_digests().values()]

    def token_digests(self) -> dict[str, tuple[Token, bytes]]:
        """All tokens by their names, with the digests of their secrets."""
        rows = self._db.execute(ALL_TOKENS)
        return {row["name"]: (msgspec.convert({k: row[k] for k in Token.__struct_fields__}, Token), row["digest"]) for row in rows}


def _place(message: Message[Any], view: JobView) -> tuple[int, int]:
    """Where a message stands among those about its job: a later start of the agent is newer, and so is a higher number.

    An agent that has lost its disk numbers from 1 again. A rejection has no number: it is the newest of its start.
    """
    return message.boot or view.boot, message.seq or view.seq + 1


def _job(row: sqlite3.Row) -> JobView:
    envelope = msgspec.json.decode(row["envelope"], type=Envelope)
    result = msgspec.json.decode(row["result"]) if row["result"] else None
    fields = {
        "cancel": bool(row["cancel"]),
        "forget": bool(row["forget"]),
        "lost": bool(row["lost"]),
        "order": read_order(envelope.payload),
        "result": result,
    }
    return msgspec.convert(dict(row) | fields, JobView)


def _dataset(row: sqlite3.Row) -> DatasetView:
    return msgspec.convert(dict(row) | {"found": msgspec.json.decode(row["found"])}, DatasetView)


def _node(row: sqlite3.Row) -> NodeView:
    parts = {name: msgspec.json.decode(row[name]) if row[name] else None for name in ("info", "heartbeat")}
    drain = None if row["drain"] is None else bool(row["drain"])
    return msgspec.convert(dict(row) | parts | {"drain": drain}, NodeView)
