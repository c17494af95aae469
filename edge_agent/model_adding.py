"""Adds a model to a node: listed, weighed against quota and disk, fetched beside its place, checked, quantised, then renamed.

What was fetched from a source that stays as it is (a commit, a list of digests) is kept for a week if the command ends before, and the next
one goes on there. A model that is refused leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import msgspec
from safetensors import SafetensorError, safe_open

from edge_agent.config import CACHE_LIMIT_VARIABLE, CACHE_VARIABLE, AgentConfig
from edge_agent.dataset import file_sha256
from edge_agent.errors import (
    NO_SPACE,
    DeviceBusy,
    DiskFull,
    EdgeAgentError,
    ModelConflict,
    ModelCorrupt,
    ModelMissing,
    ModelsFull,
    ModelSource,
    ModelUnsafe,
    ModelUnsupported,
    human_bytes,
)
from edge_agent.files import flush, lock_file, write_file
from edge_agent.forecast import lengths_of
from edge_agent.job import Dataset, Job
from edge_agent.messages import Texts
from edge_agent.model_sources import INDEX, SINGLE, Advance, Directory, Listed, Listing, ModelPlace, at_hub, is_hub_id
from edge_agent.models import INCOMING, RECORD, Record, Source, StoredFile, check_name, held_bytes, installed, read_record, working_in
from profiles.calibration import calibrated
from profiles.device import DeviceProfile, take_device
from profiles.gpu_lock import hold_gpu
from quantization.estimate import make_estimate
from quantization.model_files import find_model, weight_files
from quantization.shape import read_shape

MARK = ".source"
"""Says, in the directory of an addition that has not come to its end, where its files are from."""
SPARE_DISK_BYTES = 2**30
"""What a model leaves free."""
MOST_TEXT_BYTES = 256 * 2**20
"""Of a file that holds no weights; the largest tokenizers have 35 MB."""
KEPT_S = 7 * 24 * 3600.0
"""How long the files of an addition that has not come to its end are kept."""
TYPICAL = Texts(records=200, question=400, answer=800)
"""Of a dataset; where a plan for it has embedding and head, the model is quantised for."""
QUANTISE_S = 4 * 3600.0
TAKEN = "a job has the device now; the first job with the model quantises it"
Begin = Callable[[str, int], Advance]
"""Told of a step and its bytes; returns what is told of bytes as they come."""


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is on the node, as `edge-agent models add` prints it."""

    name: str
    path: str
    source: Source
    size_bytes: int
    fingerprint: str
    was_there: bool = False
    """The same was there before, and nothing was done."""
    quantised: bool = False
    """Whether it was loaded in 4 bits, and is in the cache."""
    note: str | None = None
    """Why not."""


def open_source(text: str, revision: str | None, config: AgentConfig) -> ModelPlace:
    """Return the place that a text names: a URL, a directory, or the id of a model at the hub. Raises ModelSource, ModelMissing."""
    if "://" in text:
        from edge_agent.model_mirror import Mirror

        return Mirror(text.rstrip("/"), revision, config)
    if Path(text).is_dir():
        if revision is not None:
            raise ModelSource(text, "a directory has no revisions; leave out --revision")
        return Directory(Path(text))
    if not is_hub_id(text) or text.startswith("."):
        raise ModelMissing(text, "there is no such directory, and it is no id of a model at the hub (OWNER/NAME)")
    return at_hub(text, revision)


def add(config: AgentConfig, source: str, name: str | None, revision: str | None, quantise: bool, begin: Begin) -> Added:
    """Bring a model to this node, and have jobs use it. Raises an EdgeAgentError that says why it cannot be, or is not wanted, here."""
    name = check_name(name or source.rstrip("/").rpartition("/")[2].lower())
    if name in config.models:
        raise ModelConflict(f"[models] of the configuration has another model {name!r}; give another --name, or take that out")
    with working_in(config) as (home, lock):
        place = open_source(source, revision, config)
        if (there := installed(config).get(name)) is not None:
            return _there_already(name, there, place.listing)
        if (home / name).exists():
            raise ModelConflict(f"{home / name} is there, and no model that was added; move it away, or give another --name")
        incoming = home / INCOMING / name
        _sweep(incoming.parent)
        try:
            files = _fetch(config, name, place, incoming, begin)
            shutil.rmtree(incoming / ".cache", ignore_errors=True)  # the hub's client keeps its books here
            _check(incoming, files)
            quantised, note = _quantise(config, name, incoming, lock, begin) if quantise else (False, "it was not asked for")
            fingerprint = find_model(str(incoming)).fingerprint
            record = Record(source=place.listing.source, fingerprint=fingerprint, added=datetime.now(timezone.utc), files=files)
            write_file(incoming / RECORD, msgspec.json.format(msgspec.json.encode(record)))
            (incoming / MARK).unlink()
            incoming.rename(home / name)
            flush(home)
        except (ModelUnsafe, ModelUnsupported, ModelMissing, ModelCorrupt):
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(str(incoming)) from None
            raise ModelSource(source, str(error)) from None
    return Added(
        name=name, path=str(home / name), source=record.source, size_bytes=record.size_bytes, fingerprint=fingerprint,
        quantised=quantised, note=note,
    )  # fmt: skip


