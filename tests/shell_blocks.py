"""The shell commands of README.md and docs/. Every block says on the line above how it is tried; what can be run is run as it is written.

    <!-- run -->             by `make test`
    <!-- run: minutes -->    by tests/long_docs.py, which runs all blocks of a document that has such ones
    <!-- run: service -->    likewise, in the background until the end of the document, as in a terminal of its own
    <!-- not run: WHY -->

A document of which another test runs all blocks says so once: `<!-- all run by: tests/long_tutorial.py -->`; that file names the document.

Commands within sentences are not run; tests/test_docs.py holds those of `edge-agent` to the commands and options that there are.

The blocks of a document share a directory and what they export. What `edge-agent demo --data-only --out demo` writes is there, and in
tests/long_docs.py `deploy/`. A block of `sh` must succeed. In one of `console` stands below a command what it says, where `…` is anything;
a command that fails says `error CODE: …`, or `✗`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, Cli

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_S = 3600.0
"""Of a block, on a machine that is busy."""
FENCED = re.compile(r"^(?P<above>[^\n]*)\n```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
ALL = re.compile(r"^<!-- all run by: (tests/\w+\.\w+) -->$", re.MULTILINE)
SAID = re.compile(r"<!-- (?:run(?:: (?P<when>minutes|service))?|not run: (?P<why>\S.*)) -->")
COMMAND = re.compile(
    r"(?:\$ |sudo |\S*bin/)?(?:edge-agent|pip|python3?|make|docker|podman|systemctl|mosquitto\w*|openssl|curl|apt|apt-get|git|export) \S"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands. `when` is None where it is not run."""

    document: Path
    line: int
    text: str
    console: bool
    when: str | None

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks_of(document: Path) -> tuple[list[Block], list[str]]:
    """Return the blocks of a document, and where it has shell commands without saying how they are tried."""
    text = document.read_text(encoding="utf-8")
    if elsewhere := ALL.search(text):
        test = ROOT / elsewhere[1]
        named = test.is_file() and document.name in test.read_text(encoding="utf-8")
        return [], [] if named else [f"{document.name}: {elsewhere[1]} does not run it"]
    blocks, wrong = [], []
    for match in FENCED.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        said = SAID.fullmatch(match["above"])
        if match["kind"] in ("sh", "console") and said is not None:
            when = None if said["why"] else said["when"] or "now"
            blocks.append(Block(document, line, match["text"], match["kind"] == "console", when))
        elif match["kind"] in ("sh", "console") or any(map(COMMAND.match, match["text"].splitlines())):
            wrong.append(f"{document.name}:{line}: a block `sh` or `console` below `<!-- run -->` or `<!-- not run: WHY -->`, please")
    fenced = {number for match in FENCED.finditer(text) for number in _lines(text, match)}
    for number, line in enumerate(text.splitlines(), 1):
        if number not in fenced and line.startswith("    ") and COMMAND.match(line.strip()):
            wrong.append(f"{document.name}:{number}: shell commands stand in a block `sh` or `console`, please")
    return blocks, wrong


def _lines(text: str, match: re.Match[str]) -> range:
    return range(text.count("\n", 0, match.start("text")), text.count("\n", 0, match.end()) + 2)


@dataclass
class Shell:
    """Runs blocks in a directory with bash, one after the other; what one exports is there for the next."""

    directory: Path
    programs: Path
    """What is first in the search path."""
    more: Mapping[str, str] = field(default_factory=dict)
    services: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **self.more, "HOME": str(self.directory), "PATH": path, "COLUMNS": "120"}

    def run(self, block: Block) -> None:
        """Run a block and hold what it does against what the document says."""
        if not block.console:
            code, said = self._bash(f"set -eo pipefail\n{block.text}")
            assert code == 0, f"{block.place}: exit status {code}\n{said}"
            return
        for command, wanted in transcript(block.text):
            code, said = self._bash(command)
            fails = re.search(r"^(?:error \w+: |✗ )", wanted, re.MULTILINE) is not None
            assert (code != 0) == fails, f"{block.place}: {command}\nexit status {code}\n{said}"
            assert matches(wanted, said), f"{block.place}: {command}\nsays\n{said}\nand not\n{wanted}"

    def _bash(self, text: str) -> tuple[int, str]:
        kept = self.directory / ".environment"
        script = f"trap 'code=$?; env -0 > {kept}; exit $code' EXIT\n{text}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S, check=False,
        )  # fmt: skip
        self.environment = dict(item.split("=", 1) for item in kept.read_text().split("\0") if item)
        kept.unlink()
        return done.returncode, done.stdout

    def serve(self, block: Block) -> None:
        """Run a block in the background."""
        with (self.directory / f"service-{block.line}.log").open("wb") as log:
            command = ["bash", "-c", f"exec {block.text.strip()}"]
            self.services.append(
                subprocess.Popen(
                    command,
                    cwd=self.directory,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def close(self) -> None:
        for service in reversed(self.services):
            with suppress(ProcessLookupError):
                service.send_signal(signal.SIGTERM)
            service.wait(30)


def transcript(text: str) -> list[tuple[str, str]]:
    """Return the commands of a block of `console`, each with what stands below it."""
    pairs: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            pairs.append((line.removeprefix("$ "), ""))
        elif pairs and pairs[-1][0].endswith("\\"):
            pairs[-1] = f"{pairs[-1][0]}\n{line}", ""
        else:
            pairs[-1] = pairs[-1][0], f"{pairs[-1][1]}{line}\n"
    return pairs


def matches(wanted: str, said: str) -> bool:
    """Whether a text is the wanted one, in which `…` stands for anything and blanks at the ends of lines do not count."""
    lines, found = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (wanted, said))
    return re.fullmatch(".*?".join(map(re.escape, lines.split("…"))), found, re.DOTALL) is not None


SHIM = """#!{python} -IS
import json, os, socket, sys
ask = socket.socket(socket.AF_UNIX)
ask.connect({address!r})
ask.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
code, out, err = json.load(ask.makefile())
sys.stdout.write(out)
sys.stdout.flush()
sys.stderr.write(err)
sys.exit(code)
"""


@contextmanager
def warm_programs(cli: Cli) -> Iterator[Path]:
    """Yield a directory with an `edge-agent` whose processes have their libraries already, as those of `cli`."""
    with tempfile.TemporaryDirectory(prefix="ea-") as place, socket.socket(socket.AF_UNIX) as door:
        address = str(Path(place) / "door")
        door.bind(address)
        door.listen()
        program = Path(place) / "edge-agent"
        program.write_text(SHIM.format(python=sys.executable, address=address))
        program.chmod(0o755)

        def answer() -> None:
            while True:
                asked, _ = door.accept()
                with asked, asked.makefile("rw") as stream:
                    if not (line := stream.readline()):
                        return
                    arguments, directory, own = json.loads(line)
                    ran = cli(*arguments, cwd=Path(directory), own=own)
                    json.dump([ran.code, ran.out, ran.err], stream)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield Path(place)
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(address)
            thread.join()
