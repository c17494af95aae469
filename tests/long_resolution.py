"""Every Python and processor that is promised has wheels for all that a node and a coordinator need: nothing has to be compiled.

By uv, which reads what packages say of themselves at the index and fetches no wheel. `python tests/long_resolution.py` prints the table of
docs/install.md.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = {"x86-64": "x86_64-manylinux_2_28", "aarch64": "aarch64-manylinux_2_28"}
"""Those of uv: Linux with a C library of 2018, which Debian 10, Ubuntu 20.04 and JetPack 5 have, or a newer one."""
NOT_OF_USERS = {"dev", "bench"}
SHOWN = ("torch", "transformers", "bitsandbytes", "numpy", "cryptography")


def resolve(python: str, processor: str, *requirements: str) -> dict[str, str]:
    """Return the packages of requirements, with their versions, of which each has a wheel there. Raises RuntimeError with uv's reason."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "-", "--python-version", python, "--python-platform", PLATFORMS[processor],
        "--only-binary", ":all:", "--no-header", "--no-annotate", "--no-config", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", done.stdout, re.MULTILINE))


def requirements() -> list[str]:
    """All that the package asks for, with every extra that is for users."""
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(r for name, some in extras.items() if name not in NOT_OF_USERS for r in some)]
    return [requirement for requirement in asked if not requirement.startswith("edge-agent[")]


@pytest.mark.parametrize("processor", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_all_that_is_needed_has_wheels(python: str, processor: str) -> None:
    """With every extra, and among them what is built for one processor."""
    found = resolve(python, processor, *requirements())
    assert {"torch", "bitsandbytes", "cryptography", "google-re2", "msgspec", "psycopg-binary", "hf-xet", "safetensors"} <= found.keys()


def test_promised_pythons_are_those_of_the_package() -> None:
    """The README and the package name the ends of the list."""
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]} on Linux, {' and '.join(PLATFORMS)}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_package_without_a_wheel_is_found() -> None:
    """The check can fail: a library that is built for one processor alone resolves there and nowhere else."""
    assert "mkl" in resolve("3.11", "x86-64", "mkl==2024.2.2")
    with pytest.raises(RuntimeError, match="no wheels with a matching"):
        resolve("3.11", "aarch64", "mkl==2024.2.2")


def main() -> None:
    """Print what is resolved for every Python and processor."""
    sys.stdout.write(f"{date.today()}, uv on {platform.machine()}\n\n")
    rows = [["Python", "Processor", "Packages", *(f"`{name}`" for name in SHOWN)]]
    rows.append(["---"] * len(rows[0]))
    for python in PYTHONS:
        for processor in PLATFORMS:
            found = resolve(python, processor, *requirements())
            rows.append([python, processor, str(len(found)), *(found[name] for name in SHOWN)])
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    main()
