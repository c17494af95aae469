"""The documents say what the code does: fields, types, defaults, errors, options and commands are compared both ways."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer
import yaml
from conftest import ROOT
from msgspec import NODEFAULT, inspect
from shell_blocks import DOCUMENTS, FENCED
from structs import Field, fields_of

import edge_agent
from edge_agent.adapters.report import Export, Merge, Replies
from edge_agent.answers import Answer, Comparison
from edge_agent.asyncapi import CHANNELS, channel_of
from edge_agent.cli import EXIT_CODES, PANELS, app
from edge_agent.config import (
    AgentConfig,
    Api,
    Broker,
    CoordinatorConfig,
    Database,
    Endpoint,
    Files,
    FileServer,
    Https,
    RestLimits,
    Size,
    Timers,
    Trust,
    read_config,
)
from edge_agent.coordinator.views import CoordinatorPhase, JobView
from edge_agent.dataset import FORMS, Record
from edge_agent.dataset_check import Check, Finding, Spread
from edge_agent.demo.tour import DemoReport
from edge_agent.doctor import BROKER_CHECKS, CHECKS
from edge_agent.errors import EdgeAgentError
from edge_agent.job import Job, NlftOptions
from edge_agent.json_items import MAX_FILE_BYTES, MAX_RECORD_BYTES, MAX_RECORDS
from edge_agent.messages import Reason, Report, decode
from edge_agent.model_adding import Added
from edge_agent.models import ModelView, Verified
from edge_agent.report import Accuracy, Built, Event, Example, FreeText, Measured, Paired, PassAtK, Result
from edge_agent.saliency import Saliency
from edge_agent.sizes import parse_size
from edge_agent.training.measure import Measurement
from profiles.device import DeviceProfile, device_profile, profile_names
from profiles.energy import EnergySource
from profiles.sampler import Sample

DOCS = ROOT / "docs"
Row = dict[str, str]


def _sections(document: str) -> dict[str, list[Row]]:
    """Return the rows of all tables under each `## ` heading, as texts by the heading of their column."""
    sections: dict[str, list[Row]] = {}
    header: list[str] = []
    rows: list[Row] = []
    for line in (DOCS / document).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = sections.setdefault(line.removeprefix("## "), [])
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif set(line) - set("|-: "):
            assert len(cells) == len(header), f"{document}: a row has {len(cells)} cells, its table {len(header)} columns: {line}"
            rows.append(dict(zip(header, cells, strict=True)))
    return sections


def _rows(document: str, section: str, column: str = "Field") -> dict[str, Row]:
    """Return the rows of the tables whose first column is `column`, by what stands in it, without its backquotes."""
    rows = [row for row in _sections(document)[section] if next(iter(row)) == column]
    named = {row[column].strip("`"): row for row in rows}
    assert len(named) == len(rows), f"{document}, {section}: something is documented twice"
    return named


def _method_options() -> tuple[type, ...]:
    """The options of all methods, as the job has them."""
    kind = next(inspect.type_info(f.type) for f in msgspec.structs.fields(Job) if f.name == "method")
    assert isinstance(kind, inspect.UnionType)
    return tuple(part.cls for part in kind.types if isinstance(part, inspect.StructType))


METHODS = {options.__struct_config__.tag: options for options in _method_options()}
JOB_FIELDS = fields_of(Job, tuple(METHODS.values()))
CONFIG_FIELDS = {
    "Agent": fields_of(AgentConfig, (Broker, Endpoint, FileServer, RestLimits, Timers, Trust)),
    "Coordinator": fields_of(CoordinatorConfig, (Api, Broker, Database, Files, Https)),
    "Broker": fields_of(Broker, (), "broker."),
    "Judges": fields_of(Endpoint, (), "judges.*."),
    "File servers": fields_of(FileServer, (), "file_servers.*."),
    "HTTPS": fields_of(Https, (), "https."),
    "API": fields_of(Api, (), "api."),
    "Database": fields_of(Database, (), "database."),
    "Files": fields_of(Files, (), "files."),
    "Trust": fields_of(Trust, (), "trust."),
    "Timers": fields_of(Timers, (), "timers."),
    "Rest": fields_of(RestLimits, (), "rest."),
}
"""The tables of docs/config.md; that of the broker belongs to both files."""
INPUTS = [
    pytest.param("job.md", "Fields", JOB_FIELDS, id="job"),
    *(pytest.param("job.md", f"Method `{tag}`", fields_of(options, (), "method."), id=f"job-{tag}") for tag, options in METHODS.items()),
    pytest.param("dataset.md", "Record", fields_of(Record), id="record"),
    *(pytest.param("config.md", section, fields, id=f"config-{section}") for section, fields in CONFIG_FIELDS.items()),
]
OUTPUTS = [
    pytest.param("dataset.md", "`edge-agent dataset check`", fields_of(Check, (Finding, Spread)), id="dataset-check"),
    pytest.param(
        "dataset.md",
        "Findings and spreads",
        fields_of(Finding, (), "finding.") | fields_of(Spread, (), "spread."),
        id="dataset-check-parts",
    ),
    pytest.param("dataset.md", "Building", fields_of(Built), id="dataset-build"),
    pytest.param("report.md", "`result.json`", fields_of(Result, (NlftOptions,)), id="result"),
    pytest.param("report.md", "`events.jsonl`", fields_of(Event), id="event"),
    pytest.param("report.md", "`profile.jsonl`", fields_of(Sample), id="sample"),
    pytest.param("report.md", "`before.jsonl`, `after.jsonl`", fields_of(Answer), id="answer"),
    pytest.param("report.md", "`saliency.json`", fields_of(Saliency, (NlftOptions,)), id="saliency"),
    pytest.param(
        "report.md", "`edge-agent evaluate --json`", fields_of(Measurement, (Accuracy, PassAtK, FreeText, Answer)), id="measurement"
    ),
    pytest.param("report.md", "`edge-agent compare --json`", fields_of(Comparison, (Measured, Example)), id="comparison"),
    pytest.param("models.md", "`edge-agent models add`", fields_of(Added), id="model-added"),
    pytest.param("models.md", "`edge-agent models list`", fields_of(ModelView), id="model-listed"),
    pytest.param("models.md", "`edge-agent models verify`", fields_of(Verified), id="model-verified"),
    pytest.param("adapters.md", "Trying one", fields_of(Replies), id="replies"),
    pytest.param("adapters.md", "Handing one on", fields_of(Export), id="export"),
    pytest.param("adapters.md", "Merging those of many nodes", fields_of(Merge, (Accuracy, FreeText, Measured)), id="merge"),
    pytest.param("report.md", "`report.json` of the demo", fields_of(DemoReport, (Accuracy, Paired, Result)), id="demo"),
]


@pytest.mark.parametrize(("document", "section", "fields"), INPUTS + OUTPUTS)
def test_fields_documented_are_those_of_the_code(document: str, section: str, fields: dict[str, Field]) -> None:
    """Every field of a document format has a row with its dotted name, and no row names a field that does not exist."""
    assert sorted(_rows(document, section)) == sorted(fields)


@pytest.mark.parametrize(("document", "section", "fields"), INPUTS + OUTPUTS)
def test_types_documented_are_those_of_the_code(document: str, section: str, fields: dict[str, Field]) -> None:
    """Every documented field has the type, bounds, values and nullability of the code, and every reported number a unit."""
    rows = _rows(document, section)
    shared = rows.keys() & fields.keys()
    assert {name: rows[name]["Type"] for name in shared} == {name: fields[name].words for name in shared}
    numbers = {name for name in shared if re.search("integer|number", fields[name].words)}
    assert {name for name in numbers if rows[name].get("Unit") == ""} == set()


@pytest.mark.parametrize(("document", "section", "fields"), INPUTS)
def test_defaults_documented_are_those_of_the_code(document: str, section: str, fields: dict[str, Field]) -> None:
    """A field of a job, record or configuration is documented as required, or with the JSON of its default."""
    rows = _rows(document, section)
    wrong = {}
    for name in rows.keys() & fields.keys():
        cell, field = rows[name]["Default"], fields[name]
        documented = NODEFAULT if cell == "required" else msgspec.convert(json.loads(cell.strip("`")), type=field.type, dec_hook=_size)
        if documented != field.default:
            wrong[name] = (cell, field.default)
    assert wrong == {}


def _size(kind: type, value: Any) -> Any:
    """Read a default that JSON has no type for."""
    return kind(parse_size(value)) if issubclass(kind, Size) else value


@pytest.mark.parametrize(
    ("name", "kind", "sections"),
    [
        ("agent.toml", AgentConfig, ("Agent", "Judges", "File servers", "Broker", "Trust", "Timers", "Rest")),
        ("coordinator.toml", CoordinatorConfig, ("Coordinator", "Database", "Files", "HTTPS", "API", "Broker")),
    ],
)
def test_example_configuration_is_complete(name: str, kind: Any, sections: tuple[str, ...], tmp_path: Path) -> None:
    """Each example of docs/config.md is read as a file of its name would be, and leaves no field out."""
    [example] = re.findall(rf"### Example `{name}`\n\n```toml\n(.*?)```", (DOCS / "config.md").read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / name
    file.write_text(example, encoding="utf-8")
    assert isinstance(read_config(file, kind), kind)
    named = r"^(?:(models|labels|files\.options|files\.option_files)\..*|(judges|file_servers)\.[^.]*)"
    given = {re.sub(named, lambda m: f"{m[1] or m[2]}.*", field) for field in _dotted(msgspec.toml.decode(example))}
    assert given == {field.removesuffix("[]") for section in sections for field in CONFIG_FIELDS[section]}


def _dotted(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a TOML document, those of its tables included."""
    for key, value in table.items():
        if prefix + key not in ("models", "labels", "judges", "file_servers", "files.options", "files.option_files"):
            yield prefix + key
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def test_example_job_is_a_complete_job() -> None:
    """The example of docs/job.md is a valid job, and leaves no field out."""
    [example] = re.findall(r"```json\n(.*?)```", (DOCS / "job.md").read_text(encoding="utf-8"), re.DOTALL)
    job = msgspec.json.decode(example, type=Job)
    assert msgspec.to_builtins(job) == json.loads(example)


