"""A job travels over a real broker and comes back: the daemon, the coordinator and the commands as their users run them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import TINY, Cli, write_domain
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet import BUDGET, QUICK, Fleet, wait_for
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from orders import NODE, make_offer, make_order

from edge_agent.config import AgentConfig, read_config
from edge_agent.doctor import BROKER_CHECKS, CHECKS, at_the_broker
from edge_agent.job import NlftOptions
from edge_agent.job_building import build_job
from edge_agent.messages import (
    BLOCK_BYTES,
    Cancel,
    Drain,
    File,
    FileRequest,
    Forget,
    Offer,
    Options,
    OptionsState,
    Order,
    Report,
    Resume,
    encode,
    new_id,
)
from edge_agent.report import Change
from edge_agent.signing import seal, seal_bytes
from edge_agent.topics import up

SETTINGS = [part for name, value in QUICK.items() for part in ("--set", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """A fleet with TLS and passwords; what passes its broker is held against the contract at its end."""
    with Fleet(secure=True, agent='home_assistant = "homeassistant"\n') as running:
        yield running
        assert running.check_messages() > 20
        assert running.trainers_at_once == 1


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, cli: Cli, tiny_model: Path) -> Path:
    """A directory with a job's files, data.jsonl and questions.jsonl, and its run without a fleet, in job/."""
    base = tmp_path_factory.mktemp("local")
    data, questions = write_domain(base / "data.jsonl", "chain", 40, 5), write_domain(base / "questions.jsonl", "chain", 400, 77)
    files = ("--model", tiny_model, "--data", data, "--eval-data", questions)
    ran = cli("train", *files, "--budget", BUDGET, "--out", base / "job", *SETTINGS, "--json")
    assert ran.code == 0, ran.out + ran.err
    return base


@pytest.mark.parametrize("broker", ["mosquitto", pytest.param("amqtt", marks=pytest.mark.slow)])
def test_a_job_travels_and_comes_back(broker: str, request: pytest.FixtureRequest, tmp_path: Path, cli: Cli, local: Path) -> None:
    """By its commands alone: submitted to the best node of a label, with a dataset inline and questions in blocks, watched, fetched; the
    adapter is that of a local run bit for bit. Over Mosquitto in MQTT 5 with TLS and passwords, and over amqtt, which speaks 3.1.1 only,
    with the agent within a WebSocket.
    """
    if broker == "amqtt":
        with Fleet(amqtt=True) as fleet:
            _travel(fleet, tmp_path, cli, local)
            assert "protocol=3.1.1" in fleet.log("agent")
            assert '"disconnected ' not in fleet.log("agent")
            assert fleet.check_messages() > 20
    else:
        fleet = request.getfixturevalue("fleet")
        _travel(fleet, tmp_path, cli, local)
        assert "protocol=5" in fleet.log("agent")


