"""Byte strings of known lengths in one file, written in any order and more than once: what only the end of a run needs takes no memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

from edge_agent.errors import NO_SPACE, DiskFull
from edge_agent.files import flush

K = TypeVar("K", bound=Hashable)
WRITTEN = b"\x01"
"""Stands before a byte string that is whole."""


class Slots(Generic[K]):
    """A place in a file for the byte string of each key. Those of an earlier run with the same keys and lengths are there."""

    def __init__(self, path: Path, lengths: Iterable[tuple[K, int]]) -> None:
        self._path = path
        slots = list(lengths)
        starts = accumulate((len(WRITTEN) + length for _, length in slots), initial=0)
        self._places = {key: (start, length) for (key, length), start in zip(slots, starts, strict=False)}
        path.touch(mode=0o600)

    def write(self, key: K, data: bytes) -> None:
        """Put a byte string of its key's length in its place. Raises DiskFull."""
        start, length = self._places[key]
        if len(data) != length:
            raise ValueError(f"{key}: {len(data)} bytes do not fill {length}")
        try:
            with self._path.open("r+b") as file:
                file.seek(start + len(WRITTEN))
                file.write(data)
                file.seek(start)
                file.write(WRITTEN)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(str(self._path), length) from error
            raise

    def flush(self) -> None:
        """Wait until all is on disk."""
        flush(self._path)

    def read(self, key: K) -> bytes | None:
        """Return a byte string, None where it was not written."""
        start, length = self._places[key]
        with self._path.open("rb") as file:
            file.seek(start)
            found = file.read(len(WRITTEN) + length)
        return found[len(WRITTEN) :] if found[: len(WRITTEN)] == WRITTEN and len(found) == len(WRITTEN) + length else None
