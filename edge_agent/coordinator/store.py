"""What a coordinator must not lose: jobs, what nodes have said of them, and nodes, in an SQLite file or PostgreSQL.

All its SQL is here, and that of the tables in schema.py; SQLite and PostgreSQL read the same text.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec

from edge_agent import config
from edge_agent.clocks import KEEP_S, Ran
from edge_agent.coordinator.database import open_file, open_server
from edge_agent.coordinator.views import (
    MANY,
    Audited,
    AuditPage,
    DatasetPage,
    DatasetView,
    DueJob,
    HistoryRow,
    JobFilter,
    JobPage,
    JobView,
    KeptRollout,
    NodePage,
    NodeView,
    RolloutNode,
    RolloutNodePage,
    Token,
)
from edge_agent.errors import DatabaseAway, Refused
from edge_agent.job import NlftOptions
from edge_agent.messages import (
    Envelope,
    Heartbeat,
    JobResult,
    JobStatus,
    Message,
    NodeInfo,
    NodeState,
    Order,
    Phase,
    read_order,
)
from edge_agent.new_options import MOST_CHANGES, NewOptions

Row = dict[str, Any]

MOST_HISTORY = 1000
"""Messages of a job that are kept, and up to a twentieth more; the oldest go first, so that no node can fill the disk with them."""
MOST_COUNTED = 100_000
"""Jobs of which it is counted how much was said of them, since some time."""
AT_NODE: frozenset[str] = frozenset(get_args(Phase))
TRANSITIONS: dict[str, frozenset[str]] = {
    "created": AT_NODE | {"offered"},  # a node may answer before it is stored that its offer was sent
    "offered": AT_NODE,
    **dict.fromkeys(AT_NODE, AT_NODE),  # the node says which, by the numbers of its messages; one without its disk begins again
    "ended": frozenset(),
}
"""The phases that a job may go to, as this coordinator knows it. `lost` is none, but a node's silence; nor is a cancel, which is asked."""
MOST_MEASURED = 3
"""Jobs of a node whose speed counts."""
MOST_AUDITED = 100_000
"""Requests that are kept; the oldest go first."""
SHARED_CLOCK_S = 1.0
"""Several coordinators agree this often on how long they have run."""
FILES = "files"
"""Of transactions after which a file may have no user any more, or a new one."""
# Begins at the clock: also a coordinator whose disk was wiped is newer than its last will.
COUNT_EPOCH = """INSERT INTO meta VALUES ('epoch', :now) ON CONFLICT (name)
DO UPDATE SET value = CASE WHEN meta.value < excluded.value THEN excluded.value ELSE meta.value + 1 END RETURNING value"""
GET_RAN = "SELECT value FROM meta WHERE name = 'ran_s'"
SET_RAN = "INSERT INTO meta VALUES ('ran_s', :ran_s) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
INSERT_JOB = """INSERT INTO jobs (id, node, model, digest, envelope, created, changed, phase, retry_of, rollout)
VALUES (:id, :node, :model, :digest, :envelope, :now, :now, 'created', :retry_of, :rollout)
ON CONFLICT (id) DO NOTHING RETURNING number"""
JOBS = """SELECT jobs.*, phase NOT IN ('created', 'offered', 'ended') AND coalesce(heard, 0) < :silent AS lost
FROM jobs LEFT JOIN nodes ON nodes.id = jobs.node"""
GET_JOB = f"{JOBS} WHERE jobs.id = :id"
HELD = " FOR UPDATE OF jobs"
LIST_JOBS = f"{JOBS} WHERE {{which}} ORDER BY jobs.number DESC LIMIT :limit"
WHICH_JOBS = {
    "before": "jobs.number < :before", "phase": "phase = :phase", "outcome": "outcome = :outcome", "node": "node = :node",
    "rollout": "rollout = :rollout",
}  # fmt: skip
GET_ENVELOPE = "SELECT envelope FROM jobs WHERE id = :id"
OPEN_JOBS = f"{JOBS} WHERE phase != 'ended' ORDER BY jobs.number"
OPEN_JOBS_OF_NODE = f"{JOBS} WHERE phase != 'ended' AND node = :node ORDER BY jobs.number"
CANCELED_JOBS_OF_ROLLOUT = f"{JOBS} WHERE rollout = :rollout AND phase != 'ended' AND cancel = 1 ORDER BY jobs.number"
DUE_JOBS = """SELECT id, node, phase, changed, cancel, options FROM jobs
WHERE phase != 'ended' AND (phase IN ('created', 'offered') OR cancel = 1 OR options IS NOT NULL) ORDER BY number"""
DUE_JOBS_OF_NODE = DUE_JOBS.replace("WHERE", "WHERE node = :node AND")
COUNT_WAITING = """SELECT node, count(*) AS count FROM jobs WHERE phase != 'ended' AND phase IN ('offered', 'accepted', 'staging', 'ready')
AND node IN (SELECT node FROM jobs WHERE phase = 'created') GROUP BY node"""
COUNT_WAITING_OF_NODE = """SELECT node, count(*) AS count FROM jobs
WHERE node = :node AND phase IN ('offered', 'accepted', 'staging', 'ready') GROUP BY node"""
FORGOTTEN_JOBS = f"{JOBS} WHERE forget = 1 ORDER BY jobs.number"
GET_OFFER = "SELECT offer FROM jobs WHERE id = :id"
SET_OFFER = "UPDATE jobs SET offer = :offer WHERE id = :id"
SET_OFFERED = "UPDATE jobs SET phase = 'offered', changed = :now WHERE id = :id AND phase = 'created'"
SET_STATUS = """UPDATE jobs SET phase = :phase, outcome = :outcome, reason = :reason, text = :text, attempt = :attempt,
boot = :boot, seq = :seq, changed = :now, result = NULL WHERE id = :id"""
SET_RESULT = """UPDATE jobs SET phase = 'finalizing', result = :result, tokens_per_s = :tokens_per_s, attempt = :attempt, boot = :boot,
seq = :seq, changed = :now WHERE id = :id"""
END_JOB = """UPDATE jobs SET phase = 'ended', outcome = :outcome, reason = :reason, text = :text, changed = :now
WHERE id = :id AND phase != 'ended' AND phase = coalesce(CAST(:phase AS TEXT), phase) RETURNING id"""
SET_OPTIONS = "UPDATE jobs SET options = :options, changed = :now WHERE id = :id"
SET_OPTIONS_STATE = "UPDATE jobs SET options_state = :state WHERE id = :id"
ASK_CANCEL = "UPDATE jobs SET cancel = 1, changed = :now WHERE id = :id"
ASK_FORGET = "UPDATE jobs SET forget = 1, changed = :now WHERE id = :id"
DELETE_JOB = "DELETE FROM jobs WHERE id = :id"
ADD_JOB_FILE = "INSERT INTO job_files VALUES (:job, :sha256) ON CONFLICT DO NOTHING"
FILES_OF_JOB = """SELECT sha256, EXISTS (SELECT 1 FROM job_files AS other
WHERE other.sha256 = job_files.sha256 AND other.job <> :job) AS shared FROM job_files WHERE job = :job"""
JOBS_OF_FILE = "SELECT id FROM jobs WHERE id IN (SELECT job FROM job_files WHERE sha256 = :sha256) ORDER BY number DESC"
FILES_OF_JOBS = "SELECT DISTINCT sha256 FROM job_files"
FILES_OF_OPEN_JOBS = "SELECT DISTINCT sha256 FROM job_files WHERE job IN (SELECT id FROM jobs WHERE phase != 'ended')"
JOBS_WITHOUT_FILES = JOBS + " WHERE NOT EXISTS (SELECT 1 FROM job_files WHERE job = jobs.id)"  # noqa: S608
DELETE_JOB_FILES = "DELETE FROM job_files WHERE job = :job"
DELETE_HISTORY = "DELETE FROM history WHERE job = :id"
INSERT_HISTORY = """INSERT INTO history (message, job, time, seq, attempt, phase, outcome, reason, text, late)
VALUES (:message, :job, :time, :seq, :attempt, :phase, :outcome, :reason, :text, :late) ON CONFLICT (message) DO NOTHING RETURNING number"""
RESULT_MESSAGE = "SELECT message FROM history WHERE job = :job AND phase = 'ended' AND late = 0 ORDER BY number DESC LIMIT 1"
CUT_HISTORY = """DELETE FROM history WHERE job = :job
AND number <= (SELECT number FROM history WHERE job = :job ORDER BY number DESC LIMIT 1 OFFSET :most)"""
GET_HISTORY = """SELECT * FROM (SELECT * FROM history WHERE job = :job ORDER BY number DESC LIMIT :limit) AS newest ORDER BY number"""
GET_NODE = "SELECT * FROM nodes WHERE id = :id"
LIST_NODES = "SELECT * FROM nodes WHERE {which} ORDER BY id LIMIT :limit"
WHICH_NODES = {"after": "id > :after", "state": "state = :state"}
GET_BOOT = "SELECT boot FROM nodes WHERE id = :id"
DUE_NODES = """SELECT * FROM nodes WHERE id IN (SELECT node FROM jobs WHERE phase != 'ended'
AND (phase IN ('created', 'offered') OR cancel = 1 OR options IS NOT NULL) UNION SELECT node FROM jobs WHERE forget = 1)"""
SET_DRAIN = "UPDATE nodes SET drain = :drain, drain_command = :command WHERE id = :id"
SET_STATE = """INSERT INTO nodes (id, state, boot, conn, told, seen, heard) VALUES (:id, :state, :boot, :conn, :told, :seen, :heard)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, boot = excluded.boot, conn = excluded.conn, told = excluded.told"""
SET_SEEN = "UPDATE nodes SET seen = :seen, heard = :heard WHERE id = :id"
SET_INFO = """INSERT INTO nodes (id, state, boot, conn, seen, heard, info) VALUES (:id, 'init', 0, 0, :seen, :heard, :info)
ON CONFLICT (id) DO UPDATE SET info = excluded.info WHERE nodes.boot <= :boot"""
SET_HEARTBEAT = "UPDATE nodes SET heartbeat = :heartbeat, seen = :seen, heard = :heard WHERE id = :id"
COUNT_NODES = "SELECT state, count(*) AS count FROM nodes GROUP BY state"
COUNT_JOBS = "SELECT phase, outcome, count(*) AS count FROM jobs GROUP BY phase, outcome"
COUNT_UNANSWERED = """SELECT (SELECT count(*) FROM jobs WHERE phase != 'ended' AND (phase = 'offered' OR cancel = 1))
+ (SELECT count(*) FROM jobs WHERE forget = 1) AS count"""
COUNT_OPEN = "SELECT node, count(*) AS count FROM jobs WHERE phase != 'ended' GROUP BY node"
GET_SPEEDS = """SELECT node, avg(tokens_per_s) AS speed FROM (SELECT node, tokens_per_s,
row_number() OVER (PARTITION BY node ORDER BY number DESC) AS place FROM jobs WHERE model = :model AND tokens_per_s IS NOT NULL) AS measured
WHERE place <= :most GROUP BY node"""
INSERT_ROLLOUT = """INSERT INTO rollouts (id, plan, created, changed, state) VALUES (:id, :plan, :now, :now, 'running')"""
ADD_ROLLOUT_NODE = "INSERT INTO rollout_nodes (rollout, place, node) VALUES (:rollout, :place, :node)"
GET_ROLLOUT = "SELECT * FROM rollouts WHERE id = :id"
LIST_ROLLOUTS = "SELECT * FROM rollouts WHERE {which} ORDER BY number DESC LIMIT :limit"
WHICH_ROLLOUTS = {"before": "number < :before", "state": "state = :state"}
RUNNING_ROLLOUTS = "SELECT * FROM rollouts WHERE state = 'running' ORDER BY number"
COUNT_ROLLOUTS = "SELECT state, count(*) AS count FROM rollouts GROUP BY state"
END_ROLLOUT = "UPDATE rollouts SET state = :state, text = :text, changed = :now WHERE id = :id AND state = 'running'"
WAITING_NODES = """SELECT place, node FROM rollout_nodes WHERE rollout = :rollout AND job IS NULL AND outcome IS NULL
ORDER BY place LIMIT :limit"""
SET_NODE_JOB = """UPDATE rollout_nodes SET job = :job
WHERE rollout = :rollout AND node = :node AND job IS NULL AND outcome IS NULL RETURNING node"""
SET_NODE_OUTCOME = """UPDATE rollout_nodes SET outcome = :outcome, text = :text
WHERE rollout = :rollout AND node = :node AND job IS NULL AND outcome IS NULL"""
LEAVE_NODES = """UPDATE rollout_nodes SET outcome = 'canceled', text = :text
WHERE rollout = :rollout AND job IS NULL AND outcome IS NULL"""
KEEP_OUTCOME = """UPDATE rollout_nodes SET outcome = (SELECT outcome FROM jobs WHERE id = :id),
text = (SELECT text FROM jobs WHERE id = :id) WHERE job = :id"""
CANCEL_WAITING = """UPDATE jobs SET cancel = 1, changed = :now WHERE rollout = :rollout AND attempt = 0
AND phase IN ('created', 'offered', 'accepted', 'staging', 'ready')"""
CANCEL_OPEN = "UPDATE jobs SET cancel = 1, changed = :now WHERE rollout = :rollout AND phase != 'ended'"
COUNT_ROLLOUT_NODES = """SELECT coalesce(n.outcome, jobs.outcome, CASE WHEN n.job IS NULL THEN 'waiting' ELSE 'open' END) AS what,
count(*) AS count FROM rollout_nodes AS n LEFT JOIN jobs ON jobs.id = n.job WHERE n.rollout = :rollout GROUP BY 1"""
LIST_ROLLOUT_NODES = """SELECT n.place, n.node, n.job, jobs.phase, coalesce(n.outcome, jobs.outcome) AS outcome,
coalesce(n.text, jobs.text) AS text FROM rollout_nodes AS n LEFT JOIN jobs ON jobs.id = n.job WHERE {which} ORDER BY n.place LIMIT :limit"""
WHICH_ROLLOUT_NODES = {"rollout": "n.rollout = :rollout", "after": "n.place > :after"}
KEEP_DATASET = """INSERT INTO datasets VALUES (:sha256, :name, :size_bytes, :uploaded, :found)
ON CONFLICT (sha256) DO UPDATE SET name = excluded.name, uploaded = excluded.uploaded, found = excluded.found"""
GET_DATASET = "SELECT * FROM datasets WHERE sha256 = :sha256"
LIST_DATASETS = "SELECT * FROM datasets WHERE {which} ORDER BY sha256 LIMIT :limit"
WHICH_DATASETS = {"after": "sha256 > :after"}
SUM_DATASETS = "SELECT sum(size_bytes) AS total FROM datasets WHERE sha256 <> :sha256"
DELETE_DATASET = "DELETE FROM datasets WHERE sha256 = :sha256"
LOOSEN_FILE = """INSERT INTO loose_files VALUES (:sha256, :since) ON CONFLICT (sha256)
DO UPDATE SET since = excluded.since WHERE loose_files.since >= 0 RETURNING since"""
LOOSE_FILES = "SELECT sha256 FROM loose_files WHERE since <= :before"
DOOM_FILE = "UPDATE loose_files SET since = -1 WHERE sha256 = :sha256 AND since <= :before"
DOOMED_FILE = "SELECT 1 FROM loose_files WHERE sha256 = :sha256 AND since < 0"
SETTLE_FILE = "DELETE FROM loose_files WHERE sha256 = :sha256"
ADD_AUDIT = "INSERT INTO audit (time, who, address, what, made, status) VALUES (:time, :who, :address, :what, :made, :status)"
CUT_AUDIT = "DELETE FROM audit WHERE number <= (SELECT max(number) FROM audit) - :most"
LIST_AUDIT = "SELECT * FROM audit WHERE {which} ORDER BY number DESC LIMIT :limit"
WHICH_AUDIT = {"before": "number < :before"}
INSERT_TOKEN = "INSERT INTO tokens (name, digest, scope, created, expires) VALUES (:name, :digest, :scope, :created, :expires)"  # noqa: S105
DELETE_TOKEN = "DELETE FROM tokens WHERE name = :name"  # noqa: S105
ALL_TOKENS = "SELECT * FROM tokens ORDER BY name"

