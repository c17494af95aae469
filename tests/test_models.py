"""Models that are added to a node: from a directory, a server and a hub, whole or not at all, as they were or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Cli
from fleet import wait_for
from hub_server import COMMIT, HubServer
from huggingface_hub import constants, hf_hub_download
from msgspec.structs import replace
from orders import NODE, make_order
from tls_server import TlsServer

from edge_agent import model_adding, model_mirror
from edge_agent.config import AgentConfig, FileServer, Limit, Size, Tls
from edge_agent.errors import (
    DiskFull,
    EdgeAgentError,
    ModelConflict,
    ModelCorrupt,
    ModelMissing,
    ModelNeeded,
    ModelsFull,
    ModelSource,
    ModelUnknown,
    ModelUnsafe,
    ModelUnsupported,
    StateUnusable,
)
from edge_agent.files import lock_file
from edge_agent.job import Dataset, Job
from edge_agent.messages import JobResult
from edge_agent.model_adding import Added, add
from edge_agent.models import INCOMING, RECORD, Source, installed, list_models, offered, read_record, remove, verify, working_in
from edge_agent.signing import seal
from edge_agent.store import Store
from quantization.model_files import find_model

HUB_ID = "lab/Tiny-1B"
WEIGHTS = "model.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig(NODE, tmp_path / "node", Size(2**30), device="cpu")


def _add(config: AgentConfig, source: object, name: str | None = "tiny", revision: str | None = None, quantise: bool = False) -> Added:
    return add(config, str(source), name, revision, quantise, lambda *_: lambda _: None)


def _left(config: AgentConfig) -> list[str]:
    """What is in the node's directory of models beside the lock."""
    home = config.state_directory / "models"
    return sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and p.name != ".lock") if home.exists() else []


