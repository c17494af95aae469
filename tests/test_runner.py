"""The daemon's side of a trainer: every way in which it can end is read for what it is, and its device is taken while it lives."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import msgspec
import pytest
from orders import make_order

from edge_agent.config import AgentConfig, RestLimits, Size, Timers
from edge_agent.delivery import Uplink
from edge_agent.files import lock_file
from edge_agent.job import Dataset, Job
from edge_agent.jobs import RUN_GRACE_S, Jobs
from edge_agent.messages import JobResult, JobStatus, decode
from edge_agent.rest import LOOK_S, Rest
from edge_agent.runner import Ending, Trainer, TrainerEnded, TrainerEvent, end_orphan
from edge_agent.store import JobRow, Store
from profiles.device import device_profile
from tests.test_supervised import gone, start

DEADLINE_S = 60.0
WHOLE = "what it wrote is in trainer.log of the job on its node"


PROGRAM = """
import os, signal, sys, time
here = os.path.join(sys.argv[2], "program.py")
exec(compile(open(here).read(), here, "exec"))
"""
LIBRARY = """
def say(line): os.write(1, line.encode() + b"\\n")
def failed(code): say('{"time": 1, "event": "failed", "code": "%s", "text": "what it says"}' % code)
def await_stop():
    while os.read(0, 4096): pass
def cry(line): os.write(2, line.encode() + b"\\n")
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A place where `python -m edge_agent train DIR --supervised` runs the small program in DIR."""
    (tmp_path / "edge_agent").mkdir()
    (tmp_path / "edge_agent" / "__init__.py").write_text("")
    (tmp_path / "edge_agent" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    yield bench
    for trainer in bench.trainers:
        trainer.stop()
        trainer.kill()
        assert trainer.wait(DEADLINE_S)


class Bench:
    """Starts trainers and hears what they say, as the daemon does."""

    def __init__(self, place: Path) -> None:
        self.place, self.events, self.trainers = place, SimpleQueue[Any](), list[Trainer]()

    def start(self, program: str, threads: int | None = None, cooled_s: float = 0.0) -> Trainer:
        (self.place / "job" / "program.py").write_text(LIBRARY + program)
        lock = lock_file(self.place / "trainer.lock")
        assert lock is not None
        self.trainers.append(Trainer("j", self.place / "job", lock, 3600.0, threads, self.events, cooled_s=cooled_s))
        assert lock.closed
        return self.trainers[-1]

    def hear(self, trainer: Trainer) -> TrainerEnded | TrainerEvent:
        event = self.events.get(timeout=DEADLINE_S)
        if isinstance(event, TrainerEvent):
            trainer.hear(event.event)
        assert isinstance(event, TrainerEnded | TrainerEvent)
        assert event.job == "j"
        return event

    def end(self, trainer: Trainer) -> tuple[int, Ending]:
        """Hear everything until the end; return the exit status and how the daemon reads it."""
        while not isinstance(event := self.hear(trainer), TrainerEnded):
            pass
        return event.code, trainer.ending(event.code)


@pytest.mark.parametrize(
    ("program", "code", "ending"),
    [
        ("", 0, Ending("succeeded")),
        ("failed('oom_device'); sys.exit(0)", 0, Ending("succeeded")),
        ("failed('oom_device'); sys.exit(7)", 7, Ending("failed", "oom_device", "what it says")),
        ("failed('timeout_run'); sys.exit(10)", 10, Ending("timed_out", "timeout_run", "what it says")),
        ("failed('state'); sys.exit(1)", 1, Ending("failed", "internal", "what it says")),
        ("cry('first'); cry('the last word'); sys.exit(3)", 3,
         Ending(None, "crash_loop", f"the trainer ended with exit code 3; {WHOLE}", again=True)),
        ("sys.exit(12)", 12, Ending(None, "crash_loop", f"the trainer ended with exit code 12; {WHOLE}", again=True)),
        ("cry('x'); os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV,
         Ending(None, "crash_loop", f"the trainer ended by signal SIGSEGV; {WHOLE}", again=True)),
        ("failed('oom_device'); os.kill(os.getpid(), signal.SIGABRT)", -signal.SIGABRT,
         Ending(None, "crash_loop", f"the trainer ended by signal SIGABRT; {WHOLE}", again=True)),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL,
         Ending(None, "crash_loop", f"the trainer ended by signal SIGKILL; {WHOLE}", again=True)),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 6)", -signal.SIGRTMIN - 6,
         Ending(None, "crash_loop", f"the trainer ended by signal 40; {WHOLE}", again=True)),
    ],
)  # fmt: skip
def test_ending_that_nobody_asked_for(program: str, code: int, ending: Ending, bench: Bench) -> None:
    """Success, a failure that was told, and a crash are told apart by exit status and events; only a crash asks for another start."""
    assert bench.end(bench.start(program)) == (code, ending)


def test_ending_of_a_program_that_is_not_there(bench: Bench) -> None:
    """A trainer that cannot even begin is a crash; what Python says of it is in its log."""
    trainer = bench.start("import no_such_module")
    code, ending = bench.end(trainer)
    assert code == 1
    assert (ending.reason, ending.again) == ("crash_loop", True)
    assert ending.text == f"the trainer ended with exit code 1; {WHOLE}"
    assert (bench.place / "job" / "trainer.log").read_text().endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


def test_last_words_stay_on_the_node(bench: Bench) -> None:
    """They may quote a dataset: they are in the log of the trainer, which is its owner's alone, those of the last start."""
    log = bench.place / "job" / "trainer.log"
    log.write_text("of the start before")
    log.chmod(0o644)
    _, ending = bench.end(bench.start("cry(\"KeyError: 'Jane Doe, born 1971'\"); sys.exit(1)"))
    assert "Jane" not in str(ending)
    assert log.read_text() == "KeyError: 'Jane Doe, born 1971'\n"
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("program", "code", "ending"),
    [
        ("await_stop(); sys.exit(12)", 12, Ending(None, again=True)),
        ("await_stop(); os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, Ending(None, again=True)),
        ("await_stop(); sys.exit(0)", 0, Ending("succeeded")),
        ("await_stop(); failed('non_finite_loss'); sys.exit(9)", 9, Ending("failed", "non_finite_loss", "what it says")),
    ],
)
def test_ending_after_the_order_to_stop(program: str, code: int, ending: Ending, bench: Bench) -> None:
    """A trainer that ends because it was told to goes on later and is no crash; what it had finished or failed before counts."""
    trainer = bench.start(program)
    trainer.stop()
    trainer.stop()
    assert bench.end(trainer) == (code, ending)


