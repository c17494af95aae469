"""The Saliency Map of a job that trains: on its page, by the command, and gone with the end of the job."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from api_server import ApiServer
from conftest import Cli, write_lines
from fleet import DEADLINE_S, Fleet, free_port, wait_for
from orders import NODE
from test_pages import ABSENT, At, Opened

from edge_agent.coordinator import live_maps
from edge_agent.dataset import file_sha256
from edge_agent.errors import EdgeAgentError
from edge_agent.job import NlftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import Artifact, JobProgress, JobStatus, encode
from edge_agent.report import Change, Event, Result
from edge_agent.saliency import Saliency
from edge_agent.saliency_page import saliency_page
from edge_agent.topics import up
from edge_agent.training import saliency_scores
from edge_agent.training.saliency_scores import LiveMap
from profiles.sensors import Resources

LONG = {"schedule__updates": 400, "schedule__batch": 4, "evaluation__questions": 0, "sampling__outputs": 1, "method__references": "epoch"}
"""Until it is canceled."""


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def fleet(port: int) -> Iterator[Fleet]:
    with Fleet(coordinator=f"[api]\nport = {port}\n") as fleet:
        yield fleet
        fleet.check_messages()


def _steps(opened: Opened) -> int:
    return int(opened.page.evaluate("saliencyMap.table.steps.length"))


@pytest.mark.slow
def test_a_person_changes_options_while_it_trains(browser: Any, fleet: Fleet, port: int) -> None:
    """From the job's page to its map, a slider, and the trainer that takes the options; newer scores come, and what was chosen stays;
    with the end of the job the map is that of its result."""
    made = fleet.client.new_token("person", "submit", None)
    job = fleet.submit(fleet.data(count=12), **LONG | {"schedule__updates": 60}).id
    with Opened(browser, At(f"http://127.0.0.1:{port}", {"submit": made.secret}), f"#/jobs/{job}", "submit") as opened:
        page = opened.page
        page.click("a.button:has-text('Saliency Map')", timeout=1000 * DEADLINE_S)
        opened.wait("globalThis.saliencyMap", DEADLINE_S)
        opened.wait("document.querySelector('.stands').innerText.includes('of 60')")
        page.locator("[data-field=judge_base_ratio] input[type=range], .control:has-text('j/b') input[type=range]").first.fill("0.2")
        options = page.evaluate("saliencyMap.options()")
        ratio = options["judge_base_ratio"]
        assert ratio < 1.5
        page.click("text=Use these options")
        page.click("text=Send to the running job")
        opened.wait("document.querySelector('.stands').innerText.includes('1 taken after')", DEADLINE_S)
        page.click("dialog button:has-text('Close')")
        before = _steps(opened)
        page.click("text=Newer scores")
        opened.wait(f"saliencyMap.table.steps.length > {before}", DEADLINE_S)
        assert page.evaluate("saliencyMap.options()") == options
        view = fleet.ended(job)
        opened.wait("document.querySelector('.stands').innerText.startsWith('ended')")
        assert page.locator("text=Newer scores").is_hidden()
        page.click("text=Use these options")
        assert page.locator("text=Send to the running job").is_hidden()
        page.click("dialog button:has-text('Close')")
        assert opened.complaints == []
        page.click("text=‹ Job")
        page.wait_for_selector("button:has-text('saliency.json')")
    result = fleet.client.result(view)
    assert result is not None
    assert result.changes == [Change(1, result.changes[0].update, NlftOptions(references="epoch", judge_base_ratio=ratio))]
    saliency = msgspec.json.decode(fleet.client.saliency(job)[0], type=Saliency)
    assert saliency.options == NlftOptions(references="epoch")
    assert len(saliency.records[0].rescored) == _epochs(result, len(saliency.records))


def _epochs(result: Result, answers: int) -> int:
    """Epochs that were scored anew: all but the first."""
    return -(-result.updates * 4 // answers) - 1


@pytest.mark.slow
def test_a_map_comes_when_it_is_asked_for_and_goes_with_its_job(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    """By the command and on the node itself; nobody but who has asked makes the coordinator fetch one, and of a canceled job nothing
    stays."""
    job = fleet.submit(fleet.data("canceled", 12, 7), **LONG).id
    waiting = fleet.submit(fleet.data("waiting", 12, 8)).id
    other = fleet.submit(fleet.data("other", 12, 9), method__name="sft").id
    fleet.trained(job, 1)
    directory = JobDirectory(fleet.directory / "node" / "jobs" / job)
    assert not directory.saliency.exists()
    nobodys = Artifact("saliency.json", "ab" * 32, 1000)
    resources = Resources(ABSENT, ABSENT, 2**32, 2**36, 2**30, None, ABSENT, ABSENT, ABSENT)
    said = JobProgress(Event(time=0.0, event="progress", stage="train"), [], resources, nobodys)
    fleet.speak(up("default", NODE, "job", job, "progress"), encode(said, "test"))
    file = tmp_path / "map.html"
    ran = cli("saliency", job, "--html", file, "--config", fleet.config("coordinator"))
    assert (ran.code, ran.out.strip()) == (0, str(file)), ran.err
    assert b"saliency" in file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    wait_for("the scores of a second epoch", lambda: b'"rescored":[{' in saliency_page(directory, DEADLINE_S)[0])
    assert len(_maps(fleet)) == 1
    assert not [topic for _, topic, _ in fleet.messages if nobodys.sha256 in topic]
    with pytest.raises(EdgeAgentError, match=f"job {waiting} is ready"):
        fleet.client.saliency(waiting)
    with pytest.raises(EdgeAgentError, match="trains by sft"):
        fleet.client.saliency(other)
    for each in (other, waiting, job):
        fleet.client.cancel(each)
    fleet.ended(job)
    wait_for("the map to go", lambda: not _maps(fleet))
    with pytest.raises(EdgeAgentError, match=r"has no saliency\.json here"):
        fleet.client.saliency(job)


def _maps(fleet: Fleet) -> set[str]:
    """Maps of running jobs at the coordinator."""
    return {file.name for file in (fleet.directory / "coordinator" / "maps" / "sha256").iterdir()}


def test_a_trainer_writes_it_when_it_is_asked_and_no_more_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has been scored since, it only says so; what comes too soon waits."""
    directory, told, written = JobDirectory(tmp_path), [], []

    def contents() -> Iterator[bytes]:
        written.append(1)
        yield b"{}"

    parts = SimpleNamespace(rescorings=SimpleNamespace(added=0))
    live = LiveMap(directory, parts, contents, lambda kind, **_: told.append(kind))  # type: ignore[arg-type]

    def ask() -> tuple[int, int, bool]:
        directory.saliency_wanted.touch()
        live.look()
        return len(written), len(told), directory.saliency_wanted.exists()

    live.look()
    assert (written, told, directory.saliency.exists()) == ([], [], False)
    assert ask() == (1, 1, False)
    assert stat.S_IMODE(directory.saliency.stat().st_mode) == 0o600
    assert ask() == (1, 1, True)
    monkeypatch.setattr(saliency_scores, "MAP_PAUSE_S", 0.0)
    assert ask() == (1, 2, False)
    parts.rescorings.added = 1
    assert ask() == (2, 3, False)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ExitStack() as ends:
        yield ApiServer(tmp_path_factory.mktemp("maps"), ends)


