"""Pages that are made of the code whenever the site is built, so that none of them goes stale.

Commands come from the command line itself, the configuration from its types, codes from the classes of errors, metrics from what a
coordinator answers a scrape with; messages and requests from asyncapi.yaml and openapi.yaml, which tests hold to the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import typer
import yaml
from msgspec import NODEFAULT
from prometheus_client.parser import text_string_to_metric_families
from structs import fields_of

import edge_agent.coordinator.http  # noqa: F401  its errors
from edge_agent.cli import app
from edge_agent.config import AgentConfig, CoordinatorConfig, Size
from edge_agent.coordinator.metrics import Metrics, Standing
from edge_agent.errors import EdgeAgentError
from edge_agent.messages import JobResult, Reason

Schema = dict[str, Any]
DOCS = Path(__file__).parent


def table(columns: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown, or nothing where it has no rows."""
    lines = ["| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    names = columns.split(", ")
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *lines]) if lines else ""


def code(text: object) -> str:
    return f"`{text}`"


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs.yml make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(document: str, pattern: str) -> dict[str, str]:
    """Return the heading below which each thing stands in the first column of a table of a document."""
    heading, found = "", {}
    for line in (DOCS / document).read_text(encoding="utf-8").splitlines():
        heading = slug(line.lstrip("# ")) if line.startswith("#") else heading
        if name := re.match(rf"\| `({pattern})` \|", line):
            found[name[1]] = f"../{document}#{heading}"
    return found


# commands


def commands() -> str:
    """Every command with its arguments and options."""
    parts = ["# Commands", "What `--help` of each says. Exit codes: [errors](../errors.md#codes)."]
    for name, command in _commands(typer.main.get_command(app), "edge-agent"):
        usage = command.get_usage(command.context_class(command, info_name=name)).removeprefix("Usage: ")
        rows = [[", ".join(map(code, [*p.opts, *p.secondary_opts])), _default(p), getattr(p, "help", "") or ""] for p in command.params]
        parts += [f"## {name}", f"```text\n{usage}\n```", command.help or "", table("Argument or option, Default, Meaning", rows)]
    return "\n\n".join(parts)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands of a command line with their full names."""
    if (children := getattr(command, "commands", None)) is None:
        yield name, command
        return
    for child in children.values():
        yield from _commands(child, f"{name} {child.name}")


def _default(option: Any) -> str:
    default = "required" if option.required else "" if option.default in (None, False) else code(option.default)
    return ", ".join(filter(None, (default, "repeatable" if option.multiple else "")))


# JSON Schemas


def words(schema: Schema) -> str:
    """Return a type in words, with its bounds or its values; another object by a link to its section."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{slug(name)})"
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(words, parts)))
    if "enum" in schema or "const" in schema:
        return ", ".join(code(json.dumps(value)) for value in schema.get("enum") or [schema["const"]])
    kind = schema.get("type", "anything")
    for key, text in (("items", "list of"), ("additionalProperties", "by name,")):
        if isinstance(schema.get(key), dict) and schema[key]:
            return f"{text} {words(schema[key])}"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤", "pattern": "like"}
    return " ".join(
        [" or ".join([kind] if isinstance(kind, str) else kind), *(f"{b} {code(schema[k])}" for k, b in bounds.items() if k in schema)]
    )


