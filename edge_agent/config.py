"""Configuration files of the agent and the coordinator: TOML, strict. Documented field by field in docs/config.md."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from msgspec import Meta

from edge_agent.errors import ConfigInvalid, JobSchema, PackageMissing
from edge_agent.hints import explain
from edge_agent.job import Alias, Positive, Strict
from edge_agent.sizes import parse_size
from edge_agent.topics import COORDINATOR

NAME_PATTERN = r"^[a-z0-9-]{1,64}\Z"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
ModelName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
Labels = Annotated[dict[Name, Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=16)]
"""What an operator says of a node, such as where it is: names and short texts."""
AGENT_CONFIG = Path("/etc/edge-agent/agent.toml")
COORDINATOR_CONFIG = Path("/etc/edge-agent/coordinator.toml")
Seconds = Annotated[float, Meta(gt=0)]
Price = Annotated[float, Meta(ge=0, le=1e9)]
URL_VARIABLE, TOKEN_VARIABLE, AUTHORITY_VARIABLE = "EDGE_AGENT_URL", "EDGE_AGENT_TOKEN_FILE", "EDGE_AGENT_CA_FILE"
"""Name the environment's variables by which the commands of a fleet find a coordinator elsewhere."""
JUDGES_VARIABLE = "EDGE_AGENT_JUDGES"
"""Names the environment's variable in which an agent gives its trainer the endpoint of a job; the key stays in its file."""
RAN_VARIABLE = "EDGE_AGENT_RAN_S"
"""Names the variable in which an agent tells its trainer how many seconds earlier starts of the job have run."""
CACHE_VARIABLE, CACHE_LIMIT_VARIABLE = "EDGE_AGENT_CACHE", "EDGE_AGENT_CACHE_LIMIT"
"""Name the environment's variables for the directory and the size of the cache of quantised models; an agent sets them for its trainer."""


class Size(int):
    """Bytes, written like `6GiB`."""


class Limit(Size):
    """Bytes, or 0 for nothing at all."""


CACHE_LIMIT = Limit(16 * 2**30)


class Tls(Strict, frozen=True):
    """An encrypted connection. Without this table the connection is plain: loopback and private networks only."""

    ca_file: Path | None = None
    """Certificates that may sign the server's; null: those of the system."""
    certificate_file: Path | None = None
    """Own certificate, for servers that ask for one."""
    key_file: Path | None = None
    """Its key; only its owner may read it."""

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("`certificate_file` and `key_file` come together")


class Proxy(Strict, frozen=True, kw_only=True):
    """The way out of a network that lets nothing out by itself."""

    url: Annotated[str, Meta(pattern=r"^[a-z0-9]+://[^/?#@\s]+:[0-9]{1,5}\Z", max_length=300)]
    """Scheme, host and port: `http://proxy.example.org:3128` (HTTP CONNECT) or `socks5://proxy.example.org:1080`."""
    username: Annotated[str, Meta(pattern=r"^[ -9;-~]{1,255}\Z")] | None = None
    password_file: Path | None = None
    """Holds the password alone; only its owner may read it."""

    def __post_init__(self) -> None:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("`username` and `password_file` of a proxy come together")
        url = urlsplit(self.url)
        _ = url.port  # ValueError for what is none
        if url.scheme not in ("http", "socks5"):
            raise ValueError(f"`url` of a proxy {self.url!r} begins with neither `http:` nor `socks5:`")

    @property
    def login(self) -> tuple[str, str] | None:
        """User name and password, this read from its file. Raises ConfigInvalid where that is missing, open to others, or holds none."""
        if self.username is None or self.password_file is None:
            return None
        return self.username, read_key(self.password_file, "password_file of a proxy")


