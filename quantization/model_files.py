"""Finds a model on this machine and reads what its files say of it, without loading a weight. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.errors import ModelMissing, ModelUnsafe, ModelUnsupported

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Tensor:
    """A weight as its file declares it."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFiles:
    """A model directory: its configuration, its tensors, and a fingerprint of both."""

    name: str
    path: Path
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]
    fingerprint: str
    """sha256 over config.json and the headers of the weight files."""

    @property
    def context_tokens(self) -> int:
        """Longest sequence the model takes."""
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 2**31)


def find_model(name: str) -> ModelFiles:
    """Return the files of a local directory, or of a model id in the local Hugging Face cache.

    Raises ModelMissing, ModelUnsafe (pickled weights only, or code of its own) or ModelUnsupported (broken files).
    """
    path = _directory(name)
    try:
        config_bytes = (path / "config.json").read_bytes()
        config = json.loads(config_bytes)
    except FileNotFoundError:
        raise ModelMissing(name, f"there is no config.json in {path}") from None
    except ValueError as error:
        raise ModelUnsupported(name, f"its config.json is broken ({error}); fetch the model again") from None
    if not isinstance(config, dict):
        raise ModelUnsupported(name, "its config.json holds no object; fetch the model again")
    if config.get("auto_map"):
        raise ModelUnsafe(name, "it brings Python code of its own (auto_map), which is never run")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if any(next(path.glob(pattern), None) for pattern in _PICKLES):
            raise ModelUnsafe(name, "it has pickled weights only, and unpickling runs code")
        raise ModelMissing(name, f"there are no *.safetensors in {path}")
    digest = hashlib.sha256(config_bytes)
    tensors: list[Tensor] = []
    for file in files:
        header = _header(name, file)
        digest.update(file.name.encode() + b"\0" + header)
        tensors += _tensors(header)
    return ModelFiles(name, path, config, tuple(tensors), digest.hexdigest())


def _directory(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelMissing(name, "there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise ModelMissing(name, "it is neither a directory nor in the local Hugging Face cache") from None


def _header(name: str, file: Path) -> bytes:
    """The JSON header of a safetensors file: 8 bytes of length, then the text."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    if len(header) != length or not header.startswith(b"{"):
        raise ModelUnsupported(name, f"{file.name} is cut off or no safetensors file; fetch the model again")
    return header


class _Entry(msgspec.Struct):
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _tensors(header: bytes) -> list[Tensor]:
    raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    entries = {k: msgspec.json.decode(v, type=_Entry) for k, v in raw.items() if k != "__metadata__"}
    return [Tensor(k, e.shape, e.data_offsets[1] - e.data_offsets[0]) for k, e in entries.items()]
