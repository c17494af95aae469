"""The command line's side of the coordinator's API."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from edge_agent.config import Tls, is_loopback, read_key
from edge_agent.coordinator.rollout import RolloutMade, RolloutPage, RolloutPlan, RolloutView, Selector, SubmittedJob
from edge_agent.coordinator.views import (
    MANY,
    Audited,
    AuditPage,
    DatasetPage,
    DatasetView,
    HistoryRow,
    JobFilter,
    JobPage,
    JobView,
    NewToken,
    NodePage,
    NodeView,
    RolloutNode,
    RolloutNodePage,
    Scope,
    Token,
)
from edge_agent.dataset import check_sha256
from edge_agent.dataset_check import Check
from edge_agent.errors import (
    ConfigInvalid,
    CoordinatorUnreachable,
    DirectoryUnusable,
    EdgeAgentError,
    Forbidden,
    Unauthorized,
    Unknown,
    exit_code_of,
)
from edge_agent.job import Job
from edge_agent.messages import ORDER_S, JobProgress, is_ulid, new_id
from edge_agent.report import Result
from edge_agent.tls import client_context

T = TypeVar("T")
P = TypeVar("P", JobPage, NodePage, DatasetPage, AuditPage, RolloutPage, RolloutNodePage)
NONE: Mapping[str, str] = {}

SOCKET = "api.sock"
"""In the coordinator's state directory, which only its owner can enter."""
VERSION = "/v1"
"""Before the path of every request."""
PROBLEM = "application/problem+json"
TIMEOUT_S = 60.0
UPLOAD_S = 600.0
"""Without a byte of the answer to an upload: a large dataset is looked into first."""
PAGE = 500
MOST_NODES = 100_000
MAP_S = 120.0
"""For the Saliency Map of a job that trains to come."""
AWAY_S = 60.0
"""How long a watcher waits for a coordinator that has gone, and who has not heard the answer to a submission."""
LONGEST_PAUSE_S = 30.0
"""Between two attempts of who waits for ever."""


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request is answered with that failed (RFC 9457)."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    """Of the status."""
    status: int
    detail: str
    """What, where and what to do."""
    code: str
    """Of the error (docs/errors.md)."""
    found: Check | None = None
    """What is in a dataset that was not kept."""


class Answered(EdgeAgentError):
    """The coordinator answered with an error; code and exit code are the error's own."""

    code = "refused"
    exit_code = 14

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.exit_code = code, exit_code_of(code)


