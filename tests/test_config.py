"""Configuration files are strict: what is wrong is named with its place, and a daemon that can never work says so once and ends with 13."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import msgspec
import psycopg
import pytest
from conftest import DEADLINE_S, TINY, Cli
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edge_agent.config import AgentConfig, Broker, CoordinatorConfig, Database, Proxy, Size, Tls, read_config
from edge_agent.errors import ConfigInvalid
from edge_agent.mqtt import Link

MINIMAL = 'node = "n1"\nstate_directory = "state"\nbudget = "1GiB"\nmodels = {}\n'
COORDINATOR = 'state_directory = "state"\n'


def _write(directory: Path, text: str) -> Path:
    path = directory / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _refused(path: Path, kind: Any = AgentConfig) -> str:
    with pytest.raises(ConfigInvalid) as raised:
        read_config(path, kind)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; see docs/config.md")
    assert "\n" not in text
    assert raised.value.exit_code == 13
    return text


def test_smallest_configuration(tmp_path: Path) -> None:
    """Four keys are enough for an agent, one for a coordinator; everything else has a default."""
    agent = read_config(_write(tmp_path, MINIMAL), AgentConfig)
    assert (agent.node, agent.budget, agent.models, agent.fleet, agent.broker) == ("n1", 2**30, {}, "default", Broker())
    coordinator = read_config(_write(tmp_path, COORDINATOR), CoordinatorConfig)
    assert (coordinator.fleet, coordinator.instance, coordinator.broker) == ("default", "main", Broker())


def test_every_key_is_read(tmp_path: Path) -> None:
    """What a file says is what the agent works with, tables included."""
    text = MINIMAL + (
        'fleet = "f"\ndevice = "cpu"\nqueue = 2\ndataset_limit = "1 MiB"\nstore_limit = "2GB"\nmax_attempts = 3\nthreads = 1\n'
        'cache_limit = "0"\n[broker]\nhost = "broker"\nport = 8883\nprotocol = "3.1.1"\nusername = "u"\npassword_file = "p"\n'
        'packet_limit = "64KiB"\nkeepalive_s = 60\nwebsocket_path = "/mqtt"\n'
        '[broker.tls]\nca_file = "ca"\ncertificate_file = "crt"\nkey_file = "key"\n'
        '[broker.proxy]\nurl = "socks5://[::1]:1080"\nusername = "LAB\\\\u"\npassword_file = "pp"\n'
        "[timers]\nqueue_s = 1\nstaging_s = 2.5\nstall_s = 3\nstop_s = 4\n"
    )
    config = read_config(_write(tmp_path, text), AgentConfig)
    tls = Tls(tmp_path / "ca", tmp_path / "crt", tmp_path / "key")
    proxy = Proxy(url="socks5://[::1]:1080", username="LAB\\u", password_file=tmp_path / "pp")
    assert config.broker == Broker("broker", 8883, "3.1.1", "u", tmp_path / "p", Size(64 * 1024), 60, tls, "/mqtt", proxy)
    assert (config.timers.queue_s, config.timers.staging_s, config.timers.stall_s, config.timers.stop_s) == (1.0, 2.5, 3.0, 4.0)
    assert (config.queue, config.dataset_limit, config.store_limit, config.max_attempts, config.threads) == (2, 2**20, 2 * 10**9, 3, 1)
    assert config.cache_limit == 0
    assert (config.fleet, config.device) == ("f", "cpu")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("colour = 1", "unknown field `colour`"),
        ("broker.hots = 'x'", "unknown field `hots` - at `$.broker`"),
        ("timers.run_s = 1", "unknown field `run_s` - at `$.timers`"),
        ("broker.tls.ca = 'x'", "unknown field `ca` - at `$.broker.tls`"),
        ("queue = 'many'", "Expected `int`, got `str` - at `$.queue`"),
        ("queue = 0", "Expected `int` >= 1 - at `$.queue`"),
        ("queue = true", "Expected `int`, got `bool` - at `$.queue`"),
        ("device = 'tpu'", "`device` 'tpu' is none of `auto`, `cpu`, `cuda`, and no UUID of a GPU"),
        ("device = 1", "Expected `str`, got `int` - at `$.device`"),
        ("broker.port = 70000", "Expected `int` <= 65535 - at `$.broker.port`"),
        ("broker.protocol = '3.1'", "Invalid enum value '3.1' - at `$.broker.protocol`"),
        ("broker.host = ''", "Expected `str` of length >= 1 - at `$.broker.host`"),
        ("broker.keepalive_s = 1", "Expected `int` >= 5 - at `$.broker.keepalive_s`"),
        ("broker.tls.ca_file = ''", "Expected `path`, got '' - at `$.broker.tls.ca_file`"),
        ("broker.tls.key_file = 'k'", "`certificate_file` and `key_file` come together - at `$.broker.tls`"),
        ("broker.tls.certificate_file = 'c'", "`certificate_file` and `key_file` come together - at `$.broker.tls`"),
        ("broker.password_file = 5", "Expected `path`, got 5 - at `$.broker.password_file`"),
        ("broker = 'here'", "Expected `object`, got `str` - at `$.broker`"),
        ("timers.stall_s = 0", "Expected `float` > 0.0 - at `$.timers.stall_s`"),
        ("timers.stall_s = nan", "Expected `float` > 0.0 - at `$.timers.stall_s`"),
        ("fleet = 'a/b'", "at `$.fleet`"),
        ("fleet = '+'", "at `$.fleet`"),
        ("store_limit = 5", "Expected `size`, got 5 - at `$.store_limit`"),
        ("store_limit = 'much'", "'much' is no size - at `$.store_limit`"),
        ("store_limit = '-1GiB'", "'-1GiB' is no size - at `$.store_limit`"),
        ("store_limit = '0GiB'", "'0GiB' is no size above 0 - at `$.store_limit`"),
        ("store_limit = ''", "Expected `size`, got '' - at `$.store_limit`"),
        ("node = 'n2'", "Cannot overwrite a value"),
        ("queue = ", "Invalid value"),
        ("[broker", "Expected ']'"),
    ],
)
def test_line_that_is_wrong(line: str, says: str, tmp_path: Path) -> None:
    """The error names the file, the place in it and what is expected there."""
    assert says in _refused(_write(tmp_path, f"{MINIMAL}{line}\n"))


@pytest.mark.parametrize("key", ["node", "state_directory", "budget"])
def test_key_that_is_missing(key: str, tmp_path: Path) -> None:
    """Without one of the three keys that have no default there is no agent."""
    text = "".join(line for line in MINIMAL.splitlines(keepends=True) if not line.startswith(key))
    assert f"missing required field `{key}`" in _refused(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("", "at `$.node`"), ("N1", "at `$.node`"), ("a/b", "at `$.node`"), ("+", "at `$.node`"), ("#", "at `$.node`"),
        ("a b", "at `$.node`"), ("n" * 65, "at `$.node`"), ("knoten-ü", "at `$.node`"),
        (r"n1\n", "at `$.node`"),
        ("coordinator", "`node` may not be 'coordinator'"),
    ],
)  # fmt: skip
def test_node_id_that_is_wrong(node: str, says: str, tmp_path: Path) -> None:
    """An id that would break out of its topics, or take the coordinator's, is refused."""
    assert says in _refused(_write(tmp_path, MINIMAL.replace('"n1"', f'"{node}"')))


