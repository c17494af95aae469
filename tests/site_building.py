"""The documentation as a site, built for tests as `make docs` builds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def build(root: Path) -> Path:
    """Build the site below a directory and return where it is. Fails the test where anything is said, a warning too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    settings = root / "mkdocs.yml"
    settings.write_text(
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("docs_dir: build/docs", "docs_dir: docs"), encoding="utf-8"
    )
    for command in (
        [sys.executable, str(ROOT / "docs" / "generate.py"), str(root / "docs")],
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(settings), "--site-dir", str(root / "site")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return root / "site"
