"""`edge-agent doctor`: what can be checked on a node before a job comes, each check by doing the thing."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx
import msgspec
import psutil

from edge_agent.admission import Rejected, open_envelope
from edge_agent.config import AgentConfig, FileServer, read_config
from edge_agent.enrolment import SOON_DAYS, days_left
from edge_agent.errors import EdgeAgentError, MessageInvalid, human_bytes
from edge_agent.https import open_client
from edge_agent.lockdown import describe, judge_ports
from edge_agent.messages import Ack, Envelope, Hello, decode, encode, new_id
from edge_agent.mqtt import Connected, Disconnected, Link, Received
from edge_agent.signing import read_trusted
from edge_agent.topics import down, up
from profiles.device import detect_profile, device_name, free_bytes
from quantization.model_files import find_model

ANSWER_S = 10.0
SPARE_DISK_BYTES = 2**30
NOT_FOUND = 404
CLOCKS_DIFFER_S = 300.0


class Check(msgspec.Struct, frozen=True):
    """One thing that was tried."""

    name: str
    passed: bool
    text: str
    """What was found, or what is wrong and what to do."""


def examine(path: Path) -> list[Check]:
    """Try everything that a node needs, the configuration first. A check that fails does not hide those after it."""
    try:
        config = read_config(path, AgentConfig)
    except EdgeAgentError as error:
        return [Check("configuration", False, str(error))]
    checks = [Check("configuration", True, f"{path}: node {config.node} of fleet {config.fleet}")]
    for name, look in CHECKS.items():
        checks.append(_try(name, look, config))
    return checks


def _try(name: str, look: Callable[[AgentConfig], str], config: AgentConfig) -> Check:
    try:
        return Check(name, True, look(config))
    except (EdgeAgentError, OSError, ssl.SSLError, subprocess.TimeoutExpired, _Wrong) as error:
        return Check(name, False, str(error))


class _Wrong(Exception):
    """A check found something wrong."""


def _state(config: AgentConfig) -> str:
    config.state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    probe = config.state_directory / f".doctor-{new_id()}"
    probe.write_bytes(b"")
    probe.unlink()
    free = psutil.disk_usage(str(config.state_directory)).free
    if free < SPARE_DISK_BYTES:
        raise _Wrong(f"{config.state_directory} has {human_bytes(free)} free; a job may need more than {human_bytes(SPARE_DISK_BYTES)}")
    return f"{config.state_directory} can be written, {human_bytes(free)} are free"


def _device(config: AgentConfig) -> str:
    device = detect_profile(config.device)
    name, free = device_name(device.torch_device), free_bytes(device)
    if config.budget > free - device.reserve_bytes:
        raise _Wrong(f"{human_bytes(free)} of {name} are free; a budget of {human_bytes(config.budget)} does not fit; lower it")
    return f"{name} (profile {device.title}): {human_bytes(free)} free, {human_bytes(config.budget)} lent to jobs"


def _models(config: AgentConfig) -> str:
    if not config.models:
        raise _Wrong("no model is named in [models]; jobs can use none")
    for path in config.models.values():
        find_model(str(path))
    return ", ".join(f"{name} ({path})" for name, path in config.models.items())


def _judges(config: AgentConfig) -> str:
    for judge in config.judges.values():
        judge.check()
    return ", ".join(sorted(config.judges)) or "none: jobs have the critic or the model itself for judgments"


def _file_servers(config: AgentConfig) -> str:
    """Ask each for a file that is none: whoever says that it has no such thing knows this node."""
    for alias, server in config.file_servers.items():
        try:
            status = asyncio.run(asyncio.wait_for(_status(alias, server), ANSWER_S))
        except (httpx.HTTPError, httpx.InvalidURL, asyncio.TimeoutError) as error:
            raise _Wrong(f"{alias} ({server.url}): {error or 'no answer'}; check [file_servers.{alias}]") from None
        if status != NOT_FOUND:
            raise _Wrong(f"{alias} ({server.url}) answers {status} to a request for a file; check its access rules")
    return ", ".join(f"{a} ({s.url})" for a, s in config.file_servers.items()) or "none: files travel over the broker"


async def _status(alias: str, server: FileServer) -> int:
    async with open_client(alias, server) as client:
        return (await client.head(f"sha256/{'0' * 64}")).status_code


def _trainer(config: AgentConfig) -> str:
    """Have a process lock itself down as a trainer does and try to get out. What a platform lacks is said, and is no fault of the node."""
    said = f"locked down, {_locked_down(())}"
    if config.judges:
        said += f"; where an endpoint judges, until it has, {_locked_down(judge_ports(judge.url for judge in config.judges.values()))}"
    return said


def _locked_down(ports: Iterable[int]) -> str:
    command = [sys.executable, "-m", "edge_agent.lockdown", *map(str, ports)]
    done = subprocess.run(command, capture_output=True, timeout=ANSWER_S, check=False)  # noqa: S603
    try:
        return describe(msgspec.json.decode(done.stdout, type=dict[str, str | None]))
    except msgspec.DecodeError:
        raise _Wrong(
            f"a process that locks itself down ends with {done.returncode}: {done.stderr.decode(errors='replace')[-400:]}"
        ) from None


def _trust(config: AgentConfig) -> str:
    trust = config.trust
    if trust is None:
        return "orders need no signature: whoever the broker lets publish to this node gives them; see [trust] in docs/config.md"
    keys = read_trusted(trust.keys_file)
    if not keys:
        raise _Wrong(f"{trust.keys_file} holds no key, so no signed order is taken; add the line of `edge-agent keys show`")
    named = ", ".join(f"{key.fingerprint} ({key.comment})" if key.comment else key.fingerprint for key in keys)
    return f"orders {'must be' if trust.required else 'may be'} signed by {named}"


def _certificate(config: AgentConfig) -> str:
    file = config.broker.tls.certificate_file if config.broker.tls else None
    if file is None:
        return "none: the broker knows this node by its password, or not at all"
    days = days_left(file)
    if days < SOON_DAYS:
        raise _Wrong(f"{file} {'has expired' if days < 0 else f'expires in {days:.0f} days'}; make a new one with `edge-agent enroll node`")
    return f"{file} is valid for {days:.0f} days"


def _link(config: AgentConfig) -> str:
    """Ask the coordinator and wait for its acknowledgement: login, encryption, rights and its presence in one."""
    events: SimpleQueue[Any] = SimpleQueue()
    message = new_id()
    answer = down(config.fleet, config.node, "ack", message)
    link = Link(config.broker, f"doctor/{config.node}", [answer], events, lambda: None)
    link.start()
    where, started = f"{config.broker.host}:{config.broker.port}", time.monotonic()
    reached = ""
    try:
        while (left := started + ANSWER_S - time.monotonic()) > 0:
            match events.get(timeout=left):
                case Connected(protocol):
                    reached = f"{where} in MQTT {protocol}"
                    started = time.monotonic()
                    link.publish(up(config.fleet, config.node, "hello"), encode(Hello(), "doctor", message_id=message), qos=1)
                case Received(topic, payload) if topic == answer:
                    answered_ms = 1000 * (time.monotonic() - started)
                    _check_answer(config, message, payload)
                    return f"{reached}; the coordinator answered in {answered_ms:.0f} ms"
                case Disconnected(why):
                    raise _Wrong(f"{where}: {why}; check [broker] and that the broker runs")
    except Empty:
        pass
    finally:
        link.close()
    if reached:
        raise _Wrong(f"{reached}, but no coordinator of fleet {config.fleet!r} answered; start it, or check the broker's access rules")
    raise _Wrong(f"{where}: no answer in {ANSWER_S:.0f} s; check host, port and firewall")


def _check_answer(config: AgentConfig, message: str, payload: bytes) -> None:
    try:
        ack = open_envelope(decode(payload, Envelope).data, Ack, config, message=message)
    except (Rejected, MessageInvalid) as error:
        raise _Wrong(f"the coordinator's answer is not taken: {error}") from None
    behind_s = (ack.time - datetime.now(timezone.utc)).total_seconds()
    if abs(behind_s) > CLOCKS_DIFFER_S:
        raise _Wrong(f"the clock is {abs(behind_s):,.0f} s {'behind' if behind_s > 0 else 'ahead of'} the coordinator's; set both by NTP")


CHECKS: dict[str, Callable[[AgentConfig], str]] = {
    "state directory": _state, "device": _device, "models": _models, "judges": _judges, "file servers": _file_servers, "trainer": _trainer,
    "trust": _trust, "certificate": _certificate, "link": _link,
}  # fmt: skip
"""What is tried, in this order."""
