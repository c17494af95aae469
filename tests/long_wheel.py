"""The wheel, installed where there is no repository, is all that demo, daemon and coordinator need: `pytest tests/long_wheel.py`.

For `make test-all`. The environment is clean: it has what pip installs for the wheel with its extra `coordinator`, as `make venv` does,
PyTorch for processors first, and nothing else; so a library that is used and not declared is missing. It takes a package index and minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from fleet import free_port, wait_for

PACKAGES = ("edge_agent", "quantization", "profiles")
WHERE = f"import json, {', '.join(PACKAGES)}; print(json.dumps([m.__path__[0] for m in ({', '.join(PACKAGES)})]))"
PYTORCH = "https://download.pytorch.org/whl/cpu"
DEMO_S = 1800
INSTALL_S = 1800


class Installed:
    """A virtual environment with the wheel, and an empty directory to work in."""

    def __init__(self, place: Path) -> None:
        self.place = place / "elsewhere"
        self.place.mkdir()
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(ROOT)]
        subprocess.run(build, check=True, timeout=300)
        [self.wheel] = place.glob("*.whl")
        subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True, timeout=300)
        self.bin = place / "venv" / "bin"
        [self.site] = (place / "venv" / "lib").glob("python*/site-packages")
        [torch] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        try:
            self._install(f"torch=={torch}+cpu")
        except subprocess.CalledProcessError:
            self._install(f"torch=={torch}+cpu", "--index-url", PYTORCH)
        self._install(f"{self.wheel}[coordinator]")

    def _install(self, *what: str) -> None:
        """As the user of the wheel would, with the versions of the project."""
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *what], check=True, timeout=INSTALL_S, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """Of somebody who has never seen the repository."""
        left = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))}
        return left | {"HOME": str(self.place), "XDG_STATE_HOME": str(self.place / "learned")}

    def run(self, *command: str, timeout: float = 300) -> str:
        done = subprocess.run(command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def edge_agent(self, *arguments: str, timeout: float = 300) -> str:
        return self.run(str(self.bin / "edge-agent"), *arguments, timeout=timeout)

    @contextmanager
    def daemon(self, command: str, config: Path) -> Iterator[subprocess.Popen[bytes]]:
        with (self.place / f"{command}.log").open("wb") as log:
            words = [str(self.bin / "edge-agent"), command, "--config", str(config)]
            process = subprocess.Popen(words, cwd=self.place, env=self.environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    place = tmp_path_factory.mktemp("wheel")
    try:
        yield Installed(place)
    finally:
        shutil.rmtree(place / "venv", ignore_errors=True)  # 1.2 GB


def test_packages_are_those_of_the_wheel(installed: Installed) -> None:
    """Nothing of the repository is in sight; and the wheel has every file of the packages that Git has."""
    found = json.loads(installed.run(str(installed.bin / "python"), "-c", WHERE))
    assert [Path(path) for path in found] == [installed.site / package for package in PACKAGES]
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *PACKAGES], capture_output=True, text=True, check=True).stdout
    assert set(listed.splitlines()) <= set(zipfile.ZipFile(installed.wheel).namelist())


def test_environment_has_nothing_that_is_not_declared(installed: Installed) -> None:
    """No library of the tests or of another extra came with it; pip finds everything that is declared, in versions that fit."""
    packages = {package["name"].lower() for package in json.loads(installed.run(str(installed.bin / "pip"), "list", "--format=json"))}
    assert {"edge-agent", "torch", "litestar"} <= packages
    assert not packages & {"pytest", "hypothesis", "ruff", "mypy", "playwright", "mlflow", "tensorboard"}
    installed.run(str(installed.bin / "pip"), "check")


def test_extra_is_taken_from_the_installed_package(installed: Installed) -> None:
    """As docs/install.md and errors say: with its name and no index at all, pip is content with what is there."""
    pip = str(installed.bin / "python"), "-m", "pip", "install", "--dry-run", "--no-index"
    assert "Would install" not in installed.run(*pip, "edge-agent[coordinator]")


def test_daemon_and_coordinator_of_the_wheel_know_each_other(installed: Installed) -> None:
    """Both start, say that they live, and end in order; the node is seen, with the model that is in the wheel."""
    port = free_port()
    broker = [str(installed.bin / "python"), "-m", "edge_agent.demo.broker", str(port)]
    link = f'[broker]\nport = {port}\nprotocol = "3.1.1"\n'
    agent, coordinator = (installed.place / f"{name}.toml" for name in ("agent", "coordinator"))
    tiny = installed.site / "edge_agent" / "demo" / "tiny"
    agent.write_text(f'node = "bench-1"\nstate_directory = "node"\nbudget = "1GiB"\n[models]\ntiny = "{tiny}"\n{link}')
    coordinator.write_text(f'state_directory = "c"\n{link}')
    with subprocess.Popen(broker, cwd=installed.place, env=installed.environment) as process:
        try:
            with installed.daemon("coordinator", coordinator) as served, installed.daemon("run", agent) as node:
                seen = ("nodes", "--config", str(coordinator), "--json")
                wait_for("the coordinator", (installed.place / "c" / "api.sock").is_socket)
                [view] = wait_for("the node", lambda: [n for n in json.loads(installed.edge_agent(*seen)) if n["state"] == "ready"])
                assert view["info"]["models"]["tiny"]
                installed.edge_agent("health", "node", "--config", str(agent))
                installed.edge_agent("health", "coordinator", "--config", str(coordinator))
                for daemon in (node, served):
                    daemon.terminate()
                    assert daemon.wait(60) == 0
        finally:
            process.terminate()


def test_demo_of_the_wheel_holds(installed: Installed) -> None:
    """`edge-agent demo` trains, measures and compares, and what it claims holds: it ends with 0."""
    installed.edge_agent("demo", "--out", "demo", timeout=DEMO_S)
    report = json.loads((installed.place / "demo" / "report.json").read_text())
    assert report["holds"] is True
