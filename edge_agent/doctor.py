"""`edge-agent doctor`: what can be checked on a node before a job comes, each check by doing the thing."""

from __future__ import annotations

import asyncio
import ctypes
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import msgspec
import psutil

from edge_agent.config import AgentConfig, FileServer, is_loopback, read_config
from edge_agent.enrolment import SOON_DAYS, days_left
from edge_agent.errors import EdgeAgentError, human_bytes
from edge_agent.https import open_client
from edge_agent.lockdown import describe, judge_ports
from edge_agent.messages import new_id
from edge_agent.models import offered
from edge_agent.proxy import with_way
from edge_agent.signing import read_trusted
from edge_agent.visit import Visit, visit
from profiles.device import device_name, free_bytes, gpu_uuid, take_device
from profiles.gpu_lock import describe_lock
from quantization.model_files import find_model

ANSWER_S = 10.0
SPARE_DISK_BYTES = 2**30
NOT_FOUND = 404
SMOKE_S = 180.0
"""Longer than the trial of a kernel on a GPU may take, which is a part of it."""
CLOCK_S = 5.0
"""Between this clock and the coordinator's; those that are synchronised differ by milliseconds."""
TIME_ERROR = 5
"""What adjtimex(2) returns for a clock that is not synchronised."""
PYTORCH = "install builds of PyTorch and bitsandbytes for it"
AGAIN = "a running agent may have taken its id back: stop it for the moment, and try again"
RULES = "give it the rules of deploy/: docs/fleet.md#certificates"
SET_CLOCK = "run `timedatectl set-ntp true`, or start another client of NTP"


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
    return checks + at_the_broker(config)


def at_the_broker(config: AgentConfig) -> list[Check]:
    """One visit for all that it shows: it may take the connection of a running agent for a moment."""
    try:
        found = visit(config)
    except EdgeAgentError as error:
        return [Check("link", False, str(error))]
    return [_try(name, look, config, found) for name, look in BROKER_CHECKS.items() if found.protocol or name != "access rules"]


def _try(name: str, look: Callable[..., str], *facts: object) -> Check:
    try:
        return Check(name, True, look(*facts))
    except (EdgeAgentError, OSError, ssl.SSLError, subprocess.TimeoutExpired, _Wrong) as error:
        return Check(name, False, str(error))


class _Wrong(Exception):
    """A check found something wrong."""


def _state(config: AgentConfig) -> str:
    place = config.state_directory
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = place / f".doctor-{new_id()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        told = f"{place} cannot be written: {error.strerror}"
        raise _Wrong(f"{told}; mend it for the agent's user, or name another `state_directory`") from None
    free = psutil.disk_usage(str(place)).free
    if free < SPARE_DISK_BYTES:
        told = f"{place} has {human_bytes(free)} free; a job may need more than {human_bytes(SPARE_DISK_BYTES)}"
        raise _Wrong(f"{told}; free some, or name another `state_directory`")
    return f"{place} can be written, {human_bytes(free)} are free"


def _device(config: AgentConfig) -> str:
    device = take_device(config.device)
    name, free = device_name(device.torch_device), free_bytes(device)
    if uuid := gpu_uuid(device):
        name = f"{name}, {uuid}"
    if config.budget > free - device.reserve_bytes:
        raise _Wrong(f"{human_bytes(free)} of {name} are free; a budget of {human_bytes(config.budget)} does not fit; lower it")
    told = f"{name} (profile {device.title}): {human_bytes(free)} free, {human_bytes(config.budget)} lent to jobs"
    return f"{told}; {describe_lock(device)}" if device.kind == "discrete" else told


def _four_bits(config: AgentConfig) -> str:
    """Have a process compute with a matrix in NF4 as a trainer would, and hold it against plain PyTorch."""
    device = take_device(config.device)
    command = [sys.executable, "-m", "quantization.smoke", device.torch_device, device.compute_dtype]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SMOKE_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise _Wrong(f"a matrix in 4 bits was not computed with on {device.torch_device} in {SMOKE_S:.0f} s; {PYTORCH}") from None
    try:
        tried = msgspec.json.decode(done.stdout.rpartition(b"\n")[2], type=dict[str, str])
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][-400:]
        what = f"a process that computes with a matrix in 4 bits on {device.torch_device}"
        raise _Wrong(f"{what} ends with {done.returncode}: {last}; {PYTORCH}") from None
    kernel = {"bitsandbytes": "the kernels of bitsandbytes", "torch": "plain PyTorch, which is slower"}[tried["kernel"]]
    told = f"{kernel} on {tried['device']}: {tried['why']}"
    if tried["wrong"]:
        raise _Wrong(f"{told}; but {tried['wrong']}, so no training there can be trusted; {PYTORCH}")
    return told


