"""Lays out what the site is built of: the pages of docs/, those of reference.py, and the files of the repository that pages link to.

`make docs` runs it, and then MkDocs on what it has written.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import msgspec
from reference import DOCS, PAGES

from edge_agent.job import Job


def main(out: Path) -> None:
    """Write all of it into a directory, anew."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    linked: set[str] = set()
    for page in out.glob("*.md"):
        # A page that is none of the site is named, and not linked to.
        text = re.sub(r"\[([^\]]+)\]\(\.\./[^)#]+\.md[^)]*\)", r"\1", page.read_text(encoding="utf-8"))
        linked |= set(re.findall(r"\]\(\.\./([^)#]+)", text))
        # What comments say to the tests is not for readers.
        text = re.sub(r"<!-- (?:not |all )?run.*?-->\n", "", text.replace("](../", "](repository/"), flags=re.DOTALL)
        page.write_text(text, encoding="utf-8")
    for path in linked:
        copy = out / "repository" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS.parent / path, copy)
    (out / "reference").mkdir()
    for name, make in PAGES.items():
        (out / "reference" / f"{name}.md").write_text(make() + "\n", encoding="utf-8")
    schema = msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Job)))
    (out / "reference" / "job.schema.json").write_bytes(schema + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
