"""A coordinator whose state is on PostgreSQL: who may work there, and what happens when the server goes away and comes back."""

from __future__ import annotations

import json
import logging
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from api_server import INFO, ApiServer
from conftest import Cli, write_domain
from fleet import MOSQUITTO, free_port, wait_for
from orders import NODE, make_offer, make_order
from paho.mqtt.enums import CallbackAPIVersion
from postgres import PASSWORD, USER, Postgres, running

from edge_agent import config
from edge_agent.coordinator import database
from edge_agent.coordinator.client import Answered, Client
from edge_agent.coordinator.schema import LATER, VERSIONS
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.dataset import file_sha256
from edge_agent.delivery import IN_FLIGHT
from edge_agent.errors import DatabaseAway, DatabaseUnusable, StateDamaged
from edge_agent.job import Dataset, Job
from edge_agent.job_building import build_job
from edge_agent.messages import JobStatus, Message, NodeState, Phase, decode, encode

DIGEST, EMPTY = "d" * 64, "0" * 64
PHASES: tuple[Phase, ...] = ("running", "paused")
NEW_COLUMNS = "SELECT data_type FROM information_schema.columns WHERE table_schema = '{}' AND column_name IN ('speed', 'data')"
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = '{}'"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held is not awaited for long."""
    monkeypatch.setattr(database, "LOCKED_S", 0.3)


@pytest.fixture(scope="module")
def struck() -> Iterator[Postgres]:
    """A server that tests stop and start; at the end of each it runs."""
    with running() as cluster:
        yield cluster


def _open(tmp_path: Path, server: config.Database) -> CoordinatorStore:
    return CoordinatorStore(tmp_path / "coordinator.sqlite", 3600, server=server)


def _schema(server: config.Database) -> str:
    return server.url.rpartition("%3D")[2]


def _job(store: CoordinatorStore) -> str:
    order = make_order(Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=2**30), 0)
    store.add_job(order, make_offer(order).order)
    return order.id


def _status(seq: int) -> Message[JobStatus]:
    return decode(encode(JobStatus(DIGEST, PHASES[seq % 2]), "edge1/f/n", seq=seq, attempt=1), JobStatus)


def _apply(store: CoordinatorStore, job: str, seq: int) -> None:
    view = store.job(job)
    assert view is not None
    store.apply_status(view, _status(seq))


# who may work there


def test_second_coordinator_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    """It is told who is there, writes nothing, and gets the database when the first one has ended."""
    server = postgres.schema()
    with closing(_open(tmp_path, server)) as first:
        job = _job(first)
        with pytest.raises(DatabaseUnusable, match=r"another coordinator works in it \('edge-agent [0-9a-f]{8} on .*', since 20") as raised:
            _open(tmp_path, server)
        assert (raised.value.code, raised.value.exit_code) == ("state", 13)
        with closing(_open(tmp_path, postgres.schema())) as elsewhere:
            assert elsewhere.jobs(9) == []
    with closing(_open(tmp_path, server)) as second:
        assert [view.id for view in second.jobs(9)] == [job]


def test_session_whose_connection_was_cut_gives_way(postgres: Postgres, tmp_path: Path) -> None:
    """The server has not noticed its end, and it still has the lock: the same coordinator takes that from it."""
    with closing(_open(tmp_path, postgres.schema())) as store:
        job, engine = _job(store), store._db._engine
        with closing(engine.raw_connection()) as lost:
            lost.detach()
            _apply(store, job, 1)
        assert [row.seq for row in store.history(job)] == [1]


def test_text_that_the_server_could_not_hold_is_refused_at_the_start(postgres: Postgres, tmp_path: Path) -> None:
    """A cluster that was made without a locale has SQL_ASCII."""
    with pytest.raises(DatabaseUnusable, match=r"its encoding is SQL_ASCII, .*createdb --encoding UTF8"):
        _open(tmp_path, postgres.of_ascii())


def test_tables_of_another_program_are_left_alone(postgres: Postgres, tmp_path: Path) -> None:
    """So are those of a later version of this one."""
    server = postgres.schema()
    postgres.ask("CREATE TABLE jobs (x TEXT)", _schema(server))
    with pytest.raises(DatabaseUnusable, match="tables of another program"):
        _open(tmp_path, server)
    assert postgres.ask(TABLES.format(_schema(server))) == [("jobs",)]
    later = postgres.schema()
    _open(tmp_path, later).close()
    postgres.ask("UPDATE meta SET value = 99 WHERE name = 'format'", _schema(later))
    with pytest.raises(DatabaseUnusable, match="its format 99 is of a later version"):
        _open(tmp_path, later)


