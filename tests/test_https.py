"""Files by HTTPS: whatever a server does, the right file arrives, by the other way if need be, and nobody gets or brings another's."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import select
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx
import msgspec
import pytest
from fleet import Fleet, free_port, wait_for
from orders import NODE, make_order
from tls_server import TlsServer

from edge_agent import https
from edge_agent.config import AgentConfig, Broker, CoordinatorConfig, Files, FileServer, Https, Tls, read_config
from edge_agent.coordinator import listening
from edge_agent.coordinator.file_server import files_served
from edge_agent.coordinator.service import Service
from edge_agent.doctor import CHECKS, _Wrong
from edge_agent.enrolment import Authority
from edge_agent.errors import ConfigInvalid
from edge_agent.https import CROSSED_S, Carried, Courier, Fetched, open_client
from edge_agent.job import Dataset, Job
from edge_agent.messages import Artifact, File, FileRequest, JobResult, encode
from edge_agent.signing import seal
from edge_agent.transfer import FileStore, Incoming

BLOCK = 64 * 1024
OTHER = "node-2"
DATA = random.Random(1).randbytes(3 * 2**20 + 777)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Node:
    """The receiving half of an agent: a file server first, then `sender`, which stands for the coordinator's blocks."""

    def __init__(self, root: Path, data: bytes, servers: dict[str, FileServer]) -> None:
        self.file = File(_sha256(data), len(data))
        self.files, self.sender = FileStore(root / "node"), FileStore(root / "sender")
        self.sender.put(data, self.file.sha256)
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.courier = Courier(servers, self.events)
        self.whys: list[str | None] = []
        self._requests: list[FileRequest] = []
        self.incoming = Incoming(self.files, self.file.sha256, self.file.size_bytes, BLOCK, self._ask)

    def _ask(self, request: FileRequest) -> bool:
        if self.incoming.mistaken or not self.courier.fetch(self.file, self.incoming.missing):
            self._requests.append(request)
        return True

    def step(self) -> bool:
        """Handle an event, or what is due; whether the file is there."""
        try:
            match self.events.get(timeout=0.05):
                case Fetched(_, number, block):
                    self.incoming.receive(number, block)
                case Carried() as carried:
                    self.courier.ended(carried)
                    self.whys.append(carried.why)
                    self.incoming.ask_again()
        except Empty:
            pass
        for request in self._requests:
            for number, block in self.sender.read_blocks(self.file.sha256, request):
                self.incoming.receive(number, block)
        self._requests.clear()
        return self.incoming.tick()

    def get(self) -> bytes:
        wait_for("the file", self.step, 30)
        return self.files.path(self.file.sha256).read_bytes()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsServer]:
    served = TlsServer(tmp_path / "server", DATA)
    yield served
    served.close()


def _server_config(server: TlsServer, **more: Any) -> FileServer:
    return FileServer(**{"url": server.url, "tls": Tls(server.authority.certificate_file), "timeout_s": 1.0} | more)


def test_file_comes_from_any_server_with_range(server: TlsServer, tmp_path: Path) -> None:
    """In ranges, from the address that the configuration and the sha256 make, with the token, and with no block over the broker."""
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    token.chmod(0o600)
    node = Node(tmp_path, DATA, {"mirror": _server_config(server, token_file=token)})
    node.sender.remove(node.file.sha256)
    assert node.get() == DATA
    ends = [(0, 2**20), (2**20, 2**21), (2**21, 3 * 2**20), (3 * 2**20, len(DATA))]
    place = f"/files/sha256/{node.file.sha256}"
    assert server.requests == [(place, f"bytes={start}-{end - 1}", "Bearer s3cret") for start, end in ends]


