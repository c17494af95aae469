"""`edge-agent install-service`: a daemon of this installation as a service of systemd, with the unit that ships beside this module.

The unit is hardened as its comments say; here its paths, user and groups become those of this machine. What the service's user could not
read is found by a process of that user, which reads all that the daemon reads when it starts: `python -m edge_agent.install KIND CONFIG`.

Does not cover: units of users (`systemctl --user`), and machines without systemd.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_agent.config import AGENT_CONFIG, COORDINATOR_CONFIG, AgentConfig, CoordinatorConfig, read_config
from edge_agent.errors import EdgeAgentError, ServiceUnusable
from edge_agent.files import write_file

Kind = Literal["agent", "coordinator"]
Config = AgentConfig | CoordinatorConfig
UNIT_DIRECTORY = Path("/etc/systemd/system")
STATES = Path("/var/lib")
"""Where systemd makes state directories."""
HOMES, TEMPORARY = (Path("/home"), Path("/root"), Path("/run/user")), (Path("/tmp"), Path("/var/tmp"))  # noqa: S108
GPU_GROUPS = ("video", "render")
"""Whose members may open the device files of GPUs, where not everyone may."""
SECRETS = ("password_file", "key_file", "token_file")
"""Endings of the names of fields with files that only their owner may read."""
USER_PATTERN = r"^[a-z_][a-z0-9_-]{0,30}\Z"
PRIVILEGED_PORTS = 1024
MARK = "# Written by `edge-agent install-service`. sha256 of what follows: "
CHECK_S = 60.0


@dataclass(frozen=True)
class Daemon:
    """What is different for each of the two."""

    name: str
    """Of the unit, the user and the state directory."""
    command: str
    config_file: Path


DAEMONS: dict[Kind, Daemon] = {
    "agent": Daemon("edge-agent", "run", AGENT_CONFIG),
    "coordinator": Daemon("edge-agent-coordinator", "coordinator", COORDINATOR_CONFIG),
}


class Installed(msgspec.Struct, frozen=True):
    """What was done, or would be."""

    unit: Path
    done: list[str]
    next: str
    """The command to go on with."""
    text: str
    """The unit's."""


