"""The coordinator's API over the network: who may do what, and what every answer looks like."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import sqlite3
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import paho.mqtt.client as paho
import pytest
from api_server import INFO, ApiServer
from conftest import ROOT, Cli, write_lines
from fleet import wait_for
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from orders import NODE
from paho.mqtt.enums import CallbackAPIVersion
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.config import Api, CoordinatorConfig, Size, read_config
from edge_agent.coordinator import audience, door, http, listening
from edge_agent.coordinator.access import ANYONE, LOCAL, SCOPES
from edge_agent.coordinator.client import Answered, Client, Problem
from edge_agent.coordinator.door import Door
from edge_agent.coordinator.http import MAX_BODY_BYTES, make_app
from edge_agent.coordinator.limits import MOST_BUCKETS, Limits, network
from edge_agent.coordinator.views import CoordinatorPhase, JobFilter, JobPage, JobView
from edge_agent.dataset import file_sha256
from edge_agent.enrolment import Authority
from edge_agent.errors import ConfigInvalid, CoordinatorUnreachable, DiskFull, TooManyRequests
from edge_agent.job import Dataset, Job, NlftOptions, SftOptions
from edge_agent.messages import Artifact, JobProgress, JobResult, JobStatus, NodeState, OptionsState, new_id
from edge_agent.mqtt import Received
from edge_agent.new_options import NewOptions
from edge_agent.report import Event
from profiles.sensors import Reading, Resources


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ExitStack() as ends:
        yield ApiServer(tmp_path_factory.mktemp("api"), ends)


def _problem(answer: httpx.Response, status: int, code: str) -> Problem:
    """Read an answer that must be a problem document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = msgspec.json.decode(answer.content, type=Problem)
    assert (problem.status, problem.code) == (status, code)
    return problem


def _routes(app: Litestar) -> dict[tuple[str, str], str | None]:
    """Return the scope of every route of an application, however it came there."""
    handlers = [(route.path, handler) for route in app.routes for handler in getattr(route, "route_handlers", [])]
    assert all(isinstance(handler, HTTPRouteHandler) for _, handler in handlers)
    return {
        (method, path): handler.opt.get("scope")
        for path, handler in handlers for method in handler.http_methods if method != "OPTIONS"
    }  # fmt: skip


def test_every_route_declares_its_scope(coordinator: ApiServer) -> None:
    """There is no route without one, and docs/api.md names each with its own, and no other."""
    found = _routes(make_app(coordinator.service, Door()))
    assert set(found.values()) <= {*SCOPES, ANYONE}
    assert all(scope != ANYONE or (method == "GET" and not path.startswith("/v1")) for (method, path), scope in found.items())
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()]
    documented = {tuple(row[0].strip("`").split(" ")): row[1].strip("`") for row in rows if row[0].startswith("`") and " /" in row[0]}
    assert documented == {(method, path.replace(":str}", "}")): scope for (method, path), scope in found.items()}


def test_every_route_checks_its_scope(coordinator: ApiServer) -> None:
    """Without a token nobody gets anywhere, with a lesser one neither; with its own scope a request gets past the door."""
    for (method, path), needed in _routes(make_app(coordinator.service, Door())).items():
        assert needed is not None
        if needed == ANYONE:
            continue  # tests/test_pages.py has them
        place = f"{coordinator.url}{path}".replace("{sha256:str}", "0" * 64).replace("{", "").replace(":str}", "")  # of what does not exist
        assert _problem(coordinator.ask(method, place, None), 401, "unauthorized").title == "Unauthorized"
        for scope in SCOPES:
            enough = SCOPES.index(scope) >= SCOPES.index(needed)  # type: ignore[arg-type]
            if enough and path == "/v1/events":
                continue  # its answer does not end
            answer = coordinator.ask(method, place, scope)
            assert (answer.status_code == 403) == (not enough), f"{method} {path} with {scope}: {answer.status_code}"
            if not enough:
                _problem(answer, 403, "forbidden")


def test_who_asks_is_told(coordinator: ApiServer) -> None:
    """A page learns whose token it has and what that may do."""
    for scope in SCOPES:
        assert coordinator.ask("GET", "/me", scope).json() == {"name": scope, "scope": scope}


def test_options_tell_nothing_without_a_token(coordinator: ApiServer) -> None:
    """The framework answers OPTIONS by itself; here that takes a scope like anything, and no route has one for it."""
    _problem(coordinator.ask("OPTIONS", "/jobs", None), 401, "unauthorized")
    _problem(coordinator.ask("OPTIONS", "/jobs", "admin"), 403, "forbidden")


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer .", "Bearer read", "Bearer read.", "Bearer {name}.x{secret}", "Bearer nobody.{secret}", "Basic {token}",
        "{token}", "Bearer {token} {token}", "Bearer {token}x", "Bearer \xff.\xfe",
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(header: str, coordinator: ApiServer) -> None:
    """An unknown name, another secret, half of it, another scheme: each is 401, and the answer asks for a token."""
    token = coordinator.secrets["read"]
    name, _, secret = token.partition(".")
    value = header.format(token=token, name=name, secret=secret).encode("latin-1")
    answer = coordinator.http.get("/nodes", headers={"Authorization": value})
    _problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert coordinator.ask("GET", "/nodes", "read").status_code == 200


