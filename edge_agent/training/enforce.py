"""Keeps a run within its budget, and on its way where memory lacks all the same: one rung lower, or later."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from edge_agent.errors import NoRoom, OutOfMemory
from edge_agent.job_directory import JobDirectory
from edge_agent.training.reporter import LOOK_S, TELL_S, Crowded, Reporter, out_of_memory
from profiles.device import DeviceProfile
from profiles.memory import HostCap, HostMemory, trim_heap
from profiles.pressure import Pressure
from profiles.recorder import StageName

T = TypeVar("T")


@contextmanager
def capped(device: DeviceProfile, budget_bytes: int, reporter: Reporter) -> Iterator[None]:
    """Let an allocation fail that would take the process over its budget: PyTorch's on a GPU, all of the process on a CPU.

    Where both share their memory, both are capped, each to what the other has left when it is looked; until the next look, half a second
    later or at the next stage, either may take the same rest.
    """
    if device.kind == "discrete":
        _cap_gpu(budget_bytes - device.unseen_bytes)
        yield
        return
    torch.ones(2**20).exp_()  # starts PyTorch's threads
    room_bytes = budget_bytes - device.file_pages_bytes - device.unseen_bytes
    cap, host, shared = HostCap(room_bytes), HostMemory(), device.kind == "unified"

    def look(stage: StageName) -> None:
        if shared:
            _cap_gpu(room_bytes - host.current_bytes())
        # There is no model yet while it is planned, and a budget that is too small is to be said in words.
        if stage == "plan":
            cap.lift()
        else:
            cap.renew(torch.cuda.memory_reserved() if shared else 0)

    if shared:
        look("plan")  # also for whoever runs without stages
    reporter.look = look
    try:
        yield
    finally:
        cap.lift()


def _cap_gpu(most_bytes: int) -> None:
    """Let PyTorch's allocator reserve so much, and no more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, most_bytes) / total))


def persevere(run: Callable[[], T], directory: JobDirectory, reporter: Reporter, pressure: Pressure) -> T:
    """Return what `run` returns, which goes on from what the directory keeps.

    Where memory lacks although it was planned, the miss is written down, which the next plan takes into account, and it is run again on
    what is a lower rung then. Where others need the memory, it is given back, and the run goes on when there is room; one that has begun
    before waits for room as well, and is not given up. Raises OutOfMemory where no plan would change the stage.
    """
    waited = directory.begun
    while True:
        try:
            return run()
        except Crowded:
            lack = None
        except NoRoom:
            if not waited:
                raise
            lack = None
        except (MemoryError, OSError, RuntimeError) as error:  # PyTorch's own are of the last kind
            lack = _lack(reporter, error)
        # Here the error is gone, and with it the frames that hold the model.
        _give_back()
        if lack is None:
            _wait_for_room(reporter, pressure)
            waited = True
        else:
            miss = directory.add_miss(reporter.recorder.current_stage, lack.detail)
            reporter.emit("out_of_memory", stage=miss.stage, text=f"{miss.text}; it was planned with {miss.rung}")


def _lack(reporter: Reporter, error: Exception) -> OutOfMemory:
    """Return the lack of memory that an error tells of; raise it where no other plan would change the stage, and every other error."""
    stage = reporter.recorder.current_stage
    lack = out_of_memory(stage, error)
    if lack is None or reporter.plan is None:
        raise error
    if reporter.plan.planned_bytes(stage) is None:
        raise lack from error
    return lack


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def _wait_for_room(reporter: Reporter, pressure: Pressure) -> None:
    """Return when the run may have its memory again. Raises Stopped on request."""
    needed = reporter.plan.peak_bytes - reporter.recorder.memory.current_bytes() if reporter.plan else 0
    began = told = time.monotonic()
    reporter.emit("paused", stage=reporter.recorder.current_stage)
    while not pressure.has_room(needed):
        reporter.check_stop()
        time.sleep(LOOK_S)
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            reporter.emit("paused", stage=reporter.recorder.current_stage)
    seconds = time.monotonic() - began
    reporter.waited(seconds)
    reporter.emit("continued", seconds=seconds)
