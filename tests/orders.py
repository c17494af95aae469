"""Orders and offers as a coordinator makes them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.job import Job
from edge_agent.messages import File, Offer, Order, new_id
from edge_agent.signing import seal

FLEET, NODE = "default", "node-1"


def make_order(job: Job, size_bytes: int, **changes: Any) -> Order:
    """Return an order of a job for the node of the test fleet, with some fields changed."""
    now = datetime.now(timezone.utc)
    fields = {"id": new_id(), "fleet": FLEET, "node": NODE, "issued": now, "expires": now + timedelta(hours=1)}
    return Order(**fields | {"job": job, "dataset": File(job.dataset.sha256, size_bytes)} | changes)  # type: ignore[arg-type]


def make_offer(order: Order, data: bytes | None = None, key: Ed25519PrivateKey | None = None) -> Offer:
    """Return an order in its envelope, signed if there is a key, beside the dataset if that is given."""
    return Offer(seal(order, key), {} if data is None else {order.dataset.sha256: data})
