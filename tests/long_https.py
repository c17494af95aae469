"""Either side is killed while a file travels by HTTPS, for `make test-all`: `pytest tests/long_https.py`.

A dataset down and an adapter up go on from where they were, and the job ends once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet, free_port, wait_for
from narrow import Narrow
from orders import NODE
from test_killed import BRIEF, check

from edge_agent.enrolment import Authority
from edge_agent.messages import BLOCK_BYTES

RATE_BYTES = 500_000
LEAST_BLOCKS = 4
"""That must have come when a side is killed, and that must be missing."""
OVERHEAD = 1.05
"""TLS records and heads of HTTP."""


@pytest.fixture(scope="module")
def way() -> Iterator[Narrow]:
    narrow = Narrow(free_port(), None)
    yield narrow
    narrow.close()


@pytest.fixture(scope="module")
def fleet(way: Narrow) -> Iterator[Fleet]:
    """A fleet whose files go by HTTPS, through a narrow way."""
    tls = f'ca_file = "tls/ca.pem"\ncertificate_file = "tls/{NODE}.pem"\nkey_file = "tls/{NODE}.key"\n'
    fleet = Fleet(agent=f'[file_servers.lab]\nurl = "https://127.0.0.1:{way.port}"\n[file_servers.lab.tls]\n{tls}')
    authority = Authority(fleet.directory / "authority")
    authority.issue("node", NODE, fleet.directory / "tls")
    authority.issue("broker", "127.0.0.1", fleet.directory / "tls")
    with fleet.config("coordinator").open("a") as config:
        config.write(f'[https]\nhost = "127.0.0.1"\nport = {way.to}\nca_file = "tls/ca.pem"\n')
        config.write('certificate_file = "tls/127.0.0.1.pem"\nkey_file = "tls/127.0.0.1.key"\n')
    with fleet:
        yield fleet
        assert fleet.trainers_at_once == 1


def _half_way(directory: Path) -> bool:
    """Whether some of the one file on its way there has come, and some is missing."""
    return any(min(come.count(0), come.count(1)) >= LEAST_BLOCKS for come in map(Path.read_bytes, directory.glob("*.map")))


def _settled(map_file: Path) -> bytes:
    """What has come when nothing comes any more: the other side may still take in what the killed one has sent."""
    found = map_file.read_bytes()
    while True:
        time.sleep(0.3)
        if (later := map_file.read_bytes()) == found:
            return found
        found = later


def _moved(fleet: Fleet, way: Narrow, direction: str) -> int:
    """Bytes that have gone down or up, by HTTPS and in blocks over the broker."""
    blocks = (payload for _, topic, payload in list(fleet.messages) if f"/{direction}/file/" in topic and "/block/" in topic)
    return int(getattr(way, f"{direction}_bytes")) + sum(map(len, blocks))


@pytest.mark.parametrize("side", ["agent", "coordinator"])
def test_file_goes_on_where_it_was_after_kill_9_of(side: str, fleet: Fleet, way: Narrow) -> None:
    """By HTTPS after a restart of the agent; over the broker after one of the coordinator, whose server rests then. What had come does not
    come again."""
    way.rate_bytes = RATE_BYTES
    data = fleet.data(f"long-{side}", 4200, len(side))
    job = fleet.submit(data, **BRIEF, dataset__limit=16).id
    for receiver, direction in (("node", "down"), ("coordinator", "up")):
        incoming = fleet.directory / receiver / "files" / "incoming"
        wait_for(f"half a file at the {receiver}", lambda place=incoming: _half_way(place))  # type: ignore[misc]
        fleet.stop(side, signal.SIGKILL)
        way.cut()
        [map_file] = incoming.glob("*.map")
        come = _settled(map_file)
        sha256, missing = map_file.name.partition(".")[0], come.count(0)
        assert come.count(1) >= LEAST_BLOCKS
        assert missing > 0
        before = _moved(fleet, way, direction)
        fleet.start_agent() if side == "agent" else fleet.start_coordinator()
        wait_for(f"the file at the {receiver}", (incoming.parent / "sha256" / sha256).exists)
        assert _moved(fleet, way, direction) - before < (missing + 1) * BLOCK_BYTES * OVERHEAD, come
    way.rate_bytes = None
    check(fleet, job, 1)
    assert any("/block/" in topic for _, topic, _ in fleet.messages) == (side == "coordinator")
    assert "event_failed" not in fleet.log("agent") + fleet.log("coordinator")
