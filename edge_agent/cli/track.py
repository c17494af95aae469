"""The command `edge-agent track`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from edge_agent.cli.fleet import CoordinatorConfigOption, UrlOption, client_of
from edge_agent.cli.shared import JsonOption, explained, print_json
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.console import printable
from edge_agent.errors import EdgeAgentError
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import is_ulid

if TYPE_CHECKING:  # httpx comes with them, which is of no use to the other commands
    from edge_agent.tracking.record import Recorded
    from edge_agent.tracking.recording import Tracker


def track(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB|DIR", help="Ids at the coordinator, or job directories; default: all that it has."),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="TensorBoard's log directory; a job is a directory in it.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option("--mlflow", metavar="URI", help="An MLflow tracking server; a job is a run.")] = None,
    experiment: Annotated[str, typer.Option("--experiment", metavar="NAME", help="MLflow's experiment; made where it is missing.")] = (
        "edge-agent"
    ),
    follow: Annotated[bool, typer.Option("--follow", help="Stay, and record each job as it ends, until Ctrl-C or SIGTERM.")] = False,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record jobs that have ended in TensorBoard or MLflow: settings, measures and names, never text of a dataset.

    What is recorded there already is left as it is. With --follow, a tracking server or coordinator that is away is awaited.
    """
    with explained(as_json):
        if tensorboard is None and mlflow is None:
            raise typer.BadParameter("give --tensorboard, --mlflow or both")
        if follow and jobs:
            raise typer.BadParameter("--follow records all jobs; leave out JOB")
        from edge_agent.tracking.record import record_all

        trackers, told = _trackers(tensorboard, mlflow, experiment), Told(as_json, follow)
        if jobs:
            for job in jobs:
                told(_record(job, trackers, config, url))
        elif follow:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt), client_of(config, url) as client:
                record_all(client, client.endings(lambda error: _warn("the coordinator", error)), trackers, told, _warn, True)
        else:
            with client_of(config, url) as client:
                record_all(client, client.ended(), trackers, told, _warn, False)
        told.end()


def _trackers(tensorboard: Path | None, mlflow: str | None, experiment: str) -> list[Tracker]:
    from edge_agent.tracking.to_mlflow import Mlflow
    from edge_agent.tracking.to_tensorboard import TensorBoard

    trackers: list[Tracker] = [TensorBoard(tensorboard)] if tensorboard else []
    return [*trackers, Mlflow(mlflow, experiment)] if mlflow else trackers


def _record(job: str, trackers: Sequence[Tracker], config: Path, url: str | None) -> Recorded:
    from edge_agent.tracking.record import record_directory, record_job

    if Path(job).exists() or not is_ulid(job):
        return record_directory(JobDirectory(Path(job)), trackers)
    with client_of(config, url) as client:
        return record_job(client, client.job(job), trackers)


class Told:
    """Prints what is recorded: a line each, or with --json a list at the end; with --follow, which has none, an object a line."""

    def __init__(self, as_json: bool, follow: bool) -> None:
        self._as_json, self._follow = as_json, follow
        self._kept: list[Recorded] = []

    def __call__(self, recorded: Recorded) -> None:
        if not self._as_json:
            what = f"recorded in {' and '.join(recorded.recorded)}" if recorded.recorded else "was recorded before"
            typer.echo(f"{recorded.job}  {what}")
        elif self._follow:
            typer.echo(msgspec.json.encode(recorded))
        else:
            self._kept.append(recorded)

    def end(self) -> None:
        if self._as_json and not self._follow:
            print_json(self._kept)


def _warn(what: str, error: EdgeAgentError) -> None:
    line = Text.assemble(("warning ", "bold yellow"), (error.code, "yellow"), printable(f": {what}: {error}"))
    Console(stderr=True).print(line, soft_wrap=True)
