"""Models that were added to a node: a directory each, with a record of where it came from and the sha256 of its files.

What is there is offered to jobs beside what the configuration names. A directory appears whole and goes whole, so whoever looks sees a
model or none. Imports neither torch nor httpx: the daemon looks here.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.config import AgentConfig, ModelName
from edge_agent.dataset import file_sha256
from edge_agent.errors import ConfigInvalid, EdgeAgentError, ModelConflict, ModelNeeded, ModelUnknown, StateUnusable
from edge_agent.files import lock_file
from edge_agent.job import Sha256, Strict
from edge_agent.store import jobs_of_model
from quantization.entries import entries_of, entry_bytes
from quantization.model_files import find_model
from quantization.shape import read_shape

log = logging.getLogger(__name__)

RECORD, INCOMING = "edge-agent-model.json", ".incoming"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}\Z")]
Count = Annotated[int, Meta(ge=0)]


class Source(Strict, frozen=True):
    """Where a model came from."""

    kind: Literal["directory", "https", "hub"]
    location: str
    """The directory, the URL, or the id at the hub."""
    revision: str | None = None
    """At the hub the commit; of an HTTPS server the sha256 of its `SHA256SUMS`; null where nothing says that it stays as it is."""


class StoredFile(Strict, frozen=True):
    """A file of a model as it was when the model was added."""

    size_bytes: Count
    sha256: Sha256


class Record(Strict, frozen=True, kw_only=True):
    """What is known of a model that was added."""

    version: Literal[1] = 1
    source: Source
    fingerprint: Sha256
    added: datetime
    files: dict[FileName, StoredFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a node, as `edge-agent models list` shows it."""

    name: str
    path: str
    offered: bool
    """Whether jobs may use it."""
    problem: str | None = None
    """Why not."""
    architecture: str | None = None
    parameters: int | None = None
    size_bytes: int = 0
    quantised_bytes: int = 0
    """Of its entries in the cache of quantised models; 0: the first job with it quantises it."""
    source: Source | None = None
    """null: the configuration names its directory."""
    added: datetime | None = None
    fingerprint: str | None = None


class Verified(msgspec.Struct, frozen=True):
    """What has become of the files of a model that was added."""

    name: str
    files: int
    size_bytes: int
    problems: list[str]
    """Files that are not as they were."""


def home_of(config: AgentConfig) -> Path:
    """Return the directory of the models that are added."""
    return config.models_directory or config.state_directory / "models"


