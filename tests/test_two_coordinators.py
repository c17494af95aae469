"""Two coordinators that share the work: real processes over PostgreSQL and Mosquitto with its sample rules, one of them killed."""

from __future__ import annotations

import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
from api_server import INFO
from conftest import write_lines
from fleet import free_port, wait_for
from orders import NODE, make_offer, make_order
from postgres import Postgres

from edge_agent.config import Broker, CoordinatorConfig, Database, Files, read_config
from edge_agent.coordinator import database
from edge_agent.coordinator.audience import Happening
from edge_agent.coordinator.others import Others
from edge_agent.coordinator.rollout import Rate, RolloutPlan, Selector
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import DatasetView
from edge_agent.dataset import file_sha256
from edge_agent.dataset_check import check
from edge_agent.errors import ConfigInvalid, DatabaseUnusable, FilesAway, JobConflict, Refused
from edge_agent.job import Dataset, Job
from edge_agent.messages import MOST_TOLD, Changed, Heartbeat, JobResult, JobStatus, NodeState, PlanAnswer, decode, encode, new_id
from profiles.sensors import Reading, Resources

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from many_fleet import BigFleet, Work  # noqa: E402

EMPTY = "0" * 64
RESOURCES = Resources(*[Reading(None, "no sensor")] * 2, 1, 1, 1, None, *[Reading(None, "no sensor")] * 3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a lock that is held nor the lead is awaited for long."""
    monkeypatch.setattr(database, "LOCKED_S", 0.3)
    monkeypatch.setattr(database, "LEAD_S", 0.0)


def _store(root: Path, server: Database, instance: str | None) -> CoordinatorStore:
    return CoordinatorStore(root / "coordinator.sqlite", 3600, server=server, instance=instance)


@pytest.fixture
def two(postgres: Postgres, tmp_path: Path) -> Iterator[tuple[CoordinatorStore, CoordinatorStore]]:
    server = postgres.schema()
    with closing(_store(tmp_path, server, "a")) as first, closing(_store(tmp_path, server, "b")) as second:
        yield first, second


def _dataset(store: CoordinatorStore, root: Path) -> str:
    file = write_lines(root / "data.jsonl", {"question": "How many?", "answer": "#### 1"})
    sha256 = file_sha256(file)
    assert store.keep_dataset(DatasetView(sha256=sha256, name="d", size_bytes=file.stat().st_size, uploaded=1.0, found=check(file)[0]))
    return sha256


def _job(store: CoordinatorStore, sha256: str) -> str:
    order = make_order(Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**30), 7)
    store.add_job(order, make_offer(order).order)
    return order.id


# who may work there


def test_only_those_that_share_work_together(postgres: Postgres, tmp_path: Path) -> None:
    """One that shares bears no other of its name, and none beside it that does not share; nor does that one bear any."""
    server = postgres.schema()
    with closing(_store(tmp_path, server, "a")):
        with pytest.raises(DatabaseUnusable, match="another coordinator with the `instance` 'a' works in it"):
            _store(tmp_path, server, "a")
        with pytest.raises(DatabaseUnusable, match=r"another coordinator works in it .* or have both say `shared = true`"):
            _store(tmp_path, server, None)
        _store(tmp_path, server, "b").close()
    with closing(_store(tmp_path, server, None)), pytest.raises(DatabaseUnusable, match="another coordinator works in it"):
        _store(tmp_path, server, "a")


def test_tables_of_an_earlier_version_are_brought_up_by_who_is_alone(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No coordinator finds other tables below it than it was made for."""
    server = postgres.schema()
    with closing(_store(tmp_path, server, "a")):
        later = (*database.LATER, "CREATE TABLE more (x INTEGER)")
        monkeypatch.setattr(database, "LATER", later)
        monkeypatch.setattr(database, "VERSIONS", (*database.VERSIONS, later[-1]))
        with pytest.raises(DatabaseUnusable, match="stop all, then start this one first"):
            _store(tmp_path, server, "b")
    _store(tmp_path, server, "b").close()


def test_sharing_takes_a_server_and_files_in_common(tmp_path: Path) -> None:
    """A file of SQLite has one coordinator, as has a directory of files."""
    file = tmp_path / "coordinator.toml"
    file.write_text('state_directory = "state"\nshared = true\n[files]\nurl = "file:///somewhere"\n')
    with pytest.raises(ConfigInvalid, match="`shared` have a `database` and `files` in common"):
        read_config(file, CoordinatorConfig)


def test_lead_passes_on(two: tuple[CoordinatorStore, CoordinatorStore]) -> None:
    """One leads; who leaves, or whose session ends, leads no more, and the other one does. Both count the same time."""
    first, second = two
    assert [first.leads(True), second.leads(True), first.leads(True)] == [True, False, True]
    assert [first.leads(False), second.leads(True), first.leads(True)] == [False, True, False]
    second._db._engine.dispose()
    wait_for("the lead", lambda: first.leads(True), 20)
    second.jobs(1)  # in a new session
    assert not second.leads(True)
    first.clock.keep()
    second.clock.set(second._ran_s())
    assert second.clock.now() == pytest.approx(first.clock.now(), abs=5)


# what both do


def test_messages_that_both_get_count_once_and_in_order(two: tuple[CoordinatorStore, CoordinatorStore], tmp_path: Path) -> None:
    """Each message comes to both at once, from as many threads: it is in the history once, and the newest status stands."""
    sha256 = _dataset(two[0], tmp_path)
    job = _job(two[0], sha256)
    digest = two[0].job(job).digest  # type: ignore[union-attr]
    phases = ("accepted", "staging", "ready", "running", "paused")
    said = [decode(encode(JobStatus(digest, phases[n % 5]), "n", boot=1, seq=n + 1, attempt=1), JobStatus) for n in range(40)]
    failures: list[BaseException] = []

    def take(store: CoordinatorStore, step: int) -> None:
        try:
            for message in said[::step]:
                view = store.job(job)
                assert view is not None
                store.apply_status(view, message)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=take, args=(store, step)) for store, step in zip(two, (1, -1), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    view = two[0].job(job)
    assert view is not None
    assert (view.seq, view.phase) == (40, phases[39 % 5])
    assert sorted(row.seq or 0 for row in two[1].history(job)) == [*range(1, 41)]


def test_end_is_one_coordinators(two: tuple[CoordinatorStore, CoordinatorStore], tmp_path: Path) -> None:
    """Of two that end a job one does; and none that thinks that it is in another phase."""
    first, second = two
    job = _job(first, _dataset(first, tmp_path))
    first.offered(job)
    assert not second.end(job, "expired", "expired", "too late", "created")
    assert second.end(job, "expired", "expired", "no answer", "offered")
    assert not first.end(job, "canceled", "canceled", "somebody asked")
    first.offered(job)
    assert (first.job(job).phase, first.job(job).outcome) == ("ended", "expired")  # type: ignore[union-attr]


def test_files_of_a_job_are_fetched_by_one(two: tuple[CoordinatorStore, CoordinatorStore]) -> None:
    """Until it leaves them, or its session ends."""
    first, second = two
    assert [first.claim("j"), second.claim("j"), second.claim("k")] == [True, False, True]
    first.leave("j")
    assert second.claim("j")
    second._db._engine.dispose()
    wait_for("what the other has left", lambda: first.claim("j") and first.claim("k"), 20)


def test_file_that_is_being_deleted_is_nobodys(two: tuple[CoordinatorStore, CoordinatorStore], tmp_path: Path) -> None:
    """What has a job is not deleted; what is being deleted can be no dataset's, nor a new job's, until it is gone."""
    first, second = two
    sha256 = _dataset(first, tmp_path)
    job = _job(first, sha256)
    assert second.drop_dataset(sha256, set, loosen=True) == [job]
    view = first.job(job)
    assert view is not None
    assert first.delete_job(view, lambda: {sha256}, loosen=True) == set()
    assert second.drop_dataset(sha256, set, loosen=True) is None
    with pytest.raises(Refused, match="has been removed meanwhile"):
        _job(first, sha256)
    assert second.doom(time.time() - 60, set) == set()
    assert second.doom(time.time() + 60, set) == {sha256}
    assert not first.loosen(sha256)
    assert first.doomed(sha256)
    assert first.doom(time.time(), set) == {sha256}  # another one goes on with it
    first.settle(sha256)
    assert first.loosen(sha256)
    assert _dataset(first, tmp_path) == sha256
    assert second.doom(time.time() + 60, set) == set()
    assert first.loose_files() == set()


# whole coordinators


class Pair:
    """Two coordinators in this process, without a broker: what a node says is told to one of them."""

    def __init__(self, postgres: Postgres, root: Path, ends: ExitStack) -> None:
        server, files = postgres.schema(), Files(url=f"file://{root}/store")
        (root / "store").mkdir()
        self.services: list[Service] = []
        for instance in ("a", "b"):
            config = CoordinatorConfig(
                root / instance, instance=instance, shared=True, broker=Broker(port=free_port()), database=server, files=files
            )
            service = Service(config)
            service.start()
            ends.callback(service.stop)
            self.services.append(service)
            self.hear(service, INFO, "info")
        self.root = root

    @staticmethod
    def hear(service: Service, data: object, *parts: str, **envelope: int) -> None:
        service.call(lambda: service._receive_up(NODE, [*parts], encode(data, "test", **envelope), False))


@pytest.fixture
def pair(postgres: Postgres, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as ends:
        yield Pair(postgres, tmp_path, ends)


def test_what_one_knows_the_other_does(pair: Pair) -> None:
    """Tokens, datasets and jobs; a rejection is an answer to the offer of either."""
    a, b = pair.services
    secret = a.call(lambda: a.access.new("t", "read", None)).secret
    wait_for("the token", lambda: "t" in b.access._digests, 20)
    assert b.access.caller(f"Bearer {secret}").name == "t"
    a.call(lambda: a.access.revoke("t"))
    wait_for("its end", lambda: "t" not in b.access._digests, 20)
    sha256 = a.call(lambda: _dataset(a._store, pair.root))
    job = b.call(lambda: b.submit(NODE, Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29), 4, 600.0)).id
    a.call(lambda: a._store.offers(job, "f" * 64))
    for refused in ("e" * 64, "f" * 64):
        status = JobStatus(None, "ended", "rejected", "job_schema", "why not", refused)
        pair.hear(b, status, "job", job, "status", boot=1)
    assert [row.outcome for row in a.call(lambda: a.history(job))] == ["rejected"]
    assert a.call(lambda: a.job(job)).outcome == "rejected"


def test_who_looks_at_one_hears_of_the_other(pair: Pair) -> None:
    """By what the other tells; who was away while nobody listened has to look anew."""
    a, b = pair.services
    heard: list[Happening] = []
    since, _ = a.call(lambda: a.listen_to_all(heard.append, None))
    pair.hear(b, NodeState("ready", 1, 1, 0), "state", boot=1)
    told = decode(encode(Changed([], [NODE]), "b"), Changed)
    a.call(lambda: a._receive_of_other(["b", "changed"], msgspec.json.encode(told)))
    a.call(lambda: a._receive_of_other(["a", "changed"], b"not even JSON"))  # its own comes back to it
    assert [(h.kind, h.subject) for h in heard] == [("node", NODE)]
    assert b'"ready"' in heard[0].data
    a.call(lambda: a.stop_listening(None, heard.append))
    a._audience._left_at -= 3600
    a.call(lambda: a._receive_of_other(["b", "changed"], msgspec.json.encode(told)))
    assert a.call(lambda: a.listen_to_all(heard.append, since))[1]


def test_others_are_told_once_a_second() -> None:
    """Of each job and node once, however often it has changed, and of many in several messages; the first change is told at once."""
    told: list[Changed] = []
    others = Others(told.append)
    jobs, nodes = [new_id() for _ in range(3)], [f"node-{number:04}" for number in range(2 * MOST_TOLD)]
    others.tick(10.0)
    assert told == []
    others.add("job", jobs[0])
    others.tick(10.1)
    assert told == [Changed(jobs[:1], [])]
    for _ in range(10):
        for job in jobs:
            others.add("job", job)
        for node in nodes:
            others.add("node", node)
        others.tick(10.5)
    others.tick(11.05)
    assert len(told) == 1
    others.tick(11.1)
    assert [len(message.jobs) + len(message.nodes) for message in told[1:]] == [MOST_TOLD, MOST_TOLD, 3]
    assert [node for message in told[1:] for node in message.nodes] == nodes
    assert [job for message in told[1:] for job in message.jobs] == jobs
    others.tick(20.0)
    assert len(told) == 4
    assert all(decode(encode(message, "a"), Changed).data == message for message in told)


def test_change_of_a_job_at_one_is_told_to_the_other(pair: Pair) -> None:
    """Who watches a job at one hears of its end at the other, in one message; a heartbeat is told with it."""
    a, b = pair.services
    job = a.call(lambda: a.submit(NODE, Job(model="tiny", dataset=Dataset(_dataset(a._store, pair.root)), budget_bytes=2**29), 4, 600.0))
    heard: list[Happening] = []
    a.call(lambda: a.listen(job.id, heard.append))
    told: list[Changed] = []
    b._others._send = told.append
    pair.hear(b, Heartbeat(RESOURCES, 0, None), "heartbeat")
    for seq, phase in enumerate(("accepted", "staging", "ready"), 1):
        pair.hear(b, JobStatus(job.digest, phase), "job", job.id, "status", boot=1, seq=seq)  # type: ignore[arg-type]
    b.call(lambda: b.cancel(job.id))
    b.call(lambda: b._others.tick(time.monotonic()))
    assert told == [Changed([job.id], [NODE])]
    a.call(lambda: a._receive_of_other(["b", "changed"], encode(told[0], "b")))
    assert [h.kind for h in heard] == ["job", "job"]
    assert b'"ready"' in heard[-1].data


def test_job_that_comes_to_both_is_one(pair: Pair) -> None:
    """Under one id: whichever is asked first makes it, also in the moment between a look of the other one and its own."""
    a, b = pair.services
    of = Job(model="tiny", dataset=Dataset(a.call(lambda: _dataset(a._store, pair.root))), budget_bytes=2**29)
    job = new_id()
    made = [service.call(lambda s=service: s.hand_in(NODE, Selector(), of, 4, 600.0, job)) for service in (a, b)]
    assert [view.id for view in made] == [job, job]
    assert b.call(lambda: b.submit(NODE, of, 4, 600.0, as_id=job)).digest == made[0].digest
    with pytest.raises(JobConflict, match=f"job {job} is there with another priority"):
        b.call(lambda: b.hand_in(NODE, Selector(), of, 5, 600.0, job))
    assert [view.id for view in b.call(lambda: b._store.jobs(10))] == [job]


def test_answer_to_a_plan_finds_who_has_asked(pair: Pair) -> None:
    """All hear it; the others drop it."""
    b = pair.services[1]
    pair.hear(b, PlanAnswer(None, "busy", "later"), "plan", new_id(), "answer")
    assert b.metrics.received.labels("plan")._value.get() == 1


def test_rollout_that_one_ends_makes_no_more_jobs(pair: Pair) -> None:
    """The other one, which makes them, may just be about to; and the first is due at once, whoever was asked for it."""
    a, b = pair.services
    sha256 = a.call(lambda: _dataset(a._store, pair.root))
    for service in (a, b):
        pair.hear(service, NodeState("ready", 1, 1, 0), "state", boot=1)
        pair.hear(service, msgspec.structs.replace(INFO, models={"tiny": EMPTY}), "info", boot=1)
    plan = RolloutPlan(job=Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29), rate=Rate(maximum_per_minute=1))
    made = a.call(lambda: a.roll_out(plan, False)).rollout
    assert made is not None
    again = a.call(lambda: a.roll_out(plan, False)).rollout
    assert again is not None
    a.call(lambda: a.cancel_rollout(made.id, False))
    with pytest.raises(Refused, match="has had its turn"):
        b.call(lambda: b._submit_of_rollout(NODE, plan, made.id))
    assert b.call(lambda: b.rollout(made.id)).counts.canceled == 1
    b.call(lambda: b._rollouts.tick(time.monotonic()))
    assert b.call(lambda: b.rollout(again.id)).counts.open == 1