class Broker(Strict, frozen=True):
    """Where the MQTT broker is and how to log in."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    """MQTT version; `auto` tries 5, then 3.1.1."""
    username: str | None = None
    password_file: Path | None = None
    """Holds the password alone; only its owner may read it."""
    packet_limit: Size = Size(128 * 1024)
    """Largest packet that the broker takes, where it does not say so itself."""
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30
    tls: Tls | None = None
    websocket_path: Annotated[str, Meta(pattern="^/[!-~]{0,254}\\Z")] | None = None
    """Where MQTT is spoken within a WebSocket."""
    proxy: Proxy | None = None
    """null: straight to the broker."""

    @property
    def password(self) -> str | None:
        """Read from its file. Raises ConfigInvalid where that is missing or others can read it."""
        return None if self.password_file is None else _read_secret(self.password_file, "broker.password_file")


class Timers(Strict, frozen=True):
    """Limits in seconds, kept by the agent also while it is offline."""

    queue_s: Seconds = 7 * 24 * 3600.0
    """From arrival to the start of the trainer."""
    staging_s: Seconds = 24 * 3600.0
    """From arrival until all files are there."""
    stall_s: Seconds = 1800.0
    """Without any sign of the trainer."""
    cooling_s: Seconds = 24 * 3600.0
    """That a job's trainer waits for the device to cool, all its waits together."""
    finalizing_s: Seconds = 24 * 3600.0
    """From the end of a job's trainer until what it made is kept."""
    stop_s: Seconds = 10.0
    """From the request to stop until the trainer is killed."""


DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY, _TIME = f"({'|'.join(DAYS)})", "([01][0-9]|2[0-3]):[0-5][0-9]"
_HOURS = re.compile(f"({_DAY}(-{_DAY})? )?{_TIME}-{_TIME}")
_DEVICE = re.compile("auto|cpu|cuda|GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SECRET = re.compile("^key$|^sas$|secret|passw|passphrase|token|credential|access_key|account_key|connection_string")
"""Names of options of file systems whose values are not for a configuration file."""


class RestLimits(Strict, frozen=True):
    """When no trainer works: in quiet hours one that does writes a checkpoint and ends, above the temperature it waits in place."""

    quiet_hours: tuple[str, ...] = ()
    """Such as `22:00-06:00` or `mon-fri 08:00-18:00`, in local time; days are those on which the hours begin."""
    max_temperature_c: Annotated[float, Meta(gt=0, le=150)] | None = None
    """Of the device; null: whatever it has. It protects itself, by clocks that it lowers."""
    cool_by_c: Annotated[float, Meta(ge=0, le=100)] = 10.0
    """Degrees below the limit at which a job goes on."""

    def __post_init__(self) -> None:
        for hours in self.quiet_hours:
            if _HOURS.fullmatch(hours) is None:
                raise ValueError(f"`quiet_hours` {hours!r} are not like `22:00-06:00` or `mon-fri 08:00-18:00`")


class Endpoint(Strict, frozen=True, kw_only=True):
    """An OpenAI-compatible server that writes judgments, and what it may cost."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?\Z", max_length=2048)]
    """Base of its API, such as `https://api.openai.com/v1`; a trainer's environment has it, so no key stands in it."""
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    input_price: Price
    """Of a million input tokens."""
    output_price: Price
    """Of a million output tokens."""
    spending_cap: Price
    """What a job may spend at most, in the currency of the prices."""
    key_file: Path | None = None
    """Holds the key alone; only its owner may read it."""
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 60.0
    """Without a byte from the server; then the request is tried again."""
    max_tokens: Annotated[int, Meta(ge=1, le=100_000)] = 200
    """Output tokens of one judgment at most."""
    reasoning: bool = False
    """A reasoning model: it takes `max_completion_tokens`, and no temperature."""
    parallel: Annotated[int, Meta(ge=1, le=64)] = 4
    """Requests at once."""

    def __post_init__(self) -> None:
        _ = urlsplit(self.url).port  # ValueError for what is none

    @property
    def key(self) -> str | None:
        """Read from its file. Raises ConfigInvalid where that is missing, open to others, or holds no key."""
        return None if self.key_file is None else read_key(self.key_file, "key_file of a judge")

    def check(self) -> None:
        """Raise ConfigInvalid or PackageMissing where it cannot be used."""
        _ = self.key
        if find_spec("openai") is None:
            raise PackageMissing("openai", "judge")


class FileServer(Strict, frozen=True, kw_only=True):
    """An HTTPS server that has files by their sha256, and how it knows this node."""

    url: Annotated[str, Meta(pattern=r"^https://[^/?#@\s]+(/[^?#\s]*)?\Z", max_length=2048)]
    """Base of its addresses: a file is at `URL/sha256/HEX`."""
    tls: Tls = Tls()
    token_file: Path | None = None
    """Holds a bearer token alone; only its owner may read it."""
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 10.0
    """Without a byte from the server; then the file goes another way."""
    proxy: Proxy | None = None
    """One of HTTP; null: straight to the server."""

    def __post_init__(self) -> None:
        _ = urlsplit(self.url).port  # ValueError for what is none
        if self.proxy is not None and not self.proxy.url.startswith("http:"):
            raise ValueError(f"the `proxy` of a file server is one of HTTP, not {self.proxy.url!r}")

    @property
    def token(self) -> str | None:
        """Read from its file. Raises ConfigInvalid where that is missing, open to others, or holds no token."""
        return None if self.token_file is None else read_key(self.token_file, "token_file of a file server")


class Https(Strict, frozen=True, kw_only=True):
    """Where a coordinator gives files to nodes, and takes them, by HTTPS. A node is known by its certificate."""

    certificate_file: Path
    """Of this server, for the host that the nodes' configurations name."""
    key_file: Path
    """Its key; only its owner may read it."""
    ca_file: Path
    """The authority that has signed the nodes' certificates."""
    host: Annotated[str, Meta(min_length=1, max_length=255)] = "0.0.0.0"  # noqa: S104
    port: Annotated[int, Meta(ge=1, le=65535)] = 8443
    denied: tuple[Name, ...] = ()
    """Nodes that get and bring nothing, whatever certificate they have."""


class Api(Strict, frozen=True, kw_only=True):
    """Where a coordinator answers requests over the network. Who asks is known by a token."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8470
    certificate_file: Path | None = None
    """Of this server, for the host that its users name. null: plain HTTP, on loopback only."""
    key_file: Path | None = None
    """Its key; only its owner may read it."""
    token_limit: Positive = 600
    """Requests a minute that a token may make."""
    address_limit: Positive = 1200
    """Requests a minute that may come from an address, with whatever tokens."""

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("`certificate_file` and `key_file` come together")
        if self.certificate_file is None and not is_loopback(self.host):
            raise ValueError(f"without `certificate_file` and `key_file` the `host` of `api` is on loopback, not {self.host!r}")


class Database(Strict, frozen=True, kw_only=True):
    """A PostgreSQL server that has a coordinator's state."""

    url: Annotated[str, Meta(pattern=r"^postgresql\+psycopg://[!-~]*\Z", max_length=2048)]
    """Such as `postgresql+psycopg://edge-agent@db.example.org/edge_agent?sslmode=verify-full`, without a password."""
    password_file: Path | None = None
    """Holds the password alone; only its owner may read it."""

    def __post_init__(self) -> None:
        url = urlsplit(self.url)
        query = dict(parse_qsl(url.query))
        if url.password is not None or any(name.endswith("password") for name in query):
            raise ValueError("the password of a `database` stands in its `password_file`, not in its `url`")
        host = query.get("hostaddr") or query.get("host") or unquote(url.hostname or "")
        here = not host or host.startswith("/") or is_loopback(host)
        if "sslmode" not in query and (not here or "," in url.netloc):
            raise ValueError("the `url` of a `database` elsewhere says `?sslmode=verify-full`, or `disable` in a network of your own")

    @property
    def where(self) -> str:
        """What may be said of it."""
        return self.url.partition("?")[0]

    @property
    def address(self) -> str:
        """The URL as PostgreSQL's own library reads it."""
        return self.url.replace("+psycopg", "", 1)

    @property
    def password(self) -> str | None:
        """Read from its file. Raises ConfigInvalid where that is missing or others can read it."""
        return None if self.password_file is None else _read_secret(self.password_file, "database.password_file")


Option = bool | int | float | str


class Files(Strict, frozen=True, kw_only=True):
    """An object store, or any other place that fsspec knows, which has a coordinator's files."""

    url: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9+.-]*://[!-~]+\Z", max_length=2048)]
    """Such as `s3://BUCKET/PREFIX`. Nothing else may be written there."""
    options: dict[str, Option | dict[str, Option]] = msgspec.field(default_factory=dict)
    """What fsspec's file system of that kind takes, such as `endpoint_url`; no secrets."""
    option_files: dict[str, Path] = msgspec.field(default_factory=dict)
    """Options of which each stands in a file of its own, that only its owner may read."""
    cache_limit: Size = Size(4 * 2**30)
    """Copies kept in the state directory, the least recently used go first."""

    def __post_init__(self) -> None:
        if "::" in self.url or urlsplit(self.url).password is not None:
            raise ValueError("the `url` of `files` names one place, and no password: that stands in a file of `option_files`")
        names = {*self.options, *(name for value in self.options.values() if isinstance(value, dict) for name in value)}
        if secret := sorted(filter(_SECRET.search, names)):
            raise ValueError(f"the option `{secret[0]}` of `files` stands in a file that `option_files` names, not here")
        if both := sorted(self.options.keys() & self.option_files):
            raise ValueError(f"`{both[0]}` is in both `options` and `option_files` of `files`")

    @property
    def where(self) -> str:
        """What may be said of it."""
        return self.url.partition("?")[0]

    @property
    def secrets(self) -> dict[str, str]:
        """Read from their files. Raises ConfigInvalid where one is missing, open to others, or no line of ASCII."""
        return {name: read_key(path, f"files.option_files.{name}") for name, path in self.option_files.items()}