def fields(schema: Schema) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and default of the fields of an object."""
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else code(json.dumps(field["default"])) if "default" in field else ""
        yield name, words(field), default


def objects(known: Schema, level: str = "##") -> list[str]:
    """Return a section for each named schema."""
    parts = []
    for name, schema in sorted(known.items()):
        rows = table("Field, Type, Default", ((code(field), *rest) for field, *rest in fields(schema)))
        parts += [f"{level} {name}", schema.get("description", ""), rows or words(schema)]
    return parts


def configuration() -> str:
    """The fields of both configurations as the code takes them, each with a link to what it means."""
    meanings = anchors("config.md", r"[a-z_.*\[\]0-9]+")
    parts = [
        "# Configuration at a glance",
        "Every field of both files, as the code takes it, with a link to its meaning in [configuration](../config.md).",
    ]
    for name, kind in (("agent", AgentConfig), ("coordinator", CoordinatorConfig)):
        rows = ([f"[{code(path)}]({meanings[path]})", field.words, _value(field.default)] for path, field in fields_of(kind).items())
        parts += [f"## {name}.toml", table("Field, Type, Default", rows)]
    return "\n\n".join(parts)


def _value(default: Any) -> str:
    """Return a default as it is written in a file."""
    if isinstance(default, Size):
        unit, power = next((unit, power) for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("", 0)) if default % 2**power == 0)
        return code(f"{default >> power}{unit}")
    return "required" if default is NODEFAULT else code("{}" if isinstance(default, msgspec.Struct) else json.dumps(default))


def messages() -> str:
    """What the data of each message has."""
    contract = yaml.load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    return "\n\n".join([
        "# Messages", contract["info"]["description"], "By topics, and when each is sent: [topics](../fleet.md#topics). "
        "For machines: [asyncapi.yaml](../asyncapi.yaml).", *objects(contract["components"]["schemas"]),
    ])  # fmt: skip


def requests() -> str:
    """Every route with its parameters, what it takes and what it answers."""
    contract = yaml.load((DOCS / "openapi.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    parts = [
        "# HTTP",
        "What each route takes and answers. How to ask, scopes, errors: [the API](../api.md). For machines: "
        "[openapi.yaml](../openapi.yaml).",
    ]
    for path, operations in contract["paths"].items():
        for method, operation in operations.items():
            answers = [
                content
                for status, answer in operation["responses"].items()
                if status < "300"
                for content in answer.get("content", {}).items()
            ]
            takes = operation.get("requestBody", {}).get("content", {}).items()
            parts += [f"## {method.upper()} {path}", f"{operation.get('summary', '')} {operation.get('description', '')}"]
            parts.append(table("Parameter, In, Type, Meaning", (
                (code(p["name"]), p["in"], words(p["schema"]), p.get("description", "")) for p in operation.get("parameters", ())
            )))  # fmt: skip
            parts += [
                f"{said} {code(kind)}: {words(body.get('schema', {}))}"
                for said, bodies in (("Takes", takes), ("Answers", answers))
                for kind, body in bodies
            ]
    return "\n\n".join([*parts, "## Objects", *objects(contract["components"]["schemas"], "###")])


# metrics and codes


def metrics() -> str:
    """What a scrape of a coordinator has: of one that has counted one of everything."""
    counted = Metrics()
    counted.watch(lambda: Standing({"ready": 1}, {("ended", "succeeded"): 1}, 0, 0, 0, 0, True, {"completed": 1}, 0))
    counted.ended(JobResult(None, "succeeded", seconds=1.0, peak_bytes=1, energy_j=1.0))
    counted.received.labels("job").inc()
    counted.requests.labels("GET", "/v1/nodes", "200").inc()
    rows = []
    for family in text_string_to_metric_families(counted.text().decode()):
        names = sorted({s.name for s in family.samples if not s.name.endswith("_created")})
        labels = sorted({label for s in family.samples for label in s.labels} - {"le"})
        bounds = dict.fromkeys(s.labels["le"] for s in family.samples if "le" in s.labels)
        if names:
            rows.append([", ".join(map(code, names)), family.type, ", ".join(map(code, labels)), ", ".join(bounds), family.documentation])
    return "\n\n".join([
        "# Metrics", "What `GET /metrics` of a coordinator answers. How to scrape it, what each means: [the API](../api.md#metrics).",
        table("Sample, Type, Labels, Buckets, Help", rows),
    ])  # fmt: skip


def codes() -> str:
    """Every stable code: where it may be told, and what it says."""
    classes: list[type[EdgeAgentError]] = [EdgeAgentError]
    for kind in classes:
        classes += kind.__subclasses__()
    here, there, causes = anchors("errors.md", "[a-z_]+"), anchors("fleet.md", "[a-z_]+"), _causes()
    rows = []
    for name in sorted({kind.code for kind in classes} | set(get_args(Reason))):
        told = [kind for kind in classes if kind.code == name and "code" not in getattr(kind.__init__, "__annotations__", ())]
        exits = ", ".join(sorted({str(kind.exit_code) for kind in told}))
        more = [f"[cause]({causes[name]})", f"[errors]({here[name]})" if name in here else ""]
        more.append(f"[reasons]({there[name]})" if name in get_args(Reason) else "")
        says = " ".join(dict.fromkeys((kind.__doc__ or "").partition("\n")[0] for kind in told))
        rows.append([code(name), exits or "1", "yes" if name in get_args(Reason) else "no", says, " ".join(filter(None, more))])
    return "\n\n".join([
        "# Codes", "Every stable code: the exit code of a command that ends with it, and whether a job on a node can end or wait with it. "
        "What to do about each: [troubleshooting](../troubleshooting.md).", table("Code, Exit code, Of a job, Says, More", rows),
    ])  # fmt: skip


def _causes() -> dict[str, str]:
    """Return where troubleshooting.md speaks of each code: below the heading that names it, else where it comes first."""
    heading, found = "", {}
    lines = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    for line in lines:
        heading = slug(line.removeprefix("## ")) if line.startswith("## ") else heading
        for name in re.findall(r"`([a-z_]+)`", line):
            if line.startswith("## ") or name not in found:
                found[name] = f"../troubleshooting.md#{heading}"
    return found


PAGES = {
    "commands": commands, "configuration": configuration, "messages": messages, "http": requests, "metrics": metrics, "codes": codes,
}  # fmt: skip
