"""One self-contained document of a page's modules, style sheet and data, which may run nothing else and load nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

WEB = Path(__file__).parent
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)
"""The only form of import in a module here; no two modules have a name in common."""
EXPORT = re.compile(r"^export ", re.MULTILINE)

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div id="map"></div>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def document(title: str, entry: str, style: str, data: bytes) -> tuple[bytes, str]:
    """Return a page and its content security policy. `entry` and `style` name files here, `data` is the JSON that the entry reads.

    Before the style come the colours of all pages. The data cannot end their element: `<` is written as an escape of JSON, which is the
    same text to who parses it.
    """
    sheet = "".join((WEB / f"{name}.css").read_text(encoding="utf-8") for name in ("colours", style))
    script = "".join(_inlined(entry, set()))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(sheet)}'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    before, after = TEMPLATE.split("{data}")
    head = before.format(policy=policy, title=title, style=sheet).encode()
    return b"".join((head, data.replace(b"<", b"\\u003c"), after.format(script=script).encode())), policy


def _inlined(name: str, seen: set[str]) -> Iterator[str]:
    """Yield a module after those that it imports, each once, as parts of one module."""
    if name in seen:
        return
    seen.add(name)
    text = (WEB / f"{name}.js").read_text(encoding="utf-8")
    for imported in IMPORT.findall(text):
        yield from _inlined(imported, seen)
    yield EXPORT.sub("", IMPORT.sub("", text))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
