"""The daemon: startup, serve, shutdown. One thread decides everything; the link, the trainer and signals only put events on its queue.

Imports no torch: the trainer is a process of its own (edge_agent/runner.py), and what must not be lost is in the store.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from edge_agent import logs
from edge_agent.admission import Rejected, open_envelope
from edge_agent.alive import Signs
from edge_agent.config import AGENT_CONFIG, AgentConfig, read_config
from edge_agent.delivery import Outbox, Uplink
from edge_agent.errors import ConfigInvalid, EdgeAgentError, MessageInvalid
from edge_agent.files import lock_state
from edge_agent.forecast import forecast
from edge_agent.home_assistant import discovery, discovery_topic
from edge_agent.https import Carried, Fetched
from edge_agent.jobs import Jobs
from edge_agent.messages import (
    ANSWER_S,
    HEARTBEAT_BUSY_S,
    HEARTBEAT_IDLE_S,
    HEARTBEAT_JITTER,
    A,
    Ack,
    Cancel,
    CoordinatorState,
    Drain,
    Envelope,
    FileRequest,
    Forget,
    Heartbeat,
    Hello,
    JobProgress,
    NodeInfo,
    NodeLimits,
    NodeState,
    Options,
    PlanAnswer,
    PlanRequest,
    Report,
    Resume,
    Watch,
    decode,
    encode,
    is_ulid,
    new_id,
)
from edge_agent.models import changed_ns, check_places, offered
from edge_agent.mqtt import Birth, Connected, Disconnected, Link, Received
from edge_agent.rest import Rest
from edge_agent.runner import TrainerEnded, TrainerEvent, known_reason
from edge_agent.serving import END, serve
from edge_agent.store import Store
from edge_agent.tls import client_context
from edge_agent.topics import COORDINATOR, block_number, node_subscriptions, split, up
from edge_agent.watchdog import Heart
from profiles.device import device_name, gpu_uuid, take_device
from profiles.sensors import Sensors
from quantization.model_files import find_model

log = logging.getLogger(__name__)

TICK_S = 1.0
HELLO_S, LONGEST_HELLO_S = 300.0, 120.0
"""Between two hellos that are answered, and at most between two that are not."""
HELLO_SPREAD = 0.5
"""By up to such a part of its pause the next hello is late: nodes that wait for one coordinator do not ask it all at once."""
NEWS_S = 5.0
"""Within so long nodes greet a coordinator that is new."""
CLOCKS_DIFFER_S = 60.0
PROGRESS_S, WATCHED_PROGRESS_S = 10.0, 0.5
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class Agent:
    """One node: its link, its jobs, and what it tells of itself."""

    def __init__(self, config: AgentConfig) -> None:
        """Open the state. Raises an EdgeAgentError where an agent with this configuration can never work."""
        self._config, self._heart = config, Heart()
        check_files(config)
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._lock = lock_state(config.state_directory)
        self._signs = Signs(config.state_directory)
        self._store = Store(config.state_directory / "agent.sqlite", config.fleet, config.node)
        self._device = take_device(config.device)
        self._sensors = Sensors(self._device, int(config.budget), config.state_directory)
        self._link = Link(config.broker, config.node, node_subscriptions(config.fleet, config.node), self._events, self._birth)
        self._uplink = Uplink(self._link, config.fleet, config.node, self._store)
        self._outbox = Outbox(self._store, self._link)
        rest = Rest(config.rest, self._sensors.device.temperature_c)
        self._jobs = Jobs(config, self._device, self._store, self._uplink, self._events, rest)
        self._connections = 0
        self._hellos: dict[str, float] = {}
        self._hello_pause_s = ANSWER_S
        self._behind_s = 0.0
        self._heartbeat_at = self._hello_at = self._progress_at = self._watched_until = 0.0
        self._told: object = None
        self._models_ns: int | None = None

    def run(self) -> None:
        """Start up, serve until SIGTERM or SIGINT, shut down."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put(END))
        self._jobs.recover()
        self._link.start()
        for name, path in self._config.models.items():
            if not os.access(path / "config.json", os.R_OK):
                log.warning("model_not_there name=%s path=%s", name, path)
        log.info(
            "agent_started node=%s boot=%d device=%s gpu=%s pid=%d", self._config.node, self._store.boot, self._device.torch_device,
            gpu_uuid(self._device), os.getpid(),
        )  # fmt: skip
        self._heart.ready()
        try:
            serve(self._events, self._handle, self._tick, self._drop, TICK_S, self._turned)
        finally:
            self._heart.stopping(2 * self._config.timers.stop_s)
            self._jobs.shut_down()
            self._link.close((self._uplink.topic("state"), self._uplink.message(self._state("offline"))))
            self._store.close()
            self._signs.take_away()
            log.info("agent_stopped node=%s", self._config.node)

    def _turned(self) -> None:
        trainer = self._jobs.trainer
        self._heart.beat(self._link, f"job {trainer.job}" if trainer else "no job")
        if self._heart.is_well:
            self._signs.leave(self._link.connected)

    def _drop(self, event: object) -> None:
        if isinstance(event, Received):
            self._link.acknowledge(event)

    def _handle(self, event: object) -> None:
        match event:
            case Received():
                self._receive(event)
            case TrainerEvent():
                self._jobs.hear(event)
            case TrainerEnded():
                if (now := time.monotonic()) < self._watched_until:
                    self._progress_at = 0.0  # who looks sees the last stage end
                    self._tell_progress(now)
                self._jobs.trainer_ended(event)
            case Fetched(sha256, number, block):
                self._jobs.receive_block(sha256, number, block)
            case Carried():
                self._jobs.carried(event)
            case Connected(protocol):
                log.info("connected host=%s port=%d protocol=%s", self._config.broker.host, self._config.broker.port, protocol)
                self._introduce()
            case Disconnected(why):
                log.warning("disconnected why=%r", why)

    def _tick(self, now: float) -> None:
        self._link.supervise()
        try:
            self._jobs.tick()
        finally:  # whatever is wrong with a job, the node still speaks
            if self._link.connected:
                self._speak(now)

    def _speak(self, now: float) -> None:
        self._outbox.tick()
        self._tell_progress(now)
        if changed_ns(self._config) != self._models_ns:
            log.info("models_changed names=%r", ", ".join(sorted(offered(self._config))))
            self._tell_info()
        if now >= self._heartbeat_at:
            self._heartbeat(now)
        if now >= self._hello_at:
            self._greet(now)

    # what comes in

    def _receive(self, message: Received) -> None:
        """Act on a message, then acknowledge it to the broker: what it asks for is in the store by then."""
        who, parts = split(message.topic)
        try:
            if message.retained and who != COORDINATOR:
                log.warning("retained_ignored topic=%s", message.topic)  # an order of the past
            elif who not in (COORDINATOR, self._config.node):
                log.warning("topic_unknown topic=%s", message.topic)  # what a broker lets through to one is not for it
            elif who != COORDINATOR:
                self._receive_down(parts[1:], message.payload)
            elif message.payload and decode(message.payload, CoordinatorState).data.online and not message.retained:
                # It has come while we were here; of one that was there before, this connection's own hello tells.
                self._heartbeat_at = self._hello_at = time.monotonic() + random.uniform(0, NEWS_S)
                self._hello_pause_s = ANSWER_S
                self._outbox.send_again()
                self._jobs.link_is_new()
        except MessageInvalid as error:
            log.warning("message_invalid topic=%s error=%s", message.topic, error)
        except Rejected as error:
            log.warning("envelope_refused topic=%s reason=%s text=%r", message.topic, error.reason, str(error))
        except ConfigInvalid as error:
            log.error("trust_unreadable topic=%s text=%r", message.topic, str(error))
        self._link.acknowledge(message)

    def _receive_down(self, parts: Sequence[str], payload: bytes) -> None:
        match parts:
            case ["job", job, "offer" | "cancel" | "options" | "watch" as kind] if is_ulid(job):
                self._receive_of_job(job, kind, payload)
            case ["plan", request, "request"] if is_ulid(request):
                self._uplink.send(self._forecast(decode(payload, PlanRequest).data), "plan", request, "answer")
            case ["ack", message]:
                ack = self._opened(payload, Ack, message=message)
                if message in self._hellos:
                    self._greeted(ack, self._hellos[message])
                self._outbox.acknowledged(message)
            case ["file", sha256, "request"]:
                self._jobs.send_blocks(sha256, decode(payload, FileRequest).data)
            case ["file", sha256, "block", text] if (number := block_number(text)) is not None:
                self._jobs.receive_block(sha256, number, payload)
            case ["command", name]:
                self._command(name, payload)
            case _:
                log.warning("topic_unknown topic=%s", "/".join(parts))

    def _receive_of_job(self, job: str, kind: str, payload: bytes) -> None:
        match kind:
            case "offer":
                self._jobs.offer(job, payload)
            case "cancel":
                self._opened(payload, Cancel, job=job)
                self._jobs.cancel(job)
            case "options":
                self._jobs.take_options(self._opened(payload, Options, job=job))
            case "watch":
                watch = decode(payload, Watch).data
                if self._jobs.trainer is not None and self._jobs.trainer.job == job:
                    self._watched_until = time.monotonic() + watch.ttl_s
                    if watch.saliency:
                        self._jobs.ask_saliency(job)

    def _forecast(self, asked: PlanRequest) -> PlanAnswer:
        try:
            plan, text = forecast(asked.job, asked.texts, self._config, self._device)
            return PlanAnswer(plan, text=text)
        except Rejected as error:
            return PlanAnswer(None, error.reason, str(error)[:1024])
        except EdgeAgentError as error:
            return PlanAnswer(None, known_reason(error.code), str(error)[:1024])

    def _command(self, name: str, payload: bytes) -> None:
        match name:
            case "report":
                decode(payload, Report)
                self._jobs.report()
            case "drain":
                self._drain(True, self._opened(payload, Drain).number)
            case "resume":
                self._drain(False, self._opened(payload, Resume).number)
            case "forget":
                self._jobs.forget(self._opened(payload, Forget).job)
            case _:
                log.warning("command_unknown name=%s", name)

    def _opened(self, payload: bytes, kind: type[A], **topic: str) -> A:
        """Return what is in the envelope of a message. Raises Rejected, MessageInvalid, ConfigInvalid."""
        return open_envelope(decode(payload, Envelope).data, kind, self._config, **topic)

    def _drain(self, wanted: bool, number: int) -> None:
        """Take no new jobs, or take them again, by the newest word on that."""
        if not self._store.set_draining(wanted, number):
            raise Rejected("replayed", f"it is command {number:,}, and command {self._store.command:,} has been done")
        self._uplink.keep(self._present(), "state")

    # what the node tells of itself

    def _birth(self) -> Birth:
        """The link's thread asks for it before each connection."""
        self._connections += 1
        source = f"edge1/{self._config.fleet}/{self._config.node}"
        return Birth(up(self._config.fleet, self._config.node, "state"), encode(self._state("lost"), source, boot=self._store.boot))

    def _state(self, state: Literal["ready", "draining", "offline", "lost"]) -> NodeState:
        return NodeState(state, self._store.boot, self._connections, self._store.command)

    def _present(self) -> NodeState:
        return self._state("draining" if self._store.draining else "ready")

    def _introduce(self) -> None:
        """A new connection: ask for the time, which offers need, say who is here, and send again what nobody has acknowledged."""
        self._hello_pause_s = ANSWER_S
        self._greet(time.monotonic())
        self._uplink.keep(self._present(), "state")
        info = self._tell_info()
        if (prefix := self._config.home_assistant) is not None:
            node = self._config.node
            self._link.publish(discovery_topic(prefix, node), discovery(self._config.fleet, node, info), qos=1, retain=True)
        self._heartbeat_at = self._progress_at = 0.0
        self._told = None
        self._outbox.send_again()
        self._jobs.link_is_new()

    def _tell_info(self) -> NodeInfo:
        """Say what this node can do, with the models that are there now."""
        self._models_ns = changed_ns(self._config)
        self._uplink.keep(info := self._info, "info")
        return info

    def _greet(self, now: float) -> None:
        """Ask the coordinator whether it is there, for its time, and which start of this node it knows.

        Where it does not answer in time, the pauses grow: it may have more to do than it can, and each hello is more.
        """
        hello, self._hello_at = new_id(), now + self._hello_pause_s * random.uniform(1, 1 + HELLO_SPREAD)
        self._hello_pause_s = min(2 * self._hello_pause_s, LONGEST_HELLO_S)
        self._hellos = {earlier: sent for earlier, sent in self._hellos.items() if now - sent <= ANSWER_S} | {hello: now}
        self._uplink.ask(Hello(), "hello", message_id=hello)

    def _greeted(self, ack: Ack, sent: float) -> None:
        """A coordinator has answered a hello: take its time, unless it was held up, and number this start above those it knows."""
        if (now := time.monotonic()) - sent <= ANSWER_S:
            self._hello_at, self._hello_pause_s = now + HELLO_S, ANSWER_S
            self._jobs.take_time(ack.time)
            behind_s = (ack.time - datetime.now(timezone.utc)).total_seconds()
            if abs(behind_s - self._behind_s) > CLOCKS_DIFFER_S:
                log.warning("clock_differs behind_s=%d", behind_s)
                self._behind_s = behind_s
        if ack.boot > self._store.boot:
            self._store.raise_boot(ack.boot)
            log.warning("boot_raised boot=%d", self._store.boot)
            self._link.reconnect()

    @property
    def _info(self) -> NodeInfo:
        config, kind = self._config, self._device.torch_device
        total = self._sensors.sample(None).device_total_bytes.value
        limits = NodeLimits(int(config.budget), int(config.dataset_limit), config.queue)
        versions = {package: found for package in PACKAGES if (found := _version(package))}
        return NodeInfo(
            _version("edge-agent") or "", platform.python_version(), device_name(kind), kind, None if total is None else int(total),
            {name: _fingerprint(path) for name, path in sorted(offered(config).items())}, limits, versions, config.labels,
        )  # fmt: skip

    def _heartbeat(self, now: float) -> None:
        trainer = self._jobs.trainer
        held = trainer.last_event.memory_bytes if trainer and trainer.last_event else None
        self._uplink.send(Heartbeat(self._sensors.sample(held), self._jobs.waiting(), trainer.job if trainer else None), "heartbeat")
        pause = HEARTBEAT_BUSY_S if trainer else HEARTBEAT_IDLE_S
        self._heartbeat_at = now + pause * random.uniform(1 - HEARTBEAT_JITTER, 1 + HEARTBEAT_JITTER)

    def _tell_progress(self, now: float) -> None:
        """Send the trainer's last event, if it is new, at the rate of whoever looks."""
        trainer = self._jobs.trainer
        event = trainer.last_event if trainer else None
        if trainer is None or event is None or (event, trainer.saliency) == self._told:
            return
        if now - self._progress_at < (WATCHED_PROGRESS_S if now < self._watched_until else PROGRESS_S):
            return
        progress = JobProgress(event, trainer.finished, self._sensors.sample(event.memory_bytes), trainer.saliency)
        if self._uplink.send(progress, "job", trainer.job, "progress"):
            self._progress_at, self._told = now, (event, trainer.saliency)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_files(config: AgentConfig) -> None:
    """Raise ConfigInvalid or PackageMissing where a judge or a file server could never be asked, no model read, or nothing signed taken."""
    check_places(config)
    for judge in config.judges.values():
        judge.check()
    for alias, server in config.file_servers.items():
        _ = server.token, server.proxy and server.proxy.login
        client_context(server.tls, f"file_servers.{alias}.tls")
    if config.trust is not None:
        from edge_agent.signing import read_trusted

        read_trusted(config.trust.keys_file)


def _fingerprint(model: Path) -> str | None:
    try:
        return find_model(str(model)).fingerprint
    except (EdgeAgentError, OSError):
        return None


def main(arguments: Sequence[str]) -> int:
    """Run the daemon of `edge-agent run` and return its exit code."""
    parser = argparse.ArgumentParser(prog="edge-agent run", add_help=False)
    parser.add_argument("--config", type=Path, default=AGENT_CONFIG)
    given = parser.parse_args(arguments)
    logs.set_up()
    try:
        Agent(read_config(given.config, AgentConfig)).run()
    except EdgeAgentError as error:
        sys.stderr.write(f"error {error.code}: {error}\n")
        return error.exit_code
    return 0
