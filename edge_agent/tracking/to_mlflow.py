"""MLflow: one run for each job, in one experiment, found again by a tag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import msgspec

from edge_agent.errors import TrackerAway
from edge_agent.tracking.recording import Recording, Setting

T = TypeVar("T")

TAG = "edge_agent."
"""Before the names of our tags."""
MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""Of one request."""
LONGEST_VALUE = 500
"""Of a parameter, for servers before MLflow 2.8."""
STATES = {"succeeded": "FINISHED", "canceled": "KILLED"}
"""Of a run, by the outcome of its job; any other is FAILED."""


class Mlflow:
    """A tracking server. A run that was not finished when its recorder died is deleted, and made anew.

    Raises ModuleNotFoundError without the package, TrackerAway where the address is none of a server.
    """

    name = "mlflow"

    def __init__(self, uri: str, experiment: str) -> None:
        # Read when it is imported. It would tell its makers of every call, print to standard output, and try for four minutes.
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self._uri, self._experiment = uri, experiment
        with self._explained():
            self._client = MlflowClient(tracking_uri=uri)

    def has(self, job: str) -> bool:
        with self._explained():
            return any(run.info.status != "RUNNING" for run in self._runs(self._experiment_id(), job))

    def record(self, recording: Recording) -> None:
        from mlflow.entities import Metric, Param

        tags = {TAG + name: text for name, text in {"job": recording.id, **recording.tags}.items()}
        metrics = [Metric(name, point.value, _ms(point.time), point.step) for name, points in recording.metrics.items() for point in points]
        parameters = [Param(name, _text(value)) for name, value in recording.parameters.items()]
        with self._explained():
            experiment = self._experiment_id()
            for run in self._runs(experiment, recording.id):
                self._client.delete_run(run.info.run_id)
            info = self._client.create_run(experiment, _ms(recording.started), tags, recording.name).info
            for some in _parts(parameters, MOST_PARAMETERS):
                self._client.log_batch(info.run_id, params=some)
            for some in _parts(metrics, MOST_METRICS):
                self._client.log_batch(info.run_id, metrics=some)
            self._client.set_terminated(info.run_id, STATES.get(recording.outcome, "FAILED"), _ms(recording.ended))

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id if found else self._client.create_experiment(self._experiment))

    def _runs(self, experiment: str, job: str) -> Sequence[Any]:
        runs: Sequence[Any] = self._client.search_runs([experiment], f"tags.`{TAG}job` = '{job}'")
        return runs

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            problem = str(error).strip()
        except ModuleNotFoundError as error:  # of a database, which MLflow's server speaks to
            problem = f"the Python package {error.name!r} is not installed; give the URL of an MLflow server"
        else:
            return
        raise TrackerAway(_without_password(self._uri), _without_password(problem.splitlines()[0]))


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _ms(time: float) -> int:
    return int(time * 1000)


def _text(value: Setting) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _parts(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
