"""What NVML tells of the first NVIDIA GPU. On a Jetson it is missing, or knows a name and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from profiles.host import Machine


@dataclass(frozen=True)
class Gpu:
    """What detection needs to know."""

    name: str
    total_bytes: int | None
    """None where the driver does not tell, as on shared memory."""


@contextmanager
def opened() -> Iterator[Any]:
    """Lend the handle of the first GPU. Raises pynvml.NVMLError. Within another one it costs nothing: NVML counts who uses it."""
    pynvml.nvmlInit()
    try:
        yield pynvml.nvmlDeviceGetHandleByIndex(0)
    finally:
        pynvml.nvmlShutdown()


def find_gpu() -> Gpu | None:
    """Return the first GPU, or None without one."""
    try:
        with opened() as handle:
            name = str(pynvml.nvmlDeviceGetName(handle))
            try:
                return Gpu(name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            except pynvml.NVMLError:
                return Gpu(name, None)
    except pynvml.NVMLError:
        return None


def _ask(question: Callable[[Any], float]) -> float:
    with opened() as handle:
        return float(question(handle))


def free_bytes(_: Machine) -> float:
    """Memory of the GPU that nobody has."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).free)


def total_bytes(_: Machine) -> float:
    """Memory of the GPU."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).total)


def utilisation_percent(_: Machine) -> float:
    """Share of the last sample period of the driver in which a kernel ran."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)


def temperature_c(_: Machine) -> float:
    """Of the chip."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU))


def power_w(_: Machine) -> float:
    """Of the whole board."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000)


def energy_j(_: Machine) -> float:
    """Of the whole board since the driver was loaded; GPUs since Volta count it."""
    return _ask(lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)
