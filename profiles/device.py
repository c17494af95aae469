"""What a device can do: the declared profiles, which of them this machine is, and what is free on it now. Imports no torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import pynvml

from edge_agent.errors import DeviceMissing, ProfileUnknown
from profiles import jetson, nvidia
from profiles.host import HERE, Machine, available_bytes

MEMORY_TOLERANCE = 0.1
"""A GPU whose memory differs by more from that of a profile of its name is another variant of it."""
FILE_PAGES_BYTES = 8 * 2**20
"""Of a budget, for pages of files, programs among them, which come without an allocation that could be refused."""
CUDA_LIBRARIES_BYTES = 370_000_000
"""What PyTorch's build with CUDA takes beyond the one for processors, on a processor too: its libraries once they are loaded."""
GIVE_ANOTHER = "give the `device` of the configuration as `nvidia-smi -L` says it"
GENERIC = ("jetson", "cuda", "cpu")
"""Profiles of any device of a kind, in the order in which they are tried."""


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of `profiles/devices/`."""

    title: str
    """Name of the device for people."""
    kind: Literal["cpu", "discrete", "unified"]
    """Where the model lives: host memory, a GPU's own memory, or memory that GPU and host share."""
    memory_bytes: int | None = None
    """Of the device; None where only the machine can tell."""
    compute_dtype: Literal["float32", "bfloat16"]
    overhead_bytes: int
    """Memory of a trainer that has loaded no model yet."""
    context_bytes: int | None = None
    """Of that, on shared memory, CUDA's context and workspaces, which nothing there shows; the rest is the process's own, and measured."""
    learned_bytes: dict[str, int] = {}
    """Of stages, what they took beyond all that can be counted, as finished jobs have shown (profiles/calibration.py); empty in files."""
    spread_bytes: int = 0
    """By how much jobs have taken more than that; 0 in files."""
    reserve_bytes: int
    """Memory that admission leaves to others."""
    bandwidth_bytes_per_s: int | None = None
    """Of the memory, as its vendor states it; None where only the machine can tell."""
    nvml_name: str | None = None
    """Pattern of the whole name that the NVIDIA driver reports."""
    board: str | None = None
    """Pattern of a part of the device tree's model."""
    source: dict[str, str]
    """Where each figure is from."""

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """The device as PyTorch, jobs and messages name it."""
        return "cpu" if self.kind == "cpu" else "cuda"

    @property
    def file_pages_bytes(self) -> int:
        """What the cap on the host leaves for pages of files (profiles/memory.py)."""
        return 0 if self.kind == "discrete" else FILE_PAGES_BYTES

    @property
    def unseen_bytes(self) -> int:
        """Of a trainer's memory, what is declared because nothing shows it."""
        if self.kind == "cpu":
            return 0
        return self.overhead_bytes if self.context_bytes is None else self.context_bytes

    @property
    def spare_bytes(self) -> int:
        """Of a budget, what no stage is to be planned with."""
        return self.file_pages_bytes + self.spread_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of one number in the compute type."""
        return 4 if self.compute_dtype == "float32" else 2

    def beyond_bytes(self, stage: str) -> int:
        """Return what to plan a stage with beyond all that can be counted; a stage that no job has shown takes the most of the others."""
        return self.learned_bytes.get(stage, max(self.learned_bytes.values(), default=self.overhead_bytes))


def profile_names() -> list[str]:
    """Return the names of all profiles: first those of one device, then those of any device of a kind."""
    names = {file.name.removesuffix(".toml") for file in (files("profiles") / "devices").iterdir() if file.name.endswith(".toml")}
    return [*sorted(names - {*GENERIC}), *GENERIC]


def device_profile(name: str) -> DeviceProfile:
    """Return a declared profile; that of a processor with the overhead of the PyTorch that is installed here. Raises ProfileUnknown."""
    if name not in (known := profile_names()):
        raise ProfileUnknown(name, known)
    profile = msgspec.toml.decode((files("profiles") / "devices" / f"{name}.toml").read_bytes(), type=DeviceProfile)
    if profile.kind == "cpu" and _has_cuda_libraries():
        return msgspec.structs.replace(profile, overhead_bytes=profile.overhead_bytes + CUDA_LIBRARIES_BYTES)
    return profile


def _has_cuda_libraries() -> bool:
    """Whether PyTorch is installed in its build with CUDA. It is not imported for that."""
    found = find_spec("torch")
    return found is not None and found.origin is not None and (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists()


def detect_profile(wanted: str = "auto", machine: Machine = HERE) -> DeviceProfile:
    """Return the profile of this machine: `auto` takes a GPU where there is one. Raises DeviceMissing where `cuda` is wanted in vain.

    The board comes first: a Jetson's NVML may be missing, or know no more than a name.
    """
    if wanted != "cpu":
        for profile in map(device_profile, profile_names()):
            if profile.board and re.search(profile.board, jetson.board(machine)):
                return profile
        if gpu := nvidia.find_gpu():
            return profile_of_gpu(gpu)
        if wanted == "cuda":
            shown = f" that {nvidia.VISIBLE}={os.environ[nvidia.VISIBLE]} shows" if nvidia.VISIBLE in os.environ else ""
            raise DeviceMissing(f"NVML finds none{shown}, and the device tree tells of no Jetson")
    return device_profile("cpu")


def take_device(wanted: str) -> DeviceProfile:
    """Return the profile of what a configuration names: `auto`, `cpu`, `cuda`, or a GPU by its UUID. All that starts here sees that alone.

    To be called before PyTorch is imported. Raises DeviceMissing, with the GPUs that there are where that one is not.
    """
    if wanted == "cpu":
        return device_profile("cpu")
    uuid = wanted if wanted.startswith("GPU-") else None
    there = nvidia.all_gpus() if uuid else []
    if uuid and uuid not in {gpu.uuid for gpu in there}:
        known = ", ".join(f"{gpu.uuid} ({gpu.name})" for gpu in there)
        raise DeviceMissing(f"{uuid} is not there, {f'there are {known}' if known else 'NVML finds none'}", GIVE_ANOTHER)
    nvidia.see_one(uuid)
    return detect_profile("cuda" if uuid else wanted)


def profile_of_gpu(gpu: nvidia.Gpu) -> DeviceProfile:
    """Return the first profile that fits a GPU's name and memory; that of `cuda` fits every GPU."""
    return next(profile for profile in map(device_profile, profile_names()) if _fits(profile, gpu))