def _same(path: Path, model: Path = TINY) -> bool:
    """Whether all files of a model are there, and nothing else but its record."""
    files = {file.name for file in path.iterdir()} - {RECORD}
    wanted = {file.name for file in model.iterdir()} - {"README.md"}
    return files == wanted and all((path / name).read_bytes() == (model / name).read_bytes() for name in files)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be changed."""
    return shutil.copytree(TINY, tmp_path / "copy")


def _split(model: Path) -> Path:
    """Have the weights of a model in two files with an index, each tensor's bytes as they were."""
    data = (model / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
    names, where = sorted(header), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file, own, body = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in part:
            start, stop = header[name]["data_offsets"]
            own[name] = header[name] | {"data_offsets": [len(body), len(body) + stop - start]}
            body += data[end + start : end + stop]
            where[name] = file
        text = json.dumps(own).encode()
        (model / file).write_bytes(len(text).to_bytes(8, "little") + text + body)
    (model / WEIGHTS).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


# a directory, and what can be done with a model


def test_model_of_a_directory_is_offered_as_it_is(config: AgentConfig) -> None:
    """Every file that belongs to it, a record with the digest of each, and nothing else; jobs may use it, beside those of the file."""
    added = _add(config, TINY)
    path = config.state_directory / "models" / "tiny"
    assert (added.path, added.was_there, added.quantised) == (str(path), False, False)
    assert offered(replace(config, models={"other": TINY})) == {"tiny": path, "other": TINY}
    assert _same(path)
    record = read_record(path)
    assert {name: file.sha256 for name, file in record.files.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in TINY.iterdir() if file.name != "README.md"
    }
    assert record.fingerprint == find_model(str(TINY)).fingerprint == find_model(str(path)).fingerprint
    assert verify(config, "tiny").problems == []
    [view] = list_models(config)
    assert (view.offered, view.architecture, view.source) == (True, "LlamaForCausalLM", Source("directory", str(TINY)))
    assert view.parameters == sum(tensor.elements for tensor in find_model(str(TINY)).tensors)
    assert view.size_bytes == added.size_bytes == sum(file.size_bytes for file in record.files.values())


def test_name_is_for_one_model(config: AgentConfig, model: Path) -> None:
    """The same source again changes nothing; another one under that name is refused, and one that the configuration has, and no name."""
    _add(config, TINY)
    before = (config.state_directory / "models" / "tiny" / RECORD).read_bytes()
    assert _add(config, TINY).was_there
    assert (config.state_directory / "models" / "tiny" / RECORD).read_bytes() == before
    with pytest.raises(ModelConflict, match="another model 'tiny'"):
        _add(config, model)
    with pytest.raises(ModelConflict, match=r"\[models\]"):
        _add(replace(config, models={"mine": TINY}), model, "mine")
    for name in ("Tiny", "a/b", "..", "x" * 65, "ü"):
        with pytest.raises(ModelConflict, match="can be no model's name"):
            _add(config, model, name)
    assert [*installed(config)] == ["tiny"]


def test_removed_model_leaves_nothing(config: AgentConfig) -> None:
    """Its files go, and nobody is offered it; a name that is unknown, or of the configuration, is an error."""
    added = _add(config, TINY)
    assert remove(config, "tiny") >= added.size_bytes
    assert (_left(config), offered(config)) == ([], {})
    with pytest.raises(ModelUnknown, match="'tiny'"):
        remove(config, "tiny")
    with pytest.raises(ModelConflict, match=r"\[models\]"):
        remove(replace(config, models={"tiny": TINY}), "tiny")


@pytest.mark.parametrize("agent", ["runs", "has ended"])
def test_model_that_a_job_needs_stays(agent: str, config: AgentConfig) -> None:
    """Until the job has ended; one of another model does not hold it."""
    _add(config, TINY)
    config.state_directory.mkdir(exist_ok=True)
    store = Store(config.state_directory / "agent.sqlite", "default", NODE)
    orders = {name: make_order(Job(model=name, dataset=Dataset("0" * 64), budget_bytes=2**30), 10) for name in ("tiny", "other")}
    for order in orders.values():
        store.accept(order.id, order.job.digest, seal(order, None).payload, 4)
    if agent == "has ended":
        store.close()
    with pytest.raises(ModelNeeded, match=orders["tiny"].id):
        remove(config, "tiny")
    assert _same(installed(config)["tiny"])
    if agent == "has ended":
        store = Store(config.state_directory / "agent.sqlite", "default", NODE)
    store.end(orders["tiny"].id, JobResult(orders["tiny"].job.digest, "canceled", "canceled"))
    remove(config, "tiny")
    store.close()
    assert installed(config) == {}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: _flip(p / WEIGHTS), "model.safetensors has sha256"), (lambda p: _cut(p / WEIGHTS), "model.safetensors has 1,"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json cannot be read: No such file"),
        (lambda p: (p / "more.safetensors").write_bytes(b""), "more.safetensors was not there"),
    ],
)  # fmt: skip
def test_file_that_has_changed_is_found(damage: Callable[[Path], object], says: str, config: AgentConfig) -> None:
    """Each with its name; the others are not blamed."""
    _add(config, TINY)
    damage(installed(config)["tiny"])
    [problem] = verify(config, "tiny").problems
    assert problem.startswith(says)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _write(file: Path, more: bytes) -> None:
    file.write_bytes(file.read_bytes() + more)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _edit(model: Path, name: str, **changes: Any) -> None:
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))


def _index(model: Path, weight: str) -> None:
    """Have the index name a weight that is not there."""
    index = json.loads((_split(model) / "model.safetensors.index.json").read_text())
    index["weight_map"][weight] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), ModelUnsafe), (lambda m: (m / "config.json").unlink(), ModelMissing),
        (lambda m: _edit(m, "config.json", auto_map={"AutoModel": "code.Model"}), ModelUnsafe),
        (lambda m: _edit(m, "config.json", quantization_config={"quant_method": "gptq"}), ModelUnsupported),
        (lambda m: _edit(m, "config.json", hidden_size=None), ModelUnsupported), (lambda m: _cut(m / WEIGHTS), ModelUnsupported),
        (lambda m: _write(m / WEIGHTS, b"more"), ModelUnsupported), (lambda m: _index(m, "no.weight"), ModelUnsupported),
        (lambda m: (m / "adapter_config.json").write_text("{}"), ModelUnsupported),
    ],
)  # fmt: skip
def test_model_that_no_job_could_use_is_refused(
    change: Callable[[Path], object], error: type[EdgeAgentError], config: AgentConfig, model: Path
) -> None:  # fmt: skip
    """With what is wrong, and nothing of it stays."""
    change(model)
    with pytest.raises(error):
        _add(config, model)
    assert (_left(config), offered(config)) == ([], {})


