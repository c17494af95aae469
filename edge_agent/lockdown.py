"""What a trainer gives up before it reads its job: privileges, the network, and every place to write to but its own.

By means of Linux that need no root: no_new_privs, empty capabilities, Landlock for files and ports, seccomp for sockets. What a platform
does not have is said with its reason, never left out in silence. All of it lasts until the process ends, and holds for what it starts.

Does not cover: what is read, which file permissions alone decide; sockets of the same machine with a path, likewise. Where an endpoint
judges, Landlock knows its port and not its host, and datagrams (names are looked up by them) are free until the judging has ended.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 4096, resource.RLIMIT_FSIZE: 16 * 2**30}
"""No core dumps, which would hold texts of datasets; open files; bytes of one file, past which a write fails as on a full disk."""
DEVICES = (
    "null", "zero", "full", "random", "urandom", "tty", "shm", "nvidia*", "nvhost*", "nvmap", "nvgpu", "nvsci*", "host1x*", "tegra*", "dri",
    "kfd", "dxg",
)  # fmt: skip
"""What of /dev may be written to: memory that processes share, and GPUs, those of Jetsons and of WSL included."""
Parts = Mapping[str, str | None]
"""Parts of the lock-down, each with the reason why it does not hold, or None where it does."""

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_CAPABILITY_VERSION = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 15))
"""Landlock's rights to write, remove, make, rename and truncate."""
_SIGNALS_AND_ABSTRACT_SOCKETS = 3
_BIND, _CONNECT = 1, 2
_ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "seccomp": 317, "capset": 126, "socket": 41, "clone": 56, "clone3": 435, "io_uring_setup": 425, "ptrace": 101, "unshare": 272,
        "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, {
        "seccomp": 277, "capset": 91, "socket": 198, "clone": 220, "clone3": 435, "io_uring_setup": 425, "ptrace": 117, "unshare": 97,
        "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
    }),
}  # fmt: skip
_REFUSED = {
    "clone3": errno.ENOSYS, "io_uring_setup": errno.ENOSYS, "ptrace": errno.EPERM, "unshare": errno.EPERM, "setns": errno.EPERM,
    "process_vm_readv": errno.EPERM, "process_vm_writev": errno.EPERM, "pidfd_getfd": errno.EPERM,
}  # fmt: skip
"""Ways around the rest: rings that open sockets, other processes, namespaces. The C library does without clone3, whose flags are hidden."""
_CLONE_NEWUSER = 0x10000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


class _Step(ctypes.Structure):
    """Of a filter: what to do, how far to jump where it applies and where not, and with which value."""

    _fields_ = (("code", ctypes.c_uint16), ("then", ctypes.c_uint8), ("otherwise", ctypes.c_uint8), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(_Step)))


class _Absent(Exception):
    """This platform does not have it; the text says what."""


def lock_down(writable: Iterable[Path], ports: Collection[int] = ()) -> Parts:
    """Give up what a trainer does not need, and return what holds.

    It may write below `writable`, to GPUs, and nowhere else; with `ports` it may connect to these by TCP, without to nothing. To be called
    before there are other threads.
    """
    _wake_gpu()
    os.umask(0o077)
    parts: dict[str, Callable[[], None]] = {
        "limits": _set_limits, "privileges": _drop_privileges, "files": partial(_close_files, list(writable)),
        "network": partial(_close_network, ports),
    }  # fmt: skip
    return {name: _why_not(give_up) for name, give_up in parts.items()}


def close_network() -> str | None:
    """Let no thread of this process open a socket of a network any more; return why it may, None where it may not."""
    return _why_not(partial(_filter_calls, (socket.AF_UNIX,)))


def judge_ports(urls: Iterable[str]) -> set[int]:
    """Return the ports to which requests to such addresses go, those of the environment's proxies included."""
    parts = [urlsplit(url) for url in [*urls, *getproxies().values()] if "://" in url]
    return {part.port or (443 if part.scheme == "https" else 80) for part in parts}


def describe(parts: Parts) -> str:
    """`holds: limits, privileges; missing: files (why), network (why)`."""
    held = [name for name, why in parts.items() if why is None]
    missing = [f"{name} ({why})" for name, why in parts.items() if why is not None]
    return f"holds: {', '.join(held) or 'nothing'}" + (f"; missing: {', '.join(missing)}" if missing else "")


def _why_not(give_up: Callable[[], None]) -> str | None:
    try:
        if sys.platform != "linux" and give_up is not _set_limits:
            return "not on this system, only on Linux"
        give_up()
    except OSError as error:
        return error.strerror or str(error)
    except (_Absent, ValueError, AttributeError) as error:
        return str(error)
    return None


def _wake_gpu() -> None:
    """Have the driver make the device files of CUDA, for which it has a program that needs the privileges which are given up."""
    program = shutil.which("nvidia-modprobe")
    if program and Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia-uvm").exists():
        subprocess.run([program, "-c", "0", "-u"], timeout=60, check=False)  # noqa: S603


def _set_limits() -> None:
    for kind, most in LIMITS.items():
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))