def test_a_node_has_no_other_file_served_as_its_map(
    coordinator: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may name the dataset of somebody else, or a file of any size; a disk that does not take a map holds up nothing."""
    file = write_lines(tmp_path / "secret.jsonl", {"question": "Whose?", "answer": "#### 1"})
    secret = file_sha256(file)
    coordinator.client("submit").upload(file, secret)
    job = coordinator.submit(secret)
    phases: tuple[Any, ...] = ("accepted", "staging", "ready", "running")
    for phase in phases:
        coordinator.hear("job", JobStatus(job.digest, phase), job.id, "status")
    place, asks = f"/jobs/{job.id}/artifacts/saliency.json", lambda: coordinator.ask("POST", f"/jobs/{job.id}/saliency", "read")

    def tell(sha256: str, size_bytes: int) -> None:
        resources = Resources(ABSENT, ABSENT, 2**32, 2**36, 2**30, None, ABSENT, ABSENT, ABSENT)
        told = Artifact("saliency.json", sha256, size_bytes)
        coordinator.hear("job", JobProgress(Event(time=0.0, event="progress"), [], resources, told), job.id, "progress")

    assert asks().status_code == 202
    tell(secret, 10)
    tell("ab" * 32, 10)
    coordinator.call(coordinator.service._maps.tick)
    assert coordinator.ask("GET", place).status_code == 404
    assert coordinator.service.files.has(secret)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(live_maps, "Incoming", fails)
        tell("cd" * 32, 10)
    assert "map_given_up" in caplog.text
    assert asks().status_code == 202
    tell("cd" * 32, 2**40)
    refused = asks()
    assert (refused.status_code, "look at it on its node" in refused.text) == (409, True)
