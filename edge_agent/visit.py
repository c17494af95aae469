"""A visit to the broker as this node: the way to the coordinator and back, its clock, and what the broker lets this node do as another.

Each is found out by doing it. The other node is invented for the visit, and what is said as that node and to it is heard and forgotten:
a `hello`, which a coordinator acknowledges and does not keep, and an acknowledgement of nothing. Of what others say nothing is read.

A broker that gives every client of a user one id has the visit take the connection of a running agent, until that comes again half a second
later at the soonest. So all requests go out together, and what the visit subscribes to beside its own topics is given up right away.

Does not cover: a broker that refuses all that is said as another, and lets a node hear what others are told. With MQTT 3.1.1, which does
not tell what is refused, only what comes back is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.reasoncodes import ReasonCode

from edge_agent.admission import Rejected, open_envelope
from edge_agent.config import AgentConfig
from edge_agent.errors import MessageInvalid
from edge_agent.messages import LIFE_S, Ack, Envelope, Hello, decode, encode, new_id
from edge_agent.mqtt import Connected, Disconnected, Link, Received, expiry
from edge_agent.signing import seal
from edge_agent.topics import COORDINATOR, down, split, up

ANSWER_S = 10.0
QUIET_S = 0.5
"""What a broker was going to deliver has come by then."""


@dataclass
class Visit:
    """What was found."""

    where: str
    protocol: str | None = None
    """Version of MQTT; None where there was no connection."""
    why: str | None = None
    """Why there was none, or how it ended before its time."""
    answered: bool = False
    """Whether the broker has answered everything that was asked of it."""
    refused: str | None = None
    """What the broker answers where it does not take what this node says as itself."""
    answer_s: float | None = None
    """Until the coordinator's acknowledgement; None where none came."""
    distrusted: str | None = None
    """What is wrong with that acknowledgement, where it was not taken: nobody trusted has signed it."""
    clock_ahead_s: float | None = None
    """This clock before the coordinator's, to half of `answer_s`."""
    trespasses: list[str] = field(default_factory=list)
    """What this node could do that it should not be able to."""


@dataclass(frozen=True)
class _Answered:
    """The broker's answer to a request."""

    number: int | None
    reasons: list[ReasonCode]


class _Guest:
    """A connection that is there for the visit. `wait` takes in what has come."""

    def __init__(self, config: AgentConfig, client_id: str, topic: str) -> None:
        self.protocol: str | None = None
        self.why: str | None = None
        self.heard: dict[str, tuple[float, bytes]] = {}
        """When the last message of a topic came, and what it said."""
        self._topic, self._events = topic, SimpleQueue[Any]()
        self._answers: dict[int | None, list[ReasonCode]] = {}
        self._link = Link(config.broker, client_id, [topic], self._events, lambda: None)
        self._link.start()

    def connect(self) -> bool:
        if not self.wait(lambda: self.protocol is not None, ANSWER_S):
            self.why = self.why or f"no answer in {ANSWER_S:.0f} s"
        elif (client := self._link.client) is not None:
            put = self._events.put  # in the link's thread
            client.on_subscribe = client.on_unsubscribe = lambda _c, _u, number, reasons, _p: put(_Answered(number, reasons))
            client.on_publish = lambda _c, _u, number, reason, _p: put(_Answered(number, [reason]))
        return self.why is None

    def wait(self, done: Callable[[], bool], seconds: float = ANSWER_S) -> bool:
        """Wait until something is so; False where it is not in time, or the connection ends."""
        until = time.monotonic() + seconds
        while not done() and self.why is None:
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            match event:
                case Connected(protocol):
                    self.protocol = protocol
                case Disconnected(why):
                    self.why = why
                case Received(topic):
                    self.heard[topic] = time.monotonic(), event.payload
                    if topic == self._topic:  # anything else may be the agent's, who has yet to store it
                        self._link.acknowledge(event)
                case _Answered(number, reasons):
                    self._answers[number] = reasons
        return done()

    def say(self, topic: str, payload: bytes, life_s: float | None = None) -> int | None:
        """Publish; return the number of the request."""
        client = self._link.client
        return None if client is None else client.publish(topic, payload, qos=1, properties=expiry(life_s)).mid

    def listen(self, topics: list[str]) -> int | None:
        client = self._link.client  # with QoS 0 nothing waits for the next visit
        return None if client is None else client.subscribe([(topic, 0) for topic in topics])[1]

    def unlisten(self, topics: list[str]) -> int | None:
        client = self._link.client
        return None if client is None else client.unsubscribe(topics)[1]

    def answered(self, *numbers: int | None) -> bool:
        """Wait for the answers to some requests; False where they do not come."""
        return None not in numbers and self.wait(lambda: self._answers.keys() >= set(numbers))

    def refusal(self, number: int | None) -> str | None:
        """What the broker has against a request that it has answered."""
        return next((str(reason) for reason in self._answers[number] if reason.is_failure), None)

    def close(self) -> None:
        """End the connection, and leave no subscription behind."""
        if self.why is None:
            self.answered(self.unlisten([self._topic]))
        self._link.close()


