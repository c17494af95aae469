"""Services: units that it understands and finds closed, daemons that say when they serve, and a watchdog that starves for what is stuck.

The daemons are real processes with a real broker; in place of systemd a socket hears what they say. Booted by it: tests/long_systemd.py.
"""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import msgspec
import paho.mqtt.publish
import pytest
from conftest import ROOT, Cli
from fleet import Fleet, wait_for
from lacking import lack
from orders import NODE

from edge_agent.config import AgentConfig, Api, Broker, CoordinatorConfig, Https, Size, Trust, read_config
from edge_agent.errors import ConfigInvalid, ServiceUnusable
from edge_agent.install import DAEMONS, Kind, install, remove, render
from edge_agent.messages import Report, encode
from edge_agent.models import check_places, installed
from edge_agent.mqtt import Link
from edge_agent.notify import Manager
from edge_agent.topics import down
from edge_agent.watchdog import ATTEMPT_S, GRACE_S, SILENCE_S, STUCK_S, LinkLife, judge

ANALYZE = shutil.which("systemd-analyze")
ABSENT = "SYSTEMD ABSENT: there is no systemd-analyze, so the units were not checked; .ci/run installs it"
THRESHOLDS: dict[Kind, float] = {"agent": 2.4, "coordinator": 1.6}
"""The most that `systemd-analyze security` may find open, of 10: 2.1 and 1.3, and a little for places in /home or /tmp."""
KINDS: tuple[Kind, ...] = ("agent", "coordinator")
ME = getpass.getuser()


def _other() -> str:
    """A user that every Debian has, where it can run this interpreter and this one may have it do so; else this one."""
    if ME != "root":
        return ME
    try:
        subprocess.run([sys.executable, "-c", ""], user="daemon", check=True, timeout=60)
    except PermissionError:
        return ME
    return "daemon"


OTHER = _other()
LIMIT_S = SILENCE_S + 2 * 30


# the decision


@pytest.mark.parametrize(
    ("connected", "moved_s", "answered_s", "feed", "reconnect"),
    [
        (True, 1.0, 0.1, True, False),  # all is well
        (True, 1.0, LIMIT_S - 1, True, False),  # it idles
        (True, 1.0, LIMIT_S + 1, True, True),  # the network lies
        (True, 1.0, LIMIT_S + GRACE_S + 1, False, False),  # and the connection does not end
        (True, STUCK_S + 1, 0.1, False, False),  # the thread is stuck
        (False, 1.0, 0.1, True, False),  # a connection was lost
        (False, 1.0, 1e6, True, False),  # the broker has been away for days: no reason to begin anew
        (False, ATTEMPT_S, 1e6, True, False),  # an attempt takes long
        (False, ATTEMPT_S + 4 * 30 + 1, 1e6, False, False),  # or never ends
    ],
)
def test_watchdog_is_fed_while_the_link_is_what_it_says(
    connected: bool, moved_s: float, answered_s: float, feed: bool, reconnect: bool
) -> None:
    """A broker that is away starves nothing; a link that is stuck does, and one that lies after it was told to connect anew."""
    verdict = judge(LinkLife("broker:1883", connected, moved_s, answered_s, keepalive_s=30))
    assert (verdict.feed, verdict.reconnect) == (feed, reconnect)
    assert "broker:1883" in verdict.status


# what is said


class Ear:
    """Hears what a daemon says as systemd would."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(address)

    def heard(self) -> list[dict[str, str]]:
        """Return what was said since the last time."""
        found = []
        with suppress(BlockingIOError):
            while True:
                lines = self._socket.recv(4096).decode().splitlines()
                found.append(dict(line.split("=", 1) for line in lines))
        return found

    def wait(self, **wanted: str) -> None:
        """Wait for a datagram that has these fields; a text may be a part of the field's."""

        def told() -> bool:
            return any(all(text in said.get(name, "") for name, text in wanted.items()) for said in self.heard())

        wait_for(f"{wanted}", told, 30)

    def fed(self) -> int:
        """How often the watchdog was fed since the last time."""
        return sum("WATCHDOG" in said for said in self.heard())

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_manager_hears_what_is_said(kind: str, tmp_path: Path) -> None:
    """On both kinds of socket that systemd may name; each field is one line whatever is in it, and what a daemon starts is told nothing."""
    name = f"{tempfile.gettempdir()}/ea-{os.getpid()}.sock" if kind == "path" else f"@ea-{os.getpid()}"
    ear = Ear(name.replace("@", "\0"))
    try:
        environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
        manager = Manager(environment)
        assert environment == {"HOME": "/"}
        assert manager.watchdog_s == 3
        manager.tell(READY=1, STATUS="two\nlines")
        assert ear.heard() == [{"READY": "1", "STATUS": "two lines"}]
        for _ in range(10_000):  # nobody reads: nothing waits
            manager.tell(WATCHDOG=1)
    finally:
        ear.close()
        Path(name).unlink(missing_ok=True)
    manager.tell(STATUS="to nobody")


