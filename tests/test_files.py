"""The coordinator's files in an object store: nothing is acknowledged before it is there, and nothing lost where it is away."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import httpx
import msgspec
import pytest
from api_server import INFO
from conftest import write_lines
from fleet import free_port, wait_for
from fsspec import AbstractFileSystem
from moto.server import ThreadedMotoServer
from orders import NODE
from test_https import DATA, Coordinator

from edge_agent.config import Api, Broker, CoordinatorConfig, Files, Size, read_config
from edge_agent.coordinator import remote_files
from edge_agent.coordinator.http import api_served
from edge_agent.coordinator.remote_files import RemoteFiles
from edge_agent.coordinator.service import Service
from edge_agent.dataset import file_sha256
from edge_agent.errors import ConfigInvalid, EdgeAgentError, FilesAway, FilesUnusable
from edge_agent.job import Dataset, Job
from edge_agent.messages import Artifact, FileRequest, Forgotten, JobProgress, JobResult, JobStatus, encode, new_id
from edge_agent.report import Event
from profiles.sensors import Reading, Resources

SECRET = "a secret of the store"  # noqa: S105
URL = "struck://store/prefix"
RESOURCES = Resources(*[Reading(None, "no sensor")] * 2, 1, 1, 1, None, Reading(3.5), *[Reading(None, "no sensor")] * 2)
ADAPTER = random.Random(1).randbytes(200_000)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Struck(AbstractFileSystem):
    """An object store in memory that fails as it is told to."""

    protocol = "struck"
    objects: ClassVar[dict[str, bytes]] = {}
    fault: ClassVar[str] = ""
    """`away`: every call fails; `hangs`: until `free`; `cuts`: what is stored is shorter; `refuses deletes`."""
    free: ClassVar[threading.Event] = threading.Event()
    calls: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, secret: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._secret = secret

    def _strike(self, call: str, path: str) -> None:
        Struck.calls.append((call, path))
        if Struck.fault == "hangs":
            Struck.free.wait()
        if Struck.fault == "away" or (Struck.fault == "refuses deletes" and call == "delete"):
            raise ConnectionError(f"no route for {self._secret or 'anyone'}")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._strike("info", path)
        if path not in Struck.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(Struck.objects[path]), "type": "file"}

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self._strike("put", rpath)
        data = Path(lpath).read_bytes()
        Struck.objects[rpath] = data[:-1] if Struck.fault == "cuts" else data

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self._strike("get", rpath)
        if rpath not in Struck.objects:
            raise FileNotFoundError(rpath)
        Path(lpath).write_bytes(Struck.objects[rpath])

    def rm_file(self, path: str) -> None:
        self._strike("delete", path)
        if Struck.objects.pop(path, None) is None:
            raise FileNotFoundError(path)


@pytest.fixture(autouse=True)
def struck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that is empty and in order, and pauses that are short."""
    fsspec.register_implementation("struck", Struck, clobber=True)
    monkeypatch.setattr(remote_files, "RETRY_S", 0.05)
    monkeypatch.setattr(remote_files, "LONGEST_RETRY_S", 0.05)
    Struck.objects, Struck.fault, Struck.free, Struck.calls = {}, "", threading.Event(), []
    yield
    Struck.fault = ""
    Struck.free.set()