FAULTS = [
    "401", "404", "503", "redirect", "range ignored", "another range", "another size", "wrong bytes", "more", "cut off", "less", "silence",
    "no http", "dripping headers", "dripping body",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_file_comes_the_other_way_where_a_server_fails(
    fault: str, server: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it does instead of answering, at once or for ever: it is asked once, and nowhere else."""
    monkeypatch.setattr(https, "PIECE_S", 2.0)
    server.data, server.fault, server.faults = DATA[: 9 * BLOCK + 1], fault, 1000
    node = Node(tmp_path, server.data, {"mirror": _server_config(server)})
    assert node.get() == server.data
    assert (node.whys[:1] == [None]) == (fault == "wrong bytes"), "what is wrong there shows only at the end of the file"
    assert [path for path, *_ in server.requests] == [f"/files/sha256/{node.file.sha256}"]


@pytest.mark.parametrize("wrong", ["authority", "host", "port", "name"])
def test_file_comes_the_other_way_where_a_server_is_not_the_one(wrong: str, server: TlsServer, tmp_path: Path) -> None:
    """A certificate of another authority or for another host, nobody at the port, a name that is none: nothing is asked of it."""
    foreign = Authority(tmp_path / "foreign").certificate_file
    change = {
        "authority": {"tls": Tls(foreign)}, "host": {"url": server.url.replace("127.0.0.1", "localhost")},
        "port": {"url": f"https://127.0.0.1:{free_port()}"}, "name": {"url": "https://does-not-exist.invalid"},
    }[wrong]  # fmt: skip
    node = Node(tmp_path, DATA, {"mirror": _server_config(server, **change)})
    assert node.get() == DATA
    assert node.whys[0]
    assert server.requests == []


def test_next_server_is_asked_before_the_broker(server: TlsServer, tmp_path: Path) -> None:
    """In the order of the configuration."""
    gone = _server_config(server, url=f"https://127.0.0.1:{free_port()}")
    node = Node(tmp_path, DATA, {"gone": gone, "mirror": _server_config(server)})
    node.sender.remove(node.file.sha256)
    assert node.get() == DATA
    assert len(node.whys) >= 1


def test_interrupted_fetch_goes_on_where_it_was(server: TlsServer, tmp_path: Path) -> None:
    """A new agent over what the old one has left asks for the rest alone."""
    server.fault = "cut off"
    servers = {"mirror": _server_config(server)}
    first = Node(tmp_path, DATA, servers)
    first.sender.remove(first.file.sha256)
    assert not first.step()
    wait_for("some of the file", lambda: (first.step(), first.incoming.missing_blocks < 30)[1], 30)
    left = first.incoming.missing.blocks[0]
    asked = len(server.requests)
    again = Node(tmp_path, DATA, servers)
    again.sender.remove(again.file.sha256)
    assert again.incoming.missing.blocks[0] == left > 0
    assert again.get() == DATA
    assert any(place.startswith(f"bytes={left * BLOCK}-") for _, place, _ in server.requests[asked:])
    wait_for("the first to end", lambda: not any(t.is_alive() for t in first.courier._threads.values()), 10)


def test_what_came_before_a_failure_is_not_asked_for_again(server: TlsServer, tmp_path: Path) -> None:
    """Blocks that an unfinished answer has brought count; the other way brings the rest alone."""
    server.fault, server.faults = "cut off", 1
    node = Node(tmp_path, DATA, {"mirror": _server_config(server)})
    asked: list[int] = []
    read = node.sender.read_blocks

    def reading(sha256: str, request: FileRequest) -> Iterator[tuple[int, bytes]]:
        asked.extend(request.blocks)
        return read(sha256, request)

    node.sender.read_blocks = reading  # type: ignore[method-assign]
    assert node.get() == DATA
    assert asked
    assert min(asked) == 8


# the coordinator's own server


class Coordinator:
    """A coordinator without a broker, with a result of NODE that awaits one artifact, and the servers that nodes configure for it."""

    def __init__(self, root: Path, data: bytes, denied: tuple[str, ...] = (), files: Files | None = None) -> None:
        self.root, self.data, self.sha256, self.port, self.files = root, data, _sha256(data), free_port(), files
        self.authority = Authority(root / "authority")
        issued = self.authority.issue("broker", "127.0.0.1", root)
        for name in (NODE, OTHER):
            self.authority.issue("node", name, root)
        self.https = Https(
            certificate_file=issued.certificate_file, key_file=issued.key_file, ca_file=self.authority.certificate_file,
            host="127.0.0.1", port=self.port, denied=denied,
        )  # fmt: skip
        dataset = _sha256(DATA)
        job = Job(model="tiny", budget_bytes=2**30, dataset=Dataset(sha256=dataset))
        self.order = make_order(job, len(DATA))
        self._ends: ExitStack | None = None
        self.start()
        self.service.files.put(DATA, dataset)
        self.service.call(lambda: self.service._store.add_job(self.order, seal(self.order, None)))

    def start(self) -> None:
        self._ends = ExitStack()
        broker = Broker(port=free_port())
        self.service = Service(CoordinatorConfig(self.root / "coordinator", broker=broker, https=self.https, files=self.files))
        self.service.start()
        self._ends.callback(self.service.stop)
        self._ends.enter_context(files_served(self.service, self.https))

    def stop(self) -> None:
        assert self._ends
        self._ends.close()

    def await_result(self) -> None:
        """Have the result of the job come from its node."""
        artifact = Artifact("adapter_model.safetensors", self.sha256, len(self.data))
        message = encode(
            JobResult(self.order.job.digest, "failed", "internal", None, artifacts=(artifact,)), "node", boot=1, attempt=1, seq=1
        )
        self.service.call(lambda: self.service._result(NODE, self.order.id, message))

    def server(self, name: str | None = NODE, **more: Any) -> FileServer:
        own = (self.root / f"{name}.pem", self.root / f"{name}.key") if name else (None, None)
        tls = Tls(self.authority.certificate_file, *own)
        return FileServer(**{"url": f"https://127.0.0.1:{self.port}", "tls": tls} | more)

    def ask(self, method: str, sha256: str, name: str | None = NODE, **request: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with open_client("lab", self.server(name)) as client:
                return await client.request(method, f"sha256/{sha256}", **request)

        return asyncio.run(go())

    def put(self, start: int, end: int, name: str = NODE, size: int | None = None) -> httpx.Response:
        place = f"bytes {start}-{end - 1}/{size or len(self.data)}"
        return self.ask("PUT", self.sha256, name, content=self.data[start:end], headers={"Content-Range": place})


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "c", random.Random(2).randbytes(5 * 2**20 + 99))
    yield made
    made.stop()


def _bring(coordinator: Coordinator, tmp_path: Path, name: str = NODE) -> Carried:
    """Bring the artifact as a node would."""
    path = tmp_path / "adapter"
    path.write_bytes(coordinator.data)
    events: SimpleQueue[Any] = SimpleQueue()
    request = FileRequest(BLOCK, [0])
    assert Courier({"lab": coordinator.server(name)}, events).send(path, coordinator.sha256, request)
    carried = events.get(timeout=30)
    assert isinstance(carried, Carried)
    assert carried.request == request
    return carried


def test_request_that_crosses_the_file_on_its_way_sends_no_blocks(coordinator: Coordinator, tmp_path: Path) -> None:
    """A coordinator asks for the next blocks while the rest comes by HTTPS: that is answered. Asked again later, the file may be lost."""
    coordinator.await_result()
    path, events, request = tmp_path / "adapter", SimpleQueue[Any](), FileRequest(BLOCK, [0])
    path.write_bytes(coordinator.data)
    courier = Courier({"lab": coordinator.server()}, events)
    assert courier.send(path, coordinator.sha256, request)
    courier.ended(events.get(timeout=30))
    assert courier.send(path, coordinator.sha256, request)
    time.sleep(CROSSED_S)
    assert not courier.send(path, coordinator.sha256, request)
    assert events.empty()


def test_node_fetches_the_files_of_its_jobs(coordinator: Coordinator, tmp_path: Path) -> None:
    """The dataset of an open job, in ranges or whole; no more once the job has ended."""
    node = Node(tmp_path, DATA, {"lab": coordinator.server()})
    node.sender.remove(node.file.sha256)
    assert node.get() == DATA
    dataset = node.file.sha256
    assert coordinator.ask("GET", dataset).content == DATA
    looked = coordinator.ask("HEAD", dataset)
    assert (looked.status_code, looked.headers["Content-Length"]) == (200, str(len(DATA)))
    rest = coordinator.ask("GET", dataset, headers={"Range": f"bytes={len(DATA) - 5}-"})
    assert (rest.status_code, rest.content) == (206, DATA[-5:])
    assert coordinator.ask("GET", dataset, headers={"Range": f"bytes={len(DATA)}-"}).status_code == 416
    coordinator.service.call(lambda: coordinator.service._store.end(coordinator.order.id, "canceled", "canceled", None))
    assert coordinator.ask("GET", dataset).status_code == 404


def test_nobody_has_the_files_of_another(coordinator: Coordinator, tmp_path: Path) -> None:
    """Another node of the fleet gets and brings nothing; without a certificate of the authority there is no connection."""
    coordinator.await_result()
    dataset = _sha256(DATA)
    assert [coordinator.ask(method, dataset, OTHER).status_code for method in ("GET", "HEAD", "PUT")] == [404, 404, 404]
    assert coordinator.put(0, BLOCK, OTHER).status_code == 404
    assert "awaits nothing" in str(_bring(coordinator, tmp_path, OTHER).why)
    assert coordinator.put(0, BLOCK).headers["Upload-Offset"] == str(BLOCK)
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        coordinator.ask("GET", dataset, None)
    Authority(tmp_path / "foreign").issue("node", "node-3", tmp_path / "f3")
    for end in ("pem", "key"):
        (tmp_path / "f3" / f"node-3.{end}").replace(coordinator.root / f"node-3.{end}")
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        coordinator.ask("GET", dataset, "node-3")
    for path in ("..%2fcoordinator.sqlite", "A" * 64, "0" * 63):
        assert coordinator.ask("GET", path).status_code in (400, 404)


def test_node_that_is_denied_has_nothing(tmp_path: Path) -> None:
    """Its certificate is still valid."""
    made = Coordinator(tmp_path, DATA, denied=(NODE,))
    try:
        assert made.ask("GET", _sha256(DATA)).status_code == 403
        assert made.ask("GET", _sha256(DATA), OTHER).status_code == 404
    finally:
        made.stop()


def test_artifact_is_brought(coordinator: Coordinator, tmp_path: Path) -> None:
    """It is adopted under its sha256, and the job has ended; brought again, it is awaited no more."""
    assert "awaits nothing" in str(_bring(coordinator, tmp_path).why), "before its result has come"
    coordinator.await_result()
    assert _bring(coordinator, tmp_path).why is None
    assert coordinator.service.files.path(coordinator.sha256).read_bytes() == coordinator.data
    assert list(coordinator.service.files.incoming.iterdir()) == []
    wait_for("the end", lambda: coordinator.service.call(lambda: coordinator.service.job(coordinator.order.id)).phase == "ended")
    assert "awaits nothing" in str(_bring(coordinator, tmp_path).why)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python 3.10 leaves a broken one open
def test_interrupted_artifact_goes_on_where_it_was(coordinator: Coordinator, tmp_path: Path) -> None:
    """A request that breaks off leaves its whole blocks, and they are there when the coordinator starts again."""
    coordinator.await_result()

    async def broken() -> Any:
        yield coordinator.data[: 5 * BLOCK + 17]
        await asyncio.sleep(0.2)
        raise httpx.WriteError("the node dies")

    place = {"Content-Range": f"bytes 0-{2**20 - 1}/{len(coordinator.data)}", "Content-Length": str(2**20)}
    with pytest.raises(httpx.WriteError):
        coordinator.ask("PUT", coordinator.sha256, content=broken(), headers=place)
    wait_for("the blocks", lambda: coordinator.ask("HEAD", coordinator.sha256).headers["Upload-Offset"] == str(5 * BLOCK), 10)
    coordinator.stop()
    coordinator.start()
    coordinator.await_result()
    assert coordinator.ask("HEAD", coordinator.sha256).headers["Upload-Offset"] == str(5 * BLOCK)
    assert _bring(coordinator, tmp_path).why is None
    assert coordinator.service.files.path(coordinator.sha256).read_bytes() == coordinator.data
    gc.collect()  # here, not in the test that comes next


@pytest.mark.parametrize(
    ("place", "length", "status"),
    [
        ("bytes 0-99/100", 100, 400), ("bytes 99-0/{size}", 10, 400), ("bytes 0-{size}/{size}", 10, 400), ("", 10, 400),
        ("bytes 0-9/{size}", 100_000, 413), ("bytes x-y/z", 10, 400), ("bytes 0-9/*", 10, 400),
    ],
)  # fmt: skip
def test_part_that_is_none_is_refused(place: str, length: int, status: int, coordinator: Coordinator) -> None:
    """Another size than the result has told, a part that is none, more than it says: nothing of it is kept."""
    coordinator.await_result()
    headers = {"Content-Range": place.format(size=len(coordinator.data))}
    assert coordinator.ask("PUT", coordinator.sha256, content=b"x" * length, headers=headers).status_code == status
    assert coordinator.ask("HEAD", coordinator.sha256).headers["Upload-Offset"] == "0"


def test_artifact_that_is_another_is_not_adopted(coordinator: Coordinator, tmp_path: Path) -> None:
    """It begins anew, which the node hears; the blocks over the broker bring the right one."""
    coordinator.await_result()
    right = coordinator.data
    coordinator.data = right[:-1] + bytes([right[-1] ^ 1])
    assert "awaits" in str(_bring(coordinator, tmp_path).why)
    assert not coordinator.service.files.has(coordinator.sha256)
    for number in range(-(-len(right) // BLOCK)):
        block = right[number * BLOCK : (number + 1) * BLOCK]
        coordinator.service.call(lambda n=number, b=block: coordinator.service.receive_block(NODE, coordinator.sha256, n, b))
    assert coordinator.service.files.has(coordinator.sha256)


def test_server_that_cannot_work_is_a_matter_of_the_configuration(coordinator: Coordinator, tmp_path: Path) -> None:
    """A port that is taken, a certificate that is none, a key that others can read."""
    taken = coordinator.https
    broken = msgspec.structs.replace(taken, certificate_file=taken.key_file)
    for https_config, says in ((taken, "cannot listen"), (broken, "certificate_file")):
        with pytest.raises(ConfigInvalid, match=says), files_served(coordinator.service, https_config):
            pass
    taken.key_file.chmod(0o644)
    with pytest.raises(ConfigInvalid, match="others can read it"), files_served(coordinator.service, taken):
        pass


def test_connections_of_nobody_are_bounded(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the port may open some and say nothing, not even in TLS; above that they are closed, and none stays counted."""
    monkeypatch.setattr(listening, "MOST_OPEN", 8)
    with ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(("127.0.0.1", coordinator.port), 10)) for _ in range(20)]
        wait_for("the end of 12", lambda: len(select.select(silent, [], [], 0)[0]) == 12, 10)
        with pytest.raises(httpx.TransportError):
            coordinator.ask("GET", _sha256(DATA))
        assert len(select.select(silent, [], [], 0.2)[0]) == 12
    wait_for("a way in", lambda: _answers(coordinator), 10)


