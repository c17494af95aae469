"""The tables of the coordinator's database, the same on SQLite and PostgreSQL, and the way to them from every earlier version.

The SQL is text that both understand; where their words for a type differ, it has SQLite's, and `POSTGRESQL` the other's.
"""

from __future__ import annotations

import re

BEFORE_POSTGRESQL = (
    """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    digest TEXT NOT NULL,
    envelope BLOB NOT NULL,
    created REAL NOT NULL,
    changed REAL NOT NULL,
    phase TEXT NOT NULL,
    outcome TEXT, reason TEXT, text TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    boot INTEGER NOT NULL DEFAULT 0,
    seq INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0,
    forget INTEGER NOT NULL DEFAULT 0,
    result BLOB
);
CREATE TABLE history (
    message TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    time REAL NOT NULL,
    seq INTEGER, attempt INTEGER,
    phase TEXT NOT NULL,
    outcome TEXT, reason TEXT, text TEXT,
    late INTEGER NOT NULL
);
CREATE INDEX history_of_job ON history (job, time);
CREATE TABLE nodes (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    boot INTEGER NOT NULL, conn INTEGER NOT NULL,
    seen REAL NOT NULL,
    info BLOB, heartbeat BLOB,
    drain INTEGER
);
""",
    """
ALTER TABLE nodes ADD COLUMN drain_command INTEGER NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN told INTEGER NOT NULL DEFAULT 0;
""",
    """
ALTER TABLE nodes ADD COLUMN heard REAL NOT NULL DEFAULT 0;
""",
    """
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    scope TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL
);
CREATE TABLE datasets (
    sha256 TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    uploaded REAL NOT NULL,
    found BLOB NOT NULL
);
CREATE TABLE audit (
    number INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    who TEXT NOT NULL,
    address TEXT,
    what TEXT NOT NULL,
    made TEXT,
    status INTEGER NOT NULL
);
ALTER TABLE jobs ADD COLUMN retry_of TEXT;
""",
)
"""What SQLite files had before there was PostgreSQL, version by version. They never change."""

NAMES = ("meta", "jobs", "history", "nodes", "tokens", "datasets", "audit")
"""Of the tables that every version on PostgreSQL has."""
TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,          -- in the order in which they came
    id TEXT NOT NULL UNIQUE,
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
    cancel INTEGER NOT NULL DEFAULT 0,   -- 1: somebody has asked for its end
    forget INTEGER NOT NULL DEFAULT 0,   -- 1: somebody has asked for its deletion, which awaits its node
    result BLOB,                         -- JSON of the JobResult, once it has come
    retry_of TEXT                        -- the job that it is run again for
);
CREATE INDEX jobs_of_node ON jobs (node, number);
CREATE INDEX jobs_by_phase ON jobs (phase, number);
CREATE INDEX jobs_by_outcome ON jobs (outcome, number);
CREATE INDEX jobs_counted ON jobs (phase, outcome);
CREATE INDEX jobs_open ON jobs (number, node) WHERE phase != 'ended';
CREATE INDEX jobs_to_forget ON jobs (number, node) WHERE forget = 1;
CREATE TABLE history (
    number INTEGER PRIMARY KEY,
    message TEXT NOT NULL UNIQUE,        -- its id: a repeated one is known here
    job TEXT NOT NULL,
    time REAL NOT NULL,
    seq INTEGER, attempt INTEGER,
    phase TEXT NOT NULL,
    outcome TEXT, reason TEXT, text TEXT,
    late INTEGER NOT NULL                -- 1: it came after a newer one and changed nothing
);
CREATE INDEX history_of_job ON history (job, number);
CREATE TABLE nodes (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    boot INTEGER NOT NULL, conn INTEGER NOT NULL,
    seen REAL NOT NULL,                  -- when the node itself last spoke
    info BLOB, heartbeat BLOB,           -- JSON
    drain INTEGER,                       -- 1: it is to take no new jobs, 0: it is; null: nobody has said
    drain_command INTEGER NOT NULL DEFAULT 0, -- the number under which it is told so
    told INTEGER NOT NULL DEFAULT 0,     -- and that which it says to have done last
    heard REAL NOT NULL DEFAULT 0        -- as `seen`, in seconds that the coordinator has run, over all its starts
);
CREATE INDEX nodes_by_state ON nodes (state, id);
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
"""
"""All tables of version 5, with which every database on PostgreSQL begins."""
TAKE_OVER = f"""
DROP INDEX history_of_job;
ALTER TABLE meta RENAME TO old_meta;
ALTER TABLE jobs RENAME TO old_jobs;
ALTER TABLE history RENAME TO old_history;
ALTER TABLE nodes RENAME TO old_nodes;
ALTER TABLE tokens RENAME TO old_tokens;
ALTER TABLE datasets RENAME TO old_datasets;
ALTER TABLE audit RENAME TO old_audit;
{TABLES}
INSERT INTO meta SELECT * FROM old_meta;
INSERT INTO jobs SELECT rowid, * FROM old_jobs;
INSERT INTO history SELECT rowid, * FROM old_history;
INSERT INTO nodes SELECT * FROM old_nodes;
INSERT INTO tokens SELECT * FROM old_tokens;
INSERT INTO datasets SELECT * FROM old_datasets;
INSERT INTO audit SELECT * FROM old_audit;
DROP TABLE old_meta;
DROP TABLE old_jobs;
DROP TABLE old_history;
DROP TABLE old_nodes;
DROP TABLE old_tokens;
DROP TABLE old_datasets;
DROP TABLE old_audit;
"""  # noqa: S608
LATER: tuple[str, ...] = (
    """