def test_model_in_several_files_is_whole(config: AgentConfig, model: Path) -> None:
    """All files of its index; weights that no index names are left where they are."""
    (_split(model) / "consolidated.safetensors").write_bytes(b"not of it")
    path = Path(_add(config, model).path)
    assert (path / "model-00002-of-00002.safetensors").is_file()
    assert not (path / "consolidated.safetensors").exists()
    assert find_model(str(path)).tensors == find_model(str(model)).tensors


def test_model_over_the_limit_is_refused(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that are there together, and where it would leave too little of the disk; what is there stays."""
    small = replace(config, models_limit=Size(5 * 2**20))
    _add(small, TINY)
    with pytest.raises(ModelsFull, match=r"3 MiB.*3 MiB.*`models_limit` is 5 MiB"):
        _add(small, TINY, "second")
    monkeypatch.setattr(model_adding, "SPARE_DISK_BYTES", 2**60)
    with pytest.raises(DiskFull, match="are needed"):
        _add(config, TINY, "second")
    assert [*offered(config)] == ["tiny"]


def test_one_command_at_a_time(config: AgentConfig) -> None:
    """A second one is told so, and changes nothing."""
    with working_in(config), pytest.raises(StateUnusable, match="another `edge-agent models`"):
        _add(config, TINY)


def test_model_is_added_without_its_copy_in_4_bits_where_that_must_wait(config: AgentConfig) -> None:
    """Where there is no cache, where a trainer has the device, and where no job fits the node's budget; the command says why."""
    config.state_directory.mkdir()
    assert "`cache_limit` is 0" in str(_add(replace(config, cache_limit=Limit(0)), TINY, "without", quantise=True).note)
    assert "the budget is" in str(_add(replace(config, budget=Size(2**20)), TINY, "large", quantise=True).note)
    lock = lock_file(config.state_directory / "trainer.lock")
    assert lock is not None
    with lock:
        assert "a job has the device now" in str(_add(config, TINY, "busy", quantise=True).note)
    assert [view.quantised_bytes for view in list_models(config) if view.offered] == [0, 0, 0]


# an HTTPS server


class Mirror(TlsServer):
    """Has the files of a model below /files/tiny, and `SHA256SUMS` where it is asked to."""

    def __init__(self, directory: Path, model: Path, sums: bool) -> None:
        super().__init__(directory, b"")
        self.files = {file.name: file.read_bytes() for file in model.iterdir()}
        if sums:
            lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in self.files.items())
            self.files["SHA256SUMS"] = "".join(lines).encode()
        self.address = f"{self.url}/tiny"

    def contents(self, path: str) -> bytes | None:
        return self.files.get(path.removeprefix("/files/tiny/"))

    def ranges(self, name: str) -> list[str]:
        return [place for path, place, _ in self.requests if path.endswith(f"/{name}")]


@pytest.fixture
def mirror_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    monkeypatch.setattr(model_mirror, "PAUSES_S", (0.01,))
    monkeypatch.setattr(model_mirror, "PIECE_BYTES", 2**20)
    made: list[Mirror] = []

    def make(model: Path = TINY, sums: bool = True) -> Mirror:
        made.append(Mirror(tmp_path / f"server{len(made)}", model, sums))
        return made[-1]

    yield make
    for server in made:
        server.close()


