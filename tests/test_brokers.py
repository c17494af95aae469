"""The brokers that docs/scale.md names: the protocol stays within what they take, and the sample rules of deploy/ say all the same."""

from __future__ import annotations

import fnmatch
import json
import random
import re
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from orders import make_offer, make_order

from edge_agent.asyncapi import CHANNELS
from edge_agent.config import Broker, Size
from edge_agent.job import Dataset, Job
from edge_agent.messages import BLOCK_BYTES, MAX_INLINE_BYTES, MAX_MESSAGE_BYTES, encode, new_id
from edge_agent.mqtt import MAX_IN_FLIGHT, MOST_SUBSCRIBED, PACKET_SHARE, SESSION_S
from edge_agent.topics import (
    COORDINATOR,
    coordinator_changed,
    coordinator_state,
    coordinator_subscriptions,
    down,
    node_subscriptions,
    shared_subscriptions,
    up,
)

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
LONG, JOB = "n" * 64, new_id()
LONGEST = {
    "fleet": LONG, "node": LONG, "instance": LONG, "job": JOB, "message": JOB, "request": JOB, "sha256": "f" * 64, "number": "9" * 19,
}  # fmt: skip
HEADERS_BYTES = 1024
"""Of a packet, besides its payload: its topic, of 256 bytes at most, and properties."""


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """A broker in deploy/brokers.toml."""

    version: str
    source: str
    packet_bytes: int
    topic_bytes: int
    topic_slashes: int
    client_id_bytes: int
    keepalive_s: tuple[int, int]
    subscriptions_at_once: int
    subscriptions: int
    in_flight: int
    queued: int
    session_s: int
    publishes_per_s: int
    bytes_per_s: int
    mqtt_5: bool
    retained: bool
    shared_subscriptions: bool


BROKERS = msgspec.toml.decode((DEPLOY / "brokers.toml").read_bytes(), type=dict[str, Limits])
EACH = pytest.mark.parametrize("limits", BROKERS.values(), ids=BROKERS.keys())


@EACH
def test_topics_fit(limits: Limits) -> None:
    """With the longest names that there are, those that are subscribed to included."""
    topics = [channel.address.format_map(LONGEST) for channel in CHANNELS.values()]
    filters = [*node_subscriptions(LONG, LONG), *coordinator_subscriptions(LONG), *shared_subscriptions(LONG)]
    for topic in (*topics, *(re.sub(r"^\$share/[^/]+/", "", name) for name in filters)):
        assert topic.count("/") <= limits.topic_slashes, topic
        assert len(topic.encode()) <= limits.topic_bytes, topic


