"""The API's document is the API: it is what the code says, and nothing that a client draws from it meets another answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
import schemathesis
import yaml
from api_server import ApiServer
from conftest import ROOT, write_lines
from hypothesis import HealthCheck, Phase, settings
from orders import NODE
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from edge_agent.coordinator.openapi import document
from edge_agent.dataset import file_sha256

WITH_JOBS = ("POST /v1/jobs", "POST /v1/rollouts", "POST /v1/plans")
CONFIG = schemathesis.Config.from_dict(
    {
        "operations": [  # of a whole job it makes thousands
            {"include-name": name, "phases": {"coverage": {"enabled": False}}} for name in WITH_JOBS
        ],
        "generation": {"with-security-parameters": False},  # the test adds a token: a request without one would be one with it
    }
)
SCHEMA = schemathesis.openapi.from_dict(document(), config=CONFIG)
ENDLESS = "/v1/events"
"""Its answer does not end; tests/test_api.py has it."""


def test_document_is_what_the_code_says() -> None:
    """docs/openapi.yaml is what `python -m edge_agent.coordinator.openapi` prints."""
    assert yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text(encoding="utf-8")) == msgspec.to_builtins(document())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A coordinator with a dataset and a job, whose ids are among those that are asked for."""
    with ExitStack() as ends:
        served = ApiServer(tmp_path_factory.mktemp("openapi"), ends)
        file = write_lines(served.root / "data.jsonl", {"question": "How many?", "answer": "#### 1"})
        with served.client("submit") as client:
            client.upload(file, file_sha256(file))
            job = served.submit(file_sha256(file)).id
            rollout = served.roll_out(file_sha256(file)).id
            client.cancel(job)  # so its events end
        served.known = {"node_id": NODE, "sha256": file_sha256(file), "job_id": job, "rollout_id": rollout}
        yield served


@SCHEMA.exclude(path=ENDLESS).parametrize()
@settings(max_examples=8, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])
def test_no_answer_is_of_another_kind(case: schemathesis.Case, server: ApiServer) -> None:
    """Whatever is asked: no status, type or form of an answer that the document does not have, none above 499, and what has not the form
    that it should have is refused."""
    if server.turn():  # every other time of what is there
        case.path_parameters = {name: server.known.get(name, value) for name, value in (case.path_parameters or {}).items()}
        _name_what_is_there(case, server)
    answer = case.call(base_url=server.url, headers={"Authorization": f"Bearer {server.secrets['admin']}"}, verify=str(server.ca_file))
    assert answer.status_code < 500, answer.text
    checks: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection]
    case.validate_response(answer, checks=checks)


def _name_what_is_there(case: schemathesis.Case, server: ApiServer) -> None:
    """Let a valid job be of a dataset, a model and a node that there are: drawn ones never are."""
    if case.operation.label not in WITH_JOBS or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    case.body["job"] |= {"dataset": {"sha256": server.known["sha256"]}, "model": "tiny", "budget_bytes": 2**29, "device": "auto"}
    if case.operation.label == "POST /v1/jobs":
        case.body |= {"node": NODE, "selector": None}