def _knowing(config: AgentConfig, server: Mirror, **more: Any) -> AgentConfig:
    """The configuration, with the server's authority among the file servers."""
    known = FileServer(url=server.url, tls=Tls(ca_file=server.authority.certificate_file), **more)
    return replace(config, file_servers={"lab": known})


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_model_of_a_server_is_the_same(
    sums: bool, parts: int, config: AgentConfig, model: Path, mirror_of: Callable[..., Mirror]
) -> None:  # fmt: skip
    """By its list of digests, which is its revision, else by the usual names; in one file of weights or several."""
    server = mirror_of(model if parts == 1 else _split(model), sums)
    server.files |= {"modeling.py": b"import os", "pytorch_model.bin": b"\x80\x04."}
    added = _add(_knowing(config, server), f"{server.address}/", None)
    assert added.name == "tiny"
    assert _same(Path(added.path), model)
    revision = hashlib.sha256(server.files["SHA256SUMS"]).hexdigest() if sums else None
    assert added.source == Source("https", server.address, revision)
    assert not server.ranges("modeling.py") + server.ranges("pytorch_model.bin")
    assert all(auth is None for *_, auth in server.requests)
    if sums:
        assert _add(_knowing(config, server), server.address, revision=revision).was_there


def test_revision_of_a_server_is_kept_to(config: AgentConfig, mirror_of: Callable[..., Mirror]) -> None:
    """Another list than the one that is asked for, or none, and a file that is not as the list says: refused, and nothing stays."""
    server, bare = mirror_of(), mirror_of(sums=False)
    with pytest.raises(ModelSource, match="not 0000"):
        _add(_knowing(config, server), server.address, revision="0" * 64)
    with pytest.raises(ModelSource, match="so no revision"):
        _add(_knowing(config, bare), bare.address, revision="0" * 64)
    server.files["tokenizer.json"] = server.files["tokenizer.json"].replace(b"a", b"b")
    with pytest.raises(ModelCorrupt, match=r"tokenizer\.json is listed with"):
        _add(_knowing(config, server), server.address)
    del server.files["tokenizer.json"]
    with pytest.raises(ModelSource, match=r"tokenizer\.json is in its SHA256SUMS, and not there"):
        _add(_knowing(config, server), server.address)
    assert (_left(config), offered(config)) == ([], {})


@pytest.mark.parametrize(
    "fault",
    ["401", "503", "redirect", "range ignored", "another range", "another size", "wrong bytes", "more", "cut off", "less", "silence"],
)
def test_server_that_does_badly_is_left_and_the_next_attempt_goes_on(
    fault: str, config: AgentConfig, mirror_of: Callable[..., Mirror]
) -> None:  # fmt: skip
    """The command ends with the reason; what has come before stays, where a list says that it is right, and does not come again."""
    server = mirror_of()
    knowing = _knowing(config, server, **({"timeout_s": 0.5} if fault == "silence" else {}))
    served = server._answer

    def answer(handler: Any, _: str) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
        served(handler, fault if start >= 2 * 2**20 else "")

    server._answer = answer  # type: ignore[method-assign]
    with pytest.raises(ModelSource):
        _add(knowing, server.address)
    assert offered(config) == {}
    server._answer = served  # type: ignore[method-assign]
    server.requests = []
    assert _same(Path(_add(_knowing(config, server), server.address).path))
    begun_again = fault == "wrong bytes"
    assert ("bytes=0-718" in server.ranges("config.json"), "bytes=0-1048575" in server.ranges(WEIGHTS)) == (begun_again, begun_again)


def test_only_a_server_of_the_configuration_gets_its_token(config: AgentConfig, tmp_path: Path, mirror_of: Callable[..., Mirror]) -> None:
    """At the same host and port; one whose authority nobody names is not spoken to, and neither is one without TLS."""
    server, other = mirror_of(), mirror_of()
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("secret\n")
    knowing = _knowing(config, server, token_file=tmp_path / "token")
    _add(knowing, server.address)
    assert {auth for *_, auth in server.requests} == {"Bearer secret"}
    with pytest.raises(ModelSource, match=r"(?i)certificate"):
        _add(knowing, other.address, "second")
    assert other.requests == []
    for url in (server.address.replace("https", "http"), f"{server.address}?x=1", "https://me:secret@127.0.0.1/tiny"):
        with pytest.raises(ModelSource, match="is like https://HOST/PATH"):
            _add(knowing, url, "second")