CREATE TABLE rollouts (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    plan BLOB NOT NULL,                  -- JSON of what was asked for
    created REAL NOT NULL, changed REAL NOT NULL,
    state TEXT NOT NULL,
    text TEXT                            -- why it has ended
);
CREATE INDEX rollouts_running ON rollouts (number) WHERE state = 'running';
CREATE INDEX rollouts_by_state ON rollouts (state);
CREATE TABLE rollout_nodes (
    rollout TEXT NOT NULL,
    place INTEGER NOT NULL,              -- in the order in which they get their jobs
    node TEXT NOT NULL,
    job TEXT,                            -- null: none was made
    outcome TEXT, text TEXT,             -- of a job that was deleted, or that could not or was not to be made
    PRIMARY KEY (rollout, place),
    UNIQUE (rollout, node)
);
CREATE INDEX rollout_nodes_of_job ON rollout_nodes (job);
ALTER TABLE jobs ADD COLUMN rollout TEXT;
ALTER TABLE jobs ADD COLUMN model TEXT;
ALTER TABLE jobs ADD COLUMN tokens_per_s REAL;
CREATE INDEX jobs_of_rollout ON jobs (rollout, number) WHERE rollout IS NOT NULL;
CREATE INDEX jobs_measured ON jobs (model, node, number) WHERE tokens_per_s IS NOT NULL;
""",
    """
ALTER TABLE jobs ADD COLUMN options BLOB;           -- JSON of the NewOptions that it was sent last
ALTER TABLE jobs ADD COLUMN options_state BLOB;     -- JSON of the OptionsState that its node tells
""",
    """
CREATE TABLE loose_files (sha256 TEXT PRIMARY KEY); -- may be in the object store, and go from there unless a dataset or a job has them
""",
    """
ALTER TABLE loose_files ADD COLUMN since REAL NOT NULL DEFAULT 0; -- -1: it is being deleted, and nothing may count on it
ALTER TABLE jobs ADD COLUMN offer TEXT;             -- sha256 of the message with its offer that was sent last
""",
    """
CREATE TABLE job_files (                            -- what jobs have brought and made; the store adds those of jobs from before
    job TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (job, sha256)
);
CREATE INDEX jobs_of_file ON job_files (sha256);
""",
)
"""A later version is a further text here, in SQL that both understand; those that are here never change."""
VERSIONS = (*BEFORE_POSTGRESQL, TAKE_OVER, *LATER)
"""The SQL that leads an SQLite file to each version from the one before."""
ALL_NAMES = (*NAMES, "rollouts", "rollout_nodes", "loose_files", "job_files")
FIRST_OF_POSTGRESQL = len(BEFORE_POSTGRESQL) + 1
NUMBERED = ("jobs", "history", "audit", "rollouts")
"""Tables whose `number` the database itself gives."""
POSTGRESQL = {
    "INTEGER PRIMARY KEY": "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY",
    "INTEGER": "BIGINT",
    "REAL": "DOUBLE PRECISION",
    "BLOB": "BYTEA",
    "TEXT": 'TEXT COLLATE "C"',  # sorted by bytes, as SQLite does, whatever the language of the server
}
"""What SQLite's types are called there."""


def postgresql(script: str) -> str:
    """Return a version's text in the words of PostgreSQL."""
    return re.sub(rf"\b({'|'.join(POSTGRESQL)})\b", lambda found: POSTGRESQL[found[1]], script)