def _shown(value: Any) -> str:
    """Return a value of a profile as docs/devices.md shows it, without its backquotes."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def test_device_profiles_documented_have_the_values_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device profile has a row in docs/devices.md with its values, and one with where its figures are from."""
    monkeypatch.setattr("profiles.device._has_cuda_libraries", lambda: False)
    profiles = {name: msgspec.structs.asdict(device_profile(name)) for name in profile_names()}
    assert set(_rows("devices.md", "Fields")) == set(fields_of(DeviceProfile))
    tables = _sections("devices.md")["Profiles"]
    values = {row["Profile"].strip("`"): row for row in tables if "`kind`" in row}
    assert list(values) == list(profiles)
    for name, fields in profiles.items():
        documented = {field.strip("`"): cell.replace("`", "") for field, cell in values[name].items()}
        declared = {field: _shown(value) for field, value in fields.items() if field not in ("source", "learned_bytes", "spread_bytes")}
        assert documented == {"Profile": name} | declared
    sources = {row["Profile"].strip("`"): row for row in tables if "`kind`" not in row}
    assert set(sources) == {name for name, fields in profiles.items() if fields["memory_bytes"]}
    for name, row in sources.items():
        assert {field.strip("`"): text for field, text in row.items() if field != "Profile"}.items() <= profiles[name]["source"].items()


