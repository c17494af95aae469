"""What this machine reports of itself: every sensor has a value or a reason, and one that is absent never reads 0."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import msgspec
import psutil
import pynvml
import pytest
from machines import AGX_RAILS, agx_orin, jetson, orin_nano, server, write

from edge_agent.messages import Heartbeat, JobProgress, NodeInfo, NodeLimits, decode, encode
from edge_agent.report import Event
from profiles.device import device_profile
from profiles.host import HERE, Machine, Rapl, busy_core_seconds
from profiles.sensors import SHORTEST_INTERVAL_S, DeviceReadings, DeviceSensors, Reading, Resources, Sensors

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
    sensors = Sensors(device_profile(request.param), BUDGET, tmp_path)
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
    resources = Sensors(device_profile("cuda"), BUDGET, tmp_path).sample(None)
    for reading in _readings(resources).values():
        assert reading.value is None
        assert str(reading.reason).startswith("NVML: ")
    assert resources.host_free_bytes > 0


def test_absent_sensor_of_the_host_has_a_reason(tmp_path: Path) -> None:
    """Power and temperature are null with a reason exactly where the kernel has no counter and no thermometer."""
    sensors = Sensors(device_profile("cpu"), BUDGET, tmp_path)
    sensors.sample(None)
    time.sleep(0.2)
    resources = sensors.sample(None)
    counters = list(HERE.sys.glob("class/powercap/intel-rapl:*/energy_uj"))
    assert (resources.power_w.value is not None) == (bool(counters) and all(os.access(counter, os.R_OK) for counter in counters))
    assert (resources.temperature_c.value is not None) == any(psutil.sensors_temperatures().values())


def test_power_before_an_interval_has_a_reason(tmp_path: Path) -> None:
    """Power comes from a counter of energy: of a single look at it there are no watts, and not 0 of them."""
    assert Sensors(device_profile("cpu"), BUDGET, tmp_path).sample(None).power_w.value is None


def test_utilisation_before_an_interval_has_a_reason(tmp_path: Path) -> None:
    """Utilisation comes from counters of time: two looks at them at once say nothing, and not 0 %."""
    sensors = Sensors(device_profile("cpu"), BUDGET, tmp_path)
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
        info = NodeInfo("1", "3", "d", "cpu", None if total is None else int(total), {}, NodeLimits(1, 1, 1), {})
        assert decode(encode(info, "edge1/f/n"), NodeInfo).data == info


def _values(readings: DeviceReadings) -> dict[str, float | None]:
    return {name: reading.value for name, reading in msgspec.structs.asdict(readings).items()}


def _sample(name: str, machine: Machine) -> DeviceReadings:
    return DeviceSensors(device_profile(name), machine).sample()


def test_jetson_reports_module_and_gpu(tmp_path: Path) -> None:
    """Load in thousandths, temperature in thousandths of a degree, and the power of the module's input, not of the rails behind it."""
    assert _values(_sample("jetson-orin-nano-8gb", orin_nano(tmp_path))) == {
        "free_bytes": 5_893_120 * 1024, "total_bytes": 7_802_392 * 1024, "utilisation_percent": 43.7, "temperature_c": 46.312,
        "power_w": pytest.approx(5.064 * 1.160),
    }  # fmt: skip


def test_jetson_without_an_input_rail_adds_up_its_rails(tmp_path: Path) -> None:
    """Of AGX Orin's two monitors, what is connected and not behind another rail."""
    readings = _sample("jetson-agx-orin-64gb", agx_orin(tmp_path))
    assert readings.power_w.value == pytest.approx(19.816 * 0.160 + 19.824 * 0.048 + 4.968 * 0.712)
    assert readings.utilisation_percent.value == 43.7


@pytest.mark.parametrize("load", ["devices/gpu.0/load", "devices/platform/gpu.0/load"])
def test_load_is_found_under_its_other_names(tmp_path: Path, load: str) -> None:
    """Releases link the GPU in different places."""
    machine = jetson(tmp_path, "NVIDIA Orin NX Developer Kit", load, AGX_RAILS)
    assert _sample("jetson-orin-nx-16gb", machine).utilisation_percent.value == 43.7


