"""The images, built and run without a Docker engine: `pytest tests/long_images.py`, for `make test-all`.

Every step of the Dockerfile for `coordinator` and `agent-cpu` is taken on a clean Debian in the place of the base image; then the services
of deploy/compose.yaml run as they are written there, and the node does a job. In the place of the images of Mosquitto and PostgreSQL,
which a registry would give, are Debian's own at the places of those. Takes root, debootstrap, Buildah and Podman.

Does not cover: the images with CUDA, limits of memory and processes, networks of compose, EMQX.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clean_root import CACHE, copy_checkout, debian, need
from conftest import ROOT
from containers import LIMITS, Engine, Service, read_compose
from fleet import wait_for

IMAGES = {"coordinator": "edge-agent:coordinator", "agent-cpu": "edge-agent:cpu"}
STAND_INS = """\
FROM {debian} AS base
RUN apt-get update && apt-get install --yes --no-install-recommends mosquitto netcat-openbsd postgresql \\
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql && groupmod --gid 70 postgres && usermod --uid 70 postgres \\
    && usermod --uid 1883 mosquitto && install --directory --owner=mosquitto /mosquitto/data \\
    && install --directory --owner=postgres --mode=700 /var/lib/postgresql/data \\
    && ln -s /usr/lib/postgresql/*/bin/pg_isready /usr/local/bin/
FROM base AS mosquitto
ENTRYPOINT ["/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf"]
FROM base AS database
ENTRYPOINT ["sh", "-ec", "cd /usr/lib/postgresql/*/bin; data=/var/lib/postgresql/data; [ -e $data/PG_VERSION ] || ./initdb --pgdata=$data \\
    --username=$POSTGRES_USER --pwfile=$POSTGRES_PASSWORD_FILE --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8; \\
    (until PGPASSWORD=$(cat $POSTGRES_PASSWORD_FILE) ./createdb -U $POSTGRES_USER -h 127.0.0.1 $POSTGRES_DB; do sleep 1; done) & \\
    exec ./postgres -D $data -k /run/postgresql"]
