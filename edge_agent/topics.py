"""Topics of the MQTT contract. Only a node writes under its `up/`, only a coordinator under its `down/`.

edge1/<fleet>/coordinator/<instance>/state      retained, last will
edge1/<fleet>/<node>/up/{hello,state,info,heartbeat}
edge1/<fleet>/<node>/up/job/<job>/{status,progress,result,forgotten}
edge1/<fleet>/<node>/up/file/<sha256>/{request,block/<number>}
edge1/<fleet>/<node>/up/plan/<request>/answer
edge1/<fleet>/<node>/down/job/<job>/{offer,cancel,options,watch}
edge1/<fleet>/<node>/down/plan/<request>/request
edge1/<fleet>/<node>/down/ack/<message>
edge1/<fleet>/<node>/down/command/{report,drain,resume,forget}
edge1/<fleet>/<node>/down/file/<sha256>/{request,block/<number>}
"""

from __future__ import annotations

ROOT = "edge1"
COORDINATOR = "coordinator"
"""Takes the place of a node in the topics of coordinators, so no node may have this id."""


def coordinator_state(fleet: str, instance: str) -> str:
    return f"{ROOT}/{fleet}/{COORDINATOR}/{instance}/state"


def up(fleet: str, node: str, *parts: object) -> str:
    """Return a topic that the node writes."""
    return "/".join((ROOT, fleet, node, "up", *map(str, parts)))


def down(fleet: str, node: str, *parts: object) -> str:
    """Return a topic that the node reads."""
    return "/".join((ROOT, fleet, node, "down", *map(str, parts)))


def node_subscriptions(fleet: str, node: str) -> list[str]:
    return [down(fleet, node, "#"), coordinator_state(fleet, "+")]


def coordinator_subscriptions(fleet: str) -> list[str]:
    return [up(fleet, "+", "#")]


def block_number(text: str) -> int | None:
    """Return the number of a block in a topic, or None for what is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else None


def split(topic: str) -> tuple[str, list[str]]:
    """Return who a topic is about (a node's id, or `coordinator`; nobody where it is too short) and its parts after that."""
    who, *parts = topic.split("/")[2:] or [""]
    return who, parts