class Trust(Strict, frozen=True):
    """Who may give this node orders: to take, stop and delete jobs, to take no more, to keep messages no longer."""

    keys_file: Path
    """Public keys as in OpenSSH's `authorized_keys`, Ed25519 only; read anew with every order."""
    required: bool = True
    """Reject orders that nobody has signed. With false only those are rejected that somebody else has signed."""


class AgentConfig(Strict, frozen=True):
    """`agent.toml`."""

    node: Name
    state_directory: Path
    budget: Size
    """Memory that a job may take at most, such as `6GiB`."""
    models: dict[ModelName, Path] = msgspec.field(default_factory=dict)
    """Models that jobs may use besides those that were added: their names in jobs, and their directories here."""
    fleet: Name = "default"
    labels: Labels = msgspec.field(default_factory=dict)
    """What selectors of jobs and rollouts may ask for."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or one of several GPUs by its UUID: each has an agent of its own."""
    judges: dict[Alias, Endpoint] = msgspec.field(default_factory=dict)
    """Endpoints that jobs may ask for judgments, by the aliases that jobs know."""
    file_servers: dict[Alias, FileServer] = msgspec.field(default_factory=dict)
    """Where files are fetched by HTTPS and results brought to, the first that works, before they travel in blocks over the broker."""
    broker: Broker = Broker()
    trust: Trust | None = None
    """null: whoever the broker lets publish to this node's topics may give it orders."""
    home_assistant: Name | None = None
    """The prefix under which Home Assistant discovers devices, which is `homeassistant` there; null: it is told nothing."""
    timers: Timers = Timers()
    rest: RestLimits = RestLimits()
    queue: Positive = 16
    """Jobs that may wait."""
    dataset_limit: Size = Size(256 * 2**20)
    """Largest file of a job."""
    store_limit: Size = Size(4 * 2**30)
    """Files kept for jobs that have ended, the least recently used go first."""
    models_directory: Path | None = None
    """Where `edge-agent models add` puts models, which jobs may then use; null: `models` in the state directory."""
    models_limit: Size = Size(64 * 2**30)
    """Of all models that were added, together."""
    cache_limit: Limit = CACHE_LIMIT
    """Quantised models kept for the next job with the same model, the least recently used go first; 0 keeps none."""
    retention_s: Annotated[float, Meta(ge=0)] = 7 * 24 * 3600.0
    """Seconds from the acknowledgement of a job's end to the deletion of all that it left here; `inf` keeps it until `forget`."""
    max_attempts: Positive = 5
    """Starts of a trainer that dies without a result; then the job has failed as `crash_loop`."""
    threads: Positive | None = None
    """Processor threads of a trainer; null: as many as cores."""

    def __post_init__(self) -> None:
        if self.node == COORDINATOR:
            raise ValueError(f"`node` may not be {COORDINATOR!r}")
        if _DEVICE.fullmatch(self.device) is None:
            raise ValueError(f"`device` {self.device!r} is none of `auto`, `cpu`, `cuda`, and no UUID of a GPU as `nvidia-smi -L` says it")

    @property
    def job_device(self) -> Literal["auto", "cpu", "cuda"]:
        """The device as jobs name it."""
        kinds: dict[str, Literal["auto", "cpu"]] = {"auto": "auto", "cpu": "cpu"}
        return kinds.get(self.device, "cuda")

    @property
    def cache_directory(self) -> Path:
        """Where trainers keep quantised models and temporary files."""
        return self.state_directory / "cache"


