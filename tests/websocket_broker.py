"""A broker of MQTT 3.1.1 on two ports of loopback, the second within WebSockets: `python tests/websocket_broker.py PORT WEBSOCKET_PORT`."""

from __future__ import annotations

import asyncio
import sys

from amqtt.broker import Broker


async def serve(port: str, websocket_port: str) -> None:
    listeners = {
        "default": {"type": "tcp", "bind": f"127.0.0.1:{port}"},
        "websocket": {"type": "ws", "bind": f"127.0.0.1:{websocket_port}"},
    }
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    await Broker({"listeners": listeners, "plugins": plugins}).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