def _travel(fleet: Fleet, directory: Path, cli: Cli, local: Path) -> None:
    config = ("--config", fleet.config("coordinator"))
    data, questions = local / "data.jsonl", local / "questions.jsonl"
    assert questions.stat().st_size > 64 * 1024, "it must be too long to travel inside the offer"
    listed = cli("nodes", *config)
    assert NODE in listed.out
    assert "ready" in listed.out
    at = ("--label", "site=bench")  # as the agent's configuration says
    submitted = cli("submit", *at, "--model", "tiny", "--data", data, "--eval-data", questions, "--budget", BUDGET, *SETTINGS, *config)
    assert submitted.code == 0, submitted.err
    assert submitted.err.startswith(f"to {NODE}: no job there, ")
    job = submitted.out.strip()
    watched = cli("watch", job, *config)
    assert watched.code == 0, watched.out + watched.err
    for words in ("running", "succeeded", "✓ train", "Accuracy on held-out questions", "Stages"):
        assert words in watched.out
    assert job in cli("jobs", *config).out
    fetched = cli("fetch", job, "--out", directory / "fetched", *config)
    assert fetched.code == 0, fetched.err
    result = json.loads((directory / "fetched" / "result.json").read_text())
    assert result["accuracy"]["after"]["n"] == 10
    adapter = (directory / "fetched" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter == (local / "job" / "adapter" / "adapter_model.safetensors").read_bytes()
    phases = [m["data"]["phase"] for m in fleet.heard("job", job, "status")]
    assert [p for i, p in enumerate(phases) if p not in phases[:i]] == ["accepted", "staging", "ready", "running", "finalizing"]
    results = fleet.heard("job", job, "result")
    assert {m["id"] for m in results} == {results[0]["id"]}
    assert results[0]["data"]["tokens_per_s"] > 0
    assert results[0]["data"].get("energy_j") == result["energy"]["total_j"]
    seqs = {m["seq"] for m in fleet.heard("job", job, "status") + results}
    assert seqs == set(range(1, len(seqs) + 1))
    beat = fleet.heard("heartbeat")[-1]["data"]["resources"]
    for sensor in ("device_free_bytes", "utilisation_percent", "temperature_c", "power_w"):
        assert (beat[sensor]["value"] is None) == (beat[sensor]["reason"] is not None)


def test_home_assistant_finds_the_sensors_of_a_node(fleet: Fleet) -> None:
    """One retained message names them; its templates, as Home Assistant reads them, find what the node says, and nothing where that is
    nothing."""
    told: list[bytes] = []
    fleet.ear.message_callback_add("homeassistant/#", lambda _c, _u, message: told.append(message.payload))
    fleet.ear.subscribe("homeassistant/#", 1)
    found = json.loads(wait_for("the discovery", lambda: told)[0])
    said = {up("default", NODE, kind): fleet.heard(kind)[-1] for kind in ("state", "heartbeat")}

    def read(template: str, topic: str) -> str:
        return SandboxedEnvironment(undefined=StrictUndefined).from_string(template).render(value_json=said[topic])

    components = found["components"]
    values = {key: read(c["value_template"], c.get("state_topic", found["state_topic"])) for key, c in components.items()}
    beat = said[found["state_topic"]]["data"]
    resources = beat["resources"]
    assert values == {
        "state": "ready", "job": beat["job"] or "none", "queue": str(beat["queue"]), "job_memory": str(resources["trainer_bytes"]),
        "device_free": str(resources["device_free_bytes"]["value"]), "disk_free": str(resources["disk_free_bytes"]),
        "utilisation": str(resources["utilisation_percent"]["value"]), "temperature": str(resources["temperature_c"]["value"]),
        "power": str(resources["power_w"]["value"]),
    }  # fmt: skip
    assert values["state"] in components["state"]["options"]
    assert read(found["availability_template"], found["availability_topic"]) == "online"
    assert len({c["unique_id"] for c in components.values()}) == len(components)
    assert all(c["platform"] == "sensor" for c in components.values())


@pytest.mark.slow
def test_one_offer_many_times_is_one_job(fleet: Fleet) -> None:
    """The same offer, sent five times at once and again after the end, gives one run and the same answer; another document under the
    same id is a conflict and changes nothing."""
    data = fleet.data("repeated", 20, 9)
    job = new_id()
    offer = _offer(fleet, data, job, updates=2)
    for _ in range(5):
        fleet.publish(offer, "job", job, "offer")
    first = wait_for("the result", lambda: fleet.heard("job", job, "result"))[0]
    assert first["data"]["outcome"] == "succeeded"
    fleet.acknowledge(job)
    fleet.publish(offer, "job", job, "offer")
    wait_for("the result once more", lambda: len({m["id"] for m in fleet.heard("job", job, "result")}) == 2)
    assert all(m["data"] == first["data"] for m in fleet.heard("job", job, "result"))
    fleet.publish(_offer(fleet, data, job, updates=3), "job", job, "offer")
    conflict = wait_for("the rejection", lambda: [m for m in fleet.heard("job", job, "status") if m["data"]["outcome"] == "rejected"])[0]
    assert conflict["data"]["reason"] == "conflict"
    assert len([m for m in fleet.log("agent").splitlines() if f"trainer_started job={job}" in m]) == 1
    fleet.control(Forget("default", NODE, job), "command", "forget")
    wait_for("the job's directory to go", lambda: not (fleet.directory / "node" / "jobs" / job).exists())
    fleet.publish(offer, "job", job, "offer")
    replayed = wait_for("its rejection", lambda: [m for m in fleet.heard("job", job, "status") if m["data"]["reason"] == "replayed"])[0]
    assert replayed["data"]["outcome"] == "rejected"


@pytest.mark.slow
def test_options_change_while_a_job_runs(fleet: Fleet, cli: Cli) -> None:
    """By the command, signed: the trainer takes them between two updates, tells it, and the report has them; an older order changes
    nothing, nor one that nobody trusted has signed."""
    config = ("--config", fleet.config("coordinator"))
    settings = {"schedule__updates": 24, "schedule__batch": 4, "evaluation__questions": 0, "sampling__outputs": 0}
    job = fleet.submit(fleet.data("live", 24, 11), **settings).id
    assert "no options were sent" in cli("options", job, *config).out
    fleet.trained(job, 2)
    changed = cli("options", job, "--set", "method.correct_threshold=0.4", "--set", "method.imitate_incorrect=true", *config)
    assert (changed.code, changed.out.split()[:3]) == (0, [job, "options", "1"]), changed.err

    def taken() -> OptionsState | None:
        state = fleet.client.job(job).options_state
        return state if state is not None and state.taken else None

    state = wait_for("the options to be taken", taken)
    method = NlftOptions(correct_threshold=0.4, imitate_incorrect=True)
    forged = Options("default", NODE, job, 2, NlftOptions(correct_threshold=0.1))
    fleet.publish(seal(forged, None), "job", job, "options")
    fleet.control(Options("default", NODE, job, 1, NlftOptions(correct_threshold=0.1)), "job", job, "options")
    view = fleet.ended(job)
    assert view.options_state == state == OptionsState(1, 1, state.update)
    assert f"1 taken after update {state.update}" in cli("options", job, *config).out
    result = fleet.client.result(view)
    assert result is not None
    assert result.changes == [Change(1, state.update or 0, method)]
    assert 2 <= result.changes[0].update < 24
    wait_for("the forged one in the log", lambda: f"/{job}/options reason=signature" in fleet.log("agent"))
    refused = cli("options", job, "--set", "method.correct_threshold=0.3", *config)
    assert (refused.code, "has ended" in refused.err) == (14, True)


def _order(data: Path, job: str, updates: int = 2, model: str = "tiny", **changes: object) -> Order:
    fields = {"budget_bytes": BUDGET, "method.name": "nlft"} | QUICK | {"schedule.updates": updates} | changes
    return make_order(build_job(model, data, None, fields, []), data.stat().st_size, id=job)


def _offer(fleet: Fleet, data: Path, job: str, updates: int = 2, **changes: object) -> Offer:
    return make_offer(_order(data, job, updates, **changes), data.read_bytes(), fleet.key)


def test_bad_messages_are_answered_and_others_go_on(fleet: Fleet, tmp_path: Path) -> None:
    """Broken JSON, an unknown field, a wrong type, 10 MB, a wrong digest, an unknown model, too large a budget, an expired offer and a
    broken dataset are rejected or fail with their reason, while a good job runs to its end."""
    good = fleet.submit(fleet.data("good", 30, 4), schedule__updates=4)
    data = fleet.data("bad", 20, 8)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "How many?", "answer": "#### 1"}\n{"question": 5}\n')
    past, key = datetime.now(timezone.utc) - timedelta(hours=1), fleet.key

    def offered(job: str) -> Offer:
        return _offer(fleet, data, job)

    def ordered(job: str, **changes: Any) -> Offer:
        return make_offer(msgspec.structs.replace(_order(data, job), **changes), None, key)

    def edited(job: str, old: str, new: str) -> Offer:
        """Signed, with one change in the text of the order."""
        text = offered(job).order.payload.decode()
        assert text.count(old) >= 1
        return Offer(seal_bytes(text.replace(old, new, 1).encode(), Order, key))

    def other_type(job: str) -> bytes:
        return encode(offered(job), "test").replace(b'"type":"edge1.job.offer"', b'"type":"edge1.job.cancel"', 1)

    def other_order(job: str) -> Offer:
        """The signature of another order."""
        return Offer(msgspec.structs.replace(offered(job).order, signatures=offered(new_id()).order.signatures))

    sha256 = _order(data, new_id()).dataset.sha256
    bad: dict[str, Callable[[str], object]] = {
        "broken JSON": lambda _: b'{"specversion": "1.0", "data": {',
        "no object": lambda _: b"[1, 2, 3]",
        "not UTF-8": lambda _: b'{"specversion": "\xff\xfe"}',
        "unknown field": lambda job: edited(job, '"epochs":', '"epoch":'),
        "wrong type": lambda job: edited(job, '"rank":16', '"rank":"16"'),
        "out of bounds": lambda job: edited(job, '"rank":16', '"rank":100000'),
        "other type": other_type,
        "10 MB": lambda _: b'{"specversion": "1.0", "filler": "' + b"x" * 10_000_000 + b'"}',
        "deep": lambda _: b'{"data":' * 100_000,
        "deep order": lambda _: Offer(seal_bytes(b'{"job":' * 20_000, Order, key)),
        "no JSON": lambda _: Offer(seal_bytes(b"\x80\x04K*.", Order, key)),
        "wrong digest": lambda job: msgspec.structs.replace(offered(job), contents={sha256: b"other"}),
        "digest of another": lambda job: ordered(job, dataset=File("0" * 64, 5)),
        "file of another": lambda job: msgspec.structs.replace(offered(job), contents={"0" * 64: b"other"}),
        "unknown model": lambda job: make_offer(_order(data, job, model="../../etc"), None, key),
        "other model": lambda job: ordered(job, model_fingerprint="0" * 64),
        "too large a budget": lambda job: _offer(fleet, data, job, budget_bytes=2**40),
        "too small a budget": lambda job: _offer(fleet, data, job, budget_bytes=2**20),
        "expired": lambda job: ordered(job, expires=past),
        "valid for too long": lambda job: ordered(job, expires=past + timedelta(days=365)),
        "other node": lambda job: ordered(job, node="node-2"),
        "other fleet": lambda job: ordered(job, fleet="theirs"),
        "other job": lambda _: offered(new_id()),
        "unsigned": lambda job: make_offer(_order(data, job)),
        "signed by another": lambda job: make_offer(_order(data, job), None, Ed25519PrivateKey.generate()),
        "signature of another": other_order,
        "other payload type": lambda job: Offer(msgspec.structs.replace(offered(job).order, payload_type="text/plain")),
        "broken line": lambda job: _offer(fleet, broken, job),
        "too large": lambda job: ordered(job, dataset=File(sha256, 2**40)),
    }
    expected = {
        "broken JSON": "job_schema", "no object": "job_schema", "not UTF-8": "job_schema", "unknown field": "job_schema",
        "wrong type": "job_schema", "out of bounds": "job_schema", "other type": "job_schema", "10 MB": "job_schema", "deep": "job_schema",
        "deep order": "job_schema", "no JSON": "job_schema", "file of another": "dataset_checksum", "other model": "model_mismatch",
        "valid for too long": "expired", "other node": "audience", "other fleet": "audience", "other job": "audience",
        "unsigned": "signature", "signed by another": "signature", "signature of another": "signature", "other payload type": "job_schema",
        "wrong digest": "dataset_checksum", "digest of another": "dataset_checksum", "unknown model": "model_missing",
        "too large a budget": "oom_predicted", "too small a budget": "oom_predicted", "expired": "expired",
        "broken line": "dataset_schema", "too large": "dataset_too_large",
    }  # fmt: skip
    jobs = {name: new_id() for name in bad}
    for name, make in bad.items():
        fleet.publish(make(jobs[name]), "job", jobs[name], "offer")
    for parts in (("job", "no-ulid", "offer"), ("job", "..", "cancel"), ("file", "..", "block", "0"), ("command", "explode"), ("strange",)):
        fleet.publish(b"{}", *parts)
    for name, job in jobs.items():
        kind = "result" if name == "broken line" else "status"
        found = wait_for(f"the answer to {name}", lambda job=job, kind=kind: fleet.heard("job", job, kind))[-1]["data"]  # type: ignore[misc]
        assert found["outcome"] == ("failed" if name == "broken line" else "rejected"), name
        assert found["reason"] == expected[name], f"{name}: {found}"
        assert 10 < len(found["text"]) <= 1024
    assert fleet.ended(good.id).outcome == "succeeded"
    assert fleet.alive("agent")
    assert "event_failed" not in fleet.log("agent")