def test_result_that_comes_to_both_is_fetched_once(pair: Pair) -> None:
    """The other one leaves it alone, unless the node brings it there by HTTPS: then it takes it, and ends the job."""
    from edge_agent.messages import Artifact

    a, b = pair.services
    adapter = b"an adapter" * 1000
    sha256 = file_sha256(_written(pair.root / "adapter", adapter))
    of = Job(model="tiny", dataset=Dataset(a.call(lambda: _dataset(a._store, pair.root))), budget_bytes=2**29)
    job = a.call(lambda: a.submit(NODE, of, 4, 600.0))
    result = JobResult(job.digest, "succeeded", artifacts=(Artifact("adapter_model.safetensors", sha256, len(adapter)),))
    payload = encode(result, "test", boot=1, seq=1)
    for service in (a, b):
        service.call(lambda s=service: s._receive_up(NODE, ["job", job.id, "result"], payload, False))
    assert a.call(lambda: a._exchange.awaited(NODE, sha256)) is not None
    assert b.call(lambda: b._exchange.awaited(NODE, sha256)) is None
    assert b.call(lambda: b.awaited(NODE, sha256)) is not None
    b.call(lambda: b.receive_block(NODE, sha256, 0, adapter))
    wait_for("the end of the job", lambda: _ended(b, job.id), 30)
    assert (pair.root / "store" / "sha256" / sha256).read_bytes() == adapter
    wait_for("the other one to await nothing", lambda: _tick(a) and not a._exchange._awaited, 30)


