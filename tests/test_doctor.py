"""`edge-agent doctor` at the broker tells what a node could do there that it should not, and a clock that is wrong, and leaves no trace."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
import typer
from conftest import TINY
from fleet import MOSQUITTO, free_port, open_broker, wait_for
from orders import NODE
from test_access import FLEET, OTHER, STOLEN, Place

from edge_agent import doctor
from edge_agent.cli import fleet
from edge_agent.config import AgentConfig, Broker, Proxy, Size, Trust
from edge_agent.doctor import BROKER_CHECKS, CHECKS, _Wrong, at_the_broker
from edge_agent.errors import EdgeAgentError
from edge_agent.messages import Ack, Hello, decode, encode, new_id
from edge_agent.mqtt import Connected, Link, Received
from edge_agent.signing import make_key, seal
from edge_agent.topics import coordinator_subscriptions, down, node_subscriptions, split, up
from edge_agent.visit import Visit, visit

SPEAKS, ORDERS = "speak as any other node", "speak to any other node as its coordinator"
HEARS, TAKES = "hear what other nodes say or are told", "take the id of any other client, and with it what waits for that"
Edit = tuple[str, str]


class EditedPlace(Place):
    """A broker with the sample files, in which a few words are others."""

    def __init__(self, directory: Path, *edits: Edit) -> None:
        super().__init__(directory)
        self._edits = edits

    @contextmanager
    def running(self) -> Iterator[EditedPlace]:
        """Started once, to write the files, and again with other words in them."""
        process = self.start()
        process.kill()
        process.wait()
        for file in (self.directory / "mosquitto.conf", self.directory / "acl"):
            text = file.read_text()
            for old, new in self._edits:
                text = text.replace(old, new)
            file.write_text(text)
        assert MOSQUITTO
        log = self.directory / "edited.log"
        with log.open("wb") as out:
            process = subprocess.Popen([MOSQUITTO, "-c", str(self.directory / "mosquitto.conf")], stdout=out, stderr=out)
        try:
            wait_for("the broker", lambda: "running" in log.read_text())
            yield self
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with the sample files as they are."""
    with EditedPlace(tmp_path_factory.mktemp("doctor")).running() as made:
        yield made


