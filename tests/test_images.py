"""Dockerfile and compose files, as far as they can be read without an engine: by a linter, by the published schema, and against each other.

That the images can be built and do their work is for tests/long_images.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from dockerfile_parse import DockerfileParser

from edge_agent.config import AgentConfig, CoordinatorConfig, read_config

DEPLOY = ROOT / "deploy"
TARGETS = ("agent-cpu", "agent-cuda", "agent-jetson", "coordinator")
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
OURS = {"setup", "coordinator", "agent"}
WRITABLE = {"emqx": "its image writes its configuration at the start"}
"""Services whose root cannot be read-only, and why."""


@cache
def stages() -> dict[str, list[dict[str, Any]]]:
    """The steps of each stage of the Dockerfile, those of the stages that it begins with included."""
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"))
    found: dict[str, list[dict[str, Any]]] = {}
    for step in parser.structure:
        if step["instruction"] == "FROM":
            begins, _, name = step["value"].split()
            found[name] = [*found.get(begins, [])]
        if found:
            found[name].append(step)
    return found


def _last(target: str, instruction: str) -> str:
    values: list[str] = [step["value"] for step in stages()[target] if step["instruction"] == instruction]
    return values[-1]


def test_linter_finds_nothing() -> None:
    """Hadolint, with ShellCheck in it, finds nothing but what .hadolint.yaml says why to leave out."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--config", ROOT / ".hadolint.yaml", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_target_runs_as_nobody_and_tells_its_health(target: str) -> None:
    """Each image ends as an ordinary user, known by number, with an entry point, a health check and its state in a volume."""
    # With a group named too, those of the user would not count, of which `video` has a Jetson's GPU.
    assert _last(target, "USER") == ("10001" if target == "agent-jetson" else "10001:10001")
    assert _last(target, "ENTRYPOINT") == '["edge-agent"]'
    kind = "coordinator" if target == "coordinator" else "node"
    assert f'CMD ["edge-agent", "health", "{kind}"]' in _last(target, "HEALTHCHECK")
    assert _last(target, "VOLUME") == "/var/lib/edge-agent"
    assert any("--uid 10001" in step["value"] for step in stages()[target])


@pytest.mark.parametrize("target", TARGETS)
def test_target_holds_no_source(target: str) -> None:
    """What is built elsewhere comes in as a wheel that is seen while it is installed, last; nothing is copied in."""
    steps = [step for step in stages()[target] if step["instruction"] in ("RUN", "COPY", "ADD")]
    assert [step["value"] for step in steps if step["instruction"] != "RUN"] == []
    assert steps[-1]["value"].endswith("pip install --no-deps /wheels/*.whl")


def test_everything_that_is_installed_is_pinned() -> None:
    """Base images have a tag that is no moving one; every step that installs packages names a version, or the file that pins them all."""
    text = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"^ARG (?:DEBIAN|JETPACK)=(.*)$", text, re.MULTILINE)) == {
        "debian:bookworm-20260518-slim", "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
    }  # fmt: skip
    runs = {step["value"] for steps in stages().values() for step in steps if step["instruction"] == "RUN"}
    pip = r"(?:PIP_CONSTRAINT=\S+ )?(?:python3 -m )?pip (?:install|download|wheel)(?:(?! && ).)*"
    steps = [part for run in runs for part in re.findall(pip, run)]
    assert len(steps) > 10
    assert sum(" wheel " in part for part in steps) == 2
    assert [part for part in steps if not PINNED.search(part)] == []


PINNED = re.compile("--constraint|==|/wheels/[*].whl|^PIP_CONSTRAINT=/requirements/|--no-deps --no-build-isolation")
"""Of a step of pip. Where it builds in an environment of its own, `--constraint` is not for what it takes there: the variable is."""


def test_source_that_is_compiled_can_be_held_to_its_commit_and_compiles_in_bounds() -> None:
    """What builds bitsandbytes is pinned with the other packages; a build argument names the commit, another how many compilers run."""
    [source] = [steps for name, steps in stages().items() if name == "bitsandbytes-source"]
    values = [step["value"] for step in source]
    [check] = [value for value in values if "BITSANDBYTES_COMMIT}" in value]
    for commit, fits in (("", True), ("abc", True), ("abd", False)):
        script = check.replace("git rev-parse HEAD", "echo abc")
        environment = {"BITSANDBYTES_COMMIT": commit, "BITSANDBYTES_TAG": "1", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0, done.stdout) == (fits, "bitsandbytes 1 is abc\n")
    assert "BUILD_JOBS=2" in values
    assert any("CMAKE_BUILD_PARALLEL_LEVEL=${BUILD_JOBS}" in value for value in values)
    assert not [value for value in values if "--parallel" in value or re.search(r" -j\b", value)]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (DEPLOY / "constraints-jetson.txt").read_text(), re.MULTILINE))
    assert {"scikit-build-core", "setuptools", "wheel"} <= pins.keys()


