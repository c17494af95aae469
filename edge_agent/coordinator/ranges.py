"""Files of the coordinator as answers: the whole, or the one range that is asked for (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from litestar import Response
from litestar.exceptions import HTTPException
from litestar.response import Stream

READ_BYTES = 256 * 1024
RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


def ranged(path: Path, sha256: str, asked: Mapping[str, str], name: str | None = None) -> Response[Any]:
    """Return a file, or the range of it that the headers of a request ask for; nothing where the other side has it already.

    What is no range, or more than one, is answered with the whole, as the RFC allows. `name`: what a browser saves it as.
    """
    size, tag = path.stat().st_size, f'"{sha256}"'
    headers = {"Accept-Ranges": "bytes", "ETag": tag}
    if name is not None:
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    if tag in asked.get("If-None-Match", ""):
        return Response(None, status_code=304, headers=headers)
    start, end = 0, size
    wanted = RANGE.fullmatch(asked.get("Range", "")) if asked.get("If-Range", tag) == tag else None
    if wanted and wanted.group(1, 2) != (None, None):
        first, last = wanted.group(1, 2)
        start = int(first) if first is not None else max(0, size - int(last))
        end = min(size, int(last) + 1) if first is not None and last is not None else size
        if start >= end:
            raise HTTPException(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if "Content-Range" in headers else 200
    headers["Content-Length"] = str(end - start)
    return Stream(_read(path, start, end), status_code=status, headers=headers, media_type="application/octet-stream")


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(READ_BYTES, end - start))):
            start += len(piece)
            yield piece