def test_ending_of_a_trainer_that_was_killed(bench: Bench) -> None:
    """After the order to stop it goes on later; killed for a reason, that reason is its end, the first of several."""
    trainer = bench.start('say(\'{"time": 1, "event": "progress"}\'); time.sleep(60)')
    assert isinstance(bench.hear(trainer), TrainerEvent)
    trainer.stop()
    assert not trainer.wait(0.01)
    trainer.kill()
    assert bench.end(trainer) == (-signal.SIGKILL, Ending(None, again=True))
    stalled, late = Ending("timed_out", "timeout_stall", "no sign"), Ending("timed_out", "timeout_run", "too long")
    trainer = bench.start("time.sleep(60)")
    trainer.kill(stalled)
    trainer.kill(late)
    assert bench.end(trainer) == (-signal.SIGKILL, stalled)


def test_waiting_for_memory_is_a_phase_of_the_job(bench: Bench) -> None:
    """`paused` and `running` are told as they change, once each; a trainer that ends while it waits ends its job as any other does."""
    with closing(Store(bench.place / "agent.sqlite", "f", "n")) as store:
        config, uplink = AgentConfig("n", bench.place, Size(2**30), {}), cast("Uplink", None)
        jobs = Jobs(config, device_profile("cpu"), store, uplink, bench.events, Rest(config.rest, lambda: None))
        store.accept("j", "d" * 64, b"{}", 4)
        for phase in ("staging", "ready"):
            store.move("j", phase)
        store.move("j", "running", start=True)
        says = ["progress", "paused", "paused", "continued", "progress", "paused"]
        jobs.trainer = bench.start("".join(f'say(\'{{"time": 1, "event": "{word}"}}\')\n' for word in says) + "sys.exit(12)")
        while not isinstance(event := bench.events.get(timeout=DEADLINE_S), TrainerEnded):
            jobs.hear(event)
        told = [decode(store.message(m).payload, JobStatus).data.phase for m in store.waiting()]  # type: ignore[union-attr]
        assert told == ["accepted", "staging", "ready", "running", "paused", "running", "paused"]
        jobs.trainer_ended(event)
        assert jobs.trainer is None
        row = store.job("j")
        assert row is not None
        assert (row.phase, row.crashes, row.attempt) == ("ready", 1, 1)


