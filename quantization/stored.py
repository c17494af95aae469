"""Weights as they lie in safetensors files, read one by one when they are asked for; transformers takes them in the place of tensors.

No file is mapped into memory: mapped pages would count against the budget of a process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import EllipsisType
from typing import Any

import msgspec
import torch
from safetensors import safe_open

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DIGESTS = "sha256"
"""Names the entry of a file's metadata that holds the digests of its weights, where there is one."""


class Damaged(ValueError):
    """A weight is not what was written."""


class StoredTensor:
    """A weight in a file. Raises Damaged when it is read and its digest is another."""

    def __init__(self, opened: Any, file: Path, name: str, sha256: str | None = None) -> None:
        self.file, self.name = file, name
        self._opened, self._declared, self._sha256 = opened, opened.get_slice(name), sha256

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._declared.get_shape())

    @property
    def float_type(self) -> torch.dtype | None:
        """The type of its numbers, None for one that no layer computes with."""
        return FLOATS.get(self._declared.get_dtype())

    def get_dtype(self) -> str:
        """Return its type as safetensors calls it."""
        return str(self._declared.get_dtype())

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, whole: EllipsisType) -> torch.Tensor:
        """Read all of it."""
        tensor: torch.Tensor = self._opened.get_tensor(self.name)
        if self._sha256 is not None and digest(tensor) != self._sha256:
            raise Damaged(f"{self.name} of {self.file} is damaged")
        return tensor

    def start(self) -> int:
        """Return where in the file it begins."""
        with self.file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entry = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])[self.name]
        return 8 + length + msgspec.json.decode(entry, type=_Entry).data_offsets[0]


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the weights of safetensors files by their names."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        opened: Any = safe_open(file, framework="pt", device="cpu", backend="pread")
        digests = msgspec.json.decode((opened.metadata() or {}).get(DIGESTS, "{}"), type=dict[str, str])
        found |= {name: StoredTensor(opened, file, name, digests.get(name)) for name in opened.keys()}  # noqa: SIM118
    return found
