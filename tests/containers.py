"""Containers without a Docker engine, for tests of the images: Buildah takes the steps of a Dockerfile, Podman runs services of compose.

All of it is below one directory. Base images are made of a clean Debian, as no registry is asked. Services share a network namespace in
which nothing else is, where compose would give each its own: their names lead to the loopback interface of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import yaml
from clean_root import give_pip, run
from fleet import wait_for

LIMITS = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")
BUILD_S = 3600.0
Service = dict[str, Any]


class Engine:
    """Images and containers in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._store = (f"--root={directory}/store", f"--runroot={directory}/run", "--storage-driver=overlay")
        self._network: subprocess.Popen[bytes] | None = None
        pip = directory / "pip"
        pip.mkdir(parents=True, exist_ok=True)
        self._seen = [f"--volume={here}:{there}:ro" for here, there in give_pip(pip).items()]

    def take_in(self, archive: Path, name: str) -> None:
        """Make a base image of the files of an archive."""
        run("podman", *self._store, "import", "--quiet", archive, name)

    def build(self, context: Path, target: str, name: str, file: Path | None = None, **arguments: str) -> None:
        """Take the steps of a Dockerfile up to a target, each anew."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        run(
            "buildah", *self._store, "build", "--isolation=chroot", "--layers", "--no-cache", "--pull-never", "--format=docker",
            *self._seen, *given,
            f"--file={file or context / 'Dockerfile'}", f"--target={target}", f"--tag={name}", context, timeout=BUILD_S,
        )  # fmt: skip

    def image(self, name: str) -> dict[str, Any]:
        """Return what an image says of itself."""
        found: dict[str, Any] = json.loads(run("podman", *self._store, "inspect", "--type=image", name))[0]
        return found

    def layers(self, name: str) -> dict[str, int]:
        """Return the bytes of each layer that is not empty, the newest first, by the step that has made it."""
        rows = json.loads(run("podman", *self._store, "history", "--format=json", name))
        return {row["CreatedBy"]: row["size"] for row in rows if row["size"]}

    def podman(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Podman where the containers are."""
        if self._network is None:  # crun refuses to see control groups of both versions, and needs none here
            script = "ip link set lo up && { umount /sys/fs/cgroup/unified 2>/dev/null; exec sleep infinity; }"
            self._network = subprocess.Popen(["unshare", "--net", "--mount", "--propagation=private", "sh", "-c", script])
            place = psutil.Process(self._network.pid)
            wait_for("a network", lambda: place.name() == "sleep")
        enter = ["nsenter", f"--target={self._network.pid}", "--net", "--mount"]
        command = [*enter, "podman", *self._store, "--cgroup-manager=cgroupfs", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)

    def start(self, name: str, service: Service, place: Path, addresses: set[str], secrets: dict[str, Path]) -> str:
        """Run a service as compose would; one with a `profiles: [setup]` to its end. Returns what it has said."""
        options = _options(service, place, secrets) | {f"--add-host={address}:127.0.0.1": None for address in addresses}
        once = service.get("profiles") == ["setup"]
        done = self.podman(
            "run", "--name", name, "--cgroups=disabled", "--network=host", "--health-interval=disable", *LIMITS,
            *(["--rm"] if once else ["--detach"]), *options, service["image"], *service.get("command", []),
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """End all containers, and what they have left."""
        if self._network is not None:
            self.podman("rm", "--all", "--force", "--volumes", "--time=5")
            self.podman("volume", "rm", "--all", "--force")
            for process in (*psutil.Process(self._network.pid).children(recursive=True), self._network):
                process.kill()
            self._network.wait()

    def remove(self) -> None:
        """Remove images too."""
        run("podman", *self._store, "rmi", "--all", "--force")
        shutil.rmtree(self._directory)


def read_compose(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


KNOWN = {
    "build", "image", "profiles", "user", "network_mode", "networks", "ports", "depends_on", "healthcheck", "restart", "init", "read_only",
    "cap_drop", "cap_add", "security_opt", "pids_limit", "mem_limit", "tmpfs", "entrypoint", "command", "environment", "volumes", "secrets",
    "stop_grace_period",
}  # fmt: skip
"""What of a service is carried over, or is for an engine with control groups and networks of its own."""


def _options(service: Service, place: Path, secrets: dict[str, Path]) -> dict[str, None]:
    """Return what Podman is told for a service of a compose file in `place`. Order counts, and nothing is said twice."""
    assert set(service) <= KNOWN, set(service) - KNOWN
    options = ["--read-only-tmpfs=false"]
    options += ["--init"] * service.get("init", False) + ["--read-only"] * service.get("read_only", False)
    if user := service.get("user"):
        options.append(f"--user={user}")
    for key, option in (("cap_drop", "cap-drop"), ("cap_add", "cap-add"), ("security_opt", "security-opt"), ("tmpfs", "tmpfs")):
        options += [f"--{option}={value.replace('privileges:true', 'privileges')}" for value in service.get(key, [])]
    options += [f"--env={name}={_default(value)}" for name, value in service.get("environment", {}).items()]
    if words := service.get("entrypoint"):
        options.append(f"--entrypoint={json.dumps(words)}")
    for volume in service.get("volumes", []):
        source, _, rest = volume.partition(":")
        options.append(f"--volume={(place / source).resolve() if source.startswith('.') else source}:{rest}")
    for secret in service.get("secrets", []):
        name, target = (secret, f"/run/secrets/{secret}") if isinstance(secret, str) else (secret["source"], secret["target"])
        options.append(f"--volume={secrets[name]}:{target}:ro")
    if test := service.get("healthcheck", {}).get("test"):
        options.append(f"--health-cmd={json.dumps(test[1:])}")
    return dict.fromkeys(options)


def _default(value: str) -> str:
    """Return a value of the environment where nobody has set the variable that it names: `${NAME:-VALUE}`."""
    return value.partition(":-")[2].removesuffix("}") if value.startswith("${") else value