@pytest.fixture(scope="module")
def open_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A broker without rules, as that of a trial."""
    with open_broker(tmp_path_factory.mktemp("open")) as port:
        yield port


def _open_config(port: int, protocol: Any = "auto") -> AgentConfig:
    return AgentConfig(NODE, Path("state"), Size(2**30), {}, FLEET, broker=Broker(port=port, protocol=protocol))


@contextmanager
def _linked(broker: Broker, client_id: str, topics: list[str]) -> Iterator[tuple[Link, SimpleQueue[Any]]]:
    events: SimpleQueue[Any] = SimpleQueue()
    link = Link(broker, client_id, topics, events, lambda: None)
    link.start()
    try:
        assert isinstance(events.get(timeout=20), Connected)
        yield link, events
    finally:
        link.close()


@contextmanager
def _coordinator(broker: Broker, behind_s: float = 0.0) -> Iterator[None]:
    """One that acknowledges every hello, by a clock that may be wrong."""
    with _linked(broker, f"coordinator/{new_id()}", coordinator_subscriptions(FLEET)) as (link, events):

        def answer() -> None:
            while isinstance(message := events.get(), Received):
                link.acknowledge(message)
                if split(message.topic)[1][-1] != "hello":
                    continue
                node, hello = split(message.topic)[0], decode(message.payload, Hello).id
                ack = Ack(FLEET, node, hello, datetime.now(timezone.utc) - timedelta(seconds=behind_s), 0)
                link.publish(down(FLEET, node, "ack", hello), encode(seal(ack, None), "test"), qos=1)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        events.put(None)
        thread.join(30)


def _texts(config: AgentConfig) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.passed, check.text) for check in at_the_broker(config)}


def test_sample_configuration_lets_a_node_do_what_is_its_own(place: Place) -> None:
    """The way to the coordinator and back, a clock that is right, and nothing else."""
    with _coordinator(place.broker("coordinator.main")):
        told = _texts(place.config(NODE))
    assert [passed for passed, _ in told.values()] == [True] * 3, told
    assert "the coordinator answered in" in told["link"][1]
    assert "the coordinator's (± " in told["clock"][1]
    assert told["access rules"][1] == "this node can neither speak nor hear as another, nor take another's id"


@pytest.mark.parametrize(
    ("edits", "trespasses"),
    [
        ((("pattern write edge1/lab/%u/up/#", "pattern write edge1/lab/+/up/#"),), [SPEAKS]),
        ((("pattern write edge1/lab/%u/up/#", "pattern write edge1/lab/#"),), [SPEAKS, ORDERS]),
        ((("pattern read edge1/lab/%u/down/#", "pattern read edge1/lab/#"),), [HEARS]),
        ((("use_username_as_clientid true", "use_username_as_clientid false"),), [TAKES]),
        ((("acl_file", "#"), ("use_username_as_clientid true", "use_username_as_clientid false")), [SPEAKS, ORDERS, HEARS, TAKES]),
    ],
)
def test_rule_that_is_missing_is_told(edits: tuple[Edit, ...], trespasses: list[str], tmp_path: Path) -> None:
    """Each by itself: what is said as another, what is heard of others (one that has said something), and whose id is taken."""
    with EditedPlace(tmp_path, *edits).running() as loose:
        with _linked(loose.broker(OTHER), OTHER, node_subscriptions(FLEET, OTHER)) as (other, _):
            other.publish(up(FLEET, OTHER, "state"), b"{}", qos=1, retain=True)
        with _coordinator(loose.broker("coordinator.main")):
            found = visit(loose.config(NODE))
        assert found.trespasses == trespasses
        elsewhere = msgspec.structs.replace(loose.config(NODE), broker=Broker("broker.example.org"))
        with pytest.raises(_Wrong, match=r"no access rules, or too few: this node can .*; give it the rules of deploy/") as raised:
            BROKER_CHECKS["access rules"](elsewhere, found)
        assert all(trespass in str(raised.value) for trespass in trespasses)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_broker_without_rules(protocol: str, open_port: int) -> None:
    """On loopback it is told, and no failure; anywhere else, behind a proxy too, it is one. MQTT 3.1.1 shows it by what comes back."""
    config = _open_config(open_port, protocol)
    with _coordinator(config.broker):
        told = _texts(config)
    assert [passed for passed, _ in told.values()] == [True] * 3, told
    assert all(trespass in told["access rules"][1] for trespass in (SPEAKS, ORDERS, HEARS, TAKES))
    found = Visit("broker:1883", protocol, answered=True, trespasses=[HEARS])
    for broker in (Broker("192.0.2.1"), Broker("::ffff:192.0.2.1"), Broker("broker"), Broker(proxy=Proxy(url="http://proxy:3128"))):
        with pytest.raises(_Wrong, match=HEARS):
            BROKER_CHECKS["access rules"](msgspec.structs.replace(config, broker=broker), found)
    for host in ("127.0.0.1", "127.0.1.1", "::1", "localhost"):
        assert "not for a fleet" in BROKER_CHECKS["access rules"](msgspec.structs.replace(config, broker=Broker(host)), found)


def test_answer_that_nobody_trusted_has_signed_is_no_answer(open_port: int, tmp_path: Path) -> None:
    """Whoever else speaks at the broker is not taken for the coordinator, nor is its clock."""
    (tmp_path / "keys").write_text(make_key(tmp_path / "signing.key", "the operator").line + "\n")
    config = msgspec.structs.replace(_open_config(open_port), trust=Trust(tmp_path / "keys"))
    with _coordinator(config.broker):
        told = _texts(config)
    passed, text = told["link"]
    assert not passed
    assert "the coordinator's answer is not taken: it is not signed" in text
    assert "no coordinator answered" in told["clock"][1]


def test_visit_leaves_a_running_agent_as_it_was(place: Place) -> None:
    """Under the sample configuration the visit has its id: it comes back to its own subscriptions, and to what came meanwhile, once."""
    topics = node_subscriptions(FLEET, NODE)
    boss = _linked(place.broker("coordinator.main"), "coordinator/lab/main", coordinator_subscriptions(FLEET))
    with boss as (speaker, _), _linked(place.broker(NODE), NODE, topics) as (_, events):
        found = visit(place.config(NODE))
        assert (found.trespasses, found.refused, found.answer_s) == ([], None, None)
        wait_for("its next connection", lambda: isinstance(events.get(timeout=30), Connected))
        for node, number in ((OTHER, 1), (NODE, 2), (NODE, 3)):
            speaker.publish(down(FLEET, node, "ack", f"n{number}"), b"", qos=1)
        heard = [events.get(timeout=20).topic for _ in range(2)]
        assert heard == [down(FLEET, NODE, "ack", f"n{number}") for number in (2, 3)]


def test_visit_leaves_nothing_at_the_broker(open_port: int) -> None:
    """Who comes under its id later finds no subscription and no message."""
    config = _open_config(open_port)
    with _coordinator(config.broker):
        visit(config)
        for client_id in (f"doctor/{NODE}", f"doctor/{NODE}/second"):
            with _linked(config.broker, client_id, ["edge1/nothing"]) as (link, events):
                link.publish(up(FLEET, NODE, "state"), b"{}", qos=1)
                link.publish("edge1/nothing", b"the end", qos=1)
                assert events.get(timeout=20).topic == "edge1/nothing"


def test_node_that_is_shut_out_is_told_so(place: Place) -> None:
    """The connection stands, and what it says is refused."""
    told = _texts(place.config(STOLEN, STOLEN))
    assert told["link"][0] is False
    assert "refuses what this node says (Not authorized)" in told["link"][1]


def test_broker_that_is_not_there() -> None:
    """One failure, with the place and the reason; nothing is told of rules that nobody has seen."""
    port = free_port()
    told = _texts(_open_config(port))
    assert told["link"] == (
        False,
        f"127.0.0.1:{port}: ConnectionRefusedError: [Errno 111] Connection refused; check [broker] and that the broker runs",
    )
    assert "access rules" not in told


@pytest.mark.parametrize(
    ("behind_s", "says"), [(60.0, "60.* s ahead of the coordinator's"), (-60.0, "(60|59).* s behind the coordinator's")]
)
def test_clock_is_held_against_the_coordinator_s(behind_s: float, says: str, open_port: int) -> None:
    """By its acknowledgement, as precisely as its way allows."""
    config = _open_config(open_port)
    with _coordinator(config.broker, behind_s):
        passed, text = _texts(config)["clock"]
    assert not passed
    assert re.search(f"{says}.*timedatectl", text)


@pytest.mark.parametrize(
    ("ahead_s", "answer_s", "synchronised", "passes"),
    [(0.1, 0.2, False, True), (-4.9, 0.1, True, True), (7.0, 1.0, True, False), (7.0, 8.0, True, True), (None, None, True, True),
     (None, None, False, False)],
)  # fmt: skip
def test_clock_and_what_the_kernel_knows(
    ahead_s: float | None, answer_s: float | None, synchronised: bool, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator's clock counts; a slow answer excuses what it may explain; without one the kernel must know."""
    monkeypatch.setattr(doctor, "_kernel_knows", lambda: synchronised)
    found, config = Visit("broker:1883", "5", answer_s=answer_s, clock_ahead_s=ahead_s), _open_config(1883)
    if not passes:
        with pytest.raises(_Wrong, match="timedatectl"):
            BROKER_CHECKS["clock"](config, found)
        return
    assert ("takes it for synchronised" in BROKER_CHECKS["clock"](config, found)) is synchronised