def test_who_loses_the_broker_leaves_results_and_listeners(pair: Pair) -> None:
    """Another one fetches what it had begun to; and who listens comes back to hear what was told meanwhile."""
    from edge_agent.messages import Artifact
    from edge_agent.mqtt import Connected, Disconnected

    a, b = pair.services
    of = Job(model="tiny", dataset=Dataset(a.call(lambda: _dataset(a._store, pair.root))), budget_bytes=2**29)
    job = a.call(lambda: a.submit(NODE, of, 4, 600.0))
    result = JobResult(job.digest, "succeeded", artifacts=(Artifact("adapter_model.safetensors", "a" * 64, 10),))
    payload = encode(result, "test", boot=1, seq=1)

    def hear(service: Service) -> object:
        service.call(lambda: service._receive_up(NODE, ["job", job.id, "result"], payload, False))
        return service.call(lambda: service._exchange.awaited(NODE, "a" * 64))

    assert hear(a) is not None
    assert hear(b) is None
    heard: list[Happening] = []
    since, _ = a.call(lambda: a.listen_to_all(heard.append, None))
    a.call(lambda: a.listen(job.id, heard.append))
    a.call(lambda: a._handle(Disconnected("a cable")))
    assert a.call(lambda: a._exchange.awaited(NODE, "a" * 64)) is None
    assert hear(b) is not None
    a.call(lambda: a._handle(Connected("5")))
    assert [h.kind for h in heard][-2:] == ["missed", "missed"]
    assert a.call(lambda: a.listen_to_all(heard.append, since))[1]
    assert not a._commands._expiries or a._leads


