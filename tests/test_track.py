"""`edge-agent track`: ended jobs in TensorBoard and MLflow, once, with no text of a dataset."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from api_server import ApiServer
from conftest import DEADLINE_S, ROOT, Cli, write_lines
from fleet import free_port, wait_for
from mlflow import MlflowClient
from orders import NODE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from edge_agent.coordinator.client import Answered, Client
from edge_agent.coordinator.views import JobView
from edge_agent.dataset import file_sha256
from edge_agent.errors import CoordinatorUnreachable, DirectoryUnusable, TrackerAway
from edge_agent.job import Dataset, Evaluation, Job, Regex
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import Artifact, JobResult
from edge_agent.prompts import Prompts
from edge_agent.report import Accuracy, Energy, Event, Example, Failure, Measured, Miss, Paired, PassAtK, Result
from edge_agent.tracking import record
from edge_agent.tracking.record import Recorded, record_all, record_directory, record_job
from edge_agent.tracking.recording import LARGEST, recording_of_directory, recording_of_job
from edge_agent.tracking.to_mlflow import MOST_METRICS, Mlflow
from edge_agent.tracking.to_tensorboard import TensorBoard
from profiles.recorder import StageRow

HIDDEN = "a secret of the dataset"
ENDED = 1_000_000.0
JOB = Job(
    model="tiny", dataset=Dataset("1" * 64), budget_bytes=2**29, prompts=Prompts(HIDDEN), evaluation=Evaluation(verifier=Regex(HIDDEN)),
)  # fmt: skip
LOSSES = [0.5 / step for step in range(1, MOST_METRICS + 11)]


def _report(**changes: Any) -> Result:
    """A report with the secret in every text that a job can bring into one."""
    measured = Measured(
        before=Accuracy(0.1, 0.05, 0.2, 50), after=Accuracy(0.9, 0.8, 0.95, 50), paired=Paired(41, 1, 0.001, 0.8, 0.7, 0.9),
        pass_before=[PassAtK(2, 0.2, 0.1, 0.3)], reason=HIDDEN,
    )  # fmt: skip
    stages = [
        StageRow(stage="evaluate", seconds=1.0, peak_bytes=10), StageRow(stage="train", seconds=4.0, peak_bytes=30),
        StageRow(stage="evaluate", seconds=3.0, peak_bytes=20),
    ]  # fmt: skip
    result = Result(
        job=JOB.digest, state="succeeded", method="nlft", seed=42, device=HIDDEN, versions={HIDDEN: HIDDEN}, budget_bytes=2**29,
        peak_bytes=30, stages=stages, seconds=10.0, tokens_per_s=500.0, energy=Energy("rapl", 96.0, 0.5), updates=len(LOSSES),
        losses=LOSSES, development_losses=[0.7, 0.6], accuracy=measured, accepted=True, acceptance=HIDDEN,
        misses=[Miss("train", HIDDEN, 1, HIDDEN)], examples=[Example(HIDDEN, HIDDEN, HIDDEN, HIDDEN, False, True)],
    )  # fmt: skip
    return msgspec.structs.replace(result, **changes)


@pytest.fixture
def directory(tmp_path: Path) -> JobDirectory:
    """A job directory as a run leaves it."""
    directory = JobDirectory(tmp_path / "one")
    directory.path.mkdir()
    (directory.path / "job.json").write_bytes(msgspec.json.encode(JOB))
    write_lines(directory.path / "dataset.jsonl", {"question": HIDDEN, "answer": HIDDEN})
    directory.append_event(Event(time=ENDED, event="finished", seconds=10.0))
    directory.write_result(_report())
    return directory


class MlflowServer:
    """MLflow's own server, a process that can be away."""

    def __init__(self, store: Path) -> None:
        self.store, self.uri = store, f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> MlflowServer:
        if self._process is None:
            command = [sys.executable, str(ROOT / "tests" / "mlflow_server.py"), str(self.store), self.uri.rpartition(":")[2]]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "serves\n"
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=DEADLINE_S)
            self._process = None

    def runs(self, experiment: str) -> list[Any]:
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(experiment)
        return [*client.search_runs([found.experiment_id])] if found else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One that is away until a test starts it."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield server
    server.stop()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ExitStack() as ends, pytest.MonkeyPatch.context() as patch:
        coordinator = ApiServer(tmp_path_factory.mktemp("api"), ends)
        for name, value in (("CA_FILE", coordinator.ca_file), ("TOKEN_FILE", coordinator.token_file("read")), ("URL", coordinator.url)):
            patch.setenv(f"EDGE_AGENT_{name}", str(value))
        yield coordinator


