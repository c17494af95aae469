"""Byte strings of known lengths in one file, written in any order and more than once: what only the end of a run needs takes no memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from edge_agent.errors import NO_SPACE, DiskFull
from edge_agent.files import flush

WRITTEN = b"\x01"
"""Stands before a byte string that is whole."""


class Slots:
    """Places in a file, of the same lengths in every turn. What an earlier run has written there with the same lengths is there."""

    def __init__(self, path: Path, lengths: Iterable[int]) -> None:
        self._path = path
        self._starts = array("Q", accumulate((len(WRITTEN) + length for length in lengths), initial=0))
        path.touch(mode=0o600)

    def write(self, slot: int, data: bytes, turn: int = 0) -> None:
        """Put a byte string of the slot's length in its place. Raises DiskFull."""
        start, length = self._place(slot, turn)
        if len(data) != length:
            raise ValueError(f"{len(data)} bytes do not fill the {length} of slot {slot}")
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

    def read(self, slot: int, turn: int = 0) -> bytes | None:
        """Return a byte string, None where it was not written."""
        start, length = self._place(slot, turn)
        with self._path.open("rb") as file:
            file.seek(start)
            found = file.read(len(WRITTEN) + length)
        return found[len(WRITTEN) :] if found.startswith(WRITTEN) and len(found) == len(WRITTEN) + length else None

    def _place(self, slot: int, turn: int) -> tuple[int, int]:
        """Return where a slot begins, and its length."""
        return turn * self._starts[-1] + self._starts[slot], self._starts[slot + 1] - self._starts[slot] - len(WRITTEN)