def test_checks_documented_are_those_of_the_code() -> None:
    """docs/fleet.md says of every check of `edge-agent doctor` what it tries, in their order."""
    assert list(_rows("fleet.md", "Commands", "Check")) == ["configuration", *CHECKS, *BROKER_CHECKS]


def test_energy_sources_documented_are_those_of_the_code() -> None:
    """docs/devices.md says of every source of energy what it measures."""
    assert list(_rows("devices.md", "Energy", "Source")) == list(get_args(EnergySource))


def test_dataset_limits_documented_are_those_of_the_code() -> None:
    """docs/dataset.md names the limits of a file, a line or record, and the number of records."""
    limits = [row["Limit"] for row in _sections("dataset.md")["Limits"]]
    assert limits[:3] == [f"{MAX_FILE_BYTES:,} bytes", f"{MAX_RECORD_BYTES:,} bytes", f"{MAX_RECORDS:,} records"]


def test_forms_documented_are_those_of_the_code() -> None:
    """docs/dataset.md has a row for every form, in the order in which they are tried, with its mark and its fields."""
    rows = _sections("dataset.md")["Forms"]
    assert [re.findall(r"`(\w+)`", row["Known by"])[0] for row in rows] == [form.mark for form in FORMS.values()]
    for row, form in zip(rows[1:], list(FORMS.values())[1:], strict=True):
        assert re.findall(r"`(\w+)`", row["Fields"]) == list(form.type.__struct_fields__)


