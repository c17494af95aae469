"""A trainer that tries to get out: `python tests/prying.py OUTSIDE PORTS EVENTS train DIR --supervised`.

At the named events, such as `stage_started/train`, it tries what a trainer must not do, in the thread of the run, in a new thread and in a
program that it starts, and appends to `prying.jsonl` of the job what came of each: null, or the name of the error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLONE_NEWUSER, PTRACE_ATTACH = 0x10000000, 16


def call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def connect(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass


def tried(attempt: Callable[[], Any]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError:  # how Python says that a limit may not be raised
        return "EPERM"
    return None


def attempts(outside: Path, inside: Path, ports: list[int]) -> dict[str, str | None]:
    """Try everything; `outside` holds a file that must stay as it is, and its parent process is no business of a trainer."""
    daemon = int(os.environ.setdefault("DAEMON", str(os.getppid())))
    families = {name: getattr(socket, name) for name in ("AF_INET", "AF_INET6", "AF_PACKET", "AF_NETLINK", "AF_UNIX")}
    kinds = {name: socket.SOCK_RAW if name == "AF_PACKET" else socket.SOCK_DGRAM for name in families}
    tries: dict[str, Callable[[], Any]] = {
        **{name: lambda name=name: socket.socket(families[name], kinds[name]).close() for name in families},
        **{f"port {n}": lambda port=port: connect(port) for n, port in enumerate(ports)},
        "listen": lambda: socket.create_server(("127.0.0.1", 0)).close(),
        "write": lambda: (outside / "kept").write_text("changed"),
        "truncate": lambda: os.truncate(outside / "kept", 0),
        "make": lambda: (outside / "new").touch(),
        "remove": lambda: (outside / "kept").unlink(),
        "rename": lambda: (inside / "job.json").rename(outside / "job.json"),
        "inside": lambda: (inside / "pried").write_text("whatever"),
        "temporary": lambda: tempfile.TemporaryFile().close(),
        "device": lambda: Path("/dev/null").write_text("whatever"),
        "own memory": lambda: Path("/proc/self/clear_refs").write_text("5"),
        "signal": lambda: os.kill(daemon, 0),
        "trace": lambda: call("ptrace", PTRACE_ATTACH, daemon, None, None),
        "read memory": lambda: call("process_vm_readv", daemon, None, 0, None, 0, 0),
        "namespace": lambda: call("unshare", CLONE_NEWUSER),
        "user": lambda: os.setgroups([]),
        "capabilities": lambda: call("prctl", 24, 0, 0, 0, 0),
        "dump": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        "files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4097, 4097)),
    }
    return {name: tried(attempt) for name, attempt in tries.items()}


def pry(outside: Path, inside: Path, ports: list[int]) -> list[dict[str, str | None]]:
    found = [attempts(outside, inside, ports)]
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(attempts, outside, inside, ports).result())
    program = [sys.executable, __file__, "program", str(outside), str(inside), *map(str, ports)]
    return [*found, json.loads(subprocess.run(program, capture_output=True, check=True, timeout=60).stdout)]


def main() -> None:
    if sys.argv[1] == "program":
        outside, inside, *ports = sys.argv[2:]
        print(json.dumps(attempts(Path(outside), Path(inside), list(map(int, ports)))))
        return
    outside, given, events = Path(sys.argv[1]), list(map(int, sys.argv[2].split(","))), sys.argv[3].split(",")
    del sys.argv[1:4]
    from edge_agent.__main__ import main as run
    from edge_agent.report import Event
    from edge_agent.supervised import Supervision

    inside, tell = Path(sys.argv[2]), Supervision.tell

    def told(self: Supervision, event: Event) -> None:
        tell(self, event)
        place = f"{event.event}/{event.stage}"
        if place in events:
            with (inside / "prying.jsonl").open("a") as file:
                file.writelines(json.dumps([place, found]) + "\n" for found in pry(outside, inside, given))

    Supervision.tell = told  # type: ignore[method-assign]
    run()


if __name__ == "__main__":
    main()