def test_manager_that_is_not_there_or_meant_is_told_nothing() -> None:
    """Without its socket nothing happens; a watchdog over another process is not ours."""
    for environment in ({}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}):
        manager = Manager(environment)
        manager.tell(READY=1)
        assert manager.watchdog_s is None


# the daemons


class Host:
    """A broker and daemons, each under an ear in place of systemd."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.ears: dict[str, Ear] = {}

    def start(self, name: str, *command: str) -> Ear:
        """Start a daemon by a command of Python."""
        place = str(self.fleet.directory / f"{name}.sock")
        self.ears[name] = ear = Ear(place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOTIFY_SOCKET", place)
            patch.setenv("WATCHDOG_USEC", "3000000")
            self.fleet.start(name, command)
        return ear

    def freeze(self, name: str) -> None:
        os.kill(self.fleet.pid(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.kill(self.fleet.pid(name), signal.SIGCONT)

    def close(self) -> None:
        for name in ("agent", "coordinator", "broker"):
            self.fleet.stop(name, signal.SIGKILL)
        for ear in self.ears.values():
            ear.close()
        self.fleet.client.__exit__()
        shutil.rmtree(self.fleet.directory)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def test_daemons_say_that_they_serve_and_live(host: Host) -> None:
    """Ready when they serve and not before; alive while the broker is there and while it is not; not while they stand still."""
    agent = host.start("agent", "-m", "edge_agent", "run")
    agent.wait(READY="1")
    agent.wait(WATCHDOG="1", STATUS="no connection to 127.0.0.1")
    host.fleet.start_broker()
    coordinator = host.start("coordinator", "-m", "edge_agent", "coordinator")
    coordinator.wait(READY="1")
    with socket.socket(socket.AF_UNIX) as probe:
        assert probe.connect_ex(str(host.fleet.directory / "coordinator" / "api.sock")) == 0
    for ear in (agent, coordinator):
        ear.wait(WATCHDOG="1", STATUS="connected to 127.0.0.1")
    host.fleet.stop("broker")
    for ear in (agent, coordinator):
        ear.wait(WATCHDOG="1", STATUS="no connection to 127.0.0.1")
        ear.wait(WATCHDOG="1")
    for name in ("agent", "coordinator"):
        host.freeze(name)
    agent.heard(), coordinator.heard()
    time.sleep(2)
    assert (agent.fed(), coordinator.fed()) == (0, 0)
    for name in ("agent", "coordinator"):
        host.thaw(name)
        assert host.fleet.stop(name) == 0
        host.ears[name].wait(STOPPING="1", EXTEND_TIMEOUT_USEC="")


def report(host: Host) -> None:
    paho.mqtt.publish.single(down("default", NODE, "command", "report"), encode(Report(), "test"), 1, port=host.fleet.port)


def wedged(host: Host, part: str) -> Ear:
    """Start a broker, and an agent of which a part can be stuck; it is connected."""
    host.fleet.start_broker()
    ear = host.start("agent", str(ROOT / "tests" / "wedged.py"), part)
    ear.wait(STATUS="connected", WATCHDOG="1")
    return ear


def test_watchdog_starves_for_a_loop_that_is_stuck(host: Host) -> None:
    """A handler that never returns: nothing feeds the watchdog any more. The link lives on."""
    ear = wedged(host, "handler")
    report(host)
    wait_for("silence", lambda: not time.sleep(1) and not ear.heard(), 30)
    time.sleep(1)
    assert ear.fed() == 0


def test_link_that_lies_connects_anew(host: Host) -> None:
    """The broker stands still, and the connection with it: the link is told to connect anew before its keepalive finds out. From then on it
    is a broker that is away, and the watchdog is fed."""
    ear = wedged(host, "link")
    host.freeze("broker")
    ear.wait(STATUS="answers nothing; it is tried anew", WATCHDOG="1")
    assert "link_silent" in host.fleet.log("agent")
    ear.wait(STATUS="no connection", WATCHDOG="1")
    host.thaw("broker")
    ear.wait(STATUS="connected", WATCHDOG="1")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_link_hears_the_answers_of_the_broker(protocol: str, host: Host) -> None:
    """Each PINGRESP, PUBACK and SUBACK counts as an answer, and what others publish does not."""
    host.fleet.start_broker()
    link = Link(Broker(port=host.fleet.port, protocol=protocol, keepalive_s=3600), "echo", ["echo"], SimpleQueue(), lambda: None)  # type: ignore[arg-type]
    link.start()
    try:
        wait_for("the connection", lambda: link.connected, 30)
        assert link.life().answered_s < 30
        client = link.client
        assert client is not None
        for ask in (client._send_pingreq, lambda: link.publish("elsewhere", b"", qos=1)):
            link._answered_at = -1e6
            link.publish("echo", b"", qos=0)  # comes back, and is no answer
            time.sleep(0.2)
            assert link.life().answered_s > 1e5
            ask()
            wait_for("an answer", lambda: link.life().answered_s < 1e5, 30)
    finally:
        link.close()


# the units


def configured(kind: Kind, state: Path, **more: object) -> AgentConfig | CoordinatorConfig:
    """A configuration with nothing but what must be there."""
    if kind == "agent":
        return AgentConfig("n", state, Size(2**30), {}, **more)  # type: ignore[arg-type]
    return CoordinatorConfig(state, **more)  # type: ignore[arg-type]


def analyzed(unit: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on a unit; it needs no systemd that runs."""
    if ANALYZE is None:
        lack(ABSENT)
    return subprocess.run([ANALYZE, "--no-pager", *command, str(unit)], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_unit_is_one_that_systemd_understands_and_finds_closed(kind: Kind, tmp_path: Path) -> None:
    """Every line is known to it, and what is left open is what trainer and network need. Without its filter of system calls it is more."""
    unit = tmp_path / f"{DAEMONS[kind].name}.service"
    unit.write_text(render(kind, Path("/etc/edge-agent/c.toml"), configured(kind, Path("/var/lib") / DAEMONS[kind].name), "daemon"))
    verified = analyzed(unit, "verify")
    assert (verified.returncode, verified.stderr) == (0, "")
    threshold = f"--threshold={round(10 * THRESHOLDS[kind])}"
    closed = analyzed(unit, "security", "--offline=true", threshold)
    assert closed.returncode == 0, closed.stdout
    unit.write_text(re.sub("^SystemCallFilter=.*", "", unit.read_text(), flags=re.MULTILINE))
    assert analyzed(unit, "security", "--offline=true", threshold).returncode == 1


def settings_of(text: str) -> dict[str, list[str]]:
    """Return the settings of a unit."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_unit_is_that_of_this_machine() -> None:
    """Its interpreter, configuration, state and ports: nothing is open that need not be, and nothing closed that must be open."""
    config = Path("/etc/edge-agent/agent.toml")
    usual = settings_of(render("agent", config, configured("agent", Path("/var/lib/edge-agent/x")), "me"))
    assert usual["ExecStart"] == [f"{sys.executable} -m edge_agent run --config {config}"]
    assert (usual["User"], usual["ReadWritePaths"]) == (["me"], [""])
    odd = Path('/srv/a 100% "free" place\\$HOME')
    elsewhere = settings_of(render("agent", odd / "agent.toml", configured("agent", odd), "me"))
    quoted = r'"/srv/a 100%% \"free\" place\\{}HOME'
    assert elsewhere["ReadWritePaths"] == elsewhere["RequiresMountsFor"] == [quoted.format("$") + '"']
    assert elsewhere["ExecStart"][0].endswith(f'--config {quoted.format("$$")}/agent.toml"')
    with pytest.raises(ServiceUnusable, match="cannot stand in a unit"):
        render("agent", config, configured("agent", Path("/srv/a\nUser=root")), "me")
    at_home = settings_of(render("agent", config, configured("agent", Path("/home/me/state")), "me"))
    interpreter_at_home = any(place.startswith(("/home/", "/root/")) for place in (sys.prefix, sys.base_prefix, str(ROOT)))
    assert (usual["ProtectHome"], at_home["ProtectHome"]) == (["read-only" if interpreter_at_home else "yes"], ["read-only"])
    state = Path("/var/lib/edge-agent")
    trusting = configured("agent", state, trust=Trust(keys_file=Path("/home/ops/trusted_keys")))
    added = configured("agent", state, models_directory=Path("/tmp/models"))  # noqa: S108
    assert settings_of(render("agent", config, trusting, "me"))["ProtectHome"] == ["read-only"]
    assert settings_of(render("agent", config, added, "me"))["PrivateTmp"] == ["no"]
    assert "/tmp/models" in settings_of(render("agent", config, added, "me"))["RequiresMountsFor"][0]  # noqa: S108
    temporary = settings_of(render("agent", config, configured("agent", Path("/tmp/state")), "me"))  # noqa: S108
    assert temporary["PrivateTmp"] == ["no"]
    pem = Path("/etc/edge-agent/a.pem")
    for name, low in ((("api"), Api(port=443)), ("https", Https(certificate_file=pem, key_file=pem, ca_file=pem, port=443))):
        state = Path("/var/lib/edge-agent-coordinator")
        text = render("coordinator", config, configured("coordinator", state, **{name: low}), "me")
        assert settings_of(text)["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
        assert settings_of(render("coordinator", config, configured("coordinator", state), "me"))["AmbientCapabilities"] == [""]


# the command


class Place:
    """A configuration that others than root may read, and a directory for units."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o755)
        self.units, self.config, self.state = directory / "units", directory / "etc" / "agent.toml", directory / "state"
        self.units.mkdir()
        self.config.parent.mkdir(mode=0o755)
        self.write("")

    def write(self, more: str) -> None:
        own = f'node = "n"\nstate_directory = "{self.state}"\nbudget = "1GiB"\n[models]\n'
        self.config.write_text(own + more)
        self.config.chmod(0o644)

    def secret(self, name: str) -> Path:
        file = self.config.parent / name
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.write_text("secret\n")
        file.chmod(0o600)
        return file

    @property
    def unit(self) -> Path:
        return self.units / "edge-agent.service"


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        yield Place(Path(directory))


def test_service_is_installed_changed_and_removed(place: Place) -> None:
    """The same again changes nothing; another configuration changes the unit; what somebody has edited is neither replaced nor removed."""
    first = install("agent", place.config, OTHER, place.units)
    assert first.next == "systemctl enable --now edge-agent"
    assert first.done[-1] == f"wrote {place.unit}"
    assert (stat.S_IMODE(place.state.stat().st_mode), place.state.owner()) == (0o700, OTHER)
    place.write('[rest]\nquiet_hours = ["22:00-06:00"]\n')
    assert install("agent", place.config, OTHER, place.units).done == [f"{place.unit} is as it should be"]
    place.state = place.state / "deeper"
    place.write("")
    changed = install("agent", place.config, OTHER, place.units)
    assert (changed.done[-1], changed.next) == (f"replaced {place.unit}", "systemctl restart edge-agent")
    place.unit.write_text(place.unit.read_text() + "Nice=10\n")
    for again in (lambda: install("agent", place.config, OTHER, place.units), lambda: remove("agent", place.units)):
        with pytest.raises(ServiceUnusable, match="was edited since; move what is your own into a drop-in"):
            again()
    assert place.unit.read_text().endswith("Nice=10\n")
    place.unit.write_text(place.unit.read_text().removesuffix("Nice=10\n"))
    assert f"removed {place.unit}" in remove("agent", place.units).done
    assert (place.unit.exists(), place.state.is_dir()) == (False, True)
    with pytest.raises(ServiceUnusable, match="nothing was removed"):
        remove("agent", place.units)


def test_secrets_are_given_to_the_user_or_what_it_cannot_read_is_said(place: Place) -> None:
    """root's own, beside the configuration, become the service's; those of somebody else, and elsewhere, are told with what to do."""
    password = place.secret("keys/password")
    place.write(f'[broker]\nusername = "n"\npassword_file = "{password}"\n')
    done = install("agent", place.config, OTHER, place.units).done
    assert (password.owner(), password.parent.owner()) == (OTHER, OTHER)
    assert [step for step in done if "keys" in step] == (
        [f"gave {path} to {OTHER}" for path in (password.parent, password)] if ME == "root" else []
    )
    password.write_text("")
    password.chmod(0o640)
    with pytest.raises(ServiceUnusable, match=f"as user {OTHER}: .*chmod 600"):
        install("agent", place.config, OTHER, place.units)
    if OTHER != ME:
        place.write("")
        place.config.chmod(0o600)
        assert f"let {OTHER} read {place.config}" in install("agent", place.config, OTHER, place.units).done
        assert stat.S_IMODE(place.config.stat().st_mode) == 0o640
    assert not list(place.units.glob("*.part"))


def test_what_is_elsewhere_or_behind_a_link_changes_no_owner(place: Place, tmp_path: Path) -> None:
    """A key may be another service's; and who owns a directory of secrets could have a link there lead to anything."""
    if ME != "root":
        lack("NOT ROOT, so no owner could have been changed")
    other, own = tmp_path / "shadow", place.secret("keys/password")
    other.write_text("secret\n")
    other.chmod(0o600)
    (place.config.parent / "link").symlink_to(other)
    for name, owner in ((other, ME), (place.config.parent / "link", ME), (own, "nobody")):
        place.write(f'[broker]\nusername = "n"\npassword_file = "{name}"\n')
        with suppress(ServiceUnusable):  # nobody may not read it, nor perhaps run this interpreter
            install("agent", place.config, "nobody", place.units)
        assert name.owner() == owner
    second = place.secret("second")
    (place.config.parent / "third").hardlink_to(second)
    place.write(f'[broker]\nusername = "n"\npassword_file = "{second}"\n')
    with pytest.raises(ServiceUnusable, match="is a link to another file"):
        install("agent", place.config, "nobody", place.units)


def test_models_that_the_user_cannot_read_are_said(place: Place, tmp_path: Path) -> None:
    """Before the service is made: it would not start with them."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for field in (f'tiny = "{closed}/tiny"\n', f'tiny = "{closed}"\n'):
        place.write(field)
        if OTHER != ME:
            with pytest.raises(ServiceUnusable, match=f"as user {OTHER}: .*models.tiny: Permission denied"):
                install("agent", place.config, OTHER, place.units)
    config = read_config(place.config, AgentConfig)
    with pytest.raises(ConfigInvalid, match="models_directory: Not a directory"):
        check_places(msgspec.structs.replace(config, models={}, models_directory=place.config))
    assert installed(msgspec.structs.replace(config, models_directory=place.config)) == {}
    check_places(msgspec.structs.replace(config, models={"later": tmp_path / "later"}))


def test_state_of_somebody_else_is_left_alone(place: Place) -> None:
    """A directory with files of another user is refused."""
    if ME != "root":
        lack("NOT ROOT, so the state directory of another user was not tried")
    place.state.mkdir()
    os.chown(place.state, pwd.getpwnam("bin").pw_uid, -1)
    (place.state / "agent.sqlite").touch()
    with pytest.raises(ServiceUnusable, match=f"run `chown -R {OTHER}: "):
        install("agent", place.config, OTHER, place.units)
    rehearsed = install("agent", place.config, OTHER, place.units, rehearsal=True)
    assert rehearsed.done[0].startswith(f"ended here: {place.state} is not {OTHER}'s and not empty; run `chown -R {OTHER}: ")
    assert "ExecStart=" in rehearsed.text


def test_command_says_what_it_would_do_and_refuses_what_it_cannot(place: Place, cli: Cli) -> None:
    """A rehearsal prints the unit and leaves nothing; wrong configurations and users have their codes."""
    base = ("install-service", "--config", place.config, "--unit-dir", place.units)
    rehearsed = cli(*base, "--user", "edge-agent-of-nobody", "--dry-run")
    assert (rehearsed.code, rehearsed.err) == (0, "")
    assert "\nWatchdogSec=" in rehearsed.out
    assert f"would have: wrote {place.unit}\nnext: systemctl enable --now edge-agent\n" in rehearsed.out
    assert [*place.units.iterdir()] == []
    assert not place.state.exists()
    with pytest.raises(KeyError):
        pwd.getpwnam("edge-agent-of-nobody")
    told = cli(*base, "--user", "edge-agent-of-nobody", "--dry-run", "--json")
    assert msgspec.json.decode(told.out)["unit"] == str(place.unit)
    refused = cli(*base, "--user", "root")
    assert (refused.code, "error service: 'root' can be no user of a service" in refused.err) == (13, True)
    refused = cli(*base, "--coordinator")
    assert (refused.code, "error config: " in refused.err) == (13, True)
    install("agent", place.config, OTHER, place.units)
    removed = cli("install-service", "--remove", "--unit-dir", place.units)
    assert (removed.code, place.unit.exists()) == (0, False)


def test_units_of_the_repository_are_those_of_the_package() -> None:
    """`deploy/systemd` is where people look, the package what is installed."""
    for kind in KINDS:
        name = f"{DAEMONS[kind].name}.service"
        assert (ROOT / "deploy" / "systemd" / name).samefile(ROOT / "edge_agent" / "systemd" / name)