def _end(coordinator: ApiServer, report: bytes | None, outcome: Any = "succeeded", **more: Any) -> JobView:
    """Have a job hand in and end as its node would; return it as the API tells it."""
    file = write_lines(coordinator.root / "data.jsonl", {"question": HIDDEN, "answer": HIDDEN})
    coordinator.client("submit").upload(file, file_sha256(file))
    job = coordinator.submit(file_sha256(file))
    artifacts: tuple[Artifact, ...] = ()
    if report is not None:
        sha256 = hashlib.sha256(report).hexdigest()
        coordinator.service.files.put(report, sha256)
        artifacts = (Artifact("result.json", sha256, len(report)),)
    coordinator.hear("job", JobResult(job.digest, outcome, artifacts=artifacts, **more), job.id, "result")
    return coordinator.client("read").job(job.id)


def _read(directory: Path) -> EventAccumulator:
    """Read what TensorBoard would show of a run."""
    read = EventAccumulator(str(directory), {"tensors": 0})  # all of them
    read.Reload()
    return read


def _series(read: EventAccumulator, name: str) -> list[tuple[int, float, float]]:
    return [(event.step, event.wall_time, event.tensor_proto.float_val[0]) for event in read.Tensors(name)]


def _all_bytes(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file())


def test_server_that_is_away_is_awaited(
    server: MlflowServer, coordinator: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warning for each attempt; as soon as it is there the job is recorded, and what came before it stays where it was recorded."""
    server.stop()
    monkeypatch.setattr(record, "FIRST_PAUSE_S", 0.01)
    trackers = [TensorBoard(tmp_path / "board"), Mlflow(server.uri, "awaited")]
    view, told, warned = _end(coordinator, msgspec.json.encode(_report())), [], []

    def warn(what: str, error: Exception) -> None:
        warned.append((what, error))
        if len(warned) == 2:
            server.start()

    client = coordinator.client("read")
    with pytest.raises(TrackerAway):
        record_all(client, [view], trackers, told.append, warn, False)
    assert (tmp_path / "board" / view.id).is_dir()
    record_all(client, [view], trackers, told.append, warn, True)
    assert told == [Recorded(view.id, ["mlflow"], ["tensorboard"])]
    assert [(what, type(error)) for what, error in warned[:2]] == [(f"job {view.id}", TrackerAway)] * 2
    [run] = server.runs("awaited")
    assert (run.data.tags["edge_agent.job"], run.data.tags["edge_agent.node"]) == (view.id, NODE)
    # By the coordinator's clock, and never before the job was made, whatever the report says.
    assert int(view.created * 1000) <= run.info.start_time <= run.info.end_time == int(view.changed * 1000)


def test_server_away_is_one_line_and_an_exit_code(directory: JobDirectory, cli: Cli, server: MlflowServer) -> None:
    """That is its own, and names no password."""
    ran = cli("track", directory.path, "--mlflow", f"http://user:hidden@127.0.0.1:{free_port()}")
    assert (ran.code, ran.out) == (17, "")
    assert ran.err.startswith("error tracker_away: MLflow at http://127.0.0.1:")
    assert ran.err.count("\n") == 1
    assert "hidden" not in ran.err


def test_tensorboard_has_what_a_job_reports(directory: JobDirectory, tmp_path: Path) -> None:
    """Losses of all updates within the train stage, stages in their order, accuracy with its interval; settings as hyperparameters."""
    board = tmp_path / "board"
    recorded = record_directory(directory, [TensorBoard(board)])
    assert record_directory(directory, [TensorBoard(board)]) == Recorded(recorded.job, [], ["tensorboard"])
    [place] = board.iterdir()
    assert place.name == recorded.job
    read = _read(place)
    losses = _series(read, "losses")
    assert [step for step, _, _ in losses] == [*range(1, len(LOSSES) + 1)]
    assert [value for _, _, value in losses] == pytest.approx(LOSSES)
    train = (ENDED - 7, ENDED - 3)
    assert train[0] < losses[0][1] < losses[-1][1] == pytest.approx(train[1])
    assert [time for _, time, _ in _series(read, "development_losses")] == [ENDED - 5, ENDED - 3]
    assert _series(read, "stages/evaluate.seconds") == [(0, ENDED - 7, 1.0), (1, ENDED, 3.0)]
    assert _series(read, "stages/train.peak_bytes") == [(0, ENDED - 3, 30.0)]
    single = {
        "accuracy/before.value": 0.1, "accuracy/after.low": 0.8, "accuracy/after.high": 0.95, "accuracy/paired.difference": 0.8,
        "accuracy/pass_before.2.value": 0.2, "energy/total_j": 96.0, "seconds": 10.0, "peak_bytes": 30.0, "budget_bytes": 2.0**29,
        "tokens_per_s": 500.0,
    }  # fmt: skip
    assert {name: _series(read, name) for name in single} == {name: [(0, ENDED, pytest.approx(value))] for name, value in single.items()}
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (settings["lora.rank"].number_value, settings["method.repair"].bool_value) == (16, True)
    names = {"method.name": "nlft", "outcome": "succeeded", "accepted": "true", "dataset": "1" * 64}
    assert {name: settings[name].string_value for name in names} == names


def test_job_that_was_cut_off_is_recorded_anew(directory: JobDirectory, tmp_path: Path, server: MlflowServer) -> None:
    """Where its recorder was killed: TensorBoard's part and MLflow's run that is not finished are not taken for the whole."""
    server.start()
    made = recording_of_directory(directory)
    (tmp_path / "board" / f".{made.id}.part").mkdir(parents=True)
    client = MlflowClient(server.uri)
    client.create_run(client.create_experiment("cut"), tags={"edge_agent.job": made.id})
    trackers = [TensorBoard(tmp_path / "board"), Mlflow(server.uri, "cut")]
    assert record_directory(directory, trackers).present == []
    assert [file.name for file in (tmp_path / "board").iterdir()] == [made.id]
    assert [run.info.status for run in server.runs("cut")] == ["FINISHED"]


def test_mlflow_has_what_a_job_reports(directory: JobDirectory, server: MlflowServer) -> None:
    """Fields of the job as `--set` names them, tags, measures, every loss; once; a new report of the directory is another run."""
    trackers = [Mlflow(server.start().uri, "told")]
    record_directory(directory, trackers)
    assert record_directory(directory, trackers).present == ["mlflow"]
    [run] = server.runs("told")
    assert (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time) == ("one", "FINISHED", 999_990_000, 1_000_000_000)
    parameters = {
        "model": "tiny",
        "lora.alpha": "16.0",
        "method.repair": "true",
        "evaluation.verifier.name": "regex",
        "budget_bytes": "536870912",
    }
    assert {name: run.data.params[name] for name in parameters} == parameters
    assert "schedule.updates" not in run.data.params
    tags = {"model": "tiny", "method": "nlft", "dataset": "1" * 64, "digest": JOB.digest, "outcome": "succeeded", "accepted": "true"}
    assert {name: run.data.tags[f"edge_agent.{name}"] for name in tags} == tags
    measures = {"accuracy.after.value": 0.9, "accuracy.paired.p_value": 0.001, "stages.train.seconds": 4.0, "energy.per_record_j": 0.5}
    assert {name: run.data.metrics[name] for name in measures} == measures
    history = MlflowClient(server.uri).get_metric_history(run.info.run_id, "losses")
    assert [point.value for point in sorted(history, key=lambda point: point.step)] == LOSSES
    directory.write_result(_report(state="failed", error=Failure("no_room", HIDDEN), accuracy=None, accepted=None))
    record_directory(directory, trackers)
    failed = next(run for run in server.runs("told") if run.info.status == "FAILED")
    assert failed.data.tags["edge_agent.reason"] == "no_room"
    assert "edge_agent.accepted" not in failed.data.tags


def test_text_of_a_dataset_is_recorded_nowhere(
    directory: JobDirectory, coordinator: ApiServer, tmp_path: Path, server: MlflowServer
) -> None:
    """Neither questions, answers, examples and errors nor prompts and patterns that people have written: they have a sha256."""
    trackers = [TensorBoard(tmp_path / "board"), Mlflow(server.start().uri, "secrets")]
    record_directory(directory, trackers)
    view = _end(coordinator, msgspec.json.encode(_report()), "failed", reason="internal", text=HIDDEN)
    record_job(coordinator.client("read"), view, trackers)
    assert len(server.runs("secrets")) == 2
    written = _all_bytes(tmp_path / "board") + _all_bytes(server.store)
    assert HIDDEN.encode() in _all_bytes(directory.path)
    assert HIDDEN.encode() not in written
    parameters = recording_of_directory(directory).parameters
    assert str(parameters["prompts"]).startswith("sha256:")
    assert str(parameters["evaluation.verifier.pattern"]).startswith("sha256:")


def test_jobs_of_a_coordinator_are_recorded_once(coordinator: ApiServer, cli: Cli, tmp_path: Path) -> None:
    """All that have ended, with a report or without; those whose report cannot be read are left out, and a warning says so."""
    first, canceled = _end(coordinator, msgspec.json.encode(_report())), _end(coordinator, None, "canceled", reason="canceled", seconds=0.5)
    broken = _end(coordinator, b'{"version": 7')
    running = coordinator.submit(first.order.dataset.sha256)
    board = tmp_path / "board"
    ran = cli("track", "--tensorboard", board)
    assert ran.code == 0, ran.err
    assert f"{first.id}  recorded in tensorboard\n" in ran.out
    assert {first.id, canceled.id} <= {place.name for place in board.iterdir()}
    assert not {broken.id, running.id} & {place.name for place in board.iterdir()}
    assert ran.err.startswith(f"warning internal: job {broken.id}: ")
    assert _series(_read(board / canceled.id), "seconds") == [(0, canceled.changed, 0.5)]
    written = _all_bytes(board)
    again = cli("track", first.id, canceled.id, "--tensorboard", board, "--json")
    assert again.json == [{"job": job, "recorded": [], "present": ["tensorboard"]} for job in (first.id, canceled.id)]
    assert _all_bytes(board) == written
    refused = cli("track", running.id, "--tensorboard", board)
    assert (refused.code, refused.out) == (14, "")
    assert "has not ended" in refused.err


# A coordinator that is stopped in this process leaves the connection of its reader to the garbage collector, as its process would end.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_follower_records_jobs_as_they_end(coordinator: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of before, new ones, and those that end while the coordinator restarts; SIGTERM and Ctrl-C end it cleanly."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")  # a traceback that is kept would keep the connection, beyond this test
    board = tmp_path / "board"
    before = _end(coordinator, msgspec.json.encode(_report()))
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-m", "edge_agent", "track", "--follow", "--tensorboard", str(board)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "300"})
        try:
            wait_for("the job of before", (board / before.id).is_dir)
            wait_for("the follower listens", lambda: coordinator.service._audience.size)
            after = _end(coordinator, None, "failed", reason="internal")
            wait_for("the job that has ended", (board / after.id).is_dir)
            coordinator.stop()
            gc.collect()
            coordinator.start()
            last = _end(coordinator, None, "failed", reason="internal")  # perhaps before the follower is back
            wait_for("the job that ended after the restart", (board / last.id).is_dir)
            process.send_signal(number)
            out, err = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, err
        assert f"{last.id}  recorded in tensorboard" in out
        assert "warning coordinator: the coordinator: no coordinator answers" in err
        assert "Traceback" not in err
        assert not [*board.glob(".*")]


def test_follower_needs_a_coordinator_at_first(coordinator: ApiServer) -> None:
    """None at all, or one that does not know the token, is a mistake and told at once."""
    token = coordinator.token_file("read")
    with Client.remote(f"https://127.0.0.1:{free_port()}", token, coordinator.ca_file) as nobody, pytest.raises(CoordinatorUnreachable):
        next(nobody.endings(lambda _: None))
    token.write_text("read.another\n")
    with Client.remote(coordinator.url, token, coordinator.ca_file) as stranger, pytest.raises(Answered) as refused:
        next(stranger.endings(lambda _: None))
    assert refused.value.code == "unauthorized"
    coordinator.token_file("read")


@pytest.mark.parametrize("seconds", [-1e300, 1e300])
def test_times_of_a_report_stay_within_the_job(seconds: float, coordinator: ApiServer) -> None:
    """Nodes say how long stages took: whatever that is, no server refuses the job for it, and numbers that none can keep are left out."""
    stages = [StageRow(stage="train", seconds=seconds), StageRow(stage="train", seconds=seconds)]
    view = _end(coordinator, None)
    made = recording_of_job(view, _report(seconds=seconds, stages=stages, losses=[1e300, 0.5], peak_bytes=10**30))
    assert view.created <= made.started <= made.ended
    points = [point for points in made.metrics.values() for point in points]
    assert points
    assert all(made.started <= point.time <= made.ended and abs(point.value) <= LARGEST for point in points)
    assert [point.step for point in made.metrics["losses"]] == [2]


def test_directory_that_is_no_ended_job_is_refused(directory: JobDirectory, cli: Cli, tmp_path: Path) -> None:
    """Without a report, with that of another job, or none at all; and a place that cannot be written."""
    board = tmp_path / "board"
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DirectoryUnusable):
        TensorBoard(file)
    for directory_of, says in ((tmp_path / "nowhere", "cannot be read"), (directory.path, "no report of the job")):
        directory.write_result(_report(job="0" * 64))
        ran = cli("track", directory_of, "--tensorboard", board)
        assert ran.code == 4
        assert says in ran.err
    assert [*board.iterdir()] == []


def test_wrong_usage_of_track(cli: Cli, tmp_path: Path) -> None:
    """Nowhere to record to, or some jobs and all that come."""
    assert cli("track").code == 2
    assert cli("track", "x", "--follow", "--tensorboard", tmp_path).code == 2


@pytest.mark.parametrize(("package", "option"), [("tensorboard", "--tensorboard"), ("mlflow", "--mlflow")])
def test_package_that_is_missing_is_named(package: str, option: str, tmp_path: Path) -> None:
    """With the extra that brings it, before any job is asked for."""
    code = f"""if True:
        import sys

        class Absent:
            def find_spec(self, name, *_):
                if name == {package!r}:
                    raise ModuleNotFoundError(name=name)

        sys.meta_path.insert(0, Absent())
        sys.argv = ["edge-agent", "track", {option!r}, "x"]
        from edge_agent.__main__ import main
        main()"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=DEADLINE_S, check=False
    )
    assert ran.returncode == 13, ran.stderr
    assert f"{sys.executable} -m pip install 'edge-agent[{package}]'" in " ".join(ran.stderr.split())
