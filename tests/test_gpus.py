"""Hosts with several GPUs: everything is about the one that PyTorch takes, and one trainer at a time has it, whoever's it is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import TINY, write_domain
from gpus import LARGE, MIG, SMALL, TWIN, Card, Driver
from machines import orin_nano

from edge_agent import jobs as jobs_module
from edge_agent import model_adding
from edge_agent.cli.shared import imports
from edge_agent.config import AgentConfig, Limit, Size, read_config
from edge_agent.doctor import CHECKS, _Wrong
from edge_agent.errors import ConfigInvalid, DeviceBusy, DeviceMissing
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.runner import Trainer, start_ticks
from edge_agent.training import run as run_module
from profiles import nvidia
from profiles.device import detect_profile, device_name, device_profile, free_bytes, gpu_uuid, take_device
from profiles.gpu_lock import describe_lock, hold_gpu
from profiles.host import Machine
from tests.test_jobs import Clock, Node, clock, made

__all__ = ["clock", "made"]
MIB = 2**20
CUDA = device_profile("rtx-4090-24gb")
HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
os.write(1, b"x")
os.read(0, 1)
"""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A host with a GPU for the screen on the first slot, and two alike."""
    driver = Driver()
    driver.install(monkeypatch)
    return driver


@pytest.fixture
def host(tmp_path: Path) -> Machine:
    """A machine with the device files of three GPUs."""
    machine = Machine(*(tmp_path / name for name in ("proc", "sys", "dev")))
    machine.dev.mkdir()
    for minor in range(3):
        (machine.dev / f"nvidia{minor}").touch()
    return machine


@pytest.fixture
def other(host: Machine) -> Callable[[int], subprocess.Popen[bytes]]:
    """Starts the trainer of another agent, which has a GPU until its input ends."""

    def start(minor: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLD, str(host.dev / f"nvidia{minor}")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        return process

    return start


# which it is


@pytest.mark.parametrize(
    ("named", "uuid"),
    [
        (None, LARGE), (TWIN, TWIN), (f"{TWIN},{LARGE}", TWIN), ("GPU-1111", SMALL), ("0", SMALL), ("2,1", TWIN), (" 1 ", LARGE),
        ("", None), ("-1", None), ("9", None), ("GPU-77777777", None), ("none", None),
    ],
)  # fmt: skip
def test_gpu_is_the_one_that_the_environment_names(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, named: str | None, uuid: str | None
) -> None:
    """By UUID, the beginning of one, or number; only the first counts, as for PyTorch, and what CUDA would not find is none. Where nothing
    is named it is the first of those with the most memory, not the one for the screen."""
    if named is not None:
        monkeypatch.setenv(nvidia.VISIBLE, named)
    found = nvidia.find_gpu()
    assert (found and found.uuid) == uuid


def test_all_that_is_told_is_of_the_same_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch, host: Machine) -> None:
    """Profile, name, free memory, temperature and lock."""
    for card in driver.cards:
        monkeypatch.setenv(nvidia.VISIBLE, card.uuid)
        profile = detect_profile("auto", host)
        assert (profile.kind, device_name("cuda", host), gpu_uuid(profile)) == ("discrete", card.name, card.uuid)
        assert (free_bytes(profile, host), nvidia.temperature_c(host)) == (card.free_mib * MIB, card.celsius)
        assert describe_lock(profile, host) == f"trainers take turns on {host.dev}/nvidia{card.minor}"
    monkeypatch.setenv(nvidia.VISIBLE, "")
    assert detect_profile("auto", host) == device_profile("cpu")
    with pytest.raises(DeviceMissing, match="none that CUDA_VISIBLE_DEVICES= shows"):
        detect_profile("cuda", host)


def test_instance_of_a_gpu_is_one_of_its_own_and_locks_the_whole(monkeypatch: pytest.MonkeyPatch, host: Machine) -> None:
    """A MIG instance has its own memory; its device file is that of the GPU."""
    whole = Card("NVIDIA H200", 143_771, LARGE, 2)
    Driver((whole, Card("NVIDIA H200 MIG 1g.18gb", 16_384, MIG, 7, whole=whole))).install(monkeypatch)
    monkeypatch.setenv(nvidia.VISIBLE, MIG)
    assert nvidia.find_gpu() == nvidia.Gpu("NVIDIA H200 MIG 1g.18gb", 16_384 * MIB, MIG, 2)


def test_libraries_see_the_gpu_that_is_measured(driver: Driver) -> None:
    """Before PyTorch is imported for a local command, CUDA is shown one GPU, and counts as NVML does."""
    with imports():
        assert (os.environ[nvidia.VISIBLE], os.environ[nvidia.ORDER]) == (LARGE, "PCI_BUS_ID")
    os.environ[nvidia.VISIBLE] = "2,0"
    with imports():
        assert os.environ[nvidia.VISIBLE] == TWIN


def test_machine_with_one_gpu_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson's driver need not know its GPU by what NVML calls it."""
    Driver((Card("Orin (nvgpu)", 0, SMALL, 0),)).install(monkeypatch)
    take_device("auto")
    assert nvidia.VISIBLE not in os.environ


