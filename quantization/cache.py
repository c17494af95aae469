"""Quantised models on disk: a model that has been loaded once is read as it lies in memory the next time, in a quarter of the bytes.

An entry is a directory of safetensors files, written beside its place and renamed. Every weight has a digest that is checked when it is
read. What is wrong with an entry costs time, never a job.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import msgspec
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from edge_agent.config import CACHE_LIMIT, CACHE_LIMIT_VARIABLE, CACHE_VARIABLE
from edge_agent.sizes import parse_size
from quantization.entries import PART, entry_bytes, models_of, stem
from quantization.model_files import ModelFiles
from quantization.stored import DIGESTS, StoredTensor, digest, stored_tensors

log = logging.getLogger(__name__)

FORMAT = 1
FILE_BYTES = 256 * 2**20
"""Weights of one file, so that on a GPU as much is copied to the host at once."""
SPARE_DISK_BYTES = 2**30
"""What writing an entry leaves free."""
ABANDONED_S = 24 * 3600.0


@dataclass(frozen=True)
class ModelCache:
    """Entries in a directory, the least recently used of which go when they are more than `limit_bytes`."""

    directory: Path
    limit_bytes: int

    def key(self, files: ModelFiles, **settings: object) -> str:
        """Return the name of the entry for a model as its files are now, for settings, and for the libraries in use."""
        versions = FORMAT, str(torch.__version__), transformers.__version__, bitsandbytes.__version__
        return f"{stem(files)}-{hashlib.sha256(msgspec.json.encode([versions, sorted(settings.items())])).hexdigest()[:32]}"

    def read(self, key: str) -> dict[str, StoredTensor] | None:
        """Return the weights of an entry; None where there is none that can be read."""
        place = self.directory / key
        try:
            os.utime(place)
            found = stored_tensors(sorted(place.iterdir()))
        except (OSError, SafetensorError, msgspec.MsgspecError):
            found = {}
        if not found:
            self.discard(key)
        return found or None

    def discard(self, key: str) -> None:
        """Throw an entry away, if there is one."""
        place = self.directory / key
        if place.exists():
            log.warning("model_cache_damaged entry=%s", place)
            shutil.rmtree(place, ignore_errors=True)

    def write(self, key: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep the weights of a loaded model, where there is room for them."""
        size_bytes = sum(_bytes(weight) for weight in weights.values())
        if size_bytes > self.limit_bytes:
            log.info("model_cache_too_small bytes=%d limit=%d", size_bytes, self.limit_bytes)
            return
        part = None
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(size_bytes)
            if shutil.disk_usage(self.directory).free < size_bytes + SPARE_DISK_BYTES:
                log.warning("model_cache_disk_full directory=%s bytes=%d", self.directory, size_bytes)
                return
            part = Path(tempfile.mkdtemp(prefix=PART, dir=self.directory))
            for number, group in enumerate(_groups(weights)):
                digests = msgspec.json.encode({name: digest(weight) for name, weight in group.items()}).decode()
                save_file(group, part / f"{number:05}.safetensors", {"format": "pt", DIGESTS: digests})
            part.rename(self.directory / key)
        except (OSError, SafetensorError) as error:
            if not (self.directory / key).exists():  # otherwise another process was first
                log.warning("model_cache_unwritten directory=%s error=%s", self.directory, error)
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
        else:
            log.info("model_cache_written entry=%s bytes=%d", key, size_bytes)

    def _make_room(self, size_bytes: int) -> None:
        """Remove the least recently used entries until so much may be added, and what an ended process has left."""
        entries = []
        for place in self.directory.iterdir():
            with suppress(OSError):
                used = place.stat().st_mtime
                if not place.name.startswith(PART):
                    entries.append((used, entry_bytes(place), place))
                elif used < time.time() - ABANDONED_S:
                    shutil.rmtree(place, ignore_errors=True)
        held = sum(held for _, held, _ in entries)
        for _, freed, place in sorted(entries):
            if held + size_bytes <= self.limit_bytes:
                break
            shutil.rmtree(place, ignore_errors=True)
            held -= freed


def find_cache() -> ModelCache | None:
    """Return the cache that the environment names, else that of the user; None where its limit is 0."""
    given = os.environ.get(CACHE_LIMIT_VARIABLE)
    limit_bytes = CACHE_LIMIT if given is None else parse_size(given, CACHE_LIMIT_VARIABLE)
    named = os.environ.get(CACHE_VARIABLE)
    of_user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(named) if named else Path(of_user).expanduser() / "edge-agent"
    return ModelCache(models_of(directory), limit_bytes) if limit_bytes > 0 else None


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a model without those that are another one's as well."""
    tied = tuple(model.all_tied_weights_keys)
    return {
        name: weight for name, weight in model.state_dict().items() if not any(name == t or name.startswith(f"{t}.") for t in tied)
    }  # fmt: skip


def _groups(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights on the host, in groups of about `FILE_BYTES`."""
    group: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if group and sum(map(_bytes, group.values())) + _bytes(weight) > FILE_BYTES:
            yield group
            group = {}
        group[name] = weight.detach().cpu().contiguous()
    yield group


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()
