"""The coordinator's pages in a real browser: who gets in, what they show and do, and that text stays text."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from api_server import INFO, ApiServer
from conftest import write_lines
from fleet import DEADLINE_S, QUICK, Fleet, free_port, wait_for
from orders import NODE

from edge_agent.coordinator.pages import WEB
from edge_agent.coordinator.rollout import Abort
from edge_agent.coordinator.views import JobFilter
from edge_agent.dataset import file_sha256
from edge_agent.errors import JobSchema
from edge_agent.job import Dataset, Job, NlftOptions, Schedule
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.messages import (
    Artifact,
    Heartbeat,
    JobProgress,
    JobResult,
    JobStatus,
    NodeInfo,
    NodeLimits,
    NodeState,
    OptionsState,
    StageDone,
    encode,
    new_id,
)
from edge_agent.report import (
    Accuracy,
    Adapter,
    Data,
    Energy,
    Event,
    Example,
    Judgments,
    Measured,
    Miss,
    Model,
    Paired,
    PassAtK,
    Repairs,
    Result,
)
from edge_agent.saliency import Saliency, SaliencyRecord
from edge_agent.sizes import parse_size
from profiles.recorder import StageRow
from profiles.sensors import Reading, Resources
from quantization.plan import Plan, StagePlan

MIB = 2**20

ABSENT = Reading(None, "no sensor")
HOSTILE = (
    "</td><script>globalThis.struck = 1</script>", "<img src=x onerror='globalThis.struck = 1'>", '"><svg onload="globalThis.struck = 1">',
    "javascript:globalThis.struck = 1", "${globalThis.struck = 1}", "&lt;b&gt;",
)  # fmt: skip
NASTY = "".join(HOSTILE)


class Coordinator(ApiServer):
    """With a fleet of which a test can say anything."""

    def say(self, node: str, kind: str, data: object, *parts: str) -> None:
        """Take in what any node says."""
        self.call(lambda: self.service._receive_up(node, [kind, *parts], encode(data, "test"), False))

    def beat(self, node: str, queue: int = 0, job: str | None = None, temperature: float | None = None, trainer: int | None = None) -> None:
        reading = Reading(temperature) if temperature is not None else ABSENT
        resources = Resources(ABSENT, ABSENT, 2**32, 2**36, 2**30, trainer, ABSENT, reading, Reading(13.25))
        self.say(node, "heartbeat", Heartbeat(resources, queue, job))


class Opened:
    """A page of a coordinator, with everything that it complained of."""

    def __init__(self, browser: Any, coordinator: ApiServer | At, at: str = "#/", scope: str | None = "admin", **options: Any) -> None:
        settings = {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light", "ignore_https_errors": True}
        self.context = browser.new_context(**settings | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.coordinator = coordinator
        self.page.goto(f"{coordinator.url}/{at}")
        if scope is not None:
            self.sign_in(coordinator.secrets[scope])
            self.page.wait_for_selector(".top")

    def sign_in(self, secret: str) -> None:
        self.page.fill("#token", secret)
        self.page.click("text=Sign in")

    def go(self, at: str) -> None:
        self.page.evaluate(f"location.hash = {at!r}")

    def wait(self, condition: str, deadline_s: float = 20) -> None:
        """Wait until a script says so; what Playwright has for that evaluates texts in the page, which its policy refuses."""
        wait_for(f"{condition}; {self.complaints}", lambda: self.page.evaluate(f"Boolean({condition})"), deadline_s)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator with three nodes: one that works, one of hostile texts, one that is lost."""
    with ExitStack() as ends:
        served = Coordinator(tmp_path_factory.mktemp("pages"), ends)
        served.say(NODE, "state", NodeState("ready", 1, 1, 0))
        served.beat(NODE, temperature=61.0)
        served.say("hostile", "state", NodeState("draining", 1, 1, 0))
        labels = {"site": NASTY[:64]}
        told = NodeInfo(NASTY, NASTY, NASTY, "cpu", None, {"tiny": "0" * 64}, INFO.limits, {NASTY: NASTY}, labels)
        served.say("hostile", "info", told)
        served.say("away", "state", NodeState("ready", 1, 1, 0))
        served.say("away", "state", NodeState("lost", 1, 1, 0))
        yield served


def test_pages_are_for_anyone_and_may_do_little(coordinator: Coordinator) -> None:
    """Without a token there are the pages' own files and nothing else, each with a policy that lets them run those files and ask the
    coordinator; answers of the API keep the one that lets nothing run."""
    for path in ("", "saliency"):
        _check_document(coordinator, path)


