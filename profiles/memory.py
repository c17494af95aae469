"""How much memory the trainer holds, now and at its peak: the number that is held against the budget."""

from __future__ import annotations

import ctypes
import itertools
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

MMAP_THRESHOLD_BYTES = 512 * 2**10
"""Smaller, and small models take twice the time, most of it the kernel's; larger, and the heap has holes that no plan foresees."""
OWN_BLOCK_BYTES = 64 * 2**10
"""Of what has blocks of its own while a model is loaded: all of its matrices, and what comes and goes beside them."""
MOST_FILLINGS = 2**14
"""Far more than a heap has holes of that size; malloc would extend the heap for ever where it may map no more."""
KEPT_BELOW_BYTES = 32 * 2**20
"""Blocks that stay with a process that keeps what it frees; the C library allows no more."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_tuned = [(128 * 2**10, 128 * 2**10)]
"""The thresholds of malloc as they are now, glibc's own at first: it does not tell them."""
_fillings: list[int] = []
"""Addresses of the blocks that fill holes of the heap."""


class Memory(Protocol):
    """What a recorder asks of a device."""

    def release(self) -> None:
        """Give back what is free but still held, and forget the peak so far."""

    def peak_bytes(self) -> int: ...

    def current_bytes(self) -> int: ...

    def peaks_bytes(self) -> tuple[int, int]:
        """(peak_bytes(), that of the process on the host) of one moment."""

    def peak_on_gpu_bytes(self) -> tuple[int | None, int | None]:
        """(allocated, reserved) peaks of PyTorch's allocator; None on a processor."""


class HostMemory:
    """Resident set of this process. Its peak comes from the kernel, which forgets it on request, so nothing is sampled."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def release(self) -> None:
        close_holes()
        # Where this is not allowed the peak stays that of the whole process: an upper bound.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        with suppress(OSError, StopIteration):
            return _status_bytes("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def current_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def peaks_bytes(self) -> tuple[int, int]:
        peak = self.peak_bytes()
        return peak, peak

    def peak_on_gpu_bytes(self) -> tuple[int | None, int | None]:
        return None, None


class CudaMemory:
    """What the caching allocator has reserved, plus what nothing shows, whose size the device profile declares.

    Where GPU and host share their memory (`shared`) the resident set of the process comes to it. Nothing is counted twice there, as far as
    is known: a Jetson's driver takes memory for the GPU, for its context too, from the kernel's pages beside those of processes (nvmap),
    and maps what it does map into one as memory of a device, which no resident set has. The peaks of both sides are added up as if they
    had come at one moment: an upper bound.
    """

    def __init__(self, unseen_bytes: int, shared: bool = False) -> None:
        import torch

        self._cuda, self._host = torch.cuda, HostMemory()
        self._unseen_bytes, self._shared = unseen_bytes, shared

    def release(self) -> None:
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats()
        self._host.release()

    def peak_bytes(self) -> int:
        return self.peaks_bytes()[0]

    def current_bytes(self) -> int:
        return int(self._cuda.memory_reserved()) + self._unseen_bytes + (self._host.current_bytes() if self._shared else 0)

    def peaks_bytes(self) -> tuple[int, int]:
        resident = self._host.peak_bytes()
        return int(self._cuda.max_memory_reserved()) + self._unseen_bytes + (resident if self._shared else 0), resident

    def peak_on_gpu_bytes(self) -> tuple[int | None, int | None]:
        return int(self._cuda.max_memory_allocated()), int(self._cuda.max_memory_reserved())


LACKS = (
    "can't allocate memory", "cannot allocate memory", "nvml_success == r", "cuda error: out of memory", "cublas_status_alloc_failed"
)  # fmt: skip
"""How PyTorch, the C library, PyTorch's allocator on a Jetson, the CUDA driver and cuBLAS say that there is no memory left."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error).lower() for text in LACKS)