def test_sleeping_gpu_leaves_the_temperature_of_the_chip(tmp_path: Path) -> None:
    """A zone that cannot be read is passed over, and zones that are not asked for are not opened: reading some never returns."""
    machine = orin_nano(tmp_path)
    zones = machine.sys / "class/thermal"
    (zones / "thermal_zone1" / "temp").unlink()
    (zones / "thermal_zone0" / "temp").unlink()
    os.mkfifo(zones / "thermal_zone0" / "temp")  # whoever opened it would wait for ever
    assert _sample("jetson-orin-nano-8gb", machine).temperature_c.value == 48.093


def test_jetson_without_sensors_has_reasons(tmp_path: Path) -> None:
    """No file of a GPU, no zone, no monitor: null with a reason each, and memory all the same."""
    readings = _sample("jetson", server(tmp_path))
    for name in ("utilisation_percent", "temperature_c", "power_w"):
        reading = getattr(readings, name)
        assert reading.value is None
        assert "no " in reading.reason
    assert readings.free_bytes.value == 16_000_000 * 1024


@pytest.mark.parametrize("content", ["", "garbage", "-", "0x10"])
def test_nonsense_of_a_sensor_has_a_reason(tmp_path: Path, content: str) -> None:
    """A file that holds no number gives null with a reason, not an error and not 0."""
    machine = orin_nano(tmp_path)
    write(machine.sys, {"devices/platform/bus@0/17000000.gpu/load": content, "class/hwmon/hwmon1/curr1_input": content})
    readings = _sample("jetson-orin-nano-8gb", machine)
    assert readings.utilisation_percent == Reading(None, "it cannot be read: ValueError")
    assert readings.power_w == Reading(None, "it cannot be read: ValueError")


def test_energy_of_a_processor_is_that_of_all_packages(tmp_path: Path) -> None:
    """Since the first look, across an overflow of a counter, without the parts of a package and without the board."""
    machine, rapl = server(tmp_path), Rapl()
    domains = machine.sys / "class/powercap"
    for number, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("2", "psys")):
        write(domains / f"intel-rapl:{number}", {"name": name, "energy_uj": 262_143_000_000, "max_energy_range_uj": 262_143_328_850})
    assert rapl(machine) == 0
    write(domains, {"intel-rapl:0/energy_uj": 262_143_300_000, "intel-rapl:1/energy_uj": 371_150, "intel-rapl:0:0/energy_uj": 5})
    assert rapl(machine) == pytest.approx(0.3 + 0.7)
    write(domains, {"intel-rapl:1/energy_uj": 1_371_150})
    assert rapl(machine) == pytest.approx(2.0)


def test_processor_reports_how_fast_its_counters_grow(tmp_path: Path) -> None:
    """Watts and utilisation are there once there is an interval; one in which nothing grew is 0, which is then the value."""
    machine = server(tmp_path)
    write(machine.sys / "class/powercap/intel-rapl:0", {"name": "package-0", "energy_uj": 0, "max_energy_range_uj": 10**12})
    sensors = DeviceSensors(device_profile("cpu"), machine)
    write(machine.sys / "class/powercap/intel-rapl:0", {"energy_uj": 5_000_000})
    write(machine.proc, {"stat": "cpu  104 0 51 900 20 0 5 0 0 0"})
    time.sleep(2 * SHORTEST_INTERVAL_S)
    values, then = _values(sensors.sample()), time.monotonic()
    assert 0 < (values["power_w"] or 0) <= 5 / (2 * SHORTEST_INTERVAL_S)
    assert 0 < (values["utilisation_percent"] or 0) <= 100
    while time.monotonic() - then < 2 * SHORTEST_INTERVAL_S:
        assert sensors.sample().power_w in (Reading(None, "no interval yet"), Reading(0.0))
    assert busy_core_seconds(machine) == 160 / os.sysconf("SC_CLK_TCK")


def test_counter_that_only_root_may_read_has_a_reason(tmp_path: Path) -> None:
    """As most kernels have it."""
    if os.geteuid() == 0:
        pytest.skip("RUN AS ROOT, who may read everything")
    machine = server(tmp_path)
    write(machine.sys / "class/powercap/intel-rapl:0", {"name": "package-0", "energy_uj": 1, "max_energy_range_uj": 2})
    (machine.sys / "class/powercap/intel-rapl:0/energy_uj").chmod(0)
    assert _sample("cpu", machine).power_w == Reading(None, "it cannot be read: PermissionError")
