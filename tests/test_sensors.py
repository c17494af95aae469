"""What this machine reports of itself: every sensor has a value or a reason, and one that is absent never reads 0."""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import psutil
import pynvml
import pytest

from edge_agent.messages import Heartbeat, JobProgress, NodeInfo, NodeLimits, decode, encode
from edge_agent.report import Event
from profiles.sensors import RAPL, Reading, Resources, Sensors

BUDGET = 6 * 2**30


def _readings(resources: Resources) -> dict[str, Reading]:
    fields = msgspec.structs.asdict(resources)
    return {name: value for name, value in fields.items() if isinstance(value, Reading)}


def _has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return bool(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(params=["cpu", "cuda"])
def samples(request: pytest.FixtureRequest, tmp_path: Path) -> list[Resources]:
    """Three samples of one device: at once, after a moment, and with a trainer that runs."""
    sensors = Sensors(request.param, BUDGET, tmp_path)
    first = sensors.sample(None)
    time.sleep(0.2)
    return [first, sensors.sample(None), sensors.sample(123)]


def test_reading_is_a_value_or_a_reason(samples: list[Resources]) -> None:
    """Never both, never neither; a reason is a text that a person can read."""
    for resources in samples:
        assert len(_readings(resources)) == 5
        for name, reading in _readings(resources).items():
            assert (reading.value is None) != (reading.reason is None), name
            assert reading.reason is None or reading.reason.strip()
            assert reading.value is None or math.isfinite(reading.value)


def test_value_is_possible(samples: list[Resources]) -> None:
    """Memory, temperature and power that are there are above 0, shares are at most 100 %, and no more is free than there is."""
    for resources in samples:
        for name in ("device_free_bytes", "device_total_bytes", "temperature_c", "power_w"):
            value = getattr(resources, name).value
            assert value is None or value > 0, name
        free, total, busy = resources.device_free_bytes.value, resources.device_total_bytes.value, resources.utilisation_percent.value
        assert (free is None) == (total is None)
        assert free is None or total is None or free <= total
        assert busy is None or 0 <= busy <= 100
        assert 0 < resources.host_free_bytes <= psutil.virtual_memory().total
        assert resources.disk_free_bytes > 0
        assert resources.budget_bytes == BUDGET
    assert [r.trainer_bytes for r in samples] == [None, None, 123]


def test_absent_gpu_has_reasons_only(tmp_path: Path) -> None:
    """Without a GPU all five sensors of `cuda` say why there is no value, and the host's numbers are there all the same."""
    if _has_gpu():
        pytest.skip("A GPU IS HERE, so the answer of a machine without one was not tested")
    resources = Sensors("cuda", BUDGET, tmp_path).sample(None)
    for reading in _readings(resources).values():
        assert reading.value is None
        assert str(reading.reason).startswith("NVML: ")
    assert resources.host_free_bytes > 0


def test_absent_sensor_of_the_host_has_a_reason(tmp_path: Path) -> None:
    """Power and temperature are null with a reason exactly where the kernel has no counter and no thermometer."""
    sensors = Sensors("cpu", BUDGET, tmp_path)
    sensors.sample(None)
    time.sleep(0.2)
    resources = sensors.sample(None)
    try:
        RAPL.read_text()
        counter = True
    except OSError:
        counter = False
    assert (resources.power_w.value is not None) == counter
    assert (resources.temperature_c.value is not None) == any(psutil.sensors_temperatures().values())


def test_power_before_an_interval_has_a_reason(tmp_path: Path) -> None:
    """Power comes from a counter of energy: of a single look at it there are no watts, and not 0 of them."""
    assert Sensors("cpu", BUDGET, tmp_path).sample(None).power_w.value is None


def test_utilisation_before_an_interval_has_a_reason(tmp_path: Path) -> None:
    """Utilisation comes from counters of time: two looks at them at once say nothing, and not 0 %."""
    sensors = Sensors("cpu", BUDGET, tmp_path)
    readings = [sensors.sample(None).utilisation_percent for _ in range(50)]
    assert not any(reading.value == 0 for reading in readings)


def test_messages_carry_the_readings(samples: list[Resources]) -> None:
    """A sample passes the strict types of the wire unchanged, nulls and reasons included."""
    for resources in samples:
        heartbeat = Heartbeat(resources, 0, None)
        assert decode(encode(heartbeat, "edge1/f/n"), Heartbeat).data == heartbeat
        progress = JobProgress(Event(time=1.0, event="progress"), [], resources)
        assert decode(encode(progress, "edge1/f/n"), JobProgress).data == progress
        total = resources.device_total_bytes.value
        info = NodeInfo("1", "3", "d", "cpu", None if total is None else int(total), [], NodeLimits(1, 1, 1), {})
        assert decode(encode(info, "edge1/f/n"), NodeInfo).data == info