def _answers(coordinator: Coordinator) -> bool:
    with suppress(httpx.TransportError):
        return coordinator.ask("GET", _sha256(DATA)).content == DATA
    return False


def test_new_certificate_is_taken_without_a_restart(coordinator: Coordinator, caplog: pytest.LogCaptureFixture) -> None:
    """The next connection has it; until certificate and key are both new the old ones serve, and it is told."""
    https, told = coordinator.https, ssl.get_server_certificate
    new = coordinator.authority.issue("broker", "127.0.0.1", coordinator.root / "new", days=20)
    old = told(("127.0.0.1", coordinator.port))
    new.certificate_file.replace(https.certificate_file)
    assert told(("127.0.0.1", coordinator.port)) == old
    assert "certificate_not_taken" in caplog.text
    new.key_file.replace(https.key_file)
    found = told(("127.0.0.1", coordinator.port))
    assert found.strip() in https.certificate_file.read_text()
    assert found != old
    assert "certificate_expires" in caplog.text
    assert coordinator.ask("GET", _sha256(DATA)).content == DATA


def test_doctor_asks_every_file_server(coordinator: Coordinator, tmp_path: Path) -> None:
    """One that answers and knows this node passes; one that does not, or that nobody can reach, fails."""
    config = AgentConfig(NODE, tmp_path, 2**30, {}, file_servers={"lab": coordinator.server()})  # type: ignore[arg-type]
    assert "lab (https://127.0.0.1" in CHECKS["file servers"](config)
    for server, says in ((coordinator.server(None), "lab"), (coordinator.server(url=f"https://127.0.0.1:{free_port()}"), "lab")):
        with pytest.raises(_Wrong, match=says):
            CHECKS["file servers"](msgspec.structs.replace(config, file_servers={"lab": server}))