class Client:
    """Requests to one coordinator. All methods raise CoordinatorUnreachable or Answered."""

    def __init__(self, http: httpx.Client, place: str) -> None:
        self._http, self._place = http, place

    @classmethod
    def local(cls, state_directory: Path) -> Client:
        """Return the client of the coordinator that works in a directory of this machine."""
        path = str(state_directory / SOCKET)
        return cls(httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url=f"http://coordinator{VERSION}", timeout=TIMEOUT_S), path)

    @classmethod
    def remote(cls, url: str, token_file: Path, ca_file: Path | None = None) -> Client:
        """Return the client of a coordinator elsewhere. Raises ConfigInvalid for a token, certificate or address that cannot be used."""
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigInvalid(Path("--coordinator"), f"{url!r} is no URL: {error}") from None
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.host)):
            raise ConfigInvalid(Path("--coordinator"), f"{url!r} does not begin with https:, and the token is for nobody else to read")
        token = read_key(token_file, "the token of --coordinator")
        http = httpx.Client(
            verify=client_context(Tls(ca_file), "--coordinator") if parts.scheme == "https" else True, timeout=TIMEOUT_S,
            base_url=parts.join(f"{parts.path.rstrip('/')}{VERSION}"), headers={"Authorization": f"Bearer {token}"}, follow_redirects=False,
            trust_env=parts.scheme == "https",  # on loopback the token goes through no proxy
        )  # fmt: skip
        return cls(http, url)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def nodes(self) -> list[NodeView]:
        nodes: list[NodeView] = []
        for page in self._pages(NodePage, "/nodes", MOST_NODES):
            nodes += page.items
        return nodes

    def answers(self) -> None:
        """Have the coordinator's loop and its database answer something small."""
        self._ask(NodePage, "GET", "/nodes", params={"limit": "1"})

    def drain(self, node: str, drain: bool) -> NodeView:
        return self._ask(NodeView, "POST", f"/nodes/{quote(node, safe='')}/{'drain' if drain else 'resume'}")

    def jobs(self, limit: int, which: JobFilter = JobFilter()) -> list[JobView]:  # noqa: B008
        jobs: list[JobView] = []
        for page in self._pages(JobPage, "/jobs", limit, {k: v for k, v in msgspec.structs.asdict(which).items() if v is not None}):
            jobs += page.items
        return jobs

    def job(self, job: str) -> JobView:
        return self._ask(JobView, "GET", _path(job))

    def history(self, job: str) -> list[HistoryRow]:
        return self._ask(list[HistoryRow], "GET", f"{_path(job)}/history")

    def cancel(self, job: str) -> JobView:
        return self._ask(JobView, "POST", f"{_path(job)}/cancel")

    def send_options(self, job: str, fields: Mapping[str, object]) -> JobView:
        return self._ask(JobView, "POST", f"{_path(job)}/options", content=msgspec.json.encode({"method": fields}))

    def retry(self, job: str) -> JobView:
        return self._ask(JobView, "POST", f"{_path(job)}/retry")

    def datasets(self, limit: int) -> list[DatasetView]:
        datasets: list[DatasetView] = []
        for page in self._pages(DatasetPage, "/datasets", limit):
            datasets += page.items
        return datasets

    def upload(self, file: Path, sha256: str) -> DatasetView:
        """Hand in a dataset."""
        with file.open("rb") as stream:
            return self._ask(DatasetView, "PUT", f"/datasets/{sha256}", params={"name": file.name}, content=stream, timeout=UPLOAD_S)

    def _bring(self, files: Mapping[str, Path]) -> None:
        """Hand in those datasets that are not there."""
        for sha256, file in files.items():
            if not self._has(sha256):
                self.upload(file, sha256)

    def _has(self, sha256: str) -> bool:
        try:
            self._ask(DatasetView, "GET", f"/datasets/{sha256}")
        except Answered as error:
            if error.code != Unknown.code:
                raise
            return False
        return True

    def remove_dataset(self, sha256: str) -> DatasetView:
        return self._ask(DatasetView, "DELETE", f"/datasets/{quote(sha256, safe='')}")

    def forget(self, job: str) -> JobView:
        return self._ask(JobView, "POST", f"{_path(job)}/forget")

    def submit(
        self,
        node: str | None,
        job: Job,
        files: dict[str, Path],
        priority: int,
        expires_s: float = ORDER_S,
        selector: Selector | None = None,
        as_id: str | None = None,
    ) -> SubmittedJob:
        """Bring files by their sha256, then submit the job over them to a node, or to the best of a selector.

        Where the answer is lost it asks again under the same id, of which the coordinator makes one job; who gives one asks again himself.
        """
        self._bring(files)
        body = {"node": node, "selector": selector, "job": job, "priority": priority, "expires_s": expires_s, "id": as_id or new_id()}
        asked = {"content": msgspec.json.encode(body)}
        lost_at: float | None = None
        while True:
            try:
                return self._ask(SubmittedJob, "POST", "/jobs", **asked)
            except CoordinatorUnreachable as error:
                if as_id is not None or (lost_at is None and not error.asked):
                    raise
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > AWAY_S:
                    raise
            time.sleep(0.5)

    def roll_out(self, plan: RolloutPlan, files: dict[str, Path], dry_run: bool) -> RolloutMade:
        """Bring files by their sha256, then begin a rollout over them; dry, bring and begin nothing."""
        self._bring({} if dry_run else files)
        return self._ask(RolloutMade, "POST", "/rollouts", params={"dry_run": dry_run}, content=msgspec.json.encode(plan))

    def rollouts(self, limit: int) -> list[RolloutView]:
        rollouts: list[RolloutView] = []
        for page in self._pages(RolloutPage, "/rollouts", limit):
            rollouts += page.items
        return rollouts

    def rollout(self, rollout: str) -> RolloutView:
        return self._ask(RolloutView, "GET", _path(rollout, "rollout"))

    def rollout_nodes(self, rollout: str, limit: int) -> list[RolloutNode]:
        nodes: list[RolloutNode] = []
        for page in self._pages(RolloutNodePage, f"{_path(rollout, 'rollout')}/nodes", limit):
            nodes += page.items
        return nodes

    def cancel_rollout(self, rollout: str, force: bool) -> RolloutView:
        return self._ask(RolloutView, "POST", f"{_path(rollout, 'rollout')}/cancel", params={"force": force})

    def audit(self, limit: int) -> list[Audited]:
        requests: list[Audited] = []
        for page in self._pages(AuditPage, "/audit", limit):
            requests += page.items
        return requests

    def tokens(self) -> list[Token]:
        return self._ask(list[Token], "GET", "/tokens")

    def new_token(self, name: str, scope: Scope, expires_s: float | None) -> NewToken:
        body = {"name": name, "scope": scope, "expires_s": expires_s}
        return self._ask(NewToken, "POST", "/tokens", content=msgspec.json.encode(body))

    def revoke_token(self, name: str) -> Token:
        return self._ask(Token, "DELETE", f"/tokens/{quote(name, safe='')}")

    def result(self, view: JobView) -> Result | None:
        """Return the report of an ended job, if it made one."""
        for artifact in view.artifacts:
            if artifact.name == "result.json":
                return self._ask(Result, "GET", f"{_path(view.id)}/artifacts/{artifact.name}")
        return None

    def fetch(self, job: str, directory: Path, only: Collection[str] | None = None) -> list[Path]:
        """Write the artifacts of an ended job, all or `only` some, into a directory as a local run would, and return their paths.

        Raises DirectoryUnusable, DatasetChecksum where a file did not come whole, Answered where the job has not ended.
        """
        view = self.job(job)
        if view.phase != "ended":
            raise Answered("refused", f"job {job} has not ended ({view.phase}); `edge-agent watch {job}` waits for it")
        written = []
        try:
            (directory / "adapter").mkdir(parents=True, exist_ok=True)
            for artifact in view.artifacts:
                if only is not None and artifact.name not in only:
                    continue
                path = directory / "adapter" / artifact.name if artifact.name.startswith("adapter") else directory / artifact.name
                self._save(f"{_path(job)}/artifacts/{artifact.name}", artifact.sha256, path)
                written.append(path)
        except OSError as error:
            raise DirectoryUnusable(directory, error.strerror or type(error).__name__) from None
        return written

    def _save(self, place: str, sha256: str, path: Path) -> None:
        part = path.with_name(f".{path.name}.part")
        try:
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)  # saliency and answers are dataset text
            with self._http.stream("GET", place) as response, part.open("wb") as file:
                self._check(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
            check_sha256(part, sha256)
            part.replace(path)
        except httpx.TransportError as error:
            raise CoordinatorUnreachable(self._place, _why(error)) from None
        finally:
            part.unlink(missing_ok=True)

    def watch(self, job: str) -> Iterator[JobView | JobProgress]:
        """Yield the job at every change and its progress as it comes, until it has ended; a restarted coordinator is awaited."""
        away_since: float | None = None
        heard: list[str] = []
        while True:
            try:
                for kind, data in self._events(f"{_path(job)}/events", heard):
                    away_since = None
                    if kind in (b"", b"saliency"):
                        continue
                    item: JobView | JobProgress
                    item = msgspec.json.decode(data, type=JobProgress) if kind == b"progress" else msgspec.json.decode(data, type=JobView)
                    yield item
                    if isinstance(item, JobView) and item.phase == "ended":
                        return
                why = "it closed the connection"
            except httpx.TransportError as error:
                why = _why(error)
            now = time.monotonic()
            away_since = away_since or now
            if now - away_since > AWAY_S:
                raise CoordinatorUnreachable(self._place, why)
            time.sleep(0.5)

    def ended(self) -> Iterator[JobView]:
        """Yield the jobs that have ended, the newest first, a page at a time."""
        for page in self._pages(JobPage, "/jobs", MANY, {"phase": "ended"}):
            yield from page.items

    def endings(self, away: Callable[[EdgeAgentError], None]) -> Iterator[JobView]:
        """Yield the jobs that have ended, then each as it ends, without end; one may come twice.

        A coordinator that goes is awaited as long as it takes, and `away` hears of it once. Raises CoordinatorUnreachable where none
        answers at first, Answered where it does not answer, or the token is not valid any more.
        """
        heard: list[str] = []
        listed = False
        pause_s = 0.0
        while True:
            problem: EdgeAgentError
            try:
                for kind, data in self._events("/events", heard):
                    pause_s = 0.0
                    if kind == b"start":
                        # They are listed once it listens, so none ends in between; again where events were lost.
                        listed = listed and not msgspec.json.decode(data)["lost"]
                        if not listed:
                            yield from self.ended()
                            listed = True
                    elif kind == b"job" and (view := msgspec.json.decode(data, type=JobView)).phase == "ended":
                        yield view
                problem = CoordinatorUnreachable(self._place, "it closed the connection")
            except httpx.TransportError as error:
                problem = CoordinatorUnreachable(self._place, _why(error))
            except (CoordinatorUnreachable, Answered) as error:
                problem = error
            if not heard or problem.code in (Unauthorized.code, Forbidden.code):
                raise problem
            if not pause_s:
                away(problem)
            pause_s = min(2 * pause_s or 0.5, LONGEST_PAUSE_S)
            time.sleep(pause_s)

    def saliency(self, job: str) -> tuple[bytes, Job]:
        """Return the `saliency.json` of a job, and its document; of one that trains as it stands now.

        Raises Answered where there is none, or where none comes.
        """
        view = self.job(job)
        if view.phase != "ended":
            self._await_map(job)
        return self._send("GET", f"{_path(job)}/artifacts/saliency.json").content, view.order.job

    def _await_map(self, job: str) -> None:
        """Have the trainer of a job write its Saliency Map, and wait until it has come, or the job has ended."""
        until = time.monotonic() + MAP_S
        asked = False
        try:
            for kind, data in self._events(f"{_path(job)}/events", []):
                if not asked:
                    self._send("POST", f"{_path(job)}/saliency")
                    asked = True
                if kind == b"saliency" or (kind == b"job" and msgspec.json.decode(data, type=JobView).phase == "ended"):
                    return
                if time.monotonic() > until:
                    break
        except httpx.TransportError as error:
            raise CoordinatorUnreachable(self._place, _why(error)) from None
        raise Answered("refused", f"no Saliency Map of job {job} has come within {MAP_S:.0f} s; its trainer writes it between two updates")

    def _events(self, path: str, heard: list[str]) -> Iterator[tuple[bytes, bytes]]:
        """Yield (kind, data) of events, after that whose id is the last of `heard`, which grows with them; of a comment nothing in both."""
        with self._http.stream("GET", path, headers={"Last-Event-ID": heard[-1]} if heard else {}) as response:
            self._check(response)
            kind = b""
            for line in _lines(response):
                name, _, value = line.rstrip(b"\r").partition(b": ")
                if line.startswith(b":"):
                    yield b"", b""
                if name == b"event":
                    kind = value
                elif name == b"id":
                    heard[:] = [value.decode()]
                elif name == b"data" and value:
                    yield kind, value

    def _pages(self, kind: type[P], path: str, limit: int, params: Mapping[str, str] = NONE) -> Iterator[P]:
        """Yield the pages of a list, up to a number of items."""
        after: dict[str, str] = {}
        while limit > 0:
            page = self._ask(kind, "GET", path, params=dict(params) | after | {"limit": str(min(limit, PAGE))})
            yield page
            if page.next is None:
                return
            limit, after = limit - len(page.items), {"after": page.next}

    def _ask(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        try:
            return msgspec.json.decode(self._send(method, path, **options).content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Answered("internal", f"the coordinator answers in another form, perhaps of another version: {error}") from None

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            asked = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise CoordinatorUnreachable(self._place, _why(error), asked=asked) from None
        self._check(response)
        return response

    @staticmethod
    def _check(response: httpx.Response) -> None:
        if response.is_success:
            return
        response.read()
        try:
            problem = msgspec.json.decode(response.content, type=Problem)
        except msgspec.DecodeError:
            raise Answered("internal", f"the coordinator answered with status {response.status_code}") from None
        raise Answered(problem.code, problem.detail)


def _path(thing: str, kind: Literal["job", "rollout"] = "job") -> str:
    """Return the path of a job or rollout. Raises Answered for what can be no id of one."""
    if not is_ulid(thing):
        lists = {"job": "edge-agent jobs", "rollout": "edge-agent rollout list"}[kind]
        raise Answered("refused", f"{thing[:80]!r} is no {kind}; `{lists}` shows them")
    return f"/{kind}s/{thing}"


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield lines that end with a newline; text in JSON may hold other characters that count as line ends elsewhere."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
