"""Topics of the MQTT contract. Only a node writes under its `up/`, only a coordinator under its `down/`.

edge1/<fleet>/coordinator/<instance>/state      retained, last will
edge1/<fleet>/coordinator/<instance>/changed    for other coordinators
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


def coordinator_changed(fleet: str, instance: str) -> str:
    """Return the topic on which a coordinator tells others that share its work of what it has stored."""
    return f"{ROOT}/{fleet}/{COORDINATOR}/{instance}/changed"


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


def shared_subscriptions(fleet: str) -> list[str]:
    """Return those of each of several coordinators.

    Of the first ones the broker hands each message to one coordinator, whichever. The others are heard by all: what is retained, which no
    shared subscription gets; what is told live, for whoever looks at it there; answers and blocks, which only the one that has asked needs.
    """
    shared = [["hello"], ["heartbeat"], ["job", "+", "status"], ["job", "+", "result"], ["job", "+", "forgotten"], ["file", "+", "request"]]
    by_all = [["state"], ["info"], ["job", "+", "progress"], ["plan", "+", "answer"], ["file", "+", "block", "+"]]
    own = [up(fleet, "+", *parts) for parts in by_all]
    return [f"$share/{ROOT}-{fleet}/{up(fleet, '+', *parts)}" for parts in shared] + [*own, coordinator_changed(fleet, "+")]


def block_number(text: str) -> int | None:
    """Return the number of a block in a topic, or None for what is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else None


def split(topic: str) -> tuple[str, list[str]]:
    """Return who a topic is about (a node's id, or `coordinator`; nobody where it is too short) and its parts after that."""
    who, *parts = topic.split("/")[2:] or [""]
    return who, parts
