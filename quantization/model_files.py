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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
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
    """sha256 over config.json, the tokenizer's files, and of each weight file the header and 256 KiB taken evenly from it."""

    @property
    def context_tokens(self) -> int:
        """Longest sequence the model takes."""
        config = self.config.get("text_config") or self.config
        limit = config.get("max_position_embeddings") or config.get("n_positions")
        return limit if isinstance(limit, int) else 2**31


def find_model(name: str, *, weights: bool = True) -> ModelFiles:
    """Return the files of a local directory, or of a model id in the local Hugging Face cache.

    Without `weights` one will do whose weights are not there, or not all of them; then no tensor is known. Raises ModelMissing, ModelUnsafe
    (pickled weights only, or code of its own) or ModelUnsupported (broken files, or quantised ones).
    """
    path = _directory(name)
    config_bytes, config = _configuration(name, path)
    if (path / "adapter_config.json").exists():
        raise ModelUnsupported(name, "it is an adapter, or has one beside its weights; give the directory of the base model alone")
    files = weight_files(path)
    if not weights and not all(file.is_file() for file in files):
        files = []
    if not files and any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise ModelUnsafe(name, "it has pickled weights only, and unpickling runs code")
    if not files and weights:
        raise ModelMissing(name, f"there are no *.safetensors in {path}")
    digest = hashlib.sha256(config_bytes)
    tensors: list[Tensor] = []
    for file in files:
        header = _header(name, file)
        digest.update(file.name.encode() + b"\0" + header + _sampled_bytes(file))
        tensors += _tensors(name, file, header)
    for text in _TOKENIZER_FILES:
        digest.update((path / text).read_bytes() if (path / text).is_file() else b"\0")
    return ModelFiles(name, path, config, tuple(tensors), digest.hexdigest())


def _configuration(name: str, path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return config.json as it is written, and what it says of a model that may be loaded."""
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
    if config.get("quantization_config"):
        raise ModelUnsupported(
            name, "its weights are stored quantised (quantization_config in its config.json); give the unquantised model"
        )
    return config_bytes, config


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


def weight_files(path: Path) -> list[Path]:
    """The files that transformers loads: those of the index, else the one of the usual name, else all."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        try:
            names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
        except msgspec.MsgspecError as error:
            raise ModelUnsupported(str(path), f"its {index.name} is broken ({error}); fetch the model again") from None
        return [path / Path(n).name for n in sorted(names)]
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


def _sampled_bytes(file: Path) -> bytes:
    size, parts = file.stat().st_size, []
    with file.open("rb") as stream:
        for k in range(64):
            stream.seek(max(0, size - 4096) * k // 63)
            parts.append(stream.read(4096))
    return b"".join(parts)


def _header(name: str, file: Path) -> bytes:
    """The JSON header of a safetensors file: 8 bytes of length, then the text."""
    if not file.is_file():
        raise ModelMissing(name, f"{file.name} is missing")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    if len(header) != length or not header.startswith(b"{"):
        raise ModelUnsupported(name, f"{file.name} is cut off or no safetensors file; fetch the model again")
    return header


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _tensors(name: str, file: Path, header: bytes) -> list[Tensor]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries = {k: msgspec.json.decode(v, type=_Entry) for k, v in raw.items() if k != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ModelUnsupported(name, f"the header of {file.name} is broken; fetch the model again") from None
    if file.stat().st_size < 8 + len(header) + max((e.data_offsets[1] for e in entries.values()), default=0):
        raise ModelUnsupported(name, f"{file.name} is cut off; fetch the model again")
    return [Tensor(k, e.shape, e.data_offsets[1] - e.data_offsets[0]) for k, e in entries.items()]