def _jobs(bench: Bench, store: Store, limits: RestLimits, temperature: list[float], timers: Timers | None = None) -> Jobs:
    """The jobs of a node with one that runs, on Monday at noon, with the temperature in a list."""
    config, uplink = AgentConfig("n", bench.place, Size(2**30), {}, timers=timers or Timers()), cast("Uplink", None)
    rest = Rest(limits, lambda: temperature[0], lambda: datetime(2026, 3, 2, 12), count(step=LOOK_S).__next__)
    jobs = Jobs(config, device_profile("cpu"), store, uplink, bench.events, rest)
    store.accept("j", "d" * 64, b"{}", 4)
    for phase in ("staging", "ready"):
        store.move("j", phase)
    store.move("j", "running", start=True)
    return jobs


def _row(store: Store) -> JobRow:
    row = store.job("j")
    assert row is not None
    return row


def _told(store: Store, kind: Any = JobStatus) -> Any:
    return decode(store.message(store.waiting()[-1]).payload, kind).data  # type: ignore[union-attr]


def test_trainer_stops_in_quiet_hours(bench: Bench) -> None:
    """Its job is told as `ready` with the reason, its start is no crash, and nothing starts before they are over."""
    with closing(Store(bench.place / "agent.sqlite", "f", "n")) as store:
        jobs = _jobs(bench, store, RestLimits(quiet_hours=("mon 08:00-18:00",)), [20.0])
        jobs.trainer = bench.start("await_stop(); sys.exit(12)")
        jobs.tick()
        jobs.trainer_ended(bench.events.get(timeout=DEADLINE_S))
        told = _told(store)
        assert (told.phase, told.outcome, told.reason) == ("ready", None, "quiet_hours")
        row = _row(store)
        assert (row.phase, row.crashes) == ("ready", 0)
        jobs.tick()
        assert (jobs.trainer, store.job("j")) == (None, row)


RESTING = """
while order := os.read(0, 99):
    if order == b"rest\\n":
        say('{"time": 1, "event": "paused", "stage": "score", "code": "thermal"}')
    elif order == b"work\\n":
        say('{"time": 1, "event": "continued"}')
sys.exit(12)
"""


def test_trainer_waits_in_place_while_the_device_is_hot(bench: Bench) -> None:
    """It is asked once, its job is `paused` as `thermal`, and goes on in the same process when the device has cooled."""
    temperature = [90.0]
    with closing(Store(bench.place / "agent.sqlite", "f", "n")) as store:
        jobs = _jobs(bench, store, RestLimits(max_temperature_c=80), temperature)
        jobs.trainer = trainer = bench.start(RESTING)
        for _ in range(3):
            jobs.tick()
        jobs.hear(bench.events.get(timeout=DEADLINE_S))
        told = _told(store)
        assert (told.phase, told.reason, told.text[:23]) == ("paused", "thermal", "the device is at 90 °C,")
        time.sleep(0.2)
        temperature[0] = 60.0
        jobs.tick()
        jobs.hear(bench.events.get(timeout=DEADLINE_S))
        told = _told(store)
        assert (told.phase, told.reason) == ("running", None)
        assert bench.events.empty()
        assert (jobs.trainer, trainer.stopping_since) == (trainer, None)
        assert trainer.cooled_s >= 0.2
        cooled_s = trainer.cooled_s
        jobs.shut_down()
        row = _row(store)
        assert (row.phase, row.crashes, row.cooled_s) == ("ready", 0, cooled_s)
        assert 0 < row.ran_s < time.monotonic() - trainer.heard + 60