@pytest.mark.parametrize("node", ["n", "0", "-", "n" * 64, "coordinators"])
def test_node_id_that_is_right(node: str, tmp_path: Path) -> None:
    """Lower-case letters, digits and hyphens, 1 to 64 of them."""
    assert read_config(_write(tmp_path, MINIMAL.replace('"n1"', f'"{node}"')), AgentConfig).node == node


@pytest.mark.parametrize("line", ["instance = 'A'", "node = 'n1'", "artifact_limit = 1", "broker.tls.insecure = true"])
def test_coordinator_file_that_is_wrong(line: str, tmp_path: Path) -> None:
    """The coordinator's file is as strict as the agent's."""
    _refused(_write(tmp_path, f"{COORDINATOR}{line}\n"), CoordinatorConfig)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"\xff\xfe", "codec"), (b"node = 1\0", "Expected newline"), ("directory", "Is a directory")],
)
def test_file_that_cannot_be_read(content: bytes | str | None, says: str, tmp_path: Path) -> None:
    """A file that is missing, a directory or no text is named as such."""
    path = tmp_path / "some.toml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    assert says in _refused(path)


def test_relative_paths_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file means the same wherever the daemon is started, also through a link; absolute paths and the home directory stay."""
    place, elsewhere = tmp_path / "etc" / "edge", tmp_path / "elsewhere"
    place.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = MINIMAL.replace("models = {}", 'models = { a = "../models/a", b = "/srv/b", c = "~/c" }').replace('"state"', '"var/state"')
    path = _write(place, text + '[broker]\npassword_file = "secret"\n[broker.tls]\nca_file = "../ca.pem"\n')
    (elsewhere / "linked.toml").symlink_to(path)
    for given in (path, Path("../etc/edge/some.toml"), Path("linked.toml")):
        config = read_config(given, AgentConfig)
        assert config.state_directory == place / "var" / "state"
        assert config.broker.password_file == place / "secret"
        assert config.broker.tls == Tls(place / "../ca.pem")
        assert config.models == {"a": place / "../models/a", "b": Path("/srv/b"), "c": tmp_path / "home" / "c"}


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6 * 2**30), ("900 MiB", 900 * 2**20), ("5000000", 5_000_000), ("1.5kb", 1500)])
def test_size_as_a_person_writes_it(text: str, size: int, tmp_path: Path) -> None:
    """Sizes carry their unit; a bare text of digits is bytes."""
    budget = read_config(_write(tmp_path, MINIMAL.replace("1GiB", text)), AgentConfig).budget
    assert budget == size
    assert isinstance(budget, Size)


@pytest.mark.parametrize(
    ("path", "says"),
    [("~no-such-user/state", "'~no-such-user/state' is no path - at `$.state_directory`"), (r"a\u0000b", "at `$.state_directory`")],
)
def test_path_that_cannot_be_one(path: str, says: str, tmp_path: Path) -> None:
    """The home of an unknown user and a path that no system takes are refused like any other wrong value."""
    assert says in _refused(_write(tmp_path, MINIMAL.replace('"state"', f'"{path}"')))


# secrets and certificates


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg:///edge", "postgresql+psycopg://u@localhost/edge", "postgresql+psycopg://u@[::1]:5433/edge",
        "postgresql+psycopg://u@%2Frun%2Fpostgresql/edge", "postgresql+psycopg:///edge?host=/run/postgresql",
        "postgresql+psycopg://u@db.example.org/edge?sslmode=verify-full", "postgresql+psycopg://u@a,b/edge?sslmode=disable",
    ],
)  # fmt: skip
def test_database_that_is_right(url: str) -> None:
    """On this machine, or elsewhere with a word on how the connection is encrypted; it is told without its options."""
    database = msgspec.convert({"url": url}, Database)
    assert (database.where, database.password) == (url.partition("?")[0], None)
    assert psycopg.conninfo.conninfo_to_dict(database.address)["dbname"] == "edge"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///state.sqlite", "matching regex"),
        ("postgresql://u@localhost/edge", "matching regex"),
        ("postgresql+psycopg://u:secret@localhost/edge", "the password of a `database` stands in its `password_file`"),
        ("postgresql+psycopg://u@localhost/edge?password=secret", "the password of a `database` stands in its `password_file`"),
        ("postgresql+psycopg://u@localhost/edge?sslpassword=secret", "the password of a `database` stands in its `password_file`"),
        ("postgresql+psycopg://u@db.example.org/edge", "says `?sslmode=verify-full`"),
        ("postgresql+psycopg://u@localhost,db.example.org/edge", "says `?sslmode=verify-full`"),
        ("postgresql+psycopg://u@localhost/edge?host=db.example.org", "says `?sslmode=verify-full`"),
        ("postgresql+psycopg://u@localhost/edge?hostaddr=10.0.0.7", "says `?sslmode=verify-full`"),
    ],
)
def test_database_that_is_wrong(url: str, says: str, tmp_path: Path) -> None:
    """Another kind, a password where it would be shown, a server elsewhere of which nobody says how it is reached."""
    error = _refused(_write(tmp_path, f'state_directory = "s"\n[database]\nurl = "{url}"\n'), CoordinatorConfig)
    assert says in error
    assert "secret" not in error


def test_database_whose_password_others_can_read(tmp_path: Path) -> None:
    """The coordinator does not start with it."""
    file = tmp_path / "password"
    file.write_text("secret")
    file.chmod(0o644)
    with pytest.raises(ConfigInvalid, match=r"database\.password_file: others can read it"):
        _ = Database(url="postgresql+psycopg:///edge", password_file=file).password


def _link(broker: Broker) -> Link:
    return Link(broker, "n1", [], SimpleQueue(), lambda: None)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_password_that_others_can_read(mode: int, tmp_path: Path) -> None:
    """Any right for group or others is one too many; the error names the file and the command that mends it."""
    file = tmp_path / "password"
    file.write_text("secret\n")
    file.chmod(mode)
    with pytest.raises(ConfigInvalid, match=f"others can read it; run `chmod 600 {file}`") as raised:
        _link(Broker(username="u", password_file=file))
    assert "secret" not in str(raised.value)


def test_password_is_read_from_its_file(tmp_path: Path) -> None:
    """The password is the file's text without the newline that an editor leaves; without a file there is none."""
    file = tmp_path / "password"
    file.write_text("pass word\n")
    file.chmod(0o600)
    assert Broker(username="u", password_file=file).password == file.read_text().removesuffix("\n")
    assert Broker(username="u").password is None


