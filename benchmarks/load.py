"""Seconds and peak memory of loading in 4 bits: `python benchmarks/load.py --shape qwen2.5-0.5b` writes
results/load-DEVICE-SHAPE.json.

Side by side, for models of real shapes with random weights: transformers' own load with bitsandbytes, ours without a cache, ours when it
has to write the cache, ours from it, and ours with the head in NF4. Each load is a process of its own, the kinds in turn, five times; the
table shows medians. Peaks are the kernel's above the resident set after imports, on CUDA what the allocator has reserved; `held` is the
same once the model is there. Does not cover a cold file cache: the files have just been written.

`--device cuda` measures a GPU, `--out DIRECTORY` writes elsewhere, `--repeats` sets the number of times.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import shapes
import torch
from page import result_file
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edge_agent.training.outcome import versions
from profiles.device import device_name, device_profile
from profiles.memory import CudaMemory, HostMemory, fix_malloc
from quantization.cache import ModelCache
from quantization.load import load_model
from quantization.model_files import find_model

MIB = 2**20
KINDS = ("transformers", "ours", "ours, cache written", "ours, from the cache", "ours, head in NF4")
CACHE_BYTES = 2**40


class Load(msgspec.Struct, frozen=True):
    """One load in a process of its own."""

    seconds: float
    peak_mib: float
    held_mib: float


class Row(msgspec.Struct, frozen=True):
    """A kind of load of a shape: every measurement, and their medians."""

    shape: str
    kind: str
    file_mib: float
    median: Load
    loads: list[Load]


class Report(msgspec.Struct, frozen=True):
    """The committed results of a shape."""

    date: str
    machine: str
    threads: str
    versions: dict[str, str]
    device: str
    rows: list[Row]


def load_once(kind: str, model: str, cache: Path, device: str) -> Load:
    """Load a model in this process."""
    fix_malloc()
    profile = device_profile(device)
    load_model(find_model(str(shapes.TINY)), profile)  # what a first load imports and compiles is not measured
    memory = CudaMemory(0) if device == "cuda" else HostMemory()
    memory.release()
    before, started = memory.current_bytes(), time.perf_counter()
    if kind == "transformers":
        dtype = getattr(torch, profile.compute_dtype)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, quantization_config=quantization, device_map={"": device}, use_safetensors=True
        )
    else:
        place = ModelCache(cache, CACHE_BYTES) if "cache" in kind else None
        loaded = load_model(find_model(model), profile, quantized_head="head" in kind, cache=place)
    seconds, peak_bytes = time.perf_counter() - started, memory.peak_bytes()
    memory.release()
    held_bytes = memory.current_bytes()
    del loaded
    return Load(round(seconds, 2), round((peak_bytes - before) / MIB, 1), round((held_bytes - before) / MIB, 1))


def in_a_process(kind: str, model: Path, cache: Path, device: str) -> Load:
    """Load a model in a process of its own."""
    command = [sys.executable, __file__, "--once", kind, "--model", str(model), "--cache", str(cache), "--device", device]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Load)


def measure(shape: str, device: str, repeats: int, directory: Path) -> list[Row]:
    """Load a shape in every way, one way after the other and all of them again."""
    model = shapes.write_model(directory / shape, shape)
    file_mib = round(sum(file.stat().st_size for file in model.glob("*.safetensors")) / MIB, 1)
    loads: dict[str, list[Load]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        for kind in KINDS:  # the cache that one writes is the one that the next reads
            loads[kind].append(in_a_process(kind, model, directory / f"cache-{shape}-{repeat}", device))
    return [Row(shape, kind, file_mib, _median(found), found) for kind, found in loads.items()]


def _median(loads: list[Load]) -> Load:
    return Load(*(round(statistics.median(column), 2) for column in zip(*map(msgspec.structs.astuple, loads), strict=True)))


def table(rows: list[Row]) -> Table:
    view = Table("shape", "load", "file MiB", "seconds", "to transformers'", "peak MiB", "held MiB")
    for row in rows:
        base = next(r.median.seconds for r in rows if (r.shape, r.kind) == (row.shape, KINDS[0]))
        cells = (
            f"{row.median.seconds:.1f}",
            f"{row.median.seconds / base:.2f}",
            f"{row.median.peak_mib:,.0f}",
            f"{row.median.held_mib:,.0f}",
        )
        view.add_row(row.shape, row.kind, f"{row.file_mib:,.0f}", *cells, end_section=row.kind == KINDS[-1])
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", choices=shapes.NAMES, default=["llama-100m", "qwen2.5-0.5b"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory")
    for internal in ("--once", "--model", "--cache"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.once:
        print(msgspec.json.encode(load_once(options.once, options.model, Path(options.cache), options.device)).decode())
        return
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as directory:
            rows = measure(shape, options.device, options.repeats, Path(directory))
        report = Report(today, device_name(options.device), threads, versions(), options.device, rows)
        file = result_file("load", options.device, shape)
        (options.out / file.name if options.out else file).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        Console(width=max(Console().width, 110)).print(table(rows))


if __name__ == "__main__":
    main()
