"""The link to the broker: one thread that connects, again and again, and only moves messages to and from a queue.

Every connection is a fresh client, because paho keeps its own queue in memory and the last will carries the number of the
connection; what must not be lost is in the store. A received message is acknowledged by whoever has stored it (`Link.acknowledge`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import paho.mqtt.client as paho
import psutil
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.backlog import Come, Going
from edge_agent.config import Broker, Proxy
from edge_agent.errors import ConfigInvalid
from edge_agent.proxy import open_tunnel, with_way
from edge_agent.tls import client_context
from edge_agent.watchdog import LinkLife

log = logging.getLogger(__name__)

SESSION_S = 7 * 24 * 3600
"""How long the broker keeps messages for a client that is away (MQTT 5; with 3.1.1 the broker decides)."""
WILL_DELAY_S = 30
"""The broker waits one keepalive, and no longer than this, before it tells that a connection is lost (MQTT 5): the pauses before the first
four attempts to be back, of up to 1, 2, 4 and 8 seconds, fit in. Far below `SESSION_S`: with its session, a will is out at once."""
DAY_S = 24 * 3600.0
RETRY_S, LONGEST_RETRY_S = 1.0, 120.0
STEADY_S = 30.0
"""A connection that has lasted as long was a good one: the next attempt comes soon."""
CONNECT_TIMEOUT_S = 10.0
ANSWER_S = 5.0
"""From an open connection to its subscriptions. Some brokers never answer a version of MQTT that they do not speak."""
FRESH_BOOT_S = 60.0
PACKET_SHARE = 0.8
"""Part of the broker's packet limit that is used, to leave room for headers."""
LONGEST_PACKET_BYTES = 16 * 2**20
"""The broker is asked to drop longer ones (MQTT 5): paho would take them into memory whole. Those below get an answer."""
MAX_IN_FLIGHT = 8
"""QoS 1 messages on their way at once, or the broker's Receive Maximum where that is less: paho does not heed it."""
MOST_SUBSCRIBED = 8
"""Subscriptions of one message: what AWS IoT Core takes."""
NO_VERSION_5 = "the broker does not answer in MQTT 5"
TAKEN_OVER = "Session taken over"
"""What a broker says in MQTT 5 to a client whose id another one has come with; in 3.1.1 it only closes the connection."""
MOST_COME = 64
"""Messages of QoS 1 that the broker may have on their way here at once (MQTT 5; with 3.1.1 it decides, 20 is usual)."""
DROPPED_S = 60.0
"""Between two words on what was dropped."""
ANSWERS = ("Received PINGRESP", "Received PUBACK", "Received SUBACK")
"""How paho tells, in the words of its log, that the broker has answered: there is no other way to hear of a PINGRESP."""
VERSION_REFUSED = {"Unsupported protocol version", "Protocol error", "Malformed packet"}


@dataclass(frozen=True)
class Connected:
    """The session is up and subscribed."""

    protocol: str


@dataclass(frozen=True)
class Disconnected:
    """The session has ended; the link tries again by itself."""

    why: str


@dataclass(frozen=True)
class Received:
    """A message. QoS 1 messages come again until they are acknowledged."""

    topic: str
    payload: bytes
    client: paho.Client = field(repr=False)
    number: int = 0
    qos: int = 0
    retained: bool = False


LinkEvent = Connected | Disconnected | Received


@dataclass(frozen=True)
class Birth:
    """What the broker publishes, retained, when a connection is lost: the last will."""

    topic: str
    will: bytes


class Pauses:
    """Those between attempts to connect: random, so that the nodes of a fleet do not come back all at once, and growing."""

    def __init__(self, source: random.Random) -> None:
        self._source, self._longest_s = source, RETRY_S

    def after(self, lasted_s: float) -> float:
        """Return how long to wait after an attempt, or a connection, that has lasted so long.

        A connection that is lost at once again and again is as bad as none: two clients may fight for one id.
        """
        self._longest_s = RETRY_S if lasted_s > STEADY_S else min(2 * self._longest_s, LONGEST_RETRY_S)
        return self._source.uniform(RETRY_S / 2, self._longest_s)


def expiry(life_s: float | None) -> Properties | None:
    """Return the properties of a message that may expire, in whole seconds; paho leaves them out with 3.1.1."""
    if life_s is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.MessageExpiryInterval = max(1, int(life_s))  # of 0, brokers differ
    return properties


