"""A driver as NVML shows it, of a host with several GPUs: what it answers of each, and to whom it does not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

SMALL = "GPU-11111111-2222-3333-4444-555555555555"
LARGE = "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
TWIN = "GPU-aaaaaaaa-bbbb-cccc-dddd-ffffffffffff"
MIG = "MIG-99999999-2222-3333-4444-555555555555"


@dataclass(eq=False)
class Card:
    """One GPU, or an instance of `whole`."""

    name: str
    mib: int
    uuid: str
    minor: int
    free_mib: int = 0
    celsius: int = 40
    whole: Card | None = None


@dataclass
class Driver:
    """Answers as NVML does: in the order of the bus, whatever the environment says."""

    cards: Sequence[Card] = field(
        default_factory=lambda: (
            Card("NVIDIA GeForce GT 1030", 2_048, SMALL, 1, 1_000, 31),
            Card("NVIDIA GeForce RTX 4090", 24_564, LARGE, 0, 20_000, 62),
            Card("NVIDIA GeForce RTX 4090", 24_564, TWIN, 2, 23_000, 63),
        )
    )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the driver's place, and let nothing of the environment choose a GPU."""
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.setenv(name, "")  # what the test's process had comes back after it
            del os.environ[name]
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: sum(not c.whole for c in self.cards),
            "nvmlDeviceGetHandleByIndex": self._by_index, "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetName": lambda card: card.name, "nvmlDeviceGetUUID": lambda card: card.uuid,
            "nvmlDeviceGetMinorNumber": self._minor, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda card: card.whole,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=card.mib * 2**20, free=card.free_mib * 2**20),
            "nvmlDeviceGetTemperature": lambda card, _: card.celsius,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    def _by_index(self, index: int) -> Card:
        cards = [card for card in self.cards if not card.whole]
        if index >= len(cards):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return cards[index]

    def _by_uuid(self, uuid: str) -> Card:
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _minor(self, card: Card) -> int:
        if card.whole:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.minor