def test_page_on_jetsons_installs_what_the_image_does() -> None:
    """PyTorch from the same index and in the same version, the library that it lacks, where that is found, the same bitsandbytes."""
    page, image = ((ROOT / name).read_text() for name in ("docs/jetson.md", "Dockerfile"))
    jetson = image[image.index("AS agent-jetson") : image.index("AS agent-cuda")]
    [index] = re.findall(r"TORCH_INDEX=(https://\S*jp6\S*)", jetson)
    torch = re.findall(r"torch==\S+", jetson)
    assert re.findall(r"--index-url (\S+) (torch==\S+)", page) == [(index, *torch)]
    for constrained in ("nvidia-cudss-cu12", "--requirement /requirements/agent.txt"):
        assert constrained in jetson
    assert re.search(r"pip install --no-deps --constraint \S+constraints-jetson.txt nvidia-cudss-cu12$", page, re.MULTILINE)
    assert re.search(r"pip install --constraint \S+constraints-jetson.txt \.$", page, re.MULTILINE)
    [place] = re.findall(r"LD_LIBRARY_PATH=([^:\s]+)", jetson)
    assert f"echo {place} | sudo tee /etc/ld.so.conf.d/" in page
    assert {re.search(r"apt-get install .*libopenblas0", text) is not None for text in (page, jetson)} == {True}
    assert set(re.findall(r"--branch (\S+)", page)) == set(re.findall(r"BITSANDBYTES_TAG=(\S+)", image))


