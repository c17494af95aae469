"""Files by their sha256, and how they travel: the receiver asks for a few blocks at a time and keeps what it has over restarts.

The same code stands at both ends: datasets go down to a node, adapters and reports come back.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from edge_agent.dataset import file_sha256
from edge_agent.errors import NO_SPACE, DatasetChecksum, DiskFull, Refused, StateUnusable
from edge_agent.files import link_file, write_file
from edge_agent.messages import BLOCK_BYTES, WINDOW_BLOCKS, FileRequest

SHA256 = re.compile("[0-9a-f]{64}")
RETRY_S, LONGEST_RETRY_S = 2.0, 60.0
MOST_MISMATCHES = 10


class FileStore:
    """Files named by their contents, in one directory. A name that is there has the right contents."""

    def __init__(self, root: Path) -> None:
        self._root, self.incoming = root / "sha256", root / "incoming"
        try:
            for directory in (self._root, self.incoming):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StateUnusable(root, error.strerror or type(error).__name__) from None

    def path(self, sha256: str) -> Path:
        """Return the place of a file. Raises Refused for a name that is no sha256: it may come from outside."""
        if not SHA256.fullmatch(sha256):
            raise Refused(f"{sha256[:80]!r} is no sha256")
        return self._root / sha256

    def has(self, sha256: str) -> bool:
        """Whether the file is there; being asked for counts as use."""
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return False
        return True

    def lasts(self, sha256: str) -> bool:
        """Whether the file is here for good, so that whoever has sent it may forget it."""
        return self.has(sha256)

    def doubt(self, sha256: str) -> None:
        """Look anew whether a file is here for good: it may have been deleted there."""

    def put(self, data: bytes, sha256: str) -> None:
        """Keep a small file. Raises DatasetChecksum where it is not the named one, DiskFull."""
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DatasetChecksum("the inline file", sha256, found)
        write_file(self.path(sha256), data)

    def adopt(self, file: Path) -> str:
        """Keep a finished file that nobody will change, and return its sha256."""
        sha256 = file_sha256(file)
        if not self.has(sha256):
            link_file(self.path(sha256), file)
        return sha256

    def take(self, part: Path, sha256: str) -> bool:
        """Move a received file to its place; False, with the part deleted, where it is not the named one."""
        if file_sha256(part) != sha256:
            part.unlink()
            return False
        link_file(self.path(sha256), part)
        part.unlink()
        return True

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def sweep(self, awaited: Collection[str]) -> None:
        """Delete what an end of the process has left of files that nobody awaits; called before anything comes."""
        for part in self.incoming.iterdir():
            if part.name.partition(".")[0] not in awaited or self.has(part.name.partition(".")[0]):
                part.unlink()

    def remove_old(self, needed: Collection[str], age_s: float) -> None:
        """Delete files that nobody needs and nobody has used for a time."""
        for file in self._root.iterdir():
            if file.name not in needed and time.time() - file.stat().st_mtime > age_s:
                file.unlink()

    def remove_unused(self, limit_bytes: int, needed: Collection[str]) -> None:
        """Delete the least recently used files over the limit, never one that is needed."""
        files = sorted(((f, f.stat()) for f in self._root.iterdir()), key=lambda pair: pair[1].st_mtime)
        total = sum(stat.st_size for _, stat in files)
        for file, stat in files:
            if total <= limit_bytes:
                return
            if file.name not in needed:
                file.unlink()
                total -= stat.st_size

    def read_blocks(self, sha256: str, request: FileRequest) -> Iterator[tuple[int, bytes]]:
        """Yield the (number, contents) of the blocks asked for; none where the file is not here."""
        if self.has(sha256):
            yield from read_blocks(self.path(sha256), request)


def read_blocks(file: Path, request: FileRequest) -> Iterator[tuple[int, bytes]]:
    """Yield the (number, contents) of the blocks asked for; none where the file is not here."""
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return
    with opened:
        size = os.fstat(opened.fileno()).st_size
        for number in request.blocks:
            if number * request.block_bytes < size:
                opened.seek(number * request.block_bytes)
                yield number, opened.read(request.block_bytes)


class Place(NamedTuple):
    """How far a file is, for a sender that goes through it from front to back."""

    size_bytes: int
    block_bytes: int
    offset: int
    """Of its first byte that has not come."""


class Incoming:
    """One file on its way here: its part, and a map with a byte for each block, 1 where it has come."""

    def __init__(self, store: FileStore, sha256: str, size_bytes: int, block_bytes: int, ask: Callable[[FileRequest], bool]) -> None:
        """`ask` sends a request for blocks and says whether it went out."""
        self.sha256, self._store, self._size_bytes, self._ask = sha256, store, size_bytes, ask
        self._block_bytes = min(BLOCK_BYTES, block_bytes)
        self._count = -(-size_bytes // self._block_bytes)
        for other in store.incoming.glob(f"{sha256}.*"):  # parts of another block size do not fit this map
            if not other.name.startswith(f"{sha256}.{self._block_bytes}."):
                other.unlink()
        self._part = store.incoming / f"{sha256}.{self._block_bytes}.part"
        self._map_file = self._part.with_suffix(".map")
        self._map = self._read_map()
        self._asked: set[int] = set()
        self._next_at, self._retry_s, self._mismatches = 0.0, RETRY_S, 0

    def _read_map(self) -> bytearray:
        if self._part.exists() and self._map_file.exists():
            found = bytearray(self._map_file.read_bytes())
            if len(found) == self._count:
                return found
        return self._new_map()

    def _new_map(self) -> bytearray:
        self._part.write_bytes(b"")
        self._map_file.write_bytes(bytes(self._count))
        return bytearray(self._count)

    @property
    def missing_blocks(self) -> int:
        return self._count - sum(self._map)

    @property
    def missing(self) -> FileRequest:
        """All blocks that have not come."""
        return FileRequest(self._block_bytes, [k for k in range(self._count) if not self._map[k]])

    @property
    def place(self) -> Place:
        first = self._map.find(0)
        return Place(self._size_bytes, self._block_bytes, self._size_bytes if first < 0 else first * self._block_bytes)

    @property
    def mistaken(self) -> bool:
        """Whether what came has been another file before."""
        return self._mismatches > 0

    def tick(self, now: float | None = None) -> bool:
        """Ask for the next window if the last one has come, or again if it stays away. True once the file is in the store.

        Raises DatasetChecksum where the other side sends another file again and again.
        """
        now = time.monotonic() if now is None else now
        if self._store.has(self.sha256):  # it has come on another way
            self.discard()
            return True
        if self._mismatches >= MOST_MISMATCHES:
            self.discard()
            raise DatasetChecksum("what came in blocks", self.sha256, "another each time")
        if not self._part.exists():
            self._map, self._asked = self._new_map(), set()
        if not self.missing_blocks:
            return self._finish(now)
        if (self._asked or self._mismatches) and now < self._next_at:
            return False
        if self._asked:
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        window = self.missing.blocks[:WINDOW_BLOCKS]
        if self._ask(FileRequest(self._block_bytes, window)):
            self._asked, self._next_at = set(window), now + self._retry_s
        return False

    def ask_again(self) -> None:
        """The link is new: what was asked for on the old one is not awaited any more."""
        self._asked, self._retry_s, self._next_at = set(), RETRY_S, 0.0

    def receive(self, number: int, block: bytes) -> bool:
        """Keep a block; a foreign or repeated one changes nothing. True once the file is in the store. Raises DiskFull."""
        if number >= self._count or self._map[number] or len(block) != self._length(number) or not self._part.exists():
            return False
        try:
            with self._part.open("r+b") as file:
                file.seek(number * self._block_bytes)
                file.write(block)
            with self._map_file.open("r+b") as file:
                file.seek(number)
                file.write(b"\1")
            self._map[number] = 1
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(str(self._part), self._size_bytes) from error
            raise
        self._asked.discard(number)
        self._retry_s = RETRY_S
        return not self._asked and self.tick()

    def _length(self, number: int) -> int:
        return min(self._block_bytes, self._size_bytes - number * self._block_bytes)

    def _finish(self, now: float) -> bool:
        if self._store.take(self._part, self.sha256):
            self._map_file.unlink(missing_ok=True)
            return True
        self._map, self._asked = self._new_map(), set()
        self._mismatches, self._next_at = self._mismatches + 1, now + RETRY_S
        return False

    def discard(self) -> None:
        """Delete what has come."""
        self._part.unlink(missing_ok=True)
        self._map_file.unlink(missing_ok=True)
