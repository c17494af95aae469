"""Rollouts: which nodes, how fast, when it is too much, and that a coordinator which is killed goes on exactly where it was."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
import pytest
from conftest import Cli, write_domain
from fleet import MOSQUITTO, free_port, wait_for
from orders import FLEET, make_offer, make_order
from paho.mqtt.enums import CallbackAPIVersion
from postgres import Postgres
from sqlalchemy.exc import DBAPIError

from edge_agent.config import Database
from edge_agent.coordinator.client import Answered, Client
from edge_agent.coordinator.rollout import (
    Abort,
    Counts,
    Exponential,
    Rate,
    RolloutPlan,
    RolloutView,
    Selector,
    best,
    choose,
    due,
    per_minute,
    why_abort,
    why_not,
)
from edge_agent.coordinator.rollouts import LOOK_S, Rollouts
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import JobFilter, NodeView
from edge_agent.errors import Refused
from edge_agent.job import Dataset, Job
from edge_agent.job_building import build_job
from edge_agent.messages import (
    Heartbeat,
    JobResult,
    JobStatus,
    NodeInfo,
    NodeLimits,
    NodeState,
    Offer,
    Outcome,
    decode,
    encode,
    new_id,
    read_order,
)
from edge_agent.topics import up
from profiles.sensors import Reading, Resources

EMPTY, FINGERPRINT, OTHER = "0" * 64, "a" * 64, "b" * 64
GIB = 2**30
NONE = Reading(None, "no sensor")
JOB = Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=GIB)
FAST = Rate(maximum_per_minute=1000)


def _info(models: dict[str, str | None] | None = None, lent: int = GIB, **labels: str) -> NodeInfo:
    models = {"tiny": FINGERPRINT} if models is None else models
    return NodeInfo("0.1.0", "3.11", "some device", "cpu", None, models, NodeLimits(lent, 2**20, 16), {}, labels)


def _beat(free: float | None = None, queue: int = 0, job: str | None = None) -> Heartbeat:
    return Heartbeat(Resources(Reading(free), NONE, 1, 1, GIB, None, NONE, NONE, NONE), queue, job)


def _node(name: str = "a", **changes: Any) -> NodeView:
    fields = {"state": "ready", "info": _info(site="north"), "heartbeat": None, "drain": None} | changes
    return NodeView(id=name, boot=1, conn=1, seen=1.0, drain_command=0, told=0, **fields)


# which nodes


@pytest.mark.parametrize(
    ("changes", "selector", "why"),
    [
        ({}, {}, None),
        ({"state": "init"}, {}, "it is init"),
        ({"state": "draining"}, {}, "it is draining"),
        ({"state": "offline"}, {}, "it is offline"),
        ({"state": "lost"}, {}, "it is lost"),
        ({"drain": True}, {}, "it is to take no new jobs"),
        ({"drain": False}, {}, None),
        ({"info": None}, {}, "it has not said yet what it can do"),
        ({}, {"labels": {"site": "north"}}, None),
        ({}, {"labels": {"site": "south"}}, "its label site is 'north'"),
        ({}, {"labels": {"site": "north", "line": "7"}}, "it has no label line"),
        ({"info": _info(line="7", site="north")}, {"labels": {"site": "north", "line": "7"}}, None),
        ({"info": _info({"other": FINGERPRINT})}, {}, "model 'tiny' is not on node a; it has: other"),
        ({"info": _info({})}, {}, "model 'tiny' is not on node a; it has: none"),
        (
            {"info": _info(dict.fromkeys(map(str, range(22))))},
            {},
            f"model 'tiny' is not on node a; it has: {', '.join(map(str, range(20)))} and 2 more",
        ),
        ({"info": _info({"tiny": None})}, {}, "the files of model 'tiny' are not there"),
        ({}, {"model_fingerprint": FINGERPRINT}, None),
        ({}, {"model_fingerprint": OTHER}, f"model 'tiny' on node a has the fingerprint {FINGERPRINT}, not {OTHER}"),
        ({"info": _info(lent=GIB // 2)}, {}, "node a lends 512 MiB, the job's budget is 1,024 MiB"),
    ],
)
def test_selector_chooses_by_what_a_node_has_told(changes: dict[str, Any], selector: dict[str, Any], why: str | None) -> None:
    """Every condition is one that leaves a node out, with its reason."""
    assert why_not(_node(**changes), JOB, Selector(**selector)) == why


def test_named_nodes_are_chosen_in_their_order() -> None:
    """Others are not spoken of; one that was never seen, or cannot have the job, has its reason."""
    nodes = [_node("a"), _node("b", state="lost"), _node("c"), _node("d")]
    choice = choose(nodes, JOB, Selector(nodes=("d", "x", "b", "a")))
    assert [c.node for c in choice.chosen] == ["d", "a"]
    assert [(c.node, c.why) for c in choice.others] == [("x", "it has never been seen"), ("b", "it is lost")]
    choice = choose(nodes[::-1], JOB, Selector())
    assert [c.node for c in choice.chosen] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("nodes", "jobs", "speeds", "order"),
    [
        ({"b": None, "a": None, "c": None}, {}, {}, "abc"),
        ({"a": None, "b": None}, {"a": 1}, {"a": 900.0}, "ba"),
        ({"a": _beat(GIB, 0, new_id()), "b": _beat(0)}, {}, {}, "ba"),
        ({"a": _beat(GIB, 2), "b": _beat(GIB, 1), "c": _beat(GIB)}, {"c": 3}, {}, "bac"),
        ({"a": None, "b": _beat(GIB / 4), "c": _beat(GIB / 2)}, {}, {"a": 900.0}, "cba"),
        ({"a": _beat(GIB), "b": _beat(9 * GIB)}, {}, {}, "ab"),  # more than the budget is of no use
        ({"a": _beat(GIB), "b": _beat(9 * GIB), "c": _beat(GIB)}, {}, {"a": 10.0, "c": 20.0}, "cab"),
    ],
)
def test_best_node_is_idle_then_free_then_fast(
    nodes: dict[str, Heartbeat | None], jobs: dict[str, int], speeds: dict[str, float], order: str
) -> None:
    """The fewest jobs first, then the most free memory up to the budget, then tokens/s, then the name; what is not told is 0."""
    views = [_node(name, heartbeat=beat) for name, beat in nodes.items()]
    choice = best([*views, _node("z", state="lost")], JOB, Selector(), jobs, speeds)
    assert "".join(c.node for c in choice.chosen) == order
    assert [c.node for c in choice.others] == ["z"]


def test_best_node_says_why() -> None:
    """In facts that a person can look up."""
    [told, untold] = best([_node("a", heartbeat=_beat(5.2 * GIB)), _node("b")], JOB, Selector(), {"b": 2}, {"a": 812.4}).chosen
    assert told.why == "no job there, 5,325 MiB free, 812 tokens/s in its last jobs with this model"
    assert untold.why == "jobs there: 2, free memory not told, speed with this model not known"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Selector, {"labels": {"site": "north"}, "nodes": ["a"]}),
        (Selector, {"nodes": ["a", "a"]}),
        (Selector, {"nodes": ["A/b"]}),
        (Selector, {"labels": {"site": ""}}),
        (Selector, {"labels": {str(number): "x" for number in range(17)}}),
        (Selector, {"label": {}}),
        (Rate, {"maximum_per_minute": 0}),
        (Rate, {"maximum_per_minute": 1001}),
        (Rate, {"maximum_per_minute": 5, "exponential": {"base_per_minute": 6, "succeeded": 1}}),
        (Exponential, {"base_per_minute": 1, "succeeded": 0}),
        (Exponential, {"base_per_minute": 1, "succeeded": 1, "increment_factor": 1.0}),
        (Exponential, {"base_per_minute": 1, "succeeded": 1, "increment_factor": 5.1}),
        (Abort, {"minimum_ended": 0, "threshold": 0.5}),
        (Abort, {"minimum_ended": 1, "threshold": 1.0}),
        (Abort, {"minimum_ended": 1, "threshold": -0.1}),
    ],
)
def test_what_makes_no_sense_is_refused(kind: type, fields: dict[str, Any]) -> None:
    """Every number has bounds, and no field is unknown."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, kind)


