"""A directory that is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from edge_agent.errors import NO_SPACE, DirectoryUnusable, DiskFull
from edge_agent.files import flush


@contextmanager
def made(out: Path) -> Iterator[Path]:
    """Lend a directory that takes the place `out` at the end. Raises DirectoryUnusable, DiskFull."""
    out = out.absolute()
    part = out.with_name(f".{out.name}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DirectoryUnusable(out, "it is there already")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            flush(file)
        part.replace(out)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(str(out)) from error
        raise DirectoryUnusable(out, error.strerror or str(error)) from None
    except SafetensorError as error:  # in which its writer wraps what the system says
        if "No space left" in str(error):
            raise DiskFull(str(out)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