def _drop_privileges() -> None:
    """Give up all capabilities, and gain none by programs that are started, whoever owns them."""
    capability = 0
    while _prctl(_PR_CAPBSET_DROP, capability) == 0:  # up to the last one; without the right to it none, which no_new_privs makes good
        capability += 1
    _checked("no_new_privs", _prctl(_PR_SET_NO_NEW_PRIVS, 1))
    header, empty = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("capset", _architecture()[1]["capset"], header, empty)


def _close_files(writable: list[Path]) -> None:
    version = _landlock_version()
    handled = _WRITES & ((1 << {1: 13, 2: 14}.get(version, 15)) - 1)
    rules = _ruleset(handled, 0, _SIGNALS_AND_ABSTRACT_SOCKETS if version >= 6 else 0)
    devices = [path for name in DEVICES for path in Path("/dev").glob(name)]
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))  # noqa: S108
    for place in (*writable, *devices, pipes, Path("/proc/self")):
        if place.exists():
            _allow_writing(rules, place, handled)
    _restrict(rules)


def _allow_writing(rules: int, place: Path, handled: int) -> None:
    opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = handled if stat.S_ISDIR(os.fstat(opened).st_mode) else handled & (_WRITE_FILE | _TRUNCATE)
        rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _call(f"Landlock rule for {place}", _LANDLOCK_ADD, rules, 1, rule, 0)
    finally:
        os.close(opened)


def _close_network(ports: Collection[int]) -> None:
    if not ports:
        _filter_calls((socket.AF_UNIX,))
        return
    _filter_calls((socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK))
    if (version := _landlock_version()) < 4:
        raise _Absent(f"Landlock {version} of this kernel knows no ports, so that all are free until judgments are written")
    rules = _ruleset(0, _BIND | _CONNECT, 0)
    for port in ports:
        _call("Landlock rule for a port", _LANDLOCK_ADD, rules, 2, _CONNECT.to_bytes(8, sys.byteorder) + port.to_bytes(8, sys.byteorder), 0)
    _restrict(rules)


def _landlock_version() -> int:
    try:
        return _call("Landlock", _LANDLOCK_CREATE, None, 0, 1)
    except OSError as error:
        raise _Absent(f"Landlock is not in this kernel, or switched off: {error.strerror}") from None


def _ruleset(files: int, ports: int, scopes: int) -> int:
    """Return the descriptor of an empty set of rules for what it handles; kernels that know less of it take a shorter one."""
    fields = [files, ports, scopes]
    while len(fields) > 1 and not fields[-1]:
        fields.pop()
    attributes = b"".join(field.to_bytes(8, sys.byteorder) for field in fields)
    return _call("Landlock rules", _LANDLOCK_CREATE, attributes, len(attributes), 0)


def _restrict(rules: int) -> None:
    try:
        _call("Landlock", _LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _filter_calls(families: Collection[int]) -> None:
    """Have sockets of other families fail as not permitted, and what leads around it, in all threads."""
    audited, numbers = _architecture()
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audited), (_RETURN, 0, 0, _FAIL | errno.EPERM), (_LOAD, 0, 0, 0)]
    steps += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]  # another numbering of the same processor
    for name, error in _REFUSED.items():
        steps += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _FAIL | error)]
    steps += [(_EQUAL, 0, 4, numbers["clone"]), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_NEWUSER), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_EQUAL, 1, 0, numbers["socket"]), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 16)]
    for family in families:
        steps += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _FAIL | errno.EACCES))

    program = _Program(len(steps), (_Step * len(steps))(*(_Step(*step) for step in steps)))
    if thread := _call("seccomp", numbers["seccomp"], 1, 1, ctypes.byref(program)):
        raise _Absent(f"seccomp: thread {thread} has a filter of its own")


def _architecture() -> tuple[int, dict[str, int]]:
    try:
        return _ARCHITECTURES[platform.machine()]
    except KeyError:
        raise _Absent(f"the system calls of {platform.machine()} are not known here") from None


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> int:
    return int(_libc().prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))


def _call(what: str, number: int, *arguments: Any) -> int:
    return _checked(what, _libc().syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))


def _checked(what: str, found: int) -> int:
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return found


# tried out, as `edge-agent doctor` does it: python -m edge_agent.lockdown [PORT ...]


def _opens_socket() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        return True


def _writes() -> bool:
    with tempfile.NamedTemporaryFile(dir=os.environ.get("TMPDIR", "/tmp")):  # noqa: S108
        return True


def _has_capabilities() -> bool:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return int(status["CapPrm"], 16) != 0 or status["NoNewPrivs"] != "1"


def _passes(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except OSError:
        return False


def main() -> None:
    """Lock this process down, try to get past every part, and print what holds as JSON."""
    ports = set(map(int, sys.argv[1:]))
    parts = dict(lock_down([], ports))
    attempts = {"privileges": _has_capabilities, "files": _writes} | ({} if ports else {"network": _opens_socket})
    parts |= {name: "it was taken, and does not hold" for name, attempt in attempts.items() if parts[name] is None and _passes(attempt)}
    print(json.dumps(parts))


if __name__ == "__main__":
    main()
