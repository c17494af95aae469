"""Errors that nobody expected: what is told of them elsewhere, and what stays on the machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import typer
from conftest import write_domain
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace

from edge_agent.cli.shared import explained
from edge_agent.errors import WHOLE_TEXT, OutOfMemory
from edge_agent.files import lock_file
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.report import Event
from edge_agent.runner import Trainer, TrainerEvent
from edge_agent.training.run import run_job

PRIVATE = "Jane Doe, born 1971"
DEADLINE_S = 120.0


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> JobDirectory:
    """A job that has not begun."""
    data = write_domain(tmp_path / "data.jsonl", "chain", 20, 1)
    made = JobDirectory(tmp_path / "job")
    made.create(build_job(str(tiny_model), data, None, {"budget_bytes": 2**30, "method.name": "sft", "device": "cpu"}, []), data, None)
    return made


def _missing_token() -> None:
    raise KeyError(PRIVATE)


def _panic() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.encode("a a a").truncate(1, stride=7)


def _no_such_file() -> None:
    Path(PRIVATE).read_bytes()


@pytest.mark.parametrize(
    ("fail", "kind", "what"),
    [
        (_missing_token, "KeyError", "KeyError"), (_panic, "PanicException", "PanicException"),
        (_no_such_file, "FileNotFoundError", r"FileNotFoundError \(No such file or directory\)"),
    ],
)  # fmt: skip
def test_error_that_nobody_expected(fail: Callable[[], None], kind: str, what: str, directory: JobDirectory) -> None:
    """Events and report have its type and the line of this program that it passed last, also of one that is no Exception, and nothing of
    its text; who runs the job gets it as it is."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.event == "stage_started":
            fail()

    with pytest.raises(BaseException) as raised:  # noqa: PT011
        run_job(directory, listen)
    assert type(raised.value).__name__ == kind
    result = directory.read_result()
    assert result is not None
    assert result.error is not None
    assert (result.state, result.error.code) == ("failed", "internal")
    assert re.fullmatch(rf"{what} at edge_agent/training/run\.py:[0-9]+; {WHOLE_TEXT}, or on standard error", result.error.text)
    assert (events[-1].event, events[-1].code, events[-1].text) == ("failed", "internal", result.error.text)
    assert PRIVATE not in directory.events.read_text()


def test_error_that_speaks_of_memory(directory: JobDirectory) -> None:
    """What is no lack of memory of the system or of PyTorch is not quoted, whatever its text says."""

    def listen(event: Event) -> None:
        if event.event == "stage_started":
            raise KeyError(f"{PRIVATE} cannot allocate memory")

    with pytest.raises(OutOfMemory, match=r"\(KeyError\)"):
        run_job(directory, listen)
    assert PRIVATE not in directory.events.read_text() + directory.result_file.read_text()


def test_whole_text_is_in_the_log_of_the_trainer(directory: JobDirectory, tmp_path: Path) -> None:
    """A real trainer leaves it there, for its owner alone; the agent reads type and place, and does not start it again."""
    (directory.path / ".key").mkdir()
    lock, events = lock_file(tmp_path / "trainer.lock"), SimpleQueue[Any]()
    assert lock is not None
    trainer = Trainer("j", directory.path, lock, 3600.0, 1, events, settings={"XDG_STATE_HOME": str(tmp_path / "state")})
    try:
        while isinstance(event := events.get(timeout=DEADLINE_S), TrainerEvent):
            trainer.hear(event.event)
        ending = trainer.ending(event.code)
    finally:
        trainer.kill()
        assert trainer.wait(DEADLINE_S)
    assert (ending.outcome, ending.reason, ending.again) == ("failed", "internal", False)
    assert re.match(r"IsADirectoryError \(Is a directory\) at edge_agent/job_directory\.py:[0-9]+; ", ending.text or "")
    log, place = directory.path / "trainer.log", str(directory.path / ".key")
    assert place not in (ending.text or "")
    assert "Traceback" in log.read_text()
    assert "[Errno 21] Is a directory" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_panic_ends_a_command_as_any_other_error(capfd: pytest.CaptureFixture[str]) -> None:
    """One line with its code and its text, its traceback, and the exit code of an internal error."""
    with pytest.raises(typer.Exit) as ended, explained(as_json=False):
        _panic()
    assert ended.value.exit_code == 1
    assert "error internal: PanicException: " in capfd.readouterr().err
