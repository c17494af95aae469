"""Entries of the cache of quantised models, as directories: where they are, which are a model's, what they take. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from quantization.model_files import ModelFiles, weight_files

PART = ".part-"
"""Begins the names of entries that are being written."""


def models_of(cache: Path) -> Path:
    """Return the place of quantised models in the directory of a cache."""
    return cache / "models"


def stem(files: ModelFiles) -> str:
    """Return what the names of all entries of a model begin with, as its files are now: contents, sizes and times of change."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(files.path)]
    return hashlib.sha256(msgspec.json.encode([files.fingerprint, stats])).hexdigest()[:32]


def entries_of(files: ModelFiles, cache: Path) -> list[Path]:
    """Return the entries of a model in the directory of a cache, for whatever settings."""
    return sorted(models_of(cache).glob(f"{stem(files)}-*"))


def entry_bytes(entry: Path) -> int:
    """Return what an entry takes on disk."""
    return sum(file.stat().st_size for file in entry.iterdir())