class HostCap:
    """Lets the process allocate until its resident set has a size, and no further: then an allocation fails.

    The kernel limits what is allocated from now on, touched or not; so threads should be there already, whose stacks are large and empty.
    What comes beside it until `renew` is called again: pages of files, programs among them. It holds in a process with `one_arena`.
    """

    def __init__(self, resident_bytes: int) -> None:
        self._resident_bytes = resident_bytes
        self._before = resource.getrlimit(resource.RLIMIT_DATA)

    def renew(self, beside_bytes: int = 0) -> None:
        """Look again at what is left, of which `beside_bytes` are taken by what no resident set has."""
        taken = _status_bytes("VmRSS") + _heap_holes_bytes() + beside_bytes
        limit = _status_bytes("VmData") + max(0, self._resident_bytes - taken)
        hard = self._before[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))

    def lift(self) -> None:
        """Let it allocate as before."""
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _heap_holes_bytes() -> int:
    """Return what of the heap has been given back and can be filled again, which the kernel would not count as allocated once more."""
    sizes: list[int] = []
    with suppress(OSError), Path("/proc/self/smaps").open(encoding="utf-8") as mappings:
        heap = itertools.dropwhile(lambda line: not line.endswith("[heap]\n"), mappings)
        sizes = [int(line.split()[1]) * 1024 for line in itertools.islice(heap, 8) if line.startswith(("Size:", "Rss:"))]
    if len(sizes) < 2:  # what malloc has is in other mappings
        return 0
    return max(0, sizes[0] - sizes[1] - len(_fillings) * MMAP_THRESHOLD_BYTES)


def trim_heap() -> None:
    """Give the system back the memory that is free between blocks in use, where the C library can."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def close_holes() -> None:
    """Give back what is free, and have large blocks take pages of their own although there is room between those in use.

    malloc looks for room first, whatever its threshold says, and what comes and goes in holes of many sizes touches more pages than it
    takes, which no plan foresees: generation after training was measured to take up to a tenth more. So the holes are filled until the
    next call, with blocks that nothing writes to. After `keep_freed` they are left open: there they are what is wanted.
    """
    _open_holes()
    trim_heap()
    if _tuned[-1][0] != MMAP_THRESHOLD_BYTES:
        return
    libc = _glibc()
    while libc is not None and len(_fillings) < MOST_FILLINGS:
        block = libc.malloc(MMAP_THRESHOLD_BYTES)
        if block is None or block > libc.sbrk(0):  # no hole has taken it: it has been mapped, beyond the heap
            libc.free(block)
            return
        _fillings.append(block)


def _open_holes() -> None:
    libc = _glibc()
    while libc is not None and _fillings:
        libc.free(_fillings.pop())


def _glibc() -> Any:
    """The C library with what is called here declared; None where it is another one."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def one_arena() -> None:
    """Have all threads of this process allocate from one heap; to be called before there are others.

    A thread for which the heap may not grow goes over to another one for good, whose pages no cap counts a second time.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def fix_malloc() -> bool:
    """Make glibc return every block of 512 KiB or more when it is freed, so that the resident set is what is in use.

    Returns False where the C library has no mallopt.
    """
    return _tune_malloc(MMAP_THRESHOLD_BYTES, MMAP_THRESHOLD_BYTES)


def keep_freed() -> bool:
    """Make glibc keep what is freed for what is allocated next, so that its pages are not fetched again; False as for `fix_malloc`."""
    _open_holes()
    return _tune_malloc(KEPT_BELOW_BYTES, 2**30)


@contextmanager
def without_holes() -> Iterator[None]:
    """Make glibc return smaller blocks too, for a time: what stays then lies close together, whatever comes and goes between.

    Holes that are left all the same are closed at the end, as `close_holes` does.
    """
    before = _tuned[-1]
    _tune_malloc(OWN_BLOCK_BYTES, OWN_BLOCK_BYTES)
    try:
        yield
    finally:
        _tune_malloc(*before)
        close_holes()


def _tune_malloc(mmap_from_bytes: int, trim_from_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    _tuned[:] = [(mmap_from_bytes, trim_from_bytes)]
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_from_bytes) and mallopt(_M_TRIM_THRESHOLD, trim_from_bytes))