# how fast


@pytest.mark.parametrize(
    ("succeeded", "rate"), [(0, 2), (4, 2), (5, 6), (9, 6), (10, 18), (15, 50), (10**6, 50)]
)  # fmt: skip
def test_exponential_rate_grows_with_success(succeeded: int, rate: float) -> None:
    """Step by step up to the maximum, however many have succeeded."""
    growing = Exponential(base_per_minute=2, increment_factor=3, succeeded=5)
    assert per_minute(Rate(maximum_per_minute=50, exponential=growing), succeeded) == pytest.approx(rate)
    assert per_minute(Rate(maximum_per_minute=50), succeeded) == 50


@pytest.mark.parametrize("rate", [1, 7, 60, 119, 1000])
@pytest.mark.parametrize("look_s", [0.1, 0.5, 7.0])
def test_constant_rate_is_kept_however_often_one_looks(rate: int, look_s: float) -> None:
    """Over ten minutes; where one looks too seldom for it there are fewer, never more."""
    last, made, looks = 0.0, 0, round(600 / look_s)
    for look in range(1, looks + 1):
        count, last = due(Rate(maximum_per_minute=rate), 0, last, look * look_s)
        made += count
        assert made <= rate / 60 * look * look_s + 1e-3
    if look_s <= LOOK_S:
        assert made == pytest.approx(looks * look_s * rate / 60, abs=1)