def test_token_ends_by_its_time_or_at_once(coordinator: ApiServer) -> None:
    """One that has expired or was revoked opens nothing; a name is given once, and is free again afterwards."""
    admin = coordinator.client("admin")
    made = admin.new_token("passing", "read", 1e-9)
    bearer = {"Authorization": f"Bearer {made.secret}"}
    _problem(coordinator.http.get("/nodes", headers=bearer), 401, "unauthorized")
    again = coordinator.ask("POST", "/tokens", json={"name": "passing", "scope": "read"})
    _problem(again, 409, "refused")
    _problem(coordinator.ask("POST", "/tokens", json={"name": LOCAL.name, "scope": "read"}), 409, "refused")
    assert "passing" in {token.name for token in admin.tokens()}
    assert admin.revoke_token("passing") == made.token
    lasting = admin.new_token("passing", "read", None)
    bearer = {"Authorization": f"Bearer {lasting.secret}"}
    assert coordinator.http.get("/nodes", headers=bearer).status_code == 200
    assert coordinator.http.get("/nodes", headers={"Authorization": f"Bearer {made.secret}"}).status_code == 401
    admin.revoke_token("passing")
    assert coordinator.http.get("/nodes", headers=bearer).status_code == 401
    _problem(coordinator.ask("DELETE", "/tokens/passing"), 404, "refused")


def test_secrets_are_kept_nowhere(coordinator: ApiServer) -> None:
    """Neither the database nor an answer holds one that was told before, and the digests are those of tokens after a restart."""
    told = coordinator.ask("GET", "/tokens").content
    for token in coordinator.secrets.values():
        secret = token.partition(".")[2].encode()
        assert len(secret) >= 43
        assert secret not in told
        assert all(secret not in file.read_bytes() for file in (coordinator.root / "coordinator").glob("coordinator.sqlite*"))