def test_tables_are_brought_up_version_by_version(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last one in one transaction: where it fails all is as before, to be tried again; state stays."""
    server = postgres.schema()
    with closing(_open(tmp_path, server)) as store:
        job = _job(store)
    step, wrong = (
        "ALTER TABLE nodes ADD COLUMN speed REAL;\nCREATE TABLE plans (number INTEGER PRIMARY KEY, data BLOB);",
        "DROP TABLE nowhere;",
    )
    for later, types in (((step, wrong), []), ((step,), [("bytea",), ("double precision",)])):
        monkeypatch.setattr(database, "LATER", (*LATER, *later))
        monkeypatch.setattr(database, "VERSIONS", (*VERSIONS, *later))
        if types:
            _open(tmp_path, server).close()
        else:
            with pytest.raises(DatabaseUnusable, match="nowhere"):
                _open(tmp_path, server)
        assert sorted(postgres.ask(NEW_COLUMNS.format(_schema(server)))) == types
        assert postgres.ask("SELECT value FROM meta WHERE name = 'format'", _schema(server)) == [(len(VERSIONS) + len(types) // 2,)]
    with closing(_open(tmp_path, server)) as store:
        assert [view.id for view in store.jobs(9)] == [job]


def test_take_over_is_all_or_nothing(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where copying the file fails, the server has no tables, and the next start begins again with the file."""
    file, server = tmp_path / "coordinator.sqlite", postgres.schema()
    with closing(CoordinatorStore(file, 3600)) as store:
        job = _job(store)
    with monkeypatch.context() as broken:
        broken.setattr(database, "SET_NEXT", "SELECT nothing FROM nowhere")
        with pytest.raises(DatabaseUnusable, match="nowhere"):
            _open(tmp_path, server)
    assert postgres.ask(TABLES.format(_schema(server))) == []
    with closing(_open(tmp_path, server)) as store:
        assert [view.id for view in store.jobs(9)] == [job]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coordinator.sqlite.taken-over"]


def test_file_beside_a_server_that_has_state_is_left_alone(postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the server has counts; the log says that the file is not used."""
    server = postgres.schema()
    _open(tmp_path, server).close()
    file = tmp_path / "coordinator.sqlite"
    with closing(CoordinatorStore(file, 3600)) as store:
        _job(store)
    with closing(_open(tmp_path, server)) as store:
        assert store.jobs(9) == []
    assert file.exists()
    assert f"database_file_unused path={file}" in caplog.text


def test_wrong_password_is_said_and_not_shown(
    postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the right one, in no line of the log."""
    monkeypatch.setattr(database, "START_S", 0.0)
    caplog.set_level(logging.DEBUG)
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("not-the-secret")
    server = postgres.schema()
    with pytest.raises(DatabaseAway, match="password authentication failed"):
        _open(tmp_path, config.Database(url=server.url, password_file=wrong))
    _open(tmp_path, server).close()
    assert "database_away" in caplog.text
    assert PASSWORD not in caplog.text
    assert "not-the-secret" not in caplog.text


def test_password_that_changes_is_read_anew(postgres: Postgres, tmp_path: Path) -> None:
    """With the next connection; a file that cannot be read meanwhile is as a server that is away."""
    server = postgres.schema()
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text(PASSWORD)
    with closing(_open(tmp_path, config.Database(url=server.url, password_file=file))) as store:
        job = _job(store)
        try:
            postgres.ask(f"ALTER ROLE \"{USER}\" PASSWORD 'another'")
            postgres.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'edge-agent %'")
            for problem in ("terminating connection", "password authentication failed"):
                with pytest.raises(DatabaseAway, match=problem):
                    store.job(job)
            file.unlink()
            with pytest.raises(DatabaseAway, match=r"database\.password_file: No such file"):
                store.job(job)
            file.touch(mode=0o600)
            file.write_text("another")
            assert store.job(job) is not None
        finally:
            postgres.ask(f"ALTER ROLE \"{USER}\" PASSWORD '{PASSWORD}'")


def test_place_where_no_tables_can_be_made(postgres: Postgres, tmp_path: Path) -> None:
    """A schema that does not exist, or that belongs to somebody else, is said with the server's words, and is never made."""
    with pytest.raises(DatabaseUnusable, match="no schema has been selected to create in"):
        _open(tmp_path, postgres.database("nowhere"))
    postgres.ask("CREATE SCHEMA foreign_one")
    postgres.ask(f'GRANT USAGE ON SCHEMA foreign_one TO "{USER}"')
    with pytest.raises(DatabaseUnusable, match="permission denied for schema foreign_one"):
        _open(tmp_path, postgres.database("foreign_one"))


def test_url_that_psycopg_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that does not exist can never work: the coordinator ends with 13."""
    with pytest.raises(DatabaseUnusable, match='invalid URI query parameter: "colour"'):
        _open(tmp_path, config.Database(url="postgresql+psycopg:///edge?colour=red"))


# what passes, and what does not


@pytest.mark.parametrize(
    ("state", "error"), [("53100", DatabaseAway), ("57014", DatabaseAway), ("25006", DatabaseAway), ("XX001", StateDamaged)]
)
def test_server_that_cannot_store(state: str, error: type[Exception], postgres: Postgres, tmp_path: Path) -> None:
    """A full disk and the like pass: nothing of the transaction is kept, and it is tried again. Damage ends the coordinator."""
    server = postgres.schema()
    with closing(_open(tmp_path, server)) as store:
        job = _job(store)
        schema = _schema(server)
        body = f"BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = '{state}'; END"
        postgres.ask(f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$", schema)
        postgres.ask("CREATE TRIGGER fail BEFORE UPDATE ON jobs EXECUTE FUNCTION fail()", schema)
        with pytest.raises(error, match="no room"):
            _apply(store, job, 1)
        assert store.history(job) == []
        postgres.ask("DROP TRIGGER fail ON jobs", schema)
        _apply(store, job, 1)
        assert [row.seq for row in store.history(job)] == [1]


def test_server_that_is_away_comes_back(struck: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says once that it went, with what to do, and once that it is back; what was stored is there."""
    caplog.set_level(logging.INFO)
    with closing(_open(tmp_path, struck.schema())) as store:
        job = _job(store)
        struck.stop("immediate")
        try:
            for _ in range(3):
                with pytest.raises(DatabaseAway, match="look whether it runs"):
                    _apply(store, job, 1)
            assert store.away is not None
        finally:
            struck.start()
        store.look()
        assert store.away is None
        _apply(store, job, 1)
        assert [row.seq for row in store.history(job)] == [1]
    assert caplog.text.count("database_away error=database postgresql+psycopg://edge-agent@/postgres does not answer") == 1
    assert caplog.text.count("database_back") == 1


class Cutter:
    """Between coordinator and server; once `armed`, it lets the next COMMIT through, and ends the connection instead of the answer."""

    def __init__(self, postgres: Postgres, ends: ExitStack) -> None:
        self.directory, self.armed, self._server = Path(tempfile.mkdtemp(prefix="ea-")), False, postgres.directory
        ends.callback(shutil.rmtree, self.directory)
        self._listener = ends.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(self.directory / ".s.PGSQL.5432"))
        self._listener.listen()
        thread = threading.Thread(target=self._serve)
        thread.start()
        ends.callback(thread.join)
        ends.callback(self._listener.shutdown, socket.SHUT_RDWR)

    def _serve(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
                    server.connect(str(self._server / ".s.PGSQL.5432"))
                    self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        while True:
            for ready in select.select([client, server], [], [], 1.0)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                (server if ready is client else client).sendall(data)
                if self.armed and ready is client and b"COMMIT\0" in data:
                    self.armed = False
                    server.recv(65536)  # it is committed
                    return


def test_commit_whose_answer_is_lost_counts_once(postgres: Postgres, tmp_path: Path) -> None:
    """The coordinator does not know whether a status was stored; it comes again, and is in the history once."""
    with ExitStack() as ends:
        cutter, server = Cutter(postgres, ends), postgres.schema()
        url = server.url.replace(str(postgres.directory), str(cutter.directory))
        store = ends.enter_context(closing(_open(tmp_path, config.Database(url=url, password_file=server.password_file))))
        job, message = _job(store), _status(1)
        view = store.job(job)
        assert view is not None
        cutter.armed = True
        with pytest.raises(DatabaseAway):
            store.apply_status(view, message)
        assert not cutter.armed
        again = store.job(job)
        assert again is not None
        assert again.seq == 1
        assert store.apply_status(again, message)
        assert [(row.seq, row.late) for row in store.history(job)] == [(1, False)]
        assert store.job(job) == again


def test_coordinator_whose_database_another_has_taken_ends(struck: Postgres, tmp_path: Path) -> None:
    """While it was cut off, another one has come: it does not write beside that."""
    server = struck.schema()
    with closing(_open(tmp_path, server)) as first:
        job = _job(first)
        struck.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'edge-agent %'")
        with closing(_open(tmp_path, server)) as second:
            with pytest.raises(DatabaseAway):
                _apply(first, job, 1)
            with pytest.raises(DatabaseUnusable, match="another coordinator"):
                first.look()
            assert second.history(job) == []


# a whole coordinator


def test_api_over_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    """What is handed in, listed, canceled, tried again, deleted and kept of it is the same as over a file."""
    with ExitStack() as ends:
        api = ApiServer(tmp_path, ends, database=postgres.schema())
        data = write_domain(tmp_path / "data.jsonl", "chain", 3, 1)
        sha256 = api.client("submit").upload(data, file_sha256(data)).sha256
        first = api.submit(sha256)
        assert api.ask("POST", f"/jobs/{first.id}/cancel").json()["outcome"] == "canceled"
        again = api.ask("POST", f"/jobs/{first.id}/retry").json()
        assert [job["id"] for job in api.ask("GET", "/jobs").json()["items"]] == [again["id"], first.id]
        assert [job["id"] for job in api.ask("GET", "/jobs?outcome=canceled").json()["items"]] == [first.id]
        assert api.ask("GET", "/jobs?node=%00").json()["items"] == []
        assert api.ask("GET", "/jobs/%00").status_code == 404
        assert api.ask("DELETE", f"/datasets/{sha256}").status_code == 409
        assert api.ask("GET", "/nodes").json()["items"][0]["info"]["models"] == {"tiny": None}
        assert api.ask("POST", f"/nodes/{NODE}/drain").json()["drain"] is True
        assert api.ask("DELETE", "/tokens/submit").status_code == 200
        assert api.ask("GET", "/jobs", "submit").status_code == 401
        wait_for("the audit", lambda: len(api.ask("GET", "/audit").json()["items"]) >= 6)
        assert (
            b'edge_agent_jobs{outcome="canceled",phase="ended"} 1.0'
            in api.http.get(f"{api.url}/metrics", headers={"Authorization": f"Bearer {api.secrets['read']}"}).content
        )


class Stage:
    """A broker, a coordinator on PostgreSQL, and a node that the test plays: it says what it is told to, and hears acknowledgements."""

    def __init__(self, server: config.Database, ends: ExitStack) -> None:
        assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
        self.directory = Path(tempfile.mkdtemp(prefix="ea-"))
        ends.callback(shutil.rmtree, self.directory)
        self.port, self.acknowledged = free_port(), list[tuple[float, str]]()
        (self.directory / "mosquitto.conf").write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ends.callback(self._end)
        self._start("broker", [MOSQUITTO, "-c", str(self.directory / "mosquitto.conf")])
        (self.directory / "coordinator.toml").write_text(
            f'state_directory = "state"\n[broker]\nport = {self.port}\n[database]\nurl = "{server.url}"\n'
            f'password_file = "{server.password_file}"\n'
        )
        self.client = ends.enter_context(Client.local(self.directory / "state"))
        self.start_coordinator()
        self.node = paho.Client(CallbackAPIVersion.VERSION2, "the-node")
        self.node.max_inflight_messages_set(1000)
        self.node.on_message = lambda _c, _u, message: self.acknowledged.append((time.monotonic(), message.topic.rpartition("/")[2]))
        wait_for("the broker", self._connect)
        self.node.loop_start()
        ends.callback(self.node.loop_stop)
        ends.callback(self.node.disconnect)
        self.node.subscribe(f"edge1/default/{NODE}/down/ack/#", 1)
        self.say(encode(INFO, "test"), "info")
        self.say(encode(NodeState("ready", 1, 1, 0), "test"), "state")
        wait_for("the node", lambda: [n for n in self.client.nodes() if n.present])

    def _connect(self) -> bool:
        with suppress(OSError):
            return self.node.connect("127.0.0.1", self.port) == 0
        return False

    def say(self, payload: bytes, *parts: str) -> None:
        self.node.publish("/".join(("edge1/default", NODE, "up", *parts)), payload, 1)

    def start_coordinator(self) -> None:
        self._start(
            "coordinator", [sys.executable, "-m", "edge_agent", "coordinator", "--config", str(self.directory / "coordinator.toml")]
        )
        wait_for(f"the coordinator\n{self.log()}", self._answers, 60)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # httpx leaves a socket open where nobody listens
            return probe.connect_ex(str(self.directory / "state" / "api.sock")) == 0

    def stop_coordinator(self, number: int) -> int:
        process = self.processes.pop("coordinator")
        process.send_signal(number)
        return process.wait(20)

    def log(self) -> str:
        return (self.directory / "coordinator.log").read_text()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(20)


@pytest.mark.slow
def test_server_that_restarts_while_nodes_speak(struck: Postgres) -> None:
    """Nothing is acknowledged while it is away; then every message is in the history once, in order, and acknowledged: also where the
    coordinator was killed meanwhile. Requests are answered with what is wrong, and the coordinator can be stopped."""
    with ExitStack() as ends:
        stage = Stage(struck.schema(), ends)
        data = write_domain(stage.directory / "data.jsonl", "chain", 3, 1)
        job = build_job("tiny", data, None, {"budget_bytes": 2**30}, [])
        view = stage.client.submit(NODE, job, {job.dataset.sha256: data}, priority=4)
        said, quiet, done = dict[str, bytes](), list[tuple[float, float]](), threading.Event()

        def speak() -> None:
            while not done.wait(0.02):
                if len(unacknowledged()) >= IN_FLIGHT:  # as a node does
                    continue
                seq = len(said) + 1
                payload = encode(JobStatus(view.digest, PHASES[seq % 2]), f"edge1/default/{NODE}", seq=seq, attempt=1, boot=1)
                said[json.loads(payload)["id"]] = payload
                stage.say(payload, "job", view.id, "status")

        def unacknowledged() -> set[str]:
            return set(said) - {message for _, message in list(stage.acknowledged)}

        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            for mode, killed in (("fast", False), ("immediate", False), ("fast", True)):
                goal = len(stage.acknowledged) + 20
                wait_for("more to be stored", partial(lambda goal: len(stage.acknowledged) > goal, goal))
                struck.stop(mode)
                try:
                    since = time.monotonic() + 0.5  # what was committed before is acknowledged a little later
                    wait_for("a request to fail", lambda: _away(stage.client))
                    time.sleep(1.0)
                    quiet.append((since, time.monotonic()))
                    if killed:
                        assert stage.stop_coordinator(signal.SIGKILL) == -signal.SIGKILL
                finally:
                    struck.start()
                if killed:
                    stage.start_coordinator()
        finally:
            done.set()
            speaker.join()
        deadline = time.monotonic() + 60
        while missing := unacknowledged():  # as a node does where a coordinator died between commit and acknowledgement
            assert time.monotonic() < deadline, f"{len(missing)} of {len(said)} messages are not acknowledged"
            for message in missing:
                stage.say(said[message], "job", view.id, "status")
            time.sleep(1.0)
        history = stage.client.history(view.id)
        assert sorted(row.seq or 0 for row in history) == [*range(1, len(said) + 1)]
        assert [row.seq for row in history if not row.late] == [*range(1, len(said) + 1)]
        assert [at for at, _ in stage.acknowledged if any(since < at < until for since, until in quiet)] == []
        log = stage.log()
        assert log.count("database_away") >= 3
        assert log.count("database_back") >= 2
        assert PASSWORD not in log
        struck.stop()
        try:
            wait_for("a request to fail", lambda: _away(stage.client))
            assert stage.stop_coordinator(signal.SIGTERM) == 0
        finally:
            struck.start()


def _away(client: Client) -> bool:
    try:
        client.jobs(1)
    except Answered as error:
        return error.code == "database_away" and "does not answer" in str(error)
    return False


def test_coordinator_whose_server_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for some time, then ends with an exit code on which a supervisor starts it again."""
    monkeypatch.setattr(database, "START_S", 0.5)
    server = config.Database(url=f"postgresql+psycopg://{USER}@127.0.0.1:{free_port()}/edge")
    with pytest.raises(DatabaseAway, match="Connection refused") as raised:
        _open(tmp_path, server)
    assert (raised.value.code, raised.value.exit_code) == ("database_away", 1)


def test_coordinator_refused_by_the_command_line(postgres: Postgres, tmp_path: Path, cold_cli: Cli) -> None:
    """`edge-agent coordinator` ends with 13 where another has its database, and says so in one line."""
    server = postgres.schema()
    file = tmp_path / "coordinator.toml"
    file.write_text(f'state_directory = "state"\n[database]\nurl = "{server.url}"\npassword_file = "{server.password_file}"\n')
    with closing(_open(tmp_path, server)):
        ran = cold_cli("coordinator", "--config", file)
    assert ran.code == 13
    assert ran.err.startswith("error state: database postgresql+psycopg://edge-agent@/postgres: another coordinator works in it")