def _models(config: AgentConfig) -> str:
    models = offered(config)
    if not models:
        raise _Wrong("there is none; `edge-agent models add` fetches one, or name a directory in [models]")
    for path in models.values():
        find_model(str(path))
    return ", ".join(f"{name} ({path})" for name, path in models.items())


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
            why = with_way(f"{alias} ({server.url}): {error or 'no answer'}", server.proxy)
            raise _Wrong(f"{why}; check [file_servers.{alias}]") from None
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


def _link(config: AgentConfig, found: Visit) -> str:
    """Login, encryption, own rights and the coordinator's presence in one."""
    if found.protocol is None:
        raise _Wrong(f"{found.where}: {found.why}; check [broker] and that the broker runs")
    reached = f"{found.where} in MQTT {found.protocol}"
    if found.refused is not None:
        raise _Wrong(f"{reached}, which refuses what this node says ({found.refused}); {RULES}")
    if found.distrusted is not None:
        raise _Wrong(f"{reached}, but the coordinator's answer is not taken: {found.distrusted}; check [trust] and the coordinator's key")
    if found.answer_s is None and found.why is not None:
        raise _Wrong(f"{reached}, but the connection ended before the coordinator answered: {found.why}; {AGAIN}")
    if found.answer_s is None:
        raise _Wrong(f"{reached}, but no coordinator of fleet {config.fleet!r} answered; start it, or check the broker's access rules")
    return f"{reached}; the coordinator answered in {1000 * found.answer_s:.0f} ms"


def _clock(config: AgentConfig, found: Visit) -> str:
    """Hold the clock against the coordinator's. The kernel's word alone counts where there is no other: in containers it seldom knows."""
    known = _kernel_knows()
    kernel = f"the kernel {'takes it for synchronised' if known else 'does not know it to be synchronised'}"
    if found.clock_ahead_s is None or found.answer_s is None:
        if not known:
            raise _Wrong(f"no coordinator answered, so it was held against none, and {kernel}; {SET_CLOCK}")
        return f"{kernel}; no coordinator answered, so it was held against none"
    apart, within = abs(found.clock_ahead_s), found.answer_s / 2
    told = f"{apart:.1f} s {'ahead of' if found.clock_ahead_s > 0 else 'behind'} the coordinator's (± {within:.1f} s); {kernel}"
    if apart > CLOCK_S + within:
        raise _Wrong(f"{told}; certificates and quiet hours go by it: {SET_CLOCK} on the machine that is wrong")
    return told


def _kernel_knows() -> bool:
    """Whether the kernel has been told, by NTP or whatever else, that its clock is right."""
    status = ctypes.create_string_buffer(512)  # struct timex, all zero: asks, and changes nothing
    return bool(0 <= ctypes.CDLL(None).adjtimex(status) < TIME_ERROR)


def _access_rules(config: AgentConfig, found: Visit) -> str:
    """What this node should not be able to do, it was not. A broker that only this machine reaches may do without rules."""
    if not found.answered:
        raise _Wrong(f"not found out: the connection ended before the broker had answered: {found.why or 'no answer'}; {AGAIN}")
    if not found.trespasses:
        told = "this node can neither speak nor hear as another, nor take another's id"
        return told if found.protocol == "5" else f"{told}, as far as MQTT {found.protocol} tells"
    told = f"the broker has no access rules, or too few: this node can {'; '.join(found.trespasses)}"
    if config.broker.proxy is None and is_loopback(config.broker.host):
        return f"{told}. It is on loopback: enough for a trial on one machine, not for a fleet"
    raise _Wrong(f"{told}; {RULES}")


CHECKS: dict[str, Callable[[AgentConfig], str]] = {
    "state directory": _state, "device": _device, "4 bits": _four_bits, "models": _models, "judges": _judges, "file servers": _file_servers,
    "trainer": _trainer, "trust": _trust, "certificate": _certificate,
}  # fmt: skip
"""What is tried on the node, in this order."""
BROKER_CHECKS: dict[str, Callable[[AgentConfig, Visit], str]] = {"link": _link, "clock": _clock, "access rules": _access_rules}
"""What a visit to the broker shows; the last one only where it was reached."""
