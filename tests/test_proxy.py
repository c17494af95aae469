"""A node behind a proxy reaches its broker and its file servers through it; whatever the proxy does instead is told, and tried again."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
from fleet import MOSQUITTO, free_port, wait_for, write_certificates
from lacking import lack
from test_https import DATA, Node
from tls_server import TlsServer
from websockets import Subprotocol
from websockets.sync.server import ServerConnection, serve

from edge_agent import mqtt
from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, Broker, FileServer, Proxy, Size, Tls, read_config
from edge_agent.doctor import CHECKS, _Wrong
from edge_agent.errors import ConfigInvalid
from edge_agent.mqtt import Connected, Disconnected, Link, LinkEvent, Received

USER, PASSWORD, WRONG = "node-1", "open-sesame", "guessed-wrong"
CONNACK, SUBACK = b"\x20\x03\0\0\0", b"\x90\x04\0\x01\0\x01"
OPENED = b"HTTP/1.1 200 Connection established\r\nProxy-agent: test\r\n\r\n"
Kind = str


class Place:
    """A broker on loopback, plain and in TLS, and the proxies that are installed, each with and without a login."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.plain, self.tls = directory, free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        write_certificates(directory)
        for secret in (PASSWORD, WRONG):
            file = self.password_file(secret)
            file.touch(mode=0o600)
            file.write_text(f"{secret}\n")
        assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
        text = f"allow_anonymous true\nuser root\nlistener {self.plain} 127.0.0.1\n"
        for host in ("127.0.0.1", "127.0.0.2"):  # the certificate is for the first
            text += f"listener {self.tls} {host}\ncertfile {directory}/server.pem\nkeyfile {directory}/server.key\n"
        (directory / "mosquitto.conf").write_text(text)
        self._start("mosquitto", self.tls, MOSQUITTO, "-c", str(directory / "mosquitto.conf"))

    def password_file(self, secret: str) -> Path:
        return self.directory / secret

    def _start(self, name: str, port: int, *command: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(name, lambda: _listens(port))

    def proxy(self, kind: Kind, login: bool = False, secret: str = PASSWORD) -> Proxy:
        """Return the configuration of a real proxy, started at need."""
        name = f"{kind} {login}"
        if name not in self._processes:
            self._ports[name] = self._ports.get(name) or free_port()
            (self._start_tinyproxy if kind == "http" else self._start_microsocks)(name, self._ports[name], login)
        own = {"username": USER, "password_file": self.password_file(secret)} if login else {}
        return Proxy(url=f"{kind}://127.0.0.1:{self._ports[name]}", **own)

    def _start_tinyproxy(self, name: str, port: int, login: bool) -> None:
        settings = self.directory / f"tinyproxy-{login}.conf"
        text = f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 600\nMaxClients 20\nLogLevel Connect\n"
        settings.write_text(text + (f"BasicAuth {USER} {PASSWORD}\n" if login else ""))
        self._start(name, port, _installed("tinyproxy"), "-d", "-c", str(settings))

    def _start_microsocks(self, name: str, port: int, login: bool) -> None:
        own = ["-u", USER, "-P", PASSWORD] if login else []
        self._start(name, port, _installed("microsocks"), "-i", "127.0.0.1", "-p", str(port), *own)

    def stop(self, kind: Kind, login: bool = False) -> None:
        process = self._processes.pop(f"{kind} {login}")
        process.terminate()
        process.wait(10)

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
            process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _installed(program: str) -> str:
    if (found := shutil.which(program)) is None:
        lack(f"REAL PROXY ABSENT: {program} is not installed (.ci/run installs it), so nothing went through it")
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("proxy"))
    yield made
    made.close()


@contextmanager
def _linked(broker: Broker) -> Iterator[tuple[Link, SimpleQueue[LinkEvent]]]:
    events: SimpleQueue[LinkEvent] = SimpleQueue()
    link = Link(broker, "behind-a-proxy", ["echo/#"], events, lambda: None)
    link.start()
    try:
        yield link, events
    finally:
        link.close()