def test_every_command_counts_gpus_as_nvml_does() -> None:
    """Whatever order the environment asks for: NVML knows no other."""
    code = "import edge_agent.__main__, os; print(os.environ['CUDA_DEVICE_ORDER'])"
    environment = os.environ | {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "PCI_BUS_ID\n"


# an agent's own


def _config(tmp_path: Path, device: str) -> AgentConfig:
    (tmp_path / "agent.toml").write_text(f'node = "n"\nstate_directory = "state"\nbudget = "1GiB"\ndevice = "{device}"\n')
    return read_config(tmp_path / "agent.toml", AgentConfig)


def test_configuration_names_a_gpu_by_its_whole_uuid(tmp_path: Path) -> None:
    """Its jobs are of `cuda`. Numbers, beginnings, lists and instances are refused."""
    devices = {device: _config(tmp_path, device).job_device for device in ("auto", "cpu", "cuda", LARGE)}
    assert devices == {"auto": "auto", "cpu": "cpu", "cuda": "cuda", LARGE: "cuda"}
    for device in ("0", "cuda:1", "GPU-1111", f"{LARGE},{SMALL}", LARGE.upper(), MIG, f"{LARGE}\\n", "CPU", ""):
        with pytest.raises(ConfigInvalid, match="device"):
            _config(tmp_path, device)


def test_agent_and_all_that_it_starts_have_the_gpu_of_its_configuration(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment names another one."""
    monkeypatch.setenv(nvidia.VISIBLE, SMALL)
    assert take_device(TWIN) == CUDA
    assert (os.environ[nvidia.VISIBLE], os.environ[nvidia.ORDER]) == (TWIN, "PCI_BUS_ID")
    assert gpu_uuid(CUDA) == TWIN
    assert take_device("cpu") == device_profile("cpu")


def test_gpu_that_is_not_there_is_an_error_with_those_that_are(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken in its place."""
    gone = f"{LARGE[:-1]}0"
    with pytest.raises(DeviceMissing) as refused:
        take_device(gone)
    known = ", ".join(f"{card.uuid} ({card.name})" for card in driver.cards)
    assert str(refused.value) == (
        f"there is no GPU to use: {gone} is not there, there are {known}; give the `device` of the configuration as `nvidia-smi -L` says it"
    )
    Driver(()).install(monkeypatch)
    with pytest.raises(DeviceMissing, match="is not there, NVML finds none; give"):
        take_device(gone)


def test_doctor_names_the_gpu_and_its_lock(driver: Driver, tmp_path: Path) -> None:
    """With its UUID, which two alike do not share."""
    config = msgspec.structs.replace(_config(tmp_path, TWIN), budget=Size(MIB))
    assert CHECKS["device"](config).startswith(f"NVIDIA GeForce RTX 4090, {TWIN} (profile GeForce RTX 4090 24 GB): 23,000 MiB free")
    assert CHECKS["device"](config).endswith(
        ("; trainers take turns on /dev/nvidia2", "; no lock keeps trainers of others from it: /dev/nvidia2: No such file or directory")
    )
    with pytest.raises(_Wrong, match=f"{TWIN} are free; a budget of"):
        CHECKS["device"](msgspec.structs.replace(config, budget=Size(2**40)))


# one trainer at a time


def test_gpu_has_one_trainer_whoever_they_belong_to(
    driver: Driver, host: Machine, other: Callable[[int], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is told which it is; the GPU beside it is free, and the kernel frees the lock of one that is killed."""
    first = other(0)
    monkeypatch.setenv(nvidia.VISIBLE, LARGE)
    with pytest.raises(DeviceBusy, match=f"another trainer has NVIDIA GeForce RTX 4090, {LARGE} .*nvidia0 is locked.*name another GPU"):
        hold_gpu(CUDA, host)
    monkeypatch.setenv(nvidia.VISIBLE, TWIN)
    beside = hold_gpu(CUDA, host)
    assert beside is not None
    with beside, pytest.raises(DeviceBusy):
        hold_gpu(CUDA, host)
    first.kill()
    first.communicate()
    monkeypatch.setenv(nvidia.VISIBLE, LARGE)
    freed = hold_gpu(CUDA, host)
    assert freed is not None
    freed.close()


def test_what_has_no_device_file_is_not_locked(driver: Driver, host: Machine, tmp_path: Path) -> None:
    """Processors and Jetsons, as before; a link in the place of the file leads nowhere."""
    for profile, machine in ((device_profile("cpu"), host), (device_profile("jetson"), orin_nano(tmp_path / "nano"))):
        assert hold_gpu(profile, machine) is None
    (host.dev / "nvidia0").unlink()
    (host.dev / "nvidia0").symlink_to(host.dev / "nvidia1")
    assert hold_gpu(CUDA, host) is None
    assert "no lock keeps trainers of others from it" in describe_lock(CUDA, host)
    (host.dev / "nvidia0").unlink()
    assert hold_gpu(CUDA, host) is None
    assert "No such file" in describe_lock(CUDA, host)


def test_trainer_holds_the_gpu_until_it_is_gone(
    driver: Driver, host: Machine, made: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the agent: one that ends does not free what its trainer still works on."""
    monkeypatch.setattr(jobs_module, "hold_gpu", lambda _: hold_gpu(CUDA, host))
    node = made()
    job = node.offer()
    node.jobs.tick()
    node.let_train("await_stop(); sys.exit(12)", job)
    node.jobs.tick()
    trainer = node.jobs.trainer
    assert isinstance(trainer, Trainer)
    with pytest.raises(DeviceBusy):
        hold_gpu(CUDA, host)
    trainer.stop()
    node.next()
    freed = hold_gpu(CUDA, host)
    assert freed is not None
    freed.close()


def test_job_waits_while_the_trainer_of_another_agent_has_the_gpu(
    driver: Driver, host: Machine, made: Callable[..., Node], clock: Clock, other: Callable[[int], subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It stays `ready` and has not begun, one line says why, and nobody is killed however long it takes; then it runs."""
    monkeypatch.setattr(jobs_module, "hold_gpu", lambda _: hold_gpu(CUDA, host))
    monkeypatch.setattr(jobs_module, "time", clock)
    theirs = other(0)
    node = made()
    job = node.offer()
    (node.place / "trainer.pid").write_text(f"{theirs.pid} {start_ticks(theirs.pid)}\n")  # whoever it was: it is not asked
    node.jobs.tick()
    node.let_train('say(\'{"time": 1, "event": "progress"}\'); await_stop()', job)
    caplog.set_level(logging.INFO)
    for _ in range(30):
        clock.now += 1
        node.jobs.tick()
    assert (node.jobs.trainer, node.row(job).phase, node.row(job).attempt, theirs.poll()) == (None, "ready", 0, None)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" text=")[0] for line in said] == [f"gpu_awaited job={job}"]
    assert LARGE in said[0]
    theirs.communicate(b"x")
    node.jobs.tick()
    node.next()
    assert (node.row(job).phase, node.row(job).attempt) == ("running", 1)


def test_local_run_takes_the_gpu_and_an_agents_trainer_has_it(
    driver: Driver, host: Machine, other: Callable[[int], subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`edge-agent train` ends at once where another trainer works, with the directory as it was; one that an agent has started, and given
    the lock, does not ask for it again."""
    data = write_domain(tmp_path / "chain.jsonl", "chain", 24, 5)
    directory = JobDirectory(tmp_path / "job")
    directory.create(build_job(str(TINY), data, None, {"budget_bytes": 2**30, "device": "cpu"}, {}), data, None)
    asked: list[str] = []

    def ask(device: object) -> object:
        asked.append("asked")
        return hold_gpu(CUDA, host)

    monkeypatch.setattr(run_module, "hold_gpu", ask)
    theirs = other(0)
    with pytest.raises(DeviceBusy):
        run_module.run_job(directory, lambda event: None)
    assert (asked, directory.begun) == (["asked"], False)

    class Begun(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(run_module, "sampled", begin)
    with pytest.raises(Begun):
        run_module.run_job(directory, lambda event: None, holds_gpu=True)
    assert asked == ["asked"]
    theirs.communicate(b"x")


def test_model_is_not_quantised_beside_a_trainer_of_another_agent(
    driver: Driver, host: Machine, other: Callable[[int], subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job with it does that."""
    monkeypatch.setattr(model_adding, "hold_gpu", lambda _: hold_gpu(CUDA, host))
    theirs = other(0)
    config = AgentConfig("n", tmp_path / "state", Size(2**30), device="cpu", cache_limit=Limit(2**30))
    config.state_directory.mkdir()
    with (tmp_path / "held").open("w") as held:
        done = model_adding._quantise(config, "tiny", TINY, held, lambda *_: lambda *_: None)
    assert done == (False, model_adding.TAKEN)
    theirs.communicate(b"x")
