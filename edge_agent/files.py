"""Files that are there whole or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from errno import EISDIR
from pathlib import Path
from typing import IO

from edge_agent.errors import NO_SPACE, DirectoryUnusable, DiskFull, StateUnusable


def write_file(path: Path, data: bytes | Iterable[bytes], private: bool = False) -> None:
    """Replace `path` atomically by bytes or parts of them; a private file is its owner's only.

    Raises DiskFull, leaving the old file and nothing else.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if private:
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)
        _write_flushed(part, data)
        part.replace(path)
        flush(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), len(data) if isinstance(data, bytes) else None) from error
        raise


def check_writable(path: Path) -> None:
    """Make the directory of a file to write later, and raise DirectoryUnusable where it could not be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise DirectoryUnusable(path, error.strerror or type(error).__name__) from None


def write_directory(path: Path, contents: Mapping[str, bytes]) -> None:
    """Replace a directory of files. Raises DiskFull, leaving the old directory and nothing else."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for name, data in contents.items():
            _write_flushed(part / name, data)
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
        flush(path.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), sum(map(len, contents.values()))) from error
        raise


def copy_file(path: Path, source: Path) -> None:
    """Put a copy of `source` at `path` atomically. Raises DiskFull."""
    part = path.with_name(f".{path.name}.part")
    try:
        shutil.copyfile(source, part)
        flush(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), source.stat().st_size) from error
        raise


def link_file(path: Path, source: Path) -> None:
    """Put the contents of `source`, which nobody changes, at `path` atomically: as a hard link where the file system can."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            part.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, part)
            flush(part)
        part.replace(path)
        part.unlink(missing_ok=True)  # renaming a link over another link of the same file leaves both
        flush(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), source.stat().st_size) from error
        raise


def lock_file(path: Path) -> IO[str] | None:
    """Open and lock a file exclusively; None where another process holds it. The kernel frees it with the last copy of the handle."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def lock_state(directory: Path) -> IO[str]:
    """Make a state directory that only its owner can enter, and take it for this process. Raises StateUnusable."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if directory.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StateUnusable(directory, f"others than its owner can enter it; run `chmod 700 {directory}`, or give another one")
        lock = lock_file(directory / "process.lock")
    except OSError as error:
        raise StateUnusable(directory, f"{error.strerror}; give another state_directory or mend its permissions") from None
    if lock is None:
        raise StateUnusable(directory, "another process works in it; stop that one, or give this one a directory of its own")
    return lock


def _write_flushed(path: Path, data: bytes | Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
