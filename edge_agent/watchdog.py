"""Whether a daemon lives: its loop turns, and its link is what it says to be. systemd's watchdog is fed while that holds.

A broker that is away for hours is no reason to begin anew, nor is a coordinator, whose answers are not asked for: a link that tries
again does its work. A link that says to be connected must hear answers of the broker to what it sends itself (PINGRESP, PUBACK); if none
comes it is told to connect anew, and then the watchdog goes without. A loop that does not turn feeds nothing. Source of what is said:
sd_notify(3).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from edge_agent.notify import USEC, Manager

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Between two looks, at least; the loops of both daemons turn as often."""
STUCK_S = 60.0
"""Without a move of the link's thread while it is connected, where it moves every second."""
ATTEMPT_S = 600.0
"""Likewise while it is not, beside what the keepalive adds: the longest pause between attempts, and names and addresses that are tried."""
SILENCE_S = 300.0
"""Without an answer of the broker while it is connected, beside two keepalives: an agent asks as often, a link that idles more often."""
GRACE_S = 60.0
"""For the link to connect anew."""
STOP_S = 30.0
"""To end in, beside what a trainer has for its checkpoint."""


@dataclass(frozen=True)
class LinkLife:
    """What a link does, in seconds up to now."""

    where: str
    """The broker's host and port."""
    connected: bool
    moved_s: float
    """Since its thread moved last."""
    answered_s: float
    """Since the broker answered last what this side had sent."""
    keepalive_s: int


@dataclass(frozen=True)
class Verdict:
    """What follows from it."""

    feed: bool
    reconnect: bool
    status: str


def judge(link: LinkLife) -> Verdict:
    """Decide whether the watchdog is fed, while the loop turns."""
    if not link.connected:
        if link.moved_s > ATTEMPT_S + 4 * link.keepalive_s:
            return Verdict(False, False, f"no connection to {link.where}, and none was tried for too long")
        return Verdict(True, False, f"no connection to {link.where}; it is tried again")
    if link.moved_s > STUCK_S:
        return Verdict(False, False, f"connected to {link.where}, by a thread that does not move")
    silence_s = link.answered_s - SILENCE_S - 2 * link.keepalive_s
    if silence_s > GRACE_S:
        return Verdict(False, False, f"connected to {link.where}, which answers nothing; the connection does not end")
    if silence_s > 0:
        return Verdict(True, True, f"connected to {link.where}, which answers nothing; it is tried anew")
    return Verdict(True, False, f"connected to {link.where}")


class Watched(Protocol):
    """What is asked of a link."""

    def life(self) -> LinkLife: ...

    def reconnect(self) -> None: ...


class Heart:
    """Of a daemon: tells systemd that it serves and how, and feeds its watchdog. Made before what the daemon starts."""

    def __init__(self, manager: Manager | None = None) -> None:
        self._manager = manager or Manager()
        self._beaten_at, self._told = -BEAT_S, Verdict(True, False, "")

    def ready(self) -> None:
        """The daemon serves."""
        self._manager.tell(READY=1)

    def beat(self, link: Watched, doing: str = "") -> None:
        """Look at the link, and feed the watchdog if it is well. To be called at every turn of the daemon's loop; `doing` is for people."""
        if (now := time.monotonic()) - self._beaten_at < BEAT_S:
            return
        self._beaten_at, verdict = now, judge(link.life())
        if verdict.reconnect and not self._told.reconnect:
            log.warning("link_silent why=%r", verdict.status)
            link.reconnect()
        if self._told.feed and not verdict.feed:
            log.error("watchdog_starves why=%r", verdict.status)
        self._told = verdict
        status = f"{verdict.status}; {doing}" if doing else verdict.status
        self._manager.tell(STATUS=status, **{"WATCHDOG": 1} if verdict.feed else {})

    @property
    def is_well(self) -> bool:
        """Whether the last look found the link to be what it says."""
        return self._told.feed

    def stopping(self, patience_s: float = 0.0) -> None:
        """The daemon is about to end, in so many seconds and some."""
        self._manager.tell(STOPPING=1, STATUS="ends", EXTEND_TIMEOUT_USEC=int((patience_s + STOP_S) * USEC))
