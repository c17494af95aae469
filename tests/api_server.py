"""A coordinator for tests of its API: real in all but its broker, which most of them do without."""

from __future__ import annotations

import ssl
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fleet import free_port
from orders import NODE

from edge_agent.config import Api, Broker, CoordinatorConfig, Database
from edge_agent.coordinator.access import SCOPES
from edge_agent.coordinator.client import Client
from edge_agent.coordinator.http import api_served
from edge_agent.coordinator.rollout import RolloutPlan, RolloutView
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.views import JobView
from edge_agent.enrolment import Authority
from edge_agent.job import Dataset, Job
from edge_agent.messages import NodeInfo, NodeLimits, NodeState, encode

INFO = NodeInfo("0.1.0", "3.11", "some device", "cpu", None, {"tiny": None}, NodeLimits(2**30, 2**20, 16), {})


class ApiServer:
    """A running coordinator, without a broker unless given one, with the API on a port of loopback and a token for every scope."""

    def __init__(
        self, root: Path, ends: ExitStack, token_limit: int = 100_000, address_limit: int = 100_000,
        database: Database | None = None, broker_port: int | None = None,
    ) -> None:  # fmt: skip
        self.root, self.port, self._ends = root, free_port(), ends
        self.known: dict[str, str] = {}
        """What requests may name, by the names of parameters."""
        self._turns = cycle((False, True))
        issued = Authority(root / "authority").issue("broker", "127.0.0.1", root / "server")
        self.ca_file = root / "authority" / "ca.pem"
        self.url = f"https://127.0.0.1:{self.port}"
        self._config = CoordinatorConfig(root / "coordinator", broker=Broker(port=broker_port or free_port()), database=database)
        limits = {"token_limit": token_limit, "address_limit": address_limit}
        self._api = Api(port=self.port, certificate_file=issued.certificate_file, key_file=issued.key_file, **limits)
        self._running = ends.enter_context(ExitStack())
        self.start()
        self.secrets = {scope: self.call(lambda s=scope: self.service.access.new(s, s, None)).secret for scope in SCOPES}  # type: ignore[misc]
        self.hear("info", INFO)
        self.http = httpx.Client(verify=ssl.create_default_context(cafile=self.ca_file), base_url=f"{self.url}/v1", timeout=30)
        ends.callback(self.http.close)

    def start(self) -> None:
        self.service = Service(self._config)
        self.service.start()
        self._running.callback(self.service.stop)
        self.call = self.service.call
        self._running.enter_context(api_served(self.service, self._api))

    def stop(self) -> None:
        self._running.close()

    def hear(self, kind: str, data: object, *parts: str) -> None:
        """Take in what a node says."""
        self.call(lambda: self.service._receive_up(NODE, [kind, *parts], encode(data, "test"), False))

    def ask(self, method: str, path: str, scope: str | None = "admin", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[scope]}"} if scope else {}
        return self.http.request(method, path, headers=headers | more.pop("headers", {}), **more)

    def turn(self) -> bool:
        """Every other time true."""
        return next(self._turns)

    def token_file(self, scope: str) -> Path:
        file = self.root / f"{scope}.token"
        file.write_text(self.secrets[scope] + "\n")
        file.chmod(0o600)
        return file

    def client(self, scope: str) -> Client:
        return self._ends.enter_context(Client.remote(self.url, self.token_file(scope), self.ca_file))

    def submit(self, sha256: str) -> JobView:
        """Hand in a job over a dataset that is there."""
        job = Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29)
        answer = self.ask("POST", "/jobs", "submit", content=msgspec.json.encode({"node": NODE, "job": job}))
        assert answer.status_code == 201, answer.text
        return msgspec.json.decode(answer.content, type=JobView)

    def roll_out(self, sha256: str) -> RolloutView:
        """Begin a rollout over a dataset that is there, to the node."""
        self.hear("state", NodeState("ready", 1, 1, 0))
        self.hear("info", msgspec.structs.replace(INFO, models={"tiny": "0" * 64}))
        plan = RolloutPlan(job=Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29))
        made = self.call(lambda: self.service.roll_out(plan, False)).rollout
        assert made is not None
        return made