@EACH
def test_packets_fit(limits: Limits) -> None:
    """A block does, and an offer with the longest job document that is taken and as much inside it as is put there."""
    payload = int(min(limits.packet_bytes, Broker().packet_limit) * PACKET_SHARE)  # as where a broker does not tell its limit
    for room in (payload, int(limits.packet_bytes * PACKET_SHARE)):
        assert min(BLOCK_BYTES, room) + HEADERS_BYTES <= limits.packet_bytes
        inline, document = min(MAX_INLINE_BYTES, room // 2), room // 4
        assert len(b64encode(bytes(inline))) + document <= room
        assert min(room, MAX_MESSAGE_BYTES) + HEADERS_BYTES <= limits.packet_bytes
    data = random.Random(1).randbytes(min(MAX_INLINE_BYTES, payload // 2))
    order = make_order(Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**30), len(data))
    assert len(encode(make_offer(order, data), "test")) <= payload


@EACH
def test_links_fit(limits: Limits) -> None:
    """Keepalive, subscriptions, client ids, and how much is on its way at once."""
    assert limits.keepalive_s[0] <= Broker().keepalive_s <= limits.keepalive_s[1]
    assert limits.subscriptions_at_once >= MOST_SUBSCRIBED
    assert len(shared_subscriptions(LONG)) <= limits.subscriptions
    assert limits.in_flight >= MAX_IN_FLIGHT
    assert len(LONG) <= limits.client_id_bytes
    assert limits.mqtt_5
    assert limits.retained
    assert limits.shared_subscriptions
    assert limits.session_s >= SESSION_S or limits.session_s == BROKERS["aws-iot-core"].session_s


def test_longest_names_on_aws() -> None:
    """The client id of a coordinator is the one thing that may be too long there: the page says from where on."""
    room = BROKERS["aws-iot-core"].client_id_bytes - len("coordinator//")
    assert f"`fleet` and `instance` have at most {room} characters together" in " ".join((ROOT / "docs" / "scale.md").read_text().split())


def test_page_shows_the_limits() -> None:
    """Every broker has a column, every limit a row, with the number of the file."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "scale.md").read_text().splitlines() if line.startswith("| ")]
    [head] = [row for row in rows if row[0] == "Limit"]
    names = {"mosquitto": "Mosquitto", "emqx": "EMQX", "hivemq": "HiveMQ", "aws-iot-core": "AWS IoT Core"}
    shown = {row[0].strip("`"): row[1:] for row in rows}
    for field in Limits.__struct_fields__[2:-3]:
        for broker, limits in BROKERS.items():
            value = getattr(limits, field)
            text = " to ".join(f"{v:,}" for v in value) if isinstance(value, tuple) else f"{value:,}" if value else "none"
            assert shown[field][head.index(names[broker]) - 1] == text, (field, broker)


def _samples() -> Iterator[tuple[str, str, str]]:
    """(who, `publish` or `subscribe`, topic or filter) of all that a fleet does."""
    for channel in CHANNELS.values():
        names = LONGEST | {"fleet": "lab", "node": "bench-3", "instance": "main"}
        topic = channel.address.format_map(names)
        yield ("bench-3" if topic.startswith(up("lab", "bench-3")) else "coordinator.main"), "publish", topic
    for name in node_subscriptions("lab", "bench-3"):
        yield "bench-3", "subscribe", name
    for name in (*coordinator_subscriptions("lab"), *shared_subscriptions("lab")):
        yield "coordinator.main", "subscribe", name


FORBIDDEN = (
    ("bench-3", "publish", up("lab", "bench-4", "state")), ("bench-3", "publish", down("lab", "bench-3", "job", JOB, "offer")),
    ("bench-3", "publish", coordinator_state("lab", "main")), ("bench-3", "publish", coordinator_changed("lab", "main")),
    ("bench-3", "subscribe", down("lab", "bench-4", "#")), ("bench-3", "subscribe", up("lab", "+", "#")),
    ("bench-3", "subscribe", "#"), ("bench-3", "subscribe", shared_subscriptions("lab")[0]),
    ("bench-3", "subscribe", coordinator_changed("lab", "+")), ("coordinator.main", "publish", up("lab", "bench-3", "state")),
    ("bench-3", "publish", up("lab", COORDINATOR, "state")),
)  # fmt: skip


def _covers(rule: str, name: str) -> bool:
    """Whether a filter of MQTT takes in a topic, or all that another filter does."""
    rules, names = rule.split("/"), name.split("/")
    for wanted, found in zip(rules, names, strict=False):
        if wanted == "#":
            return True
        if wanted not in ("+", found) or (wanted == "+" and found == "#"):
            return False
    return len(rules) == len(names)


def _emqx(who: str, action: str, name: str) -> bool:
    """What deploy/emqx/acl.conf says."""
    name = re.sub(r"^\$share/[^/]+/", "", name)
    for line in (DEPLOY / "emqx" / "acl.conf").read_text().splitlines():
        rule = re.fullmatch(r'\{(allow|deny), (?:\{username, "([^"]+)"\}|(all)), (publish|subscribe|all), \[(.*)\]\}\.', line)
        if rule is None or rule[2] not in (None, who) or rule[4] not in (action, "all"):
            continue
        if any(_covers(topic.replace("${username}", who), name) for topic in re.findall(r'"([^"]+)"', rule[5])):
            return rule[1] == "allow"
    return False


def _hivemq(who: str, action: str, name: str) -> bool:
    """What deploy/hivemq/credentials.xml says."""
    root = ElementTree.parse(DEPLOY / "hivemq" / "credentials.xml").getroot()  # noqa: S314 (ours)
    roles = {user.findtext("name"): user.findtext("roles/id") for user in root.iter("user")}
    for role in root.iter("role"):
        for permission in role.iter("permission") if role.findtext("id") == roles[who] else ():
            topic, activity = str(permission.findtext("topic")), permission.findtext("activity")
            if activity in (action.upper(), "ALL") and _covers(topic.replace("${{username}}", who), re.sub(r"^\$share/[^/]+/", "", name)):
                return True
    return False


def _aws(who: str, action: str, name: str) -> bool:
    """What the policies of deploy/aws-iot say; `*` there is any text, `+` and `#` only themselves."""
    file = "coordinator" if who.startswith("coordinator") else "node"
    policy = json.loads((DEPLOY / "aws-iot" / f"{file}-policy.json").read_text())
    kind = "topic" if action == "publish" else "topicfilter"
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        resources = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        for resource in resources if f"iot:{action.title()}" in actions else ():
            place = resource.removeprefix(f"arn:aws:iot:REGION:ACCOUNT:{kind}/").replace("${iot:Connection.Thing.ThingName}", who)
            if fnmatch.fnmatchcase(name, place.replace("[", "[[]")):
                return True
    return False


@pytest.mark.parametrize("rules", [_emqx, _hivemq, _aws], ids=["emqx", "hivemq", "aws-iot"])
def test_rules_allow_what_a_fleet_does_and_nothing_else(rules: object) -> None:
    """Those of Mosquitto are tried on a Mosquitto (test_access.py, test_two_coordinators.py)."""
    assert callable(rules)
    for who, action, name in _samples():
        assert rules(who, action, name), (who, action, name)
    for who, action, name in FORBIDDEN:
        assert not rules(who, action, name), (who, action, name)


def test_hivemq_configuration_has_the_limits() -> None:
    """Its XML can be read, and demands certificates."""
    root = ElementTree.parse(DEPLOY / "hivemq" / "config.xml").getroot()  # noqa: S314 (ours)
    assert root.findtext("listeners/tls-tcp-listener/tls/client-authentication-mode") == "REQUIRED"
    assert root.find("listeners/tcp-listener") is None
    limits = BROKERS["hivemq"]
    assert Size(int(root.findtext("mqtt/packets/max-packet-size") or 0)) == limits.packet_bytes
    assert int(root.findtext("mqtt/queued-messages/max-queue-size") or 0) == limits.queued
    assert int(root.findtext("mqtt/session-expiry/max-interval") or 0) == limits.session_s


def test_rules_of_aws_name_what_is_kept() -> None:
    """Who may publish there may have it retained, and hears what it may subscribe to."""
    for file in (DEPLOY / "aws-iot").glob("*.json"):
        for statement in json.loads(file.read_text())["Statement"]:
            if "iot:Publish" in statement["Action"]:
                assert "iot:RetainPublish" in statement["Action"]


def test_page_shows_what_was_measured() -> None:
    """Between its marks docs/scale.md has what the committed results of benchmarks/fleet.py say, and no figure without them."""
    sys.path.append(str(ROOT / "benchmarks"))
    from fleet_page import AWS_MARKS, MARKS, PAGE, Report, aws_lines, lines

    file = ROOT / "benchmarks" / "results" / "fleet.json"
    report = msgspec.json.decode(file.read_bytes(), type=Report) if file.exists() else None
    for marks, say in ((MARKS, lines), (AWS_MARKS, aws_lines)):
        said = "\n".join(say(report)) if report is not None else ""
        assert PAGE.read_text(encoding="utf-8").partition(marks[0])[2].partition(marks[1])[0].strip() == said


def test_model_has_what_every_coordinator_hears() -> None:
    """It counts for each coordinator what that subscribes to for itself, and once what they share; each further one adds no less."""
    sys.path.append(str(ROOT / "benchmarks"))
    from fleet_page import HEARD, TAKEN, Report, coordinators, cores, costs, start_s

    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for topic in shared_subscriptions("lab"):
        if not topic.endswith("/changed"):
            kinds[topic.startswith("$share/")].add("up/" + topic.partition("/up/")[2].replace("+/", "").removesuffix("/+"))
    assert (set(TAKEN), set(HEARD)) == (kinds[True], kinds[False])
    report = msgspec.json.decode((ROOT / "benchmarks" / "results" / "fleet.json").read_bytes(), type=Report)
    own = costs(report)["coordinators"]
    assert own.more is not None
    for nodes in (1_000, 100_000):
        added = [cores(own, nodes, more) - cores(own, nodes) for more in (0, 1, 10)]
        assert added == pytest.approx([0, cores(own.more, nodes), 10 * cores(own.more, nodes)])
        assert start_s(own, nodes, 3) > start_s(own, nodes) > 0
    assert coordinators(report, 1_000, 1.0) == report.coordinators
    needed = coordinators(report, 100_000, 1.0)
    assert needed is None or cores(own, 100_000, needed - report.coordinators) <= needed
    assert coordinators(report, 10**9, 1.0) is None
