"""What a device takes beyond what a plan can count, learned from finished jobs: one small file for all devices of a user.

It is learned stage by stage: the programs that are mapped, and the buffers that libraries keep, grow as a run goes on. Imports no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import msgspec

from profiles.device import DeviceProfile

Known = dict[str, dict[str, list[int]]]
"""Bytes by device and stage."""
log = logging.getLogger(__name__)

KEPT = 16
"""Jobs that are remembered; their median is what is planned."""
ODD = 1.125
"""A job that took more than the median by this factor says nothing of the others."""
LEAST_SPREAD_BYTES = 4 * 2**20
"""Between runs that are alike; a few of them may not have shown it."""
WIDEST = 4
"""A calibration is never further from the declared overhead than by this factor."""


def calibration_file() -> Path:
    """Return where the file of this user is."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "edge-agent" / "calibration.json"


def calibrated(device: DeviceProfile, file: Path | None = None) -> DeviceProfile:
    """Return the profile with what finished jobs on it have shown, or as it is declared where there are none."""
    known = _read(file or calibration_file()).get(device.title, {})
    learned_bytes = {stage: _bounded(device, int(median(found))) for stage, found in known.items() if found}
    spread_bytes = max((max(LEAST_SPREAD_BYTES, _spread(found)) for found in known.values() if found), default=0)
    return msgspec.structs.replace(device, learned_bytes=learned_bytes, spread_bytes=spread_bytes)


def learn(device: DeviceProfile, beyond_bytes: Mapping[str, int], file: Path | None = None) -> None:
    """Remember what would have covered each stage of a job. A file that cannot be written is a line in the log."""
    place = file or calibration_file()
    known = _read(place)
    of_device = known.setdefault(device.title, {})
    for stage, found in beyond_bytes.items():
        of_device[stage] = [*of_device.get(stage, []), _bounded(device, found)][-KEPT:]
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(known))
        part.replace(place)
    except OSError as error:
        log.warning("calibration_unwritten file=%s error=%s", place, error)


def _spread(found: list[int]) -> int:
    """Return by how much a job has taken more than the median."""
    middle = median(found)
    return int(max(size for size in found if size <= ODD * middle) - middle)


def _bounded(device: DeviceProfile, beyond_bytes: int) -> int:
    return min(max(beyond_bytes, device.overhead_bytes // WIDEST), device.overhead_bytes * WIDEST)


def _read(file: Path) -> Known:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Known)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("calibration_ignored file=%s error=%s", file, error)
    return {}