def test_what_the_kernel_says_of_its_clock() -> None:
    """The same as systemd says, which asks it too, where there is one."""
    shown = subprocess.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], capture_output=True, text=True, check=False)
    if shown.returncode:
        assert doctor._kernel_knows() in (True, False)
        pytest.skip(f"NO SYSTEMD: {shown.stderr.strip()}, so the kernel's word was held against nothing")
    assert doctor._kernel_knows() is (shown.stdout.strip() == "yes")


def test_4_bits_that_cannot_be_computed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends with an error is told by its last line, one that takes for ever by its time."""
    config = msgspec.structs.replace(_open_config(1), device="cpu")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with pytest.raises(_Wrong, match=r"on cpu ends with 1: ImportError: libcudart.so.12: cannot open .*; install builds of PyTorch"):
        CHECKS["4 bits"](config)
    monkeypatch.setattr(doctor, "SMOKE_S", 0.01)
    with pytest.raises(_Wrong, match="was not computed with on cpu in 0 s"):
        CHECKS["4 bits"](config)


def _wrong(check: str, config: AgentConfig, says: str) -> None:
    with pytest.raises((_Wrong, EdgeAgentError), match=says):
        CHECKS[check](config)


def test_state_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, one above it, a directory that nobody may write, a disk that is nearly full; of the trial nothing is left."""
    (tmp_path / "file").touch()
    config = msgspec.structs.replace(_open_config(1), state_directory=tmp_path / "state")
    for place, why in (("file", "File exists"), ("file/state", "Not a directory")):
        said = f"{place} cannot be written: {why}; mend it for the agent's user, or name another `state_directory`$"
        _wrong("state directory", msgspec.structs.replace(config, state_directory=tmp_path / place), said)
    closed = msgspec.structs.replace(config, state_directory=Path("/proc/self/fd"))  # to root too
    _wrong("state directory", closed, "^/proc/self/fd cannot be written: .*; mend it for")
    assert re.search("state can be written, .* are free$", CHECKS["state directory"](config))
    monkeypatch.setattr(doctor, "SPARE_DISK_BYTES", 2**60)
    _wrong("state directory", config, "state has .* free; a job may need more than .*; free some, or name another `state_directory`$")
    assert list((tmp_path / "state").iterdir()) == []


