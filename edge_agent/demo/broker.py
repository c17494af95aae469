"""A broker for one demo: `mosquitto` where it is installed, else amqtt in a process of its own (MQTT 3.1.1, keeps nothing on disk)."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import sys
from pathlib import Path

SERVER_DIRECTORIES = ("/usr/sbin", "/usr/local/sbin")
"""Where packages put servers; not always on the PATH of an ordinary user."""


def broker_command(directory: Path, port: int) -> tuple[str, list[str]]:
    """Return (the broker's name, the command that starts it on a port of loopback)."""
    mosquitto = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), *SERVER_DIRECTORIES]))
    if mosquitto is None:
        return "amqtt", [sys.executable, "-m", "edge_agent.demo.broker", str(port)]
    settings = directory / "mosquitto.conf"
    # As this user: by dropping root's rights it would forget that it is to end with the demo.
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n", encoding="utf-8")
    return "mosquitto", [mosquitto, "-c", str(settings)]


async def serve(port: int) -> None:
    """Run amqtt until the process is ended."""
    from amqtt.broker import Broker

    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    await Broker({"listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}, "plugins": plugins}).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
