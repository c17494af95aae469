"""The house: imports point one way, the daemon's side imports no torch, and nothing is called utils."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a module may import from its own layer's folder and from layers below it.
LAYERS = (
    (
        "edge_agent.errors",
        "edge_agent.clocks",
        "edge_agent.files",
        "edge_agent.hints",
        "edge_agent.intervals",
        "edge_agent.journal",
        "edge_agent.lockdown",
        "edge_agent.patterns",
        "edge_agent.prompts",
        "edge_agent.sizes",
        "edge_agent.topics",
        "edge_agent.written_number",
        "edge_agent.logs",
        "edge_agent.database",
        "edge_agent.serving",
        "edge_agent.json_items",
        "edge_agent.backlog",
        "edge_agent.notify",
        "edge_agent.watchdog",
    ),
    (
        "profiles",
        "edge_agent.final_number",
        "edge_agent.job",
        "edge_agent.new_options",
        "edge_agent.config",
        "edge_agent.tls",
        "edge_agent.proxy",
    ),
    ("edge_agent.verify", "edge_agent.critic", "edge_agent.judging", "edge_agent.dataset", "edge_agent.splitting", "quantization"),
    ("edge_agent.report", "edge_agent.saliency", "edge_agent.answers", "edge_agent.dataset_check"),
    ("edge_agent.web",),
    ("edge_agent.job_directory", "edge_agent.job_building", "edge_agent.saliency_page"),
    ("edge_agent.messages", "edge_agent.supervised"),
    ("edge_agent.alive", "edge_agent.signing", "edge_agent.rest", "edge_agent.enrolment", "edge_agent.https", "edge_agent.home_assistant"),
    ("edge_agent.store", "edge_agent.mqtt", "edge_agent.transfer", "edge_agent.runner", "edge_agent.asyncapi"),
    ("edge_agent.models",),
    ("edge_agent.admission", "edge_agent.model_sources"),
    ("edge_agent.forecast", "edge_agent.model_mirror"),
    ("edge_agent.model_adding",),
    ("edge_agent.delivery",),
    ("edge_agent.jobs",),
    ("edge_agent.training", "edge_agent.agent", "edge_agent.coordinator", "edge_agent.doctor", "edge_agent.visit", "edge_agent.install"),
    ("edge_agent.console", "edge_agent.dataset_view", "edge_agent.tracking"),
    ("edge_agent.adapters",),
    ("edge_agent.demo",),
    ("edge_agent.cli",),
    ("edge_agent.__main__",),
)
# The generator stands on the critic only, and the parts below must not know the demo.
TORCH_FREE = (
    "edge_agent.agent", "edge_agent.coordinator.service", "edge_agent.coordinator.http", "edge_agent.coordinator.client",
    "edge_agent.coordinator.file_server", "edge_agent.https",
    "edge_agent.models", "edge_agent.model_adding", "edge_agent.model_mirror",
    "edge_agent.doctor", "edge_agent.cli", "edge_agent.console", "edge_agent.job_directory", "edge_agent.job_building",
    "edge_agent.dataset", "edge_agent.splitting", "edge_agent.dataset_check", "edge_agent.dataset_view", "edge_agent.report",
    "edge_agent.answers", "edge_agent.saliency", "edge_agent.saliency_page", "edge_agent.web.loopback",
    "edge_agent.critic", "edge_agent.judging", "edge_agent.demo.tour",
    "edge_agent.adapters.report", "edge_agent.adapters.source", "edge_agent.adapters.view",
    "edge_agent.tracking.record", "edge_agent.tracking.to_mlflow", "edge_agent.tracking.to_tensorboard",
    "quantization.plan", "quantization.estimate", "quantization.ladder", "quantization.shape", "profiles.calibration",
    "quantization.model_files", "profiles.device", "profiles.recorder", "profiles.memory", "profiles.sensors",
    "profiles.energy", "profiles.sampler",
)  # fmt: skip


def _modules() -> dict[str, Path]:
    files = [f for package in ("edge_agent", "quantization", "profiles") for f in (ROOT / package).rglob("*.py")]
    return {str(f.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): f for f in files}


def _layer(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    """A new module is put into the house, not beside it."""
    assert [m for m in _modules() if m != "edge_agent" and _layer(m) is None] == []


def test_imports_point_down() -> None:
    """No module imports from a layer above its own."""
    modules = _modules()
    wrong = []
    for module, file in modules.items():
        own = _layer(module)
        for name in _imports(file) & set(modules):
            above = _layer(name)
            if own is not None and above is not None and above > own:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_names_say_what_a_module_is_for() -> None:
    """There is no utils, common, helpers or base."""
    assert [m for m in _modules() if m.rpartition(".")[2] in {"utils", "common", "helpers", "base"}] == []


def test_the_daemon_imports_little() -> None:
    """`edge-agent run` starts without torch, the command line's libraries and the coordinator's."""
    libraries = ("torch", "transformers", "numpy", "rich", "typer", "click", "litestar", "httpx", "openai", "sqlalchemy")
    names = (*libraries, "edge_agent.cli", "edge_agent.training")
    code = f"import sys, edge_agent.__main__, edge_agent.agent\nprint([m for m in {names!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_who_asks_whether_the_daemon_lives_imports_little() -> None:
    """`edge-agent health node`, which is asked every minute, starts without the command line's libraries."""
    code = "import sys, edge_agent.__main__, edge_agent.alive\nprint([m for m in ('rich', 'typer', 'edge_agent.cli') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_of_a_fleet_import_no_database() -> None:
    """What the command line reads of a coordinator's views comes without SQLAlchemy and drivers: those are the coordinator's own."""
    code = "import sys, edge_agent.cli, edge_agent.coordinator.client\nprint([m for m in ('sqlalchemy', 'psycopg') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_daemon_side_imports_no_torch() -> None:
    """Everything that the daemon will import starts without torch and transformers."""
    code = f"import sys\nfor m in {TORCH_FREE!r}: __import__(m)\nprint([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_plan_is_asked_for_is_checked_before_torch_comes() -> None:
    """An unknown device, a missing file and an unknown field are refused at once, not after the seconds that an import takes."""
    code = """if True:
        import sys
        from edge_agent.cli import app
        for data, more in (__file__, ["--device", "jetsn"]), ("none.jsonl", []), (__file__, ["--set", "schedule.epoch=1"]):
            try:
                app(["plan", "--model", "m", "--data", data, "--budget", "1GiB", *more])
            except SystemExit:
                pass
        print([m for m in ("torch", "transformers") if m in sys.modules])
    """.replace("__file__", repr(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["profile_unknown:", "dataset_empty:", "job_schema:"]
    assert done.stdout.strip() == "[]"


def test_trainers_import_no_compiler() -> None:
    """bitsandbytes comes without what PyTorch compiles with."""
    code = "import sys, edge_agent.__main__, bitsandbytes\nprint([m for m in sys.modules if m == 'torch._inductor.compile_fx'])"
    own = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=own)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", sorted(_modules()))
def test_nothing_swallows_every_exception(module: str) -> None:
    """`except Exception`, or what is wider and ends there, stands at the top of the trainer, of the daemons' loop and of a request to it,
    of the command line, and where libraries of object stores are called, each of which raises what it likes."""
    text = _modules()[module].read_text(encoding="utf-8")
    tops = {
        "edge_agent.training.run", "edge_agent.cli.shared", "edge_agent.serving", "edge_agent.coordinator.service",
        "edge_agent.coordinator.remote_files",
    }  # fmt: skip
    assert text.count("except Exception") + text.count("except BaseException as") == (module in tops)