def test_killed_addition_leaves_no_model_and_goes_on(config: AgentConfig, tmp_path: Path, mirror_of: Callable[..., Mirror]) -> None:
    """SIGKILL while weights come: no job is offered half a model, and the next command fetches the rest."""
    server = mirror_of()
    file = tmp_path / "agent.toml"
    file.write_text(
        f'node = "{NODE}"\nstate_directory = "{config.state_directory}"\nbudget = "1GiB"\n[file_servers.lab]\nurl = "{server.url}"\n'
        f'[file_servers.lab.tls]\nca_file = "{server.authority.certificate_file}"\n'
    )
    code = "import sys; from edge_agent import model_mirror; model_mirror.PIECE_BYTES = 2**20; from edge_agent.cli import app; app()"
    command = [sys.executable, "-c", code, "models", "add", server.address, "--no-quantise", "--config", str(file)]
    served = server._answer

    def answer(handler: Any, fault: str) -> None:
        served(handler, "dripping body" if "Range: bytes=1048576-" in str(handler.headers) else fault)

    server._answer = answer  # type: ignore[method-assign]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = config.state_directory / "models" / INCOMING / "tiny" / f"{WEIGHTS}.part"
    wait_for("the second mebibyte", lambda: part.exists() and server.ranges(WEIGHTS)[-1].startswith("bytes=1048576-"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert offered(config) == {}
    assert not (config.state_directory / "models" / "tiny").exists()
    server._answer = served  # type: ignore[method-assign]
    server.requests = []
    assert _same(Path(_add(_knowing(config, server), server.address).path))
    assert "bytes=0-1048575" not in server.ranges(WEIGHTS)


def test_addition_that_ends_after_its_download_goes_on(
    config: AgentConfig, mirror_of: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it (here as if killed before it quantises), nothing is fetched twice; a directory in the way is told first."""
    server = mirror_of()
    knowing = _knowing(config, server)
    with monkeypatch.context() as killed:
        killed.setattr(model_adding, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _add(knowing, server.address)
    server.requests = []
    in_the_way = config.state_directory / "models" / "tiny"
    in_the_way.mkdir()
    with pytest.raises(ModelConflict, match="no model that was added"):
        _add(knowing, server.address)
    in_the_way.rmdir()
    assert _same(Path(_add(knowing, server.address).path))
    assert set(server.ranges(WEIGHTS)) == {"bytes=0-0"}


def test_server_that_lets_nobody_in_deletes_nothing(config: AgentConfig, mirror_of: Callable[..., Mirror]) -> None:
    """What came before stays for when it does again."""
    server = mirror_of()
    kept = config.state_directory / "models" / INCOMING / "tiny" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(ModelSource, match="look at the address, and at who may read there"):
        _add(_knowing(config, server), f"{server.address}/elsewhere", "tiny")
    assert kept.exists()


# the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on loopback, for the hub's own client."""
    server = HubServer(HUB_ID, TINY)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_model_of_the_hub_is_the_same(revision: str | None, config: AgentConfig, hub: HubServer) -> None:
    """Its revision is the commit that a name stands for; nothing that could be run is asked for, and a connection that ends goes on."""
    hub.files |= {"pytorch_model.bin": b"\x80\x04.", "modeling.py": b"import os", "sub/model.safetensors": b"", "../x.json": b"{}"}
    hub.cut_off_after = 2**20
    added = _add(config, HUB_ID, None, revision)
    assert (added.name, added.source) == ("tiny-1b", Source("hub", HUB_ID, COMMIT))
    assert _same(Path(added.path))
    assert {name for name in hub.files if hub.asked_for(name)} == {name for name in hub.files if (TINY / name).is_file()} - {"README.md"}
    assert len(hub.asked_for(WEIGHTS)) > 1
    assert _add(config, HUB_ID, None, revision).was_there


def test_hub_that_has_something_else_is_refused(config: AgentConfig, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such model or revision; weights that would have to be unpickled; contents that are not those of the commit."""
    with pytest.raises(ModelSource, match="Repository Not Found"):
        _add(config, "lab/none")
    with pytest.raises(ModelSource, match="Revision Not Found"):
        _add(config, HUB_ID, revision="v2")
    hub.files["pytorch_model.bin"] = hub.files.pop(WEIGHTS)
    with pytest.raises(ModelUnsafe, match="pickled weights only"):
        _add(config, HUB_ID)
    hub.files[WEIGHTS] = (TINY / WEIGHTS).read_bytes()
    monkeypatch.setattr(hub, "_lfs", lambda data: {"size": len(data), "sha256": "0" * 64, "pointerSize": 100})
    with pytest.raises(ModelCorrupt, match="is listed with"):
        _add(config, HUB_ID)
    for text in ("nothing", "a/b/c", "./lab/Tiny", "/no/such", "lab/../x"):
        with pytest.raises(ModelMissing):
            _add(config, text)
    assert (_left(config), offered(config)) == ([], {})


@pytest.fixture
def offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with a model, and the hub out of reach."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for file in TINY.iterdir():
        hf_hub_download(HUB_ID, file.name, endpoint=hub.url, cache_dir=cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.usefixtures("offline")
def test_offline_a_model_comes_from_the_cache_of_the_hub(config: AgentConfig, hub: HubServer) -> None:
    """With its commit; one that is not there is missed by name, and nobody is asked."""
    asked = len(hub.requests)
    added = _add(config, HUB_ID)
    assert added.source == Source("hub", HUB_ID, COMMIT)
    assert _same(Path(added.path))
    with pytest.raises(ModelMissing, match="HF_HUB_OFFLINE"):
        _add(config, "lab/other", "other")
    assert len(hub.requests) == asked


def test_offline_weights_are_held_against_the_name_of_their_blob(config: AgentConfig, offline: Path) -> None:
    """It is the sha256 that the hub had of them when they came: weights that have changed in the cache since are refused."""
    [weights] = offline.glob(f"*/snapshots/*/{WEIGHTS}")
    assert weights.resolve().name == hashlib.sha256((TINY / WEIGHTS).read_bytes()).hexdigest()
    _flip(weights.resolve())
    with pytest.raises(ModelCorrupt, match=f"{WEIGHTS} is listed with"):
        _add(config, HUB_ID)
    assert (_left(config), offered(config)) == ([], {})


# the commands


@pytest.mark.slow
def test_commands_from_the_hub_to_nothing(
    hub: HubServer, tmp_path: Path, cli: Cli, cold_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """`add` in a process of its own, where the client reads its environment; `list`, `verify` and `remove`, with their exit codes."""
    file = tmp_path / "agent.toml"
    file.write_text(f'node = "{NODE}"\nstate_directory = "node"\nbudget = "1GiB"\nmodels_directory = "large"\n')
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    added = cold_cli("models", "add", HUB_ID, "--revision", "v1", "--name", "mine-1.5", "--no-quantise", "--config", file, "--json")
    assert added.code == 0, added.err
    assert added.json["source"] == {"kind": "hub", "location": HUB_ID, "revision": COMMIT}
    assert _same(tmp_path / "large" / "mine-1.5")
    assert not [path for _, path, _ in hub.requests if "harness" in path or "telemetry" in path]
    [listed] = cli("models", "list", "--config", file, "--json").json
    assert (listed["name"], listed["offered"], listed["source"]["revision"]) == ("mine-1.5", True, COMMIT)
    shown = cli("models", "list", "--config", file)
    assert "mine-1.5" in shown.out
    assert cli("models", "verify", "--config", file).out == "mine-1.5  as it was added, 6 files, 3 MiB\n"
    _flip(tmp_path / "large" / "mine-1.5" / WEIGHTS)
    bad = cli("models", "verify", "mine-1.5", "--config", file, "--json")
    assert bad.code == 5
    assert bad.json[0]["problems"][0].startswith("model.safetensors has sha256")
    assert "differs" in cli("models", "verify", "--config", file).out
    assert cli("models", "remove", "mine-1.5", "--config", file).code == 0
    gone = cli("models", "remove", "mine-1.5", "--config", file, "--json")
    assert (gone.code, gone.json["error"]["code"]) == (5, "model_missing")
    assert cli("models", "list", "--config", file, "--json").json == []
    assert "edge-agent models add SOURCE" in cli("models", "list", "--config", file).out
    mistyped = cold_cli("models", "add", "demo/tyni", "--config", file)
    assert (mistyped.code, "demo/tyni" in mistyped.err, "there is no directory of this name here" in mistyped.err) == (5, True, True)
