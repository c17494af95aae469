"""Sizes as a person writes them."""

from __future__ import annotations

import re

from edge_agent.errors import JobSchema

MOST_BYTES = 2**53 - 1
"""Of all sizes: as large as every reader of JSON can tell them."""
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(text: str, where: str = "--budget") -> int:
    """Return the bytes of `6GiB`, `900 MiB` or `5000000`. Raises JobSchema naming `where`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS or len(match[1]) > 15:
        raise JobSchema(where, f"{text!r} is no size; write it like 6GiB, 900MiB or 5000000")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size > MOST_BYTES:
        raise JobSchema(where, f"{text!r} is no size that a device has; write it like 6GiB, 900MiB or 5000000")
    return size
