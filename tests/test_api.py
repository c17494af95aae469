"""The coordinator's API over the network: who may do what, and what every answer looks like."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import ROOT, Cli
from fleet import free_port
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from orders import NODE

from edge_agent.config import Api, Broker, CoordinatorConfig, read_config
from edge_agent.coordinator.access import SCOPES, local
from edge_agent.coordinator.client import Client, Problem
from edge_agent.coordinator.http import MAX_BODY_BYTES, api_served, make_app
from edge_agent.coordinator.service import Service
from edge_agent.enrolment import Authority
from edge_agent.errors import ConfigInvalid, CoordinatorUnreachable
from edge_agent.messages import NodeInfo, NodeLimits, encode, new_id

INFO = NodeInfo("0.1.0", "3.11", "some device", "cpu", None, {"tiny": None}, NodeLimits(2**30, 2**20, 16), {})


class Coordinator:
    """A running coordinator, without a broker, with the API on a port of loopback and a token for every scope."""

    def __init__(self, root: Path, ends: ExitStack) -> None:
        self.root, self.port, self._ends = root, free_port(), ends
        issued = Authority(root / "authority").issue("broker", "127.0.0.1", root / "server")
        self.ca_file = root / "authority" / "ca.pem"
        self.url = f"https://127.0.0.1:{self.port}"
        self.service = Service(CoordinatorConfig(root / "coordinator", broker=Broker(port=free_port())))
        self.service.start()
        ends.callback(self.service.stop)
        self.call = self.service.call
        api = Api(port=self.port, certificate_file=issued.certificate_file, key_file=issued.key_file)
        ends.enter_context(api_served(self.service, api))
        self.secrets = {scope: self.call(lambda s=scope: self.service.access.new(s, s, None)).secret for scope in SCOPES}  # type: ignore[misc]
        self.hear("info", INFO)
        self.http = httpx.Client(verify=ssl.create_default_context(cafile=self.ca_file), base_url=f"{self.url}/v1", timeout=30)
        ends.callback(self.http.close)

    def hear(self, kind: str, data: object, *parts: str) -> None:
        """Take in what a node says."""
        self.call(lambda: self.service._receive_up(NODE, [kind, *parts], encode(data, "test"), False))

    def ask(self, method: str, path: str, scope: str | None = "admin", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[scope]}"} if scope else {}
        return self.http.request(method, path, headers=headers | more.pop("headers", {}), **more)

    def token_file(self, scope: str) -> Path:
        file = self.root / f"{scope}.token"
        file.write_text(self.secrets[scope] + "\n")
        file.chmod(0o600)
        return file

    def client(self, scope: str) -> Client:
        return self._ends.enter_context(Client.remote(self.url, self.token_file(scope), self.ca_file))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with ExitStack() as ends:
        yield Coordinator(tmp_path_factory.mktemp("api"), ends)


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


def test_every_route_declares_its_scope(coordinator: Coordinator) -> None:
    """There is no route without one, and docs/api.md names each with its own, and no other."""
    found = _routes(make_app(coordinator.service, local))
    assert set(found.values()) <= set(SCOPES)
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()]
    documented = {tuple(row[0].strip("`").split(" ")): row[1].strip("`") for row in rows if row[0].startswith("`") and "/v1" in row[0]}
    assert documented == {(method, path.replace(":str}", "}")): scope for (method, path), scope in found.items()}


def test_every_route_checks_its_scope(coordinator: Coordinator) -> None:
    """Without a token nobody gets anywhere, with a lesser one neither; with its own scope a request gets past the door."""
    for (method, path), needed in _routes(make_app(coordinator.service, local)).items():
        assert needed is not None
        place = path.removeprefix("/v1").replace("{", "").replace(":str}", "")  # of what does not exist
        assert _problem(coordinator.ask(method, place, None), 401, "unauthorized").title == "Unauthorized"
        for scope in SCOPES:
            enough = SCOPES.index(scope) >= SCOPES.index(needed)  # type: ignore[arg-type]
            answer = coordinator.ask(method, place, scope)
            assert (answer.status_code == 403) == (not enough), f"{method} {path} with {scope}: {answer.status_code}"
            if not enough:
                _problem(answer, 403, "forbidden")


def test_options_tell_nothing_without_a_token(coordinator: Coordinator) -> None:
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
def test_what_is_no_token_is_refused(header: str, coordinator: Coordinator) -> None:
    """An unknown name, another secret, half of it, another scheme: each is 401, and the answer asks for a token."""
    token = coordinator.secrets["read"]
    name, _, secret = token.partition(".")
    value = header.format(token=token, name=name, secret=secret).encode("latin-1")
    answer = coordinator.http.get("/nodes", headers={"Authorization": value})
    _problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert coordinator.ask("GET", "/nodes", "read").status_code == 200


def test_token_ends_by_its_time_or_at_once(coordinator: Coordinator) -> None:
    """One that has expired or was revoked opens nothing; a name is given once, and is free again afterwards."""
    admin = coordinator.client("admin")
    made = admin.new_token("passing", "read", 1e-9)
    bearer = {"Authorization": f"Bearer {made.secret}"}
    _problem(coordinator.http.get("/nodes", headers=bearer), 401, "unauthorized")
    again = coordinator.ask("POST", "/tokens", json={"name": "passing", "scope": "read"})
    _problem(again, 409, "refused")
    assert "passing" in {token.name for token in admin.tokens()}
    assert admin.revoke_token("passing") == made.token
    lasting = admin.new_token("passing", "read", None)
    bearer = {"Authorization": f"Bearer {lasting.secret}"}
    assert coordinator.http.get("/nodes", headers=bearer).status_code == 200
    assert coordinator.http.get("/nodes", headers={"Authorization": f"Bearer {made.secret}"}).status_code == 401
    admin.revoke_token("passing")
    assert coordinator.http.get("/nodes", headers=bearer).status_code == 401
    _problem(coordinator.ask("DELETE", "/tokens/passing"), 404, "refused")


def test_secrets_are_kept_nowhere(coordinator: Coordinator) -> None:
    """Neither the database nor an answer holds one that was told before, and the digests are those of tokens after a restart."""
    told = coordinator.ask("GET", "/tokens").content
    for token in coordinator.secrets.values():
        secret = token.partition(".")[2].encode()
        assert len(secret) >= 43
        assert secret not in told
        assert all(secret not in file.read_bytes() for file in (coordinator.root / "coordinator").glob("coordinator.sqlite*"))


def test_requests_that_cannot_be_answered_are_problems(coordinator: Coordinator) -> None:
    """Unknown places, other methods, broken, deep, wrong and long bodies: each has its status, code and text, none the server's."""
    ask, job = coordinator.ask, {"node": NODE, "job": {"model": "tiny"}}
    _problem(ask("GET", "/nowhere"), 404, "refused")
    _problem(ask("GET", "/../../etc/passwd"), 404, "refused")
    _problem(ask("PATCH", "/jobs"), 405, "refused")
    _problem(ask("GET", f"/jobs/{new_id()}"), 404, "refused")
    _problem(ask("POST", f"/jobs/{new_id()}/cancel"), 404, "refused")
    _problem(ask("POST", "/nodes/%2e%2e/drain"), 404, "refused")
    _problem(ask("GET", "/jobs?limit=0"), 400, "job_schema")
    for body in (b"", b"{", b"[" * 100_000, b'{"node":' * 50_000, b'{"node": "\xff"}', b"[]", b"null", msgspec.json.encode(job | {"x": 1})):
        _problem(ask("POST", "/jobs", content=body), 400, "job_schema")
    assert "dataset" in _problem(ask("POST", "/jobs", json=job), 400, "job_schema").detail
    _problem(ask("POST", "/jobs", content=b" " * (MAX_BODY_BYTES + 1)), 413, "refused")
    _problem(ask("POST", "/tokens", json={"name": "A/b", "scope": "read"}), 400, "job_schema")
    for answer in (ask("GET", "/nodes"), ask("GET", "/nowhere")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_commands_ask_a_coordinator_elsewhere(coordinator: Coordinator, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "grafana" not in cli("tokens", "list").out
    assert cli("drain", NODE).code == 0
    assert cli("resume", NODE).code == 0


def test_token_goes_to_nobody_else(coordinator: Coordinator, tmp_path: Path) -> None:
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
