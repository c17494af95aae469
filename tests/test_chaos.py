"""A few plugs are pulled at random; benchmarks/chaos.py pulls a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT
from fleet import PROTOCOL


def chaos(out: Path, *options: object) -> Any:
    """Run the benchmark; return what it found."""
    command = [sys.executable, ROOT / "benchmarks" / "chaos.py", "--protocol", PROTOCOL, "--out", out, *options]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.stdout, ran.stderr
    found = json.loads(out.read_text())
    assert ran.returncode == bool(found["wrong"])
    return found


def test_some_strikes_lose_nothing(tmp_path: Path) -> None:
    """Every job ends once, jobs that are the same have the same adapter, and nothing is left."""
    found = chaos(tmp_path / "chaos.json", "--kills", 8, "--jobs", 2, "--seed", 5)
    assert found["wrong"] == []
    assert sum(found["strikes"].values()) == 8
    assert found["outcomes"] == {"succeeded": found["jobs"]}