class Link:
    """A supervised connection. Events go to `events`; `publish` may be called from any thread."""

    def __init__(
        self, broker: Broker, client_id: str, subscriptions: list[str], events: SimpleQueue[Any], birth: Callable[[], Birth | None],
        sender: Callable[[str], str] | None = None, is_standing: Callable[[str], bool] = lambda _: False, *, keeps: bool = True,
    ) -> None:  # fmt: skip
        """`birth()` is called before each connection and returns its `Birth`, or None for a connection without a will.

        `sender`, `is_standing`: see backlog.Come; a link without them listens to one other alone.
        `keeps`: whether the broker keeps messages for it while it is away.
        """
        self._broker, self._client_id, self._subscriptions = broker, client_id, subscriptions
        self._events, self._birth, self._keeps = events, birth, keeps
        self._closing = threading.Event()
        self._client: paho.Client | None = None
        self._version: Literal["5", "3.1.1"] = "3.1.1" if broker.protocol == "3.1.1" else "5"
        self._subscribed = False
        self._limit: int = broker.packet_limit
        self._password = broker.password
        _ = broker.proxy and broker.proxy.login  # read anew with every connection
        if broker.tls is not None:
            client_context(broker.tls, "broker.tls")
        self._come, self._going = Come[Received](events.put, _acknowledge, sender, is_standing), Going()
        self._expiry_looked_at, self._dropped_at = -DAY_S, -DROPPED_S
        self._moved_at = self._answered_at = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="mqtt", daemon=True)
        self._thread.start()

    def supervise(self) -> None:
        """Start the link's thread again where a defect has ended it, with its traceback on standard error.

        Tell an expiry that is near, and how many messages came too fast.
        """
        if self._thread is not None and not self._thread.is_alive() and not self._closing.is_set():
            log.error("link_thread_died")
            self.start()
        now = time.monotonic()
        if now - self._dropped_at >= DROPPED_S and (dropped := self._come.take_dropped()):
            self._dropped_at = now
            log.warning("messages_dropped count=%d most_of=%s", dropped.total(), dropped.most_common(1)[0][0])
        if now - self._expiry_looked_at >= DAY_S:
            self._expiry_looked_at = now
            if self._broker.tls is not None and self._broker.tls.certificate_file is not None:
                from edge_agent.enrolment import tell_expiry  # takes megabytes of an agent without a certificate

                tell_expiry(self._broker.tls.certificate_file)

    @property
    def connected(self) -> bool:
        return self._subscribed

    def life(self) -> LinkLife:
        """What it does, for who watches over the daemon."""
        now, broker = time.monotonic(), self._broker
        moved_s, answered_s = now - self._moved_at, now - self._answered_at
        return LinkLife(f"{broker.host}:{broker.port}", self._subscribed, moved_s, answered_s, broker.keepalive_s)

    @property
    def dropped(self) -> int:
        """Messages that came faster than they were handled, since the start."""
        return self._come.dropped

    @property
    def client(self) -> paho.Client | None:
        """That of the present connection."""
        return self._client

    @property
    def payload_limit(self) -> int:
        """Longest payload that the broker takes for sure."""
        return int(self._limit * PACKET_SHARE)

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False, life_s: float | None = None) -> bool:
        """Hand a message to the connection; False where there is none, it is too slow for more, or the broker would refuse the size.

        `life_s`: the broker drops the message for those who have not got it by then (MQTT 5; 3.1.1 knows no such thing).
        """
        client, going = self._client, self._going
        if client is None or not self._subscribed:
            return False
        if len(payload) > self.payload_limit:
            log.error("message_too_long topic=%s bytes=%d limit=%d", topic, len(payload), self.payload_limit)
            return False
        if not going.has_room(payload):
            return False
        given = client.publish(topic, payload, qos, retain, expiry(life_s))
        if given.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        going.add(given, payload)
        return True

    def acknowledge(self, message: Received) -> None:
        """Tell the broker that a message is stored, or dropped for good. On a connection that has ended the broker does not hear it."""
        _acknowledge(message)
        self._come.handled(message)

    def reconnect(self) -> None:
        """End the connection in order; the next one has a new last will."""
        if (client := self._client) is not None:
            client.disconnect()

    def close(self, last: tuple[str, bytes] | None = None, timeout_s: float = 3.0) -> None:
        """End the connection in order, after a last retained message where there is one."""
        client = self._client
        if client is not None:
            if last is not None and self._subscribed:
                try:
                    client.publish(*last, qos=1, retain=True).wait_for_publish(timeout_s)
                except (RuntimeError, ValueError):
                    log.warning("last_message_not_sent topic=%s", last[0])
            client.disconnect()
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        if time.time() - psutil.boot_time() < FRESH_BOOT_S:  # a whole fleet may have got its power back
            self._closing.wait(random.uniform(0, FRESH_BOOT_S))
        pauses = Pauses(random.Random())
        while not self._closing.is_set():
            self._version = "3.1.1" if self._broker.protocol == "3.1.1" else "5"
            self._moved_at = began = time.monotonic()
            why = self._connect()
            if why == NO_VERSION_5 and self._broker.protocol == "auto":
                self._version = "3.1.1"
                why = self._connect()
            if not self._closing.is_set():
                self._events.put(Disconnected(with_way(why, self._broker.proxy)))
                if why == TAKEN_OVER:
                    log.error("id_taken_over client=%s", self._client_id)
                self._moved_at = time.monotonic()
                self._closing.wait(pauses.after(self._moved_at - began))

    def _connect(self) -> str:
        """Serve one connection until it ends; return why it ended. Never raises."""
        try:
            return self._connection()
        except (OSError, ValueError, RuntimeError, ConfigInvalid, paho.WebsocketConnectionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._subscribed, self._client = False, None

    def _connection(self) -> str:
        connection = _Connection(
            self._broker, self._client_id, self._subscriptions, self._version, self._subscribed_now, self._come.take, self._heard,
            keeps=self._keeps,
        )  # fmt: skip
        client = connection.client
        if self._broker.tls is not None:  # read anew, so that a certificate can be changed while it runs
            client.tls_set_context(client_context(self._broker.tls, "broker.tls"))
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._password)
        if birth := self._birth():
            connection.leave_will(birth)
        connection.open()
        self._client, self._going = client, Going()
        code, opened = MQTTErrorCode.MQTT_ERR_SUCCESS, time.monotonic()
        while code == MQTTErrorCode.MQTT_ERR_SUCCESS and (client.is_connected() or not self._closing.is_set()):
            self._moved_at = time.monotonic()
            code = client.loop(1.0)
            if not connection.subscribed and time.monotonic() - opened > ANSWER_S:
                connection.give_up()
                break
        if self._version == "5" and not connection.answered and connection.refused in (None, *VERSION_REFUSED):
            return NO_VERSION_5  # some brokers say it, others close the connection
        return connection.refused or paho.error_string(code)

    def _heard(self) -> None:
        self._answered_at = time.monotonic()

    def _subscribed_now(self, packet_limit: int) -> None:
        self._limit, self._subscribed = packet_limit, True
        self._events.put(Connected(self._version))