MOST_TOLD = 2**52
"""What a node says of the last command that it has done is not signed: no higher number is believed, so there is always one above it."""

MOST_BOOT, BOOT_STEP = 2**40, 2**16
"""Likewise the number of its start: above the first (a time in 36,000 years) only one that is a few above the last known is believed, so
nobody who speaks in a node's name can use up the numbers that it has yet to come to."""


class CoordinatorStore:
    """The coordinator's database. One thread uses it. Raises StateUnusable where it cannot be opened, DatabaseAway."""

    def __init__(
        self, path: Path, lease_s: float, clock: Callable[[], float] = time.monotonic, server: config.Database | None = None,
        instance: str | None = None,
    ) -> None:  # fmt: skip
        """Open the file at `path`; where there is a server, the database there, which begins with what is in such a file.

        `instance`: the name of this coordinator among others that work in the same database; None where there is to be none.
        `lease_s`: how long a node may be silent, while the coordinator runs, until what it has taken counts as lost.
        """
        self._db, self._lease_s = open_file(path) if server is None else open_server(server, path, instance), lease_s
        self.clock = Ran(self._ran_s(), lambda ran_s: self._db.execute(SET_RAN, ran_s=ran_s), clock)
        self._said: Counter[str] = Counter()
        self._boots: dict[str, int] = {}
        self.late = 0
        """Messages that came after newer ones, since the start."""
        self.epoch = int(self._db.execute(COUNT_EPOCH, now=int(time.time()))[0]["value"])
        with self._db.transaction(FILES):
            for view in self._jobs(JOBS_WITHOUT_FILES):  # of a database of before there was a table of them
                self._add_files(view.id, view.files)

    @property
    def away(self) -> DatabaseAway | None:
        """Why nothing can be read or stored now; any thread may ask."""
        return self._db.away

    @property
    def shared(self) -> bool:
        """Whether other coordinators work in the same database."""
        return self._db.shared

    def leads(self, wanted: bool) -> bool:
        """Whether what only one of several coordinators is to do is for this one, which is asked whether it could.

        By the clock of that one all count how long they have run.
        """
        leads = self._db.leads(wanted)
        if leads:
            self.clock.tick(SHARED_CLOCK_S if self.shared else KEEP_S)
        elif self.clock.age_s >= SHARED_CLOCK_S:
            self.clock.set(self._ran_s())
        return leads

    def _ran_s(self) -> float:
        ran = self._db.execute(GET_RAN)
        return float(ran[0]["value"]) if ran else 0.0

    def claim(self, job: str) -> bool:
        """Whether no other coordinator fetches the files of a job; none does while this one has it."""
        return self._db.claim(f"files of {job}")

    def leave(self, job: str) -> None:
        """Let another one do it."""
        self._db.leave(f"files of {job}")

    def look(self) -> None:
        """Raise DatabaseAway where the database was away and is not back."""
        self._db.look()

    def close(self) -> None:
        with suppress(sqlite3.Error, DatabaseAway):  # of a disk that is full
            if not self.shared:
                self.clock.keep()
        self._db.close()

    # jobs

    def conclude(self, job: str, text: str) -> None:
        """End a job by the result that has come, although not all of its files have."""
        view = self.job(job)
        if view is not None and view.result is not None and view.phase != "ended":
            self.end(job, view.result.outcome, view.result.reason, text)

    def add_job(self, order: Order, envelope: Envelope, retry_of: str | None = None, rollout: str | None = None) -> bool:
        """Keep an order and the envelope that it is in; of a rollout, its node has had its turn with that. False where its id is taken.

        Raises Refused where one of several coordinators has deleted a file, or ended the rollout, meanwhile.
        """
        with self._db.transaction(FILES):
            if self.shared and any(self.dataset(file.sha256) is None for file in order.files):
                raise Refused("a file of the job has been removed meanwhile; upload it again")
            new = self._db.execute(
                INSERT_JOB, id=order.id, node=order.node, model=order.job.model, digest=order.job.digest,
                envelope=msgspec.json.encode(envelope), now=time.time(), retry_of=retry_of, rollout=rollout,
            )  # fmt: skip
            if not new:
                return False
            self._add_files(order.id, {file.sha256 for file in order.files})
            if rollout is not None and not self._db.execute(SET_NODE_JOB, job=order.id, rollout=rollout, node=order.node):
                raise Refused(f"node {order.node} has had its turn in rollout {rollout}, or that has ended")
        return True

    def job(self, job: str) -> JobView | None:
        found = self._jobs(GET_JOB, id=job)
        return found[0] if found else None

    def _held(self, view: JobView) -> JobView:
        """Return a job as it is now; until the end of the transaction no other coordinator changes it."""
        found = self._jobs(f"{GET_JOB}{HELD if self.shared else ''}", id=view.id)
        return found[0] if found else view

    def envelope(self, job: str) -> Envelope:
        """That around the order of a job which is there."""
        return msgspec.json.decode(self._db.execute(GET_ENVELOPE, id=job)[0]["envelope"], type=Envelope)

    def jobs(self, limit: int) -> list[JobView]:
        """The newest jobs first."""
        return self.job_page(JobFilter(), None, limit).items

    def job_page(self, which: JobFilter, after: str | None, limit: int) -> JobPage:
        """The newest jobs first, from where a page before has ended."""
        wanted = {"before": None if after is None else int(after), **msgspec.structs.asdict(which)}
        rows = self._list(LIST_JOBS, WHICH_JOBS, wanted, limit, silent=self._silent)
        return JobPage(items=[_job(row) for row in rows[:limit]], next=str(rows[limit - 1]["number"]) if len(rows) > limit else None)

    def open_jobs(self, node: str | None = None) -> list[JobView]:
        """All that have not ended, or those of a node, the oldest first."""
        return self._jobs(OPEN_JOBS) if node is None else self._jobs(OPEN_JOBS_OF_NODE, node=node)

    def due_jobs(self, node: str | None = None) -> list[DueJob]:
        """Open jobs of all nodes, or of one, that are to be offered, ended, or to go on with other options; the oldest first."""
        rows = self._db.execute(DUE_JOBS) if node is None else self._db.execute(DUE_JOBS_OF_NODE, node=node)
        return [
            DueJob(row["id"], row["node"], row["phase"], row["changed"], bool(row["cancel"]), row["options"] is not None) for row in rows
        ]

    def waiting_counts(self, node: str | None = None) -> Counter[str]:
        """How many jobs nodes have been offered that do not run: of one, or of those for which there are more."""
        rows = self._db.execute(COUNT_WAITING) if node is None else self._db.execute(COUNT_WAITING_OF_NODE, node=node)
        return Counter({row["node"]: row["count"] for row in rows})

    def _jobs(self, query: str, **values: object) -> list[JobView]:
        return [_job(row) for row in self._db.execute(query, silent=self._silent, **values)]

    def _list(self, query: str, which: Mapping[str, str], wanted: Mapping[str, object], limit: int, **more: object) -> list[Row]:
        """Return what a list has by those conditions that are given, and one more where there is more."""
        given = {name: value for name, value in wanted.items() if value is not None}
        conditions = " AND ".join(which[name] for name in given) or "1 = 1"
        return self._db.execute(query.format(which=conditions), limit=limit + 1, **given, **more)

    @property
    def _silent(self) -> float:
        """A node that has not spoken since then is lost."""
        return self.clock.now() - self._lease_s

    def history(self, job: str) -> list[HistoryRow]:
        """The last messages about a job, the oldest first."""
        rows = self._db.execute(GET_HISTORY, job=job, limit=MOST_HISTORY)
        return [msgspec.convert(row | {"late": bool(row["late"])}, HistoryRow) for row in rows]

    def offers(self, job: str, sha256: str) -> None:
        """Note the message with the offer of a job that is about to be sent: its rejection may come to another coordinator."""
        self._db.execute(SET_OFFER, offer=sha256, id=job)

    def has_offered(self, job: str, sha256: str | None) -> bool:
        """Whether that is the message with the offer of a job which was sent last."""
        rows = self._db.execute(GET_OFFER, id=job)
        return sha256 is not None and bool(rows) and rows[0]["offer"] == sha256

    def offered(self, job: str) -> None:
        """A job has been offered; its node may have answered by now."""
        self._db.execute(SET_OFFERED, now=time.time(), id=job)

    def ask_cancel(self, job: str) -> None:
        self._db.execute(ASK_CANCEL, now=time.time(), id=job)

    def send_options(self, view: JobView, method: NlftOptions) -> NewOptions | None:
        """Keep options for a job under a number above all that were told; None where there is none left."""
        with self._db.transaction():
            view = self._held(view)
            sent, known = (state.number if state else 0 for state in (view.options, view.options_state))
            if max(sent, known) >= MOST_CHANGES:
                return None
            options = NewOptions(max(sent, known) + 1, method)
            self._db.execute(SET_OPTIONS, options=msgspec.json.encode(options), now=time.time(), id=view.id)
        return options

    def ask_forget(self, job: str) -> None:
        self._db.execute(ASK_FORGET, now=time.time(), id=job)

    def forgotten_jobs(self) -> list[JobView]:
        """Jobs whose deletion has been asked for."""
        return self._jobs(FORGOTTEN_JOBS)

    def delete_job(self, view: JobView, others: Callable[[], set[str]] = set, *, loosen: bool = False) -> set[str]:
        """Delete a job and what was said of it; its rollout keeps how it ended.

        Return its files that neither another job has nor `others` have, whose datasets go too. `loosen`: note that these are to go from the
        object store.
        """
        with self._db.transaction(FILES):
            files = {row["sha256"]: bool(row["shared"]) for row in self._db.execute(FILES_OF_JOB, job=view.id)}
            unneeded = {sha256 for sha256, shared in files.items() if not shared} - others()
            self._db.execute(DELETE_JOB_FILES, job=view.id)
            self._db.execute(KEEP_OUTCOME, id=view.id)
            self._db.execute(DELETE_HISTORY, id=view.id)
            self._db.execute(DELETE_JOB, id=view.id)
            for sha256 in unneeded:
                self.delete_dataset(sha256)
                if loosen:
                    self.loosen(sha256)
        return unneeded

    def files_of_jobs(self) -> set[str]:
        """The files of all jobs that are kept."""
        return {row["sha256"] for row in self._db.execute(FILES_OF_JOBS)}

    def files_of_open_jobs(self) -> set[str]:
        """The files of jobs that have not ended."""
        return {row["sha256"] for row in self._db.execute(FILES_OF_OPEN_JOBS)}

    def _add_files(self, job: str, files: Collection[str]) -> None:
        for sha256 in files:
            self._db.execute(ADD_JOB_FILE, job=job, sha256=sha256)

    def _users(self, sha256: str) -> list[str]:
        """The jobs that have a file, the newest first."""
        return [row["id"] for row in self._db.execute(JOBS_OF_FILE, sha256=sha256)]

    def end(self, job: str, outcome: str, reason: str | None, text: str | None, phase: str | None = None) -> bool:
        """End a job for good; False where it has ended, or is not in the given phase any more."""
        return bool(self._db.execute(END_JOB, outcome=outcome, reason=reason, text=text, now=time.time(), id=job, phase=phase))

    def apply_status(self, view: JobView, message: Message[JobStatus]) -> bool:
        """Keep a status; it changes the job if it is newer than what is known and the job has not ended. False where one is missing."""
        status = message.data
        with self._db.transaction():
            view = self._held(view)
            place = _place(message, view)
            # A rejection of a job that the node has taken answers an offer that came again, unless it has lost its disk or deleted the job.
            again = status.outcome == "rejected" and view.phase not in ("created", "offered")
            taken = again and status.reason != "replayed" and place[0] <= view.boot
            late = status.phase not in TRANSITIONS[view.phase] or taken or place <= (view.boot, view.seq)
            if not self._keep(view.id, message, status.phase, late):
                return True
            if not late:
                self._db.execute(
                    SET_STATUS, phase=status.phase, outcome=status.outcome, reason=status.reason, text=status.text,
                    attempt=message.attempt or view.attempt, boot=place[0], seq=place[1], now=time.time(), id=view.id,
                )  # fmt: skip
                if status.options != view.options_state:
                    state = msgspec.json.encode(status.options) if status.options else None
                    self._db.execute(SET_OPTIONS_STATE, state=state, id=view.id)
        self.late += late
        return message.seq is None or message.seq == view.seq + 1 or (message.seq == 1 and place[0] > view.boot)

    def apply_result(self, view: JobView, message: Message[JobResult]) -> None:
        """Keep the end of a job; it becomes the job's own when every artifact is here."""
        with self._db.transaction():
            view = self._held(view)
            late = view.result is not None or "ended" not in TRANSITIONS[view.phase]
            boot, seq = _place(message, view)
            if not self._keep(view.id, message, "ended", late):
                return
            if not late:
                self._db.execute(
                    SET_RESULT, result=msgspec.json.encode(message.data), tokens_per_s=message.data.tokens_per_s,
                    attempt=message.attempt or view.attempt, boot=boot, seq=seq, now=time.time(), id=view.id,
                )  # fmt: skip
                self._add_files(view.id, [artifact.sha256 for artifact in message.data.artifacts])
        self.late += late

    def _keep(self, job: str, message: Message[Any], phase: Phase, late: bool) -> bool:
        """Write a message into the history; False where it is there already."""
        data = message.data
        new = self._db.execute(
            INSERT_HISTORY, message=message.id, job=job, time=message.time.timestamp(), seq=message.seq, attempt=message.attempt,
            phase=phase, outcome=data.outcome, reason=data.reason, text=data.text, late=int(late),
        )  # fmt: skip
        if new:
            self._said[job] += 1
            if self._said[job] % max(1, MOST_HISTORY // 20) == 0:
                self._db.execute(CUT_HISTORY, job=job, most=MOST_HISTORY)
            if len(self._said) > MOST_COUNTED:
                self._said.clear()
        return bool(new)

    def result_message(self, job: str) -> str | None:
        """The id of the message that brought a job's result."""
        rows = self._db.execute(RESULT_MESSAGE, job=job)
        return str(rows[0]["message"]) if rows else None

    # nodes

    def node(self, node: str) -> NodeView | None:
        rows = self._db.execute(GET_NODE, id=node)
        return _node(rows[0]) if rows else None

    def nodes(self) -> list[NodeView]:
        return self.node_page(None, None, MANY).items

    def boot(self, node: str) -> int:
        """The newest start of a node that is known; 0: none."""
        if node not in self._boots:
            rows = self._db.execute(GET_BOOT, id=node)
            if not rows:
                return 0
            self._boots[node] = int(rows[0]["boot"])
        return self._boots[node]

    def due_nodes(self) -> dict[str, NodeView]:
        """The nodes that may have to be told something of a job, by their names."""
        return {row["id"]: _node(row) for row in self._db.execute(DUE_NODES)}

    def node_page(self, state: str | None, after: str | None, limit: int) -> NodePage:
        nodes = [_node(row) for row in self._list(LIST_NODES, WHICH_NODES, {"after": after, "state": state}, limit)]
        return NodePage(items=nodes[:limit], next=nodes[limit - 1].id if len(nodes) > limit else None)

    def set_state(self, node: str, state: NodeState, *, retained: bool) -> bool:
        """Keep the presence of a node; False where it is of an earlier connection than the one that is known, or of a start that cannot be.

        A last will is the broker's word and a retained message is of the past: neither says that the node is there now.
        """
        seen, heard = time.time(), self.clock.now()
        with self._db.transaction(node):
            known = self.node(node)
            if known is not None and (state.boot, state.conn) < (known.boot, known.conn):
                return False
            if state.boot > max(MOST_BOOT, (known.boot if known else 0) + BOOT_STEP):
                return False
            told = {"state": state.state, "boot": state.boot, "conn": state.conn, "told": state.command}
            self._db.execute(SET_STATE, id=node, seen=seen, heard=heard, **told)
            if not retained and state.state != "lost":
                self._db.execute(SET_SEEN, seen=seen, heard=heard, id=node)
        self._boots[node] = state.boot  # every coordinator hears every state
        return True

    def set_drain(self, node: str, drain: bool) -> None:
        """Keep whether a node is to take no new jobs, under a number above all that it has been told before."""
        with self._db.transaction(node):
            known = self.node(node)
            if known is not None:
                command = max(known.drain_command, min(known.told, MOST_TOLD)) + 1
                self._db.execute(SET_DRAIN, drain=int(drain), command=command, id=node)

    def set_info(self, node: str, info: NodeInfo, boot: int = MOST_BOOT) -> None:
        """Keep what a node can do, unless that is of an earlier start than the one that is known."""
        told = msgspec.json.encode(info)
        self._db.execute(SET_INFO, id=node, seen=time.time(), heard=self.clock.now(), info=told, boot=boot)

    def set_heartbeat(self, node: str, heartbeat: Heartbeat) -> None:
        told = msgspec.json.encode(heartbeat)
        self._db.execute(SET_HEARTBEAT, heartbeat=told, seen=time.time(), heard=self.clock.now(), id=node)

    def open_counts(self) -> dict[str, int]:
        """How many jobs nodes have that have not ended, by their names."""
        return {row["node"]: row["count"] for row in self._db.execute(COUNT_OPEN)}

    def speeds(self, model: str) -> dict[str, float]:
        """Mean tokens/s of the last jobs with a model, by node."""
        return {row["node"]: row["speed"] for row in self._db.execute(GET_SPEEDS, model=model, most=MOST_MEASURED)}

    # rollouts

    def add_rollout(self, rollout: str, plan: bytes, nodes: Sequence[str], files: Collection[str] = ()) -> None:
        """Keep a rollout and its nodes, in the order in which they get their jobs. Raises Refused as `add_job`."""
        rows = [{"rollout": rollout, "place": place, "node": node} for place, node in enumerate(nodes)]
        with self._db.transaction(FILES):
            if self.shared and any(self.dataset(sha256) is None for sha256 in files):
                raise Refused("a file of the job has been removed meanwhile; upload it again")
            self._db.execute(INSERT_ROLLOUT, id=rollout, plan=plan, now=time.time())
            self._db.execute_many(ADD_ROLLOUT_NODE, rows)

    def rollout(self, rollout: str) -> KeptRollout | None:
        rows = self._db.execute(GET_ROLLOUT, id=rollout)
        return msgspec.convert(rows[0], KeptRollout) if rows else None

    def rollouts(self, state: str | None, after: str | None, limit: int) -> list[KeptRollout]:
        """The newest first, from where a page before has ended, and one more where there is more."""
        rows = self._list(LIST_ROLLOUTS, WHICH_ROLLOUTS, {"before": None if after is None else int(after), "state": state}, limit)
        return [msgspec.convert(row, KeptRollout) for row in rows]

    def running_rollouts(self) -> list[KeptRollout]:
        """The oldest first."""
        return [msgspec.convert(row, KeptRollout) for row in self._db.execute(RUNNING_ROLLOUTS)]

    def rollout_states(self) -> dict[str, int]:
        """How many rollouts there are by state."""
        return {row["state"]: row["count"] for row in self._db.execute(COUNT_ROLLOUTS)}

    def rollout_counts(self, rollout: str) -> dict[str, int]:
        """How many of its nodes wait for their job, have one that is open, or one with an outcome."""
        return {row["what"]: row["count"] for row in self._db.execute(COUNT_ROLLOUT_NODES, rollout=rollout)}

    def rollout_nodes(self, rollout: str, after: str | None, limit: int) -> RolloutNodePage:
        wanted = {"rollout": rollout, "after": None if after is None else int(after)}
        rows = self._list(LIST_ROLLOUT_NODES, WHICH_ROLLOUT_NODES, wanted, limit)
        items = [msgspec.convert(row, RolloutNode) for row in rows[:limit]]
        return RolloutNodePage(items=items, next=str(rows[limit - 1]["place"]) if len(rows) > limit else None)

    def waiting_nodes(self, rollout: str, limit: int) -> list[tuple[int, str]]:
        """Nodes for which no job was made yet with their places, in their order."""
        return [(row["place"], row["node"]) for row in self._db.execute(WAITING_NODES, rollout=rollout, limit=limit)]

    def leave_out(self, rollout: str, node: str, text: str) -> None:
        """Keep why no job can be made for a node of a rollout."""
        self._db.execute(SET_NODE_OUTCOME, rollout=rollout, node=node, outcome="rejected", text=text)

    def end_rollout(self, rollout: str, state: str, text: str | None, *, force: bool) -> list[JobView]:
        """End a rollout, and ask for the end of its jobs that no trainer has begun, with `force` of all; return those that are to end."""
        now = time.time()
        with self._db.transaction():
            self._db.execute(END_ROLLOUT, id=rollout, state=state, text=text, now=now)
            self._db.execute(LEAVE_NODES, rollout=rollout, text=text)
            self._db.execute(CANCEL_OPEN if force else CANCEL_WAITING, rollout=rollout, now=now)
        return self._jobs(CANCELED_JOBS_OF_ROLLOUT, rollout=rollout)

    # datasets

    def keep_dataset(self, view: DatasetView) -> bool:
        """Keep what is known of a dataset; False where its file is just being deleted."""
        with self._db.transaction(FILES):
            if self.doomed(view.sha256):
                return False
            self._db.execute(
                KEEP_DATASET, sha256=view.sha256, name=view.name, size_bytes=view.size_bytes, uploaded=view.uploaded,
                found=msgspec.json.encode(view.found),
            )  # fmt: skip
            return True

    def drop_dataset(self, sha256: str, others: Callable[[], set[str]], *, loosen: bool) -> list[str] | None:
        """Delete a dataset and return None, unless jobs have it, which are returned, or `others` have it.

        `loosen`: note that its file is to go from the object store.
        """
        with self._db.transaction(FILES):
            users = self._users(sha256)
            if not users and sha256 not in others():
                self.delete_dataset(sha256)
                if loosen:
                    self.loosen(sha256)
                return None
            return users

    def dataset(self, sha256: str) -> DatasetView | None:
        rows = self._db.execute(GET_DATASET, sha256=sha256)
        return _dataset(rows[0]) if rows else None

    def dataset_page(self, after: str | None, limit: int) -> DatasetPage:
        datasets = [_dataset(row) for row in self._list(LIST_DATASETS, WHICH_DATASETS, {"after": after}, limit)]
        return DatasetPage(items=datasets[:limit], next=datasets[limit - 1].sha256 if len(datasets) > limit else None)

    def datasets_bytes(self, but: str) -> int:
        """Return how much all datasets have, but one."""
        return int(self._db.execute(SUM_DATASETS, sha256=but)[0]["total"] or 0)

    def delete_dataset(self, sha256: str) -> None:
        self._db.execute(DELETE_DATASET, sha256=sha256)

    # files of the object store that no dataset or job may have

    def loosen(self, sha256: str) -> bool:
        """Note a file that is to go from the object store, unless a dataset or a job has it later; False where it is just being deleted."""
        return bool(self._db.execute(LOOSEN_FILE, sha256=sha256, since=time.time()))

    def doom(self, before: float, others: Callable[[], set[str]]) -> set[str]:
        """Return files that nothing has, nor `others` have, and that were noted before a time.

        They are to be deleted now, and nothing counts on them until they are settled.
        """
        if not (old := self.loose_files(before)):
            return set()
        with self._db.transaction(FILES):
            kept = others()
            for sha256 in old:
                if self.doomed(sha256):
                    continue
                if sha256 in kept or self.dataset(sha256) is not None or self._users(sha256):
                    self.settle(sha256)
                else:
                    self._db.execute(DOOM_FILE, sha256=sha256, before=before)
            return {sha256 for sha256 in old if self.doomed(sha256)}

    def doomed(self, sha256: str) -> bool:
        """Whether a file of the object store is just being deleted by one of several coordinators."""
        return self.shared and bool(self._db.execute(DOOMED_FILE, sha256=sha256))

    def settle(self, sha256: str) -> None:
        """Forget that note: the file is not there any more, or something has it."""
        self._db.execute(SETTLE_FILE, sha256=sha256)

    def loose_files(self, before: float = 1e18) -> set[str]:
        """Those that were noted until a time."""
        return {row["sha256"] for row in self._db.execute(LOOSE_FILES, before=before)}

    # what was asked for

    def audit(self, request: Audited) -> None:
        with self._db.transaction():
            self._db.execute(ADD_AUDIT, **msgspec.structs.asdict(request))
            self._db.execute(CUT_AUDIT, most=MOST_AUDITED)

    def audit_page(self, after: str | None, limit: int) -> AuditPage:
        """The newest requests first, from where a page before has ended."""
        rows = self._list(LIST_AUDIT, WHICH_AUDIT, {"before": None if after is None else int(after)}, limit)
        items = [msgspec.convert(row, Audited) for row in rows[:limit]]
        return AuditPage(items=items, next=str(rows[limit - 1]["number"]) if len(rows) > limit else None)

    def counts(self) -> tuple[dict[str, int], dict[tuple[str, str], int], int]:
        """Return how many nodes there are by state, jobs by phase and outcome, and jobs that wait for an answer of their node."""
        nodes = {row["state"]: row["count"] for row in self._db.execute(COUNT_NODES)}
        jobs = {(row["phase"], row["outcome"] or ""): row["count"] for row in self._db.execute(COUNT_JOBS)}
        return nodes, jobs, self._db.execute(COUNT_UNANSWERED)[0]["count"]

    # tokens

    def add_token(self, token: Token, digest: bytes) -> None:
        self._db.execute(INSERT_TOKEN, digest=digest, **msgspec.structs.asdict(token))

    def delete_token(self, name: str) -> None:
        self._db.execute(DELETE_TOKEN, name=name)

    def tokens(self) -> list[Token]:
        return [token for token, _ in self.token_digests().values()]

    def token_digests(self) -> dict[str, tuple[Token, bytes]]:
        """All tokens by their names, with the digests of their secrets."""
        rows = self._db.execute(ALL_TOKENS)
        return {row["name"]: (msgspec.convert(row, Token), row["digest"]) for row in rows}


def _place(message: Message[Any], view: JobView) -> tuple[int, int]:
    """Where a message stands among those about its job: a later start of the agent is newer, and so is a higher number.

    An agent that has lost its disk numbers from 1 again. A rejection has no number: it is the newest of its start.
    """
    return message.boot or view.boot, message.seq or view.seq + 1


def _job(row: Row) -> JobView:
    envelope = msgspec.json.decode(row["envelope"], type=Envelope)
    result = msgspec.json.decode(row["result"]) if row["result"] else None
    fields = {
        "cancel": bool(row["cancel"]),
        "forget": bool(row["forget"]),
        "lost": bool(row["lost"]),
        "order": read_order(envelope.payload),
        "result": result,
        "options": msgspec.json.decode(row["options"]) if row["options"] else None,
        "options_state": msgspec.json.decode(row["options_state"]) if row["options_state"] else None,
    }
    return msgspec.convert(row | fields, JobView)


def _dataset(row: Row) -> DatasetView:
    return msgspec.convert(row | {"found": msgspec.json.decode(row["found"])}, DatasetView)


def _node(row: Row) -> NodeView:
    parts = {name: msgspec.json.decode(row[name]) if row[name] else None for name in ("info", "heartbeat")}
    drain = None if row["drain"] is None else bool(row["drain"])
    return msgspec.convert(row | parts | {"drain": drain}, NodeView)