def test_password_file_that_is_missing(tmp_path: Path) -> None:
    """The link is refused before it connects with an empty password."""
    with pytest.raises(ConfigInvalid, match=r"broker\.password_file: No such file"):
        _link(Broker(username="u", password_file=tmp_path / "password"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_password_file_that_holds_no_text(content: bytes | None, tmp_path: Path) -> None:
    """A directory, or bytes that are no text, where the password should be are an error of the configuration."""
    file = tmp_path / "password"
    if content is None:
        file.mkdir(mode=0o700)
    else:
        file.write_bytes(content)
        file.chmod(0o600)
    with pytest.raises(ConfigInvalid, match=str(file)):
        _link(Broker(username="u", password_file=file))


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_certificate_file_that_is_wrong(content: bytes | None, tmp_path: Path) -> None:
    """A CA file that is missing or holds no certificate is refused: nothing falls back to a plain or unchecked connection."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    with pytest.raises(ConfigInvalid, match=str(file)):
        _link(Broker(tls=Tls(ca_file=file)))
    with pytest.raises(ConfigInvalid, match=str(file)):
        _link(Broker(tls=Tls(certificate_file=file, key_file=file)))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key, readable by their owner."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n1")])
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - timedelta(days=1), now + timedelta(days=1))
        .sign(key, SHA256())
    )  # fmt: skip
    files = tmp_path / "own.crt", tmp_path / "own.key"
    files[0].write_bytes(signed.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for file in files:
        file.chmod(0o600)
    return files


def test_certificate_of_its_own(certificate: tuple[Path, Path]) -> None:
    """A certificate with its private key is taken, and so is a file of authorities."""
    _link(Broker(tls=Tls(certificate[0], *certificate)))


@pytest.mark.parametrize("wrong", ["ca_file", "certificate_file", "key_file"])
def test_missing_file_is_the_one_that_is_named(wrong: str, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """With a right certificate beside it, the error still names the file that is missing."""
    tls = msgspec.structs.replace(Tls(certificate[0], *certificate), **{wrong: tmp_path / "none"})
    with pytest.raises(ConfigInvalid, match=str(tmp_path / "none")):
        _link(Broker(tls=tls))


def test_private_key_that_others_can_read(certificate: tuple[Path, Path]) -> None:
    """A private key is a secret like the password: one that others can read is refused."""
    certificate[1].chmod(0o644)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        _link(Broker(tls=Tls(None, *certificate)))


# the command


def _agent_file(tmp_path: Path, more: str = "", name: str = "agent.toml") -> Path:
    path = tmp_path / name
    path.write_text(f'node = "n1"\nstate_directory = "state"\nbudget = "1GiB"\ndevice = "cpu"\nmodels = {{ tiny = "{TINY}" }}\n{more}')
    return path


def _never_starts(cli: Cli, path: Path) -> str:
    """Run the daemon with a configuration that can never work; return the one line that it says."""
    ran = cli("run", "--config", path)
    assert ran.code == 13, ran.err
    assert ran.out == ""
    [line] = ran.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("colour = 1", "error config: {config}: Object contains unknown field `colour`; see docs/config.md"),
        ("[broker]\npassword_file = 'open'", "error config: {directory}/open: broker.password_file: others can read it; run"),
        ("[broker]\npassword_file = 'none'", "error config: {directory}/none: broker.password_file: No such file or directory"),
        ("[broker.tls]\nca_file = 'none'", "error config: {directory}/none: "),
    ],
)
def test_daemon_with_a_wrong_file(more: str, says: str, tmp_path: Path, cli: Cli) -> None:
    """`edge-agent run` ends with 13, which tells a supervisor not to start it again, and one line that says what to mend."""
    (tmp_path / "open").write_text("secret")
    (tmp_path / "open").chmod(0o644)
    path = _agent_file(tmp_path, more)
    assert _never_starts(cli, path).startswith(says.format(config=path, directory=tmp_path))


def test_daemon_without_a_file(tmp_path: Path, cli: Cli) -> None:
    """The file that is named and missing is in the one line."""
    missing = tmp_path / "missing.toml"
    assert _never_starts(cli, missing) == f"error config: {missing}: No such file or directory; see docs/config.md"


def test_coordinator_with_a_broken_database(tmp_path: Path, cli: Cli) -> None:
    """A state that is no database is not overwritten: the coordinator ends with 13 and names it."""
    (tmp_path / "state").mkdir(mode=0o700)
    database = tmp_path / "state" / "coordinator.sqlite"
    database.write_text("somebody's notes, more than a header long\n" * 10)
    before = database.read_bytes()
    config = tmp_path / "coordinator.toml"
    config.write_text('state_directory = "state"\n')
    ran = cli("coordinator", "--config", config)
    assert ran.code == 13
    assert ran.err.startswith(f"error state: state directory {database}: file is not a database")
    assert database.read_bytes() == before


def test_daemon_whose_state_others_can_enter(tmp_path: Path, cli: Cli) -> None:
    """A directory that was open to others before is not made the agent's own by surprise: it is refused and left as it is."""
    (tmp_path / "state").mkdir(mode=0o755)
    assert "chmod 700" in _never_starts(cli, _agent_file(tmp_path))
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o755
    assert list((tmp_path / "state").iterdir()) == []


def test_daemon_whose_state_directory_is_a_file(tmp_path: Path, cli: Cli) -> None:
    """The place of the state is named where it cannot be a directory."""
    (tmp_path / "state").write_text("")
    assert _never_starts(cli, _agent_file(tmp_path)).startswith(f"error state: state directory {tmp_path / 'state'}: ")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens, taken so that nobody will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def _running(config: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A daemon that has started, and its log so far."""
    command = [sys.executable, "-m", "edge_agent", "run", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        reader = Thread(target=lambda: lines.extend(iter(_stream(process).readline, "")))
        reader.start()
        try:
            _wait_for(lines, "agent_started", process)
            yield process, lines
        finally:
            process.kill()
            reader.join(DEADLINE_S)


def _stream(process: subprocess.Popen[str]) -> Any:
    return process.stderr


def _wait_for(lines: list[str], word: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not any(word in line for line in lines):
        assert process.poll() is None, lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


def test_second_daemon_on_one_state_directory(closed_port: int, tmp_path: Path, cli: Cli) -> None:
    """Two daemons never work on one state: the second ends with 13, the first, whose broker is not even there, goes on and ends
    in order when asked. Then the directory is free again."""
    config = _agent_file(tmp_path, f"[broker]\nport = {closed_port}\n")
    with _running(config) as (process, lines):
        _wait_for(lines, "disconnected", process)
        line = _never_starts(cli, _agent_file(tmp_path, f"fleet = 'other'\n[broker]\nport = {closed_port}\n", "other.toml"))
        assert line.startswith(f"error state: state directory {tmp_path / 'state'}: another process works in it")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert "agent_stopped" in lines[-1]
    with _running(config) as (process, lines):
        process.kill()  # the kernel gives the directory free, however a daemon ends
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    with _running(config):
        pass


def test_state_directory_is_private(closed_port: int, tmp_path: Path) -> None:
    """A daemon makes its state directory for its owner alone: datasets of jobs are in it."""
    umask = os.umask(0)
    try:
        with _running(_agent_file(tmp_path, f"[broker]\nport = {closed_port}\n")):
            assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(umask)