class CoordinatorConfig(Strict, frozen=True):
    """`coordinator.toml`."""

    state_directory: Path
    fleet: Name = "default"
    instance: Name = "main"
    shared: bool = False
    """Whether other coordinators, each with an `instance` of its own, share the work: with the same fleet, database and files."""
    broker: Broker = Broker()
    database: Database | None = None
    """null: the state is in an SQLite file in the state directory."""
    files: Files | None = None
    """null: files are in the state directory alone."""
    https: Https | None = None
    """null: files travel over the broker alone."""
    api: Api | None = None
    """null: requests are answered on the socket in the state directory alone."""
    artifact_limit: Size = Size(4 * 2**30)
    """Largest file that is fetched from a node."""
    datasets_limit: Size = Size(64 * 2**30)
    """Of all datasets that are uploaded, together."""
    lease_s: Annotated[float, Meta(ge=300)] = 24 * 3600.0
    """How long a node may be silent until the jobs that it has taken are shown as lost, and a cancel ends them at once."""
    signing_key_file: Path | None = None
    """Private Ed25519 key in OpenSSH's format that signs all orders; only its owner may read it."""

    def __post_init__(self) -> None:
        if self.shared and (self.database is None or self.files is None):
            raise ValueError("coordinators that are `shared` have a `database` and `files` in common; give both tables")


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can be at the other end."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


C = TypeVar("C", AgentConfig, CoordinatorConfig)


def read_config(path: Path, kind: type[C]) -> C:
    """Read a configuration file strictly. Relative paths in it count from its directory. Raises ConfigInvalid."""
    try:
        given = msgspec.toml.decode(path.read_bytes())
        return msgspec.convert(given, type=kind, dec_hook=partial(_read_value, path.resolve().parent))
    except OSError as error:
        raise ConfigInvalid(path, error.strerror or type(error).__name__) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigInvalid(path, explain(error, kind)) from None


def _read_value(base: Path, kind: type, value: object) -> object:
    """Read what TOML has no type for."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"Expected `{kind.__name__.lower()}`, got {value!r}")
    try:
        read: Path | Size = base / Path(value).expanduser() if kind is Path else kind(parse_size(value))
    except (JobSchema, RuntimeError):
        raise ValueError(f"{value!r} is no {kind.__name__.lower()}") from None
    if isinstance(read, Size) and read < (kind is not Limit):
        raise ValueError(f"{value!r} is no size above 0")
    return read


def write_judges(judges: Mapping[str, Endpoint]) -> str:
    """Return endpoints as the text of `JUDGES_VARIABLE`."""
    return msgspec.json.encode(judges, enc_hook=str).decode()


def read_judges(text: str) -> dict[str, Endpoint]:
    """Return the endpoints that an agent has written."""
    return msgspec.json.decode(text, type=dict[str, Endpoint], dec_hook=lambda kind, value: kind(value))


def read_key(path: Path, field: str) -> str:
    """Read what stands in a header of requests. Raises ConfigInvalid where it is missing, open to others, or no line of ASCII."""
    key = _read_secret(path, field)
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigInvalid(path, f"{field}: it must hold one line of ASCII")
    return key


def _read_secret(path: Path, field: str) -> str:
    check_private(path, field)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(path, f"{field}: {error}") from None


def check_private(path: Path, field: str) -> None:
    """Raise ConfigInvalid where a secret is missing, or open to other users."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigInvalid(path, f"{field}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigInvalid(path, f"{field}: others can read it; run `chmod 600 {path}`")
    if not os.access(path, os.R_OK):
        raise ConfigInvalid(path, f"{field}: it cannot be read")