def _there_already(name: str, path: Path, listing: Listing) -> Added:
    """Return a model that was added before, if it is the one that is asked for now. Raises ModelConflict."""
    record = read_record(path)
    same = record.source == listing.source
    if same and listing.source.kind == "directory":
        same = find_model(listing.source.location).fingerprint == record.fingerprint
    elif listing.source.revision is None:
        same = False  # what a server has there may be another one by now
    if not same:
        of = f"{record.source.location}{f' at {record.source.revision}' if record.source.revision else ''}"
        raise ModelConflict(f"there is another model {name!r}, of {of}; give another --name, or `edge-agent models remove {name}` first")
    return Added(
        name=name, path=str(path), source=record.source, size_bytes=record.size_bytes, fingerprint=record.fingerprint, was_there=True,
        note="it was there already",
    )  # fmt: skip


def _sweep(incoming: Path) -> None:
    """Delete what additions and removals have left that ended long ago."""
    incoming.mkdir(exist_ok=True)
    for old in incoming.iterdir():
        if old.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(old, ignore_errors=True)


def _fetch(config: AgentConfig, name: str, place: ModelPlace, incoming: Path, begin: Begin) -> dict[str, StoredFile]:
    """Bring the files of a model into a directory, and return what they are. Raises ModelsFull, DiskFull, ModelSource, ModelCorrupt."""
    listing, mark = place.listing, incoming / MARK
    origin = msgspec.json.encode(listing.source)
    _check_texts(listing)
    if listing.source.revision is None or not mark.exists() or mark.read_bytes() != origin:
        shutil.rmtree(incoming, ignore_errors=True)
    shutil.rmtree(incoming / ".cache", ignore_errors=True)  # parts of the hub's client, to which it does not come back
    incoming.mkdir(exist_ok=True)
    write_file(mark, origin)
    if INDEX in listing.files:
        _fetch_one(place, listing.files[INDEX], incoming, lambda _: None)
    wanted = _choose(listing, incoming)
    size_bytes = sum(file.size_bytes for file in wanted)
    if size_bytes + (held := held_bytes(config)) > config.models_limit:
        shutil.rmtree(incoming)
        raise ModelsFull(name, size_bytes, held, config.models_limit)
    parts = [incoming / f"{file.name}{end}" for file in wanted for end in ("", ".part")]
    here_bytes = sum(part.stat().st_size for part in parts if part.exists())
    if shutil.disk_usage(incoming).free < size_bytes - here_bytes + SPARE_DISK_BYTES:
        raise DiskFull(str(incoming), size_bytes - here_bytes + SPARE_DISK_BYTES)
    advance = begin("fetch", size_bytes)
    return {file.name: _fetch_one(place, file, incoming, advance) for file in wanted}


def _check_texts(listing: Listing) -> None:
    """Raise ModelCorrupt for a file without weights that is as large as if it had some."""
    for name, file in listing.files.items():
        if not name.endswith(".safetensors") and file.size_bytes > MOST_TEXT_BYTES:
            told = f"{name} has {human_bytes(file.size_bytes)}, more than {human_bytes(MOST_TEXT_BYTES)}"
            raise ModelCorrupt(listing.source.location, told)


def _choose(listing: Listing, incoming: Path) -> list[Listed]:
    """Return the files that make the model, weights last. Raises ModelSource, ModelUnsafe, ModelCorrupt."""
    where, files = listing.source.location, listing.files
    if "config.json" not in files:
        raise ModelCorrupt(where, "there is no config.json, so it is no model")
    weights = {name for name in files if name.endswith(".safetensors")}
    if INDEX in files:
        named = {file.name for file in weight_files(incoming)}
        if missing := sorted(named - weights):
            raise ModelCorrupt(where, f"its {INDEX} names {', '.join(missing[:3])}, which {'is' if len(missing) == 1 else 'are'} not there")
        weights = named
    elif SINGLE in weights:
        weights = {SINGLE}
    if not weights and listing.pickled:
        raise ModelUnsafe(where, "it has pickled weights only, and unpickling runs code")
    if not weights:
        raise ModelCorrupt(where, "there are no weights in safetensors")
    texts = sorted(name for name in files if not name.endswith(".safetensors"))
    return [files[name] for name in (*texts, *sorted(weights))]