def _error_classes() -> Iterator[type[EdgeAgentError]]:
    """Yield the error tree; all modules are imported first, so that none of it is missing."""
    for module in pkgutil.walk_packages(edge_agent.__path__, "edge_agent."):
        importlib.import_module(module.name)
    classes: list[type[EdgeAgentError]] = [EdgeAgentError]
    while classes:
        yield (current := classes.pop())
        classes += current.__subclasses__()


def test_errors_documented_are_those_of_the_code() -> None:
    """Every error class has a row with its code and exit code in docs/errors.md, and no row names one that does not exist."""
    rows = _sections("errors.md")["Codes"]
    documented = {(row["Code"].strip("`"), row["Class"].strip("`"), int(row["Exit code"])) for row in rows}
    passing_on = {error for error in _error_classes() if "code" in getattr(error.__init__, "__annotations__", ())}
    assert documented == {(error.code, error.__name__, error.exit_code) for error in {*_error_classes()} - passing_on}
    assert {row["Class"].strip("`") for row in _sections("errors.md")["Errors of others"]} == {error.__name__ for error in passing_on}
    assert all(row["Meaning"] and row["What to do"] for row in rows)


def test_troubleshooting_speaks_of_every_code() -> None:
    """docs/troubleshooting.md says of every code, of errors and of jobs on nodes, how to find the cause."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert {code for code in {error.code for error in _error_classes()} | set(get_args(Reason)) if f"`{code}`" not in text} == set()


def test_exit_codes_documented_are_those_of_the_help() -> None:
    """docs/errors.md and the help of the command line name the same exit codes."""
    rows = [*_sections("errors.md")["Codes"], *_sections("errors.md")["Other exit codes"]]
    assert {int(row["Exit code"]) for row in rows} == set(map(int, re.findall(r"\d+", EXIT_CODES)))


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands of a command line with their full names."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child in children.values():
        yield from _commands(child, f"{name} {child.name}")


COMMANDS = dict(_commands(typer.main.get_command(app), "edge-agent"))


def test_commands_documented_are_those_of_a_fleet() -> None:
    """docs/fleet.md names the commands of a node and of a fleet, and no others."""
    commands = {
        f"edge-agent {command.__name__.replace('_', '-')}"
        for panel, members in PANELS.items()
        if panel != "On this machine"
        for command in members
    }
    commands |= {name for name in COMMANDS if name.split()[1] in ("datasets", "enroll", "health", "keys", "models", "rollout", "tokens")}
    assert set(_rows("fleet.md", "Commands", "Command")) == commands
    assert commands < set(COMMANDS)


def test_topics_documented_are_those_of_the_contract() -> None:
    """docs/fleet.md names every topic with its message, its QoS, whether the broker keeps it, and when it expires."""
    rows = _rows("fleet.md", "Topics", "Topic")
    documented = {topic: (row["Message"].strip("`"), int(row["QoS"]), row["Retained"] == "yes") for topic, row in rows.items()}
    assert documented == {c.address: (c.message, c.qos, c.retain) for c in CHANNELS.values()}
    for channel in CHANNELS.values():
        said, life = rows[channel.address]["Expires"], channel.life
        assert (said not in ("", "no") and not said[0].isdigit()) if isinstance(life, dict) else said == (f"{life} s" if life else "no")


def test_reasons_documented_are_those_of_the_contract() -> None:
    """docs/fleet.md says of every reason what it means, with which outcomes it comes, and what to do, and names no other."""
    rows = _rows("fleet.md", "Reasons", "Reason")
    assert sorted(rows) == sorted(get_args(Reason))
    assert all(row["Outcome"] and row["Meaning"] and row["What to do"] for row in rows.values())
    assert {outcome for row in rows.values() for outcome in re.findall(r"`(\w+)`", row["Outcome"])} == _outcomes() - {"succeeded"}


def test_phases_and_outcomes_documented_are_those_of_the_code() -> None:
    """docs/fleet.md names the phases of a job in their order, and every outcome."""
    assert list(_rows("fleet.md", "How a job travels", "Phase")) == _names(CoordinatorPhase)
    assert set(_rows("fleet.md", "How a job travels", "Outcome")) == _outcomes()


def _outcomes() -> set[str]:
    """The outcomes that a job may have at the coordinator."""
    return set(_names(next(f.type for f in msgspec.structs.fields(JobView) if f.name == "outcome")))


def _names(kind: Any) -> list[Any]:
    """Return the values of a literal type, or of a union of some, in the order of the code."""
    return [name for part in get_args(kind) for name in (_names(part) if get_args(part) else [part]) if name is not type(None)]


def test_example_request_of_an_operator_is_valid() -> None:
    """The request that docs/fleet.md shows is one that a node takes."""
    [(topic, message)] = re.findall(r"-t (\S+) -m '(.*?)'", (DOCS / "fleet.md").read_text(encoding="utf-8"), re.DOTALL)
    channel = channel_of(topic)
    assert channel.action == "receive"
    assert channel.kind is Report
    assert decode(message.encode(), Report).data == Report()


def test_log_lines_documented_are_those_of_the_daemons() -> None:
    """docs/fleet.md names every event word that the daemons log, with its level and facts."""
    files = [file for name in ("*.py", "coordinator/*.py") for file in Path(edge_agent.__path__[0]).glob(name)]
    calls = [call for file in files for call in re.findall(r'\blog\.(\w+)\(\s*"(\w+)([^"]*)"', file.read_text(encoding="utf-8"))]
    logged: dict[str, tuple[str, set[str]]] = {}
    for level, word, facts in calls:
        known = logged.setdefault(word, ({"exception": "error"}.get(level, level), set()))
        known[1].update(re.findall(r"(\w+)=%", facts))
    rows = _rows("fleet.md", "Log lines", "Event")
    assert {word: (row["Level"], set(re.findall(r"`(\w+)`", row["Facts"]))) for word, row in rows.items()} == logged


def test_options_documented_are_those_of_train() -> None:
    """docs/job.md names every option of `edge-agent train` with the field that it sets, and no other option."""
    options = {option for parameter in COMMANDS["edge-agent train"].params for option in parameter.opts if option.startswith("--")}
    rows = _rows("job.md", "Options of `edge-agent train`", "Option")
    assert set(rows) == options
    fields = {row["Field"].strip("`") for row in rows.values()}
    assert fields - {"", "any"} <= {*JOB_FIELDS, "method.name"}


def test_options_documented_are_those_of_dataset_build() -> None:
    """docs/dataset.md names every option of `edge-agent dataset build` with the field of a job that it is, and no other option."""
    options = {option for parameter in COMMANDS["edge-agent dataset build"].params for option in parameter.opts}
    rows = _rows("dataset.md", "Building", "Option")
    assert set(rows) == options
    assert {row["Field of a job"].strip("`") for row in rows.values()} - {""} <= {*JOB_FIELDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_mentioned_in_the_readme(command: str) -> None:
    """README.md mentions every command."""
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """Every relative link names a file or directory that exists, and a heading of it where it names one."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
        file = document.parent / target if target else document
        assert file.is_file() or (target.endswith("/") and file.is_dir()), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


