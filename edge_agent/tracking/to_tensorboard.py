"""TensorBoard: one subdirectory for each job, written by TensorBoard's own package, without TensorFlow."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_agent.errors import NO_SPACE, DirectoryUnusable, DiskFull
from edge_agent.files import flush
from edge_agent.tracking.recording import Recording


class TensorBoard:
    """A log directory. A job is there whole or not at all: it is written beside its place, then renamed.

    Raises ModuleNotFoundError without the package, DirectoryUnusable where nothing can be written.
    """

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401  # not only when a job has ended

        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DirectoryUnusable(directory, error.strerror or type(error).__name__) from None

    def has(self, job: str) -> bool:
        return (self._directory / job).is_dir()

    def record(self, recording: Recording) -> None:
        part = self._directory / f".{recording.id}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)  # of one that was killed
            _write(part, recording)
            for file in part.iterdir():
                flush(file)
            part.replace(self._directory / recording.id)
            flush(self._directory)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(str(self._directory)) from None
            raise DirectoryUnusable(self._directory, error.strerror or type(error).__name__) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(directory: Path, recording: Recording) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(directory))
    try:
        settings = recording.parameters | recording.tags
        hparams = hparams_pb(settings, trial_id=recording.id, start_time_secs=recording.started)
        writer.add_event(Event(wall_time=recording.started, step=0, summary=hparams))
        for name, points in recording.metrics.items():
            for point in points:
                # TensorBoard puts into one group what stands before a `/`.
                summary = scalar_pb(name.replace(".", "/", 1), point.value)
                writer.add_event(Event(wall_time=point.time, step=point.step, summary=summary))
    finally:
        writer.close()