@pytest.mark.slow
def test_garbage_does_not_end_a_job_that_runs(fleet: Fleet) -> None:
    """An unreadable offer under the id of a running job, an absurd request for blocks, a block of an absurd number: it goes on."""
    data = fleet.data("disturbed", 20, 11)
    job = fleet.submit(data, schedule__updates=3)
    wait_for("running", lambda: fleet.client.job(job.id).phase == "running")
    fleet.publish(b'{"bad": 1}', "job", job.id, "offer")
    absurd = encode(FileRequest(BLOCK_BYTES, [2**42]), "test")
    fleet.speak(up("default", NODE, "file", job.order.dataset.sha256, "request"), absurd)
    fleet.speak(up("default", NODE, "file", job.order.dataset.sha256, "block", "9" * 5000), b"x")
    assert fleet.ended(job.id).outcome == "succeeded"
    for name in ("agent", "coordinator"):
        assert "event_failed" not in fleet.log(name)
        assert "storage_error" not in fleet.log(name)


@pytest.mark.slow
def test_garbage_does_not_end_a_job_that_waits(fleet: Fleet) -> None:
    """An offer that nobody has signed, under the id of a job that its node has not been offered: the node rejects it, and the job runs."""
    fleet.stop("agent")
    wait_for("the absence of the node", lambda: not fleet.present())
    job = fleet.submit(fleet.data("waiting", 20, 13), schedule__updates=1).id
    coordinator = psutil.Process(fleet.pid("coordinator"))
    coordinator.suspend()
    try:
        fleet.start_agent()
        wait_for("the node", lambda: fleet.log("agent").rstrip().splitlines()[-1].count("connected"))
        fleet.publish(make_offer(_order(fleet.data("forged", 20, 14), job)), "job", job, "offer")
        wait_for("the rejection", lambda: [m for m in fleet.heard("job", job, "status") if m["data"]["outcome"] == "rejected"])
    finally:
        coordinator.resume()
    assert fleet.ended(job).outcome == "succeeded"
    assert f"rejection_ignored node={NODE} job={job}" in fleet.log("coordinator")