def test_what_was_missed_is_not_made_up_for() -> None:
    """After an hour away one job is due, and those of a second."""
    assert due(Rate(maximum_per_minute=6), 0, 0.0, 3600.0) == (1, pytest.approx(3599.0))
    assert due(Rate(maximum_per_minute=600), 0, 0.0, 3600.0) == (11, pytest.approx(3600.0))


# when it is too much


@pytest.mark.parametrize(
    ("counts", "aborted"),
    [
        ({}, False),
        ({"failed": 3}, False),
        ({"failed": 4}, True),
        ({"rejected": 1, "expired": 1, "timed_out": 1, "failed": 1}, True),
        ({"failed": 1, "succeeded": 3}, False),
        ({"failed": 2, "succeeded": 3}, True),
        ({"failed": 3, "canceled": 90}, False),
        ({"failed": 25, "succeeded": 75, "canceled": 9, "open": 50, "waiting": 5}, False),
        ({"failed": 26, "succeeded": 74}, True),
    ],
)
def test_abort_asks_for_a_minimum_and_a_share(counts: dict[str, int], aborted: bool) -> None:
    """At least 4 have ended, and more than a quarter of them failed; what a person canceled counts for nothing."""
    why = why_abort(Abort(minimum_ended=4, threshold=0.25), Counts(**counts))
    assert (why is not None) == aborted
    assert why_abort(None, Counts(**counts)) is None


def test_abort_says_how_many() -> None:
    """The text is what an operator reads first."""
    why = why_abort(Abort(minimum_ended=4, threshold=0.25), Counts(failed=2, rejected=1, succeeded=1))
    assert why == "3 of 4 jobs that ended have failed: more than 25 %"


# in the database, over a clock of the test's own


class Played:
    """Rollouts over a real store, with jobs that are kept and never offered; `now` is the clock."""

    def __init__(self, open_store: Callable[[], CoordinatorStore], nodes: str) -> None:
        self._open, self.now = open_store, 1000.0
        self.store = open_store()
        self.refusing: set[str] = set()
        for node in nodes:
            self.store.set_state(node, NodeState("ready", 1, 1, 0), retained=False)
            self.store.set_info(node, _info())
        self._begin()

    def _begin(self) -> None:
        self.rollouts = Rollouts(self.store, self._submit, self._cancel, lambda: self.now)

    def _submit(self, node: str, plan: RolloutPlan, rollout: str) -> None:
        if node in self.refusing:
            raise Refused(f"no model on {node}")
        order = make_order(plan.job, 0, node=node)
        self.store.add_job(order, make_offer(order).order, rollout=rollout)

    def _cancel(self, job: str) -> None:
        self.store.end(job, "canceled", "canceled", "as the test wants it")

    def restart(self) -> None:
        """As after kill -9: nothing of the memory is left."""
        self.store.close()
        self.store = self._open()
        self._begin()

    def add(self, **plan: Any) -> str:
        asked = RolloutPlan(job=JOB, **plan)
        made = self.rollouts.add(asked, self.rollouts.choose(asked)).rollout
        assert made is not None
        return made.id

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now <= until:
            self.rollouts.tick(self.now)
            self.now += LOOK_S

    def nodes_of(self, rollout: str) -> str:
        """The nodes that have got a job, in the order in which they did."""
        return "".join(view.node for view in self.store.job_page(JobFilter(rollout=rollout), None, 999).items[::-1])

    def end(self, rollout: str, node: str, outcome: Outcome) -> None:
        [view] = self.store.job_page(JobFilter(rollout=rollout, node=node), None, 9).items
        self.store.end(view.id, outcome, None, "as the test wants it")


