"""Many nodes in one process: `python benchmarks/many_nodes.py --directory D --first 0 --count 250 --port P`, until SIGTERM.

Each is the agent as `edge-agent run` runs it: its link, its database with its outbox, its files and its jobs, in two threads and a
directory of its own, D/NAME. Three things are simulated. The trainer: a run tells its progress every ten seconds, ends after a time that
is drawn, and leaves an adapter of random bytes. The start of the machine, with `--fresh`: so the link waits as after a power cut. The
look at the model's files, which is the same for all, is made once. A process has at most 1,024 files open, and a node takes 7.

Standard output gets a line of JSON when all nodes begin to connect, {"started": seconds since 1970}, and one for every connection that is
up and every one that has ended: {"node", "at", "up"}.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from edge_agent import agent, jobs, logs, mqtt
from edge_agent.agent import TICK_S, Agent
from edge_agent.config import AgentConfig, Broker, Endpoint, Size, Tls
from edge_agent.job_directory import JobDirectory
from edge_agent.mqtt import Connected, Disconnected
from edge_agent.report import Event
from edge_agent.runner import Trainer, TrainerEnded, TrainerEvent
from edge_agent.serving import serve

MODEL = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
STACK_BYTES = 512 * 1024
PROGRESS_S = 10.0


class Timers:
    """Calls that are due later, in one thread for all nodes."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._number, self._changed = count(), threading.Condition()
        threading.Thread(target=self._serve, name="timers", daemon=True).start()

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._number), call))
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                _, _, call = heapq.heappop(self._due)
            call()


class SimulatedTrainer(Trainer):
    """A run without a process. It ends after a time that is drawn, and has then made an adapter."""

    timers: Timers
    source = random.Random()
    run_s = (2.0, 8.0)
    adapter_bytes = 16 * 1024

    def __init__(
        self, job: str, directory: Path, lock: IO[str], max_run_s: float, threads: int | None, events: SimpleQueue[Any],
        judges: Mapping[str, Endpoint] | None = None, settings: Mapping[str, str] | None = None, ran_s: float = 0.0, cooled_s: float = 0.0,
        gpu: object = None,
    ) -> None:  # fmt: skip
        self.job, self.max_run_s, self.started = job, max_run_s, time.monotonic()
        self.last_event = self.saliency = self.failed = self.stopping_since = self.paused_since = self.rests = self.ended_for = None
        self.finished, self.heard = [], self.started
        self._earlier_s, self._cooled_s, self._cooling_since = ran_s, cooled_s, None
        self._events, self._directory, self._lock, self._gone = events, JobDirectory(directory), lock, threading.Event()
        self._length_s = self.source.uniform(*self.run_s)
        self._say()

    @property
    def pid(self) -> int:
        return 0

    def record(self, path: Path) -> None:
        """There is no process to find again."""

    def rest(self, why: object) -> None:
        """Nothing rests here."""

    def stop(self, why: object = None) -> None:
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self._end(-signal.SIGTERM)

    def kill(self, why: object = None) -> None:
        self._end(-signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        return self._gone.wait(timeout_s)

    def _say(self) -> None:
        if self._gone.is_set():
            return
        done = time.monotonic() - self.started
        if (left := self._length_s - done) <= 0:
            self._directory.adapter.mkdir(exist_ok=True)
            (self._directory.adapter / "adapter_model.safetensors").write_bytes(self.source.randbytes(self.adapter_bytes))
            self._end(0)
            return
        told = Event(time=time.time(), event="progress", stage="train", done=int(done), total=int(self._length_s) + 1, loss=1.0)
        self._events.put(TrainerEvent(self.job, told))
        self.timers.after(min(PROGRESS_S, left), self._say)

    def _end(self, code: int) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._lock.close()
            self._events.put(TrainerEnded(self.job, code))


class Node(Agent):
    """An agent that is one of many, and says when it is connected."""

    def serve(self) -> None:
        """As `Agent.run`, without signals."""
        self._jobs.recover()
        self._link.start()
        try:
            serve(self._events, self._handle, self._tick, self._drop, TICK_S, self._turned)
        finally:
            self._jobs.shut_down()
            self._link.close((self._uplink.topic("state"), self._uplink.message(self._state("offline"))))
            self._store.close()

    def end(self) -> None:
        self._events.put(None)

    def _handle(self, event: object) -> None:
        if isinstance(event, Connected | Disconnected):
            told = {"node": self._config.node, "at": time.time(), "up": isinstance(event, Connected)}
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
        super()._handle(event)


def config(options: Any, node: str) -> AgentConfig:
    """Return the configuration of one node."""
    tls = None
    if options.certificates is not None:
        tls = Tls(*(options.certificates / name for name in ("ca.pem", f"{node}.pem", f"{node}.key")))
    broker = Broker("127.0.0.1", options.port, keepalive_s=options.keepalive_s, tls=tls)
    return AgentConfig(node, options.directory / node, Size(2**30), {"tiny": MODEL}, options.fleet, device="cpu", broker=broker)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fleet", default="default")
    parser.add_argument("--keepalive-s", type=int, default=60)
    parser.add_argument("--certificates", type=Path, help="directory with ca.pem, NODE.pem and NODE.key")
    parser.add_argument("--run-s", type=float, nargs=2, default=(2.0, 8.0))
    parser.add_argument("--adapter-bytes", type=int, default=16 * 1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="as if the machine had just started")
    options = parser.parse_args()
    logs.set_up()
    threading.stack_size(STACK_BYTES)
    SimulatedTrainer.timers, SimulatedTrainer.run_s = Timers(), tuple(options.run_s)
    SimulatedTrainer.adapter_bytes, SimulatedTrainer.source = options.adapter_bytes, random.Random(f"{options.seed} {options.first}")
    jobs.Trainer = SimulatedTrainer  # type: ignore[misc]
    agent._fingerprint = functools.cache(agent._fingerprint)
    if options.fresh:
        began = time.time()
        mqtt.psutil.boot_time = lambda: began
    nodes = [Node(config(options, f"node-{number:05}")) for number in range(options.first, options.first + options.count)]
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threads = [threading.Thread(target=node.serve) for node in nodes]
    sys.stdout.write(json.dumps({"started": time.time()}) + "\n")
    sys.stdout.flush()
    for thread in threads:
        thread.start()
    ended.wait()
    for node in nodes:
        node.end()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
