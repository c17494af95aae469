"""Endpoints that judge: asked as configured, retried, stopped in time and below the cap; what they say is data. Who may name them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from chat_server import COST, KEY, Server, digest, endpoint, said
from conftest import TINY
from orders import make_order
from tiny_training import silent

from edge_agent.admission import Rejected, check_order
from edge_agent.config import AgentConfig, Size, read_config
from edge_agent.errors import ConfigInvalid, JobSchema, JudgeMissing, JudgeRefused
from edge_agent.job import Dataset, Job, Judging
from edge_agent.job_building import build_options
from edge_agent.judging import GIVE_UP_AFTER, JUDGMENT_CHARACTERS, RETRIES, EndpointJudge, clean_judgment
from edge_agent.training.completion import find_endpoint
from profiles.device import device_profile

Ask = Callable[..., tuple[EndpointJudge, list[str | None]]]


@pytest.fixture
def ask(server: Server, key_file: Path, tmp_path: Path) -> Ask:
    """Ask the server for judgments; again with the same file, as a later run would."""

    def asked(count: int, beat: Callable[..., None] = silent, **more: Any) -> tuple[EndpointJudge, list[str | None]]:
        judge = EndpointJudge("stub", endpoint(server, key_file, **more), tmp_path / "judgments.jsonl", beat)
        return judge, judge.judge([[{"role": "user", "content": f"question {n}"}] for n in range(count)])

    return asked


def _spent(judge: EndpointJudge) -> float:
    return sum(row.spent for row in judge.rows)


def test_endpoint_is_asked_as_configured(ask: Ask, server: Server) -> None:
    """Every request has the key, the model, the limit and its own messages; answers come in order, and cost what their usage says."""
    judge, texts = ask(5, parallel=3)
    assert texts == ["Wrong: " + digest({"messages": [{"content": f"question {n}"}]}) for n in range(5)]
    assert {key for key, _ in server.requests} == {f"Bearer {KEY}"}
    assert all(body["model"] == "judge-1" and body["max_tokens"] == 50 and body["temperature"] == 0 for _, body in server.requests)
    assert _spent(judge) == pytest.approx(5 * COST)
    assert sum(row.requests for row in judge.rows) == 5


def test_reasoning_model_gets_its_own_fields(ask: Ask, server: Server) -> None:
    """It takes `max_completion_tokens`, and neither `max_tokens` nor a temperature."""
    ask(1, reasoning=True)
    [(_, body)] = server.requests
    assert body["max_completion_tokens"] == 50
    assert not {"max_tokens", "temperature"} & set(body)


def test_endpoint_that_asks_for_patience_gets_it(ask: Ask, server: Server) -> None:
    """429 is tried again after the time that Retry-After names, and 500 after a pause; neither costs anything."""
    server.script = [(429, {"Retry-After": "1"}, b"{}"), said("late"), (500, {}, b"oops"), said("later")]
    judge, texts = ask(2)
    assert texts == ["late", "later"]
    assert server.times[1] - server.times[0] >= 1.0
    assert server.times[3] - server.times[2] >= 0.2
    assert _spent(judge) == pytest.approx(2 * COST)
    assert sum(row.requests for row in judge.rows) == 4


def test_endpoint_that_hangs_is_asked_again(ask: Ask, server: Server) -> None:
    """A request without an answer ends at its timeout and is repeated; it counts as the most that it may have cost."""
    server.script = ["hang"]
    judge, texts = ask(1, timeout_s=0.3)
    assert texts[0] is not None
    assert len(server.requests) == 2
    most = (len("question 0") + 64 + 50 * 10.0) / 1e6
    assert _spent(judge) == pytest.approx(COST + most)


def test_run_can_be_stopped_while_an_endpoint_hangs(ask: Ask, server: Server) -> None:
    """What is called while it waits may end the run, and does so at once."""

    class Over(Exception):
        pass

    def beat(*_: object) -> None:
        raise Over

    server.script, started = ["hang"], time.monotonic()
    with pytest.raises(Over):
        ask(1, beat)
    assert time.monotonic() - started < 10


GARBAGE = [
    (200, {}, b"<html>not what you think</html>"),
    (200, {"Content-Type": "text/plain"}, b"\xff\xfe\x00"),
    (200, {}, b'{"choices": [{"message": 3}]}'),
    said(None),
    said("  \n "),
]


def test_garbage_is_no_judgment_and_five_are_enough(ask: Ask, server: Server) -> None:
    """An answer that is no chat completion, or says nothing, gives no judgment; after five in a row nothing more is asked."""
    server.script = [said("good"), *GARBAGE]
    judge, texts = ask(9)
    assert texts == ["good"] + [None] * 8
    assert len(server.requests) == 1 + GIVE_UP_AFTER
    assert [row.stopped for row in judge.rows if row.stopped] == ["5 requests in a row had no usable answer"]
    _, again = ask(9)
    assert again == texts
    assert len(server.requests) == 1 + GIVE_UP_AFTER


@pytest.mark.parametrize("status", [401, 404])
def test_endpoint_that_takes_no_request_ends_the_run_at_once(status: int, ask: Ask, server: Server) -> None:
    """The first refusal is an error that names alias and status, and neither the key nor what the server says; it costs nothing."""
    server.script = [(status, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode())]
    with pytest.raises(JudgeRefused, match=rf"'stub' refuses requests for judgments with status {status}") as raised:
        ask(3)
    assert len(server.requests) == 1
    assert KEY[:8] not in "".join(traceback.format_exception(raised.value))
    judge, texts = ask(3)
    assert None not in texts
    assert _spent(judge) == pytest.approx(3 * COST)


@pytest.mark.parametrize("status", [307, 308])
def test_redirect_is_not_followed(status: int, ask: Ask, server: Server) -> None:
    """Wherever it points, nothing goes there: the run ends at once with an error that says so, and it costs nothing."""
    elsewhere = Server()
    try:
        server.script = [(status, {"Location": f"{elsewhere.url}/chat/completions"}, b"")]
        with pytest.raises(JudgeRefused, match=rf"'stub' redirects requests for judgments with status {status}, and no redirect is"):
            ask(3)
        assert len(server.requests) == 1
        assert not elsewhere.requests
    finally:
        elsewhere.close()
    judge, _ = ask(3)
    assert _spent(judge) == pytest.approx(3 * COST)


def test_spending_stops_below_the_cap(ask: Ask, server: Server) -> None:
    """Nothing is asked that could pass the cap with all its repetitions; later runs ask nothing either, the rest has no judgment."""
    most = (1 + RETRIES) * (len("question 0") + 64 + 50 * 10.0) / 1e6
    cap = 2.5 * COST + most
    judge, texts = ask(8, spending_cap=cap)
    assert [text is not None for text in texts] == [True] * 3 + [False] * 5
    assert _spent(judge) <= cap
    assert judge.rows[-1].stopped == "the spending cap is reached"
    judge, again = ask(8, spending_cap=10 * cap)
    assert again == texts
    assert len(server.requests) == 3


def test_usage_that_a_server_does_not_tell_is_not_free(ask: Ask, server: Server) -> None:
    """An answer without `usage` counts as the most that it may have cost, so a cap holds also there."""
    server.script = [said("free?", None)] * 9
    judge, texts = ask(9, spending_cap=0.005)
    assert 0 < sum(text is not None for text in texts) < 9
    assert 0.002 < _spent(judge) <= 0.005


def test_nothing_is_set_aside_without_a_key(server: Server, key_file: Path, tmp_path: Path) -> None:
    """A key that is gone when the asking begins costs nothing."""
    judge = endpoint(server, key_file)
    key_file.unlink()
    with pytest.raises(ConfigInvalid):
        EndpointJudge("stub", judge, tmp_path / "judgments.jsonl", silent)
    assert not (tmp_path / "judgments.jsonl").exists() or not (tmp_path / "judgments.jsonl").read_bytes()


def test_spending_outlives_a_kill(ask: Ask, server: Server, tmp_path: Path) -> None:
    """What was asked before a kill is not asked again, and what was in flight counts as spent in full."""
    judge, texts = ask(4)
    file = tmp_path / "judgments.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:9])  # two answers, and the third request was on its way
    judge, again = ask(4)
    assert again == texts
    assert len(server.requests) == 4 + 2
    assert _spent(judge) == pytest.approx(4 * COST + judge.rows[4].spent)


def test_judgment_is_data() -> None:
    """Control characters and line breaks are gone, the length is bounded, and nothing is None."""
    assert clean_judgment("Step 1\x1b[31m is\r\nwrong.\x00\u202e It\tshould be 7. ") == "Step 1 [31m is wrong. It should be 7."
    assert len(clean_judgment("word " * 10**6) or "") <= JUDGMENT_CHARACTERS
    assert clean_judgment(" \x07\n ") is None


# configuration and admission


def test_judges_are_configured_and_their_keys_private(tmp_path: Path, key_file: Path) -> None:
    """An endpoint is read with its key; a key that others can read, or a file without one, is refused."""
    text = 'node = "n"\nstate_directory = "s"\nbudget = "1GiB"\nmodels = {}\n[judges.stub]\nurl = "http://localhost:1/v1"\nmodel = "m"\n'
    path = tmp_path / "agent.toml"
    path.write_text(text + 'key_file = "judge.key"\ninput_price = 1\noutput_price = 2\nspending_cap = 3\n')
    judges = read_config(path, AgentConfig).judges
    assert judges["stub"].key == KEY
    judging = Judging("endpoint", "stub")
    assert find_endpoint(judging, judges) is judges["stub"]
    with pytest.raises(JudgeMissing, match=r"'other' is not among .* \(stub\)"):
        find_endpoint(Judging("endpoint", "other"), judges)
    key_file.write_text("")
    with pytest.raises(ConfigInvalid, match="it must hold one line"):
        find_endpoint(judging, judges)
    key_file.chmod(0o640)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        find_endpoint(judging, judges)
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match="missing required field `input_price`"):
        read_config(path, AgentConfig)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:sk-1@judge.example.org/v1", "https://sk-1@judge.example.org", "https://judge.example.org/v1?key=sk-1",
        "https://judge.example.org/v1#sk-1", "https:///v1", "https://judge.example.org:port/v1", "ftp://judge.example.org",
    ],
)  # fmt: skip
def test_key_in_the_address_of_a_judge_is_refused(url: str, tmp_path: Path) -> None:
    """It would stand in the trainer's environment; the error does not quote it."""
    path = tmp_path / "agent.toml"
    lines = [f"url = {json.dumps(url)}", 'model = "m"', "input_price = 1", "output_price = 2", "spending_cap = 3"]
    path.write_text('node = "n"\nstate_directory = "s"\nbudget = "1GiB"\n[judges.stub]\n' + "\n".join(lines))
    with pytest.raises(ConfigInvalid, match=r"at `\$\.judges\[\.\.\.\]") as raised:
        read_config(path, AgentConfig)
    assert "sk-1" not in str(raised.value)


@pytest.mark.parametrize("judge", ["oracle", "endpoint", "endpoint:", "model:x", "endpoint:UP"])
def test_judge_that_does_not_exist_is_refused(judge: str) -> None:
    """A source is one of three, and an alias belongs to the endpoint alone."""
    with pytest.raises(JobSchema):
        build_options(judge, {})


def test_node_takes_only_jobs_whose_endpoint_it_has(server: Server, tmp_path: Path) -> None:
    """An offer that names an endpoint of the node is taken, another one is rejected as `judge_missing`."""
    judges = {"a": endpoint(server, None)}
    config = AgentConfig(node="n", state_directory=tmp_path, budget=Size(2**31), models={"tiny": TINY}, judges=judges)

    def offer(alias: str) -> None:
        job = Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**31, judging=Judging("endpoint", alias))
        check_order(make_order(job, 9), config, device_profile("cpu"), 0, False, datetime.now(timezone.utc))

    offer("a")
    with pytest.raises(Rejected) as rejected:
        offer("b")
    assert rejected.value.reason == "judge_missing"