def visit(config: AgentConfig) -> Visit:
    """Go to the broker and try everything. Raises ConfigInvalid where the configuration's secrets or certificates cannot be read."""
    found, message = Visit(f"{config.broker.host}:{config.broker.port}"), new_id()
    answer = down(config.fleet, config.node, "ack", message)
    guest = _Guest(config, f"doctor/{config.node}", answer)
    try:
        if guest.connect():
            found.protocol = guest.protocol
            _try_everything(config, found, guest, message, answer)
        else:
            found.why = guest.why
    finally:
        guest.close()
    return found


def _try_everything(config: AgentConfig, found: Visit, guest: _Guest, message: str, answer: str) -> None:
    stranger, states = f"doctor-{new_id()}", up(config.fleet, "+", "state")
    nothing = Ack(config.fleet, stranger, new_id(), datetime.now(timezone.utc), 0)
    as_stranger, to_stranger = up(config.fleet, stranger, "hello"), down(config.fleet, stranger, "ack", nothing.message)
    sent, sent_at = time.monotonic(), time.time()
    hello = guest.say(up(config.fleet, config.node, "hello"), encode(Hello(), "doctor", message_id=message), LIFE_S[Hello])
    # The states of other nodes are retained. Nothing is said of the stranger after this visit, so its topics may stay subscribed.
    listening = guest.listen([states, up(config.fleet, stranger, "#"), down(config.fleet, stranger, "#")])
    said = {
        as_stranger: guest.say(as_stranger, encode(Hello(), "doctor"), LIFE_S[Hello]),
        to_stranger: guest.say(to_stranger, encode(seal(nothing, None), "doctor")),
    }
    found.answered = guest.answered(hello, listening, *said.values())
    guest.unlisten([states])
    if found.answered:
        found.refused = guest.refusal(hello)
        guest.wait(lambda: answer in guest.heard, 0.0 if found.refused else ANSWER_S)
        guest.wait(lambda: guest.heard.keys() >= said.keys(), QUIET_S)
    found.why = guest.why
    if answer in guest.heard:
        came, payload = guest.heard[answer]
        try:
            told = open_envelope(decode(payload, Envelope).data, Ack, config, message=message).time
        except (Rejected, MessageInvalid) as error:
            found.distrusted = str(error)
        else:
            found.answer_s = came - sent
            found.clock_ahead_s = sent_at + found.answer_s / 2 - told.timestamp()
    if found.answered:
        found.trespasses = _trespasses(config.node, guest, said)
        guest.unlisten([up(config.fleet, stranger, "#"), down(config.fleet, stranger, "#")])
        if _second_stays(config, guest):
            found.trespasses.append("take the id of any other client, and with it what waits for that")


def _trespasses(node: str, guest: _Guest, said: dict[str, int | None]) -> list[str]:
    """What of all that was said and heard should not have been."""
    found = []
    as_stranger, to_stranger = said
    taken = [topic for topic, number in said.items() if guest.refusal(number) is None]
    if guest.protocol == "3.1.1":
        taken = [topic for topic in taken if topic in guest.heard]
    if as_stranger in taken:
        found.append("speak as any other node")
    if to_stranger in taken:
        found.append("speak to any other node as its coordinator")
    if any(split(topic)[0] not in (node, COORDINATOR) for topic in guest.heard):
        found.append("hear what other nodes say or are told")
    return found


def _second_stays(config: AgentConfig, guest: _Guest) -> bool:
    """Whether the same user may come under another id: where ids are bound to users, the second ends the first, or does not come."""
    if guest.why is not None:  # the agent has: it came again
        return False
    second = _Guest(config, f"doctor/{config.node}/second", down(config.fleet, config.node, "ack", new_id()))
    try:
        return second.connect() and not guest.wait(lambda: guest.why is not None, QUIET_S)
    finally:
        guest.close()  # before it comes again, and ends the second in turn
        second.close()