def test_device_that_never_cools_ends_the_job(bench: Bench) -> None:
    """After `cooling_s`, which earlier starts have begun, it writes its checkpoint and the job has failed as `thermal`."""
    with closing(Store(bench.place / "agent.sqlite", "f", "n")) as store:
        jobs = _jobs(bench, store, RestLimits(max_temperature_c=80), [90.0], Timers(cooling_s=1000.0))
        jobs.trainer = bench.start(RESTING, cooled_s=999.8)
        jobs.tick()
        jobs.hear(bench.events.get(timeout=DEADLINE_S))
        jobs.tick()
        assert jobs.trainer.stopping_since is None
        time.sleep(0.3)
        jobs.tick()
        jobs.trainer_ended(bench.events.get(timeout=DEADLINE_S))
        told = _told(store, JobResult)
        assert (told.outcome, told.reason) == ("failed", "thermal")
        assert "more than 1,000 s" in told.text


@pytest.mark.parametrize("mended", [True, False])
def test_what_a_job_made_is_kept_sooner_or_later(bench: Bench, mended: bool) -> None:
    """While the disk takes nothing the job is `finalizing`, tried again and again; after `finalizing_s` it has failed, and all is there."""
    now = [0.0]
    with closing(Store(bench.place / "agent.sqlite", "f", "n", lambda: now[0])) as store:
        jobs = _jobs(bench, store, RestLimits(), [20.0], Timers(finalizing_s=1000.0))
        store.move("j", "finalizing")
        adapter = bench.place / "jobs" / "j" / "adapter"
        adapter.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (adapter / name).write_text(name)
        (bench.place / "files").rename(bench.place / "away")
        for now[0] in (0.0, 500.0, 1000.0):
            with pytest.raises(FileNotFoundError):
                jobs.tick()
            assert _row(store).phase == "finalizing"
        now[0] = 1001.0
        if mended:
            (bench.place / "away").rename(bench.place / "files")
        with nullcontext() if mended else suppress(FileNotFoundError):  # what it would delete there is not there either
            jobs.tick()
        told = _told(store, JobResult)
        assert (told.outcome, told.reason, len(told.artifacts)) == (("succeeded", None, 2) if mended else ("failed", "internal", 0))
        assert mended or "could not be kept for 1,000 s" in told.text
        assert len(list(adapter.iterdir())) == 2


def test_time_of_earlier_starts_counts(bench: Bench) -> None:
    """A restart of the agent takes up how long the job has run: the next trainer is told, and its own limit is what is left."""
    order = msgspec.json.encode(make_order(Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**30, max_run_s=7.0), 9))
    program = 'say(\'{"time": 1, "event": "progress", "text": "%s"}\' % os.environ[\'EDGE_AGENT_RAN_S\']); await_stop()'
    (bench.place / "jobs" / "j").mkdir(parents=True)
    (bench.place / "jobs" / "j" / "program.py").write_text(LIBRARY + program)
    ran_s = 0.0
    with closing(Store(bench.place / "agent.sqlite", "f", "n")) as store:
        store.accept("j", "d" * 64, order, 4)
        for phase in ("staging", "ready"):
            store.move("j", phase)
        for attempt in (1, 2, 3):
            config, uplink = AgentConfig("n", bench.place, Size(2**30), {}), cast("Uplink", None)
            jobs = Jobs(config, device_profile("cpu"), store, uplink, bench.events, Rest(config.rest, lambda: None))
            jobs.tick()
            assert jobs.trainer is not None
            event = bench.events.get(timeout=DEADLINE_S)
            assert float(event.event.text) == ran_s
            time.sleep(0.1)
            jobs.shut_down()
            row = _row(store)
            assert (row.attempt, row.ran_s >= ran_s + 0.1) == (attempt, True)
            ran_s = row.ran_s
            assert isinstance(bench.events.get(timeout=DEADLINE_S), TrainerEnded)
        store.spend_time("j", 7.0 + RUN_GRACE_S, 0.0)
        jobs.trainer = None
        jobs.tick()
        jobs.tick()
        while not isinstance(event := bench.events.get(timeout=DEADLINE_S), TrainerEnded):
            pass
        jobs.trainer_ended(event)
        told = _told(store, JobResult)
        assert (told.outcome, told.reason) == ("timed_out", "timeout_run")