def _speaks(broker: Broker) -> None:
    """A message goes to the broker and comes back."""
    with _linked(broker) as (link, events):
        assert isinstance(events.get(timeout=20), Connected)
        assert link.publish("echo/x", b"hello", qos=1)
        received = events.get(timeout=20)
        assert isinstance(received, Received)
        link.acknowledge(received)


def _fails(broker: Broker) -> str:
    """The connection is not made; return why, as the log would say it."""
    with _linked(broker) as (_, events):
        event = events.get(timeout=20)
        assert isinstance(event, Disconnected)
        assert broker.proxy is not None
        assert event.why.endswith(f"; the way is through the proxy {broker.proxy.url}")
        assert not [secret for secret in (PASSWORD, WRONG) if secret in event.why]
        return event.why


REAL = [("http", False), ("http", True), ("socks5", False), ("socks5", True)]


@pytest.mark.parametrize(("kind", "login"), REAL)
def test_broker_is_reached_through_a_proxy(kind: Kind, login: bool, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a login, plain and in TLS; this machine looks up no name, the proxy does."""
    look_up = socket.getaddrinfo

    def without_names(host: str, *rest: Any, **more: Any) -> Any:
        if host != "127.0.0.1":
            raise socket.gaierror(f"{host!r} was looked up")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", without_names)
    proxy = place.proxy(kind, login)
    _speaks(Broker("localhost", place.plain, proxy=proxy))
    _speaks(Broker("localhost", place.tls, tls=Tls(place.directory / "ca.pem"), proxy=proxy))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho leaves a socket that fails to the collector
@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_certificate_is_the_broker_s(kind: Kind, place: Place) -> None:
    """Its name is held against the broker's host: one that is good for the host of the proxy alone is refused."""
    broker = Broker("127.0.0.2", place.tls, tls=Tls(place.directory / "ca.pem"), proxy=place.proxy(kind))
    assert "certificate verify failed" in _fails(broker)
    _speaks(msgspec.structs.replace(broker, host="127.0.0.1"))


def test_websocket_in_tls_goes_through_a_proxy(place: Place) -> None:
    """The way of most companies: out by CONNECT to port 443, TLS in that, a WebSocket in that, MQTT in that."""

    def speak(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(CONNACK)
        connection.recv()
        connection.send(SUBACK)
        connection.recv(timeout=20)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place.directory / "server.pem", place.directory / "server.key")
    with serve(speak, "127.0.0.1", 0, subprotocols=[Subprotocol("mqtt")], ssl=context) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, tls = server.socket.getsockname()[1], Tls(place.directory / "ca.pem")
        with _linked(Broker("localhost", port, tls=tls, websocket_path="/mqtt", proxy=place.proxy("http", True))) as (_, events):
            assert isinstance(events.get(timeout=20), Connected)


@pytest.mark.parametrize(("kind", "says"), [("http", "401 Unauthorized"), ("socks5", "authentication failure")])
def test_wrong_login_is_told(kind: Kind, says: str, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """As what the proxy says, without the password; the right one is taken with the next connection, without a new start."""
    proxy = place.proxy(kind, True, WRONG)
    with _linked(Broker("localhost", place.plain, proxy=proxy)) as (_, events):
        told = events.get(timeout=20)
        assert isinstance(told, Disconnected)
        assert says in told.why
        assert proxy.password_file is not None
        proxy.password_file.write_text(PASSWORD)
        wait_for("the connection", lambda: isinstance(events.get(timeout=20), Connected))
    proxy.password_file.write_text(WRONG)
    assert not [secret for secret in (PASSWORD, WRONG) if secret in told.why + caplog.text]


def test_proxy_that_dies_is_awaited(place: Place) -> None:
    """In the middle of a connection: its end names the proxy, and when that is back there is a new one."""
    broker = Broker("localhost", place.plain, proxy=place.proxy("http"))
    with _linked(broker) as (_, events):
        assert isinstance(events.get(timeout=20), Connected)
        place.stop("http")
        ended = events.get(timeout=20)
        assert isinstance(ended, Disconnected)
        assert f"the way is through the proxy {broker.proxy and broker.proxy.url}" in ended.why
        place.proxy("http")
        wait_for("the connection", lambda: isinstance(events.get(timeout=20), Connected))


class BadProxy:
    """Reads what it is asked, then sends pieces, waiting for more from the client before each that is None, and hangs up or does not."""

    def __init__(self, *pieces: bytes | None, hangs: bool = False) -> None:
        self._pieces, self._hangs, self._over = pieces, hangs, threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.recv(1000)
                for piece in self._pieces:
                    if piece is None:
                        client.recv(1000)
                    else:
                        client.sendall(piece)
                        time.sleep(0.05)  # no delay of Nagle's puts two together
                if self._hangs:
                    self._over.wait(30)

    def __enter__(self) -> BadProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


def test_answer_may_come_in_pieces() -> None:
    """As any answer over TCP may: what belongs to it is never taken for the broker's."""
    with BadProxy(OPENED[:12], OPENED[12:-2], OPENED[-2:], None, CONNACK, None, SUBACK, hangs=True) as proxy:
        broker = Broker("broker.invalid", proxy=Proxy(url=f"http://127.0.0.1:{proxy.port}"))
        with _linked(broker) as (_, events):
            assert isinstance(events.get(timeout=20), Connected)


@pytest.mark.parametrize(
    ("kind", "pieces", "says"),
    [
        ("http", (b"HTTP/1.1 403 Filtered\r\n\r\n",), "403 Filtered"),
        ("http", (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",), "407"),
        ("http", (b"\x05\xff" * 500,), "no answer in HTTP"),
        ("http", (b"HTTP/1.1 abc OK\r\n\r\n",), "no answer in HTTP"),
        ("http", (b"HTTP/1.1 200 " + b"x" * 70_000,), "no answer in HTTP"),
        ("http", (), "without response"),
        ("http", (OPENED[:30],), "lost|reset|refused|closed"),
        ("http", (OPENED, b"\xff" * 100), "."),
        ("socks5", (b"\x05\xff",), "No acceptable authentication"),
        ("socks5", (b"HTTP/1.1 400 Bad Request\r\n\r\n",), "SOCKS version"),
        ("socks5", (b"\x05\0", None, b"\x05\x05\0\x01" + bytes(6)), "refused by destination"),
        ("socks5", (b"\x05\0", None, b"\x05\0\0\x07" + bytes(6)), "address type"),
        ("socks5", (b"\x05\x02",), "authentication method"),
        ("socks5", (b"\x05",), "closed"),
    ],
)
def test_proxy_that_refuses_or_talks_rubbish(kind: Kind, pieces: tuple[bytes | None, ...], says: str) -> None:
    """Each is a reason that names the proxy, and the link goes on."""
    with BadProxy(*pieces) as proxy:
        assert re.search(says, _fails(Broker("broker.invalid", proxy=Proxy(url=f"{kind}://127.0.0.1:{proxy.port}"))))


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_proxy_that_is_silent(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for as long as for a broker, and no longer; one that is not there is told at once."""
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 0.3)
    with BadProxy(hangs=True) as proxy:
        assert "timed out" in _fails(Broker("broker.invalid", proxy=Proxy(url=f"{kind}://127.0.0.1:{proxy.port}")))
    assert "refused" in _fails(Broker("broker.invalid", proxy=Proxy(url=f"{kind}://127.0.0.1:{free_port()}")))


# files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsServer]:
    served = TlsServer(tmp_path / "server", DATA)
    yield served
    served.close()


@pytest.mark.parametrize("login", [False, True])
def test_files_come_through_a_proxy(login: bool, server: TlsServer, place: Place, tmp_path: Path) -> None:
    """The server is reached by CONNECT, and known by its own certificate."""
    proxy = place.proxy("http", login)
    node = Node(tmp_path, DATA, {"mirror": FileServer(url=server.url, tls=Tls(server.authority.certificate_file), proxy=proxy)})
    node.sender.remove(node.file.sha256)
    assert node.get() == DATA
    assert f"CONNECT {server.url.split('/')[2]}" in (place.directory / f"http {login}.log").read_text()


def test_files_go_over_the_broker_where_a_proxy_fails(server: TlsServer, place: Place, tmp_path: Path) -> None:
    """One that refuses, and one that is not there: the reason names it, and the log no password. `doctor` says the same."""
    for proxy in (place.proxy("http", True, WRONG), Proxy(url=f"http://127.0.0.1:{free_port()}")):
        servers = {"mirror": FileServer(url=server.url, tls=Tls(server.authority.certificate_file), timeout_s=5, proxy=proxy)}
        node = Node(tmp_path / proxy.url[-5:], DATA, servers)
        assert node.get() == DATA
        assert [why for why in node.whys if why and f"through the proxy {proxy.url}" in why and WRONG not in why] == node.whys != []
        config = AgentConfig("node-1", tmp_path, Size(2**30), {}, file_servers=servers)
        with pytest.raises(_Wrong, match=f"through the proxy {proxy.url}"):
            CHECKS["file servers"](config)
    assert server.requests == []


# the configuration


@pytest.mark.parametrize("table", ["broker", "file_servers.lab"])
@pytest.mark.parametrize(
    "proxy",
    ['url = "http://user:password@proxy:3128"', 'url = "http://proxy"', 'url = "https://proxy:3128"', 'url = "http://proxy:99999"',
     'url = "http://proxy:3128/x"', 'url = "http://proxy:3128"\nusername = "u"', 'url = "http://proxy:3128"\npassword_file = "p"',
     'url = "http://proxy:3128"\nusername = "u:v"\npassword_file = "p"', 'username = "u"\npassword_file = "p"'],
)  # fmt: skip
def test_proxy_that_is_none_is_refused(table: str, proxy: str, tmp_path: Path) -> None:
    """A scheme, a host and a port, and no secret beside them; a login is whole."""
    with pytest.raises(ConfigInvalid, match="proxy") as raised:
        read_config(_toml(tmp_path, table, proxy), AgentConfig)
    assert "user:password" not in str(raised.value)


def test_proxy_of_a_file_server_is_one_of_http(tmp_path: Path) -> None:
    """A broker may be behind one of SOCKS."""
    socks = 'url = "socks5://proxy:1080"'
    assert read_config(_toml(tmp_path, "broker", socks), AgentConfig).broker.proxy == Proxy(url="socks5://proxy:1080")
    with pytest.raises(ConfigInvalid, match="one of HTTP"):
        read_config(_toml(tmp_path, "file_servers.lab", socks), AgentConfig)


def _toml(directory: Path, table: str, proxy: str) -> Path:
    file = directory / "agent.toml"
    url = '[file_servers.lab]\nurl = "https://files"\n' if table == "file_servers.lab" else ""
    file.write_text(f'node = "n1"\nstate_directory = "s"\nbudget = "1GiB"\nmodels = {{}}\n{url}[{table}.proxy]\n{proxy}\n')
    return file


def test_password_that_others_can_read(tmp_path: Path) -> None:
    """No process starts with it, neither for the broker nor for a file server."""
    file = tmp_path / "proxy.password"
    file.write_text(PASSWORD)
    file.chmod(0o644)
    proxy = Proxy(url="http://127.0.0.1:3128", username=USER, password_file=file)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        Link(Broker(proxy=proxy), "open", [], SimpleQueue(), lambda: None)
    config = AgentConfig(USER, tmp_path / "state", Size(2**30), {}, file_servers={"lab": FileServer(url="https://files", proxy=proxy)})
    with pytest.raises(ConfigInvalid, match="others can read it"):
        Agent(config)
