"""Files that are there whole or not at all: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from edge_agent.errors import NO_SPACE, DiskFull


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` atomically. Raises DiskFull, leaving the old file and nothing else."""
    part = path.with_name(f".{path.name}.part")
    try:
        _write_flushed(part, data)
        part.replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), len(data)) from error
        raise


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
        _flush_directory(path.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno in NO_SPACE:
            raise DiskFull(str(path), sum(map(len, contents.values()))) from error
        raise


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