class Place:
    """A coordinator without a broker over an object store: it may be started again, its files' directory lost."""

    def __init__(self, root: Path, ends: ExitStack, **files: Any) -> None:
        self.root, self.files = root, Files(**{"url": URL} | files) if files.get("url", URL) else None
        self._ends: ExitStack | None = None
        ends.callback(self.stop)
        self.start()

    def start(self) -> None:
        self._ends = ExitStack()
        self.service = Service(CoordinatorConfig(self.root / "coordinator", broker=Broker(port=free_port()), files=self.files))
        self.service.start()
        self._ends.callback(self.service.stop)
        self.call = self.service.call
        api = Api(port=free_port())
        self._ends.enter_context(api_served(self.service, api))
        secret = self.call(lambda: self.service.access.new(new_id(), "admin", None)).secret
        self.http = self._ends.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{api.port}/v1", headers={"Authorization": f"Bearer {secret}"}, timeout=30)
        )
        self.hear(INFO, "info")

    def stop(self) -> None:
        if self._ends is not None:
            self._ends.close()
        self._ends = None

    def start_again(self, *, lose_files: bool = False) -> None:
        self.stop()
        if lose_files:
            shutil.rmtree(self.root / "coordinator" / "files")
        self.start()

    def hear(self, data: object, *parts: str) -> None:
        self.call(lambda: self.service._receive_up(NODE, [*parts], encode(data, "test"), False))

    def upload(self, text: str = "How many?") -> httpx.Response:
        file = write_lines(self.root / "data.jsonl", {"question": text, "answer": "#### 1"})
        return self.http.put(f"/datasets/{file_sha256(file)}", content=file.read_bytes())

    def job(self, sha256: str) -> str:
        job = Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29)
        answer = self.http.post("/jobs", content=msgspec.json.encode({"node": NODE, "job": job}))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def result(self, job: str, data: bytes = ADAPTER) -> None:
        """Have a job end as its node says, and all blocks of its one artifact come."""
        digest = self.call(lambda: self.service.job(job)).digest
        artifact = Artifact("adapter_model.safetensors", _sha256(data), len(data))
        self.hear(JobResult(digest, "succeeded", artifacts=(artifact,)), "job", job, "result")
        self.bring(data)

    def bring(self, data: bytes) -> None:
        place = self.call(lambda: self.service.awaited(NODE, _sha256(data)))
        while place is not None:
            block = data[place.offset : place.offset + place.block_bytes]
            self.call(lambda n=place.offset // place.block_bytes, b=block: self.service.receive_block(NODE, _sha256(data), n, b))
            place = self.call(lambda: self.service.awaited(NODE, _sha256(data)))

    def phase(self, job: str) -> str:
        """Where a job stands when the coordinator has looked at what it awaits once more."""
        self.call(self.service._exchange.tick)
        return str(self.http.get(f"/jobs/{job}").json()["phase"])

    def ended(self, job: str) -> None:
        wait_for("the end of the job", lambda: self.phase(job) == "ended", 30)

    def adapter(self, job: str, **headers: str) -> httpx.Response:
        return self.http.get(f"/jobs/{job}/artifacts/adapter_model.safetensors", headers=headers)

    def forget(self, job: str) -> None:
        assert self.http.post(f"/jobs/{job}/forget").status_code == 200
        self.hear(Forgotten(), "job", job, "forgotten")

    def local(self) -> set[str]:
        return {file.name for file in (self.root / "coordinator" / "files" / "sha256").iterdir()}

    def loose(self) -> set[str]:
        return self.call(self.service._store.loose_files)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as ends:
        yield Place(tmp_path, ends)


def _stored() -> set[str]:
    """The files that the store has, by their sha256; each is what its name says."""
    assert all(path == f"store/prefix/sha256/{_sha256(data)}" for path, data in Struck.objects.items())
    return {_sha256(data) for data in Struck.objects.values()}


def _problem(answer: httpx.Response) -> str:
    """What an answer says that the store is away."""
    assert (answer.status_code, answer.json()["code"]) == (503, "files_away"), answer.text
    return str(answer.json()["detail"])


def _done(place: Place) -> None:
    wait_for("all that waits", lambda: place.service._remote.waiting == 0, 30)  # type: ignore[union-attr]


def test_without_a_store_nothing_of_it_is_there(tmp_path: Path) -> None:
    """No table `[files]`: files are where they were, and fsspec is not imported."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom edge_agent.config import CoordinatorConfig\n"
        "from edge_agent.coordinator.http import api_served\nfrom edge_agent.coordinator.service import Service\n"
        f"service = Service(CoordinatorConfig(Path({str(tmp_path / 'state')!r})))\n"
        "print(type(service.files).__name__, service._remote, 'fsspec' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "FileStore None False"
    with ExitStack() as ends:
        place = Place(tmp_path, ends, url="")
        dataset = place.upload().json()["sha256"]
        job = place.job(dataset)
        place.result(job)
        assert place.phase(job) == "ended"
        assert place.adapter(job).content == ADAPTER
        assert place.local() == {dataset, _sha256(ADAPTER)}
        place.forget(job)
        assert (place.local(), place.loose(), Struck.calls) == (set(), set(), [])


def test_all_files_outlive_the_disk(place: Place) -> None:
    """A coordinator over the same database and store, and an empty disk, gives datasets and artifacts as before, in ranges too."""
    dataset = place.upload().json()["sha256"]
    job = place.job(dataset)
    place.result(job)
    place.ended(job)
    assert _stored() == {dataset, _sha256(ADAPTER)}
    place.start_again(lose_files=True)
    assert place.local() == set()
    part = place.adapter(job, Range="bytes=100-299")
    assert (part.status_code, part.content) == (206, ADAPTER[100:300])
    assert place.local() == {_sha256(ADAPTER)}
    whole = place.adapter(job)
    assert (whole.content, whole.headers["etag"]) == (ADAPTER, f'"{_sha256(ADAPTER)}"')
    assert place.http.get(f"/jobs/{job}/artifacts/result.json").status_code == 404
    again = place.job(dataset)  # its file is not here: the offer goes without it, and the node asks for blocks
    view = place.call(lambda: place.service.job(again))
    assert place.call(lambda: place.service._exchange.offer(view)).contents == {}
    request = FileRequest(1024, [0])
    [(number, block)] = wait_for("a block", lambda: place.call(lambda: [*place.service.files.read_blocks(dataset, request)]), 30)
    assert (number, _sha256(block)) == (0, dataset)
    assert place.call(lambda: place.service._exchange.offer(view)).contents == {dataset: block}


def test_result_waits_for_the_store(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """While the store is away a result is not acknowledged, also by a coordinator that is killed and started again; then it is."""
    caplog.set_level(logging.INFO)
    job = place.job(place.upload().json()["sha256"])
    Struck.fault = "away"
    place.result(job)
    wait_for("some attempts", lambda: len([call for call in Struck.calls if call[1].endswith(_sha256(ADAPTER))]) > 3, 30)
    assert place.phase(job) == "finalizing"
    assert place.adapter(job).content == ADAPTER
    place.start_again()
    assert place.phase(job) == "finalizing"
    assert place.http.get("/jobs").status_code == 200
    Struck.fault = ""
    _done(place)
    assert place.phase(job) == "finalizing"  # its node says again what was not acknowledged
    place.result(job)
    place.ended(job)
    assert _sha256(ADAPTER) in _stored()
    said = [record for record in caplog.records if record.name.endswith("remote_files")]
    assert [(r.levelno, r.getMessage().split()[0]) for r in said] == 2 * [(logging.WARNING, "files_away")] + [(logging.INFO, "files_back")]


def test_disk_that_is_lost_before_the_store_has_it(place: Place) -> None:
    """The artifact comes from its node again: it was not told to forget it."""
    job = place.job(place.upload().json()["sha256"])
    Struck.fault = "away"
    place.result(job)
    assert place.phase(job) == "finalizing"
    place.start_again(lose_files=True)
    Struck.fault = ""
    place.result(job)
    place.ended(job)
    assert place.adapter(job).content == ADAPTER


def test_upload_is_answered_when_the_store_has_it(place: Place) -> None:
    """Where it is away the answer says so, and no dataset is listed; the same again goes through, and the object is not lost."""
    Struck.fault = "away"
    assert "no route for anyone" in _problem(place.upload())
    assert place.http.get("/datasets").json()["items"] == []
    assert len(place.loose()) == 1
    Struck.fault = ""
    answer = place.upload()
    assert answer.status_code == 200
    assert _stored() == {answer.json()["sha256"]}
    assert place.loose() == set()
    assert place.upload().json()["sha256"] == answer.json()["sha256"]


def test_upload_that_nobody_has_repeated_goes(place: Place) -> None:
    """What was stored for a request that got no answer is deleted at the next start; what a dataset has stays."""
    kept = place.upload().json()["sha256"]
    Struck.fault = "away"
    _problem(place.upload("Another?"))
    Struck.fault = ""
    _done(place)
    assert len(_stored()) == 2
    place.call(lambda: place.service._store.loosen(kept))  # as a kill before the dataset is settled leaves it
    place.start_again()
    _done(place)
    assert _stored() == {kept}
    wait_for("the notes", lambda: place.loose() == set(), 30)


def test_store_that_hangs_holds_up_nobody(place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The coordinator answers and takes messages meanwhile, and says so; so is who waits; the end of the process waits little."""
    job = place.job(place.upload().json()["sha256"])
    monkeypatch.setattr(remote_files, "TIDY_S", 0.05)
    monkeypatch.setattr(remote_files, "SAY_S", 0.1)
    place.start_again()
    monkeypatch.setattr(remote_files, "WAIT_S", 0.3)
    monkeypatch.setattr(remote_files, "STOP_S", 0.1)
    Struck.fault = "hangs"
    assert "not answered" in _problem(place.upload("Another?"))
    place.result(job)
    for number in range(remote_files.THREADS):
        assert "not answered" in _problem(place.upload(f"{number}?"))
    assert place.phase(job) == "finalizing"
    wait_for("the warning", lambda: f"files_slow count={remote_files.THREADS} " in caplog.text, 30)
    place.start_again()
    assert place.phase(job) == "finalizing"
    Struck.fault = ""
    Struck.free.set()
    place.result(job)
    place.ended(job)


def test_fetch_that_fails_is_tried_when_somebody_asks(place: Place) -> None:
    """A download is answered with what fails, and goes through when the store is back."""
    job = place.job(place.upload().json()["sha256"])
    place.result(job)
    place.ended(job)
    place.start_again(lose_files=True)
    Struck.fault = "away"
    assert "no route" in _problem(place.adapter(job))
    Struck.fault = ""
    assert place.adapter(job).content == ADAPTER


def test_object_that_is_another_is_not_taken(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong bytes of the store reach nobody, and leave nothing; restored, or brought again, they are right."""
    dataset = place.upload().json()["sha256"]
    job = place.job(dataset)
    place.result(job)
    place.ended(job)
    place.start_again(lose_files=True)
    path = f"store/prefix/sha256/{_sha256(ADAPTER)}"
    Struck.objects[path] = ADAPTER[:-1] + b"x"
    assert "another file" in _problem(place.adapter(job))
    assert f"file_broken sha256={_sha256(ADAPTER)}" in caplog.text
    assert (place.local(), [*place.service.files.incoming.iterdir()]) == (set(), [])
    Struck.objects[path] = ADAPTER
    assert place.adapter(job).content == ADAPTER
    Struck.objects[f"store/prefix/sha256/{dataset}"] = b""
    assert place.upload().status_code == 200  # an object of another length does not pass for the file
    assert dataset in _stored()


def test_store_that_cuts_what_it_takes(place: Place) -> None:
    """What is not there as long as it was sent does not count as stored."""
    Struck.fault = "cuts"
    assert "bytes after" in _problem(place.upload())
    Struck.fault = ""
    assert place.upload().status_code == 200
    assert len(_stored()) == 1


def test_copies_over_the_limit_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files that the store has, those not used for longest; what it does not have yet stays, whatever the limit."""
    monkeypatch.setattr(remote_files, "TIDY_S", 0.05)
    with ExitStack() as ends:
        place = Place(tmp_path, ends, cache_limit=Size(1))
        jobs = [place.job(place.upload().json()["sha256"]) for _ in range(2)]
        place.result(jobs[0])
        place.ended(jobs[0])
        wait_for("an empty directory", lambda: place.local() == set(), 30)
        assert place.adapter(jobs[0]).content == ADAPTER
        wait_for("an empty directory", lambda: place.local() == set(), 30)
        Struck.fault = "away"
        place.result(jobs[1], b"of the other job")
        ticks = threading.Event()
        assert not ticks.wait(0.3)
        assert place.local() == {_sha256(b"of the other job")}
        Struck.fault = ""
        place.ended(jobs[1])
        wait_for("an empty directory", lambda: place.local() == set(), 30)
        assert place.adapter(jobs[1]).content == b"of the other job"


def test_forgotten_job_leaves_nothing_in_the_store(place: Place) -> None:
    """Nor does a dataset that is removed; what another job has stays, with the last one it goes."""
    dataset, other = (place.upload(text).json()["sha256"] for text in ("How many?", "Another?"))
    jobs = [place.job(dataset) for _ in range(2)]
    for job in jobs:
        place.result(job)
        place.ended(job)
    place.forget(jobs[0])
    _done(place)
    assert _stored() == {dataset, other, _sha256(ADAPTER)}
    place.forget(jobs[1])
    _done(place)
    assert _stored() == {other}
    assert place.http.delete(f"/datasets/{other}").status_code == 200
    _done(place)
    assert (_stored(), place.local()) == (set(), set())
    wait_for("the notes", lambda: place.loose() == set(), 30)


def test_deletion_is_not_lost(place: Place) -> None:
    """A store that is away when a job is forgotten, and a coordinator that ends before it is back: the objects go all the same."""
    dataset = place.upload().json()["sha256"]
    job = place.job(dataset)
    place.result(job)
    place.ended(job)
    Struck.fault = "refuses deletes"
    place.forget(job)
    assert place.loose() == {dataset, _sha256(ADAPTER)}
    place.start_again(lose_files=True)
    wait_for("an attempt", lambda: ("delete", f"store/prefix/sha256/{dataset}") in Struck.calls, 30)
    assert _stored() == {dataset, _sha256(ADAPTER)}
    Struck.fault = ""
    _done(place)
    assert _stored() == set()
    wait_for("the notes", lambda: place.loose() == set(), 30)


def test_file_that_comes_again_is_not_deleted(place: Place) -> None:
    """A dataset that is uploaded anew before its old object is gone stays, also after a restart."""
    dataset = place.upload().json()["sha256"]
    Struck.fault = "refuses deletes"
    assert place.http.delete(f"/datasets/{dataset}").status_code == 200
    assert place.upload().status_code == 200
    Struck.fault = ""
    for _ in range(2):
        _done(place)
        assert _stored() == {dataset}
        place.start_again()
    assert place.job(dataset)


def test_files_of_before_are_stored_at_the_start(tmp_path: Path) -> None:
    """A coordinator that gets a store brings there what its jobs have; files of nobody stay out."""
    with ExitStack() as ends:
        place = Place(tmp_path, ends, url="")
        dataset = place.upload().json()["sha256"]
        job = place.job(dataset)
        place.result(job)
        place.service.files.put(b"nobody's", _sha256(b"nobody's"))
        place.files = Files(url=URL)
        place.start_again()
        _done(place)
        assert _stored() == {dataset, _sha256(ADAPTER)}
        place.start_again(lose_files=True)
        assert place.adapter(job).content == ADAPTER


def test_live_map_is_not_stored(place: Place) -> None:
    """A Saliency Map of a running job is here alone; that of its result is stored, though it is the same file."""
    dataset = place.upload().json()["sha256"]
    job, live = place.job(dataset), b"a map"
    digest = place.call(lambda: place.service.job(job)).digest
    place.hear(JobStatus(digest, "running"), "job", job, "status")
    assert place.http.post(f"/jobs/{job}/saliency").status_code == 202
    told = Artifact("saliency.json", _sha256(live), len(live))
    place.hear(JobProgress(Event(time=1.0, event="progress"), [], RESOURCES, told), "job", job, "progress")
    place.bring(live)
    assert place.http.get(f"/jobs/{job}/artifacts/saliency.json").content == live
    place.call(place.service._maps.tick)
    assert _stored() == {dataset}
    place.result(job, live)
    place.bring(live)
    place.ended(job)
    place.call(place.service._maps.tick)
    assert _stored() == {dataset, _sha256(live)}
    assert _sha256(live) in place.local()


def test_node_gets_and_brings_files_by_https(tmp_path: Path) -> None:
    """A dataset that is not here is fetched for it, or it is told to go another way; what it has brought is awaited until it is stored."""
    with ExitStack() as ends:
        coordinator = Coordinator(tmp_path, ADAPTER, files=Files(url=URL))
        ends.callback(coordinator.stop)
        dataset = _sha256(DATA)
        wait_for("the dataset", lambda: coordinator.service.files.lasts(dataset), 30)
        coordinator.service.files.remove(dataset)
        Struck.fault = "away"
        assert coordinator.ask("GET", dataset).status_code == 503
        Struck.fault = ""
        assert coordinator.ask("HEAD", dataset).headers["content-length"] == str(len(DATA))
        assert coordinator.ask("GET", dataset).content == DATA
        Struck.fault = "away"
        coordinator.await_result()
        assert coordinator.put(0, len(ADAPTER)).headers["upload-offset"] == str(len(ADAPTER))
        service, job = coordinator.service, coordinator.order.id
        service.call(service._exchange.tick)
        assert service.call(lambda: service.job(job)).phase == "finalizing"
        Struck.fault = ""
        wait_for("the object", lambda: service.files.lasts(_sha256(ADAPTER)), 30)
        service.call(service._exchange.tick)
        assert service.call(lambda: service.job(job)).phase == "ended"


def test_request_that_ends_leaves_others_waiting(tmp_path: Path) -> None:
    """Two wait for one file; the one that gives up does not end the other's."""
    files = RemoteFiles(tmp_path, Files(url=URL), print)
    Struck.objects[f"store/prefix/sha256/{_sha256(ADAPTER)}"] = ADAPTER

    async def ask() -> Path | None:
        first, second = (asyncio.create_task(files.bring(_sha256(ADAPTER))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        files.start()
        return await second

    found = asyncio.run(ask())
    files.stop()
    assert found is not None
    assert found.read_bytes() == ADAPTER
    with pytest.raises(FilesAway, match="the coordinator ends"):
        asyncio.run(files.bring("0" * 64))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ('url = "bucket/prefix"', "regex"),
        ('url = "s3://"', "regex"),
        ('url = "ftp://me:word@host/files"', "no password"),
        ('url = "simplecache::s3://bucket"', "regex"),
        ('url = "s3://b"\noptions = { secret = "x" }', "`secret`"),
        ('url = "s3://b"\noptions = { key = "x" }', "`key`"),
        ('url = "s3://b"\noptions = { client_kwargs = { aws_secret_access_key = "x" } }', "`aws_secret_access_key`"),
        ('url = "az://b"\noptions = { connection_string = "x" }', "`connection_string`"),
        ('url = "s3://b"\noptions = { endpoint_url = [] }', "files.options"),
        ('url = "s3://b"\noptions = { anon = true }\noption_files = { anon = "f" }', "both"),
        ('url = "s3://b"\ncache_limit = 0', "cache_limit"),
    ],
)
def test_configuration_that_is_wrong(files: str, says: str, tmp_path: Path) -> None:
    """What can be no place for files, and every secret that stands in the configuration itself, is refused and not repeated."""
    (tmp_path / "c.toml").write_text(f'state_directory = "s"\n[files]\n{files}\n')
    with pytest.raises(ConfigInvalid) as raised:
        read_config(tmp_path / "c.toml", CoordinatorConfig)
    assert says in str(raised.value)
    assert "word" not in str(raised.value).replace("password", "")


def test_store_that_can_never_be_used(tmp_path: Path) -> None:
    """A kind that nobody knows, packages that are missing, and a secret that others can read end the start with 13."""

    def refused(**files: Any) -> EdgeAgentError:
        with pytest.raises(EdgeAgentError) as raised:
            RemoteFiles(tmp_path, Files(**files), print)
        assert raised.value.exit_code == 13
        return raised.value

    assert isinstance(refused(url="nowhere://x"), FilesUnusable)
    (tmp_path / "secret").write_text(SECRET)
    assert isinstance(refused(url=URL, option_files={"secret": tmp_path / "secret"}), ConfigInvalid)
    for name, url, says in (("s3fs", "s3://b", "edge-agent[s3]"), ("gcsfs", "gs://b", "gcsfs"), ("fsspec", "s3://b", "edge-agent[files]")):
        code = (
            f"import sys; sys.modules[{name!r}] = None\nfrom pathlib import Path\n"
            "from edge_agent.config import Files\nfrom edge_agent.coordinator.remote_files import RemoteFiles\n"
            "from edge_agent.errors import EdgeAgentError\n"
            f"try:\n    RemoteFiles(Path({str(tmp_path)!r}), Files(url={url!r}), print)\nexcept EdgeAgentError as error:\n"
            "    print(error.exit_code, error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith("13 ")
        assert says in done.stdout


def test_secret_of_the_store_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read from its file for every new connection; a library that puts it into its errors is not quoted with it."""
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "secret").chmod(0o600)
    with ExitStack() as ends:
        place = Place(tmp_path, ends, option_files={"secret": tmp_path / "secret"})
        Struck.fault = "away"
        said = _problem(place.upload())
        assert "no route for ***" in said
        Struck.fault = ""
        assert place.upload().status_code == 200
    assert "no route for ***" in caplog.text
    assert SECRET not in caplog.text + said


def test_directory_as_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`file://` works too: the directory for the files is made, one above it never, as where nothing is mounted."""
    with ExitStack() as ends:
        place = Place(tmp_path, ends, url=f"file://{tmp_path}/mounted")
        _problem(place.upload())
        assert not (tmp_path / "mounted").exists()
        (tmp_path / "mounted").mkdir()
        dataset = place.upload().json()["sha256"]
        assert [file.name for file in (tmp_path / "mounted" / "sha256").iterdir()] == [dataset]
        place.start_again(lose_files=True)
        assert asyncio.run(place.service.file(dataset)) == tmp_path / "coordinator" / "files" / "sha256" / dataset
        assert place.http.delete(f"/datasets/{dataset}").status_code == 200
        _done(place)
        assert [*(tmp_path / "mounted" / "sha256").iterdir()] == []


# a server that speaks S3


class S3:
    """A server of S3's protocol on loopback, with one bucket, that may go away and come back."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server: ThreadedMotoServer | None = None
        self.start()
        httpx.post(f"http://127.0.0.1:{self.port}/moto-api/reset")
        self.system = fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{self.port}", skip_instance_cache=True)

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None

    def names(self) -> list[str]:
        """All objects of the bucket."""
        return list(self.system.find("bucket", refresh=True))

    def stored(self) -> dict[str, bytes]:
        """Likewise, with what is in them."""
        return {path: self.system.cat_file(path) for path in self.names()}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    for name, value in (("AWS_ACCESS_KEY_ID", "someone"), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    server = S3()
    yield server
    server.stop()


def test_s3_has_the_files(s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stored, fetched, in parts too, and deleted by the protocol itself; a bucket that is missing is said, and not made."""
    large = random.Random(3).randbytes(12 * 2**20)
    with ExitStack() as ends:
        place = Place(tmp_path, ends, url="s3://bucket/some/prefix", options={"endpoint_url": f"http://127.0.0.1:{s3.port}"})
        assert "bucket does not exist" in _problem(place.upload())
        s3.system.mkdir("bucket")
        dataset = place.upload().json()["sha256"]
        job = place.job(dataset)
        place.result(job, large)
        place.ended(job)
        stored = s3.stored()
        assert {path: _sha256(data) for path, data in stored.items()} == {
            f"bucket/some/prefix/sha256/{sha256}": sha256 for sha256 in (dataset, _sha256(large))
        }
        place.start_again(lose_files=True)
        assert place.adapter(job, Range="bytes=-5").content == large[-5:]
        assert place.adapter(job).content == large
        place.start_again(lose_files=True)
        s3.system.pipe_file(f"bucket/some/prefix/sha256/{_sha256(large)}", large[:-1])
        assert "another file" in _problem(place.adapter(job))
        place.forget(job)
        _done(place)
        assert s3.names() == []
    assert SECRET not in caplog.text