NO_COMMAND = re.compile(r"^\s*(?:sudo )?(?:systemctl|journalctl) ")
"""Lines where `edge-agent` is the name of a service."""
_PROGRAM = r"(?<![\w.:=-])(?:/[\w./-]*/)?(edge-agent (?!edge-agent)[a-z]"
CALLED = re.compile(rf"{_PROGRAM}[^\n]*?)(?=$|{_PROGRAM}))")


def commands_of(document: Path) -> list[str]:
    """Every call of `edge-agent` in a document: in its shell blocks, whoever runs them, behind whatever starts it, and within sentences."""
    text = document.read_text(encoding="utf-8")
    blocks = [match for match in FENCED.finditer(text) if match["kind"] in ("sh", "console")]
    lines = [re.sub(r"\s# .*", "", line) for match in blocks for line in match["text"].replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]*\bedge-agent [a-z][^`\n]*)`(?!`)", FENCED.sub("", text))
    return [call for line in lines if not NO_COMMAND.match(line) for call, _ in CALLED.findall(line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_documents_have_only_real_options(document: Path) -> None:
    """Every call of `edge-agent`, run by a test or not, is of a command that exists and takes the options that it is given."""
    for call in commands_of(document):
        name = next((n for n in sorted(COMMANDS, key=len, reverse=True) if re.match(rf"{n}(?![\w-])", call)), None)
        groups = {" ".join(n.split()[:2]) for n in COMMANDS if len(n.split()) > 2}
        if name is None:
            assert re.sub(r" (?:--help|…|\.\.\.)$", "", call.strip()) in groups, f"{document.name}: {call}"
            continue
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", call)) <= known, f"{document.name}: {call}"


def test_calls_are_found_behind_what_starts_them() -> None:
    """In the tutorial, below `sudo`, `docker compose exec`, a path or `systemd-run`, in a substitution, and within sentences."""
    found = {document.name: " | ".join(commands_of(document)) for document in DOCUMENTS}
    assert "edge-agent install-service" in found["jetson.md"]
    assert "edge-agent doctor" in found["jetson.md"]
    assert "edge-agent plan --device jetson-orin-nano-8gb" in found["jetson.md"]
    assert "edge-agent nodes" in found["docker.md"]
    assert "edge-agent tokens new NAME" in found["docker.md"]
    assert "edge-agent submit" in found["tutorial.md"]


def test_page_on_containers_names_what_there_is() -> None:
    """Files, services, targets and build arguments of every `docker` command in it, in blocks and sentences; none of them is run."""
    text = (DOCS / "docker.md").read_text(encoding="utf-8").replace("\\\n", " ")
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    files = re.findall(r"--file (\S+)", text)
    assert files
    assert [file for file in files if not (ROOT / "deploy" / file.rstrip("`")).is_file()] == []
    called = re.findall(r"docker compose (?:exec|run --rm) ([\w-]+)", text)
    assert set(called) >= {"setup", "agent", "coordinator"}
    assert set(called) <= services.keys()
    arguments = re.findall(r"--build-arg (\w+)=", text)
    assert len(arguments) >= 5
    assert set(arguments) <= set(re.findall(r"^ARG (\w+)=", image, re.MULTILINE))
    assert set(re.findall(r"--target (\S+)", text)) <= set(re.findall(r"AS (\S+)$", image, re.MULTILINE))
    assert "within sentences" in text
    assert "within sentences" in (DOCS / "jetson.md").read_text(encoding="utf-8")