def _fetch_one(place: ModelPlace, file: Listed, incoming: Path, advance: Advance) -> StoredFile:
    """Bring a file, unless it is there, and hold it against what was listed. Raises ModelCorrupt."""
    path = incoming / file.name
    if path.exists():
        advance(file.size_bytes)
    else:
        place.fetch(file, incoming, advance)
    size_bytes, sha256 = path.stat().st_size, file_sha256(path)
    if size_bytes != file.size_bytes or file.sha256 not in (None, sha256):
        told = f"{file.size_bytes:,} bytes{f', sha256 {file.sha256}' if file.sha256 else ''}"
        raise ModelCorrupt(
            place.listing.source.location, f"{file.name} is listed with {told}, and came with {size_bytes:,}, sha256 {sha256}"
        )
    flush(path)
    return StoredFile(size_bytes, sha256)


def _check(incoming: Path, files: dict[str, StoredFile]) -> None:
    """Raise ModelUnsupported or ModelUnsafe for files that no job could use."""
    held: dict[str, set[str]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(incoming / name, framework="np") as opened:
                    held[name] = set(opened.keys())
            except SafetensorError as error:
                raise ModelUnsupported(incoming.name, f"{name} is no whole safetensors file: {error}") from None
    if INDEX in files:
        named = msgspec.json.decode((incoming / INDEX).read_bytes())["weight_map"]
        if missing := sorted(weight for weight, file in named.items() if weight not in held.get(file, ())):
            raise ModelUnsupported(incoming.name, f"{missing[0]} is not in {named[missing[0]]}, where {INDEX} has it")
    read_shape(find_model(str(incoming)))


def _quantise(config: AgentConfig, name: str, incoming: Path, held: IO[str], begin: Begin) -> tuple[bool, str | None]:
    """Load a model in 4 bits once, as a trainer would, so that the cache has it. Returns whether it has, and why not.

    The process that does it has the device, and `held`, the lock of the models, also where this one is killed meanwhile. Raises
    ModelUnsupported where no job could load it.
    """
    if config.cache_limit == 0:
        return False, "`cache_limit` is 0"
    try:
        device = take_device(config.device)
        vocabulary = _vocabulary(config, incoming, device)
    except EdgeAgentError as error:
        return False, str(error)
    lock = lock_file(config.state_directory / "trainer.lock")
    if lock is None:
        return False, TAKEN
    try:
        gpu = hold_gpu(device)
    except DeviceBusy:
        lock.close()
        return False, TAKEN
    begin("quantise", 0)
    environment = os.environ | {
        CACHE_VARIABLE: str(config.cache_directory), CACHE_LIMIT_VARIABLE: str(int(config.cache_limit)), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "quantization.prequantise", str(incoming), device.torch_device, *vocabulary]
    descriptors = [file.fileno() for file in (lock, gpu, held) if file is not None]
    with lock, gpu or nullcontext():
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, env=environment, timeout=QUANTISE_S, check=False, pass_fds=descriptors
            )
        except subprocess.TimeoutExpired:
            return False, f"it took longer than {QUANTISE_S:,.0f} s"
    with suppress(msgspec.DecodeError):
        code, text = msgspec.json.decode(done.stdout.rpartition(b"\n")[2], type=tuple[str, str])
        if code == ModelUnsupported.code:
            raise ModelUnsupported(name, text.partition("': ")[2] or text)
        return not code, text or None
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][-400:]
    return False, f"a process that loads it ends with {done.returncode}: {last}"


def _vocabulary(config: AgentConfig, incoming: Path, device: DeviceProfile) -> list[str]:
    """Return how jobs of a usual size would hold embedding and head, by name. Raises DoesNotFit where none fits the node's budget."""
    files = find_model(str(incoming))
    job = Job(model=incoming.name, dataset=Dataset("0" * 64), budget_bytes=int(config.budget))
    lengths, _ = lengths_of(job, TYPICAL, files.context_tokens)
    plan = make_estimate(read_shape(files), job, lengths, calibrated(device))
    return [name for name, held in plan.vocabulary.items() if held]