@pytest.mark.parametrize(
    "url", ["http://h/x", "https://", "https://u:p@h/", "https://h/?q", "https://h/#f", "https://h:x/", "ftp://h", "https://h /"]
)
def test_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    """Encrypted, and with nothing but a host, a port and a path."""
    file = tmp_path / "agent.toml"
    file.write_text(f'node = "n1"\nstate_directory = "s"\nbudget = "1GiB"\nmodels = {{}}\n[file_servers.lab]\nurl = "{url}"\n')
    with pytest.raises(ConfigInvalid, match="file_servers"):
        read_config(file, AgentConfig)


# the daemons


@pytest.mark.parametrize("way", ["https", pytest.param("broken", marks=pytest.mark.slow)])
def test_files_of_a_job_travel_by_https(way: str) -> None:
    """A real node and coordinator: no file in blocks over the broker; with a server that nobody can reach, all of them, and no job lost."""
    port = free_port()
    server = f'[file_servers.lab]\nurl = "https://127.0.0.1:{port if way == "https" else free_port()}"\n[file_servers.lab.tls]\n'
    files = f'ca_file = "tls/ca.pem"\ncertificate_file = "tls/{NODE}.pem"\nkey_file = "tls/{NODE}.key"\n'
    fleet = Fleet(agent=server + files)
    authority = Authority(fleet.directory / "authority")
    authority.issue("node", NODE, fleet.directory / "tls")
    authority.issue("broker", "127.0.0.1", fleet.directory / "tls")
    with fleet.config("coordinator").open("a") as config:
        config.write(f'[https]\nhost = "127.0.0.1"\nport = {port}\nca_file = "tls/ca.pem"\n')
        config.write('certificate_file = "tls/127.0.0.1.pem"\nkey_file = "tls/127.0.0.1.key"\n')
    with fleet:
        data = fleet.data("long", 600)
        assert data.stat().st_size > 64 * 1024
        job = fleet.submit(data, schedule__updates=1, evaluation__questions=1, dataset__limit=4)
        assert fleet.ended(job.id).outcome == "succeeded"
        assert fleet.adapter(job.id)
        blocks = [topic for _, topic, _ in fleet.messages if "/block/" in topic]
        assert (blocks == []) == (way == "https")

        def ended() -> tuple[int, ...]:
            return tuple(fleet.log("agent").count(f"{word} alias=lab") for word in ("file_carried", "file_server_failed"))

        wait_for("the agent to have heard of the last file", lambda: sum(ended()) >= 5)
        assert ended() == ((5, 0) if way == "https" else (0, 5)), "the dataset, the report, two files of the adapter, the Saliency Map"
        fleet.check_messages()