@pytest.fixture(params=["sqlite", "postgresql"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Played]]:
    server: Database | None = None
    if request.param == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        server = postgres.schema()
    with ExitStack() as ends:

        def make(nodes: str) -> Played:
            played = Played(lambda: CoordinatorStore(tmp_path / "coordinator.sqlite", 3600, server=server), nodes)
            ends.callback(lambda: played.store.close())
            return played

        yield make


def test_jobs_are_made_at_their_rate(play: Callable[[str], Played]) -> None:
    """The first at once, the others a pause apart, faster after successes; the view says when the next one is."""
    played = play("abcdefgh")
    growing = Exponential(base_per_minute=6, increment_factor=2, succeeded=2)
    rollout = played.add(rate=Rate(maximum_per_minute=60, exponential=growing))
    played.run(0)
    assert played.nodes_of(rollout) == "a"
    played.run(9)
    assert played.nodes_of(rollout) == "a"
    played.run(11)
    assert played.nodes_of(rollout) == "abc"
    for node in "ab":
        played.end(rollout, node, "succeeded")
    played.run(9)
    assert played.nodes_of(rollout) == "abcde", "one in 5 s now"
    view = played.rollouts.view(rollout)
    assert (view.counts, view.nodes) == (Counts(waiting=3, open=3, succeeded=2), 8)
    assert view.next is not None
    played.run(60)
    for node in "cdefgh":
        played.end(rollout, node, "succeeded")
    played.run(1)
    view = played.rollouts.view(rollout)
    assert (view.state, view.counts, view.next) == ("completed", Counts(succeeded=8), None)


def test_two_rollouts_at_once(play: Callable[[str], Played]) -> None:
    """Each has its own rate, its own nodes and its own end; a node may be in both, with a job of each."""
    played = play("abcd")
    first = played.add(rate=Rate(maximum_per_minute=60))
    second = played.add(rate=Rate(maximum_per_minute=6), selector=Selector(nodes=("d", "a")))
    played.run(1.5)
    assert (played.nodes_of(first), played.nodes_of(second)) == ("ab", "d")
    played.run(10)
    assert (played.nodes_of(first), played.nodes_of(second)) == ("abcd", "da")
    for node in "abcd":
        played.end(first, node, "succeeded")
    played.run(1)
    assert [played.rollouts.view(rollout).state for rollout in (first, second)] == ["completed", "running"]
    assert played.store.rollout_states() == {"completed": 1, "running": 1}
    assert [view.id for view in played.rollouts.page(None, None, 1).items] == [second]
    assert [view.id for view in played.rollouts.page("completed", None, 9).items] == [first]


def test_rollout_goes_on_where_it_was(play: Callable[[str], Played]) -> None:
    """However often the coordinator is killed, every node gets one job; nodes that came later get none."""
    played = play("abcdefg")
    rollout = played.add(rate=Rate(maximum_per_minute=60))
    played.run(0)
    played.store.set_state("x", NodeState("ready", 1, 1, 0), retained=False)
    played.store.set_info("x", _info())
    for _ in range(9):
        played.restart()
        played.run(0.5)
        made = played.nodes_of(rollout)
        played.run(0.5)
        assert len(played.nodes_of(rollout)) - len(made) <= 1
    assert played.nodes_of(rollout) == "abcdefg"