def _fits(profile: DeviceProfile, gpu: nvidia.Gpu) -> bool:
    if profile.nvml_name is None or not re.fullmatch(profile.nvml_name, gpu.name):
        return False
    declared, found = profile.memory_bytes, gpu.total_bytes
    return declared is None or found is None or abs(found - declared) <= MEMORY_TOLERANCE * declared


def free_bytes(device: DeviceProfile, machine: Machine = HERE) -> int:
    """Return the memory that is free for a new trainer; the device's `reserve_bytes` are still in it.

    Of shared memory the page cache is free, which CUDA does not say. A GPU with memory of its own whose driver does not tell how
    much of it is free counts as one that shares the host's.
    """
    if device.kind == "discrete":
        with suppress(pynvml.NVMLError):
            return int(nvidia.free_bytes(machine))
    available = available_bytes(machine)
    return available if device.memory_bytes is None else min(device.memory_bytes, available)


def device_name(torch_device: str, machine: Machine = HERE) -> str:
    """Return the name of this machine's processor or GPU for reports."""
    if torch_device == "cpu":
        return f"{_processor(machine)}, {psutil.cpu_count()} cores"
    gpu = nvidia.find_gpu()
    return jetson.board(machine) or (gpu.name if gpu else "GPU")


def gpu_uuid(device: DeviceProfile) -> str | None:
    """Return the UUID of this machine's GPU; None on a processor, or where NVML does not know it."""
    gpu = None if device.kind == "cpu" else nvidia.find_gpu()
    return gpu.uuid if gpu else None


def _processor(machine: Machine) -> str:
    try:
        lines = (machine.proc / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
