"""What a machine lacks is left out in words, but fails `make test-all`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from lacking import ALL, lack

INHERENT = {"conftest.py": 1, "test_devices.py": 1, "test_doctor.py": 1, "test_lockdown.py": 1, "test_sensors.py": 2}
"""Skips by file that no package and no right would spare: a GPU that is or is not there, a kernel, data of its own."""


def test_a_lack_is_left_out_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is skipped by default, and fails where everything has to be tried; both say what is missing."""
    monkeypatch.delenv(ALL, raising=False)
    with pytest.raises(pytest.skip.Exception, match="NO BROOM"):
        lack("NO BROOM")
    monkeypatch.setenv(ALL, "1")
    with pytest.raises(pytest.fail.Exception, match="NO BROOM"):
        lack("NO BROOM")


@pytest.mark.parametrize(("target", "told"), [("test-all", "1"), ("test", "")])
def test_make_tells_all_its_tests_that_nothing_may_be_left_out(target: str, told: str, tmp_path: Path) -> None:
    """What `make test-all` needs first hears it as well as its own commands; `make test` leaves out what cannot be."""
    recorder = tmp_path / "sh"
    recorder.write_text(f'#!/bin/sh\necho "$(echo "$2" | tr "\\n" " ")|${ALL}" >>{tmp_path}/ran\n')
    recorder.chmod(0o755)
    make = [shutil.which("make") or "make", "--always-make", f"SHELL={recorder}", f"VENV={tmp_path}/venv", target]
    environment = {name: value for name, value in os.environ.items() if name not in (ALL, "MAKEFLAGS", "MAKELEVEL")}
    subprocess.run(make, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
    ran = [line for line in (tmp_path / "ran").read_text().splitlines() if "pytest" in line]
    assert ran
    assert {line.rpartition("|")[2] for line in ran} == {told}
    assert any("not slow" in line for line in ran) == (not told)


def test_no_test_skips_for_what_could_be_installed() -> None:
    """Whatever skips goes by `lack`, but where nothing that is installed would help."""
    found = {file.name: len(re.findall(r"\bpytest\.skip\(", file.read_text())) for file in sorted((ROOT / "tests").glob("*.py"))}
    found = {name: count for name, count in found.items() if count and name not in ("lacking.py", "test_lacking.py")}
    assert found == INHERENT
