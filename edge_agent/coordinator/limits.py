"""How often somebody may ask: a bucket for each token and address that fills steadily, of which a bounded number is kept."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict

from edge_agent.errors import TooManyRequests

MOST_BUCKETS = 4096
NETWORK_BITS = 64
"""Of an IPv6 address: who has one has all that follow."""


class Limits:
    """`per_minute` requests each, and as many at once. Any thread may ask."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """Take one request of a bucket. Raises TooManyRequests where it is empty."""
        with self._lock:
            now = time.monotonic()
            left, then = self._buckets.pop(key, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
            self._buckets[key] = (max(0.0, left - 1) if left >= 1 else left, now)
            if len(self._buckets) > MOST_BUCKETS:  # that of who has not asked for the longest: it is the fullest, or nearly
                self._buckets.popitem(last=False)
        if left < 1:
            raise TooManyRequests((1 - left) * 60 / self._per_minute)

    def __len__(self) -> int:
        return len(self._buckets)


def network(address: str) -> str:
    """Return what is counted as one address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((address, NETWORK_BITS), strict=False)) if parsed.version == 6 else address
