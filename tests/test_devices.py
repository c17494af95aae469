"""Which profile a machine gets, and what is free on it: from the names that drivers report and the trees that kernels show."""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from machines import AGX_RAILS, agx_orin, jetson, orin_nano, server, write

from edge_agent.errors import DeviceMissing, ProfileUnknown
from profiles import device
from profiles.device import (
    CUDA_LIBRARIES_BYTES,
    GENERIC,
    detect_profile,
    device_name,
    device_profile,
    free_bytes,
    profile_names,
    profile_of_gpu,
)
from profiles.nvidia import Gpu, find_gpu

MIB = 2**20
LOAD = "devices/platform/gpu.0/load"
BOARDS = {
    "Jetson AGX Orin Developer Kit": "jetson-agx-orin-64gb",
    "NVIDIA Jetson AGX Orin Developer Kit": "jetson-agx-orin-64gb",
    "NVIDIA Orin Nano Developer Kit": "jetson-orin-nano-8gb",
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super": "jetson-orin-nano-8gb",
    "NVIDIA Orin NX Developer Kit": "jetson-orin-nx-16gb",
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit": "jetson-orin-nx-16gb",
    "NVIDIA Jetson Xavier NX Developer Kit": "jetson",
    "NVIDIA Jetson AGX Thor Developer Kit": "jetson",
}
"""Models of device trees of JetPack 5 and 6."""
GPUS = [
    ("NVIDIA GeForce RTX 3060", 12_288, "rtx-3060-12gb"),
    ("NVIDIA GeForce RTX 3060", 8_192, "cuda"),
    ("NVIDIA GeForce RTX 3060 Laptop GPU", 6_144, "cuda"),
    ("NVIDIA GeForce RTX 4060", 8_188, "rtx-4060-8gb"),
    ("NVIDIA GeForce RTX 4060 Ti", 16_380, "cuda"),
    ("NVIDIA GeForce RTX 4090", 24_564, "rtx-4090-24gb"),
    ("NVIDIA H200", 143_771, "h200"),
    ("NVIDIA A100-SXM4-40GB", 40_960, "cuda"),
    ("Orin (nvgpu)", None, "jetson"),
]
"""Names and MiB as NVML reports them; of shared memory it reports none."""


@pytest.mark.parametrize("name", profile_names())
def test_profile_states_where_its_figures_are_from(name: str) -> None:
    """Every figure of a profile has a source, and no source is of a figure that is not there."""
    profile = device_profile(name)
    figures = {"memory_bytes", "overhead_bytes", "context_bytes", "reserve_bytes", "bandwidth_bytes_per_s"}
    assert set(profile.source) == {figure for figure in figures if getattr(profile, figure) is not None}
    assert all(text.endswith(".") for text in profile.source.values())
    assert (profile.memory_bytes is None) == (name in GENERIC)
    assert (profile.context_bytes is None) == (profile.kind != "unified")


def test_pytorch_with_cuda_takes_more_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trainer's memory its libraries are the largest part where the model is small; a GPU's overhead has them already."""
    library = tmp_path / "torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(device, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    plain, gpu = device_profile("cpu"), device_profile("rtx-3060-12gb")
    library.touch()
    assert device_profile("cpu").overhead_bytes == plain.overhead_bytes + CUDA_LIBRARIES_BYTES
    assert device_profile("rtx-3060-12gb") == gpu
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert device_profile("cpu") == plain


def test_profile_that_does_not_exist_is_an_error() -> None:
    """The error names those that exist; a name is never taken for a path."""
    for name in ("rtx-9090", "../devices/cpu", ""):
        with pytest.raises(ProfileUnknown, match="jetson-orin-nano-8gb"):
            device_profile(name)


@pytest.mark.parametrize(("board", "name"), BOARDS.items())
def test_board_of_a_jetson_decides(tmp_path: Path, board: str, name: str) -> None:
    """Each known model of a device tree has its profile, whatever NVML says, and other Jetsons have one of their own."""
    machine = jetson(tmp_path, board, LOAD, AGX_RAILS)
    for wanted in ("auto", "cuda"):
        found = detect_profile(wanted, machine)
        assert (found, found.torch_device, found.kind) == (device_profile(name), "cuda", "unified")
    assert device_name("cuda", machine) == board
    assert detect_profile("cpu", machine) == device_profile("cpu")


@pytest.mark.parametrize(("gpu", "total_mib", "name"), GPUS)
def test_name_and_memory_of_a_gpu_decide(gpu: str, total_mib: int | None, name: str) -> None:
    """Each known name has its profile where its memory is that of the profile; every other GPU has the profile of its kind."""
    assert profile_of_gpu(Gpu(gpu, None if total_mib is None else total_mib * MIB)) == device_profile(name)


def test_machine_without_gpu_is_a_processor(tmp_path: Path) -> None:
    """`auto` takes the processor, and asking for a GPU is an error that says what to do. A board that is no Jetson changes nothing."""
    if find_gpu() is not None:
        pytest.skip("A GPU IS HERE, so the answer of a machine without one was not tested")
    machine = server(tmp_path)
    for board in ("", "Raspberry Pi 5 Model B Rev 1.0"):
        write(machine.proc, {"device-tree/model": board})
        assert detect_profile("auto", machine) == device_profile("cpu")
        with pytest.raises(DeviceMissing, match="--device cpu"):
            detect_profile("cuda", machine)


def test_free_memory_of_shared_memory_is_what_the_kernel_can_give(tmp_path: Path) -> None:
    """The page cache counts as free, and no more than the module has is free."""
    nano = device_profile("jetson-orin-nano-8gb")
    assert free_bytes(nano, orin_nano(tmp_path / "nano")) == 5_893_120 * 1024
    assert free_bytes(nano, agx_orin(tmp_path / "agx")) == nano.memory_bytes


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 16_000_000 * 1024), (4_000_000_000, 2_600_000_000), (2_000_000_000, 600_000_000), (1_000_000_000, 0)]
)
def test_free_memory_is_within_the_limit_of_the_control_group(tmp_path: Path, limit: str | int, free: int) -> None:
    """What the group has left, with the files that it caches, where that is less than the machine has; never less than nothing."""
    machine = server(tmp_path)
    write(machine.proc, {"self/cgroup": "0::/system.slice/edge-agent.service"})
    group = {"memory.max": limit, "memory.current": 2_000_000_000, "memory.stat": "anon 1\nactive_file 400000000\ninactive_file 200000000"}
    for name, content in group.items():
        write(machine.sys / "fs/cgroup/system.slice/edge-agent.service", {name: content})
    assert free_bytes(device_profile("cpu"), machine) == free


def test_limit_of_a_group_above_binds_too(tmp_path: Path) -> None:
    """The smallest room on the way to the root counts; groups of the first version, and none at all, set no limit."""
    machine = server(tmp_path)
    assert free_bytes(device_profile("cpu"), machine) == 16_000_000 * 1024
    write(machine.proc, {"self/cgroup": "4:memory:/docker/1\n0::/user.slice/app.service"})
    for group, limit in (("user.slice", 3_000_000_000), ("user.slice/app.service", "max")):
        files = {"memory.max": limit, "memory.current": 1_000_000_000, "memory.stat": "anon 1000000000"}
        write(machine.sys / "fs/cgroup" / group, files)
    assert free_bytes(device_profile("cpu"), machine) == 2_000_000_000
