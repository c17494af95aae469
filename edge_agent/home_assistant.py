"""What tells Home Assistant of a node: one retained message, by which its MQTT integration finds the sensors of the node.

They read what the node says anyway, its heartbeat and its presence. Nothing is taken from there. The form is that of Home Assistant's
discovery of devices (2024.12 and later).
"""

from __future__ import annotations

from typing import get_type_hints

import msgspec

from edge_agent.messages import NodeInfo, NodeState
from edge_agent.topics import up

PRESENT = "{{ 'online' if value_json.data.state in ('ready', 'draining') else 'offline' }}"


class _Sensor(msgspec.Struct, frozen=True):
    """One figure of the heartbeat."""

    key: str
    name: str
    place: str
    """In the heartbeat's data."""
    kind: str | None = None
    """Home Assistant's `device_class`."""
    unit: str | None = None


SENSORS = (
    _Sensor("device_free", "Device memory free", "resources.device_free_bytes.value", "data_size", "B"),
    _Sensor("job_memory", "Memory of the running job", "resources.trainer_bytes", "data_size", "B"),
    _Sensor("disk_free", "Disk free", "resources.disk_free_bytes", "data_size", "B"),
    _Sensor("utilisation", "Utilisation", "resources.utilisation_percent.value", None, "%"),
    _Sensor("temperature", "Temperature", "resources.temperature_c.value", "temperature", "°C"),
    _Sensor("power", "Power", "resources.power_w.value", "power", "W"),
    _Sensor("queue", "Jobs waiting", "queue"),
)


def discovery_topic(prefix: str, node: str) -> str:
    """Return where a node tells of itself."""
    return f"{prefix}/device/{node}/config"


def discovery(fleet: str, node: str, info: NodeInfo) -> bytes:
    """Return what it tells: a device with its sensors, which have no value where the node has none."""
    own = f"edge-agent-{fleet}-{node}"
    state = up(fleet, node, "state")
    states = list(get_type_hints(NodeState)["state"].__args__)
    sensors: dict[str, dict[str, object]] = {
        "state": {
            "platform": "sensor", "unique_id": f"{own}-state", "name": "State", "device_class": "enum", "options": states,
            "state_topic": state, "value_template": "{{ value_json.data.state }}",
        },
        "job": {
            "platform": "sensor", "unique_id": f"{own}-job", "name": "Running job", "value_template": "{{ value_json.data.job or 'none' }}",
        },
    }  # fmt: skip
    for sensor in SENSORS:
        sensors[sensor.key] = {
            "platform": "sensor", "unique_id": f"{own}-{sensor.key}", "name": sensor.name, "state_class": "measurement",
            "value_template": f"{{{{ value_json.data.{sensor.place} }}}}",
            **({"device_class": sensor.kind} if sensor.kind else {}), **({"unit_of_measurement": sensor.unit} if sensor.unit else {}),
        }  # fmt: skip
    return msgspec.json.encode({
        "device": {"identifiers": [own], "name": node, "model": info.device, "sw_version": info.agent},
        "origin": {"name": "edge-agent", "sw_version": info.agent},
        "components": sensors,
        "state_topic": up(fleet, node, "heartbeat"),
        "availability_topic": state,
        "availability_template": PRESENT,
        "qos": 1,
    })  # fmt: skip