def test_device_that_is_not_there_or_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that nobody finds, and a budget that does not fit what is free."""
    config = msgspec.structs.replace(_open_config(1), device="cpu")
    assert re.search("free, 1,024 MiB lent to jobs$", CHECKS["device"](config))
    _wrong("device", msgspec.structs.replace(config, budget=Size(2**50)), "are free; a budget of .* does not fit; lower it$")
    monkeypatch.setattr("profiles.device.nvidia.find_gpu", lambda: None)
    monkeypatch.setattr("profiles.device.jetson.board", lambda _: "")
    _wrong("device", msgspec.structs.replace(config, device="cuda"), "there is no GPU to use: .*; run with --device cpu, or install")


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    """None at all, a directory that is not there, an empty one, and one with broken weights: each names the place, and what to do."""
    config = msgspec.structs.replace(_open_config(1), state_directory=tmp_path / "state")
    _wrong("models", config, r"^there is none; `edge-agent models add` fetches one, or name a directory in \[models\]$")
    for name, says in (
        ("gone", "there is no such directory; give a directory with config.json"),
        ("empty", "there is no config.json .*; give a directory with config.json"),
        ("broken", "model.safetensors is cut off or no safetensors file; fetch the model again"),
    ):
        if name != "gone":
            (tmp_path / name).mkdir()
        if name == "broken":
            (tmp_path / name / "config.json").write_bytes((TINY / "config.json").read_bytes())
            (tmp_path / name / "model.safetensors").write_bytes(b"?")
        named = msgspec.structs.replace(config, models={"tiny": TINY, "other": tmp_path / name})
        _wrong("models", named, f"{tmp_path / name}.*{says}")
    assert CHECKS["models"](msgspec.structs.replace(config, models={"tiny": TINY})) == f"tiny ({TINY})"


def test_keys_that_nobody_can_be_trusted_by(tmp_path: Path) -> None:
    """A file that is not there, without a key, that others can change, or with something else in it."""
    keys = tmp_path / "keys"
    config = msgspec.structs.replace(_open_config(1), trust=Trust(keys))
    _wrong("trust", config, "keys: trust.keys_file: .*No such file or directory.*; see docs/config.md$")
    keys.write_text("# none yet\n")
    _wrong("trust", config, "keys holds no key, so no signed order is taken; add the line of `edge-agent keys show`$")
    line = make_key(tmp_path / "signing.key", "the operator").line
    keys.write_text(f"{line}\nssh-rsa something\n")
    _wrong("trust", config, "trust.keys_file: line 2 is no public key .*; it begins with ssh-ed25519")
    keys.write_text(f"{line}\n")
    keys.chmod(0o666)
    _wrong("trust", config, f"others can change it; run `chmod go-w {keys}`")
    keys.chmod(0o644)
    assert re.search(r"^orders must be signed by .* \(the operator\)$", CHECKS["trust"](config))


@pytest.fixture
def command() -> Iterator[Callable[..., None]]:
    """`edge-agent doctor`, in this process; the log says afterwards what it said before."""
    logger = logging.getLogger("edge_agent.mqtt")
    level = logger.level
    yield fleet.doctor
    logger.setLevel(level)


def test_node_on_which_much_is_wrong(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check is made and told, whatever those before it have found, and the exit code is 1."""
    for name in ("state", "keys"):
        (tmp_path / name).touch()
    (tmp_path / "agent.toml").write_text(
        f'node = "{NODE}"\nstate_directory = "state"\nbudget = "99999GiB"\ndevice = "cpu"\n[models]\ntiny = "gone"\n'
        f'[trust]\nkeys_file = "keys"\n[broker]\nport = {free_port()}\n'
    )
    monkeypatch.setitem(CHECKS, "4 bits", lambda _: "this takes long, and is tried elsewhere")
    with pytest.raises(typer.Exit) as ended:
        command(tmp_path / "agent.toml", as_json=True)
    assert ended.value.exit_code == 1
    told = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert list(told) == ["configuration", *CHECKS, "link", "clock"], told
    failed = [name for name, check in told.items() if not check["passed"] and name != "clock"]
    assert failed == ["state directory", "device", "models", "trust", "link"]
