"""Shared by all tests: the shipped model, the real data where it is present, and the command line run as a user runs it."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, Server
from hypothesis import settings
from lacking import lack
from postgres import Postgres, running

# A shell gives what it runs in the background a deaf ear for Ctrl-C, and all processes of the tests would have it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
# Nothing of the user is touched.
STATE = tempfile.TemporaryDirectory()
os.environ["XDG_STATE_HOME"] = STATE.name
NUMBERS = itertools.count()
# Tiny models are slower on more threads, and results must not depend on the machine's number of cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# As `edge_agent/__main__.py` has it, for what runs without.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Quantised models are kept in no user's home; tests of the cache name a directory of their own.
os.environ["EDGE_AGENT_CACHE_LIMIT"] = "0"

# How long an example takes depends on the machine: tests never assert on time.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent
TINY = ROOT / "edge_agent" / "demo" / "tiny"
SHARED = ROOT.parent / "shared" / "data"
DEADLINE_S = 240
ABSENT = "BROWSER ABSENT: {}, so no page was opened and nothing of this was checked"
# The longest first, so that no core waits at the end for the last of them (they are shared out in the order of their collection).
LONG = (
    "test_interruptions.py", "test_fleet.py", "test_killed.py", "test_enforce.py", "test_chaos.py", "test_https.py", "test_resume.py",
    "test_bad_input.py", "test_train.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONG` first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@contextmanager
def _nothing_learned() -> Iterator[None]:
    """What a run in this process learns of the device must not decide another test: a process that has many libraries takes more.

    Makes no directory, as tests of side effects watch all files of this process; who learns does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", f"{STATE.name}/learned-{next(NUMBERS)}")
        yield


@pytest.fixture(scope="module", autouse=True)
def _file_of_tests_knows_nothing() -> Iterator[None]:
    with _nothing_learned():
        yield


@pytest.fixture(autouse=True)
def _test_knows_nothing() -> Iterator[None]:
    with _nothing_learned():
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The directory of the shipped model."""
    return TINY


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of the session's own."""
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; a user's machine has none."""
    if not SHARED.is_dir():
        pytest.skip(f"REAL DATA ABSENT: {SHARED} does not exist, so this check on real data did not run")
    return SHARED


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]


def _environment(state: Path | None, own: Mapping[str, str] = os.environ) -> dict[str, str]:
    nowhere = tempfile.mkdtemp(dir=STATE.name)
    return {**own, "COLUMNS": "120", "XDG_STATE_HOME": str(state or nowhere)}


@pytest.fixture(scope="session")
def cli() -> Iterator[Cli]:
    """Run `edge-agent` with arguments, as its own process; `state` is where it finds what other runs have taught it, if not nowhere.

    `own` is its environment, if not that of the tests.

    The process has its libraries from one that has imported them already (warm.py).
    """
    warm: list[subprocess.Popen[str]] = []

    def run(*arguments: object, cwd: Path | None = None, state: Path | None = None, own: Mapping[str, str] = os.environ) -> Ran:
        if not warm:
            command = [sys.executable, str(ROOT / "tests" / "warm.py")]
            warm.append(subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True))
        process = warm[0]
        assert process.stdin is not None
        assert process.stdout is not None
        environment = _environment(state, own)
        out, err = (Path(environment["XDG_STATE_HOME"]) / name for name in ("out", "err"))
        for file in (out, err):
            file.touch()
        request = {"arguments": [*map(str, arguments)], "environment": environment, "directory": str(cwd or Path.cwd())}
        process.stdin.write(json.dumps(request | {"out": str(out), "err": str(err)}) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], DEADLINE_S)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            warm.clear()
            raise TimeoutError(f"{arguments} took longer than {DEADLINE_S} s: {out.read_text()}{err.read_text()}")
        return Ran(int(process.stdout.readline()), out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    yield run
    for process in warm:
        process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="session")
def cold_cli() -> Cli:
    """Like `cli`, where the memory of the process is what is tested: it imports its own libraries."""

    def run(*arguments: object, state: Path | None = None) -> Ran:
        command = [sys.executable, "-m", "edge_agent", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(state), timeout=DEADLINE_S, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


def write_lines(path: Path, *lines: object) -> Path:
    """Write lines: bytes as they are, anything else as JSON."""
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def write_domain(path: Path, family: str, count: int, seed: int) -> Path:
    """Write problems of a family as a dataset."""
    from edge_agent.demo.problems import problems

    rows = [{"question": p.question, "answer": p.answer} for p in islice(problems(family, seed), count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "judge.key"
    file.touch(mode=0o600)
    file.write_text(f"{KEY}\n")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright. Of a module: while it is there no other test of the process can run an event loop."""
    if find_spec("playwright") is None:
        lack(ABSENT.format("Playwright is not installed"))
    playwright = import_module("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        lack(ABSENT.format("there is no Chromium; `apt-get install chromium`"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )  # fmt: skip
        yield browser
        browser.close()