def _acknowledge(message: Received) -> None:
    if message.qos:
        message.client.ack(message.number, message.qos)


def _mask_pongs(websocket: Any) -> None:
    """Have paho mask its answers to a server's pings too, as all frames of a client must be (RFC 6455, section 5.3).

    It does not by itself, and many servers end a connection at the first frame that is not masked.
    """
    frame = websocket._create_frame
    websocket._create_frame = lambda opcode, data, do_masking=1: frame(opcode, data)


def _reach_through(client: Any, proxy: Proxy, host: str, port: int) -> None:
    """Have paho begin its connections at a proxy. TLS and WebSocket come on top as ever, with the name of the broker.

    Its own proxies need a package that nobody keeps any more.
    """
    client._create_socket_connection = lambda: open_tunnel(proxy, host, port, CONNECT_TIMEOUT_S)


class _Connection:
    """One client from its CONNECT to its end, and what it has heard. Its callbacks run in the link's thread."""

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        subscriptions: list[str],
        version: str,
        on_subscribed: Callable[[int], None],
        on_message: Callable[[Received], None],
        on_answer: Callable[[], None] = lambda: None,
        *,
        keeps: bool = True,
    ) -> None:
        self.answered = self.subscribed = False
        self.refused: str | None = None
        self._broker, self._version, self._keeps = broker, version, keeps
        self._subscriptions = subscriptions
        self._ungranted: dict[int | None, list[str]] = {}
        """Subscriptions that the broker has not answered, by the number of their message."""
        self._on_subscribed, self._on_message, self._packet_limit = on_subscribed, on_message, int(broker.packet_limit)
        self._on_answer = on_answer
        five = version == "5"
        self.client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=None if five else not keeps,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311, reconnect_on_failure=False, manual_ack=True,
            transport="tcp" if broker.websocket_path is None else "websockets",
        )  # fmt: skip
        if broker.websocket_path is not None:
            client.ws_set_options(broker.websocket_path)
        if broker.proxy is not None:
            _reach_through(client, broker.proxy, broker.host, broker.port)
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = CONNECT_TIMEOUT_S
        # With this set, `publish` leaves the socket to the link's thread.
        client.on_socket_register_write = lambda *_: None
        client.on_connect, client.on_subscribe = self._connected, self._granted
        client.on_disconnect, client.on_message, client.on_log = self._disconnected, self._message, self._logged

    def leave_will(self, birth: Birth) -> None:
        """What the broker publishes when this connection is lost and no other comes in time. To be called before `open`."""
        properties = None
        if self._version == "5":
            properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
            # Mosquitto 2.0 ends a session that it is not to keep only with its will, and until then hands it what is for all who share.
            properties.WillDelayInterval = min(self._broker.keepalive_s, WILL_DELAY_S) if self._keeps else 0
        self.client.will_set(birth.topic, birth.will, qos=1, retain=True, properties=properties)

    def open(self) -> None:
        """Connect; the broker's answer comes with the loop. Raises OSError."""
        host, port, keepalive_s = self._broker.host, self._broker.port, self._broker.keepalive_s
        if self._version == "5":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_S if self._keeps else 0
            properties.MaximumPacketSize, properties.ReceiveMaximum = LONGEST_PACKET_BYTES, MOST_COME
            self.client.connect(host, port, keepalive_s, clean_start=not self._keeps, properties=properties)
        else:
            self.client.connect(host, port, keepalive_s)
        if self._broker.websocket_path is not None:
            _mask_pongs(self.client.socket())

    def give_up(self) -> None:
        """Close a connection whose broker does not answer."""
        if self.answered:
            self.refused = "the broker does not answer the subscription"
        self.client.disconnect()
        self.client.loop_write()
        if (sock := self.client.socket()) is not None:
            sock.close()

    def _connected(self, client: paho.Client, _u: Any, _f: Any, reason: ReasonCode, properties: Properties | None) -> None:
        if reason.is_failure:
            self.refused = str(reason)
            return
        self.answered = True
        self._packet_limit = int(getattr(properties, "MaximumPacketSize", self._broker.packet_limit))
        # Its setter takes no change of an open connection, and the broker says only now what it takes.
        client._max_inflight_messages = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        for first in range(0, len(self._subscriptions), MOST_SUBSCRIBED):
            topics = self._subscriptions[first : first + MOST_SUBSCRIBED]
            self._ungranted[client.subscribe([(topic, 1) for topic in topics])[1]] = topics

    def _granted(self, client: paho.Client, _u: Any, number: int, reasons: list[ReasonCode], _p: Any) -> None:
        topics = self._ungranted.pop(number, [])
        refused = [topic for topic, reason in zip(topics, reasons, strict=False) if reason.is_failure]
        if refused:
            self.refused = f"the broker refuses to subscribe to {', '.join(refused)}"
            client.disconnect()
            return
        if self._ungranted:
            return
        self.subscribed = True
        self._on_subscribed(self._packet_limit)

    def _disconnected(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        if reason.is_failure and self.refused is None and self.answered:
            self.refused = str(reason)

    def _logged(self, _c: paho.Client, _u: Any, _level: int, text: str) -> None:
        if text.startswith(ANSWERS):
            self._on_answer()

    def _message(self, client: paho.Client, _u: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError as error:  # not every broker looks; unacknowledged it would end this connection and every later one
            log.warning("message_invalid topic=%r error=%s", error.object, error.reason)
            if message.qos:
                client.ack(message.mid, message.qos)
            return
        self._on_message(Received(topic, bytes(message.payload), client, message.mid, message.qos, message.retain))
