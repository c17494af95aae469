"""A daemon of which a part can be stuck, with a heart that beats ten times as fast: `python tests/wedged.py PART --config FILE`.

`handler`: the loop never comes back from the command `report`; `thread`: nor does the link's thread from taking it in; `link`: nothing is
stuck, and a connection that is told to end does so; `stubborn`: one that does not.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from edge_agent import agent, watchdog
from edge_agent.agent import Agent, main
from edge_agent.backlog import Come
from edge_agent.mqtt import Link, Received

KEEPALIVE_S = 10
"""Of the configurations that this is started with."""


def stuck(part: Any) -> Any:
    """Have a method never return where it is given the command."""

    def method(self: Any, message: Any) -> None:
        if isinstance(message, Received) and message.topic.endswith("command/report"):
            threading.Event().wait()
        part(self, message)

    return method


if __name__ == "__main__":
    part, *rest = sys.argv[1:]
    agent.TICK_S = watchdog.BEAT_S = 0.1
    watchdog.STUCK_S, watchdog.SILENCE_S, watchdog.GRACE_S = 2.5, 2.0 - 2 * KEEPALIVE_S, 1.0
    agent.HELLO_S = agent.ANSWER_S = 0.5  # type: ignore[attr-defined]
    if part == "handler":
        Agent._handle = stuck(Agent._handle)  # type: ignore[method-assign]
    elif part == "thread":
        Come.take = stuck(Come.take)  # type: ignore[method-assign]
    elif part == "stubborn":
        Link.reconnect = lambda self: None  # type: ignore[method-assign]
    sys.exit(main(rest))