def test_job_and_mark_are_one_transaction(play: Callable[[str], Played], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mark cannot be set there is no job either, and the node has its turn later."""
    played = play("ab")
    rollout = played.add(rate=Rate(maximum_per_minute=60))
    with monkeypatch.context() as broken:
        broken.setattr("edge_agent.coordinator.store.SET_NODE_JOB", "UPDATE nowhere SET job = :job")
        with pytest.raises((sqlite3.OperationalError, DBAPIError)):
            played.run(0)
    assert played.nodes_of(rollout) == ""
    played.restart()
    played.run(9)
    assert played.nodes_of(rollout) == "ab"


def test_rollout_is_aborted_when_too_many_fail(play: Callable[[str], Played]) -> None:
    """No more jobs are made, those that no trainer has begun are canceled, what runs goes on; the reason is told."""
    played = play("abcdef")
    rollout = played.add(rate=Rate(maximum_per_minute=60), abort=Abort(minimum_ended=2, threshold=0.5))
    played.run(3)
    for node, outcome in (("a", "failed"), ("b", "timed_out")):
        played.end(rollout, node, outcome)  # type: ignore[arg-type]
    [running] = played.store.job_page(JobFilter(rollout=rollout, node="c"), None, 9).items
    told = JobStatus(running.digest, "running")
    played.store.apply_status(running, decode(encode(told, "c", seq=1, attempt=1, boot=1), JobStatus))
    played.run(9)
    view = played.rollouts.view(rollout)
    assert (view.state, view.text) == ("aborted", "2 of 2 jobs that ended have failed: more than 50 %")
    assert view.counts == Counts(failed=1, timed_out=1, open=1, canceled=3)
    nodes = {node.node: node for node in played.rollouts.nodes(rollout, None, 99).items}
    assert (nodes["c"].phase, nodes["c"].outcome) == ("running", None)
    assert (nodes["d"].outcome, nodes["d"].text) == ("canceled", "as the test wants it")
    assert (nodes["f"].job, nodes["f"].outcome, nodes["f"].text) == (None, "canceled", view.text)


@pytest.mark.parametrize("force", [False, True])
def test_rollout_that_is_canceled(force: bool, play: Callable[[str], Played]) -> None:
    """What waits is canceled, what has begun goes on unless that is asked for too, now or later; its state stays."""
    played = play("abc")
    rollout = played.add(rate=Rate(maximum_per_minute=60))
    played.run(1)
    [begun] = played.store.job_page(JobFilter(rollout=rollout, node="a"), None, 9).items
    status = decode(encode(JobStatus(begun.digest, "ready"), "a", seq=1, attempt=1, boot=1), JobStatus)  # interrupted, and to go on
    played.store.apply_status(begun, status)
    view = played.rollouts.cancel(rollout, force)
    assert (view.state, view.counts) == ("canceled", Counts(canceled=3) if force else Counts(canceled=2, open=1))
    played.run(5)
    assert played.nodes_of(rollout) == "ab"
    assert played.rollouts.cancel(rollout, False) == view
    assert played.rollouts.cancel(rollout, True).counts == Counts(canceled=3)


def test_node_that_cannot_have_its_job_any_more(play: Callable[[str], Played]) -> None:
    """It counts as rejected, with the reason, and is not asked again."""
    played = play("abc")
    rollout = played.add(rate=FAST)
    played.refusing = {"b"}
    played.run(2)
    played.refusing = set()
    played.run(2)
    assert played.nodes_of(rollout) == "ac"
    assert played.rollouts.view(rollout).counts == Counts(open=2, rejected=1)
    [_, left, _] = played.rollouts.nodes(rollout, None, 99).items
    assert (left.node, left.job, left.outcome, left.text) == ("b", None, "rejected", "no model on b")


def test_job_that_is_deleted_still_counts(play: Callable[[str], Played]) -> None:
    """The rollout keeps how it ended, and its node gets no other one."""
    played = play("ab")
    rollout = played.add(rate=Rate(maximum_per_minute=6))
    played.run(0)
    [first] = played.store.jobs(9)
    played.end(rollout, "a", "failed")
    played.store.delete_job(first)
    played.run(60)
    assert played.nodes_of(rollout) == "b"
    assert played.rollouts.view(rollout).counts == Counts(failed=1, open=1)
    [deleted, _] = played.rollouts.nodes(rollout, None, 99).items
    assert (deleted.job, deleted.phase, deleted.outcome, deleted.text) == (first.id, None, "failed", "as the test wants it")


def test_rollout_without_nodes_is_refused(play: Callable[[str], Played]) -> None:
    """So is one that names a node which cannot have the job; both errors say why."""
    played = play("ab")
    with pytest.raises(Refused, match=r"^no node can have the job: a: it has no label site; b: it has no label site$"):
        played.add(selector=Selector(labels={"site": "north"}))
    with pytest.raises(Refused, match=r"^not all of the nodes that are named can have the job: x: it has never been seen$"):
        played.add(selector=Selector(nodes=("a", "x")))
    assert played.rollouts.page(None, None, 9).items == []


def test_speed_of_a_node_is_that_of_its_last_jobs(play: Callable[[str], Played]) -> None:
    """The mean of the last three with a model that told one."""
    played = play("ab")
    for node, speed in (("a", 1e6), ("a", 10.0), ("a", None), ("a", 20.0), ("a", 60.0), ("b", 5.0)):
        order = make_order(JOB, 0, node=node)
        played.store.add_job(order, make_offer(order).order)
        view = played.store.job(order.id)
        assert view is not None
        played.store.apply_result(view, decode(encode(JobResult(None, "succeeded", tokens_per_s=speed), node, seq=1, boot=1), JobResult))
    assert played.store.speeds("tiny") == {"a": 30.0, "b": 5.0}
    assert played.store.speeds("other") == {}
    assert played.store.open_counts() == {"a": 5, "b": 1}


# a whole coordinator


class Stage:
    """A broker, a coordinator, and nodes that the test plays: each takes what it is offered, and ends it as it is told to."""

    def __init__(self, ends: ExitStack) -> None:
        assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
        self.directory = Path(tempfile.mkdtemp(prefix="ea-"))
        ends.callback(shutil.rmtree, self.directory)
        self.port, self._processes = free_port(), dict[str, subprocess.Popen[bytes]]()
        self.offered: defaultdict[str, list[str]] = defaultdict(list)
        """Jobs by node."""
        self.outcomes: dict[str, Outcome] = {}
        """Of the jobs of each node; without one they run on."""
        self._said: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
        (self.directory / "mosquitto.conf").write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
        self.config = self.directory / "coordinator.toml"
        self.config.write_text(f'state_directory = "state"\n[broker]\nport = {self.port}\n')
        ends.callback(self._end)
        self._start("broker", [MOSQUITTO, "-c", str(self.directory / "mosquitto.conf")])
        self._nodes = paho.Client(CallbackAPIVersion.VERSION2, "the-nodes")
        self._nodes.max_inflight_messages_set(1000)
        self._nodes.on_message = self._hear
        wait_for("the broker", self._connect)
        self._nodes.subscribe([(f"edge1/{FLEET}/+/down/job/#", 1), (f"edge1/{FLEET}/coordinator/+/state", 1)])
        self._nodes.loop_start()
        ends.callback(self._nodes.loop_stop)
        ends.callback(self._nodes.disconnect)
        self.client = ends.enter_context(Client.local(self.directory / "state"))
        self.start_coordinator()
        self.data = write_domain(self.directory / "data.jsonl", "chain", 3, 1)
        self.job = build_job("tiny", self.data, None, {"budget_bytes": GIB}, [])
        self.files = {self.job.dataset.sha256: self.data}

    def _connect(self) -> bool:
        with suppress(OSError):
            return self._nodes.connect("127.0.0.1", self.port) == 0
        return False

    def _start(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def start_coordinator(self) -> None:
        self._start("coordinator", [sys.executable, "-m", "edge_agent", "coordinator", "--config", str(self.config)])
        wait_for("the coordinator", self._answers, 60)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # httpx leaves a socket open where nobody listens
            return probe.connect_ex(str(self.directory / "state" / "api.sock")) == 0

    def kill_coordinator(self) -> None:
        process = self._processes.pop("coordinator")
        process.send_signal(signal.SIGKILL)
        process.wait(20)

    def _end(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(20)

    def join(self, info: NodeInfo, *nodes: str, outcome: Outcome | None = None) -> None:
        """Have nodes come, and their jobs end with an outcome."""
        for node in nodes:
            if outcome is not None:
                self.outcomes[node] = outcome
            for kind, data in (("info", info), ("state", NodeState("ready", 1, 1, 0))):
                self._nodes.publish(up(FLEET, node, kind), encode(data, node), 1, retain=True)
        wait_for("the nodes", lambda: {*nodes} <= {n.id for n in self.client.nodes() if n.present and n.info})

    def _hear(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        match message.topic.split("/")[2:]:
            case ["coordinator", *_]:  # one is there: what it has not acknowledged is said again
                for said in list(self._said.values()):
                    self._say(said)
            case [node, _, _, job, "offer"]:
                self._take(node, job, bytes(message.payload))
            case [node, _, _, job, "cancel"]:
                self._say([(up(FLEET, node, "job", job, "result"), encode(JobResult(None, "canceled"), node, boot=1, seq=9))])

    def _take(self, node: str, job: str, payload: bytes) -> None:
        if (node, job) not in self._said:
            self.offered[node].append(job)
            digest, outcome = read_order(decode(payload, Offer).data.order.payload).job.digest, self.outcomes.get(node)
            last = JobStatus(digest, "running") if outcome is None else JobResult(digest, outcome, tokens_per_s=float(len(node)))
            said = [("status", encode(JobStatus(digest, "accepted"), node, boot=1, seq=1))]
            said += [("status" if outcome is None else "result", encode(last, node, boot=1, seq=2, attempt=1))]
            self._said[node, job] = [(up(FLEET, node, "job", job, kind), message) for kind, message in said]
        self._say(self._said[node, job])

    def _say(self, said: list[tuple[str, bytes]]) -> None:
        for topic, message in said:
            self._nodes.publish(topic, message, 1)

    def roll_out(self, **plan: Any) -> str:
        made = self.client.roll_out(RolloutPlan(job=self.job, **plan), self.files, dry_run=False).rollout
        assert made is not None
        return made.id

    def ended(self, rollout: str, state: str) -> RolloutView:
        return wait_for(f"the end of {rollout}", lambda: view if (view := self.client.rollout(rollout)).state == state else None, 60)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with ExitStack() as ends:
        yield Stage(ends)


def test_coordinator_is_killed_in_the_middle(stage: Stage) -> None:
    """Three times, at any moment: in the end every node has got exactly one job, in order, and all is counted."""
    nodes = [f"killed-{number:02}" for number in range(20)]
    stage.join(_info(test="killed"), *nodes, outcome="succeeded")
    rollout = stage.roll_out(selector=Selector(labels={"test": "killed"}), rate=Rate(maximum_per_minute=240))
    for many in (3, 8, 14):
        wait_for("some offers", lambda many=many: sum(bool(stage.offered[node]) for node in nodes) >= many)  # type: ignore[misc]
        stage.kill_coordinator()
        stage.start_coordinator()
    view = stage.ended(rollout, "completed")
    assert view.counts == Counts(succeeded=len(nodes))
    assert {node: len(stage.offered[node]) for node in nodes} == dict.fromkeys(nodes, 1)
    jobs = stage.client.jobs(99, JobFilter(rollout=rollout))
    assert [job.node for job in jobs[::-1]] == nodes
    assert {job.rollout for job in jobs} == {rollout}


def test_failing_nodes_abort_a_rollout(stage: Stage) -> None:
    """The others are never offered the job; one that runs goes on, until it is ended by force."""
    failing = [f"fails-{number}" for number in range(3)]
    stage.join(_info(test="fails"), *failing, outcome="failed")
    stage.join(_info(test="fails"), "a-that-runs")
    stage.join(_info(test="fails"), *(f"spared-{number}" for number in range(4)), outcome="succeeded")
    rollout = stage.roll_out(
        selector=Selector(labels={"test": "fails"}), rate=Rate(maximum_per_minute=120), abort=Abort(minimum_ended=2, threshold=0.5)
    )
    view = stage.ended(rollout, "aborted")
    assert re.fullmatch(r"([23]) of \1 jobs that ended have failed: more than 50 %", view.text or "")
    assert len([node for node in stage.offered if node.startswith("spared")]) <= 1
    wait_for("all but what runs", lambda: stage.client.rollout(rollout).counts.open == 1)
    assert stage.client.cancel_rollout(rollout, force=True).state == "aborted"
    wait_for("the end of what ran", lambda: stage.client.rollout(rollout).counts.open == 0)
    [ran] = [node for node in stage.client.rollout_nodes(rollout, 99) if node.node == "a-that-runs"]
    assert ran.outcome == "canceled"
    assert 'edge_agent_rollouts{state="aborted"} 1.0' in stage.client._http.get("http://coordinator/metrics").text


def test_model_that_goes_before_the_turn_of_its_node(stage: Stage) -> None:
    """The node gets no job, and the rollout says why; a dataset that is still to be sent is not removed."""
    stage.join(_info(test="goes"), "goes-0", "goes-1", "goes-2", outcome="succeeded")
    fields = {"selector": Selector(nodes=("goes-2", "goes-0", "goes-1")), "rate": Rate(maximum_per_minute=30)}
    rollout = stage.roll_out(**fields)
    stage.join(_info({"other": FINGERPRINT}), "goes-1")
    with pytest.raises(Answered, match="is that of"):
        stage.client.remove_dataset(stage.job.dataset.sha256)
    assert stage.ended(rollout, "completed").counts == Counts(succeeded=2, rejected=1)
    *_, left = stage.client.rollout_nodes(rollout, 99)
    assert (left.node, left.job, left.text) == ("goes-1", None, "model 'tiny' is not on node goes-1; it has: other")
    with pytest.raises(Answered, match="not all of the nodes that are named can have the job: goes-1: model 'tiny' is not on node goes-1"):
        stage.roll_out(**fields)


def test_commands_of_a_rollout(stage: Stage, cli: Cli) -> None:
    """Tried dry, made, shown, listed, ended; and a job without a node goes to the best one, which is named."""
    stage.join(_info(test="cli", site="north"), "cli-0", "cli-10", outcome="succeeded")
    stage.join(_info(test="cli", site="south"), "cli-2")
    at = ("--config", stage.config)
    job = ("--model", "tiny", "--data", stage.data, "--budget", "1GiB", *at)
    only = ("--label", "test=cli", "--label", "site=north")
    dry = cli("rollout", "submit", *job, *only, "--dry-run")
    assert dry.code == 0, dry.err
    assert [line.split()[:2] for line in dry.out.splitlines() if line.startswith("  cli")] == [
        ["cli-0", "yes"],
        ["cli-10", "yes"],
        ["cli-2", "no"],
    ]
    before = cli("rollout", "list", "--json", *at).json
    made = cli("rollout", "submit", *job, *only, "--per-minute", "600", "--abort-above", "0.5", "--each-seed", "--json").json["rollout"]
    assert (made["plan"]["abort"], made["plan"]["seeds"]) == ({"minimum_ended": 10, "threshold": 0.5}, "each")
    assert [view["id"] for view in cli("rollout", "list", "--json", *at).json] == [made["id"], *(view["id"] for view in before)]
    stage.ended(made["id"], "completed")
    shown = cli("rollout", "show", made["id"], *at)
    assert "2: 2 succeeded" in shown.out
    assert {job["node"] for job in cli("jobs", "--rollout", made["id"], "--json", *at).json} == {"cli-0", "cli-10"}
    placed = cli("submit", *job, *only)
    assert placed.err.startswith("to cli-10: no job there, free memory not told, 6 tokens/s in its last jobs"), placed.err
    assert stage.client.job(placed.out.strip()).node == "cli-10"
    assert {node["id"]: node["info"]["labels"] for node in cli("nodes", "--json", *at).json}["cli-2"] == {"test": "cli", "site": "south"}
    slow = cli("rollout", "submit", *job, "--node", "cli-2", "--node", "cli-0", "--per-minute", "1").out.strip()
    assert cli("rollout", "cancel", slow, *at).out == f"{slow}  canceled\n"
    wait_for("the audit", lambda: f"/v1/rollouts/{slow}" in {row.made for row in stage.client.audit(99)})
    nobody = cli("submit", *job, "--label", "site=nowhere")
    assert (nobody.code, "no node can have the job" in nobody.err) == (14, True)
    for wrong in (("--label", "site"), ("--label", "a=1", "--label", "a=2"), ("--node", "x", "--label", "a=1")):
        assert cli("rollout", "submit", *job, *wrong).code == 2, wrong