def test_events_are_kept(bench: Bench) -> None:
    """The last place, the stages that have ended and the failure are known; noise and a line that was cut off are no events."""
    program = """
say('{"time": 1, "event": "stage_started", "stage": "train"}')
say('no json')
say('{"time": 1, "event": "unheard of"}')
say('{"time": 1, "event": "progress", "stage": "train", "done": 3}')
os.write(1, b'\\xff\\xfe\\n')
say('{"time": 1, "event": "stage_finished", "stage": "train", "seconds": 2.5, "memory_bytes": 7}')
os.write(1, b'{"time": 1, "event": "prog')
"""
    trainer = bench.start(program)
    assert bench.end(trainer) == (0, Ending("succeeded"))
    assert trainer.last_event is not None
    assert (trainer.last_event.event, trainer.last_event.done) == ("progress", 3)
    assert [(s.stage, s.seconds, s.peak_bytes) for s in trainer.finished] == [("train", 2.5, 7)]
    assert trainer.failed is None


def test_trainer_is_cut_off_from_the_daemon(bench: Bench) -> None:
    """It has a session of its own, so a signal to the daemon's group does not reach it, looks nothing up in the network, and uses the
    threads that it was given."""
    program = "import json; cry(json.dumps([os.getsid(0), os.environ['HF_HUB_OFFLINE'], os.environ.get('OMP_NUM_THREADS')])); sys.exit(3)"
    for threads, wanted in ((3, "3"), (None, os.environ.get("OMP_NUM_THREADS"))):
        trainer = bench.start(program, threads)
        assert bench.end(trainer)[0] == 3
        assert json.loads((bench.place / "job" / "trainer.log").read_text()) == [trainer.pid, "1", wanted]


def test_device_is_taken_for_as_long_as_the_trainer_lives(bench: Bench) -> None:
    """The daemon gives its lock away with the start: the trainer alone holds it, and its end frees it."""
    trainer = bench.start("await_stop()")
    assert lock_file(bench.place / "trainer.lock") is None
    trainer.stop()
    assert bench.end(trainer)[0] == 0
    lock = lock_file(bench.place / "trainer.lock")
    assert lock is not None
    lock.close()


def test_orphan_is_known_by_its_start(bench: Bench) -> None:
    """The recorded process is killed; another one that has got the same id since is not, and one that is gone is no error."""
    trainer, record = bench.start("time.sleep(60)"), bench.place / "trainer.pid"
    assert end_orphan(record) is None
    trainer.record(record)
    pid, ticks = map(int, record.read_text().split())
    assert pid == trainer.pid
    for wrong in (f"{pid} {ticks - 1}", f"{pid} {ticks + 1}", f"{pid}", "", "x y", f"-1 {ticks}"):
        record.write_text(wrong)
        assert end_orphan(record) is None
    assert not trainer.wait(0.05)
    trainer.record(record)
    assert record.stat().st_mode & 0o777 == 0o600
    assert end_orphan(record) == pid
    assert bench.end(trainer)[0] == -signal.SIGKILL
    assert end_orphan(record) is None


# the lock

HOLDER = """
import subprocess, sys
from pathlib import Path
from edge_agent.files import lock_file
lock = lock_file(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_lock_excludes_and_is_given_back(tmp_path: Path) -> None:
    """Nobody else gets it while it is held, in this process or another; closing the handle frees it."""
    path = tmp_path / "lock"
    lock = lock_file(path)
    assert lock is not None
    assert lock_file(path) is None
    lock.close()
    lock = lock_file(path)
    assert lock is not None
    lock.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_lock_lives_as_long_as_the_child_that_inherited_it(number: int | None, tmp_path: Path) -> None:
    """The end of the process that took the lock does not free it while the child it was handed to lives; the child's end does."""
    path = tmp_path / "lock"
    with start([sys.executable, "-c", HOLDER, str(path)]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert lock_file(path) is None
            if number is not None:
                process.send_signal(number)
            process.stdin.close()
            process.wait(DEADLINE_S)
            assert not gone(child)
            assert lock_file(path) is None
        finally:
            os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while (lock := lock_file(path)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.close()