class Steps:
    """Does one thing after the other and keeps what it was; in a rehearsal it does nothing."""

    def __init__(self, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self.done: list[str] = []

    def take(self, what: str, action: Any, *arguments: object) -> None:
        """Raises ServiceUnusable where this process may not, or cannot."""
        self.done.append(what)
        if self.rehearsal:
            return
        try:
            action(*arguments)
        except PermissionError as error:
            raise ServiceUnusable(f"{what}: {error.strerror}; run it as root, such as with sudo") from None
        except OSError as error:
            raise ServiceUnusable(f"{what}: {error}") from None
        except subprocess.CalledProcessError as error:
            raise ServiceUnusable(f"{what}: {_said(error.stderr) or error}") from None


def install(kind: Kind, config_file: Path | None, user: str | None, unit_directory: Path, rehearsal: bool = False) -> Installed:
    """Write the unit of a daemon, and make what it needs. Doing it again changes nothing, or what has changed in the configuration.

    Raises ServiceUnusable, and ConfigInvalid for a configuration that the daemon would not start with.
    """
    daemon = DAEMONS[kind]
    file = Path(os.path.abspath(config_file or daemon.config_file))  # noqa: PTH100 - links stay, `..` goes
    config, user = _read(kind, file), user or daemon.name
    steps, unit = Steps(rehearsal), unit_directory / f"{daemon.name}.service"
    before = _read_own(unit)
    _make_user(user, STATES / daemon.name, steps)
    _make_state(config.state_directory, STATES / daemon.name, user, steps)
    _hand_over(config, file, user, steps)
    if _exists(user) and (not rehearsal or os.geteuid() == 0):
        _check_as(user, kind, file, STATES / daemon.name)
    text = _stamped(render(kind, file, config, user))
    if before != text:
        steps.take(f"{'wrote' if before is None else 'replaced'} {unit}", write_file, unit, text.encode())
        _reload(unit_directory, steps)
    if not steps.done:
        steps.done.append(f"{unit} is as it should be")
    verb = "enable --now" if before in (None, text) else "restart"
    return Installed(unit, steps.done, f"systemctl {verb} {daemon.name}", text)


def check_user(user: str) -> None:
    """Raise ServiceUnusable for what should be no user of a service."""
    if re.search(USER_PATTERN, user) is None or user == "root":
        raise ServiceUnusable(f"{user!r} can be no user of a service; give --user an ordinary one, or leave it out")


def remove(kind: Kind, unit_directory: Path, rehearsal: bool = False) -> Installed:
    """Stop and remove the service of a daemon; its user, configuration and state stay. Raises ServiceUnusable."""
    daemon, steps = DAEMONS[kind], Steps(rehearsal)
    unit, state = unit_directory / f"{daemon.name}.service", STATES / daemon.name
    text = _read_own(unit)
    if text is None:
        raise ServiceUnusable(f"there is no {unit}; nothing was removed")
    if _is_running(unit_directory):
        steps.take(f"stopped {daemon.name}", _run, "systemctl", "disable", "--now", unit.name)
    steps.take(f"removed {unit}", unit.unlink)
    _reload(unit_directory, steps)
    for kept in (unit.with_suffix(".service.d"), state):
        if kept.exists():
            steps.done.append(f"kept {kept}")
    return Installed(unit, steps.done, f"userdel {daemon.name}; rm -r {state}, if nothing there is needed any more", text)


# the unit


def render(kind: Kind, config_file: Path, config: Config, user: str) -> str:
    """Return the text of a unit: the one that ships, with what is this machine's own."""
    daemon, package = DAEMONS[kind], Path(__file__).parent
    state = config.state_directory
    models = [*filter(None, [config.models_directory]), *config.models.values()] if isinstance(config, AgentConfig) else []
    needed = [Path(sys.prefix), Path(sys.base_prefix), package, config_file, *_paths(config)]
    settings = {
        "RequiresMountsFor": " ".join(_quoted(str(path)) for path in dict.fromkeys([state, *models])),
        "User": user,
        "ExecStart": _command_line(sys.executable, "-m", "edge_agent", daemon.command, "--config", str(config_file)),
        "ReadWritePaths": "" if _within(state, STATES / daemon.name) else _quoted(str(state)),
        "ProtectHome": "read-only" if any(_within(path, home) for path in needed for home in HOMES) else "yes",
        "PrivateTmp": "no" if any(_within(path, place) for path in needed for place in TEMPORARY) else "yes",
    }
    if kind == "agent":
        settings["SupplementaryGroups"] = " ".join(filter(_has_group, GPU_GROUPS))
    if isinstance(config, CoordinatorConfig) and any(t and t.port < PRIVILEGED_PORTS for t in (config.api, config.https)):
        settings |= {"CapabilityBoundingSet": "CAP_NET_BIND_SERVICE", "AmbientCapabilities": "CAP_NET_BIND_SERVICE", "PrivateUsers": "no"}
    text = (files("edge_agent") / "systemd" / f"{daemon.name}.service").read_text(encoding="utf-8")
    for name, value in settings.items():
        line = f"{name}={value}".replace("\\", r"\\")
        text, count = re.subn(rf"^{name}=.*$", line, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the unit {daemon.name} has {name} {count} times")
    return text


def _quoted(word: str) -> str:
    """Return a word as it stands in a unit, whatever is in it: systemd.syntax(7), and specifiers."""
    if not word.isprintable():
        raise ServiceUnusable(f"{word!r} cannot stand in a unit; give it another name")
    plain = word.replace("%", "%%")
    return plain if re.fullmatch(r"[\w@%+=:,./$-]+", plain) else '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _command_line(*words: str) -> str:
    """Likewise for a command, in which systemd also replaces variables."""
    return " ".join(_quoted(word.replace("$", "$$")) for word in words)


def _stamped(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _read_own(unit: Path) -> str | None:
    """Return the text of a unit that was written here; None where there is none. Raises ServiceUnusable where somebody has edited it."""
    try:
        text = unit.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceUnusable(f"{unit} cannot be read: {error}") from None
    if text != _stamped(text.partition("\n")[2]):
        raise ServiceUnusable(
            f"{unit} was not written by this command, or was edited since; move what is your own into a drop-in "
            f"(`systemctl edit {unit.stem}`), remove the file, and run this again"
        )
    return text


def _within(path: Path, place: Path) -> bool:
    return any(candidate.is_relative_to(place) for candidate in (path, path.resolve()))


def _reload(unit_directory: Path, steps: Steps) -> None:
    if _is_running(unit_directory):
        steps.take("told systemd to read its units", _run, "systemctl", "daemon-reload")


def _is_running(unit_directory: Path) -> bool:
    """Whether systemd runs here and reads that directory."""
    return unit_directory == UNIT_DIRECTORY and Path("/run/systemd/system").is_dir()


# its user, and what is to be its own


def _make_user(user: str, home: Path, steps: Steps) -> None:
    if _exists(user):
        return
    program = shutil.which("useradd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    if program is None:
        raise ServiceUnusable(f"there is no user {user}, and no useradd to make it; make it, or name another with --user")
    about = ("--system", "--user-group", "--no-create-home", "--home-dir", str(home), "--shell", "/usr/sbin/nologin")
    steps.take(f"made the user {user}", _run, program, *about, user)


def _make_state(state: Path, usual: Path, user: str, steps: Steps) -> None:
    """Make a state directory that systemd does not make."""
    if _within(state, usual):
        return
    if not state.exists():
        steps.take(f"made {state}", state.mkdir, 0o700, True)
        steps.take(f"gave {state} to {user}", _chown, state, user)
    elif not _exists(user) or state.stat().st_uid != pwd.getpwnam(user).pw_uid:
        if not state.is_dir() or any(state.iterdir()):
            problem = f"{state} is not {user}'s and not empty; run `chown -R {user}: {state}`, or name its owner with --user"
            if not steps.rehearsal:
                raise ServiceUnusable(problem)
            steps.done.append(f"ended here: {problem}")
            return
        steps.take(f"gave {state} to {user}", _chown, state, user)


def _hand_over(config: Config, config_file: Path, user: str, steps: Steps) -> None:
    """Give the user what is root's and closed to it, below the directory of the configuration: secrets and directories of theirs. It
    may also read the configuration. What lies elsewhere may be another service's; the check that follows says whether it can be read.
    """
    place = config_file.parent.resolve()
    own: dict[Path, None] = {}
    for secret in filter(lambda path: path.resolve().is_relative_to(place), _secrets(config)):
        between = [parent for parent in secret.resolve().parents if parent != place and parent.is_relative_to(place)]
        own |= dict.fromkeys(path for path in [*reversed(between), secret.resolve()] if _is_closed(path, path.is_dir()))
    for path in own:
        steps.take(f"gave {path} to {user}", _give, path, user)
    if _is_closed(config_file, others_count=True):
        steps.take(f"let {user} read {config_file}", _let_read, config_file, user)


def _is_closed(path: Path, others_count: bool) -> bool:
    """Whether a file is root's and nobody else may read it. Of secrets nobody else ever may; they change hands if they are root's."""
    try:
        state = path.stat()
    except OSError:
        return False  # the check that follows says so
    return state.st_uid == 0 and not (others_count and state.st_mode & stat.S_IROTH)


def _chown(path: Path, user: str) -> None:
    shutil.chown(path, user, pwd.getpwnam(user).pw_gid)


def _give(path: Path, user: str) -> None:
    """Change the owner of a file or directory that is at this path, and not where somebody has a link lead meanwhile."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        state = os.fstat(opened)
        if Path(f"/proc/self/fd/{opened}").readlink() != path or (stat.S_ISREG(state.st_mode) and state.st_nlink != 1):
            raise OSError(f"{path} is a link to another file")
        os.fchown(opened, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    finally:
        os.close(opened)


def _let_read(path: Path, user: str) -> None:
    shutil.chown(path, group=pwd.getpwnam(user).pw_gid)
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRGRP)


def _paths(value: object) -> Iterator[Path]:
    """Yield all files and directories that a configuration names."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _paths(one)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _paths(getattr(value, name))


def _secrets(value: object) -> Iterator[Path]:
    """Yield the files of a configuration that only their owner may read."""
    if isinstance(value, dict):
        for one in value.values():
            yield from _secrets(one)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            found = getattr(value, name)
            if name == "option_files":
                yield from found.values()
            elif name.endswith(SECRETS) and found is not None:
                yield found
            else:
                yield from _secrets(found)


def _exists(user: str) -> bool:
    with suppress(KeyError):
        pwd.getpwnam(user)
        return True
    return False


def _has_group(name: str) -> bool:
    with suppress(KeyError):
        grp.getgrnam(name)
        return True
    return False


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=CHECK_S)  # noqa: S603


def _said(output: bytes) -> str:
    return output.decode(errors="replace").strip().rpartition("\n")[2][-400:]


# what the user could not read


def _check_as(user: str, kind: Kind, config_file: Path, home: Path) -> None:
    """Have a process of the user read what the daemon will. Raises ServiceUnusable with what it cannot."""
    entry = pwd.getpwnam(user)
    who: dict[str, Any] = {}
    if entry.pw_uid != os.geteuid():
        groups = os.getgrouplist(user, entry.pw_gid) + [grp.getgrnam(name).gr_gid for name in GPU_GROUPS if _has_group(name)]
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
    command = [sys.executable, "-m", "edge_agent.install", kind, str(config_file)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, timeout=CHECK_S, check=False, cwd="/", env=os.environ | {"HOME": str(home)}, **who
        )
    except PermissionError:
        raise ServiceUnusable(
            f"user {user} cannot run {sys.executable}; install edge-agent where everyone may read it, such as in /opt/edge-agent"
            if os.geteuid() == 0 else f"only root can install a service of user {user}; run it with sudo, or give --user"
        ) from None  # fmt: skip
    if done.returncode:
        raise ServiceUnusable(f"as user {user}: {_said(done.stderr) or f'the check ends with {done.returncode}'}")


def _read(kind: Kind, config_file: Path) -> Config:
    return read_config(config_file, AgentConfig) if kind == "agent" else read_config(config_file, CoordinatorConfig)


def check(config: Config) -> None:
    """Read what a daemon reads when it starts. Raises an EdgeAgentError where it would not start."""
    from edge_agent.tls import client_context, server_context

    if config.broker.tls is not None:
        client_context(config.broker.tls, "broker.tls")
    _ = config.broker.password, config.broker.proxy and config.broker.proxy.login
    if isinstance(config, AgentConfig):
        from edge_agent.agent import check_files

        check_files(config)
        return
    from edge_agent.signing import read_private_key

    if config.signing_key_file is not None:
        read_private_key(config.signing_key_file)
    _ = config.database and config.database.password, config.files and config.files.secrets
    if config.https is not None:
        server_context(config.https.certificate_file, config.https.key_file, config.https.ca_file, "https")
    if config.api is not None and config.api.certificate_file is not None and config.api.key_file is not None:
        server_context(config.api.certificate_file, config.api.key_file, None, "api")


def main(arguments: Sequence[str]) -> int:
    kind: Kind = "agent" if arguments[0] == "agent" else "coordinator"
    try:
        check(_read(kind, Path(arguments[1])))
    except EdgeAgentError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
