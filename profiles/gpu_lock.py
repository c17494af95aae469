"""Trainers on a GPU take turns, whoever they belong to: each holds a lock on the GPU's device file until it is gone.

The file is the same for all users and all units of systemd, whatever those see of `/tmp`, and only root can put another in its place.
Does not cover a container whose engine has made a device file of its own.
"""

from __future__ import annotations

import fcntl
import os
from io import FileIO
from pathlib import Path

from edge_agent.errors import DeviceBusy
from profiles import nvidia
from profiles.device import DeviceProfile
from profiles.host import HERE, Absent, Machine


def hold_gpu(device: DeviceProfile, machine: Machine = HERE) -> FileIO | None:
    """Lock the GPU that PyTorch takes; None where there is no file to lock. The kernel frees it with the last copy of the handle.

    Raises DeviceBusy where another trainer has it.
    """
    try:
        file, opened = _open(device, machine)
    except Absent:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        gpu = nvidia.find_gpu()
        raise DeviceBusy(f"{gpu.name}, {gpu.uuid}" if gpu else "the GPU", file) from None
    return opened


def describe_lock(device: DeviceProfile, machine: Machine = HERE) -> str:
    """Say by what file trainers take turns, or why by none."""
    try:
        file, opened = _open(device, machine)
    except Absent as error:
        return f"no lock keeps trainers of others from it: {error}"
    opened.close()
    return f"trainers take turns on {file}"


def _open(device: DeviceProfile, machine: Machine) -> tuple[Path, FileIO]:
    """Open the device file of a GPU with memory of its own. Raises Absent."""
    if device.kind != "discrete":
        raise Absent("only GPUs with memory of their own have a file")
    gpu = nvidia.find_gpu()
    if gpu is None or gpu.minor is None:
        raise Absent("NVML does not tell its number")
    file = machine.dev / f"nvidia{gpu.minor}"
    try:
        return file, FileIO(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError as error:
        raise Absent(f"{file}: {error.strerror}") from None
