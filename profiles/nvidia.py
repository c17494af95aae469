"""What NVML tells of one NVIDIA GPU: the one that PyTorch takes. On a Jetson it is missing, or knows a name and nothing else.

PyTorch takes the first that CUDA shows it, and CUDA goes by the environment, which NVML does not. Both count in the order of the bus, as
nvidia-smi does, once `see_one` was called or `edge_agent.__main__` imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pynvml

from profiles.host import Machine

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
"""Name the environment's variables by which CUDA chooses."""
BUS_ORDER = "PCI_BUS_ID"


@dataclass(frozen=True)
class Gpu:
    """What detection needs to know."""

    name: str
    total_bytes: int | None
    """None where the driver does not tell, as on shared memory."""
    uuid: str | None = None
    minor: int | None = None
    """Number of its device file."""


@contextmanager
def opened() -> Iterator[Any]:
    """Lend the handle of the GPU that PyTorch takes.

    It is the first that the environment names, and where it names none the one with the most memory. Raises pynvml.NVMLError.
    Within another one it costs nothing: NVML counts who uses it.
    """
    with _nvml():
        yield _chosen()


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _chosen() -> Any:
    named = os.environ.get(VISIBLE)
    first = None if named is None else named.partition(",")[0].strip()
    if first is None:
        return max(_handles(), key=lambda handle: _total_bytes(handle) or 0, default=None) or _missing()
    if first.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):  # CUDA takes the beginning of one for the whole
        return next((handle for handle in _handles() if (_uuid(handle) or "").startswith(first)), None) or _missing()
    if first.isascii() and first.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(first))
    return _missing()


def _missing() -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def _handles() -> list[Any]:
    """Those of all GPUs that this process may ask, in the order of the bus."""
    handles = []
    for index in range(_told(lambda _: pynvml.nvmlDeviceGetCount(), None) or 1):
        with suppress(pynvml.NVMLError):
            handles.append(pynvml.nvmlDeviceGetHandleByIndex(index))
    return handles


def _told(question: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return question(handle)
    except pynvml.NVMLError:
        return None


def _uuid(handle: Any) -> str | None:
    uuid = _told(pynvml.nvmlDeviceGetUUID, handle)
    return None if uuid is None else str(uuid)


def _total_bytes(handle: Any) -> int | None:
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return None if memory is None else int(memory.total)


def _minor(handle: Any) -> int | None:
    """Of an instance (MIG) that of the GPU it is a part of."""
    whole = _told(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) if (_uuid(handle) or "").startswith("MIG-") else handle
    minor = None if whole is None else _told(pynvml.nvmlDeviceGetMinorNumber, whole)
    return None if minor is None else int(minor)


def _describe(handle: Any) -> Gpu:
    return Gpu(str(pynvml.nvmlDeviceGetName(handle)), _total_bytes(handle), _uuid(handle), _minor(handle))


def find_gpu() -> Gpu | None:
    """Return the GPU that PyTorch takes, or None without one."""
    try:
        with opened() as handle:
            return _describe(handle)
    except pynvml.NVMLError:
        return None


def all_gpus() -> list[Gpu]:
    """Return all of this machine, whatever the environment shows of them to PyTorch."""
    try:
        with _nvml():
            return [_describe(handle) for handle in _handles()]
    except pynvml.NVMLError:
        return []


def see_one(uuid: str | None = None) -> None:
    """Have PyTorch, here and in processes that are started from here, see one GPU alone: this one, or the one that NVML would be asked of.

    To be called before PyTorch is imported. On a machine with one GPU nothing has to be said.
    """
    os.environ[ORDER] = BUS_ORDER
    if uuid is None and len(all_gpus()) > 1 and (gpu := find_gpu()) is not None:
        uuid = gpu.uuid
    if uuid is not None:
        os.environ[VISIBLE] = uuid


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
