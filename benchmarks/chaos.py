"""Pulls every plug of a fleet at random and counts what is lost: `python benchmarks/chaos.py --kills 1000 --jobs 200 --seed 1`.

The fleet is that of small_fleet.py. While jobs run, `kill -9` ends one of agent, trainer, coordinator and broker, or the network is cut
for a few seconds; all the while a client repeats messages of every other job, each on its own topic, in any order. Nothing may be lost:
every job has one end and one result, every message of it is in its history, the node has nothing left to say, no trainer runs, and no part
of a file is left. Exits with 1 where anything of that does not hold.

Every two jobs are the same but for their ids, so their adapters must be. 1,000 kills take an hour on two cores, more beside other work.
Does not cover a full disk, power cuts (what the kernel has not written), and other brokers. Needs Mosquitto.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
import psutil
from page import RESULTS
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from small_fleet import AGENT, COORDINATOR, SmallFleet, until

from edge_agent.coordinator.client import Answered
from edge_agent.coordinator.views import JobView
from edge_agent.errors import CoordinatorUnreachable, EdgeAgentError
from edge_agent.training.outcome import versions
from profiles.device import device_name

STRIKES = {"agent": 3, "trainer": 3, "coordinator": 2, "broker": 2, "cut": 2}
"""What is struck, and how often beside the others."""
OPEN_JOBS = 6
REMEMBERED_S, REPEAT_S = 60.0, 0.5
DEFECTS = ("event_failed", "database_set_aside", "storage_error", "link_thread_died", "Traceback")
"""What no log may hold."""
SETTLE_S = 600.0
"""From the last strike to the end of everything, at most."""


class Outcome(msgspec.Struct):
    """What was done, and what was found wrong."""

    date: str
    machine: str
    versions: dict[str, str]
    protocol: str
    """Version of MQTT; auto: 5 where the broker has it."""
    seed: int
    seconds: float
    jobs: int
    strikes: dict[str, int]
    broker_defects: int
    """How often the broker ended by itself."""
    repeated: int
    outcomes: dict[str, int]
    attempts: int
    late: int
    """Messages of the node that came after a newer one and changed nothing."""
    wrong: list[str]


class Repeater:
    """Says again what was said of every other job, on its own topic: what a broker may do, and more.

    A repeat would heal a loss, so of the other jobs it says nothing: what is lost of them stays lost.
    """

    def __init__(self, port: int, rng: random.Random) -> None:
        self.count, self._rng = 0, rng
        self._heard: deque[tuple[float, str, bytes]] = deque(maxlen=2000)
        self._own: Counter[bytes] = Counter()
        self._jobs: dict[str, int] = {}
        self._client = paho.Client(CallbackAPIVersion.VERSION2, "repeater")
        self._client.on_connect = lambda client, *_: client.subscribe("edge1/+/+/+/job/#", 1)
        self._client.on_message = self._message
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def _message(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        if self._own[payload]:
            self._own[payload] -= 1
        elif self._jobs.setdefault(message.topic.split("/")[5], len(self._jobs)) % 2 == 0:
            self._heard.append((time.monotonic(), message.topic, payload))

    def tick(self) -> None:
        """Repeat one message of the last minute."""
        recent = [m for m in list(self._heard) if time.monotonic() - m[0] < REMEMBERED_S]
        if recent and self._client.is_connected():
            _, topic, payload = self._rng.choice(recent)
            self._own[payload] += 1
            self._client.publish(topic, payload, 1)
            self.count += 1

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Chaos:
    """One run: jobs that are handed in, strikes at random, and what is found at the end."""

    def __init__(
        self, jobs: int, kills: int, seed: int, agent: Sequence[str], coordinator: Sequence[str], strikes: Mapping[str, int], protocol: str
    ) -> None:
        """`strikes` says how often each is struck beside the others; `protocol` is the version of MQTT."""
        self._wanted, self._kills, self._kinds, self.seed, self._protocol = jobs, kills, strikes, seed, protocol
        self._rng, self._console = random.Random(seed), Console(stderr=True)
        self.fleet = SmallFleet(agent, coordinator, protocol=protocol)
        self.jobs: list[str] = []
        self.strikes: Counter[str] = Counter()
        self.broker_defects = 0
        self.wrong: list[str] = []

    def run(self, settle_s: float) -> Outcome:
        """Do it all, and return what was found."""
        began = time.monotonic()
        deadline: float | None = None
        views: list[JobView] = []
        repeater: Repeater | None = None
        try:
            self._begin()
            repeater = Repeater(self.fleet.port, self._rng)
            strike_at = repeat_at = time.monotonic()
            while deadline is None or time.monotonic() < deadline:
                now = time.monotonic()
                views = self._views() or views
                ended = sum(view.phase == "ended" for view in views)
                self._hand_in(len(self.jobs) - ended)
                if now >= repeat_at:
                    repeater.tick()
                    repeat_at = now + REPEAT_S
                if (struck := sum(self.strikes.values())) < self._kills:
                    # No faster than jobs end, so that there are as many strikes on the last as on the first.
                    if now >= strike_at and struck * self._wanted <= self._kills * (ended + OPEN_JOBS):
                        self._strike(ended)
                        strike_at = now + self._rng.expovariate(1 / 2.0)
                else:  # whatever has been handed in by now: what does not end is to be found, not waited for
                    deadline = deadline or now + settle_s
                    if len(self.jobs) >= self._wanted and ended == len(self.jobs) and not self.fleet.outbox():
                        break
                if not self.fleet.alive("broker"):  # a defect of its own
                    self.broker_defects += 1
                    self.fleet.start("broker")
                self.fleet.trainers()
                time.sleep(0.1)
            self._examine(repeater.count)
        finally:
            if repeater is not None:
                repeater.close()
            self.fleet.close()
        return self._outcome(time.monotonic() - began, repeater.count)

    def _begin(self) -> None:
        """Run the first job without a disturbance."""
        self.jobs.append(self.fleet.submit(len(self.jobs) // 2))
        until("the first job", lambda: self.fleet.client.job(self.jobs[0]).phase == "ended", 120)

    def _views(self) -> list[JobView]:
        with suppress(CoordinatorUnreachable, Answered):
            return [view for view in self.fleet.client.jobs(10_000) if view.id in set(self.jobs)]
        return []

    def _hand_in(self, unfinished: int) -> None:
        if unfinished < OPEN_JOBS and (len(self.jobs) < self._wanted or sum(self.strikes.values()) < self._kills):
            with suppress(CoordinatorUnreachable, Answered):
                self.jobs.append(self.fleet.submit(len(self.jobs) // 2))

    def _strike(self, ended: int) -> None:
        """Pull one plug, and put it back in after a while."""
        what = self._rng.choices(list(self._kinds), list(self._kinds.values()))[0]
        trainers = self.fleet.trainers()
        if what == "trainer":
            if not trainers:
                return
            with suppress(psutil.Error):
                self._rng.choice(trainers).kill()
        elif what == "cut":
            self.fleet.cable.cut(self._rng.uniform(0.1, 4.0))
        else:
            if what != "broker" and not self.fleet.alive(what):
                self.wrong.append(f"the {what} had ended by itself")
            self.fleet.kill(what)
            time.sleep(self._rng.choice([0.0, self._rng.uniform(0.0, 3.0)]))
            self.fleet.start(what)
        self.strikes[what] += 1
        if (count := sum(self.strikes.values())) % 50 == 0:
            self._console.print(f"{count} strikes, {ended} of {len(self.jobs)} jobs ended")

    def _examine(self, repeated: int) -> None:
        """Write down everything that is not as it should be."""
        fleet, wrong = self.fleet, self.wrong
        wrong += [f"the {name} ended by itself" for name in ("coordinator", "agent") if not fleet.alive(name)]
        adapters: dict[int, set[str]] = {}
        for number, job in enumerate(self.jobs):
            adapters.setdefault(number // 2, set()).add(self._examine_job(job))
        wrong += [f"jobs {2 * pair} and {2 * pair + 1} have different adapters" for pair, found in adapters.items() if len(found) > 1]
        if waiting := fleet.outbox():
            wrong.append(f"{waiting} messages were never acknowledged")
        if fleet.trainers():
            wrong.append("a trainer runs although all jobs have ended")
        if fleet.most_trainers > 1:
            wrong.append(f"{fleet.most_trainers} trainers ran at once")
        left = [str(f) for side in ("node", "coordinator") for f in (fleet.directory / side).rglob("*") if f.suffix in (".part", ".map")]
        wrong += [f"{file} is left" for file in left]
        wrong += [f"the {name} says {word}" for name in ("agent", "coordinator") for word in DEFECTS if word in fleet.log(name)]
        if not repeated:
            wrong.append("no message was repeated")

    def _examine_job(self, job: str) -> str:
        """Fetch what a job has made; returns the sha256 of its adapter."""
        try:
            view = self.fleet.client.job(job)
            history = self.fleet.client.history(job)
            if view.outcome == "succeeded":
                self.fleet.client.fetch(job, self.fleet.directory / "fetched" / job)
        except EdgeAgentError as error:  # those of the client included
            self.wrong.append(f"job {job}: {error}")
            return "none"
        if view.phase != "ended" or view.outcome != "succeeded":
            self.wrong.append(f"job {job} is {view.phase} {view.outcome} {view.reason} {view.text}")
            return "none"
        if (ends := sum(row.phase == "ended" and not row.late for row in history)) != 1:
            self.wrong.append(f"job {job} has {ends} ends")
        numbers = {row.seq for row in history if row.seq is not None}
        if missing := set(range(1, max(numbers) + 1)) - numbers:
            self.wrong.append(f"messages {sorted(missing)} of job {job} never came")
        return next(a.sha256 for a in view.artifacts if a.name == "adapter_model.safetensors")

    def _outcome(self, seconds: float, repeated: int) -> Outcome:
        with closing(sqlite3.connect(f"file:{self.fleet.directory}/coordinator/coordinator.sqlite?mode=ro", uri=True)) as db:
            outcomes = dict(db.execute("SELECT coalesce(outcome, phase), count(*) FROM jobs GROUP BY 1").fetchall())
            attempts, late = (
                int(db.execute(q).fetchone()[0] or 0) for q in ("SELECT sum(attempt) FROM jobs", "SELECT sum(late) FROM history")
            )
        today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
        return Outcome(
            today, device_name("cpu"), versions(), self._protocol, self.seed, round(seconds, 1), len(self.jobs), dict(self.strikes),
            self.broker_defects, repeated, outcomes, attempts, late, self.wrong,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="strikes in all")
    parser.add_argument("--jobs", type=int, default=20, help="at least; more are handed in while there are strikes left")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strike", nargs="+", choices=tuple(STRIKES), default=list(STRIKES), help="what is struck")
    parser.add_argument("--protocol", choices=("auto", "5", "3.1.1"), default="auto", help="version of MQTT")
    parser.add_argument("--settle-s", type=float, default=SETTLE_S, help="from the last strike to the end of all jobs, at most")
    parser.add_argument("--agent", nargs="+", default=AGENT, help="another agent, to try this program itself")
    parser.add_argument("--coordinator", nargs="+", default=COORDINATOR, help="likewise")
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    parser.add_argument("--keep", action="store_true", help="keep the state and the logs, and say where they are")
    options: Any = parser.parse_args()
    strikes = {what: STRIKES[what] for what in options.strike}
    chaos = Chaos(options.jobs, options.kills, options.seed, options.agent, options.coordinator, strikes, options.protocol)
    outcome = chaos.run(options.settle_s)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    sys.stdout.write(json.dumps(msgspec.to_builtins(outcome), indent=2) + "\n")
    if options.keep or outcome.wrong:
        sys.stderr.write(f"state and logs: {chaos.fleet.directory}\n")
    else:
        shutil.rmtree(chaos.fleet.directory)
    sys.exit(bool(outcome.wrong))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
