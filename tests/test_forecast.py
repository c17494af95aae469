"""The plan of a job before it is sent: near the plan of the real lengths, cheap whatever is asked, and answered by its node alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from api_server import ApiServer
from conftest import write_domain, write_lines
from fleet import open_broker, wait_for
from orders import NODE

from edge_agent.admission import Rejected
from edge_agent.config import AgentConfig
from edge_agent.coordinator import plans, routes
from edge_agent.dataset import file_sha256, read_records
from edge_agent.dataset_check import check
from edge_agent.errors import DoesNotFit
from edge_agent.forecast import forecast, lengths_of
from edge_agent.job import CutOptions, Dataset, Job, NlftOptions, ReftOptions, SftOptions
from edge_agent.messages import NodeState, PlanAnswer, Texts, encode, new_id
from edge_agent.training.prepare import prepare_files
from profiles.calibration import calibrated
from profiles.device import device_profile
from quantization.estimate import make_estimate
from quantization.plan import Plan

CPU = device_profile("cpu")
LARGEST = Texts(2**28, *[2**28] * 4)


def _config(tmp_path: Path, tiny_model: Path, budget: int = 2**33) -> AgentConfig:
    return AgentConfig(NODE, tmp_path, budget=budget, models={"tiny": tiny_model})


@pytest.mark.parametrize("method", [NlftOptions(), SftOptions(), CutOptions(), ReftOptions()], ids=lambda m: type(m).__name__)
def test_it_is_near_the_plan_of_the_real_lengths(method: Any, tmp_path: Path, tiny_model: Path) -> None:
    """Of worked problems, whose tokens have about three characters each, within -5 and +20 %."""
    file = write_domain(tmp_path / "data.jsonl", "chain", 24, 5)
    found, _ = check(file)
    assert found.characters.question is not None
    assert found.characters.answer is not None
    texts = Texts(found.records, found.characters.question.max, found.characters.answer.max)
    job = Job(model="tiny", dataset=Dataset(file_sha256(file)), budget_bytes=2**33, method=method)
    device = calibrated(CPU)  # runs of this session may have taught it
    exact = prepare_files(msgspec.structs.replace(job, model=str(tiny_model)), read_records(file), None, device)
    planned = make_estimate(exact.shape, job, exact.lengths, device).peak_bytes
    told, warning = forecast(job, texts, _config(tmp_path, tiny_model), CPU)
    assert warning is None
    assert 0.95 * planned < told.peak_bytes < 1.2 * planned


@pytest.mark.parametrize("method", [NlftOptions(), CutOptions(), ReftOptions()], ids=lambda m: type(m).__name__)
def test_it_is_cheap_whatever_is_asked(method: Any) -> None:
    """Texts and batches as large as a message may name them are cut off at what a model and a device can take."""
    job = Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**33, method=method)
    job = msgspec.structs.replace(job, schedule=msgspec.structs.replace(job.schedule, batch=1_000_000))
    lengths, given = lengths_of(job, LARGEST, 8192)
    assert given > 2**26
    assert lengths.score.longest == lengths.train.longest == 8192
    assert max(len(lengths.score.tokens), len(lengths.train.tokens)) <= 1024
    assert sum(lengths.generate) <= 8192


def test_it_says_what_a_job_lacks(tmp_path: Path, tiny_model: Path) -> None:
    """As an offer of the job would be answered."""
    config, texts = _config(tmp_path, tiny_model, 2**31), Texts(24, 200, 150)
    job = Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**31)
    for changed, reason in (
        ({"budget_bytes": 2**32}, "oom_predicted"),
        ({"model": "other"}, "model_missing"),
        ({"device": "cuda"}, "device_missing"),
    ):
        with pytest.raises(Rejected) as refused:
            forecast(msgspec.structs.replace(job, **changed), texts, config, CPU)
        assert refused.value.reason == reason
    _, warning = forecast(job, Texts(24, 9000, 150), config, CPU)
    assert "the model's context has 2,048" in (warning or "")
    with pytest.raises(DoesNotFit, match="raise --budget to at least"):
        forecast(msgspec.structs.replace(job, budget_bytes=2**28), texts, config, CPU)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ExitStack() as ends:
        port = ends.enter_context(open_broker(tmp_path_factory.mktemp("broker")))
        server = ApiServer(tmp_path_factory.mktemp("plans"), ends, broker_port=port)
        wait_for("the coordinator's link", lambda: server.service._link.connected)
        yield server


def test_its_node_alone_answers(coordinator: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is not there is not asked, what another says is not taken, and who waits in vain is told."""
    file = write_lines(
        tmp_path / "data.jsonl", {"question": "How many?", "answer": "#### 1"}, {"question": "And now, how many?", "answer": "#### 2"}
    )
    coordinator.client("submit").upload(file, file_sha256(file))
    job = Job(model="tiny", dataset=Dataset(file_sha256(file)), budget_bytes=2**29)
    body = msgspec.json.encode({"node": NODE, "job": job})
    away = coordinator.ask("POST", "/plans", "read", content=body)
    assert (away.status_code, "is not there to be asked" in away.text) == (409, True)
    coordinator.hear("state", NodeState("ready", 1, 1, 0))
    missing = msgspec.json.encode({"node": NODE, "job": msgspec.structs.replace(job, dataset=Dataset("0" * 64))})
    assert coordinator.ask("POST", "/plans", "read", content=missing).status_code == 404

    plan = Plan("as asked", 8, 256, False, 64, 2**29, ())
    asked: list[Any] = []

    def answer() -> None:
        while not (plans := coordinator.service._plans._asked):
            time.sleep(0.01)
        [(request, waiting)] = plans.items()
        asked.append(waiting.node)
        for node, told in (("other", PlanAnswer(None, "busy", "not mine")), (NODE, PlanAnswer(plan))):
            message = encode(told, "test")
            coordinator.call(
                lambda node=node, message=message: coordinator.service._receive_up(node, ["plan", request, "answer"], message, False)
            )

    thread = threading.Thread(target=answer)
    thread.start()
    told = coordinator.ask("POST", "/plans", "read", content=body)
    thread.join()
    assert (told.status_code, asked) == (200, [NODE])
    assert msgspec.json.decode(told.content, type=PlanAnswer) == PlanAnswer(plan)
    monkeypatch.setattr(routes, "PLAN_S", 0.1)
    monkeypatch.setattr(plans, "MOST_OF_NODE", 1)
    silent = coordinator.ask("POST", "/plans", "read", content=body)
    assert (silent.status_code, "has not answered" in silent.text) == (409, True)
    busy = coordinator.ask("POST", "/plans", "read", content=body)
    assert (busy.status_code, "is asked for 1 plans already" in busy.text) == (409, True)
    late = encode(PlanAnswer(plan), "test")
    coordinator.hear("plan", PlanAnswer(plan), new_id(), "answer")
    [request] = coordinator.service._plans._asked
    coordinator.call(lambda: coordinator.service._receive_up(NODE, ["plan", request, "answer"], late, False))
    assert coordinator.service._plans._asked == {}