def installed(config: AgentConfig) -> dict[str, Path]:
    """Return the models that were added, by name; none where their directory cannot be read."""
    home = home_of(config)
    try:
        found = sorted(home.iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.error("models_unreadable directory=%s error=%r", home, error.strerror)
        return {}
    return {path.name: path for path in found if NAME.fullmatch(path.name) and os.access(path / RECORD, os.R_OK)}


def check_places(config: AgentConfig) -> None:
    """Raise ConfigInvalid for a directory of models that this user may not enter. One that is not there may come yet."""
    places = {f"models.{name}": path for name, path in config.models.items()}
    if config.models_directory is not None:
        places["models_directory"] = config.models_directory
    for field, path in places.items():
        with suppress(FileNotFoundError):
            _check_place(field, path)


def _check_place(field: str, path: Path) -> None:
    try:
        os.scandir(path).close()
    except (PermissionError, NotADirectoryError) as error:
        problem = f"{field}: {error.strerror}; let the agent's user enter it and read what is there, or name another directory"
        raise ConfigInvalid(path, problem) from None


def offered(config: AgentConfig) -> dict[str, Path]:
    """Return the models that jobs may use, by name: those that were added, and those that the configuration names."""
    return installed(config) | config.models


def changed_ns(config: AgentConfig) -> int | None:
    """Return when a model was last added or removed, as the file system tells it."""
    try:
        return home_of(config).stat().st_mtime_ns
    except OSError:
        return None


def read_record(path: Path) -> Record:
    """Read the record of a model. Raises StateUnusable where it cannot be read."""
    try:
        return msgspec.json.decode((path / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateUnusable(path / RECORD, f"{error}; remove the model and add it again") from None


def held_bytes(config: AgentConfig) -> int:
    """Return the bytes of all models that were added."""
    return sum(file.stat().st_size for path in installed(config).values() for file in path.iterdir())


@contextmanager
def working_in(config: AgentConfig) -> Iterator[tuple[Path, IO[str]]]:
    """Hold the directory of the models for a command that changes it, by a lock. Raises StateUnusable."""
    home = home_of(config)
    try:
        for directory in (config.state_directory, home):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (owner := directory.stat().st_uid) != os.geteuid():
                raise StateUnusable(directory, f"it belongs to user {owner}, as whom the agent runs; run this as that user (`sudo -u`)")
        lock = lock_file(home / ".lock")
    except OSError as error:
        raise StateUnusable(home, f"{error.strerror}; mend its permissions, or give another `models_directory`") from None
    if lock is None:
        raise StateUnusable(home, "another `edge-agent models` works in it; wait until it has ended")
    with lock:
        yield home, lock


def list_models(config: AgentConfig) -> list[ModelView]:
    """Return all models of a node, with what is wrong with them."""
    added = installed(config)
    return [_view(name, path, added.get(name) == path, config) for name, path in sorted(offered(config).items())]


def _view(name: str, path: Path, added: bool, config: AgentConfig) -> ModelView:
    record = None
    try:
        record = read_record(path) if added else None
        files = find_model(str(path))
        read_shape(files)  # raises for what could not be trained
    except (EdgeAgentError, OSError) as error:
        return ModelView(name=name, path=str(path), offered=False, problem=str(error), source=record.source if record else None)
    kinds = files.config.get("architectures") or [files.config.get("model_type", "unknown")]
    return ModelView(
        name=name, path=str(path), offered=True, architecture=str(kinds[0]), parameters=sum(tensor.elements for tensor in files.tensors),
        size_bytes=record.size_bytes if record else sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        quantised_bytes=sum(map(entry_bytes, entries_of(files, config.cache_directory))),
        source=record.source if record else None, added=record.added if record else None, fingerprint=files.fingerprint,
    )  # fmt: skip


def find_added(config: AgentConfig, name: str) -> Path:
    """Return the place of a model that was added. Raises ModelUnknown, or ModelConflict for one that the configuration names."""
    known = installed(config)
    if name not in known and name in config.models:
        raise ModelConflict(f"model {name!r} was not added: [models] of the configuration names its directory; take it out there")
    if name not in known:
        raise ModelUnknown(name, known)
    return known[name]


def remove(config: AgentConfig, name: str) -> int:
    """Delete a model that was added, and what the cache has of it, and return the bytes. Raises ModelNeeded while a job needs it."""
    with working_in(config) as (home, _):
        path, hidden = find_added(config, name), home / INCOMING / f"{name}.removed"
        _check_unneeded(config, name)
        hidden.parent.mkdir(exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        try:
            _check_unneeded(config, name)  # a job that came in this moment; a later one ends as `model_missing`
        except ModelNeeded:
            hidden.rename(path)
            raise
        places = [hidden]
        with suppress(EdgeAgentError):  # entries of a broken model are found by nobody; they go when there is no more room
            places += entries_of(find_model(str(hidden)), config.cache_directory)
        freed = sum(map(entry_bytes, places))
        for place in places:
            shutil.rmtree(place)
    return freed


def _check_unneeded(config: AgentConfig, name: str) -> None:
    file = config.state_directory / "agent.sqlite"
    try:
        jobs = jobs_of_model(file, name)
    except sqlite3.Error as error:
        raise StateUnusable(file, f"{error}, so that nobody knows which jobs need the model") from None
    if jobs:
        raise ModelNeeded(name, jobs)


def verify(config: AgentConfig, name: str) -> Verified:
    """Hold every file of a model against the record of its addition. Raises ModelUnknown, ModelConflict, StateUnusable."""
    path = find_added(config, name)
    record = read_record(path)
    problems = [problem for file, was in record.files.items() if (problem := _compare(path / file, was))]
    known = {RECORD, *record.files}
    problems += [f"{file.name} was not there" for file in sorted(path.iterdir()) if file.name not in known]
    return Verified(name, len(record.files), record.size_bytes, problems)


def _compare(file: Path, was: StoredFile) -> str | None:
    """Return what is other than it was."""
    try:
        size_bytes = file.stat().st_size
        sha256 = file_sha256(file) if size_bytes == was.size_bytes else None
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    if sha256 is None:
        return f"{file.name} has {size_bytes:,} bytes, not {was.size_bytes:,}"
    return None if sha256 == was.sha256 else f"{file.name} has sha256 {sha256}, not {was.sha256}"


def check_name(name: str) -> ModelName:
    """Return the name of a model. Raises ModelConflict for what can be none."""
    if NAME.fullmatch(name) is None:
        raise ModelConflict(f"{name!r} can be no model's name: it has 1 to 64 small letters, digits, `.`, `_` and `-`; give another --name")
    return name
