"""The coordinator's files in an object store, by fsspec: what is in the state directory is where they arrive, and a cache.

The coordinator's thread never waits for the object store: threads of their own carry files there and back, and delete them there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_agent import config
from edge_agent.errors import FilesAway, FilesUnusable, PackageMissing
from edge_agent.messages import FileRequest
from edge_agent.transfer import LONGEST_RETRY_S, RETRY_S, FileStore

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

THREADS = 4
WAIT_S = 300.0
"""That a request waits for a file to come or go."""
SAY_S = 60.0
"""Between two lines of the log that say that the object store is still away, and until one says that a file takes long."""
TIDY_S = 60.0
"""Between two looks at how much room the copies take. One that somebody has asked for since stays: it may be about to be read."""
STOP_S = 5.0
LONGEST_SAID = 500
"""Characters of what the library of an object store says of an error."""


@dataclass
class Task:
    """What is to be done with one file: `keep` it in the object store, `fetch` it from there, `delete` it there."""

    sha256: str
    kind: Literal["keep", "fetch", "delete"]
    at_once: bool = False
    """Before others, also while those pause because the object store is away: somebody waits."""
    since: float = 0.0
    """When a thread took it."""
    done: Future[bool] = field(default_factory=Future)
    """Of the next attempt: whether the file is there then."""


class OwnSystem(threading.local):
    """The file system of one thread: not every library bears to be shared, and one that has failed is made anew."""

    system: AbstractFileSystem | None = None
    root = ""
    secrets: Collection[str] = ()


class RemoteFiles(FileStore):
    """A file store that lasts as an object store does. An object is at `URL/sha256/HEX`, and is checked when it is fetched.

    `has` speaks of the copy in the state directory, `lasts` of the object. Any thread may use it.
    """

    def __init__(self, root: Path, files: config.Files, deleted: Callable[[str], None], trust_s: float = math.inf) -> None:
        """`deleted` hears, in another thread, of each object that is gone. Raises FilesUnusable, PackageMissing, ConfigInvalid.

        `trust_s`: how long an object that was seen counts as there, where others delete too.
        """
        super().__init__(root)
        _check(files)
        self._config, self._deleted, self._trust_s = files, deleted, trust_s
        self._own = OwnSystem()
        self._changed = threading.Condition()
        self._there: dict[str, float] = {}
        """Objects that this process has seen, or stored, and when."""
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._busy: dict[str, Task] = {}
        self._failing: set[str] = set()
        """Files that could not be stored or deleted at the last attempt."""
        self._again_at, self._pause_s = 0.0, RETRY_S
        self._away_since: float | None = None
        self._said = 0.0
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work, name="files", daemon=True) for work in (*[self._work] * THREADS, self._tidy)]

    def go_on(self, needed: Collection[str], loose: Collection[str]) -> None:
        """Have done what an end in between has left: files stored that only the state directory may have, loose objects deleted."""
        for file in self._root.iterdir():
            if file.name in needed:
                self._want(file.name, "keep")
        for sha256 in loose:
            self.delete(sha256)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads. One that hangs in a library is left behind: what it was doing is done again after the next start."""
        with self._changed:
            self._end.set()
            for task in (*self._tasks.values(), *self._busy.values()):
                task.done.cancel()
            self._changed.notify_all()
        until = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    @property
    def waiting(self) -> int:
        """How many files are to be stored or deleted."""
        with self._changed:
            return sum(task.kind != "fetch" for task in (*self._tasks.values(), *self._busy.values()))

    # what the coordinator's thread asks

    def lasts(self, sha256: str) -> bool:
        """Whether the object store has the file; one that is only here is on its way there from now on."""
        with self._changed:
            if time.monotonic() - self._there.get(sha256, -math.inf) < self._trust_s:
                return True
            if self.has(sha256):
                self._want(sha256, "keep")
            return False

    def doubt(self, sha256: str) -> None:
        """Look anew whether the object store has a file."""
        with self._changed:
            self._there.pop(sha256, None)

    def delete(self, sha256: str) -> None:
        """Delete an object, now or when the object store is back."""
        with self._changed:
            self._there.pop(sha256, None)
            self._want(sha256, "delete")

    def leave_deletions(self) -> None:
        """Delete nothing that has not begun: another coordinator does from now on, and the file may come again meanwhile."""
        with self._changed:
            for task in [task for task in self._tasks.values() if task.kind == "delete"]:
                task.done.cancel()
                del self._tasks[task.sha256]

    def read_blocks(self, sha256: str, request: FileRequest) -> Iterator[tuple[int, bytes]]:
        """As of any file store; of a file that is not here now no block comes, and it is fetched until somebody asks again."""
        if not self.has(sha256):
            self._want(sha256, "fetch")
        yield from super().read_blocks(sha256, request)

    # what requests wait for

    async def secure(self, sha256: str) -> None:
        """Wait until the object store has a file that is here. Raises FilesAway where it does not take it now; it is tried again."""
        if not self.lasts(sha256) and self.has(sha256):
            await self._wait(self._want(sha256, "keep", at_once=True))

    def check(self, sha256: str) -> None:
        """Raise FilesAway where the object store does not have a file (any more)."""
        if not self.lasts(sha256):
            raise FilesAway(self._config.where, "the file was deleted meanwhile")

    async def bring(self, sha256: str) -> Path | None:
        """Return the place of a file, which is fetched first where it is not here; None where there is none. Raises FilesAway."""
        path = self.path(sha256)
        if self.has(sha256):
            return path
        return path if await self._wait(self._want(sha256, "fetch")) else None

    async def _wait(self, done: Future[bool]) -> bool:
        try:  # others may wait for the same
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(done)), WAIT_S)
        except asyncio.TimeoutError:
            raise FilesAway(self._config.where, f"it has not answered in {WAIT_S:.0f} s") from None
        except asyncio.CancelledError:
            if not done.cancelled():  # it is the request that ends
                raise
            raise FilesAway(self._config.where, "the file was deleted meanwhile, or the coordinator ends") from None

    def _want(self, sha256: str, kind: Literal["keep", "fetch", "delete"], *, at_once: bool = False) -> Future[bool]:
        """Have something done with a file, instead of what was to be done with it before; return the end of the next attempt."""
        with self._changed:
            task, busy = self._tasks.get(sha256), self._busy.get(sha256)
            if task is None and busy is not None and busy.kind == kind:
                return busy.done
            if task is not None and task.kind == "delete" and kind == "fetch":
                (nothing := Future[bool]()).set_result(False)
                return nothing
            if task is None or task.kind != kind:
                if task is not None:
                    task.done.cancel()
                task = self._tasks[sha256] = Task(sha256, kind)
            if at_once or kind == "fetch":
                task.at_once = True
                self._tasks.move_to_end(sha256, last=False)
            if self._end.is_set():
                task.done.cancel()
            self._changed.notify()
            return task.done

    # the threads

    def _work(self) -> None:
        while (task := self._next()) is not None:
            self._attempt(task)

    def _attempt(self, task: Task) -> None:
        try:
            with self._explained() as place:
                there = self._do(task, *place)
        except FilesAway as error:
            self._failed(task, error)
        else:
            self._succeeded(task, there)

    def _next(self) -> Task | None:
        """Wait for a task that is due, and take it; None at the end. No two threads work on one file."""
        with self._changed:
            while not self._end.is_set():
                left_s = self._again_at - time.monotonic()
                due = (task for task in self._tasks.values() if task.sha256 not in self._busy and (left_s <= 0 or task.at_once))
                if (task := next(due, None)) is not None:
                    self._busy[task.sha256] = self._tasks.pop(task.sha256)
                    task.since = time.monotonic()
                    return task
                self._changed.wait(left_s if left_s > 0 else None)
            return None

    @contextmanager
    def _explained(self) -> Iterator[tuple[AbstractFileSystem, str]]:
        """Give this thread's file system and the root of the objects; say what errors mean: every library raises what it likes."""
        own = self._own
        try:
            if own.system is None:
                import fsspec

                secrets = self._config.secrets
                own.secrets = secrets.values()
                options = deepcopy(self._config.options) | secrets  # some libraries write into what they get
                own.system, own.root = fsspec.core.url_to_fs(self._config.url, skip_instance_cache=True, **options)
            yield own.system, f"{own.root.rstrip('/')}/sha256"
        except Exception as error:
            own.system = None
            said = " ".join(f"{type(error).__name__}: {error}".split())
            for secret in own.secrets:
                said = said.replace(secret, "***")
            raise FilesAway(self._config.where, said[:LONGEST_SAID]) from error

    def _do(self, task: Task, system: AbstractFileSystem, root: str) -> bool:
        """Do a task; return whether the file is in the object store then."""
        place = f"{root}/{task.sha256}"
        match task.kind:
            case "keep":
                return self._keep(system, place, self.path(task.sha256))
            case "fetch":
                return self._fetch(system, place, task.sha256)
            case "delete":
                with suppress(FileNotFoundError):
                    system.rm_file(place)
                return False

    def _keep(self, system: AbstractFileSystem, place: str, file: Path) -> bool:
        """Store a file, unless it is there already; False where it is not here any more."""
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return False
        if _size(system, place) == size:
            return True
        try:
            system.put_file(str(file), place)
        except FileNotFoundError:  # a file system with directories, before its first file; never more than this one
            system.mkdir(place.rpartition("/")[0], create_parents=False)
            system.put_file(str(file), place)
        if (found := _size(system, place)) != size:
            raise OSError(f"{place} has {found} bytes after {size} were stored")
        return True

    def _fetch(self, system: AbstractFileSystem, place: str, sha256: str) -> bool:
        """Fetch a file; False where there is none. What was stored and is another file now is not taken."""
        part = self.incoming / f"fetched-{sha256}"
        try:
            system.get_file(place, str(part))
            if self.take(part, sha256):
                return True
        except FileNotFoundError:
            return False
        finally:
            part.unlink(missing_ok=True)
        with self._changed:
            self._there.pop(sha256, None)  # so that the right one takes its place when it comes again
        log.error("file_broken sha256=%s", sha256)
        raise OSError(f"{place} is another file; restore it")

    def _succeeded(self, task: Task, there: bool) -> None:
        with self._changed:
            del self._busy[task.sha256]
            self._failing.discard(task.sha256)
            self._again_at, self._pause_s = 0.0, RETRY_S
            doomed = task.sha256 in self._tasks and self._tasks[task.sha256].kind == "delete"
            if there and not doomed:
                self._there[task.sha256] = time.monotonic()
            elif doomed and task.kind == "fetch":
                with suppress(OSError):
                    self.remove(task.sha256)
            if self._away_since is not None and not self._failing:
                log.info("files_back where=%s away_s=%.1f", self._config.where, time.monotonic() - self._away_since)
                self._away_since = None
            self._changed.notify_all()
        with suppress(InvalidStateError):  # the coordinator ends
            task.done.set_result(there)
        if task.kind == "delete":
            self._deleted(task.sha256)

    def _failed(self, task: Task, error: FilesAway) -> None:
        """Have it tried again after a pause, unless something else is to be done by now. Who wants a file fetched asks again."""
        now = time.monotonic()
        with self._changed:
            del self._busy[task.sha256]
            if task.kind != "fetch":
                self._failing.add(task.sha256)
                if task.kind == "keep" or self._trust_s == math.inf:  # who leads then deletes what it finds doomed
                    self._tasks.setdefault(task.sha256, Task(task.sha256, task.kind))
                self._again_at, self._pause_s = now + self._pause_s, min(2 * self._pause_s, LONGEST_RETRY_S)
            if self._away_since is None or now - self._said >= SAY_S:
                log.warning("files_away error=%s", error)
                self._away_since, self._said = self._away_since or now, now
            self._changed.notify_all()
        with suppress(InvalidStateError):
            task.done.set_exception(error)

    def _tidy(self) -> None:
        while not self._end.wait(TIDY_S):
            with self._changed:
                since = [task.since for task in self._busy.values()]
            longest_s = time.monotonic() - min(since, default=time.monotonic())
            if longest_s >= SAY_S:  # a library may wait for long before it says so
                log.warning("files_slow count=%d longest_s=%.0f", len(since), longest_s)
            with suppress(OSError):
                self._evict()

    def _evict(self) -> None:
        """Delete the copies that were used least recently while they take more than the limit: of those that the object store has."""
        found, total = [], 0
        for file in self._root.iterdir():
            with suppress(FileNotFoundError):
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
                total += stat.st_size
        for used, size, file in sorted(found):
            if total <= self._config.cache_limit or time.time() - used < TIDY_S:
                return
            with self._changed:
                if file.name in self._there:
                    file.unlink(missing_ok=True)
                    total -= size


def _check(files: config.Files) -> None:
    """Raise where files can never be stored."""
    if find_spec("fsspec") is None:
        raise PackageMissing("fsspec", "files")
    import fsspec

    protocol = files.url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise PackageMissing("s3fs", "s3") if protocol == "s3" else FilesUnusable(files.where, str(error)) from None
    except ValueError as error:
        raise FilesUnusable(files.where, str(error)) from None
    _ = files.secrets  # ConfigInvalid now, not with every file


def _size(system: AbstractFileSystem, place: str) -> int | None:
    """The bytes of an object; None where there is none."""
    system.invalidate_cache()  # of lists that some libraries make and believe
    try:
        return int(system.info(place)["size"])
    except FileNotFoundError:
        return None