"""
LARGEST = {"coordinator": 600e6, "agent-cpu": 1.8e9}
"""Bytes of an image: no PyTorch in the one, nothing of CUDA in the other."""
LARGEST_PROJECT = 20e6
"""Bytes of the layer that changes with the code."""


@pytest.fixture(scope="module")
def checkout() -> Iterator[Path]:
    need("debootstrap", "buildah", "podman", "crun", "catatonit", "nsenter", "ip")
    place = CACHE / "images"
    shutil.rmtree(place / "checkout", ignore_errors=True)
    copy_checkout(place / "checkout")
    yield place / "checkout"
    shutil.rmtree(place / "checkout")


@pytest.fixture(scope="module")
def engine(checkout: Path) -> Iterator[Engine]:
    """With all images that the services name."""
    engine = Engine(checkout.parent / "engine")
    services = read_compose(checkout / "deploy/compose.yaml")["services"]
    [base] = re.findall(r"^ARG DEBIAN=(.*)$", (checkout / "Dockerfile").read_text(), re.MULTILINE)
    stand_ins = checkout.parent / "stand-ins"
    stand_ins.write_text(STAND_INS.format(debian=base))
    try:
        engine.take_in(debian(), f"docker.io/library/{base}")
        for target, name in IMAGES.items():
            engine.build(checkout, target, name)
        for name in ("mosquitto", "database"):
            engine.build(checkout, name, services[name]["image"], stand_ins)
        yield engine
    finally:
        engine.close()
        engine.remove()


@pytest.mark.parametrize("target", IMAGES)
def test_image_holds_what_it_needs_and_says_how_it_lives(target: str, engine: Engine) -> None:
    """It is for an ordinary user, tells its health, has each package in the version that is pinned, and no source of the project."""
    image = engine.image(IMAGES[target])
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["edge-agent"]
    assert config["Cmd"] == (["coordinator"] if target == "coordinator" else ["run"])
    assert image["Healthcheck"]["Test"] == ["CMD", "edge-agent", "health", "coordinator" if target == "coordinator" else "node"]
    assert set(config["Volumes"]) == {"/var/lib/edge-agent"}
    assert image["Size"] < LARGEST[target]
    layers = engine.layers(IMAGES[target])
    assert next(iter(layers.values())) < LARGEST_PROJECT
    once = "run", "--rm", "--cgroups=disabled", "--network=host", "--health-interval=disable", *LIMITS, "--entrypoint=[]"
    left = engine.podman(*once, IMAGES[target], "sh", "-c", "ls -d /src /requirements /wheels /root/.cache")
    assert left.stdout == ""
    frozen = engine.podman(*once, IMAGES[target], "pip", "freeze", "--all").stdout.split()
    packages = dict(line.split("==", 1) for line in frozen if "==" in line)
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "deploy/constraints-debian.txt").read_text(), re.MULTILINE))
    assert ("torch" in packages) == (target != "coordinator")
    free = {name for name, version in packages.items() if pinned.get(_plain(name)) != version.removesuffix("+cpu")}
    assert free <= {"pip", "setuptools", "edge-agent"}
    print(f"{target}: {image['Size'] / 1e6:.0f} MB; layers, the newest first: {[round(size / 1e6, 1) for size in layers.values()]} MB")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_services_of_the_compose_file_do_a_job(engine: Engine, checkout: Path) -> None:
    """With its secrets, users, read-only roots and no capability: all are healthy, the node does a job and passes the doctor."""
    deploy = checkout / "deploy"
    compose = read_compose(deploy / "compose.yaml")
    services: dict[str, Service] = compose["services"]
    secrets = {name: (deploy / secret["file"]).resolve() for name, secret in compose["secrets"].items()}
    addresses = {"broker", *services}
    (deploy / "secrets").mkdir()
    assert engine.start("setup", services["setup"], deploy, addresses, secrets).startswith("made: ")
    assert {name for name, file in secrets.items() if not file.is_file()} == set()
    for name in ("database", "mosquitto", "coordinator", "agent"):
        engine.start(name, services[name], deploy, addresses, secrets)
        wait_for(f"{name} to be healthy", lambda name=name: engine.podman("healthcheck", "run", name).returncode == 0, 600)  # type: ignore[misc]
    wait_for("the node", lambda: [node for node in _asked(engine, "nodes") if node["state"] == "ready"])
    job = _submit(engine, checkout)
    watched = engine.podman("exec", "coordinator", "edge-agent", "watch", job)
    assert watched.returncode == 0, f"{watched.stdout}{watched.stderr}"
    checks = json.loads(engine.podman("exec", "agent", "edge-agent", "doctor", "--json").stdout)
    assert [check for check in checks if not check["passed"]] == []
    for name in ("coordinator", "agent"):
        _check_narrow(engine, name)
        assert engine.podman("stop", "--time=30", name).returncode == 0
        assert engine.podman("inspect", name, "--format={{.State.ExitCode}}").stdout.strip() == "0"
        assert engine.podman("healthcheck", "run", name).returncode != 0


def _asked(engine: Engine, command: str) -> Any:
    return json.loads(engine.podman("exec", "coordinator", "edge-agent", command, "--json").stdout or "[]")


def _submit(engine: Engine, checkout: Path) -> str:
    """Hand in the job of the tutorial, in fewer updates."""
    for name in ("questions", "held-out"):
        script = f"cat > /tmp/{name}.jsonl <<'END'\n{(checkout / 'docs/tutorial' / name).with_suffix('.jsonl').read_text()}END"
        assert engine.podman("exec", "coordinator", "sh", "-c", script).returncode == 0
    files = "--data", "/tmp/questions.jsonl", "--eval-data", "/tmp/held-out.jsonl"  # noqa: S108 - of the container
    settings = "--set", "schedule.learning_rate=0.002", "--set", "schedule.updates=30", "--questions", "40"
    node = "--node", "bench-1", "--model", "tiny", "--budget", "1GiB"
    done = engine.podman("exec", "coordinator", "edge-agent", "submit", *node, *files, *settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _check_narrow(engine: Engine, name: str) -> None:
    """The daemon is nobody in particular, can gain nothing, and writes to its state and /tmp only."""
    status = engine.podman("exec", name, "cat", "/proc/1/status").stdout
    facts = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))
    assert (facts["CapEff"], facts["CapBnd"], facts["NoNewPrivs"], facts["Seccomp"]) == ("0" * 16, "0" * 16, "1", "2")
    assert facts["Uid"].split() == ["10001"] * 4
    free = {"/tmp": True, "/var/lib/edge-agent": True, "/": False, "/etc/edge-agent": False, "/opt/edge-agent": False}  # noqa: S108
    assert {place: engine.podman("exec", name, "touch", f"{place}/.written").returncode == 0 for place in free} == free