@pytest.mark.slow
def test_large_datasets_are_taken(fleet: Fleet, tmp_path: Path) -> None:
    """A dataset of 12 MB is uploaded and offered; it is below the limit of 256 MiB."""
    large = tmp_path / "large.jsonl"
    large.write_text("".join(json.dumps({"question": f"{k}? " + "x" * 120_000, "answer": "#### 1"}) + "\n" for k in range(100)))
    view = fleet.submit(large)
    wait_for("staged", lambda: fleet.client.job(view.id).phase not in ("created", "offered", "accepted", "staging"))
    assert (fleet.directory / "node" / "jobs" / view.id / "dataset.jsonl").stat().st_size == large.stat().st_size
    assert fleet.ended(view.id).reason == "record_too_long"


def test_a_job_is_canceled_wherever_it_is(fleet: Fleet, cli: Cli) -> None:
    """One that runs, one that waits and one whose offer never came: each ends once as canceled, and nothing runs on."""
    data = fleet.data("canceled", 30, 6)
    running, waiting = fleet.submit(data, schedule__updates=500), fleet.submit(data, schedule__updates=501)
    fleet.trained(running.id, 2)
    wait_for("the second job at the node", lambda: fleet.client.job(waiting.id).phase == "ready")
    unknown = new_id()
    fleet.control(Cancel("default", NODE, unknown), "job", unknown, "cancel")
    wait_for("an answer", lambda: fleet.heard("job", unknown, "result"))
    fleet.publish(_offer(fleet, data, unknown), "job", unknown, "offer")
    for job in (waiting.id, running.id):
        assert cli("cancel", job, "--config", fleet.config("coordinator")).code == 0
    for job in (waiting.id, running.id):
        assert fleet.ended(job).outcome == "canceled"
        assert {m["data"]["outcome"] for m in fleet.heard("job", job, "result")} == {"canceled"}
    assert {m["data"]["outcome"] for m in fleet.heard("job", unknown, "result")} == {"canceled"}
    watched = cli("watch", running.id, "--config", fleet.config("coordinator"))
    assert watched.code == 1
    assert "canceled" in watched.err
    wait_for("the trainer to end", lambda: not fleet.trainers())