def test_requests_that_cannot_be_answered_are_problems(coordinator: ApiServer) -> None:
    """Unknown places, other methods, broken, deep, wrong and long bodies: each has its status, code and text, none the server's."""
    ask, job = coordinator.ask, {"node": NODE, "job": {"model": "tiny"}}
    _problem(ask("GET", "/nowhere"), 404, "refused")
    _problem(ask("GET", "/../../etc/passwd"), 404, "refused")
    _problem(ask("PATCH", "/jobs"), 405, "refused")
    _problem(ask("GET", f"/jobs/{new_id()}"), 404, "refused")
    _problem(ask("POST", f"/jobs/{new_id()}/cancel"), 404, "refused")
    _problem(ask("POST", "/nodes/%2e%2e/drain"), 404, "refused")
    _problem(ask("GET", "/jobs?limit=0"), 400, "job_schema")
    assert "ouctome" in _problem(ask("GET", "/jobs?ouctome=failed"), 400, "job_schema").detail
    for body in (b"", b"{", b"[" * 100_000, b'{"node":' * 50_000, b'{"node": "\xff"}', b"[]", b"null", msgspec.json.encode(job | {"x": 1})):
        _problem(ask("POST", "/jobs", content=body), 400, "job_schema")
    assert "dataset" in _problem(ask("POST", "/jobs", json=job), 400, "job_schema").detail
    _problem(ask("POST", "/jobs", content=b" " * (MAX_BODY_BYTES + 1)), 413, "refused")
    assert "expires_s" in _problem(ask("POST", "/tokens", json={"name": "a", "scope": "read", "expires_s": "1"}), 400, "job_schema").detail
    _problem(ask("POST", "/tokens", json={"name": "A/b", "scope": "read"}), 400, "job_schema")
    for answer in (ask("GET", "/nodes"), ask("GET", "/nowhere")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_commands_ask_a_coordinator_elsewhere(coordinator: ApiServer, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its URL, with a token from a file, over TLS; what the token may not do is refused, with exit code 14."""
    monkeypatch.setenv("EDGE_AGENT_CA_FILE", str(coordinator.ca_file))
    monkeypatch.setenv("EDGE_AGENT_TOKEN_FILE", str(coordinator.token_file("read")))
    at = ("--coordinator", coordinator.url)
    listed = cli("nodes", *at, "--json")
    assert [node["id"] for node in listed.json] == [NODE]
    refused = cli("drain", NODE, *at)
    assert refused.code == 14
    assert refused.err.startswith("error forbidden: this token may read")
    monkeypatch.setenv("EDGE_AGENT_TOKEN_FILE", str(coordinator.token_file("admin")))
    monkeypatch.setenv("EDGE_AGENT_URL", coordinator.url)
    made = cli("tokens", "new", "grafana", "--scope", "read", "--days", "30", "--json")
    assert made.json["token"]["scope"] == "read"
    assert coordinator.http.get("/nodes", headers={"Authorization": f"Bearer {made.json['secret']}"}).status_code == 200
    assert "grafana" in cli("tokens", "list").out
    assert cli("tokens", "revoke", "grafana").code == 0
    assert "/v1/tokens/grafana" in cli("audit").out


def test_token_goes_to_nobody_else(coordinator: ApiServer, tmp_path: Path) -> None:
    """A plain connection to another machine, a token that others can read, a server that another authority has signed: each is refused."""
    token = coordinator.token_file("admin")
    for url in ("http://coordinator.example.org", "ftp://127.0.0.1", "coordinator.example.org", "http://127.0.0.1.example.org"):
        with pytest.raises(ConfigInvalid, match="https"):
            Client.remote(url, token)
    token.chmod(0o644)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        Client.remote(coordinator.url, token)
    other = Authority(tmp_path / "authority").certificate_file
    with (
        Client.remote(coordinator.url, coordinator.token_file("admin"), other) as deceived,
        pytest.raises(CoordinatorUnreachable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        deceived.nodes()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('host = "0.0.0.0"', "loopback"),
        ('host = "::"', "loopback"),
        ('host = "coordinator.example.org"', "loopback"),
        ('key_file = "x.key"', "come together"),
    ],
)
def test_port_without_tls_is_on_loopback_only(table: str, says: str, tmp_path: Path) -> None:
    """A configuration that would send tokens in clear over a network is none."""
    file = tmp_path / "coordinator.toml"
    file.write_text(f'state_directory = "s"\n[api]\n{table}\n')
    with pytest.raises(ConfigInvalid, match=says):
        read_config(file, CoordinatorConfig)
    file.write_text('state_directory = "s"\n[api]\nhost = "::1"\n')
    assert read_config(file, CoordinatorConfig).api == Api(host="::1")


def _dataset(coordinator: ApiServer, name: str, *records: object) -> tuple[Path, str]:
    file = write_lines(coordinator.root / name, *records)
    return file, file_sha256(file)


def _ended(coordinator: ApiServer, job: JobView, data: bytes, **more: Any) -> None:
    """End a job as its node would, with a report."""
    sha256 = hashlib.sha256(data).hexdigest()
    coordinator.service.files.put(data, sha256)
    result = JobResult(job.digest, "succeeded", artifacts=(Artifact("result.json", sha256, len(data)),), **more)
    coordinator.hear("job", result, job.id, "result")
    assert coordinator.call(lambda: coordinator.service.job(job.id)).outcome == "succeeded"


def test_dataset_is_looked_into_and_kept_while_a_job_has_it(coordinator: ApiServer) -> None:
    """The answer says what is in it; it is listed, not removed under a job, and removed without one."""
    file, sha256 = _dataset(
        coordinator, "good.jsonl", {"question": "How many?", "answer": "#### 1"}, {"question": "And?", "answer": "#### 2"}
    )
    with coordinator.client("submit") as client:
        kept = client.upload(file, sha256)
        assert (kept.name, kept.size_bytes, kept.found.records, kept.found.with_answer) == ("good.jsonl", file.stat().st_size, 2, 2)
        assert client.upload(file, sha256).sha256 == sha256
        assert [view.sha256 for view in client.datasets(10)] == [sha256]
        job = coordinator.submit(sha256)
        with pytest.raises(Answered, match=job.id) as refused:
            client.remove_dataset(sha256)
        assert refused.value.code == "refused"
        other, digest = _dataset(coordinator, "other.jsonl", {"question": "?", "answer": "#### 3"})
        client.upload(other, digest)
        assert client.remove_dataset(digest).name == "other.jsonl"
        assert [view.sha256 for view in client.datasets(10)] == [sha256]
        assert not coordinator.service.files.has(digest)
    words = coordinator.ask("GET", f"/datasets/{sha256}", "read").text
    assert "How many?" not in words


def test_datasets_have_a_limit_together(coordinator: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that passes it is refused, and nothing of it stays; the same again takes no more room."""
    file, sha256 = _dataset(coordinator, "kept.jsonl", {"question": "Is there room?", "answer": "#### 1"})
    service = coordinator.service
    coordinator.client("submit").upload(file, sha256)
    held = coordinator.call(lambda: service._store.datasets_bytes(""))
    monkeypatch.setattr(service, "_config", msgspec.structs.replace(service._config, datasets_limit=Size(held)))
    assert coordinator.ask("PUT", f"/datasets/{sha256}", content=file.read_bytes()).status_code == 200
    data = b'{"question": "Is there more?", "answer": "#### 2"}\n'
    other = hashlib.sha256(data).hexdigest()
    refused = coordinator.ask("PUT", f"/datasets/{other}", content=data)
    assert "`datasets_limit`" in _problem(refused, 409, "refused").detail
    assert not service.files.has(other)
    assert list(service.files.incoming.glob(f"{other}*")) == []


def test_dataset_that_is_wrong_is_not_kept(coordinator: ApiServer) -> None:
    """Wrong lines are listed, nothing and another file are refused, a name is no path; nothing of them is left."""
    file, sha256 = _dataset(coordinator, "wrong.jsonl", {"question": "How many?", "answer": "#### 1"}, {"question": 5}, b"{")
    problem = _problem(coordinator.ask("PUT", f"/datasets/{sha256}", "submit", content=file.read_bytes()), 422, "dataset_schema")
    assert problem.found is not None
    assert [line.where for line in problem.found.wrong_lines] == ["line 2", "line 3"]
    _problem(coordinator.ask("PUT", f"/datasets/{'0' * 64}", "submit", content=file.read_bytes()), 422, "dataset_checksum")
    _problem(coordinator.ask("PUT", f"/datasets/{hashlib.sha256(b'').hexdigest()}", "submit", content=b""), 422, "dataset_empty")
    for place in ("/datasets/passwd", "/datasets/..%2f..%2fpasswd", f"/datasets/{sha256}?name=../x"):
        assert coordinator.ask("PUT", place, "submit", content=b"{}").status_code in (400, 404)
    assert not coordinator.service.files.has(sha256)
    assert list(coordinator.service.files.incoming.iterdir()) == []


def test_lists_have_pages_and_filters(coordinator: ApiServer) -> None:
    """Page by page every job comes once, the newest first, also while others come; a filter leaves out the rest."""
    file, sha256 = _dataset(coordinator, "paged.jsonl", {"question": "Pages?", "answer": "#### 7"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
        made = [coordinator.submit(sha256).id for _ in range(7)]
        client.cancel(made[3])
        first = msgspec.json.decode(coordinator.ask("GET", "/jobs?limit=3", "read").content, type=JobPage)
        assert [view.id for view in first.items] == made[:-4:-1]
        made.append(coordinator.submit(sha256).id)
        second = msgspec.json.decode(coordinator.ask("GET", f"/jobs?limit=3&after={first.next}", "read").content, type=JobPage)
        assert [view.id for view in second.items] == made[3:0:-1]
        assert [view.id for view in client.jobs(8)] == made[::-1]
        assert [view.id for view in client.jobs(100, JobFilter(outcome="canceled", node=NODE))] == [made[3]]
        assert client.jobs(100, JobFilter(node="nobody")) == []
        everything = {view.id for view in client.jobs(10_000)}
        assert {
            view.id
            for phase in get_args(CoordinatorPhase)
            for part in (get_args(phase) or [phase])
            for view in client.jobs(10_000, JobFilter(phase=part))
        } == everything
    for wrong in ("phase=sleeping", "outcome=x", "limit=1001", "after=-1", "after=x", "after=" + "9" * 40):
        _problem(coordinator.ask("GET", f"/jobs?{wrong}", "read"), 400, "job_schema")


def test_ended_job_is_handed_in_again(coordinator: ApiServer) -> None:
    """As a new job with the same document, which says from which it came; one that has not ended is not."""
    file, sha256 = _dataset(coordinator, "again.jsonl", {"question": "Again?", "answer": "#### 9"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
        job = coordinator.submit(sha256)
        with pytest.raises(Answered, match="has not ended"):
            client.retry(job.id)
        client.cancel(job.id)
        again = client.retry(job.id)
    assert (again.retry_of, again.order.job, again.node) == (job.id, job.order.job, job.node)
    assert again.id != job.id
    assert (again.phase, job.retry_of) == ("created", None)


def test_options_of_a_job_change_while_it_runs(coordinator: ApiServer) -> None:
    """Each change adds to those before and has a number; the job shows what was sent and what its node says of it."""
    file, sha256 = _dataset(coordinator, "live.jsonl", {"question": "Live?", "answer": "#### 4"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
        job = coordinator.submit(sha256)
        assert (job.options, job.options_state) == (None, None)
        first = client.send_options(job.id, {"correct_threshold": 0.5})
        assert first.options == NewOptions(1, NlftOptions(correct_threshold=0.5))
        both = NewOptions(2, NlftOptions(correct_threshold=0.5, imitate_incorrect=True))
        assert client.send_options(job.id, {"imitate_incorrect": True}).options == both
        assert client.send_options(job.id, {"imitate_incorrect": True}).options == both  # nothing new
        state = OptionsState(2, 2, 40)
        coordinator.hear("job", JobStatus(job.digest, "running", options=state), job.id, "status")
        assert client.job(job.id).options_state == state
        for fields, says in (
            ({"references": "live"}, "method.references: it cannot change while a job runs"),
            ({"cluster": "like"}, "method.cluster: it cannot change while this job runs"),
            ({"correct_threshold": 1.5}, "$.correct_threshold"),
            ({"correct_threshold": "0.5"}, "$.correct_threshold"),
            ({"threshold": 0.5}, "unknown field `threshold`"),
            ({"name": "sft"}, "$.name"),
        ):
            with pytest.raises(Answered) as refused:
                client.send_options(job.id, fields)
            assert refused.value.code == "job_schema"
            assert says in str(refused.value)
        _ended(coordinator, job, b"{}")
        with pytest.raises(Answered, match="has ended"):
            client.send_options(job.id, {"correct_threshold": 0.6})
        other = Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29, method=SftOptions())
        submitted = client.submit(NODE, other, {}, 4)
        with pytest.raises(Answered, match="trains by sft; only options of nlft can change"):
            client.send_options(submitted.id, {"correct_threshold": 0.6})
    path = f"/jobs/{job.id}/options"
    _problem(coordinator.ask("POST", path, "read", json={"method": {"correct_threshold": 0.5}}), 403, "forbidden")
    for body in ({}, {"method": {}}, {"method": {"correct_threshold": [0.5]}}, {"method": {}, "schedule": {}}, {"method": {"x" * 65: 1}}):
        _problem(coordinator.ask("POST", path, "submit", json=body), 400, "job_schema")


class Losing(httpx.HTTPTransport):
    """Has a request done, and loses its answer."""

    def __init__(self, coordinator: ApiServer) -> None:
        super().__init__(verify=ssl.create_default_context(cafile=coordinator.ca_file))
        self.left = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        if request.method == "POST" and self.left:
            self.left -= 1
            answer.close()
            raise httpx.ReadError("the connection is gone")
        return answer


def test_job_is_handed_in_once(coordinator: ApiServer, tmp_path: Path) -> None:
    """Who has not heard the answer asks again under the same id and gets that job; another one under that id is refused."""
    file, sha256 = _dataset(coordinator, "once.jsonl", {"question": "Once?", "answer": "#### 1"})
    job, transport = Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29), Losing(coordinator)
    headers = {"Authorization": f"Bearer {coordinator.secrets['submit']}"}

    def count() -> int:
        return len(coordinator.call(lambda: coordinator.service._store.jobs(1000)))

    with Client(
        httpx.Client(transport=transport, base_url=f"{coordinator.url}/v1", headers=headers, timeout=30), coordinator.url
    ) as client:
        client.upload(file, sha256)
        before, transport.left = count(), 2
        submitted = client.submit(NODE, job, {}, 4)
        assert (count(), transport.left) == (before + 1, 0)
        assert client.job(submitted.id).digest == job.digest
        own, transport.left = new_id(), 1
        with pytest.raises(CoordinatorUnreachable):  # who gives an id asks again himself
            client.submit(NODE, job, {}, 4, as_id=own)
        assert client.submit(NODE, job, {}, 4, as_id=own).id == own
        assert client.submit(None, job, {}, 4, as_id=own).node == NODE
        assert count() == before + 2
        other = msgspec.structs.replace(job, seed=7)
        for what, node, of, priority, expires_s in (
            ("document", NODE, other, 4, 7 * 24 * 3600.0), ("node", "another", job, 4, 7 * 24 * 3600.0),
            ("priority", NODE, job, 5, 7 * 24 * 3600.0), ("time to expire", NODE, job, 4, 60.0),
        ):  # fmt: skip
            with pytest.raises(Answered, match=f"job {own} is there with another {what}") as refused:
                client.submit(node, of, {}, priority, expires_s, as_id=own)
            assert (refused.value.code, refused.value.exit_code) == ("conflict", 4)
        assert count() == before + 2
    body = {"node": NODE, "job": msgspec.to_builtins(job)}
    for wrong in ("", own.upper(), f"{own}\n", own[:-1], f"8{own[1:]}", "il" + own[2:]):
        _problem(coordinator.ask("POST", "/jobs", "submit", json=body | {"id": wrong}), 400, "job_schema")
    unheard = Client.remote("https://127.0.0.1:1", coordinator.token_file("submit"), coordinator.ca_file)
    began = time.monotonic()
    with unheard, pytest.raises(CoordinatorUnreachable):  # nobody was asked
        unheard.submit(NODE, job, {}, 4)
    assert time.monotonic() - began < 10


def test_artifact_comes_whole_or_by_ranges(coordinator: ApiServer, tmp_path: Path) -> None:
    """With its name and sha256; a range that is asked for and no other; nothing where the other side has it."""
    file, sha256 = _dataset(coordinator, "made.jsonl", {"question": "Made?", "answer": "#### 4"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
        job, data = coordinator.submit(sha256), random.Random(3).randbytes(300_000)
        place = f"/jobs/{job.id}/artifacts/result.json"
        _problem(coordinator.ask("GET", place, "read"), 404, "refused")
        _ended(coordinator, job, data)
        assert [path.name for path in client.fetch(job.id, tmp_path)] == ["result.json"]
    assert (tmp_path / "result.json").read_bytes() == data
    assert (tmp_path / "result.json").stat().st_mode & 0o777 == 0o600, "what it says of questions is for who fetched it"
    whole = coordinator.ask("GET", place, "read")
    tag = whole.headers["etag"]
    assert (whole.status_code, whole.content) == (200, data)
    assert tag == f'"{hashlib.sha256(data).hexdigest()}"'
    assert whole.headers["content-disposition"] == 'attachment; filename="result.json"'
    for wanted, part in {"0-99": data[:100], "299999-": data[-1:], "-5": data[-5:], "100-900000": data[100:], "-900000": data}.items():
        answer = coordinator.ask("GET", place, "read", headers={"Range": f"bytes={wanted}", "If-Range": tag})
        assert (answer.status_code, answer.content) == (206, part), wanted
    for wanted in ("bytes=-", "bytes=0-1,5-6", "lines=0-1", "bytes=x-"):
        assert coordinator.ask("GET", place, "read", headers={"Range": wanted}).content == data
    assert coordinator.ask("GET", place, "read", headers={"Range": "bytes=0-9", "If-Range": '"older"'}).content == data
    assert coordinator.ask("GET", place, "read", headers={"If-None-Match": f'"x", {tag}'}).status_code == 304
    for wanted in ("300000-", "5-4", "-0"):
        _problem(coordinator.ask("GET", place, "read", headers={"Range": f"bytes={wanted}"}), 416, "refused")
    _problem(coordinator.ask("GET", f"/jobs/{job.id}/artifacts/adapter_config.json", "read"), 404, "refused")
    _problem(coordinator.ask("GET", f"/jobs/{job.id}/artifacts/passwd", "read"), 400, "job_schema")


class Reader:
    """Reads server-sent events as a browser would."""

    def __init__(self, coordinator: ApiServer, path: str, ends: ExitStack, heard: str | None = None, secret: str = "") -> None:
        headers = {"Authorization": f"Bearer {secret or coordinator.secrets['read']}"} | ({"Last-Event-ID": heard} if heard else {})
        self._answer = ends.enter_context(coordinator.http.stream("GET", path, headers=headers))
        assert self._answer.headers["content-type"].startswith("text/event-stream")
        self._lines = self._answer.iter_lines()

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Yield kind, id and data; a comment has kind and id empty."""
        event: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line:
                event[name] = value
            elif event:
                yield event.get("event", ""), event.get("id", ""), json.loads(event["data"]) if "data" in event else event[""]
                event = {}


RESOURCES = Resources(*[Reading(None, "no sensor")] * 2, 1, 1, 1, None, Reading(3.5), *[Reading(None, "no sensor")] * 2)


def test_events_of_a_job_end_with_it(coordinator: ApiServer) -> None:
    """Where it stands, its progress, its end; who comes back with the last id hears what was missed, and where it stands."""
    file, sha256 = _dataset(coordinator, "watched.jsonl", {"question": "Watched?", "answer": "#### 5"})
    progress = JobProgress(Event(event="progress", time=1.0, stage="train", done=1, total=9), [], RESOURCES)
    with coordinator.client("submit") as client, ExitStack() as ends:
        client.upload(file, sha256)
        job, other = coordinator.submit(sha256), coordinator.submit(sha256)
        events = iter(Reader(coordinator, f"/jobs/{job.id}/events", ends))
        kind, _, data = next(events)
        assert (kind, data["id"], data["phase"]) == ("job", job.id, "created")
        coordinator.hear("job", progress, job.id, "progress")
        client.cancel(other.id)
        kind, first, data = next(events)
        assert (kind, data["event"]["done"]) == ("progress", 1)
        client.cancel(job.id)
        kind, last, data = next(events)
        assert (kind, data["outcome"]) == ("job", "canceled")
        assert list(events) == []
        again = list(Reader(coordinator, f"/jobs/{job.id}/events", ends, first))
        assert [(kind, data["phase"]) for kind, _, data in again] == [("job", "ended")] * 1
        assert again[0][1] == last
        assert [view.phase for view in client.watch(job.id) if isinstance(view, JobView)] == ["ended"]
    _problem(coordinator.ask("GET", f"/jobs/{new_id()}/events", "read"), 404, "refused")


def test_progress_of_a_job_is_kept_for_who_comes_later(coordinator: ApiServer) -> None:
    """From its beginning to the newest moment, evenly, however much was told; a stale one changes nothing; other jobs have none."""
    file, sha256 = _dataset(coordinator, "told.jsonl", {"question": "Told?", "answer": "#### 7"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
    job, other = coordinator.submit(sha256).id, coordinator.submit(sha256).id
    for most in (1, 2, audience.MOST_POINTS, 3 * audience.MOST_POINTS + 7):
        for time_s in range(1, most + 1):  # those that were told before come again
            event = Event(event="progress", time=float(time_s), stage="train", done=time_s, total=999, loss=0.5, memory_bytes=7)
            coordinator.hear("job", JobProgress(event, [], RESOURCES), job, "progress")
        points = coordinator.ask("GET", f"/jobs/{job}/progress", "read").json()
        times = [point["time"] for point in points]
        assert (times[0], times[-1]) == (1.0, float(most))
        assert min(most, audience.MOST_POINTS // 2) <= len(points) <= audience.MOST_POINTS
        assert len({b - a for a, b in pairwise(times[:-1])}) <= 1
    none = {"total": 999, "tokens_per_s": None, "temperature_c": None}
    first = {"time": 1.0, "stage": "train", "done": 1, "loss": 0.5, "memory_bytes": 7, "power_w": None}
    assert points[0] == first | none
    assert coordinator.ask("GET", f"/jobs/{other}/progress", "read").json() == []
    _problem(coordinator.ask("GET", f"/jobs/{new_id()}/progress", "read"), 404, "refused")


def test_events_of_the_fleet_go_on_where_they_were(coordinator: ApiServer) -> None:
    """All of jobs and nodes, in order, each with an id; from an id that is kept on nothing is missed, from another that is said."""
    with ExitStack() as ends:
        events = iter(Reader(coordinator, "/events", ends))
        kind, start, data = next(events)
        assert (kind, data) == ("start", {"lost": False})
        for boot in (1, 2, 3):
            coordinator.hear("state", NodeState("ready", boot, 1, 0))
        told = [next(events) for _ in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coordinator.service, "_progress", lambda _n, job, progress: coordinator.service._audience.progress(job, progress))
            progress = JobProgress(Event(event="progress", time=1.0, stage="train", done=1, total=9), [], RESOURCES)
            coordinator.hear("job", progress, (of := new_id()), "progress")
        kind, _, data = next(events)
        assert (kind, data["job"], data["progress"]["event"]["done"]) == ("progress", of, 1)
        assert [(kind, data["id"], data["boot"]) for kind, _, data in told] == [("node", NODE, boot) for boot in (1, 2, 3)]
        ids = [int(number.partition("-")[2]) for _, number, _ in told]
        assert ids == sorted(set(ids))
    with ExitStack() as ends:
        events = iter(Reader(coordinator, "/events", ends, told[0][1]))
        assert next(events)[::2] == ("start", {"lost": False})
        assert [next(events) for _ in range(2)] == told[1:]
        assert next(events)[0] == "progress"
    for heard in ("0-0", start.replace("-", "-9"), "x", "1-1" + "0" * 40):
        with ExitStack() as ends:
            assert next(iter(Reader(coordinator, "/events", ends, heard)))[::2] == ("start", {"lost": True})
    wait_for("nobody listens", lambda: not coordinator.service._audience._listeners)


def test_silence_is_told(coordinator: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing happens a comment comes, so that both ends see that the other is there."""
    monkeypatch.setattr(door, "PING_S", 0.05)
    with ExitStack() as ends:
        events = iter(Reader(coordinator, "/events", ends))
        assert next(events)[0] == "start"
        assert next(events) == ("", "", "still here")


def test_stream_ends_with_its_token(coordinator: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose token is revoked hears nothing of what happens then; one token has a bounded number of streams."""
    monkeypatch.setattr(door, "PING_S", 0.05)
    monkeypatch.setattr(door, "MOST_STREAMS", 2)
    access = coordinator.service.access
    secret = coordinator.call(lambda: access.new("guest", "read", None)).secret
    with ExitStack() as ends:
        readers = [iter(Reader(coordinator, "/events", ends, secret=secret)) for _ in range(2)]
        for reader in readers:
            assert next(reader)[0] == "start"
        third = coordinator.http.get("/events", headers={"Authorization": f"Bearer {secret}"})
        assert (third.status_code, third.headers["retry-after"]) == (429, "1")
        assert next(iter(Reader(coordinator, "/events", ends)))[0] == "start", "another token has its own"
        coordinator.call(lambda: access.revoke("guest"))
        coordinator.hear("info", INFO)
        assert [kind for reader in readers for kind, _, _ in reader if kind] == []


def test_reader_that_does_not_read_is_cut_off(coordinator: ApiServer) -> None:
    """It is not written for without end: its connection is closed, and nothing is kept for it any more."""
    context = ssl.create_default_context(cafile=coordinator.ca_file)
    listeners = coordinator.service._audience._listeners
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {coordinator.secrets['read']}\r\n\r\n".encode())
        wait_for("the listener", lambda: listeners)
        info = msgspec.structs.replace(INFO, versions={"long": "x" * 60_000})
        for _ in range(door.MOST_UNHEARD + 200):
            coordinator.hear("info", info)
        wait_for("its end", lambda: not listeners)
    coordinator.hear("info", INFO)


def _value(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))


@pytest.mark.parametrize("lost", ["incoming", "sha256"])
def test_disk_that_fails_is_told_without_its_paths(lost: str, coordinator: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks learns what is wrong, and the log also where."""
    file, sha256 = _dataset(coordinator, f"without-{lost}.jsonl", {"question": f"Without {lost}?", "answer": "#### 7"})
    place = coordinator.root / "coordinator" / "files" / lost
    place.rename(place.with_name("away"))
    try:
        answer = coordinator.ask("PUT", f"/datasets/{sha256}", "submit", content=file.read_bytes())
    finally:
        place.with_name("away").rename(place)
    problem = _problem(answer, 503, "state")
    assert "No such file or directory" in problem.detail
    assert str(coordinator.root) not in answer.text
    assert str(place) in caplog.text
    full = http._explain_disk(None, DiskFull(str(place), 7))  # type: ignore[arg-type]
    assert (full.status_code, full.content.detail.count("no space is left"), str(place) in full.content.detail) == (503, 1, False)
    broken = http._explain_disk(None, sqlite3.OperationalError("disk I/O error"))  # type: ignore[arg-type]
    assert (broken.status_code, broken.content.detail.count("disk I/O error")) == (503, 1)


def test_metrics_count_what_happens(coordinator: ApiServer) -> None:
    """Nodes, jobs, what jobs took, messages, refused and late ones, answers: in a text that Prometheus' own reader takes."""
    file, sha256 = _dataset(coordinator, "counted.jsonl", {"question": "Counted?", "answer": "#### 6"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
    before = coordinator.ask("GET", f"{coordinator.url}/metrics", "read").text
    job = coordinator.submit(sha256)
    _ended(coordinator, job, b"counted", seconds=75.0, peak_bytes=3 * 2**30, energy_j=1500.0)
    coordinator.hear("job", JobResult(job.digest, "failed"), job.id, "result")
    bad = Received(f"edge1/default/{NODE}/up/heartbeat", b"{", paho.Client(CallbackAPIVersion.VERSION2))
    coordinator.call(lambda: coordinator.service._receive(bad))
    after = coordinator.ask("GET", f"{coordinator.url}/metrics", "read")
    assert after.headers["content-type"].startswith("text/plain; version=")
    grown = {
        'edge_agent_jobs{outcome="succeeded",phase="ended"}': 1, 'edge_agent_job_seconds_count{outcome="succeeded"}': 1,
        'edge_agent_job_seconds_bucket{le="300.0",outcome="succeeded"}': 1, "edge_agent_job_peak_bytes_sum": 3 * 2**30,
        "edge_agent_job_energy_joules_total": 1500,
        'edge_agent_messages_received_total{kind="job"}': 2, "edge_agent_messages_refused_total": 1, "edge_agent_messages_late_total": 1,
        'edge_agent_api_requests_total{method="POST",route="/v1/jobs",status="201"}': 1,
    }  # fmt: skip
    found = {(m.name, s.name) for m in text_string_to_metric_families(after.text) for s in m.samples}
    assert found
    for name, more in grown.items():
        old = _value(before, name) if f"\n{name} " in before else 0
        assert _value(after.text, name) - old == more, name
    assert NODE not in after.text
    assert job.id not in after.text
    documented = set(re.findall(r"^\| `(edge_agent_\w+)`", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    assert documented == {line.split()[2] for line in after.text.splitlines() if line.startswith("# TYPE") and "_created" not in line}


def test_dashboard_shows_the_metrics_that_there_are() -> None:
    """Every one that is documented, by labels that it has, and no other; no panel lies on another."""
    rows = re.findall(r"^\| `(edge_agent_\w+)` \|([^|]*)\|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    labels = {name: {"le", "instance", *re.findall(r"`(\w+)`", cell)} for name, cell in rows}
    board = msgspec.json.decode((ROOT / "deploy" / "grafana" / "edge-agent.json").read_bytes())
    asked = set()
    for expression in (target["expr"] for panel in board["panels"] for target in panel["targets"]):
        name, chosen = re.findall(r"(edge_agent_\w+)\{(.*?)\}", expression)[0]
        name = re.sub(r"_(count|sum|bucket)$", "", name)
        used = [*re.findall(r"(\w+)[!=]=?~?\"", chosen), *(re.findall(r"by \((\w+)\)", expression))]
        assert set(used) <= labels[name], expression
        asked.add(name)
    assert asked == set(labels)
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(cells) == len(set(cells))


def test_audit_names_who_asked_for_what(coordinator: ApiServer) -> None:
    """Each request that was to change something, done or refused, and what it has made; no reading, no body and no secret."""
    file, sha256 = _dataset(coordinator, "audited.jsonl", {"question": "Audited?", "answer": "#### 8"})
    with coordinator.client("submit") as client:
        client.upload(file, sha256)
        job = coordinator.submit(sha256)
        client.cancel(job.id)
        with pytest.raises(Answered, match="may submit"):
            client.forget(job.id)
    coordinator.ask("GET", "/nodes", "read")
    coordinator.ask("POST", f"/jobs/{job.id}/cancel", None)
    told = coordinator.client("admin").audit(4)
    assert [(r.who, r.address, r.what, r.made, r.status) for r in told] == [
        ("submit", "127.0.0.1", f"POST /v1/jobs/{job.id}/forget", None, 403),
        ("submit", "127.0.0.1", f"POST /v1/jobs/{job.id}/cancel", None, 200),
        ("submit", "127.0.0.1", "POST /v1/jobs", f"/v1/jobs/{job.id}", 201),
        ("submit", "127.0.0.1", f"PUT /v1/datasets/{sha256}", None, 200),
    ]


def test_who_asks_too_often_waits(tmp_path: Path) -> None:
    """A token has its own number of requests, an address one for all of them and for those without; then the answer is 429."""
    with ExitStack() as ends:
        limited = ApiServer(tmp_path, ends, token_limit=5, address_limit=12)
        answers = [limited.ask("GET", "/nodes", "read") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert _problem(answers[-1], 429, "too_many_requests").detail
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
        assert limited.ask("GET", "/nodes", "submit").status_code == 200
        assert {limited.ask("GET", "/nodes", None).status_code for _ in range(5)} == {401}
        assert limited.ask("GET", "/nodes", "admin").status_code == 429
        for _ in range(3):
            _problem(limited.ask("POST", "/jobs", "submit", headers={"X-Forwarded-For": "192.0.2.1"}), 429, "too_many_requests")
        assert limited.call(lambda: limited.service.audited(None, 9)).items == []


def test_limits_keep_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask, a bounded number of buckets is kept, and those of an IPv6 network share one."""
    limits = Limits(2)
    for number in range(MOST_BUCKETS + 100):
        limits.take(f"address {number}")
    assert len(limits) == MOST_BUCKETS
    assert network("2001:db8:1:2:3::4") == network("2001:db8:1:2:ffff::1") != network("2001:db8:1:3::4")
    assert network("192.0.2.7") != network("192.0.2.8")
    limits.take("x")
    limits.take("x")
    with pytest.raises(TooManyRequests):
        limits.take("x")
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    limits.take("x")
    with pytest.raises(TooManyRequests):
        limits.take("x")


def test_connection_that_asks_for_nothing_is_ended(coordinator: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it drips: it takes the place of others."""
    monkeypatch.setattr(listening, "HEAD_S", 0.2)
    context = ssl.create_default_context(cafile=coordinator.ca_file)
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET /v1/nodes HTTP/1.1\r\nHost: ")
        with suppress(ConnectionError, ssl.SSLError):
            assert connection.recv(1) == b""
