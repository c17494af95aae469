"""Delivers damaged messages to a real agent and a real coordinator: `python benchmarks/fuzz.py --messages 1000000 --seed 1`.

Three receivers, with their own SQLite files and directories: a node that takes orders from anyone (`open`), one that takes signed ones only
(`signed`), and a coordinator. Only the connection below the link is not there: a message enters where paho hands it over, and what is
published is held against the contract. Messages of every topic are damaged as bytes and as JSON, their topics too; orders also inside
their envelopes. `--keep` adds what reached something new to the corpus, tests/corpus, which tests/test_fuzz.py replays.

After every message: no exception, it was acknowledged, it took less than `LONGEST_S`, no log line is longer than `LONGEST_LINE`, and an
audit hook has seen no file written outside of the state directories, no process started, no connection made. After every batch: the
signed node has the jobs that it had before, and none of them was stopped; the open one has only orders for it; the coordinator has not
lost or changed a job that has ended or is another node's; all that is stored can be read; and what a node has on disk belongs to its
jobs. After every round the daemons start again on what is there; at the end this process holds no more memory than after the warm-up.
Exits with 1 where anything of that does not hold.

Does not cover the MQTT packets themselves, which paho and the broker parse, nor the HTTP API. The state is in memory where there is
/dev/shm: a million messages would wear a disk.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import gc
import json
import logging
import platform
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil
from fuzz_messages import RECEIVERS, Damage, Delivery, Receiver, label, seeds
from fuzz_place import Guard, Lines, Place
from page import RESULTS

from edge_agent.asyncapi import channel_of
from profiles.device import device_name

CORPUS = Path(__file__).parent.parent / "tests" / "corpus"
LONGEST_S, STUCK_S = 5.0, 60.0
"""A message that takes longer hangs; what does not even hear the alarm is ended with its traceback."""
LONGEST_LINE = 8192
GROWTH_BYTES = 8 * 2**20
"""More resident memory than after the warm-up is a leak."""
BATCH, ROUND, WARM_UP = 500, 20_000, 0.2
MOST_WRONG, LONGEST_KEPT = 20, 4096


class Kept(msgspec.Struct, frozen=True):
    """A line of the corpus: a delivery to a receiver that has just begun, of what topic it was before damage, and what it leads to."""

    of: str
    outcome: str
    delivery: Delivery


class Memory(msgspec.Struct, frozen=True):
    """Resident, of this process."""

    warm_bytes: int
    end_bytes: int


class Found(msgspec.Struct):
    """What was delivered, what became of it, and what was found wrong."""

    date: str
    machine: str
    versions: dict[str, str]
    seed: int
    messages: int
    seconds: float
    messages_per_s: float
    longest_s: float
    longest_line: int
    memory: Memory
    """After a fifth of the messages, and at the end."""
    outcomes: dict[str, dict[str, int]]
    """By topic of the undamaged message; an event word of the log, with its reason, or what was done without a word."""
    wrong: list[str]


class Hang(Exception):
    """A message takes too long."""


def _hang(*_: object) -> None:
    raise Hang(f"it takes more than {LONGEST_S:.0f} s")


GUARD: list[Guard] = []


@dataclass
class Trial:
    """Delivers, and writes down what is wrong."""

    receivers: Sequence[Receiver] = RECEIVERS
    wrong: list[str] = field(default_factory=list)
    failed: list[Delivery] = field(default_factory=list)
    longest_s: float = 0.0
    _lines: Lines = field(default_factory=Lines)
    _place: Place | None = None

    def __enter__(self) -> Trial:
        if not GUARD:
            GUARD.append(Guard())
        self._guard, logger = GUARD[0], logging.getLogger("edge_agent")
        self._bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        logger.addHandler(self._lines)
        logger.propagate, self._level = False, logger.level
        logger.setLevel(logging.INFO)
        self._alarm = signal.signal(signal.SIGALRM, _hang)
        return self

    def __exit__(self, *_: object) -> None:
        self.end_round()
        logger = logging.getLogger("edge_agent")
        logger.removeHandler(self._lines)
        logger.propagate = True
        logger.setLevel(self._level)
        signal.signal(signal.SIGALRM, self._alarm)
        sys.dont_write_bytecode = self._bytecode
        faulthandler.cancel_dump_traceback_later()

    @property
    def place(self) -> Place:
        if self._place is None:
            memory = Path("/dev/shm")  # noqa: S108
            root = Path(tempfile.mkdtemp(prefix="ea-fuzz-", dir=memory if memory.is_dir() else None)).resolve()
            self._place = Place(root, self.receivers)
            self._guard.root = root
        return self._place

    def deliver(self, delivery: Delivery) -> str:
        """Deliver a message; return what became of it."""
        place, began = self.place, time.perf_counter()
        side, self._lines.longest = place.sides[delivery.to], 0
        side.wire.published.clear()
        self._lines.words.clear()
        acknowledged, changes = side.wire.acknowledged, place.changes()
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        try:
            place.hear(delivery)
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._blame(f"{delivery.to}: {type(error).__name__}: {error}"[:300], delivery)
            self.end_round(examine=False)
            return f"raised:{type(error).__name__}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.longest_s = max(self.longest_s, time.perf_counter() - began)
        if side.wire.acknowledged != acknowledged + 1:
            self._blame(f"{delivery.to}: acknowledged {side.wire.acknowledged - acknowledged} times", delivery)
        if self._lines.longest > LONGEST_LINE:
            self._blame(f"{delivery.to}: a log line of {self._lines.longest:,} characters, {self._lines.words[-1]}", delivery)
        for topic, _ in side.wire.published:
            if not _in_contract(topic):
                self._blame(f"{delivery.to}: published on {topic[:100]!r}", delivery)
        if self._guard.seen:
            self._blame(f"{delivery.to}: {self._guard.seen[0]}", delivery)
            self._guard.seen.clear()
        if self._lines.words:
            return self._lines.words[-1]
        if side.wire.published:
            return ":".join(["answered", *re.findall(r'(?<="reason":")\w+', side.wire.published[0][1].decode("latin-1"))[:1]])
        return "stored" if place.changes() > changes else "nothing"

    def examine(self, last: Iterable[Delivery]) -> None:
        """Let the daemons work, and look at what they have."""
        self._carefully(self.place.settle, last)

    def end_round(self, *, examine: bool = True) -> None:
        """Start the daemons again on what they have, then end them; the next round begins anew."""
        if self._place is not None:
            if examine:
                self._carefully(self.place.restart, ())
            self._guard.root = None
            self._place.close()
            self._place = None

    def _carefully(self, look: Callable[[], list[str]], last: Iterable[Delivery]) -> None:
        try:
            for wrong in look():
                self._blame(wrong, *last)
        except Exception as error:
            self._blame(f"after a batch: {type(error).__name__}: {error}"[:300], *last)
            self.end_round(examine=False)
        if self._guard.seen:
            self._blame(f"after a batch: {self._guard.seen[0]}", *last)
            self._guard.seen.clear()

    def _blame(self, what: str, *deliveries: Delivery) -> None:
        if len(self.wrong) < MOST_WRONG and what not in self.wrong:
            self.wrong.append(what)
            self.failed += deliveries


@lru_cache(10_000)
def _in_contract(topic: str) -> bool:
    try:
        return bool(channel_of(topic))
    except LookupError:
        return False


def corpus() -> list[Kept]:
    """Return what is kept."""
    return [line for file in sorted(CORPUS.glob("*.jsonl")) for line in msgspec.json.Decoder(Kept).decode_lines(file.read_bytes())]


def fuzz(messages: int, seed: int) -> tuple[Found, dict[tuple[str, str], Delivery], list[Delivery]]:
    """Run the trial; return what was found, a short delivery for each outcome of a topic, and those where something is wrong."""
    outcomes: dict[str, Counter[str]] = {}
    firsts: dict[tuple[str, str], Delivery] = {}
    process, damage, began = psutil.Process(), Damage(seeds(), seed), time.monotonic()
    warm_bytes, longest_line, every = 0, 0, min(ROUND, max(BATCH, messages // 5))
    with Trial() as trial:
        for number in range(1, messages + 1):
            whole, delivery = damage()
            name = label(whole)
            outcome = trial.deliver(delivery)
            longest_line = max(longest_line, trial._lines.longest)
            outcomes.setdefault(name, Counter())[outcome] += 1
            known = firsts.get((name, outcome))
            if known is None or len(delivery.payload) + len(delivery.topic) < len(known.payload) + len(known.topic):
                firsts[name, outcome] = delivery
            if number % BATCH == 0:
                faulthandler.dump_traceback_later(STUCK_S, exit=True)
                trial.examine([delivery])
            if number % every == 0:
                trial.end_round()
                gc.collect()
                if warm_bytes == 0 and number >= WARM_UP * messages:
                    warm_bytes = process.memory_info().rss
        trial.end_round()
        gc.collect()
        end_bytes = process.memory_info().rss
        if warm_bytes and end_bytes - warm_bytes > GROWTH_BYTES:
            trial._blame(f"the process has grown by {end_bytes - warm_bytes:,} bytes")
    seconds = time.monotonic() - began
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    packages = {"python": platform.python_version()} | {
        name: version(name) for name in ("edge-agent", "msgspec", "paho-mqtt", "cryptography")
    }
    found = Found(
        today, device_name("cpu"), packages, seed, messages, round(seconds, 1), round(messages / seconds, 1), round(trial.longest_s, 3),
        longest_line, Memory(warm_bytes, end_bytes), {name: dict(sorted(c.items())) for name, c in sorted(outcomes.items())}, trial.wrong,
    )  # fmt: skip
    return found, firsts, trial.failed


def replay(delivery: Delivery) -> tuple[str, list[str]]:
    """Deliver one message to daemons that have just begun; return what became of it, and what is wrong."""
    with Trial((delivery.to,)) as trial:
        outcome = trial.deliver(delivery)
        trial.examine([delivery])
    return outcome, trial.wrong


def keep(damaged: Iterable[tuple[str, Delivery]]) -> None:
    """Write the corpus: all that is valid, and of the damaged what leads a topic, from the start, where nothing else does."""
    kept = [Kept(label(whole), replay(whole)[0], whole) for whole in seeds() if len(whole.payload) <= LONGEST_KEPT]
    known = {(line.of, line.outcome) for line in kept}
    for of, delivery in [*((line.of, line.delivery) for line in corpus()), *damaged]:
        outcome = replay(delivery)[0]
        if len(delivery.payload) <= LONGEST_KEPT and (of, outcome) not in known:
            known.add((of, outcome))
            kept.append(Kept(of, outcome, delivery))
    CORPUS.mkdir(exist_ok=True)
    for to in RECEIVERS:
        lines = [line for line in kept if line.delivery.to == to]
        (CORPUS / f"{to}.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reached something new")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    options: Any = parser.parse_args()
    found, firsts, failed = fuzz(options.messages, options.seed)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    sys.stdout.write(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")
    if options.keep:
        keep([*((of, delivery) for (of, _), delivery in firsts.items()), *(("wrong", delivery) for delivery in failed)])
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