@pytest.mark.slow
def test_a_forgotten_job_leaves_nothing(fleet: Fleet, cli: Cli) -> None:
    """Of two jobs over the same dataset the first keeps it as long as it is there; with the last one the file goes, at both ends. One that
    has not ended is refused, and one that its node never took is deleted as well."""
    data, config = fleet.data("forgotten", 20, 12), ("--config", fleet.config("coordinator"))
    first, second = (fleet.submit(data, schedule__updates=k) for k in (1, 2))
    files = [fleet.directory / side / "files" / "sha256" for side in ("node", "coordinator")]
    sha256 = first.order.dataset.sha256
    for job in (first.id, second.id):
        assert fleet.ended(job).outcome == "succeeded"
        assert all((place / sha256).exists() for place in files)
        made = {a.sha256 for a in fleet.client.job(job).artifacts if a.name != "adapter_config.json"}  # all jobs of a fleet have the same
        assert cli("forget", job, *config).code == 0
        wait_for("the job to go", lambda job=job: job not in {view.id for view in fleet.client.jobs(10_000)})  # type: ignore[misc]
        assert not (fleet.directory / "node" / "jobs" / job).exists()
        assert not any((place / artifact).exists() for place in files for artifact in made)
    assert not any((place / sha256).exists() for place in files)
    running = fleet.submit(data, schedule__updates=500)
    refused = cli("forget", running.id, *config, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (14, "refused")
    fleet.client.cancel(running.id)
    fleet.ended(running.id)
    rejected = fleet.submit(data, budget_bytes=2**21)
    assert fleet.ended(rejected.id).outcome == "rejected"
    fleet.client.forget(rejected.id)
    wait_for("the rejected job to go", lambda: rejected.id not in {view.id for view in fleet.client.jobs(10_000)})


def test_an_operator_drains_a_node(fleet: Fleet, cli: Cli) -> None:
    """Until `resume`; what it was told before, or what nobody has signed, changes nothing then."""
    config = ("--config", fleet.config("coordinator"))

    def state() -> str:
        return next(node.state for node in fleet.client.nodes() if node.id == NODE)

    assert cli("drain", NODE, *config).code == 0
    wait_for("draining", lambda: state() == "draining")
    fleet.publish(seal(Resume("default", NODE, 1000), None), "command", "resume")
    heard = (payload for _, topic, payload in fleet.messages if topic.endswith("/down/command/drain"))
    drain = next(heard)  # the node has answered it, so it has passed
    wait_for("the refusal", lambda: "/command/resume reason=signature" in fleet.log("agent"))
    assert cli("resume", NODE, *config).code == 0
    wait_for("ready", lambda: state() == "ready")
    fleet.publish(drain, "command", "drain")
    wait_for("the refusal", lambda: "/command/drain reason=replayed" in fleet.log("agent"))
    assert state() == "ready"
    unknown = cli("drain", "nobody", *config, "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (14, "refused")


def test_a_draining_node_takes_no_jobs(fleet: Fleet) -> None:
    """`drain` refuses new jobs until `resume`; `report` tells where jobs stand."""
    data = fleet.data("drained", 20, 3)
    fleet.control(Drain("default", NODE, 1000), "command", "drain")
    wait_for("draining", lambda: fleet.heard("state")[-1]["data"]["state"] == "draining")
    refused = new_id()
    fleet.publish(_offer(fleet, data, refused), "job", refused, "offer")
    assert wait_for("the answer", lambda: fleet.heard("job", refused, "status"))[0]["data"]["reason"] == "draining"
    fleet.control(Resume("default", NODE, 1001), "command", "resume")
    wait_for("ready", lambda: fleet.heard("state")[-1]["data"]["state"] == "ready")
    taken = new_id()
    fleet.publish(_offer(fleet, data, taken, 400), "job", taken, "offer")
    wait_for("running", lambda: "running" in [m["data"]["phase"] for m in fleet.heard("job", taken, "status")])
    fleet.acknowledge(taken)
    before = len({m["id"] for m in fleet.heard("job", taken, "status")})
    fleet.publish(Report(), "command", "report")
    wait_for("one more status", lambda: len({m["id"] for m in fleet.heard("job", taken, "status")}) > before)
    fleet.control(Cancel("default", NODE, taken), "job", taken, "cancel")
    wait_for("the end", lambda: fleet.heard("job", taken, "result"))


def test_a_model_comes_to_a_running_node_and_goes(fleet: Fleet, cli: Cli) -> None:
    """The coordinator knows it without a restart of the node; it stays while a job needs it, and is then missed by name."""
    node, coordinator = ("--config", fleet.config("agent")), ("--config", fleet.config("coordinator"))

    def fingerprints() -> dict[str, str | None]:
        info = next(view.info for view in fleet.client.nodes() if view.id == NODE)
        return info.models if info else {}

    assert cli("models", "add", TINY, "--name", "spare-1.5", "--no-quantise", *node).code == 0
    wait_for("the model at the coordinator", lambda: "spare-1.5" in fingerprints())
    assert fingerprints()["spare-1.5"] == fingerprints()["tiny"]
    data = fleet.data("spare", 20, 9)
    job = cli("submit", "--node", NODE, "--model", "spare-1.5", "--data", data, "--budget", "1GiB", *coordinator).out.split()[0]
    wait_for("the job at the node", lambda: fleet.client.job(job).phase in ("staging", "ready", "running"))
    needed = cli("models", "remove", "spare-1.5", *node, "--json")
    assert (needed.code, needed.json["error"]["code"]) == (4, "model_needed")
    assert job in needed.json["error"]["text"]
    assert cli("cancel", job, *coordinator).code == 0
    fleet.ended(job)
    assert cli("models", "remove", "spare-1.5", *node).code == 0
    wait_for("the model to be gone", lambda: "spare-1.5" not in fingerprints())
    refused = cli("submit", "--node", NODE, "--model", "spare-1.5", "--data", data, "--budget", "1GiB", *coordinator)
    assert refused.code == 14
    assert "models_changed" in fleet.log("agent")


def test_doctor_tells_what_is_wrong(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    """On a healthy node every check passes, the way to the coordinator and back included; a wrong password is named."""
    healthy = cli("doctor", "--config", fleet.config("agent"), "--json")
    assert healthy.code == 0, healthy.out
    assert all(check["passed"] for check in healthy.json)
    texts = {check["name"]: check["text"] for check in healthy.json}
    assert list(texts) == ["configuration", *CHECKS, *BROKER_CHECKS]
    assert re.match(r"the kernels of bitsandbytes on .*: they agree with plain PyTorch|plain PyTorch, .*", texts["4 bits"])
    assert "speak as any other node" in texts["access rules"]
    wrong = fleet.directory / "wrong.toml"
    (fleet.directory / "wrong.password").write_text("nothing of the kind\n")
    (fleet.directory / "wrong.password").chmod(0o600)
    wrong.write_text(fleet.config("agent").read_text().replace("agent.password", "wrong.password"))
    told = {check.name: check for check in at_the_broker(read_config(wrong, AgentConfig))}
    assert not told["link"].passed
    assert re.search("[Nn]ot authori", told["link"].text)
    sick = cli("doctor", "--config", fleet.directory / "missing.toml", "--json")
    assert (sick.code, [check["name"] for check in sick.json]) == (1, ["configuration"])


def test_secrets_and_data_stay_out_of_logs_topics_and_process_lists(fleet: Fleet) -> None:
    """No password and no text of a dataset is in a log, nor in the arguments or the environment of a process, and no text of a dataset in a
    topic, status or result."""
    data = fleet.data("secret", 20, 15)
    job = fleet.submit(data, schedule__updates=2).id
    trainer = wait_for("the trainer", fleet.trainers)[0]
    processes = [trainer, *(psutil.Process(fleet.pid(name)) for name in ("agent", "coordinator"))]
    shown = [f"{process.cmdline()} {process.environ()}" for process in processes]
    assert fleet.ended(job).outcome == "succeeded"
    words = [text for line in data.read_text().splitlines() for text in json.loads(line).values() if len(text) > 12]
    assert len(words) >= 20
    shown += [fleet.log(name) for name in ("agent", "coordinator")]
    assert not [word for word in ["secret of", *words] if any(word in text for text in shown)]
    for _, topic, payload in fleet.messages:
        assert "secret of" not in topic
        if "/file/" not in topic:  # an order is in base64
            assert not [word for word in words if word.encode() in payload or json.dumps(word).encode() in payload]


def test_requests_that_make_no_sense_are_refused(fleet: Fleet, cli: Cli) -> None:
    """Unknown nodes, models and jobs, and a fetch before the end, each give one line and their exit code."""
    config, data = ("--config", fleet.config("coordinator")), fleet.data()
    asked = ("--data", data, "--budget", "1GiB", *config)
    for arguments in (
        ("submit", "--node", "nobody", "--model", "tiny", *asked),
        ("submit", "--node", NODE, "--model", "huge", *asked),
        ("submit", "--node", NODE, "--model", "tiny", "--data", data, "--budget", "1TiB", *config),
        ("watch", "01m7y2essw0kb8w4wz6xbny0v3", *config),
        ("watch", "#", *config),
        ("fetch", "../nodes", *config),
        ("cancel", "nothing", *config),
    ):
        ran = cli(*arguments)
        assert ran.code == 14, ran.err
        assert ran.err.startswith("error refused: ")
    missing = cli("jobs", "--config", fleet.directory / "missing.toml")
    assert missing.code == 13