@pytest.mark.parametrize("name", ["debian", "jetson"])
def test_pins_of_images_are_those_of_the_project(name: str) -> None:
    """Where constraints.txt pins a package too, it is to the same version, but for three on the older Python of JetPack."""
    pattern = r"^([\w.-]+)==([^\s;]+)\s*(?:;.*)?$"
    project = dict(re.findall(pattern, (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    images = dict(re.findall(pattern, (DEPLOY / f"constraints-{name}.txt").read_text(), re.MULTILINE))
    differ = {package for package in project.keys() & images if project[package] != images[package]}
    assert differ <= ({"torch", "transformers", "typer"} if name == "jetson" else set())
    assert {"torch", "transformers", "peft", "bitsandbytes", "msgspec"} <= images.keys()
    torch = re.findall(r"torch==([\d.]+)", (ROOT / "Dockerfile").read_text())
    assert images["torch"] in torch


def test_requirements_are_those_of_the_project() -> None:
    """An image of a coordinator has its extras and no PyTorch; packages of an extra that an extra names come with it."""
    script = [sys.executable, str(DEPLOY / "requirements.py"), "coordinator", "s3", "--without", "torch", "peft"]
    lines = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    names = {re.match(r"[\w.-]+", line)[0] for line in lines}  # type: ignore[index]
    assert {"msgspec", "litestar", "s3fs", "fsspec"} <= names
    assert not {"torch", "peft", "edge-agent"} & names


@cache
def compose(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


SERVICES = compose(DEPLOY / "compose.yaml")["services"]


def test_compose_files_follow_the_specification() -> None:
    """Each is valid by the schema that the Compose specification publishes."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, COMPOSE)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(COMPOSE) == 3


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_file_names_what_there_is(file: Path) -> None:
    """Every target that is built, every file that is mounted, every network, volume and secret that a service names exists."""
    whole = compose(file)
    for service in whole["services"].values():
        if "build" in service:
            assert service["build"]["target"] in TARGETS
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source == "./secrets" or ((DEPLOY / source).exists() if source.startswith(".") else source in whole["volumes"]), source
        assert set(service.get("networks", [])) <= set(whole.get("networks", {}))
        assert {s if isinstance(s, str) else s["source"] for s in service.get("secrets", [])} <= set(whole.get("secrets", {}))
        assert set(service.get("depends_on", {})) <= set(whole["services"])


OVERLAYS = [file for file in COMPOSE if file.name != "compose.yaml"]
UNCONFINED = {("compose.jetson.yaml", "agent"): "systempaths=unconfined"}
"""What a service is free of beyond the others, with the words for it in its file and in docs/docker.md."""
GPU = {"deploy", "runtime", "group_add"}
"""What an overlay may add to a node, for its GPU."""
MERGED = [(file, name) for file in COMPOSE for name in compose(file)["services"]]


def _merged(file: Path, name: str) -> dict[str, Any]:
    """A service as compose makes it of the first file and an overlay: lists are put together, anything else takes the place."""
    if file not in OVERLAYS:
        return dict(SERVICES[name])
    service = dict(SERVICES[name])
    for key, value in compose(file)["services"][name].items():
        service[key] = [*service.get(key, []), *value] if isinstance(value, list) else value
    return service


@pytest.mark.parametrize(("file", "name"), MERGED, ids=[f"{file.name}-{name}" for file, name in MERGED])
def test_service_is_confined(file: Path, name: str) -> None:
    """None is privileged, has or can gain a capability that it does not need, or writes to its root; no port is open to other machines."""
    service = _merged(file, name)
    assert not {"privileged", "devices", "pid", "ipc", "userns_mode"} & service.keys()
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service or name == "setup"
    free = [UNCONFINED[file.name, name]] if (file.name, name) in UNCONFINED else []
    assert service["security_opt"] == ["no-new-privileges:true", *free]
    assert service["read_only"] is (name not in WRITABLE)
    assert "docker.sock" not in str(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or name in OURS
    if name not in OURS:
        assert re.search(r":\d+\.\d+\.\d+|:\d+\.\d+-", service["image"])


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.name)
def test_overlay_adds_a_gpu_and_memory_and_nothing_else(file: Path) -> None:
    """Of the node alone; what it frees is said where it stands and in the documentation, and what it gives is more than without."""
    page = (ROOT / "docs" / "docker.md").read_text()
    assert set(compose(file)["services"]) == {"agent"}
    assert compose(file).keys() == {"services"}
    own = compose(file)["services"]["agent"]
    assert own.keys() <= {"build", "image", "mem_limit", "security_opt"} | GPU
    assert own.get("group_add", ["video"]) == ["video"]
    assert _gigabytes(own["mem_limit"]) > _gigabytes(SERVICES["agent"]["mem_limit"])
    if free := UNCONFINED.get((file.name, "agent")):
        assert f"`{free}`" in page
        assert "device tree" in file.read_text()


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_memory_of_a_node_is_more_than_its_budget(file: Path) -> None:
    """By 2 GiB for what is beside the trainer; docs/docker.md says each, and who has more sets it without changing a file."""
    limit = _merged(file, "agent")["mem_limit"]
    budget = read_config(DEPLOY / "compose" / "agent.toml", AgentConfig).budget
    assert _gigabytes(limit) * 2**30 >= budget + 2 * 2**30
    sentence = next(line for line in (ROOT / "docs" / "docker.md").read_text().split("\n- ") if line.startswith("**Memory**"))
    assert f"{_gigabytes(limit)}g" in sentence
    assert "`AGENT_MEMORY`" in sentence


def _gigabytes(limit: str) -> int:
    return int(re.fullmatch(r"\$\{AGENT_MEMORY:-(\d+)g\}", limit)[1])  # type: ignore[index]


def test_secrets_are_files_that_one_script_makes() -> None:
    """Each secret of the compose file is made by deploy/secrets.sh, in a directory that Git does not know; none is in the environment."""
    script = (DEPLOY / "secrets.sh").read_text()
    for secret in compose(DEPLOY / "compose.yaml")["secrets"].values():
        assert Path(secret["file"]).parts[0] == "secrets"
        directory, name = Path(secret["file"]).parent.name, Path(secret["file"]).stem
        assert directory in script
        assert name.removeprefix("coordinator.") in script
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text()
    named = [(name, str(value)) for service in SERVICES.values() for name, value in service.get("environment", {}).items()]
    assert not [value for _, value in named if "secret" in value.lower() and not value.startswith("/run/secrets/")]
    words = re.compile("cookie|password|secret|token|key", re.IGNORECASE)
    assert not [name for name, value in named if words.search(name) and not value.startswith("/run/secrets/")]


STAND_INS = {
    "edge-agent": 'case $1 in keys) : >"$3"; echo key ;; *) : >"$5/ca.pem"; : >"$7/$3.pem"; : >"$7/$3.key" ;; esac',
    "chown": "exit 0",
}
"""Programs in the place of those that make certificates and give files away: it writes empty files, and what is random stays."""


def _make_secrets(place: Path) -> None:
    programs = place.with_name("programs")
    programs.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin"}
    subprocess.run(["sh", DEPLOY / "secrets.sh", place], env=environment, capture_output=True, timeout=60, check=True)


def test_passwords_are_random_and_made_once(tmp_path: Path) -> None:
    """Each of them for one fleet alone, readable by one user; a second run leaves them, and makes one that an older fleet lacks."""
    made = []
    for fleet in ("one", "two"):
        place = tmp_path / fleet / "secrets"
        place.mkdir(parents=True)
        _make_secrets(place)
        for file in (place / "broker" / "cookie", place / "database" / "password"):
            assert file.stat().st_mode & 0o777 == 0o600
            assert re.fullmatch("[0-9a-f]{48}", file.read_text())
            made.append(file.read_text())
    assert len(set(made)) == len(made)
    _make_secrets(place)
    assert (place / "broker" / "cookie").read_text() in made
    (place / "broker" / "cookie").unlink()
    _make_secrets(place)
    assert re.fullmatch("[0-9a-f]{48}", (place / "broker" / "cookie").read_text())
    assert (place / "database" / "password").read_text() in made


def test_broker_of_erlang_has_a_secret_cookie_and_hears_its_own_container_alone(tmp_path: Path) -> None:
    """EMQX starts, and its health is asked, with the cookie of the secret; without one it does not start. What is for other nodes of a
    cluster, and its dashboard, is bound to the loopback interface."""
    emqx = SERVICES["emqx"]
    (tmp_path / "cookie").write_text("a1b2")

    def says(script: str, *words: str) -> str:
        script = script.replace("$$", "$").replace("/run/secrets/broker_cookie", str(tmp_path / "cookie"))
        for program in ("/usr/bin/docker-entrypoint.sh", "emqx ctl status"):
            script = script.replace(program, "env")
        done = subprocess.run(["/bin/sh", "-c", script, *words], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
        return done.stdout

    *shell, script, name = emqx["entrypoint"]
    assert shell == ["/bin/sh", "-c"]
    assert emqx["command"] == ["/opt/emqx/bin/emqx", "foreground"]
    kind, asked = emqx["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    assert "EMQX_NODE__COOKIE=a1b2\n" in says(script, name)
    assert "EMQX_NODE__COOKIE=a1b2\n" in says(asked)
    (tmp_path / "cookie").unlink()
    assert says(script, name) == ""
    environment = emqx["environment"]
    assert environment["ERL_AFLAGS"] == "-kernel inet_dist_use_interface {127,0,0,1}"
    assert environment["EMQX_RPC__LISTEN_ADDRESS"] == "127.0.0.1"
    assert environment["EMQX_DASHBOARD__LISTENERS__HTTP__BIND"].startswith("127.0.0.1:")
    assert "broker_cookie" in emqx["secrets"]


def test_configurations_of_the_services_are_valid() -> None:
    """Both daemons read theirs, and what they name is where the compose file mounts it."""
    agent = read_config(DEPLOY / "compose" / "agent.toml", AgentConfig)
    coordinator = read_config(DEPLOY / "compose" / "coordinator.toml", CoordinatorConfig)
    assert agent.fleet == coordinator.fleet == "lab"
    for name, config in (("agent", agent), ("coordinator", coordinator)):
        text = (DEPLOY / "compose" / f"{name}.toml").read_text()
        assert set(re.findall(r"/run/secrets/(\w+)", text)) == set(SERVICES[name]["secrets"])
        assert str(config.state_directory) == "/var/lib/edge-agent"
    assert f"{agent.models['tiny']}:ro" in " ".join(SERVICES["agent"]["volumes"])


def test_broker_in_a_container_has_the_rules_of_any() -> None:
    """Its configuration is the sample that the tests of the rules drive, but for where files are, and that its log is the container's."""
    places = {
        "/etc/mosquitto/edge-agent/ca.pem": "/run/secrets/authority",
        "/etc/mosquitto/edge-agent/broker.example.org.pem": "/run/secrets/broker_certificate",
        "/etc/mosquitto/edge-agent/broker.example.org.key": "/run/secrets/broker_key",
        "/etc/mosquitto/edge-agent/acl": "/mosquitto/config/acl",
        "/var/lib/mosquitto/": "/mosquitto/data/",
    }
    sample, own = (_settings(DEPLOY / "mosquitto" / f"{name}.conf") for name in ("mosquitto", "container"))
    assert own == [" ".join(places.get(word, word) for word in line.split()) for line in sample] + ["log_dest stdout"]
    mounted = {volume.split(":")[1] for volume in SERVICES["mosquitto"]["volumes"]}
    mounted |= {f"/run/secrets/{secret}" for secret in SERVICES["mosquitto"]["secrets"]}
    assert {place.rstrip("/") for place in places.values()} <= mounted


def _settings(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