def _check_document(coordinator: Coordinator, path: str) -> None:
    got = coordinator.ask("GET", f"{coordinator.url}/{path}", None)
    assert (got.status_code, got.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = got.headers["content-security-policy"]
    wanted = {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"}
    assert wanted <= set(policy.split("; "))
    assert "unsafe" not in policy
    assert "set-cookie" not in got.headers
    assert "<script>" not in got.text
    assert "style=" not in got.text
    for name in re.findall(r"/web/([\w.]+)", got.text):
        file = coordinator.ask("GET", f"{coordinator.url}/web/{name}", None)
        assert file.content == (WEB / name).read_bytes()
        assert file.headers["content-security-policy"] == policy
        assert (file.headers["cache-control"], file.headers["x-content-type-options"]) == ("no-cache", "nosniff")
        kept = coordinator.ask("GET", f"{coordinator.url}/web/{name}", None, headers={"If-None-Match": file.headers["etag"]})
        assert (kept.status_code, kept.content) == (304, b"")
    for name in ("document.py", "pages.html", "nothing.js", "..%2Fcli.py", "%2Fetc%2Fpasswd", ".js", "__init__.py"):
        assert coordinator.ask("GET", f"{coordinator.url}/web/{name}", None).status_code in (400, 404), name
    answer = coordinator.ask("GET", "/nodes", "read")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; frame-ancestors")
    assert answer.headers["cache-control"] == "no-store"


def test_nothing_of_the_pages_is_from_elsewhere() -> None:
    """No script, style or font of another host, no inline style, no markup from a string: what the policy forbids is not even tried."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|cookie"
    for file in [*WEB.glob("*.js"), *WEB.glob("*.css"), *WEB.glob("*.html")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file.name
        assert not re.search(forbidden, text), file.name


def test_who_has_a_token_gets_in(browser: Any, coordinator: Coordinator) -> None:
    """A wrong token is told so; a good one is kept for the tab alone, in no cookie and no address; a revoked one leads back to the door."""
    with Opened(browser, coordinator, scope=None) as opened:
        opened.sign_in("nobody.x")
        opened.page.wait_for_selector("[role=alert]:not(:empty)")
        assert "does not know this token" in opened.text("[role=alert]")
        guest = coordinator.call(lambda: coordinator.service.access.new("guest", "read", None))
        opened.sign_in(f" {guest.secret} ")
        opened.page.wait_for_selector("td")
        assert opened.context.cookies() == []
        assert opened.page.url == f"{coordinator.url}/#/"
        opened.page.reload()
        opened.page.wait_for_selector("td")
        other = opened.context.new_page()
        other.goto(coordinator.url)
        other.wait_for_selector("#token")
        assert not opened.page.is_visible("text=New job")  # its scope is `read`
        coordinator.call(lambda: coordinator.service.access.revoke("guest"))
        opened.go("#/jobs")
        opened.page.wait_for_selector("#token")
        assert "expired or was revoked" in opened.text("[role=alert]")
        assert opened.page.evaluate("sessionStorage.length") == 0


def test_fleet_is_shown_as_it_happens(browser: Any, coordinator: Coordinator) -> None:
    """Every node with its state, device and resources; what a node says is there without a reload; some of them can be found."""
    with Opened(browser, coordinator) as opened:
        row = f"tr:has(a[href='#/nodes/{NODE}'])"
        opened.page.wait_for_selector(row)
        assert [opened.page.inner_text(f"{row} td:nth-child({n})") for n in (3, 5, 6, 7)] == ["some device", "61 °C", "13.3 W", "0"]
        opened.wait("document.querySelector('.standing.live')")
        job = new_id()
        coordinator.beat(NODE, queue=3, job=job, temperature=72.0, trainer=2**29)
        opened.wait(f"document.querySelector(\"a[href='#/jobs/{job}']\")")
        assert "512 MiB of 1 GiB" in opened.text(row)
        progress = JobProgress(Event(event="progress", time=1.0, stage="train", done=7, total=90), [], _resources())
        with pytest.MonkeyPatch.context() as patch:  # a job that only the node knows has no progress to tell
            patch.setattr(coordinator.service, "_progress", lambda _n, j, p: coordinator.service._audience.progress(j, p))
            coordinator.hear("job", progress, job, "progress")
        opened.wait("document.body.innerText.includes('train 7 of 90')")
        coordinator.say("away", "state", NodeState("ready", 2, 1, 0))
        opened.wait("document.querySelector('.chips').innerText.includes('ready 2')")
        coordinator.say("away", "state", NodeState("lost", 2, 1, 0))
        opened.page.keyboard.press("/")
        opened.page.keyboard.type("hostil")
        opened.wait("document.querySelectorAll('tbody tr').length === 1")
        opened.page.fill("input[type=search]", "")
        opened.page.click(".chips button:has-text('lost')")
        assert "away" in opened.text("tbody")
        assert opened.page.locator("tbody tr").count() == 1
        assert opened.complaints == []


def test_a_tab_that_nobody_looks_at_holds_no_connection(browser: Any, coordinator: Coordinator) -> None:
    """It is closed as the tab is hidden; when the tab is looked at again what was missed is there."""
    hide = """(hidden) => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    audience = coordinator.service._audience
    wait_for("nobody listens", lambda: audience.size == 0)
    with Opened(browser, coordinator) as opened:
        opened.page.wait_for_selector("td")
        wait_for("the page listens", lambda: audience.size == 1)
        opened.page.evaluate(hide, True)
        wait_for("nobody listens", lambda: audience.size == 0)
        coordinator.beat(NODE, queue=9)
        opened.page.evaluate(hide, False)
        opened.wait(f"document.querySelector(\"tr:has(a[href='#/nodes/{NODE}'])\").innerText.includes('9')")
        opened.go("#/new")
        wait_for("nobody listens", lambda: audience.size == 0)
        coordinator.beat(NODE)
        assert opened.complaints == []


def _resources() -> Resources:
    return Resources(ABSENT, ABSENT, 2**32, 2**36, 2**30, 2**29, ABSENT, ABSENT, Reading(20.0))


def test_a_node_has_a_page_and_can_be_drained(browser: Any, coordinator: Coordinator) -> None:
    """All that it says of itself, with the reasons of what is missing; draining asks first, and takes the scope `admin`."""
    with Opened(browser, coordinator, f"#/nodes/{NODE}") as opened:
        opened.page.wait_for_selector(".facts")
        assert "no sensor" in opened.text("main")
        opened.page.click("text=Drain")
        opened.page.click("dialog >> text=Leave it")
        opened.page.click("text=Drain")
        opened.page.click("dialog button.danger")
        opened.page.wait_for_selector("button:has-text('Resume')")
        assert coordinator.call(lambda: coordinator.service._store.node(NODE).drain) is True  # type: ignore[union-attr]
        opened.page.click("button:has-text('Resume')")
        opened.page.click("dialog button.danger")
        opened.page.wait_for_selector("button:has-text('Drain')")
    with Opened(browser, coordinator, f"#/nodes/{NODE}", "submit") as opened:
        opened.page.wait_for_selector(".facts")
        assert not opened.page.is_visible("text=Drain")


def _report(**changes: Any) -> bytes:
    """A report of a job, whose texts are hostile."""
    stages = [
        StageRow(stage="load", seconds=2.0, peak_bytes=300 * MIB, planned_bytes=400 * MIB),
        StageRow(
            stage="train", seconds=8.0, tokens=4000, peak_bytes=700 * MIB, planned_bytes=650 * MIB, energy_j=96.0, energy_source="ina3221"
        ),
    ]
    plan = Plan(NASTY, 4, 1024, False, 8, 2**29, (StagePlan("load", 1, 1),))
    measured = Measured(
        before=Accuracy(0.131, 0.111, 0.155, 300), after=Accuracy(0.949, 0.932, 0.962, 300), paired=Paired(246, 1, 0.0, 0.818, 0.77, 0.85),
        pass_before=[PassAtK(2, 0.2, 0.1, 0.3)],
    )  # fmt: skip
    result = Result(
        job="0" * 64, state="succeeded", method="nlft", seed=42, device=NASTY, versions={NASTY: NASTY}, model=Model(NASTY, "0" * 64, 2048),
        data=Data("0" * 64, 50, 200, 300, 120, 80, 0, Repairs(80, 70, 60), Judgments(critic=80), 250, 0.06), plan=plan,
        misses=[Miss("train", NASTY, 1, NASTY)], kernel="bitsandbytes", budget_bytes=600 * MIB, peak_bytes=700 * MIB, stages=stages,
        seconds=10.0, tokens_per_s=500.0, energy=Energy("ina3221", 96.0, 0.5), updates=3, losses=[0.9, 0.5, 0.25], kept_update=3,
        development_losses=[0.7, 0.6], accuracy=measured, accepted=True, acceptance=NASTY, adapter=Adapter("0" * 64, 1, 1000),
        examples=[Example(NASTY, NASTY, f"{NASTY}\nsecond line\u202e", NASTY, False, True), Example("q", "a", "b", "c", None, None)],
    )  # fmt: skip
    return msgspec.json.encode(msgspec.structs.replace(result, **changes))


def _running(coordinator: Coordinator, sha256: str) -> str:
    """Hand in a job and bring it to its training."""
    job = coordinator.submit(sha256)
    phases: tuple[Any, ...] = ("accepted", "staging", "ready", "running")
    for phase in phases:
        coordinator.hear("job", JobStatus(job.digest, phase), job.id, "status")
    return job.id


def _end(
    coordinator: Coordinator, job: str, report: bytes | None, outcome: Any = "succeeded", saliency: bytes | None = None, **more: Any
) -> None:
    """End a job as its node would."""
    artifacts: tuple[Artifact, ...] = ()
    files: tuple[tuple[Any, bytes | None], ...] = (("result.json", report), ("saliency.json", saliency))
    for name, data in files:
        if data is not None:
            sha256 = hashlib.sha256(data).hexdigest()
            coordinator.service.files.put(data, sha256)
            artifacts += (Artifact(name, sha256, len(data)),)
    digest = coordinator.call(lambda: coordinator.service.job(job)).digest
    coordinator.hear("job", JobResult(digest, outcome, artifacts=artifacts, **more), job, "result")


def test_a_map_of_hostile_tokens_stays_text(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """What a node writes as the Saliency Map of a job is shown under the pages' policy; one that is broken, or is none, is said."""
    tokens, scores = [*HOSTILE], [-0.5] * len(HOSTILE)
    record = SaliencyRecord(NASTY, False, "incorrect", NASTY, NASTY, NASTY, tokens, *[scores] * 5, None, [])
    job, broken, sft = (_running(coordinator, dataset) for _ in range(3))
    _end(coordinator, job, _report(), saliency=msgspec.json.encode(Saliency(1, NlftOptions(), 0, [record])))
    _end(coordinator, broken, _report(), saliency=b'{"records": 1}')
    _end(coordinator, sft, _report())
    with Opened(browser, coordinator, f"#/jobs/{job}", "read") as opened:
        page = opened.page
        page.click("a.button:has-text('Saliency Map')")
        opened.wait("globalThis.saliencyMap")
        assert page.locator(".flow .t").all_inner_texts() == tokens
        assert NASTY in opened.text("main.answer")
        assert page.locator("text=Newer scores").is_hidden()
        assert (page.evaluate("globalThis.struck"), opened.complaints) == (None, [])
        for other, says in ((broken, "cannot be shown"), (sft, "has left no Saliency Map"), ("../jobs", "")):
            page.goto("about:blank")
            page.goto(f"{coordinator.url}/saliency#{other}")
            opened.wait(f"document.querySelector('.waiting, .stands')?.innerText.includes({json.dumps(says)})")
            assert page.evaluate("globalThis.saliencyMap") is None
        assert page.evaluate("globalThis.struck") is None


def _progress(coordinator: Coordinator, job: str, done: int, **more: Any) -> None:
    event = Event(
        event="progress", time=1000.0 + 2 * done, stage="train", done=done, total=40, memory_bytes=512 * MIB, budget_bytes=600 * MIB
    )
    finished = [StageDone("load", 2.0, 300 * MIB)]
    coordinator.hear("job", JobProgress(msgspec.structs.replace(event, **more), finished, _resources()), job, "progress")


@pytest.fixture(scope="module")
def dataset(coordinator: Coordinator) -> str:
    file = write_lines(coordinator.root / "data.jsonl", {"question": "How many?", "answer": "#### 1"})
    coordinator.client("submit").upload(file, file_sha256(file))
    return file_sha256(file)


def test_everything_is_done_by_keyboard(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """Signing in, going from page to page, past the links at the top, and out of a question without an answer to it."""
    job = coordinator.submit(dataset).id
    with Opened(browser, coordinator, scope=None) as opened:
        press, focused = opened.page.keyboard.press, "document.activeElement.textContent"
        opened.page.keyboard.type(coordinator.secrets["submit"])  # the field has the focus
        press("Enter")
        opened.page.wait_for_selector("td")
        assert opened.page.evaluate("document.activeElement.id") == "main"
        press("Tab")
        assert opened.page.evaluate("document.activeElement.type") == "search"
        for _ in range(8):
            press("Shift+Tab")
        assert opened.page.evaluate(focused) == "Skip to the page"
        assert opened.page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        for _ in range(3):
            press("Tab")
        assert opened.page.evaluate(focused) == "Jobs"
        press("Enter")
        opened.wait("location.hash === '#/jobs'")
        opened.page.wait_for_selector("tbody a")
        opened.page.focus(f"a[href='#/jobs/{job}']")
        press("Enter")
        opened.page.wait_for_selector(".timeline li")
        assert opened.page.title() == f"Job {job} · Edge agent"
        opened.page.focus("text=Cancel")
        press("Enter")
        opened.page.wait_for_selector("dialog[open]")
        assert opened.page.evaluate(focused) == "Leave it"
        press("Escape")
        opened.wait("document.querySelector('dialog') === null")
        assert coordinator.call(lambda: coordinator.service.job(job)).phase == "created"
        assert opened.complaints == []


def test_a_job_is_shown_while_it_runs_and_when_it_has_ended(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """Phases, the stage at work with its curves live, then without a reload the report: accuracy with intervals, stages with planned and
    measured memory, losses, examples, what the node said, files that can be downloaded."""
    job = _running(coordinator, dataset)
    for done in range(1, 3):
        _progress(coordinator, job, done, loss=1.0 / done, tokens_per_s=100.0 * done)
    with Opened(browser, coordinator, f"#/jobs/{job}", "submit") as opened:
        opened.wait("document.querySelectorAll('.timeline li').length === 5")
        opened.wait("document.querySelectorAll('.chart').length === 4")  # what was told before it was opened
        for done in range(3, 5):
            _progress(coordinator, job, done, loss=1.0 / done, tokens_per_s=100.0 * done)
        opened.wait("document.body.innerText.includes('4 of 40')")
        assert "about 72 s" in opened.text("main")  # two seconds an update
        sent = coordinator.call(lambda: coordinator.service.send_options(job, {"correct_threshold": 0.5}))
        opened.wait("document.querySelector('.facts').innerText.includes('1 sent, none taken yet')")
        coordinator.hear("job", JobStatus(sent.digest, "running", options=OptionsState(1, 1, 4)), job, "status")
        opened.wait("document.querySelector('.facts').innerText.includes('1 sent, 1 taken after 4 updates')")
        charts = opened.page.locator(".chart figcaption").all_inner_texts()
        assert [text.split("\n") for text in charts] == [
            ["Loss", "0.250 · update 4"], ["Tokens/s", "400 · train"], ["Power", "20 W · train"], ["Memory", "512 MiB · train"],
        ]  # fmt: skip
        assert "load" in opened.text("table[aria-label=Stages]")
        opened.page.focus(".chart svg")
        opened.page.keyboard.press("Home")
        assert opened.text(".chart output") == "1.000 at 1 · update 1"
        opened.page.keyboard.press("ArrowRight")
        assert opened.text(".chart output") == "0.500 at 2 · update 2"
        assert opened.page.get_attribute(".chart svg", "aria-label") == "Loss over updates: 0.500 at 2 · update 2"
        report = _report()
        _end(coordinator, job, report, seconds=10.0, peak_bytes=700 * MIB, accepted=True)
        opened.page.wait_for_selector(".example")
        assert opened.page.locator(".intervals .value").all_inner_texts()[:2] == ["13.1 % [11.1, 15.5]", "94.9 % [93.2, 96.2]"]
        assert "+81.8 points [+77.0, +85.0] on the same questions: 246 gained, 1 lost, p < 0.001." in opened.text("main")
        stages = opened.page.locator("table[aria-label=Stages] tbody tr").all_inner_texts()
        assert [re.sub(r"\s+", " ", text).strip() for text in stages] == [
            "load 2.0 s 300 MiB of 400 MiB planned", "train 8.0 s 4,000 500 96 J 700 MiB of 650 MiB planned",
        ]  # fmt: skip
        assert opened.page.locator(".bar-of.over").count() == 1
        assert opened.text(".chart output").startswith("0.250")
        assert opened.page.locator("table[aria-label='What the node said'] tbody tr").count() == 6
        assert opened.text(".standing") == ""
        with opened.page.expect_download() as download:
            opened.page.click("button:has-text('result.json')")
        assert Path(download.value.path()).read_bytes() == report
        assert download.value.suggested_filename == f"{job}-result.json"
        opened.page.reload()
        opened.page.wait_for_selector(".example")
        titles = ["Loss", "Tokens/s", "Power", "Memory", "Loss on development records"]
        assert opened.page.locator(".chart figcaption span").all_inner_texts() == titles
        assert opened.complaints == []


def test_hostile_text_stays_text(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """Whatever a node, a dataset or a model says is shown as it is, on every page, and is no markup, no script and no link."""
    job = _running(coordinator, dataset)
    _progress(coordinator, job, 1, event="out_of_memory", text=NASTY)
    with Opened(browser, coordinator) as opened:
        bad = "document.querySelectorAll('svg[onload], a[href^=javascript]').length"
        found = f"[globalThis.struck, document.scripts.length, document.images.length, {bad}]"
        for at, what in (("#/", "main"), ("#/nodes/hostile", ".facts >> nth=1"), (f"#/jobs/{job}", ".notice")):
            opened.go(at)
            opened.wait(f"document.querySelector('main').textContent.includes({json.dumps(HOSTILE[1])})")
            assert all(text in opened.text(what) for text in HOSTILE)
            assert opened.page.evaluate(found) == [None, 1, 0, 0]
        _end(coordinator, job, _report(), text=NASTY)
        opened.page.wait_for_selector(".example")
        assert opened.page.locator(".written").all_inner_texts()[2] == f"{NASTY}\nsecond line⟨202E⟩"
        assert opened.page.evaluate(found) == [None, 1, 0, 0]
        for at in ("#/jobs/" + "%3Cb%3E", "#/nodes/<img src=x onerror=alert(1)>", "#/jobs/%E0%A4%A", "#/nowhere", "#/constructor"):
            opened.go(at)
            opened.page.wait_for_selector("h1")
            assert opened.page.evaluate(found) == [None, 1, 0, 0]
        assert [text for text in opened.complaints if "404" not in text] == []


def test_jobs_are_canceled_and_run_again(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """Cancel asks first; an ended job is handed in again, and the new one says of which it is a retry; `read` may do neither."""
    job = coordinator.submit(dataset).id
    with Opened(browser, coordinator, f"#/jobs/{job}", "submit") as opened:
        opened.page.click("text=Cancel")
        opened.page.click("text=Leave it")
        assert coordinator.call(lambda: coordinator.service.job(job)).phase == "created"
        opened.page.click("text=Cancel")
        opened.page.click("dialog button.danger")
        opened.wait("document.querySelector('.headline').innerText.includes('canceled')")
        assert "it was canceled before it was offered" in opened.text("main")
        opened.page.click("text=Retry")
        opened.wait(f"!location.hash.endsWith({job!r})")
        opened.wait(f"document.querySelector(\"dd a[href='#/jobs/{job}']\")")
        again = opened.page.evaluate("location.hash").removeprefix("#/jobs/")
        assert coordinator.call(lambda: coordinator.service.job(again)).retry_of == job
    with Opened(browser, coordinator, f"#/jobs/{again}", "read") as opened:
        opened.page.wait_for_selector(".timeline li")
        assert opened.page.locator("button:visible").all_inner_texts() == ["◐", "Sign out"]


def test_jobs_are_listed_and_filtered(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """The newest first, a new one without a reload; by phase, outcome and node, which the address keeps; page by page."""
    with Opened(browser, coordinator, "#/jobs", "submit") as opened:
        opened.page.wait_for_selector("tbody tr")
        job = coordinator.submit(dataset).id
        opened.wait(f"document.querySelector('tbody tr a').hash === '#/jobs/{job}'")
        opened.page.select_option("[aria-label=outcome]", "canceled")
        opened.wait("[...document.querySelectorAll('tbody .mark')].every((e) => e.textContent.includes('canceled'))")
        assert opened.page.evaluate("location.hash") == "#/jobs?outcome=canceled"
        opened.page.reload()
        opened.page.wait_for_selector("tbody tr")
        assert opened.page.input_value("[aria-label=outcome]") == "canceled"
        opened.page.fill("input[type=search]", "nobody")
        opened.page.keyboard.press("Enter")
        opened.wait("document.body.innerText.includes('There is no such job')")
        known = coordinator.call(lambda: coordinator.service.job(job))
        have = len(coordinator.call(lambda: coordinator.service.jobs(JobFilter(), None, 1000)).items)
        for _ in range(101 - have):
            coordinator.call(lambda: coordinator.service.submit(NODE, known.order.job, 4, 60.0))
        opened.go("#/jobs")
        opened.wait("document.querySelectorAll('tbody tr').length === 100")
        opened.page.click("text=Show more")
        opened.wait("document.querySelectorAll('tbody tr').length === 101")


def test_rollouts_are_listed_shown_and_stopped(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """A new one comes up without a reload, its nodes and their jobs as they end; canceling asks first, and `read` may not."""

    later = itertools.count()

    def job_of(rollout: str) -> str:
        coordinator.call(lambda: coordinator.service._rollouts.tick(time.monotonic() + next(later)))  # as where there is a broker
        return str(coordinator.call(lambda: coordinator.service.rollout_nodes(rollout, None, 1)).items[0].job)

    first = coordinator.roll_out(dataset).id
    job_of(first)
    with Opened(browser, coordinator, "#/rollouts", "submit") as opened:
        opened.wait(f"document.querySelector('tbody tr a')?.hash === '#/rollouts/{first}'")
        second = coordinator.roll_out(dataset).id
        job_of(second)
        opened.wait(f"document.querySelector('tbody tr a').hash === '#/rollouts/{second}'")
        assert opened.page.get_attribute("tbody tr .bar-of", "aria-label") == "1 open"
        opened.page.click("tbody tr a")
        opened.wait(f"document.querySelector('tbody .job a')?.hash === '#/jobs/{job_of(second)}'")
        opened.page.click("text=Cancel all")
        opened.page.click("text=Leave it")
        assert coordinator.call(lambda: coordinator.service.rollout(second)).state == "running"
        opened.page.click("text=Cancel all")
        opened.page.click("dialog button.danger")
        opened.wait("document.querySelector('.headline').innerText.includes('canceled')")
        opened.wait("document.querySelector('tbody .state').innerText.includes('canceled')")
        opened.go(f"#/rollouts/{first}")
        opened.wait(f"document.querySelector('tbody .job a')?.hash === '#/jobs/{job_of(first)}'")
        _end(coordinator, job_of(first), None)
        job_of(first)
        opened.wait("document.querySelector('.headline').innerText.includes('completed')")
        assert "1 succeeded" in opened.text(".headline")
        opened.go("#/rollouts/01ARZ3NDEKTSV4RRFFQ69G5FAV")
        opened.wait("document.querySelector('.told').innerText.includes('there is no rollout')")
        assert [text for text in opened.complaints if "404" not in text] == []
    with Opened(browser, coordinator, f"#/rollouts/{first}", "read") as opened:
        opened.page.wait_for_selector("tbody .job a")
        assert opened.page.locator("button:visible").all_inner_texts() == ["◐", "Sign out"]


def _field(opened: Opened, label: str) -> Any:
    return opened.page.locator(f"label:has(> span:text-is({json.dumps(label)})) > :is(input, select, textarea)")


def test_a_job_is_submitted_from_the_form(browser: Any, coordinator: Coordinator, tmp_path: Path) -> None:
    """A file is uploaded and what is in it is shown, one with wrong lines is not taken; what the form sends is the document that it shows,
    with every field that was filled in; what the coordinator refuses is said beside the button."""
    coordinator.say("able", "state", NodeState("ready", 1, 1, 0))
    able = NodeInfo("0.1.0", "3.11", "a device", "cpu", None, {"tiny": "0" * 64, "absent": None}, NodeLimits(2**30, 1000, 2), {})
    coordinator.say("able", "info", able)
    coordinator.beat("able")
    good = write_lines(tmp_path / "good <b>.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(12)))
    bad = write_lines(tmp_path / "bad.jsonl", {"question": "x", "answer": "#### 1"}, {NASTY: 1})
    with Opened(browser, coordinator, "#/new", "submit") as opened:
        page = opened.page
        page.wait_for_selector(".checks li")
        page.click("button:has-text('Submit')")
        opened.wait("document.querySelector('.told').textContent !== ''")
        _field(opened, "Node").select_option("able")
        assert _field(opened, "Model").locator("option:enabled").all_inner_texts() == ["tiny"]
        assert _field(opened, "Memory budget").input_value() == "1GiB"
        page.set_input_files("[aria-label='Dataset: a file']", bad)
        page.wait_for_selector(".notice.wrong")
        assert "1 wrong line, so it is not kept" in opened.text(".notice.wrong")
        wrong = opened.text("table[aria-label='Wrong lines']")
        assert "line 2\tObject contains an unknown field (it takes `answer`" in wrong
        assert not any(text in wrong for text in HOSTILE), "nothing of a dataset is quoted"
        page.set_input_files("[aria-label='Dataset: a file']", good)
        page.wait_for_selector(".found .facts")
        assert opened.text(".dataset select option:checked").startswith("good <b>.jsonl, 12 records")
        assert "#### " not in opened.text(".found")
        _field(opened, "Memory budget").fill("2 GiB")
        assert opened.page.locator(".checks .ill").all_inner_texts() == ["▲it lends 1 GiB, the budget is 2 GiB"]
        page.click("button:has-text('Submit')")
        opened.wait("document.querySelector('.told').textContent.includes('able lends')")
        _field(opened, "Memory budget").fill("1GiB")
        _field(opened, "Epochs").fill("x")
        page.click("button:has-text('Submit')")
        opened.wait("document.querySelector('.told').textContent === 'Epochs: x is no number'")
        _field(opened, "Epochs").fill("5")
        _field(opened, "Learning rate").fill("0.002")
        _field(opened, "Method").select_option("released")
        page.click("summary:has-text('Further')")
        further = _field(opened, "One field=value a line, by their names in the job document")
        further.fill("schedule.warmup=2")
        page.click("button:has-text('Submit')")
        opened.wait("document.querySelector('.told').textContent.includes('job.schedule.warmup')")
        further.fill("schedule.warmup=0.25\nprompts=plain")
        page.click("summary:has-text('Job document')")
        shown = json.loads(opened.text("form pre"))
        page.click("button:has-text('Submit')")
        page.wait_for_selector(".timeline li")
        order = coordinator.call(lambda: coordinator.service.jobs(JobFilter(), None, 1)).items[0].order
        assert order.job == msgspec.convert(shown, Job)
        wanted = Job(
            model="tiny", dataset=Dataset(file_sha256(good)), budget_bytes=1024 * MIB, method=NlftOptions.released(), prompts="plain",
            schedule=Schedule(epochs=5, learning_rate=0.002, warmup=0.25),
        )  # fmt: skip
        assert (order.job, order.priority) == (wanted, 4)
        page.click("text=Rerun with changes")
        page.wait_for_selector(".found .facts")
        _field(opened, "Seed").fill("7")
        _field(opened, "Epochs").fill("")
        _field(opened, "Priority").select_option("9")
        page.click("button:has-text('Submit')")
        page.wait_for_selector(".timeline li")
        again = coordinator.call(lambda: coordinator.service.jobs(JobFilter(), None, 1)).items[0].order
        schedule = msgspec.structs.replace(wanted.schedule, epochs=3)
        assert (again.job, again.priority) == (msgspec.structs.replace(wanted, seed=7, schedule=schedule), 9)
        assert opened.page.evaluate("globalThis.struck") is None


def test_a_rollout_is_begun_from_the_form(browser: Any, coordinator: Coordinator, tmp_path: Path) -> None:
    """Who would get it stands below the form before anything is made; the best node gets a job likewise."""
    for node, site in (("north-1", "north"), ("north-2", "north"), ("south-1", "south")):
        told = msgspec.structs.replace(INFO, models={"many": "0" * 64}, labels={"site": site, "note": NASTY[:64]})
        coordinator.say(node, "state", NodeState("ready", 1, 1, 0))
        coordinator.say(node, "info", told)
    data = write_lines(tmp_path / "many.jsonl", *({"question": f"{n}, many?", "answer": f"#### {n}"} for n in range(12)))
    with Opened(browser, coordinator, "#/new", "submit") as opened:
        page = opened.page
        page.wait_for_selector(".checks li")
        _field(opened, "For").select_option("many")
        _field(opened, "Model").select_option("many")
        _field(opened, "Memory budget").fill("1GiB")
        page.set_input_files("[aria-label='Dataset: a file']", data)
        page.wait_for_selector(".found .facts")
        opened.wait("document.body.innerText.includes('3 nodes would get this job')")
        labels = _field(opened, "Nodes with the labels")
        labels.fill("site")
        page.click("button:has-text('Begin the rollout')")
        opened.wait("document.querySelector('.told').textContent.includes('site is no label')")
        for wrong in ("site=north, site=south", "__proto__=x"):
            labels.fill(wrong)
            opened.wait("!document.body.innerText.includes('3 nodes would get this job')")
            page.click("button:has-text('Begin the rollout')")
            opened.wait("document.querySelector('.told').textContent !== ''")
        labels.fill("site=west")
        opened.wait("document.querySelector('.notice.wrong')")
        labels.fill(" site = north ")
        _field(opened, "Jobs per minute").fill("5")
        _field(opened, "Stop above this share of failures, in %").fill("25")
        _field(opened, "Once so many have ended").fill("4")
        opened.wait("document.body.innerText.includes('2 nodes would get this job')")
        assert "south-1" in opened.text("table[aria-label=Not]")
        page.click("button:has-text('Begin the rollout')")
        opened.wait("location.hash.startsWith('#/rollouts/')")
        [made] = coordinator.call(lambda: coordinator.service.rollouts(None, None, 1)).items
        assert made.plan.job == Job(model="many", dataset=Dataset(file_sha256(data)), budget_bytes=1024 * MIB)
        assert (made.plan.selector.labels, made.plan.rate.maximum_per_minute) == ({"site": "north"}, 5)
        assert made.plan.abort == Abort(minimum_ended=4, threshold=0.25)
        opened.go("#/new")
        page.wait_for_selector(".checks")
        _field(opened, "For").select_option("best")
        _field(opened, "Model").select_option("many")
        _field(opened, "Memory budget").fill("1GiB")
        _field(opened, "Nodes with the labels").fill("site=south")
        page.set_input_files("[aria-label='Dataset: a file']", data)
        page.wait_for_selector(".found .facts")
        lost = []

        def lose(route: Any) -> None:
            lost.append((route.request.post_data_json["id"], route.fetch().json()["id"]))
            route.abort()

        page.route("**/v1/jobs", lose, times=1)
        page.click("button:has-text('Submit')")
        opened.wait("document.querySelector('.told').textContent !== ''")
        assert lost[0][0] == lost[0][1]
        assert coordinator.call(lambda: coordinator.service.jobs(JobFilter(), None, 1)).items[0].id == lost[0][0]
        opened.complaints.clear()
        page.click("button:has-text('Submit')")  # the same again is the same job
        page.wait_for_selector(".timeline li")
        assert page.evaluate("location.hash") == f"#/jobs/{lost[0][0]}"
        assert coordinator.call(lambda: coordinator.service.jobs(JobFilter(), None, 1)).items[0].node == "south-1"
        assert page.evaluate("globalThis.struck") is None


def test_presets_of_the_form_are_those_of_the_code(browser: Any, coordinator: Coordinator) -> None:
    """Each is a method of a job, with the options that the code has for it; defaults and sizes are read as the code reads them."""
    with Opened(browser, coordinator, "#/new", "submit") as opened:
        opened.page.wait_for_selector(".checks li")
        module = "import('/web/submit.js')"
        presets = opened.page.evaluate(f"{module}.then((m) => Object.entries(m.PRESETS).map(([name, preset]) => [name, preset.method]))")
        methods = {name: msgspec.convert(method, METHOD) for name, method in presets}
        assert methods.pop("released") == NlftOptions.released()
        assert methods == {type(method).__struct_config__.tag: type(method)() for method in methods.values()}
        assert set(methods) == {option.__struct_config__.tag for option in get_args(METHOD)}
        job = msgspec.to_builtins(Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=1))
        for name, shown in opened.page.evaluate(f"{module}.then((m) => m.FIELDS.map(([name, , shown]) => [name, shown]))"):
            value = functools.reduce(lambda part, key: part[key], name.split("."), job)
            assert (value is None and shown == "by epochs") or float(shown) == value, name
        [most] = re.findall(r"MOST_BYTES = ([\d* ]+);", (WEB / "dataset.js").read_text(encoding="utf-8"))
        assert math.prod(int(base) ** int(power or 1) for base, power in re.findall(r"(\d+)(?: \*\* (\d+))?", most)) == MAX_FILE_BYTES
        sizes = ["6GiB", " 900 MiB ", "5000000", "1.5kb", "3 gib", "GiB", "1 XB", "-1", "1e3", "", "1GiB constructor"]
        read = opened.page.evaluate(f"{module}.then((m) => {json.dumps(sizes)}.map(m.parseSize))")
        assert read == [_size(text) for text in sizes]


def _size(text: str) -> int | None:
    try:
        return parse_size(text)
    except JobSchema:
        return None


METHOD = next(field.type for field in msgspec.structs.fields(Job) if field.name == "method")


def test_jobs_are_compared(browser: Any, coordinator: Coordinator, dataset: str) -> None:
    """Chosen in the list: accuracy with intervals, time, memory and energy of each, and only the fields in which they differ."""
    jobs = [_running(coordinator, dataset) for _ in range(2)]
    _end(coordinator, jobs[0], _report())
    lower = Accuracy(0.5, 0.44, 0.56, 300)
    _end(coordinator, jobs[1], _report(seconds=200.0, accuracy=Measured(before=lower, after=lower), energy=Energy(reason="none")))
    with Opened(browser, coordinator, "#/jobs", "read") as opened:
        opened.page.wait_for_selector("td")
        for job in jobs:
            opened.page.check(f"[aria-label='Compare job {job}']")
        opened.page.click("text=Compare 2 jobs")
        opened.page.wait_for_selector(".intervals")
        assert opened.page.locator(".intervals .value").all_inner_texts() == ["94.9 % of 300", "50.0 % of 300"]
        rows = opened.page.locator("table[aria-label=Measures] tbody tr").all_inner_texts()
        assert [word in rows[0] for word in ("+81.8", "10 s", "700 MiB", "96 J")] == [True] * 4
        assert "3 min 20 s" in rows[1]
        assert "Their documents and their node are the same." in opened.text("main")
        opened.go(f"#/compare/{jobs[0]}/{new_id()}")
        opened.page.wait_for_selector(".notice.wrong")
        opened.go("#/compare/x")
        opened.wait("document.body.innerText.includes('Choose two jobs or more')")


def test_a_person_trains_a_model(browser: Any, tmp_path: Path) -> None:
    """The real stack, from the browser: a job is submitted, its curves are watched, its adapter is downloaded; the coordinator goes and
    comes again; another job is canceled while it trains."""
    port = free_port()
    with Fleet(coordinator=f"[api]\nport = {port}\n") as fleet:
        made = fleet.client.new_token("person", "submit", None)
        data, questions = fleet.data(), fleet.data("questions", 8, 9)
        with Opened(browser, At(f"http://127.0.0.1:{port}", {"submit": made.secret}), "#/new", "submit") as opened:
            page = opened.page
            page.wait_for_selector(".checks .well")
            page.set_input_files("[aria-label='Dataset: a file']", data)
            page.set_input_files("[aria-label='Evaluation questions: a file']", questions)
            _field(opened, "Method").select_option("sft")
            page.click("summary:has-text('Further')")
            settings = QUICK | {"sampling.outputs": 0, "schedule.updates": 12, "schedule.batch": 4, "evaluation.questions": 8}
            fields = {**settings, "evaluation.max_new_tokens": 30}
            further = _field(opened, "One field=value a line, by their names in the job document")
            further.fill("\n".join(f"{name}={value}" for name, value in fields.items()))
            opened.wait("document.querySelectorAll('.found .facts').length === 2")
            opened.wait("document.body.innerText.includes('It should fit: about')")
            budget = _field(opened, "Memory budget").input_value()
            _field(opened, "Memory budget").fill("100MiB")
            opened.wait("document.body.innerText.includes('raise --budget to at least')")
            _field(opened, "Memory budget").fill(budget)
            opened.wait("document.body.innerText.includes('It should fit: about')")
            page.click("button:has-text('Submit')")
            opened.wait("document.body.innerText.includes('Now: train')", DEADLINE_S)
            opened.wait("document.querySelector('.chart path.line')", DEADLINE_S)
            opened.wait("document.querySelector('.example')", DEADLINE_S)
            job = page.evaluate("location.hash").removeprefix("#/jobs/")
            view = fleet.client.job(job)
            assert view.outcome == "succeeded"
            assert view.result is not None
            measured = view.result.accuracy
            assert measured is not None
            assert measured.after is not None
            assert f"{100 * measured.after.value:.1f} %" in opened.text(".intervals")
            with page.expect_download() as download:
                page.click("button:has-text('adapter_model.safetensors')")
            assert Path(download.value.path()).read_bytes() == fleet.adapter(job)
            opened.go("#/")
            opened.wait("document.querySelector('.standing.live')")
            fleet.stop("coordinator")
            opened.wait("document.querySelector('.standing.broken')")
            fleet.start_coordinator()
            opened.wait("document.querySelector('.standing.live')", DEADLINE_S)
            opened.wait(f"document.querySelector(\"a[href='#/nodes/{NODE}']\")")
            assert {text for text in opened.complaints if "ERR_" not in text} == set()
            opened.complaints.clear()
            opened.go(f"#/jobs/{job}")
            page.click("text=Rerun with changes")
            page.wait_for_selector(".found .facts >> nth=1")
            _field(opened, "Updates").fill("500")
            page.click("button:has-text('Submit')")
            opened.wait("document.body.innerText.includes('Now: train')", DEADLINE_S)
            page.click("text=Cancel")
            page.click("dialog button.danger")
            opened.wait("document.querySelector('.headline').innerText.includes('canceled')", DEADLINE_S)
            opened.go("#/jobs")
            opened.wait("document.querySelectorAll('tbody input[type=checkbox]').length === 2")
            for box in page.locator("tbody input[type=checkbox]").all():
                box.check()
            page.click("text=Compare")
            page.wait_for_selector(".intervals")
            assert len(page.locator("table[aria-label=Measures] tbody tr").all()) == 2
            assert opened.complaints == []


@dataclass
class At:
    """Where a coordinator is, and who may get in."""

    url: str
    secrets: dict[str, str]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_and_everything_is_legible(browser: Any, coordinator: Coordinator, dataset: str, scheme: str) -> None:
    """From 390 to 1440 pixels no page scrolls sideways, nothing stands out of what holds it, and small text has a contrast of 4.5."""
    job = _running(coordinator, dataset)
    _progress(coordinator, job, 3, loss=0.5)
    _end(coordinator, job, _report(), accepted=False)
    other = _running(coordinator, dataset)
    _end(coordinator, other, None, "failed", reason="oom_predicted", text="x" * 1000)
    rollout = coordinator.roll_out(dataset).id
    with Opened(browser, coordinator, color_scheme=scheme) as opened:
        for at, ready in (
            ("#/", "td"), ("#/nodes/hostile", ".facts"), ("#/jobs", "td"), (f"#/jobs/{job}", ".example"), (f"#/jobs/{other}", ".notice"),
            (f"#/compare/{job}/{other}", ".intervals"), ("#/rollouts", "td"),
            (f"#/rollouts/{rollout}", "td"), (f"#/new?from={job}", ".found .facts"),
        ):  # fmt: skip
            opened.go(at)
            opened.page.wait_for_selector(ready)
            for width in (390, 800, 1180, 1440):
                opened.page.set_viewport_size({"width": width, "height": 844})
                assert opened.page.evaluate(OUT_OF_PLACE, width) == [], (at, width)
            assert opened.page.evaluate(CONTRAST) >= 4.5, at


OUT_OF_PLACE = """(width) => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(
    [...document.querySelectorAll('.app *')].filter((e) => {
        const { left, right, width: own } = e.getBoundingClientRect();
        const hidden = e.closest('.skip, thead, svg') || getComputedStyle(e).visibility === 'hidden';
        return own > 0 && !hidden && (left < -1 || right > width + 1);
    }).map((e) => `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`)
), 50)))"""

CONTRAST = """() => {
    const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const light = (colour) => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        const { backgroundColor } = getComputedStyle(e);
        return backgroundColor === 'rgba(0, 0, 0, 0)' && e.parentElement ? ground(e.parentElement) : backgroundColor;
    };
    return Math.min(...[...document.querySelectorAll('h1, h2, h3, small, .hint, a, dt, dd, .mark, th, td, .notice, button')]
        .filter((e) => e.checkVisibility()).map((e) => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        }));
}"""