def _written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def _tick(service: Service) -> bool:
    service.call(service._exchange.tick)
    return True


def _ended(service: Service, job: str) -> bool:
    service.call(service._exchange.tick)
    return bool(service.call(lambda: service.job(job)).phase == "ended")


def test_upload_of_what_is_being_deleted_is_tried_again(pair: Pair) -> None:
    """It is answered with 503 until the file is gone, and stored anew then."""
    a, b = pair.services
    sha256 = a.call(lambda: _dataset(a._store, pair.root))
    view = a.call(lambda: a.dataset(sha256))
    a.call(lambda: a._store.drop_dataset(sha256, set, loosen=True))
    assert b.call(lambda: b._store.doom(time.time() + 60, set)) == {sha256}
    a._remote._there[sha256] = time.monotonic()  # type: ignore[union-attr]
    with pytest.raises(FilesAway, match="just being deleted"):
        a.call(lambda: a.keep_dataset(view))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpx leaves a socket open where nobody listens
def test_one_is_killed(tmp_path: Path) -> None:
    """Jobs are handed in at both, and every one has one result, at its node and in the database: also where the one that leads is killed in
    their midst. The access rules of deploy/ let coordinators do what they have to."""
    options = Namespace(
        nodes=5, jobs=30, rate=10.0, coordinators=2, database="postgresql", tls=True, run_s=(0.2, 1.0), adapter_bytes=100_000,
        strikes=False, fresh=False, nodes_directory=str(tmp_path), keep=False, seed=1, away_s=0.5,
    )  # fmt: skip
    with ExitStack() as ends:
        fleet = BigFleet(options, ends)
        fleet.start_nodes()
        fleet.until("the nodes", lambda: fleet.up == options.nodes, 60)
        work = Work(fleet)
        killer = threading.Timer(1.0, work.kill_coordinator)
        killer.start()
        work.submit()
        killer.join()
        work.wait()
        ended, lost, double, _ = work.count()
        assert (ended, lost, double) == (options.jobs, 0, 0)
        del work.jobs[next(iter(work.jobs))]  # as if nobody had handed it in
        assert work.count()[:3] == (options.jobs - 1, 0, 1)
        assert work.taken_over_s is not None
        assert all("refuses" not in (fleet.directory / f"coordinator-{name}.log").read_text() for name in fleet.instances)
